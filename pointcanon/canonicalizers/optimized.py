"""Ordinary networks that choose and refine among exactly equivariant candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.manhattan import Manhattan, surface_normals
from pointcanon.canonicalizers.pca import PCA
from pointcanon.canonicalizers.union import Union
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.layers.critical_max import CriticalMax, learning_dtype
from pointcanon.layers.group_conv import GroupConv
from pointcanon.rotations import gram_schmidt

__all__ = ["Optimized", "OrbitNet", "PoseNet"]

NEIGHBOURS = 10
"""Through which a plane is laid where normals are estimated."""

NEVER = -1e4
"""Log-odds of a candidate that is there for the comparison only."""

SCORER_LESSONS, REFINER_LESSONS = 24, 4
"""Candidates of a cloud from which the networks learn in a step, on average."""


Part: TypeAlias = tuple[Tensor, Tensor | None]
"""Some points of each cloud ``(B, M, C)``, and which of them are real."""


class PoseNet(nn.Module):
    """A small PointNet that looks at posed clouds: shared layers, a maximum, a dense head.

    Args:
        widths: Of the shared per-point layers, at least two.
        outputs: Of the dense head, whose hidden layer is as wide as the last shared one.

    Raises:
        InputError: On fewer than two widths, or one below 1.
    """

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.features = CriticalMax(widths)
        self.head = nn.Sequential(
            nn.LayerNorm(widths[-1]),
            nn.Linear(widths[-1], widths[-1]),
            nn.ReLU(),
            nn.Linear(widths[-1], outputs),
        )

    def forward(
        self, points: Tensor, mask: Tensor | None = None, lessons: int | None = None
    ) -> Tensor:
        """``(M, N, 3)`` posed clouds to ``(M, outputs)``; ``lessons`` of them teach, None: all."""
        answer: Tensor = self.head(self.features(points, mask, lessons))
        return answer


class OrbitNet(nn.Module):
    """Scores of the poses of an orbit, each seen together with all the others.

    Alone, a pose must be recognised as right. Beside the other poses of the same cloud it need only
    be more so than they are, and what is seen in each (flat below, alike left and right) is
    evidence for or against every other. A small PointNet looks at each pose; two convolutions over
    the group let every pose see all of them *from where it stands*, so that the score is still one
    function of the posed cloud and the whole is as equivariant as with a network that looks at each
    alone, at no more looks.

    Args:
        group: ``(G, 3, 3)``. Clouds come in runs of G: in the poses ``R g``, in the order of g.
        widths: Of the shared per-point layers, at least two.
        hidden: Features of each pose once it has seen the others.
        mixed: Of these, mixed down, the second convolution sees so many.

    Raises:
        InputError: On fewer than two widths, a number below 1, or matrices that are no group.
    """

    def __init__(
        self, group: Tensor, widths: Sequence[int], hidden: int = 256, mixed: int = 64
    ) -> None:
        super().__init__()
        if min(hidden, mixed) < 1:
            raise InputError(f"hidden is {hidden}, mixed {mixed}; choose at least 1")
        self.size = len(group)
        self.features = CriticalMax(widths, inputs=9)
        self.normed = nn.LayerNorm(widths[-1])
        self.first = GroupConv(group, widths[-1], hidden)
        self.first_normed = nn.LayerNorm(hidden)
        self.mix = nn.Linear(hidden, mixed)
        self.second = GroupConv(group, mixed, hidden)
        self.second_normed = nn.LayerNorm(hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(
        self, points: Tensor, mask: Tensor | None = None, lessons: int | None = None
    ) -> Tensor:
        """``(M, N, 9)`` posed points and normals to ``(M, 1)``; ``lessons`` teach, None: all."""
        features = self.features(points, mask, lessons)
        dtype = learning_dtype(self, features)
        with torch.autocast(points.device.type, dtype=dtype, enabled=dtype != points.dtype):
            orbit = self.normed(features).unflatten(0, (-1, self.size))
            orbit = self.first_normed(self.first(orbit).relu())
            orbit = self.second_normed(orbit + self.second(self.mix(orbit)).relu())
        answer: Tensor = self.score(orbit.to(points.dtype)).flatten(0, 1)
        return answer


class Optimized(Canonicalizer):
    """Score the poses a coarse frame proposes, look at the best more closely, mend them.

    The proposals are exactly equivariant, so each posed cloud is invariant, and whatever an
    ordinary network says of it is invariant too: the whole stays exactly equivariant on generic
    clouds. This is optimised canonicalization (Panigrahi & Mondal, arXiv 2405.14089) with its group
    replaced by the candidates of coarse frames, which carries it to continuous rotations.

    A small scorer compares all candidates of an orbit (``OrbitNet``): it sees points and, as
    their products with themselves, which have no sign, the normals of the surface. A refiner
    looks ``steps`` times at the ``keep`` best. It answers with a residual rotation (two columns,
    Gram-Schmidt) and with two scores, for the pose as it is and for the mended one, so that a pose
    that is exact already can stay. Scores add up from look to look.

    Normals are estimated where none are given, and the proposals are given them too.

    Args:
        proposal: Equivariant candidates; the default is ``Union([Manhattan(), PCA(24)])``.
        keep: Candidates that the refiner looks at.
        steps: Times it looks at each.
        answers: Candidates that are returned, heaviest first.
        scorer_widths: Of the shared layers of the scorer, at least two.
        scorer_hidden: Features of each candidate once the scorer has compared it with the others.
        refiner_widths: Of the shared layers of the refiner, at least two.
        scorer_points: Points of each cloud that the scorer sees, None for all: random ones in
            training, in evaluation points spread evenly over the distances from the centre.
        looks: In evaluation, parts of the cloud that the scorer sees one after the other; the mean
            of its scores counts. Each costs as much as the first.
        gate: Log-odds that a cloud arrives in its canonical pose already, against any one of the
            proposals; None gives that pose no chance of its own. With a gate the frames are no
            longer exactly equivariant, as it looks at the pose in which the cloud arrived.
        refiner_points: Points of each cloud that the refiner sees, in the same way.

    Raises:
        InputError: On a number that is too small.
    """

    def __init__(
        self,
        proposal: Canonicalizer | None = None,
        keep: int = 6,
        steps: int = 1,
        answers: int = 3,
        scorer_widths: Sequence[int] = (64, 128),
        scorer_hidden: int = 256,
        refiner_widths: Sequence[int] = (64, 128, 256),
        scorer_points: int | None = 256,
        looks: int = 1,
        gate: float | None = None,
        refiner_points: int | None = 256,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("keep", keep, 1),
            ("steps", steps, 0),
            ("answers", answers, 1),
            ("scorer_points", scorer_points, 1),
            ("looks", looks, 1),
            ("refiner_points", refiner_points, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose at least {least}")
        self.proposal = Union([Manhattan(), PCA(24)]) if proposal is None else proposal
        self.keep, self.steps, self.answers = keep, steps, answers
        self.scorer_points, self.looks, self.gate = scorer_points, looks, gate
        self.refiner_points = refiner_points
        self.scorer_widths, self.scorer_hidden = tuple(scorer_widths), scorer_hidden
        self.refiner_widths = tuple(refiner_widths)
        self.scorer = OrbitNet(self.proposal.candidate_group, scorer_widths, scorer_hidden)
        self.refiner = PoseNet(refiner_widths, outputs=8)
        for weight in self.refiner.head[-1].parameters():
            nn.init.zeros_(weight)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "proposal": self.proposal,
            "keep": self.keep,
            "steps": self.steps,
            "answers": self.answers,
            "scorer_widths": self.scorer_widths,
            "scorer_hidden": self.scorer_hidden,
            "refiner_widths": self.refiner_widths,
            "scorer_points": self.scorer_points,
            "looks": self.looks,
            "gate": self.gate,
            "refiner_points": self.refiner_points,
        }

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        unit = clouds.unit_scale(points, mask)
        if normals is None:
            normals = surface_normals(unit, NEIGHBOURS, mask)
        proposals = self.proposal.propose(points, mask, normals)
        if self.gate is not None:
            proposals = _with_the_pose_as_received(
                proposals, self.proposal.candidate_group, self.gate
            )
        surface = torch.cat((unit, _halved(normals)), dim=-1)
        frames = self._score(proposals, self._parts(surface, mask, self.scorer_points, self.looks))
        stages = [frames]
        for _ in range(self.steps):
            frames = self._mend(frames, *self._parts(unit, mask, self.refiner_points)[0])
            stages.append(frames)
        return replace(frames.best(self.answers), stages=tuple(stages))

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        """One look of the refiner from any frames of clouds ``(B, N, 3)``: mended poses, weighed.

        The frames' own centre is kept, their weights are replaced.
        """
        unit = clouds.unit_scale(points - frames.centre[:, None], mask)
        with torch.autocast(points.device.type, enabled=False):
            part, kept = self._parts(unit, mask, self.refiner_points)[0]
            answer = self._look(self.refiner, frames.apply_vectors(part), kept)
            weights = answer[..., 1].log_softmax(dim=1)
            return replace(_turned(frames, answer), log_weights=weights, raw=None, stages=())

    def _score(self, proposals: Frames, parts: Sequence[Part]) -> Frames:
        """The proposals weighed by the mean score of the given parts of each surface."""
        scores = torch.zeros_like(proposals.log_weights)
        for surface, mask in parts:
            lessons = SCORER_LESSONS * len(surface)
            posed = _surface_features(proposals, surface)
            scores = scores + self._look(self.scorer, posed, mask, lessons)[..., 0] / len(parts)
        return Frames.of(
            proposals.rotations,
            proposals.log_weights + scores,
            degenerate=proposals.degenerate,
        )

    def _mend(self, frames: Frames, unit: Tensor, mask: Tensor | None) -> Frames:
        """The kept frames as they are and as the refiner mends them, ``2 * keep`` of them."""
        frames = frames.select(self._kept(frames))
        posed = frames.apply_vectors(unit)
        answer = self._look(self.refiner, posed, mask, REFINER_LESSONS * len(unit))
        # each look is taught by its own loss: no gradient runs through those before it
        weights = frames.log_weights.detach()[..., None] + answer[..., :2]
        return Frames.of(
            torch.cat((frames.rotations.detach(), _turned(frames, answer).rotations), dim=1),
            weights.transpose(1, 2).flatten(1),
            degenerate=frames.degenerate,
        )

    def _kept(self, scored: Frames) -> Tensor:
        logits = scored.log_weights.detach()
        if self.training:
            # Gumbel noise: a sample without replacement, so that unlikely candidates are seen too
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.topk(min(self.keep, scored.count), dim=1).indices

    def _parts(
        self, points: Tensor, mask: Tensor | None, count: int | None, looks: int = 1
    ) -> list[Part]:
        """What a network sees of each cloud: while it learns something else every time."""
        if self.training:
            return [_random_part(points, mask, count)]
        return _spread_parts(points, mask, count, looks)

    @staticmethod
    def _look(
        network: OrbitNet | PoseNet,
        posed: Tensor,
        mask: Tensor | None,
        lessons: int | None = None,
    ) -> Tensor:
        """What a network says of clouds in K poses ``(B, K, N, C)``, ``(B, K, outputs)``."""
        batch, count = posed.shape[:2]
        if mask is not None:
            mask = mask.repeat_interleave(count, dim=0)
        answer: Tensor = network(posed.detach().flatten(0, 1), mask, lessons)
        return answer.unflatten(0, (batch, count))


def _with_the_pose_as_received(proposals: Frames, group: Tensor, log_odds: float) -> Frames:
    """Proposals and the orbit of the identity, whose other elements have next to no weight."""
    received = proposals.rotations.new_full((len(proposals.rotations), len(group)), NEVER)
    received[:, 0] = log_odds
    orbit = group.to(received).expand(len(received), -1, -1, -1)
    mean = proposals.log_weights.logsumexp(dim=1, keepdim=True) - math.log(proposals.count)
    return Frames.of(
        torch.cat((proposals.rotations, orbit), dim=1),
        torch.cat((proposals.log_weights, mean + received), dim=1),
        degenerate=proposals.degenerate,
    )


def _halved(normals: Tensor) -> Tensor:
    """Vectors as long as the square root, so that their products are as large as they were long."""
    tiny = torch.finfo(normals.dtype).tiny
    return normals / normals.norm(dim=-1, keepdim=True).clamp_min(tiny).sqrt()


def _surface_features(frames: Frames, surface: Tensor) -> Tensor:
    """Points and normals ``(B, N, 6)`` in each pose: x and ``n n^T``, ``(B, K, N, 9)``."""
    points, normals = (frames.apply_vectors(vectors) for vectors in surface.split(3, dim=-1))
    return torch.cat((points, normals.square(), normals * normals.roll(1, dims=-1)), dim=-1)


def _turned(frames: Frames, answer: Tensor) -> Frames:
    """Frames turned by the residual rotations in the last six numbers of ``answer``."""
    residual = gram_schmidt(_near_identity(answer[..., -6:]))
    return replace(frames, rotations=frames.rotations.detach() @ residual)


def _near_identity(answer: Tensor) -> Tensor:
    """Six numbers as two columns ``(..., 3, 2)``; zeros mean no rotation."""
    eye = torch.eye(3, 2, dtype=answer.dtype, device=answer.device)
    return eye + answer.unflatten(-1, (3, 2))


def _random_part(points: Tensor, mask: Tensor | None, count: int | None) -> Part:
    """``count`` points ``(B, count, C)`` and their mask, padding only where there are fewer."""
    if count is None or count >= points.shape[1]:
        return points, mask
    order = torch.rand(points.shape[:2], device=points.device)
    if mask is not None:
        order = order + (~mask).to(order.dtype)  # padding last
    index = order.topk(count, dim=1, largest=False).indices
    return _pick(points, index), None if mask is None else mask.gather(1, index)


def _spread_parts(points: Tensor, mask: Tensor | None, count: int | None, parts: int) -> list[Part]:
    """Parts of ``count`` real points, whatever their order: every so many by their radius.

    Together they use all points, as far as they go; where there are fewer, points repeat, which no
    maximum minds.
    """
    if count is None or count >= points.shape[1]:
        return [(points, mask)]
    radius = points[..., :3].norm(dim=-1)
    real = torch.full_like(radius[:, :1], points.shape[1])
    if mask is not None:
        radius = torch.where(mask, radius, radius.new_tensor(torch.inf))
        real = mask.sum(dim=1, keepdim=True).to(radius.dtype)
    rank = (torch.arange(count * parts, device=points.device) + 0.5) * real / (count * parts)
    order = radius.argsort(dim=1).gather(1, rank.long())
    return [(_pick(points, order[:, part::parts]), None) for part in range(parts)]


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Points ``index (B, M)`` of clouds ``(B, N, C)``."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[2]))
