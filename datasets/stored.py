"""What files say of clouds, checked once as it is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pointcanon.errors import DataError, PointcanonError
from pointcanon.readers.arrays import h5_dataset

if TYPE_CHECKING:
    import h5py

__all__ = ["class_labels", "finite_points", "h5_file", "report_missing", "whole_numbers"]


@contextmanager
def h5_file(path: Path, kind: str, more: Sequence[str] = ()) -> Iterator[h5py.File]:
    """An open HDF5 file of clouds, whose arrays are numbers that lie in it.

    Args:
        path: Of the file.
        kind: Whose files these are, for the message.
        more: Arrays it may have besides ``data (n, P, 3)`` and ``label``, one for each cloud;
            ``normal`` is of the shape of ``data``.

    Raises:
        DataError: If it is damaged or lacks an array, also if that shows only while it is open.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            keys = list(file)  # which follows no link, as ``in`` does
            absent = [key for key in ("data", "label") if key not in keys]
            if absent:
                raise DataError(
                    f"{path} has no {' and no '.join(map(repr, absent))} (its keys: "
                    f"{', '.join(keys[:8]) or 'none'}); a {kind} h5 file holds 'data' and 'label'"
                )
            held = ("data", "label", *(key for key in more if key in keys))
            shapes = {key: h5_dataset(file, key).shape for key in held}
            shape = shapes["data"]
            if len(shape) != 3 or shape[-1] != 3:
                raise DataError(f"{path}: 'data' has shape {shape}, expected (n, P, 3)")
            _require_label_each(path, shapes["label"], shape[0])
            if shapes.get("normal", shape) != shape:
                raise DataError(f"{path}: 'normal' has shape {shapes['normal']}, expected {shape}")
            yield file
    except PointcanonError:
        raise
    except Exception as error:  # h5py raises whatever a damaged file leads it to
        raise DataError(
            f"{path} cannot be read as HDF5, it is damaged or incomplete; fetch it again ({error})"
        ) from error


def class_labels(
    path: Path, values: np.ndarray, clouds: int, classes: int, of: Path | None = None
) -> np.ndarray:
    """Labels as public files hold them, ``(n,)`` or ``(n, 1)`` of any dtype, as ``(n,)`` int64.

    Args:
        path: Of the file, for the message.
        values: What it holds.
        clouds: How many labels there must be.
        classes: How many classes there are.
        of: The file that holds the clouds, where it is another.

    Raises:
        DataError: If there are more labels or fewer, or one is no class.
    """
    _require_label_each(path, values.shape, clouds, of)
    labels = values.reshape(-1)
    known = whole_numbers(labels, classes)
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise DataError(f"{path}: label {labels[row]} of row {row} is none of 0 to {classes - 1}")
    return labels.astype(np.int64)


def whole_numbers(values: np.ndarray, count: int) -> np.ndarray:
    """Which values, of any dtype, are one of 0 to ``count - 1``."""
    return (values >= 0) & (values < count) & (values == np.round(values))


def _require_label_each(
    path: Path, shape: tuple[int, ...], clouds: int, of: Path | None = None
) -> None:
    if shape not in ((clouds,), (clouds, 1)):
        where = "" if of is None else f" in {of}"
        raise DataError(f"{path} holds labels {shape} for {clouds} clouds{where}")


def report_missing(folder: Path, split: str, absent: Sequence[str], stop: bool) -> None:
    """Say that not all of a data set is there, as a warning to whoever opens it.

    Args:
        folder: Of the data set.
        split: That is not whole.
        absent: Names of what is not there.
        stop: Refuse to go on.

    Raises:
        DataError: If ``stop``.
    """
    what = (
        f"{folder} lacks {len(absent):,} of what its split {split!r} should hold "
        f"(first: {absent[0]})"
    )
    if stop:
        raise DataError(f"{what}; complete it, or pass missing='warn' to go on without")
    warnings.warn(f"{what}; going on without", stacklevel=3)


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
