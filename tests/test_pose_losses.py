"""Recipes that teach poses by other losses: contrastive, matrix Fisher, quotient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pointcanon as pc
from pointcanon import checkpoint, testing
from pointcanon.canonicalizers import Contrastive, Optimized, Orbit, VectorNeuron
from pointcanon.errors import UsageError
from pointcanon.train.run import train

TINY = [
    *("--data.size=48", "--data.num_points=48", "--data.batch_size=16"),
    *("--trainer.max_epochs=1", "--trainer.limit_val_batches=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
SMALL = ["--model.canonicalizer.keep=2", "--model.canonicalizer.scorer_widths=[8,16]"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    classes = tuple(pc.datasets.load("parametric-shapes", None, "test").classes)
    network = pc.predictors.create(
        "pointnet", num_classes=len(classes), widths=(8, 8), embedding=16
    )
    path = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    card = checkpoint.Card(kind="predictor", coordinate_frame="z-up", classes=classes)
    checkpoint.save(path, network, card)
    return path


def _train(recipe: str, predictor: Path, folder: Path, *options: str) -> pc.Canonicalized:
    arguments = ["--config", recipe, "--output", str(folder), f"--model.predictor={predictor}"]
    train([*arguments, *TINY, *options])
    return pc.load(folder / "best.safetensors")


def test_the_optimised_recipe(predictor: Path, tmp_path: Path) -> None:
    model = _train("shapes-pointnet-optimised", predictor, tmp_path)
    assert isinstance(model.canonicalizer, Contrastive)
    frames = model.canonicalizer(testing.generic_clouds(3, 40))
    assert frames.embeddings is not None
    assert frames.embeddings.shape == (3, 24, 64)


def test_the_matrix_fisher_recipe_answers_how_sure_it_is(predictor: Path, tmp_path: Path) -> None:
    options = ["--model.canonicalizer.size=small", "--model.canonicalizer.num_points=32"]
    model = _train("shapes-pointnet-matrix-fisher", predictor, tmp_path, *options)
    assert isinstance(model.canonicalizer, VectorNeuron)
    points = testing.generic_clouds(8, 40)
    sure = model.predict(points).frame_confidence
    assert sure is not None
    assert sure.shape == (8,)
    assert ((sure > 0) & (sure < 1)).all()
    turned = model.predict(points @ pc.rotations.so3_grid(8).mT).frame_confidence
    torch.testing.assert_close(sure, turned)
    assert (
        pc.Canonicalized(model.predictor, VectorNeuron()).predict(points).frame_confidence is None
    )


def test_the_quotient_recipe(predictor: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--model.canonicalizer.proposal.canonicalizer.size=small"]
    model = _train("shapes-pointnet-quotient", predictor, tmp_path, *options)
    assert isinstance(model.canonicalizer, Optimized)
    assert isinstance(model.canonicalizer.proposal, Orbit)
    assert isinstance(model.canonicalizer.proposal.canonicalizer, VectorNeuron)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("contrastive", "contrastive_weight needs a canonicalizer with embeddings"),
        ("matrix_fisher", "orthonormalise: matrix-fisher"),
    ],
)
def test_a_loss_that_does_not_fit_the_canonicalizer_is_named(
    weight: str, words: str, predictor: Path, tmp_path: Path
) -> None:
    options = ["--model.canonicalizer.orthonormalise=svd", f"--model.{weight}_weight=1"]
    with pytest.raises(UsageError, match=words):
        _train("shapes-pointnet-matrix-fisher", predictor, tmp_path, *options)


def test_a_canonicalizer_learns_the_classes(predictor: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--model.canonicalizer.proposal.canonicalizer.size=small"]
    options.append("--model.class_weight=0.3")

    def learn(classes: int) -> pc.Canonicalized:
        told = f"--model.canonicalizer.classes={classes}"
        return _train("shapes-pointnet-quotient", predictor, tmp_path / told, *options, told)

    logits = learn(16).canonicalizer(testing.generic_clouds(3, 40)).class_logits
    assert logits is not None
    assert logits.shape == (3, 16)
    with pytest.raises(UsageError, match=r"learns 16 classes.* this one learns 5: .*classes 16"):
        learn(5)


def test_an_unknown_quotient_is_named(predictor: Path, tmp_path: Path) -> None:
    with pytest.raises(pc.errors.PointcanonError, match="unknown rotation group 'D4'"):
        _train("shapes-pointnet-quotient", predictor, tmp_path, "--model.quotient_group=D4")
