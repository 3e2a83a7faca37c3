"""What files say of clouds, checked once as it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pointcanon.errors import DataError

__all__ = ["class_labels", "finite_points"]


def class_labels(path: Path, values: np.ndarray, clouds: int, classes: int) -> np.ndarray:
    """Labels as public files hold them, ``(n,)`` or ``(n, 1)`` of any dtype, as ``(n,)`` int64.

    Args:
        path: Of the file, for the message.
        values: What it holds.
        clouds: How many labels there must be.
        classes: How many classes there are.

    Raises:
        DataError: If there are more labels or fewer, or one is no class.
    """
    labels = values.reshape(-1)
    if values.shape not in ((clouds,), (clouds, 1)):
        raise DataError(f"{path} holds labels {values.shape} for {clouds} clouds")
    known = (labels >= 0) & (labels < classes) & (labels == np.round(labels))
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise DataError(f"{path}: label {labels[row]} of row {row} is none of 0 to {classes - 1}")
    return labels.astype(np.int64)


def finite_points(values: np.ndarray, source: str) -> Tensor:
    """A cloud ``(N, 3)`` as a float32 tensor of its own.

    Raises:
        DataError: If a point is not three finite numbers.
    """
    points = torch.tensor(values, dtype=torch.float32)
    finite = points.isfinite().all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise DataError(f"{source}: point {row} is {points[row].tolist()}, not three numbers")
    return points
