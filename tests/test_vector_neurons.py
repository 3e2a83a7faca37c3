"""Vector-neuron layers against their definitions, and the canonicalizer made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pointcanon import rotations, testing
from pointcanon.canonicalizers.vector_neuron import VectorNeuron
from pointcanon.errors import InputError
from pointcanon.layers import vector_neurons as vn
from pointcanon.neighbors import knn


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Vectors ``(..., 3, C)`` turned."""
    return turn @ x


def softened(x: Tensor) -> Tensor:
    """Lengths as the layers take them."""
    return (x.square().sum(dim=-2) + vn.NORM_SOFTENING).sqrt()


TURN = rotations.random_rotations(
    1, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)[0]
MASK = torch.tensor([[True] * 5 + [False] * 2, [True, False] * 3 + [True]])

LAYERS = {
    "linear": lambda: vn.Linear(4, 6),
    "leaky": lambda: vn.LeakyReLU(4),
    "leaky, shared": lambda: vn.LeakyReLU(4, shared_direction=True),
    "norm": lambda: vn.BatchNorm(4),
    "linear leaky": lambda: vn.LinearLeakyReLU(4, 6),
    "linear leaky, shared": lambda: vn.LinearLeakyReLU(4, 6, norm=False, shared_direction=True),
    "max": lambda: vn.MaxPool(4),
    "mean": vn.MeanPool,
    "edges": lambda: Edges(vn.EdgeConv(4, 5)),
    "edges, cross, max": lambda: Edges(vn.EdgeConv(4, 5, cross=True, pool="max")),
}


class Edges(nn.Module):
    """An edge convolution over fixed neighbours, so that it takes features alone."""

    def __init__(self, layer: vn.EdgeConv) -> None:
        super().__init__()
        self.layer = layer
        self.index = torch.randint(7, (2, 7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.index)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_commute_with_rotations(name, training):
    layer = LAYERS[name]().double().train(training)
    x = features(2, 7, 3, 4)
    torch.testing.assert_close(layer(turned(x, TURN)), turned(layer(x), TURN))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_finite_at_vanishing_vectors(name):
    layer = LAYERS[name]().double()
    x = torch.zeros(2, 7, 3, 4, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_leaky_relu_keeps_half_the_space_and_shortens_the_other():
    layer = vn.LeakyReLU(1, negative_slope=0.25).double()
    nn.init.ones_(layer.direction.weight)  # d = q: always kept
    q = features(9, 3, 1)
    assert torch.equal(layer(q), q)
    nn.init.constant_(layer.direction.weight, -2.0)  # d = -2 q: all of it lies along -d
    length = 4 * q.square().sum(dim=1, keepdim=True)
    kept = 1 - 0.75 * length / (length + vn.NORM_SOFTENING)
    torch.testing.assert_close(layer(q), kept * q)


def test_fused_layer_equals_its_parts():
    fused = vn.LinearLeakyReLU(4, 6).double()
    x = features(2, 7, 3, 4)
    q, d = (x @ part.mT for part in fused.linear.weight.split(6))
    length = softened(q)
    spread = (length.var((0, 1), correction=0) + 1e-5).sqrt()
    q = q * ((length - length.mean((0, 1))) / spread / length)[..., None, :]
    dot = (q * d).sum(dim=-2, keepdim=True)
    length = d.square().sum(dim=-2, keepdim=True) + vn.NORM_SOFTENING
    torch.testing.assert_close(fused(x), q - 0.8 * dot.clamp_max(0) / length * d, rtol=0, atol=1e-9)


def test_batch_norm_normalises_lengths_over_real_vectors():
    layer = vn.BatchNorm(4).double()
    x = 3 * features(2, 7, 3, 4)
    padded = torch.where(MASK[..., None, None], x, torch.full_like(x, 1e3))
    real = layer(padded, MASK)[MASK]
    alone = vn.BatchNorm(4).double()(x[MASK])
    torch.testing.assert_close(real, alone)
    signed = (real * x[MASK]).sum(dim=-2) / x[MASK].square().sum(dim=-2) * softened(x[MASK])
    torch.testing.assert_close(signed.mean(dim=0), torch.zeros(4).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        signed.std(dim=0, correction=0), torch.ones(4).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        real / real.norm(dim=1, keepdim=True) * signed.sign()[:, None],
        x[MASK] / x[MASK].norm(dim=1, keepdim=True),
    )
    assert int(layer.lengths.num_batches_tracked) == 1
    before = layer.lengths.running_mean.clone()
    layer.eval()(x)
    assert torch.equal(before, layer.lengths.running_mean)


@pytest.mark.parametrize("make", [vn.MeanPool, lambda: vn.MaxPool(4)])
def test_pools_ignore_padding_and_order(make):
    pool = make().double()
    x = features(2, 7, 3, 4)
    padded = torch.where(MASK[..., None, None], x, torch.full_like(x, 1e3))
    pooled = pool(padded, MASK)
    for b in range(2):
        alone = x[b, MASK[b]]
        torch.testing.assert_close(pooled[b], pool(alone))
        torch.testing.assert_close(pooled[b], pool(alone.flip(0)))


def test_max_pool_takes_the_vector_farthest_along_the_direction():
    pool = vn.MaxPool(4).double()
    x = features(2, 7, 3, 4)
    direction = x @ pool.direction.weight.detach().mT
    pooled = pool(x)
    for b, c in itertools.product(range(2), range(4)):
        best = max(range(7), key=lambda n: float(x[b, n, :, c] @ direction[b, n, :, c]))
        assert torch.equal(pooled[b, :, c], x[b, best, :, c])


def test_dropout_takes_whole_vectors():
    layer = vn.Dropout(0.4)
    x = torch.ones(50, 40, 3, 5)
    dropped = layer(x)
    assert torch.equal(dropped.amax(dim=-2), dropped.amin(dim=-2))
    kept = dropped[..., 0, :] > 0
    assert torch.allclose(dropped[..., 0, :][kept], torch.tensor(1 / 0.6))
    assert abs(float(kept.float().mean()) - 0.6) < 0.02
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize("channels", [1, 8])
def test_invariant_head_is_invariant_and_complete(channels):
    head = vn.InvariantHead(channels).double().eval()
    x = features(2, 7, 3, channels)
    out = head(x)
    assert out.shape == (2, 7, 3 * channels)
    torch.testing.assert_close(head(turned(x, TURN)), out)
    assert float((head(features(2, 7, 3, channels)) - out).detach().abs().max()) > 1e-3


def naive_edge_conv(layer: vn.EdgeConv, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The formula, one edge feature after the other."""
    near = torch.stack([cloud[i] for cloud, i in zip(x, index, strict=True)])
    own = x[:, :, None].expand_as(near)
    parts = [near - own, own]
    if layer.weight.shape[1] == 3 * layer.in_channels:
        parts.append(torch.linalg.cross(near, own, dim=-2))
    both = torch.cat(parts, dim=-1) @ layer.weight.mT
    q, d = both[..., : layer.out_channels], both[..., layer.out_channels :]
    dot = (q * d).sum(dim=-2, keepdim=True)
    length = d.square().sum(dim=-2, keepdim=True) + vn.NORM_SOFTENING
    q = q - (1 - layer.negative_slope) * dot.clamp_max(0) / length * d
    if layer.farthest is None:
        return (q * weights[..., None, None]).sum(dim=2) / weights.sum(dim=2)[..., None, None]
    extent = (q * (q @ layer.farthest.mT)).sum(dim=-2, keepdim=True)
    extent = torch.where(weights[..., None, None] > 0, extent, -torch.inf)
    return q.gather(2, extent.argmax(dim=2, keepdim=True).expand(-1, -1, 1, 3, -1))[:, :, 0]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("shared", [False, True])
def test_edge_conv_without_edges_equals_edge_conv(cross, pool, shared, monkeypatch):
    layer = vn.EdgeConv(2, 5, cross=cross, pool=pool, shared_direction=shared).double()
    x = features(3, 11, 3, 2).requires_grad_()
    index = torch.randint(11, (3, 11, 4))
    weights = torch.rand(3, 11, 4, dtype=torch.float64)
    weights[..., 2] = 0
    expected = naive_edge_conv(layer, x, index, weights)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad(
        (expected * probe).sum(), [x, *layer.parameters()], allow_unused=True
    )
    found = layer(x, index, weights)
    torch.testing.assert_close(found, expected)
    got = torch.autograd.grad((found * probe).sum(), [x, *layer.parameters()], allow_unused=True)
    for ours, theirs in zip(got, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for block in (1, 1_000, 3_000, 1 << 24):
            monkeypatch.setattr(vn, "_CPU_BLOCK", block)
            torch.testing.assert_close(layer(x, index, weights), expected)
    ones = torch.ones_like(weights)
    torch.testing.assert_close(layer(x, index), naive_edge_conv(layer, x, index, ones))


def test_edge_conv_keeps_no_edges_for_the_gradient():
    """What autograd saves grows with the points, not with the edges."""
    layer = vn.EdgeConv(1, 16)
    x, k = torch.randn(4, 64, 3, 1), 16
    index = knn(x[..., 0], k)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        layer(x, index)
    assert max(saved, default=0) <= 4 * 64 * 3 * 32


def test_edge_conv_names_what_does_not_fit():
    layer, x = vn.EdgeConv(2, 3), torch.zeros(1, 4, 3, 2)
    index = torch.zeros(1, 4, 2, dtype=torch.int64)
    with pytest.raises(InputError, match="features have shape"):
        layer(x[..., :1], index)
    with pytest.raises(InputError, match="neighbors has shape"):
        layer(x, index[:, :3])
    with pytest.raises(InputError, match="weights has shape"):
        layer(x, index, torch.ones(1, 4, 3))
    with pytest.raises(InputError, match="unknown pool 'sum'"):
        vn.EdgeConv(2, 3, pool="sum")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="p is 1"):
        vn.Dropout(1)


# the canonicalizer --------------------------------------------------------------------------------

SHAPES = (testing.generic_clouds, testing.surface_clouds)


def settled(*args, dtype: torch.dtype = torch.float64, **options) -> VectorNeuron:
    """A canonicalizer whose running statistics have seen data."""
    canonicalizer = VectorNeuron(*args, **options)
    with torch.no_grad():
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            cloud = testing.surface_clouds(4, 48, generator)
            canonicalizer(cloud, normals=cloud if canonicalizer.normals else None)
    return canonicalizer.to(dtype).eval()


@pytest.mark.parametrize(
    ("size", "orthonormalise"),
    [("small", "gram-schmidt"), ("small", "svd"), ("large", "gram-schmidt")],
)
def test_contract_in_float64(size, orthonormalise):
    canonicalizer = settled(size, k=8, orthonormalise=orthonormalise)
    for clouds in SHAPES:
        points = clouds(3, 40, dtype=torch.float64)
        testing.assert_equivariant(canonicalizer, points)
        frames = canonicalizer(points)
        testing.assert_proper(frames)
        assert not frames.degenerate.any()
    testing.assert_permutation_invariant(canonicalizer, points)
    testing.assert_translation_invariant(canonicalizer, points)
    testing.assert_scale_invariant(canonicalizer, points)
    testing.assert_batch_independent(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points)
    testing.assert_degenerate_safe(canonicalizer, dtype=torch.float64)


@pytest.mark.parametrize(("size", "clouds"), [("small", 32), ("large", 8)])
def test_contract_in_float32(size, clouds):
    canonicalizer = settled(size, k=12, dtype=torch.float32)
    for make in SHAPES:
        points = make(clouds, 96)
        testing.assert_equivariant(canonicalizer, points)
        testing.assert_proper(canonicalizer(points))
    testing.assert_degenerate_safe(canonicalizer)


@pytest.mark.parametrize("count", [3, 4, 5, 19, 20, 21])
def test_fewer_points_than_neighbours(count):
    canonicalizer = settled(k=20)
    points = testing.generic_clouds(4, count, dtype=torch.float64)
    testing.assert_equivariant(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points)


def test_neighbours_on_a_lattice_do_not_hang_on_rounding():
    """Nearly every k-th distance is shared here; a plain k-NN mean would depend on the pose."""
    generator = torch.Generator().manual_seed(1)
    axis = torch.arange(6, dtype=torch.float64)
    lattice = torch.cartesian_prod(axis, axis, axis)
    clouds = [lattice[torch.randperm(216, generator=generator)[:100]] for _ in range(4)]
    testing.assert_equivariant(settled(k=9), torch.stack(clouds), tolerance=1e-9)


def test_frame_is_continuous_where_the_nearest_points_change():
    """A point moves away past another: the k nearest change, the frame hardly."""
    canonicalizer = settled(k=6)
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


def test_farthest_points_of_larger_clouds():
    canonicalizer = settled(k=8, num_points=32)
    points = testing.surface_clouds(3, 100, dtype=torch.float64)
    testing.assert_equivariant(canonicalizer, points)
    testing.assert_permutation_invariant(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points)
    testing.assert_padding_independent(canonicalizer, points[:, :20])


def test_normals_turn_along():
    canonicalizer = settled(k=8, normals=True)
    points = testing.generic_clouds(3, 40, dtype=torch.float64)
    normals = torch.nn.functional.normalize(features(3, 40, 3), dim=-1)
    testing.assert_equivariant(canonicalizer, points, normals=normals)
    before = canonicalizer(points, normals=normals).rotations
    assert (canonicalizer(points, normals=-normals).rotations - before).abs().max() > 1e-3
    with pytest.raises(InputError, match="pass normals too"):
        canonicalizer(points)


def test_raw_vectors_and_gradients_are_returned():
    canonicalizer = VectorNeuron(k=8, dropout=0.5)
    points = testing.generic_clouds(3, 40).requires_grad_()
    frames = canonicalizer(points)
    assert frames.raw is not None
    assert frames.raw.shape == (3, 1, 3, 2)
    assert torch.equal(rotations.gram_schmidt(frames.raw), frames.rotations)
    canonicalizer(points).rotations[:, :, 0].sum().backward()
    gradients = [points.grad, *(p.grad for p in canonicalizer.parameters())]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)
    assert any(bool(g.abs().max() > 0) for g in gradients if g is not None)


def test_training_mode_is_equivariant_too():
    """Batch statistics are of lengths; only dropout is random, and on whole vectors."""
    canonicalizer = VectorNeuron(k=8, dropout=0.3).double()
    points = testing.generic_clouds(4, 40, dtype=torch.float64)

    def frames(cloud: Tensor) -> Tensor:
        torch.manual_seed(3)
        return canonicalizer(cloud).rotations

    torch.testing.assert_close(frames(points @ TURN.mT), TURN @ frames(points))


def test_mirror_images_are_told_apart():
    canonicalizer = settled(k=8)
    points = testing.generic_clouds(3, 40, dtype=torch.float64)
    mirrored = points * torch.tensor([-1.0, 1, 1], dtype=torch.float64)
    posed = canonicalizer(points).apply(points)
    other = canonicalizer(mirrored).apply(mirrored)
    flipped = other * torch.tensor([1.0, 1, -1], dtype=torch.float64)
    assert (posed - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (posed - flipped).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_compiles_without_graph_breaks():
    canonicalizer = settled(k=6, dtype=torch.float32)
    points = testing.generic_clouds(2, 30)
    compiled = torch.compile(canonicalizer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(points).rotations, canonicalizer(points).rotations, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "unknown size 'huge'; choose one of: small, large"),
        ({"orthonormalise": "qr"}, "unknown orthonormalisation 'qr'"),
        ({"k": 1}, "k is 1"),
        ({"num_points": 2}, "num_points is 2"),
        ({"dropout": 1.0}, "p is 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        VectorNeuron(**options)


def test_sizes_and_hyperparameters():
    small, large = VectorNeuron("small"), VectorNeuron("large", k=7, orthonormalise="svd")
    count = {m: sum(p.numel() for p in m.parameters()) for m in (small, large)}
    assert count[small] == 1176
    assert 70_000 < count[large] < 300_000
    again = VectorNeuron(**large.hyperparameters)  # type: ignore[arg-type]
    again.load_state_dict(large.state_dict())
    assert again.hyperparameters == large.hyperparameters
