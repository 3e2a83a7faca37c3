"""Real disks that are full or read-only: what is said, and what is left of the files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_nothing_lost import SHORT, STEPS, difference, learned

from pointcanon import checkpoint
from pointcanon.canonicalizers import PCA, Optimized
from pointcanon.cli import main
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.errors import DataError
from pointcanon.model import Canonicalized
from pointcanon.predictors import create
from pointcanon.train.run import train
from pointcanon.train.task import CloudTask

CLASSES = tuple(ParametricShapes("test").classes)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs mount")
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leave no room, not for a byte."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and six clouds in ``scans/<class>/``."""
    monkeypatch.chdir(tmp_path)
    network = create(
        "pointnet", num_classes=len(CLASSES), widths=[8], embedding=8, transforms=False
    )
    network.classes, network.normalisation = CLASSES, "unit-ball"  # type: ignore[assignment]
    card: dict[str, Any] = {"classes": CLASSES, "normalisation": "unit-ball"}
    checkpoint.save("net.safetensors", network, checkpoint.Card("predictor", **card))
    Canonicalized(network, PCA(1)).save("model.safetensors", **card)
    for number in range(6):
        folder = Path("scans", CLASSES[number % 3])
        folder.mkdir(parents=True, exist_ok=True)
        points = np.random.default_rng(number).normal(size=(40, 3))
        np.save(folder / f"{number}.npy", points * np.roll([9, 1, 1], number))
    return tmp_path


SHAPES = "--data.name=parametric-shapes --data.num_points=48"
COMMANDS = {
    "predict": ("predict model.safetensors scans --device cpu --json disk/out.jsonl", "out.jsonl"),
    "canonicalize": ("canonicalize model.safetensors scans --device cpu --out disk/out", "out"),
    "eval": (
        f"eval model.safetensors {SHAPES} --protocol I/SO3 --seeds 0 --limit 8 --device cpu "
        "--json disk/out.json",
        "out.json",
    ),
    "audit": ("audit model.safetensors scans --rotations 1 --json disk/out.json", "out.json"),
    "adapt": (
        "adapt net.safetensors scans --epochs 1 --device cpu --out disk/out.safetensors",
        "out.safetensors",
    ),
    "export": ("export model.safetensors -o disk/out.pt2", "out.pt2"),
}


NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "export" else name for name in COMMANDS
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``adapt`` trains is small."""

    def recommended(classes: int | None) -> Optimized:
        sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
        return Optimized(keep=1, classes=classes, **sizes)

    monkeypatch.setattr("pointcanon.train.adapt.recommended", recommended)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_clear_line(
    name: str, shop: Path, disk: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = COMMANDS[name]
    fill(disk)
    # of what takes long it is found out before
    status, words = (2, "bytes and 0 are free") if name == "adapt" else (1, "No space left")
    assert main(command.split()) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pointcanon: cannot write disk/out")
    assert words in error
    left = [path.relative_to(disk) for path in disk.rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"ballast", "out.jsonl", "poses.jsonl"}
    (disk / "ballast").unlink()
    # lines are appended: those that are there are whole, and the rest follow
    again = f"{command} --resume" if name in ("predict", "canonicalize") else command
    assert main(again.split()) == 0, capsys.readouterr().err
    assert (disk / out).exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_found_out_at_once(
    name: str, shop: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command, _ = COMMANDS[name]
    assert main(command.split()) == 2
    said = capsys.readouterr()
    [error] = said.err.splitlines()
    assert error.startswith("pointcanon: cannot write disk/out")
    assert "read-only" in error.lower()
    assert not said.out  # no work was done before


def test_a_training_on_a_read_only_disk(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(DataError, match=r"cannot write .*[Rr]ead-only"):
        train([*SHORT, f"--output={disk / 'run'}"])


def test_a_training_goes_on_once_there_is_room(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learned(train([*SHORT, f"--output={tmp_path / 'whole'}"]))
    arguments = [*SHORT, f"--output={disk / 'run'}", "--save_interval=0"]
    step = CloudTask.training_step

    def filling(task: CloudTask, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if task.global_step == STEPS + 1:
            fill(disk)
        return step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(CloudTask, "training_step", filling)
        with pytest.raises(DataError, match=r"No space left.*go on with") as caught:
            train(arguments)
    assert "\n" not in str(caught.value)
    assert not list((disk / "run").glob(".*.tmp"))
    os.unlink(disk / "ballast")
    train([*arguments, "--resume"])
    assert difference(learned(disk / "run"), whole) is None
