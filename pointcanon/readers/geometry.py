"""What files hold: clouds, and meshes that are made into clouds."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import numpy as np

__all__ = ["LIMIT", "Cloud", "Malformed", "Mesh", "float_array", "sample_surface"]

LIMIT = 1 << 30
"""Bytes that are read at once: the largest file, or the largest cloud of a file of many."""


class Malformed(ValueError):
    """What is wrong with the content of a file, in words that follow "cannot be read: "."""


class Cloud(NamedTuple):
    """``points (N, 3)`` and ``normals (N, 3)`` of unit length or None, float32 or float64.

    Normals are None where a file has none, or not a direction for every point.
    """

    points: np.ndarray
    normals: np.ndarray | None = None

    @classmethod
    def of_columns(cls, columns: np.ndarray) -> Cloud:
        """From ``(N, C >= 3)``: positions, then normals if columns 4 to 6 are unit vectors.

        Colours, the other habit, never are in every row.

        Raises:
            Malformed: If there are fewer than three columns.
        """
        if columns.ndim != 2 or columns.shape[1] < 3:
            raise Malformed(f"an array of shape {columns.shape} is no cloud; expected (N, 3)")
        columns = float_array(columns)
        return cls(columns[:, :3], columns[:, 3:6] if columns.shape[1] >= 6 else None)

    def checked(self) -> Cloud:
        """The cloud, if it can be used.

        Raises:
            Malformed: If it has no point, or one that is not finite.
        """
        if len(self.points) == 0:
            raise Malformed("it holds no points")
        bad = ~np.isfinite(self.points).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            more = f", and {int(bad.sum()) - 1:,} more are not finite" if bad.sum() > 1 else ""
            raise Malformed(f"point {row} is {self.points[row].tolist()}{more}")
        return Cloud(self.points, self.normals if self._directed() else None)

    def _directed(self) -> bool:
        if self.normals is None or not np.isfinite(self.normals).all():
            return False
        if np.abs(self.normals).max() > 2:  # colours, or numbers whose squares overflow
            return False
        return bool((np.abs(np.linalg.norm(self.normals, axis=1) - 1) < 0.01).all())


class Mesh(NamedTuple):
    """``vertices (V, 3)`` float64 and triangles ``faces (F, 3)`` int64."""

    vertices: np.ndarray
    faces: np.ndarray


def float_array(values: np.ndarray) -> np.ndarray:
    """float32 as it is, other numbers as float64, in the byte order of the machine.

    Raises:
        Malformed: If it does not hold real numbers.
    """
    if values.dtype.kind not in "fiu":
        raise Malformed(f"it holds {values.dtype}, not numbers")
    return values.astype(
        np.float32 if values.dtype.itemsize <= 4 and values.dtype.kind == "f" else np.float64
    )


def fans(polygons: list[list[int]]) -> np.ndarray:
    """Triangles ``(F, 3)`` int64 of polygons, each cut into a fan."""
    triangles = [
        (polygon[0], polygon[i], polygon[i + 1])
        for polygon in polygons
        for i in range(1, len(polygon) - 1)
    ]
    return np.array(triangles, dtype=np.int64).reshape(-1, 3)


def sample_surface(mesh: Mesh, count: int) -> Cloud:
    """Points uniform by area on the surface of a mesh, with the normals of their faces.

    The draw is a function of the faces alone: a mesh that was turned or scaled is sampled at the
    same places of its surface.

    Args:
        mesh: Of at least one triangle that has an area.
        count: Number of points, at least 1.

    Returns:
        float64.

    Raises:
        Malformed: If the mesh has no surface, a vertex that is not finite, or a face that names
            one that is not there.
    """
    vertices, faces = mesh
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise Malformed(f"a face names a vertex outside 0 … {len(vertices) - 1}")
    if len(vertices):
        Cloud(vertices).checked()
    corners = vertices[faces]
    size = np.abs(corners).max(initial=0) or 1.0  # so that no product overflows or vanishes
    edges = (corners[:, 1:] - corners[:, :1]) / size
    normals = np.cross(edges[:, 0], edges[:, 1])
    areas = np.linalg.norm(normals, axis=1)
    reached = np.cumsum(areas)
    if not len(reached) or not reached[-1] > 0:
        raise Malformed(f"it is a mesh whose {len(faces)} faces have no area: nothing to sample")
    seed = blake2b(np.ascontiguousarray(faces).tobytes(), digest_size=8).digest()
    # the raw stream of a bit generator never changes between numpy versions
    raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(3 * count)
    which, first, second = ((raw >> np.uint64(11)) * 2.0**-53).reshape(3, count)
    chosen = np.searchsorted(reached, which * reached[-1], side="right")
    root = np.sqrt(first)  # uniform over a triangle: Osada et al. 2002, equation 1
    weights = np.stack((1 - root, root * (1 - second), root * second), axis=1)
    points = (weights[..., None] * corners[chosen]).sum(axis=1)
    return Cloud(points, normals[chosen] / areas[chosen, None])
