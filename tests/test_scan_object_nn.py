"""ScanObjectNN, on generated files of exactly its layout, and every fault a file can have."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pointcanon import datasets
from pointcanon.cli import main
from pointcanon.coordinates import convert
from pointcanon.datasets import ScanObjectNN
from pointcanon.datasets.check import check
from pointcanon.datasets.scan_object_nn import VARIANTS
from pointcanon.errors import DataError, InputError, UsageError

SIZE = 96
LABELS = np.repeat(np.arange(15), 10)


def write_file(path: Path, labels: np.ndarray = LABELS, seed: int = 0, **changes: object) -> Path:
    """Scans somewhere in a room, about a third of their points background (-1)."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(len(labels), SIZE, 3)) * [0.3, 0.6, 0.2] + [4.0, 1.0, -2.0]
    arrays: dict[str, object] = {
        "data": points.astype(np.float32),
        "label": labels.astype(np.int32),
        "mask": rng.choice(np.array([-1, 5, 5], dtype=np.int32), (len(labels), SIZE)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in (arrays | changes).items():
            if value is not None:
                file.create_dataset(key, data=value)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``h5_files`` with every variant; each file has clouds of its own."""
    root = tmp_path_factory.mktemp("scans") / "h5_files"
    for seed, ending in enumerate(dict.fromkeys(VARIANTS.values())):
        for folder, offset in (("main_split", 0), ("main_split_nobg", 100)):
            write_file(root / folder / f"training_{ending}", seed=offset + 2 * seed)
            write_file(root / folder / f"test_{ending}", LABELS[::5], seed=offset + 2 * seed + 1)
    write_file(root / "split2" / "training_objectdataset.h5", seed=50)
    write_file(root / "split2" / "test_objectdataset.h5", LABELS[::5], seed=51)
    return root


def stored(path: Path, key: str = "data") -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[key])


def unit_ball(points: np.ndarray) -> np.ndarray:
    centred = points.astype(np.float64) - points.astype(np.float64).mean(axis=0)
    return centred / np.linalg.norm(centred, axis=1).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_its_own_file(root: Path, variant: str) -> None:
    data = ScanObjectNN(root, "test", variant=variant, num_points=64)
    folder = "main_split_nobg" if variant == "OBJ_ONLY" else "main_split"
    path = root / folder / f"test_{VARIANTS[variant]}"
    assert (data.variant, data.name) == (variant, f"ScanObjectNN {variant}")
    assert data.labels.tolist() == LABELS[::5].tolist()
    for i in (0, 29):
        item = data[i]
        np.testing.assert_allclose(item["points"], unit_ball(stored(path)[i, :64]), atol=1e-5)
        assert (item["label"], item["index"]) == (LABELS[::5][i], i)
        assert item["points"].dtype == torch.float32
        assert data.source(i) == f"{path}[{i}]"


def test_classes_are_in_the_order_of_the_public_labels(root: Path) -> None:
    data = ScanObjectNN(root, "test", variant="OBJ_BG", num_points=64)
    assert data.classes == [
        *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table"),
        *("bed", "pillow", "sink", "sofa", "toilet"),
    ]
    assert (str(data.coordinate_frame), data.coordinate_frame.up) == ("y-up", 1)


@pytest.mark.parametrize("where", ["file", "folder", "root", "parent", "elsewhere"])
def test_a_root_may_be_a_file_or_any_folder_above_it(
    root: Path, tmp_path: Path, where: str
) -> None:
    ending = VARIANTS["PB_T50_RS"]
    source = root / "main_split" / f"test_{ending}"
    places = {
        "file": source,
        "folder": root / "main_split",
        "root": root,
        "parent": root.parent,
        "elsewhere": tmp_path / "copy",
    }
    places["elsewhere"].mkdir()
    shutil.copy(source, places["elsewhere"])
    variant = None if where in ("file", "elsewhere") else "PB_T50_RS"
    data = ScanObjectNN(places[where], "test", variant=variant, num_points=64)
    assert data.variant == "PB_T50_RS"
    np.testing.assert_allclose(data[3]["points"], unit_ball(stored(source)[3, :64]), atol=1e-5)


def test_the_folder_tells_which_of_the_two_variants_with_equal_names_it_is(
    root: Path, tmp_path: Path
) -> None:
    ending = "training_objectdataset.h5"
    assert ScanObjectNN(root / "main_split" / ending, "train", num_points=9).variant == "OBJ_BG"
    own = ScanObjectNN(root / "main_split_nobg" / ending, "train", num_points=9)
    assert own.variant == "OBJ_ONLY"
    assert own.name == "ScanObjectNN OBJ_ONLY"
    with pytest.raises(DataError, match=r"main_split_nobg does not hold OBJ_BG"):
        ScanObjectNN(root / "main_split_nobg", "train", variant="OBJ_BG")
    with pytest.raises(DataError, match=r"several variants: give variant=.*OBJ_BG.*OBJ_ONLY"):
        ScanObjectNN(write_file(tmp_path / ending), "train", num_points=9)


def test_the_hard_variants_without_background_are_asked_for_by_folder(root: Path) -> None:
    usual = ScanObjectNN(root, "test", variant="PB_T50_RS", num_points=9)
    assert (usual.name, Path(usual.source(0)).parent.name) == (
        *("ScanObjectNN PB_T50_RS", "main_split"),
    )
    folder = root / "main_split_nobg"
    bare = ScanObjectNN(folder, "test", variant="PB_T50_RS", num_points=9)
    assert bare.name == "ScanObjectNN PB_T50_RS without background"
    assert Path(bare.source(0)).parent == folder
    assert not torch.equal(usual[0]["points"], bare[0]["points"])


def test_the_splits_of_the_supplement(root: Path) -> None:
    data = ScanObjectNN(root, "test", fold=2, num_points=64)
    assert data.source(0).startswith(str(root / "split2"))
    with pytest.raises(DataError, match="does not hold OBJ_BG of ScanObjectNN, split split3"):
        ScanObjectNN(root, "test", variant="OBJ_BG", fold=3)
    with pytest.raises(InputError, match="fold is 5"):
        ScanObjectNN(root, "test", fold=5)


def test_validation_is_a_tenth_of_every_class_of_train(root: Path) -> None:
    def sources(split: str, **options: int) -> list[str]:
        data = ScanObjectNN(root, split, variant="OBJ_BG", num_points=8, **options)
        return [data.source(i) for i in range(len(data))]

    train, val, whole = (sources(split) for split in ("train", "val", "trainval"))
    assert (len(train), len(val)) == (135, 15)
    assert sorted(train + val) == sorted(whole)
    held = ScanObjectNN(root, "val", variant="OBJ_BG", num_points=8)
    assert held.labels.tolist() == list(range(15))
    assert sources("val", validation_seed=4) != val
    again = pickle.loads(pickle.dumps(held))
    assert torch.equal(again[7]["points"], held[7]["points"])


def test_the_background_is_left_out_by_the_mask(root: Path) -> None:
    path = root / "main_split" / "test_objectdataset.h5"
    points, own = stored(path), stored(path, "mask") != -1
    data = ScanObjectNN(root, "test", variant="OBJ_BG", num_points=90, background=False)
    for i in (0, 12):
        mine = points[i][own[i]]
        assert len(mine) < 90
        expected = unit_ball(np.concatenate((mine, mine))[:90])
        np.testing.assert_allclose(data[i]["points"], expected, atol=1e-5)


def test_frames_are_converted(root: Path) -> None:
    upright = ScanObjectNN(root, "test", variant="OBJ_BG", num_points=64)
    turned = ScanObjectNN(
        root, "test", variant="OBJ_BG", num_points=64, coordinate_frame="y-up-mirrored"
    )
    expected = convert(upright[5]["points"], "y-up", "y-up-mirrored")
    assert torch.equal(turned[5]["points"], expected)


def test_it_is_registered(root: Path) -> None:
    data = datasets.load("scan-object-nn", root, "val", variant="PB_T25", num_points=64)
    assert isinstance(data, ScanObjectNN)
    assert datasets.ScanObjectNN is ScanObjectNN
    with pytest.raises(UsageError, match="its options are: variant, fold, num_points, background"):
        datasets.load("scan-object-nn", root, "val", flavour="PB_T25")


def test_arguments_that_cannot_be_met(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown split 'dev'"):
        ScanObjectNN(root, "dev")
    with pytest.raises(InputError, match=r"unknown variant 'PB'; choose one of: OBJ_BG"):
        ScanObjectNN(root, "test", variant="PB")
    with pytest.raises(DataError, match=r"several variants: give variant=.*PB_T50_RS"):
        ScanObjectNN(root, "test")
    with pytest.raises(InputError, match=r"num_points is 97, but clouds of .*\.h5 have 96"):
        ScanObjectNN(root, "test", variant="OBJ_BG", num_points=97)
    with pytest.raises(DataError, match=r"none does not exist; give a folder with h5_files"):
        ScanObjectNN(tmp_path / "none", "test")
    with pytest.raises(DataError, match="does not hold ScanObjectNN"):
        ScanObjectNN(tmp_path, "test")
    write_file(tmp_path / "main_split" / "training_objectdataset.h5")
    with pytest.raises(DataError, match=r"main_split has no test_objectdataset\.h5"):
        ScanObjectNN(tmp_path, "test", num_points=9)


def test_check_counts_and_finds_what_is_wrong(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ScanObjectNN PB_T25_R in .*main_split \(h5\).*variant"):
        check(root)
    with pytest.raises(DataError, match="not one variant 'PB'"):
        check(root, variant="PB")
    with pytest.raises(DataError, match="not one variant 'PB_T25'; give one of these folders"):
        check(root, variant="PB_T25")
    report = check(root / "main_split", layout="h5", variant="PB_T25")
    assert (report.dataset, report.layout, report.coordinate_frame) == (
        *("ScanObjectNN PB_T25", "h5", "y-up"),
    )
    assert report.ok
    assert report.totals == {"train": 150, "test": 30}
    assert report.counts["train"]["sofa"] == 10
    assert not report.duplicates
    path = write_file(tmp_path / "training_objectdataset_augmentedrot.h5")
    with h5py.File(path, "a") as file:
        file["data"][3] = file["data"][140]
        file["data"][7, 5] = np.nan
    report = check(tmp_path)
    assert report.dataset == "ScanObjectNN PB_T50_R"
    assert report.missing == {"train": [], "test": ["test_objectdataset_augmentedrot.h5"]}
    assert list(report.unreadable) == ["training_objectdataset_augmentedrot.h5[7]"]
    ((first, second),) = report.duplicates
    assert (first.cloud[-3:], first.category) == ("[3]", "bag")
    assert (second.cloud[-5:], second.category) == ("[140]", "toilet")
    write_file(path.with_name(report.missing["test"][0])).write_bytes(b"")
    report = check(path)
    assert report.totals == {"train": 149, "test": 0}
    assert "fetch it again" in report.unreadable["test_objectdataset_augmentedrot.h5"]


def test_check_from_the_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "check", "--data.root", str(root)]
    assert main(command) == 1
    assert "OBJ_BG" in capsys.readouterr().err
    assert main([*command, "--data.variant", "OBJ_ONLY"]) == 0
    shown = capsys.readouterr().out
    assert f"ScanObjectNN OBJ_ONLY at {root / 'main_split_nobg'}" in shown
    assert "layout h5, coordinate frame y-up" in shown
    assert "duplicates: 0 groups" in shown


NAN = np.full((150, SIZE, 3), np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": None}, r"has no 'label' \(its keys: data, mask\)"),
        ({"data": np.zeros((150, SIZE, 2))}, r"'data' has shape \(150, 96, 2\)"),
        ({"label": np.zeros(149)}, r"holds labels \(149,\) for 150 clouds"),
        ({"label": np.full(150, 15)}, r"label 15 of row 0 is none of 0 to 14"),
        ({"label": np.full(150, np.nan)}, r"label nan of row 0 is none of 0 to 14"),
        ({"data": NAN}, r"\.h5\[\d+\]: point 0 is \[nan, nan, nan\], not three numbers"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = write_file(tmp_path / "training_objectdataset_augmentedrot.h5", **changes)
    with pytest.raises(DataError, match=words) as error:
        ScanObjectNN(tmp_path, "train", num_points=9)[0]
    assert str(path) in str(error.value)


def test_a_damaged_file_and_masks_that_do_not_help(tmp_path: Path) -> None:
    path = write_file(tmp_path / "training_objectdataset_augmentedrot.h5", mask=None)
    with pytest.raises(InputError, match=r"has no mask \(150, 96\): it holds none"):
        ScanObjectNN(path, "train", num_points=9, background=False)
    write_file(path, mask=np.full((150, SIZE), -1))
    with pytest.raises(DataError, match=r"\.h5\[\d+\] is all background"):
        ScanObjectNN(path, "train", num_points=9, background=False)[0]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="damaged or incomplete; fetch it again"):
        ScanObjectNN(path, "train", num_points=9)
