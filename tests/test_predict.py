"""``predict`` and ``canonicalize`` on files and folders, as a user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roma
import torch
import trimesh

import pointcanon as pc
from pointcanon.cli import main, streaming
from pointcanon.rotations import geodesic_angle, random_rotations

CLASSES = ("ball", "box", "cone", "disc", "egg", "flag")
KEYS = {
    *("file", "index", "label", "confidence", "top5", "rotation", "quaternion_wxyz", "centre"),
    *("scale", "degenerate", "points"),
}


@pytest.fixture
def model() -> pc.Canonicalized:
    torch.manual_seed(0)
    predictor = pc.predictors.create("pointnet", num_classes=6, widths=(8, 16), embedding=16)
    model = pc.Canonicalized(predictor, pc.canonicalizers.PCA(4)).eval()
    model.coordinate_frame, model.classes, model.normalisation = "y-up", CLASSES, "unit-ball"
    return model


@pytest.fixture
def checkpoint(model: pc.Canonicalized, tmp_path: Path) -> str:
    model.save(tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def cloud(seed: int, size: int = 50) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.gamma(2.0, size=(size, 3)) * (3.0, 2.0, 1.0) + draw.normal(size=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files, eleven clouds, two bad files and a bad cloud."""
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for seed, size in enumerate((50, 80, 1500)):
        np.savetxt(folder / f"{seed}.xyz", cloud(seed, size))
    np.save(folder / "deep" / "many.npy", np.stack([cloud(seed) for seed in range(5)]))
    bad = np.stack([cloud(0), cloud(1)])
    bad[1, 7] = np.nan
    np.savez(folder / "deep" / "some.npz", points=bad)
    (folder / "broken.ply").write_bytes(b"ply\nformat ascii 1.0\nelement vertex 9\n")
    (folder / "empty.off").touch()
    return folder


def read(*files: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def keys(records: list[dict[str, Any]]) -> list[tuple[str, int | None]]:
    return [(record["file"], record["index"]) for record in records]


def test_a_line_says_what_the_model_says(
    checkpoint: str, model: pc.Canonicalized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = cloud(0)
    np.save(tmp_path / "a.npy", points)
    assert main(["predict", checkpoint, str(tmp_path / "a.npy"), "--device", "cpu"]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(record) == KEYS
    assert (record["file"], record["index"]) == (str(tmp_path / "a.npy"), None)
    assert record["points"] == 50
    assert record["degenerate"] is False
    ball = pc.interop.batch((points - points.mean(0)) / record["scale"], dtype=torch.float32)
    expected = model.predict(*ball)
    assert record["label"] == CLASSES[int(expected.labels)]
    assert record["confidence"] == pytest.approx(float(expected.confidence), abs=1e-6)
    assert record["top5"][0] == {"label": record["label"], "probability": record["confidence"]}
    top = [CLASSES[i] for i in expected.probabilities[0].argsort(descending=True)[:5]]
    assert [entry["label"] for entry in record["top5"]] == top
    rotation = torch.tensor(record["rotation"])
    assert float(geodesic_angle(rotation, expected.rotation[0])) < 1e-4
    w, *xyz = record["quaternion_wxyz"]
    assert w >= 0
    torch.testing.assert_close(roma.unitquat_to_rotmat(torch.tensor([*xyz, w])), rotation)
    canonical = (points - record["centre"]) / record["scale"] @ np.array(record["rotation"])
    assert np.linalg.norm(canonical, axis=1).max() == pytest.approx(1)


def test_a_turned_moved_and_scaled_file_has_the_same_label(
    checkpoint: str, tmp_path: Path, generator: torch.Generator
) -> None:
    mesh = trimesh.creation.cone(1.0, 3.0)
    mesh.apply_transform(trimesh.transformations.scale_matrix(1.5, direction=(1, 0, 0)))
    mesh.export(tmp_path / "a.off")
    turn = random_rotations(generator=generator, dtype=torch.float64).numpy()
    moved = trimesh.Trimesh(700 * mesh.vertices @ turn.T + 1e5, mesh.faces, process=False)
    moved.export(tmp_path / "b.off", digits=12)
    paths = [str(tmp_path / name) for name in ("a.off", "b.off")]
    assert main(["predict", checkpoint, *paths, "--json", str(tmp_path / "out.jsonl")]) == 0
    still, turned = read(tmp_path / "out.jsonl")
    assert still["label"] == turned["label"]
    assert turned["confidence"] == pytest.approx(still["confidence"], abs=1e-4)
    assert turned["scale"] == pytest.approx(700 * still["scale"], rel=1e-6)
    expected = turn @ still["centre"] * 700 + 1e5
    np.testing.assert_allclose(turned["centre"], expected, rtol=1e-7)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_reported_and_the_rest_go_on(
    workers: int,
    checkpoint: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["predict", checkpoint, str(folder), str(folder / "0.xyz"), "--json", str(out)]
    options = ["--num_workers", str(workers), "--batch_size", "3"]
    assert main([*arguments, *options, str(tmp_path / "absent.pcd")]) == 1
    records = read(out)
    good = [record for record in records if "error" not in record]
    bad = {record["file"]: record for record in records if "error" in record}
    assert len(set(keys(records))) == len(records) == 13
    assert all(set(record) == KEYS for record in good)
    assert len(good) == 9
    assert {Path(file).name for file in bad} == {
        *("broken.ply", "empty.off", "some.npz", "absent.pcd"),
    }
    some = str(folder / "deep" / "some.npz")
    assert bad[some]["index"] == 1
    assert (some, 0) in keys(good)
    error = capsys.readouterr().err
    assert error.count("pointcanon: ") == error.count("\n") == 4
    assert all(record["error"] in error for record in bad.values())
    # a cloud's answer does not depend on what it came with
    single = tmp_path / "single.jsonl"
    assert main(["predict", checkpoint, str(folder / "2.xyz"), "--json", str(single)]) == 0
    (alone,) = read(single)
    (there,) = (record for record in good if record["file"] == alone["file"])
    assert alone["points"] == there["points"] == 1024
    assert there["confidence"] == pytest.approx(alone["confidence"], abs=1e-5)


def test_resuming_neither_repeats_nor_skips(
    checkpoint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    command = ["predict", checkpoint, str(folder), "--json", str(out), "--batch_size", "4"]
    assert main(command) == 1
    whole = out.read_bytes()
    assert main(command) == 2
    assert f"{out} exists: go on with it (--resume)" in capsys.readouterr().err
    everything = sorted(map(repr, keys(read(out))))
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 5, ends[0], ends[3] + 40, ends[-2] - 1, ends[-1] - 1, ends[-1]):
        out.write_bytes(whole[:cut])
        assert main([*command, "--resume"]) == 1
        assert sorted(map(repr, keys(read(out)))) == everything
        kept = whole[:cut].rpartition(b"\n")[0]
        assert out.read_bytes().startswith(kept)
    # what failed stays failed, and other files are not taken for output
    assert out.read_bytes() == whole
    out.write_text("name,label\n")
    assert main([*command, "--resume"]) == 1
    assert "line 1 is not of this command's output" in capsys.readouterr().err
    assert out.read_text() == "name,label\n"


def test_a_long_torn_line_is_repaired(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for torn in (b"x" * 200_000, b"", b"{"):
        for whole in (b"", b"{}\n", b"{}\n" * 50_000):
            file.write_bytes(whole + torn)
            streaming._cut_torn_line(file)
            assert file.read_bytes() == whole


def test_processes_share_the_files_out(
    checkpoint: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["predict", checkpoint, str(folder), "--json", str(tmp_path / "out.jsonl")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main(command)
    shards = [tmp_path / f"out.{rank}-of-2.jsonl" for rank in (0, 1)]
    assert sorted(tmp_path.glob("out*")) == shards
    first, second = ({record["file"] for record in read(shard)} for shard in shards)
    assert not first & second
    assert {len(first), len(second)} == {3, 4}
    assert len(set(keys(read(*shards)))) == len(read(*shards)) == 12
    # torn off, and taken up by another number of processes
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-9])
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        main([*command, "--resume"])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert main(command) == 2  # it would be a second output beside the first
    assert main([*command, "--resume"]) == 1
    records = read(*tmp_path.glob("out*.jsonl"))
    assert len(set(keys(records))) == len(records) == 12


@pytest.mark.slow
def test_torchrun_shares_a_folder_out_and_fails_together(
    checkpoint: str, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "pointcanon", "predict", checkpoint, str(folder), "--json", str(out)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    shards = [tmp_path / f"out.{rank}-of-2.jsonl" for rank in (0, 1)]
    records = read(*shards)
    assert len(set(keys(records))) == len(records) == 12
    assert sum("error" in record for record in records) == 3
    assert all(read(shard) for shard in shards)


def test_files_in_another_frame_are_converted(
    checkpoint: str, model: pc.Canonicalized, tmp_path: Path
) -> None:
    points = torch.from_numpy(cloud(3))
    records = {}
    for frame in ("y-up", "z-up", "y-up-mirrored"):
        there = pc.coordinates.convert(points, "y-up", frame)
        np.save(tmp_path / f"{frame}.npy", there.numpy())
        arguments = ["predict", checkpoint, str(tmp_path / f"{frame}.npy")]
        out = tmp_path / f"{frame}.jsonl"
        assert main([*arguments, "--coordinate_frame", frame, "--json", str(out)]) == 0
        (records[frame],) = read(out)
    plain = records["y-up"]
    pose = np.array(plain["rotation"])
    canonical = (points.numpy() - plain["centre"]) @ pose
    for frame, record in records.items():
        assert record["confidence"] == pytest.approx(plain["confidence"], abs=1e-6)
        rotation = np.array(record["rotation"])
        assert np.linalg.det(rotation) == pytest.approx(1)
        there = pc.coordinates.convert(points, "y-up", frame).numpy()
        mine = torch.from_numpy((there - record["centre"]) @ rotation)
        back = pc.coordinates.convert(mine, frame, "y-up").numpy()
        np.testing.assert_allclose(back, canonical, atol=1e-5)


def test_large_clouds_go_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        streaming.Item(str(size), None, 1.0, points=np.zeros((size, 3)))
        for size in (10, 10, 90, 10, 10, 10, 300, 10)
    ]
    monkeypatch.setattr(streaming, "POINTS_AT_ONCE", 100)
    lots = [[int(item.file) for item in lot] for lot in streaming._lots(items, 2)]
    assert lots == [[10, 10], [90], [10, 10], [10], [300], [10]]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--num_points", "few"], 2, "'few' is no whole number"),
        (["--batch_size", "0"], 2, "0 is less than 1"),
        (["--coordinate_frame", "sideways"], 2, "unknown coordinate frame 'sideways'"),
        (["--device", "abacus"], 2, "--device abacus cannot be used here"),
        (["--resume"], 2, "--json FILE"),
        (["--json", "."], 2, "it is a folder"),
    ],
)
def test_bad_usage_is_one_line(
    options: list[str],
    status: int,
    words: str,
    checkpoint: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", checkpoint, str(folder), *options]) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_checkpoints_that_cannot_answer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = pc.predictors.create("pointnet-parts", num_parts=4, num_categories=0)
    pc.Canonicalized(parts, pc.canonicalizers.PCA(4)).save(tmp_path / "parts.safetensors")
    assert main(["predict", str(tmp_path / "parts.safetensors"), str(folder)]) == 2
    assert "labels points, not clouds" in capsys.readouterr().err
    seeing = pc.predictors.create("pointnet", num_classes=2, embedding=8, normals=True)
    model = pc.Canonicalized(seeing, pc.canonicalizers.PCA(4))
    model.save(tmp_path / "normals.safetensors")
    bare = [str(tmp_path / "normals.safetensors"), str(folder / "0.xyz")]
    assert main(["predict", *bare]) == 1
    assert "0.xyz has no normals" in capsys.readouterr().err
    assert main(["predict", *bare, "--coordinate_frame", "z-up"]) == 2
    assert "does not say its coordinate frame" in capsys.readouterr().err
    trimesh.creation.box().export(tmp_path / "box.stl")
    assert main(["predict", bare[0], str(tmp_path / "box.stl")]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["label"] in (0, 1)  # the card has no names
    assert record["scale"] == 1


def test_canonical_clouds_are_written(
    checkpoint: str, folder: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    turn = random_rotations(generator=generator, dtype=torch.float64).numpy()
    np.savetxt(folder / "turned.csv", cloud(0) @ turn.T + 9, delimiter=",")
    normals = np.eye(3)[np.arange(50) % 3]
    np.save(folder / "normals.npy", np.hstack((cloud(5), normals)).astype(np.float32))
    out = tmp_path / "out"
    command = ["canonicalize", checkpoint, str(folder), "--out", str(out)]
    assert main(command) == 1  # two files and a cloud are bad
    records = {(Path(r["file"]).name, r["index"]): r for r in read(out / "poses.jsonl")}
    written = {str(path.relative_to(out)) for path in out.rglob("*.*")} - {"poses.jsonl"}
    assert written == {
        *("0.xyz.ply", "1.xyz.ply", "2.xyz.ply", "turned.csv.ply", "normals.npy"),
        *(f"deep/many.{i:06d}.npy" for i in range(5)),
        "deep/some.000000.npz",
    }
    posed = pc.readers.read(out / "0.xyz.ply").points
    np.testing.assert_allclose(posed.mean(axis=0), 0, atol=1e-10)
    record = records["0.xyz", None]
    back = posed @ np.array(record["rotation"]).T + record["centre"]
    np.testing.assert_allclose(back, cloud(0), atol=1e-10)
    again = pc.readers.read(out / "turned.csv.ply").points
    signs = np.sign((again * posed).sum(axis=0))  # which of the four is heaviest is a tie
    np.testing.assert_allclose(again * signs, posed, atol=1e-3)
    assert len(pc.readers.read(out / "2.xyz.ply").points) == 1500
    stored = np.load(out / "normals.npy")
    rotation = np.array(records["normals.npy", None]["rotation"])
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored[:, 3:], normals @ rotation, atol=1e-6)
    assert np.array_equal(pc.readers.read(out / "deep" / "many.000000.npy").points.shape, (50, 3))
    before = (out / "poses.jsonl").read_bytes()
    assert main([*command, "--resume"]) == 1
    assert (out / "poses.jsonl").read_bytes() == before


def test_canonical_clouds_do_not_overwrite(
    checkpoint: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["canonicalize", checkpoint]
    assert main([*command, str(folder), "--out", str(folder / "out")]) == 2
    assert "lies in" in capsys.readouterr().err
    (tmp_path / "0.xyz").write_bytes((folder / "0.xyz").read_bytes())
    twice = [str(folder / "0.xyz"), str(tmp_path / "0.xyz")]
    assert main([*command, *twice, "--out", str(tmp_path / "out")]) == 2
    assert "would both be written to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
