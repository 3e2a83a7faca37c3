"""Surfaces of simple solids as triangles, and uniform sampling of them, in plain NumPy.

Everything is a *loft*: rings of points joined into a skin. A box, a surface of revolution, an
extrusion and a bent tube differ only in how their rings are made, so all of them share one winding
(counter-clockwise seen from outside, hence outward normals) and one cached table of faces, which is
what makes building and sampling an object a matter of a fraction of a millisecond.

A surface is a float64 array ``(T, 3, 3)``: T triangles, their 3 corners, x y z. Some triangles may
be degenerate (where a ring shrinks to a point): they have no area and are never sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Surface",
    "areas_and_normals",
    "box",
    "extrude",
    "lathe",
    "loft",
    "mirrored",
    "rod",
    "sample",
    "spun",
    "tube",
]

Surface = NDArray[np.float64]

# Reading the coordinates in these orders carries z to the named axis by a proper rotation.
_Z_TO_AXIS = {"x": [2, 0, 1], "y": [1, 2, 0], "z": [0, 1, 2]}


@lru_cache(maxsize=256)
def _loft_faces(rings: int, sides: int, capped: bool) -> NDArray[np.int64]:
    """Corner indices ``(T, 3)`` of a loft whose last two vertices are the centres of its ends."""
    here = np.arange(sides)
    after = (here + 1) % sides
    start = sides * np.arange(rings - 1)[:, None]
    lower = np.stack((start + here, start + after, start + sides + after), axis=-1)
    upper = np.stack((start + here, start + sides + after, start + sides + here), axis=-1)
    faces = [lower.reshape(-1, 3), upper.reshape(-1, 3)]
    if capped:
        last = sides * (rings - 1)
        centre = np.full(sides, sides * rings)
        faces.append(np.stack((centre, after, here), axis=-1))
        faces.append(np.stack((centre + 1, last + here, last + after), axis=-1))
    return np.concatenate(faces)


def loft(rings: ArrayLike, *, capped: bool = True) -> Surface:
    """Skin through rings of points.

    Args:
        rings: ``(R, S, 3)``, R rings of S points each, every ring counter-clockwise seen against
            the direction in which the rings follow each other.
        capped: Close the first and the last ring with a fan about its mean point (right for
            outlines that are star-shaped about it, as all convex ones are).
    """
    rings = np.asarray(rings, dtype=np.float64)
    count, sides, _ = rings.shape
    vertices = rings.reshape(-1, 3)
    if capped:
        vertices = np.concatenate((vertices, rings[[0, -1]].mean(axis=1)))
    return vertices[_loft_faces(count, sides, capped)]


@lru_cache(maxsize=16)
def _circle(sides: int) -> NDArray[np.float64]:
    """Regular polygon ``(sides, 2)`` on the unit circle, counter-clockwise."""
    angle = 2 * np.pi * np.arange(sides) / sides
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1)


def box(low: Sequence[float], high: Sequence[float]) -> Surface:
    """Axis-aligned box between two corners."""
    corner = np.asarray(low, dtype=np.float64)
    return _UNIT_BOX * (np.asarray(high) - corner) + corner


_UNIT_BOX = loft([[(0, 0, z), (1, 0, z), (1, 1, z), (0, 1, z)] for z in (0, 1)])


def lathe(profile: ArrayLike, *, axis: str = "z", sides: int = 24, capped: bool = True) -> Surface:
    """Surface of revolution.

    Args:
        profile: ``(R, 2)`` rows of (radius, position along the axis), positions rising on the
            outside. A profile may turn back inside (a cup), or end where it began (a ring, with
            ``capped=False``); then it must run counter-clockwise in the (radius, position) plane.
        axis: ``"x"``, ``"y"`` or ``"z"``.
        sides: Number of facets around the axis.
        capped: Close the ends whose radius is not zero by discs.
    """
    profile = np.asarray(profile, dtype=np.float64)
    rings = np.empty((len(profile), sides, 3))
    rings[..., :2] = profile[:, None, :1] * _circle(sides)
    rings[..., 2] = profile[:, 1:]
    return loft(rings[..., _Z_TO_AXIS[axis]], capped=capped)


def extrude(outline: ArrayLike, low: float, high: float, *, axis: str = "z") -> Surface:
    """Prism over an outline.

    Args:
        outline: ``(S, 2)`` corners, either way round, in the plane of the other two axes in
            alphabetical order: (y, z) for ``axis="x"``, (x, z) for ``"y"``, (x, y) for ``"z"``.
        low: Where the prism begins along the axis.
        high: Where it ends.
        axis: ``"x"``, ``"y"`` or ``"z"``.
    """
    outline = np.asarray(outline, dtype=np.float64)
    if axis == "y":  # cyclically the plane across y is (z, x)
        outline = outline[:, ::-1]
    ahead = np.roll(outline, -1, axis=0)
    if (outline[:, 0] * ahead[:, 1] - outline[:, 1] * ahead[:, 0]).sum() < 0:
        outline = outline[::-1]
    rings = np.empty((2, len(outline), 3))
    rings[..., :2] = outline
    rings[0, :, 2], rings[1, :, 2] = low, high
    return loft(rings[..., _Z_TO_AXIS[axis]])


def tube(
    path: ArrayLike, radius: ArrayLike, *, across: Sequence[float], sides: int = 10
) -> Surface:
    """Round tube along a plane path.

    Args:
        path: ``(P, 3)`` points, P >= 2.
        radius: One radius, or ``(P,)`` of them.
        across: Unit vector perpendicular to the plane of the path.
        sides: Number of facets around the path.
    """
    path = np.asarray(path, dtype=np.float64)
    steps = np.diff(path, axis=0)
    tangent = np.concatenate((steps[:1], steps[:-1] + steps[1:], steps[-1:]))
    tangent /= np.sqrt((tangent * tangent).sum(axis=1, keepdims=True))
    binormal = np.asarray(across, dtype=np.float64)
    normal = _cross(binormal[None], tangent)  # normal, binormal, tangent are right-handed
    circle = _circle(sides)
    section = circle[:, :1] * normal[:, None] + circle[:, 1:] * binormal
    return loft(path[:, None] + np.asarray(radius).reshape(-1, 1, 1) * section)


def rod(
    start: Sequence[float],
    end: Sequence[float],
    radius: float,
    end_radius: float | None = None,
    *,
    sides: int = 10,
) -> Surface:
    """Straight round rod between two points, conical when ``end_radius`` is given."""
    path = np.array((start, end), dtype=np.float64)
    direction = path[1] - path[0]
    least = np.zeros(3)
    least[np.abs(direction).argmin()] = 1.0
    across = _cross(direction, least)
    across /= np.sqrt(across @ across)
    return tube(
        path,
        (radius, radius if end_radius is None else end_radius),
        across=across.tolist(),
        sides=sides,
    )


def spun(surface: Surface, angle: float) -> Surface:
    """The surface turned about z by ``angle`` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return surface @ np.array(((c, s, 0.0), (-s, c, 0.0), (0.0, 0.0, 1.0)))


def mirrored(surface: Surface) -> Surface:
    """The surface reflected in the plane y = 0, still facing outwards."""
    return surface[:, ::-1] * np.array((1.0, -1.0, 1.0))


def areas_and_normals(surface: Surface) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Areas ``(T,)`` and outward unit normals ``(T, 3)``; degenerate triangles get (0, 0, 0)."""
    corner = surface[:, 0]
    doubled = _cross(surface[:, 1] - corner, surface[:, 2] - corner)
    length = np.sqrt((doubled * doubled).sum(axis=1))
    real = length > 1e-12 * length.max()
    normals = np.zeros_like(doubled)
    np.divide(doubled, length[:, None], out=normals, where=real[:, None])
    return np.where(real, length / 2, 0.0), normals


def sample(
    surface: Surface, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Points drawn uniformly by area.

    Returns:
        Points ``(count, 3)``, outward unit normals ``(count, 3)``, triangle indices ``(count,)``.
    """
    areas, normals = areas_and_normals(surface)
    cumulative = np.cumsum(areas)
    draws = rng.random((3, count))
    # side="right" steps over triangles without area, also for a draw of exactly 0
    chosen = np.searchsorted(cumulative, draws[0] * cumulative[-1], side="right")
    chosen = np.minimum(chosen, np.flatnonzero(areas)[-1])
    root = np.sqrt(draws[1])
    weights = np.stack((1 - root, root * (1 - draws[2]), root * draws[2]), axis=-1)
    points = np.einsum("nc,ncd->nd", weights, surface[chosen])
    return points, normals[chosen], chosen


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cross product along the last axis, without the overhead of ``np.cross`` on small arrays."""
    return a[..., [1, 2, 0]] * b[..., [2, 0, 1]] - a[..., [2, 0, 1]] * b[..., [1, 2, 0]]
