"""Foreign networks behind our calls: every convention, masks, fixed sizes, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pointcanon import checkpoint, predictors
from pointcanon.canonicalizers import PCA
from pointcanon.errors import CheckpointError, InputError
from pointcanon.model import Canonicalized
from pointcanon.predictors import PartPredictor, Predictor, wrap


class Foreign(nn.Module):
    """Channels first, mean over points, logits and more in a tuple."""

    def __init__(self, channels: int = 3, num_classes: int = 4, points: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Conv1d(channels, num_classes, 1)
        self.points = points

    @property
    def hyperparameters(self) -> dict[str, object]:
        channels, num_classes = self.layer.in_channels, self.layer.out_channels
        return {"channels": channels, "num_classes": num_classes, "points": self.points}

    def forward(self, cloud: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.points in (None, cloud.shape[2]), f"built for {self.points} points"
        features = self.layer(cloud)
        return features.mean(dim=2), {"points": features}


class ForeignParts(nn.Module):
    """Channels last, with a category; logits ``(B, P, N)`` or ``(B, N, P)``."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3 + 2, 6)
        self.channels_first = channels_first

    def forward(self, cloud: Tensor, category: Tensor) -> Tensor:
        known = category[:, None].expand(-1, cloud.shape[1], -1)
        logits = self.layer(torch.cat((cloud, known), dim=-1))
        return logits.mT if self.channels_first else logits


def mean_logits(foreign: Foreign, clouds: list[Tensor]) -> Tensor:
    return torch.stack([foreign.layer(cloud.mT[None])[0].mean(dim=1) for cloud in clouds])


@pytest.fixture
def foreign() -> Foreign:
    torch.manual_seed(0)
    return Foreign().eval()


def test_a_classifier_with_channels_first_and_a_tuple(foreign: Foreign) -> None:
    network = wrap(foreign, layout="BCN", outputs=0, num_classes=4).eval()
    assert isinstance(network, Predictor)
    points = torch.randn(3, 10, 3)
    torch.testing.assert_close(network(points), foreign(points.mT)[0])
    model = Canonicalized(network, PCA())
    assert model(points).shape == (3, 4)


def test_normals_go_in_as_channels() -> None:
    foreign = Foreign(channels=6).eval()
    network = wrap(foreign, layout="BCN", channels=6, outputs=0, num_classes=4).eval()
    points, normals = torch.randn(2, 2, 10, 3)
    expected = foreign(torch.cat((points, normals), dim=-1).mT)[0]
    torch.testing.assert_close(network(points, normals=normals), expected)
    with pytest.raises(InputError, match="give normals"):
        network(points)


def test_padding_is_never_passed_on(foreign: Foreign, generator: torch.Generator) -> None:
    network = wrap(foreign, layout="BCN", outputs=0, num_classes=4).eval()
    points = torch.randn(4, 10, 3, generator=generator)
    mask = torch.rand(4, 10, generator=generator) < 0.6
    mask[:, 0] = True
    points[~mask] = torch.nan
    expected = mean_logits(foreign, [cloud[real] for cloud, real in zip(points, mask, strict=True)])
    torch.testing.assert_close(network(points, mask), expected)
    assert len(mask.sum(dim=1).unique()) > 1
    network.train()
    with pytest.raises(InputError, match=r"knows no mask.*sample one number of points"):
        network(points, mask)


@pytest.mark.parametrize("count", [5, 8, 30])
def test_a_fixed_number_of_points_is_kept(generator: torch.Generator, count: int) -> None:
    foreign = Foreign(points=8).eval()
    network = wrap(foreign, layout="BCN", outputs=0, num_classes=4, num_points=8).eval()
    points = torch.randn(2, count, 3, generator=generator)
    logits = network(points)
    if count == 8:
        torch.testing.assert_close(logits, foreign(points.mT)[0])
    mask = torch.ones(2, count + 3, dtype=torch.bool)
    mask[:, count:] = False
    wide = nn.functional.pad(points, (0, 0, 0, 3), value=torch.inf)
    torch.testing.assert_close(network(wide, mask), logits)


@pytest.mark.parametrize("channels_first", [False, True])
def test_parts_come_back_at_their_points(channels_first: bool, generator: torch.Generator) -> None:
    foreign = ForeignParts(channels_first).eval()
    network = wrap(foreign, num_parts=6, num_categories=2).eval()
    assert isinstance(network, PartPredictor)
    points, category = torch.randn(3, 10, 3, generator=generator), torch.tensor([1, 0, 1])
    one_hot = nn.functional.one_hot(category, 2).float()
    expected = foreign(points, one_hot)
    expected = expected.mT if channels_first else expected
    torch.testing.assert_close(network(points, category=category), expected)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, ::2] = False
    found = network(points, mask, category=category)
    torch.testing.assert_close(found[mask], expected[mask])


def test_parts_of_points_that_were_left_out_are_those_of_the_nearest() -> None:
    foreign = ForeignParts(channels_first=False).eval()
    network = wrap(foreign, num_parts=6, num_categories=2, num_points=2).eval()
    points = torch.tensor([[[0.0, 0, 0], [10.0, 0, 0], [0.5, 0, 0], [9.0, 0, 0]]])
    logits = network(points, category=torch.tensor([0]))[0]
    # the farthest points are the first two
    torch.testing.assert_close(logits[2:], logits[:2])
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_what_the_module_does_wrong_is_said(foreign: Foreign) -> None:
    points = torch.randn(2, 10, 3)
    with pytest.raises(InputError, match=r"Foreign fails on input of shape \(2, 10, 3\).*'BNC'"):
        wrap(foreign, outputs=0, num_classes=4)(points)
    with pytest.raises(InputError, match=r"a tuple \(a tensor \(2, 4\), .*say with outputs"):
        wrap(foreign, layout="BCN", num_classes=4)(points)
    with pytest.raises(InputError, match=r"has no 'logits'; check outputs"):
        wrap(foreign, layout="BCN", outputs="logits", num_classes=4)(points)
    with pytest.raises(InputError, match=r"a tensor \(2, 4\), expected \(2, 7\)"):
        wrap(foreign, layout="BCN", outputs=0, num_classes=7)(points)
    with pytest.raises(InputError, match=r"built for 8 points.*num_points"):
        wrap(Foreign(points=8), layout="BCN", outputs=0, num_classes=4)(points)
    parts = wrap(ForeignParts(False), num_parts=5, num_categories=2)
    with pytest.raises(InputError, match=r"\(2, 10, 6\), expected \(2, 10, 5\) or \(2, 5, 10\)"):
        parts(points, category=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say what it predicts"),
        ({"num_classes": 2, "num_parts": 2}, "say what it predicts"),
        ({"num_classes": 2, "layout": "NCB"}, "layout is 'NCB'; choose 'BNC' or 'BCN'"),
        ({"num_classes": 2, "channels": 4}, "channels is 4; choose 3, or 6"),
        ({"num_classes": 2, "num_points": 0}, "num_points is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"num_classes": 2, "num_categories": 3}, "num_categories is for part segmentation"),
        ({"num_parts": 2, "num_categories": -1}, "num_categories is -1"),
    ],
)
def test_contradictions_are_refused(foreign: Foreign, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrap(foreign, **options)


def test_only_modules_are_wrapped() -> None:
    with pytest.raises(InputError, match=r"module is a function; pass a torch\.nn\.Module"):
        wrap(lambda points: points, num_classes=2)


def test_a_registered_module_can_be_saved(foreign: Foreign, tmp_path: Path) -> None:
    network = wrap(foreign, layout="BCN", outputs=0, num_classes=4).eval()
    card = checkpoint.Card(kind="predictor", coordinate_frame="z-up")
    with pytest.raises(CheckpointError, match="Foreign is not registered"):
        checkpoint.save(tmp_path / "net.safetensors", network, card)
    checkpoint.register(Foreign)
    checkpoint.save(tmp_path / "net.safetensors", network, card)
    again = predictors.load(tmp_path / "net.safetensors")
    points = torch.randn(2, 10, 3)
    torch.testing.assert_close(again(points), network(points))
    assert again.coordinate_frame == "z-up"
