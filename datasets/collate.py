"""Batches of clouds that differ in their number of points."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pointcanon.datasets import UNLABELLED, CloudItem

__all__ = ["collate"]

_PADDING = {"points": 0.0, "normals": 0.0, "parts": UNLABELLED}


def collate(items: list[CloudItem]) -> dict[str, Tensor]:
    """A batch as torch's default collate makes it, padded where the clouds differ in size.

    Args:
        items: At least one, all with the same keys.

    Returns:
        ``points (B, N, 3)``, ``label (B,)``, ``index (B,)`` and what else the items hold, N being
        the largest size. Only if sizes differ there is ``mask (B, N)`` bool, True = a real point;
        padded points lie at the origin and their part is ``UNLABELLED``.
    """
    sizes = [len(item["points"]) for item in items]
    if min(sizes) == max(sizes):
        return default_collate(cast(list[Any], items))
    padded = [_padded(item, max(sizes)) for item in items]
    mask = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
    return {**default_collate(padded), "mask": mask}


def _padded(item: CloudItem, size: int) -> dict[str, Any]:
    longer: dict[str, Any] = dict(item)
    for key, value in _PADDING.items():
        if key in longer:
            short = longer[key]
            longer[key] = short.new_full((size, *short.shape[1:]), value)
            longer[key][: len(short)] = short
    return longer
