"""Public checkpoints: every layout recognised, equal to the plain networks, and no code run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from public_formats import (
    PublicClassifier,
    PublicDGCNN,
    PublicDGCNNParts,
    PublicPointNet,
    PublicPointNet2,
    PublicPointNet2Parts,
    PublicPointNetParts,
    PublicPointNetSegmentation,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from pointcanon import checkpoint, predictors
from pointcanon.classes import MODELNET10_CLASSES, MODELNET40_CLASSES, SHAPENET_PART_CATEGORIES
from pointcanon.datasets import ModelNet40
from pointcanon.errors import CheckpointError, UsageError
from pointcanon.eval.evaluate import evaluate
from pointcanon.predictors.public import LAYOUTS


def as_yanx27(state: dict[str, Tensor]) -> dict[str, Any]:
    """As its training scripts save: with accuracies that are NumPy's, and the optimizer."""
    moments = {0: {"step": 3, "exp_avg": torch.zeros(2)}}
    return {
        "epoch": 3,
        "instance_acc": np.mean([0.5, 0.75]),
        "class_acc": np.float32(0.5),
        "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 0.1}]},
    }


def as_antao97(state: dict[str, Tensor]) -> dict[str, Any]:
    return OrderedDict((f"module.{key}", value) for key, value in state.items())


class Case(NamedTuple):
    """A public network, how it is saved, and what is to be found."""

    build: Callable[[], nn.Module]
    save: Callable[[dict[str, Tensor]], dict[str, Any]]
    found: dict[str, Any]
    frame: str | None
    classes: tuple[str, ...] | None
    points: int = 48


MODELNET, SHAPENET = "y-up-mirrored", "y-up"
PARTS = SHAPENET_PART_CATEGORIES

CASES = {
    "learning3d": Case(PublicClassifier, dict, {"embedding": 64}, MODELNET, MODELNET40_CLASSES),
    "yanx27 pointnet": Case(
        lambda: PublicPointNet(40, channels=6),
        as_yanx27,
        {"normals": True, "transforms": (0, 1), "widths": (64, 128), "rectified": False},
        MODELNET,
        MODELNET40_CLASSES,
    ),
    "yanx27 pointnet, ModelNet10": Case(
        lambda: PublicPointNet(10), as_yanx27, {"normals": False}, MODELNET, MODELNET10_CLASSES
    ),
    "yanx27 pointnet parts": Case(
        lambda: PublicPointNetParts(channels=6),
        as_yanx27,
        {"normals": True, "num_categories": 16, "num_parts": 50},
        SHAPENET,
        PARTS,
    ),
    "yanx27 pointnet++ ssg": Case(
        lambda: PublicPointNet2(40, "ssg"),
        as_yanx27,
        {"scales": "ssg", "normals": False},
        MODELNET,
        MODELNET40_CLASSES,
        points=520,
    ),
    "yanx27 pointnet++ msg": Case(
        lambda: PublicPointNet2(40, "msg", normals=True),
        as_yanx27,
        {"scales": "msg", "normals": True},
        MODELNET,
        MODELNET40_CLASSES,
        points=520,
    ),
    "yanx27 pointnet++ ssg parts": Case(
        lambda: PublicPointNet2Parts(50, "ssg", normals=True),
        as_yanx27,
        {"scales": "ssg", "normals": True, "num_categories": 16},
        SHAPENET,
        PARTS,
        points=520,
    ),
    "yanx27 pointnet++ msg parts": Case(
        lambda: PublicPointNet2Parts(50, "msg"),
        as_yanx27,
        {"scales": "msg", "normals": False, "num_categories": 16},
        SHAPENET,
        PARTS,
        points=520,
    ),
    "fxia22": Case(
        lambda: PublicPointNet(16, second=False), dict, {"transforms": (0,)}, SHAPENET, PARTS
    ),
    "fxia22, or yanx27 without its wrapper": Case(
        lambda: PublicPointNet(40), dict, {"transforms": (0, 1)}, None, None
    ),
    "fxia22 parts": Case(
        lambda: PublicPointNetSegmentation(4),
        dict,
        {"transforms": (0, 1), "skip": "aligned", "num_categories": 0},
        SHAPENET,
        None,
    ),
    "fxia22 parts, one transform": Case(
        lambda: PublicPointNetSegmentation(4, second=False),
        dict,
        {"transforms": (0,)},
        SHAPENET,
        None,
    ),
    "antao97 or WangYueFt": Case(
        lambda: PublicDGCNN(embedding=128),
        as_antao97,
        {"k": 20, "embedding": 128},
        MODELNET,
        MODELNET40_CLASSES,
    ),
    "antao97 parts": Case(
        lambda: PublicDGCNNParts(embedding=128),
        as_antao97,
        {"k": 40, "num_parts": 50, "num_categories": 16},
        SHAPENET,
        PARTS,
    ),
}


def after_training(network: nn.Module) -> nn.Module:
    """Scales of both signs, and statistics that are not the initial ones."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.1, 1.0)
    return network.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_layout_is_recognised_and_computes_what_its_repository_does(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    public = after_training(case.build())
    torch.save(case.save(public.state_dict()), tmp_path / "weights.pth")
    network = predictors.load(tmp_path / "weights.pth")
    assert not network.training
    assert {key: network.hyperparameters[key] for key in case.found} == case.found
    assert network.coordinate_frame == case.frame
    assert network.classes == case.classes
    assert network.normalisation == (None if case.frame is None else "unit-ball")

    points = torch.randn(2, case.points, 3, generator=generator, dtype=torch.float64)
    points = points / points.norm(dim=-1).amax()
    normals = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    given, theirs = {}, [points]
    if network.normals:
        given["normals"] = normals
        theirs = [torch.cat((points, normals), dim=-1)]
    if getattr(network, "num_categories", 0):
        given["category"] = torch.tensor([3, 11])
        theirs.append(nn.functional.one_hot(given["category"], 16).double())
    with torch.no_grad():
        expected = public.double()(*theirs)
        found = network.double()(points, **given)
    assert expected.std(dim=0).max() > 1e-5  # or nothing would be tested
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_what_weights_do_not_tell_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "dgcnn.t7"
    torch.save(PublicDGCNN(embedding=16).state_dict(), path)
    assert predictors.load(path, k=40).k == 40
    with pytest.raises(CheckpointError, match="neighbours"):
        predictors.load(path, neighbours=40)
    with pytest.raises(CheckpointError, match=r"linear3\.weight"):
        predictors.load(path, num_classes=3)
    own = tmp_path / "own.safetensors"
    network = predictors.create("dgcnn", num_classes=2, k=3, embedding=8)
    checkpoint.save(own, network, checkpoint.Card(kind="predictor"))
    with pytest.raises(UsageError, match="says its own hyper-parameters; leave out k"):
        predictors.load(own, k=40)


def test_weights_that_appear_twice_must_agree(tmp_path: Path) -> None:
    state = PublicDGCNN(embedding=16).state_dict()
    state["bn3.bias"] = state["bn3.bias"] + 1
    torch.save(state, tmp_path / "torn.t7")
    with pytest.raises(CheckpointError, match=r"bn3\.bias and conv3\.1\.bias should be the same"):
        predictors.load(tmp_path / "torn.t7")


def test_files_older_than_the_counter_of_batches_are_read(tmp_path: Path) -> None:
    state = PublicPointNet(16).state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert predictors.load(tmp_path / "old.pth").num_classes == 16


@pytest.fixture
def public() -> PublicClassifier:
    torch.manual_seed(0)
    network = PublicClassifier(num_classes=40, embedding=96)
    network(torch.randn(8, 30, 3))  # running statistics that are not the initial ones
    return network.eval()


def write_plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def write_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=False)


def write_wrapped(state: dict[str, Tensor], path: Path) -> None:
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "model_state_dict": {"state_dict": parallel}}, path)


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@pytest.mark.parametrize("write", [write_plain, write_legacy, write_wrapped, write_safetensors])
def test_load_recognises_learning3d(public: PublicClassifier, tmp_path: Path, write) -> None:
    path = tmp_path / "weights.t7"
    write(public.state_dict(), path)
    network = predictors.load(path)
    assert not network.training
    assert network.coordinate_frame == "y-up-mirrored"
    assert network.classes == MODELNET40_CLASSES
    points = torch.randn(4, 50, 3)
    torch.testing.assert_close(network(points), public(points), rtol=1e-4, atol=1e-5)


def test_of_other_data_nothing_is_claimed(tmp_path: Path) -> None:
    torch.save(PublicClassifier(7, embedding=32).state_dict(), tmp_path / "seven.t7")
    network = predictors.load(tmp_path / "seven.t7")
    assert network.num_classes == 7
    assert network.classes is network.coordinate_frame is network.normalisation is None


def test_an_unknown_network_gets_the_layouts_and_the_first_keys(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt.*predictors\.wrap.*encoder") as error:
        predictors.load(tmp_path / "other.pt")
    for layout in LAYOUTS:
        assert layout.name in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bn2.bias"), r"missing bn2\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda state: state.update({"linear2.weight": torch.zeros(256, 3)}),
            r"linear2\.weight has shape \(256, 3\), expected \(256, 512\)",
        ),
        (lambda state: state["linear3.bias"].fill_(torch.nan), r"NaN.*linear3\.bias"),
        (lambda state: state.update({"linear3.weight": torch.zeros(())}), "too few dimensions"),
    ],
)
def test_load_is_strict(public: PublicClassifier, tmp_path: Path, change, message: str) -> None:
    state = public.state_dict()
    change(state)
    torch.save(state, tmp_path / "changed.t7")
    with pytest.raises(CheckpointError, match=message):
        predictors.load(tmp_path / "changed.t7")


class Trap:
    """Unpickled carelessly, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_only_numbers_are_read_beside_tensors(public: PublicClassifier, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"state_dict": public.state_dict(), "curve": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"odd\.pt holds Python objects beside tensors"):
        predictors.load(path)


def test_load_runs_no_code(public: PublicClassifier, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    torch.save({"state_dict": public.state_dict(), "arguments": Trap(sprung)}, path)
    with pytest.raises(CheckpointError, match=r"trap\.pt.*run code.*state_dict\(\)"):
        predictors.load(path)
    path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(CheckpointError, match=r"trap\.pt"):
        predictors.load(path)
    assert not sprung.exists()


@pytest.mark.parametrize("write", [write_plain, write_legacy, write_safetensors])
def test_load_refuses_truncated_files(public: PublicClassifier, tmp_path: Path, write) -> None:
    path = tmp_path / "cut.t7"
    write(public.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 9, 100, 5_000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.t7.*(damaged|incomplete).*again"):
            predictors.load(path)


def test_load_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pt"):
        predictors.load(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        predictors.load(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(CheckpointError, match=r"notes\.txt.*no PyTorch file"):
        predictors.load(tmp_path / "notes.txt")
    for content in ([torch.zeros(1)], {}, {"epoch": 3}, {"state_dict": {}}, torch.zeros(2)):
        torch.save(content, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=r"odd\.pt holds no state dictionary"):
            predictors.load(tmp_path / "odd.pt")


def test_a_training_state_is_named_as_such(tmp_path: Path) -> None:
    state = {
        "pytorch-lightning_version": "2.6",
        "state_dict": {"predictor.weight": torch.zeros(2)},
        "hyper_parameters": {"path": tmp_path},  # an object, as training states may hold
    }
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is a training state.*best\.safetensors"):
        predictors.load(tmp_path / "last.ckpt")


@pytest.mark.slow
def test_the_real_pointnet_reaches_its_accuracy(real_data: Path) -> None:
    network = predictors.load(real_data / "weights" / "learning3d_pointnet_modelnet40.t7")
    test = ModelNet40(real_data / "modelnet40_ply_hdf5_2048", "test")
    assert len(test) == 2468
    scores = evaluate(network, test, "I/I").trials.aligned
    assert 100 * scores.overall_accuracy == pytest.approx(86.1, abs=0.2)
    assert 100 * scores.mean_class_accuracy == pytest.approx(80.2, abs=0.2)
