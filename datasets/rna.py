"""Surfaces of RNA molecules with a label at every point (Poulenard et al., 3DV 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from torch.utils.data import Dataset

from pointcanon.clouds import normalise
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.coordinates import coordinate_frame as frame_named
from pointcanon.datasets import UNLABELLED, CloudItem
from pointcanon.datasets.modelnet_layouts import Ref
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.datasets.split import stratified_split
from pointcanon.errors import DataError, InputError
from pointcanon.readers.arrays import npz_array

__all__ = ["FILE_NAME", "RNA", "VALIDATION_FRACTION", "RnaFile", "rna_file_at"]

FILE_NAME = "rna_seg_2048.npz"
VALIDATION_FRACTION = 0.1
"""Share of the official train split that is held out as ``"val"``."""

_OFFICIAL = {"train": "train", "val": "train", "trainval": "train", "test": "test"}
_CLASS = "5S rRNA"
_NATIVE_FRAME = frame_named("z-up")


class RNA(Dataset[CloudItem]):
    """683 molecules of 5S ribosomal RNA: 547 train and 136 test surfaces, 2,048 points each.

    A point is labelled with the place in the sequence it belongs to: 159 parts, of one class. The
    few points without a label (22 of 1.4 million, which published figures count as one label more)
    are ``UNLABELLED``. Clouds are centred and in the unit ball. They have no common pose, but many
    molecules of test have a near twin in train that lies nearly the same way.

    The file ``rna_seg_2048.npz`` holds ``points (n, P, 3)`` int16, ``labels (n, P)`` (0 = none),
    ``split (n,)`` (0 train, 1 test), ``center (n, 3)`` and ``scale (n,)``, so that
    ``points / 32767 * scale + center`` are Ångström; it is made from
    https://github.com/nmwsharp/RNA-Surface-Segmentation-Dataset.

    Args:
        root: The file, or the folder it is in.
        split: ``"train"`` and ``"val"``, which together are the official train split
            (``"trainval"``); or ``"test"``.
        num_points: Points per cloud, drawn once if fewer than there are.
        coordinate_frame: Name of the frame to convert to; None keeps that of the file, called
            ``z-up`` although no direction means up here. The mirrored frame makes another molecule.
        validation_seed: Chooses the validation split.

    Attributes:
        classes: The one class.
        labels: ``(len(self),)`` int64, all 0.
        parts: The labels of the file, in ascending order, as text; a part indexes them.
        part_ranges: All parts.
        layout: ``"npz"``.
        native_frame: The frame of the file.
        coordinate_frame: The frame of the items.

    Raises:
        DataError: If the root does not hold the data set, or the file is damaged.
        InputError: On an argument that cannot be met.
    """

    name: str = "RNA"
    layout: str = "npz"
    native_frame: CoordinateFrame = _NATIVE_FRAME

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int = 2048,
        coordinate_frame: str | CoordinateFrame | None = None,
        validation_seed: int = 0,
    ) -> None:
        if split not in _OFFICIAL:
            raise InputError(f"unknown split {split!r}; choose one of: {', '.join(_OFFICIAL)}")
        file = rna_file_at(root)
        if file is None:
            raise DataError(f"no RNA surfaces at data root {root}: it holds no {FILE_NAME}")
        held = file.read()
        if not 1 <= num_points <= held.points.shape[1]:
            raise InputError(
                f"num_points is {num_points}, but clouds of {file.path} have "
                f"{held.points.shape[1]:,} points; ask for 1 to that many"
            )
        self.split = split
        self.num_points = num_points
        self.coordinate_frame = frame_named(coordinate_frame or _NATIVE_FRAME)
        self.classes = [_CLASS]
        values = np.unique(held.labels[held.labels > 0])
        self.parts: tuple[str, ...] = tuple(str(value) for value in values)
        self.part_ranges: tuple[range, ...] = (range(len(values)),)
        chosen = np.flatnonzero(held.split == ("train", "test").index(_OFFICIAL[split]))
        if split in ("train", "val"):
            same = np.zeros(len(chosen), dtype=np.int64)
            halves = stratified_split(same, VALIDATION_FRACTION, validation_seed)
            chosen = chosen[halves[0] if split == "train" else halves[1]]
        if not len(chosen):
            raise DataError(f"{file.path} holds no clouds for split {split!r}")
        self.labels: np.ndarray = np.zeros(len(chosen), dtype=np.int64)
        self._refs = [Ref(file.path, int(row), _CLASS) for row in chosen]
        self._points = held.points[chosen]
        self._parts = np.where(
            held.labels[chosen] > 0, np.searchsorted(values, held.labels[chosen]), UNLABELLED
        ).astype(np.int16)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        rows = drawn_rows(self._points.shape[1], self.num_points, str(self._refs[index].row))
        # neither the unit of length nor the place of the file is left
        points = normalise(torch.tensor(self._points[index], dtype=torch.float32)[None])[0, rows]
        points = convert(points, self.native_frame, self.coordinate_frame)
        parts = torch.tensor(self._parts[index, rows], dtype=torch.int64)
        return {"points": points, "label": 0, "index": index, "parts": parts}

    def source(self, index: int) -> str:
        """The file, and the row in it, that item ``index`` comes from."""
        return str(self._refs[index])

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.split}: {len(self):,} clouds of {self.num_points:,} points, "
            f"{self.layout} layout, {self.coordinate_frame})"
        )


class _Arrays(NamedTuple):
    points: np.ndarray
    labels: np.ndarray
    split: np.ndarray


class RnaFile:
    """The file, as ``pointcanon data check`` looks at it."""

    dataset: str = "RNA"
    name: str = "npz"
    coordinate_frame: str = _NATIVE_FRAME.name
    classes: tuple[str, ...] = (_CLASS,)
    splits: tuple[str, ...] = ("train", "test")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent

    def read(self) -> _Arrays:
        """All of it.

        Raises:
            DataError: If it is damaged, or not as :class:`RNA` says.
        """
        try:
            with ZipFile(self.path) as file:
                known = [name.removesuffix(".npy") for name in file.namelist()]
                absent = [key for key in _Arrays._fields if key not in known]
                if absent:
                    raise DataError(
                        f"{self.path} holds {', '.join(known) or 'nothing'}, but no "
                        f"{' and no '.join(absent)}"
                    )
                held = _Arrays(*(npz_array(file, key) for key in _Arrays._fields))
        except DataError:
            raise
        except Exception as error:  # damage shows in more ways than can be listed
            raise DataError(
                f"{self.path} cannot be read, it is damaged or incomplete ({error})"
            ) from error
        if held.points.ndim != 3 or held.points.shape[2] != 3 or 0 in held.points.shape:
            raise DataError(
                f"{self.path}: 'points' has shape {held.points.shape}, expected (n, P, 3)"
            )
        if held.labels.shape != held.points.shape[:2] or held.split.shape != held.labels.shape[:1]:
            raise DataError(
                f"{self.path} holds points {held.points.shape} but labels {held.labels.shape} and "
                f"split {held.split.shape}; expected (n, P, 3), (n, P) and (n,)"
            )
        for key, allowed in (("labels", "whole numbers from 0"), ("split", "0 or 1")):
            values = getattr(held, key)
            fault = (values < 0) | (values != np.round(values))
            fault = fault | (values > 1) if key == "split" else fault
            if fault.any():
                place = tuple(int(i) for i in np.argwhere(fault)[0])
                raise DataError(
                    f"{self.path}: {key} of row {place[0]} holds {values[place]}, not {allowed}"
                )
        if not np.isfinite(held.points).all():
            row = int(np.argwhere(~np.isfinite(held.points))[0, 0])
            raise DataError(f"{self.path}[{row}] has a point that is not three finite numbers")
        return held

    def clouds(self, split: str) -> Iterator[tuple[Ref, bytes | DataError]]:
        """Every cloud of a split with a digest of its content.

        Raises:
            DataError: If the file cannot be read.
        """
        held = self.read()
        for row in np.flatnonzero(held.split == self.splits.index(split)):
            content = held.points[row].tobytes() + held.labels[row].tobytes()
            yield Ref(self.path, int(row), _CLASS), blake2b(content, digest_size=16).digest()


def rna_file_at(root: str | Path) -> RnaFile | None:
    """The file at ``root``, in it, or in a folder directly inside it."""
    root = Path(root).expanduser()
    if root.name == FILE_NAME and root.is_file():
        return RnaFile(root)
    candidates = (root / FILE_NAME, *sorted(root.glob(f"*/{FILE_NAME}")))
    return next((RnaFile(path) for path in candidates if path.is_file()), None)
