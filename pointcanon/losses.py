"""Losses: functions of the frames a canonicalizer returned, of nothing else."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from pointcanon import rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.priors import Prior, log_normaliser
from pointcanon.rotations import about_axis, product

__all__ = [
    "Refines",
    "contrastive_loss",
    "matrix_fisher_loss",
    "prior_loss",
    "quotient_loss",
    "refinement_loss",
    "refinement_starts",
]


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
    spread: float = math.radians(30),
    starts: Tensor | None = None,
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
        starts: ``(B, samples, 3, 3)``, the turns away from the data's pose where they have been
            drawn already, by :func:`refinement_starts`.

    Returns:
        A scalar.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if starts is None:
        starts = refinement_starts(len(points), samples, spread)
    starts = starts.to(points)
    if reference is not None:
        reference = reference.to(points)
        starts = product(reference[:, None], starts)
    frames = canonicalizer.refine(points, Frames.of(starts, centre=points.mean(dim=1)))
    poses = frames.rotations
    if reference is not None:
        poses = product(reference.mT[:, None], poses)
    return -prior.log_prob(poses).mean()


def refinement_starts(
    count: int,
    samples: int = 4,
    spread: float = math.radians(30),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Turns ``(count, samples, 3, 3)`` float32, on the CPU so as to be the same on every device.

    Args:
        count: Of clouds.
        samples: Turns of each.
        spread: Largest angle in radians; angles are uniform up to it, axes uniform on the sphere.
        generator: Source of randomness; None takes torch's.
    """
    axis = torch.randn(count, samples, 3, generator=generator)
    return about_axis(axis, spread * torch.rand(count, samples, generator=generator))


def contrastive_loss(embeddings: Tensor) -> Tensor:
    """How alike a network's answers to the poses of one cloud are: what keeps an orbit distinct.

    Optimised canonicalization (Panigrahi & Mondal, arXiv 2405.14089) shows any network s, which
    need not be equivariant, the cloud posed by every element of a group and takes the pose of least
    energy, ``E_g = -cos(s(x g), v)`` with a learned vector v. That pose is unique only if the
    answers differ, so they are pushed towards right angles,
    ``L = mean_{g != h} |cos(s(x g), s(x h))|``, and the prior tells which one shall win::

        frames = Contrastive(network)(points)
        loss = contrastive_loss(frames.embeddings) + prior_loss(frames, prior, reference)

    The loss is 0 only where D >= G. A network that cannot tell two poses apart, such as an
    invariant one or any network on a cloud with a symmetry in the group, has loss 1 there.

    Args:
        embeddings: ``(B, G, D)``, of B clouds in G >= 2 poses.

    Returns:
        A scalar in [0, 1].

    Raises:
        InputError: If the shape is not ``(B, G >= 2, D)``.
    """
    if embeddings.ndim != 3 or embeddings.shape[1] < 2:
        shape = tuple(embeddings.shape)
        raise InputError(f"embeddings has shape {shape}, expected (B, G, D) with G >= 2 poses")
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    unit = nn.functional.normalize(embeddings.to(dtype), dim=-1)
    count = embeddings.shape[1]
    pairs = torch.ones(count, count, dtype=torch.bool, device=unit.device).triu(diagonal=1)
    return product(unit, unit.mT)[:, pairs].abs().mean()


def quotient_loss(raw: Tensor, group: Tensor | str, reference: Tensor) -> Tensor:
    """Squared distance to the reference pose modulo a finite group: ``min_Q |F - R Q|^2``.

    A cloud that looks the same, or nearly so, after a turn Q of its canonical pose has poses R and
    R Q that no network can tell apart, and the squared distance to one of them is least at their
    mean, which is no pose at all. The quotient is a target that such symmetries leave alone
    (Scarvelis et al. 2025, arXiv 2410.02101); which Q it was is for a second network to say, such
    as the scorer of ``Optimized(Orbit(...))``.

    Args:
        raw: F, ``(..., 3, 3)``: rotations that map canonical to input, or matrices before they are
            made rotations.
        group: ``(G, 3, 3)``, or a name that :func:`pointcanon.rotations.group` knows.
        reference: R, ``(..., 3, 3)``, the rotations applied to the data.

    Returns:
        The mean, a scalar.

    Raises:
        InputError: On a wrong shape or an unknown group.
    """
    _check_matrices(raw, reference)
    if isinstance(group, str):
        group = rotations.group(group)
    targets = product(reference.to(raw)[..., None, :, :], group.to(raw))
    squared = (raw[..., None, :, :] - targets).square().sum(dim=(-1, -2))
    return squared.amin(dim=-1).mean()


def matrix_fisher_loss(raw: Tensor, reference: Tensor) -> Tensor:
    """Mean negative log-likelihood of the reference poses, ``log c(F) - tr(F^T R)``.

    The network's 3 x 3 answer F is the parameter of a matrix Fisher distribution, so it learns how
    sure it is together with the pose (Mohlin et al. 2020, arXiv 2006.09740): the pose is F made a
    rotation by SVD, and :func:`pointcanon.priors.confidence` says how sure. Unlike a squared
    distance, the loss has no derivative of an SVD in it.

    Args:
        raw: F, ``(..., 3, 3)``, such as ``frames.fisher[:, 0]`` of
            ``VectorNeuron(orthonormalise="matrix-fisher")``.
        reference: R, ``(..., 3, 3)``, the rotations applied to the data.

    Returns:
        A scalar; that of a network that knows nothing, F = 0, is 0.

    Raises:
        InputError: On a wrong shape.
    """
    _check_matrices(raw, reference)
    exact = raw.to(torch.float64)  # both terms grow with F and nearly cancel
    likelihood = (exact * reference.to(exact)).sum(dim=(-1, -2)) - log_normaliser(exact)
    return -likelihood.mean().to(torch.promote_types(raw.dtype, torch.float32))


def _check_matrices(raw: Tensor, reference: Tensor) -> None:
    if raw.shape[-2:] != (3, 3) or reference.shape != raw.shape:
        raise InputError(
            f"raw has shape {tuple(raw.shape)} and reference {tuple(reference.shape)}; both must "
            "be the same (..., 3, 3)"
        )
