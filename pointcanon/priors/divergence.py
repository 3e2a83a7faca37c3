"""How far one prior is from another."""

from __future__ import annotations

import torch

from pointcanon.errors import InputError
from pointcanon.priors.base import Prior
from pointcanon.priors.matrix_fisher import MatrixFisher

__all__ = ["kl"]


def kl(
    p: Prior, q: Prior, samples: int = 10_000, generator: torch.Generator | None = None
) -> float:
    """Kullback-Leibler divergence ``KL(p || q)``, the mean of ``log p - log q`` under p, in nats.

    With p the poses of the data and q those of a canonicalizer, ``kl(p, q)`` is the forward
    divergence (q must cover p) and ``kl(q, p)`` the reverse (q must stay inside p). Against
    ``Uniform()`` it is minus the entropy.

    Closed form between matrix Fisher distributions, ``Aligned`` and ``Uniform`` among them:
    ``tr((F_p - F_q)^T E_p[R]) - log c(F_p) + log c(F_q)``. Otherwise the mean over samples of p.

    Args:
        p: The distribution the mean is taken under.
        q: The one it is compared with.
        samples: For the Monte Carlo mean, whose error falls with their square root.
        generator: Draws them.

    Raises:
        InputError: If ``samples`` < 1.
    """
    if samples < 1:
        raise InputError(f"samples is {samples}; choose at least 1")
    if isinstance(p, MatrixFisher) and isinstance(q, MatrixFisher):
        linear = ((p.parameter - q.parameter) * p.mean).sum()
        return float(linear) - p.log_normaliser + q.log_normaliser
    drawn = p.sample(samples, generator=generator, dtype=torch.float64)
    return float((p.log_prob(drawn) - q.log_prob(drawn)).mean())
