"""Steerable layers against e3nn and their definitions, and the canonicalizer made of them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pointcanon import checkpoint, rotations, testing
from pointcanon.canonicalizers import Steerable
from pointcanon.errors import InputError
from pointcanon.layers import steerable
from pointcanon.neighbors import knn

o3 = pytest.importorskip("e3nn.o3")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


TURN = rotations.random_rotations(
    1, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)[0]
MASK = torch.tensor([[True] * 5 + [False] * 2, [True, False] * 3 + [True]])


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def wigner(degree: int) -> Tensor:
    """The matrix that turns harmonics as ``TURN`` turns vectors (e3nn's own is exact to 5e-7)."""
    vectors = features(60, 3)
    before, after = (
        o3.spherical_harmonics(degree, x, normalize=False) for x in (vectors, vectors @ TURN.mT)
    )
    return torch.linalg.lstsq(before, after).solution.mT


def turned(x: Tensor) -> Tensor:
    """Tensors ``(D, ...)`` turned, each degree by its Wigner matrix."""
    whole = torch.block_diag(*(wigner(degree) for degree in range(int(len(x) ** 0.5))))
    return torch.einsum("ij,j...->i...", whole, x)


LAYERS = {
    "linear": lambda: steerable.Linear(3, 4, 6),
    "norm": lambda: steerable.Norm(),
    "gate": lambda: steerable.Gate(3, 4),
    "interaction": lambda: steerable.Interaction(3, 4),
    "last interaction": lambda: steerable.Interaction(3, 4, out_degree=1),
    "product with a view": lambda: WithView(steerable.TensorProduct(3, 4, 2)),
}


class WithView(nn.Module):
    """A tensor product of the features and a linear view of them."""

    def __init__(self, product: steerable.TensorProduct) -> None:
        super().__init__()
        self.product, self.view = product, steerable.Linear(3, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.view(x))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_commute_with_wigner_matrices(name):
    layer = LAYERS[name]().double()
    x = features(16, 4, 2, 7)
    torch.testing.assert_close(layer(turned(x)), turned(layer(x)), atol=1e-10, rtol=0)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_harmonics_are_those_of_e3nn(degree):
    vectors = features(3, 5, 6)
    found = steerable.SolidHarmonics(degree).double()(vectors)
    wanted = o3.spherical_harmonics(
        list(range(degree + 1)), vectors.movedim(0, -1), normalize=False, normalization="component"
    )
    torch.testing.assert_close(found, wanted.movedim(-1, 0))
    torch.testing.assert_close(
        steerable.invert(found), steerable.SolidHarmonics(degree).double()(-vectors)
    )


def test_tensor_product_is_the_sum_of_all_couplings():
    product = steerable.TensorProduct(2, 3, 1).double()
    first, second = features(9, 3, 4), features(9, 3, 4)
    found = product(first, second)
    paths = {0: [(0, 0), (1, 1), (2, 2)], 1: [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]}
    for l3, pairs in paths.items():
        coupled = [
            (2 * l3 + 1) ** 0.5
            * torch.einsum(
                "ijk,icn,jcn->kcn",
                o3.wigner_3j(l1, l2, l3, dtype=torch.float64),
                first[l1**2 : (l1 + 1) ** 2],
                second[l2**2 : (l2 + 1) ** 2],
            )
            for l1, l2 in pairs
        ]
        wanted = torch.einsum("dc,kcn->kdn", product.weights[l3], torch.cat(coupled, dim=1))
        torch.testing.assert_close(found[l3**2 : (l3 + 1) ** 2], wanted)


def test_coupling_of_unit_variance_has_unit_variance():
    coefficients = steerable.coupling(3)
    for l1, l2, l3 in [(0, 3, 3), (1, 1, 1), (2, 3, 2), (3, 3, 0)]:
        block = coefficients[l1**2 : (l1 + 1) ** 2, l2**2 : (l2 + 1) ** 2, l3**2 : (l3 + 1) ** 2]
        ones = torch.ones(2 * l3 + 1, dtype=torch.float64)
        torch.testing.assert_close(block.square().sum(dim=(0, 1)), ones)


def test_bernstein_polynomials_sum_to_one():
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    basis = steerable.bernstein(x, 4)
    torch.testing.assert_close(basis.sum(dim=0), torch.ones_like(x))
    torch.testing.assert_close(basis[:, 0], torch.tensor([1.0, 0, 0, 0]).double())
    torch.testing.assert_close(basis[1], 3 * x * (1 - x) ** 2)


def test_mean_and_interaction_leave_padding_out():
    layer = steerable.Interaction(2, 4).double()
    x = features(9, 4, 2, 7)
    other = torch.where(MASK, x, 1e3)
    torch.testing.assert_close(steerable.mean(other, MASK), steerable.mean(x, MASK))
    torch.testing.assert_close(steerable.mean(x, MASK)[:, :, 0, 0], x[:, :, 0, :5].mean(dim=-1))
    found, wanted = layer(other, MASK), layer(x, MASK)
    torch.testing.assert_close(found[..., MASK], wanted[..., MASK])


def test_norm_brings_each_degree_to_one_and_keeps_zero():
    norm = steerable.Norm().double()
    x = 100 * features(9, 4, 5)
    for rows in norm(x).split([1, 3, 5]):
        assert rows.square().mean(dim=(0, 1)).sub(1).abs().max() < 1e-2
    assert not norm(torch.zeros_like(x)).any()


def test_dropout_takes_whole_tensors():
    layer = steerable.Dropout(0.4)
    x = torch.ones(9, 20, 3, 40)
    dropped = layer(x)
    for rows in dropped.split([1, 3, 5]):
        assert torch.equal(rows.amax(dim=0), rows.amin(dim=0))
        assert abs(float((rows[0] > 0).float().mean()) - 0.6) < 0.03
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped[dropped > 0].unique(), torch.tensor([1 / 0.6]))
    assert torch.equal(layer.eval()(x), x)


def test_coefficients_are_exact_in_every_dtype():
    product = steerable.TensorProduct(2, 3, 2)
    assert torch.equal(product.half().double().coupling, steerable.coupling(2))
    assert "coupling" not in product.state_dict()


def test_coefficients_survive_the_context_they_were_first_asked_in():
    steerable.coupling.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        assert steerable.coupling(2).device.type == "cpu"
    layer, x = steerable.TensorProduct(2, 3, 2), torch.randn(9, 3, 4, requires_grad=True)
    layer(x, x).sum().backward()
    assert x.grad is not None


# the canonicalizer --------------------------------------------------------------------------------

SHAPES = (testing.generic_clouds, testing.surface_clouds)
SMALL: dict[str, Any] = {"channels": 4, "layers": 2, "k": 8}


def build(dtype: torch.dtype = torch.float64, **options) -> Steerable:
    return Steerable(**{**SMALL, **options}).to(dtype).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"lmax": 3, "orthonormalise": "svd"}, {"lmax": 1}, {"mirror": True}, {"num_points": 24}],
    ids=str,
)
def test_contract_in_float64(options):
    canonicalizer = build(**options)
    for clouds in SHAPES:
        points = clouds(6, 40, dtype=torch.float64)
        testing.assert_equivariant(canonicalizer, points)
        frames = canonicalizer(points)
        testing.assert_proper(frames)
        assert not frames.degenerate.any()
    testing.assert_permutation_invariant(canonicalizer, points)
    testing.assert_translation_invariant(canonicalizer, points)
    testing.assert_scale_invariant(canonicalizer, points)
    testing.assert_batch_independent(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points[:, :20])
    testing.assert_degenerate_safe(canonicalizer, dtype=torch.float64)


def test_default_size_in_float32():
    canonicalizer = Steerable().eval()
    assert 10_000 < sum(weight.numel() for weight in canonicalizer.parameters()) < 70_000
    for make in SHAPES:
        points = make(50, 280)
        testing.assert_equivariant(canonicalizer, points)
        testing.assert_proper(canonicalizer(points))
    testing.assert_degenerate_safe(canonicalizer)


@pytest.mark.parametrize("count", [3, 4, 7, 8, 9])
def test_fewer_points_than_neighbours(count):
    canonicalizer = build()
    points = testing.generic_clouds(4, count, dtype=torch.float64)
    assert not canonicalizer(points).degenerate.any()
    testing.assert_equivariant(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points)


@pytest.mark.parametrize("orthonormalise", ["gram-schmidt", "svd"])
def test_mirror_images_are_posed_as_mirror_images(orthonormalise):
    """R(S x) = S R(x) diag(1, 1, -1) for every reflection S, inversion included."""
    canonicalizer = build(mirror=True, orthonormalise=orthonormalise)
    points = testing.generic_clouds(20, 40, dtype=torch.float64)
    points = points - points.mean(dim=1, keepdim=True)
    reflections = -rotations.so3_grid(20, torch.float64)
    reflections[0] = -torch.eye(3)
    flip = torch.tensor([1.0, 1.0, -1.0]).double()
    frames = canonicalizer(points)
    mirrored = canonicalizer(points @ reflections.mT)
    wanted = reflections @ frames.rotations[:, 0] * flip
    torch.testing.assert_close(mirrored.rotations[:, 0], wanted, atol=1e-10, rtol=0)
    poses = mirrored.apply(points @ reflections.mT)
    torch.testing.assert_close(poses, frames.apply(points) * flip, atol=1e-9, rtol=0)
    # polar vectors turn by S, axial ones by det(S) S
    parity = torch.tensor([1.0, 1.0, -1.0]).double()[: frames.raw.shape[-1]]
    raw = (reflections @ frames.raw[:, 0]) * parity
    torch.testing.assert_close(mirrored.raw[:, 0], raw, atol=1e-10, rtol=0)
    assert (frames.raw.norm(dim=-2) > 1e-4).all()


def test_mirror_images_are_told_apart_otherwise():
    canonicalizer = build()
    points = testing.generic_clouds(20, 40, dtype=torch.float64)
    mirrored = points * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    posed, other = canonicalizer(points).apply(points), canonicalizer(mirrored).apply(mirrored)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for flip in torch.cartesian_prod(signs, signs, signs):
        assert ((posed - other * flip).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_plane_of_symmetry_of_a_cloud_is_the_plane_of_its_pose():
    half = testing.generic_clouds(10, 30, dtype=torch.float64)
    half = half - half.mean(dim=1, keepdim=True)
    points = torch.cat((half, half * torch.tensor([1.0, -1.0, 1.0]).double()), dim=1) @ TURN.mT
    frames = build(mirror=True)(points)
    assert not frames.degenerate.any()
    posed = frames.apply(points)[:, 0]
    first, second = posed.chunk(2, dim=1)
    torch.testing.assert_close(first * torch.tensor([1.0, 1.0, -1.0]).double(), second)
    assert not build()(points).degenerate.any()


def test_neighbours_on_a_lattice_do_not_hang_on_rounding():
    """Nearly every k-th distance is shared here; a plain k-NN mean would depend on the pose."""
    generator = torch.Generator().manual_seed(1)
    axis = torch.arange(6, dtype=torch.float64)
    lattice = torch.cartesian_prod(axis, axis, axis)
    clouds = [lattice[torch.randperm(216, generator=generator)[:100]] for _ in range(4)]
    testing.assert_equivariant(build(k=9), torch.stack(clouds), tolerance=1e-9)


def test_neighbours_that_all_but_coincide_are_no_directions():
    """Each point ten times over, apart by rounding: its neighbourhood is itself."""
    few = testing.generic_clouds(50, 20)
    points = few.repeat(1, 10, 1)
    points = points + 1e-6 * torch.randn_like(points)
    testing.assert_equivariant(build(torch.float32), points)


def test_frame_is_continuous_where_the_nearest_points_change():
    canonicalizer = build(k=6)
    cloud = testing.generic_clouds(1, 40, dtype=torch.float64)[0]
    start, end = cloud[0].clone(), cloud[1].clone()
    path = cloud.expand(100, -1, -1).clone()
    path[:, 0] = start + torch.linspace(0, 0.9, 100, dtype=torch.float64)[:, None] * (end - start)
    changes = (knn(path, 6).sort(dim=-1).values.diff(dim=0) != 0).flatten(1).any(dim=1)
    assert changes.sum() > 3
    with torch.no_grad():
        frames = canonicalizer(path).rotations[:, 0]
    steps = frames.diff(dim=0).flatten(1).norm(dim=1)
    assert steps.max() < 20 * steps.median() + 1e-6


def test_normals_turn_along():
    canonicalizer = build(normals=True, num_points=24)
    points = testing.generic_clouds(3, 40, dtype=torch.float64)
    normals = nn.functional.normalize(features(3, 40, 3), dim=-1)
    testing.assert_equivariant(canonicalizer, points, normals=normals)
    before = canonicalizer(points, normals=normals).rotations
    assert (canonicalizer(points, normals=-normals).rotations - before).abs().max() > 1e-3
    with pytest.raises(InputError, match="pass normals too"):
        canonicalizer(points)


def test_training_mode_is_equivariant_too():
    canonicalizer = Steerable(dropout=0.3, **SMALL).double()
    points = testing.generic_clouds(4, 40, dtype=torch.float64)

    def frames(cloud: Tensor) -> Tensor:
        torch.manual_seed(3)
        return canonicalizer(cloud).rotations

    torch.testing.assert_close(frames(points @ TURN.mT), TURN @ frames(points))
    assert not torch.equal(canonicalizer(points).rotations, canonicalizer(points).rotations)


def test_copies_pickles_and_checkpoints(tmp_path):
    canonicalizer = build(torch.float32, mirror=True, orthonormalise="svd", lmax=3)
    points = testing.generic_clouds(3, 40)
    wanted = canonicalizer(points).rotations
    path = tmp_path / "steerable.safetensors"
    checkpoint.save(path, canonicalizer, checkpoint.Card(kind="canonicalized"))
    loaded, _ = checkpoint.load(path)
    unpickled = pickle.loads(pickle.dumps(canonicalizer))
    for again in (loaded, unpickled, copy.deepcopy(canonicalizer)):
        assert again.hyperparameters == canonicalizer.hyperparameters
        assert torch.equal(again(points).rotations, wanted)
        testing.assert_equivariant(again.double(), points.double())


def test_registered_without_e3nn_and_built_without_warnings():
    code = (
        "import sys, warnings\n"
        "from pointcanon.canonicalizers import CANONICALIZERS, Steerable\n"
        "assert CANONICALIZERS['Steerable'] is Steerable and 'e3nn' not in sys.modules\n"
        "warnings.simplefilter('error')\n"
        "import torch\n"
        "module = Steerable(channels=2, layers=1, k=4)\n"
        "assert 'e3nn' in sys.modules\n"
        "module(torch.randn(2, 9, 3)).rotations.sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmax": 0}, "lmax is 0; choose at least 1"),
        ({"channels": 0}, "channels is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"k": 1}, "k is 1; choose at least 2"),
        ({"num_points": 2}, "num_points is 2; choose at least 3"),
        ({"orthonormalise": "qr"}, "unknown orthonormalisation 'qr'"),
        ({"dropout": 1.0}, "p is 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Steerable(**options)
