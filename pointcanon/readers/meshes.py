"""Meshes: ``.off``, and ``.obj`` and ``.stl`` through trimesh."""

from __future__ import annotations

import io
import re

import numpy as np

from pointcanon.readers.geometry import Cloud, Malformed, Mesh, fans
from pointcanon.readers.text import rows_of, text_of

__all__ = ["parse_obj", "parse_off", "parse_stl"]


def parse_off(raw: bytes) -> Cloud | Mesh:
    """The mesh of an ``.off`` file, or its vertices if it has no faces.

    Many files of ModelNet40 run header and counts together, ``OFF352 322 0``. Colours and normals
    of vertices are left aside.
    """
    text = re.sub(r"#.*", "", text_of(raw))
    header = re.match(r"\s*(?:ST)?C?N?OFF\s*(\d+)\s+(\d+)[^\n]*", text)
    if header is None:
        raise Malformed(f"it begins with {text[:20]!r}, not OFF and counts")
    vertices, faces = int(header[1]), int(header[2])
    lines = [line for line in text[header.end() :].splitlines() if line.strip()]
    if len(lines) < vertices + faces:
        raise Malformed(
            f"it is cut off: {vertices:,} vertices and {faces:,} faces are announced, "
            f"{len(lines):,} lines follow"
        )
    points = rows_of(lines[:vertices]) if vertices else np.empty((0, 3))
    if points.shape[1] < 3:
        raise Malformed(f"its vertices have {points.shape[1]} coordinates")
    if not faces:
        return Cloud(points[:, :3])
    polygons = []
    for line in lines[vertices : vertices + faces]:
        words = line.split()
        corners = [int(word) for word in words[1 : int(words[0]) + 1]]
        if len(corners) != int(words[0]):
            raise Malformed(f"it is cut off in the face {line.strip()[:60]!r}")
        polygons.append(corners)
    return Mesh(points[:, :3], fans(polygons))


def parse_obj(raw: bytes) -> Cloud | Mesh:
    """The mesh of an ``.obj`` file, all its objects together, or its vertices without faces."""
    text = text_of(raw)
    if re.search(r"^v\s", text, flags=re.MULTILINE) is None:
        raise Malformed("it has no vertices (lines that begin with v)")
    return _load(text.encode(), "obj")


def parse_stl(raw: bytes) -> Cloud | Mesh:
    """The mesh of an ``.stl`` file, ASCII or binary."""
    # binary files may begin with "solid" too: those hold bytes that no text does
    if raw.lstrip()[:5].lower() == b"solid" and b"\0" not in raw:
        corners = len(re.findall(rb"\bvertex\b", raw))
        facets = len(re.findall(rb"\bendfacet\b", raw))
        if b"endsolid" not in raw or corners != 3 * facets:
            raise Malformed(f"it is cut off: {facets:,} facets are complete, no endsolid follows")
    else:
        count = int.from_bytes(raw[80:84], "little")
        if len(raw) < 84 or len(raw) < 84 + 50 * count:
            raise Malformed(f"it is cut off: {count:,} facets are announced, {len(raw):,} bytes")
        raw = raw[: 84 + 50 * count]
    return _load(raw, "stl")


def _load(raw: bytes, kind: str) -> Cloud | Mesh:
    import trimesh

    # without a resolver no file that this one names is opened
    scene = trimesh.load_scene(
        io.BytesIO(raw), file_type=kind, process=False, skip_materials=True, maintain_order=True
    )
    parts = list(scene.geometry.values())
    meshes = [part for part in parts if isinstance(part, trimesh.Trimesh)]
    if not meshes:
        clouds = [part.vertices for part in parts if isinstance(part, trimesh.PointCloud)]
        return Cloud(np.concatenate([*clouds, np.empty((0, 3))]))
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = [mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]
    return Mesh(np.concatenate([mesh.vertices for mesh in meshes]), np.concatenate(faces))
