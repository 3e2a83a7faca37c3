"""Ordinary networks that choose and refine among exactly equivariant candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointcanon import clouds
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.manhattan import Manhattan
from pointcanon.canonicalizers.pca import PCA
from pointcanon.canonicalizers.union import Union
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.rotations import gram_schmidt

__all__ = ["Optimized", "PoseNet"]

TILE = 1 << 18
"""Activations held at once while looking for maxima; a megabyte in float32 stays in cache."""


SCORER_LESSONS, REFINER_LESSONS = 8, 4
"""Candidates of a cloud from which the networks learn in a step, on average."""


class PoseNet(nn.Module):
    """A small PointNet that looks at posed clouds: shared layers, a maximum, a dense head.

    Many poses of each cloud are looked at and few of them teach anything, so learning is sparse:

    - A maximum has a gradient only at the points that attain it. The network looks at all points
      without recording anything, in tiles that stay in cache, and in the backward pass at the
      critical ones alone.
    - Of the M clouds only ``lessons`` are looked at in the backward pass, sampled in proportion to
      the norm of their gradient and weighted so that the gradient of the weights is unbiased.
    - While learning, the maxima are located in bfloat16 where the processor multiplies that fast.

    The points are taken as given: no gradient flows to them. No normalisation depends on the
    batch: the same network sees candidate poses of very different distributions, and one set of
    running statistics could not serve them all.

    Args:
        widths: Of the shared per-point layers, at least two.
        outputs: Of the dense head, whose hidden layer is as wide as the last shared one.

    Raises:
        InputError: On fewer than two widths, or one below 1.
    """

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"widths is {tuple(widths)}; give at least two, each at least 1")
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths[:-2]), widths[:-1], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.peak = nn.Linear(widths[-2], widths[-1])
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
        if not torch.is_grad_enabled():
            return self._answer(points, mask)
        return cast(Tensor, _SparseLesson.apply(self, points, mask, lessons, *self.parameters()))

    def _answer(self, points: Tensor, mask: Tensor | None) -> Tensor:
        """The answer with nothing recorded."""
        # the activation is monotone, so it follows the maximum, on one row instead of N
        largest = [features.amax(dim=1) for features in self._features(points, mask)]
        return self.head(torch.cat(largest).to(points.dtype).relu())

    def _recorded_answer(self, points: Tensor, mask: Tensor | None) -> Tensor:
        """The answer as a function of the critical points, recorded for a backward pass."""
        with torch.no_grad():
            critical = torch.cat([f.argmax(dim=1) for f in self._features(points, mask)])
        points = points.gather(1, critical[..., None].expand(-1, -1, 3))
        dtype = self._dtype(points)
        with torch.autocast(points.device.type, dtype=dtype, enabled=dtype != points.dtype):
            features = self.shared(points)
            values = (features * self.peak.weight.to(features)).sum(dim=-1, dtype=points.dtype)
        return self.head((values + self.peak.bias).relu())

    def _features(self, points: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Features of each point before the maximum ``(m, N, C)``, a tile of clouds at a time."""
        dtype = self._dtype(points)
        layers = [layer for layer in (*self.shared, self.peak) if isinstance(layer, nn.Linear)]
        weights = [(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in layers]
        rows = max(1, TILE // (points.shape[1] * self.peak.out_features))
        for start in range(0, max(1, len(points)), rows):
            tile = slice(start, start + rows)
            features = points[tile].to(dtype)
            for weight, bias in weights[:-1]:
                features = functional.linear(features, weight, bias).relu_()
            features = functional.linear(features, *weights[-1])
            if mask is not None:
                features = features.masked_fill(~mask[tile, :, None], -torch.inf)
            yield features

    def _dtype(self, points: Tensor) -> torch.dtype:
        """While learning, bfloat16 where the processor multiplies that several times as fast."""
        return torch.bfloat16 if self.training and _fast_bfloat16(points) else points.dtype


class _SparseLesson(torch.autograd.Function):
    """A look whose backward pass repeats it for a sample of the clouds only."""

    @staticmethod
    def forward(
        ctx: Any,
        network: PoseNet,
        points: Tensor,
        mask: Tensor | None,
        lessons: int | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.network, ctx.lessons = network, lessons
        ctx.save_for_backward(points, mask)
        return network._answer(points, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        points, mask = ctx.saved_tensors
        rows, scale = _sample_rows(gradient, ctx.lessons)
        parameters = list(ctx.network.parameters())
        with torch.enable_grad():
            answer = ctx.network._recorded_answer(
                points[rows], None if mask is None else mask[rows]
            )
            gradients = torch.autograd.grad(
                answer, parameters, gradient[rows] * scale[:, None], allow_unused=True
            )
        return None, None, None, None, *gradients


def _sample_rows(gradient: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """At most ``count`` rows, drawn in proportion to their norm, and their unbiased weights.

    Systematic sampling: one random offset, equal strides along the cumulated norms. A row that is
    hit several times comes back once, with its hits in its weight.
    """
    size = gradient.norm(dim=1).to(torch.float64)
    if count is None or count >= len(size):
        rows = size.nonzero()[:, 0]
        return rows, torch.ones_like(rows, dtype=gradient.dtype)
    total = size.sum()
    offset = torch.rand((), dtype=torch.float64, device=size.device)
    marks = (torch.arange(count, device=size.device) + offset) * (total / count)
    hit = torch.searchsorted(size.cumsum(0), marks).clamp_max(len(size) - 1)
    rows, hits = hit.unique(return_counts=True)
    scale = hits * total / (count * size[rows].clamp_min(torch.finfo(torch.float64).tiny))
    return rows, scale.to(gradient.dtype)


def _fast_bfloat16(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32:
        return False
    if tensor.is_cuda:
        return torch.cuda.is_bf16_supported()
    return tensor.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


class Optimized(Canonicalizer):
    """Score the poses a coarse frame proposes, look at the best more closely, mend them.

    The proposals are exactly equivariant, so each posed cloud is invariant, and whatever an
    ordinary network says of it is invariant too: the whole stays exactly equivariant on generic
    clouds. This is optimised canonicalization (Panigrahi & Mondal, arXiv 2405.14089) with its group
    replaced by the candidates of coarse frames, which carries it to continuous rotations.

    A small scorer looks at every candidate, a larger refiner ``steps`` times at the ``keep`` best.
    It answers with a residual rotation (two columns, Gram-Schmidt) and with two scores, for the
    pose as it is and for the mended one, so that a pose that is exact already can stay. Scores add
    up from look to look.

    Args:
        proposal: Equivariant candidates; the default is ``Union([Manhattan(), PCA(24)])``.
        keep: Candidates that the refiner looks at.
        steps: Times it looks at each.
        answers: Candidates that are returned, heaviest first.
        scorer_widths: Of the shared layers of the scorer, at least two.
        refiner_widths: Of the shared layers of the refiner, at least two.
        scorer_points: Points of each cloud that the scorer sees, None for all: random ones in
            training, in evaluation points spread evenly over the distances from the centre.
        refiner_points: Random points of each cloud that the refiner sees in training, None for
            all; in evaluation it sees all.

    Raises:
        InputError: On a number that is too small.
    """

    def __init__(
        self,
        proposal: Canonicalizer | None = None,
        keep: int = 8,
        steps: int = 1,
        answers: int = 3,
        scorer_widths: Sequence[int] = (32, 64, 128),
        refiner_widths: Sequence[int] = (64, 128, 512),
        scorer_points: int | None = 256,
        refiner_points: int | None = 512,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("keep", keep, 1),
            ("steps", steps, 0),
            ("answers", answers, 1),
            ("scorer_points", scorer_points, 1),
            ("refiner_points", refiner_points, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose at least {least}")
        self.proposal = Union([Manhattan(), PCA(24)]) if proposal is None else proposal
        self.keep, self.steps, self.answers = keep, steps, answers
        self.scorer_points, self.refiner_points = scorer_points, refiner_points
        self.scorer_widths, self.refiner_widths = tuple(scorer_widths), tuple(refiner_widths)
        self.scorer = PoseNet(scorer_widths, outputs=1)
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
            "refiner_widths": self.refiner_widths,
            "scorer_points": self.scorer_points,
            "refiner_points": self.refiner_points,
        }

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        proposals = self.proposal.propose(points, mask, normals)
        unit = clouds.unit_scale(points, mask)
        if self.training:
            frames = self._score(proposals, *_random_part(unit, mask, self.scorer_points))
        else:
            frames = self._score(proposals, *_spread_part(unit, mask, self.scorer_points))
        stages = [frames]
        for _ in range(self.steps):
            frames = self._mend(frames, *self._refined_part(unit, mask))
            stages.append(frames)
        return replace(frames.best(self.answers), stages=tuple(stages))

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        """One look of the refiner from any frames of clouds ``(B, N, 3)``: mended poses, weighed.

        The frames' own centre is kept, their weights are replaced.
        """
        unit = clouds.unit_scale(points - frames.centre[:, None], mask)
        with torch.autocast(points.device.type, enabled=False):
            answer = self._look(self.refiner, frames, *self._refined_part(unit, mask))
            weights = answer[..., 1].log_softmax(dim=1)
            return replace(_turned(frames, answer), log_weights=weights, raw=None, stages=())

    def _score(self, proposals: Frames, unit: Tensor, mask: Tensor | None) -> Frames:
        lessons = SCORER_LESSONS * len(unit)
        scores = self._look(self.scorer, proposals, unit, mask, lessons)[..., 0]
        return Frames.of(
            proposals.rotations,
            proposals.log_weights + scores,
            degenerate=proposals.degenerate,
        )

    def _mend(self, frames: Frames, unit: Tensor, mask: Tensor | None) -> Frames:
        """The kept frames as they are and as the refiner mends them, ``2 * keep`` of them."""
        frames = frames.select(self._kept(frames))
        answer = self._look(self.refiner, frames, unit, mask, REFINER_LESSONS * len(unit))
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

    def _refined_part(self, points: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _random_part(points, mask, self.refiner_points if self.training else None)

    @staticmethod
    def _look(
        network: PoseNet,
        frames: Frames,
        points: Tensor,
        mask: Tensor | None,
        lessons: int | None = None,
    ) -> Tensor:
        posed = frames.apply_vectors(points).detach().flatten(0, 1)
        if mask is not None:
            mask = mask.repeat_interleave(frames.count, dim=0)
        answer: Tensor = network(posed, mask, lessons)
        return answer.unflatten(0, (-1, frames.count))


def _turned(frames: Frames, answer: Tensor) -> Frames:
    """Frames turned by the residual rotations in the last six numbers of ``answer``."""
    residual = gram_schmidt(_near_identity(answer[..., -6:]))
    return replace(frames, rotations=frames.rotations.detach() @ residual)


def _near_identity(answer: Tensor) -> Tensor:
    """Six numbers as two columns ``(..., 3, 2)``; zeros mean no rotation."""
    eye = torch.eye(3, 2, dtype=answer.dtype, device=answer.device)
    return eye + answer.unflatten(-1, (3, 2))


def _random_part(
    points: Tensor, mask: Tensor | None, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """``count`` points of each cloud and their mask, padding only where there are fewer."""
    if count is None or count >= points.shape[1]:
        return points, mask
    order = torch.rand(points.shape[:2], device=points.device)
    if mask is not None:
        order = order + (~mask).to(order.dtype)  # padding last
    index = order.topk(count, dim=1, largest=False).indices
    return _pick(points, index), None if mask is None else mask.gather(1, index)


def _spread_part(
    points: Tensor, mask: Tensor | None, count: int | None
) -> tuple[Tensor, Tensor | None]:
    """``count`` real points of each cloud, whatever their order: every so many by their radius.

    Where there are fewer, points repeat, which no maximum minds.
    """
    if count is None or count >= points.shape[1]:
        return points, mask
    radius = points.norm(dim=-1)
    real = torch.full_like(radius[:, :1], points.shape[1])
    if mask is not None:
        radius = torch.where(mask, radius, radius.new_tensor(torch.inf))
        real = mask.sum(dim=1, keepdim=True).to(radius.dtype)
    rank = (torch.arange(count, device=points.device) + 0.5) * real / count
    return _pick(points, radius.argsort(dim=1).gather(1, rank.long())), None


def _pick(points: Tensor, index: Tensor) -> Tensor:
    """Points ``index (B, M)`` of clouds ``(B, N, 3)``."""
    return points.gather(1, index[..., None].expand(-1, -1, 3))
