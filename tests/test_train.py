"""Training: every recipe, what is kept, resuming, and what a user sees when something is wrong."""

from __future__ import annotations

import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pointcanon as pc
from pointcanon import checkpoint, datasets
from pointcanon.cli import main
from pointcanon.datasets.collate import collate
from pointcanon.errors import PointcanonError, UsageError
from pointcanon.eval.protocols import random_pose
from pointcanon.train.run import find_recipe, recipes, train
from pointcanon.train.task import CloudTask, _turned

TINY = [
    "--data.size=64",
    "--data.num_points=48",
    "--data.batch_size=16",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=2",
]
TINY_POINTNET = [*TINY, "--model.predictor_options={embedding: 16, widths: [8, 16]}"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PointNet trained for one epoch on a handful of shapes."""
    folder = tmp_path_factory.mktemp("predictor")
    return _train("shapes-pointnet", folder, *TINY_POINTNET) / "best.safetensors"


def _train(recipe: str, folder: Path, *options: str, epochs: int = 1) -> Path:
    return train(
        [
            *("--config", recipe, "--output", str(folder)),
            f"--trainer.max_epochs={epochs}",
            *options,
        ]
    )


def test_a_predictor_recipe_writes_a_predictor(predictor: Path) -> None:
    card = checkpoint.read_card(predictor)
    assert card is not None
    assert (card.kind, card.coordinate_frame) == ("predictor", "z-up")
    assert "shapes-pointnet" in (card.training_command or "")
    assert pc.predictors.load(predictor)(torch.randn(2, 30, 3)).shape == (2, len(card.classes))
    folder = predictor.parent
    assert {p.name for p in folder.iterdir()} >= {"best.safetensors", "last.ckpt", "config.yaml"}
    rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open()))
    assert any(row["val/accuracy"] for row in rows)


CANONICALIZERS = [r for r in recipes() if "-canonicalizer" in r and "parts" not in r]


STARTED = [
    "--config=shapes-pointnet-canonicalizer",
    *TINY,
    "--model.start=parametric-shapes",
    "--model.canonicalizer.refiner_widths=[64,128,256]",
]


def test_a_training_begins_with_the_weights_it_is_given(predictor: Path, tmp_path: Path) -> None:
    options = [*STARTED, f"--output={tmp_path}", f"--model.predictor={predictor}"]
    train([*options, "--trainer.max_epochs=1", "--model.learning_rate=0"])
    trained = pc.load(tmp_path / "best.safetensors").canonicalizer.state_dict()
    start = pc.canonicalizers.load("parametric-shapes").state_dict()
    assert all(torch.equal(start[key], trained[key]) for key in start)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.start=nothing.safetensors", "nothing.safetensors is neither a file nor"),
        ("--model.start=modelnet40", "start modelnet40 was trained on clouds in y-up-mirrored"),
        ("--model.canonicalizer=PCA", "holds Optimized and the canonicalizer .* is PCA"),
        ("--model.canonicalizer.scorer_hidden=32", "of start parametric-shapes do not fit"),
    ],
)
def test_weights_that_will_not_do_to_begin_with_are_refused(
    option: str, message: str, predictor: Path, tmp_path: Path
) -> None:
    options = [*STARTED, f"--output={tmp_path}", f"--model.predictor={predictor}", option]
    with pytest.raises(PointcanonError, match=message):
        train(options)


@pytest.mark.parametrize("name", CANONICALIZERS)
def test_a_canonicalizer_recipe_leaves_the_predictor_as_it_was(
    name: str, predictor: Path, tmp_path: Path
) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--trainer.check_val_every_n_epoch=1"]
    options += ["--data.name=parametric-shapes", "--model.canonicalizer.keep=2"]
    options += ["--model.canonicalizer.classes=16"]
    folder = _train(name, tmp_path, *options)
    model = pc.load(folder / "best.safetensors")
    before = pc.predictors.load(predictor).state_dict()
    after = model.predictor.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fresh = pc.canonicalizers.Optimized(
        **{**model.canonicalizer.hyperparameters, "proposal": None}  # type: ignore[arg-type]
    )
    learned, initial = (c.scorer.features.peak.weight for c in (model.canonicalizer, fresh))  # type: ignore[union-attr]
    assert not torch.equal(learned, initial)


def test_a_canonicalizer_is_chosen_by_its_name(predictor: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--model.canonicalizer=VectorNeuron"]
    options += [
        "--model.canonicalizer.k=4",
        "--model.refinement_weight=0",
        "--model.class_weight=0",
        "--model.vote=certainty",
    ]
    folder = _train("shapes-pointnet-canonicalizer", tmp_path, *options)
    model = pc.load(folder / "best.safetensors")
    assert isinstance(model.canonicalizer, pc.canonicalizers.VectorNeuron)


def test_how_far_away_a_refiner_begins(predictor: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--data.name=parametric-shapes"]
    with pytest.raises(UsageError, match=r"refinement_spread is 200.*degrees in \(0, 180\]"):
        _train("shapes-pointnet-canonicalizer", tmp_path, *options, "--model.refinement_spread=200")
    learned = []
    for spread in (5, 60):
        folder = tmp_path / str(spread)
        options = [*options, f"--model.refinement_spread={spread}", "--model.canonicalizer.keep=2"]
        weights = pc.load(
            _train("shapes-pointnet-canonicalizer", folder, *options) / "best.safetensors"
        )
        learned.append(weights.canonicalizer.refiner.features.peak.weight)  # type: ignore[union-attr]
    assert not torch.equal(*learned)


def test_a_vote_that_heeds_nobody_is_refused(predictor: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--model.class_weight=0"]
    with pytest.raises(UsageError, match=r"vote agreement heeds .* class_weight is 0.*certainty"):
        _train("shapes-pointnet-canonicalizer", tmp_path, *options)


POINTNET = """
        class_path: pointcanon.predictors.PointNet
        init_args: {num_classes: 8, widths: [8, 8], embedding: 8}"""

BY_NAME = {
    "Identity": "{}",
    "PCA": "{poses: 4, weighting: smooth}",
    "Manhattan": "{poses: 1, k: 6}",
    "VectorNeuron": "{k: 4, orthonormalise: svd}",
    "Steerable": "{channels: 4, layers: 1, k: 8, num_points: 24}",
    "Union": """
      parts:
      - class_path: pointcanon.canonicalizers.PCA
      - class_path: pointcanon.canonicalizers.Manhattan""",
    "Orbit": """
      canonicalizer: {class_path: pointcanon.canonicalizers.PCA, init_args: {poses: 1}}
      group: C2
      axis: [0, 0, 1]""",
    "Optimized": "{keep: 2, scorer_widths: [8, 8], refiner_widths: [8, 8]}",
    "Contrastive": f"""
      proposal: {{class_path: pointcanon.canonicalizers.PCA, init_args: {{poses: 4}}}}
      network:{POINTNET}""",
    "ForGroup": """
      canonicalizer: {class_path: pointcanon.canonicalizers.PCA, init_args: {poses: 1}}
      group: SO2
      axis: 2
      scale: true""",
}
"""Each canonicalizer, as a recipe writes it."""


def test_every_canonicalizer_has_been_written_down() -> None:
    # Search is the one that no training runs, and says so
    assert {*BY_NAME, "Search"} == set(pc.canonicalizers.CANONICALIZERS)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_recipe_trains_before_any_canonicalizer(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""\
model:
  predictor: pointnet
  predictor_options: {{embedding: 8, widths: [8, 8]}}
  trained: joint
  canonicalizer:
    class_path: pointcanon.canonicalizers.{name}
    init_args: {BY_NAME[name]}
  prior: {{class_path: pointcanon.priors.Aligned}}
"""
    )
    options = [*TINY, "--data.name=parametric-shapes", "--trainer.limit_train_batches=1"]
    folder = _train(str(recipe), tmp_path / "run", *options)
    if name == "Identity":  # what is kept is a predictor
        assert pc.predictors.load(folder / "best.safetensors").classes
        return
    model = pc.load(folder / "best.safetensors")
    assert type(model.canonicalizer) is pc.canonicalizers.CANONICALIZERS[name]
    assert model(torch.randn(2, 30, 3)).isfinite().all()


def test_a_joint_recipe_trains_both(tmp_path: Path) -> None:
    folder = _train("shapes-pointnet-joint", tmp_path, *TINY_POINTNET)
    assert pc.load(folder / "best.safetensors").classes


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_what_it_does(name: str) -> None:
    assert find_recipe(name).read_text().startswith("# ")


def test_resuming_repeats_the_undisturbed_run(
    predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--model.canonicalizer.keep=2"]
    recipe = "shapes-pointnet-canonicalizer"
    whole = _train(recipe, tmp_path / "whole", *options, epochs=3)

    def power_cut(task: CloudTask) -> None:
        if task.current_epoch == 1:
            raise RuntimeError("power cut")

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(CloudTask, "on_train_epoch_start", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            _train(recipe, stopped, *options, epochs=3)
    _train(recipe, stopped, *options, "--resume", epochs=3)
    first, second = (
        torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
        for folder in (whole, stopped)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((stopped / "logs").iterdir())) == 2  # the first run's figures are still there


def test_mixed_precision_trains_the_recommended_recipe(predictor: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--trainer.precision=bf16-mixed"]
    folder = _train("shapes-pointnet-canonicalizer", tmp_path, *options)
    assert all(
        v.isfinite().all() for v in checkpoint.load_state(folder / "best.safetensors").values()
    )


def test_a_predictor_behind_a_canonicalizer_is_kept_with_it(tmp_path: Path) -> None:
    folder = _train("shapes-pointnet", tmp_path, *TINY_POINTNET, "--model.canonicalizer=PCA")
    assert isinstance(pc.load(folder / "best.safetensors").canonicalizer, pc.canonicalizers.PCA)


def test_a_training_too_short_to_be_validated_is_kept(tmp_path: Path) -> None:
    options = [*TINY_POINTNET, "--trainer.check_val_every_n_epoch=5"]
    folder = _train("shapes-pointnet", tmp_path, *options)
    assert {"best.safetensors", "last.ckpt"} <= {path.name for path in folder.iterdir()}


def test_the_kept_configuration_resumes_its_own_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightning, "handlers", [caplog.handler])
    folder = _train("shapes-pointnet", tmp_path, *TINY_POINTNET)
    before = (folder / "last.ckpt").read_bytes()
    config = str(folder / "config.yaml")
    assert train(["--config", config, "--resume", "--trainer.max_epochs=2"]) == folder
    assert (folder / "last.ckpt").read_bytes() != before
    assert "Restor" in caplog.text  # Lightning is heard, but not on what we have decided
    assert "weights_only" not in caplog.text


def test_an_upright_prior_under_z(predictor: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--model.predictor={predictor}", "--model.protocol=z/SO3"]
    options += ["--model.prior=Upright", "--model.prior.axis=2", "--model.canonicalizer.keep=2"]
    assert pc.load(_train("shapes-pointnet-canonicalizer", tmp_path, *options) / "best.safetensors")


@pytest.mark.parametrize("name", ["VectorNeuron", "Optimized"])
def test_poses_in_training_do_not_matter_to_an_equivariant_canonicalizer(
    name: str, predictor: Path
) -> None:
    """The loss speaks of the pose relative to the turn, so I/SO3, z/SO3 and SO3/SO3 are one."""
    clouds = datasets.ParametricShapes("train", num_points=48, size=16)
    batch = collate([clouds[i] for i in range(16)])
    losses = []
    for protocol in ("I/SO3", "z/SO3", "SO3/SO3"):
        torch.manual_seed(0)
        task = CloudTask(
            str(predictor),
            pc.canonicalizers.CANONICALIZERS[name](),
            prior=pc.priors.Aligned(50.0),
            task_weight=0.1,
            protocol=protocol,
            dataset=clouds,
        )
        turn = random_pose(task.protocol.train, 16, task.up_axis, torch.Generator().manual_seed(1))
        task.eval()  # bfloat16 and random parts of the points are for learning
        losses.append(task._loss(_turned(batch, turn), turn).item())
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-3)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pointcanon", "train", "--config", "shapes-pointnet"),
            *("--output", str(tmp_path / "run"), "--trainer.max_epochs=2", *TINY_POINTNET),
            *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = [
        checkpoint.load_state(
            _train("shapes-pointnet", tmp_path / name, *TINY_POINTNET, f"--seed_everything={seed}")
            / "best.safetensors"
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    key = next(key for key in states[0] if key.endswith("weight"))
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--config", "nothing"], 2, "the recipes are"),
        ([], 2, "name a recipe"),
        (["--config", "shapes-pointnet", "--model.protocol", "z/up"], 2, "unknown protocol"),
        (["--config", "shapes-pointnet", "--model.predictor", "pointnot"], 2, "neither a file"),
        (["--config", "shapes-pointnet-canonicalizer", "--model.predictor", "dgcnn"], 2, "FILE"),
        (["--config", "shapes-pointnet", "--model.augmentation", "x"], 2, "unknown augmentation"),
        (["--config", "modelnet40-pointnet", "--data.root", "missing"], 1, "missing"),
    ],
)
def test_bad_usage_is_one_clear_line(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == status
    error = capsys.readouterr().err
    line = [text for text in error.splitlines() if text.startswith("pointcanon: ")]
    assert len(line) == 1
    assert words in line[0]
    assert "Traceback" not in error


def test_a_checkpoint_in_another_frame_is_refused(
    predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "shapes-pointnet-canonicalizer", "--output", str(tmp_path)]
    arguments += [*TINY, f"--model.predictor={predictor}", "--data.coordinate_frame=y-up-mirrored"]
    assert main(["train", *arguments]) == 1
    assert "--data.coordinate_frame z-up" in capsys.readouterr().err


def test_a_training_is_never_overwritten(
    predictor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "shapes-pointnet", "--output", str(predictor.parent), *TINY_POINTNET]
    assert main(["train", *arguments]) == 2
    assert "--resume" in capsys.readouterr().err
