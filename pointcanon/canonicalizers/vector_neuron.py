"""A learned equivariant frame: vector neurons, orthonormalised."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pointcanon import clouds, neighbors
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.vector_frames import (
    Orthonormalise,
    vector_frames,
    vectors_needed,
)
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.layers import vector_neurons as vn
from pointcanon.portable import exporting

__all__ = ["VectorNeuron"]


class VectorNeuron(Canonicalizer):
    """One frame from a small equivariant network (learned canonicalization, Kaba et al. 2023).

    A vector-neuron network (Deng et al. 2021, arXiv 2104.12229) gives every point two or three
    vectors that turn with the cloud; their mean over the points is made a rotation. Invariant to
    translation, scale and the order of the points.

    Neighbours count by ``1 - d^2 / r^2``, where r is the distance of the k-th: the last of them
    fades out where another would fade in, so that the frame does not jump, nor hang on rounding,
    where the k nearest points change. (Clouds of at most k points count all alike.)

    Args:
        size: ``"small"`` (about 1,200 parameters, one edge convolution) or ``"large"`` (about
            190,000, two edge convolutions and layers that see the whole cloud).
        k: Neighbours of each point, itself included.
        num_points: Reduce larger clouds to this many farthest points. The chosen points do not
            depend on order or pose, but they can hide an exact symmetry of the full cloud.
        orthonormalise: ``"gram-schmidt"`` of two vectors with a cross product, or ``"svd"``: the
            rotation nearest to three. ``"matrix-fisher"`` is the same, and takes the three for the
            parameter of a matrix Fisher distribution (``frames.fisher``), for training with
            :func:`pointcanon.losses.matrix_fisher_loss`: they then say how sure the frame is too
            (``frames.confidence``).
        normals: Whether the network takes normals as a second vector of each point.
        dropout: Probability of dropping a whole vector before the last layer, in training.

    Raises:
        InputError: For any other choice.
    """

    def __init__(
        self,
        size: Literal["small", "large"] = "small",
        k: int = 20,
        num_points: int | None = None,
        orthonormalise: Orthonormalise = "gram-schmidt",
        normals: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if size not in _NETWORKS:
            raise InputError(f"unknown size {size!r}; choose one of: {', '.join(_NETWORKS)}")
        if k < 2:
            raise InputError(f"k is {k}; a point counts as its own neighbour, so choose k >= 2")
        if num_points is not None and num_points < 3:
            raise InputError(f"num_points is {num_points}; a frame needs at least 3 points")
        self.size: Literal["small", "large"] = size
        self.k = k
        self.num_points = num_points
        self.orthonormalise: Orthonormalise = orthonormalise
        self.normals = normals
        self.dropout = dropout
        self.network = _NETWORKS[size](2 if normals else 1, vectors_needed(orthonormalise), dropout)

    @property
    def hyperparameters(self) -> dict[str, object]:
        names = ("size", "k", "num_points", "orthonormalise", "normals", "dropout")
        return {name: getattr(self, name) for name in names}

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        if self.normals and normals is None:
            raise InputError("this canonicalizer was built with normals=True: pass normals too")
        if self.num_points is not None and (exporting() or points.shape[1] > self.num_points):
            if mask is None and exporting():  # smaller clouds, which repeat points, are not known
                mask = torch.ones_like(points[..., 0], dtype=torch.bool)
            points, mask, normals = _thin(points, mask, normals, self.num_points)
        points = clouds.unit_scale(clouds.recentre(points, mask), mask)
        index, weights = _neighborhoods(points, self.k, mask)
        channels = [points, normals] if self.normals and normals is not None else [points]
        vectors = self.network(torch.stack(channels, dim=-1), index, weights, mask)
        pool = vn.MeanPool()
        raw = pool(vectors, mask)
        # the mean is told apart from zero by comparison with what it is the mean of
        power = pool(vectors.detach().square(), mask).sum(dim=-2)
        size = power.amax(dim=-1).sqrt()
        return vector_frames(raw, size, points, self.orthonormalise)


class _Small(nn.Module):
    """One edge convolution and two layers on points, as equiadapt's VNSmall."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        width = 21
        self.edges = vn.EdgeConv(channels, width, cross=True)
        self.norm = vn.BatchNorm(width)
        self.hidden = vn.LinearLeakyReLU(width, width)
        self.dropout = vn.Dropout(dropout)
        self.out = vn.LinearLeakyReLU(width, outputs, norm=False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm(self.edges(x, index, weights), mask)
        return self.out(self.dropout(self.hidden(x, mask)))


class _Large(nn.Module):
    """Two edge convolutions, then layers on points that also see the mean over the cloud."""

    def __init__(self, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.near = vn.EdgeConv(channels, 32, cross=True)
        self.near_norm = vn.BatchNorm(32)
        self.far = vn.EdgeConv(32, 64, shared_direction=True)
        self.far_norm = vn.BatchNorm(64)
        self.embed = vn.LinearLeakyReLU(32 + 64, 128)
        self.mix = nn.ModuleList(vn.LinearLeakyReLU(2 * 128, 128) for _ in range(2))
        self.pool = vn.MeanPool()
        self.dropout = vn.Dropout(dropout)
        self.last = vn.LinearLeakyReLU(2 * 128, 64)
        self.out = vn.Linear(64, outputs)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        near = self.near_norm(self.near(x, index, weights), mask)
        far = self.far_norm(self.far(near, index, weights), mask)
        x = self.embed(torch.cat((near, far), dim=-1), mask)
        for layer in self.mix:
            x = x + layer(self._with_context(x, mask), mask)
        return self.out(self.dropout(self.last(self._with_context(x, mask), mask)))

    def _with_context(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return torch.cat((x, self.pool(x, mask)[:, None].expand_as(x)), dim=-1)


_NETWORKS = {"small": _Small, "large": _Large}


def _thin(
    points: Tensor, mask: Tensor | None, normals: Tensor | None, count: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The cloud reduced to ``count`` farthest points; repeats of small clouds are masked out."""
    index = neighbors.farthest_point_sample(points, count, mask)
    if mask is not None:
        mask = torch.arange(count, device=points.device) < mask.sum(dim=1)[:, None]
    index = index[..., None].expand(-1, -1, 3)
    points = points.gather(1, index)
    if mask is not None:
        points = torch.where(mask[..., None], points, points.new_zeros(()))
    return points, mask, None if normals is None else normals.gather(1, index)


def _neighborhoods(points: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices and weights of the neighbours, both ``(B, N, k)``, nearest first."""
    batch, count = points.shape[:2]
    index = neighbors.knn(points, k, mask)
    near = points.gather(1, index.flatten(1)[..., None].expand(-1, -1, 3)).view(batch, count, k, 3)
    squared = (near - points[:, :, None]).square().sum(dim=-1)
    reach = squared[..., -1:]
    fading = 1 - squared / torch.where(reach > 0, reach, torch.ones_like(reach))
    # where a cloud has no more than k points all of them are there, and repeats do not count
    if mask is None:
        counts = torch.full((batch, 1, 1), count, device=points.device)
    else:
        counts = mask.sum(dim=1)[:, None, None]
    every = (torch.arange(k, device=points.device) < counts).to(points.dtype)
    weights = torch.where(counts > k, fading.clamp(0, 1), every.expand_as(fading))
    if mask is not None:  # rows of padding have no neighbourhood; any weights will do
        weights = torch.where(mask[..., None], weights, torch.ones_like(weights))
    return index, weights
