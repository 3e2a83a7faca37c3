"""Which points of a cloud to use: the same on every machine, or drawn anew."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch

__all__ = ["drawn_rows"]


def drawn_rows(count: int, num_points: int, name: str | None) -> np.ndarray:
    """Indices of ``num_points`` rows of a cloud of ``count``, each equally likely.

    No row comes twice before all have come once, so a small cloud is repeated as evenly as can be.
    A cloud of exactly that many rows is taken as it is.

    Args:
        count: At least 1.
        num_points: At least 1.
        name: Of the cloud: the draw is a function of it. None draws from torch's global generator,
            which every loader process seeds for itself.

    Returns:
        ``(num_points,)`` int64.
    """
    if count == num_points:
        return np.arange(count)
    if name is None:
        order = torch.randperm(count).numpy()
    else:
        seed = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")
        # the raw stream of a bit generator never changes between numpy versions
        order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    return np.resize(order, num_points)
