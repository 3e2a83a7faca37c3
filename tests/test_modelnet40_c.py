"""ModelNet40-C, on generated files of exactly its layout: the reader, and its protocol in eval."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pointcanon import checkpoint, datasets, predictors
from pointcanon.cli import main
from pointcanon.coordinates import convert
from pointcanon.datasets import ModelNet40C
from pointcanon.datasets.check import check
from pointcanon.errors import DataError, InputError

COUNT = 40
LABELS = np.random.default_rng(1).permutation(40).astype(np.uint8)[:, None]
SIZES = {"cutout": 29, "upsampling": 48, "lidar": 24}


def write_c(folder: Path, *variants: str, **changes: np.ndarray) -> Path:
    """``label.npy`` (n, 1) and files of float32 clouds, their sizes as different as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "label.npy", changes.get("label", LABELS))
    for seed, variant in enumerate(variants):
        size = SIZES.get(variant.rpartition("_")[0], 32)
        points = np.random.default_rng(seed).uniform(-1, 1, (COUNT, size, 3))
        np.save(folder / f"data_{variant}.npy", changes.get(variant, points.astype(np.float32)))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    everything = [
        f"{name}_{severity}" for name in ModelNet40C.corruptions for severity in range(1, 6)
    ]
    return write_c(tmp_path_factory.mktemp("c") / "modelnet40_c", "original", *everything)


def test_the_fifteen_corruptions_are_those_of_the_files() -> None:
    assert len(set(ModelNet40C.corruptions)) == 15
    published = (
        *("occlusion", "lidar", "density_inc", "density", "cutout"),
        *("uniform", "gaussian", "impulse", "upsampling", "background"),
        *("rotation", "shear", "distortion", "distortion_rbf", "distortion_rbf_inv"),
    )
    assert set(ModelNet40C.corruptions) == set(published)


@pytest.mark.parametrize("variant", ["original", "gaussian_3", "cutout_1", "distortion_rbf_inv_5"])
def test_clouds_come_as_stored_and_whole(root: Path, variant: str) -> None:
    data = ModelNet40C(root.parent, "test", variant=variant)
    stored = np.load(root / f"data_{variant}.npy")
    assert (len(data), data.name) == (COUNT, f"ModelNet40-C {variant}")
    assert data.labels.tolist() == LABELS[:, 0].tolist()
    for i in (0, 39):
        item = data[i]
        np.testing.assert_array_equal(item["points"], stored[i])
        assert (item["label"], item["index"]) == (LABELS[i, 0], i)
        assert data.source(i) == f"{root / f'data_{variant}.npy'}[{i}]"
    assert str(data.coordinate_frame) == "y-up-mirrored"


def test_fewer_points_are_drawn_once_and_not_the_first(root: Path) -> None:
    data = ModelNet40C(root, "test", variant="density_inc_5", num_points=16)
    points, stored = data[3]["points"], np.load(root / "data_density_inc_5.npy")[3]
    assert torch.equal(points, data[3]["points"])
    assert len(points.unique(dim=0)) == 16
    assert torch.isin(points, torch.tensor(stored)).all()
    assert not np.array_equal(points, stored[:16])


def test_another_file_of_the_same_clouds(root: Path) -> None:
    clean = ModelNet40C(root, "test", num_points=16, coordinate_frame="z-up")
    other = clean.corrupted("lidar", 2)
    assert (other.variant, other.num_points, str(other.coordinate_frame)) == ("lidar_2", 16, "z-up")
    own = ModelNet40C(root, "test", variant="lidar_2", num_points=16)
    assert torch.equal(other[1]["points"], convert(own[1]["points"], "y-up-mirrored", "z-up"))
    again = pickle.loads(pickle.dumps(other))
    assert torch.equal(again[1]["points"], other[1]["points"])


def test_it_is_registered(root: Path) -> None:
    assert isinstance(datasets.load("modelnet40-c", root, "test"), ModelNet40C)
    assert datasets.ModelNet40C is ModelNet40C


@pytest.mark.parametrize("variant", ["fog_1", "gaussian_6", "gaussian", "gaussian_", "_3", ""])
def test_unknown_corruptions_and_severities_are_refused(root: Path, variant: str) -> None:
    with pytest.raises(InputError, match=r"unknown variant '.*such as 'gaussian_3', of: occlusion"):
        ModelNet40C(root, "test", variant=variant)


def test_arguments_that_cannot_be_met(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown split 'train'; ModelNet40-C has 'test' alone"):
        ModelNet40C(root, "train")
    with pytest.raises(InputError, match=r"num_points is 33, but clouds of .*data_original\.npy"):
        ModelNet40C(root, "test", num_points=33)
    with pytest.raises(DataError, match=r"root .*none; give a folder with label\.npy"):
        ModelNet40C(tmp_path / "none", "test")
    with pytest.raises(DataError, match="no ModelNet40-C at data root"):
        ModelNet40C(tmp_path, "test")
    write_c(tmp_path, "gaussian_1")
    with pytest.raises(DataError, match=r"has no data_original\.npy; fetch it, or choose another"):
        ModelNet40C(tmp_path, "test")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"original": np.zeros((COUNT, 32))}, r"data_original\.npy has shape \(40, 32\), expected"),
        ({"original": np.zeros((COUNT, 3, 32))}, r"has shape \(40, 3, 32\), expected \(n, P, 3\)"),
        ({"original": np.zeros((41, 32, 3))}, r"label\.npy holds labels \(40, 1\) for 41 clouds"),
        ({"label": np.full(40, 40)}, r"label\.npy: label 40 of row 0 is none of 0 to 39"),
        ({"label": np.zeros((40, 2))}, r"label\.npy holds labels \(40, 2\) for 40 clouds"),
        ({"original": np.array(["x"])}, r"data_original\.npy cannot be read, .*it holds <U1, not"),
        (
            {"original": np.full((COUNT, 32, 3), np.inf, dtype=np.float32)},
            r"data_original\.npy\[0\]: point 0 is \[inf, inf, inf\], not three numbers",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ModelNet40C(write_c(tmp_path, "original", **changes), "test")[0]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    root = write_c(tmp_path, "original")
    path = root / "data_original.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"data_original\.npy cannot be read, it is damaged"):
        ModelNet40C(root, "test")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"data_original\.npy cannot be read, it is damaged"):
        ModelNet40C(root, "test")


def test_check_goes_through_all_files(root: Path, tmp_path: Path) -> None:
    report = check(root.parent)
    assert (report.dataset, report.layout, report.coordinate_frame) == (
        *("ModelNet40-C", "npy", "y-up-mirrored"),
    )
    assert report.ok
    assert report.totals == {"test": 76 * COUNT}
    assert report.counts["test"]["airplane"] == 76
    bad = np.ones((COUNT, 32, 3), dtype=np.float32)
    bad[2:] = np.random.default_rng(5).normal(size=(COUNT - 2, 32, 3))
    bad[9, 4] = np.inf
    write_c(tmp_path, "original", "gaussian_1", "shear_4", gaussian_1=bad)
    (tmp_path / "data_shear_4.npy").write_bytes(b"")
    report = check(tmp_path, layout="npy")
    assert not report.ok
    assert report.totals == {"test": 2 * COUNT - 1}
    assert len(report.missing["test"]) == 73
    assert set(report.unreadable) == {"data_gaussian_1.npy[9]", "data_shear_4.npy"}
    ((first, second),) = report.duplicates
    assert [first.cloud, second.cloud] == ["data_gaussian_1.npy[0]", "data_gaussian_1.npy[1]"]
    (tmp_path / "label.npy").write_bytes(b"")
    assert "label.npy cannot be read" in check(tmp_path).unreadable["data_original.npy"]


# the protocol


@pytest.fixture
def predictor(tmp_path: Path) -> str:
    classes = datasets.ModelNet40.class_names
    torch.manual_seed(0)
    network = predictors.create("pointnet", num_classes=40, widths=(8,), embedding=16)
    card = checkpoint.Card(kind="predictor", coordinate_frame="y-up-mirrored", classes=classes)
    checkpoint.save(tmp_path / "predictor.safetensors", network.eval(), card)
    return str(tmp_path / "predictor.safetensors")


def test_eval_gives_the_error_of_every_corruption_and_their_mean(
    root: Path, predictor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.name", "modelnet40-c", "--data.root", str(root)]
    file = tmp_path / "report.json"
    arguments = ["eval", predictor, *data, "--protocol", "I/I", "--json", str(file)]
    assert main([*arguments, "--corruptions", "all"]) == 0
    found = json.loads(file.read_text())
    inside = found["corruptions"]["by_name"]
    assert tuple(inside) == ModelNet40C.corruptions
    assert (found["dataset"], found["corruptions"]["seed"]) == ("ModelNet40-C original", None)
    errors = [
        [1 - each["metrics"]["overall_accuracy"] for each in of["by_severity"]]
        for of in inside.values()
    ]
    assert np.shape(errors) == (15, 5)
    assert found["corruptions"]["error"] == pytest.approx(np.mean(errors))
    assert [each["num_points"] for each in inside["lidar"]["by_severity"]] == [24] * 5
    assert "corruptions from files" in capsys.readouterr().out

    one = tmp_path / "one.json"
    arguments = ["eval", predictor, *data, "--protocol", "I/I", "--json", str(one)]
    assert main([*arguments, "--data.variant", "impulse_4"]) == 0
    accuracy = json.loads(one.read_text())["metrics"]["overall_accuracy"]
    assert accuracy == inside["impulse"]["by_severity"][3]["metrics"]["overall_accuracy"]


def test_eval_says_what_is_missing_before_it_works(
    predictor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_c(tmp_path / "c", "original", *(f"shear_{severity}" for severity in (1, 2, 4, 5)))
    data = ["--data.name", "modelnet40-c", "--data.root", str(root), "--protocol", "I/I"]
    assert main(["eval", predictor, *data, "--corruptions", "shear"]) == 1
    assert "c has no data_shear_3.npy; fetch it" in capsys.readouterr().err
    assert main(["eval", predictor, *data, "--corruptions", "jitter"]) == 2
    assert "unknown corruption 'jitter'; give 'all', or some of: occlusion" in (
        capsys.readouterr().err
    )
    assert main(["eval", predictor, *data, "--data.variant", "fog_1"]) == 2
    assert "unknown variant 'fog_1'" in capsys.readouterr().err


def test_a_missing_corruption_is_found_before_anything_is_measured(
    predictor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    for file in root.iterdir():
        if file.name != "data_gaussian_2.npy":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    data = ["--data.name", "modelnet40-c", "--data.root", str(tmp_path)]
    assert main(["eval", predictor, *data, "--protocol", "I/I", "--corruptions", "gaussian"]) == 1
    captured = capsys.readouterr()
    assert "data_gaussian_2.npy" in captured.err
    assert not captured.out
