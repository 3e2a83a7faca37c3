"""The prior that is a set of poses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.priors.aligned import Aligned
from pointcanon.priors.base import Prior
from pointcanon.rotations import product, svd_project

__all__ = ["Empirical"]


class Empirical(Prior):
    """Poses that were seen, each blurred: a kernel density estimate on SO(3).

    ``p(R) = mean_m exp(kappa tr R_m^T R) / c(kappa)``, with the kernel of :class:`Aligned`.

    Args:
        rotations: ``(M, 3, 3)`` the poses R_m: a tensor, or nested lists of numbers.
        concentration: kappa > 0, of the kernel.

    Raises:
        InputError: If a matrix is no rotation (to 1e-3), there are none, or the concentration is
            not positive and finite.
    """

    def __init__(
        self, rotations: Tensor | Sequence[Sequence[Sequence[float]]], concentration: float = 50.0
    ) -> None:
        rotations = torch.as_tensor(rotations, dtype=torch.float64, device="cpu")
        if rotations.ndim != 3 or rotations.shape[1:] != (3, 3) or len(rotations) == 0:
            shape = tuple(rotations.shape)
            raise InputError(f"rotations has shape {shape}, expected (M, 3, 3) with M >= 1")
        proper = svd_project(rotations.nan_to_num())
        wrong = ~((proper - rotations).abs().amax(dim=(-1, -2)) <= 1e-3)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise InputError(
                f"rotations[{first}] is no rotation: {rotations[first].tolist()}; give orthogonal "
                "matrices of determinant +1"
            )
        self.rotations = proper
        self.kernel = Aligned(concentration)

    def log_prob(self, rotation: Tensor) -> Tensor:
        # tr R_m^T R for all m at once: one product of matrices read as vectors of nine
        traces = product(rotation.flatten(-2), self.rotations.to(rotation).flatten(-2).mT)
        total = (self.kernel.concentration * traces).logsumexp(dim=-1)
        return total - self.kernel.log_normaliser - math.log(len(self.rotations))

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        index = torch.randint(len(self.rotations), size, generator=generator, device=device)
        turns = self.kernel.sample(*size, generator=generator, dtype=torch.float64, device=device)
        return (self.rotations.to(turns.device)[index] @ turns).to(dtype)
