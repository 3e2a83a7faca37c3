"""When a training ends by itself, what it keeps and logs, and a recipe that cannot be read."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pointcanon.errors import UsageError
from pointcanon.train.callbacks import SaveBest
from pointcanon.train.run import train
from pointcanon.train.task import CloudTask

TINY = [
    "--config=shapes-pointnet",
    "--data.size=64",
    "--data.num_points=48",
    "--data.batch_size=16",
    "--model.predictor_options={embedding: 16, widths: [8, 16]}",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=2",
]


def test_patience_ends_a_training_that_gets_no_better(tmp_path: Path) -> None:
    still = ["--model.learning_rate=1e-12", "--trainer.check_val_every_n_epoch=1"]
    train([*TINY, *still, f"--output={tmp_path}", "--patience=2", "--trainer.max_epochs=9"])
    rows = list(csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open()))
    scores = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    assert len(scores) < 9
    assert len(scores) == scores.index(max(scores)) + 1 + 2


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train([*TINY, f"--output={tmp_path}", "--trainer.max_epochs=1"])
    folder = tmp_path / "logs" / "version_0"
    log = events.EventAccumulator(str(folder))
    log.Reload()
    [event] = log.Scalars("val/accuracy")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    [figure] = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    assert event.value == pytest.approx(figure)


@pytest.mark.parametrize("text", ["data: {name: [", "\tdata:\n", "just a sentence", ""])
def test_a_recipe_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.yaml .*recipe"):
        train(["--config", str(recipe), "--output", str(tmp_path / "run")])


def test_of_equal_scores_the_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = SaveBest(tmp_path, "pointcanon train")
    written: list[float] = []
    monkeypatch.setattr(kept, "_write", lambda task, trainer, metrics: written.append(trainer.step))
    task = Mock(spec=CloudTask, monitor="val/accuracy")
    scores = (0.5, 0.7, 0.6, 0.7, math.nan, 0.69)
    for step, score in enumerate(scores):
        metrics = {"val/accuracy": torch.tensor(score)}
        trainer = Mock(sanity_checking=False, callback_metrics=metrics, step=step)
        kept.on_validation_epoch_end(trainer, task)
    assert written == [0, 1, 3]
    assert kept.state_dict()["best"] == pytest.approx(0.7)
