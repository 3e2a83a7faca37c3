"""Part segmentation end to end: models, training, evaluation, the command line.

A cloud is a box; its class says along which axis it is cut into parts, and the predictor knows
both. Four marked points tell the canonicalizer the pose exactly, so figures follow by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_rna import write_rna
from test_shapenet_part import write_txt
from torch import Tensor, nn

import pointcanon as pc
from pointcanon import checkpoint, predictors, rotations, testing
from pointcanon.canonicalizers import PCA, Canonicalizer, Identity
from pointcanon.cli import main
from pointcanon.coordinates import coordinate_frame
from pointcanon.datasets import UNLABELLED, CloudItem, PartDataset
from pointcanon.errors import CheckpointError, InputError, UsageError
from pointcanon.eval.evaluate import AGAIN_SEED, check_fit, evaluate
from pointcanon.eval.protocols import pose_rotations
from pointcanon.eval.report import render, to_json
from pointcanon.frames import Frames
from pointcanon.model import Canonicalized
from pointcanon.predictors import PartPredictor
from pointcanon.train.run import recipes, train
from pointcanon.train.task import CloudTask, find_predictor

CLASSES = ("slab", "stack")
PARTS = ("slab/left", "slab/right", "stack/low", "stack/middle", "stack/high")
RANGES = (range(2), range(2, 5))


def truth_of(points: Tensor, category: int) -> Tensor:
    """Slabs are cut in two across x, stacks in three across z."""
    if category == 0:
        return (points[..., 0] > 0.1).long()
    return 2 + (points[..., 2] > -0.2).long() + (points[..., 2] > 0.2).long()


class Cutter(PartPredictor):
    """The truth of a cloud in its own pose, as logits; its favourite is a part of no slab."""

    num_parts, num_categories = len(PARTS), len(CLASSES)

    def __init__(self, favourite: float = 0.0) -> None:
        super().__init__()
        self.favourite = favourite
        self.sizes: list[tuple[int, ...]] = []

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"favourite": self.favourite}

    def predict(
        self, points: Tensor, mask: Tensor | None, normals: Tensor | None, category: Tensor | None
    ) -> Tensor:
        assert category is not None
        self.sizes.append(tuple(points.shape))
        both = torch.stack([truth_of(points, label) for label in range(2)], dim=1)
        truth = (both * category[..., None].long()).sum(dim=1)
        logits = 4.0 * nn.functional.one_hot(truth, len(PARTS)).to(points)
        logits[..., 4] += self.favourite
        return logits + 0.5 * points[..., :1].sin()  # and a little of the pose


class Marked(Canonicalizer):
    """The pose, read off the marked points: exactly equivariant."""

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        vectors = torch.stack((points[:, 0] - points[:, 1], points[:, 2] - points[:, 3]), dim=-1)
        return Frames.of(rotations.gram_schmidt(vectors))


class Boxes:
    """Marked boxes, of one size or of several."""

    name, split = "Boxes", "test"
    parts, part_ranges = PARTS, RANGES
    coordinate_frame = coordinate_frame("z-up")

    def __init__(self, labels: list[int], sizes: tuple[int, ...] = (60,)) -> None:
        self.classes = list(CLASSES)
        self.labels = np.array(labels, dtype=np.int64)
        self.sizes = sizes
        self.mislabelled: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> CloudItem:
        label = int(self.labels[index])
        points = self.points(index)
        parts = truth_of(points, label)
        parts[4 : 4 + self.mislabelled.get(index, 0)] = RANGES[label].start
        return {"points": points, "label": label, "index": index, "parts": parts}

    def points(self, index: int) -> Tensor:
        """Symmetric about the origin, so that the centroid is there whatever the sample."""
        generator = torch.Generator().manual_seed(index)
        size = self.sizes[index % len(self.sizes)]
        half = 2 * torch.rand(size // 2 - 2, 3, generator=generator) - 1
        marks = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
        return torch.cat((marks, half, -half))


def part_network(**options: Any) -> predictors.PointNetParts:
    torch.manual_seed(0)
    small: dict[str, Any] = {"transforms": False, "widths": (8, 8), "embedding": 16, "head": (16,)}
    network = predictors.PointNetParts(len(PARTS), num_categories=2, **{**small, **options}).eval()
    nn.init.normal_(network.logits.weight, std=3.0)  # so that a changed vote would show
    return network


# the model


@pytest.mark.parametrize("vote", ["probabilities", "mean"])
def test_points_keep_their_outputs_in_every_pose_and_order(vote: Any) -> None:
    points = testing.generic_clouds(12, 40, dtype=torch.float64)
    category = torch.arange(12) % 2
    model = Canonicalized(part_network().double(), PCA(4), vote).eval()
    outputs = model(points, category=category)
    assert outputs.shape == (12, 40, len(PARTS))
    turn = rotations.random_rotations(12, dtype=torch.float64)
    torch.testing.assert_close(model(points @ turn.mT + 3, category=category), outputs)
    order = torch.randperm(40)
    torch.testing.assert_close(model(points[:, order], category=category), outputs[:, order])
    assert (model(points, category=1 - category) - outputs).abs().max() > 1e-3


def test_frames_vote_at_each_point() -> None:
    points = testing.generic_clouds(3, 20, dtype=torch.float64)
    category = torch.tensor([0, 1, 0])
    model = Canonicalized(part_network().double(), PCA(4), "probabilities").eval()
    posed = model.canonicalizer(points).apply(points)
    each = [model.predictor(posed[:, k], category=category).softmax(-1) for k in range(4)]
    torch.testing.assert_close(
        model(points, category=category).softmax(-1), torch.stack(each).mean(0)
    )
    assert (each[0] - each[1]).abs().max() > 1e-3


def test_padding_and_normals_in_parts() -> None:
    points = testing.generic_clouds(4, 40, dtype=torch.float64)
    normals = nn.functional.normalize(points.flip(1) - 1, dim=-1)
    mask = (torch.arange(40) < 30).expand(4, 40)
    category = torch.tensor([0, 1, 1, 0])
    model = Canonicalized(part_network(normals=True).double(), PCA(4)).eval()
    outputs = model(torch.where(mask[..., None], points, torch.nan), mask, normals, category)
    alone = model(points[:, :30], None, normals[:, :30], category)
    torch.testing.assert_close(outputs[:, :30], alone)
    turn = rotations.random_rotations(4, dtype=torch.float64)
    turned = model(points[:, :30] @ turn.mT, None, normals[:, :30] @ turn.mT, category)
    torch.testing.assert_close(turned, alone)


def test_a_prediction_labels_every_point() -> None:
    points = testing.generic_clouds(3, 20)
    model = Canonicalized(part_network(), PCA(4)).train()
    answer = model.predict(points, category=torch.tensor([0, 1, 0]))
    assert answer.labels.shape == answer.confidence.shape == (3, 20)
    assert answer.probabilities.shape == (3, 20, len(PARTS))
    assert answer.rotation.shape == (3, 3, 3)
    torch.testing.assert_close(answer.probabilities.amax(-1), answer.confidence)
    assert torch.equal(answer.probabilities.argmax(-1), answer.labels)
    assert model.training


def test_a_large_cloud_is_seen_in_shares_in_the_pose_of_the_whole() -> None:
    boxes = Boxes([1, 0], sizes=(100, 60))
    points = torch.zeros(2, 100, 3)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    for row in range(2):
        cloud = boxes.points(row)
        points[row, : len(cloud)], mask[row, : len(cloud)] = cloud, True
    category = torch.tensor([1, 0])
    turn = rotations.random_rotations(2)
    predictor = Cutter()
    model = Canonicalized(predictor, Marked())
    answer = model.predict(points @ turn.mT, mask, None, category, max_points=32)
    # dealt out as evenly as can be: 100 points in four shares, 60 in two
    assert predictor.sizes == [(1, 25, 3)] * 4 + [(1, 30, 3)] * 2
    for row in range(2):
        truth = truth_of(boxes.points(row), int(category[row]))
        assert torch.equal(answer.labels[row][mask[row]], truth)
    whole = model.predict(points @ turn.mT, mask, None, category)
    torch.testing.assert_close(answer.probabilities[mask], whole.probabilities[mask])


def test_a_hundred_thousand_points_in_bounded_shares() -> None:
    points = testing.generic_clouds(1, 100_000)
    seen: list[int] = []
    network = part_network()
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    model = Canonicalized(network, PCA(1))
    answer = model.predict(points, category=torch.tensor([1]), max_points=4096)
    assert answer.labels.shape == (1, 100_000)
    assert max(seen) <= 4096
    frames = model.canonicalizer(points)
    share = slice(3, None, 25)
    expected = network(frames.apply(points)[:, 0, share], category=torch.tensor([1]))
    torch.testing.assert_close(answer.probabilities[:, share], expected.softmax(-1))


def test_shares_are_for_part_networks() -> None:
    points = testing.generic_clouds(1, 40)
    with pytest.raises(InputError, match="max_points is 0"):
        Canonicalized(part_network(), PCA(1)).predict(
            points, category=torch.tensor([0]), max_points=0
        )
    classifier = predictors.PointNet(2, widths=(8,), embedding=8)
    with pytest.raises(InputError, match="PointNet gives each cloud one answer"):
        Canonicalized(classifier, PCA(1)).predict(points, max_points=20)


def test_a_part_model_survives_a_file(tmp_path: Path) -> None:
    points, category = testing.generic_clouds(2, 30), torch.tensor([0, 1])
    model = Canonicalized(part_network(), PCA(4)).eval()
    model.save(tmp_path / "parts.safetensors", classes=CLASSES)
    again = pc.load(tmp_path / "parts.safetensors")
    assert again.segments
    assert torch.equal(again(points, category=category), model(points, category=category))


# evaluation


def test_figures_by_hand() -> None:
    boxes = Boxes([0, 0, 0, 1])
    boxes.mislabelled = {1: 20, 3: 10}
    found = evaluate(Canonicalized(Cutter(), Marked()), boxes, "I/SO3", batch_size=3)
    assert isinstance(boxes, PartDataset)
    iou, right, points = [], 0, 0
    for index in range(4):
        item = boxes[index]
        predicted, truth = truth_of(item["points"], item["label"]), item["parts"]
        shares = []
        for part in RANGES[item["label"]]:
            union = ((predicted == part) | (truth == part)).sum()
            shares.append(float(((predicted == part) & (truth == part)).sum() / union))
        iou.append(sum(shares) / len(shares))
        right, points = right + int((predicted == truth).sum()), points + len(truth)
    for scores in (found.trials.aligned, *found.trials.turned):
        assert scores.instance_miou == pytest.approx(sum(iou) / 4)
        assert scores.class_miou == pytest.approx((sum(iou[:3]) / 3 + iou[3]) / 2)
        assert scores.per_class == pytest.approx({"slab": sum(iou[:3]) / 3, "stack": iou[3]})
        assert scores.point_accuracy == pytest.approx(right / points)
    assert iou[1] < 1
    assert found.invariance is not None
    assert found.invariance.prediction_flip_rate == 0
    assert found.invariance.rotation_error_deg is not None
    assert found.invariance.rotation_error_deg.max < 1e-3
    assert found.bare is not None
    assert found.bare.mean.instance_miou < found.trials.mean.instance_miou
    assert found.aligned_tax() == pytest.approx(0)


def test_flips_are_counted_over_points() -> None:
    boxes = Boxes([0, 1, 1])
    found = evaluate(Canonicalized(Cutter(), Identity()), boxes, "I/SO3", seeds=(4,), batch_size=2)
    up = boxes.coordinate_frame.up_axis
    once = pose_rotations("SO3", 3, up, seed=4, dtype=torch.float64)
    again = pose_rotations("SO3", 3, up, seed=AGAIN_SEED, dtype=torch.float64) @ once
    flips = []
    for index, label in enumerate(boxes.labels):
        points = boxes.points(index).double()
        first, second = (truth_of(points @ turn[index].mT, int(label)) for turn in (once, again))
        flips.append(first != second)
    assert found.invariance is not None
    assert found.invariance.prediction_flip_rate == pytest.approx(
        torch.cat(flips).double().mean().item()
    )


def test_parts_of_the_class_or_of_all() -> None:
    boxes, model = Boxes([0, 1]), Canonicalized(Cutter(favourite=9.0), Marked())
    own = evaluate(model, boxes, "I/I")
    every = evaluate(model, boxes, "I/I", restricted=False)
    assert (own.restricted, every.restricted) == (True, False)
    assert own.trials.aligned.per_class["slab"] == 1
    assert every.trials.aligned.per_class["slab"] == 0
    assert every.trials.aligned.per_class["stack"] == own.trials.aligned.per_class["stack"] < 1


def test_clouds_of_several_sizes_and_shares_change_nothing() -> None:
    model = Canonicalized(Cutter(), Marked())
    boxes = Boxes([0, 1, 1, 0, 1], sizes=(60, 40, 90))
    alone, together, shared = (
        evaluate(model, boxes, "I/SO3", seeds=(0,), batch_size=size, max_points=most)
        for size, most in ((1, None), (5, None), (2, 32))
    )
    assert alone.num_points is together.num_points is None
    for found in (together, shared):
        for one, other in zip(alone.trials.turned, found.trials.turned, strict=True):
            assert other.figures == pytest.approx(one.figures)


def test_the_report_of_parts() -> None:
    from io import StringIO

    from rich.console import Console

    found = evaluate(Canonicalized(Cutter(), Marked()), Boxes([0, 0, 1]), "I/SO3", seeds=(0, 1))
    report = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert set(report["metrics"]) >= {"instance_miou", "class_miou", "per_class"}
    assert report["metrics"]["per_class"] == {"slab": 1, "stack": 1}
    assert report["aligned"]["instance_miou"] == 1
    assert set(report["invariance"]) == {"prediction_flip_rate", "rotation_error_deg"}
    assert [trial["seed"] for trial in report["per_seed"]] == [0, 1]
    assert report["restricted"] is True
    console = Console(width=120, record=True, file=StringIO())
    render(found, console)
    text = console.export_text()
    for words in ("instance mIoU", "class mIoU", "mIoU % by class", "stack", "behind Marked"):
        assert words in text


def test_a_class_without_clouds_is_null() -> None:
    found = evaluate(Canonicalized(Cutter(), Marked()), Boxes([0, 0]), "I/I")
    assert found.trials.aligned.per_class == {"slab": 1.0, "stack": None}
    assert found.trials.aligned.class_miou == 1


def test_data_that_do_not_fit_are_refused() -> None:
    boxes = Boxes([0, 1])
    plain = SimpleNamespace(name="Plain", classes=list(CLASSES), coordinate_frame="z-up")
    with pytest.raises(CheckpointError, match="labels parts, and Plain has none"):
        check_fit(Cutter(), plain)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="7 outputs, Boxes has 5 parts"):
        check_fit(predictors.PointNetParts(7, num_categories=2), boxes)
    with pytest.raises(CheckpointError, match="16 categories, Boxes has 2 classes"):
        check_fit(Canonicalized(predictors.PointNetParts(5), Identity()), boxes)
    boxes.normals = False  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"--data\.normals true"):
        check_fit(part_network(normals=True), boxes)
    with pytest.raises(InputError, match="max_points is for part networks"):
        evaluate(predictors.PointNet(2), boxes, "I/I", max_points=9)


def test_a_part_network_that_answers_nan_is_named() -> None:
    class Broken(Cutter):
        def predict(self, points: Tensor, *rest: Any) -> Tensor:
            logits = super().predict(points, *rest)
            return torch.where(points[..., :1] > 0.999, torch.nan, logits)

    with pytest.raises(InputError, match="NaN or infinity for cloud 0"):
        evaluate(Broken(), Boxes([0, 1]), "I/I")

    class BrokenForSome(Cutter):
        def predict(self, points: Tensor, *rest: Any) -> Tensor:
            category = rest[-1]
            return super().predict(points, *rest) + torch.where(category[:, :1] > 0, 0, torch.nan)

    with pytest.raises(InputError, match="NaN or infinity for cloud 1"):
        evaluate(BrokenForSome(), Boxes([0, 1]), "I/I", max_points=30)


# training


TINY = [
    *("--data.batch_size=16", "--trainer.max_epochs=1", "--trainer.limit_val_batches=2"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    "--trainer.check_val_every_n_epoch=1",
]
SHAPES = [*TINY, "--data.size=32", "--data.num_points=48"]
SMALL = "--model.predictor_options={transforms: false, widths: [8, 16], embedding: 16, head: [16]}"
DGCNN = "--model.predictor_options={k: 6, embedding: 16}"
POINTNET2 = "--model.predictor_options={scales: ssg}"
SMALL_NORMALS = SMALL[:-1] + ", normals: true}"


def _train(recipe: str, folder: Path, *options: str) -> Path:
    return train(["--config", recipe, "--output", str(folder), *options]) / "best.safetensors"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part network of the parametric shapes, trained for one epoch."""
    return _train("shapes-pointnet-parts", tmp_path_factory.mktemp("parts"), *SHAPES, SMALL)


@pytest.fixture(scope="module")
def shapenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_txt(tmp_path_factory.mktemp("shapenet"))


def test_a_part_recipe_writes_a_part_predictor(parts: Path) -> None:
    card = checkpoint.read_card(parts)
    assert card is not None
    assert card.kind == "predictor"
    assert "val_instance_miou" in card.metrics
    network = pc.predictors.load(parts)
    assert isinstance(network, PartPredictor)
    assert network.num_categories == len(card.classes or ()) == 16
    assert "val/instance_miou" in (parts.parent / "logs/version_0/metrics.csv").read_text()


def test_a_canonicalizer_for_a_frozen_part_network(parts: Path, tmp_path: Path) -> None:
    options = [*SHAPES, f"--model.predictor={parts}", "--model.canonicalizer.keep=2"]
    model = pc.load(_train("shapes-pointnet-parts-canonicalizer", tmp_path, *options))
    before = pc.predictors.load(parts).state_dict()
    after = model.predictor.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("protocol", ["z/z", "z/SO3", "SO3/SO3", "I/SO3"])
def test_joint_training_by_the_labels_of_the_points_alone(protocol: str, tmp_path: Path) -> None:
    options = [*SHAPES, SMALL, "--model.trained=joint", f"--model.protocol={protocol}"]
    options += ["--model.canonicalizer=VectorNeuron", "--model.canonicalizer.k=4"]
    model = pc.load(_train("shapes-pointnet-parts", tmp_path, *options))
    assert model.segments
    assert isinstance(model.canonicalizer, pc.canonicalizers.VectorNeuron)


def test_the_gradient_of_the_points_reaches_the_canonicalizer() -> None:
    shapes = pc.datasets.load("parametric-shapes", None, "train", num_points=32, size=4)
    vector_neuron = pc.canonicalizers.VectorNeuron(k=4)
    small = {"transforms": False, "widths": [8], "embedding": 8, "head": [8]}
    task = CloudTask(
        "pointnet-parts", vector_neuron, "joint", predictor_options=small, dataset=shapes
    )
    batch = pc.datasets.collate.collate([shapes[i] for i in range(4)])
    loss = task._loss(batch, torch.eye(3).expand(4, 3, 3))
    loss.backward()
    gradients = [weight.grad for weight in vector_neuron.parameters() if weight.grad is not None]
    assert any(gradient.any() for gradient in gradients)
    # unlabelled points and padding count for nothing
    longer = {key: torch.cat((batch[key], batch[key][:, :5]), 1) for key in ("points", "parts")}
    mask = (torch.arange(37) < 32).expand(4, 37)
    longer["parts"] = longer["parts"].masked_fill(~mask, UNLABELLED)
    padded = {**batch, **longer, "mask": mask}
    task.eval()
    expected = task._loss(batch, torch.eye(3).expand(4, 3, 3))
    torch.testing.assert_close(task._loss(padded, torch.eye(3).expand(4, 3, 3)), expected)


def test_rna_behind_its_principal_axes(tmp_path: Path) -> None:
    root = write_rna(tmp_path / "rna")
    options = [*TINY, f"--data.root={root}", "--data.num_points=30", "--data.batch_size=6", SMALL]
    file = _train("rna-pointnet-parts-pca", tmp_path / "run", *options)
    model = pc.load(file)
    assert isinstance(model.canonicalizer, PCA)
    assert isinstance(model.predictor, PartPredictor)
    assert (model.predictor.num_parts, model.predictor.num_categories) == (3, 0)
    report, pictures = tmp_path / "report.json", tmp_path / "pictures"
    arguments = [str(file), "--data.name=rna", f"--data.root={root}", "--data.num_points=30"]
    arguments += ["--protocol=I/SO3", f"--json={report}", f"--pictures={pictures}"]
    assert main(["eval", *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["metrics"]["point_accuracy"] == pytest.approx(found["aligned"]["point_accuracy"])
    assert found["metrics"]["per_class"].keys() == {"5S rRNA"}
    assert found["n"] == (pictures / "report.html").read_text().count('class="scene"') == 5


def test_all_points_with_normals_drawn_anew(shapenet: Path, tmp_path: Path) -> None:
    options = [*TINY, f"--data.root={shapenet}", SMALL_NORMALS, "--data.normals=true"]
    options += ["--model.augmentation.scale=[0.8,1.25]", "--model.augmentation.isotropic=true"]
    options += ["--model.canonicalizer=VectorNeuron", "--model.canonicalizer.normals=true"]
    options += ["--model.canonicalizer.k=4", "--model.trained=joint"]
    file = _train("shapenet-pointnet-parts", tmp_path / "all", *options, "--data.num_points=all")
    data = [str(file), "--data.name=shapenet-part", f"--data.root={shapenet}"]
    data += ["--data.num_points=all", "--protocol=I/SO3", "--limit=6", "--seeds=0"]
    report = tmp_path / "report.json"
    arguments = [*data, "--data.normals=true", "--max_points=20", "--unrestricted"]
    assert main(["eval", *arguments, f"--json={report}"]) == 0
    found = json.loads(report.read_text())
    assert (found["num_points"], found["restricted"], found["n"]) == (None, False, 6)
    assert found["invariance"]["rotation_error_deg"]["p50"] < 1


def test_what_a_data_set_offers_reaches_it(shapenet: Path) -> None:
    from pointcanon.train.data import Clouds

    clouds = Clouds("shapenet-part", str(shapenet), num_points=20, resample=True, normals=True)
    first, again = clouds.train_set[0], clouds.train_set[0]
    assert not torch.equal(first["points"], again["points"])
    assert first["normals"].shape == (20, 3)
    assert torch.equal(clouds.val_set[0]["points"], clouds.val_set[0]["points"])
    with pytest.raises(UsageError, match=r"rna.*normals"):
        Clouds("rna", str(shapenet), normals=True)


def test_missing_files_can_be_left_out(shapenet: Path, tmp_path: Path) -> None:
    import shutil

    from pointcanon.cli.options import DataOptions

    root = tmp_path / "partial"
    shutil.copytree(shapenet, root)
    next(root.glob("*/test0.txt")).unlink()
    with pytest.raises(pc.DataError, match="missing='warn'"):
        DataOptions("shapenet-part", str(root), num_points="all").open()
    with pytest.warns(UserWarning, match="going on without"):
        data = DataOptions("shapenet-part", str(root), num_points="all", missing="warn").open()
    assert len(data) == 31


@pytest.mark.slow
@pytest.mark.parametrize("name", [recipe for recipe in recipes() if "parts" in recipe])
def test_every_part_recipe_runs(name: str, parts: Path, shapenet: Path, tmp_path: Path) -> None:
    options = [*TINY, "--trainer.limit_train_batches=2"]
    if name.startswith("shapes"):
        options += ["--data.size=32", "--data.num_points=48"]
    elif name.startswith("rna"):
        root = write_rna(tmp_path / "rna")
        options += [f"--data.root={root}", "--data.num_points=30", "--data.batch_size=6"]
    else:
        options += [f"--data.root={shapenet}", "--data.num_points=40"]
    if name.endswith("canonicalizer"):
        frozen = parts
        if name.startswith("shapenet"):
            frozen = _train("shapenet-pointnet-parts", tmp_path / "frozen", *options, SMALL)
        options += [f"--model.predictor={frozen}", "--model.canonicalizer.keep=2"]
    else:
        given = {"pointnet": SMALL, "dgcnn": DGCNN, "pointnet2": POINTNET2}
        options.append(given[name.split("-")[1]])
    assert _train(name, tmp_path / "run", *options).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_repeats_the_run_though_points_are_drawn(
    workers: int, shapenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*TINY, f"--data.root={shapenet}", "--data.num_points=20", SMALL]
    options.append(f"--data.num_workers={workers}")
    options.append("--trainer.max_epochs=3")
    recipe = "shapenet-pointnet-parts"
    whole = _train(recipe, tmp_path / "whole", *options).parent

    def power_cut(task: CloudTask) -> None:
        if task.current_epoch == 1:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(CloudTask, "on_train_epoch_start", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            _train(recipe, tmp_path / "stopped", *options)
    stopped = _train(recipe, tmp_path / "stopped", *options, "--resume").parent
    first, second = (
        torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
        for folder in (whole, stopped)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_processes_score_as_one(parts: Path, tmp_path: Path) -> None:
    """13 clouds in batches of 4: no share and no batch is even."""
    script = tmp_path / "validate.py"
    script.write_text(
        "import json, sys, lightning\n"
        "from pointcanon import datasets\n"
        "from pointcanon.train.data import Clouds\n"
        "from pointcanon.train.task import CloudTask\n"
        "clouds = Clouds('parametric-shapes', num_points=32, size=16, eval_batch_size=4)\n"
        "clouds.val_set = datasets.load('parametric-shapes', None, 'val', num_points=32, size=13)\n"
        f"task = CloudTask({str(parts)!r}, trained='predictor', dataset=clouds.train_set)\n"
        "trainer = lightning.Trainer(accelerator='cpu', devices=int(sys.argv[1]), logger=False,\n"
        "    strategy=sys.argv[2], enable_progress_bar=False, enable_checkpointing=False)\n"
        "found = trainer.validate(task, datamodule=clouds, verbose=False)[0]\n"
        "if trainer.is_global_zero:\n"
        "    print('found', json.dumps(found))\n"
    )
    figures = []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        done = subprocess.run(
            [sys.executable, str(script), devices, strategy],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        line = next(text for text in done.stdout.splitlines() if text.startswith("found "))
        figures.append(json.loads(line.removeprefix("found ")))
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert figures[0]["val/instance_miou"] > 0


# the command line


def test_the_command_reports_writes_and_draws(parts: Path, tmp_path: Path) -> None:
    report, pictures = tmp_path / "report.json", tmp_path / "pictures"
    arguments = [str(parts), "--data.name=parametric-shapes", "--data.num_points=48"]
    arguments += ["--limit=20", "--protocol=z/SO3", "--seeds=4,5"]
    assert main(["eval", *arguments, f"--json={report}", f"--pictures={pictures}"]) == 0
    found = json.loads(report.read_text())
    assert (found["n"], found["seeds"], found["restricted"]) == (20, [4, 5], True)
    assert set(found["metrics"]) >= {"instance_miou", "class_miou", "per_class"}
    assert sorted(path.name for path in pictures.iterdir()) == [
        *("curve.png", "gallery.png", "poses.png", "report.html")
    ]


SHAPES_DATA = ["--data.name=parametric-shapes", "--data.num_points=48", "--protocol=I/I"]
BAD_EVAL = {
    "no points": (["--max_points=0"], 2, "max_points"),
    "many points": (["--data.num_points=many"], 2, "num_points"),
    "all points": (["--data.num_points=all"], 2, "num_points is 'all'"),
    "missing": (["--data.missing=perhaps"], 2, "missing"),
    "no such option": (["--data.missing=warn"], 2, "missing"),
    "pictures": (["--pictures=/dev/null/x"], 2, "cannot write"),
    "other parts": (["--data.name=rna", "--data.root={rna}", "--data.num_points=30"], 1, "classes"),
}


@pytest.mark.parametrize("case", BAD_EVAL)
def test_bad_usage_of_eval_is_one_line(
    case: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, status, words = BAD_EVAL[case]
    rna = write_rna(tmp_path / "rna")
    given = [option.format(rna=rna) for option in options]
    assert main(["eval", str(parts), *SHAPES_DATA, *given]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_classifier_is_not_given_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = predictors.PointNet(16, widths=(8,), embedding=8)
    checkpoint.save(tmp_path / "c.safetensors", network, checkpoint.Card(kind="predictor"))
    arguments = [str(tmp_path / "c.safetensors"), *SHAPES_DATA, "--max_points=20"]
    assert main(["eval", *arguments]) == 2
    assert "--max_points is for networks that label parts" in capsys.readouterr().err


NORMALS = ["--data.normals=true", SMALL_NORMALS]
BAD_TRAIN = {
    "stretched normals": ([*NORMALS, "--model.augmentation=scale"], 2, "isotropic true"),
    "dropped parts": (["--model.augmentation=vnn"], 2, "makes their parts wrong"),
    "dropped normals": ([*NORMALS, "--model.augmentation=vnn"], 2, "parts and normals wrong"),
    "no normals": ([SMALL_NORMALS], 1, "--data.normals true"),
    "points": (["--data.num_points=some"], 2, "num_points"),
    "no resampling": (["--data.resample=true"], 2, "resample"),
    "canonicalizer for a new one": (["--model.trained=canonicalizer"], 2, "FILE"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_usage_of_train_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, status, words = BAD_TRAIN[case]
    base = ["--config", "shapes-pointnet-parts", "--output", str(tmp_path), *SHAPES]
    assert main(["train", *base, *options]) == status
    lines = [t for t in capsys.readouterr().err.splitlines() if t.startswith("pointcanon: ")]
    assert len(lines) == 1
    assert words in lines[0]


def test_parts_need_data_with_parts() -> None:
    plain: Any = SimpleNamespace(name="Plain", classes=["a", "b"])
    with pytest.raises(UsageError, match="labels parts, and Plain has none"):
        find_predictor("dgcnn-parts", plain, {})
    assert find_predictor("pointnet", plain, {}).num_classes == 2
