"""Several priors, each with a share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.priors.base import Prior

__all__ = ["Mixture"]


class Mixture(Prior):
    """``p(R) = sum_i w_i p_i(R)``: most clouds stand one way, some another, a few anyhow.

    Args:
        priors: At least one.
        weights: Their shares w_i, positive and in proportion: they are divided by their sum. None
            for equal ones.

    Raises:
        InputError: If there is no prior, or the weights are not one positive number for each.
    """

    def __init__(self, priors: Sequence[Prior], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(priors) if weights is None else weights
        if not priors:
            raise InputError("a mixture needs at least one prior")
        if len(weights) != len(priors):
            raise InputError(f"{len(weights)} weights for {len(priors)} priors; give one for each")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InputError(f"weights must be positive and finite, got {list(weights)}")
        self.priors = tuple(priors)
        self.weights = tuple(float(weight) / sum(weights) for weight in weights)

    def log_prob(self, rotation: Tensor) -> Tensor:
        shares = zip(self.weights, self.priors, strict=True)
        parts = [math.log(weight) + prior.log_prob(rotation) for weight, prior in shares]
        return torch.stack(parts).logsumexp(dim=0)

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        level = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
        edges = torch.tensor(self.weights, dtype=torch.float64, device=level.device).cumsum(dim=0)
        chosen = torch.bucketize(level, edges[:-1], right=True)
        drawn = torch.empty(*size, 3, 3, dtype=dtype, device=level.device)
        for index, prior in enumerate(self.priors):
            here = chosen == index
            drawn[here] = prior.sample(
                int(here.sum()), generator=generator, dtype=dtype, device=device
            )
        return drawn
