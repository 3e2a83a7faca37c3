"""When a training ends by itself, what it logs, and a recipe that cannot be read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pointcanon.errors import UsageError
from pointcanon.train.run import train

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
