"""The three public layouts of ModelNet on disk, each a reader behind one small interface.

=====  =======================================================  ================  =========
name   files                                                    coordinate frame  normals
=====  =======================================================  ================  =========
h5     ``modelnet40_ply_hdf5_2048/{train,test}_files.txt, *.h5``  y-up-mirrored   if stored
off    ``ModelNet40/<class>/{train,test}/*.off``                z-up              of faces
txt    ``modelnet40_normal_resampled/<class>/*.txt`` and lists  y-up-mirrored     yes
=====  =======================================================  ================  =========

:func:`layouts_at` finds which is at a folder. A :class:`Layout` names its files, the clouds in a
file (a :class:`Ref` each, with its class) and reads one cloud.
"""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch

from pointcanon.classes import MODELNET10_CLASSES, MODELNET40_CLASSES
from pointcanon.clouds import normalise
from pointcanon.datasets.stored import h5_file, whole_numbers
from pointcanon.errors import DataError, InputError
from pointcanon.files import atomic_write
from pointcanon.readers.arrays import npz_array

if TYPE_CHECKING:
    import h5py

__all__ = [
    "LAYOUTS",
    "MODELNET10_CLASSES",
    "MODELNET40_CLASSES",
    "H5Layout",
    "Layout",
    "OffLayout",
    "Ref",
    "TxtLayout",
    "digest",
    "layouts_at",
    "require_layout",
]


POOL = 2048
"""Points of a cloud that some are drawn from, where a layout could give any number."""


class Ref(NamedTuple):
    """Where one cloud is, and its class."""

    path: Path
    row: int | None
    category: str

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}[{self.row}]"


class Cloud(NamedTuple):
    """``points (N, 3)`` and ``normals (N, 3)`` or None, float32, in the layout's own frame."""

    points: np.ndarray
    normals: np.ndarray | None


class Layout(ABC):
    """A reader of one layout.

    Attributes:
        name: ``"h5"``, ``"off"`` or ``"txt"``.
        coordinate_frame: Name of the frame its files are in.
        folder: The folder of the layout itself.
        classes: The classes the folder is a data set of: ModelNet40's or ModelNet10's.
        splits: The official splits.
    """

    name: ClassVar[str]
    coordinate_frame: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        self.folder = folder
        self.classes = classes

    @property
    def dataset(self) -> str:
        """``"ModelNet40"`` or ``"ModelNet10"``."""
        return f"ModelNet{len(self.classes)}"

    @classmethod
    @abstractmethod
    def recognise(cls, folder: Path, cache: Path | None) -> Layout | None:
        """A reader of ``folder``, or None if it is not in this layout."""

    @abstractmethod
    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        """Files of the official ``"train"`` or ``"test"`` split that are there, and names of what
        should be but is not: listed files, or classes without any mesh."""

    @abstractmethod
    def refs(self, path: Path) -> list[Ref]:
        """The clouds in one file."""

    @abstractmethod
    def read(self, ref: Ref, num_points: int, normals: bool) -> Cloud:
        """The first ``num_points`` points of a cloud, as the field uses them."""

    @abstractmethod
    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        """Every cloud of a file with a digest of its content, or with what is wrong with it.

        Raises:
            DataError: If the file as a whole cannot be read.
        """

    def require(self, path: Path, num_points: int, normals: bool) -> None:  # noqa: B027
        """Refuse, before any cloud is read, what the file is known not to hold.

        Only h5 files state this up front; the other layouts find out in :meth:`read`.
        """

    def pool(self, path: Path, num_points: int) -> int:
        """How many points of each cloud there are to draw ``num_points`` from."""
        return max(num_points, POOL)


# ------------------------------------------------------------------------------------------- h5


class H5Layout(Layout):
    """``data (n, P, 3)``, ``label (n, 1)`` and sometimes ``normal (n, P, 3)`` per file.

    The public files are compressed in chunks of many clouds, so reading a single row decodes a
    hundred. A file is therefore decoded once per process, only as many points as are used, as long
    as :attr:`memory_limit` bytes are not exceeded; beyond that, row by row. No file stays open, so
    workers may be forked or spawned.
    """

    name = "h5"
    coordinate_frame = "y-up-mirrored"
    memory_limit: int = 2 << 30

    def __init__(self, folder: Path, classes: tuple[str, ...], order: tuple[str, ...]) -> None:
        super().__init__(folder, classes)
        self._order = order
        self._decoded: dict[tuple[Path, str, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": {}}  # a spawned worker decodes what it needs itself

    @classmethod
    def recognise(cls, folder: Path, cache: Path | None) -> H5Layout | None:
        if not any((folder / f"{split}_files.txt").is_file() for split in ("train", "test")):
            return None
        names = folder / "shape_names.txt"
        order = tuple(_lines(names)) if names.is_file() else MODELNET40_CLASSES
        for classes in (MODELNET40_CLASSES, MODELNET10_CLASSES):
            if set(order) == set(classes) and len(order) == len(classes):
                return cls(folder, classes, order)
        return None

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        # The lists name paths relative to another root ("data/modelnet40_ply_hdf5_2048/…"), in
        # some copies with backslashes: only the last part means anything here.
        named = [PureWindowsPath(line).name for line in _list(self.folder, f"{split}_files.txt")]
        present = [self.folder / name for name in named if os.path.isfile(self.folder / name)]
        return present, [name for name in named if not os.path.isfile(self.folder / name)]

    def refs(self, path: Path) -> list[Ref]:
        with _h5_file(path) as file:
            labels = file["label"][...].reshape(-1)
        outside = np.flatnonzero(~whole_numbers(labels, len(self._order)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{path}: label {labels[row]} of row {row} is outside the "
                f"{len(self._order)} classes of {self.folder / 'shape_names.txt'}"
            )
        return [Ref(path, row, self._order[int(label)]) for row, label in enumerate(labels)]

    def require(self, path: Path, num_points: int, normals: bool) -> None:
        with _h5_file(path) as file:
            if normals and "normal" not in file:
                raise InputError(
                    f"normals were asked for, but {path} stores none (it holds "
                    f"{', '.join(file)}); leave normals away or use the txt layout"
                )
            _require_points(path, file["data"].shape[1], num_points)

    def pool(self, path: Path, num_points: int) -> int:
        with _h5_file(path) as file:
            return max(num_points, int(file["data"].shape[1]))

    def read(self, ref: Ref, num_points: int, normals: bool) -> Cloud:
        points = self._row(ref, "data", num_points)
        return Cloud(points, self._row(ref, "normal", num_points) if normals else None)

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        refs = self.refs(path)
        clouds = _decode(path, "data", slice(None), None)
        return ((ref, digest(clouds[i], ref)) for i, ref in enumerate(refs))

    def _row(self, ref: Ref, key: str, num_points: int) -> np.ndarray:
        place = (ref.path, key, num_points)
        if place not in self._decoded:
            with _h5_file(ref.path) as file:
                shape = file[key].shape if key in file else file["data"].shape
            size = shape[0] * num_points * 3 * 4
            if size + sum(held.nbytes for held in self._decoded.values()) > self.memory_limit:
                row = _decode(ref.path, key, ref.row, num_points)
                return _require_finite(row, ref)
            self._decoded[place] = _decode(ref.path, key, slice(None), num_points)
        return _require_finite(self._decoded[place][ref.row], ref)


def _h5_file(path: Path) -> AbstractContextManager[h5py.File]:
    return h5_file(path, "ModelNet", ("normal",))


def _decode(path: Path, key: str, rows: slice | int | None, num_points: int | None) -> np.ndarray:
    with _h5_file(path) as file:
        if key not in file:
            raise InputError(f"normals were asked for, but {path} stores none")
        if num_points is not None:
            _require_points(path, file[key].shape[1], num_points)
        return np.ascontiguousarray(file[key][rows, :num_points], dtype=np.float32)


# ------------------------------------------------------------------------------------------ off


class OffLayout(Layout):
    """Meshes, whose surface is sampled uniformly by area, once, and kept as one npz per mesh.

    The seed of a mesh is a digest of its path inside the layout, so the points do not depend on
    where the data lie, on the order of reading, or on which worker reads. The whole sample is
    centred and divided by its largest norm. An entry is written atomically, and is used only if
    the mesh still has the size and the time of change it was made from.
    """

    name = "off"
    coordinate_frame = "z-up"
    least_samples: ClassVar[int] = 2048

    def __init__(self, folder: Path, classes: tuple[str, ...], cache: Path) -> None:
        super().__init__(folder, classes)
        self.cache = cache

    @classmethod
    def recognise(cls, folder: Path, cache: Path | None) -> OffLayout | None:
        held = {
            name
            for name in MODELNET40_CLASSES
            if any((folder / name / split).is_dir() for split in ("train", "test"))
        }
        if not held:
            return None
        classes = MODELNET10_CLASSES if held == set(MODELNET10_CLASSES) else MODELNET40_CLASSES
        return cls(folder, classes, _cache_folder(folder, cache))

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        meshes = {name: sorted((self.folder / name / split).glob("*.off")) for name in classes}
        empty = [f"{name}/{split}/*.off" for name, paths in meshes.items() if not paths]
        return [path for paths in meshes.values() for path in paths], empty

    def refs(self, path: Path) -> list[Ref]:
        return [Ref(path, None, path.parent.parent.name)]

    def read(self, ref: Ref, num_points: int, normals: bool) -> Cloud:
        points, directions = self._samples(ref.path, max(num_points, self.least_samples))
        return Cloud(points[:num_points], directions[:num_points] if normals else None)

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        vertices, faces = _read_off(path)
        ref = self.refs(path)[0]
        return iter([(ref, digest(vertices, ref, also=faces.tobytes()))])

    def _samples(self, path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
        inside = path.relative_to(self.folder)
        entry = (self.cache / f"surface-{count}" / inside).with_suffix(".npz")
        status = path.stat()
        stamp = np.array([status.st_size, status.st_mtime_ns])
        try:
            with ZipFile(entry) as kept:
                if np.array_equal(npz_array(kept, "stamp"), stamp):
                    return npz_array(kept, "points"), npz_array(kept, "normals")
        except Exception:  # not there yet, or damaged in whatever way: made anew below
            pass
        seed = int.from_bytes(blake2b(inside.as_posix().encode(), digest_size=8).digest(), "little")
        points, normals = _sample_surface(path, count, seed)
        _keep(entry, points=points, normals=normals, stamp=stamp)
        return points, normals


def _cache_folder(folder: Path, cache: Path | None) -> Path:
    """Where samples are kept: as asked, else beside the meshes, else in the user's cache."""
    if cache is not None:
        return cache.expanduser() / folder.name
    if os.access(folder, os.W_OK):
        return folder / ".pointcanon"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    which = blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    return base / "pointcanon" / f"{folder.name}-{which}"


def _keep(entry: Path, **arrays: np.ndarray) -> None:
    """Write an npz that loaders in other processes may be looking for."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)  # type: ignore[arg-type]
    try:
        atomic_write(entry, packed.getvalue())
    except DataError as error:
        raise DataError(
            f"surface samples cannot be kept ({error}): pass cache=, a folder that can be written"
        ) from error


def _sample_surface(path: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import trimesh

    vertices, faces = _read_off(path)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    if not 0 < mesh.area < np.inf:
        raise DataError(
            f"{path} is a mesh whose {len(faces)} faces have no area: nothing to sample"
        )
    points, chosen = trimesh.sample.sample_surface(mesh, count, seed=seed)
    corners = mesh.triangles[chosen]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return _unit_ball(np.asarray(points)), normals.astype(np.float32)


def _read_off(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices ``(V, 3)`` float64 and triangles ``(F, 3)`` int64 of an OFF file."""
    import trimesh

    text = re.sub(r"#.*", "", _text(path))
    _require_complete_off(path, text)
    try:
        loaded = trimesh.load_mesh(io.BytesIO(text.encode()), file_type="off", process=False)
        vertices, faces = np.asarray(loaded.vertices), np.asarray(loaded.faces)
    except Exception as error:  # trimesh raises whatever its parser ran into
        raise DataError(f"{path} cannot be read as an OFF mesh ({error})") from error
    if faces.size and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise DataError(f"{path}: a face names a vertex outside 0 … {len(vertices) - 1}")
    if not np.isfinite(vertices).all():
        row = int(np.flatnonzero(~np.isfinite(vertices).all(axis=1))[0])
        raise DataError(f"{path}: vertex {row} is {vertices[row].tolist()}")
    return vertices, faces


def _require_complete_off(path: Path, text: str) -> None:
    """Refuse what trimesh reads without a word: a file cut off, or one without faces."""
    # Many files of ModelNet40 run header and counts together: "OFF352 322 0".
    header = re.match(r"\s*C?OFF\s*(\d{1,18})\s+(\d{1,18})", text)
    if header is None:
        raise DataError(
            f"{path} is no OFF mesh: it starts with {text[:20]!r}, not 'OFF' and counts"
        )
    vertices, faces = int(header[1]), int(header[2])
    if vertices == 0 or faces == 0:
        raise DataError(f"{path} is a mesh with {vertices} vertices and {faces} faces: no surface")
    body = text[header.end() :].splitlines()[1:]
    held = sum(1 for line in body if line.strip())
    if held < vertices + faces:
        raise DataError(
            f"{path} is incomplete: {vertices} vertices and {faces} faces are announced, "
            f"{held} lines follow; fetch it again"
        )


# ------------------------------------------------------------------------------------------ txt


class TxtLayout(Layout):
    """One text file per cloud, rows ``x,y,z,nx,ny,nz``; the first N rows, centred, then scaled."""

    name = "txt"
    coordinate_frame = "y-up-mirrored"

    @classmethod
    def recognise(cls, folder: Path, cache: Path | None) -> TxtLayout | None:
        # The public folder holds the lists of both; those of ModelNet10 name a part of its clouds.
        for prefix, classes in (
            ("modelnet40", MODELNET40_CLASSES),
            ("modelnet10", MODELNET10_CLASSES),
        ):
            if any((folder / f"{prefix}_{split}.txt").is_file() for split in ("train", "test")):
                return cls(folder, classes)
        return None

    def files(self, split: str, classes: Sequence[str]) -> tuple[list[Path], list[str]]:
        listing = f"modelnet{len(self.classes)}_{split}.txt"
        present, missing = [], []
        for row, name in enumerate(_list(self.folder, listing), start=1):
            category = name.rpartition("_")[0]
            if category not in self.classes or not re.fullmatch(r"\w{1,100}", name):
                raise DataError(
                    f"{self.folder / listing}, line {row}: {name!r} is of no class of "
                    f"ModelNet{len(self.classes)}; a line reads like 'airplane_0001'"
                )
            if category in classes:
                path = self.folder / category / f"{name}.txt"
                if path.is_file():
                    present.append(path)
                else:
                    missing.append(f"{category}/{name}.txt")
        return present, missing

    def refs(self, path: Path) -> list[Ref]:
        return [Ref(path, None, path.parent.name)]

    def read(self, ref: Ref, num_points: int, normals: bool) -> Cloud:
        rows = _read_rows(ref.path, num_points)
        _require_points(ref.path, len(rows), num_points)
        return Cloud(_unit_ball(rows[:, :3]), rows[:, 3:] if normals else None)

    def scan(self, path: Path) -> Iterator[tuple[Ref, bytes | DataError]]:
        ref = self.refs(path)[0]
        return iter([(ref, digest(_read_rows(path, None), ref))])


def _read_rows(path: Path, count: int | None) -> np.ndarray:
    """The first ``count`` rows, or all, ``(n, 6)`` float32."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = list(islice((line for line in file if line.strip()), count))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if not lines:
        raise DataError(f"{path} is empty; a row reads x,y,z,nx,ny,nz")
    try:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.float32, ndmin=2, comments=None)
    except ValueError:
        raise _row_fault(path, lines) from None
    if rows.shape[1] != 6 or not np.isfinite(rows).all():
        raise _row_fault(path, lines)
    return rows


def _row_fault(path: Path, lines: list[str]) -> DataError:
    """Which row it is that cannot be used; looked for only once one is known to be there."""
    for row, line in enumerate(lines, start=1):
        try:
            values = np.array(line.split(","), dtype=np.float32)
        except ValueError:
            values = np.empty(0, dtype=np.float32)
        if values.shape != (6,) or not np.isfinite(values).all():
            return DataError(
                f"{path}, row {row}: {line.strip()[:80]!r} is not six finite numbers "
                "x,y,z,nx,ny,nz separated by commas"
            )
    return DataError(f"{path} holds rows that are not six finite numbers")


# --------------------------------------------------------------------------- finding the layout

LAYOUTS: dict[str, type[Layout]] = {cls.name: cls for cls in (H5Layout, OffLayout, TxtLayout)}

_KNOWN = (
    "modelnet40_ply_hdf5_2048/ (h5), ModelNet40/<class>/{train,test}/*.off (off), "
    "modelnet40_normal_resampled/ (txt)"
)
_OTHERS = {
    "synsetoffset2category.txt": "ShapeNet-Part",
    "train_hdf5_file_list.txt": "ShapeNet-Part (h5)",
    "main_split": "ScanObjectNN",
    "main_split_nobg": "ScanObjectNN",
}


def require_layout(name: str | None) -> None:
    """Refuse the name of a layout that there is not; None means any.

    Raises:
        InputError: Naming those there are.
    """
    if name is not None and name not in LAYOUTS:
        raise InputError(f"unknown layout {name!r}; choose one of: {', '.join(LAYOUTS)}")


def layouts_at(root: str | Path, cache: str | Path | None = None) -> list[Layout]:
    """The ModelNet layouts in ``root``, or else in the folders directly inside it.

    Args:
        root: The folder of a layout, or its parent.
        cache: Where samples of meshes are kept; None for the default of :class:`OffLayout`.

    Raises:
        DataError: If there is no such folder, or none of the layouts in it.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"data root {root} does not exist; give a folder with one of: {_KNOWN}")
    if not root.is_dir():
        raise DataError(f"data root {root} is a file; give a folder with one of: {_KNOWN}")
    keep = None if cache is None else Path(cache)
    inside = sorted(path for path in root.iterdir() if path.is_dir())
    for folders in ([root], inside):
        candidates = (cls.recognise(path, keep) for path in folders for cls in LAYOUTS.values())
        found = [layout for layout in candidates if layout is not None]
        if found:
            return found
    raise DataError(f"no ModelNet at data root {root}, which {_contents(root)}; known: {_KNOWN}")


def _contents(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    if not names:
        return "is empty"
    for sign, dataset in _OTHERS.items():
        if sign in names:
            return f"looks like {dataset} (it holds {sign})"
    if "shape_names.txt" in names:
        listed = _few(_lines(root / "shape_names.txt"))
        return f"holds other classes: its shape_names.txt lists {listed}"
    return f"holds {_few(names)}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"


# -------------------------------------------------------------------------------------- helpers


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _list(folder: Path, name: str) -> list[str]:
    if not (folder / name).is_file():
        raise DataError(f"{folder} has no {name}, which lists the clouds of that split")
    return _lines(folder / name)


def _require_points(path: Path, held: int, wanted: int) -> None:
    if held < wanted:
        raise InputError(
            f"num_points is {wanted:,}, but clouds of {path} have {held:,} points; "
            f"ask for {held:,} or fewer"
        )


def _require_finite(points: np.ndarray, ref: Ref) -> np.ndarray:
    if np.isfinite(points).all():
        return points
    row = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
    raise DataError(f"{ref}: point {row} is {points[row].tolist()}, not three finite numbers")


def digest(points: np.ndarray, ref: Ref, also: bytes = b"") -> bytes | DataError:
    """Of the content of a cloud, or the error that a point of it is not finite."""
    try:
        return blake2b(_require_finite(points, ref).tobytes() + also, digest_size=16).digest()
    except DataError as error:
        return error


def _unit_ball(points: np.ndarray) -> np.ndarray:
    """Centred and divided by the largest norm, in the precision given, then float32."""
    return normalise(torch.from_numpy(points)[None])[0].float().numpy()
