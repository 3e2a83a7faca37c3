"""Every reader of files: a few sound files for it, and how it reads one.

Used by ``test_hostile_files.py``, which damages the sound files in fixed ways, and by
``fuzz_readers.py``, which lets coverage guide the damage. What that found lies in ``findings/``,
as ``<target>-<name>``, and is read again by every run of the tests.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from public_formats import PublicClassifier
from test_checkpoint import rewrite_card
from test_readers import CLOUDS, h5, npy, npz
from torch_geometric.data import Data

from pointcanon import Canonicalized, canonicalizers, checkpoint, predictors, readers
from pointcanon.cli.streaming import Lines, Share
from pointcanon.datasets import ModelNet40C, ScanObjectNN
from pointcanon.datasets import modelnet_layouts as modelnet
from pointcanon.datasets import shapenet_part_layouts as shapenet
from pointcanon.datasets.rna import RnaFile
from pointcanon.errors import DataError, PointcanonError
from pointcanon.predictors.public.layout import read_weights
from pointcanon.train.run import find_recipe

__all__ = ["TARGETS", "Target", "findings"]

FINDINGS = Path(__file__).parent / "findings"


class Target(NamedTuple):
    """A reader: the ending of its files, some sound ones, and what reads all of one."""

    suffix: str
    sound: Callable[[], list[bytes]]
    read: Callable[[Path], object]


def findings(name: str) -> list[Path]:
    """Files that once made the reader of that name misbehave."""
    return sorted(FINDINGS.glob(f"{name}-*"))


def read_clouds(path: Path) -> None:
    clouds = readers.CloudFile(path, samples=8)
    for index in range(min(3, len(clouds))):
        clouds[index]


def of_kind(suffix: str) -> list[bytes]:
    return [content for ending, content, _ in CLOUDS.values() if ending.lower() == suffix]


STL = """solid a
facet normal 0 0 1
outer loop
vertex 0 0 0
vertex 1 0 0
vertex 0 1 0
endloop
endfacet
endsolid a
"""
OFF = "OFF\n4 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n"
OBJ = "o a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nvn 0 0 1\nf 1 2 3\nf 1//1 2//1 4//1\nf -1 -2 -3\n"
PLY = (
    "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
    "property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    "0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
)


def stl() -> list[bytes]:
    facet = np.zeros(1, dtype=[("numbers", "<f4", 12), ("extra", "<u2")])
    facet["numbers"] = [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    return [STL.encode(), bytes(80) + (1).to_bytes(4, "little") + facet.tobytes()]


def cards() -> list[bytes]:
    """A checkpoint of pointcanon; one without a checksum, so that damage gets further."""
    network = predictors.PointNet(2, widths=(2,), embedding=2)
    card = checkpoint.Card("predictor", classes=("a", "b"), metrics={"overall_accuracy": 0.5})

    def unsigned(path: Path) -> None:
        checkpoint.save(path, network, card)
        rewrite_card(path, sha256=...)

    return [saved(lambda path: checkpoint.save(path, network, card)), saved(unsigned)]


def models() -> list[bytes]:
    """A canonicalized model, whose card tells of two networks more."""
    small: dict[str, Any] = {"scorer_widths": (4, 4), "refiner_widths": (4, 4), "keep": 1}
    network = predictors.PointNet(2, widths=(2,), embedding=2)
    model = Canonicalized(network, canonicalizers.Optimized(**small))
    return [saved(model.save)]


def weights(**options: bool) -> list[bytes]:
    """State dictionaries, plain and nested."""
    state = PublicClassifier(2, embedding=2).state_dict()
    small = {"a.weight": torch.eye(3), "a.bias": torch.zeros(3), "n": torch.tensor(3)}
    return [torch_file(content, **options) for content in (small, {"model": state, "epoch": 3})]


def torch_file(content: object, **options: bool) -> bytes:
    packed = io.BytesIO()
    torch.save(content, packed, **options)
    return packed.getvalue()


def saved(write: Callable[[Path], object]) -> bytes:
    """What a function writes to a file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path)
        return path.read_bytes()


def load_weights(path: Path) -> None:
    read_weights(path)
    predictors.load(path)


def modelnet_h5() -> list[bytes]:
    points = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    return [h5(data=points, label=np.arange(4, dtype=np.uint8)[:, None], normal=points)]


def scan_modelnet(layout: type[modelnet.Layout], path: Path) -> None:
    classes = modelnet.MODELNET40_CLASSES
    reader = {
        modelnet.H5Layout: lambda: modelnet.H5Layout(path.parent, classes, classes),
        modelnet.OffLayout: lambda: modelnet.OffLayout(path.parent, classes, path.parent / "kept"),
        modelnet.TxtLayout: lambda: modelnet.TxtLayout(path.parent, classes),
    }[layout]()
    raise_first(content for _, content in reader.scan(path))


def raise_first(contents: object) -> None:
    for content in list(contents):
        if isinstance(content, Exception):
            raise content


def shapenet_h5() -> list[bytes]:
    points = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    parts = np.zeros((2, 8), dtype=np.int64)
    return [
        h5(data=points, label=np.zeros((2, 1)), pid=parts),
        h5(data=points, label=[0, 0], seg=parts),
    ]


def shapenet_pyg() -> list[bytes]:
    held = {"pos": torch.rand(6, 3), "x": torch.rand(6, 3), "y": torch.zeros(6, dtype=torch.long)}
    data = {**held, "category": torch.tensor([0, 0])}
    slices = {key: torch.tensor([0, 2, 6]) for key in held} | {"category": torch.tensor([0, 1, 2])}
    return [torch_file((data, slices, Data))]


def scan_pyg(path: Path) -> None:
    raise_first(content for _, content in shapenet.PygLayout(path.parent, "air").scan(path))


def scan_shapenet_h5(path: Path) -> None:
    raise_first(content for _, content in shapenet.H5Layout(path.parent).scan(path))


def scan_object_nn() -> list[bytes]:
    points = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    mask = np.array([[-1, 5] * 4] * 4, dtype=np.int32)
    return [h5(data=points, label=np.arange(4, dtype=np.int32), mask=mask)]


MODELNET40_C = {
    "data_original.npy": npy(np.random.default_rng(0).random((4, 8, 3), dtype=np.float32)),
    "label.npy": npy(np.arange(4, dtype=np.uint8)[:, None]),
}


def read_placed(
    name: str, others: dict[str, bytes], opened: Callable[[Path], Any], path: Path
) -> None:
    """A file under the name that a data set knows it by, beside sound ones."""
    with TemporaryDirectory() as folder:
        place = Path(folder) / name
        for other in others.keys() - {name}:
            (Path(folder) / other).write_bytes(others[other])
        place.symlink_to(path.absolute())
        try:
            data = opened(Path(folder))
            for index in range(min(3, len(data))):
                data[index]
        except PointcanonError as error:
            raise DataError(str(error).replace(str(place), str(path))) from error


def rna() -> list[bytes]:
    points = np.random.default_rng(0).integers(-99, 99, (2, 8, 3)).astype(np.int16)
    labels = np.ones((2, 8), dtype=np.int16)
    return [npz(points=points, labels=labels, split=np.array([0, 1], dtype=np.int8))]


RECIPE = "data:\n  name: modelnet40\nmodel: &m\n  learning_rate: 1e-3\ntrainer:\n  again: *m\n"
ROWS = b"0.1,0.2,0.3,0,0,1\n-1e-3,2,3,1,0,0\n"
LINES = b'{"file": "a.ply", "index": null}\n{"file": "b.npy", "index": 3, "error": "x"}\n'

TARGETS: dict[str, Target] = {
    **{
        suffix[1:]: Target(suffix, partial(of_kind, suffix), read_clouds)
        for suffix in (".pcd", ".xyz", ".txt", ".csv", ".npy", ".npz", ".h5")
    },
    "ply": Target(".ply", lambda: [*of_kind(".ply"), PLY.encode()], read_clouds),
    "off": Target(".off", lambda: [*of_kind(".off"), OFF.encode()], read_clouds),
    "obj": Target(".obj", lambda: [*of_kind(".obj"), OBJ.encode()], read_clouds),
    "stl": Target(".stl", stl, read_clouds),
    "safetensors": Target(".safetensors", cards, predictors.load),
    "model": Target(".safetensors", models, checkpoint.load),
    "torch": Target(".pth", weights, load_weights),
    "torch_old": Target(
        ".t7", partial(weights, _use_new_zipfile_serialization=False), load_weights
    ),
    "modelnet_h5": Target(".h5", modelnet_h5, partial(scan_modelnet, modelnet.H5Layout)),
    "modelnet_off": Target(
        ".off",
        lambda: [OFF.encode(), b"OFF" + OFF[4:].encode()],
        partial(scan_modelnet, modelnet.OffLayout),
    ),
    "modelnet_txt": Target(".txt", lambda: [ROWS], partial(scan_modelnet, modelnet.TxtLayout)),
    "shapenet_h5": Target(".h5", shapenet_h5, scan_shapenet_h5),
    "shapenet_pyg": Target(".pt", shapenet_pyg, scan_pyg),
    "shapenet_txt": Target(
        ".txt", lambda: [b"0 0 1 0 0 1 0\n.1 2 3e-1 1 0 0 1\n"], shapenet._read_rows
    ),
    "shapenet_json": Target(
        ".json", lambda: [json.dumps(["shape_data/02691156/a", "é"]).encode()], shapenet._json_list
    ),
    "scan_object_nn": Target(
        ".h5",
        scan_object_nn,
        partial(
            read_placed,
            "test_objectdataset_augmentedrot.h5",
            {},
            lambda root: ScanObjectNN(root, "test", num_points=4, background=False),
        ),
    ),
    **{
        f"modelnet40_c_{name}": Target(
            ".npy",
            partial(list, [MODELNET40_C[file]]),
            partial(read_placed, file, MODELNET40_C, lambda root: ModelNet40C(root, "test")),
        )
        for name, file in (("clouds", "data_original.npy"), ("labels", "label.npy"))
    },
    "rna": Target(".npz", rna, lambda path: RnaFile(path).read()),
    "recipe": Target(".yaml", lambda: [RECIPE.encode()], lambda path: find_recipe(str(path))),
    "resumed": Target(".jsonl", lambda: [LINES], lambda path: Lines(path, True, Share())),
}
