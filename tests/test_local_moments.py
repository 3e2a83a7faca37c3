"""Moments of neighbourhoods, and layers that look at clouds in poses that are never made."""

from __future__ import annotations

import pytest
import torch

from pointcanon import rotations, testing
from pointcanon.layers import tiles
from pointcanon.layers.local_moments import SCALES, local_moments, symmetric, symmetric_square
from pointcanon.layers.posed_linear import PosedLinear

DTYPE = torch.float64


def test_moments_are_those_of_a_gaussian_neighbourhood() -> None:
    cloud = 0.3 * testing.generic_clouds(2, 40, dtype=DTYPE)
    points = cloud[:, :5] + 0.01
    offsets, covariances = local_moments(points, cloud)
    for s, scale in enumerate(SCALES):
        weights = (-torch.cdist(points, cloud).square() / (2 * scale**2)).softmax(dim=-1)
        mean = weights @ cloud
        near = cloud[:, None] - mean[:, :, None]
        covariance = torch.einsum("bmn,bmni,bmnj->bmij", weights, near, near)
        i, j = [0, 1, 2, 0, 1, 2], [0, 1, 2, 1, 2, 0]
        torch.testing.assert_close(offsets[:, :, s], (mean - points) / scale, atol=1e-9, rtol=0)
        found = covariances[:, :, s] * scale**2
        torch.testing.assert_close(found, covariance[..., i, j], atol=1e-9, rtol=0)


@pytest.mark.parametrize("tile", [1, 40 * 7, 40 * 40 * 2])
def test_padding_and_tiles_do_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = testing.generic_clouds(3, 40, dtype=DTYPE)
    mask = torch.arange(40) < torch.tensor([[40], [25], [1]])
    real = [one[kept][None] for one, kept in zip(cloud, mask, strict=True)]
    expected = [local_moments(one, one) for one in real]
    monkeypatch.setattr(tiles, "TILE", tile)
    found = local_moments(cloud, cloud, mask)
    for index, alone in enumerate(expected):
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours[index, mask[index]], theirs[0])


def test_a_point_that_is_alone_has_no_neighbourhood() -> None:
    far = torch.tensor([[[100.0, 0.0, 0.0]]])
    offsets, covariances = local_moments(far, torch.zeros(1, 4, 3))
    torch.testing.assert_close(offsets, torch.zeros_like(offsets), atol=1e-3, rtol=0)
    assert covariances.isfinite().all()


def test_the_symmetric_square_turns_tensors() -> None:
    turns = rotations.random_rotations(7, dtype=DTYPE)
    vectors = testing.generic_clouds(7, 5, dtype=DTYPE)
    expected = symmetric(vectors @ turns)
    torch.testing.assert_close(symmetric(vectors) @ symmetric_square(turns), expected)


def test_weights_are_turned_instead_of_points() -> None:
    cloud = testing.generic_clouds(3, 30, dtype=DTYPE)
    turns = rotations.random_rotations(12, dtype=DTYPE).unflatten(0, (3, 4))
    layer = PosedLinear(1 + len(SCALES), len(SCALES), 6).double()

    def known(points: torch.Tensor) -> torch.Tensor:
        return torch.cat([points, *(m.flatten(2) for m in local_moments(points, points))], dim=-1)

    expected = torch.stack([layer.linear(known(cloud @ turns[:, k])) for k in range(4)], dim=1)
    found = known(cloud)[:, None] @ layer.turned(turns) + layer.linear.bias
    torch.testing.assert_close(found, expected)


def test_points_alone_need_no_tensors() -> None:
    cloud = testing.generic_clouds(2, 9, dtype=DTYPE)
    turn = rotations.random_rotations(1, dtype=DTYPE)
    layer = PosedLinear(1, 0, 4).double()
    expected = layer.linear(cloud @ turn)
    torch.testing.assert_close(cloud @ layer.turned(turn) + layer.linear.bias, expected)
