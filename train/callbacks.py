"""What is kept of a training: its best model, as a checkpoint with its card, and its state."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping

from pointcanon import checkpoint
from pointcanon.canonicalizers import Identity
from pointcanon.errors import CheckpointError, DataError
from pointcanon.files import atomic_write
from pointcanon.train.task import CloudTask

__all__ = ["Interrupted", "Patience", "SaveBest", "SaveState", "StateFile"]


class SaveBest(Callback):
    """Write ``best.safetensors`` whenever the validation score is the best: accuracy, or mIoU.

    Of equals the last one is kept, since the learning rate falls.
    Without a canonicalizer that is the predictor, for :func:`pointcanon.predictors.load`; with one
    it is the canonicalized model, for :func:`pointcanon.load`.

    Args:
        folder: Of the file.
        command: The command line of the training, for the card.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.path = folder / "best.safetensors"
        self.command = command
        self.best = -1.0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, CloudTask)
        score = float(trainer.callback_metrics[pl_module.monitor])
        if trainer.sanity_checking or not score >= self.best:
            return
        self.best = score
        self._write(pl_module, trainer, {pl_module.monitor.replace("/", "_"): score})

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.best < 0:  # a training too short to be validated has no better model than the last
            self._write(pl_module, trainer, {})

    def _write(
        self,
        task: lightning.LightningModule,
        trainer: lightning.Trainer,
        metrics: dict[str, float],
    ) -> None:
        if not (trainer.is_global_zero and isinstance(task, CloudTask)):
            return
        known: dict[str, Any] = {
            "coordinate_frame": task.model.coordinate_frame,
            "classes": tuple(task.model.classes or ()),
            "parts": None if task.model.parts is None else tuple(task.model.parts),
            "normalisation": "unit-ball",
            "training_command": self.command,
            "metrics": {**metrics, "epoch": float(trainer.current_epoch)},
        }
        with _saying_what_is_left(self.path):
            if isinstance(task.model.canonicalizer, Identity):
                card = checkpoint.Card(kind="predictor", **known)
                checkpoint.save(self.path, task.model.predictor, card)
            else:
                task.model.save(self.path, **known)


class Interrupted(Exception):
    """A training ended because it was asked to, and its state is kept."""


class SaveState(Checkpoint):
    """Keep the state of the training in one file, from which it goes on as if nothing had been.

    It is written at the end of each epoch, now and then within, and when Ctrl-C or SIGTERM ask to
    stop: after the step that is under way, so that nothing is lost. A second time stops at once.

    Args:
        path: Of the file.
        interval: Seconds between two states within an epoch.

    Raises:
        Interrupted: Once the state is saved after it was asked to stop.
    """

    def __init__(self, path: Path, interval: float) -> None:
        self.path, self.interval = path, interval
        self.saved = time.monotonic()
        self.stopping = False

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # Lightning, which has its own for SIGTERM, puts the former handlers back in the end
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._asked)

    def _asked(self, *_: object) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        # not print, which may be interrupted itself
        os.write(2, b"\nstopping after this step; once more stops at once\n")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if _amid_an_epoch(trainer, batch_idx + 1):
            due = self.stopping or time.monotonic() - self.saved >= self.interval
            self._save(trainer, due)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._save(trainer, True)

    def _save(self, trainer: lightning.Trainer, due: bool) -> None:
        # what one process wants all do, or some would wait for the others for ever
        agreed = trainer.strategy.reduce_boolean_decision
        if agreed(due, all=False):
            trainer.save_checkpoint(self.path, weights_only=False)
            self.saved = time.monotonic()
            if agreed(self.stopping, all=False):
                raise Interrupted


def _amid_an_epoch(trainer: lightning.Trainer, batches: int) -> bool:
    """Whether a training resumed after so many batches of an epoch would do all that is left.

    Gradients that are still gathered would be lost, and so would a validation that comes next.
    """
    every = trainer.val_check_batch
    counted = batches if trainer.check_val_every_n_epoch else trainer.fit_loop.total_batch_idx + 1
    return not (
        batches >= trainer.num_training_batches
        or batches % trainer.accumulate_grad_batches
        or (every and counted % every == 0)
    )


class StateFile(CheckpointIO):
    """Reads and writes the state: the old file or the new, whole, and known to be whole.

    (Lightning writes a file elsewhere and moves it, which is no one step between two disks.)
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with _saying_what_is_left(path):
            atomic_write(path, content.getvalue(), durable=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The state, on the CPU. Nothing in the file is executed.

        Raises:
            CheckpointError: If the file is damaged or holds no state of a training.
        """
        try:
            checkpoint.check_archive(path)
            with zipfile.ZipFile(path) as archive:  # what torch writes; it does not check the sums
                broken = archive.testzip()
            if broken is None:
                return torch.load(path, map_location=map_location, weights_only=True)
            reason = f"the checksum of {broken} does not hold"
        except Exception as error:  # whatever a damaged file leads to
            reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(
            f"{path} is damaged ({reason}): copy it again, or begin anew with another --output"
        )

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


@contextmanager
def _saying_what_is_left(path: str | Path) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(
            f"cannot write {path}: {error.__cause__ or error}; what was saved before is whole: "
            "mend that and go on with --resume"
        ) from error


class Patience(EarlyStopping):
    """Early stopping that a resumed training remembers to have had enough."""

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience
