"""Priors, losses and orthonormalisation on whatever a network in training may come up with."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import EFFORTS, powers
from torch import Tensor

from pointcanon import losses, priors, rotations, testing
from pointcanon.frames import Frames
from pointcanon.priors import Aligned, Empirical, MatrixFisher, Mixture, Prior, Uniform, Upright

SEEDS = st.integers(0, 1 << 16)
FLOATS = st.sampled_from([torch.float32, torch.float64])
KINDS = (
    "normal",
    "zero",
    "rank one",
    "rank two",
    "reflection",
    "rotation",
    "half turn",
    "huge row",
)


def matrices(kind: str, scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    """``(3, 3, 3)``: a batch of matrices of a kind."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    turns = rotations.random_rotations(3, generator=generator, dtype=torch.float64)
    signs = draw.new_tensor
    made = {
        "normal": draw,
        "zero": 0 * draw,
        "rank one": draw[:, :, :1] * draw[:, :1],
        "rank two": draw * signs([1.0, 1.0, 0.0]),
        "reflection": turns * signs([1.0, 1.0, -1.0]),
        "rotation": turns,
        "half turn": turns @ torch.diag(signs([1.0, -1.0, -1.0])) @ turns.mT,
        "huge row": draw * signs([1e12, 1.0, 1e-12]),
    }
    most = torch.finfo(dtype).max
    return (made[kind] * scale).clamp(-most, most).to(dtype)


def prior(name: str, concentration: float) -> Prior:
    turns = rotations.random_rotations(3, generator=torch.Generator().manual_seed(0))
    made = {
        "Uniform": Uniform,
        "Aligned": lambda: Aligned(concentration),
        "Upright": lambda: Upright((1e-3, 2.0, -1.0), concentration),
        "MatrixFisher": lambda: MatrixFisher(concentration * turns[0]),
        "Empirical": lambda: Empirical(turns, concentration),
        "Mixture": lambda: Mixture([Upright(1, concentration), Uniform()], [1e-9, 1.0]),
    }
    return made[name]()


PRIORS = [
    name
    for name in priors.__all__
    if inspect.isclass(cls := getattr(priors, name)) and issubclass(cls, Prior) and cls is not Prior
]


def assert_no_nan_flows_back(value: Tensor, inputs: Tensor) -> None:
    (gradient,) = torch.autograd.grad(value.sum(), inputs)
    assert not gradient.isnan().any()


@EFFORTS
@pytest.mark.parametrize("name", PRIORS)
def test_priors(name: str, effort: object) -> None:
    @effort
    @given(powers(-9, 7), SEEDS, FLOATS)
    def holds(concentration: float, seed: int, dtype: torch.dtype) -> None:
        known = prior(name, concentration)
        generator = torch.Generator().manual_seed(seed)
        drawn = known.sample(2, 3, generator=generator, dtype=dtype)
        assert drawn.shape == (2, 3, 3, 3)
        assert drawn.dtype == dtype
        testing.assert_proper(drawn)
        assert known.sample(0, dtype=dtype).shape == (0, 3, 3)
        for kind in ("rotation", "half turn"):
            poses = matrices(kind, 1.0, seed, dtype).requires_grad_()
            density = known.log_prob(poses)
            assert density.shape == (3,)
            assert density.isfinite().all()
            if density.requires_grad:
                assert_no_nan_flows_back(density, poses)
        # log p is in the mean no less over what is drawn than over all poses
        everywhere = known.log_prob(
            rotations.random_rotations(64, generator=generator, dtype=dtype)
        )
        most = known.log_prob(known.sample(64, generator=generator, dtype=dtype))
        chance = ((everywhere.var() + most.var()) / 64).sqrt()
        slack = 6 * float(chance) + 1e-3 * max(1.0, concentration)
        assert most.mean() >= everywhere.mean() - slack

    holds()


@EFFORTS
def test_the_normaliser_of_the_matrix_fisher_distribution(effort: object) -> None:
    @effort
    @given(st.sampled_from(KINDS[:-1]), powers(-30, 6), SEEDS, FLOATS)
    def holds(kind: str, scale: float, seed: int, dtype: torch.dtype) -> None:
        parameter = matrices(kind, scale, seed, dtype).requires_grad_()
        value = priors.log_normaliser(parameter)
        size = torch.linalg.svdvals(parameter.detach()).sum(dim=-1)
        assert value.isfinite().all()
        # Jensen's inequality below, the largest value of tr F^T R above
        slack = 1e-5 * (1 + size)
        assert (value >= -slack).all()
        assert (value <= size + slack).all()
        (mean,) = torch.autograd.grad(value.sum(), parameter)
        assert (torch.linalg.matrix_norm(mean, ord=2) <= 1 + 1e-5).all()
        sure = priors.confidence(parameter)
        assert ((sure >= 0) & (sure <= 1)).all()

    holds()


@EFFORTS
@pytest.mark.parametrize("project", [rotations.gram_schmidt, rotations.svd_project])
def test_orthonormalisation(project: object, effort: object) -> None:
    @effort
    @given(st.sampled_from(KINDS), powers(), SEEDS, FLOATS)
    @example("zero", 1.0, 0, torch.float32)
    def holds(kind: str, scale: float, seed: int, dtype: torch.dtype) -> None:
        vectors = matrices(kind, scale, seed, dtype).requires_grad_()
        found = project(vectors)
        testing.assert_proper(found)
        assert_no_nan_flows_back(found * torch.linspace(-1, 1, 9, dtype=dtype).view(3, 3), vectors)

    holds()


@EFFORTS
@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_loss(name: str, effort: object) -> None:
    @effort
    @given(powers(-6, 4), SEEDS, FLOATS, st.sampled_from([0.0, 0.1]))
    def holds(concentration: float, seed: int, dtype: torch.dtype, outliers: float) -> None:
        poses = matrices("half turn", 1.0, seed, dtype)[None].requires_grad_()
        scores = torch.tensor([[0.0, -1e4, 50.0]], dtype=dtype, requires_grad=True)
        frames = Frames.of(poses, scores)
        value = losses.prior_loss(frames, prior(name, concentration), outliers=outliers)
        assert value.isfinite()
        for gradient in torch.autograd.grad(value, [poses, scores], allow_unused=True):
            assert gradient is None or gradient.isfinite().all()

    holds()
