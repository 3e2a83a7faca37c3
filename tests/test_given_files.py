"""``adapt`` and ``audit`` on files of the user's own, as an engineer meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

import pointcanon as pc
from pointcanon.canonicalizers import Optimized
from pointcanon.cli import main
from pointcanon.cli.clouds import folder_names
from pointcanon.datasets.given import GivenClouds

SHOP = """
import torch
from torch import nn

class Longest(nn.Module):
    classes = ("deep", "tall", "wide")  # along y, z, x

    def forward(self, points):
        return points.var(dim=1)[:, [1, 2, 0]]

net = Longest()

class Told(Longest):
    normalisation = "unit-ball"
    coordinate_frame = "y-up"

    def forward(self, points):
        assert torch.allclose(points.norm(dim=-1).amax(dim=1), torch.ones(len(points)))
        return super().forward(points)

def size(points):
    return points.square().sum(dim=(1, 2))[:, None] * torch.tensor([1.0, -1.0])
"""
AXES = {"deep": 1, "tall": 2, "wide": 0}


def stick(axis: int, seed: int) -> np.ndarray:
    """A cloud ``(40, 3)`` that is long along one axis."""
    points = np.random.default_rng(seed).normal(size=(40, 3)) * 0.1
    points[:, axis] *= 30
    return points + np.array([1.0, 2.0, 3.0])


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's and seven clouds in ``scans/<class>/``."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    for name in AXES:
        Path("scans", name, "deeper").mkdir(parents=True)
    np.savetxt("scans/deep/a.xyz", stick(1, 0))
    np.savetxt("scans/deep/b.csv", stick(1, 1), delimiter=",")
    np.save("scans/tall/c.npy", np.stack([stick(2, 2), stick(2, 3)]))
    np.savez("scans/tall/deeper/d.npz", points=stick(2, 4))
    trimesh.PointCloud(stick(0, 5)).export("scans/wide/e.ply")
    trimesh.creation.box((9, 1, 1)).export("scans/wide/f.stl")
    return tmp_path


def run(command: str) -> int:
    return main(command.split())


def audit(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    command = f"audit {arguments} --rotations 2 --device cpu --json figures.json"
    assert run(command) == 0, capsys.readouterr().err
    found: dict[str, object] = json.loads(Path("figures.json").read_text())
    return found


def test_folders_name_the_classes(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = audit("shop:net scans --canonicalizer PCA", capsys)
    assert (found["n"], found["labelled"], found["dataset"]) == (7, True, "scans")
    assert found["alone"]["score"]["I"] == 1  # type: ignore[index]
    assert found["canonicalized"]["agreement"]["SO3"] == 1  # type: ignore[index]
    worst = found["alone"]["worst"][0]  # type: ignore[index]
    assert worst["source"].startswith("scans/")
    assert worst["upright"] == worst["source"].split("/")[1]
    # part of the classes is enough, of a network that says them
    found = audit("shop:net scans/wide scans/deep/a.xyz", capsys)
    assert (found["n"], found["dataset"], found["labelled"]) == (3, "2 paths", True)
    assert found["alone"]["score"]["I"] == 1  # type: ignore[index]
    assert "changes most: scans/" in capsys.readouterr().out


def test_labels_are_what_is_known(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not audit("shop:net scans --labels none", capsys)["labelled"]
    assert not audit("shop:size scans", capsys)["labelled"]  # it does not say its classes
    Path("scans/wide").rename("scans/Wide")
    assert run("audit shop:net scans") == 2
    error = capsys.readouterr().err
    assert "scans/Wide/e.ply lies in no folder named after a class: deep, tall, wide" in error
    Path("two").mkdir()
    Path("scans/deep").rename("two/deep")
    Path("scans/tall").rename("two/tall")
    assert not audit("shop:net scans", capsys)["labelled"]
    assert run("audit shop:net scans --labels folders") == 2
    assert run("audit shop:size two/deep two/tall --labels folders") == 2
    assert "--labels none" in capsys.readouterr().err
    assert audit("shop:size two --labels folders --limit 3", capsys)["n"] == 3
    assert json.loads(Path("figures.json").read_text())["labelled"]


def test_clouds_are_as_the_network_takes_them(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = audit(
        "shop:Told scans/wide --num_points all", capsys
    )  # asserts that it is in the unit ball
    assert found["coordinate_frame"] == "y-up"
    assert found["alone"]["score"]["I"] == 1  # type: ignore[index]
    assert found["alone"]["agreement"]["z"] < 1  # type: ignore[index]
    # a file whose z is up stands along y there
    found = audit("shop:Told scans/tall --coordinate_frame z-up", capsys)
    assert found["alone"]["score"]["I"] == 0  # type: ignore[index]
    assert found["alone"]["agreement"]["z"] == 1  # type: ignore[index]
    # of a network that does not say its frame, the files' says which way is up
    found = audit("shop:net scans/deep --coordinate_frame y-up", capsys)
    assert found["coordinate_frame"] == "y-up"
    assert found["alone"]["agreement"]["z"] == 1  # type: ignore[index]


def test_a_bad_file_is_reported_and_the_rest_go_on(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("scans/wide/bad.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 9\n")
    assert audit("shop:net scans --num_workers 1", capsys)["n"] == 7
    error = capsys.readouterr().err.splitlines()
    assert "bad.ply cannot be read" in error[0]
    assert error[1] == "pointcanon: 1 left out, going on with 7 clouds"
    assert run("audit shop:net scans/wide/bad.ply") == 1
    assert "none of the 1 files can be read" in capsys.readouterr().err


def test_a_gate_for_a_build(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gate = "scans --rotations 2 --device cpu --min-agreement 0.99"
    assert run(f"audit shop:net {gate}") == 1
    assert "Longest alone keeps" in capsys.readouterr().err
    assert run(f"audit shop:size {gate} --labels none") in (0, 1)
    assert run(f"audit shop:net {gate} --canonicalizer PCA") == 0


def test_part_networks_are_told_the_category_by_folder(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = pc.predictors.PointNetParts(
        4, num_categories=3, transforms=False, widths=(8,), embedding=8, head=(8,)
    )
    network.classes, network.normalisation = tuple(AXES), "unit-ball"
    network.parts = ("deep/a", "deep/b", "tall/a", "wide/a")
    pc.Canonicalized(network, pc.canonicalizers.PCA(1)).save("parts.safetensors")
    found = audit("parts.safetensors scans", capsys)
    assert (found["segments"], found["labelled"]) == (True, False)
    assert run("audit parts.safetensors scans --labels none") == 1
    assert "told the category" in capsys.readouterr().err
    given = GivenClouds([stick(0, 0)], [1], classes=tuple(AXES), part_names=network.parts)
    assert given.part_ranges == (range(2), range(2, 3), range(3, 4))


def test_adapting_to_a_folder(
    shop: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(classes: int | None) -> Optimized:
        sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
        return Optimized(keep=1, points=None, classes=classes, **sizes)

    monkeypatch.setattr("pointcanon.train.adapt.recommended", small)
    network = pc.predictors.create("pointnet", num_classes=3, embedding=8, widths=(8,))
    network.classes, network.normalisation = tuple(AXES), "unit-ball"  # type: ignore[assignment]
    card = {"classes": network.classes, "normalisation": "unit-ball"}
    pc.checkpoint.save("net.safetensors", network, pc.checkpoint.Card("predictor", **card))  # type: ignore[arg-type]
    Path("scans/wide/bad.ply").write_bytes(b"ply\n")
    command = "adapt net.safetensors scans --epochs 1 --device cpu --out robust.safetensors"
    assert main([*command.split(), "--json", "report.json"]) == 0
    assert "bad.ply cannot be read" in capsys.readouterr().err
    assert json.loads(Path("report.json").read_text())["labelled"]
    model = pc.load("robust.safetensors")
    assert (model.classes, model.normalisation) == (tuple(AXES), "unit-ball")
    assert run("predict robust.safetensors scans/deep --device cpu") == 0
    assert run(command.replace("scans", "nowhere")) == 1
    assert run(command.replace("scans", "scans/deep/a.xyz")) == 1
    assert "at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("shop:net scans --data.root there", "name files or --data.root, not both: scans, there"),
        ("shop:net --labels none", "--labels and --coordinate_frame are for files"),
        ("shop:Told scans --coordinate_frame up", "--coordinate_frame: unknown coordinate frame"),
        ("shop:net scans --num_points 0", "num_points"),
        ("shop:net scans --labels some", "labels"),
    ],
)
def test_bad_usage_is_one_clear_line(
    arguments: str, words: str, shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pointcanon: ")
    assert error.count("\n") == 1
    assert words in error


def test_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a/b/c", "d"):
        Path(folder).mkdir(parents=True)
    assert folder_names("a/b/c/f.ply", ["d", "a"]) == ["c", "b", "a"]
    assert folder_names("./a/f.ply", ["./a"]) == ["a"]
    assert folder_names("a/b/f.ply", ["."]) == ["b", "a", tmp_path.name]
    assert folder_names("a/b/f.ply", ["a/b/f.ply"]) == ["b", "a"]
    assert folder_names("f.ply", ["f.ply"])[0] == tmp_path.name


def test_where_clouds_come_from_is_kept(generator: torch.Generator) -> None:
    class Scans(list[torch.Tensor]):
        def source(self, index: int) -> str:
            return f"{index}.ply"

    scans = Scans(torch.randn(4, 5, 3, generator=generator))
    assert GivenClouds(scans).select([3, 1]).select([1]).source(0) == "1.ply"
    assert GivenClouds(list(scans)).source(0) is None
