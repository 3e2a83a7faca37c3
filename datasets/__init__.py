"""Data sets: map-style torch data sets that all yield a :class:`CloudItem`, and their registry.

A new data set is one file in this folder and one line in ``REGISTRY``. Importing this package
reads no data and imports no reader (h5py, trimesh): a data set's module is imported when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor

from pointcanon.coordinates import CoordinateFrame
from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from pointcanon.datasets.modelnet import ModelNet10, ModelNet40
    from pointcanon.datasets.modelnet40_c import ModelNet40C
    from pointcanon.datasets.parametric import ParametricShapes
    from pointcanon.datasets.rna import RNA
    from pointcanon.datasets.scan_object_nn import ScanObjectNN
    from pointcanon.datasets.shapenet_part import ShapeNetPart

__all__ = [
    "REGISTRY",
    "RNA",
    "UNLABELLED",
    "CloudDataset",
    "CloudItem",
    "ModelNet10",
    "ModelNet40",
    "ModelNet40C",
    "ParametricShapes",
    "PartDataset",
    "ScanObjectNN",
    "ShapeNetPart",
    "load",
]

UNLABELLED = -1
"""In place of a part, for a point that has none: it counts in no loss and in no metric."""


class _CloudItem(TypedDict):
    points: Tensor
    label: int
    index: int


class CloudItem(_CloudItem, total=False):
    """One cloud, in the shape torch's default collate makes a batch of.

    ``points (N, 3)`` float32, ``label`` the index of its class, ``index`` its place in the data
    set; where asked for, ``normals (N, 3)`` float32; of a :class:`PartDataset`, ``parts (N,)``
    int64, the part each point belongs to, or ``UNLABELLED``.
    """

    normals: Tensor
    parts: Tensor


class CloudDataset(Protocol):
    """What every data set of clouds with a class offers.

    Attributes:
        name: The data set's name, as printed in reports.
        classes: The class names; a label indexes them.
        labels: ``(len(self),)`` int64, known without reading any points.
        coordinate_frame: The frame the items are in.
    """

    name: str
    classes: list[str]
    labels: np.ndarray
    coordinate_frame: CoordinateFrame

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CloudItem: ...


@runtime_checkable
class PartDataset(CloudDataset, Protocol):
    """A :class:`CloudDataset` whose points are labelled, for part segmentation.

    The label of a cloud, its class, is what the field calls the category of the shape. Such a data
    set serves classification as well: what is learned is for the model to say.

    Attributes:
        parts: The part names, over all classes; a part indexes them.
        part_ranges: For each class, the parts its points may have.
    """

    parts: tuple[str, ...]
    part_ranges: tuple[range, ...]


class _Entry(NamedTuple):
    module: str
    name: str
    needs_root: bool = True


REGISTRY: dict[str, _Entry] = {
    "modelnet40": _Entry("pointcanon.datasets.modelnet", "ModelNet40"),
    "modelnet10": _Entry("pointcanon.datasets.modelnet", "ModelNet10"),
    "modelnet40-c": _Entry("pointcanon.datasets.modelnet40_c", "ModelNet40C"),
    "scan-object-nn": _Entry("pointcanon.datasets.scan_object_nn", "ScanObjectNN"),
    "parametric-shapes": _Entry("pointcanon.datasets.parametric", "ParametricShapes", False),
    "shapenet-part": _Entry("pointcanon.datasets.shapenet_part", "ShapeNetPart"),
    "rna": _Entry("pointcanon.datasets.rna", "RNA"),
}
"""Data sets by the name recipes and the command line use."""


def load(name: str, root: str | Path | None, split: str, **options: Any) -> CloudDataset:
    """The data set called ``name``.

    Args:
        name: A key of ``REGISTRY``.
        root: The folder that holds it; None for a data set that is generated.
        split: The split, such as ``"train"``, ``"val"`` or ``"test"``.
        **options: Passed on to the data set's class.

    Raises:
        UsageError: On an unknown name or option, or a root that is missing or not called for.
        DataError: If the root does not hold the data set.
    """
    if name not in REGISTRY:
        raise UsageError(f"unknown data set {name!r}; choose one of: {', '.join(REGISTRY)}")
    entry = REGISTRY[name]
    if entry.needs_root and root is None:
        raise UsageError(f"data set {name!r} needs the folder that holds it: give data.root")
    if not entry.needs_root and root is not None:
        raise UsageError(f"data set {name!r} is generated: leave data.root away (got {root})")
    dataset = getattr(import_module(entry.module), entry.name)
    place = (root,) if entry.needs_root else ()
    try:
        signature(dataset).bind(*place, split, **options)
    except TypeError as error:
        known = ", ".join(list(signature(dataset).parameters)[len(place) + 1 :])
        raise UsageError(f"data set {name!r}: {error}; its options are: {known}") from None
    return dataset(*place, split, **options)


def __getattr__(name: str) -> Any:
    for entry in REGISTRY.values():
        if entry.name == name:
            return getattr(import_module(entry.module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
