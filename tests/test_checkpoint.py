"""Checkpoints come back as they were saved, say what they are, and never run code."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pointcanon import checkpoint, predictors
from pointcanon.checkpoint import CARD_KEY, Card
from pointcanon.errors import CheckpointError, DataError
from pointcanon.predictors import DGCNN, PointNet

CARD = Card(
    kind="predictor",
    coordinate_frame="z-up",
    classes=("ball", "line"),
    normalisation="unit-ball",
    training_command="pointcanon train --config parametric-pointnet",
    metrics={"overall_accuracy": 0.98},
)


def small() -> PointNet:
    return PointNet(2, widths=(4, 5), embedding=6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    checkpoint.save(path, small(), CARD)
    return path


def rewrite_card(path: Path, **changes: object) -> None:
    """The same weights under a card with some fields changed; ``...`` removes one."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    card = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][CARD_KEY]) | changes
    text = json.dumps({key: value for key, value in card.items() if value is not ...})
    save_file(checkpoint.load_state(path), path, metadata={CARD_KEY: text})


@pytest.mark.parametrize(
    "network",
    [
        small(),
        PointNet(2, transforms=True, widths=(4, 5, 6), embedding=6, dropout=0.1),
        DGCNN(2, k=3, embedding=8),
        small().double(),
    ],
    ids=["pointnet", "transforms", "dgcnn", "float64"],
)
def test_a_network_comes_back_bit_for_bit(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "net.safetensors"
    checkpoint.save(path, network, CARD)
    again = predictors.load(path)
    assert type(again) is type(network)
    assert not again.training
    assert again.hyperparameters == network.hyperparameters
    dtype = next(network.parameters()).dtype
    points = torch.randn(2, 9, 3, dtype=dtype)
    assert torch.equal(again(points), network.eval()(points))
    assert (again.coordinate_frame, again.classes) == ("z-up", ("ball", "line"))
    assert again.normalisation == "unit-ball"


def test_the_card_comes_back_with_architecture_and_version(saved: Path) -> None:
    card = checkpoint.read_card(saved)
    assert card is not None
    assert card.architecture["class"] == "PointNet"
    assert card.architecture["hyperparameters"]["widths"] == [4, 5]
    assert card.pointcanon_version
    assert replace(card, architecture={}, sha256=None, pointcanon_version=None) == CARD


class Pair(nn.Module):
    """A module of modules, with the kinds of hyper-parameter there are."""

    def __init__(self, members: list[nn.Module], options: dict[str, object]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.options = options
        self.tied = members[0].head[-1].weight

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"members": list(self.members), "options": self.options}


checkpoint.register(Pair)


def test_modules_nest_and_may_share_weights(tmp_path: Path) -> None:
    pair = Pair([small(), DGCNN(2, k=3, embedding=8)], {"steps": 3, "scale": 0.5, "name": None})
    path = tmp_path / "pair.safetensors"
    checkpoint.save(path, pair, replace(CARD, kind="canonicalized"))
    again, card = checkpoint.load(path)
    assert isinstance(again, Pair)
    assert card.kind == "canonicalized"
    assert again.options == pair.options
    assert [type(member) for member in again.members] == [PointNet, DGCNN]
    torch.testing.assert_close(again.state_dict(), pair.state_dict(), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"canonicalized model.*pointcanon\.load"):
        predictors.load(path)


def test_what_could_not_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(CheckpointError, match="Linear is not registered"):
        checkpoint.save(path, nn.Linear(2, 2), CARD)
    with pytest.raises(CheckpointError, match=r"Linear needs a property hyperparameters"):
        checkpoint.register(nn.Linear)
    for value in (float("nan"), torch.zeros(2), {1: 2}):
        pair = Pair([small()], {"bad": value})
        with pytest.raises(CheckpointError, match=r"Pair\.options\.bad"):
            checkpoint.save(path, pair, CARD)
    assert not list(tmp_path.iterdir())


def test_two_classes_of_one_name_are_refused() -> None:
    other = type("PointNet", (PointNet,), {})
    with pytest.raises(CheckpointError, match=r"already registered a class PointNet"):
        checkpoint.register(other)


def test_an_interrupted_save_leaves_the_old_file(saved: Path) -> None:
    resource = pytest.importorskip("resource")
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, limits[1]))  # the disk is full after 9 bytes
    try:
        with pytest.raises(DataError, match=r"cannot write .*net\.safetensors.*too large"):
            checkpoint.save(saved, small(), CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["net.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(saved: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*net\.safetensors/inside"):
        checkpoint.save(saved / "inside", small(), CARD)


def test_truncated_files_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 7, 9, 500, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            checkpoint.load(saved)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            predictors.load(saved)


@pytest.mark.parametrize("place", [-1, -100])
def test_a_flipped_bit_in_the_weights_is_refused(saved: Path, place: int) -> None:
    damaged = bytearray(saved.read_bytes())
    damaged[place] ^= 1
    saved.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"net\.safetensors is damaged: .*checksum"):
        checkpoint.load(saved)


def test_the_checksum_is_of_the_bytes_of_the_tensors_by_name(saved: Path) -> None:
    card = checkpoint.read_card(saved)
    assert card is not None
    state = sorted(checkpoint.load_state(saved).items())
    stored = b"".join(value.numpy().tobytes() for _, value in state)
    assert card.sha256 == hashlib.sha256(stored).hexdigest()


def test_a_file_of_the_first_format_has_no_checksum_and_loads(saved: Path) -> None:
    rewrite_card(saved, format_version=1, sha256=...)
    network, card = checkpoint.load(saved)
    assert card.sha256 is None
    checkpoint.save(saved, network, card)
    again = checkpoint.read_card(saved)
    assert again is not None
    assert again.sha256 is not None
    assert again.format_version > 1


def test_weights_of_another_architecture_are_refused(saved: Path) -> None:
    architecture = checkpoint.describe(PointNet(3, widths=(4, 5, 6), embedding=6))
    rewrite_card(saved, architecture=architecture)
    message = r"net\.safetensors, PointNet: .*missing shared\.2\.linear\.weight"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"class": "os.system", "hyperparameters": {"command": "true"}}, "unknown architecture"),
        ({"class": "PointNet", "hyperparameters": {"classes": 2}}, "refuses"),
        ({"class": "PointNet", "hyperparameters": {"num_classes": -1}}, "refuses"),
        ({"class": "PCA", "hyperparameters": {"poses": 7}}, "refuses .*choose 1, 4 or 24"),
        ({"class": "PointNet"}, "not the description"),
        ({"class": [], "hyperparameters": {}}, "unknown architecture"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(
    saved: Path, architecture: object, message: str
) -> None:
    rewrite_card(saved, architecture=architecture)
    with pytest.raises(CheckpointError, match=rf"net\.safetensors: .*{message}"):
        checkpoint.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, r"format 99.*update pointcanon"),
        ({"format_version": ...}, "damaged card"),
        ({"kind": "recipe"}, "kind is 'recipe'"),
        ({"kind": ...}, "damaged card"),
        ({"colour": "red"}, "damaged card"),
        ({"coordinate_frame": "sideways"}, "coordinate_frame is 'sideways'"),
        ({"classes": "ball"}, "classes is 'ball'"),
        ({"metrics": {"accuracy": "high"}}, "metrics is"),
        ({"sha256": 7}, "sha256 is 7"),
    ],
)
def test_damaged_cards_are_refused(saved: Path, changes: dict, message: str) -> None:
    rewrite_card(saved, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_card(saved)


def test_a_card_must_be_valid_to_be_written(tmp_path: Path) -> None:
    for change in ({"kind": "other"}, {"coordinate_frame": "up"}, {"metrics": {"a": float("inf")}}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            checkpoint.save(tmp_path / "net.safetensors", small(), replace(CARD, **change))


def test_safetensors_of_others_have_no_card(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert checkpoint.read_card(path) is None
    with pytest.raises(CheckpointError, match=r"no pointcanon card.*predictors\.load"):
        checkpoint.load(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={CARD_KEY: "{not json"})
    with pytest.raises(CheckpointError, match="damaged card"):
        checkpoint.read_card(path)


def test_other_files_are_not_taken_for_checkpoints(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="there is no file"):
        checkpoint.read_card(tmp_path / "absent.safetensors")


def test_a_file_of_the_second_format_names_no_classes_of_the_canonicalizer(saved: Path) -> None:
    rewrite_card(saved, format_version=2, canonicalizer_classes=...)
    assert checkpoint.load(saved)[1].canonicalizer_classes is None
