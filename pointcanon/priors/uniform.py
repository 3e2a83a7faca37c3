"""The prior that knows nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.priors.matrix_fisher import MatrixFisher

__all__ = ["Uniform"]


class Uniform(MatrixFisher):
    """Haar measure: nothing is known of the pose (learned canonicalization, arXiv 2211.06489)."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(3, 3))

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
