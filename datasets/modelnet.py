"""ModelNet40 and ModelNet10 (Wu et al., CVPR 2015), from any of their three public layouts."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.coordinates import coordinate_frame as frame_named
from pointcanon.datasets import CloudItem
from pointcanon.datasets.modelnet_layouts import (
    MODELNET10_CLASSES,
    MODELNET40_CLASSES,
    Layout,
    Ref,
    layouts_at,
    require_layout,
)
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.datasets.split import stratified_split
from pointcanon.datasets.stored import report_missing
from pointcanon.errors import DataError, InputError

__all__ = ["VALIDATION_FRACTION", "ModelNet10", "ModelNet40"]

VALIDATION_FRACTION = 0.1
"""Share of every class of the official train split that is held out as ``"val"``."""

_OFFICIAL = {"train": "train", "val": "train", "trainval": "train", "test": "test"}


class ModelNet40(Dataset[CloudItem]):
    """The 40 classes of ModelNet, 9,843 train and 2,468 test clouds.

    Points are the first ``num_points`` of a cloud, in the unit ball: as stored (h5), or centred and
    divided by their largest norm after the choice (txt); meshes (off) are sampled uniformly by
    area, once, and kept on disk.

    Args:
        root: The folder of a layout, or its parent.
        split: ``"train"`` and ``"val"``, which together are the official train split
            (``"trainval"``); or ``"test"``. Which clouds are held out depends on the order of the
            files, so it is the same for every copy of a layout, but not between layouts.
        num_points: Points per cloud.
        coordinate_frame: Name of the frame to convert to; None keeps that of the files
            (``y-up-mirrored`` for h5 and txt, ``z-up`` for off).
        normals: Whether items have normals. Those of meshes are the faces' own, whose sign is
            not reliable in ModelNet.
        resample: Draw the points of ``"train"`` and ``"trainval"`` at each reading, from torch's
            global generator: of all that h5 files hold, of the first 2,048 (or ``num_points``)
            otherwise.
        validation_seed: Chooses the validation split.
        layout: ``"h5"``, ``"off"`` or ``"txt"``, where a root holds several.
        missing: What to do about clouds or classes that should be there but are not: ``"raise"``,
            or ``"warn"`` with their number and go on.
        cache: Folder for samples of meshes; by default ``.pointcanon`` inside the data, or the
            user's cache where the data cannot be written.

    Attributes:
        classes: The class names, alphabetical; a label indexes them.
        labels: ``(len(self),)`` int64, known without reading any points.
        layout: ``"h5"``, ``"off"`` or ``"txt"``.
        native_frame: The frame of the files.
        coordinate_frame: The frame of the items.
        missing: Names of what should be there but is not.

    Raises:
        DataError: If the root does not hold the data set, or a file is damaged.
        InputError: On an argument that cannot be met, such as more points than the files hold.
    """

    name: str = "ModelNet40"
    class_names: ClassVar[tuple[str, ...]] = MODELNET40_CLASSES

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int = 1024,
        coordinate_frame: str | CoordinateFrame | None = None,
        normals: bool = False,
        resample: bool = False,
        validation_seed: int = 0,
        layout: str | None = None,
        missing: Literal["raise", "warn"] = "raise",
        cache: str | Path | None = None,
    ) -> None:
        if split not in _OFFICIAL:
            raise InputError(f"unknown split {split!r}; choose one of: {', '.join(_OFFICIAL)}")
        if num_points < 1:
            raise InputError(f"num_points is {num_points}; choose at least 1")
        if missing not in ("raise", "warn"):
            raise InputError(f"missing is {missing!r}; choose 'raise' or 'warn'")
        require_layout(layout)
        self._reader = _choose(layouts_at(root, cache), root, layout, self.name, self.class_names)
        self.split = split
        self.num_points = num_points
        self.normals = normals
        self._resample = resample and split in ("train", "trainval")
        self.classes = list(self.class_names)
        self.layout = self._reader.name
        self.native_frame = frame_named(self._reader.coordinate_frame)
        self.coordinate_frame = frame_named(coordinate_frame or self.native_frame)

        files, absent = self._reader.files(_OFFICIAL[split], self.class_names)
        self.missing = tuple(absent)
        if absent:
            report_missing(self._reader.folder, split, absent, stop=missing == "raise")
        for path in files:
            self._reader.require(path, num_points, normals)
        self._pool = num_points
        if self._resample and files:
            self._pool = min(self._reader.pool(path, num_points) for path in files)
        refs = [r for path in files for r in self._reader.refs(path) if r.category in self.classes]
        if not refs:
            raise DataError(f"{self._reader.folder} holds no clouds for split {split!r}")
        number = {category: label for label, category in enumerate(self.classes)}
        labels = np.array([number[ref.category] for ref in refs], dtype=np.int64)
        if split in ("train", "val"):
            halves = stratified_split(labels, VALIDATION_FRACTION, validation_seed)
            chosen = halves[0] if split == "train" else halves[1]
            refs, labels = [refs[i] for i in chosen], labels[chosen]
        self._refs: list[Ref] = refs
        self.labels: np.ndarray = labels

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        points, directions = self._reader.read(self._refs[index], self._pool, self.normals)
        if self._resample:
            rows = drawn_rows(len(points), self.num_points, None)
            points = points[rows]
            directions = None if directions is None else directions[rows]
        item: CloudItem = {
            "points": self._posed(points),
            "label": int(self.labels[index]),
            "index": index,
        }
        if directions is not None:
            item["normals"] = self._posed(directions)
        return item

    def source(self, index: int) -> str:
        """The file, and the row in it, that item ``index`` comes from."""
        return str(self._refs[index])

    def _posed(self, vectors: np.ndarray) -> Tensor:
        own = torch.tensor(vectors)  # a copy: what a user does to an item stays there
        return convert(own, self.native_frame, self.coordinate_frame)

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.split}: {len(self):,} clouds of {self.num_points:,} points, "
            f"{self.layout} layout, {self.coordinate_frame})"
        )


class ModelNet10(ModelNet40):
    """The ten classes of ModelNet10: 3,991 train and 908 test clouds.

    Read from its own folder of meshes, or as the ten classes of a folder of ModelNet40.
    """

    name = "ModelNet10"
    class_names = MODELNET10_CLASSES


def _choose(
    found: list[Layout], root: str | Path, layout: str | None, name: str, classes: tuple[str, ...]
) -> Layout:
    """The one layout among those found that ``name`` is to be read from."""
    there = ", ".join(f"{f.folder} ({f.name}, {len(f.classes)} classes)" for f in found)
    usable = [f for f in found if layout in (None, f.name) and set(classes) <= set(f.classes)]
    exact = [f for f in usable if set(classes) == set(f.classes)] or usable
    if not exact:
        asked = name if layout is None else f"{name} in layout {layout!r}"
        raise DataError(f"data root {root} does not hold {asked}; found: {there}")
    if len(exact) > 1:
        raise DataError(
            f"data root {root} holds {name} more than once; give one of the folders, "
            f"or layout=: {there}"
        )
    return exact[0]
