"""Augmentations: their ranges and distributions, and that a generator decides them entirely."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from pointcanon.datasets import augment
from pointcanon.datasets.corruptions import corruption
from pointcanon.errors import InputError, UsageError


@pytest.fixture
def points(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(400, 64, 3, generator=generator) + 0.5  # away from zero: ratios are exact


def test_jitter_is_clipped_normal_noise(points, generator):
    noise = augment.jitter(points, generator, sigma=0.01, clip=0.02) - points
    assert noise.abs().max() <= 0.02 + 1e-6
    clipped = (noise.abs() > 0.02 - 1e-6).float().mean()
    assert clipped == pytest.approx(0.0455, abs=0.005)  # P(|x| > 2 sigma)
    assert noise.mean() == pytest.approx(0, abs=1e-4)


def test_anisotropic_scale_is_one_factor_per_axis_and_cloud(points, generator):
    factors = augment.scale(points, generator) / points
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    factors = factors[:, 0]
    assert factors.min() >= 2 / 3 - 1e-5
    assert factors.max() <= 3 / 2 + 1e-5
    assert factors.mean() == pytest.approx((2 / 3 + 3 / 2) / 2, abs=0.03)
    assert (factors[:, 0] - factors[:, 1]).abs().max() > 0.3


def test_isotropic_scale_keeps_the_shape(points, generator):
    factors = augment.scale(points, generator, low=0.8, high=1.25, isotropic=True) / points
    torch.testing.assert_close(factors, factors[:, :1, :1].expand_as(factors))
    assert factors[:, 0, 0].std() > 0.1


def test_shift_moves_a_cloud_as_a_whole(points, generator):
    moved = augment.shift(points, generator, limit=0.2) - points
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), atol=1e-6, rtol=0)
    assert moved.abs().max() <= 0.2 + 1e-6
    assert moved[:, 0].std() == pytest.approx(0.4 / 12**0.5, abs=0.01)


def test_dropped_points_become_the_first(points, generator):
    kept = augment.drop_points(points, generator, largest=0.875)
    same = (kept == points).all(-1)
    first = (kept == points[:, :1]).all(-1)
    assert (same | first).all()
    assert same[:, 0].all()
    share = 1 - same[:, 1:].float().mean(1)
    assert share.mean() == pytest.approx(0.875 / 2, abs=0.04)
    assert share.min() < 0.1
    assert share.max() > 0.7


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_presets_keep_type_and_input_and_follow_the_generator(points, name, dtype):
    points = points.to(dtype)
    before = points.clone()

    def run(seed: int) -> torch.Tensor:
        return augment.augmentation(name)(points, torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    one = run(3)
    torch.manual_seed(2)  # the global generator plays no part
    assert torch.equal(one, run(3))
    assert one.dtype == dtype
    assert one.shape == points.shape or name == "damage"
    assert torch.equal(points, before)
    assert torch.equal(one, run(4)) == (name == "none")


def test_none_changes_nothing_and_draws_nothing(points, generator):
    state = generator.get_state()
    assert augment.augmentation("none")(points, generator) is points
    assert torch.equal(generator.get_state(), state)


def test_presets_are_those_of_the_field():
    dgcnn, vnn = augment.AUGMENTATIONS["dgcnn"], augment.AUGMENTATIONS["vnn"]
    assert (dgcnn.scale, dgcnn.isotropic, dgcnn.shift) == ((2 / 3, 3 / 2), False, 0.2)
    assert (vnn.scale, vnn.isotropic, vnn.shift) == ((0.8, 1.25), True, 0.1)
    assert (dgcnn.dropout, vnn.dropout) == (0, 0.875)


def test_own_augmentation_is_used_as_it_is():
    own = dataclasses.replace(augment.AUGMENTATIONS["vnn"], jitter=0.01)
    assert augment.augmentation(own) is own


def test_damage_comes_over_a_share_of_the_batches_in_every_way_and_severity(points, generator):
    names = ("points", "crop")
    amounts = {name: corruption(name).amounts for name in names}
    clean, counts = 0, Counter()
    for _ in range(400):
        damaged = augment.damage(points[:4], generator, names=names, share=0.7)
        clean += damaged is points or torch.equal(damaged, points[:4])
        counts[damaged.shape[1]] += 1
    assert clean == pytest.approx(400 * 0.3, abs=40)
    kept = {int(amount * 64 + 1e-9) for several in amounts.values() for amount in several}
    assert set(counts) == kept | {64}
    # whatever is left is centred and in the unit ball, as a damaged scan reaches a network
    torch.testing.assert_close(damaged.mean(dim=1), torch.zeros(4, 3), atol=1e-6, rtol=0)
    assert damaged.norm(dim=-1).max() == pytest.approx(1)


def test_an_augmentation_that_damages_scales_afterwards(points, generator):
    own = augment.Augmentation(scale=(2.0, 2.0), corruptions=("crop",), corrupted=1.0)
    assert own(points, generator).norm(dim=-1).amax(dim=1) == pytest.approx(torch.full((400,), 2.0))


def test_unknown_name_lists_the_known():
    with pytest.raises(UsageError, match=r"'dgcn'.*none, scale, damage, pointnet, dgcnn, vnn"):
        augment.augmentation("dgcn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"scale": (1.5, 0.5)}, "scale is"),
        ({"scale": (0.0, 1.0)}, "scale is"),
        ({"shift": -0.1}, "shift is -0.1"),
        ({"jitter": float("nan")}, "jitter is nan"),
        ({"corrupted": 1.5}, "corrupted is 1.5"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        augment.Augmentation(**options)


def test_an_unknown_corruption_is_refused():
    with pytest.raises(UsageError, match=r"unknown corruption 'rust'; choose one of: points,"):
        augment.Augmentation(corruptions=("rust",))
