"""Vector-neuron layers: networks whose features are 3-d vectors that turn with the input.

After Deng et al. 2021 (arXiv 2104.12229). Features are ``(..., N, 3, C)``, channels last and
contiguous: N points, 3 coordinates, C channels. A layer mixes channels and never coordinates, so
it is one matrix product over all rows of all points and commutes with rotations; what is nonlinear
acts through inner products. All layers but :class:`EdgeConv` accept any leading dimensions, and
all have finite gradients at vanishing vectors.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pointcanon.errors import InputError
from pointcanon.layers import pointwise
from pointcanon.layers.shared_batch import SharesBatch

__all__ = [
    "BatchNorm",
    "Dropout",
    "EdgeConv",
    "InvariantHead",
    "LeakyReLU",
    "Linear",
    "LinearLeakyReLU",
    "MaxPool",
    "MeanPool",
]

NORM_SOFTENING = 1e-2
"""Added to squared norms before division. A direction is noise where its vector is short, and every
layer that divides by a length carries that noise on at full size: with the 1e-6 of the paper's code
six layers turn float32 rounding into errors of 5e-4 in a frame, with this into 4e-5."""

_CPU_BLOCK = 1 << 19
"""Edge features held at once on a CPU without gradients: they stay in cache."""

_DEVICE_BLOCK = 1 << 27


class Linear(nn.Module):
    """Mixes channels: ``(..., 3, C_in)`` to ``(..., 3, C_out)``. No bias: it would pick a pose."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = _weight(out_channels, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class LeakyReLU(nn.Module):
    """Shortens the part of each vector that points against a learned direction.

    With d = U x, a vector q of negative <q, d> becomes ``q - (1 - slope) <q, d> / |d|^2 d``, with
    :data:`NORM_SOFTENING` added to the square.

    Args:
        channels: C.
        negative_slope: What is kept of the part along -d.
        shared_direction: One direction for all channels, at about half the cost.
    """

    def __init__(
        self, channels: int, negative_slope: float = 0.2, shared_direction: bool = False
    ) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.direction = Linear(channels, 1 if shared_direction else channels)

    def forward(self, x: Tensor) -> Tensor:
        return _rectify(x, self.direction(x), self.negative_slope, dim=-2)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class BatchNorm(nn.Module):
    """Batch normalisation of the lengths of vectors, never of coordinates.

    Each ``x`` becomes ``x BN(|x|) / |x|``, with statistics over all real vectors of a channel;
    |x| is ``sqrt(x^2 + NORM_SOFTENING)``.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.lengths = pointwise.BatchNorm(channels, eps=eps, momentum=momentum)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``(..., 3, C)``; ``mask (...)`` bool is True where a vector is real."""
        length = (_squared_norm(x, dim=-2) + NORM_SOFTENING).sqrt()
        return x * (self.lengths(length, mask) / length).unsqueeze(-2)


class LinearLeakyReLU(nn.Module):
    """Linear, batch normalisation and leaky ReLU, with both linear maps in one product.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        norm: Whether lengths are batch-normalised before the activation.
        negative_slope: Of the activation.
        shared_direction: One direction for all channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: bool = True,
        negative_slope: float = 0.2,
        shared_direction: bool = False,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.negative_slope = negative_slope
        self.linear = Linear(in_channels, out_channels + (1 if shared_direction else out_channels))
        self.norm = BatchNorm(out_channels) if norm else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., 3, C_in)`` to ``(..., 3, C_out)``; ``mask (...)`` as in :class:`BatchNorm`."""
        both = self.linear(x)
        vectors, direction = both[..., : self.out_channels], both[..., self.out_channels :]
        if self.norm is not None:
            vectors = self.norm(vectors, mask)
        return _rectify(vectors, direction, self.negative_slope, dim=-2)


class MaxPool(nn.Module):
    """The vector farthest along a learned direction, for each channel.

    ``(..., N, 3, C)`` to ``(..., 3, C)``. Which vector wins can hang on rounding: where exactness
    under rotation matters, prefer :class:`MeanPool`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.direction = Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool over N; ``mask (..., N)`` bool is True where a point is real."""
        extent = (x * self.direction(x)).sum(dim=-2, keepdim=True)
        if mask is not None:
            extent = extent.masked_fill(~mask[..., None, None], -math.inf)
        farthest = extent.argmax(dim=-3, keepdim=True)
        return x.gather(-3, farthest.expand(*x.shape[:-3], 1, *x.shape[-2:])).squeeze(-3)


class MeanPool(nn.Module):
    """The mean vector of the real points, ``(..., N, 3, C)`` to ``(..., 3, C)``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool over N; ``mask (..., N)`` bool is True where a point is real."""
        if mask is None:
            return x.mean(dim=-3)
        kept = torch.where(mask[..., None, None], x, x.new_zeros(()))
        return kept.sum(dim=-3) / mask.sum(dim=-1).clamp_min(1)[..., None, None]


class Dropout(SharesBatch, nn.Module):
    """Dropout of whole vectors ``(B, ..., 3, C)``: all three coordinates of a channel go, or none.

    In training a vector is zeroed with probability p and the others are scaled by 1 / (1 - p).

    Raises:
        InputError: If p is outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"dropout probability p is {p}; choose 0 <= p < 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self.dropped(torch.ones_like(x[..., :1, :]), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class InvariantHead(nn.Module):
    """Rotation-invariant features: the coordinates of each vector in an equivariant basis.

    A small vector-neuron network gives three vectors T per point, and x turns into ``T^T x``
    (VNStdFeature of the paper): ``(..., 3, C)`` to ``(..., 3 C)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = max(1, channels // 2), max(1, channels // 4)
        self.first = LinearLeakyReLU(channels, half)
        self.second = LinearLeakyReLU(half, quarter)
        self.basis = Linear(quarter, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask (...)`` bool, True where a vector is real, guards the statistics."""
        basis = self.basis(self.second(self.first(x, mask), mask))
        return (basis.mT @ x).flatten(-2)


class EdgeConv(nn.Module):
    r"""Edge convolution on vectors: activates each edge, then pools over the neighbours.

    .. math:: y_i = \mathrm{pool}_{j \in N(i)}\, \sigma(A (x_j - x_i) + B x_i + C (x_j \times x_i))

    Being linear before the activation, an edge is the sum of a term of j and a term of i: two
    products over points replace those over edges, and only their results are gathered. Edges are
    formed for some points at a time, and formed again for the gradient, so that nothing of size
    N k C_out is kept.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        cross: Whether edges carry the cross product too. It is what distinguishes a shape from
            its mirror image.
        pool: ``"mean"``, or ``"max"`` along a learned direction.
        negative_slope: Of the activation.
        shared_direction: One direction of the activation for all channels.

    Shapes: features ``(B, N, 3, C_in)``, neighbours ``(B, N, k)`` int64 and weights ``(B, N, k)``
    to ``(B, N, 3, C_out)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cross: bool = False,
        pool: Literal["mean", "max"] = "mean",
        negative_slope: float = 0.2,
        shared_direction: bool = False,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise InputError(f"unknown pool {pool!r}; choose 'mean' or 'max'")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.negative_slope = negative_slope
        rows = out_channels + (1 if shared_direction else out_channels)
        # columns: A, B and, with cross, C
        self.weight = _weight(rows, (3 if cross else 2) * in_channels)
        self.farthest = _weight(out_channels, out_channels) if pool == "max" else None

    def forward(self, x: Tensor, neighbors: Tensor, weights: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: ``(B, N, 3, C_in)``.
            neighbors: ``(B, N, k)`` indices into N, such as
                :func:`pointcanon.neighbors.knn` returns.
            weights: ``(B, N, k)``, not negative and not all zero for a point: a weighted mean, or
                the maximum over those of positive weight. The default counts all alike.

        Raises:
            InputError: If a shape does not fit.
        """
        self._check(x, neighbors, weights)
        if weights is None:
            weights = x.new_ones(()).expand(neighbors.shape)
        batch, count, k = neighbors.shape
        if batch == 0:
            return x.new_zeros(0, count, 3, self.out_channels)
        edges = count * k * 3 * self.weight.shape[0]
        gradient = torch.is_grad_enabled() and (
            x.requires_grad or weights.requires_grad or self.weight.requires_grad
        )
        if torch.compiler.is_compiling():
            return self._clouds(x, neighbors, weights)
        limit = _CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK
        clouds = max(1, limit // edges)
        pieces = []
        for b in range(0, batch, clouds):
            part = x[b : b + clouds], neighbors[b : b + clouds], weights[b : b + clouds]
            if gradient:
                pieces.append(checkpoint(self._clouds, *part, use_reentrant=False))
            else:
                points = max(1, min(count, limit * count // edges))
                pieces.append(self._clouds(*part, points))
        return torch.cat(pieces)

    def _clouds(
        self, x: Tensor, neighbors: Tensor, weights: Tensor, points: int | None = None
    ) -> Tensor:
        """The layer on a few clouds, ``points`` points of each at a time or all at once."""
        batch, count, k = neighbors.shape
        difference, own, *cross = self.weight.split(self.in_channels, dim=1)
        # from here points are last: gathers and sums then run along contiguous memory
        planes = x.permute(3, 2, 0, 1).reshape(self.in_channels, -1)
        of_neighbor = (difference @ planes).view(-1, batch * count)
        of_point = ((own - difference) @ planes).view(-1, 3, batch, count)
        planes = planes.reshape(self.in_channels * 3, batch * count)
        offset = torch.arange(batch, device=x.device)[:, None, None] * count
        pieces = []
        parts = [slice(None)]
        if points is not None:
            parts = [slice(start, start + points) for start in range(0, count, points)]
        for rows in parts:
            index = (neighbors[:, rows] + offset).permute(2, 0, 1).flatten()
            shape = (-1, 3, k, batch, neighbors[:, rows].shape[1])
            edge = of_neighbor.index_select(1, index).view(shape)
            edge = edge + of_point[:, :, None, :, rows]
            if cross:
                here = planes.view(-1, 3, 1, batch, count)[..., rows]
                there = planes.index_select(1, index).view(shape)
                product = torch.linalg.cross(there, here.expand_as(there), dim=1)
                edge = edge + (cross[0] @ product.flatten(1)).view(shape)
            vectors, direction = edge[: self.out_channels], edge[self.out_channels :]
            vectors = _rectify(vectors, direction, self.negative_slope, dim=1)
            pieces.append(self._pool(vectors, weights[:, rows].permute(2, 0, 1).contiguous()))
        return torch.cat(pieces, dim=-1).permute(2, 3, 1, 0).contiguous()

    def _pool(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """``(C, 3, k, B, n)`` to ``(C, 3, B, n)``."""
        if self.farthest is None:
            return (vectors * (weights / weights.sum(dim=0))).sum(dim=2)
        direction = (self.farthest @ vectors.flatten(1)).view(vectors.shape)
        extent = (vectors * direction).sum(dim=1, keepdim=True)
        extent = extent.masked_fill(weights == 0, -math.inf)
        farthest = extent.argmax(dim=2, keepdim=True)
        return vectors.gather(2, farthest.expand(-1, 3, -1, -1, -1)).squeeze(2)

    def _check(self, x: Tensor, neighbors: Tensor, weights: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[2:] != (3, self.in_channels):
            raise InputError(
                f"features have shape {tuple(x.shape)}, expected (B, N, 3, {self.in_channels})"
            )
        if neighbors.ndim != 3 or neighbors.shape[:2] != x.shape[:2]:
            raise InputError(
                f"neighbors has shape {tuple(neighbors.shape)}, "
                f"expected ({x.shape[0]}, {x.shape[1]}, k)"
            )
        if weights is not None and weights.shape != neighbors.shape:
            raise InputError(
                f"weights has shape {tuple(weights.shape)}, expected {tuple(neighbors.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, negative_slope={self.negative_slope}"


def _rectify(vectors: Tensor, direction: Tensor, slope: float, dim: int) -> Tensor:
    """Leaky ReLU of vectors whose coordinates lie along ``dim``."""
    axes = list(zip(vectors.unbind(dim), direction.unbind(dim), strict=True))
    # three fused products run several times faster than a sum over a dimension of three
    along = axes[0][0] * axes[0][1]
    length = axes[0][1].square() + NORM_SOFTENING
    for q, d in axes[1:]:
        along = torch.addcmul(along, q, d)
        length = torch.addcmul(length, d, d)
    excess = along.clamp_max(0) / length * (1 - slope)
    return vectors - excess.unsqueeze(dim) * direction


def _squared_norm(x: Tensor, dim: int) -> Tensor:
    first, second, third = x.unbind(dim)
    return torch.addcmul(torch.addcmul(first.square(), second, second), third, third)


def _weight(rows: int, columns: int) -> nn.Parameter:
    """Initialised as ``torch.nn.Linear`` is: uniform within 1 / sqrt(columns)."""
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(rows, columns).uniform_(-bound, bound))
