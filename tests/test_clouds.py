"""Clouds: what is refused at the door, and statistics that padding cannot reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pointcanon.clouds import centroid, check_cloud, normalise, radius, unit_scale
from pointcanon.errors import InputError

GARBAGE = [0.0, 1e30, torch.nan, torch.inf, -torch.inf]


def padded(garbage: float, real: int = 7, extra: int = 4) -> tuple[Tensor, Tensor]:
    """A cloud in float64, and itself followed by padding, with its mask."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, real, 3, generator=generator, dtype=torch.float64) + 3
    wide = torch.full((2, real + extra, 3), garbage, dtype=torch.float64)
    wide[:, :real] = points
    return points, wide


def test_good_clouds_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        points = torch.ones(2, 1, 3, dtype=dtype)
        check_cloud(points, torch.ones(2, 1, dtype=torch.bool), normals=points)
        check_cloud(points, normals=None)


BAD_POINTS = {
    "no tensor": (np.zeros((1, 2, 3)), r"ndarray; pass a torch tensor"),
    "channels first": (torch.zeros(2, 3, 10), r"\(2, 3, 10\).*points\.mT"),
    "single cloud": (torch.zeros(10, 3), r"\(10, 3\).*points\[None\]"),
    "two coordinates": (torch.zeros(2, 10, 2), r"\(2, 10, 2\), expected \(B, N, 3\)"),
    "flat": (torch.zeros(3), r"expected \(B, N, 3\)"),
    "integers": (torch.zeros(2, 10, 3, dtype=torch.int64), r"int64.*points\.float\(\)"),
    "no points": (torch.zeros(2, 0, 3), "at least one point"),
    "NaN": (torch.tensor([[[0.0, 0, 0], [0, torch.nan, 1]]]), r"points\[0, 1\].*nan.*remove"),
    "infinity": (torch.tensor([[[torch.inf, 0, 0]]]), r"points\[0, 0\].*inf.*remove"),
}


@pytest.mark.parametrize("case", BAD_POINTS)
def test_bad_points_are_refused_by_name(case: str) -> None:
    points, message = BAD_POINTS[case]
    with pytest.raises(InputError, match=message):
        check_cloud(points)


BAD_MASKS = {
    "no tensor": ([[True] * 4] * 2, "mask is a list"),
    "dtype": (torch.ones(2, 4), r"mask has dtype torch\.float32.*bool"),
    "shape": (torch.ones(2, 5, dtype=torch.bool), r"mask has shape \(2, 5\), expected \(2, 4\)"),
    "device": (torch.ones(2, 4, dtype=torch.bool, device="meta"), "mask is on meta"),
    "empty cloud": (torch.tensor([[True] * 4, [False] * 4]), "cloud 1 of the batch is empty"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks_are_refused_by_name(case: str) -> None:
    mask, message = BAD_MASKS[case]
    with pytest.raises(InputError, match=message):
        check_cloud(torch.zeros(2, 4, 3), mask)


BAD_NORMALS = {
    "no tensor": ([0.0], "normals is a list"),
    "shape": (torch.zeros(2, 5, 3), r"normals has shape \(2, 5, 3\)"),
    "dtype": (torch.zeros(2, 4, 3, dtype=torch.float64), r"normals has dtype torch\.float64"),
    "device": (torch.zeros(2, 4, 3, device="meta"), "normals is on meta"),
    "NaN": (torch.full((2, 4, 3), torch.nan), r"normals\[0, 0\] is \[nan"),
}


@pytest.mark.parametrize("case", BAD_NORMALS)
def test_bad_normals_are_refused_by_name(case: str) -> None:
    normals, message = BAD_NORMALS[case]
    with pytest.raises(InputError, match=message):
        check_cloud(torch.zeros(2, 4, 3), normals=normals)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_points_may_hold_anything(garbage: float) -> None:
    points, wide = padded(garbage)
    mask = torch.arange(wide.shape[1]).expand(2, -1) < points.shape[1]
    check_cloud(wide, mask, normals=wide)
    torch.testing.assert_close(centroid(wide, mask), points.mean(dim=1))
    torch.testing.assert_close(radius(wide, mask), points.norm(dim=-1).amax(dim=1))
    torch.testing.assert_close(normalise(wide, mask)[mask], normalise(points).flatten(0, 1))
    assert not normalise(wide, mask)[~mask].any()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_points_reach_no_gradient(garbage: float) -> None:
    points, wide = padded(garbage)
    mask = torch.arange(wide.shape[1]).expand(2, -1) < points.shape[1]
    wide.requires_grad_()
    normalise(wide, mask).pow(3).sum().backward()
    points.requires_grad_()
    normalise(points).pow(3).sum().backward()
    torch.testing.assert_close(wide.grad[mask], points.grad.flatten(0, 1))
    assert not wide.grad[~mask].any()


def test_normalised_clouds_are_centred_in_the_unit_ball() -> None:
    points, _ = padded(0.0)
    unit = normalise(points)
    torch.testing.assert_close(unit.mean(dim=1), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(unit.norm(dim=-1).amax(dim=1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(normalise(100 * points - 7), unit)


def test_coincident_points_normalise_to_the_origin_with_a_finite_gradient() -> None:
    points = torch.ones(1, 5, 3, requires_grad=True)
    unit = normalise(points)
    assert not unit.any()
    unit.sum().backward()
    assert torch.isfinite(points.grad).all()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_unit_scale_is_that_of_the_real_points(garbage: float) -> None:
    points, wide = padded(garbage)
    mask = torch.arange(wide.shape[1]).expand(2, -1) < points.shape[1]
    unit = unit_scale(points)
    size = unit.square().sum(dim=-1).mean(dim=1)
    torch.testing.assert_close(size, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(unit_scale(wide, mask)[mask], unit.flatten(0, 1))
    assert not unit_scale(wide, mask)[~mask].any()


@pytest.mark.parametrize(
    ("dtype", "sizes"), [(torch.float32, (1e-37, 1e37)), (torch.float64, (1e-300, 1e160))]
)
def test_unit_scale_of_every_size(dtype: torch.dtype, sizes: tuple[float, ...]) -> None:
    points = padded(0.0)[0].to(dtype)
    for size in sizes:
        torch.testing.assert_close(unit_scale(size * points), unit_scale(points))


def test_unit_scale_leaves_a_cloud_at_the_origin_with_a_finite_gradient() -> None:
    points = torch.zeros(1, 5, 3, requires_grad=True)
    unit = unit_scale(points)
    assert not unit.any()
    unit.sum().backward()
    assert torch.isfinite(points.grad).all()
