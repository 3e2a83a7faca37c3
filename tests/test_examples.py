"""The programs in ``examples/`` run, as their docstrings say, and say what they should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pointcanon as pc
from pointcanon import checkpoint
from pointcanon.canonicalizers import PCA
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.predictors import PointNet

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.slow


def run(folder: Path, name: str, *arguments: str, status: int = 0) -> str:
    """What an example prints, run in a folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


@pytest.fixture
def network() -> PointNet:
    torch.manual_seed(0)
    network = PointNet(num_classes=16, widths=(16, 32), embedding=64).eval()
    network.classes = tuple(ParametricShapes("test", size=16).classes)
    network.coordinate_frame, network.normalisation = "z-up", "unit-ball"
    return network


def test_every_example_is_run_here_or_beside_what_it_shows() -> None:
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for example in EXAMPLES.glob("*.py"):
        assert example.stem in tests, example.name


def test_adapt_own_network(tmp_path: Path) -> None:
    said = run(tmp_path, "adapt_own_network.py", "--minutes", "0.05")
    assert "robust.safetensors" in said
    card = checkpoint.read_card(tmp_path / "robust.safetensors")
    assert card is not None
    assert card.coordinate_frame == "z-up"
    assert card.classes is not None
    assert len(card.classes) == 16


def test_predict_files(tmp_path: Path, network: PointNet) -> None:
    pc.Canonicalized(network, PCA(4)).save(tmp_path / "robust.safetensors")
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans" / "two.npy", np.random.default_rng(0).normal(size=(2, 80, 3)))
    said = run(tmp_path, "predict_files.py", "robust.safetensors", "scans").splitlines()
    assert len(said) == 2
    assert network.classes is not None
    for line in said:
        place, answer = line.split(": ")
        assert place == "scans/two.npy"
        assert answer.split(", ")[0] in network.classes
    (tmp_path / "scans" / "torn.ply").write_text("ply\n")
    assert (
        run(tmp_path, "predict_files.py", "robust.safetensors", "scans", status=1).count("\n") == 2
    )


def test_part_segmentation(tmp_path: Path) -> None:
    said = run(tmp_path, "part_segmentation.py", "--epochs", "4", "--minutes", "0.05")
    alone, canonicalized = (
        [float(number) for number in re.findall(r"0\.\d+", line)] for line in said.splitlines()[-2:]
    )
    upright, turned = alone[0], alone[2]
    assert turned < upright  # it has learned upright objects
    assert canonicalized[2] == pytest.approx(canonicalized[0], abs=0.02)  # whatever the pose


def test_robustness_report(tmp_path: Path, network: PointNet) -> None:
    checkpoint.save(
        tmp_path / "net.safetensors",
        network,
        checkpoint.Card(
            "predictor",
            coordinate_frame="z-up",
            classes=network.classes,
            normalisation="unit-ball",
        ),
    )
    arguments = ("net.safetensors", "--clouds", "16", "--json", "figures.json")
    said = run(tmp_path, "robustness_report.py", *arguments)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == [line.split()[0] for line in said.splitlines()[1:]]
    assert figures["PCA(24)"]["passes"] == 24
