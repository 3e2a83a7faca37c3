"""Shared layers over the points of clouds in many poses and a maximum, cheap to teach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pointcanon.errors import InputError
from pointcanon.layers.posed_linear import PosedLinear
from pointcanon.layers.shared_batch import SharesBatch
from pointcanon.layers.tiles import tiles
from pointcanon.portable import full_precision

__all__ = ["CriticalMax", "learning_precision"]


class CriticalMax(SharesBatch, nn.Module):
    """Shared layers over the points of a cloud, the maximum of each feature, and a ReLU.

    Many poses of each cloud are looked at and few of them teach much, so learning is sparse:

    - A maximum has a gradient only at the points that attain it, the critical points of Qi et al.
      (2017, arXiv 1612.00593). The module looks at all points without recording anything, in tiles
      that stay in cache, and in the backward pass at the critical ones alone.
    - Of all the poses only ``lessons`` are looked at in the backward pass, sampled in proportion to
      the norm of their gradient and weighted so that the gradient of the weights is unbiased.
    - While learning, the maxima are located in bfloat16 where the processor multiplies that fast.

    The poses are never made: the first layer's weights are turned instead (``PosedLinear``). The
    points and poses are taken as given: no gradient flows to them. No normalisation depends on the
    batch: candidate poses have very different distributions, and one set of running statistics
    could not serve them all.

    Args:
        widths: Of the layers, at least two.
        vectors: Given of each point, 3 numbers each.
        tensors: Given of each point, 6 numbers each, as in :class:`PosedLinear`.

    Raises:
        InputError: On fewer than two widths, or one below 1.
    """

    def __init__(self, widths: Sequence[int], vectors: int = 1, tensors: int = 0) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"widths is {tuple(widths)}; give at least two, each at least 1")
        self.first = PosedLinear(vectors, tensors, widths[0])
        self.shared = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(widths[:-1])
        )
        self.peak = nn.Linear(widths[-2], widths[-1])

    def forward(
        self,
        points: Tensor,
        rotations: Tensor,
        mask: Tensor | None = None,
        lessons: int | None = None,
    ) -> Tensor:
        """Features ``(B, K, C)`` of B clouds in K poses each.

        Args:
            points: ``(B, N, F)``, the vectors and tensors of each point.
            rotations: ``(B, K, 3, 3)``, the poses are ``x @ R``.
            mask: ``(B, N)`` bool, True = a real point.
            lessons: So many of the B * K poses teach, None: all.
        """
        if not torch.is_grad_enabled():
            return self._largest(points, rotations, mask)
        parameters = self.parameters()
        answer = _SparseLesson.apply(self, points, rotations, mask, lessons, *parameters)
        return cast(Tensor, answer)

    def _largest(self, points: Tensor, rotations: Tensor, mask: Tensor | None) -> Tensor:
        """The features with nothing recorded."""
        # bias and activation follow the maximum, on one row instead of N
        tiles = self._features(points, rotations, mask)
        largest = torch.cat([features.amax(dim=1).flatten(0, 1) for features in tiles])
        values = largest.unflatten(0, rotations.shape[:2]).to(points.dtype)
        return (values + self.peak.bias).relu()

    def _recorded(self, points: Tensor, rotations: Tensor, mask: Tensor | None) -> Tensor:
        """Features ``(M, C)`` of M poses ``(M, 1, 3, 3)``, recorded at their critical points."""
        with torch.no_grad():
            tiles = self._features(points, rotations, mask)
            # several times as fast as argmax over this dimension
            critical = torch.cat([features.max(dim=1).indices[:, 0] for features in tiles])
        points = points.gather(1, critical[..., None].expand(-1, -1, points.shape[2]))
        with learning_precision(self, points):
            features = points @ self.first.turned(rotations[:, 0]) + self.first.linear.bias
            features = features.relu()
            for layer in self.shared:
                features = layer(features).relu()
            values = (features * self.peak.weight.to(features)).sum(dim=-1, dtype=points.dtype)
        return (values + self.peak.bias).relu()

    def _features(self, points: Tensor, rotations: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Features of each point up to their bias, ``(b, N, k, C)``, tile by tile."""
        dtype = _learning_dtype(self, points)
        points = points.to(dtype)
        turned = self.first.turned(rotations).to(dtype)
        first_bias = self.first.linear.bias.to(dtype)
        layers = [layer for layer in self.shared if isinstance(layer, nn.Linear)]
        shared = [(layer.weight.to(dtype), layer.bias.to(dtype)) for layer in layers]
        peak = self.peak.weight.to(dtype)
        activations = points.shape[1] * self.peak.out_features
        for clouds, poses in tiles(points.shape[0], rotations.shape[1], activations):
            weights = turned[clouds, poses].transpose(1, 2)  # (b, F, k, C)
            features = (points[clouds] @ weights.flatten(2)).unflatten(2, weights.shape[2:])
            features = features.add_(first_bias)
            for weight, bias in shared:
                features = functional.linear(features.relu_(), weight, bias)
            features = functional.linear(features.relu_(), peak)
            if mask is not None:
                features = features.masked_fill(~mask[clouds, :, None, None], -torch.inf)
            yield features


def learning_precision(module: nn.Module, values: Tensor) -> AbstractContextManager[object]:
    """While learning, autocast to bfloat16 where the processor multiplies that fast; else none."""
    dtype = _learning_dtype(module, values)
    if dtype == values.dtype:
        return full_precision(values)
    return torch.autocast(values.device.type, dtype=dtype)


def _learning_dtype(module: nn.Module, values: Tensor) -> torch.dtype:
    """While learning, bfloat16 where the processor multiplies that several times as fast."""
    return torch.bfloat16 if module.training and _fast_bfloat16(values) else values.dtype


class _Recorded(nn.Module):
    """The recorded look as a module, to be called with the parameters of the forward pass."""

    def __init__(self, look: CriticalMax) -> None:
        super().__init__()
        self.look = look

    def forward(self, points: Tensor, rotations: Tensor, mask: Tensor | None) -> Tensor:
        return self.look._recorded(points, rotations, mask)


class _SparseLesson(torch.autograd.Function):
    """A look whose backward pass repeats it for a sample of the poses only."""

    @staticmethod
    def forward(
        ctx: Any,
        module: CriticalMax,
        points: Tensor,
        rotations: Tensor,
        mask: Tensor | None,
        lessons: int | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.module, ctx.lessons = module, lessons
        ctx.save_for_backward(points, rotations, mask, *parameters)
        return module._largest(points, rotations, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        points, rotations, mask, *parameters = ctx.saved_tensors
        gradient = gradient.flatten(0, 1)
        rows, scale = _sample_rows(gradient, ctx.lessons, ctx.module)
        clouds = rows // rotations.shape[1]
        poses = rotations.flatten(0, 1)[rows, None]
        recorded = _Recorded(ctx.module)
        used = dict(zip((name for name, _ in recorded.named_parameters()), parameters, strict=True))
        given = points[clouds], poses, None if mask is None else mask[clouds]
        with torch.enable_grad():
            features = torch.func.functional_call(recorded, used, given)
            gradients = torch.autograd.grad(
                features, parameters, gradient[rows] * scale[:, None], allow_unused=True
            )
        return None, None, None, None, None, *gradients


def _sample_rows(gradient: Tensor, count: int | None, module: SharesBatch) -> tuple[Tensor, Tensor]:
    """At most ``count`` rows, drawn in proportion to their norm, and their unbiased weights.

    Systematic sampling: one random offset, equal strides along the cumulated norms. A row may come
    more than once; their number is always the same, because libraries prepare (and keep) a program
    for every new shape. Across processes the strides are along the rows of all of them, ``count``
    for each; this one gets those that fall on its own, rounded up by rows that weigh nothing.
    """
    size = gradient.norm(dim=1).to(torch.float64)
    if count is None or count >= len(size):
        return torch.arange(len(size), device=size.device), torch.ones_like(gradient[:, 0])
    totals, rank = module.gathered(size.sum())
    ends = totals.cumsum(0)
    total, marked = ends[-1], count * len(ends)
    offset = torch.rand((), dtype=torch.float64, device=size.device)
    marks = (torch.arange(marked, device=size.device) + offset) * (total / marked)
    before = ends[rank - 1] if rank > 0 else torch.zeros_like(total)
    idle = 0
    if len(ends) > 1:
        marks = marks[(marks > before) & (marks <= ends[rank])]
        step = -(-count // 4)
        idle = -len(marks) % step if len(marks) else step
        marks = torch.cat((marks, before.expand(idle)))
    rows = torch.searchsorted(size.cumsum(0), marks - before).clamp_max(len(size) - 1)
    scale = total / (marked * size[rows].clamp_min(torch.finfo(torch.float64).tiny))
    scale[len(scale) - idle :] = 0
    return rows, scale.to(gradient.dtype)


def _fast_bfloat16(tensor: Tensor) -> bool:
    if tensor.dtype != torch.float32:
        return False
    if tensor.is_cuda:
        return torch.cuda.is_bf16_supported()
    return tensor.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
