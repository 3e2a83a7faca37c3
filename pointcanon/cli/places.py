"""Where ``predict`` and ``canonicalize`` write a file for each cloud."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pointcanon import readers
from pointcanon.cli.clouds import Item
from pointcanon.errors import UsageError
from pointcanon.files import atomic_write
from pointcanon.readers.ply import encode_ply

__all__ = ["Places", "write"]


class Places:
    """Where the results go: as they lie in the folders that were named.

    Args:
        out: The folder of the results.
        paths: The files and folders that are read.

    Raises:
        UsageError: If two results would have one name, or lie among the files that are read.
    """

    def __init__(self, out: Path, paths: list[str]) -> None:
        self._out = out
        self._folders = [_normal(path) for path in paths if os.path.isdir(path)]
        for folder in self._folders:
            if out.resolve().is_relative_to(folder.resolve()):
                raise UsageError(f"--out {out} lies in {folder}, which is read; choose another")
        taken: dict[Path, str] = {}
        for file in readers.find(paths):
            place = self._place(file)
            if place in taken:
                raise UsageError(
                    f"{taken[place]} and {file} would both be written to {place}; "
                    "name the folder above both, or call twice"
                )
            taken[place] = file

    def of(self, item: Item) -> Path:
        place = self._place(item.file)
        if item.index is None:
            return place
        return place.with_name(f"{place.stem}.{item.index:06d}{place.suffix}")

    def _place(self, file: str) -> Path:
        path = _normal(file)
        inside = next((path.relative_to(f) for f in self._folders if path.is_relative_to(f)), None)
        place = self._out / (path.name if inside is None else inside)
        kind = path.suffix.lower()
        ending = {".npy": ".npy", ".npz": ".npz", ".h5": ".npz", ".hdf5": ".npz"}.get(kind, ".ply")
        return place if ending == kind else place.with_name(place.name + ending)


def _normal(path: str) -> Path:
    """Without ``..``, which would lead out of the folder of the results too."""
    return Path(os.path.normpath(path))


def write(place: Path, arrays: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> None:
    """Write a result, as the ending of its place says.

    Args:
        place: Ends in ``.npy``, ``.npz`` or ``.ply``.
        arrays: What a ``.npz`` holds; a ``.npy`` holds the first.
        columns: What a ``.ply`` says of each point.

    Raises:
        DataError: If it cannot be written.
    """
    packed = io.BytesIO()
    if place.suffix == ".npy":
        np.save(packed, next(iter(arrays.values())))
    elif place.suffix == ".npz":
        np.savez(packed, **arrays)  # type: ignore[arg-type]
    else:
        packed.write(encode_ply(columns))
    atomic_write(place, packed.getvalue())
