"""Trained canonicalizers that come with the package, alone and in front of a predictor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pointcanon as pc
from pointcanon import checkpoint, datasets, predictors, rotations, testing
from pointcanon.canonicalizers import PCA, PRETRAINED, load
from pointcanon.cli.options import open_canonicalizer
from pointcanon.errors import CheckpointError, InputError


@pytest.mark.parametrize("name", PRETRAINED)
def test_what_comes_with_the_package_loads_and_is_equivariant(name: str) -> None:
    canonicalizer = load(name)
    assert checkpoint.read_card(PRETRAINED[name]).kind == "canonicalizer"  # type: ignore[union-attr]
    assert canonicalizer.coordinate_frame is not None
    assert next(canonicalizer.parameters()).dtype == torch.float32
    testing.assert_equivariant(canonicalizer, testing.surface_clouds(20, 300))


def test_together_they_stay_small() -> None:
    assert sum(path.stat().st_size for path in PRETRAINED.values()) < 5_000_000


def test_who_asks_for_something_else_is_told_where_it_is() -> None:
    path = PRETRAINED["parametric-shapes"]
    for wrong in (pc.load, predictors.load):
        with pytest.raises(CheckpointError, match=r"with pointcanon\.canonicalizers\.load$"):
            wrong(path)


def test_real_objects_stand_upright(real_data: Path) -> None:
    clouds = datasets.ModelNet40(real_data / "modelnet40_ply_hdf5_2048", "test")
    chosen = torch.stack([clouds[i]["points"] for i in range(0, len(clouds), 60)])
    turns = rotations.random_rotations(len(chosen), generator=torch.Generator().manual_seed(0))
    frames = load("modelnet40")(chosen @ turns.mT).best().rotations[:, 0]
    up = clouds.coordinate_frame.up_axis.to(turns)
    upright = (frames.mT @ turns @ up) @ up
    assert (upright > math.cos(math.radians(10))).float().mean() > 0.7


def test_a_file_of_either_kind(tmp_path: Path) -> None:
    whole = pc.Canonicalized(predictors.create("pointnet", num_classes=3), PCA(4))
    whole.save(tmp_path / "whole.safetensors", coordinate_frame="z-up")
    found = load(tmp_path / "whole.safetensors")
    assert isinstance(found, PCA)
    assert (found.poses, found.coordinate_frame) == (4, "z-up")
    assert open_canonicalizer(str(tmp_path / "whole.safetensors")).coordinate_frame == "z-up"


def test_half_precision_is_for_the_file_only(tmp_path: Path) -> None:
    network = predictors.create("pointnet", num_classes=3)
    card = checkpoint.Card(kind="predictor")
    for name, dtype in (("half", torch.float16), ("whole", None)):
        checkpoint.save(tmp_path / name, network, card, dtype=dtype)
    sizes = [(tmp_path / name).stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    weight = next(checkpoint.load(tmp_path / "half")[0].parameters())
    torch.testing.assert_close(weight, next(network.parameters()), atol=1e-3, rtol=1e-3)
    assert weight.dtype == torch.float32


def test_bad_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"modelnet is neither a file nor .*: modelnet40"):
        load("modelnet")
    path = tmp_path / "predictor.safetensors"
    network = predictors.create("pointnet", num_classes=3)
    checkpoint.save(path, network, checkpoint.Card(kind="predictor"))
    with pytest.raises(CheckpointError, match="holds a predictor and no canonicalizer"):
        load(path)


def test_two_coordinate_frames_do_not_go_together() -> None:
    network = predictors.create("pointnet", num_classes=3)
    network.coordinate_frame = "z-up"
    with pytest.raises(InputError, match=r"upright in the frame y-up.*trained in z-up"):
        pc.Canonicalized(network, load("modelnet40"))
