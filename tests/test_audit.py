"""``pc.audit`` on networks whose answers are known: what stays, what turns, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pointcanon as pc
from pointcanon.cli import main
from pointcanon.datasets.given import GivenClouds
from pointcanon.errors import CheckpointError, InputError
from pointcanon.eval.audit import ANGLES
from pointcanon.eval.audit_pictures import worst_gallery
from pointcanon.eval.evaluate import chosen_clouds
from pointcanon.frames import Frames
from pointcanon.predictors.recognise import recognise


class Axis(nn.Module):
    """The coordinate axis along which a cloud is longest."""

    def forward(self, points: Tensor) -> Tensor:
        return points.var(dim=1)


class Size(nn.Module):
    """Whether a cloud is large: the same under every rotation."""

    def forward(self, points: Tensor) -> Tensor:
        spread = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        return torch.stack((spread - 8.0, 8.0 - spread), dim=1)


class Height(nn.Module):
    """Whether a point is above the middle: the same under rotations about up."""

    def forward(self, points: Tensor) -> Tensor:
        height = (points - points.mean(dim=1, keepdim=True))[..., 2]
        return torch.stack((height, -height), dim=-1)


@pytest.fixture
def sticks(generator: torch.Generator) -> Tensor:
    """``(6, 24, 3)``: two clouds along each axis, well away from the origin."""
    points = torch.randn(6, 24, 3, generator=generator) * 0.05
    for cloud in range(6):
        points[cloud, :, cloud // 2] *= 20
    return points + torch.tensor([3.0, -1.0, 2.0])


LABELS = [0, 0, 1, 1, 2, 2]


def test_an_invariant_network_is_trusted_fully(sticks: Tensor) -> None:
    found = pc.audit(Size(), sticks, rotations=3)
    assert (found.n, found.labelled, found.canonicalized) == (6, False, None)
    assert found.agreement == 1
    assert found.alone.score == {"I": 1, "z": 1, "SO3": 1}
    assert found.alone.agreement_by_angle == (1,) * len(ANGLES)
    assert found.alone.worst == ()


def test_every_figure_agrees_with_a_count_by_hand(sticks: Tensor) -> None:
    found = pc.audit(Axis(), sticks, LABELS, rotations=4, seed=5)
    centred = sticks.double() - sticks.double().mean(dim=1, keepdim=True)
    for pose, words in (("z", "about up"), ("SO3", "any")):
        right = 0.0
        for seed in range(5, 9):
            turns = pc.eval.protocols.pose_rotations(
                pose, 6, torch.tensor([0.0, 0, 1]), seed=seed, dtype=torch.float64
            )
            said = Axis()(centred @ turns.mT).argmax(dim=1)
            right += float((said == torch.tensor(LABELS)).double().mean()) / 4
        assert math.isclose(found.alone.score[pose], right, abs_tol=1e-12), words
    assert found.alone.score["I"] == 1
    assert found.alone.agreement == found.alone.score  # here the labels are the upright answers
    assert found.alone.score_by_angle[0] == 1
    assert found.flips == 1 - found.alone.agreement["SO3"]
    # a stick along z stays there when turned about z, so a third of the answers stay at least
    assert found.alone.agreement["z"] >= 1 / 3


def test_up_is_where_the_frame_says(sticks: Tensor) -> None:
    along_y = sticks[2:4]
    turned = {
        frame: pc.audit(Axis(), along_y, rotations=8, coordinate_frame=frame).alone.agreement["z"]
        for frame in ("y-up", "z-up")
    }
    assert turned["y-up"] == 1
    assert turned["z-up"] < 1

    class Told(Axis):
        coordinate_frame = "y-up"

    assert pc.audit(Told(), along_y, rotations=2).coordinate_frame == "y-up"


def test_an_exact_canonicalizer_costs_what_it_turns(sticks: Tensor) -> None:
    found = pc.audit(Axis(), sticks, LABELS, rotations=4, canonicalizer=pc.canonicalizers.PCA(1))
    assert found.canonicalized is not None
    assert found.canonicalized.agreement["SO3"] == 1 == found.agreement
    assert found.canonicalized.worst == ()
    # principal axes put every stick along one axis: one class of three remains right
    assert math.isclose(found.canonicalized.score["I"], 1 / 3)
    assert found.tax is not None
    assert math.isclose(found.tax, 2 / 3)
    assert found.canonicalized.passes == 1
    model = pc.Canonicalized(Axis(), pc.canonicalizers.PCA(1))
    again = pc.audit(model, sticks, LABELS, rotations=4)
    assert again.canonicalized is not None
    assert again.canonicalized.score == found.canonicalized.score
    assert again.alone.score == found.alone.score


def test_parts_are_counted_by_points(sticks: Tensor) -> None:
    found = pc.audit(Height(), sticks, rotations=4)
    assert found.segments
    assert found.alone.agreement["z"] == 1
    assert found.alone.score_by_angle[-1] < found.alone.score_by_angle[0] == 1
    assert 0.3 < found.agreement < 0.7
    above = (sticks[..., 2] < sticks.mean(dim=1, keepdim=True)[..., 2]).long()
    assert pc.audit(Height(), sticks, parts=above, rotations=1).alone.score["I"] == 1
    wrong = pc.audit(Height(), sticks, parts=1 - above, rotations=1)
    assert wrong.alone.score["I"] == 0
    assert wrong.alone.agreement["z"] == 1


def test_clouds_come_in_many_forms(sticks: Tensor) -> None:
    class Items(torch.utils.data.Dataset):
        def __init__(self, make: Any) -> None:
            self.make = make

        def __len__(self) -> int:
            return len(sticks)

        def __getitem__(self, index: int) -> Any:
            return self.make(sticks[index], LABELS[index])

    class Data:
        def __init__(self, pos: Tensor, y: Tensor) -> None:
            self.pos, self.y = pos, y

    expected = pc.audit(Axis(), sticks, LABELS, rotations=2)
    for clouds, labels in (
        (sticks.numpy(), np.array(LABELS)),
        (list(sticks), torch.tensor(LABELS)),
        (Items(lambda points, label: (points, label)), None),
        (Items(lambda points, label: {"points": points.numpy(), "label": label}), None),
        (Items(lambda points, label: Data(points, torch.tensor([label]))), None),
        (Items(lambda points, label: points), LABELS),
    ):
        found = pc.audit(Axis(), clouds, labels, rotations=2)
        assert found.alone.score == expected.alone.score
        assert found.labelled


def test_clouds_of_different_size_are_asked_about_without_padding(sticks: Tensor) -> None:
    ragged = [cloud[: 10 + 2 * place] for place, cloud in enumerate(sticks)]
    together = pc.audit(Axis(), ragged, rotations=2, batch_size=6)
    alone = pc.audit(Axis(), ragged, rotations=2, batch_size=1)
    assert together.alone.score == alone.alone.score
    assert together.alone.worst == alone.alone.worst


def test_a_function_will_do(sticks: Tensor) -> None:
    def by_numpy(points: Tensor) -> np.ndarray:
        return points.numpy().var(axis=1)

    found = pc.audit(by_numpy, sticks, LABELS, rotations=2)
    assert found.alone.name == "by_numpy alone"
    assert found.alone.score == pc.audit(Axis(), sticks, LABELS, rotations=2).alone.score


def test_nothing_of_the_network_changes(sticks: Tensor) -> None:
    network = nn.Sequential(nn.Dropout(0.5), Axis()).train()
    network[1].eval()
    state = torch.get_rng_state()
    pc.audit(network, sticks, rotations=1)
    assert (network.training, network[0].training, network[1].training) == (True, True, False)
    assert torch.equal(state, torch.get_rng_state())


def test_the_worst_clouds_are_those_that_change(sticks: Tensor) -> None:
    found = pc.audit(Axis(), sticks, LABELS, rotations=6, limit=4, worst=2)
    assert found.n == 4
    assert len(found.alone.worst) == 2
    first, second = found.alone.worst
    assert first.agreement <= second.agreement < 1
    turn = torch.tensor(first.rotation, dtype=torch.float64)
    centred = sticks[first.index].double() - sticks[first.index].double().mean(dim=0)
    said = Axis()((centred @ turn.mT)[None]).argmax()
    assert (first.upright, first.turned) == (str(LABELS[first.index]), str(int(said)))
    assert first.upright != first.turned


def test_it_prints_and_plots_and_is_json(sticks: Tensor, tmp_path: Path) -> None:
    found = pc.audit(Axis(), sticks, rotations=2, canonicalizer=pc.canonicalizers.PCA(1))
    text = str(found)
    for words in ("Axis alone", "behind PCA", "6 clouds", "upright answers", "aligned tax"):
        assert words in text
    axes = found.plot(tmp_path / "new" / "curve.png").axes[0]
    assert (tmp_path / "new" / "curve.png").read_bytes().startswith(b"\x89PNG")
    drawn = axes.lines[0].get_xydata()
    assert drawn[:, 0].tolist() == list(ANGLES)
    assert drawn[0, 1] == 100
    assert json.loads(found.to_json())["alone"]["score"] == found.alone.score
    worst_gallery(found.alone, GivenClouds(sticks), tmp_path / "worst.png")
    assert (tmp_path / "worst.png").stat().st_size > 10_000
    assert found.canonicalized is not None
    with pytest.raises(InputError, match="nothing to draw"):
        worst_gallery(found.canonicalized, GivenClouds(sticks))


def nan_for_one(points: Tensor) -> Tensor:
    answer = points.var(dim=1)
    answer[points[..., 0].mean(dim=1) > 50] = torch.nan
    return answer


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("axis", {}, "network is a str: pass a torch"),
        (lambda points: points.sum(), {}, r"answers \(\) to one cloud"),
        (lambda points: points.nonsense, {}, "fails on a cloud .*AttributeError.*nonsense"),
        (lambda points: {"logits": points}, {}, r"returns a dict.*predictors\.wrap"),
        (Axis(), {"labels": [0, 1]}, "2 labels for 6 clouds"),
        (Axis(), {"labels": [0, 0, 1, 1, 2, 7]}, r"clouds\[5\] is 7.*0 to 2"),
        (Axis(), {"labels": [0.5] * 6}, "expected one integer"),
        (Axis(), {"rotations": 0}, "rotations is 0"),
        (Axis(), {"coordinate_frame": "up"}, "unknown coordinate frame 'up'"),
        (Height(), {"parts": torch.zeros(6, 3, dtype=torch.int64)}, "24 points and 3 parts"),
    ],
)
def test_what_cannot_be_audited_is_said(
    sticks: Tensor, network: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pc.audit(network, sticks, **options)


def test_bad_clouds_and_answers_are_named(sticks: Tensor) -> None:
    far = sticks.clone()
    far[4] += 100
    with pytest.raises(InputError, match="NaN or infinity for cloud 4"):
        pc.audit(nan_for_one, far)
    last = chosen_clouds(GivenClouds(sticks), 3)[-1]
    far = sticks.clone()
    far[last] += 100
    with pytest.raises(InputError, match=f"NaN or infinity for cloud {last}"):
        pc.audit(nan_for_one, far, limit=3)
    broken = sticks.clone()
    broken[3, 7, 0] = torch.inf
    with pytest.raises(InputError, match=r"clouds\[3\], point 7, is \[inf"):
        pc.audit(Axis(), broken)
    with pytest.raises(InputError, match=r"clouds\[0\] has shape \(3,\)"):
        pc.audit(Axis(), sticks[0])
    with pytest.raises(InputError, match="clouds is empty"):
        pc.audit(Axis(), [])
    with pytest.raises(InputError, match="clouds is a generator"):
        pc.audit(Axis(), (cloud for cloud in sticks))
    with pytest.raises(InputError, match="looks at normals"):
        pc.audit(pc.predictors.create("pointnet2", num_classes=3, normals=True), sticks)
    forty = pc.predictors.create("pointnet", num_classes=40, embedding=8)
    shapes = pc.datasets.load("parametric-shapes", None, "test", size=2, num_points=8)
    with pytest.raises(CheckpointError, match="40 outputs"):
        pc.audit(forty, shapes)


def test_a_network_is_recognised_by_its_answer(sticks: Tensor) -> None:
    assert recognise(Axis(), sticks[0]).num_classes == 3  # type: ignore[union-attr]
    assert recognise(Height(), sticks[0]).num_parts == 2  # type: ignore[union-attr]
    channels_first = recognise(lambda points: Height()(points).mT, sticks[0])
    torch.testing.assert_close(channels_first(sticks), Height()(sticks))
    own = pc.predictors.create("pointnet", num_classes=2, embedding=8)
    assert recognise(own, sticks[0]) is own


MODULE = """
import torch
from torch import nn

class Axis(nn.Module):
    def forward(self, points):
        return points.var(dim=1)[:, [0, 1, 2] * 5 + [0]]

net = Axis()
size = lambda points: points.square().sum(dim=(1, 2))[:, None] * torch.linspace(-1, 1, 16)
answer = 42

def make():
    return net

def fail():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module of the user's, ``shop``."""
    (tmp_path / "shop.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    return tmp_path


SHAPES = "--data.name parametric-shapes --data.num_points 32 --limit 8 --rotations 2 --device cpu"


@pytest.mark.parametrize("name", ["shop:net", "shop:make", "shop:Axis"])
def test_the_command_takes_what_can_be_imported(
    name: str, shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"audit {name} {SHAPES} --min-agreement 0.99 --json figures.json --pictures out"
    assert main(command.split()) == 1
    printed = capsys.readouterr()
    assert "Axis alone" in printed.out
    assert printed.err.startswith("pointcanon: Axis alone keeps ")
    found = json.loads((shop / "figures.json").read_text())
    assert found["agreement"] < 0.99
    assert {path.name for path in (shop / "out").iterdir()} == {"curve.png", "worst.png"}


def test_the_command_lets_a_trusted_network_pass(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"audit shop:size {SHAPES} --min-agreement 0.99".split()) == 0
    model = pc.Canonicalized(
        pc.predictors.create("pointnet", num_classes=16, embedding=8, widths=[8, 8]),
        pc.canonicalizers.PCA(1),
    )
    model.save("model.safetensors")
    assert main(f"audit model.safetensors {SHAPES}".split()) == 0
    assert "behind PCA" in capsys.readouterr().out
    assert main(f"audit shop:size {SHAPES} --canonicalizer model.safetensors".split()) == 0
    assert "behind PCA" in capsys.readouterr().out


@pytest.mark.parametrize("canonicalizer", [[], ["--canonicalizer", "PCA"]])
def test_the_command_sets_options_of_the_canonicalizer(
    canonicalizer: list[str], shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = pc.predictors.create("pointnet", num_classes=16, embedding=8, widths=[8, 8])
    pc.Canonicalized(network, pc.canonicalizers.PCA(1)).save("model.safetensors")
    counts = set()

    def propose(self: pc.canonicalizers.PCA, *cloud: Any) -> pc.Frames:
        frames = own(self, *cloud)
        counts.add(frames.count)
        return frames

    own = pc.canonicalizers.PCA.propose
    monkeypatch.setattr(pc.canonicalizers.PCA, "propose", propose)
    options = ["--canonicalizer_options", '{"poses": 4}']
    assert main(["audit", "model.safetensors", *SHAPES.split(), *canonicalizer, *options]) == 0
    assert counts == {4}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("shop:nothing " + SHAPES, 2, ("shop has no 'nothing'", "make", "net")),
        ("shops:net " + SHAPES, 2, ("shops cannot be imported", "No module named 'shops'")),
        ("shop: " + SHAPES, 2, ("'shop:' is no file", "import.path:name")),
        ("shop:answer " + SHAPES, 2, ("shop:answer is a int",)),
        ("shop:fail " + SHAPES, 2, ("shop:fail() raises RuntimeError: no weights here",)),
        ("missing.safetensors " + SHAPES, 1, ("missing.safetensors",)),
        ("shop:net --data.name nothing", 2, ("unknown data set 'nothing'",)),
        (f"shop:net {SHAPES} --min-agreement 99", 2, ("--min-agreement is 99", "0.99")),
        (f"shop:net {SHAPES} --rotations 0", 2, ("rotations", "--help")),
        (f"shop:net {SHAPES} --canonicalizer LSD", 2, ("'LSD'", "PCA")),
        (f'shop:net {SHAPES} --canonicalizer_options {{"looks":4}}', 2, ("shop:net has no",)),
        (
            f'shop:net {SHAPES} --canonicalizer PCA --canonicalizer_options {{"looks":4}}',
            *(2, ("PCA has no option 'looks'; it has: poses, weighting",)),
        ),
        (f"shop:net {SHAPES} --device abacus", 2, ("--device abacus",)),
    ],
)
def test_bad_usage_is_one_clear_line(
    arguments: str,
    status: int,
    words: tuple[str, ...],
    shop: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["audit", *arguments.split()]) == status
    error = capsys.readouterr().err
    assert error.startswith("pointcanon: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_passes_are_those_of_a_cloud_on_average(sticks: Tensor) -> None:
    class Sharper(pc.canonicalizers.Canonicalizer):
        """One frame of the first four clouds, three of the last two, by where they lie."""

        def propose(self, points: Tensor, mask: Any, normals: Any) -> Frames:
            several = points.var(dim=1).argmax(dim=1) == 2
            weights = torch.zeros(len(points), 3).masked_fill(
                ~several[:, None] & (torch.arange(3) > 0), -torch.inf
            )
            return Frames.of(torch.eye(3).expand(len(points), 3, 3, 3), weights)

    found = pc.audit(Size(), sticks, rotations=1, canonicalizer=Sharper(), batch_size=5)
    with_one = pc.audit(Size(), sticks, rotations=1, canonicalizer=Sharper(), batch_size=1)
    assert found.canonicalized is not None
    assert with_one.canonicalized is not None
    assert found.canonicalized.passes == pytest.approx(with_one.canonicalized.passes)


def test_a_count_or_a_layer_is_no_name(sticks: Tensor) -> None:
    class Own(Axis):
        classes = 3
        coordinate_frame = "y-up"

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 2)])

    predictor = recognise(Own(), sticks[0])
    assert (predictor.classes, predictor.parts) == (None, None)
    assert predictor.coordinate_frame == "y-up"
    assert pc.audit(Own(), sticks, rotations=1).n == 6
