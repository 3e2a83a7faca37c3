"""The Polygon File Format (Turk 1994), ASCII and binary in both byte orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pointcanon.readers.geometry import Cloud, Malformed, Mesh, fans, float_array
from pointcanon.readers.text import named_cloud, rows_of

__all__ = ["encode_ply", "parse_ply"]

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}


class _Property(NamedTuple):
    """A value of type ``item``, or a list of them behind a length of type ``length``."""

    name: str
    item: np.dtype
    length: np.dtype | None


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    properties: list[_Property]

    @property
    def smallest(self) -> int:
        """Bytes of a row whose lists are empty."""
        return sum((p.length or p.item).itemsize for p in self.properties)

    @property
    def polygons(self) -> str | None:
        """The list that holds the corners of faces."""
        names = {p.name for p in self.properties if p.length is not None}
        return next((n for n in ("vertex_indices", "vertex_index") if n in names), None)


_Table = dict[str, "np.ndarray | list[list[int]]"]


def parse_ply(raw: bytes) -> Cloud | Mesh:
    """The mesh of a ``.ply`` file, or its cloud if it has no faces."""
    encoding, elements, start = _header(raw)
    read = _ascii if encoding == "ascii" else _binary
    tables: dict[str, _Table] = {}
    for element, table in zip(elements, read(raw, start, elements), strict=True):
        tables[element.name] = table
    if "vertex" not in tables:
        raise Malformed("it has no element vertex")
    columns = tables["vertex"].items()
    cloud = named_cloud({k: float_array(v) for k, v in columns if isinstance(v, np.ndarray)})
    faces = next((e for e in elements if e.name == "face" and e.count and e.polygons), None)
    if faces is None or faces.polygons is None:
        return cloud
    polygons = tables["face"][faces.polygons]
    if not isinstance(polygons, np.ndarray):
        return Mesh(cloud.points.astype(np.float64), fans(polygons))
    corners = np.arange(1, polygons.shape[1] - 1)
    triangles = [polygons[:, [0, i, i + 1]] for i in corners]
    joined = np.concatenate([*triangles, np.empty((0, 3), dtype=np.int64)])
    return Mesh(cloud.points.astype(np.float64), joined.astype(np.int64))


def _header(raw: bytes) -> tuple[str, list[_Element], int]:
    end = raw.find(b"end_header")
    end = raw.find(b"\n", end) if end >= 0 else -1
    if not raw.startswith(b"ply") or end < 0:
        raise Malformed("it does not begin with a PLY header, or is cut off in it")
    encoding, elements = "", []
    for line in raw[:end].decode("ascii", errors="replace").splitlines()[1:]:
        words = line.split()
        try:
            if not words or words[0] in ("comment", "obj_info", "end_header"):
                continue
            if words[0] == "format":
                encoding = words[1]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2]), []))
            elif words[0] == "property" and words[1] == "list":
                item, length = _type(words[3], encoding), _type(words[2], encoding)
                elements[-1].properties.append(_Property(words[4], item, length))
            elif words[0] == "property":
                elements[-1].properties.append(_Property(words[2], _type(words[1], encoding), None))
        except (IndexError, ValueError, KeyError):
            raise Malformed(f"its header has the line {line[:60]!r}") from None
    if encoding not in _ORDERS:
        raise Malformed(f"its format is {encoding!r}, not one of {', '.join(_ORDERS)}")
    for element in elements:
        if element.count < 0:
            raise Malformed(f"it announces {element.count} rows of {element.name}")
    return encoding, elements, end + 1


def _type(word: str, encoding: str) -> np.dtype:
    return np.dtype(_ORDERS[encoding] + _TYPES[word])


def _ascii(raw: bytes, start: int, elements: list[_Element]) -> Iterator[_Table]:
    text = raw[start:].decode("ascii", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    at = 0
    for element in elements:
        if not element.properties:
            yield {}
            continue
        rows = lines[at : at + element.count]
        if len(rows) < element.count:
            raise _cut_off(element)
        at += element.count
        lists = any(p.length is not None for p in element.properties)
        yield _ascii_lists(rows, element) if lists else _ascii_values(rows, element)


def _ascii_values(rows: list[str], element: _Element) -> _Table:
    table = rows_of(rows) if rows else np.empty((0, len(element.properties)))
    if table.shape[1] != len(element.properties):
        raise Malformed(
            f"rows of {element.name} hold {table.shape[1]} numbers, "
            f"{len(element.properties)} are announced"
        )
    # numbers written out may be integers of any size: only the floats keep their type
    kept = (p.item if p.item.kind == "f" else np.dtype(np.float64) for p in element.properties)
    columns = zip(element.properties, table.T, kept, strict=True)
    return {p.name: column.astype(dtype) for p, column, dtype in columns}


def _ascii_lists(rows: list[str], element: _Element) -> _Table:
    found: dict[str, list[list[int]]] = {p.name: [] for p in element.properties if p.length}
    for row in rows:
        words = row.split()
        at = 0
        for name, _, length in element.properties:
            if length is None:
                at += 1
                continue
            stop = at + 1 + int(words[at])
            if len(words) < stop:
                raise _cut_off(element)
            if name == element.polygons:
                found[name].append([int(word) for word in words[at + 1 : stop]])
            at = stop
    return dict(found)


def _binary(raw: bytes, start: int, elements: list[_Element]) -> Iterator[_Table]:
    at = start
    for element in elements:
        if element.count * element.smallest > len(raw) - at:
            raise _cut_off(element)
        table, at = _binary_rows(raw, at, element)
        yield table


def _binary_rows(raw: bytes, start: int, element: _Element) -> tuple[_Table, int]:
    """The values of an element, and where the next one begins."""
    if not element.count or not element.properties:
        return {}, start
    dtype = _row(raw, start, element)
    end = start + element.count * dtype.itemsize
    if end <= len(raw):
        rows = np.frombuffer(raw, dtype, element.count, start)
        lists = [p for p in element.properties if p.length is not None]
        lengths = [rows[f"length of {p.name}"] for p in lists]
        if all((length == length[0]).all() for length in lengths):
            return {p.name: rows[p.name] for p in element.properties}, end
    elif all(p.length is None for p in element.properties):
        raise _cut_off(element)
    return _binary_lists(raw, start, element)


def _row(raw: bytes, start: int, element: _Element) -> np.dtype:
    """The type of a row, if the lists of all rows are as long as those of the first."""
    fields: list[tuple] = []
    at = start
    for name, item, length in element.properties:
        if length is None:
            fields.append((name, item))
            at += item.itemsize
            continue
        size = _length(raw, at, length, element)
        fields += [(f"length of {name}", length), (name, item, (size,))]
        at += length.itemsize + size * item.itemsize
        if at > len(raw):
            raise _cut_off(element)
    return np.dtype(fields)


def _binary_lists(raw: bytes, start: int, element: _Element) -> tuple[_Table, int]:
    found: dict[str, list[list[int]]] = {p.name: [] for p in element.properties if p.length}
    at = start
    for _ in range(element.count):
        for name, item, length in element.properties:
            size = 1
            if length is not None:
                size = _length(raw, at, length, element)
                at += length.itemsize
            if at + size * item.itemsize > len(raw):
                raise _cut_off(element)
            if name == element.polygons:
                found[name].append(np.frombuffer(raw, item, size, at).tolist())
            at += size * item.itemsize
    return dict(found), at


def _length(raw: bytes, at: int, dtype: np.dtype, element: _Element) -> int:
    if at + dtype.itemsize > len(raw):
        raise _cut_off(element)
    size = int(np.frombuffer(raw, dtype, 1, at)[0])
    if size < 0:
        raise Malformed(f"a list of {element.name} has the length {size}")
    return size


def _cut_off(element: _Element) -> Malformed:
    return Malformed(
        f"it is cut off: {element.count:,} rows of {element.name} are announced, fewer follow"
    )


def encode_ply(columns: Mapping[str, np.ndarray]) -> bytes:
    """A binary file of points with these properties, in this order.

    Args:
        columns: Arrays ``(N,)`` of 8 to 32-bit integers or of floats, such as ``x``, ``y``, ``z``
            and ``label``; each is written in its own type.
    """
    names = {item: name for name, item in reversed(_TYPES.items())}  # char rather than int8
    layout = [(name, values.dtype.newbyteorder("<")) for name, values in columns.items()]
    rows = np.empty(len(next(iter(columns.values()))), layout)
    for name, values in columns.items():
        rows[name] = values
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(rows)}",
        *(f"property {names[kind.str[1:]]} {name}" for name, kind in layout),
        "end_header\n",
    ]
    return "\n".join(header).encode() + rows.tobytes()
