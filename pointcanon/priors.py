"""Priors over canonical poses: where in SO(3) the clouds a predictor was trained on live.

Densities are with respect to the Haar measure normalised to one, so the uniform density is 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.errors import InputError

__all__ = ["Aligned", "Prior", "Uniform", "Upright"]


class Prior(ABC):
    """A distribution over rotations."""

    @abstractmethod
    def log_prob(self, rotation: Tensor) -> Tensor:
        """Log density ``(...)`` of ``(..., 3, 3)`` rotations."""

    @abstractmethod
    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Rotations ``(*size, 3, 3)`` drawn from the prior."""


class Uniform(Prior):
    """Haar measure: nothing is known of the pose (learned canonicalization, arXiv 2211.06489)."""

    def log_prob(self, rotation: Tensor) -> Tensor:
        return rotation.new_zeros(rotation.shape[:-2])

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        return rotations.random_rotations(*size, generator=generator, dtype=dtype, device=device)


class Aligned(Prior):
    """Poses concentrated about the identity: an isotropic matrix Fisher distribution.

    ``p(R) = exp(kappa tr R) / c(kappa)`` with ``c(kappa) = e^kappa [I0(2 kappa) - I1(2 kappa)]``.
    As ``|R - I|^2 = 6 - 2 tr R``, minus its logarithm is the squared distance to the identity of
    Mondal et al. (arXiv 2310.01647, eq. 9) with weight ``kappa / 2``, up to a constant.

    Args:
        concentration: kappa > 0; the mean angle is 29.9 degrees at 5, 20.8 at 10, 9.2 at 50.
    """

    def __init__(self, concentration: float = 10.0) -> None:
        self.concentration = _positive(concentration)

    def log_prob(self, rotation: Tensor) -> Tensor:
        kappa = torch.tensor(self.concentration, dtype=torch.float64)
        # exponentially scaled Bessel functions carry a factor e^(-2 kappa)
        bessel = torch.special.i0e(2 * kappa) - torch.special.i1e(2 * kappa)
        log_normaliser = float(3 * kappa + bessel.log())
        trace = rotation.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        return self.concentration * trace - log_normaliser

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        # the angle has density proportional to exp(2 kappa cos t) (1 - cos t): invert its integral
        # on a grid that resolves the peak, whose width is about 1 / sqrt(kappa)
        width = min(math.pi, 12 / math.sqrt(2 * self.concentration))
        grid = torch.linspace(0, width, 4097, dtype=torch.float64)
        density = (2 * self.concentration * (grid.cos() - 1)).exp() * (1 - grid.cos())
        cumulative = torch.cumulative_trapezoid(density, grid)
        cumulative = torch.cat((cumulative.new_zeros(1), cumulative)) / cumulative[-1]
        level = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
        upper = torch.searchsorted(cumulative.to(level.device), level).clamp(1, len(grid) - 1)
        grid, cumulative = grid.to(level.device), cumulative.to(level.device)
        low, high = cumulative[upper - 1], cumulative[upper]
        share = (level - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
        angle = grid[upper - 1] + share * (grid[upper] - grid[upper - 1])
        axis = torch.randn(*size, 3, dtype=torch.float64, device=device, generator=generator)
        return rotations.about_axis(axis, angle).to(dtype)


class Upright(Prior):
    """Poses whose up axis is kept and whose heading is free: for predictors trained under z.

    ``p(R) = exp(kappa u.R u) kappa / sinh(kappa)``: uniform about the up axis u.

    Args:
        axis: ``(3,)`` the up axis of the data, or its index (0, 1, 2).
        concentration: kappa > 0.
    """

    def __init__(self, axis: Tensor | int, concentration: float = 10.0) -> None:
        if isinstance(axis, int):
            if axis not in (0, 1, 2):
                raise InputError(f"the index of the up axis must be 0, 1 or 2, got {axis}")
            axis = torch.eye(3, dtype=torch.float64)[axis]
        if axis.shape != (3,) or not 0 < float(axis.norm()) < math.inf:
            raise InputError(
                f"the up axis must be a finite, nonzero vector of shape (3,), got {axis}"
            )
        self.axis = axis.to(torch.float64) / axis.to(torch.float64).norm()
        self.concentration = _positive(concentration)

    def log_prob(self, rotation: Tensor) -> Tensor:
        axis = self.axis.to(rotation)
        height = (axis * rotations.product(rotation, axis)).sum(dim=-1)
        # log(kappa / sinh kappa), written so that a large kappa does not overflow
        kappa = self.concentration
        log_normaliser = kappa + math.log1p(-math.exp(-2 * kappa)) - math.log(2 * kappa)
        return kappa * height - log_normaliser

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        kappa = self.concentration
        level = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
        height = 1 + torch.log(level + (1 - level) * math.exp(-2 * kappa)) / kappa
        axis = self.axis.to(level.device)
        least = torch.eye(3, dtype=torch.float64, device=level.device)[axis.abs().argmin()]
        tilt = rotations.about_axis(torch.linalg.cross(axis, least), height.clamp(-1, 1).acos())
        first, second = (
            rotations.random_about_axis(
                *size, axis=axis, generator=generator, dtype=torch.float64, device=device
            )
            for _ in range(2)
        )
        return (first @ tilt @ second).to(dtype)


def _positive(concentration: float) -> float:
    if not (concentration > 0 and math.isfinite(concentration)):
        raise InputError(f"concentration must be positive and finite, got {concentration}")
    return float(concentration)
