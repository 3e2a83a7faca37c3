"""Frames that align the surfaces of an object with the coordinate planes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pointcanon import clouds, neighbors, portable, rotations
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.pca import PCA
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.rotations import product

__all__ = ["Manhattan", "surface_normals"]

STARTS = 8
"""Rotations of the principal axes from which the alignment is sought; the best one counts."""

TIE = 1e-4
"""Alignments, which are at most 1, that differ by less count as the same."""


class Manhattan(Canonicalizer):
    """The frame along which the normals of the surface point, in all 24 orders and signs.

    Man-made things are mostly built of faces at right angles. Their frame maximises the alignment
    ``sum_i w_i |R^T n_i|_4^4`` of the normals n_i (the fourth power does not mind their sign), the
    Manhattan frame of Straub et al. (CVPR 2014) with a smooth measure. It needs no training, and
    where there are such faces it is exact within a degree or two, where principal axes tilt with
    every asymmetry of the object.

    The ascent ``R <- polar(sum_i w_i n_i (R^T n_i)^3)`` is the fixed-point iteration of symmetric
    kurtosis-based independent component analysis (Hyvarinen & Oja 1997). It starts from fixed
    rotations of the principal axes, so the frame is exactly equivariant on generic clouds. The
    measure is the same for all 24 rotations of the cube: the one nearest to the principal axes
    comes first, the others follow in a fixed order. A normal counts in proportion to its length;
    estimated ones are as long as the surface is flat.

    Args:
        poses: 1 or 24 (a scorer such as that of ``Optimized`` can choose among the 24).
        k: Neighbours from which the normal of a point is estimated, where none are given.
        steps: Of the ascent.

    Raises:
        InputError: For another number of poses, k below 3 or steps below 1.
    """

    def __init__(self, poses: Literal[1, 24] = 24, k: int = 10, steps: int = 12) -> None:
        super().__init__()
        if poses not in (1, 24):
            raise InputError(f"poses is {poses!r}; choose 1 or 24")
        if k < 3:
            raise InputError(f"k is {k}; a plane needs at least 3 neighbours")
        if steps < 1:
            raise InputError(f"steps is {steps}; choose at least 1")
        self.poses: Literal[1, 24] = poses
        self.k, self.steps = k, steps
        self.axes = PCA(1)
        self.register_buffer("cube", rotations.group("O", torch.float64).round(), persistent=False)
        self.register_buffer("starts", _starts(STARTS), persistent=False)
        self.cube: Tensor
        self.starts: Tensor

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"poses": self.poses, "k": self.k, "steps": self.steps}

    @property
    def candidate_group(self) -> Tensor:
        return self.cube[: self.poses]

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        axes = self.axes.propose(points, mask, normals)
        principal = axes.rotations[:, 0]
        with torch.no_grad():
            # everything below happens in the invariant pose, so that a tie is broken the same way
            posed = product(clouds.unit_scale(points, mask), principal)
            if normals is None:
                normals = surface_normals(posed, self.k, mask)
            else:
                normals = product(normals, principal)
            aligned = self._align(normals)
            aligned = _nearest_to_identity(aligned, self.cube.to(aligned))
            turns = aligned[:, None] @ self.cube.to(aligned)[: self.poses]
        return Frames.of(product(principal[:, None], turns), degenerate=axes.degenerate)

    def _align(self, normals: Tensor) -> Tensor:
        """The best local maximum ``(B, 3, 3)`` of the alignment, over all starts."""
        lengths = normals.norm(dim=-1)
        normals = normals / lengths.clamp_min(1e-12)[..., None]
        weights = lengths / lengths.sum(dim=1, keepdim=True).clamp_min(1e-12)
        starts = self.starts.to(normals).expand(normals.shape[0], -1, -1, -1)
        frames, alignment = _ascend(normals, weights, starts, self.steps)
        # several starts reach one maximum: the first of them, whatever the rounding, goes on alone
        best = (alignment >= alignment.amax(dim=1, keepdim=True) - TIE).int().argmax(dim=1)
        chosen = frames[torch.arange(frames.shape[0], device=frames.device), best][:, None]
        return _ascend(normals, weights, chosen, 2 * self.steps)[0][:, 0]


def _ascend(normals: Tensor, weights: Tensor, frames: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Frames after so many steps from ``(B, S, 3, 3)``, and their alignment ``(B, S)``."""
    weighted = (weights[..., None] * normals).mT

    def step(carry: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        (frames,) = carry
        # all starts side by side, (B, N, 3 S): two matrix products a step
        along = normals @ frames.transpose(1, 2).flatten(2)
        pull = (weighted @ along**3).unflatten(2, (-1, 3)).transpose(1, 2)
        frames = rotations.svd_project(pull + 1e-6 * frames)
        return (frames,), frames

    (frames,), _ = portable.repeat(step, (frames,), steps)
    along = normals @ frames.transpose(1, 2).flatten(2)
    alignment = torch.einsum("bn,bnc->bc", weights, along**4)
    return frames, alignment.unflatten(1, (-1, 3)).sum(dim=2)


def surface_normals(points: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Normals of the surface a cloud was sampled from, up to sign, as long as it is flat there.

    Args:
        points: ``(B, N, 3)``.
        k: Neighbours (the point itself included) through which a plane is laid.
        mask: ``(B, N)`` bool, True = a real point.

    Returns:
        ``(B, N, 3)``, whose length is the planarity ``(l1 - l0) / l2`` in [0, 1] of the
        neighbourhood, from the eigenvalues l0 <= l1 <= l2 of its covariance; zero at padding.
    """
    index = neighbors.knn(points, k, mask)
    batch = torch.arange(points.shape[0], device=points.device)[:, None, None]
    near = points[batch, index]
    near = near - near.mean(dim=2, keepdim=True)
    values, vectors = portable.eigh(near.mT @ near)
    tiny = torch.finfo(points.dtype).tiny
    planarity = ((values[..., 1] - values[..., 0]) / values[..., 2].clamp_min(tiny)).clamp(0, 1)
    if mask is not None:
        planarity = planarity * mask
    return vectors[..., 0] * planarity[..., None]


def _nearest_to_identity(frames: Tensor, cube: Tensor) -> Tensor:
    """Of each frame's 24 equivalents the one with the largest trace ``(B, 3, 3)``."""
    trace = torch.einsum("bij,gji->bg", frames, cube)
    return frames @ cube[trace.argmax(dim=1)]


def _starts(count: int) -> Tensor:
    """The identity and fixed rotations that are far from one another modulo the cube group."""
    cube = rotations.group("O", torch.float64)
    grid = rotations.so3_grid(512, dtype=torch.float64)
    chosen = [torch.eye(3, dtype=torch.float64)]
    nearest = torch.full((len(grid),), -torch.inf, dtype=torch.float64)
    for _ in range(count - 1):
        trace = torch.einsum("nij,gkj,ik->ng", grid, cube, chosen[-1]).amax(dim=1)
        nearest = torch.maximum(nearest, trace)
        chosen.append(grid[nearest.argmin()])
    return torch.stack(chosen)
