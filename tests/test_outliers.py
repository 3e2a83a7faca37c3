"""Strays: what is left out, what never is, and the commands that leave them out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pointcanon as pc
from pointcanon.cli import main
from pointcanon.datasets import ParametricShapes
from pointcanon.datasets.corruptions import Corrupted
from pointcanon.datasets.without_outliers import WithoutOutliers
from pointcanon.errors import InputError
from pointcanon.outliers import inliers
from pointcanon.rotations import random_rotations
from pointcanon.testing import generic_clouds

STRAYS = 5


def sheet(dtype: torch.dtype = torch.float64) -> Tensor:
    """``(2, 10 * 10 + STRAYS, 3)``: a grid of spacing 1, and strays at distances 9 and more."""
    x, y = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    grid = torch.stack((x, y, torch.zeros_like(x)), dim=-1).flatten(0, 1)
    strays = 9.0 * (1 + torch.arange(STRAYS))[:, None] * torch.tensor([0.0, 0.0, 1.0])
    cloud = torch.cat((grid, strays)).to(dtype)
    return torch.stack((cloud, cloud.roll(1, dims=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_strays_go_and_the_surface_stays(dtype: torch.dtype, scale: float) -> None:
    expected = (torch.arange(100 + STRAYS) < 100).expand(2, -1)
    assert torch.equal(inliers(scale * sheet(dtype)), expected)


def test_pose_place_and_order_do_not_matter() -> None:
    points = generic_clouds(6, 200, dtype=torch.float64)
    points[:, :STRAYS] *= 10
    found = inliers(points)
    assert found.float().mean() < 1
    turned = points @ random_rotations(6, dtype=torch.float64).mT + 3
    assert torch.equal(inliers(turned), found)
    order = torch.randperm(200)
    assert torch.equal(inliers(points[:, order]), found[:, order])
    assert torch.equal(inliers(points[2:3]), found[2:3])


def test_padding_is_no_neighbour() -> None:
    points = sheet()
    padded = torch.cat((points, points.new_zeros(2, 40, 3)), dim=1)
    mask = (torch.arange(padded.shape[1]) < points.shape[1]).expand(2, -1)
    found = inliers(padded, mask)
    assert torch.equal(found[:, :-40], inliers(points))
    assert not found[:, -40:].any()


def test_strays_are_no_neighbours_to_one_another() -> None:
    """Seven strays side by side, at twice the spacing: near each other, and far from the rest."""
    points = sheet()[:1, :100]
    clump = torch.tensor([20.0, 20.0, 20.0]) + 2.2 * torch.tensor(
        [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]],
        dtype=torch.float64,
    )
    assert not inliers(torch.cat((points, clump[None]), dim=1))[0, 100:].any()


@pytest.mark.parametrize(
    "points",
    [
        torch.zeros(1, 9, 3),
        torch.ones(1, 1, 3),
        torch.tensor([[[0.0, 0, 0], [1, 0, 0]]]),
        torch.cat((torch.zeros(1, 8, 3), torch.rand(1, 4, 3)), dim=1),
    ],
    ids=["coincident", "single", "pair", "mostly coincident"],
)
def test_where_nothing_can_be_said_all_stay(points: Tensor) -> None:
    assert inliers(points).all()


def test_half_the_points_stay_at_the_least() -> None:
    """Distances that double from point to point: each round would take more than it may."""
    points = torch.zeros(1, 40, 3, dtype=torch.float64)
    points[0, :, 0] = 2.0 ** torch.arange(40)
    assert inliers(points, k=1, ratio=1).sum() >= 20


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="k is 0"):
        inliers(sheet(), k=0)
    for ratio in (0.5, float("nan")):
        with pytest.raises(InputError, match=f"ratio is {ratio}"):
            inliers(sheet(), ratio=ratio)
    with pytest.raises(InputError, match=r"nan|NaN"):
        inliers(sheet().masked_fill(sheet() == 3, torch.nan))


def test_a_data_set_without_its_strays() -> None:
    clean = ParametricShapes("test", num_points=256)
    noisy = Corrupted(clean, "background", 5)
    found = WithoutOutliers(noisy)
    assert (found.classes, len(found)) == (clean.classes, len(clean))
    assert found.coordinate_frame == clean.coordinate_frame
    for index in (0, 100, 479):
        before, after = noisy[index], found[index]
        assert (after["label"], after["index"]) == (before["label"], index)
        kept = inliers(before["points"][None])[0]
        assert int(kept[256:].sum()) <= 6  # of 12 that were strewn about
        assert int(kept[:256].sum()) > 240
        points = pc.clouds.normalise(before["points"][kept][None])[0]
        torch.testing.assert_close(after["points"], points)


def model(folder: Path, network: str = "pointnet", **options: int) -> str:
    torch.manual_seed(0)
    small = {"widths": (8, 16), "embedding": 16} if network == "pointnet" else {}
    predictor = pc.predictors.create(network, **options, **small)
    whole = pc.Canonicalized(predictor, pc.canonicalizers.PCA(4)).eval()
    whole.normalisation = "unit-ball"
    whole.save(folder / "model.safetensors")
    return str(folder / "model.safetensors")


def test_files_without_their_strays(tmp_path: Path) -> None:
    checkpoint = model(tmp_path, num_classes=6)
    points = generic_clouds(1, 100, dtype=torch.float64)[0].numpy()
    np.save(tmp_path / "clean.npy", points)
    np.save(tmp_path / "dirty.npy", np.vstack((points, [[50.0, 0, 0], [0, 70, 0]])))
    options = ["--drop_outliers", "--device", "cpu"]
    lines = []
    for name in ("clean", "dirty"):
        out = tmp_path / f"{name}.jsonl"
        command = ["predict", checkpoint, str(tmp_path / f"{name}.npy"), "--json", str(out)]
        assert main([*command, *options]) == 0
        lines.append(json.loads(out.read_text()))
    for key in ("label", "centre", "scale", "rotation", "points"):
        assert lines[0][key] == lines[1][key]
    # the whole cloud is posed, strays and all, in the frame that was found without them
    command = ["canonicalize", checkpoint, str(tmp_path / "dirty.npy"), "--out"]
    assert main([*command, str(tmp_path / "posed"), *options]) == 0
    posed = np.load(tmp_path / "posed" / "dirty.npy")
    assert posed.shape == (102, 3)
    expected = (points - lines[0]["centre"]) @ np.array(lines[0]["rotation"])
    np.testing.assert_allclose(posed[:100], expected, atol=1e-5)


def test_eval_leaves_them_out_after_the_corruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = model(tmp_path, num_classes=16)
    command = ["eval", checkpoint, "--data.name", "parametric-shapes", "--data.num_points", "64"]
    command += ["--protocol", "I/I", "--limit", "8", "--device", "cpu", "--drop_outliers"]
    out = tmp_path / "found.json"
    assert main([*command, "--corruptions", "outliers", "--json", str(out)]) == 0
    assert "ParametricShapes without outliers" in capsys.readouterr().out
    assert json.loads(out.read_text())["dataset"] == "ParametricShapes without outliers"


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_part_networks_keep_every_point(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = model(tmp_path, "pointnet-parts", num_parts=50, num_categories=16)
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).normal(size=(40, 3)))
    given = {
        "eval": ["--data.name", "parametric-shapes", "--protocol", "I/I"],
        "predict": [str(tmp_path / "cloud.npy"), "--category", "0"],
    }
    assert main([command, checkpoint, *given[command], "--drop_outliers"]) == 2
    assert "--drop_outliers is for" in capsys.readouterr().err
