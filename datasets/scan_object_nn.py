"""ScanObjectNN (Uy et al., ICCV 2019): objects cut out of scans of rooms, from its h5 files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from pointcanon.classes import SCAN_OBJECT_NN_CLASSES
from pointcanon.clouds import normalise
from pointcanon.coordinates import CoordinateFrame, convert
from pointcanon.coordinates import coordinate_frame as frame_named
from pointcanon.datasets import CloudItem
from pointcanon.datasets.modelnet_layouts import Ref, digest
from pointcanon.datasets.split import stratified_split
from pointcanon.datasets.stored import class_labels, finite_points, h5_file
from pointcanon.errors import DataError, InputError
from pointcanon.readers.geometry import LIMIT

if TYPE_CHECKING:
    import h5py

__all__ = ["VALIDATION_FRACTION", "VARIANTS", "ScanObjectNN", "ScanObjectNNFiles", "files_at"]

VALIDATION_FRACTION = 0.1
"""Share of every class of the official train split that is held out as ``"val"``."""

VARIANTS: dict[str, str] = {
    "OBJ_BG": "objectdataset.h5",
    "OBJ_ONLY": "objectdataset.h5",
    "PB_T25": "objectdataset_augmented25_norot.h5",
    "PB_T25_R": "objectdataset_augmented25rot.h5",
    "PB_T50_R": "objectdataset_augmentedrot.h5",
    "PB_T50_RS": "objectdataset_augmentedrot_scale75.h5",
}
"""The end of the names of their files, which begin with ``training_`` and ``test_``."""

_OFFICIAL = {"train": "training", "val": "training", "trainval": "training", "test": "test"}
_FOLDS = ("main_split", "split1", "split2", "split3", "split4")
_NATIVE_FRAME = frame_named("y-up")
_BACKGROUND = -1
_KNOWN = "h5_files/main_split/ or main_split_nobg/, with training_objectdataset.h5 and the like"


class ScanObjectNN(Dataset[CloudItem]):
    """15 classes of real furniture and household objects, scanned, with holes and neighbours.

    ==========  ============================================================  =============
    variant     what                                                          train, test
    ==========  ============================================================  =============
    OBJ_ONLY    the points of the object (``main_split_nobg``)                2,309, 581
    OBJ_BG      all points in its box, background too (``main_split``)        2,309, 581
    PB_T25      as OBJ_BG, the box moved by up to 25 %, five times            11,416, 2,882
    PB_T25_R    that, turned about the up axis                                11,416, 2,882
    PB_T50_R    the box moved by up to 50 %, turned                           11,416, 2,882
    PB_T50_RS   that, scaled; the hardest, and the one most figures are for   11,416, 2,882
    ==========  ============================================================  =============

    Points are the first ``num_points`` of the 2,048 of a cloud, which lie in random order, centred
    and divided by the largest norm of these. The y axis points up (according to the authors' issue
    33); that the scans are not mirrored is taken for granted. ``main_split_nobg`` holds the PB
    variants without background as well, which are read where the root is that folder or a file in
    it. The copies of an object in the PB variants are not told apart in the files, so ``"val"``
    holds near twins of ``"train"`` there: select on OBJ_BG where that matters.

    Args:
        root: ``h5_files``, its parent, one of its folders, or one of the files.
        split: ``"train"`` and ``"val"``, which together are the official train split
            (``"trainval"``); or ``"test"``.
        variant: A key of :data:`VARIANTS`; None where the root holds one alone.
        fold: 0 for the main split, which nearly all figures are for; 1 to 4 for the others of the
            paper's supplement.
        num_points: Points per cloud.
        background: Keep the points of neighbours, floors and walls. False leaves out what the file
            marks as such, and repeats the points of an object that has fewer.
        coordinate_frame: Name of the frame to convert to; None keeps that of the files, ``y-up``.
        validation_seed: Chooses the validation split.

    Attributes:
        classes: The class names, in the order of the files' labels.
        labels: ``(len(self),)`` int64, known without reading any points.
        variant: A key of :data:`VARIANTS`.
        layout: ``"h5"``.
        native_frame: The frame of the files.
        coordinate_frame: The frame of the items.

    Raises:
        DataError: If the root does not hold the data set, or a file is damaged.
        InputError: On an argument that cannot be met, such as more points than the files hold.
    """

    layout: str = "h5"
    native_frame: CoordinateFrame = _NATIVE_FRAME

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        variant: str | None = None,
        fold: int = 0,
        num_points: int = 1024,
        background: bool = True,
        coordinate_frame: str | CoordinateFrame | None = None,
        validation_seed: int = 0,
    ) -> None:
        if split not in _OFFICIAL:
            raise InputError(f"unknown split {split!r}; choose one of: {', '.join(_OFFICIAL)}")
        if variant not in (None, *VARIANTS):
            raise InputError(f"unknown variant {variant!r}; choose one of: {', '.join(VARIANTS)}")
        if fold not in range(len(_FOLDS)):
            raise InputError(f"fold is {fold}; choose 0, the main split, or 1 to 4")
        place = _choose(Path(root).expanduser(), variant, fold)
        self.variant = place.variant
        self.name: str = place.dataset
        self.split = split
        self.num_points = num_points
        self.background = background
        self.classes = list(SCAN_OBJECT_NN_CLASSES)
        self.coordinate_frame = frame_named(coordinate_frame or _NATIVE_FRAME)
        self._path = place.path(split)
        if not self._path.is_file():
            raise DataError(
                f"{place.folder} has no {self._path.name}, the {split} clouds of that variant"
            )
        labels = _labels(self._path, num_points, masked=not background)
        rows = np.arange(len(labels))
        if split in ("train", "val"):
            halves = stratified_split(labels, VALIDATION_FRACTION, validation_seed)
            rows = halves[0] if split == "train" else halves[1]
        if not len(rows):
            raise DataError(f"{self._path} holds no clouds for split {split!r}")
        self.labels: np.ndarray = labels[rows]
        self._refs = [Ref(self._path, int(row), self.classes[labels[row]]) for row in rows]
        self._held: tuple[np.ndarray, np.ndarray | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # a spawned worker reads what it needs itself

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        ref = self._refs[index]
        points = normalise(finite_points(self._points(ref), str(ref))[None])[0]
        points = convert(points, self.native_frame, self.coordinate_frame)
        return {"points": points, "label": int(self.labels[index]), "index": index}

    def source(self, index: int) -> str:
        """The file, and the row in it, that item ``index`` comes from."""
        return str(self._refs[index])

    def _points(self, ref: Ref) -> np.ndarray:
        if self._held is None:
            with _h5_file(self._path, masked=not self.background) as file:
                # all of them: reading row by row decodes a chunk of a compressed file each time
                needed = self.num_points if self.background else None
                mask = None if self.background else file["mask"][...] != _BACKGROUND
                self._held = file["data"][:, :needed].astype(np.float32), mask
        clouds, mask = self._held
        if mask is None:
            return clouds[ref.row]
        own = clouds[ref.row][mask[ref.row]]
        if not len(own):
            raise DataError(f"{ref} is all background: read it with background, or leave it out")
        return np.resize(own, (self.num_points, 3))

    def __repr__(self) -> str:
        return (
            f"{self.name}({self.split}: {len(self):,} clouds of {self.num_points:,} points, "
            f"{self.layout} layout, {self.coordinate_frame})"
        )


@dataclass(frozen=True)
class ScanObjectNNFiles:
    """The two files of a variant, as ``pointcanon data check`` looks at them too.

    Attributes:
        variant: A key of :data:`VARIANTS`.
        folder: The one that holds them.
    """

    name: ClassVar[str] = "h5"
    coordinate_frame: ClassVar[str] = _NATIVE_FRAME.name
    classes: ClassVar[tuple[str, ...]] = SCAN_OBJECT_NN_CLASSES
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    variant: str
    folder: Path

    @property
    def dataset(self) -> str:
        """Its name, in which no two sets of clouds are called the same."""
        bare = self.folder.name.endswith("_nobg") and self.variant != "OBJ_ONLY"
        return f"ScanObjectNN {self.variant}" + (" without background" if bare else "")

    def path(self, split: str) -> Path:
        """Where the file with the clouds of a split should be."""
        return self.folder / f"{_OFFICIAL[split]}_{VARIANTS[self.variant]}"

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        """The file of a split if it is there, or its name if it is not."""
        path = self.path(split)
        return ([path], []) if path.is_file() else ([], [path.name])

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        """Every cloud of a file with a digest of its content, or with what is wrong with it.

        Raises:
            DataError: If the file as a whole cannot be read.
        """
        labels = _labels(path)
        with _h5_file(path, masked=False) as file:
            clouds = file["data"][...].astype(np.float32)
        for row, label in enumerate(labels):
            ref = Ref(path, row, self.classes[label])
            yield ref, digest(clouds[row], ref)


def _choose(root: Path, variant: str | None, fold: int) -> ScanObjectNNFiles:
    """Where the one variant is that is asked for, or that is there."""
    if not root.exists():
        raise DataError(f"data root {root} does not exist; give a folder with {_KNOWN}")
    found = [place for place in files_at(root, fold) if variant in (None, place.variant)]
    if not found:
        asked = "ScanObjectNN" if variant is None else f"{variant} of ScanObjectNN"
        raise DataError(
            f"data root {root} does not hold {asked}, split {_FOLDS[fold]}; known: {_KNOWN}"
        )
    if variant is not None and len({place.folder.name for place in found}) == len(found):
        return found[0]  # main_split comes before main_split_nobg
    if len(found) > 1:
        there = ", ".join(f"{place.variant} ({place.folder.name})" for place in found)
        raise DataError(
            f"data root {root} holds several variants: give variant=, of the command line "
            f"--data.variant, one of: {there}"
        )
    return found[0]


def files_at(root: Path, fold: int = 0) -> list[ScanObjectNNFiles]:
    """The variants at a root, which may be a file, the folder of a split, or above it."""
    only = root.name.partition("_")[2] if root.is_file() else None
    folder = root.parent if root.is_file() else root
    names = (_FOLDS[fold], f"{_FOLDS[fold]}_nobg")
    if folder.name in {name for split in _FOLDS for name in (split, f"{split}_nobg")}:
        folders = [folder]
    else:
        above = (folder, folder / "h5_files")
        folders = [place / name for place in above for name in names if (place / name).is_dir()]
        folders = folders or [folder]  # the files of a variant copied somewhere else
    return [
        ScanObjectNNFiles(variant, place)
        for place in folders
        for variant, ending in VARIANTS.items()
        if only in (None, ending)
        if not _contradicts(variant, place)
        if any((place / f"{split}_{ending}").is_file() for split in ("training", "test"))
    ]


def _contradicts(variant: str, folder: Path) -> bool:
    """Of the two variants that share the names of files, the folder tells which; elsewhere both."""
    if variant == "OBJ_BG":
        return folder.name.endswith("_nobg")
    return variant == "OBJ_ONLY" and folder.name in _FOLDS


def _labels(path: Path, num_points: int | None = None, masked: bool = False) -> np.ndarray:
    """``(n,)`` int64, once the file is known to hold what is asked of it."""
    with _h5_file(path, masked) as file:
        shape, size = file["data"].shape, file["data"].size * file["data"].dtype.itemsize
        if size > LIMIT:
            raise DataError(f"{path}: 'data' of shape {shape} takes more than {LIMIT >> 20:,} MiB")
        labels = file["label"][...]
        mask = file["mask"].shape if masked and "mask" in file else None
    if masked and mask != shape[:2]:
        held = "none" if mask is None else f"one of shape {mask}"
        raise InputError(
            f"the background was to be left out, but {path} has no mask {shape[:2]}: it holds "
            f"{held}; keep the background, or read OBJ_ONLY"
        )
    if num_points is not None and not 1 <= num_points <= shape[1]:
        raise InputError(
            f"num_points is {num_points:,}, but clouds of {path} have {shape[1]:,} points; "
            "ask for 1 to that many"
        )
    return class_labels(path, labels, shape[0], len(SCAN_OBJECT_NN_CLASSES))


def _h5_file(path: Path, masked: bool) -> AbstractContextManager[h5py.File]:
    return h5_file(path, "ScanObjectNN", ("mask",) if masked else ())
