"""Frames from the principal axes of a cloud."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pointcanon import clouds, portable, rotations
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["PCA"]

EIGENVALUE_GAP = 1e-4
"""Two eigenvalues closer than this fraction of the largest leave their axes undetermined."""

SKEWNESS = 1e-6
"""Third moments below this fraction of the largest possible leave a sign undetermined."""

CROSSING = 0.1
"""Two eigenvalues this close, as a fraction of the largest, begin to share their plane's weight."""

FLATNESS = 1e-8
"""Fourth moments in a plane below this fraction of those in space are rounding."""


class PCA(Canonicalizer):
    """Principal axes as candidate frames.

    Eigenvectors of the covariance are equivariant up to their signs and order, so the *set* of
    candidates is exactly equivariant on clouds with three distinct eigenvalues (Puny et al. 2022,
    arXiv 2110.03336; Li et al. 2021). The skewness of the cloud along its first two axes fixes one
    member of the set, and the finite group that permutes the set gives the others in a fixed
    order, so that on generic clouds the candidates are equivariant one by one.

    Where two eigenvalues cross, the axes in their plane may turn at once by any angle, and the
    uniform mean of a predictor over the candidates jumps. With ``weighting="smooth"`` it does not:
    the frames are weighted and robust in the sense of Dym et al. (2024, arXiv 2402.16077), by
    fewer candidates than their pairs of points. The axis of the third eigenvalue stays put at a
    crossing, and in the plane orthogonal to it the fourth moment ``c = sum z^4``, z a point as a
    complex number, has four directions ``arg(c) / 4 + j pi / 2``. Frames on these get the weight
    ``|c|`` as far as the gap of the two eigenvalues closes, and the principal axes lose theirs in
    step. The vote of a continuous predictor is then continuous wherever one gap is open and the
    fourth moment in the plane of the other does not vanish with it; elsewhere (all three
    eigenvalues equal, or a three-, five- or more than four-fold axis) ``degenerate`` is set.
    A square plate, which has no principal axes, is not degenerate here.

    Args:
        poses: 1 (signs by skewness), 4 (the proper sign choices) or 24 (with all axis orders).
        weighting: ``"uniform"``, or ``"smooth"``, which makes 20 candidates of 4 poses and 72 of
            24; while no eigenvalues are within a tenth of the largest, all the weight is on the
            principal axes.

    Raises:
        InputError: For any other choice, or smooth weighting of a single pose.
    """

    def __init__(
        self,
        poses: Literal[1, 4, 24] = 24,
        weighting: Literal["uniform", "smooth"] = "uniform",
    ) -> None:
        super().__init__()
        if poses not in (1, 4, 24):
            raise InputError(f"poses is {poses!r}; choose 1, 4 or 24")
        if weighting not in ("uniform", "smooth"):
            raise InputError(f"weighting is {weighting!r}; choose 'uniform' or 'smooth'")
        if poses == 1 and weighting == "smooth":
            raise InputError("a single pose has no weights to smooth; choose poses = 4 or 24")
        self.poses: Literal[1, 4, 24] = poses
        self.weighting: Literal["uniform", "smooth"] = weighting
        families = _families(poses)[: 1 if weighting == "uniform" else 3]
        self.sizes = [len(family) for family in families]
        source = torch.arange(len(families)).repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("elements", torch.cat(families), persistent=False)
        self.register_buffer("source", source, persistent=False)

    elements: Tensor
    source: Tensor

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"poses": self.poses, "weighting": self.weighting}

    @property
    def candidate_group(self) -> Tensor:
        families = self.elements.split(self.sizes)
        return families[0] if len(set(self.sizes)) == 1 else super().candidate_group

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        # moments in float64: the axes are as exact as the coordinates allow
        exact = clouds.unit_scale(points.detach().to(torch.float64), mask)
        covariance = exact.mT @ exact
        eigenvalues, axes = portable.eigh(covariance)
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
        if self.weighting == "smooth":
            frames, weights = _smoothed(frame, exact @ frame, gaps, largest)
            degenerate = weights.sum(dim=1) <= EIGENVALUE_GAP
        else:
            frames, weights = frame[:, None], torch.ones_like(largest)
            degenerate = (gaps <= EIGENVALUE_GAP * largest).any(dim=1)
        if self.poses == 1:
            certain = skewness.abs() > SKEWNESS * along.abs().pow(3).sum(dim=1)
            degenerate = degenerate | ~certain[:, :2].all(dim=1)
        candidates = frames[:, self.source] @ self.elements.to(torch.float64)
        shares = (weights / weights.new_tensor(self.sizes))[:, self.source]
        scores = shares.clamp_min(torch.finfo(torch.float64).tiny).log()
        return Frames.of(
            candidates.to(points.dtype), scores.to(points.dtype), degenerate=degenerate
        )


def _families(poses: int) -> tuple[Tensor, ...]:
    """What permutes the candidates when all axes, the third or the first alone are determined."""
    every = rotations.group("O", torch.float64).round()
    if poses == 1:
        return (every[:1],) * 3
    if poses == 24:
        return (every,) * 3
    keeps = every.diagonal(dim1=1, dim2=2).abs() == 1
    return every[keeps.all(dim=1)], every[keeps[:, 2]], every[keeps[:, 0]]


def _smoothed(frame: Tensor, along: Tensor, gaps: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The principal frame and the two that turn it in a plane, ``(B, 3, 3, 3)``, and weights."""
    eye = torch.eye(3, dtype=frame.dtype, device=frame.device)
    angle_12, certain_12 = _fourfold(along, along[..., 0], along[..., 1])
    angle_23, certain_23 = _fourfold(along, along[..., 1], along[..., 2])
    in_12 = frame @ rotations.about_axis(eye[2], angle_12)
    in_23 = frame @ rotations.about_axis(eye[0], angle_23)
    width = CROSSING * torch.where(largest > 0, largest, torch.ones_like(largest))
    open_12, open_23 = (gaps / width).clamp(0, 1).unbind(dim=1)
    weights = (
        open_12 * open_23,
        (1 - open_12) * open_23 * certain_12,
        (1 - open_23) * open_12 * certain_23,
    )
    return torch.stack((frame, in_12, in_23), dim=1), torch.stack(weights, dim=1)


def _fourfold(along: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Angle, up to quarter turns, of the fourth moment in a plane, and its size in [0, 1]."""
    # (x + iy)^4, whose modulus is the fourth power of the distance
    squared = x.square() - y.square(), 2 * x * y
    real = (squared[0].square() - squared[1].square()).sum(dim=1)
    imaginary = (2 * squared[0] * squared[1]).sum(dim=1)
    in_plane = (x.square() + y.square()).square().sum(dim=1)
    in_space = along.square().sum(dim=2).square().sum(dim=1)
    most = torch.maximum(in_plane, FLATNESS * in_space)
    size = (real.square() + imaginary.square()).sqrt() / torch.where(
        most > 0, most, torch.ones_like(most)
    )
    return portable.atan2(imaginary, real) / 4, size
