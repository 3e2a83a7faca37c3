"""Every canonicalizer and predictor, asked about clouds as hostile as users' data.

A new one joins by being registered; predictors need a line in ``SMALL``.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import DTYPES, EFFORTS, Spec, specs
from test_canonicalizers import CASES, EQUIVARIANT, build, motions
from torch import Tensor, nn

from pointcanon import predictors, testing
from pointcanon.errors import InputError, NotFiniteError
from pointcanon.predictors import PREDICTORS, PartPredictor

NOT_FINITE = st.sampled_from([torch.nan, torch.inf, -torch.inf])
SMALL = {
    "pointnet": {"num_classes": 5, "widths": (8, 8), "embedding": 16, "transforms": (0,)},
    "pointnet-parts": {"num_parts": 5, "widths": (8, 8, 8), "embedding": 16, "head": (8,)},
    "pointnet2": {"num_classes": 5},
    "pointnet2-parts": {"num_parts": 5},
    "dgcnn": {"num_classes": 5, "k": 4, "embedding": 16},
    "dgcnn-parts": {"num_parts": 5, "k": 4, "embedding": 16},
}


@cache
def canonicalizer(case: str, dtype: torch.dtype) -> nn.Module:
    return build(case, torch.promote_types(dtype, torch.float32))


@cache
def predictor(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return predictors.create(name, **SMALL[name]).to(dtype)


def assert_no_nan_flows_back(values: list[Tensor], points: Tensor, module: nn.Module) -> None:
    """Of a sum that treats no entry alike."""
    value = torch.cat([value.flatten() for value in values])
    if not value.requires_grad:
        return
    probe = torch.linspace(-1, 1, value.numel(), dtype=value.dtype)
    wanted = [points, *(weight for weight in module.parameters() if weight.requires_grad)]
    for gradient in torch.autograd.grad((value * probe).sum(), wanted, allow_unused=True):
        assert gradient is None or not gradient.isnan().any()


def assert_statistics_are_finite(module: nn.Module) -> None:
    for name, value in module.named_buffers():
        assert not value.is_floating_point() or value.isfinite().all(), name


@EFFORTS
@pytest.mark.parametrize("case", CASES)
def test_frames_of_any_cloud(case: str, effort: object) -> None:
    @effort
    @given(specs(), st.booleans())
    @example(Spec(batch=0), True)
    @example(Spec("cube", count=64, scale=1e-27, seed=66), True)
    def holds(spec: Spec, training: bool) -> None:
        points, mask = spec.build()
        module = canonicalizer(case, spec.dtype).train(training)
        points.requires_grad_()
        frames = module(points, mask)
        dtype = torch.promote_types(spec.dtype, torch.float32)
        assert frames.rotations.shape == (spec.batch, frames.count, 3, 3)
        assert frames.log_weights.shape == (spec.batch, frames.count)
        assert frames.degenerate.shape == (spec.batch,)
        assert {frames.rotations.dtype, frames.log_weights.dtype, frames.centre.dtype} == {dtype}
        if spec.batch:
            testing.assert_proper(frames, group=motions(case).get("group", "SO3"))
        assert frames.centre.isfinite().all()
        assert frames.log_weights.isfinite().all()
        torch.testing.assert_close(frames.weights.sum(dim=1), frames.weights.new_ones(spec.batch))
        assert_no_nan_flows_back([frames.rotations, frames.log_weights], points, module)
        assert_statistics_are_finite(module)

    holds()


@EFFORTS
@pytest.mark.parametrize("case", EQUIVARIANT)
def test_equivariance_on_generic_clouds(case: str, effort: object) -> None:
    @effort
    @given(st.integers(0, 1 << 16), st.sampled_from([24, 50, 80]))
    def holds(seed: int, count: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        points = testing.generic_clouds(2, count, generator, torch.float64)
        module = canonicalizer(case, torch.float64).eval()
        testing.assert_equivariant(module, points, generator=generator, **motions(case))

    holds()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_refused_or_hidden(case: str, number: float) -> None:
    points, _ = Spec(count=21).build()
    points[1, 7, 2] = number
    module = canonicalizer(case, torch.float32).eval()
    with pytest.raises(InputError, match=r"points\[1, 7\]"):
        module(points)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1, 7] = False
    testing.assert_proper(module(points, mask), group=motions(case).get("group", "SO3"))


def test_every_predictor_is_asked() -> None:
    assert set(SMALL) == set(PREDICTORS)


def answer(module: nn.Module, points: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of the clouds, or of their real points."""
    if not isinstance(module, PartPredictor):
        return module(points, mask)
    category = torch.zeros(len(points), dtype=torch.long)
    logits = module(points, mask, category=category)
    assert logits.shape[:2] == points.shape[:2]
    return logits.flatten(0, 1) if mask is None else logits[mask]


@EFFORTS
@pytest.mark.parametrize("name", PREDICTORS)
def test_logits_of_any_cloud_are_finite_or_refused(name: str, effort: object) -> None:
    @effort
    @given(specs())
    @example(Spec(batch=0))
    @example(Spec(batch=0, dtype=torch.float64, mask="half"))
    @example(Spec(scale=1e30))
    def holds(spec: Spec) -> None:
        points, mask = spec.build()
        module = predictor(name, spec.dtype).eval()
        try:
            logits = answer(module, points.requires_grad_(), mask)
        except InputError as error:
            # too few neighbours, or coordinates that the network cannot carry
            few = "neighbours" in str(error) and (mask is not None or spec.count < 4)
            if few or isinstance(error, NotFiniteError):
                return
            raise
        assert logits.shape[-1] == 5
        assert logits.dtype == spec.dtype
        assert logits.isfinite().all()
        # beyond that a gradient may leave the range of its dtype
        if spec.dtype in DTYPES[:2] and spec.scale < 1e12:
            assert_no_nan_flows_back([logits], points, module)

    holds()


@EFFORTS
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_predictor_names_what_is_not_finite(name: str, effort: object) -> None:
    @effort
    @given(
        st.integers(0, 2),
        st.integers(0, 20),
        st.integers(0, 2),
        NOT_FINITE,
        st.sampled_from(DTYPES),
    )
    def holds(cloud: int, point: int, axis: int, number: float, dtype: torch.dtype) -> None:
        points, _ = Spec(batch=3, count=21, dtype=dtype).build()
        clean = points.clone()
        points[cloud, point, axis] = number
        module = predictor(name, dtype).eval()
        with pytest.raises(InputError, match=rf"points\[{cloud}, {point}\]"):
            answer(module, points, None)
        mask = torch.ones(3, 21, dtype=torch.bool)
        mask[cloud, point] = False
        hidden = answer(module, points, mask)
        assert hidden.isfinite().all()
        torch.testing.assert_close(hidden, answer(module, clean, mask), rtol=0, atol=0)

    holds()


def test_squared_distances_beyond_the_dtype_leave_no_nan() -> None:
    """Padding may be so far from all coarse points that no weight of its interpolation is left."""
    spec = Spec(shape="line", batch=2, count=3, scale=1e20, offset=1e6, mask="half", seed=8699)
    points, mask = spec.build()
    module = predictor("pointnet2-parts", spec.dtype).eval()
    logits = answer(module, points.requires_grad_(), mask)
    assert_no_nan_flows_back([logits], points, module)


@EFFORTS
@pytest.mark.parametrize("name", PREDICTORS)
def test_training_on_any_cloud_leaves_no_nan(name: str, effort: object) -> None:
    @effort
    @given(specs(), st.sampled_from(DTYPES[:2]), st.sampled_from([1e-12, 1e-3, 1.0, 1e3]))
    @example(Spec(batch=0), torch.float32, 1.0)
    @example(Spec(offset=1e6, mask="half"), torch.float32, 1e-12)
    def holds(spec: Spec, dtype: torch.dtype, scale: float) -> None:
        spec = Spec(**{**vars(spec), "dtype": dtype, "scale": scale})
        points, mask = spec.build()
        module = predictor(name, dtype).train()
        try:
            logits = answer(module, points.requires_grad_(), mask)
        except InputError as error:
            if "neighbours" in str(error):
                return
            raise
        assert logits.isfinite().all()
        assert_no_nan_flows_back([logits], points, module)
        assert_statistics_are_finite(module)

    holds()
