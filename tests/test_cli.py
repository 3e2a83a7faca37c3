"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pointcanon as pc
from pointcanon.cli import COMMANDS, main


def test_the_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in COMMANDS)
    assert main([]) == 2


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"pointcanon \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"pointcanon {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["evall"], 2, "unknown command 'evall'"),
        (["info", "missing.safetensors"], 1, "missing.safetensors"),
        (["data", "check", "--data.root", "missing"], 1, "missing"),
        (["eval", "missing.t7", "--data.root", "missing", "--protocol", "I/SO3"], 1, "missing"),
    ],
)
def test_errors_are_one_line_and_a_status(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("pointcanon: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_process_exits_with_the_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pointcanon", "info", "missing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_info_prints_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = pc.predictors.create("pointnet", num_classes=2, embedding=8)
    model = pc.Canonicalized(predictor, pc.canonicalizers.PCA(4))
    model.save(tmp_path / "model.safetensors", metrics={"val_accuracy": 0.5})
    assert main(["info", str(tmp_path / "model.safetensors")]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["metrics"] == {"val_accuracy": 0.5}
    assert card["architecture"]["hyperparameters"]["canonicalizer"]["class"] == "PCA"
    assert main(["info", "modelnet40"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["class"] == "Optimized"


def test_data_list_names_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert {"modelnet40", "modelnet10", "parametric-shapes"} <= set(capsys.readouterr().out.split())


def test_data_check_of_the_real_data(real_data: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    root = str(real_data / "modelnet40_normal_resampled")
    main(["data", "check", "--data.root", root, "--json", str(report)])
    assert json.loads(report.read_text())["coordinate_frame"] == "y-up-mirrored"


def test_the_demo_removes_nothing_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "predictor").mkdir()
    (tmp_path / "predictor" / "mine.txt").write_text("precious")
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert main(["demo", "--epochs", "many"]) == 2
    assert capsys.readouterr().err.count("pointcanon: ") == 3
    assert (tmp_path / "predictor" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_the_demo_ends_with_figures_and_a_picture(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pointcanon", "demo", "--output", str(tmp_path / "demo")),
            *("--json", str(figures)),
        ],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    upright = found["bare"]["aligned"]["overall_accuracy"]
    assert found["bare"]["metrics"]["overall_accuracy"] < upright - 0.4
    assert found["metrics"]["overall_accuracy"] > upright - 0.03
    assert (tmp_path / "demo" / "gallery.png").stat().st_size > 10_000
