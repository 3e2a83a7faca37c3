"""A training that is killed, interrupted, or short of disk or readers: what is left, and whether it
goes on to the weights of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pointcanon as pc
from pointcanon import checkpoint, files
from pointcanon.canonicalizers import PCA, Optimized
from pointcanon.cli import main
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.errors import CheckpointError, DataError, PointcanonError, UsageError
from pointcanon.train.callbacks import SaveState, StateFile
from pointcanon.train.data import EpochsSampler, Position
from pointcanon.train.run import train
from pointcanon.train.task import CloudTask

KILLS = 24
TINY = [
    "--config=shapes-pointnet",
    "--data.num_points=48",
    "--data.batch_size=16",
    "--model.predictor_options={embedding: 16, widths: [8, 16]}",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=2",
]
SHORT = [*TINY, "--data.size=64", "--trainer.max_epochs=2"]
STEPS = 4
"""Of an epoch of SHORT."""


def difference(first: Any, second: Any, where: str = "") -> str | None:
    """Where two states differ in any bit; None if they do not."""
    if isinstance(first, Tensor):
        return None if torch.equal(first, second) else where
    if isinstance(first, list | tuple):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if not isinstance(first, dict):
        return None if first == second else f"{where}: {first} and {second}"
    if first.keys() != second.keys():
        return f"{where}: {sorted(first)} and {sorted(second)}"
    found = (difference(first[key], second[key], f"{where}.{key}") for key in first)
    return next((place for place in found if place), None)


def learned(folder: Path) -> dict[str, Any]:
    """All that a training learned: its state and its best model."""
    state = StateFile().load_checkpoint(folder / "last.ckpt")
    card = checkpoint.read_card(folder / "best.safetensors")
    assert card is not None
    return {
        **{key: state[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")},
        "steps": (state["epoch"], state["global_step"]),
        "best": checkpoint.load_state(folder / "best.safetensors"),
        "metrics": dict(card.metrics),
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SHORT, undisturbed."""
    return train([*SHORT, f"--output={tmp_path_factory.mktemp('whole')}"])


@pytest.fixture(scope="module")
def undisturbed(whole_run: Path) -> dict[str, Any]:
    """What it learned."""
    return learned(whole_run)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps, counted over all epochs, after which Ctrl-C is pressed."""
    pressed: list[int] = []
    whole = CloudTask.training_step

    def step(task: CloudTask, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if task.global_step + 1 in pressed:
            pressed.remove(task.global_step + 1)  # a step may be of several batches
            os.kill(os.getpid(), signal.SIGINT)
        return whole(task, batch, batch_idx)

    monkeypatch.setattr(CloudTask, "training_step", step)
    return pressed


# order


def test_processes_divide_each_batch_of_one() -> None:
    for size, batch_size, processes in ((40, 4, 2), (41, 4, 3), (47, 8, 2), (12, 4, 3)):
        at = Position(epoch=3)
        alone = list(EpochsSampler(size, batch_size * processes, 5, lambda at=at: at))
        shares = [
            EpochsSampler(size, batch_size, 5, lambda at=at: at, rank=rank, processes=processes)
            for rank in range(processes)
        ]
        assert {len(share) for share in shares} == {len(list(share)) for share in shares}
        batches = torch.stack([torch.tensor(list(share)).view(-1, batch_size) for share in shares])
        assert batches.transpose(0, 1).flatten().tolist() == alone
        assert len(set(alone)) == len(alone) == size - size % (batch_size * processes)
        assert all(n // size == 3 for n in alone)


def test_fewer_clouds_than_a_batch_are_all_seen() -> None:
    for size, processes in ((10, 1), (10, 2), (7, 3)):
        shares = [
            list(EpochsSampler(size, 8, 0, Position, rank=rank, processes=processes))
            for rank in range(processes)
        ]
        assert {len(share) for share in shares} == {-(-size // processes)} or processes == 1
        assert {n for share in shares for n in share} == set(range(size)) or size > 8 * processes


def test_an_epoch_gone_on_with_is_the_rest_of_it() -> None:
    for batch in range(5):
        whole, rest = (
            list(EpochsSampler(40, 4, 1, lambda at=at: at, rank=1, processes=2))
            for at in (Position(2, 0), Position(2, batch))
        )
        assert rest == whole[4 * batch :]


def test_readers_do_not_matter(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    train([*SHORT, f"--output={tmp_path}", "--data.num_workers=2"])
    assert difference(learned(tmp_path), undisturbed) is None


# interrupted


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2])
def test_ctrl_c_keeps_every_step(
    step: int, stopping: list[int], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background job starts with it ignored
    stopping.append(step)
    with pytest.raises(PointcanonError, match=r"^interrupted; go on with: .* --resume$"):
        train([*SHORT, f"--output={tmp_path}"])
    state = StateFile().load_checkpoint(tmp_path / "last.ckpt")
    assert state["global_step"] == step
    train([*SHORT, f"--output={tmp_path}", "--resume"])
    assert difference(learned(tmp_path), undisturbed) is None
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_stops_at_once(
    stopping: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(save: SaveState, *_: object) -> None:
        save.stopping = True
        raise KeyboardInterrupt

    stopping.append(2)
    monkeypatch.setattr(SaveState, "_asked", asked)
    with pytest.raises(PointcanonError, match=r"^interrupted; nothing was kept yet$"):
        train([*SHORT, f"--output={tmp_path}"])


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.val_check_interval=0.5"],
        ["--trainer.accumulate_grad_batches=2"],
        ["--trainer.check_val_every_n_epoch=2"],
        ["--data.num_workers=1"],
    ],
    ids=lambda options: options[0].rpartition(".")[2],
)
@pytest.mark.slow
def test_however_it_is_trained(options: list[str], stopping: list[int], tmp_path: Path) -> None:
    whole = learned(train([*SHORT, *options, f"--output={tmp_path / 'whole'}"]))
    for step in range(1, whole["steps"][1]):
        folder = tmp_path / str(step)
        stopping.append(step)
        with pytest.raises(PointcanonError, match=r"^interrupted; go on"):
            train([*SHORT, *options, f"--output={folder}"])
        train([*SHORT, *options, f"--output={folder}", "--resume"])
        assert difference(learned(folder), whole) is None, f"stopped in step {step}"


def test_patience_is_not_renewed(tmp_path: Path) -> None:
    still = ["--model.learning_rate=1e-12", "--patience=1", "--trainer.max_epochs=9"]
    arguments = [*TINY, "--data.size=32", *still, f"--output={tmp_path}"]
    train(arguments)
    before = learned(tmp_path)
    train([*arguments, "--resume"])
    assert difference(learned(tmp_path), before) is None


# faults


class DiskFull:
    """Lets so many files be written, then has room for half of one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, path: Path, content: bytes, durable: bool) -> None:
        self.count -= 1
        if self.count < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        REPLACE(path, content, durable)


REPLACE = files._replace


@pytest.mark.parametrize("count", [2, 4])
def test_a_full_disk_leaves_what_was_saved(
    count: int, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [*SHORT, f"--output={tmp_path}", "--save_interval=0"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", DiskFull(count))  # the first is config.yaml
        with pytest.raises(DataError, match=r"No space left.*go on with --resume") as caught:
            train(arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*.tmp"))
    train([*arguments, "--resume"])
    assert difference(learned(tmp_path), undisturbed) is None


def test_a_reader_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = ParametricShapes.__getitem__

    def dying(shapes: ParametricShapes, index: int) -> Any:
        if shapes.split == "train" and index == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(shapes, index)

    monkeypatch.setattr(ParametricShapes, "__getitem__", dying)
    with pytest.raises(DataError, match=r"^a process that reads data died .*num_workers") as caught:
        train([*SHORT, f"--output={tmp_path}", "--data.num_workers=1"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_reader_that_dies_is_named_by_every_command(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predictor = pc.predictors.create("pointnet", num_classes=16, widths=(8, 8), embedding=8)
    model = pc.Canonicalized(predictor, pc.canonicalizers.PCA(1))
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "cloud.npy", np.random.default_rng(0).normal(size=(30, 3)))

    def dying(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ParametricShapes, "__getitem__", dying)
    monkeypatch.setattr("pointcanon.cli.clouds.Preparation.__call__", dying)
    given = {
        "predict": [str(tmp_path / "cloud.npy")],
        "eval": ["--data.name", "parametric-shapes", "--protocol", "I/I", "--limit", "4"],
    }
    arguments = [command, str(tmp_path / "model.safetensors"), *given[command], "--device", "cpu"]
    assert main([*arguments, "--num_workers", "1"]) == 1
    assert "a process that reads data died" in capsys.readouterr().err


INTERRUPTED = {
    "predict": "model.safetensors clouds --json found.jsonl --batch_size 2",
    "canonicalize": "model.safetensors clouds --out found --batch_size 2",
    "eval": "model.safetensors --data.name parametric-shapes --protocol I/SO3 --data.num_points 30 "
    "--limit 40 --batch_size 4 --json found",
    "audit": "model.safetensors --data.name parametric-shapes --data.num_points 30 "
    "--limit 40 --batch_size 4 --json found",
    "adapt": "model.safetensors clouds --epochs 3 --batch_size 1 --out found.safetensors",
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_ctrl_c_is_one_line_and_leaves_no_torn_file(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    monkeypatch.setattr(
        "pointcanon.train.adapt.recommended",
        lambda classes: Optimized(PCA(24), 2, classes=classes, **sizes),
    )
    predictor = pc.predictors.create("pointnet", num_classes=16, widths=(8, 8), embedding=8)
    pc.Canonicalized(predictor, PCA(1)).save("model.safetensors")
    Path("clouds").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        np.save(f"clouds/{number:02}.npy", generator.normal(size=(30, 3)))
    asked = 0
    whole = PCA.propose

    def pressed(canonicalizer: PCA, *given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(canonicalizer, *given)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(PCA, "propose", pressed)
            arguments = [command, *INTERRUPTED[command].split(), "--device", "cpu"]
            assert main(arguments) == 1
    finally:
        signal.signal(signal.SIGINT, handler)
    assert asked >= 4
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "pointcanon: interrupted"
    assert not any("Traceback" in line for line in said)
    after = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not [path for path in after if path.name.endswith(".tmp")]
    if command in ("eval", "audit", "adapt"):
        assert after == []


def test_batch_norm_is_not_synchronised_by_torch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sync_batchnorm is not for these networks"):
        train([*SHORT, f"--output={tmp_path}", "--trainer.sync_batchnorm=true"])


class Shell:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_a_damaged_state_is_refused(
    whole_run: Path, undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "last.ckpt"
    good = (whole_run / "last.ckpt").read_bytes()
    flipped = bytearray(good)
    largest = max(undisturbed["state_dict"].values(), key=Tensor.numel).numpy().tobytes()
    flipped[good.index(largest) + 5] ^= 1
    torch.save(Shell(), tmp_path / "shell")
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "zeros")
    with (
        zipfile.ZipFile(tmp_path / "zeros") as sound,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in sound.infolist():
            bomb.writestr(entry.filename, sound.read(entry))
    bad = {
        "bomb": (tmp_path / "bomb").read_bytes(),
        "flipped": bytes(flipped),
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "pickle": pickle.dumps(Shell()),
        "archive": (tmp_path / "shell").read_bytes(),
    }
    for name, content in bad.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged \(.*\): copy") as caught:
            StateFile().load_checkpoint(file)
        assert "\n" not in str(caught.value), name
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged"):
        train([*SHORT, f"--output={tmp_path}", "--resume"])
    assert not (tmp_path / "executed").exists()


# killed


def train_alone(arguments: list[str]) -> None:
    """Train in this process, with readers that end when it does."""
    multiprocessing.set_start_method("fork", force=True)
    train(arguments)


def die_while_writing(nth: int, arguments: list[str]) -> None:
    """Train in this process, which kills itself when half of the nth state is written."""

    def replace(path: Path, content: bytes, durable: bool) -> None:
        if path.name == "last.ckpt" and next(states) == nth:
            path.with_name(f".{path.name}.0.tmp").write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        REPLACE(path, content, durable)

    states = itertools.count(1)
    files._replace = replace
    train_alone(arguments)


def die_some_time_after(nth: int, seconds: float, arguments: list[str]) -> None:
    """Train in this process, which kills itself some time after the nth state, or its start."""

    def replace(path: Path, content: bytes, durable: bool) -> None:
        REPLACE(path, content, durable)
        if path.name == "last.ckpt" and next(states) == nth:
            killer.start()

    states = itertools.count(1)
    killer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    if nth == 0:
        killer.start()
    files._replace = replace
    train_alone(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments_it_ends_in_the_same_weights(workers: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pointcanon.train.run", "torch.utils.tensorboard"])
    arguments = [*TINY, "--data.size=640", f"--data.num_workers={workers}"]
    arguments += ["--trainer.max_epochs=4", "--save_interval=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def in_a_process(work: Callable[..., None], *options: Any) -> int | None:
        process = context.Process(target=work, args=options)
        process.start()
        process.join()
        return process.exitcode

    assert in_a_process(train_alone, [*arguments, f"--output={whole}"]) == 0
    arguments += [f"--output={broken}"]
    state, best = broken / "last.ckpt", broken / "best.safetensors"
    chance = random.Random(workers)
    for kill in range(KILLS):
        now = [*arguments, *(["--resume"] if state.exists() else [])]
        if kill % 3 == 0:
            code = in_a_process(die_while_writing, chance.randint(1, 4), now)
        elif kill % 3 == 1:
            soon = chance.randint(1, 4), 0.03 * chance.random()
            code = in_a_process(die_some_time_after, *soon, now)
        else:
            code = in_a_process(die_some_time_after, 0, 0.3 * chance.random(), now)
        assert code == -signal.SIGKILL, f"it was over before kill {kill}"
        if state.exists():
            StateFile().load_checkpoint(state)
        if best.exists():
            checkpoint.load_state(best)
    assert in_a_process(train_alone, [*arguments, "--resume"]) == 0
    assert difference(learned(broken), learned(whole)) is None
    assert not list(broken.glob(".*.tmp"))
