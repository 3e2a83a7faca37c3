"""ShapeNet-Part in its public layouts, on generated files of exactly those layouts and on the real
sample. Every fault a file can have is one clear error that names the file and the row.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pointcanon import datasets
from pointcanon.classes import SHAPENET_PART_CATEGORIES
from pointcanon.coordinates import convert
from pointcanon.datasets import UNLABELLED, PartDataset, ShapeNetPart
from pointcanon.datasets.check import check
from pointcanon.datasets.collate import collate
from pointcanon.datasets.sampling import drawn_rows
from pointcanon.datasets.shapenet_part_layouts import PART_RANGES, PARTS, H5Layout
from pointcanon.datasets.split import stratified_split
from pointcanon.errors import DataError, InputError, UsageError

SYNSETS = (
    *("02691156", "02773838", "02954340", "02958343", "03001627", "03261776", "03467517"),
    *("03624134", "03636649", "03642806", "03790512", "03797390", "03948459", "04099429"),
    *("04225987", "04379243"),
)
COUNTS = {"train": 3, "val": 1, "test": 2}
"""Clouds of each category and split."""


def write_txt(folder: Path, points: int = 40) -> Path:
    """The folder as it is published, with clouds of ``points`` to ``points + 15`` rows."""
    (folder / "train_test_split").mkdir(parents=True)
    names = (name.capitalize() for name in SHAPENET_PART_CATEGORIES)
    lines = [f"{name}\t{synset}" for name, synset in zip(names, SYNSETS, strict=True)]
    (folder / "synsetoffset2category.txt").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        entries = []
        for label, synset in enumerate(SYNSETS):
            for number in range(count):
                rows = rng.normal(size=(points + label, 7))
                rows[:, 3:6] /= np.linalg.norm(rows[:, 3:6], axis=1, keepdims=True)
                rows[:, 6] = rng.choice(PART_RANGES[label], len(rows))
                (folder / synset).mkdir(exist_ok=True)
                np.savetxt(folder / synset / f"{split}{number}.txt", rows, fmt="%.6f")
                entries.append(f"shape_data/{synset}/{split}{number}")
        path = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
        path.write_text(json.dumps(entries))
    return folder


def write_h5(folder: Path, points: int = 40, listed: bool = True) -> Path:
    """``hdf5_data`` with its lists; or ``shapenetpart_hdf5_2048``, which has none."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, files in (("train", 2), ("val", 1), ("test", 1)):
        names = [f"ply_data_{split}{i}.h5" if listed else f"{split}{i}.h5" for i in range(files)]
        if listed:
            (folder / f"{split}_hdf5_file_list.txt").write_text("\n".join(names) + "\n")
        labels = rng.permutation(np.repeat(np.arange(16, dtype=np.uint8), COUNTS[split]))
        for name, part in zip(names, np.array_split(labels, files), strict=True):
            data = rng.uniform(-0.5, 0.5, (len(part), points, 3)).astype(np.float32)
            pid = np.array([rng.choice(PART_RANGES[c], points) for c in part], dtype=np.uint8)
            with h5py.File(folder / name, "w") as file:
                file.create_dataset("data", data=data, compression="gzip", chunks=(8, 16, 1))
                file.create_dataset("label", data=part[:, None])
                file.create_dataset("pid" if listed else "seg", data=pid, compression="gzip")
    return folder


def write_pyg(folder: Path) -> Path:
    """What torch_geometric makes of the txt folder, made by torch_geometric."""
    from torch_geometric.datasets import ShapeNet

    write_txt(folder / "raw")
    ShapeNet(str(folder))
    return folder


@pytest.fixture
def txt_root(tmp_path: Path) -> Path:
    return write_txt(tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal")


@pytest.fixture
def h5_root(tmp_path: Path) -> Path:
    return write_h5(tmp_path / "hdf5_data")


@pytest.fixture(scope="module")
def pyg_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyg(tmp_path_factory.mktemp("pyg"))


# ------------------------------------------------------------------------------------ the layouts


def test_the_standard_part_ranges() -> None:
    assert [own.start for own in PART_RANGES] == [
        *(0, 4, 6, 8, 12, 16, 19, 22, 24, 28, 30, 36, 38, 41, 44, 47)
    ]
    assert (len(SHAPENET_PART_CATEGORIES), len(PARTS), PART_RANGES[-1].stop) == (16, 50, 50)
    for name, own in zip(SHAPENET_PART_CATEGORIES, PART_RANGES, strict=True):
        assert all(PARTS[part].startswith(f"{name}/") for part in own)


def test_txt_is_centred_and_scaled_on_all_points_before_the_choice(txt_root: Path) -> None:
    data = ShapeNetPart(txt_root, "test", num_points="all", normals=True)
    assert (data.layout, str(data.coordinate_frame), len(data)) == ("txt", "y-up", 32)
    item = data[9]
    rows = np.loadtxt(data.source(9))
    assert data.source(9).endswith(f"{SYNSETS[4]}/test1.txt")
    centred = rows[:, :3] - rows[:, :3].mean(0)
    np.testing.assert_allclose(
        item["points"], centred / np.linalg.norm(centred, axis=1).max(), atol=1e-6
    )
    np.testing.assert_allclose(item["normals"], rows[:, 3:6], atol=1e-6)
    np.testing.assert_array_equal(item["parts"], rows[:, 6])
    assert (item["label"], item["parts"].dtype) == (4, torch.int64)
    few = ShapeNetPart(txt_root, "test", num_points=10, normals=True)[9]
    rows_of = (few["points"][:, None] == item["points"]).all(-1).float().argmax(1)
    for key in ("points", "normals", "parts"):
        assert torch.equal(few[key], item[key][rows_of])  # type: ignore[literal-required]
    assert len(set(rows_of.tolist())) == 10


def test_h5_items_are_the_stored_points_and_parts(h5_root: Path) -> None:
    data = ShapeNetPart(h5_root, "test", num_points=40)
    with h5py.File(h5_root / "ply_data_test0.h5") as file:
        points, labels, pid = file["data"][...], file["label"][:, 0], file["pid"][...]
    assert (data.layout, str(data.coordinate_frame), len(data)) == ("h5", "y-up", 32)
    np.testing.assert_array_equal(data.labels, labels)
    for i in range(len(data)):
        np.testing.assert_array_equal(data[i]["points"], points[i])
        np.testing.assert_array_equal(data[i]["parts"], pid[i])
    assert data.source(3).endswith("ply_data_test0.h5[3]")
    assert data[-1]["index"] == 31
    with pytest.raises(IndexError):
        data[32]


def test_the_h5_pack_without_lists_and_with_seg(tmp_path: Path) -> None:
    listed = ShapeNetPart(write_h5(tmp_path / "hdf5_data"), "trainval", num_points=40)
    root = write_h5(tmp_path / "shapenetpart_hdf5_2048", listed=False)
    data = ShapeNetPart(root, "trainval", num_points=40)
    assert len(data) == len(listed) == 64
    for i in (0, 30, 63):
        assert torch.equal(data[i]["points"], listed[i]["points"])
        assert torch.equal(data[i]["parts"], listed[i]["parts"])


def test_h5_reads_the_same_when_it_may_not_keep_files(
    h5_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ShapeNetPart(h5_root, "train", num_points=16)
    monkeypatch.setattr(H5Layout, "memory_limit", 0)
    rowwise = ShapeNetPart(h5_root, "train", num_points=16)
    for i in (0, 20, 47):
        assert torch.equal(kept[i]["points"], rowwise[i]["points"])
        assert torch.equal(kept[i]["parts"], rowwise[i]["parts"])


def test_pyg_reads_the_same_clouds_as_the_txt_it_was_made_from(pyg_root: Path) -> None:
    for split in ("train", "val", "test"):
        pyg = ShapeNetPart(pyg_root, split, num_points="all", normals=True)
        txt = ShapeNetPart(pyg_root / "raw", split, num_points="all", normals=True)
        assert (pyg.layout, len(pyg)) == ("pyg", len(txt))
        np.testing.assert_array_equal(pyg.labels, txt.labels)
        for i in (0, len(pyg) - 1):
            for key in ("points", "normals", "parts"):
                assert torch.equal(pyg[i][key], txt[i][key])  # type: ignore[literal-required]


def test_pyg_of_a_few_categories(tmp_path: Path) -> None:
    from torch_geometric.datasets import ShapeNet

    write_txt(tmp_path / "raw")
    ShapeNet(str(tmp_path), categories=["Mug", "Bag"])
    data = ShapeNetPart(tmp_path, "test")
    assert [data.classes[label] for label in data.labels] == ["bag", "bag", "mug", "mug"]
    assert set(data[3]["parts"].tolist()) <= set(PART_RANGES[data.classes.index("mug")])


def test_pyg_never_runs_code_of_a_file(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "sprung"),)

    torch.save(({"pos": Trap()}, {}), tmp_path / "mug_test.pt")
    with pytest.raises(DataError, match=r"mug_test\.pt.*without running code"):
        ShapeNetPart(tmp_path, "test")
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------------------------- splits, protocol


def test_splits_are_the_official_ones(txt_root: Path, h5_root: Path) -> None:
    for root in (txt_root, h5_root):
        sizes = {s: len(ShapeNetPart(root, s)) for s in ("train", "val", "trainval", "test")}
        assert sizes == {"train": 48, "val": 16, "trainval": 64, "test": 32}


def test_validation_is_held_out_where_no_list_names_it(h5_root: Path) -> None:
    (h5_root / "val_hdf5_file_list.txt").unlink()
    (h5_root / "ply_data_val0.h5").unlink()
    whole = ShapeNetPart(h5_root, "trainval")
    train, val = ShapeNetPart(h5_root, "train"), ShapeNetPart(h5_root, "val")
    kept, held_out = stratified_split(whole.labels, 0.1, 0)
    assert [train.source(i) for i in range(len(train))] == [whole.source(i) for i in kept]
    assert [val.source(i) for i in range(len(val))] == [whole.source(i) for i in held_out]
    assert np.bincount(val.labels).tolist() == [1] * 16


def test_it_is_a_part_data_set_of_the_registry(txt_root: Path) -> None:
    data = datasets.load("shapenet-part", txt_root, "val", num_points=8)
    assert isinstance(data, PartDataset)
    assert isinstance(datasets.load("parametric-shapes", None, "val", size=1), PartDataset)
    assert len(data.part_ranges) == len(data.classes) == 16
    assert set(data[0]) == {"points", "label", "index", "parts"}
    with pytest.raises(UsageError, match=r"shapenet-part.*colour.*its options are: num_points"):
        datasets.load("shapenet-part", txt_root, "val", colour=True)


def test_loader_processes_and_pickles_give_the_same(h5_root: Path) -> None:
    data = ShapeNetPart(h5_root, "test", num_points=24)
    here = [data[i]["points"] for i in range(len(data))]
    loader = DataLoader(data, batch_size=8, num_workers=2)
    assert torch.equal(torch.cat([batch["points"] for batch in loader]), torch.stack(here))
    assert torch.equal(pickle.loads(pickle.dumps(data))[7]["points"], here[7])


def test_frames_are_converted_normals_too(txt_root: Path) -> None:
    own = ShapeNetPart(txt_root, "val", normals=True)[3]
    turned = ShapeNetPart(txt_root, "val", normals=True, coordinate_frame="z-up")[3]
    for key in ("points", "normals"):
        expected = convert(own[key], "y-up", "z-up")  # type: ignore[literal-required]
        assert torch.equal(turned[key], expected)  # type: ignore[literal-required]


# ----------------------------------------------------------------------------------------- points


def test_a_draw_is_fixed_by_name_and_repeats_no_row_too_early() -> None:
    rows = drawn_rows(100, 60, "a")
    assert len(set(rows.tolist())) == 60
    np.testing.assert_array_equal(rows, drawn_rows(100, 60, "a"))
    assert rows.tolist() != drawn_rows(100, 60, "b").tolist()
    np.testing.assert_array_equal(drawn_rows(7, 7, None), np.arange(7))
    assert np.bincount(drawn_rows(10, 25, "a")).tolist().count(3) == 5
    counts = np.bincount(np.concatenate([drawn_rows(20, 5, str(i)) for i in range(4000)]))
    assert abs(counts - 1000).max() < 150  # five standard deviations


def test_points_are_drawn_once_or_at_each_reading(txt_root: Path, tmp_path: Path) -> None:
    elsewhere = write_txt(tmp_path / "copy")
    fixed = ShapeNetPart(txt_root, "train", num_points=16)
    assert torch.equal(fixed[5]["points"], fixed[5]["points"])
    there = ShapeNetPart(elsewhere, "train", num_points=16)[5]
    assert torch.equal(fixed[5]["points"], there["points"])
    fresh = ShapeNetPart(txt_root, "train", num_points=16, resample=True)
    assert not torch.equal(fresh[5]["points"], fresh[5]["points"])
    test = ShapeNetPart(txt_root, "test", num_points=16, resample=True)
    assert torch.equal(test[5]["points"], test[5]["points"])


def test_all_points_make_a_batch_with_a_mask(txt_root: Path) -> None:
    data = ShapeNetPart(txt_root, "val", num_points="all")
    batch = next(iter(DataLoader(data, batch_size=16, collate_fn=collate)))
    assert batch["points"].shape == (16, 55, 3)
    assert batch["mask"].sum(dim=1).tolist() == list(range(40, 56))
    assert torch.equal(batch["parts"][3][:43], data[3]["parts"])
    assert (batch["parts"][~batch["mask"]] == UNLABELLED).all()
    assert not batch["points"][~batch["mask"]].any()
    same = collate([data[0], data[0]])
    assert "mask" not in same
    assert same["label"].tolist() == [0, 0]


# --------------------------------------------------------------------------------------- bad input


def rewrite(path: Path, row: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[row] = text
    path.write_text("\n".join(lines) + "\n")


FIRST_TEST = f"{SYNSETS[0]}/test0.txt"
GOOD = "0 0 0 0 0 1 "


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (GOOD + "4.0", r"test0\.txt: point 2 is labelled 4.*no part of airplane \(0 … 3\)"),
        (GOOD + "-1", r"test0\.txt: point 2 is labelled -1"),
        (GOOD + "0.5", r"test0\.txt, row 3: '0 0 0 0 0 1 0\.5'"),
        ("nan 0 0 0 0 1 0", r"test0\.txt, row 3: 'nan"),
        ("0 0 0 0 0 1", r"test0\.txt, row 3: .*x y z nx ny nz part"),
        ("zero 0 0 0 0 1 0", r"test0\.txt, row 3: 'zero"),
        ("\n\nzero 0 0 0 0 1 0", r"test0\.txt, row 5: 'zero"),
    ],
)
def test_a_bad_row_is_named(txt_root: Path, line: str, words: str) -> None:
    rewrite(txt_root / FIRST_TEST, 2, line)
    data = ShapeNetPart(txt_root, "test")
    with pytest.raises(DataError, match=words):
        data[0]
    assert data[1]["points"].isfinite().all()
    assert list(check(txt_root).unreadable) == [FIRST_TEST]


def test_an_empty_cloud_is_named(txt_root: Path) -> None:
    (txt_root / FIRST_TEST).write_text("\n")
    with pytest.raises(DataError, match=r"test0\.txt holds no points"):
        ShapeNetPart(txt_root, "test")[0]


def listing(root: Path, split: str = "test") -> Path:
    return root / "train_test_split" / f"shuffled_{split}_file_list.json"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), r"shuffled_test_file_list\.json, which lists the clouds"),
        (lambda path: path.write_text("[1,"), r"shuffled_test_file_list\.json is no list in json"),
        (lambda path: path.write_text("{}"), r"holds a dict, not a list"),
        (
            lambda path: path.write_text('["shape_data/02691156/test0", "shape_data/00000000/a"]'),
            r"entry 1: 'shape_data/00000000/a' is of no category",
        ),
        (lambda path: path.write_text("[3]"), r"entry 0: 3 is of no category"),
        (lambda path: path.write_text("[]"), r"holds no clouds for split 'test'"),
    ],
)
def test_a_bad_list_is_named(txt_root: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(listing(txt_root))
    with pytest.raises(DataError, match=words):
        ShapeNetPart(txt_root, "test")


def test_clouds_that_are_not_there_stop_or_do_not(txt_root: Path) -> None:
    (txt_root / FIRST_TEST).unlink()
    words = r"lacks 1 of what its split 'test' should hold \(first: 02691156/test0\.txt\)"
    with pytest.raises(DataError, match=words + ".*missing='warn'"):
        ShapeNetPart(txt_root, "test")
    with pytest.warns(UserWarning, match=words):
        data = ShapeNetPart(txt_root, "test", missing="warn")
    assert (len(data), data.missing) == (31, (FIRST_TEST,))


def change(root: Path, **values: object) -> None:
    with h5py.File(root / "ply_data_test0.h5", "a") as file:
        for key, value in values.items():
            if key in file:
                del file[key]
            if value is not None:
                file[key] = value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pid": None, "mark": [0]}, r"test0\.h5 has no 'pid' and no 'seg'"),
        ({"label": np.full(32, 16)}, r"test0\.h5: label 16 of row 0 is outside the 16 categories"),
        ({"label": np.full(32, 0.7)}, r"test0\.h5: label 0\.7 of row 0 is outside the 16 cat"),
        ({"label": np.full(32, np.nan)}, r"test0\.h5: label nan of row 0 is outside the 16 cat"),
        ({"pid": np.full((32, 40), 0.6)}, r"test0\.h5\[0\]: point 0 is labelled 0\.6, which is no"),
        ({"pid": np.full((32, 40), np.nan)}, r"test0\.h5\[0\]: point 0 is labelled nan, which is"),
        ({"label": np.zeros(31)}, r"test0\.h5 holds labels \(31,\) for 32 clouds"),
        ({"pid": np.zeros((32, 39))}, r"'pid' has shape \(32, 39\).*a part is needed for every"),
        ({"data": np.zeros((32, 40, 6))}, r"'data' has shape \(32, 40, 6\), expected"),
        ({"pid": np.full((32, 40), 77)}, r"test0\.h5\[0\]: point 0 is labelled 77"),
        ({"data": np.full((32, 40, 3), np.inf)}, r"test0\.h5\[0\]: point 0 is \[inf"),
    ],
)
def test_a_bad_h5_file_is_named(h5_root: Path, values: dict[str, object], words: str) -> None:
    change(h5_root, **values)
    with pytest.raises(DataError, match=words):
        ShapeNetPart(h5_root, "test")[0]
    assert not check(h5_root).ok


def test_a_damaged_h5_file_is_named(h5_root: Path) -> None:
    path = h5_root / "ply_data_test0.h5"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"test0\.h5 cannot be read as HDF5"):
        ShapeNetPart(h5_root, "test")
    path.unlink()
    with pytest.raises(DataError, match=r"lacks 1 of .*ply_data_test0\.h5"):
        ShapeNetPart(h5_root, "test")
    (h5_root / "test_hdf5_file_list.txt").unlink()
    with pytest.raises(DataError, match=r"no test_hdf5_file_list\.txt.* and no test\*\.h5"):
        ShapeNetPart(h5_root, "test")


def test_bad_arguments_are_refused(txt_root: Path, h5_root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown split 'dev'"):
        ShapeNetPart(txt_root, "dev")
    with pytest.raises(InputError, match="num_points is 0"):
        ShapeNetPart(txt_root, "test", num_points=0)
    with pytest.raises(InputError, match="unknown layout 'off'"):
        ShapeNetPart(txt_root, "test", layout="off")
    with pytest.raises(InputError, match=r"normals.*ply_data_test0\.h5 stores none"):
        ShapeNetPart(h5_root, "test", normals=True)[0]
    with pytest.raises(DataError, match=r"more than once.*\(txt\)"):
        ShapeNetPart(tmp_path, "test")
    assert len(ShapeNetPart(tmp_path, "test", layout="h5")) == 32
    with pytest.raises(DataError, match="does not hold ShapeNetPart in layout 'pyg'"):
        ShapeNetPart(tmp_path, "test", layout="pyg")
    with pytest.raises(DataError, match="none is no folder"):
        ShapeNetPart(tmp_path / "none", "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no ShapeNet-Part at data root"):
        ShapeNetPart(tmp_path / "empty", "test")


# ------------------------------------------------------------------------------------------ check


def test_check_counts_clouds_and_finds_duplicates(
    txt_root: Path, h5_root: Path, pyg_root: Path
) -> None:
    for root, layout in ((txt_root, "txt"), (h5_root, "h5"), (pyg_root, "pyg")):
        report = check(root)
        assert (report.dataset, report.layout, report.ok) == ("ShapeNetPart", layout, True)
        assert report.totals == {"train": 48, "val": 16, "test": 32}
        assert report.counts["train"]["mug"] == 3
    (txt_root / SYNSETS[3] / "train0.txt").write_text((txt_root / FIRST_TEST).read_text())
    report = check(txt_root)  # an airplane among the cars: its parts give it away
    assert list(report.unreadable) == [f"{SYNSETS[3]}/train0.txt"]
    (txt_root / SYNSETS[0] / "train0.txt").write_text((txt_root / FIRST_TEST).read_text())
    assert len(check(txt_root).shared) == 1


# -------------------------------------------------------------------------------------- real data


@pytest.mark.filterwarnings("ignore:.*going on without")
def test_real_clouds(real_data: Path) -> None:
    root = real_data / "shapenetcore_partanno_segmentation_benchmark_v0_normal"
    if not root.is_dir():
        pytest.skip("the ShapeNet-Part sample is not at hand")
    data = ShapeNetPart(root, "trainval", num_points="all", normals=True, missing="warn")
    assert len(data) > 0
    for i in range(len(data)):
        item = data[i]
        assert data.classes[item["label"]] in ("skateboard", "table")
        assert item["points"].mean(dim=0).abs().max() < 1e-6
        assert item["points"].norm(dim=1).max().item() == pytest.approx(1)
        assert (item["normals"].norm(dim=1) - 1).abs().max() < 1e-3
        if data.classes[item["label"]] == "table":  # y is up: the top lies above the legs
            height = item["points"][:, 1]
            top, leg = (
                height[item["parts"] == data.parts.index(p)] for p in ("table/top", "table/leg")
            )
            assert top.mean() > leg.mean() + 0.1
