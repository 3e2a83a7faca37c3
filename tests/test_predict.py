"""``predict`` and ``canonicalize`` on files and folders, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roma
import torch
import trimesh

import pointcanon as pc
from pointcanon.cli import main, streaming
from pointcanon.cli.options import with_options
from pointcanon.errors import UsageError
from pointcanon.predictors.public import yanx27
from pointcanon.rotations import geodesic_angle, random_rotations

CLASSES = ("ball", "box", "cone", "disc", "egg", "flag")
KEYS = {
    *("file", "index", "label", "confidence", "top5", "rotation", "quaternion_wxyz", "centre"),
    *("scale", "frame_weight", "degenerate", "points"),
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
    assert record["frame_weight"] == 0.25  # principal axes do not prefer any of the four signs
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


def weights_of(checkpoint: str, options: list[str], tmp_path: Path) -> list[float]:
    """The frame weights that both commands report of one cloud: of K principal frames 1 / K."""
    np.save(tmp_path / "one.npy", cloud(0))
    where = {"predict": ["--json"], "canonicalize": ["--out"]}
    found = []
    for command, place in where.items():
        out = tmp_path / f"{command}-{len(list(tmp_path.iterdir()))}.jsonl"
        arguments = [command, checkpoint, str(tmp_path / "one.npy"), *place, str(out), *options]
        assert main(arguments) == 0
        (record,) = read(out if out.is_file() else out / "poses.jsonl")
        found.append(record["frame_weight"])
    return found


def test_another_canonicalizer_is_put_in_front_and_set(
    checkpoint: str, model: pc.Canonicalized, tmp_path: Path
) -> None:
    single = pc.Canonicalized(model.predictor, pc.canonicalizers.PCA(1))
    single.save(tmp_path / "single.safetensors")
    pc.checkpoint.save(
        tmp_path / "bare.safetensors", model.predictor, pc.checkpoint.Card("predictor")
    )
    for network, options, count in (
        (checkpoint, [], 4),
        (checkpoint, ["--canonicalizer", "PCA"], 24),
        (checkpoint, ["--canonicalizer", str(tmp_path / "single.safetensors")], 1),
        (str(tmp_path / "bare.safetensors"), ["--canonicalizer", "PCA"], 24),
        (checkpoint, ["--canonicalizer_options", '{"poses": 24}'], 24),
        (checkpoint, ["--canonicalizer=PCA", '--canonicalizer_options={"poses": 1}'], 1),
    ):
        assert weights_of(network, options, tmp_path) == pytest.approx([1 / count] * 2)


def test_options_are_of_their_types() -> None:
    optimized = pc.canonicalizers.Optimized(scorer_widths=(8, 8), refiner_widths=(8, 8))
    changed = with_options(optimized, '{"looks": 4, "gate": 3, "points": null}')
    assert changed.options == {**optimized.options, "looks": 4, "gate": 3.0, "points": None}
    assert with_options(optimized, None) is optimized
    for text, words in (
        ('{"looks": 2.5}', "--canonicalizer_options, Optimized: .*looks.* 2.5"),
        ('{"gate": [3]}', "gate"),
        ('{"proposal": "PCA"}', "Optimized has no option 'proposal'; it has: keep, steps"),
        ('{"scorer_widths": [8, 9]}', "the weights do not fit"),
    ):
        with pytest.raises(UsageError, match=words):
            with_options(optimized, text)


def test_a_line_says_how_sure_the_frame_is(model: pc.Canonicalized, tmp_path: Path) -> None:
    sure = pc.canonicalizers.VectorNeuron(k=5, orthonormalise="matrix-fisher")
    model = pc.Canonicalized(model.predictor, sure).eval()
    model.save(tmp_path / "sure.safetensors")
    np.save(tmp_path / "a.npy", cloud(0))
    both = [str(tmp_path / "sure.safetensors"), str(tmp_path / "a.npy")]
    assert main(["predict", *both, "--json", str(tmp_path / "out.jsonl")]) == 0
    assert main(["canonicalize", *both, "--out", str(tmp_path / "out")]) == 0
    (predicted,) = read(tmp_path / "out.jsonl")
    (posed,) = read(tmp_path / "out" / "poses.jsonl")
    assert set(predicted) == KEYS | {"frame_confidence"}
    expected = model.predict(*pc.interop.batch(cloud(0), dtype=torch.float32)).frame_confidence
    assert expected is not None
    for record in (predicted, posed):
        assert record["frame_confidence"] == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("frame", ["y-up", "y-up-mirrored"])
def test_a_mirrored_and_scaled_cloud_is_posed_as_the_matrix_says(
    frame: str, model: pc.Canonicalized, tmp_path: Path, generator: torch.Generator
) -> None:
    both_hands = pc.canonicalizers.ForGroup(pc.canonicalizers.PCA(1), "O3", scale=True)
    front = pc.Canonicalized(model.predictor, both_hands)
    front.coordinate_frame, front.normalisation = "y-up", None
    front.save(tmp_path / "front.safetensors")
    turn = random_rotations(generator=generator, dtype=torch.float64).numpy()
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", cloud(0))
    np.save(tmp_path / "in" / "b.npy", -3 * cloud(0) @ turn.T + 7)  # mirrored, turned, larger
    command = ["canonicalize", str(tmp_path / "front.safetensors"), str(tmp_path / "in")]
    assert main([*command, "--out", str(tmp_path / "out"), "--coordinate_frame", frame]) == 0
    records = read(tmp_path / "out" / "poses.jsonl")
    assert {record.get("mirrored") for record in records} == {True, None}
    canonical = []
    for record in records:
        rotation, points = np.array(record["rotation"]), np.load(record["file"])
        mirrored = record.get("mirrored", False)
        assert ("quaternion_wxyz" in record) is not mirrored
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(-1 if mirrored else 1)
        canonical.append((points - record["centre"]) / record["scale"] @ rotation)
        written = np.load(record["output"])  # in its size
        np.testing.assert_allclose(written, canonical[-1] * record["scale"], atol=1e-10)
    np.testing.assert_allclose(*canonical, atol=1e-4)
    assert np.linalg.norm(canonical[0], axis=1).max() == pytest.approx(1, abs=1e-5)
    assert records[1]["scale"] == pytest.approx(3 * records[0]["scale"], rel=1e-5)


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


@pytest.mark.parametrize("batch_size", ["1", "8"])
def test_a_cloud_without_an_answer_does_not_stop_the_others(
    batch_size: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    predictor = pc.predictors.create("dgcnn", num_classes=2, k=5, embedding=8)
    with torch.no_grad():
        predictor.head[-1].weight.mul_(1e12)
    pc.Canonicalized(predictor, pc.canonicalizers.PCA(1)).save(tmp_path / "model.safetensors")
    clouds = {"a": cloud(0), "few": cloud(1, 3), "huge": 1e32 * cloud(2), "z": cloud(3)}
    clouds["far"] = 1e37 * cloud(4)  # each number is in range, their sum is not
    for name, points in clouds.items():
        np.save(tmp_path / f"{name}.npy", points)
    files = [str(tmp_path / "model.safetensors"), *(str(tmp_path / f"{n}.npy") for n in clouds)]
    options = ["--batch_size", batch_size]
    search = ["--canonicalizer=Search", '--canonicalizer_options={"budget": 2, "keep": 1}']
    words = {
        "few": ": DGCNN looks at k = 5 neighbours, but a cloud has 3 points",
        "huge": ": the network answers NaN or infinity: its coordinates reach",
        "far": " has coordinates beyond the range of float32",
    }
    for command, lines, bad in (
        (["predict", *files, "--json", "out.jsonl"], "out.jsonl", {"few", "huge", "far"}),
        (["canonicalize", *files, *search, "--out", "out"], "out/poses.jsonl", {"few", "far"}),
    ):
        assert main([*command, *options]) == 1
        records = {Path(record["file"]).stem: record for record in read(Path(lines))}
        assert set(records) == set(clouds)
        errors = {name: record["error"] for name, record in records.items() if "error" in record}
        assert set(errors) == bad
        shown = capsys.readouterr().err.splitlines()
        for name in bad:
            assert errors[name].startswith(f"{tmp_path / name}.npy{words[name]}")
            assert f"pointcanon: {errors[name]}" in shown
            assert records[name]["index"] is None
        assert len(shown) == len(bad)


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


def test_a_reader_that_has_seen_enough_ends_it_quietly(
    checkpoint: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["predict", checkpoint, str(folder / "0.xyz")]) == 1
        print("and what is still to be written goes nowhere")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_killed_run_is_taken_up(checkpoint: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "many", tmp_path / "out.jsonl"
    folder.mkdir()
    for seed in range(600):
        np.save(folder / f"{seed}.npy", cloud(seed, 20))
    command = [sys.executable, "-m", "pointcanon", "predict", checkpoint, str(folder)]
    command += ["--json", str(out), "--batch_size", "1", "--device", "cpu"]
    for least in (5, 200):
        run = subprocess.Popen([*command, "--resume"], env={**os.environ, "OMP_NUM_THREADS": "1"})
        while run.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > least):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    before = out.read_bytes()
    assert 200 < before.count(b"\n") < 600
    out.write_bytes(before + b'{"file": "half a li')  # had it come between two writes
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert sorted(record["file"] for record in read(out)) == sorted(map(str, folder.iterdir()))


PEAK = """
import resource, sys
from pointcanon.cli import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss has another unit")
def test_thousands_of_files_take_the_memory_of_a_few(checkpoint: str, tmp_path: Path) -> None:
    peaks = []
    for count in (200, 5000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for seed in range(count):
            np.save(folder / f"{seed}.npy", cloud(seed, 64))
        arguments = ["predict", checkpoint, str(folder), "--json", str(tmp_path / f"{count}.jsonl")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *arguments, "--device", "cpu"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        status, kibibytes = map(int, done.stdout.split())
        assert status == 0
        assert len(read(tmp_path / f"{count}.jsonl")) == count
        peaks.append(kibibytes)
    assert peaks[1] - peaks[0] < 20 * 1024  # holding 5,000 of them would take more


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
        (
            ["--canonicalizer", "LSD"],
            2,
            "'LSD' is neither a checkpoint nor one of: modelnet40",
        ),
        (["--canonicalizer_options", "looks=4"], 2, "is 'looks=4'; give JSON, such as '{\"answers"),
        (["--canonicalizer_options", "[4]"], 2, "is '[4]'; give JSON"),
        (
            ["--canonicalizer_options", '{"looks": 4}'],
            2,
            "PCA has no option 'looks'; it has: poses",
        ),
        (["--canonicalizer_options", '{"poses": "few"}'], 2, "poses"),
        (["--canonicalizer_options", '{"poses": 5}'], 2, "poses"),
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
    assert record["frame_weight"] == 0.25
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


# networks that label points

PARTS = ("box/lid", "box/side", "cone/tip", "cone/base", "cone/side")


def part_model(**options: Any) -> pc.Canonicalized:
    torch.manual_seed(0)
    small: dict[str, Any] = {"transforms": False, "widths": (8, 8), "embedding": 16, "head": (16,)}
    network = pc.predictors.PointNetParts(len(PARTS), **{"num_categories": 2, **small, **options})
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):  # or all points would be of one part
            torch.nn.init.normal_(module.weight)
    network.classes, network.normalisation = ("box", "cone"), "unit-ball"
    network.parts = PARTS
    return pc.Canonicalized(network, pc.canonicalizers.PCA(4)).eval()


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A checkpoint, and beside it a folder with one folder for each category."""
    part_model().save(tmp_path / "parts.safetensors")
    for seed, name in enumerate(("box/a.npy", "cone/deep/b.xyz", "cone/c.npz")):
        file = tmp_path / "scans" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".npy":
            np.save(file, cloud(seed))
        elif file.suffix == ".npz":
            np.savez(file, points=np.stack([cloud(seed), cloud(seed + 1)]))
        else:
            np.savetxt(file, cloud(seed, 80))
    return tmp_path


def test_the_card_names_the_parts(parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(parts / "parts.safetensors")]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["classes"], card["parts"]) == (["box", "cone"], list(PARTS))
    model = pc.load(parts / "parts.safetensors")
    assert model.parts == model.predictor.parts == PARTS
    shapenet = yanx27.SHAPENET_PART[50]
    assert shapenet.parts == pc.datasets.ShapeNetPart.parts
    assert pc.classes.part_ranges(*map(tuple, (card["classes"], PARTS))) == (range(2), range(2, 5))
    assert pc.classes.part_ranges(["box", "egg"], ["0", "1"]) == (range(2), range(2))


@pytest.mark.parametrize("num_points", [None, 30])
def test_every_point_has_a_label_in_its_place(num_points: int | None, parts: Path) -> None:
    out = parts / "out.jsonl"
    command = ["predict", str(parts / "parts.safetensors"), str(parts / "scans"), "--labels"]
    command += ["--json", str(out), "--out", str(parts / "labels"), "--batch_size", "3"]
    assert main([*command, *(() if num_points is None else ("--num_points", "30"))]) == 0
    records = {(Path(record["file"]).name, record["index"]): record for record in read(out)}
    assert len(records) == 4
    model = part_model()
    for (name, index), record in records.items():
        category = ("box", "cone").index(record["category"])
        points = pc.readers.CloudFile(record["file"])[index or 0].points
        assert record["points"] == len(points) == len(record["labels"])
        ball = torch.from_numpy((points - points.mean(0)) / record["scale"])[None].float()
        told = torch.tensor([category])
        expected = model.predict(ball, category=told, max_points=num_points).probabilities[0]
        own = [part.startswith(record["category"]) for part in PARTS]
        expected[:, ~torch.tensor(own)] = 0
        confidence, labels = expected.max(dim=1)
        assert record["labels"] == labels.tolist(), name
        assert record["confidence"] == pytest.approx(float(confidence.mean()), abs=1e-5)
        counts = {PARTS[label]: record["labels"].count(label) for label in set(record["labels"])}
        assert {part: found["points"] for part, found in record["parts"].items()} == counts
        assert all(PARTS[found["label"]] == part for part, found in record["parts"].items())
        stored: Any = (
            trimesh.load(record["output"]) if name == "b.xyz" else np.load(record["output"])
        )
        if name == "b.xyz":
            np.testing.assert_allclose(stored.vertices, points)
            written = stored.metadata["_ply_raw"]["vertex"]["data"]["label"].tolist()
            assert len(np.unique(stored.colors, axis=0)) == len(counts)
        else:
            written = (stored["labels"] if name == "c.npz" else stored).tolist()
        assert written == record["labels"]
    assert len(set(records["b.xyz", None]["labels"])) > 1
    assert Path(records["c.npz", 1]["output"]).relative_to(parts) == Path(
        "labels/cone/c.000001.npz"
    )


def test_the_category_is_told_found_or_not_needed(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = str(parts / "parts.safetensors"), parts / "out.jsonl"
    np.save(parts / "loose.npy", cloud(3))
    command = ["predict", checkpoint, "--json", str(out)]
    assert main([*command, str(parts / "scans"), str(parts / "loose.npy")]) == 2
    error = capsys.readouterr().err
    assert "loose.npy is not known: give --category, or" in error
    assert "box, cone" in error
    assert main([*command, str(parts / "loose.npy"), "--category", "egg"]) == 2
    assert "'egg' is none of the network's: box, cone" in capsys.readouterr().err
    assert not out.exists()
    told = ["--category", "cone"]
    assert main([*command, str(parts / "loose.npy"), str(parts / "scans/box"), *told]) == 0
    assert {record["category"] for record in read(out)} == {"cone"}
    assert all(part.startswith("cone/") for record in read(out) for part in record["parts"])
    out.unlink()
    assert main([*command, str(parts / "scans/cone")]) == 0  # the folder that is named counts
    assert {record["category"] for record in read(out)} == {"cone"}
    out.unlink()
    free = part_model(num_categories=0)
    free.classes = free.parts = None
    free.save(parts / "free.safetensors")
    assert (
        main(["predict", str(parts / "free.safetensors"), *command[2:], str(parts / "scans")]) == 0
    )
    assert {record["category"] for record in read(out)} == {None}
    assert {part for record in read(out) for part in record["parts"]} <= set("01234")


@pytest.mark.parametrize("option", [["--category", "box"], ["--labels"], ["--out", "labels"]])
def test_what_is_for_points_is_refused_for_clouds(
    option: list[str], checkpoint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", checkpoint, str(folder / "0.xyz"), *option]) == 2
    assert f"{option[0]} is for networks that label points" in capsys.readouterr().err


def test_a_canonicalizer_that_looks_at_normals_gets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steerable = pc.canonicalizers.Steerable(normals=True, channels=2, layers=1)
    model = pc.Canonicalized(
        pc.predictors.create("pointnet", num_classes=2, embedding=8, widths=(8,)), steerable
    )
    model.save(tmp_path / "model.safetensors")
    trimesh.creation.cone(1.0, 3.0).export(tmp_path / "a.stl")
    np.save(tmp_path / "b.npy", cloud(0))
    for command in (["predict"], ["canonicalize", "--out", str(tmp_path / "out")]):
        name, *options = command
        files = [str(tmp_path / "a.stl"), str(tmp_path / "b.npy")]
        assert main([name, str(tmp_path / "model.safetensors"), *files, *options]) == 1
        assert "b.npy has no normals" in capsys.readouterr().err


def test_clouds_are_not_copied_for_want_of_a_canonicalizer(
    model: pc.Canonicalized, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare.safetensors"
    pc.checkpoint.save(bare, model.predictor, pc.checkpoint.Card("predictor"))
    np.save(tmp_path / "one.npy", cloud(0))
    arguments = [str(bare), str(tmp_path / "one.npy"), "--out", str(tmp_path / "posed")]
    assert main(["canonicalize", *arguments]) == 2
    assert "has no canonicalizer" in capsys.readouterr().err
    assert not (tmp_path / "posed").exists()
