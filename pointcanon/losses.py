"""Losses: functions of the frames a canonicalizer returned, of nothing else."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.priors import Prior
from pointcanon.rotations import about_axis, product

__all__ = ["Refines", "prior_loss", "refinement_loss"]


class Refines(Protocol):
    """A canonicalizer that can improve frames it is given."""

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        """Nearer frames of the same clouds, one for each that was given."""
        ...


def prior_loss(
    frames: Frames, prior: Prior, reference: Tensor | None = None, outliers: float = 0.0
) -> Tensor:
    """Mean negative log-likelihood of the canonical poses under ``prior``.

    An equivariant frame of a data cloud that was turned by G is R = G R0, with R0 the frame of the
    cloud as the data set holds it; the prior speaks of R0 (Mondal et al., arXiv 2310.01647).
    Several weighted candidates are a mixture, ``-log sum_k w_k p(G^T R_k)``: only those near the
    prior's mode need be right, and the weights learn which they are. With one candidate and the
    ``Aligned`` prior this is the squared distance to the identity, up to scale and constant.

    A canonicalizer that works in stages is asked the same at each of them, and the mean counts.

    Args:
        frames: Of B clouds, K candidates each.
        prior: Over the poses of the predictor's training data.
        reference: ``(B, 3, 3)``, the rotations G applied to the data; None where there were none.
        outliers: Share of clouds that may have any pose at all, ``p <- (1 - share) p + share``. A
            cloud none of whose candidates is near the mode then pulls at nothing, where the plain
            prior would pull hardest.

    Returns:
        A scalar.

    Raises:
        InputError: If ``outliers`` is not in [0, 1).
    """
    if not 0 <= outliers < 1:
        raise InputError(f"outliers is a share in [0, 1), got {outliers}")
    stages = frames.stages or (frames,)
    total = frames.rotations.new_zeros(())
    for stage in stages:
        poses = stage.rotations
        if reference is not None:
            poses = product(reference.mT[:, None].to(poses), poses)
        likelihood = (stage.log_weights + prior.log_prob(poses)).logsumexp(dim=1)
        if outliers > 0:
            anywhere = torch.full_like(likelihood, math.log(outliers))
            likelihood = torch.logaddexp(likelihood + math.log1p(-outliers), anywhere)
        total = total - likelihood.mean()
    return total / len(stages)


def refinement_loss(
    canonicalizer: Refines,
    points: Tensor,
    prior: Prior,
    reference: Tensor | None = None,
    samples: int = 4,
    spread: float = math.radians(75),
) -> Tensor:
    """How well one step of refinement undoes a random turn away from the data's pose.

    Candidates that a young scorer keeps are mostly the wrong ones and teach a refiner little; poses
    drawn about the right one are all useful. Each is judged alone, without weights: the mean
    negative log-likelihood of the refined poses under ``prior``.

    Args:
        canonicalizer: Has a method ``refine``.
        points: ``(B, N, 3)``.
        prior: Over the poses of the predictor's training data.
        reference: ``(B, 3, 3)``, the rotations applied to the data; None where there were none.
        samples: Poses drawn for each cloud.
        spread: Largest angle in radians; angles are uniform up to it, axes uniform on the sphere.

    Returns:
        A scalar.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    axis = torch.randn(len(points), samples, 3, dtype=points.dtype, device=points.device)
    angle = spread * torch.rand(len(points), samples, dtype=points.dtype, device=points.device)
    starts = about_axis(axis, angle)
    if reference is not None:
        reference = reference.to(points)
        starts = product(reference[:, None], starts)
    frames = canonicalizer.refine(points, Frames.of(starts, centre=points.mean(dim=1)))
    poses = frames.rotations
    if reference is not None:
        poses = product(reference.mT[:, None], poses)
    return -prior.log_prob(poses).mean()
