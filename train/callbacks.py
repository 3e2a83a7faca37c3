"""What is kept of a training: the best model on validation, as a checkpoint with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from pointcanon import checkpoint
from pointcanon.canonicalizers import Identity
from pointcanon.train.task import CloudTask

__all__ = ["SaveBest"]


class SaveBest(Callback):
    """Write ``best.safetensors`` whenever the validation score rises: accuracy, or instance mIoU.

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
        if trainer.sanity_checking or score <= self.best:
            return
        self.best = score
        self._write(pl_module, trainer, {pl_module.monitor.replace("/", "_"): score})

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
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
            "normalisation": "unit-ball",
            "training_command": self.command,
            "metrics": {**metrics, "epoch": float(trainer.current_epoch)},
        }
        if isinstance(task.model.canonicalizer, Identity):
            card = checkpoint.Card(kind="predictor", **known)
            checkpoint.save(self.path, task.model.predictor, card)
        else:
            task.model.save(self.path, **known)
