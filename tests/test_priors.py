"""Priors are normalised densities that sample what they say, and the loss is what they say."""

from __future__ import annotations

import json
import math

import jsonargparse
import pytest
import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import prior_loss, refinement_loss
from pointcanon.priors import (
    Aligned,
    Empirical,
    MatrixFisher,
    Mixture,
    Prior,
    Uniform,
    Upright,
    confidence,
    kl,
    log_normaliser,
)
from pointcanon.testing import assert_proper

DTYPE = torch.float64
EYE = torch.eye(3, dtype=DTYPE)
UP = torch.tensor([1.0, 2.0, -0.5], dtype=DTYPE)
TURNS = rotations.so3_grid(8, DTYPE)
RECIPE = Mixture([Aligned(30.0), Upright(1, 20.0), Uniform()], [0.6, 0.35, 0.05])
"""Most objects stand and face alike, some only stand alike, a few lie anyhow."""


def fisher(*values: float) -> Tensor:
    """A matrix with these proper singular values, in general position."""
    return TURNS[1] @ torch.diag(torch.tensor(values, dtype=DTYPE)) @ TURNS[2]


PRIORS: dict[str, Prior] = {
    "uniform": Uniform(),
    "aligned, broad": Aligned(0.5),
    "aligned": Aligned(5.0),
    "upright, broad": Upright(1, concentration=0.5),
    "upright": Upright(2, concentration=8.0),
    "upright, other axis": Upright(UP, concentration=3.0),
    "matrix Fisher": MatrixFisher(fisher(6.0, 4.0, 1.0)),
    "matrix Fisher, negative": MatrixFisher(fisher(5.0, 3.0, -2.0)),
    "matrix Fisher, one axis": MatrixFisher(fisher(6.0, 0.0, 0.0)),
    "empirical": Empirical(TURNS[:5], concentration=4.0),
    "mixture": Mixture([Aligned(6.0), Upright(1, 5.0), Uniform()], [12, 7, 1]),
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


SINGULAR_VALUES = {
    "zero": (0.0, 0.0, 0.0),
    "distinct": (5.0, 2.0, 1.0),
    "equal": (3.0, 3.0, 3.0),
    "equal pair": (3.0, 1.0, 1.0),
    "improper": (3.0, 1.0, -1.0),
    "rank one": (4.0, 0.0, 0.0),
    "peaked": (80.0, 70.0, 60.0),
}
singular = pytest.mark.parametrize("values", SINGULAR_VALUES.values(), ids=SINGULAR_VALUES)


@singular
def test_log_normaliser_has_the_gradient_of_its_values(values: tuple[float, ...]) -> None:
    """Against finite differences, also where the derivative of an SVD does not exist."""
    parameter = fisher(*values).requires_grad_()
    assert torch.autograd.gradcheck(log_normaliser, parameter, eps=1e-5, atol=1e-8)


@pytest.mark.parametrize("values", list(SINGULAR_VALUES.values())[:-1])
def test_log_normaliser_and_its_gradient_are_integrals_over_rotations(
    values: tuple[float, ...], grid: Tensor
) -> None:
    parameter = fisher(*values).requires_grad_()
    density = (parameter.detach() * grid).sum(dim=(-1, -2)).exp()
    found = log_normaliser(parameter)
    assert found.item() == pytest.approx(density.mean().log().item(), abs=2e-3)
    found.backward()
    expected = (density[:, None, None] * grid).mean(dim=0) / density.mean()
    torch.testing.assert_close(parameter.grad, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(MatrixFisher(parameter.detach()).mean, parameter.grad)


@pytest.mark.parametrize("kappa", [1e-6, 0.1, 1.0, 30.0, 1e3, 1e6])
def test_isotropic_log_normaliser_is_the_closed_form(kappa: float) -> None:
    twice = torch.tensor(2 * kappa, dtype=DTYPE)
    scaled = torch.special.i0e(twice) - torch.special.i1e(twice)
    found = log_normaliser(kappa * TURNS) - 3 * kappa
    expected = scaled.log().expand(8)
    torch.testing.assert_close(found, expected, atol=1e-12 + 1e-15 * kappa, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e3, 1e5, 1e7])
def test_log_normaliser_far_out_is_the_gaussian_one(scale: float) -> None:
    s = scale * torch.tensor([3.0, 2.0, -1.0], dtype=DTYPE)
    slopes = 2 * (s.sum() - s)  # of the squares of the three small entries of a quaternion
    gaussian = s.sum() - (math.log(math.pi) + slopes.log().sum()) / 2
    parameter = fisher(*s.tolist()).requires_grad_()
    found = log_normaliser(parameter)
    assert found.item() == pytest.approx(gaussian.item(), abs=2 / scale + 1e-14 * scale)
    found.backward()
    assert (parameter.grad - MatrixFisher(parameter.detach()).mode).norm() < 2 / scale


def test_log_normaliser_does_not_turn_and_takes_batches() -> None:
    parameters = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    plain = log_normaliser(parameters)
    assert plain.shape == (2, 8)
    torch.testing.assert_close(log_normaliser(TURNS @ parameters), plain)
    torch.testing.assert_close(log_normaliser(parameters.mT), plain)
    torch.testing.assert_close(plain[1, 3], log_normaliser(parameters[1, 3]))
    low = parameters.float().requires_grad_()
    answer = log_normaliser(low)
    torch.testing.assert_close(answer, plain.float())
    answer.sum().backward()
    assert low.grad.dtype == torch.float32
    assert log_normaliser(parameters[:, :0]).shape == (2, 0)
    with pytest.raises(InputError, match=r"\(3, 2\), expected \(\.\.\., 3, 3\)"):
        log_normaliser(parameters[0, 0, :, :2])


def test_no_rotation_is_likelier_than_the_mode(grid: Tensor) -> None:
    for values in ((6.0, 4.0, 1.0), (5.0, 3.0, -2.0)):
        prior = MatrixFisher(fisher(*values))
        assert_proper(prior.mode)
        best = prior.log_prob(prior.mode)
        assert best > prior.log_prob(grid).max()
        assert best.item() == pytest.approx(sum(values) - prior.log_normaliser)


def test_matrix_fisher_of_a_multiple_of_the_identity_is_the_aligned_prior() -> None:
    by_rows = MatrixFisher([[4, 0, 0], [0, 4, 0], [0, 0, 4]])
    torch.testing.assert_close(by_rows.log_prob(TURNS), Aligned(4.0).log_prob(TURNS))
    nothing = MatrixFisher(torch.zeros(3, 3))
    torch.testing.assert_close(nothing.log_prob(TURNS), Uniform().log_prob(TURNS))


@singular
def test_confidence_is_the_mean_cosine_about_the_least_certain_axis(
    values: tuple[float, ...],
) -> None:
    prior = MatrixFisher(fisher(*values))
    angle = torch.arange(720, dtype=DTYPE) * (2 * math.pi / 720)
    means = []
    for axis in TURNS[1].mT:  # the columns of U
        density = prior.log_prob(rotations.about_axis(axis, angle) @ prior.mode).exp()
        means.append((density * angle.cos()).sum() / density.sum())
    found = confidence(prior.parameter)
    torch.testing.assert_close(found, torch.stack(means).min(), atol=1e-9, rtol=0)


def test_confidence_grows_from_nought_to_one() -> None:
    scales = torch.tensor([0.0, 0.1, 1.0, 10.0, 1e3, 1e9], dtype=DTYPE)
    found = confidence(scales[:, None, None] * fisher(2.0, 1.0, 0.5))
    assert found[0] == 0
    assert (found.diff() > 0).all()
    assert found[-1] == pytest.approx(1, abs=1e-8)
    assert confidence(torch.eye(3).expand(2, 5, 3, 3)).shape == (2, 5)
    with pytest.raises(InputError, match="expected"):
        confidence(torch.ones(3))


def test_empirical_is_the_mean_of_its_kernels(grid: Tensor) -> None:
    prior = Empirical(TURNS[:3].tolist(), concentration=9.0)
    kernels = [Aligned(9.0).log_prob(turn.mT @ grid[:100]).exp() for turn in TURNS[:3]]
    torch.testing.assert_close(prior.log_prob(grid[:100]).exp(), sum(kernels) / 3)
    sharp = Empirical(TURNS[:3], concentration=1e6).sample(200, dtype=DTYPE)
    nearest, which = rotations.geodesic_angle(sharp[:, None], TURNS[:3]).min(dim=1)
    assert nearest.max() < 0.01
    assert which.unique().tolist() == [0, 1, 2]


def test_mixture_is_the_sum_of_its_shares(grid: Tensor) -> None:
    first, second = Aligned(3.0), Upright(0, 4.0)
    # in proportion: 3 to 1
    found = Mixture([first, second], [6, 2]).log_prob(grid[:100]).exp()
    expected = 0.75 * first.log_prob(grid[:100]).exp() + 0.25 * second.log_prob(grid[:100]).exp()
    torch.testing.assert_close(found, expected)
    even = Mixture([first, second]).log_prob(grid[:100])
    torch.testing.assert_close(even, Mixture([first, second], [5, 5]).log_prob(grid[:100]))
    nested = Mixture([Mixture([first, second], [1, 3]), Uniform()], [0.8, 0.2])
    flat = Mixture([first, second, Uniform()], [0.2, 0.6, 0.2])
    torch.testing.assert_close(nested.log_prob(grid[:100]), flat.log_prob(grid[:100]))


def test_mixture_draws_its_shares(generator: torch.Generator) -> None:
    here, there = Empirical(TURNS[:1], 1e5), Empirical(TURNS[3:4], 1e5)
    sample = Mixture([here, there, here], [0.2, 0.7, 0.1]).sample(50, 200, generator=generator)
    share = (rotations.geodesic_angle(sample, TURNS[3].float()) < 0.1).double().mean()
    assert share.item() == pytest.approx(0.7, abs=0.02)  # standard deviation 0.005


def test_mixture_is_exact_in_float32_and_never_overflows(generator: torch.Generator) -> None:
    """Value and gradient, near the mode, anywhere, and where every peaked part underflows."""
    axis = torch.randn(3, 300, 3, generator=generator, dtype=DTYPE)
    angle = torch.tensor([1e-3, 0.5, math.pi], dtype=DTYPE)
    turns = rotations.about_axis(axis, angle[:, None])
    for prior in (RECIPE, Mixture([Aligned(1e4), Uniform()], [0.95, 0.05])):
        exact = turns.clone().requires_grad_()
        low = turns.float().requires_grad_()
        expected, found = prior.log_prob(exact), prior.log_prob(low)
        # rounding of the trace, three times the concentration
        largest = max(getattr(part, "concentration", 0) for part in prior.priors)
        bound = 4e-7 * 3 * largest
        assert (found - expected).abs().max() < bound
        expected.sum().backward()
        found.sum().backward()
        assert (low.grad - exact.grad).abs().max() < bound * largest
    half_turn = torch.diag(torch.tensor([1.0, -1, -1]))
    assert prior.log_prob(half_turn).item() == pytest.approx(math.log(0.05))


def test_divergence_in_closed_form_is_the_mean_over_samples(
    grid: Tensor, generator: torch.Generator
) -> None:
    first, second = MatrixFisher(fisher(6.0, 4.0, 1.0)), Aligned(3.0)
    for p, q in ((first, second), (second, first), (first, Uniform()), (Uniform(), first)):
        logs = p.log_prob(grid), q.log_prob(grid)
        expected = (logs[0].exp() * (logs[0] - logs[1])).mean().item()
        assert kl(p, q) == pytest.approx(expected, abs=5e-3)
        by_samples = kl(Mixture([p]), q, 40_000, generator)
        assert by_samples == pytest.approx(expected, abs=0.05)
        assert kl(p, p) == pytest.approx(0, abs=1e-12)
    assert kl(first, second) != pytest.approx(kl(second, first), abs=0.1)


def test_forward_divergence_asks_to_cover_and_the_reverse_to_stay_inside(
    generator: torch.Generator,
) -> None:
    two = Mixture([Empirical(TURNS[:1], 50.0), Empirical(TURNS[3:4], 50.0)])
    one, both = Empirical(TURNS[:1], 50.0), Aligned(0.1)
    assert kl(two, both, generator=generator) < kl(two, one, generator=generator)
    assert kl(one, two, generator=generator) < kl(both, two, generator=generator)
    assert kl(one, two, generator=generator) == pytest.approx(math.log(2), abs=0.02)


def the_prior(prior: Prior) -> Prior:
    return prior


def test_priors_are_built_from_recipes() -> None:
    def parsed(name: str, **arguments: object) -> Prior:
        recipe = json.dumps({"class_path": name, "init_args": arguments})
        built = jsonargparse.auto_cli(the_prior, args=[recipe])
        assert isinstance(built, Prior)
        return built

    parts: list[dict[str, object]] = [
        {"class_path": "Aligned", "init_args": {"concentration": 30.0}},
        {"class_path": "Upright", "init_args": {"axis": 1, "concentration": 20.0}},
        {"class_path": "pointcanon.priors.Uniform"},
    ]
    shares = [0.6, 0.35, 0.05]
    rows = fisher(3, 2, 1).tolist()
    for built, expected in (
        (parsed("Mixture", priors=parts, weights=shares), RECIPE),
        (parsed("Upright", axis=[0.0, 0.0, 1.0]), Upright(2)),
        (parsed("pointcanon.priors.MatrixFisher", parameter=rows), MatrixFisher(rows)),
        (parsed("Empirical", rotations=TURNS.tolist(), concentration=7), Empirical(TURNS, 7.0)),
    ):
        torch.testing.assert_close(built.log_prob(TURNS), expected.log_prob(TURNS))


def test_bad_parameters_of_priors_are_refused() -> None:
    for parameter in (torch.ones(3), torch.full((3, 3), math.nan), torch.ones(2, 3, 3)):
        with pytest.raises(InputError, match=r"finite matrix of shape \(3, 3\)"):
            MatrixFisher(parameter)
    with pytest.raises(InputError, match="M >= 1"):
        Empirical(torch.zeros(0, 3, 3))
    for wrong in (-EYE, 2 * EYE, EYE.roll(1, 0).flip(0), EYE * math.nan):
        with pytest.raises(InputError, match=r"rotations\[1\] is no rotation"):
            Empirical(torch.stack((EYE, wrong)))
    with pytest.raises(InputError, match="concentration"):
        Empirical(TURNS, concentration=0.0)
    with pytest.raises(InputError, match="at least one"):
        Mixture([])
    with pytest.raises(InputError, match="2 weights for 1 priors"):
        Mixture([Uniform()], [1, 2])
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="weights must be positive"):
            Mixture([Uniform(), Aligned()], [1.0, weight])
    with pytest.raises(InputError, match="samples is 0"):
        kl(Uniform(), Uniform(), samples=0)


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
