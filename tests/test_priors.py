"""Priors are normalised densities that sample what they say, and the loss is what they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import prior_loss, refinement_loss
from pointcanon.priors import Aligned, Prior, Uniform, Upright
from pointcanon.testing import assert_proper

DTYPE = torch.float64
EYE = torch.eye(3, dtype=DTYPE)
UP = torch.tensor([1.0, 2.0, -0.5], dtype=DTYPE)
PRIORS: dict[str, Prior] = {
    "uniform": Uniform(),
    "aligned, broad": Aligned(0.5),
    "aligned": Aligned(5.0),
    "upright, broad": Upright(1, concentration=0.5),
    "upright": Upright(2, concentration=8.0),
    "upright, other axis": Upright(UP, concentration=3.0),
}


@pytest.fixture(scope="module")
def grid() -> Tensor:
    return rotations.so3_grid(50_000, DTYPE)


def angles(turns: Tensor) -> Tensor:
    return rotations.geodesic_angle(EYE, turns)


def mean_angle(kappa: float) -> float:
    """Of the isotropic matrix Fisher distribution, in degrees, by quadrature over the angle."""
    angle = torch.linspace(0, math.pi, 200_001, dtype=DTYPE)
    density = (2 * kappa * (angle.cos() - 1)).exp() * (1 - angle.cos())
    return math.degrees(torch.trapezoid(angle * density, angle) / torch.trapezoid(density, angle))


@pytest.mark.parametrize("name", PRIORS)
def test_density_integrates_to_one(name: str, grid: Tensor) -> None:
    assert PRIORS[name].log_prob(grid).exp().mean().item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("concentration", [0.01, 1.0, 10.0, 100.0, 1e4, 1e8])
def test_aligned_normaliser_at_any_concentration(concentration: float) -> None:
    # Haar measure gives angles the density (1 - cos t) / pi
    width = min(math.pi, 12 / math.sqrt(2 * concentration))
    angle = torch.linspace(0, width, 20_001, dtype=DTYPE)
    turns = rotations.about_axis(torch.ones(3, dtype=DTYPE), angle)
    density = Aligned(concentration).log_prob(turns).exp() * 2 * (angle / 2).sin() ** 2 / math.pi
    # the trace of a matrix near the identity is rounded at 1e-16, times the concentration
    accuracy = 1e-5 + 1e-15 * concentration
    assert torch.trapezoid(density, angle).item() == pytest.approx(1, abs=accuracy)


@pytest.mark.parametrize("concentration", [0.01, 1.0, 100.0, 1e4])
def test_upright_normaliser_at_any_concentration(concentration: float) -> None:
    # the height u.Ru is uniform on [-1, 1] under Haar measure; this is its distance from 1
    drop = torch.linspace(0, min(2.0, 40 / concentration), 20_001, dtype=DTYPE)
    turns = rotations.about_axis(EYE[0], (1 - drop).acos())
    density = Upright(2, concentration).log_prob(turns).exp() / 2
    assert torch.trapezoid(density, drop).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("kappa", "degrees"), [(5.0, 29.9), (10.0, 20.8), (50.0, 9.2)])
def test_aligned_mean_angle_is_the_published_one(kappa: float, degrees: float) -> None:
    assert mean_angle(kappa) == pytest.approx(degrees, abs=0.05)
    sample = Aligned(kappa).sample(20_000, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    # standard deviation at most 13 degrees over sqrt(20000)
    assert angles(sample).rad2deg().mean().item() == pytest.approx(mean_angle(kappa), abs=0.4)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_have_the_moments_of_the_density(
    name: str, grid: Tensor, generator: torch.Generator
) -> None:
    prior = PRIORS[name]
    sample = prior.sample(20_000, generator=generator, dtype=DTYPE)
    assert_proper(sample, tolerance=1e-12)
    density = prior.log_prob(grid).exp()[:, None, None]
    weighted = (density * grid).mean(dim=0)
    torch.testing.assert_close(sample.mean(dim=0), weighted, atol=0.02, rtol=0)
    second = (density * grid.square()).mean(dim=0)
    torch.testing.assert_close(sample.square().mean(dim=0), second, atol=0.02, rtol=0)
    # the mean log-likelihood of its own samples is minus its entropy
    entropy = -(density[:, 0, 0] * prior.log_prob(grid)).mean()
    assert prior.log_prob(sample).mean().item() == pytest.approx(-entropy.item(), abs=0.05)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_shape_dtype_and_generator(name: str) -> None:
    def draw(seed: int) -> Tensor:
        return PRIORS[name].sample(2, 4, generator=torch.Generator().manual_seed(seed))

    assert draw(1).shape == (2, 4, 3, 3)
    assert draw(1).dtype == torch.float32
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert_proper(draw(1))
    assert PRIORS[name].log_prob(draw(1)).shape == (2, 4)


def test_upright_keeps_up_and_frees_the_heading(generator: torch.Generator) -> None:
    kappa = 20.0
    sample = Upright(UP, kappa).sample(20_000, generator=generator, dtype=DTYPE)
    axis = UP / UP.norm()
    height = (sample @ axis) @ axis
    assert height.mean().item() == pytest.approx(1 / math.tanh(kappa) - 1 / kappa, abs=2e-3)
    # turning about up, before or after, changes no density
    turn = rotations.about_axis(axis, torch.tensor(1.3, dtype=DTYPE))
    prior, some = Upright(UP, kappa), sample[:50]
    torch.testing.assert_close(prior.log_prob(turn @ some), prior.log_prob(some))
    torch.testing.assert_close(prior.log_prob(some @ turn), prior.log_prob(some))


def test_upright_axis_by_index_or_vector() -> None:
    turns = rotations.so3_grid(20, DTYPE)
    by_index = Upright(1, 4.0).log_prob(turns)
    torch.testing.assert_close(by_index, Upright(7 * EYE[1], 4.0).log_prob(turns))


def test_squared_distance_to_the_identity_is_the_isotropic_matrix_fisher() -> None:
    kappa = 7.0
    turns = rotations.so3_grid(100, DTYPE)
    squared = (turns - EYE).square().sum(dim=(-1, -2))
    torch.testing.assert_close(squared, 6 - 2 * turns.diagonal(dim1=-2, dim2=-1).sum(dim=-1))
    constant = Aligned(kappa).log_prob(turns) + kappa / 2 * squared
    torch.testing.assert_close(constant, constant[:1].expand(100))
    torch.testing.assert_close(constant[0], Aligned(kappa).log_prob(EYE))


def test_squared_distance_to_the_identity_under_turns_about_up_is_the_upright_prior() -> None:
    kappa = 7.0
    poses = rotations.so3_grid(100, DTYPE)
    turns = rotations.group("C8", DTYPE)
    squared = (turns @ poses[:, None] - EYE).square().sum(dim=(-1, -2)).mean(dim=1)
    constant = Upright(2, kappa).log_prob(poses) + kappa / 2 * squared
    torch.testing.assert_close(constant, constant[:1].expand(100))
    # its floor, in the mean-square form, is 4 / 9: no single pose serves every heading
    assert squared.min().item() / 9 == pytest.approx(4 / 9, abs=0.02)
    assert squared.min().item() / 9 > 4 / 9


@pytest.mark.parametrize("concentration", [0.0, -1.0, math.nan, math.inf])
def test_bad_concentrations_are_refused(concentration: float) -> None:
    with pytest.raises(InputError, match="concentration"):
        Aligned(concentration)
    with pytest.raises(InputError, match="concentration"):
        Upright(0, concentration)


BAD_AXES = [torch.zeros(3), torch.ones(2), torch.full((3,), torch.nan), torch.ones(3) / 0, 3, -1]


@pytest.mark.parametrize("axis", BAD_AXES)
def test_bad_axes_are_refused(axis: Tensor | int) -> None:
    with pytest.raises(InputError, match="axis"):
        Upright(axis)


def candidates(batch: int = 5, count: int = 3) -> Frames:
    generator = torch.Generator().manual_seed(2)
    return Frames.of(
        rotations.random_rotations(batch, count, generator=generator, dtype=DTYPE),
        torch.randn(batch, count, generator=generator, dtype=DTYPE),
    )


@pytest.mark.parametrize("name", PRIORS)
def test_loss_asks_for_the_pose_the_data_set_holds(name: str, generator: torch.Generator) -> None:
    """Turning the data by G turns R to G R; told of G, the loss does not change."""
    prior, found = PRIORS[name], candidates()
    turns = rotations.random_rotations(5, generator=generator, dtype=DTYPE)
    turned = Frames.of(turns[:, None] @ found.rotations, found.log_weights)
    before, after = prior_loss(found, prior), prior_loss(turned, prior, turns)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(before, prior_loss(found, prior, EYE.expand(5, 3, 3)))


def test_loss_is_smallest_for_the_right_frame() -> None:
    turns = rotations.so3_grid(6, DTYPE)
    right = prior_loss(Frames.of(turns), Aligned(10.0), turns)
    transposed = prior_loss(Frames.of(turns.mT), Aligned(10.0), turns)
    assert right.item() == pytest.approx(-Aligned(10.0).log_prob(EYE).item())
    assert transposed > right + 1


def test_loss_of_candidates_is_that_of_their_mixture() -> None:
    prior, found = Aligned(4.0), candidates()
    mixture = (found.weights * prior.log_prob(found.rotations).exp()).sum(dim=1)
    torch.testing.assert_close(prior_loss(found, prior), -mixture.log().mean())
    # with one candidate it is the plain negative log-likelihood
    one = found.best()
    expected = -prior.log_prob(one.rotations[:, 0]).mean()
    torch.testing.assert_close(prior_loss(one, prior), expected)


def test_loss_teaches_the_weights_which_candidate_is_right() -> None:
    scores = torch.zeros(1, 2, dtype=DTYPE, requires_grad=True)
    half_turn = torch.diag(torch.tensor([1.0, -1, -1], dtype=DTYPE))
    prior_loss(Frames.of(torch.stack((EYE, half_turn))[None], scores), Aligned(10.0)).backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]


def test_loss_averages_over_the_stages() -> None:
    first, second = candidates(), Frames.of(EYE.expand(5, 1, 3, 3))
    staged = Frames.of(second.rotations, stages=(first, second))
    expected = (prior_loss(first, Aligned()) + prior_loss(second, Aligned())) / 2
    torch.testing.assert_close(prior_loss(staged, Aligned()), expected)


def test_outliers_are_a_uniform_share_of_the_prior() -> None:
    prior, found, share = Aligned(50.0), candidates(), 0.1
    mixture = (found.weights * prior.log_prob(found.rotations).exp()).sum(dim=1)
    expected = -((1 - share) * mixture + share).log().mean()
    torch.testing.assert_close(prior_loss(found, prior, outliers=share), expected)
    # however wrong the pose, the loss ends at -log(share)
    half_turn = Frames.of(torch.diag(torch.tensor([1.0, -1, -1])).double()[None])
    ceiling = prior_loss(half_turn, Aligned(1e4), outliers=share)
    assert ceiling.item() == pytest.approx(-math.log(share))
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="outliers"):
            prior_loss(found, prior, outliers=bad)


class Stays:
    """Refines nothing: the poses it is given come back."""

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        return frames


class Knows(Stays):
    """Refines to the pose the data set holds, turned by ``reference``."""

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference

    def refine(self, points: Tensor, frames: Frames, mask: Tensor | None = None) -> Frames:
        return Frames.of(self.reference[:, None].expand_as(frames.rotations))


def test_refinement_starts_within_the_spread_of_the_right_pose() -> None:
    torch.manual_seed(0)
    kappa, spread = 3.0, 1.0
    turns = rotations.so3_grid(500, DTYPE)
    points = torch.randn(500, 4, 3, dtype=DTYPE)
    # angles uniform on [0, spread]: the mean trace is 1 + 2 sin(spread) / spread
    normaliser = 3 * kappa - Aligned(kappa).log_prob(EYE)
    expected = normaliser - kappa * (1 + 2 * math.sin(spread) / spread)
    for reference in (None, turns):
        loss = refinement_loss(Stays(), points, Aligned(kappa), reference, 8, spread)
        assert loss.item() == pytest.approx(expected.item(), abs=0.05)
    right = refinement_loss(Knows(turns), points, Aligned(kappa), turns)
    torch.testing.assert_close(right, -Aligned(kappa).log_prob(EYE))


@pytest.mark.parametrize("name", PRIORS)
def test_loss_keeps_its_precision_under_autocast(name: str) -> None:
    found = candidates()
    found = Frames.of(found.rotations.float(), found.log_weights.float())
    turns = rotations.so3_grid(5)
    expected = prior_loss(found, PRIORS[name], turns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prior_loss(found, PRIORS[name], turns)
    torch.testing.assert_close(inside, expected)
