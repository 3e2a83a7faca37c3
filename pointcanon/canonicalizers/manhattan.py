"""Frames that align the surfaces of an object with the coordinate planes."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

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
        products = _products(normals)
        moments = (weights[..., None] * products).mT @ products
        starts = self.starts.to(normals).expand(normals.shape[0], -1, -1, -1)
        frames, alignment = _ascend(moments, starts, self.steps)
        # several starts reach one maximum: the first of them, whatever the rounding, goes on alone
        best = (alignment >= alignment.amax(dim=1, keepdim=True) - TIE).int().argmax(dim=1)
        chosen = frames[torch.arange(frames.shape[0], device=frames.device), best][:, None]
        return _ascend(moments, chosen, 2 * self.steps)[0][:, 0]


def _ascend(moments: Tensor, frames: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Frames after so many steps from ``(B, S, 3, 3)``, and their alignment ``(B, S)``.

    The sums over all normals are forms of their fourth moments Q, ``moments (B, 9, 9)``: with the
    products s of an axis r, ``sum_i w_i (n_i . r)^4 = s^T Q s``, and ``sum_i w_i n_i (n_i . r)^3``
    is the symmetric matrix of entries ``Q s`` times r.
    """
    moments = moments[:, None]

    def step(carry: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        (frames,) = carry
        matrices = (_products(frames.mT) @ moments).unflatten(-1, (3, 3))
        pull = (matrices @ frames.mT[..., None])[..., 0].mT
        frames = rotations.svd_project(pull + 1e-6 * frames)
        return (frames,), frames

    (frames,), _ = portable.repeat(step, (frames,), steps)
    products = _products(frames.mT)
    return frames, (products @ moments * products).sum(dim=(-1, -2))


def _products(axes: Tensor) -> Tensor:
    """``(..., 9)`` products of the entries of axes ``(..., 3)``, each with each."""
    return (axes[..., :, None] * axes[..., None, :]).flatten(-2)


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
    normals, planarity = _planes(near.mT @ near)
    if mask is not None:
        planarity = planarity * mask
    return normals * planarity[..., None]


def _planes(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Normals ``(..., 3)`` of the planes nearest to points of these covariances, and planarity."""
    if covariances.dtype == torch.float64 or portable.exporting():
        values, vectors = portable.eigh(covariances)
        normals, (least, middle, most) = vectors[..., 0], values.unbind(dim=-1)
    else:
        # a library takes matrices one by one; the roots of a cubic take them all at once, and cost
        # half of the digits where two are equal
        exact = covariances.double()
        least, middle, most = _eigenvalues(exact)
        shifted = exact - least[..., None, None] * torch.eye(3).to(exact)
        crossed = torch.linalg.cross(shifted, shifted.roll(-1, dims=-2), dim=-1)
        longest = crossed.square().sum(dim=-1).argmax(dim=-1)[..., None, None]
        normals = crossed.gather(-2, longest.expand(*longest.shape[:-1], 3))[..., 0, :]
        normals = nn.functional.normalize(normals, dim=-1, eps=torch.finfo(exact.dtype).tiny)
    tiny = torch.finfo(covariances.dtype).tiny
    planarity = ((middle - least) / most.clamp_min(tiny)).clamp(0, 1)
    return normals.to(covariances), planarity.to(covariances)


def _eigenvalues(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of symmetric ``(..., 3, 3)``, ascending, by the roots of their cubic (Smith 1961)."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    rest = matrices - mean[..., None, None] * torch.eye(3).to(matrices)
    spread = (rest.square().sum(dim=(-1, -2)) / 6).sqrt()
    first, second, third = rest.unbind(dim=-2)
    determinant = (torch.linalg.cross(first, second, dim=-1) * third).sum(dim=-1)
    tiny = torch.finfo(matrices.dtype).tiny
    angle = (determinant / (2 * spread**3).clamp_min(tiny)).clamp(-1, 1).acos() / 3
    most = mean + 2 * spread * angle.cos()
    least = mean + 2 * spread * (angle + 2 * math.pi / 3).cos()
    return least, 3 * mean - most - least, most


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
