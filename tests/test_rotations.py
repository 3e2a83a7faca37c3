"""Rotations: orthonormalisation everywhere defined, Haar statistics, angles, groups and grids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.errors import InputError
from pointcanon.testing import assert_proper

ORTHONORMALISE = {"gram-schmidt": rotations.gram_schmidt, "svd": rotations.svd_project}
EYE = torch.eye(3, dtype=torch.float64)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def difficult_matrices() -> dict[str, Tensor]:
    x, y, z = EYE
    return {
        "zero": torch.zeros(3, 3, dtype=torch.float64),
        "identity (equal singular values)": EYE,
        "reflection (equal singular values, det < 0)": -EYE,
        "first column zero": torch.stack((0 * x, y, z), dim=-1),
        "second column zero": torch.stack((x, 0 * y, z), dim=-1),
        "parallel columns": torch.stack((x + y, 2 * (x + y), z), dim=-1),
        "nearly parallel columns": torch.stack((x, x + 1e-7 * y, z), dim=-1),
        "opposite columns": torch.stack((x + 3 * z, -x - 3 * z, y), dim=-1),
        "rank one": torch.ones(3, 3, dtype=torch.float64),
        "two equal singular values": torch.diag(torch.tensor([2.0, 1.0, -1.0]).double()),
    }


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ORTHONORMALISE)
def test_rotation_and_finite_gradient_for_every_input(
    method: str, dtype: torch.dtype, scale: float
) -> None:
    cases = torch.cat((torch.stack(list(difficult_matrices().values())), randn(50, 3, 3)))
    matrices = (cases * scale).to(dtype).requires_grad_()
    answer = ORTHONORMALISE[method](matrices)
    assert answer.dtype == dtype
    assert_proper(answer)
    (answer * randn(*answer.shape, seed=1, dtype=dtype)).sum().backward()
    assert torch.isfinite(matrices.grad).all()


@pytest.mark.parametrize("method", ORTHONORMALISE)
def test_scale_of_the_vectors_does_not_matter(method: str) -> None:
    matrices = randn(20, 3, 3, dtype=torch.float32)
    expected = ORTHONORMALISE[method](matrices)
    for scale in (2.0**-99, 2.0**99):
        torch.testing.assert_close(ORTHONORMALISE[method](matrices * scale), expected)


@pytest.mark.parametrize("method", ORTHONORMALISE)
def test_orthonormalisation_is_equivariant_and_keeps_rotations(
    method: str, generator: torch.Generator
) -> None:
    matrices = randn(50, 3, 3)
    turns = rotations.random_rotations(50, generator=generator, dtype=torch.float64)
    orthonormalise = ORTHONORMALISE[method]
    torch.testing.assert_close(orthonormalise(turns @ matrices), turns @ orthonormalise(matrices))
    torch.testing.assert_close(orthonormalise(turns), turns)


def test_gram_schmidt_of_two_vectors() -> None:
    vectors = torch.tensor([[2.0, 5.0], [0.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(rotations.gram_schmidt(vectors), torch.eye(3))
    # a third column is ignored: the third axis is the cross product, so there is no reflection
    mirrored = torch.cat((vectors, torch.tensor([[0.0], [0.0], [-1.0]])), dim=-1)
    torch.testing.assert_close(rotations.gram_schmidt(mirrored), torch.eye(3))


def test_gram_schmidt_falls_back_to_axes() -> None:
    nothing = rotations.gram_schmidt(torch.zeros(3, 2))
    torch.testing.assert_close(nothing[:, 0], torch.tensor([1.0, 0.0, 0.0]))
    direction = torch.tensor([0.1, -2.0, 0.7])
    parallel = rotations.gram_schmidt(torch.stack((direction, 3 * direction), dim=-1))
    torch.testing.assert_close(parallel[:, 0], direction / direction.norm())
    # the second axis leans on x, the coordinate axis least aligned with the direction
    assert parallel[0, 1] > 0.9


@pytest.mark.parametrize("method", ORTHONORMALISE)
def test_gradients_are_the_derivatives(method: str) -> None:
    matrices = randn(6, 3, 3).requires_grad_()
    assert torch.linalg.det(matrices).min() < 0 < torch.linalg.det(matrices).max()
    assert torch.autograd.gradcheck(ORTHONORMALISE[method], (matrices,))


def test_svd_projection_equals_the_textbook() -> None:
    matrices = randn(200, 3, 3)
    left, _, right = torch.linalg.svd(matrices)
    sign = torch.ones(200, 3, dtype=torch.float64)
    sign[:, 2] = torch.linalg.det(left @ right)
    expected = left @ torch.diag_embed(sign) @ right
    torch.testing.assert_close(rotations.svd_project(matrices), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svd_projection_is_the_same_with_a_derivative(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(300, 3, 3, generator=generator, dtype=dtype)
    matrices[:100] *= torch.logspace(-20, 10, 100, dtype=dtype)[:, None, None]
    assert (torch.linalg.det(matrices.double()) < 0).any()
    without = rotations.svd_project(matrices)
    assert_proper(without)
    with_one = rotations.svd_project(matrices.clone().requires_grad_()).detach()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(without, with_one, atol=tolerance, rtol=0)


def test_svd_projection_is_the_nearest_rotation(generator: torch.Generator) -> None:
    matrices = randn(20, 1, 3, 3)
    others = rotations.random_rotations(2000, generator=generator, dtype=torch.float64)
    nearest = (matrices - rotations.svd_project(matrices)).norm(dim=(-1, -2))
    assert ((matrices - others).norm(dim=(-1, -2)) >= nearest).all()


def test_noise_reaches_svd_half_as_much_as_gram_schmidt(generator: torch.Generator) -> None:
    sigma = 0.01
    exact = rotations.random_rotations(20_000, generator=generator, dtype=torch.float64)
    noisy = exact + sigma * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    for method, factor in (("svd", 3), ("gram-schmidt", 6)):
        error = (ORTHONORMALISE[method](noisy) - exact).square().sum(dim=(-1, -2)).mean()
        assert error.item() == pytest.approx(factor * sigma**2, rel=0.03)


def test_svd_of_zero_is_the_identity() -> None:
    torch.testing.assert_close(
        rotations.svd_project(torch.zeros(2, 3, 3)), torch.eye(3).repeat(2, 1, 1)
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 1), (4, 2), (2, 2, 3)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        rotations.gram_schmidt(torch.zeros(shape))
    with pytest.raises(InputError, match="shape"):
        rotations.svd_project(torch.zeros(shape))


def test_near_singular_sees_what_leaves_a_frame_open() -> None:
    x, y, _ = EYE
    pairs = torch.stack(
        [torch.stack(pair, dim=-1) for pair in ((x, y), (x, x), (x, 0 * x), (x, x + 1e-9 * y))]
    )
    assert rotations.near_singular(pairs, 1.0).tolist() == [False, True, True, True]
    # the SVD needs s2 + s3 sign(det) > 0: a rank-two matrix does, an exact tie of signs does not
    diagonals = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, -1], [2, 1, -0.5], [1, 0, 0]])
    matrices = torch.diag_embed(diagonals.double())
    found = rotations.near_singular(matrices, 1.0, columns=3)
    assert found.tolist() == [False, False, True, False, True]
    # relative to the size the vectors should have
    assert rotations.near_singular(1e-6 * pairs[:1].float(), torch.tensor([1.0])).all()
    assert not rotations.near_singular(1e-6 * pairs[:1].float(), torch.tensor([1e-6])).any()


def test_haar_statistics(generator: torch.Generator) -> None:
    sample = rotations.random_rotations(100_000, generator=generator, dtype=torch.float64)
    assert_proper(sample)
    angle = rotations.geodesic_angle(EYE, sample).rad2deg()
    assert angle.mean().item() == pytest.approx(126.476, abs=0.4)  # sd 36.5 / sqrt(1e5) = 0.12
    assert (sample - EYE).square().sum(dim=(-1, -2)).mean().item() == pytest.approx(6, abs=0.03)
    # each column is uniform on the sphere: no mean, and second moment 1 / 3
    assert sample.mean(dim=0).abs().max() < 0.01
    torch.testing.assert_close(sample.square().mean(dim=0), EYE * 0 + 1 / 3, atol=0.01, rtol=0)


def test_sampling_follows_the_generator() -> None:
    def draw(seed: int) -> Tensor:
        return rotations.random_rotations(2, 5, generator=torch.Generator().manual_seed(seed))

    assert draw(3).shape == (2, 5, 3, 3)
    assert draw(3).dtype == torch.float32
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_random_about_axis_keeps_the_axis(generator: torch.Generator) -> None:
    axis = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    turns = rotations.random_about_axis(20_000, axis=axis, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(turns @ axis, axis.expand(20_000, 3))
    angle = rotations.geodesic_angle(EYE, turns)
    assert angle.mean().item() == pytest.approx(math.pi / 2, abs=0.03)


def test_about_axis_is_right_handed() -> None:
    x, y, z = EYE
    quarter = rotations.about_axis(5 * z, torch.tensor(math.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(quarter @ x, y)
    torch.testing.assert_close(rotations.from_rotvec(z * math.pi / 2), quarter)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-3, 1.0, math.pi - 1e-7, math.pi])
def test_angle_is_accurate_at_both_ends(angle: float, generator: torch.Generator) -> None:
    axis = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    turn = rotations.about_axis(axis, torch.full((100,), angle, dtype=torch.float64))
    base = rotations.random_rotations(100, generator=generator, dtype=torch.float64)
    measured = rotations.geodesic_angle(base, base @ turn)
    # 1e-12 rad is known to the rounding of the matrix entries only
    torch.testing.assert_close(measured, torch.full_like(measured, angle), rtol=1e-8, atol=1e-15)


def test_angle_in_float32_near_zero() -> None:
    turn = rotations.about_axis(randn(100, 3), torch.full((100,), 1e-7, dtype=torch.float64))
    measured = rotations.geodesic_angle(torch.eye(3), turn.float())
    torch.testing.assert_close(measured, torch.full_like(measured, 1e-7), rtol=1e-4, atol=0)


def test_angle_has_a_finite_gradient_everywhere(generator: torch.Generator) -> None:
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    others = rotations.random_rotations(5, generator=generator, dtype=torch.float64)
    matrices = torch.cat((EYE[None], half_turn[None], others)).requires_grad_()
    rotations.geodesic_angle(EYE, matrices).sum().backward()
    assert torch.isfinite(matrices.grad).all()
    assert (matrices.grad[0] == 0).all()


def test_angle_is_a_metric_that_broadcasts(generator: torch.Generator) -> None:
    a, b, c = rotations.random_rotations(3, 50, generator=generator, dtype=torch.float64)
    angle = rotations.geodesic_angle
    torch.testing.assert_close(angle(a, b), angle(b, a))
    assert (angle(a, c) <= angle(a, b) + angle(b, c) + 1e-12).all()
    torch.testing.assert_close(angle(c @ a, c @ b), angle(a, b))
    assert angle(a[:, None], b[None]).shape == (50, 50)


GROUPS = {"C1": 1, "C2": 2, "C5": 5, "C12": 12, "T": 12, "O": 24, "I": 60}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_groups(name: str) -> None:
    elements = rotations.group(name, torch.float64)
    assert elements.shape == (GROUPS[name], 3, 3)
    assert_proper(elements, tolerance=1e-14)
    assert torch.equal(elements[0].round(decimals=14), EYE)

    def where(matrices: Tensor) -> Tensor:
        distance = (matrices[..., None, :, :] - elements).abs().amax(dim=(-1, -2))
        assert (distance.amin(dim=-1) < 1e-13).all()
        return distance.argmin(dim=-1)

    # every row and column of the product table is a permutation: closed, all elements distinct
    table = where(elements[:, None] @ elements[None])
    everyone = torch.arange(len(elements))
    assert torch.equal(table.sort(dim=0).values, everyone[:, None].expand_as(table))
    assert torch.equal(table.sort(dim=1).values, everyone.expand_as(table))
    assert torch.equal(where(elements.mT).sort().values, everyone)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("T", {0: 1, 120: 8, 180: 3}),
        ("O", {0: 1, 90: 6, 120: 8, 180: 9}),
        ("I", {0: 1, 72: 12, 120: 20, 144: 12, 180: 15}),
    ],
)
def test_groups_have_the_right_classes(name: str, counts: dict[int, int]) -> None:
    angles = rotations.geodesic_angle(EYE, rotations.group(name, torch.float64)).rad2deg().round()
    values, found = angles.unique(return_counts=True)
    assert dict(zip(values.int().tolist(), found.tolist(), strict=True)) == counts


def test_cyclic_group_about_another_axis() -> None:
    axis = torch.tensor([0.0, 3.0, 0.0])
    elements = rotations.group("C4", torch.float64, axis=axis)
    torch.testing.assert_close(elements @ EYE[1], EYE[1].expand(4, 3))
    torch.testing.assert_close(elements[1] @ EYE[2], EYE[0])


def test_a_group_is_a_fresh_tensor() -> None:
    rotations.group("O", torch.float64).zero_()
    assert rotations.group("O", torch.float64).any()


@pytest.mark.parametrize("name", ["", "C", "C0", "D4", "c4", "octahedral"])
def test_unknown_groups_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown rotation group"):
        rotations.group(name)


@pytest.mark.parametrize("axis", [torch.zeros(3), torch.tensor([torch.nan, 0, 1])])
def test_an_axis_has_a_direction(axis: torch.Tensor) -> None:
    with pytest.raises(InputError, match="rotation axis is zero or not finite"):
        rotations.about_axis(axis, torch.ones(2))
    with pytest.raises(InputError, match="rotation axis"):
        rotations.group("C2", axis=axis)


def test_the_length_of_an_axis_does_not_matter() -> None:
    axis, angle = torch.tensor([1.0, -2.0, 0.5]), torch.tensor(0.7)
    expected = rotations.about_axis(axis, angle)
    for length in (1e-30, 1e30):
        torch.testing.assert_close(rotations.about_axis(length * axis, angle), expected)


def test_only_cyclic_groups_have_an_axis() -> None:
    with pytest.raises(InputError, match="axis"):
        rotations.group("O", axis=EYE[0])


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_grid_is_deterministic_and_proper(size: int) -> None:
    grid = rotations.so3_grid(size, torch.float64)
    assert grid.shape == (size, 3, 3)
    assert_proper(grid, tolerance=1e-12)
    assert torch.equal(grid, rotations.so3_grid(size, torch.float64))


def test_grid_is_near_uniform(generator: torch.Generator) -> None:
    size = 500
    grid = rotations.so3_grid(size, torch.float64)
    random = rotations.random_rotations(size, generator=generator, dtype=torch.float64)

    def spacing(points: Tensor) -> Tensor:
        angle = rotations.geodesic_angle(points[:, None], points[None])
        return angle.fill_diagonal_(torch.inf).amin(dim=1)

    # a ball of angle r has Haar volume (r - sin r) / pi: the radius at which 500 just fill SO(3)
    ideal = (6 * math.pi / size) ** (1 / 3)
    assert spacing(grid).min() > 0.9 * ideal
    assert spacing(grid).std() < 0.1 * spacing(grid).mean()
    assert spacing(random).min() < 0.3 * ideal
    # and it leaves no hole: every rotation has a grid point within 1.5 ideal radii
    probes = rotations.random_rotations(1500, generator=generator, dtype=torch.float64)
    nearest = rotations.geodesic_angle(probes[:, None], grid[None]).amin(dim=1)
    assert nearest.max() < 1.5 * ideal
    assert grid.mean(dim=0).abs().max() < 5e-3
    assert (grid - EYE).square().sum(dim=(-1, -2)).mean().item() == pytest.approx(6, abs=0.01)


def test_empty_grid_is_refused() -> None:
    with pytest.raises(InputError, match="size"):
        rotations.so3_grid(0)


def test_products_and_angles_keep_their_precision_under_autocast() -> None:
    first, second = rotations.so3_grid(8), rotations.so3_grid(8).flip(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (first @ second).dtype == torch.bfloat16
        product = rotations.product(first, second)
        angle = rotations.geodesic_angle(first, second)
    assert torch.equal(product, first @ second)
    assert torch.equal(angle, rotations.geodesic_angle(first, second))
