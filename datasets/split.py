"""Holding out a validation split, the same on every machine and with every numpy."""

from __future__ import annotations

import numpy as np

from pointcanon.errors import InputError

__all__ = ["stratified_split"]


def stratified_split(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide indices into kept and held out, with the same share of every class held out.

    Of a class with n members, ``floor(fraction * n + 1/2)`` are held out, but at least one and at
    most n - 1; a class with a single member is kept whole.

    Args:
        labels: ``(n,)`` integers.
        fraction: Share to hold out, in (0, 1).
        seed: Non-negative; the split is a function of ``labels``, ``fraction`` and ``seed`` alone.

    Returns:
        ``kept`` and ``held_out``, int64, both ascending, disjoint, together ``0 … n - 1``.

    Raises:
        InputError: If an argument is out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels has shape {labels.shape}, dtype {labels.dtype}; pass (n,) ints")
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}; choose a number between 0 and 1")
    if seed < 0:
        raise InputError(f"seed is {seed}; choose a non-negative integer")
    # The raw stream of a bit generator never changes between numpy versions, whereas what
    # Generator.permutation makes of it may.
    keys = np.random.PCG64(seed).random_raw(len(labels))
    held: list[np.ndarray] = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(int(fraction * len(members) + 0.5), 1), len(members) - 1)
        held.append(members[np.argsort(keys[members], kind="stable")[:count]])
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
