"""Files to clouds: point clouds as they are, meshes sampled on their surface.

=====================  ==========================================================================
``.ply``               ASCII and binary, points or faces
``.off .obj .stl``     meshes, or points where there are no faces
``.pcd``               ASCII, binary and binary_compressed; points the sensor missed (NaN) are left
                       out
``.xyz .txt .csv``     rows of three or more numbers, a line of names where there is one
``.npy .npz .h5``      one cloud ``(N, 3)`` or many ``(n, N, 3)``
=====================  ==========================================================================

A new format is a function from the bytes of a file to a :class:`Cloud` or a :class:`Mesh`, and a
line in :data:`FORMATS`. Nothing in a file is executed, no other file that it names is opened, and
what it declares of its size is compared with what it holds before any memory is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from pointcanon.errors import DataError, InputError
from pointcanon.readers.arrays import Stack, open_h5, open_npy, open_npz
from pointcanon.readers.geometry import LIMIT, Cloud, Malformed, Mesh, sample_surface
from pointcanon.readers.meshes import parse_obj, parse_off, parse_stl
from pointcanon.readers.pcd import parse_pcd
from pointcanon.readers.ply import parse_ply
from pointcanon.readers.text import parse_text

_T = TypeVar("_T")

__all__ = ["FORMATS", "Cloud", "CloudFile", "Mesh", "find", "read", "sample_surface"]

FORMATS: dict[str, Callable[[bytes], Cloud | Mesh]] = {
    ".ply": parse_ply,
    ".off": parse_off,
    ".obj": parse_obj,
    ".stl": parse_stl,
    ".pcd": parse_pcd,
    ".xyz": parse_text,
    ".txt": parse_text,
    ".csv": parse_text,
}
"""Formats that hold one cloud or one mesh, by the ending of the name."""

ARRAYS: dict[str, Callable[[Path], Stack]] = {
    ".npy": open_npy,
    ".npz": open_npz,
    ".h5": open_h5,
    ".hdf5": open_h5,
}
"""Formats that may hold many clouds, which are read when they are asked for."""


class CloudFile(Sequence[Cloud]):
    """The clouds of a file, each read when it is asked for.

    Args:
        path: Its ending says the format.
        samples: Points drawn on the surface of a mesh. They are a function of its faces, so they
            are the same on every machine, and at the same places whatever its pose.

    Attributes:
        stacked: Whether the file holds an array of clouds, even if of a single one.

    Raises:
        DataError: Naming the file, if it is missing, damaged or of no known format. Of a file of
            many clouds one may turn out bad only when it is asked for.
        InputError: If ``samples`` < 1.
    """

    def __init__(self, path: str | Path, *, samples: int = 2048) -> None:
        if samples < 1:
            raise InputError(f"samples is {samples}; choose at least 1")
        self.path, self._samples = Path(path), samples
        kind = self.path.suffix.lower()
        if kind not in {*FORMATS, *ARRAYS}:
            if not self.path.exists():
                raise DataError(f"there is no file or folder {path}; check the path")
            known = " ".join((*FORMATS, *ARRAYS))
            raise DataError(f"{path}: unknown kind of file {kind!r}; known: {known}")
        self._held: Sequence[Cloud | Mesh]
        self._held = self._guarded(lambda: self._open(kind), "")
        self.stacked = isinstance(self._held, Stack) and self._held.stacked

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: int) -> Cloud:  # type: ignore[override]
        index = range(len(self))[index]
        return self._guarded(lambda: self._cloud(index), f"[{index}]" if self.stacked else "")

    def _open(self, kind: str) -> Sequence[Cloud | Mesh]:
        if self.path.stat().st_size == 0:
            raise Malformed("it is empty")
        if kind in ARRAYS:
            return ARRAYS[kind](self.path)
        if self.path.stat().st_size > LIMIT:
            raise Malformed(f"it is larger than {LIMIT >> 20:,} MiB; split it")
        return [FORMATS[kind](self.path.read_bytes())]

    def _cloud(self, index: int) -> Cloud:
        held = self._held[index]
        if isinstance(held, Mesh):
            return sample_surface(held, self._samples)
        return held.checked()

    def _guarded(self, action: Callable[[], _T], where: str) -> _T:
        """What the action returns; whatever it stumbles over becomes one error about the file."""
        try:
            return action()
        except FileNotFoundError:
            raise DataError(f"there is no file {self.path}") from None
        except OSError as error:
            reason = error.strerror or str(error)
        except Malformed as error:
            reason = str(error)
        except MemoryError:
            reason = "it needs more memory than there is"
        except Exception as error:  # a parser runs into damage in more ways than can be listed
            reason = f"it is damaged or of another format ({type(error).__name__}: {error})"
        raise DataError(f"{self.path}{where} cannot be read: {' '.join(reason.split())}")


def read(path: str | Path, *, samples: int = 2048) -> Cloud:
    """The cloud of a file that holds one; :class:`CloudFile` reads those that hold many.

    Args:
        path: Its ending says the format.
        samples: Points drawn on the surface of a mesh.

    Raises:
        DataError: Naming the file, if it is missing, damaged, of no known format, or holds several
            clouds.
        InputError: If ``samples`` < 1.
    """
    clouds = CloudFile(path, samples=samples)
    if len(clouds) != 1:
        raise DataError(f"{path} holds {len(clouds):,} clouds; read them with readers.CloudFile")
    return clouds[0]


def find(paths: Iterable[str | Path]) -> Iterator[str]:
    """The files named, and those of a known format in the folders named, each once.

    Folders are searched through and through, in the order of the names; hidden files are left out.

    Raises:
        DataError: If a folder holds no file of a known format.
    """
    known = (*FORMATS, *ARRAYS)
    seen: set[str] = set()
    for path in map(str, paths):
        inside = _walk(path, known) if os.path.isdir(path) else iter([path])
        empty = True
        for file in inside:
            empty = False
            if file not in seen:
                seen.add(file)
                yield file
        if empty:
            raise DataError(
                f"folder {path} holds no file of a known kind: {' '.join(sorted(known))}"
            )


def _walk(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(base, name)
