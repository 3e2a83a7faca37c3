"""Coordinate frames: which axis is up, and what is a mirror and not a rotation."""

from __future__ import annotations

import itertools

import pytest
import torch

from pointcanon.coordinates import COORDINATE_FRAMES, convert, coordinate_frame
from pointcanon.errors import InputError
from pointcanon.testing import assert_proper

NAMES = list(COORDINATE_FRAMES)
PAIRS = list(itertools.product(NAMES, NAMES))


def test_y_up_is_a_rotation_of_the_meshes_and_y_up_mirrored_is_not() -> None:
    assert torch.linalg.det(coordinate_frame("y-up").matrix).item() == pytest.approx(1)
    assert torch.linalg.det(coordinate_frame("y-up-mirrored").matrix).item() == pytest.approx(-1)
    assert_proper(coordinate_frame("y-up").matrix[None])
    mirrored = {name for name in NAMES if coordinate_frame(name).mirrored}
    assert mirrored == {"y-up-mirrored"}


def test_public_h5_frame_exchanges_y_and_z() -> None:
    mesh = torch.tensor([[1.0, 2.0, 3.0]])
    assert convert(mesh, "z-up", "y-up-mirrored").tolist() == [[1.0, 3.0, 2.0]]
    assert convert(mesh, "z-up", "y-up").tolist() == [[1.0, 3.0, -2.0]]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_conversion_is_exact_and_reversible(
    source: str, target: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    points = torch.randn(2, 50, 3, generator=generator).to(dtype)
    there = convert(points, source, target)
    assert there.dtype == dtype
    assert torch.equal(convert(there, target, source), points)
    # a signed permutation of the coordinates changes no bit of their magnitudes
    assert torch.equal(there.abs().sort(dim=-1).values, points.abs().sort(dim=-1).values)
    assert (there is points) is (source == target)
    via = convert(convert(points, source, "y-up-mirrored"), "y-up-mirrored", target)
    assert torch.equal(via, there)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_up_stays_up(source: str, target: str) -> None:
    up = convert(coordinate_frame(source).up_axis, source, target)
    assert torch.equal(up, coordinate_frame(target).up_axis)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_orientation_flips_only_between_mirrored_and_plain(source: str, target: str) -> None:
    triple = convert(torch.eye(3), source, target)
    reflected = coordinate_frame(source).mirrored != coordinate_frame(target).mirrored
    assert torch.linalg.det(triple).item() == pytest.approx(-1 if reflected else 1)


def test_outward_normals_stay_outward() -> None:
    directions = torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)
    points, normals = 2 * directions, directions
    for target in NAMES:
        moved, turned = convert(points, "z-up", target), convert(normals, "z-up", target)
        torch.testing.assert_close((moved * turned).sum(dim=-1), torch.full((20,), 2.0))


def test_a_frame_is_found_by_name_or_itself() -> None:
    frame = coordinate_frame("y-up")
    assert coordinate_frame(frame) is frame
    assert str(frame) == "y-up"
    with pytest.raises(InputError, match=r"'x-up'.*z-up, y-up, y-up-mirrored"):
        coordinate_frame("x-up")
