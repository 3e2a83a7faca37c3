"""The prior of data sets whose objects stand alike and face anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.priors.base import Prior, positive

__all__ = ["Upright"]


class Upright(Prior):
    """Poses whose up axis is kept and whose heading is free: for predictors trained under z.

    ``p(R) = exp(kappa u.R u) kappa / sinh(kappa)``: uniform about the up axis u.

    Args:
        axis: The up axis of the data: its index (0, 1, 2) or three numbers.
        concentration: kappa > 0.

    Raises:
        InputError: If the axis has no direction or the concentration is not positive and finite.
    """

    def __init__(self, axis: int | Sequence[float] | Tensor, concentration: float = 10.0) -> None:
        self.axis = rotations.direction(axis)
        self.concentration = kappa = positive(concentration)
        # log(sinh kappa / kappa), written so that a large kappa does not overflow
        self.log_normaliser = kappa + math.log1p(-math.exp(-2 * kappa)) - math.log(2 * kappa)

    def log_prob(self, rotation: Tensor) -> Tensor:
        axis = self.axis.to(rotation)
        height = (axis * rotations.product(rotation, axis)).sum(dim=-1)
        return self.concentration * height - self.log_normaliser

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
