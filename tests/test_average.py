"""The mean of several trainings of one canonicalizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pointcanon import testing
from pointcanon.canonicalizers import PCA, Canonicalizer, Optimized, VectorNeuron, average
from pointcanon.cli.options import open_canonicalizer
from pointcanon.errors import InputError
from pointcanon.model import Canonicalized
from pointcanon.predictors import PointNet


def trained(seed: int, **options: Any) -> Optimized:
    torch.manual_seed(seed)
    made = Optimized(scorer_widths=(8, 16), refiner_widths=(8, 16), scorer_hidden=16, **options)
    made.coordinate_frame = "y-up"
    return made.eval()


def test_weights_are_the_mean_and_a_part_named_twice_counts_twice() -> None:
    one, other = trained(0), trained(1)
    mean = average([one, other, other]).state_dict()
    before = one.state_dict()["scorer.score.weight"].clone()
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(mean[name], (weight + 2 * other.state_dict()[name]) / 3)
    mean["scorer.score.weight"].zero_()  # nothing is shared
    assert torch.equal(one.state_dict()["scorer.score.weight"], before)


def test_the_mean_of_one_training_is_itself_and_the_first_has_its_way() -> None:
    points = testing.generic_clouds(3, 64)
    one, other = trained(0, answers=2), trained(0, answers=4)
    mean = average([one, other])
    assert (mean.options, mean.training) == (one.options, False)
    assert mean.coordinate_frame == "y-up"
    frames, expected = mean(points), one(points)
    assert torch.equal(frames.rotations, expected.rotations)
    assert torch.equal(frames.log_weights, expected.log_weights)
    testing.assert_equivariant(average([one, trained(1)]), points)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PCA(4), "of Optimized and PCA have no mean"),
        (VectorNeuron(), "of Optimized and VectorNeuron have no mean"),
        (trained(0, classes=3), "of Optimized and Optimized have no mean"),
    ],
)
def test_of_other_kinds_and_sizes_there_is_no_mean(other: Canonicalizer, message: str) -> None:
    with pytest.raises(InputError, match=message):
        average([trained(0), other])


def test_of_other_frames_and_classes_there_is_no_mean() -> None:
    other = trained(0)
    other.coordinate_frame = "z-up"
    with pytest.raises(InputError, match="differ in their coordinate_frame, y-up and z-up"):
        average([trained(0), other])
    one, other = trained(0, classes=2), trained(0, classes=2)
    one.class_names, other.class_names = ("cup", "bed"), ("bed", "cup")
    with pytest.raises(InputError, match="differ in their class_names"):
        average([one, other])
    with pytest.raises(InputError, match="empty"):
        average([])


def test_the_command_line_names_it_by_a_plus(tmp_path: Path) -> None:
    files = []
    for seed in (0, 1):
        model = Canonicalized(PointNet(3, widths=(8, 8), embedding=8), trained(seed))
        files.append(tmp_path / f"training+{seed}.safetensors")
        model.save(files[-1])
    found = open_canonicalizer(files[0]).state_dict()  # a file may have a plus in its name
    assert torch.equal(found["scorer.score.weight"], trained(0).scorer.score.weight)
    shorter = [file.rename(tmp_path / f"{seed}.safetensors") for seed, file in enumerate(files)]
    mean = open_canonicalizer("+".join(map(str, shorter))).state_dict()
    expected = average([trained(0), trained(1)]).state_dict()
    assert all(torch.equal(mean[name], expected[name]) for name in expected)
