"""The RNA surfaces: a generated file of exactly the layout, the real one, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pointcanon import datasets
from pointcanon.datasets import RNA, UNLABELLED, PartDataset
from pointcanon.datasets.check import check
from pointcanon.errors import DataError, InputError


def write_rna(folder: Path, **changes: object) -> Path:
    """20 train and 5 test molecules of 30 points; labels 0, 3, 5 and 9."""
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "points": rng.integers(-32767, 32768, (25, 30, 3)).astype(np.int16),
        "labels": rng.choice(np.array([0, 3, 5, 9], dtype=np.uint16), (25, 30)),
        "split": (np.arange(25) % 5 == 4).astype(np.uint8),
        "names": np.array([f"{i}ABC" for i in range(25)]),
        "center": rng.normal(size=(25, 3)).astype(np.float32),
        "scale": np.full(25, 50, dtype=np.float32),
    }
    kept = {key: value for key, value in (arrays | changes).items() if value is not None}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "rna_seg_2048.npz", **kept)  # type: ignore[arg-type]
    return folder


def test_items_are_the_stored_molecules_in_the_unit_ball(tmp_path: Path) -> None:
    data = RNA(write_rna(tmp_path), "test", num_points=30)
    with np.load(tmp_path / "rna_seg_2048.npz") as file:
        points, labels = file["points"].astype(float), file["labels"]
    assert (len(data), data.classes, data.parts) == (5, ["5S rRNA"], ("3", "5", "9"))
    assert data.part_ranges == (range(3),)
    assert data.labels.tolist() == [0] * 5
    for i, row in enumerate(range(4, 25, 5)):
        item = data[i]
        centred = points[row] - points[row].mean(0)
        expected = centred / np.linalg.norm(centred, axis=1).max()
        np.testing.assert_allclose(item["points"], expected, atol=1e-6)
        wanted = [{0: UNLABELLED, 3: 0, 5: 1, 9: 2}[int(label)] for label in labels[row]]
        assert item["parts"].tolist() == wanted
        assert (item["label"], item["index"], item["parts"].dtype) == (0, i, torch.int64)
        assert data.source(i).endswith(f"rna_seg_2048.npz[{row}]")


def test_validation_is_a_tenth_of_train_and_fewer_points_are_drawn_once(tmp_path: Path) -> None:
    root = write_rna(tmp_path)
    sources = {
        split: {data.source(i) for i in range(len(data))}
        for split in ("train", "val", "trainval", "test")
        for data in [RNA(root, split, num_points=12)]
    }
    assert {split: len(found) for split, found in sources.items()} == {
        "train": 18,
        "val": 2,
        "trainval": 20,
        "test": 5,
    }
    assert sources["train"] | sources["val"] == sources["trainval"]
    other = RNA(root, "val", num_points=12, validation_seed=3)
    assert {other.source(i) for i in range(2)} != sources["val"]
    data = datasets.load("rna", root, "test", num_points=12)
    assert isinstance(data, PartDataset)
    assert torch.equal(data[1]["points"], data[1]["points"])
    assert len(data[1]["points"].unique(dim=0)) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, r"rna_seg_2048\.npz holds points, .* but no labels"),
        ({"labels": np.zeros((25, 29))}, r"points \(25, 30, 3\) but labels \(25, 29\)"),
        ({"labels": np.full((25, 30), -3)}, r"labels of row 0 holds -3"),
        ({"labels": np.full((25, 30), np.nan)}, r"labels of row 0 holds nan"),
        ({"split": np.full(25, 2)}, r"split of row 0 holds 2, not 0 or 1"),
        ({"split": np.zeros(25)}, r"holds no clouds for split 'test'"),
        ({"points": np.zeros((25, 0, 3))}, r"'points' has shape \(25, 0, 3\)"),
        ({"points": np.full((25, 30, 3), np.nan)}, r"rna_seg_2048\.npz\[0\] has a point"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        RNA(write_rna(tmp_path, **changes), "test", num_points=30)


def test_bad_arguments_and_places(tmp_path: Path) -> None:
    root = write_rna(tmp_path / "rna")
    with pytest.raises(InputError, match="have 30 points"):
        RNA(root, "test", num_points=31)
    with pytest.raises(InputError, match="unknown split 'dev'"):
        RNA(root, "dev")
    with pytest.raises(DataError, match=r"no RNA surfaces.*rna_seg_2048\.npz"):
        RNA(tmp_path / "none", "test")
    path = root / "rna_seg_2048.npz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged or incomplete"):
        RNA(tmp_path, "test")


def test_check(tmp_path: Path) -> None:
    report = check(write_rna(tmp_path))
    assert (report.dataset, report.layout, report.ok) == ("RNA", "npz", True)
    assert report.counts == {"train": {"5S rRNA": 20}, "test": {"5S rRNA": 5}}
    (tmp_path / "rna_seg_2048.npz").write_bytes(b"")
    assert not check(tmp_path).ok


def test_real_molecules(real_data: Path) -> None:
    root = real_data / "rna"
    if not root.is_dir():
        pytest.skip("the RNA surfaces are not at hand")
    train, test = RNA(root, "trainval"), RNA(root, "test")
    assert (len(train), len(test), len(train.parts)) == (547, 136, 159)
    assert train.parts[0] == "3"
    assert train.parts[-1] == "259"
    unlabelled = [
        int((data[i]["parts"] == UNLABELLED).sum())
        for data in (train, test)
        for i in range(len(data))
    ]
    assert sum(unlabelled) == 22
    assert max(unlabelled) == 22  # all in one molecule
    assert test[0]["points"].norm(dim=1).max().item() == pytest.approx(1)
