"""Arrays of one or many clouds: ``.npy``, ``.npz`` and ``.h5``; nothing is unpickled."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np

from pointcanon.readers.geometry import LIMIT, Cloud, Malformed

if TYPE_CHECKING:
    import h5py

__all__ = ["Stack", "h5_dataset", "npy_array", "npz_array", "open_h5", "open_npy", "open_npz"]

_POINTS = ("data", "points", "pos", "xyz", "positions", "vertices")
_NORMALS = ("normals", "normal")
_BLOCK = 32 << 20
"""Bytes of clouds that are read together: single rows of a compressed file would each decode a
chunk of many."""

DENSEST = 1 << 12
"""Bytes that a byte of HDF5 may stand for: more than the compressions it knows make of zeros."""


class Rows(Protocol):
    """Rows of an array that may lie on disk."""

    def __call__(self, start: int, stop: int) -> np.ndarray: ...


class Array(NamedTuple):
    """An array ``shape`` of ``dtype``, read by rows."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Rows


class Stack(Sequence[Cloud]):
    """The clouds of an array ``(n, N, C)``, or the one of an array ``(N, C)``.

    Raises:
        Malformed: If an array has another shape, or a cloud is too large.
    """

    def __init__(self, points: Array, normals: Array | None) -> None:
        shape = points.shape
        self.stacked = len(shape) == 3
        if len(shape) not in (2, 3) or shape[-1] < 3:
            raise Malformed(f"an array of shape {shape} is no cloud; expected (N, 3) or (n, N, 3)")
        if 0 in shape[-2:]:
            raise Malformed("it holds no points")
        if shape[-2] == 3 and shape[-1] > 6:
            looks, expected = ("(n, 3, N)", "(n, N, 3)") if self.stacked else ("(3, N)", "(N, 3)")
            raise Malformed(f"an array of shape {shape} looks like {looks}; expected {expected}")
        if normals is not None and normals.shape != (*shape[:-1], 3):
            raise Malformed(f"normals have shape {normals.shape}, points {shape}")
        self._arrays = [points] if normals is None else [points, normals]
        self._cloud_bytes = max(1, sum(_size(array) for array in self._arrays))
        if self.stacked:
            self._cloud_bytes = max(1, self._cloud_bytes // max(1, shape[0]))
        if self._cloud_bytes > LIMIT:
            raise Malformed(f"a cloud of shape {shape[-2:]} takes more than {LIMIT >> 20:,} MiB")
        self._length = shape[0] if self.stacked else 1
        if self._length == 0:
            raise Malformed("it holds no clouds")
        self._block: tuple[int, list[np.ndarray]] = (0, [])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        if not self.stacked:
            return self._cloud([array.rows(0, array.shape[0]) for array in self._arrays])
        start, held = self._block
        if not held or not start <= index < start + len(held[0]):
            start, stop = index, min(len(self), index + max(1, _BLOCK // self._cloud_bytes))
            held = [array.rows(start, stop) for array in self._arrays]
            self._block = (start, held)
        return self._cloud([rows[index - start] for rows in held])

    @staticmethod
    def _cloud(arrays: list[np.ndarray]) -> Cloud:
        cloud = Cloud.of_columns(arrays[0])
        if len(arrays) == 1:
            return cloud
        return Cloud(cloud.points, Cloud.of_columns(arrays[1]).points)


def _size(array: Array) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def open_npy(path: Path) -> Stack:
    """The clouds of a ``.npy`` file."""
    held = npy_array(path)
    rows = Array(held.shape, held.dtype, lambda start, stop: np.array(held[start:stop]))
    return Stack(rows, None)


def npy_array(path: Path) -> np.ndarray:
    """The numbers of a ``.npy`` file, mapped into memory rather than read.

    Raises:
        Malformed: If it holds none, or fewer than it says; NumPy raises others.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        shape, fortran, dtype = _npy_header(file, size)
        offset = file.tell()
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def open_npz(path: Path) -> Stack:
    """The clouds of a ``.npz`` file, in ``points`` or the only array, and ``normals``."""
    with ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        key, normals = _keys(held)

        def load(key: str) -> Array:
            values = npz_array(archive, key)
            return Array(values.shape, values.dtype, lambda start, stop: values[start:stop])

        return Stack(load(key), None if normals is None else load(normals))


def npz_array(archive: ZipFile, key: str) -> np.ndarray:
    """An array of numbers of a ``.npz`` file, in no more memory than it says it takes.

    Raises:
        Malformed: If there is none, or it takes more than is read at once.
    """
    try:
        info = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise Malformed(f"it holds no array {key!r}") from None
    if info.file_size > LIMIT:
        raise Malformed(f"its array {key!r} is larger than {LIMIT >> 20:,} MiB")
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise Malformed(f"its array {key!r} is compressed in a way that NumPy does not")
    with archive.open(info) as member:
        raw = member.read(info.file_size)  # where read() would first unpack whatever is there
    shape, fortran, dtype = _npy_header(file := io.BytesIO(raw), len(raw))
    flat = np.frombuffer(raw, dtype, math.prod(shape), file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def open_h5(path: Path) -> Stack:
    """The clouds of an HDF5 file, in ``data`` and ``normal``, as the public files have them."""
    import h5py

    def array(key: str) -> Array:
        with h5py.File(path, "r") as file:
            held = h5_dataset(file, key)
            return Array(tuple(held.shape), held.dtype, rows(key))

    def rows(key: str) -> Rows:
        def read(start: int, stop: int) -> np.ndarray:
            with h5py.File(path, "r") as file:
                return h5_dataset(file, key)[start:stop]

        return read

    with h5py.File(path, "r") as file:
        own = [str(key) for key in file if isinstance(file.get(key, getlink=True), h5py.HardLink)]
        points, normals = _keys([key for key in own if isinstance(file[key], h5py.Dataset)])
    return Stack(array(points), None if normals is None else array(normals))


def h5_dataset(file: h5py.File, key: str) -> h5py.Dataset:
    """An array of numbers that lies in the file itself, and is no larger than the file can hold.

    Raises:
        Malformed: If there is none.
    """
    import h5py

    if not isinstance(file.get(key, getlink=True), h5py.HardLink):
        raise Malformed(f"its {key!r} is missing, or lies in another file, which is not opened")
    held = file[key]
    if not isinstance(held, h5py.Dataset) or held.dtype.kind not in "fiu" or held.shape is None:
        raise Malformed(f"its {key!r} holds {getattr(held, 'dtype', 'a group')}, not numbers")
    if held.is_virtual or held.external:
        raise Malformed(f"its {key!r} lies in other files, which are not opened")
    stored, size = held.id.get_storage_size(), math.prod(held.shape) * held.dtype.itemsize
    if size > DENSEST * stored:
        raise Malformed(
            f"its {key!r} of shape {held.shape} takes {size:,} bytes, {stored:,} are there"
        )
    if held.chunks and math.prod(held.chunks) * held.dtype.itemsize > LIMIT:
        raise Malformed(
            f"the chunks {held.chunks} of its {key!r} take more than {LIMIT >> 20:,} MiB"
        )
    return held


def _keys(names: Iterable[str]) -> tuple[str, str | None]:
    """Which array holds the points, and which the normals."""
    known = list(names)
    points = next((name for name in _POINTS if name in known), None)
    normals = next((name for name in _NORMALS if name in known), None)
    others = [name for name in known if name != normals]
    if points is None and len(others) == 1:
        points = others[0]
    if points is None:
        held = ", ".join(map(repr, known[:8])) or "no array"
        raise Malformed(f"it holds {held}; name the clouds one of {', '.join(_POINTS)}")
    return points, normals


def _npy_header(file: BinaryIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array, which is known to be there in full; leaves the file at
    its first value."""
    major = np.lib.format.read_magic(file)[0]
    start = file.tell()
    if int.from_bytes(file.read(2 if major == 1 else 4), "little") > size:
        raise Malformed("it is cut off in its header")
    file.seek(start)
    header: Callable[[BinaryIO], tuple[tuple[int, ...], bool, np.dtype]] = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise Malformed("it holds pickled objects, which are never read; save an array of numbers")
    if dtype.kind not in "fiu":
        raise Malformed(f"it holds {dtype}, not numbers")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or needed > size - file.tell():
        raise Malformed(
            f"it is cut off: an array of shape {shape} takes {needed:,} bytes, "
            f"{size - file.tell():,} follow"
        )
    return shape, fortran, dtype
