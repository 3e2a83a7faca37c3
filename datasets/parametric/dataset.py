"""A labelled data set of parametric objects: generated, reproducible, nothing to download."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pointcanon import coordinates
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import CloudItem
from pointcanon.datasets.parametric.primitives import Surface, areas_and_normals, sample
from pointcanon.datasets.parametric.shapes import CATEGORIES, Draw
from pointcanon.errors import InputError

if TYPE_CHECKING:
    import trimesh

__all__ = ["ParametricShapes", "Split"]

Split = Literal["train", "val", "test", "trainval"]

_SIZES = {"train": 1440, "val": 240, "test": 480, "trainval": 1680}
_STREAMS = {"train": 0, "val": 1, "test": 2}
_NATIVE_FRAME = coordinates.coordinate_frame("z-up")
_CLASSES = tuple(CATEGORIES)


def _part_ranges() -> tuple[range, ...]:
    """The part ids of every category: consecutive, in the order of the categories."""
    counts = [len(category.parts) for category in CATEGORIES.values()]
    return tuple(
        range(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)
    )


class _Cloud(NamedTuple):
    points: Tensor
    normals: Tensor
    parts: Tensor


class ParametricShapes(Dataset[CloudItem]):
    """Objects of everyday kinds, upright, facing +x, centred and in the unit ball.

    Item ``i`` is a function of ``(seed, split, i)`` alone (and of ``num_points``): the same in
    every process and order, whatever the size of the split, on every machine to within rounding.
    Labels go round the classes, so every split is balanced. ``trainval`` is ``train`` followed by
    ``val``, item for item; a ``size`` is then shared out 6 : 1. Points are uniform by area over
    the surfaces of all parts, the little that lies inside other parts included. Clouds are made
    on first use and kept (32 kB per 1,024 points).

    An item is a dict with ``points (num_points, 3)`` float32, ``label`` int, ``index`` int,
    ``parts (num_points,)`` int64 and, on request, ``normals (num_points, 3)`` float32, outward.

    Args:
        split: ``"train"``, ``"val"``, ``"test"`` or ``"trainval"``.
        num_points: Points per cloud.
        size: Number of objects; by default 1,440 / 240 / 480 / 1,680.
        seed: Another seed is another data set of the same kind, without a shared object.
        normals: Whether items carry normals.
        coordinate_frame: Frame that clouds and meshes are given in.

    Attributes:
        name: ``"ParametricShapes"``.
        classes: Names of the classes, alphabetical; a label is an index into them.
        labels: ``(len,)`` int64, known without generating anything.
        parts: Names of all parts, ``"chair/leg"``; a part id is an index into them.
        part_ranges: The part ids of each class.
        native_frame: The frame objects are built in, z-up.
        coordinate_frame: The frame of the items.
        layout: ``"generated"``.

    Raises:
        InputError: On an unknown split or frame, or a number that is out of range.
    """

    name: str = "ParametricShapes"
    layout: str = "generated"
    native_frame: CoordinateFrame = _NATIVE_FRAME
    parts: tuple[str, ...] = tuple(
        f"{name}/{part}" for name, category in CATEGORIES.items() for part in category.parts
    )
    part_ranges: tuple[range, ...] = _part_ranges()

    def __init__(
        self,
        split: Split,
        *,
        num_points: int = 1024,
        size: int | None = None,
        seed: int = 0,
        normals: bool = False,
        coordinate_frame: str | CoordinateFrame = _NATIVE_FRAME,
    ) -> None:
        if split not in get_args(Split):
            known = ", ".join(get_args(Split))
            raise InputError(f"unknown split {split!r}; choose one of: {known}")
        self.split = split
        self.num_points = _at_least(1, "num_points", num_points)
        self.seed = _at_least(0, "seed", seed)
        self.normals = normals
        self.coordinate_frame = coordinates.coordinate_frame(coordinate_frame)
        self.classes = list(_CLASSES)
        self._items = _items(split, _at_least(1, "size", _SIZES[split] if size is None else size))
        self.labels = np.array([item % len(_CLASSES) for _, item in self._items], dtype=np.int64)
        self._clouds: dict[int, _Cloud] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        if index not in self._clouds:
            self._clouds[index] = self._sample(index)
        kept = self._clouds[index]
        # clones: a transform that works in place must not reach what is kept
        item: CloudItem = {
            "points": kept.points.clone(),
            "label": int(self.labels[index]),
            "index": index,
            "parts": kept.parts.clone(),
        }
        if self.normals:
            item["normals"] = kept.normals.clone()
        return item

    def mesh(self, index: int) -> trimesh.Trimesh:
        """The surface that a cloud was sampled from, in the same place, size and frame.

        Parts are closed bodies of their own that overlap a little; ``face_attributes["part"]``
        holds the global part id of every face.

        Raises:
            IndexError: If there is no such item.
        """
        import trimesh

        surface, parts, rng = self._build(range(len(self))[index])
        points, _, _ = sample(surface, self.num_points, rng)
        centre, scale = _centre_and_scale(points)
        solid = areas_and_normals(surface)[0] > 0
        corners = self._in_frame((surface[solid] - centre) / scale)
        if self.coordinate_frame.mirrored:
            corners = corners.flip(1)  # a reflection turns triangles inside out
        return trimesh.Trimesh(
            vertices=corners.reshape(-1, 3).numpy(),
            faces=np.arange(3 * len(corners)).reshape(-1, 3),
            face_attributes={"part": parts[solid]},
        )

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.split}: {len(self):,} clouds of {self.num_points:,} points, "
            f"{self.layout}, {self.coordinate_frame})"
        )

    def _build(self, index: int) -> tuple[Surface, NDArray[np.int64], np.random.Generator]:
        """Triangles ``(T, 3, 3)`` and part ids ``(T,)`` of an object, and the generator after."""
        split, item = self._items[index]
        rng = np.random.default_rng((self.seed, _STREAMS[split], item))
        label = int(self.labels[index])
        category, first = CATEGORIES[_CLASSES[label]], self.part_ranges[label].start
        pieces = list(category.build(Draw(rng)))
        ids = [first + category.parts.index(part) for part, _ in pieces]
        surface = np.concatenate([piece for _, piece in pieces])
        return surface, np.repeat(ids, [len(piece) for _, piece in pieces]), rng

    def _sample(self, index: int) -> _Cloud:
        surface, parts, rng = self._build(index)
        points, normals, chosen = sample(surface, self.num_points, rng)
        centre, scale = _centre_and_scale(points)
        return _Cloud(
            self._in_frame((points - centre) / scale).float(),
            self._in_frame(normals).float(),
            torch.from_numpy(parts[chosen]),
        )

    def _in_frame(self, vectors: NDArray[np.float64]) -> Tensor:
        return coordinates.convert(torch.from_numpy(vectors), _NATIVE_FRAME, self.coordinate_frame)


def _items(split: Split, size: int) -> list[tuple[str, int]]:
    """The (stream, number) of every item."""
    if split != "trainval":
        return [(split, i) for i in range(size)]
    held_out = size // 7
    return _items("train", size - held_out) + _items("val", held_out)


def _centre_and_scale(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """What is subtracted and divided by so that the cloud is centred and in the unit ball."""
    centre = points.mean(axis=0)
    return centre, float(np.linalg.norm(points - centre, axis=1).max()) or 1.0


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)
