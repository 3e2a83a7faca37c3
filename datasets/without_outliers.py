"""A data set without the points that belong to no surface."""

from __future__ import annotations

import numpy as np

from pointcanon.clouds import normalise
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import CloudDataset, CloudItem
from pointcanon.outliers import inliers

__all__ = ["WithoutOutliers"]


class WithoutOutliers:
    """A data set whose clouds lose their strays (:func:`pointcanon.outliers.inliers`).

    The clouds come centred and in the unit ball again, which a stray may have set the size of.
    Points have no parts any more: it is for classifiers.

    Args:
        dataset: Any.

    Attributes:
        labels: ``(len(self),)`` int64, those of ``dataset``, as are its classes and its frame.
    """

    def __init__(self, dataset: CloudDataset) -> None:
        self.name: str = f"{dataset.name} without outliers"
        self.split: str | None = getattr(dataset, "split", None)
        self.classes: list[str] = list(dataset.classes)
        self.labels: np.ndarray = dataset.labels
        self.coordinate_frame: CoordinateFrame = dataset.coordinate_frame
        self.normals: bool = getattr(dataset, "normals", False)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> CloudItem:
        item = self._dataset[index]
        kept = inliers(item["points"][None])[0]
        points = normalise(item["points"][kept][None])[0]
        found: CloudItem = {"points": points, "label": item["label"], "index": item["index"]}
        if "normals" in item:
            found["normals"] = item["normals"][kept]
        return found
