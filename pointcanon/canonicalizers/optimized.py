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
from pointcanon.canonicalizers.manhattan import Manhattan
from pointcanon.canonicalizers.pca import PCA
from pointcanon.canonicalizers.union import Union
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.layers.critical_max import CriticalMax, learning_precision
from pointcanon.layers.group_conv import GroupConv
from pointcanon.layers.local_moments import SCALES, local_moments
from pointcanon.layers.shared_batch import Dropout, SharesBatch
from pointcanon.portable import exporting
from pointcanon.rotations import gram_schmidt

__all__ = ["Optimized", "OrbitNet", "PoseNet"]

NEIGHBOURS = 1024
"""Points of each cloud that count as neighbours: as many as describe its surface well."""

VECTORS, TENSORS = 1 + len(SCALES), len(SCALES)
"""What the networks are told of each point: where it is, and moments at each scale."""

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
        vectors: Given of each point.
        tensors: Given of each point, as in ``layers.posed_linear``.

    Raises:
        InputError: On fewer than two widths, or one below 1.
    """

    def __init__(
        self, widths: Sequence[int], outputs: int, vectors: int = 1, tensors: int = 0
    ) -> None:
        super().__init__()
        self.features = CriticalMax(widths, vectors, tensors)
        self.head = nn.Sequential(
            nn.LayerNorm(widths[-1]),
            nn.Linear(widths[-1], widths[-1]),
            nn.ReLU(),
            nn.Linear(widths[-1], outputs),
        )

    def forward(
        self,
        points: Tensor,
        rotations: Tensor,
        mask: Tensor | None = None,
        lessons: int | None = None,
    ) -> Tensor:
        """``(B, K, outputs)`` of clouds in K poses each; arguments as of ``CriticalMax``."""
        answer: Tensor = self.head(self.features(points, rotations, mask, lessons))
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
        group: ``(G, 3, 3)``. Poses come in runs of G: ``R g``, in the order of g.
        widths: Of the shared per-point layers, at least two.
        hidden: Features of each pose once it has seen the others.
        mixed: Of these, mixed down, the second convolution sees so many.
        vectors: Given of each point.
        tensors: Given of each point, as in ``layers.posed_linear``.
        classes: To be told apart besides; None for none.
        dropout: Of the features of each pose before they are scored.
        class_dropout: Before both layers that tell the classes.

    Raises:
        InputError: On fewer than two widths, a number below 1, or matrices that are no group.
    """

    def __init__(
        self,
        group: Tensor,
        widths: Sequence[int],
        hidden: int = 256,
        mixed: int = 64,
        vectors: int = 1,
        tensors: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        class_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(hidden, mixed) < 1:
            raise InputError(f"hidden is {hidden}, mixed {mixed}; choose at least 1")
        self.size = len(group)
        self.features = CriticalMax(widths, vectors, tensors)
        self.normed = nn.LayerNorm(widths[-1])
        self.first = GroupConv(group, widths[-1], hidden)
        self.first_normed = nn.LayerNorm(hidden)
        self.mix = nn.Linear(hidden, mixed)
        self.second = GroupConv(group, mixed, hidden)
        self.second_normed = nn.LayerNorm(hidden)
        self.drop, self.class_drop = Dropout(dropout), Dropout(class_dropout)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.recognise = None
        if classes is not None:
            self.recognise = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
            )

    def forward(
        self,
        points: Tensor,
        rotations: Tensor,
        mask: Tensor | None = None,
        lessons: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores ``(B, K)`` of clouds in K poses each, and logits of their classes ``(B, C)``.

        Arguments are those of ``CriticalMax``.
        """
        return self.compared(self.features(points, rotations, mask, lessons))

    def compared(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of the features ``(B, K, C)`` of each pose.

        The classes are told by the most that any pose shows of each feature; there are none where
        none are to be told apart.
        """
        with learning_precision(self, features):
            orbit = self.normed(features).unflatten(1, (-1, self.size))
            orbit = self.first_normed(self.first(orbit).relu())
            orbit = self.second_normed(orbit + self.second(self.mix(orbit)).relu())
        orbit = orbit.to(features.dtype).flatten(1, 2)
        recognised = None if self.recognise is None else self._recognised(orbit.amax(dim=1))
        return self.score(self.drop(orbit))[..., 0], recognised

    def _recognised(self, features: Tensor) -> Tensor:
        assert self.recognise is not None
        hidden, rectify, told = self.recognise  # dropout among them would rename their weights
        features = rectify(hidden(self.class_drop(features)))
        logits: Tensor = told(self.class_drop(features))
        return logits


class Optimized(SharesBatch, Canonicalizer):
    """Score the poses a coarse frame proposes, look at the best more closely, mend them.

    The proposals are exactly equivariant, so each posed cloud is invariant, and whatever an
    ordinary network says of it is invariant too: the whole stays exactly equivariant on generic
    clouds. This is optimised canonicalization (Panigrahi & Mondal, arXiv 2405.14089) with its group
    replaced by the candidates of coarse frames, which carries it to continuous rotations.

    A small scorer compares all candidates of an orbit (``OrbitNet``). A refiner looks ``steps``
    times at the ``keep`` best. It answers with a residual rotation (two columns, Gram-Schmidt) and
    with two scores, for the pose as it is and for the mended one, so that a pose that is exact
    already can stay. Scores add up from look to look. Both see some of the points and, of each of
    these, the mean and covariance of its neighbourhood at four scales (``local_moments``): where
    the surface faces, how it bends, and where it ends.

    The proposals alone look at normals.

    Args:
        proposal: Equivariant candidates; the default is ``Union([Manhattan(), PCA(24)])``.
        keep: Candidates that the refiner looks at.
        steps: Times it looks at each.
        answers: Candidates that are returned, heaviest first.
        scorer_widths: Of the shared layers of the scorer, at least two.
        scorer_hidden: Features of each candidate once the scorer has compared it with the others.
        refiner_widths: Of the shared layers of the refiner, at least two.
        points: Of each cloud that the networks see, None for all: random ones in training, in
            evaluation points spread evenly over the distances from the centre.
        looks: In evaluation, parts of so many points that the scorer sees one after the other; the
            mean of the features it finds counts. Each costs nearly as much as the first.
        gate: Log-odds that a cloud arrives in its canonical pose already, against any one of the
            proposals; None gives that pose no chance of its own. With a gate the frames are no
            longer exactly equivariant, as it looks at the pose in which the cloud arrived.
        classes: How many classes the scorer learns to tell apart besides (``Frames.class_logits``):
            knowing what a thing is helps to see how it stands. None learns poses alone.
        dropout: Share of the scorer's features of a pose that are left out in training.
        class_dropout: The same of those by which it tells the classes.
        negligible: Of the answers, those that weigh less than this share of the heaviest one get no
            weight at all, and a ``Canonicalized`` does not ask its predictor about them.

    Raises:
        InputError: On a number that is too small.
    """

    group: Tensor

    def __init__(
        self,
        proposal: Canonicalizer | None = None,
        keep: int = 6,
        steps: int = 1,
        answers: int = 3,
        scorer_widths: Sequence[int] = (64, 128),
        scorer_hidden: int = 256,
        refiner_widths: Sequence[int] = (64, 128, 256),
        points: int | None = 256,
        looks: int = 1,
        gate: float | None = None,
        negligible: float = 0.0,
        classes: int | None = None,
        dropout: float = 0.0,
        class_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("keep", keep, 1),
            ("steps", steps, 0),
            ("answers", answers, 1),
            ("points", points, 1),
            ("looks", looks, 1),
            ("classes", classes, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose at least {least}")
        for name, share in (
            ("negligible", negligible),
            ("dropout", dropout),
            ("class_dropout", class_dropout),
        ):
            if not 0 <= share < 1:
                raise InputError(f"{name} is {share}; choose a share in [0, 1)")
        self.proposal = Union([Manhattan(), PCA(24)]) if proposal is None else proposal
        self.keep, self.steps, self.answers = keep, steps, answers
        self.points, self.looks, self.gate, self.negligible = points, looks, gate, negligible
        self.scorer_widths, self.scorer_hidden = tuple(scorer_widths), scorer_hidden
        self.refiner_widths, self.classes = tuple(refiner_widths), classes
        self.dropout, self.class_dropout = dropout, class_dropout
        self.register_buffer("group", self.proposal.candidate_group, persistent=False)
        self.scorer = OrbitNet(
            self.group,
            scorer_widths,
            scorer_hidden,
            vectors=VECTORS,
            tensors=TENSORS,
            classes=classes,
            dropout=dropout,
            class_dropout=class_dropout,
        )
        self.refiner = PoseNet(refiner_widths, outputs=8, vectors=VECTORS, tensors=TENSORS)
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
            "points": self.points,
            "looks": self.looks,
            "gate": self.gate,
            "negligible": self.negligible,
            "classes": self.classes,
            "dropout": self.dropout,
            "class_dropout": self.class_dropout,
        }

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        proposals = self.proposal.propose(points, mask, normals)
        if self.gate is not None:
            proposals = _with_the_pose_as_received(proposals, self.group, self.gate)
        parts = self._parts(clouds.unit_scale(points, mask), mask, self.looks)
        frames = self._score(proposals, parts)
        stages = [frames]
        for _ in range(self.steps):
            frames = self._mend(frames, *parts[0])
            stages.append(frames)
        answers = frames.best(self.answers).without_negligible(self.negligible)
        degenerate = answers.degenerate | stages[0].contested
        return replace(answers, degenerate=degenerate, stages=tuple(stages))

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        """One look of the refiner from any frames of clouds ``(B, N, 3)``: mended poses, weighed.

        The frames' own centre is kept, their weights are replaced.
        """
        unit = clouds.unit_scale(points - frames.centre[:, None], mask)
        with torch.autocast(points.device.type, enabled=False):
            surface, kept = self._parts(unit, mask)[0]
            answer = self.refiner(surface, frames.rotations.detach(), kept)
            weights = answer[..., 1].log_softmax(dim=1)
            return replace(_turned(frames, answer), log_weights=weights, raw=None, stages=())

    def _score(self, proposals: Frames, parts: Sequence[Part]) -> Frames:
        """The proposals weighed by the scorer, after a look at each of the given parts."""
        poses = proposals.rotations.detach()
        lessons = SCORER_LESSONS * poses.shape[0]
        looks = [self.scorer.features(surface, poses, mask, lessons) for surface, mask in parts]
        scores, classes = self.scorer.compared(torch.stack(looks).mean(dim=0))
        return Frames.of(
            proposals.rotations,
            proposals.log_weights + scores,
            degenerate=proposals.degenerate,
            class_logits=classes,
        )

    def _mend(self, frames: Frames, surface: Tensor, mask: Tensor | None) -> Frames:
        """The kept frames as they are and as the refiner mends them, ``2 * keep`` of them."""
        frames = frames.select(self._kept(frames))
        lessons = REFINER_LESSONS * surface.shape[0]
        answer = self.refiner(surface, frames.rotations.detach(), mask, lessons)
        # each look is taught by its own loss: no gradient runs through those before it
        weights = frames.log_weights.detach()[..., None] + answer[..., :2]
        return Frames.of(
            torch.cat((frames.rotations.detach(), _turned(frames, answer).rotations), dim=1),
            weights.transpose(1, 2).flatten(1),
            degenerate=frames.degenerate,
            class_logits=frames.class_logits,
        )

    def _kept(self, scored: Frames) -> Tensor:
        logits = scored.log_weights.detach()
        if self.training:
            # Gumbel noise: a sample without replacement, so that unlikely candidates are seen too
            noise = self.drawn(lambda clouds: _exponential(logits, clouds), len(logits))
            logits = logits - noise.log()
        return logits.topk(min(self.keep, scored.count), dim=1).indices

    def _parts(self, unit: Tensor, mask: Tensor | None, looks: int = 1) -> list[Part]:
        """What the networks see of each cloud: while they learn something else every time."""
        if self.training:
            parts = [self._random_part(unit, mask)]
        else:
            parts = _spread_parts(unit, mask, self.points, looks)
        cloud, real = _neighbours(unit, mask)
        return [(_surface(points, cloud, real), kept) for points, kept in parts]

    def _random_part(self, points: Tensor, mask: Tensor | None) -> Part:
        """``self.points`` points and their mask, padding only where there are fewer."""
        batch, size, _ = points.shape
        if self.points is None or self.points >= size:
            return points, mask
        order = self.drawn(lambda clouds: torch.rand(clouds, size, device=points.device), batch)
        if mask is not None:
            order = order + (~mask).to(order.dtype)  # padding last
        index = order.topk(self.points, dim=1, largest=False).indices
        return _pick(points, index), None if mask is None else mask.gather(1, index)


def _exponential(like: Tensor, rows: int) -> Tensor:
    return like.new_empty(rows, *like.shape[1:]).exponential_()


def _surface(points: Tensor, cloud: Tensor, mask: Tensor | None) -> Tensor:
    """``(B, M, VECTORS * 3 + TENSORS * 6)``: points and the moments of the cloud around them."""
    offsets, covariances = local_moments(points, cloud, mask)
    return torch.cat((points.detach(), offsets.flatten(2), covariances.flatten(2)), dim=-1)


def _with_the_pose_as_received(proposals: Frames, group: Tensor, log_odds: float) -> Frames:
    """Proposals and the orbit of the identity, whose other elements have next to no weight."""
    batch = proposals.rotations.shape[0]  # len() would close the size of a program
    received = proposals.rotations.new_full((batch, len(group)), NEVER)
    received[:, 0] = log_odds
    orbit = group.to(received).expand(batch, -1, -1, -1)
    mean = proposals.log_weights.logsumexp(dim=1, keepdim=True) - math.log(proposals.count)
    return Frames.of(
        torch.cat((proposals.rotations, orbit), dim=1),
        torch.cat((proposals.log_weights, mean + received), dim=1),
        degenerate=proposals.degenerate,
    )


def _turned(frames: Frames, answer: Tensor) -> Frames:
    """Frames turned by the residual rotations in the last six numbers of ``answer``."""
    residual = gram_schmidt(_near_identity(answer[..., -6:]))
    return replace(frames, rotations=frames.rotations.detach() @ residual)


def _near_identity(answer: Tensor) -> Tensor:
    """Six numbers as two columns ``(..., 3, 2)``; zeros mean no rotation."""
    eye = torch.eye(3, 2, dtype=answer.dtype, device=answer.device)
    return eye + answer.unflatten(-1, (3, 2))


def _spread_parts(
    points: Tensor, mask: Tensor | None, count: int | None, parts: int = 1
) -> list[Part]:
    """Parts of ``count`` real points; together they use all of them, as far as they go.

    Where there are fewer, points repeat, which no maximum minds.
    """
    if count is None or (not exporting() and count >= points.shape[1]):
        return [(points, mask)]
    index, _ = _spread(points, mask, count * parts)
    return [(_pick(points, index[:, part::parts]), None) for part in range(parts)]


def _neighbours(points: Tensor, mask: Tensor | None) -> Part:
    """At most ``NEIGHBOURS`` real points of each cloud, none of them twice."""
    if not exporting() and points.shape[1] <= NEIGHBOURS:
        return points, mask
    index, first = _spread(points, mask, NEIGHBOURS)
    return _pick(points, index), first


def _spread(points: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """``count`` real points, whatever their order: every so many by their radius.

    Returns:
        Indices ``(B, count)`` and, True where a point comes for the first time, ``(B, count)``.
    """
    radius = points.norm(dim=-1)
    real = torch.full_like(radius[:, :1], points.shape[1])
    if mask is not None:
        radius = torch.where(mask, radius, radius.new_tensor(torch.inf))
        real = mask.sum(dim=1, keepdim=True).to(radius.dtype)
    rank = ((torch.arange(count, device=points.device) + 0.5) * real / count).long()
    first = torch.cat((torch.ones_like(rank[:, :1]), rank.diff(dim=1)), dim=1) > 0
    return radius.argsort(dim=1).gather(1, rank), first


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Points ``index (B, M)`` of clouds ``(B, N, C)``."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[2]))
