"""Clouds of more points than a frame is found by."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pointcanon import clouds, rotations, testing
from pointcanon.canonicalizers import PCA, Canonicalizer, Manhattan, VectorNeuron, base


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if a frame were found by so many points."""
    monkeypatch.setattr(base, "MOST_POINTS", 100)
    return 100


def test_points_are_spread_evenly_over_their_order() -> None:
    points = torch.arange(1000.0)[:, None].expand(2, 1000, 3)
    mask = torch.ones(2, 1000, dtype=torch.bool)
    mask[0, ::2] = False
    mask[1, 60:] = False
    whole, none, _ = clouds.spread(points, None, points, 100)
    assert none is None
    assert whole[0, :, 0].tolist() == list(range(0, 1000, 10))
    some, real, same = clouds.spread(points, mask, points, 100)
    assert some[0, :, 0].tolist() == list(range(1, 1000, 10))
    assert real is not None
    assert some[1, real[1], 0].tolist() == list(range(60))
    assert torch.equal(some, same)  # type: ignore[arg-type]
    assert clouds.spread(points, mask, None, 1000) == (points, mask, None)


@pytest.mark.parametrize("make", [PCA, Manhattan, lambda: VectorNeuron(k=8)])
def test_their_frames_turn_with_them(make: type[Canonicalizer], few: int) -> None:
    torch.manual_seed(0)
    canonicalizer = make().double().eval()
    points = testing.surface_clouds(4, 1000, torch.Generator().manual_seed(1)).double()
    points = points + torch.tensor([3.0, -2.0, 1.0])
    turn = rotations.random_rotations(4, dtype=torch.float64)
    found, turned = canonicalizer(points), canonicalizer(points @ turn.mT)
    assert torch.allclose(found.centre, points.mean(dim=1))
    expected = turn[:, None] @ found.rotations
    assert torch.allclose(turned.rotations, expected, atol=1e-9)


def test_padding_does_not_matter_to_them(few: int) -> None:
    points = testing.surface_clouds(1, 350, torch.Generator().manual_seed(2)).double()
    padded = torch.cat((points, torch.full((1, 77, 3), 9.0, dtype=torch.float64)), dim=1)
    mask = torch.arange(427)[None] < 350
    alone, beside = PCA(1)(points).rotations, PCA(1)(padded, mask).rotations
    assert torch.allclose(alone, beside, atol=1e-12)


def test_no_more_of_them_are_looked_at(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    propose = PCA.propose

    def watched(*arguments: torch.Tensor | None) -> object:
        seen.append(arguments[1].shape)  # type: ignore[union-attr]
        return propose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PCA, "propose", watched)
    for size in (99, 100, 101, 5000):
        PCA()(torch.randn(2, size, 3))
    assert [shape[1] for shape in seen] == [99, few, few, few]


TEN_MILLION = """
import resource, torch
from pointcanon import canonicalizers, testing

canonicalizer = {make}.eval()
surface = testing.surface_clouds(1, 4096, torch.Generator().manual_seed(0))
with torch.no_grad():
    canonicalizer(surface)
    points = surface[:, torch.arange(10_000_000) % 4096]
    points += 0.01 * torch.randn(points.shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames = canonicalizer(points)
testing.assert_proper(frames)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ru_maxrss has another unit")
@pytest.mark.parametrize(
    "make",
    [
        "canonicalizers.PCA(24)",
        "canonicalizers.VectorNeuron()",
        "canonicalizers.pretrained.load('modelnet40')",
    ],
)
def test_ten_million_points_take_bounded_memory(make: str) -> None:
    script = TEN_MILLION.format(make=make)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 512 * 1024  # KiB; the cloud itself has 114 MiB
