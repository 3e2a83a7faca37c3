"""Points that belong to no surface: what a scanner sees of dust, rain, or the thing next to it."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcanon import clouds, neighbors
from pointcanon.errors import InputError

__all__ = ["inliers"]

ROUNDS = 2
"""Strays are neighbours to one another until the first of them are gone."""


def inliers(
    points: Tensor, mask: Tensor | None = None, *, k: int = 6, ratio: float = 2.25
) -> Tensor:
    """Which points have neighbours as near as most points of their cloud have.

    Networks that take a maximum over points are thrown off by a handful of strays. This is the
    statistical outlier removal of Rusu et al. (Robotics and Autonomous Systems 56, 2008) with the
    median in place of mean and deviation, which the strays themselves would raise. Distances do not
    depend on pose, place or scale, and so neither does the answer.

    What comes back is a mask as every network and canonicalizer here takes it:
    ``model.predict(points, inliers(points))``. Half the points of a cloud are kept at the least.

    Args:
        points: ``(B, N, 3)`` floating point.
        mask: ``(B, N)`` bool, True = a real point; padding is no neighbour, and comes out False.
        k: Neighbours whose mean distance counts.
        ratio: A point is left out whose neighbours are more than so many times as far away as
            those of the median point. At least 1.

    Returns:
        ``(B, N)`` bool.

    Raises:
        InputError: On clouds that no answer can be given for, or a number out of range.
    """
    if k < 1:
        raise InputError(f"k is {k}; choose at least 1 neighbour")
    if not ratio >= 1:
        raise InputError(f"ratio is {ratio}; choose at least 1, where half the points stay")
    clouds.check_cloud(points, mask)
    real = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
    # in double precision, where no square of a difference vanishes or overflows
    exact = points.double()
    exact = clouds.unit_scale(exact - clouds.centroid(exact, mask)[:, None], mask)
    kept = real
    for _ in range(ROUNDS):
        far = _mean_distance(exact, neighbors.knn(points, k + 1, kept))
        median = far.masked_fill(~kept, torch.nan).nanmedian(dim=1, keepdim=True).values
        # of a cloud most of whose points coincide nothing can be said
        kept = kept & ((far <= ratio * median) | (median == 0))
    enough = 2 * kept.sum(dim=1, keepdim=True) >= real.sum(dim=1, keepdim=True)
    return torch.where(enough, kept, real)


def _mean_distance(points: Tensor, index: Tensor) -> Tensor:
    """Of each point to the neighbours ``index (B, N, 1 + k)``, the first of which is itself."""
    batch = torch.arange(points.shape[0], device=points.device)[:, None, None]
    near = points[batch, index[..., 1:]]
    return (near - points[:, :, None]).norm(dim=-1).mean(dim=2)
