"""Neighbours and farthest points against naive twins, on every backend that can run here."""

from __future__ import annotations

import types

import pytest
import torch
from torch import Tensor

from pointcanon import neighbors
from pointcanon.errors import InputError
from pointcanon.neighbors import backend, ball_query, farthest_point_sample, knn


def naive_knn(points: Tensor, k: int, mask: Tensor | None = None, queries: Tensor | None = None):
    queries = points if queries is None else queries
    squared = (queries[:, :, None].double() - points[:, None].double()).square().sum(dim=-1)
    result = torch.empty(*queries.shape[:2], k, dtype=torch.int64)
    for b in range(len(points)):
        real = torch.arange(points.shape[1]) if mask is None else mask[b].nonzero()[:, 0]
        for i in range(queries.shape[1]):
            ranked = sorted((float(squared[b, i, j]), int(j)) for j in real)
            result[b, i] = torch.tensor([ranked[s % len(ranked)][1] for s in range(k)])
    return result


def naive_farthest(points: Tensor, m: int, mask: Tensor | None = None, start=None) -> Tensor:
    result = torch.empty(len(points), m, dtype=torch.int64)
    for b in range(len(points)):
        real = list(range(points.shape[1])) if mask is None else mask[b].nonzero()[:, 0].tolist()
        cloud = points[b].double()
        if start is None:
            centre = cloud[real].mean(dim=0)
            first = max(real, key=lambda j: (float((cloud[j] - centre).square().sum()), -j))
        else:
            first = int(start[b])
        chosen = [first]
        while len(chosen) < min(m, len(real)):
            left = [j for j in real if j not in chosen]
            gap = {
                j: min(float((cloud[j] - cloud[c]).square().sum()) for c in chosen) for j in left
            }
            chosen.append(max(left, key=lambda j: (gap[j], -j)))
        result[b] = torch.tensor([chosen[s % len(chosen)] for s in range(m)])
    return result


@pytest.fixture(params=["pykdtree", "scipy", "dense"])
def knn_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes :func:`knn` use the backend for 3-d points on a CPU."""
    if request.param == "pykdtree":
        pytest.importorskip("pykdtree")
    elif request.param == "scipy":
        monkeypatch.setattr(neighbors, "_optional", lambda name: None)
    else:
        monkeypatch.setattr(neighbors, "_knn_backend", lambda *_: "two-stage top-k")
    return request.param


def random_mask(batch: int, count: int, generator: torch.Generator) -> Tensor:
    mask = torch.rand(batch, count, generator=generator) < 0.5
    mask[:, 3] = True
    return mask


@pytest.mark.parametrize("k", [1, 2, 7, 30, 31])
@pytest.mark.parametrize("masked", [False, True])
def test_knn_equals_sorting_all_distances(knn_backend, k, masked, generator):
    points = torch.randn(3, 30, 3, generator=generator, dtype=torch.float64)
    mask = random_mask(3, 30, generator) if masked else None
    queries = torch.randn(3, 5, 3, generator=generator, dtype=torch.float64)
    real = mask if masked else torch.ones(3, 30, dtype=torch.bool)
    assert torch.equal(knn(points, k, mask)[real], naive_knn(points, k, mask)[real])
    assert torch.equal(knn(points, k, mask, queries), naive_knn(points, k, mask, queries))


@pytest.mark.parametrize("masked", [False, True])
def test_ties_are_broken_by_index(knn_backend, masked, generator):
    """A lattice with doubled points: nearly every k-th place is shared."""
    axis = torch.arange(4.0)
    lattice = torch.cartesian_prod(axis, axis, axis)
    points = torch.cat((lattice, lattice[::3]))[torch.randperm(86, generator=generator)][None]
    mask = random_mask(1, 86, generator) if masked else None
    rows = mask if masked else torch.ones(1, 86, dtype=torch.bool)
    for k in (1, 4, 10, 27):
        assert torch.equal(knn(points, k, mask)[rows], naive_knn(points, k, mask)[rows])


@pytest.mark.parametrize("dimensions", [1, 2, 5, 16])
def test_other_dimensions(dimensions, generator):
    points = torch.randn(2, 60, dimensions, generator=generator, dtype=torch.float64)
    mask = random_mask(2, 60, generator)
    assert torch.equal(knn(points, 6, mask)[mask], naive_knn(points, 6, mask)[mask])


def test_two_stages_and_chunks_change_nothing(monkeypatch, generator):
    points = torch.randn(3, 700, 6, generator=generator, dtype=torch.float64)
    whole = torch.cdist(points, points).topk(9, largest=False).indices
    for chunk in (1, 5_000, 1 << 24):
        monkeypatch.setattr(neighbors, "_CPU_CHUNK", chunk)
        assert torch.equal(knn(points, 9), whole)


def test_coincident_and_extreme_clouds(knn_backend):
    same = torch.full((1, 50, 3), 0.3)
    assert torch.equal(knn(same, 4), torch.arange(4).expand(1, 50, 4))
    line = torch.arange(12.0)[None, :, None] * torch.tensor([1.0, 0.5, 0.25])
    for size in (1e-30, 1.0, 1e30):
        assert torch.equal(knn(line * size, 3), naive_knn(line.double() * size, 3))
    assert torch.equal(knn(torch.zeros(1, 1, 3), 5), torch.zeros(1, 1, 5, dtype=torch.int64))


def test_fewer_real_points_than_k_repeat_cyclically(knn_backend):
    points = torch.tensor([[[0.0, 0, 0], [9, 9, 9], [1, 0, 0], [3, 0, 0]]])
    mask = torch.tensor([[True, False, True, True]])
    assert knn(points, 7, mask)[0, 0].tolist() == [0, 2, 3, 0, 2, 3, 0]


def test_padding_is_ignored_whatever_it_holds(knn_backend, generator):
    points = torch.randn(2, 40, 3, generator=generator)
    padded = torch.cat((points, torch.full((2, 9, 3), float("nan"))), dim=1)
    mask = torch.arange(49).expand(2, -1) < 40
    assert torch.equal(knn(padded, 5, mask)[:, :40], knn(points, 5))
    assert torch.equal(farthest_point_sample(padded, 8, mask), farthest_point_sample(points, 8))


def test_a_cloud_alone_and_in_a_batch(knn_backend, generator):
    points = torch.randn(4, 64, 3, generator=generator)
    batched = knn(points, 8)
    for b in range(4):
        assert torch.equal(knn(points[b : b + 1], 8)[0], batched[b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype, generator):
    points = torch.randn(2, 50, 3, generator=generator).to(dtype)
    assert torch.equal(knn(points, 5), naive_knn(points, 5))
    assert torch.equal(farthest_point_sample(points, 9), naive_farthest(points, 9))


def test_autocast_changes_nothing(generator):
    points = torch.randn(2, 200, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        inside = knn(points, 6)
    assert torch.equal(inside, knn(points, 6))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("m", [1, 10, 40, 50])
def test_farthest_points_equal_the_naive_loop(dimensions, masked, m, generator):
    points = torch.randn(3, 40, dimensions, generator=generator, dtype=torch.float64)
    mask = random_mask(3, 40, generator) if masked else None
    assert torch.equal(farthest_point_sample(points, m, mask), naive_farthest(points, m, mask))
    start = torch.tensor([3, 3, 3])
    assert torch.equal(
        farthest_point_sample(points, m, mask, start), naive_farthest(points, m, mask, start)
    )


def test_farthest_points_take_every_double_before_repeating():
    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]])
    assert sorted(farthest_point_sample(points, 4)[0].tolist()) == [0, 1, 2, 3]


def test_farthest_points_do_not_depend_on_order_or_pose(generator):
    points = torch.randn(2, 300, 3, generator=generator, dtype=torch.float64)
    chosen = points.gather(1, farthest_point_sample(points, 32)[..., None].expand(-1, -1, 3))
    order = torch.randperm(300, generator=generator)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    moved = points[:, order] @ turn.mT + 5.0
    index = farthest_point_sample(moved, 32)
    again = (moved.gather(1, index[..., None].expand(-1, -1, 3)) - 5.0) @ turn
    torch.testing.assert_close(again, chosen)


def test_memory_stays_bounded(generator):
    """16,384 points of 8 dimensions: all distances at once would be a gigabyte."""
    import resource

    points = torch.randn(1, 16_384, 8, generator=generator)
    knn(points[:, :64], 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = knn(points, 4, queries=points[:, :4096])
    assert torch.equal(index[0, :, 0], torch.arange(4096))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200


def test_no_gradient_is_recorded(generator):
    points = torch.randn(1, 20, 3, generator=generator, requires_grad=True)
    assert not knn(points, 3).requires_grad
    assert not farthest_point_sample(points, 3).requires_grad


def test_one_operator_under_compile_and_plain_torch_in_an_export(generator):
    class Both(torch.nn.Module):
        def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
            return knn(points, 5), farthest_point_sample(points, 4)

    points = torch.randn(2, 30, 3, generator=generator)
    expected = Both()(points)
    compiled = torch.compile(Both(), fullgraph=True, backend="aot_eager")(points)
    program = torch.export.export(Both(), (points,))
    exported = program.module()(points)
    for ours, again, out in zip(expected, compiled, exported, strict=True):
        assert torch.equal(ours, again)
        assert torch.equal(ours, out)
    if hasattr(torch.compiler, "is_exporting"):
        assert "pointcanon" not in str(program.graph)


def test_operator_registration(generator):
    points = torch.randn(2, 12, 3, generator=generator)
    mask = random_mask(2, 12, generator)
    torch.library.opcheck(torch.ops.pointcanon.knn, (points, points, 4, mask))
    start = torch.tensor([3, 3])
    torch.library.opcheck(torch.ops.pointcanon.farthest_point_sample, (points, 4, mask, start))


def test_backend_names_what_is_used(monkeypatch):
    assert backend("cpu") == backend(torch.device("cpu"))
    assert "farthest points: torch" in backend()
    monkeypatch.setattr(neighbors, "_optional", lambda name: None)
    assert backend().startswith("knn in 3-d: scipy; knn otherwise: two-stage top-k")
    assert backend("cuda").startswith("knn in 3-d: two-stage top-k")
    monkeypatch.setattr(neighbors, "_optional", lambda name: name == "torch_cluster")
    assert "torch-cluster" in backend("cuda")
    monkeypatch.setattr(neighbors, "_optional", lambda name: True)
    assert "pytorch3d" in backend("cuda")


def fake_pytorch3d() -> types.ModuleType:
    """The documented behaviour of the two PyTorch3D functions we call."""
    ops = types.ModuleType("pytorch3d.ops")

    def knn_points(p1, p2, lengths1=None, lengths2=None, norm=2, K=1):
        index = torch.zeros(*p1.shape[:2], K, dtype=torch.int64)
        for b, count in enumerate(lengths2.tolist()):
            width = min(K, count)
            found = torch.cdist(p1[b], p2[b, :count]).topk(width, largest=False).indices
            index[b, :, :width] = found
        return types.SimpleNamespace(idx=index)

    def sample_farthest_points(points, lengths=None, K=50):
        index = torch.full((len(points), K), -1)
        for b, count in enumerate(lengths.tolist()):
            width = min(K, count)
            first = torch.zeros(1, dtype=torch.int64)
            index[b, :width] = naive_farthest(points[b : b + 1, :count], width, start=first)[0]
        return None, index

    ops.knn_points = knn_points
    ops.sample_farthest_points = sample_farthest_points
    return ops


def fake_torch_cluster() -> types.ModuleType:
    """The documented behaviour of the two torch-cluster functions we call."""
    library = types.ModuleType("torch_cluster")

    def knn(x, y, k, batch_x, batch_y):
        pairs = []
        for i in range(len(y)):
            own = (batch_x == batch_y[i]).nonzero()[:, 0]
            near = torch.cdist(y[i : i + 1], x[own])[0].topk(min(k, len(own)), largest=False)
            pairs.append(torch.stack((torch.full_like(near.indices, i), own[near.indices])))
        return torch.cat(pairs, dim=1)

    def fps(src, batch, ratio, random_start=True):
        assert not random_start
        flat = []
        for b in range(int(batch.max()) + 1):
            own = (batch == b).nonzero()[:, 0]
            m = int(torch.ceil(ratio[b] * len(own)))
            first = torch.zeros(1, dtype=torch.int64)
            flat.append(own[naive_farthest(src[own][None], m, start=first)[0]])
        return torch.cat(flat)

    library.knn = knn
    library.fps = fps
    return library


@pytest.mark.parametrize("name", ["pytorch3d", "torch-cluster", "installed torch-cluster"])
def test_foreign_kernels_give_the_same_answers(name, monkeypatch, generator):
    if name == "installed torch-cluster":
        library = pytest.importorskip("torch_cluster", exc_type=ImportError)
        name = "torch-cluster"
    else:
        library = fake_pytorch3d() if name == "pytorch3d" else fake_torch_cluster()
    points = torch.randn(3, 30, 3, generator=generator)
    mask = random_mask(3, 30, generator)
    mask[0, :] = torch.arange(30) == 3
    cases = [(k, m) for k in (1, 5, 16, 30, 33) for m in (None, mask)]
    expected = [knn(points, k, m) for k, m in cases]
    sampled = [farthest_point_sample(points, k, m) for k, m in cases]
    monkeypatch.setattr(neighbors, "_optional", lambda _: library)
    monkeypatch.setattr(neighbors, "_knn_backend", lambda *_: name)
    monkeypatch.setattr(neighbors, "_farthest_backend", lambda *_: name)
    for (k, m), index, sample in zip(cases, expected, sampled, strict=True):
        assert torch.equal(knn(points, k, m), index)
        assert torch.equal(farthest_point_sample(points, k, m), sample)


@pytest.mark.gpu
def test_cuda_gives_the_answers_of_the_cpu(generator):
    points = torch.randn(4, 500, 3, generator=generator)
    mask = random_mask(4, 500, generator)
    cuda = points.cuda(), 8, mask.cuda()
    assert torch.equal(knn(*cuda).cpu()[mask], knn(points, 8, mask)[mask])
    wide = torch.randn(2, 300, 32, generator=generator, dtype=torch.float64)
    assert torch.equal(knn(wide.cuda(), 8).cpu(), knn(wide, 8))
    assert torch.equal(
        farthest_point_sample(points.cuda(), 50, mask.cuda()).cpu(),
        farthest_point_sample(points, 50, mask),
    )


POINTS = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn(POINTS, 0), "k is 0"),
        (lambda: knn(POINTS, 2.5), "k is 2.5"),
        (lambda: knn(POINTS[0], 2), r"shape \(4, 3\)"),
        (lambda: knn(POINTS[:, :0], 2), "empty clouds"),
        (lambda: knn(POINTS.long(), 2), "dtype torch.int64"),
        (lambda: knn([1.0], 2), "is a list"),
        (lambda: knn(POINTS, 2, mask=torch.ones(2, 5, dtype=torch.bool)), r"mask has shape"),
        (lambda: knn(POINTS, 2, mask=torch.ones(2, 4)), "mask has dtype"),
        (lambda: knn(POINTS, 2, mask=torch.zeros(2, 4, dtype=torch.bool)), "cloud 0 .* is empty"),
        (lambda: knn(POINTS, 2, queries=torch.zeros(1, 4, 3)), "queries has shape"),
        (lambda: knn(POINTS / 0, 2), r"points\[0, 0\] is not finite"),
        (lambda: farthest_point_sample(POINTS, 0), "m is 0"),
        (lambda: farthest_point_sample(POINTS, 2, start=torch.tensor([0, 9])), r"start\[1\] is 9"),
        (lambda: farthest_point_sample(POINTS, 2, start=torch.tensor([0])), "start has shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


# balls --------------------------------------------------------------------------------------------


def naive_ball(points: Tensor, radius: float, k: int, mask: Tensor | None, queries: Tensor):
    result = torch.empty(*queries.shape[:2], k, dtype=torch.int64)
    for b in range(len(points)):
        real = range(points.shape[1]) if mask is None else mask[b].nonzero()[:, 0].tolist()
        for i, query in enumerate(queries[b]):
            gap = {j: float((points[b, j] - query).norm()) for j in real}
            inside = [j for j in real if gap[j] <= radius] or [min(real, key=gap.__getitem__)]
            result[b, i] = torch.tensor((inside + [inside[0]] * k)[:k])
    return result


@pytest.mark.parametrize("k", [1, 4, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_a_ball_holds_its_first_points(k, masked, generator, monkeypatch):
    points = torch.randn(3, 30, 3, generator=generator, dtype=torch.float64)
    queries = torch.randn(3, 7, 3, generator=generator, dtype=torch.float64)
    queries[0, 0] = 50.0  # far from all points
    mask = random_mask(3, 30, generator) if masked else None
    expected = naive_ball(points, 0.9, k, mask, queries)
    given = points if mask is None else points.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(ball_query(given, 0.9, k, mask, queries), expected)
    monkeypatch.setattr(neighbors, "_CPU_CHUNK", 70)
    assert torch.equal(ball_query(given, 0.9, k, mask, queries), expected)


def test_a_ball_is_closed_and_of_any_size():
    line = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, 0.0, 0.0])
    for size in (2.0**-100, 1.0, 2.0**100):
        found = ball_query(line * size, 2 * size, 6)[0]
        assert found[0].tolist() == [0, 1, 2, 0, 0, 0]
        assert found[3].tolist() == [1, 2, 3, 4, 5, 1]


def test_balls_are_one_operator_and_trace_for_export(generator):
    points, queries = torch.randn(2, 30, 3, generator=generator), torch.randn(2, 5, 3)

    class Module(torch.nn.Module):
        def forward(self, points: Tensor, queries: Tensor) -> Tensor:
            return ball_query(points, 0.9, 40, queries=queries)

    expected = Module()(points, queries)
    compiled = torch.compile(Module(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(points, queries), expected)
    program = torch.export.export(Module(), (points, queries))
    assert torch.equal(program.module()(points, queries), expected)


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf")])
def test_a_radius_is_positive(radius):
    with pytest.raises(InputError, match=r"radius is .*; choose a positive number"):
        ball_query(torch.zeros(1, 3, 3), radius, 2)
