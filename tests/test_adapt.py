"""``pc.adapt``: from a network and clouds to a robust model, its report, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import pointcanon as pc
from pointcanon import checkpoint
from pointcanon.canonicalizers import Optimized
from pointcanon.cli import main
from pointcanon.datasets import UNLABELLED
from pointcanon.errors import CheckpointError, InputError
from pointcanon.predictors import Predictor
from pointcanon.predictors.recognise import recognise
from pointcanon.priors import Aligned
from pointcanon.rotations import geodesic_angle
from pointcanon.testing import assert_invariant, generic_clouds
from pointcanon.train.adapt import (
    Adapted,
    PoseTask,
    _classifier,
    _of_one_size,
    _outliers,
    _pose_loss,
    _rate,
    recommended,
)
from pointcanon.train.run import find_recipe


class Corner(nn.Module):
    """Which signed axis a cloud leans to: no answer survives a rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {}

    def forward(self, points: Tensor) -> Tensor:
        centred = points - points.mean(dim=1, keepdim=True)
        skewness = centred.pow(3).mean(dim=1) * self.scale
        return torch.cat((skewness, -skewness), dim=1)


def small(classes: int | None = None) -> Optimized:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    return Optimized(keep=2, points=None, classes=classes, **sizes)


@pytest.fixture(scope="module")
def corners() -> tuple[Tensor, Tensor]:
    """Clouds ``(60, 40, 3)``, all alike but for noise, and what ``Corner`` says of them."""
    generator = torch.Generator().manual_seed(1)
    shape = torch.randn(40, 3, generator=generator).abs().square() * torch.tensor([1.0, 0.6, 0.3])
    points = shape + 0.01 * torch.randn(60, 40, 3, generator=generator)
    points = points - points.mean(dim=1, keepdim=True)
    return points, Corner()(points).argmax(dim=1)


@pytest.fixture(scope="module")
def adapted(corners: tuple[Tensor, Tensor]) -> Adapted:
    return pc.adapt(
        Corner(), corners[0], canonicalizer=small(), epochs=12, learning_rate=2e-2, progress=False
    )


def test_a_network_becomes_robust(adapted: Adapted, corners: tuple[Tensor, Tensor]) -> None:
    report, history = adapted.report, adapted.history
    assert (report.n, report.labelled) == (6, False)
    assert (history.clouds, history.held_out) == (54, 6)
    assert report.alone.score["I"] == 1
    assert report.alone.score["SO3"] < 0.6
    assert report.judged.score["SO3"] > 0.9
    assert report.flips == 0
    assert history.stopped in ("all epochs", "no longer improving")
    losses = [loss for _, loss in history.losses]
    assert min(losses) < losses[0]
    assert_invariant(adapted, generic_clouds(4, 40))


def test_the_report_prints_and_plots(adapted: Adapted, tmp_path: Path) -> None:
    text = str(adapted.report)
    for words in ("alone", "behind Optimized", "aligned tax", "passes", "flips"):
        assert words in text
    adapted.report.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_is_saved_with_its_figures(
    adapted: Adapted, corners: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="Corner is not registered"):
        adapted.save(tmp_path / "model.safetensors")
    checkpoint.register(Corner)
    adapted.save(tmp_path / "model.safetensors", training_command="mine")
    again = pc.load(tmp_path / "model.safetensors")
    assert type(again) is pc.Canonicalized
    torch.testing.assert_close(again(corners[0]), adapted(corners[0]))
    card = checkpoint.read_card(tmp_path / "model.safetensors")
    assert card is not None
    assert (card.coordinate_frame, card.training_command) == ("z-up", "mine")
    assert card.metrics["held_out_agreement_so3"] == adapted.report.judged.score["SO3"]


QUICK: dict[str, Any] = {"epochs": 2, "progress": False}


def test_the_network_and_the_random_stream_are_left_alone(corners: tuple[Tensor, Tensor]) -> None:
    network = Corner().train()
    state = torch.get_rng_state()
    pc.adapt(network, corners[0][:12], canonicalizer=small_in(state), **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.scale.requires_grad
    assert torch.equal(network.scale, torch.ones(3))
    assert network.scale.grad is None


def small_in(state: Tensor) -> Optimized:
    made = small()
    torch.set_rng_state(state)
    return made


def test_the_same_seed_gives_the_same_model(corners: tuple[Tensor, Tensor]) -> None:
    weights = [
        pc.adapt(
            Corner(), corners[0][:12], canonicalizer=small(), seed=seed, **QUICK
        ).canonicalizer.scorer.features.peak.weight  # type: ignore[union-attr]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_labels_serve_the_report_alone(corners: tuple[Tensor, Tensor]) -> None:
    points, labels = corners[0][:12], corners[1][:12]
    wrong = (labels + 1) % 6
    models = [
        pc.adapt(Corner(), points, given, canonicalizer=small(), **QUICK)
        for given in (labels, wrong)
    ]
    # all clouds are alike, so both hold out the same ones
    first, second = (model.canonicalizer.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert models[0].report.labelled
    assert models[0].report.alone.score["I"] == 1
    assert models[1].report.alone.score["I"] == 0


def pose_task(canonicalizer: Optimized, **options: Any) -> PoseTask:
    given: dict[str, Any] = {"learning_rate": 1e-3, "minutes": None, "seed": 0, **options}
    task = PoseTask(canonicalizer, pc.priors.Aligned(), torch.tensor([0.0, 0.0, 1.0]), **given)
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    return task


class Silent(Corner):
    """Has no answer for a cloud with a point far out."""

    def forward(self, points: Tensor) -> Tensor:
        far = points.abs().amax(dim=(1, 2)) > 1e2
        return super().forward(points).masked_fill(far[:, None], torch.nan)


def _corner(network: Corner | None = None) -> Predictor:
    found = recognise(network or Corner(), torch.rand(9, 3))
    assert isinstance(found, Predictor)
    return found


def step(task: PoseTask, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    return task.training_step(batch, 0)


def things(points: Tensor) -> Tensor:
    """Clouds that lean to x and to z by turns, as ``Corner`` sees it."""
    made = points.clone()
    made[::2] *= torch.tensor([0.5, 1.0, 4.0])
    return made


def test_the_network_teaches_its_classes(corners: tuple[Tensor, Tensor]) -> None:
    points = things(corners[0][:8])
    classify = _classifier(_corner(), small(6), torch.float32)
    assert classify is not None
    batch = {"points": points, "index": torch.arange(8)}
    classes = classify(batch)
    assert torch.equal(classes, Corner()(points).argmax(dim=1))
    assert set(classes.tolist()) == {0, 2}
    canonicalizer, seen = small(6).train(), []
    canonicalizer.register_forward_hook(lambda _, __, frames: seen.append(frames.class_logits))
    taught = step(pose_task(canonicalizer, classify=classify), batch)
    poses = step(pose_task(canonicalizer), batch)
    wrong = torch.nn.functional.cross_entropy(seen[0], classes)
    torch.testing.assert_close(taught, poses + 0.3 * wrong)


def test_a_cloud_without_an_answer_teaches_its_pose(corners: tuple[Tensor, Tensor]) -> None:
    points = things(corners[0][:8])
    points[3, 0] = 1e3  # the network says nan
    points[7, 0] = 1e3
    classify = _classifier(_corner(Silent()), small(6), torch.float32)
    assert classify is not None
    found = classify({"points": points})
    expected = Corner()(points).argmax(dim=1)
    expected[[3, 7]] = UNLABELLED
    assert torch.equal(found, expected)
    none = pose_task(small(6), classify=lambda batch: torch.full((8,), UNLABELLED))
    batch = {"points": points, "index": torch.arange(8)}
    assert step(none, batch) == step(pose_task(small(6)), batch)


def test_adapt_teaches_the_classes(corners: tuple[Tensor, Tensor]) -> None:
    def head(epochs: int) -> Tensor:
        options: dict[str, Any] = {"epochs": epochs, "batch_size": 4, "progress": False}
        model = pc.adapt(Corner(), corners[0][:12], canonicalizer=small(6), **options)
        assert model.vote == "agreement"
        with torch.no_grad():
            front = pc.canonicalizers.PCA(4)
            audited = pc.audit(model, corners[0][:4], canonicalizer=front, progress=False)
        assert audited.canonicalized is not None
        return model.canonicalizer.scorer.recognise[0].weight  # type: ignore[union-attr]

    assert not torch.equal(head(1), small(6).scorer.recognise[0].weight)


def test_classes_learned_elsewhere_are_learned_anew(corners: tuple[Tensor, Tensor]) -> None:
    network = pc.predictors.create("pointnet", num_classes=6, embedding=8, widths=[8, 8])
    network.classes = tuple("abcdef")
    known = small(6)
    known.class_names = tuple("uvwxyz")
    model = pc.adapt(network, corners[0][:8], canonicalizer=known, epochs=1, progress=False)
    assert (model.vote, model.canonicalizer.class_names) == ("agreement", network.classes)


FRAMES: dict[str, Any] = {
    "svd": lambda: pc.canonicalizers.VectorNeuron(k=6, orthonormalise="svd"),
    "matrix-fisher": lambda: pc.canonicalizers.VectorNeuron(k=6, orthonormalise="matrix-fisher"),
    "SO2": lambda: pc.canonicalizers.ForGroup(
        pc.canonicalizers.VectorNeuron(k=6), group="SO2", axis=2
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_single_frame_is_taught(name: str, corners: tuple[Tensor, Tensor]) -> None:
    points = corners[0]
    torch.manual_seed(0)
    untaught = FRAMES[name]()
    torch.manual_seed(0)
    options: dict[str, Any] = {"epochs": 8, "batch_size": 4, "learning_rate": 1e-2}
    options |= {"prior": pc.priors.Aligned(10.0), "progress": False}
    model = pc.adapt(Corner(), points, canonicalizer=FRAMES[name](), **options)
    eye = torch.eye(3)
    before, after = (
        geodesic_angle(each.eval()(points).best().rotations[:, 0], eye).median().rad2deg()
        for each in (untaught, model.canonicalizer)
    )
    assert after < 10 < 20 < before
    assert model.vote == "certainty"
    losses = [loss for _, loss in model.history.losses]
    assert min(losses) < losses[0] - 1
    if name == "matrix-fisher":
        confidence = model.canonicalizer(points).confidence
        assert confidence is not None
        assert confidence.median() > 0.1


def test_where_there_is_nothing_to_learn_there_is_a_report(corners: tuple[Tensor, Tensor]) -> None:
    axes = pc.canonicalizers.PCA(1)
    model = pc.adapt(Corner(), corners[0][:12], canonicalizer=axes, progress=False)
    assert model.history.stopped == "nothing to learn"
    assert (model.history.epochs, model.history.losses) == (0, ())
    assert model.report.flips == 0


def test_the_recommended_canonicalizer_is_that_of_the_recipe() -> None:
    recipe = yaml.safe_load(find_recipe("modelnet40-pointnet-canonicalizer").read_text())
    asked = recipe["model"]["canonicalizer"]["init_args"]
    made = recommended(asked["classes"])
    assert {name: getattr(made, name) for name in asked} == asked


def test_embeddings_are_kept_distinct(corners: tuple[Tensor, Tensor]) -> None:
    canonicalizer = pc.canonicalizers.Contrastive(
        pc.predictors.create("pointnet", num_classes=8, widths=(8, 8), embedding=8),
        pc.canonicalizers.PCA(4),
    )
    frames = canonicalizer(corners[0][:4])
    turn = torch.eye(3).expand(4, 3, 3)
    prior = pc.priors.Aligned(50.0)
    expected = pc.losses.prior_loss(frames, prior, turn, 0.05)
    expected = expected + pc.losses.contrastive_loss(frames.embeddings)
    assert _outliers(frames) == 0.05
    torch.testing.assert_close(_pose_loss(frames, prior, turn, 0.05), expected)


def test_the_network_is_asked_once_about_each_cloud() -> None:
    asked: list[int] = []

    def classify(batch: dict[str, Tensor]) -> Tensor:
        asked.extend(batch["index"].tolist())
        return 10 * batch["index"]

    task = pose_task(small(), classify=classify)
    for index in ([0, 2], [3, 1], [1, 0], [2, 3]):
        classes = task._classes({"index": torch.tensor(index)})
        assert classes is not None
        assert classes.tolist() == [10 * cloud for cloud in index]
    assert asked == [0, 2, 3, 1]


def test_other_classes_than_the_network_tells_apart(corners: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match=r"classes is 5, and the network tells 6 .* classes=6"):
        pc.adapt(Corner(), corners[0][:12], canonicalizer=Optimized(classes=5), **QUICK)


def test_the_best_weights_are_kept(corners: tuple[Tensor, Tensor]) -> None:
    options = {"epochs": 8, "patience": 2, "progress": False, "learning_rate": 0.5}
    model = pc.adapt(Corner(), corners[0][:12], canonicalizer=small(), **options)  # type: ignore[arg-type]
    losses = [loss for _, loss in model.history.losses]
    if model.history.stopped == "no longer improving":
        assert min(losses) == losses[-3]
    assert len(losses) == model.history.epochs


def test_the_time_is_kept(corners: tuple[Tensor, Tensor]) -> None:
    model = pc.adapt(
        Corner(),
        corners[0][:12],
        canonicalizer=small(),
        minutes=0.2 / 60,
        epochs=10_000,
        progress=False,
    )
    assert model.history.stopped == "time is up"
    assert len(model.history.losses) >= 1


def test_ragged_clouds_and_parts(corners: tuple[Tensor, Tensor]) -> None:
    class Height(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            height = (points - points.mean(dim=1, keepdim=True))[..., 2]
            return torch.stack((height, -height), dim=-1)

    ragged = [cloud[: 20 + place] for place, cloud in enumerate(corners[0][:12])]
    model = pc.adapt(Height(), ragged, canonicalizer=small(), **QUICK)
    assert model.report.segments
    assert model.predict(ragged[0][None]).labels.shape == (1, 20)
    assert model.report.flips < 0.01


def test_double_precision_stays(corners: tuple[Tensor, Tensor]) -> None:
    model = pc.adapt(Corner().double(), corners[0][:12].double(), canonicalizer=small(), **QUICK)
    assert model(corners[0].double()).dtype == torch.float64


def test_every_cloud_of_a_step_has_one_size(generator: torch.Generator) -> None:
    points = torch.randn(3, 3000, 3, generator=generator)
    mask = torch.zeros(3, 3000, dtype=torch.bool)
    sizes = [3, 2500, 3000]
    for cloud, size in enumerate(sizes):
        mask[cloud, -size:] = True
    points[~mask] = torch.nan
    found, normals = _of_one_size({"points": points, "normals": points, "mask": mask}, generator)
    assert found.shape == (3, 2048, 3)
    assert normals is not None
    assert bool(found.isfinite().all())
    assert torch.equal(found, normals)
    assert [len(cloud.unique(dim=0)) for cloud in found] == [3, 2048, 2048]
    counts = found[0].unique(dim=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [_rate(step / 100) for step in range(101)]
    assert rates[0] < 0.05
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0.01)
    assert _rate(1.5) == pytest.approx(0.01)
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"minutes": 0}, "minutes is 0; choose a number above 0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"patience": 0}, "patience is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"labels": [0]}, "1 labels for 60 clouds"),
    ],
)
def test_what_cannot_be_is_refused(
    corners: tuple[Tensor, Tensor], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pc.adapt(Corner(), corners[0], **options)


def test_what_is_no_network_or_no_data_is_refused(corners: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InputError, match="canonicalized already"):
        pc.adapt(pc.Canonicalized(Corner(), pc.canonicalizers.PCA(1)), corners[0])
    with pytest.raises(InputError, match="pass at least 2"):
        pc.adapt(Corner(), corners[0][:1])
    shapes = pc.datasets.load("parametric-shapes", None, "test", size=4, num_points=8)
    predictor = pc.predictors.create("pointnet", num_classes=16, embedding=8)
    predictor.coordinate_frame = "y-up-mirrored"
    with pytest.raises(CheckpointError, match="y-up-mirrored"):
        pc.adapt(predictor, shapes)
    categories = pc.predictors.create("pointnet-parts", num_parts=3, num_categories=2)
    with pytest.raises(InputError, match="pass the categories as labels"):
        pc.adapt(categories, corners[0])


def test_the_command_writes_model_report_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    predictor = pc.predictors.create("pointnet", num_classes=16, embedding=8, widths=[8, 8])
    card = checkpoint.Card(kind="predictor", coordinate_frame="z-up")
    checkpoint.save("net.safetensors", predictor, card)
    monkeypatch.setattr("pointcanon.train.adapt.recommended", small)
    data = "--data.name parametric-shapes --data.split val --data.num_points 16"
    command = f"adapt net.safetensors {data} --epochs 1 --device cpu --out robust.safetensors"
    assert main([*command.split(), "--json", "report.json", "--plot", "curve.png"]) == 0
    assert "behind Optimized" in capsys.readouterr().out
    assert isinstance(pc.load("robust.safetensors").canonicalizer, Optimized)
    found = json.loads(Path("report.json").read_text())
    assert found["canonicalized"]["agreement"]["SO3"] == 1 - found["flips"]
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint.read_card("robust.safetensors")
    assert saved is not None
    assert saved.training_command == "pointcanon " + " ".join(
        [*command.split(), "--json", "report.json", "--plot", "curve.png"]
    )


@pytest.mark.parametrize(
    "asked",
    ["PCA --canonicalizer.poses 4", "VectorNeuron --canonicalizer.k 4", "Search"],
)
def test_the_command_takes_any_canonicalizer(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    predictor = pc.predictors.create("pointnet", num_classes=16, embedding=8, widths=[8, 8])
    checkpoint.save("net.safetensors", predictor, checkpoint.Card(kind="predictor"))
    np.save("clouds.npy", torch.randn(4, 24, 3).numpy())
    command = "adapt net.safetensors clouds.npy --epochs 1 --device cpu --out o.safetensors "
    assert main([*command.split(), "--canonicalizer", *asked.split()]) == 0
    found = pc.load("o.safetensors").canonicalizer
    assert type(found).__name__ == asked.split()[0]
    assert getattr(found, "poses", 4) == 4


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("net.safetensors", 2, ("out", "--help")),
        ("missing.safetensors --out o.safetensors", 1, ("missing.safetensors",)),
        ("nowhere:net --out o.safetensors", 2, ("nowhere cannot be imported",)),
        (
            "torch.nn:Identity --out o.safetensors --data.name parametric-shapes",
            1,
            ("logits", "outputs", "Identity"),
        ),
        ("torch.nn:Identity --out . ", 2, ("it is a folder",)),
        ("torch.nn:Identity --out model.txt", 2, ("model.txt does not end in .safetensors",)),
    ],
)
def test_bad_usage_is_one_clear_line(
    arguments: str,
    status: int,
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", *arguments.split()]) == status
    error = capsys.readouterr().err
    assert error.startswith("pointcanon: ")
    assert error.count("\n") == 1
    assert any(word in error for word in words)


def test_a_canonicalizer_that_was_loaded_learns_in_training_mode(
    corners: tuple[Tensor, Tensor],
) -> None:
    modes = set()
    loaded = small().eval()
    loaded.scorer.register_forward_pre_hook(
        lambda module, args: modes.add((torch.is_grad_enabled(), module.training))
    )
    loaded.scorer.features.register_forward_pre_hook(
        lambda module, args: modes.add((torch.is_grad_enabled(), module.training))
    )
    pc.adapt(Corner(), corners[0][:12], canonicalizer=loaded, **QUICK)
    assert modes == {(True, True), (False, False)}


@pytest.mark.filterwarnings("ignore:Encountered `nan`")
def test_a_validation_that_fails_is_never_the_best() -> None:
    task = PoseTask(
        small(), Aligned(), torch.tensor([0.0, 0, 1]), learning_rate=1.0, minutes=None, seed=0
    )
    task.log = lambda *args, **options: None  # type: ignore[method-assign]
    kept = []
    for loss in (math.nan, 0.9, math.nan, 1.0, 0.1):
        task.mean.update(loss)
        with torch.no_grad():
            task.canonicalizer.scorer.score.weight.fill_(loss)
        task._trainer = type("Trainer", (), {"current_epoch": 0, "global_step": 0})()
        task.on_validation_epoch_end()
        kept.append(float(task.best["scorer.score.weight"].mean()))
    assert kept[1:] == pytest.approx([0.9, 0.9, 0.9, 0.1])
