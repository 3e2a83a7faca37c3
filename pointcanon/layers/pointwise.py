"""Layers that treat every point alike, channels last, with statistics over real points only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BatchNorm", "PooledLinear", "masked_max", "masked_mean"]

SCORES = 2**24
"""Elements of the largest intermediate of :class:`PooledLinear`: 64 MB in float32."""


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of ``(..., C)`` whose statistics leave padding out."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            input: ``(..., C)``, finite in padded rows too.
            mask: ``(...)`` bool, broadcastable to the leading dimensions; True = a real row.
        """
        if mask is None and input.numel() == self.num_features:
            # torch refuses to train on a single row; here its variance is zero
            mask = input.new_ones(input.shape[:-1], dtype=torch.bool)
        if mask is None or not self.training:
            return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)
        rows = _exact(input.reshape(-1, self.num_features))
        weights = mask.expand(input.shape[:-1]).reshape(-1, 1).to(rows.dtype)
        mean = (weights * rows).sum(dim=0) / weights.sum()
        variance = (weights * (rows - mean).square()).sum(dim=0) / weights.sum()
        self.track(mean, variance, weights.sum())
        return self.affine_map(input, mean, variance)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch of ``count`` rows."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)

    def affine_map(self, input: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """``(..., C)`` normalised by the given statistics ``(C,)``, scaled and shifted."""
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (input * scale + (self.bias - mean * scale)).to(input.dtype)


class PooledLinear(nn.Module):
    """A linear layer, batch normalisation and a maximum over the points, at a fraction of the cost.

    Same parameters, outputs, running statistics and gradients as applying the three in turn.
    Normalisation is monotone in each channel, so the maximum can come first: the largest linear
    output where the scale is positive, the smallest where it is negative. The batch statistics
    follow from the mean and covariance of the *input*, which has far fewer channels. What remains
    of the wide layer is one product that needs no gradient, and one row for each channel of each
    cloud that does.

    Args:
        in_channels: C.
        out_channels: D, worth it when several times C.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            features: ``(B, N, C)``, finite in padded rows too.
            mask: ``(B, N)`` bool, True = a real point.

        Returns:
            ``(B, D)``.
        """
        winners = self._winners(features, mask)
        rows = features.gather(1, winners[..., None].expand(-1, -1, features.shape[-1]))
        pooled = (rows * self.linear.weight).sum(dim=-1) + self.linear.bias
        if not self.training:
            return self.norm(pooled)
        mean, variance, count = self._statistics(features, mask)
        self.norm.track(mean, variance, count)
        return self.norm.affine_map(pooled, mean, variance)

    @torch.no_grad()
    def _winners(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Index of the point that wins each channel, ``(B, D)``."""
        rising = torch.where(self.norm.weight[:, None] < 0, -1.0, 1.0)
        weight = self.linear.weight * rising.to(self.linear.weight)
        step = max(1, SCORES // (features.shape[1] * weight.shape[0]))
        winners = []
        for start in range(0, features.shape[0], step):
            # points last: a maximum along contiguous memory is three times as fast
            scores = weight @ features[start : start + step].mT
            if mask is not None:
                scores = scores.masked_fill(~mask[start : start + step, None], -torch.inf)
            winners.append(scores.argmax(dim=-1))
        return torch.cat(winners)

    def _statistics(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean ``(D,)`` and variance ``(D,)`` of the linear outputs, and the number of points."""
        rows, weight = _exact(features.flatten(0, 1)), _exact(self.linear.weight)
        # a variance from low-precision products could even come out negative
        with torch.autocast(features.device.type, enabled=False):
            if mask is None:
                count = rows.new_tensor(float(rows.shape[0]))
                mean = rows.mean(dim=0)
                centred = rows - mean
            else:
                real = mask.reshape(-1, 1).to(rows.dtype)
                count = real.sum()
                mean = (real * rows).sum(dim=0) / count
                centred = real * (rows - mean)
            covariance = centred.mT @ centred / count
            variance = ((weight @ covariance) * weight).sum(dim=-1).clamp_min(0)
            return weight @ mean + self.linear.bias, variance, count


def _exact(values: Tensor) -> Tensor:
    """At least float32, for sums over many rows."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def masked_max(features: Tensor, mask: Tensor | None) -> Tensor:
    """Maximum over the real points: ``(B, N, C)`` to ``(B, C)``."""
    if mask is not None:
        features = features.masked_fill(~mask[..., None], -torch.inf)
    return features.amax(dim=1)


def masked_mean(features: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real points: ``(B, N, C)``, finite in padded rows too, to ``(B, C)``."""
    if mask is None:
        return features.mean(dim=1)
    weights = mask[..., None].to(features.dtype)
    return (weights * features).sum(dim=1) / weights.sum(dim=1)
