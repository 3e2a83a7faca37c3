"""Corruptions: what each does to clouds whose answer is known, and the curves made of them."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from pointcanon import checkpoint, datasets, predictors
from pointcanon.canonicalizers import PCA
from pointcanon.cli import main
from pointcanon.clouds import centroid, radius
from pointcanon.coordinates import coordinate_frame
from pointcanon.datasets import CloudItem
from pointcanon.datasets.corruptions import CORRUPTIONS, SEVERITIES, Corrupted, corruption
from pointcanon.errors import InputError, UsageError
from pointcanon.eval.corruption_pictures import corruption_curves
from pointcanon.eval.corruptions import (
    CorruptionReport,
    corruption_names,
    evaluate_corruptions,
    render,
    to_json,
)
from pointcanon.eval.evaluate import evaluate
from pointcanon.model import Canonicalized
from pointcanon.rotations import random_rotations

REMOVING = ("points", "crop", "gradient", "density", "density_inc", "cutout")
ADDING = ("upsampling", "background")


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def sphere(count: int, clouds: int = 1) -> Tensor:
    """Uniform on the unit sphere, so uniform along every axis (Archimedes), float64."""
    points = torch.randn(clouds, count, 3, generator=seeded(7), dtype=torch.float64)
    return points / points.norm(dim=-1, keepdim=True)


def apply(name: str, severity: int, points: Tensor, seed: int = 0) -> Tensor:
    return corruption(name)(points, severity, seeded(seed))


def kept_rows(before: Tensor, after: Tensor) -> Tensor:
    """Which points of one cloud are in the other, exactly: rows of ``before``."""
    place = {tuple(point): row for row, point in enumerate(before.tolist())}
    return torch.tensor([place[tuple(point)] for point in after.tolist()])


# every corruption


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_generator_decides_and_the_clouds_given_stay(name: str) -> None:
    clouds = sphere(256, 3).float()
    before, state = clouds.clone(), torch.get_rng_state()
    for severity in SEVERITIES:
        found = apply(name, severity, clouds)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert torch.equal(found, apply(name, severity, clouds))
        assert not torch.equal(found, apply(name, severity, clouds, seed=1))
    assert torch.equal(clouds, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(apply(name, 3, clouds[:1])[0], apply(name, 3, clouds[0]))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_size_and_place_of_a_cloud_do_not_matter(name: str) -> None:
    clouds, place = sphere(256, 2), torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)
    for severity in (1, 5):
        expected = 4 * apply(name, severity, clouds) + place
        torch.testing.assert_close(apply(name, severity, 4 * clouds + place), expected)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("points", (768, 512, 256, 128, 64)),
        ("crop", (921, 819, 716, 614, 512)),
        ("gradient", (512,) * 5),
        ("occlusion", (1024,) * 5),
        ("lidar", (768,) * 5),
        ("density", (949, 874, 799, 724, 649)),
        ("density_inc", (512,) * 5),
        ("cutout", (964, 934, 874, 814, 724)),
        ("upsampling", (1228, 1280, 1365, 1536, 2048)),
        ("background", (1046, 1049, 1053, 1058, 1075)),
        ("outliers", (1024,) * 5),
    ],
)
def test_clouds_of_1024_points_become_as_large_as_those_published(
    name: str, sizes: tuple[int, ...]
) -> None:
    cloud = sphere(1024)
    assert tuple(apply(name, severity, cloud).shape[1] for severity in SEVERITIES) == sizes


@pytest.mark.parametrize("name", REMOVING)
def test_what_removes_points_keeps_the_others_once_each(name: str) -> None:
    cloud = sphere(300)[0]
    rows = kept_rows(cloud, apply(name, 4, cloud))
    assert len(rows.unique()) == len(rows) < 300


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", ["one place", "one point", "a line"])
def test_the_poorest_clouds_stay_finite(name: str, shape: str) -> None:
    cloud = torch.zeros(1 if shape == "one point" else 40, 3)
    if shape == "a line":
        cloud[:, 0] = torch.linspace(-1, 1, 40)
    if shape == "one point" and name in ("density", "density_inc", "cutout"):
        with pytest.raises(InputError, match="clouds of 1 points have no"):
            apply(name, 5, cloud)
        return
    found = apply(name, 5, cloud)
    assert found.isfinite().all()
    assert len(found) >= 1


@pytest.mark.parametrize(
    ("points", "severity", "words"),
    [
        (torch.zeros(64, 3), 0, "severity is 0; choose one of: 1, 2, 3, 4, 5"),
        (torch.zeros(64, 3), 6, "severity is 6"),
        (torch.zeros(3, 64), 1, r"shape \(3, 64\)"),
        (torch.zeros(2, 0, 3), 1, r"shape \(2, 0, 3\)"),
    ],
)
def test_bad_arguments(points: Tensor, severity: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        CORRUPTIONS["gaussian"](points, severity, seeded())


def test_unknown_names_and_clouds_too_small_say_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"unknown corruption 'fog'.*points, crop"):
        corruption("fog")
    with pytest.raises(InputError, match=r"clouds of 8 points have no 10 patches of 1.*than 10"):
        apply("cutout", 5, torch.zeros(8, 3))


# density


@pytest.mark.parametrize(("severity", "share"), [(1, 0.9), (3, 0.7), (5, 0.5)])
def test_a_crop_keeps_one_side_of_a_plane(severity: int, share: float) -> None:
    cloud = sphere(4000)[0]
    rows = kept_rows(cloud, apply("crop", severity, cloud))
    lost = cloud[torch.ones(4000, dtype=torch.bool).index_fill(0, rows, False)]
    across = lost.mean(dim=0) / lost.mean(dim=0).norm()
    # a share s of the sphere lies below the height 2 s - 1 along any axis
    assert (cloud[rows] @ across).max() == pytest.approx(2 * share - 1, abs=0.1)
    assert (lost @ across).min() == pytest.approx(2 * share - 1, abs=0.1)


def test_a_gradient_thins_out_along_a_direction_the_more_the_severer() -> None:
    cloud = sphere(4000)[0]
    leans = [apply("gradient", severity, cloud).mean(dim=0).norm() for severity in SEVERITIES]
    assert all(milder < severer for milder, severer in pairwise(leans))
    assert leans[0] > 0.05
    assert leans[-1] < 0.5  # a half space, which leaves nothing at the other end


def test_of_a_sphere_the_far_side_is_hidden() -> None:
    cloud = sphere(20_000)[0]
    seen = apply("occlusion", 1, cloud)
    rows = kept_rows(cloud, seen)
    towards = seen.mean(dim=0) / seen.mean(dim=0).norm()
    # between twenty thousand points there is hardly a gap to see through
    assert (seen @ towards < -0.2).double().mean() < 0.01
    assert 5_000 < len(rows.unique()) < 10_500  # of the near half all but steep slopes
    # no point again before all have come
    assert rows.bincount().max() == -(-20_000 // len(rows.unique()))
    fewer = [len(apply("occlusion", severity, cloud).unique(dim=0)) for severity in (3, 5)]
    assert fewer[1] < fewer[0] < len(rows.unique())


def test_a_scanner_sees_the_near_side_in_lines() -> None:
    cloud = sphere(4000)[0]
    spacing = CORRUPTIONS["lidar"].amounts[2]
    seen = apply("lidar", 3, cloud)
    # the view is the first thing that is drawn
    view = random_rotations(1, generator=seeded(), dtype=torch.float64)[0]
    lines = ((seen - cloud.mean(dim=0)) @ view)[:, 1] / radius((cloud - cloud.mean(dim=0))[None])
    assert (lines / spacing - 0.5).sub((lines / spacing - 0.5).round()).abs().max() < 1e-9
    assert len((lines / spacing).round().unique()) <= 2 / spacing + 1


def test_a_patch_loses_three_quarters() -> None:
    cloud = sphere(1024)[0]
    rows = kept_rows(cloud, apply("density", 1, cloud))
    lost = torch.ones(1024, dtype=torch.bool).index_fill(0, rows, False)
    distance = torch.cdist(cloud, cloud)
    patch = distance.topk(100, largest=False).indices
    losses = lost[patch].sum(dim=1)
    assert lost.sum() == 75
    assert losses.max() == 75  # all in the hundred around one point


def test_a_hole_is_a_point_and_its_nearest() -> None:
    cloud = sphere(1024)[0]
    rows = kept_rows(cloud, apply("cutout", 1, cloud))
    lost = torch.ones(1024, dtype=torch.bool).index_fill(0, rows, False)
    hole = torch.cdist(cloud, cloud).topk(30, largest=False).indices
    assert lost.sum() == 60
    assert lost[hole].all(dim=1).any()


def test_a_patch_is_kept_whole_while_half_is_lost() -> None:
    cloud = sphere(1024)[0]
    rows = kept_rows(cloud, apply("density_inc", 1, cloud))
    kept = torch.zeros(1024, dtype=torch.bool).index_fill(0, rows, True)
    patch = torch.cdist(cloud, cloud).topk(50, largest=False).indices
    assert kept.sum() == 512
    assert kept[patch].all(dim=1).any()  # by chance 1 in 2^50


# noise


def test_noise_has_the_limit_and_the_deviation_that_it_says() -> None:
    cloud = sphere(4000)[0]
    size = radius((cloud - cloud.mean(dim=0))[None])
    noise = (apply("uniform", 3, cloud) - cloud) / size
    assert 0.0299 < noise.abs().max() <= 0.03
    assert noise.std() == pytest.approx(0.03 / 3**0.5, rel=0.05)
    for name, severity, sigma in (("gaussian", 5, 0.03), ("jitter", 5, 0.1)):
        noise = (apply(name, severity, cloud) - cloud) / size
        assert noise.std() == pytest.approx(sigma, rel=0.05)


def test_an_impulse_strikes_a_share_of_the_points_along_each_axis() -> None:
    cloud = sphere(1000)[0]
    moved = apply("impulse", 5, cloud) - cloud
    struck = moved.abs().amax(dim=1) > 0
    assert struck.sum() == 100
    torch.testing.assert_close(
        moved[struck].abs(), (0.1 * radius((cloud - cloud.mean(0))[None])).expand(100, 3)
    )


@pytest.mark.parametrize("name", ADDING)
def test_what_adds_points_leaves_the_others(name: str) -> None:
    cloud = sphere(1000)[0]
    found = apply(name, 3, cloud)
    assert torch.equal(found[:1000], cloud)
    added = found[1000:] - cloud.mean(dim=0)
    size = radius((cloud - cloud.mean(dim=0))[None])
    if name == "upsampling":
        nearest = torch.cdist(added, cloud - cloud.mean(dim=0), p=torch.inf).amin(dim=1)
        assert nearest.max() <= 0.05 * size
    else:
        assert added.abs().max() <= size
        assert (added.norm(dim=1) > size).any()  # in the box, not the ball


def test_outliers_take_the_place_of_points() -> None:
    cloud = sphere(1000)[0]
    found = apply("outliers", 4, cloud)
    assert torch.isin(found, cloud).all(dim=1).sum() == 800
    strewn = found[800:].norm(dim=1)
    assert (strewn < 0.5).double().mean() == pytest.approx(1 / 8, abs=0.06)  # uniform in the ball


def test_a_shear_is_one_matrix_and_a_distortion_is_none() -> None:
    cloud = sphere(500)[0] - sphere(500)[0].mean(dim=0)
    for name, linear in (("shear", True), ("distortion", False)):
        found = apply(name, 5, cloud)
        fitted = cloud @ torch.linalg.lstsq(cloud, found).solution
        assert ((fitted - found).abs().max() < 1e-9) == linear
        assert 0.05 < (found - cloud).norm(dim=1).max() < 0.8


# the data set


class Balls:
    """Clouds of two classes: long ones and flat ones."""

    name, split, normals = "Balls", "test", False

    def __init__(self, count: int = 8) -> None:
        self.classes = ["long", "flat"]
        self.labels = np.arange(count, dtype=np.int64) % 2
        self.coordinate_frame = coordinate_frame("z-up")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> CloudItem:
        label = int(self.labels[index])
        shape = torch.tensor([[0.2, 0.3, 1.0], [1.0, 0.8, 0.1]])[label]
        points = torch.randn(256, 3, generator=seeded(index)) * shape
        return {"points": points, "label": label, "index": index}


class Flatness(nn.Module):
    """Logits: the variance along the z axis, and across it."""

    num_classes = 2

    def forward(self, points: Tensor) -> Tensor:
        variance = points.var(dim=1)
        return torch.stack((variance[:, 2], variance[:, :2].mean(dim=1)), dim=1)


def test_corrupted_clouds_are_the_same_whenever_they_are_read() -> None:
    data = Corrupted(Balls(), "outliers", 3)
    last = data[7]["points"]
    assert torch.equal(last, data[7]["points"])
    assert torch.equal(last, pickle.loads(pickle.dumps(data))[-1]["points"])
    assert not torch.equal(last, Corrupted(Balls(), "outliers", 3, seed=1)[7]["points"])
    torch.testing.assert_close(centroid(last[None])[0], torch.zeros(3), atol=1e-6, rtol=0)
    assert radius(last[None]).item() == pytest.approx(1)
    assert (data[7]["label"], data[7]["index"], len(data)) == (1, 7, 8)
    assert data.labels.tolist() == Balls().labels.tolist()
    assert (data.name, data.split) == ("Balls outliers 3", "test")


def test_a_severer_corruption_is_more_of_the_same() -> None:
    whole = Balls()[0]["points"]
    found = [CORRUPTIONS["points"](whole, severity, seeded()) for severity in SEVERITIES]
    rows = [set(kept_rows(whole, each).tolist()) for each in found]
    assert all(fewer < more for more, fewer in pairwise(rows))


def test_data_that_cannot_be_corrupted_is_refused() -> None:
    class WithNormals(Balls):
        normals = True

    with pytest.raises(InputError, match="Balls is read with normals"):
        Corrupted(WithNormals(), "crop", 1)
    with pytest.raises(UsageError, match="unknown corruption 'x'"):
        Corrupted(Balls(), "x", 1)
    with pytest.raises(InputError, match="severity is 9"):
        Corrupted(Balls(), "crop", 9)
    with pytest.raises(InputError, match="seed is -1"):
        Corrupted(Balls(), "crop", 1, seed=-1)


# curves

NAMES = ("points", "crop")


@pytest.fixture(scope="module")
def report() -> CorruptionReport:
    model = Canonicalized(Flatness(), PCA(4))
    measure = partial(evaluate, model, protocol="I/SO3", seeds=(0,))
    return evaluate_corruptions(measure, Balls(), NAMES, severities=(5, 1))


def test_a_curve_is_the_evaluation_of_corrupted_data(report: CorruptionReport) -> None:
    model = Canonicalized(Flatness(), PCA(4))
    one = evaluate(model, Corrupted(Balls(), "crop", 5), "I/SO3", seeds=(0,))
    assert (tuple(report.curves), report.severities, report.seed) == (NAMES, (1, 5), 0)
    found = report.curves["crop"][1]
    assert (found.trials, found.bare, found.frames) == (one.trials, one.bare, one.frames)
    errors = [1 - each.trials.mean.overall_accuracy for each in report.curves["crop"]]
    assert report.error("crop") == pytest.approx(sum(errors) / 2)
    both = [report.error(name, bare=True) or 0.0 for name in NAMES]
    assert report.error(bare=True) == pytest.approx(sum(both) / 2)
    upright = [
        1 - each.bare.aligned.overall_accuracy
        for curve in report.curves.values()
        for each in curve
        if each.bare is not None
    ]
    assert len(upright) == 4
    assert report.error(bare=True, aligned=True) == pytest.approx(sum(upright) / 4)
    assert report.error(bare=True, aligned=True) != report.error(bare=True)
    assert report.up() == pytest.approx((report.up("points") + report.up("crop")) / 2)


def test_the_json_is_that_of_eval_and_the_corruptions(report: CorruptionReport) -> None:
    found = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert {"dataset", "n", "protocol", "metrics", "aligned", "bare", "frames"} <= set(found)
    inside = found["corruptions"]
    means = {"error", "bare_error", "bare_aligned_error", "up_within_10_deg"}
    assert set(inside) == {"seed", *means, "by_name"}
    assert inside["bare_aligned_error"] == report.error(bare=True, aligned=True)
    points = inside["by_name"]["points"]
    assert points["error"] == report.error("points")
    assert [each["severity"] for each in points["by_severity"]] == [1, 5]
    assert [each["num_points"] for each in points["by_severity"]] == [192, 16]
    for each in points["by_severity"]:
        assert {"metrics", "aligned", "bare", "frames", "prediction_flip_rate"} <= set(each)


def test_the_table_has_each_corruption_with_and_without(report: CorruptionReport) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    render(report, console)
    text = console.export_text()
    for part in (
        "corrupted clouds under SO3",
        "points",
        "crop",
        "Flatness alone",
        "behind PCA",
        "up within 10°",
        "generated with seed 0",
        "mean error",
    ):
        assert part in text


def test_without_a_canonicalizer_there_is_one_row_and_one_line(tmp_path: Path) -> None:
    measure = partial(evaluate, Flatness(), protocol="I/I")
    alone = evaluate_corruptions(measure, Balls(), ("gaussian",))
    assert to_json(alone)["corruptions"]["bare_error"] is None
    console = Console(width=100, record=True, file=io.StringIO())
    render(alone, console)
    text = console.export_text()
    assert "as they come" in text
    for part in ("alone", "behind", "within", "nan"):
        assert part not in text
    panel = corruption_curves(alone, tmp_path / "curve.svg").axes[0]
    assert len(panel.lines) == 1
    assert panel.lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4, 5]  # type: ignore[union-attr]
    assert panel.lines[0].get_ydata()[0] == 100  # type: ignore[index]


def test_the_picture_has_a_panel_for_each_corruption(
    report: CorruptionReport, tmp_path: Path
) -> None:
    figure = corruption_curves(report, tmp_path / "new" / "curves.png")
    assert [panel.get_title() for panel in figure.axes] == list(NAMES)
    assert all(len(panel.lines) == 4 for panel in figure.axes)
    assert (tmp_path / "new" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_bad_curves_are_refused_before_any_work() -> None:
    def measure(_: Any) -> Any:
        raise AssertionError("worked")

    refused: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: corruption_names("fog", Balls()), UsageError, r"unknown corruption 'fog'; give"),
        (lambda: corruption_names("crop,crop", Balls()), UsageError, "names 'crop' twice"),
        (lambda: corruption_names("", Balls()), UsageError, "unknown corruption ''"),
        (
            lambda: evaluate_corruptions(measure, Balls(), severities=()),
            InputError,
            "severities is []",
        ),
        (
            lambda: evaluate_corruptions(measure, Balls(), severities=(6,)),
            InputError,
            "severities is",
        ),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words.replace("[", r"\[")):
            call()
    assert corruption_names("all", Balls()) == tuple(CORRUPTIONS)
    assert corruption_names("crop, points", Balls()) == ("crop", "points")


# the command


@pytest.fixture
def robust(tmp_path: Path) -> str:
    classes = tuple(datasets.load("parametric-shapes", None, "test").classes)
    torch.manual_seed(0)
    network = predictors.create("pointnet", num_classes=len(classes), widths=(8,), embedding=16)
    network.coordinate_frame, network.classes = "z-up", classes
    Canonicalized(network.eval(), PCA(4)).save(tmp_path / "robust.safetensors")
    card = checkpoint.Card(kind="predictor", coordinate_frame="z-up", classes=classes)
    checkpoint.save(tmp_path / "predictor.safetensors", network, card)
    return str(tmp_path / "robust.safetensors")


DATA = ["--data.name", "parametric-shapes", "--data.num_points", "128", "--limit", "4"]


def test_the_command_writes_and_draws(
    robust: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    arguments = ["eval", robust, *DATA, "--protocol", "I/SO3", "--seeds", "0"]
    arguments += ["--corruptions", "crop", "--json", str(file)]
    assert main([*arguments, "--pictures", str(tmp_path / "pictures")]) == 0
    found = json.loads(file.read_text())
    assert list(found["corruptions"]["by_name"]) == ["crop"]
    assert len(found["corruptions"]["by_name"]["crop"]["by_severity"]) == 5
    assert (tmp_path / "pictures" / "corruptions.png").is_file()
    assert "mean error" in capsys.readouterr().out


def test_the_command_refuses_what_it_does_not_know(
    robust: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", robust, *DATA, "--protocol", "I/SO3", "--corruptions", "fog"]
    assert main(arguments) == 2
    assert "unknown corruption 'fog'; give 'all', or some of: points, crop" in (
        capsys.readouterr().err
    )
