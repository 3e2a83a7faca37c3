"""What every prior is: a density over rotations that can be evaluated and sampled."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pointcanon.errors import InputError

__all__ = ["Prior", "positive"]


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


def positive(concentration: float) -> float:
    """The concentration, if it is one.

    Raises:
        InputError: If it is not positive and finite.
    """
    if not (concentration > 0 and math.isfinite(concentration)):
        raise InputError(f"concentration must be positive and finite, got {concentration}")
    return float(concentration)
