"""ShapeNet-Part (Yi et al., SIGGRAPH Asia 2016), from any of its public layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointcanon.classes import SHAPENET_PART_CATEGORIES
from pointcanon.clouds import normalise
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.coordinates import coordinate_frame as frame_named
from pointcanon.datasets import CloudItem
from pointcanon.datasets.modelnet_layouts import Ref
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.datasets.shapenet_part_layouts import (
    LAYOUTS,
    PART_RANGES,
    PARTS,
    PartLayout,
    layouts_at,
)
from pointcanon.datasets.split import stratified_split
from pointcanon.datasets.stored import report_missing
from pointcanon.errors import DataError, InputError

__all__ = ["VALIDATION_FRACTION", "ShapeNetPart"]

VALIDATION_FRACTION = 0.1
"""Share of every category of train that is held out where a copy has no list of validation."""

_OFFICIAL = {"train": ("train",), "val": ("val",), "trainval": ("train", "val"), "test": ("test",)}
_KNOWN = (
    "shapenetcore_partanno_segmentation_benchmark_v0_normal/ (txt), hdf5_data/ or "
    "shapenet_part_seg_hdf5_data/ or shapenetpart_hdf5_2048/ (h5), torch_geometric's processed/ "
    "(pyg)"
)


class ShapeNetPart(Dataset[CloudItem]):
    """16 categories, 50 parts: 12,137 train, 1,870 val and 2,874 test clouds, upright.

    Clouds lie in the unit ball: as stored (h5), or centred and divided by the largest norm of all
    their points (txt, pyg). Of a cloud that holds more points, ``num_points`` are drawn, once and
    the same everywhere, or anew at each reading; of one that holds fewer, points are repeated.

    Args:
        root: The folder of a layout, or its parent.
        split: ``"train"``, ``"val"``, both (``"trainval"``, what the field trains on) or
            ``"test"``. Where a copy does not say what is validation, it is held out of train.
        num_points: Points per cloud; ``"all"`` for all there are, which differ in number
            (:func:`pointcanon.datasets.collate.collate` makes batches of them).
        coordinate_frame: Name of the frame to convert to; None keeps that of the files, ``y-up``.
        normals: Whether items have normals.
        resample: Draw the points of ``"train"`` and ``"trainval"`` at each reading, from torch's
            global generator.
        validation_seed: Chooses the validation split, where none is official.
        layout: ``"txt"``, ``"h5"`` or ``"pyg"``, where a root holds several.
        missing: What to do about listed files that are not there: ``"raise"``, or ``"warn"`` with
            their number and go on.

    Attributes:
        classes: The categories, alphabetical; a label indexes them.
        labels: ``(len(self),)`` int64, known without reading any points.
        parts: Names of all parts, ``"chair/leg"``, in the files' order; a part indexes them.
        part_ranges: The parts of each category: the first are 0 4 6 8 12 16 19 22 24 28 30 36 38
            41 44 47.
        layout: ``"txt"``, ``"h5"`` or ``"pyg"``.
        native_frame: The frame of the files.
        coordinate_frame: The frame of the items.
        missing: Names of what should be there but is not.

    Raises:
        DataError: If the root does not hold the data set, or a file is damaged.
        InputError: On an argument that cannot be met.
    """

    name: str = "ShapeNetPart"
    parts: tuple[str, ...] = PARTS
    part_ranges: tuple[range, ...] = PART_RANGES

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_points: int | Literal["all"] = 2048,
        coordinate_frame: str | CoordinateFrame | None = None,
        normals: bool = False,
        resample: bool = False,
        validation_seed: int = 0,
        layout: str | None = None,
        missing: Literal["raise", "warn"] = "raise",
    ) -> None:
        if split not in _OFFICIAL:
            raise InputError(f"unknown split {split!r}; choose one of: {', '.join(_OFFICIAL)}")
        if num_points != "all" and (not isinstance(num_points, int) or num_points < 1):
            raise InputError(f"num_points is {num_points!r}; choose at least 1, or 'all'")
        if missing not in ("raise", "warn"):
            raise InputError(f"missing is {missing!r}; choose 'raise' or 'warn'")
        self._reader = _choose(root, layout)
        self.split = split
        self.num_points: int | Literal["all"] = num_points
        self.normals = normals
        self._resample = resample and split in ("train", "trainval")
        self.classes = list(SHAPENET_PART_CATEGORIES)
        self.layout = self._reader.name
        self.native_frame = frame_named(self._reader.coordinate_frame)
        self.coordinate_frame = frame_named(coordinate_frame or self.native_frame)

        sources, held_out = _OFFICIAL[split], False
        if split != "test" and not self._reader.has_split("val"):
            sources, held_out = ("train",), split != "trainval"
        files, absent = [], []
        for source in sources:
            there, not_there = self._reader.files(source, SHAPENET_PART_CATEGORIES)
            files += there
            absent += not_there
        self.missing = tuple(absent)
        if absent:
            report_missing(self._reader.folder, split, absent, stop=missing == "raise")
        refs = [ref for path in files for ref in self._reader.refs(path)]
        if not refs:
            raise DataError(f"{self._reader.folder} holds no clouds for split {split!r}")
        labels = np.array(
            [SHAPENET_PART_CATEGORIES.index(ref.category) for ref in refs], dtype=np.int64
        )
        if held_out:
            halves = stratified_split(labels, VALIDATION_FRACTION, validation_seed)
            chosen = halves[0] if split == "train" else halves[1]
            refs, labels = [refs[i] for i in chosen], labels[chosen]
        self._refs: list[Ref] = refs
        self.labels: np.ndarray = labels

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        ref = self._refs[index]
        cloud = self._reader.read(ref, self.normals)
        rows = self._rows(len(cloud.points), ref)
        points = torch.tensor(cloud.points)  # a copy: what a user does to an item stays there
        if self._reader.raw:
            points = normalise(points[None])[0]
        item: CloudItem = {
            "points": self._posed(points[rows]),
            "label": int(self.labels[index]),
            "index": index,
            "parts": torch.tensor(cloud.parts[rows]),
        }
        if cloud.normals is not None:
            item["normals"] = self._posed(torch.tensor(cloud.normals[rows]))
        return item

    def source(self, index: int) -> str:
        """The file, and the row in it, that item ``index`` comes from."""
        return str(self._refs[index])

    def _rows(self, count: int, ref: Ref) -> np.ndarray:
        if self.num_points == "all":
            return np.arange(count)
        name = str(ref._replace(path=Path(ref.path.name)))  # wherever the data lie
        return drawn_rows(count, self.num_points, None if self._resample else name)

    def _posed(self, vectors: Tensor) -> Tensor:
        return convert(vectors, self.native_frame, self.coordinate_frame)

    def __repr__(self) -> str:
        size = self.num_points if self.num_points == "all" else f"{self.num_points:,}"
        return (
            f"{self.name}({self.split}: {len(self):,} clouds of {size} points, "
            f"{self.layout} layout, {self.coordinate_frame})"
        )


def _choose(root: str | Path, layout: str | None) -> PartLayout:
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; choose one of: {', '.join(LAYOUTS)}")
    if not Path(root).expanduser().is_dir():
        raise DataError(f"data root {root} is no folder; give one with one of: {_KNOWN}")
    found = layouts_at(root)
    there = ", ".join(f"{reader.folder} ({reader.name})" for reader in found)
    usable = [reader for reader in found if layout in (None, reader.name)]
    if not found:
        raise DataError(f"no ShapeNet-Part at data root {root}; known: {_KNOWN}")
    if not usable:
        raise DataError(
            f"data root {root} does not hold ShapeNetPart in layout {layout!r}; found: {there}"
        )
    if len(usable) > 1:
        raise DataError(
            f"data root {root} holds ShapeNetPart more than once; give one of the folders, or "
            f"layout=: {there}"
        )
    return usable[0]
