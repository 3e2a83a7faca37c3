"""Coordinate frames of data sets: which axis is up, and whether the object is mirrored.

A :class:`CoordinateFrame` is stated relative to the frame of the original meshes. The OFF files of
ModelNet are z-up; the public h5 and txt clouds are the same objects with y and z *exchanged*,
which is a reflection (det = -1): no rotation undoes it, so a network trained on one and fed the
other loses accuracy for good. Frames are therefore named, converted explicitly, and compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pointcanon.errors import InputError

__all__ = ["COORDINATE_FRAMES", "CoordinateFrame", "convert", "coordinate_frame"]


@dataclass(frozen=True)
class CoordinateFrame:
    """A signed permutation of the mesh axes: ``x_here = x_mesh @ matrix.mT`` for rows of points.

    Attributes:
        name: The name used in recipes, checkpoints and messages.
        rows: The 3x3 matrix as a tuple of rows.
        up: Index of the axis that points up here (0, 1 or 2); gravity is its negative direction.
    """

    name: str
    rows: tuple[tuple[int, int, int], ...]
    up: int

    @property
    def matrix(self) -> Tensor:
        """``(3, 3)`` float64, from mesh coordinates to this frame."""
        return torch.tensor(self.rows, dtype=torch.float64)

    @property
    def mirrored(self) -> bool:
        """Whether objects appear reflected relative to the original meshes (det = -1)."""
        return bool(torch.linalg.det(self.matrix) < 0)

    @property
    def up_axis(self) -> Tensor:
        """``(3,)`` float64 unit vector pointing up in this frame."""
        return torch.eye(3, dtype=torch.float64)[self.up]

    def __str__(self) -> str:
        return self.name


COORDINATE_FRAMES: dict[str, CoordinateFrame] = {
    frame.name: frame
    for frame in (
        CoordinateFrame("z-up", ((1, 0, 0), (0, 1, 0), (0, 0, 1)), up=2),
        CoordinateFrame("y-up", ((1, 0, 0), (0, 0, 1), (0, -1, 0)), up=1),
        CoordinateFrame("y-up-mirrored", ((1, 0, 0), (0, 0, 1), (0, 1, 0)), up=1),
    )
}
"""``z-up``: the OFF meshes. ``y-up``: those, turned by -90 degrees about x (a proper rotation).
``y-up-mirrored``: those, with y and z exchanged (the public h5 and txt clouds)."""


def coordinate_frame(name: str | CoordinateFrame) -> CoordinateFrame:
    """The frame called ``name``.

    Raises:
        InputError: If there is no such frame.
    """
    if isinstance(name, CoordinateFrame):
        return name
    if name not in COORDINATE_FRAMES:
        known = ", ".join(COORDINATE_FRAMES)
        raise InputError(f"unknown coordinate frame {name!r}; choose one of: {known}")
    return COORDINATE_FRAMES[name]


def convert(
    vectors: Tensor, source: str | CoordinateFrame, target: str | CoordinateFrame
) -> Tensor:
    """Express points or normals ``(..., 3)`` of the ``source`` frame in the ``target`` frame.

    The map is a signed permutation, so it is exact in every dtype. It is a reflection when exactly
    one of the two frames is mirrored; normals of a surface keep pointing outwards either way. Where
    they are one frame the vectors come back themselves.
    """
    source, target = coordinate_frame(source), coordinate_frame(target)
    if source == target:
        return vectors
    change = target.matrix @ source.matrix.mT
    return vectors @ change.to(vectors).mT
