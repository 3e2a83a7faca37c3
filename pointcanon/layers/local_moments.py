"""What a cloud is like around its points, in vectors and tensors that turn with it."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcanon.layers.tiles import tiles

__all__ = ["SCALES", "local_moments", "symmetric", "symmetric_square"]

SCALES = (0.8, 0.4, 0.2, 0.1)
"""Widths of the neighbourhoods, each half of the one before."""


@torch.no_grad()
def local_moments(
    points: Tensor, cloud: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a cloud around some points, in neighbourhoods of all ``SCALES``.

    Neighbours are weighed by a Gaussian of their distance: nothing jumps where one of them comes or
    goes, and their order does not matter. No gradient flows through.

    Args:
        points: ``(B, M, 3)``.
        cloud: ``(B, N, 3)``, of size about 1 (``clouds.unit_scale``).
        mask: ``(B, N)`` bool, True = a real point of the cloud.

    Returns:
        ``(B, M, S, 3)``, the way from each point to the mean of its neighbours, and
        ``(B, M, S, 6)``, their covariance (:func:`symmetric`), in units of the scale.
    """
    monomials = _monomials(cloud)
    if mask is not None:
        monomials = monomials * mask[..., None]
    offsets, covariances = [], []
    for clouds, part in tiles(points.shape[0], points.shape[1], cloud.shape[1]):
        offset, covariance = _moments(points[clouds, part], cloud[clouds], monomials[clouds])
        offsets.append(offset.flatten(0, 1))
        covariances.append(covariance.flatten(0, 1))
    size = points.shape[:2]
    return torch.cat(offsets).unflatten(0, size), torch.cat(covariances).unflatten(0, size)


def symmetric(vectors: Tensor) -> Tensor:
    """The products ``v v^T`` of ``(..., 3)`` vectors as their entries xx, yy, zz, xy, yz, zx."""
    return torch.cat((vectors.square(), vectors * vectors.roll(-1, dims=-1)), dim=-1)


def symmetric_square(rotations: Tensor) -> Tensor:
    """``(..., 6, 6)`` matrices S with ``symmetric(v @ R) = symmetric(v) @ S``."""
    first, second = [0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 2, 0]
    left, right = rotations[..., first], rotations[..., second]
    straight = left[..., first, :] * right[..., second, :]
    crossed = left[..., second, :] * right[..., first, :]
    # an entry off the diagonal stands for two
    twice = torch.arange(6, device=rotations.device)[:, None] >= 3
    return straight + crossed * twice


def _monomials(points: Tensor) -> Tensor:
    return torch.cat((torch.ones_like(points[..., :1]), points, symmetric(points)), dim=-1)


def _moments(points: Tensor, cloud: Tensor, monomials: Tensor) -> tuple[Tensor, Tensor]:
    # a point counts for next to nothing itself, and for all there is where it is alone
    own = torch.finfo(points.dtype).eps * _monomials(points)
    # every pass over the weights counts: few of them, in place
    width = SCALES[0] ** 2
    squares = (cloud.square().sum(-1)[..., None], points.square().sum(-1)[..., None, :])
    weights = torch.baddbmm(squares[0], cloud, points.mT, beta=-0.5 / width, alpha=1 / width)
    weights = weights.sub_(squares[1] * (0.5 / width)).clamp_max_(0).exp_()
    offsets, covariances = [], []
    for scale in SCALES:
        if scale != SCALES[0]:
            weights = weights.square_().square_()  # half the width
        # this way round, ten rows by many columns, the product is several times as fast
        moments = (monomials.mT @ weights).mT + own
        moments = moments[..., 1:] / moments[..., :1]
        mean, second = moments.split((3, 6), dim=-1)
        offsets.append((mean - points) / scale)
        covariances.append((second - symmetric(mean)) / scale**2)
    return torch.stack(offsets, dim=2), torch.stack(covariances, dim=2)
