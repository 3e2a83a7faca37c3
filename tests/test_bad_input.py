"""What a user can get wrong at the command line: one line that names the thing and the remedy.

Every case ends with status 1 (failed) or 2 (bad usage), and never with a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
from public_formats import PublicClassifier, write_h5, write_meshes, write_txt
from safetensors.torch import save_file
from test_checkpoint import rewrite_card

from pointcanon import checkpoint, predictors
from pointcanon.cli import main
from pointcanon.datasets.modelnet_layouts import MODELNET10_CLASSES, MODELNET40_CLASSES
from pointcanon.predictors import Predictor


class Case(NamedTuple):
    """What is prepared in a folder, the command that meets it there, and how that ends.

    ``{folder}`` in the command and in the words stands for the folder.
    """

    prepare: Callable[[Path], object]
    command: str
    status: int
    words: tuple[str, ...]


def save(path: Path, network: Predictor, classes: tuple[str, ...] | None = None) -> None:
    card = checkpoint.Card("predictor", classes=classes)
    checkpoint.save(path, network, card)


def forty(folder: Path) -> None:
    """A PointNet of ModelNet40."""
    network = predictors.PointNet(40, widths=(8, 8), embedding=16)
    save(folder / "net.safetensors", network, MODELNET40_CLASSES)


def truncated(folder: Path) -> None:
    forty(folder)
    file = write_h5(folder, per_class=2) / "ply_data_test0.h5"
    file.write_bytes(file.read_bytes()[:4000])


def without_faces(folder: Path) -> None:
    network = predictors.PointNet(10, widths=(8, 8), embedding=16)
    save(folder / "net.safetensors", network, MODELNET10_CLASSES)
    meshes = write_meshes(folder / "ModelNet10")
    (meshes / "bed" / "test" / "bed_0003.off").write_text("OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n")


def another_data_set(folder: Path) -> None:
    forty(folder)
    (folder / "synsetoffset2category.txt").write_text("Airplane\t02691156\n")
    (folder / "02691156").mkdir()


def empty(folder: Path) -> None:
    forty(folder)
    (folder / "data").mkdir()


def nan_in_h5(folder: Path) -> None:
    forty(folder)
    with h5py.File(write_h5(folder, per_class=2) / "ply_data_test0.h5", "a") as file:
        file["data"][11, 3, 1] = np.nan


def nan_in_txt(folder: Path) -> None:
    forty(folder)
    file = write_txt(folder) / "bed" / "bed_0004.txt"
    file.write_text("0.1,nan,0.3,0,0,1\n" + file.read_text())


def few_points(folder: Path) -> None:
    save(folder / "net.safetensors", predictors.DGCNN(16, k=20, embedding=16))


def renamed_key(folder: Path) -> None:
    state = PublicClassifier(40, embedding=16).state_dict()
    state["feature_model.convolution1.weight"] = state.pop("feature_model.conv1.weight")
    torch.save(state, folder / "net.t7")


def foreign(folder: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2, 2)}, folder / "net.safetensors")


def other_weights(folder: Path) -> None:
    """The card of one network on the weights of another."""
    forty(folder)
    path = folder / "net.safetensors"
    with checkpoint.safe_open(path, framework="pt") as file:
        card = file.metadata()
    save_file(predictors.DGCNN(40, embedding=16).state_dict(), path, metadata=card)
    rewrite_card(path, sha256=...)


def training_state(folder: Path) -> None:
    state = {"pytorch-lightning_version": "2.6", "state_dict": {"weight": torch.zeros(2)}}
    torch.save(state, folder / "last.ckpt")


def h5(folder: Path) -> None:
    forty(folder)
    write_h5(folder, per_class=2)


def file_named_folder(folder: Path) -> None:
    write_h5(folder, per_class=2)
    (folder / "file").touch()


EVAL = "eval {folder}/net.safetensors --protocol I/SO3 --data.num_points 16 "
SHAPES = "--data.name parametric-shapes"
AT_FOLDER = "--data.root {folder}"

CASES: dict[str, Case] = {
    "truncated h5": Case(
        truncated, EVAL + AT_FOLDER, 1, ("ply_data_test0.h5", "damaged or incomplete", "fetch it")
    ),
    "mesh without faces": Case(
        without_faces,
        EVAL + AT_FOLDER + "/ModelNet10 --data.name modelnet10",
        1,
        ("bed_0003.off", "3 vertices and 0 faces"),
    ),
    "another data set": Case(
        another_data_set, EVAL + AT_FOLDER, 1, ("{folder}", "looks like ShapeNet-Part", "known: ")
    ),
    "empty root": Case(empty, EVAL + AT_FOLDER + "/data", 1, ("{folder}/data", "empty", "known: ")),
    "missing root": Case(
        forty, EVAL + AT_FOLDER + "/none", 1, ("{folder}/none does not exist", "give a folder")
    ),
    "NaN in h5": Case(nan_in_h5, EVAL + AT_FOLDER, 1, ("ply_data_test0.h5[11]", "nan", "finite")),
    "NaN in txt": Case(nan_in_txt, EVAL + AT_FOLDER, 1, ("bed_0004.txt, row 1", "six finite")),
    "NaN met by a loader process": Case(
        nan_in_txt, EVAL + AT_FOLDER + " --num_workers 1", 1, ("bed_0004.txt, row 1", "six finite")
    ),
    "more points than stored": Case(
        h5,
        "eval {folder}/net.safetensors --protocol I/I --data.num_points 65 " + AT_FOLDER,
        2,
        ("num_points is 65", "ask for 64 or fewer"),
    ),
    "fewer points than neighbours": Case(
        few_points,
        "eval {folder}/net.safetensors --protocol I/SO3 --data.num_points 8 " + SHAPES,
        1,
        ("k = 20", "8 points", "sample more points"),
    ),
    "renamed key": Case(
        renamed_key,
        "eval {folder}/net.t7 --protocol I/SO3 " + SHAPES,
        1,
        ("net.t7", "learning3d", "missing feature_model.conv1.weight"),
    ),
    "foreign network": Case(
        foreign, EVAL + SHAPES, 1, ("net.safetensors fits none", "convert it", "encoder.weight")
    ),
    "weights of another network": Case(
        other_weights, EVAL + SHAPES, 1, ("net.safetensors, PointNet", "do not fit", "missing")
    ),
    "other classes": Case(forty, EVAL + SHAPES, 1, ("40 classes", "its own data")),
    "training state": Case(
        training_state,
        "eval {folder}/last.ckpt --protocol I/SO3 " + SHAPES,
        1,
        ("last.ckpt is a training state", "best.safetensors"),
    ),
    "unknown protocol": Case(
        forty, "eval {folder}/net.safetensors --protocol I/SO4 " + SHAPES, 2, ("'I/SO4'", "write")
    ),
    "unknown split": Case(h5, EVAL + AT_FOLDER + " --data.split exam", 2, ("'exam'", "choose one")),
    "no clouds": Case(forty, EVAL + SHAPES + " --limit 0", 2, ("limit", "0", "--help")),
    "a seed twice": Case(forty, EVAL + SHAPES + " --seeds 1,1", 2, ("'1,1'", "different")),
    "report in a file": Case(
        file_named_folder,
        "data check --data.root {folder} --json {folder}/file/report.json",
        2,
        ("cannot write {folder}/file/report.json", "name another place"),
    ),
    "unknown layout": Case(
        h5, "data check --data.root {folder} --data.layout ply", 2, ("'ply'", "h5", "--help")
    ),
    "layout that is not there": Case(
        h5, "data check --data.root {folder} --data.layout off", 1, ("'off'", "(h5)", "give one")
    ),
    "no action": Case(lambda folder: None, "data", 2, ("action", "--help")),
    "no card": Case(foreign, "info {folder}/net.safetensors", 1, ("no pointcanon card",)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    case.prepare(tmp_path)
    arguments = [part.replace("{folder}", str(tmp_path)) for part in case.command.split()]
    assert main(arguments) == case.status
    error = capsys.readouterr().err
    assert error.startswith("pointcanon: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    for words in case.words:
        assert words.replace("{folder}", str(tmp_path)) in error


def test_data_check_makes_the_folder_of_its_report(tmp_path: Path) -> None:
    root = write_h5(tmp_path, per_class=2)
    report = tmp_path / "new" / "report.json"
    assert main(["data", "check", "--data.root", str(root), "--json", str(report)]) == 0
    assert list(report.parent.iterdir()) == [report]
