"""What must be true of every canonicalizer, asked of each one that is registered.

A new canonicalizer joins by being in ``CANONICALIZERS``; a line in ``OPTIONS`` tests it with other
constructor arguments than its defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from pointcanon import checkpoint, rotations, testing
from pointcanon.canonicalizers import (
    CANONICALIZERS,
    PCA,
    Canonicalizer,
    Contrastive,
    ForGroup,
    Identity,
    Manhattan,
    Orbit,
    VectorNeuron,
)
from pointcanon.energies import Entropy
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import prior_loss
from pointcanon.predictors import PointNet
from pointcanon.priors import Aligned

SMALL = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}


def network() -> PointNet:
    """With logits of a trained network's size, so that poses differ by more than rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = PointNet(5, widths=(8, 8), embedding=16)
        nn.init.normal_(list(built.parameters())[-2], std=2.0)
    return built


Module = TypeVar("Module", bound=nn.Module)


def seeded(make: Callable[[], Module]) -> Module:
    """With the same weights in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "PCA": [
        {"poses": 1},
        {"poses": 4},
        {"poses": 24},
        {"poses": 4, "weighting": "smooth"},
        {"poses": 24, "weighting": "smooth"},
    ],
    "Steerable": [
        {"channels": 4, "layers": 1, "k": 8},
        {
            "lmax": 1,
            "channels": 4,
            "layers": 2,
            "num_points": 32,
            "mirror": True,
            "orthonormalise": "svd",
        },
    ],
    "Optimized": [
        SMALL,
        {"keep": 2, "steps": 2, "answers": 1, "proposal": PCA(24), **SMALL},
        {"proposal": seeded(lambda: Orbit(VectorNeuron(orthonormalise="svd"))), **SMALL},
    ],
    "Manhattan": [{"poses": 1}, {}],
    "Union": [{"parts": (PCA(4), Manhattan(1))}],
    "Orbit": [{}, {"canonicalizer": PCA(1), "group": "C3", "axis": (1.0, 1.0, 0.0)}],
    "Contrastive": [{"network": network(), "proposal": PCA(4)}],
    "ForGroup": [
        {"canonicalizer": seeded(VectorNeuron), "group": "O3", "scale": True},
        {
            "canonicalizer": seeded(lambda: Contrastive(network(), PCA(4))),
            "group": "SO2",
            "axis": (1.0, 2.0, 0.5),
        },
    ],
    "Search": [
        {"network": network(), "budget": 32},
        {"network": network(), "energy": Entropy(), "budget": 24, "proposal": PCA(1)},
    ],
}
CASES = {
    f"{name}-{number}": (name, options)
    for name in CANONICALIZERS
    for number, options in enumerate(OPTIONS.get(name, [{}]))
}
EQUIVARIANT = [case for case in CASES if not case.startswith("Identity")]
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def build(case: str, dtype: torch.dtype = torch.float32) -> Canonicalizer:
    """In eval mode, with no weight left at the zero or one it may start from."""
    name, options = CASES[case]
    torch.manual_seed(0)
    module = CANONICALIZERS[name](**copy.deepcopy(options))
    with torch.no_grad():
        for weight in module.parameters():
            if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
                weight += 0.1 * torch.randn_like(weight)
    return module.to(dtype).eval()


def motions(case: str) -> dict[str, Any]:
    """The group that a case is equivariant to, and its axis."""
    name, options = CASES[case]
    return {k: options[k] for k in ("group", "axis") if k in options and name == "ForGroup"}


def assert_proper(case: str, frames: Frames) -> None:
    testing.assert_proper(frames, group=motions(case).get("group", "SO3"))


LEARNED = [
    case for case in CASES if any(weight.requires_grad for weight in build(case).parameters())
]

every = pytest.mark.parametrize("case", CASES)
learned = pytest.mark.parametrize("case", LEARNED)
equivariant = pytest.mark.parametrize("case", EQUIVARIANT)


def generic(batch: int, count: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.generic_clouds(batch, count, dtype=dtype)


@equivariant
@BOTH_DTYPES
@pytest.mark.parametrize("cloud", [testing.generic_clouds, testing.surface_clouds])
def test_equivariance(case: str, dtype: torch.dtype, cloud: Callable[..., Tensor]) -> None:
    points = cloud(100 if dtype == torch.float32 else 25, 64, dtype=dtype)
    module = build(case, dtype)
    assert not module(points).degenerate.any()
    testing.assert_equivariant(module, points, **motions(case))


@equivariant
def test_equivariance_on_real_clouds(case: str, real_data: Path) -> None:
    import h5py

    files = sorted((real_data / "modelnet40_ply_hdf5_2048").glob("*test0.h5"))
    with h5py.File(files[0]) as file:
        points = torch.from_numpy(file["data"][:100, :256])
    testing.assert_equivariant(build(case), points, **motions(case))


@equivariant
def test_equivariance_with_a_mask_and_normals(case: str) -> None:
    points = generic(32, 96)
    mask = torch.arange(96) < torch.arange(40, 72)[:, None]
    normals = nn.functional.normalize(generic(32, 96).flip(0) - 1, dim=-1)
    testing.assert_equivariant(build(case), points, mask=mask, normals=normals, **motions(case))


@equivariant
@BOTH_DTYPES
def test_order_place_and_size_of_the_cloud_do_not_matter(case: str, dtype: torch.dtype) -> None:
    module = build(case, dtype)
    points = generic(100 if dtype == torch.float32 else 25, dtype=dtype)
    testing.assert_permutation_invariant(module, points)
    testing.assert_translation_invariant(module, points)
    testing.assert_scale_invariant(module, points)


@every
@BOTH_DTYPES
def test_batch_and_padding_do_not_matter(case: str, dtype: torch.dtype) -> None:
    module, points = build(case, dtype), generic(16, dtype=dtype)
    testing.assert_batch_independent(module, points)
    testing.assert_padding_independent(module, points)


@every
@BOTH_DTYPES
def test_frames_are_proper_and_invertible(case: str, dtype: torch.dtype) -> None:
    module, points = build(case, dtype), generic(16, dtype=dtype)
    frames = module(points)
    assert_proper(case, frames)
    testing.assert_invertible(module, points)
    torch.testing.assert_close(frames.weights.sum(dim=1), torch.ones(16, dtype=dtype))
    for value in (frames.rotations, frames.log_weights, frames.centre):
        assert value.dtype == dtype
    assert frames.degenerate.shape == (16,)
    assert frames.degenerate.dtype == torch.bool


@equivariant
def test_clouds_are_centred_at_their_mean(case: str) -> None:
    points = generic(8)
    frames = build(case)(points)
    torch.testing.assert_close(frames.centre, points.mean(dim=1))
    posed = frames.apply(points)
    torch.testing.assert_close(
        posed.mean(dim=2), torch.zeros_like(posed[:, :, 0]), atol=1e-5, rtol=0
    )


@equivariant
@BOTH_DTYPES
def test_clouds_that_determine_no_frame(case: str, dtype: torch.dtype) -> None:
    group = motions(case).get("group", "SO3")
    testing.assert_degenerate_safe(build(case, dtype), group=group, dtype=dtype)


@every
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_any_number_of_points(case: str, count: int, training: bool) -> None:
    module = build(case).train(training)
    assert_proper(case, module(generic(4, count)))
    assert_proper(case, module(generic(1, count)))


@every
def test_flat_and_tiny_and_huge_clouds(case: str) -> None:
    module, points = build(case), generic(8)
    flat = points * torch.tensor([1.0, 1.0, 0.0])
    for difficult in (flat, 1e-12 * points, 1e12 * points, points + 1e5):
        assert_proper(case, module(difficult))


@every
def test_a_batch_of_no_clouds(case: str) -> None:
    frames = build(case)(torch.zeros(0, 5, 3))
    assert len(frames.rotations) == 0


@learned
@pytest.mark.parametrize("cloud", [testing.generic_clouds, testing.surface_clouds])
def test_training_mode_is_proper_with_finite_gradients(
    case: str, cloud: Callable[..., Tensor]
) -> None:
    module = build(case).train()
    points = cloud(6, 64).requires_grad_()
    mask = torch.arange(64) < torch.tensor([[64], [50], [30], [9], [64], [2]])
    frames = module(points, mask)
    assert_proper(case, frames)
    loss = prior_loss(frames, Aligned(), rotations.so3_grid(6))
    gradients = torch.autograd.grad(loss, [*module.parameters(), points], allow_unused=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
    for (name, _), gradient in zip(module.named_parameters(), gradients[:-1], strict=True):
        assert gradient is not None, f"no loss reaches {name}"
        assert gradient.any(), f"no loss reaches {name}"


@every
def test_autocast_leaves_frames_exact(case: str) -> None:
    module, points = build(case), generic(32)
    plain = module(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frames = module(points)
        low = module(points.bfloat16())
    assert frames.rotations.dtype == frames.log_weights.dtype == torch.float32
    assert testing.frame_distance(frames, plain).max() < 1e-5
    assert low.rotations.dtype == torch.float32
    assert_proper(case, low)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_clouds_are_worked_out_in_float32(case: str, dtype: torch.dtype) -> None:
    module, points = build(case), generic(8).to(dtype)
    frames = module(points)
    assert frames.rotations.dtype == torch.float32
    assert torch.equal(frames.rotations, module(points.float()).rotations)
    assert torch.isfinite(frames.apply(points)).all()


@every
def test_evaluation_is_deterministic_and_keeps_nothing(case: str) -> None:
    module, points = build(case), generic(4)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    attributes = {part: set(vars(part)) for part in module.modules()}
    first, second = module(points), module(points)
    assert torch.equal(first.rotations, second.rotations)
    assert torch.equal(first.log_weights, second.log_weights)
    assert {part: set(vars(part)) for part in module.modules()} == attributes
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


@every
def test_rebuilt_from_its_hyperparameters(case: str) -> None:
    module, points = build(case), generic(4)
    again = checkpoint.build(checkpoint.describe(module))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.eval()(points).rotations, module(points).rotations)


@every
def test_compiles_without_graph_breaks(case: str) -> None:
    module, points = build(case), generic(4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: module(x).apply(x), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(points), module(points).apply(points))


@pytest.mark.parametrize("case", [case for case in CASES if hasattr(build(case), "refine")])
def test_refinement_of_any_frame_is_equivariant(case: str) -> None:
    module, points = build(case, torch.float64), generic(30, dtype=torch.float64)
    turns = rotations.so3_grid(30, torch.float64)
    starts = Frames.of(rotations.so3_grid(60, torch.float64).view(30, 2, 3, 3))
    mask = (torch.arange(64) < 50).expand(30, 64)
    for given in (None, mask):
        refined = module.refine(points, starts, given)
        carried = Frames.of(turns[:, None] @ starts.rotations)
        found = module.refine(points @ turns.mT, carried, given)
        expected = Frames.of(turns[:, None] @ refined.rotations, refined.log_weights)
        assert testing.frame_distance(found, expected).max() < 1e-10
    single = module.float()
    low = Frames.of(starts.rotations.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = single.refine(points.float(), low)
    assert testing.frame_distance(inside, single.refine(points.float(), low)).max() < 1e-5


BAD_INPUTS: dict[str, tuple[Any, Any, str]] = {
    "no tensor": ([[0.0, 0.0, 0.0]], None, "points is a list"),
    "channels first": (torch.zeros(2, 3, 9), None, r"points\.mT"),
    "one cloud": (torch.zeros(9, 3), None, r"points\[None\]"),
    "integers": (torch.zeros(2, 9, 3, dtype=torch.int32), None, "int32"),
    "no points": (torch.zeros(2, 0, 3), None, "at least one point"),
    "NaN": (torch.full((2, 9, 3), torch.nan), None, "nan"),
    "infinite": (torch.full((2, 9, 3), torch.inf), None, "inf"),
    "mask dtype": (torch.zeros(2, 9, 3), torch.ones(2, 9), "mask has dtype"),
    "mask shape": (torch.zeros(2, 9, 3), torch.ones(2, 8, dtype=torch.bool), "mask has shape"),
    "mask device": (
        torch.zeros(2, 9, 3),
        torch.ones(2, 9, dtype=torch.bool, device="meta"),
        "mask is on meta",
    ),
    "all masked": (torch.zeros(2, 9, 3), torch.zeros(2, 9, dtype=torch.bool), "cloud 0 .* empty"),
}


@every
@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_one_clear_error(case: str, bad: str) -> None:
    points, mask, message = BAD_INPUTS[bad]
    with pytest.raises(InputError, match=message):
        build(case)(points, mask)


@every
def test_bad_normals_are_one_clear_error(case: str) -> None:
    with pytest.raises(InputError, match="normals has shape"):
        build(case)(torch.zeros(2, 9, 3), None, torch.zeros(2, 8, 3))


@learned
def test_weights_of_another_dtype_or_device_are_named(case: str) -> None:
    module = build(case)
    with pytest.raises(InputError, match=r"float64.*float32 weights.*convert"):
        module(generic(2, dtype=torch.float64))
    with pytest.raises(InputError, match="meta"):
        module.to("meta")(generic(2))


@equivariant
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float32, (1e-22, 1e22)), (torch.float64, (1e-160, 1e160))],
    ids=["f32", "f64"],
)
def test_extreme_sizes_do_not_matter(
    case: str, dtype: torch.dtype, factors: tuple[float, ...]
) -> None:
    testing.assert_scale_invariant(build(case, dtype), generic(16, dtype=dtype), factors=factors)


def test_pca_has_1_4_or_24_poses() -> None:
    with pytest.raises(InputError, match="poses is 7; choose 1, 4 or 24"):
        PCA(7)  # type: ignore[arg-type]


def test_identity_leaves_clouds_untouched() -> None:
    points = generic(3)
    frames = Identity()(points)
    assert torch.equal(frames.apply(points)[:, 0], points)
    assert not frames.centre.any()


def test_pca_axes_are_those_of_the_covariance() -> None:
    points = generic(16, dtype=torch.float64)
    posed = PCA(4)(points).apply(points)
    assert posed.shape == (16, 4, 64, 3)
    covariance = posed.mT @ posed
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(covariance, torch.diag_embed(variances), atol=1e-9, rtol=0)
    assert (variances.diff(dim=-1) < 0).all()  # largest first


@pytest.mark.parametrize("poses", [1, 4, 24])
def test_pca_candidates_are_distinct_and_equally_weighted(poses: int) -> None:
    frames = PCA(poses)(generic(5, dtype=torch.float64))
    angle = rotations.geodesic_angle(frames.rotations[:, :, None], frames.rotations[:, None])
    different = angle[:, ~torch.eye(poses, dtype=torch.bool)]
    assert (different > 1).all()
    torch.testing.assert_close(frames.weights, torch.full((5, poses), 1 / poses).double())


def test_pca_set_serves_clouds_whose_symmetry_the_set_contains() -> None:
    """A brick has three distinct axes but no sign along them: settled as a set, not as one."""
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    brick = torch.cartesian_prod(signs, signs, signs) * torch.tensor([3.0, 2.0, 1.0]).double()
    points = brick.expand(20, 8, 3)
    assert PCA(1)(points).degenerate.all()
    assert not PCA(4)(points).degenerate.any()
    testing.assert_equivariant(PCA(4), points)
    testing.assert_equivariant(PCA(24), points)


# the checks themselves: each must catch what it is there for


def transposed(points: Tensor) -> Tensor:
    return PCA(1)(points).rotations.mT


def mirrored(points: Tensor) -> Tensor:
    return PCA(1)(points).rotations * torch.tensor([1.0, 1.0, -1.0])


def uncentred(points: Tensor) -> Tensor:
    return PCA(1).propose(points, None, None).rotations


def ordered(points: Tensor) -> Tensor:
    return rotations.gram_schmidt(points[:, :2].mT)


def of_absolute_size(points: Tensor) -> Frames:
    frames, size = PCA(4)(points), points.std(dim=(1, 2))
    return Frames.of(frames.rotations, size[:, None] * torch.arange(4.0))


def of_the_batch(points: Tensor) -> Tensor:
    return PCA(1)(points - points.mean(dim=(0, 1)) + points[:1]).rotations


def blind_to_masks(points: Tensor, mask: Tensor | None = None) -> Frames:
    return PCA(1)(points.nan_to_num(posinf=0.0))


def unflagged(points: Tensor) -> Tensor:
    return PCA(1)(points).rotations


def with_nan_gradient(points: Tensor) -> Frames:
    frames, nothing = PCA(1)(points), (0 * points).square().sum().sqrt()
    return Frames.of(frames.rotations + nothing, degenerate=frames.degenerate)


class Stretched(PCA):
    def forward(self, *arguments: Any) -> Frames:
        frames = super().forward(*arguments)
        return Frames.of(2 * frames.rotations, centre=frames.centre)


@pytest.mark.parametrize(
    ("check", "canonicalizer"),
    [
        (testing.assert_equivariant, transposed),
        (testing.assert_equivariant, Identity()),
        (testing.assert_permutation_invariant, ordered),
        (testing.assert_translation_invariant, uncentred),
        (testing.assert_scale_invariant, of_absolute_size),
        (testing.assert_batch_independent, of_the_batch),
        (testing.assert_padding_independent, blind_to_masks),
        (testing.assert_invertible, Stretched(4)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_checks_catch_what_is_wrong(check: Callable[..., None], canonicalizer: Any) -> None:
    with pytest.raises(AssertionError, match=r"cloud \d+ of 20 by .*tolerance"):
        check(canonicalizer, generic(20))


def test_proper_check_catches_reflections() -> None:
    with pytest.raises(AssertionError, match=r"cloud 0.*det R is -1.*tolerance"):
        testing.assert_proper(mirrored(generic(4)))


def test_degenerate_check_catches_missing_flags_and_nan() -> None:
    with pytest.raises(AssertionError, match=r"single point.*not flagged"):
        testing.assert_degenerate_safe(unflagged)
    with pytest.raises(AssertionError, match="no rotation"):
        testing.assert_degenerate_safe(lambda points: unflagged(points) / 0)
    with pytest.raises(AssertionError, match=r"single point.*gradient"):
        testing.assert_degenerate_safe(with_nan_gradient)


def test_equivariance_of_nothing_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="degenerate"):
        testing.assert_equivariant(PCA(1), torch.zeros(4, 10, 3))
    with pytest.raises(InputError, match="tolerances are known"):
        testing.assert_equivariant(PCA(1), generic(4).half())


def test_tolerance_may_be_given_and_mode_is_restored() -> None:
    module = PCA(1).train()
    with pytest.raises(AssertionError, match="tolerance 1e-20"):
        testing.assert_equivariant(module, generic(8), tolerance=1e-20)
    assert module.training


def test_equivariance_error_is_the_frobenius_norm() -> None:
    points = generic(30, dtype=torch.float64)
    turns = rotations.so3_grid(30, torch.float64)
    assert testing.equivariance_error(PCA(1), points, turns).max() < 1e-10
    found = testing.equivariance_error(Identity(), points, turns)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found, (turns - eye).norm(dim=(-1, -2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "module",
    [
        PCA(24),
        Manhattan(24),
        Orbit(PCA(1), "I"),
        Orbit(PCA(1), "C5", axis=(1.0, 2.0, 3.0)),
        ForGroup(PCA(1), "SO2", axis=(1.0, 2.0, 3.0)),
        ForGroup(PCA(1), "O2", axis=(1.0, 2.0, 3.0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_constants_are_not_rounded_with_the_weights(
    module: Canonicalizer, dtype: torch.dtype
) -> None:
    points = generic(4, dtype=torch.float64)
    expected = copy.deepcopy(module)(points)
    module = copy.deepcopy(module).to(dtype)
    testing.assert_proper(module(points.to(dtype)), group="O3")
    assert torch.equal(module(points).rotations, expected.rotations)
    moved = module.to("meta").to_empty(device="cpu")
    assert {buffer.device.type for buffer in moved.buffers()} == {"cpu"}


def test_other_options_stay_on_the_device() -> None:
    changed = PCA(24).to("meta").with_options(poses=24)
    assert {buffer.device.type for buffer in changed.buffers()} == {"meta"}
