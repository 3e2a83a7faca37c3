"""pointcanon works without a network: no socket is opened unless a user asks for one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pointcanon import checkpoint, predictors

PROGRAM = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        os.write(2, f"{event} {arguments}".encode())
        os._exit(3)

sys.addaudithook(refuse)
import pointcanon
from pointcanon.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def test_a_prediction_opens_no_socket(tmp_path: Path) -> None:
    network = predictors.PointNet(3, widths=(4,), embedding=4)
    checkpoint.save(tmp_path / "net.safetensors", network, checkpoint.Card("predictor"))
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).normal(size=(50, 3)))
    told = run("predict", str(tmp_path / "net.safetensors"), str(tmp_path / "cloud.npy"))
    assert told.returncode == 0, told.stderr
    assert '"label"' in told.stdout


@pytest.mark.slow
def test_a_training_and_its_evaluation_open_no_socket(tmp_path: Path) -> None:
    data = ["--data.num_points=16", "--data.name=parametric-shapes"]
    small = '--model.predictor_options={"widths": [4, 4], "embedding": 4}'
    steps = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    steps += ["--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    told = run("train", "--config=shapes-pointnet", small, *data, *steps, f"--output={tmp_path}")
    assert told.returncode == 0, told.stderr
    model = str(tmp_path / "best.safetensors")
    told = run("eval", model, *data, "--protocol=I/SO3", "--limit=4", "--device=cpu")
    assert told.returncode == 0, told.stderr
    assert "PointNet" in told.stdout


def test_the_watch_sees_sockets() -> None:
    program = PROGRAM.replace("import pointcanon\n", "import socket; socket.socket()\n")
    told = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert told.returncode == 3
    assert b"socket.__new__" in told.stderr
