"""Several canonicalizers side by side: candidates, opinions, and what they must have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pointcanon import canonicalizers, model, testing
from pointcanon.canonicalizers import PCA, Manhattan, Optimized, Union
from pointcanon.cli.options import open_canonicalizer
from pointcanon.errors import InputError, UsageError
from pointcanon.model import Canonicalized
from pointcanon.predictors import create

CLASSES = ("chair", "mug", "plane")


def trained(seed: int, classes: int | None = 3) -> Optimized:
    torch.manual_seed(seed)
    return Optimized(
        PCA(24), scorer_widths=(8, 16), refiner_widths=(8, 16), scorer_hidden=16, classes=classes
    ).eval()


def test_union_offers_the_candidates_of_all_with_equal_shares() -> None:
    points = testing.generic_clouds(3, 64, dtype=torch.float64)
    frames = Union([PCA(4), PCA(1)])(points)
    torch.testing.assert_close(frames.rotations[:, :4], PCA(4)(points).rotations)
    torch.testing.assert_close(frames.rotations[:, 4:], PCA(1)(points).rotations)
    expected = torch.tensor([1 / 8] * 4 + [1 / 2], dtype=torch.float64)
    torch.testing.assert_close(frames.weights, expected.expand(3, 5))
    assert frames.class_logits is None


def test_union_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="parts is empty"):
        Union([])


def test_those_that_know_the_same_classes_have_one_opinion() -> None:
    points = testing.generic_clouds(2, 64)
    parts = trained(0), trained(1)
    both = Union(parts)
    found, alone = both(points), [part(points) for part in parts]
    expected = [frames.class_logits for frames in alone]
    assert expected[0] is not None
    assert expected[1] is not None
    joint = (expected[0].log_softmax(dim=1) + expected[1].log_softmax(dim=1)) / 2
    assert both.classes == 3
    torch.testing.assert_close(found.class_logits, joint)
    torch.testing.assert_close(
        found.weights, torch.cat([frames.weights for frames in alone], dim=1) / 2
    )


@pytest.mark.parametrize("other", ["knows none", "another number", "other names"])
def test_those_that_do_not_have_none(other: str) -> None:
    first, second = trained(0), trained(1, {"knows none": None, "another number": 4}.get(other, 3))
    first.class_names = CLASSES
    if other == "other names":
        second.class_names = ("chair", "mug", "train")
    both = Union([first, second])
    assert both.classes is None
    assert both.class_names is None
    assert both(testing.generic_clouds(2, 64)).class_logits is None
    with pytest.raises(InputError, match="vote is 'agreement'"):
        Canonicalized(create("pointnet", num_classes=3), both, "agreement").eval()(
            testing.generic_clouds(2, 64)
        )


def test_parts_of_different_frames_are_refused() -> None:
    first, second = trained(0), trained(1)
    first.coordinate_frame, second.coordinate_frame = "y-up", "z-up"
    with pytest.raises(InputError, match="in the frames y-up and z-up; choose one"):
        Union([first, second])
    second.coordinate_frame = "y-up"
    assert Union([first, second, Manhattan()]).coordinate_frame == "y-up"


def test_a_pair_votes_by_agreement_is_stored_and_named_by_its_files(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = create("pointnet", num_classes=3).eval()
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for seed, file in enumerate(files):
        Canonicalized(network, trained(seed), "agreement").save(
            file, classes=CLASSES, coordinate_frame="y-up"
        )
    pair = open_canonicalizer(f"{files[0]},{files[1]}")
    assert isinstance(pair, Union)
    assert (pair.classes, pair.class_names, pair.coordinate_frame) == (3, CLASSES, "y-up")
    points = testing.generic_clouds(2, 64)
    whole = Canonicalized(network, pair, "agreement").eval()
    whole.save(tmp_path / "pair.safetensors", classes=CLASSES, coordinate_frame="y-up")
    again = model.load(tmp_path / "pair.safetensors")
    assert again.canonicalizer.class_names == CLASSES
    with torch.no_grad():
        torch.testing.assert_close(again(points), whole(points))
        turn = testing.rotations.random_rotations(2)
        torch.testing.assert_close(whole(points @ turn.mT), whole(points), rtol=1e-3, atol=1e-3)
    assert isinstance(canonicalizers.load(tmp_path / "pair.safetensors"), Union)


def test_one_wrong_name_among_several_is_told() -> None:
    with pytest.raises(UsageError, match="'Manhatten' is neither a checkpoint nor one of"):
        open_canonicalizer("PCA,Manhatten")
