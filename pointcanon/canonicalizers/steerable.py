"""A learned equivariant frame: spherical tensors of neighbourhoods, orthonormalised."""

from __future__ import annotations

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
from pointcanon.layers import steerable

__all__ = ["Steerable"]

RADIAL = 4
"""Radial functions of a neighbourhood, and of the place of its centre in the cloud."""

REACH_SOFTENING = 1e-4
"""Added to the square of a neighbourhood's radius, in units of the cloud's: offsets of points that
all but coincide are rounding, and are not brought to unit size."""


class Steerable(Canonicalizer):
    """One frame from a small steerable network on spherical harmonics (e3nn).

    Farthest points of the cloud look at their nearest neighbours and at their own place: both are
    expanded in solid harmonics up to degree ``lmax`` times smooth radial functions. A few layers
    couple these tensors by Clebsch-Gordan products, gate them, and let every point see the mean
    over the cloud (Thomas et al. 2018, arXiv 1802.08219; Geiger & Smidt 2022, arXiv 2207.09453).
    The mean of the vectors (degree 1) of the last layer is made a rotation (Kaba et al. 2023).
    Invariant to translation, scale and the order of the points.

    Neighbours fade out at the distance of the k-th, where another fades in, so that the frame does
    not jump, nor hang on rounding, where the k nearest points change.

    Parity. A frame with det = +1 cannot commute with reflections. With ``mirror=False`` its vectors
    are sums of polar (1o) and axial (1e) ones, the network tells a cloud from its mirror image, and
    their frames have nothing to do with each other. With ``mirror=True`` the first two vectors are
    purely polar and the third, which ``"gram-schmidt"`` has not, purely axial. Then, in evaluation
    and for every reflection S, ``R(S x) = S R(x) diag(1, 1, -1)``: the pose of the mirror image is
    the mirror image of the pose in the plane z = 0. A cloud that is its own mirror image then has
    its plane of symmetry there, so do not train with a prior for a pose that has it elsewhere.

    Args:
        lmax: Highest degree of the tensors.
        channels: Tensors of each degree at each point.
        layers: Tensor products in turn.
        k: Neighbours of each point, itself included.
        num_points: The network looks at this many farthest points of larger clouds, with their
            neighbours among all; None for every point. The chosen points do not depend on order or
            pose, but they can hide an exact symmetry of the full cloud.
        orthonormalise: ``"gram-schmidt"`` of two vectors with a cross product, ``"svd"``: the
            rotation nearest to three, or ``"matrix-fisher"``, as for ``VectorNeuron``.
        mirror: Whether mirror images are posed as mirror images, at twice the cost.
        normals: Whether the network takes the normals of the points it looks at.
        dropout: Probability of dropping a whole tensor in each layer, in training.

    Raises:
        InputError: On a number that is too small or an unknown choice.
    """

    def __init__(
        self,
        lmax: int = 2,
        channels: int = 16,
        layers: int = 3,
        k: int = 20,
        num_points: int | None = 256,
        orthonormalise: Orthonormalise = "gram-schmidt",
        mirror: bool = False,
        normals: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("lmax", lmax, 1),
            ("channels", channels, 1),
            ("layers", layers, 1),
            ("k", k, 2),
            ("num_points", num_points, 3),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; choose at least {least}")
        self.lmax, self.channels, self.layers = lmax, channels, layers
        self.k, self.num_points = k, num_points
        self.orthonormalise: Orthonormalise = orthonormalise
        self.mirror, self.normals, self.dropout = mirror, normals, dropout
        self.harmonics = steerable.SolidHarmonics(lmax)
        vectors = vectors_needed(orthonormalise)
        self.network = _Network(lmax, 2 * RADIAL + int(normals), channels, layers, vectors, dropout)

    @property
    def hyperparameters(self) -> dict[str, object]:
        sizes = ("lmax", "channels", "layers", "k", "num_points")
        choices = ("orthonormalise", "mirror", "normals", "dropout")
        return {name: getattr(self, name) for name in (*sizes, *choices)}

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        if self.normals and normals is None:
            raise InputError("this canonicalizer was built with normals=True: pass normals too")
        points = clouds.unit_scale(clouds.recentre(points, mask), mask)
        centres, real = points, mask
        if self.num_points is not None and points.shape[1] > self.num_points:
            chosen = neighbors.farthest_point_sample(points, self.num_points, mask)
            centres = _gather(points, chosen)
            normals = None if normals is None else _gather(normals, chosen)
            if mask is not None:  # the points of small clouds repeat
                numbers = torch.arange(self.num_points, device=points.device)
                real = numbers < mask.sum(dim=1)[:, None]
        features = [self._surroundings(points, centres, mask), self._place(centres)]
        if self.normals and normals is not None:
            features.append(self.harmonics(_components(normals))[:, None])
        vectors = self._vectors(torch.cat(features, dim=1), real)
        raw = steerable.mean(vectors, real)[..., 0].permute(2, 0, 1)
        # the mean is told apart from zero by comparison with what it is the mean of
        power = steerable.mean(vectors.detach().square().sum(dim=0), real)
        size = power[..., 0].amax(dim=0).sqrt()
        return vector_frames(raw, size, points, self.orthonormalise)

    def _surroundings(self, points: Tensor, centres: Tensor, mask: Tensor | None) -> Tensor:
        """Harmonic moments of the neighbours of each centre, ``(D, RADIAL, B, M)``."""
        batch, count = points.shape[:2]
        queries = None if centres is points else centres
        index = neighbors.knn(points, self.k, mask, queries)
        row = torch.arange(batch, device=points.device)[:, None, None] * count
        near = _components(points).flatten(1).index_select(1, (index + row).flatten())
        offset = near.view(3, *index.shape) - _components(centres)[..., None]
        squared = offset.square().sum(dim=0)
        farthest = squared.amax(dim=-1, keepdim=True)
        reach = farthest + REACH_SOFTENING
        fading = (farthest - squared) / reach
        # a cloud of n < k points has no more neighbours than that, and their repeats do not count
        counts = points.new_full((batch,), count) if mask is None else mask.sum(dim=1)
        counts = counts.clamp_max(self.k)[:, None, None]
        fading = fading * (torch.arange(self.k, device=points.device) < counts)
        radial = fading * steerable.bernstein(squared / reach, RADIAL)
        harmonics = self.harmonics(offset * reach.rsqrt())
        return torch.einsum("dbmk,rbmk->drbm", harmonics, radial) / counts[..., 0]

    def _place(self, centres: Tensor) -> Tensor:
        """Where each centre is in its cloud, ``(D, RADIAL, B, M)``."""
        places = _components(centres)
        squared = places.square().sum(dim=0)
        inside = squared / (1 + squared)
        harmonics = self.harmonics(places * (1 + squared).rsqrt())
        return harmonics[:, None] * steerable.bernstein(inside, RADIAL)

    def _vectors(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Of each point, ``(3, columns, B, M)``."""
        if not self.mirror:
            return self.network(features, mask)
        # odd and even parts under x -> -x are polar and axial: rotations commute with inversion
        both = torch.stack((features, steerable.invert(features)), dim=3).flatten(2, 3)
        masks = None if mask is None else mask.repeat_interleave(2, dim=0)
        here, there = self.network(both, masks).unflatten(2, (-1, 2)).unbind(dim=3)
        polar, axial = (here - there) / 2, (here + there) / 2
        return torch.cat((polar[:, :2], axial[:, 2:]), dim=1)


class _Network(nn.Module):
    """Tensors of each point to vectors of each point, by way of ``layers`` tensor products."""

    def __init__(
        self, lmax: int, inputs: int, channels: int, layers: int, outputs: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = steerable.Linear(lmax, inputs, channels)
        self.interactions = nn.ModuleList(
            steerable.Interaction(lmax, channels, 1 if last else lmax, dropout)
            for last in (number == layers - 1 for number in range(layers))
        )
        self.out = nn.Linear(channels, outputs, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """``((lmax + 1)^2, inputs, B, M)`` to ``(3, outputs, B, M)``."""
        x = self.embed(x)
        for interaction in self.interactions:
            x = interaction(x, mask)
        return steerable.mix(self.out.weight, x[1:4])


def _components(vectors: Tensor) -> Tensor:
    """``(B, N, 3)`` to ``(3, B, N)``, contiguous."""
    return vectors.permute(2, 0, 1).contiguous()


def _gather(vectors: Tensor, index: Tensor) -> Tensor:
    return vectors.gather(1, index[..., None].expand(-1, -1, 3))
