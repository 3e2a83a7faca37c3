"""Ordinary networks that choose and refine among exactly equivariant candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.pca import PCA
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.rotations import gram_schmidt

__all__ = ["Optimized", "PoseNet"]

TILE = 1 << 18
"""Activations held at once while looking for maxima; a megabyte in float32 stays in cache."""


class PoseNet(nn.Module):
    """A small PointNet that looks at a posed cloud: shared layers, a maximum, a dense head.

    A maximum has a gradient only at the points that attain it, so the network looks at all points
    without recording anything, in tiles that stay in cache, and then once more at the critical
    ones alone: same values and gradients, at a memory and backward cost that do not grow with N.

    No normalisation depends on the batch: the same network sees candidate poses of very different
    distributions, and one set of running statistics could not serve them all.

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

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(M, N, 3)`` posed clouds to ``(M, outputs)``."""
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            values, critical = self._maximum(points, mask, locate=learning)
        if critical is not None:
            index = critical[..., None].expand(-1, -1, 3)
            features = self.shared(points.gather(1, index))
            values = (features * self.peak.weight).sum(dim=-1) + self.peak.bias
        # the activation is monotone, so it follows the maximum, on one row instead of N
        return self.head(values.relu())

    def _maximum(
        self, points: Tensor, mask: Tensor | None, locate: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Largest value of each channel ``(M, C)`` and the point that attains it ``(M, C)``."""
        rows = max(1, TILE // (points.shape[1] * self.peak.out_features))
        values, critical = [], []
        for start in range(0, max(1, len(points)), rows):
            tile = slice(start, start + rows)
            features = self.peak(self.shared(points[tile]))
            if mask is not None:
                features = features.masked_fill(~mask[tile, :, None], -torch.inf)
            if locate:
                largest = features.max(dim=1)
                values.append(largest.values)
                critical.append(largest.indices)
            else:  # several times as fast
                values.append(features.amax(dim=1))
        return torch.cat(values), torch.cat(critical) if locate else None


class Optimized(Canonicalizer):
    """Score the poses a coarse frame proposes, keep the best, refine them.

    The proposals are exactly equivariant, so each posed cloud is invariant, and whatever an
    ordinary network says of it is invariant too: the whole stays exactly equivariant on generic
    clouds. This is optimised canonicalization (Panigrahi & Mondal, arXiv 2405.14089) with its group
    replaced by the candidates of a coarse frame, which carries it to continuous rotations.

    A scorer gives every candidate an energy. A refiner looks at the kept ones ``steps`` times; each
    time it answers with a residual rotation (two columns, Gram-Schmidt) and a new score.

    Args:
        proposal: Equivariant candidates; the default is ``PCA(24)``.
        keep: Candidates that are refined and returned, heaviest first.
        steps: Times the refiner looks at each.
        scorer_widths: Of the shared layers of the scorer, at least two.
        refiner_widths: Of the shared layers of the refiner, at least two.
        train_points: Random points of each cloud seen in training; None for all.

    Raises:
        InputError: On a number that is too small.
    """

    def __init__(
        self,
        proposal: Canonicalizer | None = None,
        keep: int = 4,
        steps: int = 3,
        scorer_widths: Sequence[int] = (32, 64, 128),
        refiner_widths: Sequence[int] = (64, 128, 256),
        train_points: int | None = 256,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("keep", keep, 1),
            ("steps", steps, 0),
            ("train_points", train_points, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose at least {least}")
        self.proposal = PCA(24) if proposal is None else proposal
        self.keep, self.steps, self.train_points = keep, steps, train_points
        self.scorer_widths, self.refiner_widths = tuple(scorer_widths), tuple(refiner_widths)
        self.scorer = PoseNet(scorer_widths, outputs=1)
        self.refiner = PoseNet(refiner_widths, outputs=7)
        for weight in self.refiner.head[-1].parameters():
            nn.init.zeros_(weight)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "proposal": self.proposal,
            "keep": self.keep,
            "steps": self.steps,
            "scorer_widths": self.scorer_widths,
            "refiner_widths": self.refiner_widths,
            "train_points": self.train_points,
        }

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        if self.training and self.train_points is not None:
            index = _random_index(points, mask, self.train_points)
            points, mask, normals = _pick(points, index), _pick(mask, index), _pick(normals, index)
        proposals = self.proposal.propose(points, mask, normals)
        unit = clouds.unit_scale(points, mask)
        scores = proposals.log_weights + self._look(self.scorer, proposals, unit, mask)[..., 0]
        scored = Frames.of(proposals.rotations, scores, degenerate=proposals.degenerate)
        stages = [scored]
        frames = scored.select(self._kept(scored))
        for _ in range(self.steps):
            frames = self._refine_once(unit, frames, mask)
            stages.append(frames)
        return replace(frames.best(frames.count), stages=tuple(stages))

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        """One step of the refiner from any frames of clouds ``(B, N, 3)``: nearer poses, weighed.

        The frames' own centre is kept, their weights are replaced.
        """
        centred = points - frames.centre[:, None]
        if self.training and self.train_points is not None:
            index = _random_index(centred, mask, self.train_points)
            centred, mask = _pick(centred, index), _pick(mask, index)
        with torch.autocast(points.device.type, enabled=False):
            return self._refine_once(clouds.unit_scale(centred, mask), frames, mask)

    def _refine_once(self, unit: Tensor, frames: Frames, mask: Tensor | None) -> Frames:
        answer = self._look(self.refiner, frames, unit, mask)
        residual = gram_schmidt(_near_identity(answer[..., 1:]))
        # each step is taught by its own loss: no gradient runs through the poses before it
        turned = frames.rotations.detach() @ residual
        weights = answer[..., 0].log_softmax(dim=1)
        return replace(frames, rotations=turned, log_weights=weights, raw=None, stages=())

    def _kept(self, scored: Frames) -> Tensor:
        logits = scored.log_weights.detach()
        if self.training:
            # Gumbel noise: a sample without replacement, so that unlikely candidates are seen too
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.topk(min(self.keep, scored.count), dim=1).indices

    @staticmethod
    def _look(network: nn.Module, frames: Frames, points: Tensor, mask: Tensor | None) -> Tensor:
        posed = frames.apply_vectors(points).detach().flatten(0, 1)
        if mask is not None:
            mask = mask.repeat_interleave(frames.count, dim=0)
        return network(posed, mask).unflatten(0, (-1, frames.count))


def _near_identity(answer: Tensor) -> Tensor:
    """Six numbers as two columns ``(..., 3, 2)``; zeros mean no rotation."""
    eye = torch.eye(3, 2, dtype=answer.dtype, device=answer.device)
    return eye + answer.unflatten(-1, (3, 2))


def _random_index(points: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Which points of each cloud to keep ``(B, min(count, N))``, padding only if it must."""
    order = torch.rand(points.shape[:2], device=points.device)
    if mask is not None:
        order = order + (~mask).to(order.dtype)  # padding last
    return order.topk(min(count, points.shape[1]), dim=1, largest=False).indices


@overload
def _pick(values: Tensor, index: Tensor) -> Tensor: ...
@overload
def _pick(values: None, index: Tensor) -> None: ...
def _pick(values: Tensor | None, index: Tensor) -> Tensor | None:
    """Entries ``index (B, M)`` of ``values (B, N)`` or ``(B, N, 3)``."""
    if values is None:
        return None
    return values[torch.arange(len(index), device=index.device)[:, None], index]
