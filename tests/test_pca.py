"""PCA's smooth weighting: the vote stays continuous where eigenvalues cross, the others' jump."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pointcanon import rotations, testing
from pointcanon.canonicalizers import PCA
from pointcanon.errors import InputError
from pointcanon.frames import Frames

CASES: dict[str, dict[str, Any]] = {
    "1": {"poses": 1},
    "4": {"poses": 4},
    "24": {"poses": 24},
    "4-smooth": {"poses": 4, "weighting": "smooth"},
    "24-smooth": {"poses": 24, "weighting": "smooth"},
}


def whitened(seed: int = 0, count: int = 24) -> Tensor:
    """A cloud ``(count, 3)`` without symmetry whose covariance is the identity."""
    points = testing.generic_clouds(
        1, count, torch.Generator().manual_seed(seed), dtype=torch.float64
    )[0]
    points = points - points.mean(dim=0)
    factor = torch.linalg.cholesky(points.mT @ points / count)
    return points @ torch.linalg.inv(factor).mT


def straight(time: Tensor, plane: tuple[int, int]) -> Tensor:
    """Covariances whose eigenvalues in ``plane`` cross at time 0; their axes never turn."""
    shear = torch.zeros(len(time), 3, 3, dtype=torch.float64)
    shear[:, plane[0], plane[0]], shear[:, plane[1], plane[1]] = time, -time
    return shear


def bent(time: Tensor, plane: tuple[int, int]) -> Tensor:
    """They meet at time 0 and part again along other axes, turned by an eighth of a turn."""
    shear = straight(time.clamp_max(0), plane)
    shear[:, plane[0], plane[1]] = shear[:, plane[1], plane[0]] = time.clamp_min(0)
    return shear


def path(bend: Callable[..., Tensor], plane: tuple[int, int], steps: int) -> Tensor:
    """Clouds ``(2 * steps, 24, 3)`` along a continuous path, none of them at the crossing."""
    time = torch.linspace(-0.1, 0.1, 2 * steps, dtype=torch.float64)
    third = ({0, 1, 2} - set(plane)).pop()
    covariance = torch.eye(3, dtype=torch.float64).repeat(2 * steps, 1, 1)
    covariance[:, third, third] = 0.4 if third == 2 else 2.0
    root = torch.linalg.cholesky(covariance + bend(time, plane))
    return whitened() @ root.mT


def predictor(posed: Tensor) -> Tensor:
    """A fixed smooth function of clouds ``(..., N, 3)`` that no rotation leaves alone."""
    weights = torch.tensor(
        [[1.3, -0.4, 0.2], [0.5, 0.9, -1.1], [-0.7, 0.3, 0.8]], dtype=posed.dtype
    )
    return (posed @ weights).sin().mean(dim=-2) + (posed @ weights.mT).cos().mean(dim=-2)


def largest_increment(module: PCA, points: Tensor) -> float:
    frames = module(points)
    assert module.weighting == "uniform" or not frames.degenerate.any()
    return float(frames.vote(predictor(frames.apply(points))).diff(dim=0).norm(dim=-1).max())


PLANES = pytest.mark.parametrize("plane", [(0, 1), (1, 2)], ids=["first two", "last two"])
BENDS = pytest.mark.parametrize("bend", [straight, bent])


@PLANES
@BENDS
@pytest.mark.parametrize(
    ("case", "jumps"),
    [
        ("1", (straight, bent)),
        ("4", (straight, bent)),
        ("24", (bent,)),  # an exchange of two axes maps all 24 among themselves
        ("4-smooth", ()),
        ("24-smooth", ()),
    ],
)
def test_votes_through_an_eigenvalue_crossing(
    case: str, jumps: tuple[object, ...], bend: Callable[..., Tensor], plane: tuple[int, int]
) -> None:
    module = PCA(**CASES[case])
    coarse, fine = (largest_increment(module, path(bend, plane, steps)) for steps in (25, 200))
    if bend in jumps:
        assert fine > 0.01
        assert fine > 0.5 * coarse  # however fine the path
    else:
        assert fine < coarse / 6


@PLANES
@pytest.mark.parametrize("poses", [4, 24])
def test_smooth_frames_at_the_crossing_are_those_beside_it(poses: Any, plane: Any) -> None:
    """From every direction: any small change of the covariance of a cloud that is isotropic in a
    plane changes the vote by little."""
    module = PCA(poses, "smooth")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 3, 3, generator=generator, dtype=torch.float64)
    votes = []
    for size in (0.0, 1e-7):
        covariance = torch.eye(3, dtype=torch.float64) + size * (noise + noise.mT)
        third = ({0, 1, 2} - set(plane)).pop()
        covariance[:, third, third] += -0.6 if third == 2 else 1.0
        points = whitened() @ torch.linalg.cholesky(covariance).mT
        frames = module(points)
        assert not frames.degenerate.any()
        votes.append(frames.vote(predictor(frames.apply(points))))
    assert (votes[1] - votes[0]).abs().max() < 1e-5
    assert votes[0].std(dim=0).max() < 1e-8  # and all of them agree at the crossing


@pytest.mark.parametrize("poses", [4, 24])
def test_smooth_is_uniform_where_eigenvalues_are_far_apart(poses: Any) -> None:
    stretch = torch.tensor([2.0, 1.4, 0.7], dtype=torch.float64)
    points = torch.stack([whitened(seed) for seed in range(8)]) * stretch
    plain, smooth = PCA(poses)(points), PCA(poses, "smooth")(points)
    assert smooth.count == {4: 20, 24: 72}[poses]
    assert testing.frame_distance(plain, smooth.best(poses)).max() < 1e-12
    torch.testing.assert_close(smooth.vote(smooth.rotations), plain.vote(plain.rotations))


def test_a_square_plate_is_settled_by_its_fourth_moment() -> None:
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    plate = torch.cartesian_prod(signs, signs, signs) * torch.tensor([1.0, 1.0, 0.2]).double()
    turns = rotations.so3_grid(20, torch.float64)
    points = plate @ turns.mT
    assert PCA(4)(points).degenerate.all()
    assert PCA(24)(points).degenerate.all()
    for poses in (4, 24):
        frames = PCA(poses, "smooth")(points)
        assert not frames.degenerate.any()
        votes = frames.vote(predictor(frames.apply(points)))
        torch.testing.assert_close(votes, votes[:1].expand_as(votes))


@pytest.mark.parametrize("fold", [3, 5, 6])
def test_other_regular_prisms_have_no_frame_and_are_flagged(fold: int) -> None:
    angle = torch.arange(fold, dtype=torch.float64) * (2 * torch.pi / fold)
    rim = torch.stack((angle.cos(), angle.sin(), torch.full_like(angle, 0.2)), dim=-1)
    prism = torch.cat((rim, rim * torch.tensor([1.0, 1.0, -1.0])))
    frames = PCA(24, "smooth")(prism[None])
    assert frames.degenerate.all()
    testing.assert_proper(frames)
    assert torch.isfinite(frames.log_weights).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "soft"}, "weighting is 'soft'; choose 'uniform' or 'smooth'"),
        ({"poses": 1, "weighting": "smooth"}, "choose poses = 4 or 24"),
    ],
)
def test_what_cannot_be_smoothed_is_one_clear_error(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PCA(**options)


def test_a_vote_of_smooth_frames_has_no_nan_where_weights_vanish() -> None:
    points = torch.stack([whitened(seed) for seed in range(4)]).float() * torch.tensor([3.0, 2, 1])
    frames: Frames = PCA(4, "smooth")(points)
    logits = torch.randn(4, frames.count, 7)
    assert torch.isfinite(frames.vote_logits(logits)).all()
    assert torch.isfinite(frames.vote(logits)).all()
