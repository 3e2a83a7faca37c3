"""Layers that treat every point alike, channels last, with statistics over real points only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.layers.shared_batch import Dropout, SharesBatch, total
from pointcanon.portable import exporting, full_precision

__all__ = [
    "BatchNorm",
    "PooledLinear",
    "SharedLayer",
    "class_head",
    "exact",
    "linear_of_parts",
    "masked_max",
    "masked_mean",
    "shared_layers",
]

SCORES = 2**24
"""Elements of the largest intermediate of :class:`PooledLinear`: 64 MB in float32."""


class BatchNorm(SharesBatch, nn.BatchNorm1d):
    """Batch normalisation of ``(..., C)`` whose statistics leave padding out."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            input: ``(..., C)``, finite in padded rows too, which come out as ``bias`` in training.
            mask: ``(...)`` bool, broadcastable to the leading dimensions; True = a real row.
        """
        if not self.training:
            return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)
        if mask is None and (self.across_processes or input.numel() <= self.num_features):
            # torch refuses to train on a single row, whose variance is zero here, and lets a batch
            # of none make NaN of the running statistics
            mask = input.new_ones(input.shape[:-1], dtype=torch.bool)
        if mask is None:
            return super().forward(input.reshape(-1, self.num_features)).reshape(input.shape)
        rows = exact(input.reshape(-1, self.num_features))
        real = mask.expand(input.shape[:-1]).reshape(-1, 1)
        count = real.sum().to(rows.dtype)
        mean = torch.where(real, rows, 0.0).sum(dim=0) / count.clamp_min(1)
        variance = torch.where(real, rows - mean, 0.0).square().sum(dim=0) / count.clamp_min(1)
        mean, variance = self.batch_statistics(mean, variance, count)
        # padding counts for the mean: divided by the variance of points that coincide, it would
        # grow from layer to layer until it overflows
        rows = torch.where(real, rows, mean)
        return self.affine_map(rows.reshape(input.shape), mean, variance).to(input.dtype)

    def batch_statistics(
        self, mean: Tensor, variance: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By what a batch is normalised, from mean and variance of the ``count`` rows seen here.

        These are they, or where processes share a batch (``shared_batch``), those of the rows of
        all of them. The running statistics move towards them, if there are any rows.
        """
        if self.across_processes:  # the joint mean first, or squares of large means would cancel
            count, sums = count.detach(), total(torch.cat((count * mean, count[None])))
            joint = sums[:-1] / sums[-1].clamp_min(1)
            squares = count * (variance + (mean - joint).square())
            mean, count = joint, sums[-1].detach()
            variance = total(squares) / count.clamp_min(1)
        self._track(mean, variance, count)
        return mean, variance

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(count > 0)
        unbiased = variance * count / (count - 1).clamp_min(1)
        step = self.momentum * (count > 0).to(self.running_mean)
        self.running_mean.lerp_(mean.to(self.running_mean), step)
        self.running_var.lerp_(unbiased.to(self.running_var), step)

    def affine_map(self, input: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """``(..., C)`` normalised by the given statistics ``(C,)``, scaled and shifted."""
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (input * scale + (self.bias - mean * scale)).to(input.dtype)


class SharedLayer(nn.Module):
    """Linear, batch normalisation over real points, ReLU: the same for every point.

    Args:
        in_channels: C.
        out_channels: D.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., C)`` to ``(..., D)``; ``mask`` is ``(...)``."""
        return F.relu(self.norm(self.linear(features), mask))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight ``(D, C)`` and bias ``(D,)`` of the layer in evaluation, less its ReLU."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        bias = (self.linear.bias - self.norm.running_mean) * scale + self.norm.bias
        return self.linear.weight * scale[:, None], bias


def class_head(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """From the code of a cloud ``(B, channels)`` to its logits, as in PointNet and PointNet++."""
    return nn.Sequential(
        SharedLayer(channels, 512),
        Dropout(dropout),
        SharedLayer(512, 256),
        Dropout(dropout),
        nn.Linear(256, num_classes),
    )


def shared_layers(modules: nn.ModuleList) -> list[SharedLayer]:
    """The same layers, typed."""
    return [layer for layer in modules if isinstance(layer, SharedLayer)]


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
        bias: Of the linear layer; normalisation makes it idle, but weights that exist may have it.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=bias)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool.

        Args:
            features: ``(B, N, C)``, finite in padded rows too.
            mask: ``(B, N)`` bool, True = a real point.

        Returns:
            ``(B, D)``.
        """
        if exporting():  # the plain form; a program of open sizes can have no blocks
            return masked_max(self.norm(self.linear(features), mask), mask)
        winners = self._winners(features, mask)
        rows = features.gather(1, winners[..., None].expand(-1, -1, features.shape[-1]))
        pooled = (rows * self.linear.weight).sum(dim=-1)
        if self.linear.bias is not None:
            pooled = pooled + self.linear.bias
        if not self.training:
            return self.norm(pooled)
        mean, variance = self.norm.batch_statistics(*self._statistics(features, mask))
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
        rows, weight = exact(features.flatten(0, 1)), exact(self.linear.weight)
        # a variance from low-precision products could even come out negative
        with full_precision(features):
            if mask is None:
                count = rows.new_tensor(float(rows.shape[0]))
                mean = rows.sum(dim=0) / count.clamp_min(1)
                centred = rows - mean
            else:
                real = mask.reshape(-1, 1).to(rows.dtype)
                count = real.sum()
                mean = (real * rows).sum(dim=0) / count.clamp_min(1)
                centred = real * (rows - mean)
            covariance = centred.mT @ centred / count.clamp_min(1)
            variance = ((weight @ covariance) * weight).sum(dim=-1).clamp_min(0)
            mean = weight @ mean
            if self.linear.bias is not None:
                mean = mean + self.linear.bias
            return mean, variance, count


def exact(values: Tensor) -> Tensor:
    """At least float32, for sums over many rows."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def linear_of_parts(linear: nn.Linear, *parts: Tensor) -> Tensor:
    """A linear layer on parts that lie side by side, without joining them.

    Args:
        linear: Takes the sum of the parts' channels.
        *parts: ``(..., C_i)``, broadcastable: what all points of a cloud share, ``(B, 1, C_i)``, is
            multiplied once.
    """
    weights = linear.weight.split([part.shape[-1] for part in parts], dim=1)
    products = [F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)]
    first, *others = products
    return sum(others, first if linear.bias is None else first + linear.bias)


def masked_max(features: Tensor, mask: Tensor | None) -> Tensor:
    """Maximum over the real points: ``(B, N, C)`` to ``(B, C)``."""
    if mask is not None:
        features = features.masked_fill(~mask[..., None], -torch.inf)
    if torch.is_grad_enabled() and features.requires_grad:
        # the gradient of amax passes over all points several times, this one visits the winners
        return features.max(dim=1).values
    return features.amax(dim=1)


def masked_mean(features: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real points: ``(B, N, C)``, finite in padded rows too, to ``(B, C)``."""
    if mask is None:
        return features.mean(dim=1)
    weights = mask[..., None].to(features.dtype)
    return (weights * features).sum(dim=1) / weights.sum(dim=1)
