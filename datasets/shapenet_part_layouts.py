"""The public layouts of ShapeNet-Part on disk, each a reader behind one small interface.

=====  ===================================================================  ========  ==========
name   files                                                                normals   points
=====  ===================================================================  ========  ==========
txt    ``shapenetcore_partanno_segmentation_benchmark_v0_normal/``           yes       all, raw
h5     ``hdf5_data/``, ``shapenet_part_seg_hdf5_data/`` (``data``,           if stored 2,048, in
       ``label``, ``pid``, listed in ``*_hdf5_file_list.txt``) and                     the unit
       ``shapenetpart_hdf5_2048/`` (``seg`` for ``pid``, without lists)                ball
pyg    ``processed/*_{train,val,test}.pt`` of torch_geometric's ShapeNet     if stored all, raw
=====  ===================================================================  ========  ==========

:func:`layouts_at` finds which is at a folder. A :class:`PartLayout` names the files of a split and
the clouds in a file (a :class:`Ref` each, with its category), and reads one cloud.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pointcanon import checkpoint
from pointcanon.classes import SHAPENET_PART_CATEGORIES, SHAPENET_PART_PARTS, part_ranges
from pointcanon.datasets.modelnet_layouts import Ref
from pointcanon.datasets.stored import h5_file, whole_numbers
from pointcanon.errors import DataError, InputError

if TYPE_CHECKING:
    import h5py

__all__ = [
    "LAYOUTS",
    "PARTS",
    "PART_RANGES",
    "H5Layout",
    "PartCloud",
    "PartLayout",
    "PygLayout",
    "TxtLayout",
    "layouts_at",
]

_SYNSETS: dict[str, str] = {
    "airplane": "02691156",
    "bag": "02773838",
    "cap": "02954340",
    "car": "02958343",
    "chair": "03001627",
    "earphone": "03261776",
    "guitar": "03467517",
    "knife": "03624134",
    "lamp": "03636649",
    "laptop": "03642806",
    "motorbike": "03790512",
    "mug": "03797390",
    "pistol": "03948459",
    "rocket": "04099429",
    "skateboard": "04225987",
    "table": "04379243",
}
"""By category, its WordNet synset, which names its folder."""

PARTS: tuple[str, ...] = SHAPENET_PART_PARTS
PART_RANGES: tuple[range, ...] = part_ranges(SHAPENET_PART_CATEGORIES, PARTS)

_CATEGORY_OF = {synset: category for category, synset in _SYNSETS.items()}
_RANGE_OF = dict(zip(SHAPENET_PART_CATEGORIES, PART_RANGES, strict=True))
_SPLITS = ("train", "val", "test")


class PartCloud(NamedTuple):
    """All of a cloud: ``points (n, 3)`` float32, ``parts (n,)`` int64, ``normals (n, 3)`` float32
    or None."""

    points: np.ndarray
    parts: np.ndarray
    normals: np.ndarray | None


class PartLayout(ABC):
    """A reader of one layout.

    Attributes:
        name: ``"txt"``, ``"h5"`` or ``"pyg"``.
        raw: Whether points are in the units of the meshes, rather than in the unit ball.
        coordinate_frame: Name of the frame its files are in.
        folder: The folder of the layout itself.
    """

    name: ClassVar[str]
    raw: ClassVar[bool]
    dataset: str = "ShapeNetPart"
    coordinate_frame: str = "y-up"
    classes: tuple[str, ...] = SHAPENET_PART_CATEGORIES
    splits: tuple[str, ...] = _SPLITS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @abstractmethod
    def recognise(cls, folder: Path) -> PartLayout | None:
        """A reader of ``folder``, or None if it is not in this layout."""

    @abstractmethod
    def has_split(self, split: str) -> bool:
        """Whether the folder says which clouds belong to a split."""

    @abstractmethod
    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        """Files of ``"train"``, ``"val"`` or ``"test"`` that are there, and names of those that are
        listed but are not.

        Raises:
            DataError: If the list of the split is not there or cannot be used.
        """

    @abstractmethod
    def refs(self, path: Path) -> list[Ref]:
        """The clouds in one file."""

    @abstractmethod
    def stored(self, ref: Ref, normals: bool) -> PartCloud:
        """A cloud as it is on disk, whatever its values are."""

    def read(self, ref: Ref, normals: bool = False) -> PartCloud:
        """A cloud.

        Raises:
            DataError: If it is empty, has a point that is not finite, or a part that its category
                does not have.
            InputError: If there are no normals.
        """
        cloud = self.stored(ref, normals)
        if len(cloud.points) == 0:
            raise DataError(f"{ref} holds no points")
        for what, vectors in (("point", cloud.points), ("normal", cloud.normals)):
            if vectors is not None and not np.isfinite(vectors).all():
                row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                raise DataError(
                    f"{ref}: {what} {row} is {vectors[row].tolist()}, not three finite numbers"
                )
        parts = _RANGE_OF[ref.category]
        outside = np.flatnonzero((cloud.parts < parts.start) | (cloud.parts >= parts.stop))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{ref}: point {row} is labelled {cloud.parts[row]}, which is no part of "
                f"{ref.category} ({parts.start} … {parts.stop - 1})"
            )
        return cloud

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        """Every cloud of a file with a digest of its content, or with what is wrong with it.

        Raises:
            DataError: If the file as a whole cannot be read.
        """
        return ((ref, self._digest(ref)) for ref in self.refs(path))

    def _digest(self, ref: Ref) -> bytes | DataError:
        try:
            cloud = self.read(ref)
        except DataError as error:
            return error
        return blake2b(cloud.points.tobytes() + cloud.parts.tobytes(), digest_size=16).digest()


# ------------------------------------------------------------------------------------------ txt


class TxtLayout(PartLayout):
    """``<synset>/<id>.txt``, rows ``x y z nx ny nz part``; the splits are lists of ids in json."""

    name = "txt"
    raw = True

    @classmethod
    def recognise(cls, folder: Path) -> TxtLayout | None:
        signs = (folder / "synsetoffset2category.txt", folder / "train_test_split")
        return cls(folder) if any(sign.exists() for sign in signs) else None

    def has_split(self, split: str) -> bool:
        return self._list(split).is_file()

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        present, missing = [], []
        for number, entry in enumerate(_json_list(self._list(split))):
            # "shape_data/02691156/<id>": the first folder is that of another root
            _, synset, name = ("", "", *PurePosixPath(str(entry)).parts)[-3:]
            if synset not in _CATEGORY_OF:
                raise DataError(
                    f"{self._list(split)}, entry {number}: {entry!r} is of no category of "
                    "ShapeNet-Part; an entry reads like 'shape_data/02691156/<id>'"
                )
            if _CATEGORY_OF[synset] in classes:
                path = self.folder / synset / f"{name}.txt"
                if os.path.isfile(path):
                    present.append(path)
                else:
                    missing.append(f"{synset}/{name}.txt")
        return present, missing

    def refs(self, path: Path) -> list[Ref]:
        return [Ref(path, None, _CATEGORY_OF[path.parent.name])]

    def stored(self, ref: Ref, normals: bool) -> PartCloud:
        rows = _read_rows(ref.path)
        parts = rows[:, 6].astype(np.int64)
        return PartCloud(rows[:, :3], parts, rows[:, 3:6] if normals else None)

    def _list(self, split: str) -> Path:
        return self.folder / "train_test_split" / f"shuffled_{split}_file_list.json"


def _json_list(path: Path) -> list[Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}, which lists the clouds of that split, cannot be read ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no list in json ({error}); fetch it again") from error
    if not isinstance(held, list):
        raise DataError(f"{path} holds a {type(held).__name__}, not a list of clouds")
    return held


def _whole(ref: Ref, parts: np.ndarray) -> np.ndarray:
    """Parts as int64.

    Raises:
        DataError: If one is no whole number.
    """
    broken = np.flatnonzero(parts != np.round(parts))
    if len(broken):
        point = int(broken[0])
        raise DataError(
            f"{ref}: point {point} is labelled {parts[point]}, which is no whole number"
        )
    return parts.astype(np.int64, copy=False)


def _read_rows(path: Path) -> np.ndarray:
    """``(n, 7)`` float32; n may be 0."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return np.empty((0, 7), dtype=np.float32)
    try:
        rows = np.loadtxt(lines, dtype=np.float32, ndmin=2, comments=None)
    except ValueError:
        raise _row_fault(path, text) from None
    if rows.shape[1] != 7 or not np.isfinite(rows).all() or np.any(rows[:, 6] % 1):
        raise _row_fault(path, text)
    return rows


def _row_fault(path: Path, text: str) -> DataError:
    """Which row it is that cannot be used; looked for only once one is known to be there."""
    for row, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = np.array(line.split(), dtype=np.float32)
        except ValueError:
            values = np.empty(0, dtype=np.float32)
        if values.shape != (7,) or not np.isfinite(values).all() or values[6] % 1:
            return DataError(
                f"{path}, row {row}: {line.strip()[:80]!r} is not six finite numbers and a whole "
                "one, x y z nx ny nz part, separated by spaces"
            )
    return DataError(f"{path} holds rows that are not six finite numbers and a whole one")


# ------------------------------------------------------------------------------------------- h5


class H5Layout(PartLayout):
    """``data (n, P, 3)``, ``label (n, 1)`` and ``pid`` or ``seg (n, P)`` per file.

    The public files are compressed in chunks of many clouds, so a file is decoded once per process,
    as long as :attr:`memory_limit` bytes are not exceeded; beyond that, row by row. No file stays
    open, so workers may be forked or spawned.
    """

    name = "h5"
    raw = False
    memory_limit: int = 2 << 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._decoded: dict[Path, dict[str, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}  # a spawned worker decodes what it needs itself

    @classmethod
    def recognise(cls, folder: Path) -> H5Layout | None:
        reader = cls(folder)
        if any(reader._list(split).is_file() for split in _SPLITS):
            return reader
        found = [path for split in _SPLITS for path in reader._unlisted(split)]
        return reader if found and _labels_parts(found[0]) else None

    def has_split(self, split: str) -> bool:
        return self._list(split).is_file() or bool(self._unlisted(split))

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        if not self._list(split).is_file():
            found = self._unlisted(split)
            if not found:
                raise DataError(
                    f"{self.folder} has no {self._list(split).name}, which lists the files of that "
                    f"split, and no {split}*.h5"
                )
            return found, []
        lines = self._list(split).read_text(encoding="utf-8", errors="replace").splitlines()
        # in some copies a list names paths relative to another root: only the last part counts
        names = [PureWindowsPath(line.strip()).name for line in lines if line.strip()]
        present = [self.folder / name for name in names if os.path.isfile(self.folder / name)]
        return present, [name for name in names if not os.path.isfile(self.folder / name)]

    def refs(self, path: Path) -> list[Ref]:
        with _h5_file(path) as file:
            labels = file["label"][...].reshape(-1)
        outside = np.flatnonzero(~whole_numbers(labels, len(self.classes)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{path}: label {labels[row]} of row {row} is outside the {len(self.classes)} "
                "categories of ShapeNet-Part"
            )
        return [Ref(path, row, self.classes[int(label)]) for row, label in enumerate(labels)]

    def stored(self, ref: Ref, normals: bool) -> PartCloud:
        if ref.path in self._decoded:
            held, row = self._decoded[ref.path], ref.row
        elif self._fits(ref.path):
            held = self._decoded[ref.path] = _decode(ref.path, slice(None))
            row = ref.row
        else:
            held, row = _decode(ref.path, ref.row), None
        if normals and "normal" not in held:
            raise InputError(
                f"normals were asked for, but {ref.path} stores none; leave normals away or use "
                "the txt layout"
            )
        cloud = {key: values if row is None else values[row] for key, values in held.items()}
        parts = _whole(ref, cloud["parts"])
        normal = cloud["normal"] if normals else None
        return PartCloud(cloud["data"], parts, normal)

    def _fits(self, path: Path) -> bool:
        with _h5_file(path) as file:
            size = file["data"].size * (8 if "normal" in file else 4)
        kept = sum(array.nbytes for held in self._decoded.values() for array in held.values())
        return size + kept <= self.memory_limit

    def _list(self, split: str) -> Path:
        return self.folder / f"{split}_hdf5_file_list.txt"

    def _unlisted(self, split: str) -> list[Path]:
        named = re.compile(rf"(?:ply_data_)?{split}(\d*)\.h5").fullmatch
        found = [(path, named(path.name)) for path in self.folder.glob(f"*{split}*.h5")]
        numbered = [(int(match[1] or 0), path) for path, match in found if match]
        return [path for _, path in sorted(numbered)]


def _labels_parts(path: Path) -> bool:
    """Whether an h5 file is one of ShapeNet-Part's; one that cannot be opened may be."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "pid" in file or "seg" in file
    except Exception:  # of whatever kind: reading it will say what is wrong
        return True


def _part_key(file: h5py.File) -> str:
    return "pid" if "pid" in file else "seg"


@contextmanager
def _h5_file(path: Path) -> Iterator[h5py.File]:
    """An open ShapeNet-Part h5 file whose keys and shapes are the expected ones."""
    with h5_file(path, "ShapeNet-Part", ("pid", "seg", "normal")) as file:
        clouds, key = file["data"].shape, _part_key(file)
        if key not in file:
            raise DataError(f"{path} has no 'pid' and no 'seg', the part of every point")
        if file[key].shape != clouds[:2]:
            raise DataError(
                f"{path}: {key!r} has shape {file[key].shape}, but 'data' {clouds}: a part is "
                "needed for every point"
            )
        yield file


def _decode(path: Path, rows: slice | int | None) -> dict[str, np.ndarray]:
    with _h5_file(path) as file:
        held = {"data": file["data"][rows].astype(np.float32, copy=False)}
        held["parts"] = file[_part_key(file)][rows]
        if "normal" in file:
            held["normal"] = file["normal"][rows].astype(np.float32, copy=False)
    return held


# ------------------------------------------------------------------------------------------ pyg


class PygLayout(PartLayout):
    """What ``torch_geometric.datasets.ShapeNet`` keeps: ``pos``, ``x`` (normals), ``y`` (parts) of
    all clouds one after the other, where each begins, and its category.

    The categories a file was made for are in its name, ``air_bag_…_train.pt``; of several such sets
    the largest is read. Files are memory-mapped, and read without running any code in them.
    """

    name = "pyg"
    raw = True

    def __init__(self, folder: Path, codes: str) -> None:
        super().__init__(folder)
        self._codes = codes
        self._mapped: dict[Path, _Mapped] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    @classmethod
    def recognise(cls, folder: Path) -> PygLayout | None:
        for place in (folder, folder / "processed"):
            sets = {
                match[1]
                for path in place.glob("*.pt")
                if (
                    match := re.fullmatch(r"([a-z]{3}(?:_[a-z]{3})*)_(?:train|val|test)", path.stem)
                )
            }
            known = [
                s
                for s in sets
                if set(s.split("_")) <= {name[:3] for name in SHAPENET_PART_CATEGORIES}
            ]
            if known:
                return cls(place, max(known, key=lambda s: (len(s), s)))
        return None

    def has_split(self, split: str) -> bool:
        return self._file(split).is_file()

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        if not self.has_split(split):
            raise DataError(f"{self._file(split)}, which holds that split, is not there")
        return [self._file(split)], []

    def refs(self, path: Path) -> list[Ref]:
        order = [next(n for n in self.classes if n[:3] == c) for c in self._codes.split("_")]
        given = self._open(path).category
        outside = np.flatnonzero(~whole_numbers(given, len(order)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{path}: category {given[row]} of cloud {row} is outside the {len(order)} "
                f"in the name of the file"
            )
        return [Ref(path, row, order[int(number)]) for row, number in enumerate(given)]

    def stored(self, ref: Ref, normals: bool) -> PartCloud:
        held = self._open(ref.path)
        if normals and held.normals is None:
            raise InputError(f"normals were asked for, but {ref.path} stores none")
        assert ref.row is not None
        rows = slice(held.starts[ref.row], held.starts[ref.row + 1])
        return PartCloud(
            held.points[rows].numpy().astype(np.float32, copy=False),
            _whole(ref, held.parts[rows].numpy()),
            held.normals[rows].numpy() if normals and held.normals is not None else None,
        )

    def _open(self, path: Path) -> _Mapped:
        if path not in self._mapped:
            self._mapped[path] = _map(path)
        return self._mapped[path]

    def _file(self, split: str) -> Path:
        return self.folder / f"{self._codes}_{split}.pt"


class _Mapped(NamedTuple):
    """Tensors in a file: all points and parts, the row at which each cloud starts (and the end),
    the categories."""

    points: Tensor
    parts: Tensor
    normals: Tensor | None
    starts: list[int]
    category: np.ndarray


def _map(path: Path) -> _Mapped:
    held = _load_weights_only(path)
    if not (isinstance(held, tuple) and len(held) >= 2 and isinstance(held[0], dict)):
        raise DataError(
            f"{path} is not what torch_geometric's ShapeNet writes now; let it process raw/ again, "
            "or read raw/ as the txt layout"
        )
    data, slices = held[0], held[1]
    absent = [key for key in ("pos", "y", "category") if data.get(key) is None]
    if absent:
        raise DataError(f"{path} holds {', '.join(data)}, but no {' and no '.join(absent)}")
    points, parts, normals = data["pos"], data["y"], data.get("x")
    plain = [isinstance(value, Tensor) and checkpoint.is_whole(value) for value in (points, parts)]
    if not all(plain) or points.ndim != 2 or points.shape[1] != 3:
        raise DataError(f"{path}: its pos and y are no plain tensors (n, 3) and (n,)")
    if parts.shape != points.shape[:1]:
        raise DataError(f"{path} holds {len(points)} points but {len(parts)} part labels")
    if not (isinstance(normals, Tensor) and checkpoint.is_whole(normals)):
        normals = None
    elif normals.shape != points.shape:
        normals = None  # features of another kind, from a pre_transform
    # a single cloud is stored without slices
    try:
        starts = [0, len(points)] if slices is None else slices["pos"].tolist()
        category = torch.as_tensor(data["category"]).detach().reshape(-1).numpy()
        ordered = all(isinstance(start, int) for start in starts)
        ordered = ordered and sorted(starts) == starts
        ordered = ordered and 0 <= min(starts) <= max(starts) <= len(points)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError):
        ordered = False
    if not ordered:
        raise DataError(f"{path} does not say where each of its clouds begins")
    if len(category) != len(starts) - 1:
        raise DataError(f"{path} holds {len(starts) - 1} clouds but {len(category)} categories")
    normals = None if normals is None else normals.detach()
    return _Mapped(points.detach(), parts.detach(), normals, starts, category)


def _load_weights_only(path: Path) -> Any:
    from torch_geometric.data import Data

    # the file names its class, and nothing else, as torch_geometric itself allows
    torch.serialization.add_safe_globals([Data])
    try:
        checkpoint.check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever a damaged or foreign file leads it to
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{path} cannot be read without running code from it, or is damaged ({reason}); let "
            "torch_geometric process raw/ again, or read raw/ as the txt layout"
        ) from error


# --------------------------------------------------------------------------- finding the layout

LAYOUTS: dict[str, type[PartLayout]] = {cls.name: cls for cls in (TxtLayout, H5Layout, PygLayout)}


def layouts_at(root: str | Path) -> list[PartLayout]:
    """The ShapeNet-Part layouts in ``root``, or else in the folders directly inside it."""
    root = Path(root).expanduser()
    inside = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for folders in ([root], inside):
        candidates = (cls.recognise(path) for path in folders for cls in LAYOUTS.values())
        found = [layout for layout in candidates if layout is not None]
        if found:
            return found
    return []
