"""Frames from the principal axes of a cloud."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pointcanon import clouds, rotations
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["PCA"]

EIGENVALUE_GAP = 1e-4
"""Two eigenvalues closer than this fraction of the largest leave their axes undetermined."""

SKEWNESS = 1e-6
"""Third moments below this fraction of the largest possible leave a sign undetermined."""


class PCA(Canonicalizer):
    """Principal axes as candidate frames, equally weighted.

    Eigenvectors of the covariance are equivariant up to their signs and order, so the *set* of
    candidates is exactly equivariant on clouds with three distinct eigenvalues (Puny et al. 2022,
    arXiv 2110.03336; Li et al. 2021). The skewness of the cloud along its first two axes fixes one
    member of the set, and the finite group that permutes the set gives the others in a fixed
    order, so that on generic clouds the candidates are equivariant one by one.

    Args:
        poses: 1 (signs by skewness), 4 (the proper sign choices) or 24 (with all axis orders).

    Raises:
        InputError: For any other number.
    """

    def __init__(self, poses: Literal[1, 4, 24] = 24) -> None:
        super().__init__()
        self.poses: Literal[1, 4, 24] = poses
        flips = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        elements = {
            1: torch.eye(3, dtype=torch.float64)[None],
            4: torch.diag_embed(flips.to(torch.float64)),
            24: rotations.group("O", torch.float64).round(),
        }
        if poses not in elements:
            raise InputError(f"poses is {poses!r}; choose 1, 4 or 24")
        self.register_buffer("elements", elements[poses], persistent=False)

    elements: Tensor

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"poses": self.poses}

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        # moments in float64: the axes are as exact as the coordinates allow
        exact = clouds.unit_scale(points.detach().to(torch.float64), mask)
        covariance = exact.mT @ exact
        eigenvalues, axes = torch.linalg.eigh(covariance)
        eigenvalues, axes = eigenvalues.flip(-1), axes.flip(-1)
        along = exact @ axes
        skewness = along.pow(3).sum(dim=1)
        sign = torch.where(skewness < 0, -1.0, 1.0)
        axes = axes * sign[:, None]
        frame = torch.cat(
            (axes[..., :2], torch.linalg.cross(axes[..., 0], axes[..., 1])[..., None]), dim=-1
        )
        largest = eigenvalues[:, :1]
        gaps = eigenvalues[:, :2] - eigenvalues[:, 1:]
        degenerate = (gaps <= EIGENVALUE_GAP * largest).any(dim=1)
        if self.poses == 1:
            certain = skewness.abs() > SKEWNESS * along.abs().pow(3).sum(dim=1)
            degenerate = degenerate | ~certain[:, :2].all(dim=1)
        candidates = frame[:, None] @ self.elements.to(torch.float64)
        return Frames.of(candidates.to(points.dtype), degenerate=degenerate)
