"""Files as enemies: damage, code, bombs and paths that lead elsewhere.

Whatever a file holds, reading it ends in an answer or in one error of pointcanon that names it;
nothing in it is executed, nothing is written, and memory stays near the size of the file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from public_formats import write_h5, write_txt
from safetensors.torch import save_file
from targets import TARGETS, findings
from test_checkpoint import rewrite_card
from test_readers import POINTS, h5, huge_h5, huge_npy, npy, npz, ply
from torch_geometric.data import Data

from pointcanon import checkpoint, predictors
from pointcanon.cli import main
from pointcanon.datasets import modelnet_layouts as modelnet
from pointcanon.datasets import shapenet_part_layouts as shapenet
from pointcanon.errors import CheckpointError, DataError, PointcanonError, UsageError

HERE = Path(__file__).parent
GROWTH = 160 << 20
"""Bytes that reading a bomb may take; each would unpack to more."""


def read(name: str, path: Path) -> str:
    """What is said of a file; empty if it is read."""
    said = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].read(path)
    except PointcanonError as error:
        said = str(error)
    assert not said or str(path) in said
    return said


# --------------------------------------------------------------------------------------- damage


def damaged(sound: bytes, draw: np.random.Generator) -> bytes:
    """Cut off, with bits flipped, bytes replaced, or a piece repeated or left out."""
    where = draw.integers(len(sound), size=2)
    start, stop = sorted(where.tolist())
    other = bytearray(sound)
    match int(draw.integers(5)):
        case 0:
            return sound[:start]
        case 1:
            for place in draw.integers(min(len(sound), 400), size=3):
                other[place] ^= 1 << int(draw.integers(8))
            return bytes(other)
        case 2:
            other[start : start + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"9999", b"\x7f\n{["])
            return bytes(other)
        case 3:
            return sound[:stop] + sound[start:]
    return sound[:start] + sound[stop:]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("trials", [12, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_is_one_error(name: str, trials: int, tmp_path: Path) -> None:
    target = TARGETS[name]
    path = tmp_path / f"file{target.suffix}"
    draw = np.random.default_rng(0)
    for sound in target.sound():
        path.write_bytes(sound)
        target_says = read(name, path)
        assert not target_says or name in ("torch", "torch_old")  # of no known layout
        for _ in range(trials):
            path.write_bytes(damaged(sound, draw))
            read(name, path)


@pytest.mark.parametrize("name", TARGETS)
def test_what_fuzzing_found_stays_mended(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{TARGETS[name].suffix}"
    for found in findings(name):
        path.write_bytes(found.read_bytes())
        read(name, path)


# ----------------------------------------------------------------------------------------- code


class Attack:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


def pickled(path: Path, attack: Attack) -> None:
    path.write_bytes(pickle.dumps(attack))


def in_npy(path: Path, attack: Attack) -> None:
    np.save(path, np.array([attack], dtype=object))


def in_npz(path: Path, attack: Attack) -> None:
    values = np.array([attack], dtype=object)
    with path.open("wb") as file:  # a name would be given the ending
        np.savez(file, points=values, labels=values, split=values)  # type: ignore[arg-type]


def in_yaml(path: Path, attack: Attack) -> None:
    path.write_text(f"data: !!python/object/apply:os.mknod ['{attack.mark}']\n")


def in_state(old: bool, path: Path, attack: Attack) -> None:
    state = OrderedDict({"a.weight": torch.zeros(2), "b": attack})
    torch.save(state, path, _use_new_zipfile_serialization=not old)


CODE: dict[str, tuple[str, Callable[[Path, Attack], object]]] = {
    "npy": ("npy", in_npy),
    "npy that is a pickle": ("npy", pickled),
    "npz": ("npz", in_npz),
    "rna": ("rna", in_npz),
    "modelnet40-c, clouds": ("modelnet40_c_clouds", in_npy),
    "modelnet40-c, labels": ("modelnet40_c_labels", in_npy),
    "modelnet40-c that is a pickle": ("modelnet40_c_clouds", pickled),
    "modelnet40-c that is an archive": ("modelnet40_c_labels", in_npz),
    "torch": ("torch", lambda path, attack: in_state(False, path, attack)),
    "torch of old": ("torch_old", lambda path, attack: in_state(True, path, attack)),
    "a bare pickle": ("torch", pickled),
    "pyg": ("shapenet_pyg", lambda path, attack: torch.save(({"pos": attack}, None, Data), path)),
    "recipe": ("recipe", in_yaml),
}


@pytest.mark.parametrize("case", CODE)
def test_nothing_in_a_file_is_executed(case: str, tmp_path: Path) -> None:
    name, write = CODE[case]
    path, mark = tmp_path / f"file{TARGETS[name].suffix}", tmp_path / "executed"
    write(path, Attack(mark))
    assert read(name, path)
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_attack_would_work(tmp_path: Path) -> None:
    in_state(False, tmp_path / "file", Attack(tmp_path / "executed"))
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "executed").exists()


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    network = predictors.PointNet(2, widths=(2,), embedding=2)
    network.shared[0].norm.running_var.fill_(value)
    checkpoint.save(path, network, checkpoint.Card("predictor"))
    with pytest.raises(CheckpointError, match=r"net\.safetensors.*NaN or infinite weights in"):
        predictors.load(path)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.eye(3).to_sparse(),
        torch.empty(3, 3, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_weights_that_are_not_there_are_refused(weight: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"feature_model.conv1.weight": weight}, path)
    assert read("torch", path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool])
def test_weights_of_another_kind_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    network = predictors.PointNet(2, widths=(2,), embedding=2)
    checkpoint.save(path, network, checkpoint.Card("predictor"))
    rewrite_card(path, sha256=...)  # written so, rather than damaged
    with checkpoint.safe_open(path, framework="pt") as file:
        card = file.metadata()
    state = {key: value.to(dtype) for key, value in network.state_dict().items()}
    save_file(state, path, metadata=card)
    with pytest.raises(CheckpointError, match=rf"net\.safetensors.*holds {dtype}"):
        predictors.load(path)


# ---------------------------------------------------------------------------------------- bombs


def deflated(size: int) -> bytes:
    """So many zeros, without ever having them."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def lying_npz(name: str, said: int, held: int = 192 << 20) -> bytes:
    """An archive whose member says it has ``said`` bytes and unpacks to ``held``."""
    packed, name = deflated(held), name.encode()
    sizes = struct.pack("<III", 0, len(packed), said)
    local = b"PK\3\4" + struct.pack("<HHHHH", 20, 0, 8, 0, 0) + sizes
    local += struct.pack("<HH", len(name), 0) + name + packed
    central = b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 0) + sizes
    central += struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + b"PK\5\6" + end


def packed_again(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive, with its members compressed."""
    from io import BytesIO

    out = BytesIO()
    with (
        zipfile.ZipFile(BytesIO(content)) as sound,
        zipfile.ZipFile(out, "w", method, compresslevel=1) as packed,
    ):
        for info in sound.infolist():
            packed.writestr(info.filename, sound.read(info))
    return out.getvalue()


def torch_bomb(content: object) -> bytes:
    from io import BytesIO

    out = BytesIO()
    torch.save(content, out)
    return packed_again(out.getvalue())


def huge_chunk() -> bytes:
    from io import BytesIO

    out = BytesIO()
    with h5py.File(out, "w") as file:
        options = {"chunks": (1, 1 << 27, 3), "dtype": "f4", "compression": "gzip"}
        held = file.create_dataset("data", (1, 1 << 27, 3), **options)
        held.id.write_direct_chunk((0, 0, 0), np.random.default_rng(0).bytes(500_000))
    return out.getvalue()


def zeros_h5(clouds: tuple[int, int, int], labels: int, chunks: int = 0) -> bytes:
    """Clouds and labels of zeros; where there are many, in so many chunks of 32 MiB, compressed."""
    from io import BytesIO

    out = BytesIO()
    with h5py.File(out, "w") as file:
        for key, shape in (("data", clouds), ("label", (labels,))):
            if math.prod(shape) < 1 << 20:
                file[key] = np.zeros(shape, dtype=np.float32)
                continue
            rows = (8 << 20) // math.prod(shape[1:])
            chunk = zlib.compress(bytes(4 * rows * math.prod(shape[1:])))
            options = {"dtype": "f4", "compression": "gzip"}
            held = file.create_dataset(key, shape, chunks=(rows, *shape[1:]), **options)
            for number in range(chunks):
                held.id.write_direct_chunk((number * rows, *(0 for _ in shape[1:])), chunk)
    return out.getvalue()


def wide(path: Path) -> bytes:
    """A checkpoint whose card speaks of a network of 40 GB."""
    checkpoint.save(path, predictors.PointNet(2, widths=(2,)), checkpoint.Card("predictor"))
    made = checkpoint.describe(predictors.PointNet(2, widths=(2,)))
    made["hyperparameters"]["widths"] = [100_000, 100_000]
    rewrite_card(path, architecture=made)
    return path.read_bytes()


def wide_state() -> bytes:
    """Weights whose shapes, each small, together make a network of 40 GB."""
    from public_formats import PublicClassifier
    from targets import torch_file

    state = PublicClassifier(2, embedding=4).state_dict()
    for key in [key for key in state if "conv5" in key or "bn5" in key]:
        state[key] = torch.zeros(100_000, *state[key].shape[1:])
    state["linear1.weight"] = torch.zeros(100_000, 1)
    return torch_file(state)


BOMBS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "h5 of clouds that are not there": ("h5", lambda path: huge_h5()),
    "h5 of a huge chunk": ("h5", lambda path: huge_chunk()),
    "npy of a huge shape": ("npy", lambda path: huge_npy()),
    "npy of a huge header": ("npy", lambda path: b"\x93NUMPY\2\0\xff\xff\xff\xff{" + bytes(99)),
    "scans that are not there": ("scan_object_nn", lambda path: zeros_h5((1 << 40, 8, 3), 1 << 40)),
    "scans that unpack": (
        "scan_object_nn",
        lambda path: zeros_h5((36 << 10, 2731, 3), 36 << 10, 36),
    ),
    "labels that unpack": ("scan_object_nn", lambda path: zeros_h5((4, 8, 3), 1 << 28, 32)),
    "labels that unpack, modelnet": ("modelnet_h5", lambda path: zeros_h5((4, 8, 3), 1 << 28, 32)),
    "npy of a huge shape, modelnet40-c": ("modelnet40_c_clouds", lambda path: huge_npy()),
    "npy of empty clouds without number": ("npy", lambda path: npy(np.empty((1 << 50, 0, 3)))),
    "npz that lies": ("npz", lambda path: lying_npz("points.npy", 100)),
    "npz that is too large": ("npz", lambda path: lying_npz("points.npy", 2 << 30)),
    "npz in another compression": (
        "npz",
        lambda path: packed_again(npz(points=np.zeros((1 << 20, 3))), zipfile.ZIP_BZIP2),
    ),
    "rna that lies": ("rna", lambda path: lying_npz("points.npy", 100)),
    "torch": ("torch", lambda path: torch_bomb({"a": torch.zeros(24 << 20)})),
    "torch of a wide network": ("torch", lambda path: wide_state()),
    "pyg": ("shapenet_pyg", lambda path: torch_bomb(({"pos": torch.zeros(8 << 20, 3)}, None))),
    "safetensors of a huge header": (
        "safetensors",
        lambda path: struct.pack("<Q", 1 << 40) + b'{"a":{}}',
    ),
    "safetensors of a wide network": ("safetensors", wide),
    "ply": (
        "ply",
        lambda path: ply("binary_big_endian").replace(b"vertex 5", b"vertex 99999999999999"),
    ),
    "pcd": (
        "pcd",
        lambda path: (
            b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nPOINTS 1\n"
            b"DATA binary_compressed\n" + struct.pack("<II", 8, 1 << 31) + bytes(8)
        ),
    ),
    "yaml of aliases": (
        "recipe",
        lambda path: (
            b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(
                b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9))
                for i in range(1, 12)
            )
        ),
    ),
    "yaml in itself": ("recipe", lambda path: b"a: &a [*a]\n"),
    "yaml without bottom": ("recipe", lambda path: b"a: " + b"[" * 5000),
    "json without bottom": ("shapenet_json", lambda path: b"[" * 100_000),
    "lines without bottom": ("resumed", lambda path: b"[" * 100_000 + b"\n"),
    "off of comments": ("modelnet_off", lambda path: b"# " * 50_000 + b"X"),
}


def test_bombs_do_not_go_off(tmp_path: Path) -> None:
    """In another process, whose memory is limited and measured: a fork, all imported."""
    names = {}
    for number, (name, make) in enumerate(BOMBS.values()):
        path = tmp_path / f"file{number}{TARGETS[name].suffix}"
        path.write_bytes(make(path))
        names[str(path)] = name
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        told = pool.submit(light_the_fuses, names).result(timeout=600)
    for case, (grown, seconds, message) in zip(BOMBS, told, strict=True):
        assert message, f"{case}: it was read"
        assert "memory" not in message, f"{case}: {message}"
        assert "allocate" not in message, f"{case}: {message}"
        assert grown < GROWTH, f"{case}: {grown >> 20} MiB"
        assert seconds < 60, f"{case}: {seconds} s"
    assert len(list(tmp_path.iterdir())) == len(BOMBS)


def light_the_fuses(names: dict[str, str]) -> list[tuple[int, float, str]]:
    """Read each file: how much memory and time it took, and what was said of it."""
    torch.set_num_threads(1)  # those of the parent are not here
    for name in set(names.values()):  # what is imported on the way is not counted
        path = Path(next(iter(names))).with_name(f"sound{TARGETS[name].suffix}")
        path.write_bytes(TARGETS[name].sound()[0])
        read(name, path)
        path.unlink()
    pages = int(Path("/proc/self/statm").read_text().split()[5])  # of data
    limit = pages * resource.getpagesize() + (3 << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    told = []
    for path, name in names.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        message = read(name, Path(path))
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        told.append((grown, time.process_time() - began, message))
    return told


# ---------------------------------------------------------------------------------------- paths


def test_lists_name_nothing_outside_their_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("0.1,0.2,0.3,0,0,1\n")
    root = write_txt(tmp_path)
    (root / "airplane" / "airplane_").mkdir()
    for name in ("airplane_/../../../secret", str(tmp_path / "secret"), "airplane_" + "0" * 400):
        (root / "modelnet40_test.txt").write_text(f"{name}\n")
        (layout,) = modelnet.layouts_at(root)
        with pytest.raises(DataError, match=r"modelnet40_test\.txt, line 1"):
            layout.files("test", layout.classes)
    root = write_h5(tmp_path, per_class=2)
    (root / "secret.h5").write_bytes(b"")
    lines = ["../secret.txt", str(secret), "..", "a" * 400, "\0"]
    (root / "test_files.txt").write_text("\n".join(lines))
    (layout,) = modelnet.layouts_at(root)
    present, missing = layout.files("test", layout.classes)
    assert not present
    assert len(missing) == len(lines)


def test_shapenet_lists_name_nothing_outside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("0 0 0 0 0 1 0\n")
    lists = tmp_path / "data" / "train_test_split"
    lists.mkdir(parents=True)
    (tmp_path / "data" / "02691156").mkdir()
    names = ["x/02691156/..", f"x/02691156/{'a' * 400}", "x/02691156/\0"]
    for name in [*names, "x/02691156/../../secret", 3, None, [], "\ud800"]:
        (lists / "shuffled_test_file_list.json").write_text(json.dumps([name]))
        (layout,) = shapenet.layouts_at(tmp_path / "data")
        if name in names:
            present, missing = layout.files("test", layout.classes)
            assert not present
            assert len(missing) == 1
        else:
            with pytest.raises(DataError, match=r"shuffled_test_file_list\.json, entry 0"):
                layout.files("test", layout.classes)


@pytest.mark.parametrize("name", ["h5", "modelnet_h5", "shapenet_h5", "scan_object_nn"])
@pytest.mark.parametrize("way", ["external link", "soft link", "external storage", "virtual"])
def test_h5_files_open_no_others(name: str, way: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.h5"
    secret.write_bytes(h5(data=POINTS))
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    path = tmp_path / "file.h5"
    path.write_bytes(TARGETS[name].sound()[0])
    with h5py.File(path, "a") as file:
        shape = file["data"].shape
        del file["data"]
        if way == "external link":
            file["data"] = h5py.ExternalLink(str(secret), "/data")
        elif way == "soft link":
            file["data"] = h5py.SoftLink("/label")
        elif way == "external storage":
            whole = [(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("data", shape, dtype="f4", external=whole)
        else:
            layout = h5py.VirtualLayout(shape, dtype="f4")
            layout[...] = h5py.VirtualSource(str(secret), "data", shape=shape)
            file.create_virtual_dataset("data", layout)
    assert read(name, path)


def test_members_of_archives_are_not_unpacked(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    with zipfile.ZipFile(inside / "file.npz", "w") as archive:
        for name in ("../evil.npy", str(tmp_path / "evil.npy"), "points.npy"):
            archive.writestr(name, npy(POINTS))
    assert read("npz", inside / "file.npz") == ""
    assert sorted(tmp_path.iterdir()) == [inside]


def test_results_stay_in_the_folder_that_is_named(tmp_path: Path) -> None:
    checkpoint.save(
        tmp_path / "net.safetensors",
        predictors.PointNet(2, widths=(2,), embedding=2),
        checkpoint.Card("predictor"),
    )
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "a.npy").write_bytes(npy(POINTS))
    (tmp_path / "b.npy").write_bytes(npy(POINTS))
    (data / "link.npy").symlink_to(tmp_path / "b.npy")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "out"
    files = [str(data), f"{data}/deep/../../b.npy"]
    arguments = ["canonicalize", str(tmp_path / "net.safetensors"), *files]
    arguments += ["--canonicalizer", "PCA", "--out", str(out)]
    assert main(arguments) == 0
    names = ["b.npy", "deep", "deep/a.npy", "link.npy", "poses.jsonl"]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before == {path: after[path] for path in before}


def test_recipes_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / "recipe.yaml"
    for place in ("model", "data", "trainer"):
        attack = {"class_path": "os.mknod", "init_args": {"path": str(mark)}}
        path.write_text(yaml.safe_dump({place: {"canonicalizer": attack, "name": attack}}))
        arguments = ["train", "--config", str(path), "--output", str(tmp_path / "out")]
        assert main(arguments) == 2
        assert not mark.exists()
    assert "Traceback" not in capsys.readouterr().err
    path.write_text("!!python/name:os.system")
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        TARGETS["recipe"].read(path)


def test_names_in_files_do_not_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.pth"
    torch.save({"\x1b]0;owned\x07\n\x1b[2Jweight": torch.zeros(2)}, path)
    assert main(["predict", str(path), str(path)]) == 1
    error = capsys.readouterr().err
    assert error[:-1].isprintable()


def test_names_of_classes_do_not_either(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    network = predictors.PointNet(2, widths=(2,), embedding=2)
    checkpoint.save(path, network, checkpoint.Card("predictor", classes=("a", "b")))
    rewrite_card(path, classes=["a", "\x1b[2Jb"])
    with pytest.raises(CheckpointError, match=r"net\.safetensors: the card's classes is .*x1b"):
        predictors.load(path)


# -------------------------------------------------------------------------------------- folders

SOUND = (b"good.npy", b"\x1b]0;owned\x07.npy", b"\xff.npy", b"$\\frac{/a.npy", b"[red]/a.npy")


def hostile_folder(folder: Path) -> None:
    """Clouds of odd names, and among them all that is no cloud."""
    for number, name in enumerate(SOUND):
        path = os.fsencode(folder) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        points = np.random.default_rng(number).normal(size=(40, 3))
        Path(os.fsdecode(path)).write_bytes(npy(points))
    os.mkfifo(folder / "pipe.npy")
    (folder / "folder.npy").mkdir()
    (folder / "loop").symlink_to(folder)
    for name, target in {"gone": "nowhere", "itself": "itself.npy", "zeros": "/dev/zero"}.items():
        (folder / f"{name}.npy").symlink_to(target)
    in_npy(folder / "code.npy", Attack(folder.parent / "executed"))
    for name, content in {
        "empty.ply": b"",
        "\x1b[2Jtorn.ply": b"ply\n",
        "huge.npy": huge_npy(),
        "huge.h5": huge_h5(),
        "nan.npy": npy(np.full((4, 3), np.nan)),
        "complex.npy": npy(np.zeros((4, 3), complex)),
        "flat.npy": npy(np.zeros((4, 2))),
        "far.npy": npy(np.full((4, 3), 1e300)),
    }.items():
        (folder / name).write_bytes(content)


BAD = 13
"""Files of a hostile folder that hold no cloud."""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a network in ``shop.py``."""
    (tmp_path / "shop.py").write_text("def net(points):\n    return points.var(dim=1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    return tmp_path


def test_a_folder_of_all_that_is_read_for_what_is_sound(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile_folder(shop / "scans")
    checkpoint.save(
        "net.safetensors",
        predictors.PointNet(2, widths=(2,), embedding=2),
        checkpoint.Card("predictor"),
    )
    audited = "audit shop:net scans --rotations 1 --device cpu --json found.json --pictures drawn"
    for command, status in (
        (audited, 0),
        ("predict net.safetensors scans --device cpu --json out.jsonl", 1),
        ("canonicalize net.safetensors scans --device cpu --canonicalizer PCA --out posed", 1),
    ):
        assert main(command.split()) == status, capsys.readouterr().err
        said = capsys.readouterr()
        lines = [*said.out.splitlines(), *said.err.splitlines()]
        assert all(line.isprintable() for line in lines)
        assert sum("scans/" in line for line in said.err.splitlines()) == BAD
        said.out.encode()  # what a terminal of UTF-8 could not be told
    assert json.loads(Path("found.json").read_text())["n"] == len(SOUND)
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert sum("error" in record for record in records) == BAD
    assert len(records) == BAD + len(SOUND)
    posed = {os.fsencode(path.relative_to("posed")) for path in Path("posed").rglob("*.npy")}
    assert posed == set(SOUND)
    assert not Path("executed").exists()


@pytest.mark.usefixtures("shop")
def test_names_of_folders_become_names_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate((b"$\\frac{", b"\x1b[2J", b"\xff")):
        folder = Path(os.fsdecode(b"scans/" + name))
        folder.mkdir(parents=True)
        points = np.random.default_rng(number).normal(size=(40, 3)) * np.roll([9, 1, 1], number + 1)
        (folder / "a.npy").write_bytes(npy(points))
    command = "audit shop:net scans --labels folders --rotations 1 --device cpu --pictures drawn"
    assert main(command.split()) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"\udcff" in out
    assert Path("drawn/worst.png").exists()
