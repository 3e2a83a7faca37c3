"""ModelNet40-C (Sun et al. 2022, arXiv 2201.12296): the test clouds of ModelNet40, corrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from pointcanon.classes import MODELNET40_CLASSES
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.coordinates import coordinate_frame as frame_named
from pointcanon.datasets import CloudItem
from pointcanon.datasets.modelnet_layouts import Ref, digest
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.datasets.stored import class_labels, finite_points
from pointcanon.errors import DataError, InputError
from pointcanon.readers.arrays import npy_array

__all__ = ["ModelNet40C", "ModelNet40CFiles", "files_at"]

_NATIVE_FRAME = frame_named("y-up-mirrored")
_CLEAN = "original"
_DEGREES = ("1", "2", "3", "4", "5")
_KNOWN = "a folder with label.npy and files such as data_gaussian_3.npy, of ModelNet40-C"


class ModelNet40C(Dataset[CloudItem]):
    """2,468 test clouds of the 40 classes, clean and in 15 corruptions at five severities.

    Clouds come as stored, all their points, which differ in number between the files, as the
    protocol has it: its figure is the error rate over a file, meant over severities and over
    corruptions (``pointcanon eval --data.name modelnet40-c --corruptions all``). Severities of
    ``occlusion`` and ``lidar`` are five points of view.

    The frame is that of ModelNet40's h5 files, of which the clouds are made. ``occlusion`` and
    ``lidar`` are rendered from the meshes instead, and the published script poses these by
    ``(x, y, z) -> (-x, z, y)``: next to the other files they are mirrored in x. They are left so,
    which every published figure has in it.

    Args:
        root: The folder of the files, or its parent.
        split: ``"test"``, all there is.
        variant: The file: ``"original"`` for the clean clouds, or a corruption and a severity, such
            as ``"gaussian_3"``.
        num_points: Points per cloud, drawn once if fewer than there are; None for all.
        coordinate_frame: Name of the frame to convert to; None keeps ``y-up-mirrored``.

    Attributes:
        classes: The class names, alphabetical; a label indexes them.
        labels: ``(len(self),)`` int64.
        corruptions: The fifteen, whichever files are there.
        layout: ``"npy"``.
        native_frame: The frame of the files.
        coordinate_frame: The frame of the items.

    Raises:
        DataError: If the root does not hold the data set, or a file is missing or damaged.
        InputError: On an argument that cannot be met.
    """

    layout: str = "npy"
    split: str = "test"
    native_frame: CoordinateFrame = _NATIVE_FRAME
    corruptions: tuple[str, ...] = (
        *("occlusion", "lidar", "density_inc", "density", "cutout"),
        *("uniform", "gaussian", "impulse", "upsampling", "background"),
        *("rotation", "shear", "distortion", "distortion_rbf", "distortion_rbf_inv"),
    )

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        variant: str = _CLEAN,
        num_points: int | None = None,
        coordinate_frame: str | CoordinateFrame | None = None,
    ) -> None:
        if split != "test":
            raise InputError(f"unknown split {split!r}; ModelNet40-C has 'test' alone")
        _require_variant(variant, self.corruptions)
        files = files_at(Path(root).expanduser())
        if files is None:
            raise DataError(f"no ModelNet40-C at data root {root}; give {_KNOWN}")
        self.folder = files.folder
        self.name: str = f"ModelNet40-C {variant}"
        self.variant = variant
        self.num_points = num_points
        self.classes = list(MODELNET40_CLASSES)
        self.coordinate_frame = frame_named(coordinate_frame or _NATIVE_FRAME)
        self._path = files.path(variant)
        self._held: np.ndarray | None = None
        shape = self._clouds().shape
        self.labels: np.ndarray = _labels(self._path, shape[0])
        if num_points is not None and not 1 <= num_points <= shape[1]:
            raise InputError(
                f"num_points is {num_points:,}, but clouds of {self._path} have {shape[1]:,} "
                "points; ask for 1 to that many, or leave it away for all"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a spawned worker maps the file itself

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        stored = self._clouds()[index]
        # clouds of some files lie in order, patch by patch: their first points are a part of them
        rows = drawn_rows(len(stored), self.num_points or len(stored), str(index))
        points = finite_points(stored[rows], self.source(index))
        points = convert(points, self.native_frame, self.coordinate_frame)
        return {"points": points, "label": int(self.labels[index]), "index": index}

    def corrupted(self, name: str, severity: int) -> ModelNet40C:
        """The same clouds from another file.

        Args:
            name: One of :attr:`corruptions`.
            severity: From 1 to 5.

        Raises:
            DataError: If that file is missing or damaged.
            InputError: If there is no such corruption or severity.
        """
        return ModelNet40C(
            self.folder,
            self.split,
            variant=f"{name}_{severity}",
            num_points=self.num_points,
            coordinate_frame=self.coordinate_frame,
        )

    def source(self, index: int) -> str:
        """The file, and the row in it, that item ``index`` comes from."""
        return str(Ref(self._path, range(len(self))[index], ""))

    def _clouds(self) -> np.ndarray:
        if self._held is None:
            self._held = _mapped(self._path)
        return self._held

    def __repr__(self) -> str:
        points = self.num_points or self._clouds().shape[1]
        return (
            f"{self.name}({len(self):,} clouds of {points:,} points, {self.layout} layout, "
            f"{self.coordinate_frame})"
        )


@dataclass(frozen=True)
class ModelNet40CFiles:
    """All of its files, as ``pointcanon data check`` looks at them.

    Attributes:
        folder: The one that holds them.
    """

    dataset: ClassVar[str] = "ModelNet40-C"
    name: ClassVar[str] = "npy"
    coordinate_frame: ClassVar[str] = _NATIVE_FRAME.name
    classes: ClassVar[tuple[str, ...]] = MODELNET40_CLASSES
    splits: ClassVar[tuple[str, ...]] = ("test",)

    folder: Path

    def path(self, variant: str) -> Path:
        """Where the clouds of a variant should be."""
        return self.folder / f"data_{variant}.npy"

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        """The files that are there, and the names of those that are not."""
        corrupted = (f"{name}_{degree}" for name in ModelNet40C.corruptions for degree in _DEGREES)
        paths = [self.path(variant) for variant in (_CLEAN, *corrupted)]
        present = [path for path in paths if path.is_file()]
        return present, [path.name for path in paths if path not in present]

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        """Every cloud of a file with a digest of its content, or with what is wrong with it.

        Raises:
            DataError: If the file as a whole cannot be read.
        """
        clouds = _mapped(path)
        for row, label in enumerate(_labels(path, len(clouds))):
            ref = Ref(path, row, self.classes[label])
            yield ref, digest(clouds[row], ref)


def _require_variant(variant: str, corruptions: tuple[str, ...]) -> None:
    name, _, severity = variant.rpartition("_")
    if variant != _CLEAN and not (name in corruptions and severity in _DEGREES):
        raise InputError(
            f"unknown variant {variant!r}; choose {_CLEAN!r}, or a corruption with a severity from "
            f"1 to 5, such as 'gaussian_3', of: {', '.join(corruptions)}"
        )


def files_at(root: Path) -> ModelNet40CFiles | None:
    """Those in a folder, or else in one directly inside it."""
    inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
    for folder in (root, *inside):
        if (folder / "label.npy").is_file() and any(folder.glob("data_*.npy")):
            return ModelNet40CFiles(folder)
    return None


def _mapped(path: Path) -> np.ndarray:
    """Clouds ``(n, P, 3)``."""
    held = _array(path)
    if held.ndim != 3 or held.shape[-1] != 3:
        raise DataError(f"{path} has shape {held.shape}, expected (n, P, 3)")
    return held


def _labels(file: Path, clouds: int) -> np.ndarray:
    path = file.with_name("label.npy")
    return class_labels(path, _array(path), clouds, len(MODELNET40_CLASSES), file)


def _array(path: Path) -> np.ndarray:
    """Mapped rather than read: a file is tens of megabytes, and there are 76."""
    if not path.is_file():
        raise DataError(f"{path.parent} has no {path.name}; fetch it, or choose another variant")
    try:
        return npy_array(path)
    except Exception as error:  # NumPy raises whatever a damaged header leads it to
        raise DataError(f"{path} cannot be read, it is damaged or incomplete ({error})") from error
