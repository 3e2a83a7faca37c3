"""Edge convolutions (Wang et al. 2019, arXiv 1801.07829) that hold no edges, channels last.

A layer of weights [A, B] on the edge [x_j - x_i, x_i] is ``A x_j + (B - A) x_i``: two products over
points, not over edges. Normalisation and a rising activation commute with the maximum over the
neighbours once the scale, whose sign may turn the maximum into a minimum, is part of A. So what
remains is a maximum of gathered rows, and no tensor has a row for every edge. Outputs, running
statistics and gradients are those of the plain form.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pointcanon.layers.pointwise import BatchNorm, exact
from pointcanon.neighbors import knn
from pointcanon.portable import exporting, full_precision

__all__ = ["DeepEdgeConv", "EdgeConv", "Layer", "neighbor_max"]

SLOPE = 0.2
"""Of every leaky ReLU."""

_CPU_BLOCK = 1 << 18
"""Elements of a gathered block on a CPU: it stays in cache."""

_DEVICE_BLOCK = 1 << 27


class Layer(nn.Module):
    """Linear, batch normalisation over real rows, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=bias)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., C)`` to ``(..., D)``; ``mask`` is broadcastable to ``(...)``."""
        if self.training:
            return self.activate(self.linear(features), mask)
        scale, shift = _scale_and_shift(self.norm, *_running(self.norm))
        if self.linear.bias is not None:
            shift = shift + scale * self.linear.bias
        weight = (scale[:, None] * self.linear.weight).to(self.linear.weight.dtype)
        # one wide intermediate instead of three
        return F.leaky_relu_(F.linear(features, weight, shift.to(weight.dtype)), SLOPE)

    def activate(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """What follows the linear map, ``(..., D)``."""
        return F.leaky_relu_(self.norm(features, mask), SLOPE)


class EdgeConv(nn.Module):
    """A layer on the edges to the k nearest neighbours in feature space, and a maximum over them.

    Computes in at least float32, also under autocast: ``A x_j`` and ``A x_i`` are large where
    neighbours are alike, and their difference would drown in the rounding of bfloat16.

    Args:
        in_channels: C.
        out_channels: D.
        k: Neighbours of a point, itself among them.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.layer = Layer(2 * in_channels, out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, C)``, finite in padded rows too, to ``(B, N, D)``, zero in those."""
        neighbors = knn(features.detach(), self.k, mask)
        with full_precision(features):
            ends, centres = _edge_terms(self.layer, features, neighbors, mask)
            maxima = F.leaky_relu_(neighbor_max(ends, neighbors) + centres, SLOPE)
        return _without_padding(maxima, mask).to(features.dtype)


class DeepEdgeConv(nn.Module):
    """Two layers on the edges to the k nearest neighbours, and a maximum over them.

    The first layer needs no edges until it is activated; from there on they exist for a block of
    points at a time, and are computed again for the gradient.

    Args:
        in_channels: C.
        hidden_channels: Between the layers.
        out_channels: D.
        k: Neighbours of a point, itself among them.
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.layers = nn.ModuleList(
            [Layer(2 * in_channels, hidden_channels), Layer(hidden_channels, out_channels)]
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, C)``, finite in padded rows too, to ``(B, N, D)``, zero in those."""
        neighbors = knn(features.detach(), self.k, mask)
        first, second = self.layers
        assert isinstance(first, Layer)
        assert isinstance(second, Layer)
        with full_precision(features):
            ends, centres = _edge_terms(first, features, neighbors, mask)
            weight, norm = second.linear.weight.to(ends.dtype), second.norm
            if self.training:
                rising = torch.where(norm.weight < 0, -1.0, 1.0).to(ends.dtype)
                blocks = self._blocks(ends, centres, neighbors, mask, weight * rising[:, None])
                maxima, *moments = zip(*blocks, strict=True)
                mean, variance, count = _pool_moments(*map(torch.stack, moments))
                mean, variance = norm.batch_statistics(mean * rising, variance, count)
                scale, shift = _scale_and_shift(norm, mean, variance)
                outputs = torch.cat(maxima) * (rising * scale) + shift
            else:
                scale, shift = _scale_and_shift(norm, *_running(norm))
                blocks = self._blocks(ends, centres, neighbors, mask, scale[:, None] * weight)
                outputs = torch.cat([maxima for maxima, *_ in blocks]) + shift
            outputs = F.leaky_relu_(outputs, SLOPE).unflatten(0, neighbors.shape[:2])
        return _without_padding(outputs, mask).to(features.dtype)

    def _blocks(
        self,
        ends: Tensor,
        centres: Tensor,
        neighbors: Tensor,
        mask: Tensor | None,
        weight: Tensor,
    ) -> Iterator[tuple[Tensor, ...]]:
        """What :meth:`_block` says of one block of points after another."""
        if torch.compiler.is_compiling():
            index = _flat(neighbors, ends.shape[1])
            real = None if mask is None else mask.flatten()
            yield self._block(ends.flatten(0, 1), centres.flatten(0, 1), index, real, weight)
            return
        limit = _CPU_BLOCK if ends.device.type == "cpu" else _DEVICE_BLOCK
        rows = max(1, limit // (neighbors.shape[2] * weight.shape[0]))
        masks = [None] * len(ends) if mask is None else mask.unbind()
        for end, centre, index, real in zip(
            ends.unbind(), centres.unbind(), neighbors.unbind(), masks, strict=True
        ):
            # unbind and split rather than slices, each of whose gradients would be a whole batch
            starts = range(0, len(index), rows)
            reals = [None] * len(starts) if real is None else real.split(rows)
            for part in zip(centre.split(rows), index.split(rows), reals, strict=True):
                if torch.is_grad_enabled():
                    yield checkpoint(
                        self._block,
                        end,
                        *part,
                        weight,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    yield self._block(end, *part, weight)

    def _block(
        self, ends: Tensor, centres: Tensor, index: Tensor, real: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, ...]:
        """Maxima of the second linear map over the edges of n points, and in training its moments.

        Args:
            ends: ``(N, H)``, of all points that ``index`` refers to.
            centres: ``(n, H)``.
            index: ``(n, k)``.
            real: ``(n,)`` bool.
            weight: ``(D, H)``.

        Returns:
            ``(n, D)`` and in training mean ``(D,)``, sum of squares about it ``(D,)`` and number
            of real edges.
        """
        edges = ends.index_select(0, index.flatten()).unflatten(0, index.shape) + centres[:, None]
        values = F.linear(F.leaky_relu_(edges, SLOPE), weight)
        maxima = values.amax(dim=1)
        if not self.training:
            return (maxima,)
        if real is None:
            count = values.new_tensor(float(index.numel()))
            variance, mean = torch.var_mean(values, dim=(0, 1), correction=0)
            return maxima, mean, count * variance, count
        real = real[:, None, None].to(values.dtype)
        count = index.shape[1] * real.sum()
        mean = (real * values).sum(dim=(0, 1)) / count.clamp_min(1)
        squares = (real * (values - mean).square()).sum(dim=(0, 1))
        return maxima, mean, squares, count


def neighbor_max(values: Tensor, neighbors: Tensor) -> Tensor:
    """Maximum over the neighbours of each point, channel by channel.

    Args:
        values: ``(B, N, D)``.
        neighbors: ``(B, M, k)`` int64 indices into N.

    Returns:
        ``(B, M, D)``. One of several equal maxima receives the gradient.
    """
    if exporting():
        return (
            values.flatten(0, 1)[_flat(neighbors, values.shape[1])]
            .amax(dim=1)
            .unflatten(0, neighbors.shape[:2])
        )
    learns = torch.is_grad_enabled() and values.requires_grad
    return torch.ops.pointcanon.neighbor_max(values, neighbors, learns)[0]


@torch.library.custom_op(
    "pointcanon::neighbor_max",
    mutates_args=(),
    schema="(Tensor values, Tensor neighbors, bool slots) -> (Tensor, Tensor)",
)
def _neighbor_max(values: Tensor, neighbors: Tensor, slots: bool) -> tuple[Tensor, Tensor]:
    """The maxima and, where asked for, which of the k neighbours each comes from."""
    shape = (*neighbors.shape[:2], values.shape[2])
    rows = values.flatten(0, 1).contiguous()
    index = _flat(neighbors, values.shape[1]).T.contiguous()
    maxima = rows.new_empty(index.shape[1], rows.shape[1])
    winners = torch.zeros(maxima.shape if slots else 0, dtype=_slot_type(len(index))).to(
        rows.device
    )
    limit = _CPU_BLOCK if rows.device.type == "cpu" else _DEVICE_BLOCK
    step = max(1, limit // rows.shape[1])
    # neighbour by neighbour: twice as fast as gathering all k, and no index is as wide as a value
    for start in range(0, len(maxima), step):
        best = maxima[start : start + step]
        best.copy_(rows.index_select(0, index[0, start : start + step]))
        other, winner = torch.empty_like(best), winners[start : start + step]
        for slot in range(1, len(index)):
            torch.index_select(rows, 0, index[slot, start : start + step], out=other)
            if slots:
                torch.maximum(winner, (other > best).to(winner.dtype).mul_(slot), out=winner)
            torch.maximum(best, other, out=best)
    return maxima.view(shape), winners.view(shape) if slots else winners


@_neighbor_max.register_fake
def _(values: Tensor, neighbors: Tensor, slots: bool) -> tuple[Tensor, Tensor]:
    shape = (*neighbors.shape[:2], values.shape[2])
    kind = _slot_type(neighbors.shape[2])
    return values.new_empty(shape), values.new_empty(shape if slots else (0,), dtype=kind)


def _neighbor_max_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    values, neighbors, _ = inputs
    ctx.count = values.shape[1]
    ctx.save_for_backward(neighbors, output[1])


def _neighbor_max_backward(ctx, gradient: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
    neighbors, winners = ctx.saved_tensors
    result = []
    for grad, index, slot in zip(gradient, neighbors, winners, strict=True):
        # a cloud at a time: indices take twice the memory of values
        source = index.gather(1, slot.long())
        result.append(grad.new_zeros(ctx.count, grad.shape[1]).scatter_add(0, source, grad))
    return torch.stack(result), None, None


_neighbor_max.register_autograd(_neighbor_max_backward, setup_context=_neighbor_max_context)


def _slot_type(k: int) -> torch.dtype:
    return torch.uint8 if k <= 256 else torch.int32


def _flat(neighbors: Tensor, count: int) -> Tensor:
    """Indices into the points of all clouds, ``(B, M, k)`` to ``(B M, k)``."""
    offset = torch.arange(neighbors.shape[0], device=neighbors.device) * count
    return (neighbors + offset[:, None, None]).flatten(0, 1)


def _edge_terms(
    layer: Layer, features: Tensor, neighbors: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Two ``(B, N, D)``, of point j and of point i, whose sum is the normalised layer on ij."""
    features = exact(features)
    weight, norm = layer.linear.weight.to(features.dtype), layer.norm
    if layer.training:
        mean, variance = norm.batch_statistics(*_edge_statistics(weight, features, neighbors, mask))
    else:
        mean, variance = _running(norm)
    scale, shift = _scale_and_shift(norm, mean, variance)
    of_difference, of_centre = (scale[:, None] * weight).chunk(2, dim=1)
    ends = F.linear(features, of_difference)
    return ends, F.linear(features, of_centre - of_difference, shift)


def _edge_statistics(
    weight: Tensor, features: Tensor, neighbors: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(D,)`` and variance ``(D,)`` of ``weight [x_j - x_i, x_i]``, and the number of edges.

    They follow from mean and covariance of the edges themselves, and these from in-degrees and the
    sums ``d_i`` of the ``x_j - x_i`` at each point: with the x centred, the sum over all edges ij
    of ``(x_j - x_i)(x_j - x_i)^T`` is the sum over all points i of
    ``(indegree_i - k) x_i x_i^T - d_i x_i^T - x_i d_i^T``.
    """
    k = neighbors.shape[2]
    index, rows = _flat(neighbors, features.shape[1]), features.flatten(0, 1)
    real = rows.new_ones(len(rows), 1) if mask is None else mask.reshape(-1, 1).to(rows.dtype)
    points = real.sum()
    centre = (real * rows).sum(dim=0) / points
    rows = real * (rows - centre)
    degree = torch.zeros_like(real).scatter_add_(
        0, index.reshape(-1, 1), real.expand(-1, k).reshape(-1, 1)
    )
    differences = real * (F.embedding_bag(index, rows, mode="sum") - k * rows)
    mean = differences.sum(dim=0) / (k * points)
    cross = differences.mT @ rows / (k * points)
    spread = (rows * (degree - k * real)).mT @ rows / (k * points)
    within = spread - cross - cross.mT - mean[:, None] * mean
    covariance = torch.cat(
        (
            torch.cat((within, cross), dim=1),
            torch.cat((cross.mT, rows.mT @ rows / points), dim=1),
        )
    )
    variance = ((weight @ covariance) * weight).sum(dim=-1).clamp_min(0)
    return weight @ torch.cat((mean, centre)), variance, k * points


def _pool_moments(mean: Tensor, squares: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of rows of P blocks together, from those of each (Chan 1979).

    Args:
        mean: ``(P, D)``.
        squares: ``(P, D)``, sums about the means.
        count: ``(P,)``.
    """
    total = count.sum()
    count = count[:, None]
    joint = (count * mean).sum(dim=0) / total
    squares = squares + count * (mean - joint).square()
    return joint, squares.sum(dim=0) / total, total


def _without_padding(features: Tensor, mask: Tensor | None) -> Tensor:
    """Zero in padded rows, which divided by the variance of points that coincide would grow."""
    return features if mask is None else features.masked_fill(~mask[..., None], 0.0)


def _running(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _scale_and_shift(norm: BatchNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Batch normalisation by these statistics, as ``scale * x + shift``."""
    scale = exact(norm.weight) * torch.rsqrt(exact(variance) + norm.eps)
    return scale, exact(norm.bias) - mean * scale
