"""Point Cloud Data, the format of PCL: https://pointclouds.org/documentation/tutorials/pcd_file_format.html"""

from __future__ import annotations

import numpy as np

from pointcanon.readers.geometry import Cloud, Malformed, float_array
from pointcanon.readers.text import named_cloud, rows_of

__all__ = ["decompress_lzf", "parse_pcd"]

_KINDS = {"F": "f", "I": "i", "U": "u"}


def parse_pcd(raw: bytes) -> Cloud:
    """The cloud of a ``.pcd`` file: ``DATA ascii``, ``binary`` or ``binary_compressed``.

    Points that hold NaN are left out: that is how the format writes what the sensor missed.
    """
    header, body = _header(raw)
    columns = _columns(header)
    count = _count(header)
    encoding = header["DATA"][0].lower()
    if encoding == "ascii":
        table = _ascii(body, columns, count)
    elif encoding == "binary":
        table = _binary(body, columns, count)
    elif encoding == "binary_compressed":
        table = _compressed(body, columns, count)
    else:
        raise Malformed(f"DATA is {encoding!r}, not ascii, binary or binary_compressed")
    cloud = named_cloud({name: float_array(values) for name, values in table.items()})
    seen = ~np.isnan(cloud.points).any(axis=1)
    return Cloud(cloud.points[seen], None if cloud.normals is None else cloud.normals[seen])


def _header(raw: bytes) -> tuple[dict[str, list[str]], bytes]:
    """The words after each key, and what follows the line that begins with DATA."""
    header: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in header:
        end = raw.find(b"\n", start)
        if end < 0 or end - start > 100_000:
            raise Malformed("its header has no line DATA; it is no PCD file, or cut off")
        words = raw[start:end].decode("ascii", errors="replace").split()
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
        start = end + 1
    absent = [key for key in ("FIELDS", "SIZE", "TYPE", "DATA") if not header.get(key)]
    if absent:
        raise Malformed(f"its header has no {' and no '.join(absent)}")
    return header, raw[start:]


def _columns(header: dict[str, list[str]]) -> list[tuple[str, np.dtype, int]]:
    """Name, type and number of values of each field."""
    names = [name.lower() for name in header["FIELDS"]]
    counts = header.get("COUNT", ["1"] * len(names))
    if not len(names) == len(header["SIZE"]) == len(header["TYPE"]) == len(counts):
        raise Malformed("FIELDS, SIZE, TYPE and COUNT of its header differ in length")
    columns = []
    for name, size, kind, count in zip(names, header["SIZE"], header["TYPE"], counts, strict=True):
        if kind not in _KINDS or size not in ("1", "2", "4", "8") or not count.isdigit():
            raise Malformed(f"field {name} has TYPE {kind}, SIZE {size} and COUNT {count}")
        columns.append((name, np.dtype(f"<{_KINDS[kind]}{size}"), int(count)))
    return columns


def _count(header: dict[str, list[str]]) -> int:
    try:
        if "POINTS" in header:
            return int(header["POINTS"][0])
        return int(header["WIDTH"][0]) * int(header.get("HEIGHT", ["1"])[0])
    except (KeyError, IndexError, ValueError):
        raise Malformed("its header does not say the number of points") from None


def _ascii(body: bytes, columns: list[tuple[str, np.dtype, int]], count: int) -> dict:
    lines = [line for line in body.decode("ascii", errors="replace").splitlines() if line.strip()]
    if len(lines) < count:
        raise Malformed(f"it is cut off: {count:,} points are announced, {len(lines):,} follow")
    rows = rows_of(lines[:count]) if count else np.empty((0, sum(c for *_, c in columns)))
    if rows.shape[1] != sum(values for *_, values in columns):
        raise Malformed(f"its rows hold {rows.shape[1]} numbers, which FIELDS and COUNT do not")
    starts = np.cumsum([0, *(values for *_, values in columns)])
    fields = zip(columns, starts, strict=False)
    return {name: rows[:, at].astype(_wide(dtype)) for (name, dtype, c), at in fields if c == 1}


def _wide(dtype: np.dtype) -> np.dtype:
    """Of ASCII numbers, whose integers may be written as floats."""
    return dtype if dtype.kind == "f" else np.dtype(np.float64)


def _binary(body: bytes, columns: list[tuple[str, np.dtype, int]], count: int) -> dict:
    # fields may share a name ("_" is padding): numbered, so that none is lost
    row = np.dtype([(f"{i}", dtype, (c,)) for i, (_, dtype, c) in enumerate(columns)])
    _require(body, count * row.itemsize, count)
    table = np.frombuffer(body, row, count)
    return {name: table[f"{i}"][:, 0] for i, (name, _, c) in enumerate(columns) if c == 1}


def _compressed(body: bytes, columns: list[tuple[str, np.dtype, int]], count: int) -> dict:
    """Field after field, each for all points, behind two sizes and LZF."""
    if len(body) < 8:
        raise Malformed("it is cut off before the sizes of its compressed data")
    packed, size = (int(value) for value in np.frombuffer(body, "<u4", 2))
    _require(body[8:], packed, count)
    whole = count * sum(dtype.itemsize * c for _, dtype, c in columns)
    if size != whole:
        raise Malformed(f"it announces {size:,} bytes of data, its {count:,} points are {whole:,}")
    data = decompress_lzf(body[8 : 8 + packed], size)
    table, at = {}, 0
    for name, dtype, values in columns:
        if values == 1:
            table[name] = np.frombuffer(data, dtype, count, at)
        at += count * dtype.itemsize * values
    return table


def _require(body: bytes, size: int, count: int) -> None:
    if count < 0 or len(body) < size:
        raise Malformed(
            f"it is cut off: {count:,} points are announced, {size:,} bytes, {len(body):,} follow"
        )


def decompress_lzf(packed: bytes, size: int) -> bytes:
    """What LibLZF compressed to ``packed``.

    A control byte below 32 is followed by that many bytes and one more, as they are. Above, its
    three high bits are a length less two (7: more in the next byte), and its five low bits with the
    next byte the distance back, less one, from where to repeat; a repeat may reach into itself.

    Args:
        packed: As LibLZF has it, without a header.
        size: Bytes that must come out.

    Raises:
        Malformed: If other than ``size`` bytes come out.
    """
    out = bytearray()
    at, end = 0, len(packed)
    try:
        while at < end and len(out) <= size:
            control = packed[at]
            at += 1
            if control < 32:
                if at + control >= end:
                    raise IndexError
                out += packed[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += packed[at]
                at += 1
            start = len(out) - ((control & 31) << 8 | packed[at]) - 1
            at += 1
            if start < 0:
                raise IndexError
            length += 2
            pattern = out[start : start + length]
            out += (pattern * (length // len(pattern) + 1))[:length]
    except IndexError:
        raise Malformed("its compressed data are damaged") from None
    if len(out) != size:
        raise Malformed(f"its compressed data give {len(out):,} bytes, not {size:,}")
    return bytes(out)
