"""Shared layers over the points of many posed clouds and a maximum, cheap to teach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointcanon.errors import InputError

__all__ = ["CriticalMax", "learning_dtype"]

TILE = 1 << 18
"""Activations held at once while looking for maxima; a megabyte in float32 stays in cache."""


class CriticalMax(nn.Module):
    """Shared layers over the points of a cloud, the maximum of each feature, and a ReLU.

    Many poses of each cloud are looked at and few of them teach much, so learning is sparse:

    - A maximum has a gradient only at the points that attain it, the critical points of Qi et al.
      (2017, arXiv 1612.00593). The module looks at all points without recording anything, in tiles
      that stay in cache, and in the backward pass at the critical ones alone.
    - Of the M clouds only ``lessons`` are looked at in the backward pass, sampled in proportion to
      the norm of their gradient and weighted so that the gradient of the weights is unbiased.
    - While learning, the maxima are located in bfloat16 where the processor multiplies that fast.

    The points are taken as given: no gradient flows to them. No normalisation depends on the
    batch: candidate poses have very different distributions, and one set of running statistics
    could not serve them all.

    Args:
        widths: Of the layers, at least two.
        inputs: Numbers that are given of each point.

    Raises:
        InputError: On fewer than two widths, or one below 1.
    """

    def __init__(self, widths: Sequence[int], inputs: int = 3) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise InputError(f"widths is {tuple(widths)}; give at least two, each at least 1")
        layers: list[nn.Module] = []
        for before, after in zip((inputs, *widths[:-2]), widths[:-1], strict=True):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.shared = nn.Sequential(*layers)
        self.peak = nn.Linear(widths[-2], widths[-1])

    def forward(
        self, points: Tensor, mask: Tensor | None = None, lessons: int | None = None
    ) -> Tensor:
        """``(M, N, inputs)`` clouds to ``(M, C)`` features; ``lessons`` clouds teach, None: all."""
        if not torch.is_grad_enabled():
            return self._largest(points, mask)
        return cast(Tensor, _SparseLesson.apply(self, points, mask, lessons, *self.parameters()))

    def _largest(self, points: Tensor, mask: Tensor | None) -> Tensor:
        """The features with nothing recorded."""
        # the activation is monotone, so it follows the maximum, on one row instead of N
        largest = [features.amax(dim=1) for features in self._features(points, mask)]
        return torch.cat(largest).to(points.dtype).relu()

    def _recorded(self, points: Tensor, mask: Tensor | None) -> Tensor:
        """The features as a function of the critical points, recorded for a backward pass."""
        with torch.no_grad():
            # several times as fast as argmax over this dimension
            critical = torch.cat([f.max(dim=1).indices for f in self._features(points, mask)])
        points = points.gather(1, critical[..., None].expand(-1, -1, points.shape[2]))
        dtype = learning_dtype(self, points)
        with torch.autocast(points.device.type, dtype=dtype, enabled=dtype != points.dtype):
            features = self.shared(points)
            values = (features * self.peak.weight.to(features)).sum(dim=-1, dtype=points.dtype)
        return (values + self.peak.bias).relu()

    def _features(self, points: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Features of each point before the maximum ``(m, N, C)``, a tile of clouds at a time."""
        dtype = learning_dtype(self, points)
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


def learning_dtype(module: nn.Module, values: Tensor) -> torch.dtype:
    """While learning, bfloat16 where the processor multiplies that several times as fast."""
    return torch.bfloat16 if module.training and _fast_bfloat16(values) else values.dtype


class _SparseLesson(torch.autograd.Function):
    """A look whose backward pass repeats it for a sample of the clouds only."""

    @staticmethod
    def forward(
        ctx: Any,
        module: CriticalMax,
        points: Tensor,
        mask: Tensor | None,
        lessons: int | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.module, ctx.lessons = module, lessons
        ctx.save_for_backward(points, mask)
        return module._largest(points, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        points, mask = ctx.saved_tensors
        rows, scale = _sample_rows(gradient, ctx.lessons)
        parameters = list(ctx.module.parameters())
        with torch.enable_grad():
            features = ctx.module._recorded(points[rows], None if mask is None else mask[rows])
            gradients = torch.autograd.grad(
                features, parameters, gradient[rows] * scale[:, None], allow_unused=True
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
