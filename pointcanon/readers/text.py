"""Rows of numbers: ``.xyz``, ``.txt`` and ``.csv``, and the ASCII parts of other formats."""

from __future__ import annotations

import numpy as np

from pointcanon.readers.geometry import Cloud, Malformed

__all__ = ["named_cloud", "parse_text", "rows_of", "text_of"]

_SEPARATORS = str.maketrans(",;\t", "   ")


def text_of(raw: bytes) -> str:
    """The text of a file; damage is left to be found where numbers are expected.

    Raises:
        Malformed: If it is binary.
    """
    if b"\0" in raw:
        raise Malformed("it is binary, not text")
    return raw.decode("utf-8-sig", errors="replace")


def rows_of(lines: list[str]) -> np.ndarray:
    """Numbers ``(len(lines), C)`` float64, separated by blanks.

    Raises:
        Malformed: Naming the first row that does not fit.
    """
    try:
        return np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError:
        pass
    width = None
    for row, line in enumerate(lines, start=1):
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            break
        width = len(values) if width is None else width
        if len(values) != width:
            raise Malformed(f"row {row} has {len(values)} numbers, the rows before it {width}")
    raise Malformed(f"row {row} reads {line.strip()[:60]!r}, not numbers")


def parse_text(raw: bytes) -> Cloud:
    """A row a point: x y z, and perhaps a normal after it, separated by blanks, ``,`` or ``;``.

    A first line of names, such as ``x,y,z,nx,ny,nz``, says where they are. Without one, columns
    four to six are taken for normals if they are unit vectors. Lines that begin with ``#`` or
    ``//`` are comments.
    """
    lines = [line.translate(_SEPARATORS).strip() for line in text_of(raw).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "//"))]
    if not lines:
        raise Malformed("it holds no points")
    names = [word.strip("\"'").lower() for word in lines[0].split()]
    if {"x", "y", "z"} <= set(names):
        rows = rows_of(lines[1:]) if lines[1:] else np.empty((0, len(names)))
        if rows.shape[1] != len(names):
            raise Malformed(f"it names {len(names)} columns and has {rows.shape[1]}")
        return named_cloud({name: rows[:, i] for i, name in enumerate(names)})
    return Cloud.of_columns(rows_of(lines))


def named_cloud(columns: dict[str, np.ndarray]) -> Cloud:
    """A cloud from columns of equal length by their usual names.

    Raises:
        Malformed: If there are no x, y and z.
    """
    if not {"x", "y", "z"} <= set(columns):
        raise Malformed(f"it has no x, y and z but {', '.join(columns) or 'nothing'}")
    normals = None
    for names in (("nx", "ny", "nz"), ("normal_x", "normal_y", "normal_z")):
        if set(names) <= set(columns):
            normals = np.stack([columns[name] for name in names], axis=1)
    return Cloud(np.stack([columns[name] for name in ("x", "y", "z")], axis=1), normals)
