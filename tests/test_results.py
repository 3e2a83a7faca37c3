"""``docs/results.md``: every command in it exists, and its small rows still hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pointcanon.canonicalizers import PCA, VectorNeuron
from pointcanon.cli import COMMANDS
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.model import Canonicalized
from pointcanon.predictors import create
from pointcanon.train.run import recipes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (ROOT / "docs" / "results.md").read_text()
COMMAND_LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", RESULTS, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that makes the tables of accuracy."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return __import__("accuracy")


def published(name: str) -> list[list[float]]:
    """The numbers in each cell of the first row that begins so."""
    lines = (line for line in RESULTS.splitlines() if line.startswith(f"| {name} |"))
    _, _, *cells, _ = next(lines).split("|")
    return [[float(number) for number in re.findall(r"\d+\.?\d*", cell)] for cell in cells]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_commands_exist(line: str) -> None:
    words = line.split("#")[0].split()
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "pointcanon":
        assert words[1] in COMMANDS
        assert words[1] != "train" or words[words.index("--config") + 1] in recipes()
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    else:
        assert words[:2] == ["pip", "download"]


def test_the_size_of_the_small_canonicalizer() -> None:
    ours = sum(weight.numel() for weight in VectorNeuron("small").parameters())
    assert f"| parameters | {ours:,} |" in RESULTS


def test_rows_as_they_are_printed(accuracy: Any) -> None:
    def trials(aligned: float, turned: float) -> dict[str, Any]:
        names = ("overall_accuracy", "mean_class_accuracy")
        figures = [dict.fromkeys(names, figure) for figure in (aligned, turned, 0.014)]
        return dict(zip(("aligned", "metrics", "metrics_sd"), figures, strict=True))

    report = {
        **trials(0.5, 0.25),
        "bare": trials(0.75, 0.125),
        "canonicalizer": "Optimized",
        "invariance": {"prediction_flip_rate": 0.001},
        "aligned_tax": {"overall_accuracy": 0.25},
        "frames": {"passes": 3.0},
        "timing": {"total_ms": 12.4},
    }
    *_, alone, behind = accuracy.demo_rows(report)
    assert alone == "| PointNet alone | 75.0 | 12.5 ± 1.4 |  |"
    assert behind == "| behind `Optimized` | 50.0 | 25.0 ± 1.4 | 0.10 % |"
    behind = "| behind PCA | 50.0 / 50.0 | 25.0 ± 1.4 / 25.0 ± 1.4 | 25.0 | 0.10 % | 3 | 12 ms |"
    assert accuracy.frozen_row("PCA", report) == behind
    assert accuracy.pair(report) == "overall / mean class accuracy %"
    parts = {"overall_accuracy": "instance_miou", "mean_class_accuracy": "class_miou"}
    text = json.dumps(report)
    for figure, of_parts in parts.items():
        text = text.replace(figure, of_parts)
    assert accuracy.frozen_row("PCA", json.loads(text)) == behind
    assert accuracy.pair(json.loads(text)) == "instance / class mIoU %"


TABLES = {
    "overall accuracy %": "accuracy.py demo",
    "overall / mean class accuracy %": "accuracy.py modelnet40",
    "instance / class mIoU %": "accuracy.py shapes-parts",
    "nearest candidate, 500 validation clouds": "candidates.py",
    "accuracy of points / mean IoU of labels %": "pointcanon eval",
    "DGCNN": "dgcnn.py",
    # and trials, said to be such
    "": "methods.py canonicalizer.py overhead.py dgcnn.py pointnet2.py soak.py",
}
"""By the first word of its heading, what prints a table."""


def test_a_script_for_every_table() -> None:
    rules = re.finditer(r"^\|(.*?)\|.*\n\|---", RESULTS, re.MULTILINE)
    assert {rule[1].strip() for rule in rules} == set(TABLES)
    scripts = {name for made_by in TABLES.values() for name in made_by.split() if ".py" in name}
    for script in scripts:
        assert (ROOT / "benchmarks" / script).is_file()
    accuracies = (ROOT / "benchmarks" / "accuracy.py").read_text()
    assert all(f'"{made_by.split()[1]}"' in accuracies for made_by in list(TABLES.values())[:3])


def test_the_script_makes_the_rows(accuracy: Any, tmp_path: Path) -> None:
    shapes = ParametricShapes("test")
    sizes = {"num_parts": len(shapes.parts), "num_categories": len(shapes.classes)}
    network = create("pointnet-parts", **sizes, transforms=False, widths=(4,), embedding=4)
    file = tmp_path / "parts.safetensors"
    names: dict[str, Any] = {"classes": tuple(shapes.classes), "parts": tuple(shapes.parts)}
    Canonicalized(network, PCA(1)).save(file, **names)
    report = accuracy.frozen(None, file, seeds=(0,), limit=2)
    assert accuracy.pair(report) == "instance / class mIoU %"
    assert re.fullmatch(
        r"\| behind PCA( \| [\d.± /%ms-]+){6} \|", accuracy.frozen_row("PCA", report)
    )


@pytest.mark.slow
def test_the_demo(accuracy: Any) -> None:
    report = accuracy.demo(seed=0)
    [upright], [turned, deviation], _ = published("PointNet alone")
    bare = report["bare"]
    assert 100 * bare["aligned"]["overall_accuracy"] == pytest.approx(upright, abs=1)
    assert 100 * bare["metrics"]["overall_accuracy"] == pytest.approx(turned, abs=3 * deviation)
    [upright], [turned, _], [flips] = published("behind `Optimized`")
    assert 100 * report["aligned"]["overall_accuracy"] == pytest.approx(upright, abs=1.5)
    assert 100 * report["metrics"]["overall_accuracy"] == pytest.approx(turned, abs=1.5)
    assert 100 * report["invariance"]["prediction_flip_rate"] == pytest.approx(flips, abs=0.25)


@pytest.mark.slow
def test_a_frozen_pointnet_on_modelnet40(accuracy: Any, real_data: Path) -> None:
    weights = next((real_data / "weights").glob("learning3d*"), None)
    root = real_data / "modelnet40_ply_hdf5_2048"
    if weights is None or not root.is_dir():
        pytest.skip("needs the weights of learning3d's PointNet, and ModelNet40")
    report = accuracy.frozen(root, weights, seeds=(0, 1, 2))
    section = RESULTS.index("## ModelNet40")
    line = next(x for x in RESULTS[section:].splitlines() if x.startswith("| PointNet alone |"))
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    names = ("overall_accuracy", "mean_class_accuracy")
    found = [100 * report["aligned"][name] for name in names]
    for name in names:
        found += [100 * report["metrics"][name], 100 * report["metrics_sd"][name]]
    assert found == pytest.approx(numbers, abs=0.1)


@pytest.mark.slow
def test_how_near_the_candidates_come(real_data: Path) -> None:
    weights = next((real_data / "weights").glob("learning3d*"), None)
    root = real_data / "modelnet40_ply_hdf5_2048"
    if weights is None or not root.is_dir():
        pytest.skip("needs the weights of learning3d's PointNet, and ModelNet40")
    script = [sys.executable, str(ROOT / "benchmarks" / "candidates.py")]
    options = ["--root", str(root), "--predictor", str(weights)]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    for name in ("PCA(24)", "Manhattan(24)", "both"):
        [[angle], [under], [up], [predicted]] = published(name if name == "both" else f"`{name}`")
        pattern = (
            rf"^{re.escape(name)}\s+angle median (\S+) .*?<10 (\S+) %.*<10 (\S+) %\n.* (\S+) %$"
        )
        found = re.search(pattern, done.stdout, re.MULTILINE)
        assert found is not None
        assert [float(figure) for figure in found.groups()] == pytest.approx(
            [angle, under, up, predicted], abs=1.01
        )
