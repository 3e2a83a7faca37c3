"""Frames along the normals of a surface, and candidates of several kinds together."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pointcanon import rotations, testing
from pointcanon.canonicalizers import PCA, Manhattan
from pointcanon.canonicalizers.manhattan import surface_normals
from pointcanon.errors import InputError


def stairs(batch: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random points on faces at right angles, tilted to the principal axes, and normals."""
    generator = torch.Generator().manual_seed(0)
    low = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    size = torch.tensor([[2.0, 1.5, 0.0], [2.0, 0.0, 1.0], [0.0, 1.5, 2.0], [1.0, 0.0, 3.0]])
    face = torch.randint(4, (batch, count), generator=generator)
    points = low[face] + size[face] * torch.rand(batch, count, 3, generator=generator)
    normals = (size[face] == 0).to(dtype)
    return points.to(dtype), normals


def turn(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return rotations.random_rotations(batch, generator=generator, dtype=dtype)


def off_axis(frames: Tensor, turns: Tensor) -> Tensor:
    """Angle in degrees ``(B,)`` between a frame and the nearest of the true ones."""
    cube = rotations.group("O", frames.dtype)
    angle = rotations.geodesic_angle(turns[:, None] @ cube, frames[:, None])
    return torch.rad2deg(angle.amin(dim=1))


def test_faces_at_right_angles_are_found_from_their_normals() -> None:
    points, normals = stairs(20, 200)
    turns = turn(20)
    frames = Manhattan(1)(points @ turns.mT, normals=normals @ turns.mT)
    assert off_axis(frames.rotations[:, 0], turns).max() < 1e-5


def test_faces_at_right_angles_are_found_where_principal_axes_are_tilted() -> None:
    points, _ = stairs(20, 600)
    turns = turn(20)
    found = off_axis(Manhattan(1)(points @ turns.mT).rotations[:, 0], turns)
    assert found.max() < 2
    assert off_axis(PCA(1)(points @ turns.mT).rotations[:, 0], turns).median() > 5


def test_24_candidates_are_the_cube_rotations_of_the_first() -> None:
    points = testing.surface_clouds(5, 200, dtype=torch.float64)
    frames = Manhattan()(points).rotations
    torch.testing.assert_close(frames[:, 0], Manhattan(1)(points).rotations[:, 0])
    turns = frames[:, :1].mT @ frames
    torch.testing.assert_close(turns, rotations.group("O", turns.dtype).expand_as(turns))


def test_the_first_candidate_is_the_nearest_to_the_principal_axes() -> None:
    points, _ = stairs(20, 300)
    frames, axes = Manhattan()(points).rotations, PCA(1)(points).rotations
    angle = rotations.geodesic_angle(frames, axes)
    assert (angle.argmin(dim=1) == 0).all()


def test_normals_of_a_plane_and_of_a_line() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.rand(1, 100, 3, generator=generator).double() * torch.tensor([1.0, 1.0, 0.0])
    turns = turn(1)
    normals = surface_normals(flat @ turns.mT, k=8)
    planarity = normals.norm(dim=-1)
    assert (planarity > 0).all()
    torch.testing.assert_close((normals @ turns)[..., 2].abs(), planarity)
    line = surface_normals(flat * torch.tensor([1.0, 0.0, 0.0]), k=8)
    assert line.norm(dim=-1).max() < 1e-12


def test_padding_has_no_say() -> None:
    points, normals = stairs(4, 120)
    mask = torch.arange(120) < 100
    bad = torch.where(mask[:, None], normals, normals.new_tensor([1.0, 1.0, 1.0]) / math.sqrt(3))
    masked = Manhattan()(points, mask.expand(4, -1), bad).rotations
    alone = Manhattan()(points[:, :100], normals=normals[:, :100]).rotations
    torch.testing.assert_close(masked, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poses": 4}, "poses is 4; choose 1 or 24"),
        ({"k": 2}, "k is 2; a plane needs at least 3"),
        ({"steps": 0}, "steps is 0; choose at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Manhattan(**options)  # type: ignore[arg-type]
