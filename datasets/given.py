"""Clouds that a user hands over, in whatever form, as a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from pointcanon.classes import part_ranges
from pointcanon.coordinates import CoordinateFrame, coordinate_frame
from pointcanon.datasets import CloudItem
from pointcanon.errors import InputError

__all__ = ["GivenClouds"]


class GivenClouds:
    """Anything with a length and clouds at its indices, as a data set with classes and parts.

    An item is a cloud ``(N, 3)``; a tuple of a cloud and its label; a mapping with ``points`` and,
    where there are any, ``label``, ``normals`` and ``parts``; or an object with ``pos`` and, where
    there are any, ``y`` and ``normal``, as torch_geometric has it. So arrays and tensors
    ``(M, N, 3)``, lists of clouds of different size, and torch data sets will all do. Nothing is
    read before it is asked for.

    Args:
        clouds: M >= 1 of them.
        labels: ``(M,)`` integers that replace what the items say; of part networks the category.
        parts: ``(M, N)`` integers, or M tensors ``(N,)``, that replace what the items say.
        classes: Names that a label indexes; None asks the data set, which may not know.
        part_names: Names that a part indexes, likewise.
        coordinate_frame: Which way is up; None asks the data set, and z-up where it does not know.

    Attributes:
        labels: ``(M,)`` int64; zeros where they are not known without reading the clouds.
        labelled: Whether labels are known.
        segmented: Whether parts are known.

    Raises:
        InputError: If there are no clouds, or not as many labels or parts; by an item, on a cloud
            that is none.
    """

    split: str | None = None

    def __init__(
        self,
        clouds: Any,
        labels: Any = None,
        *,
        parts: Any = None,
        classes: Sequence[str] | None = None,
        part_names: Sequence[str] | None = None,
        coordinate_frame: str | CoordinateFrame | None = None,
    ) -> None:
        if not (hasattr(clouds, "__len__") and hasattr(clouds, "__getitem__")):
            raise InputError(
                f"clouds is a {type(clouds).__name__}: pass an array (M, N, 3), a list of clouds "
                "(N, 3), or a torch Dataset"
            )
        if len(clouds) == 0:
            raise InputError("clouds is empty: pass at least one cloud")
        self._clouds, self._given_parts = clouds, parts
        for name, given in (("labels", labels), ("parts", parts)):
            if given is not None and len(given) != len(clouds):
                raise InputError(f"{len(given)} {name} for {len(clouds)} clouds: give one for each")
        self.name: str = getattr(clouds, "name", "clouds")
        self.coordinate_frame = _frame(clouds, coordinate_frame)
        first = self._read(0)
        self._given_labels = None if labels is None else _integers("labels", labels)
        known = getattr(clouds, "labels", None) if labels is None else self._given_labels
        self.labels = np.zeros(len(clouds), np.int64) if known is None else np.asarray(known)
        # a cloud that is given again still has no label, though its item has a number there
        self.labelled = labels is not None or getattr(clouds, "labelled", "label" in first)
        self.segmented = parts is not None or "parts" in first
        self.normals = "normals" in first
        self.classes = list(classes or getattr(clouds, "classes", None) or [])
        self.parts: tuple[str, ...] = tuple(part_names or getattr(clouds, "parts", None) or ())
        self._ranges: tuple[range, ...] | None = getattr(clouds, "part_ranges", None)

    @property
    def part_ranges(self) -> tuple[range, ...]:
        """The parts of each class: those named after it, where the data set does not say."""
        return self._ranges or part_ranges(self.classes or [""], self.parts)

    def source(self, index: int) -> str | None:
        """Where a cloud comes from, if the data set says."""
        clouds: Any = self._clouds
        while isinstance(clouds, Subset):
            index, clouds = clouds.indices[index], clouds.dataset
        return clouds.source(index) if hasattr(clouds, "source") else None

    def select(self, indices: Sequence[int]) -> GivenClouds:
        """Some of the clouds, in that order, at new indices."""
        chosen = copy(self)
        chosen._clouds = Subset(self._clouds, list(indices))
        chosen.labels = self.labels[list(indices)]
        if self._given_labels is not None:
            chosen._given_labels = self._given_labels[list(indices)]
        if self._given_parts is not None:
            chosen._given_parts = [self._given_parts[index] for index in indices]
        return chosen

    def __len__(self) -> int:
        return len(self._clouds)

    def __getitem__(self, index: int) -> CloudItem:
        found = self._read(index)
        points = _cloud(found["points"], f"clouds[{index}]")
        label = found.get("label", 0)
        if self._given_labels is not None:
            label = self._given_labels[index]
        item: CloudItem = {"points": points, "label": int(label), "index": index}
        if self.classes and not 0 <= item["label"] < len(self.classes):
            raise InputError(
                f"the label of clouds[{index}] is {item['label']}: "
                f"the predictor knows 0 to {len(self.classes) - 1}"
            )
        if "normals" in found:
            item["normals"] = _cloud(found["normals"], f"the normals of clouds[{index}]")
        parts = found.get("parts") if self._given_parts is None else self._given_parts[index]
        if parts is not None:
            item["parts"] = _integers(f"the parts of clouds[{index}]", parts)
            if len(item["parts"]) != len(points):
                raise InputError(
                    f"clouds[{index}] has {len(points)} points and {len(item['parts'])} parts: "
                    "give one for each point"
                )
        return item

    def _read(self, index: int) -> Mapping[str, Any]:
        found = self._clouds[index]
        if isinstance(found, Mapping):
            return found
        if isinstance(found, tuple):
            return dict(zip(("points", "label"), found, strict=False))
        if hasattr(found, "pos"):
            named = {"points": "pos", "label": "y", "normals": "normal"}
            read = {key: getattr(found, name, None) for key, name in named.items()}
            return {key: value for key, value in read.items() if value is not None}
        return {"points": found}


def _frame(clouds: Any, asked: str | CoordinateFrame | None) -> CoordinateFrame:
    own = getattr(clouds, "coordinate_frame", None)
    if own is not None and asked is not None and coordinate_frame(asked) != coordinate_frame(own):
        raise InputError(
            f"coordinate_frame is {asked}, and the data set is in {own}: read it in {asked}"
        )
    return coordinate_frame(own or asked or "z-up")


def _cloud(values: Any, name: str) -> Tensor:
    try:
        points = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(values).__name__}: pass numbers (N, 3)") from error
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise InputError(f"{name} has shape {tuple(points.shape)}: expected (N, 3), N >= 1")
    if not bool(points.isfinite().all()):
        place = int((~points.isfinite().all(dim=1)).nonzero()[0])
        raise InputError(f"{name}, point {place}, is {points[place].tolist()}: remove it")
    return points.detach().cpu().float()


def _integers(name: str, values: Any) -> Tensor:
    numbers = torch.as_tensor(values).detach().cpu()
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise InputError(
            f"{name} has shape {tuple(numbers.shape)} and dtype {numbers.dtype}: expected one "
            "integer for each"
        )
    return numbers.long()
