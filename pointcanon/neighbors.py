"""Exact nearest neighbours, balls and farthest-point sampling, in bounded memory.

All answer with indices, so none carries a gradient. All are deterministic, take masks, never
return a padded point, and compute in at least float32 (also under autocast). For clouds of 3-d
points on a CPU a k-d tree finds the neighbours; elsewhere distances are formed a chunk at a time
and the nearest are picked in two exact stages. Kernels of PyTorch3D or torch-cluster serve CUDA
where they are installed; :func:`backend` says what is used. Under ``torch.compile`` each function
is one operator of the graph; an export instead traces plain torch operations on all distances at
once, for numbers of clouds and points that stay open.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from pointcanon.clouds import centroid, check_mask
from pointcanon.errors import InputError
from pointcanon.portable import exporting, full_precision, repeat

__all__ = ["backend", "ball_query", "farthest_point_sample", "knn"]

_CPU_CHUNK = 1 << 18
"""Distances held at once on a CPU: 1 MiB of float32, so that a chunk stays in cache."""

_DEVICE_CHUNK = 1 << 25

_DIRECT_DIMENSIONS = 4
"""Up to here distances are sums of squared differences, which lose nothing to cancellation;
above, the matrix product ``|y|^2 - 2 x.y`` is several times faster."""

_TORCH_CLUSTER_MOST = 100
"""The largest k of torch-cluster's CUDA kernel."""


def knn(
    points: Tensor, k: int, mask: Tensor | None = None, queries: Tensor | None = None
) -> Tensor:
    """Indices of the k nearest real points of each query, nearest first.

    Exact; equal distances are ordered by index (the PyTorch3D and torch-cluster kernels order
    them their own way). A point that is its own query finds itself, first unless it has a double.
    Where a cloud has n < k real points the n neighbours repeat cyclically from the nearest, so
    that a maximum over neighbours stays exact and a mean stays finite.

    Args:
        points: ``(B, N, D)`` floating point, N >= 1.
        k: Neighbours of each query, at least 1.
        mask: ``(B, N)`` bool, True = a real point; what padded points hold is ignored.
        queries: ``(B, M, D)``; the default is ``points`` (rows of padded points are then
            arbitrary, but valid, indices).

    Returns:
        ``(B, M, k)`` int64 indices into N.

    Raises:
        InputError: On a wrong shape, dtype, device or k, an empty cloud, NaN or inf.
    """
    points, queries = _prepared(points, k, mask, queries)
    if exporting():
        return _knn_traced(points, queries, k, mask)
    return torch.ops.pointcanon.knn(points, queries, k, mask)


def ball_query(
    points: Tensor,
    radius: float,
    k: int,
    mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Indices of the first k real points within a radius of each query, in index order.

    The grouping of PointNet++ (Qi et al. 2017, arXiv 1706.02413) as its public code has it: of a
    ball with more than k points those of lowest index are kept, so the answer depends on the order
    of such a cloud; a ball with fewer is filled up with its first, so that a maximum over it stays
    exact. A ball with none is filled with the nearest point.

    Args:
        points: ``(B, N, D)`` floating point, N >= 1.
        radius: Positive; a point at this distance is inside.
        k: Most points of each ball, at least 1.
        mask: ``(B, N)`` bool, True = a real point; what padded points hold is ignored.
        queries: ``(B, M, D)`` centres of the balls; the default is ``points``.

    Returns:
        ``(B, M, k)`` int64 indices into N.

    Raises:
        InputError: On a wrong shape, dtype, device, radius or k, an empty cloud, NaN or inf.
    """
    points, queries = _prepared(points, k, mask, queries)
    if not 0 < radius < math.inf:
        raise InputError(f"radius is {radius!r}; choose a positive number")
    if exporting():
        return _ball_traced(points, queries, float(radius), k, mask)
    return torch.ops.pointcanon.ball_query(points, queries, float(radius), k, mask)


def farthest_point_sample(
    points: Tensor, m: int, mask: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """Indices of m points, each the farthest from those chosen before it (Gonzalez 1985).

    Deterministic: equal distances are resolved by the lowest index. With the default start the
    chosen *points* do not depend on the order of the cloud, nor on its pose, but for such ties.
    No point is chosen twice unless a cloud has n < m real points: then the n repeat cyclically.

    Args:
        points: ``(B, N, D)`` floating point, N >= 1.
        m: Points to choose, at least 1.
        mask: ``(B, N)`` bool, True = a real point; padded points are never chosen.
        start: ``(B,)`` int64, the first point of each cloud; the default is the one farthest
            from the centroid.

    Returns:
        ``(B, m)`` int64 indices into N, in the order they were chosen.

    Raises:
        InputError: On a wrong shape, dtype, device, m or start, an empty cloud, NaN or inf.
    """
    _check_points("points", points, mask)
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise InputError(f"m is {m!r}; ask for at least 1 point")
    points = _at_least_float32(points, mask)
    if start is None:
        start = _farthest_from_centroid(points, mask)
    else:
        _check_start(start, points, mask)
    if exporting():
        return _farthest_traced(points, m, mask, start)
    return torch.ops.pointcanon.farthest_point_sample(points, m, mask, start)


def backend(device: torch.device | str = "cpu") -> str:
    """What finds neighbours and samples points on ``device``, in one readable line.

    For example ``"knn in 3-d: pykdtree; knn otherwise: two-stage top-k; farthest points: torch"``.
    """
    device = torch.device(device)
    return (
        f"knn in 3-d: {_knn_backend(device, 3)}; knn otherwise: {_knn_backend(device, 64)}; "
        f"farthest points: {_farthest_backend(device)}"
    )


# which backend ------------------------------------------------------------------------------------


@cache
def _optional(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or does not load beside this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def _knn_backend(device: torch.device, dimensions: int, k: int = 1) -> str:
    if device.type == "cpu" and dimensions == 3:
        return "pykdtree" if _optional("pykdtree.kdtree") else "scipy"
    if device.type == "cuda":
        if _optional("pytorch3d.ops"):
            return "pytorch3d"
        if _optional("torch_cluster") and k <= _TORCH_CLUSTER_MOST:
            return "torch-cluster"
    return "two-stage top-k"


def _farthest_backend(device: torch.device) -> str:
    if device.type == "cuda":
        if _optional("pytorch3d.ops"):
            return "pytorch3d"
        if _optional("torch_cluster"):
            return "torch-cluster"
    return "torch"


@torch.library.custom_op(
    "pointcanon::knn",
    mutates_args=(),
    schema="(Tensor points, Tensor queries, int k, Tensor? mask) -> Tensor",
)
def _knn_operator(points: Tensor, queries: Tensor, k: int, mask: Tensor | None) -> Tensor:
    return _knn(points, queries, k, mask)


@_knn_operator.register_fake
def _(points: Tensor, queries: Tensor, k: int, mask: Tensor | None) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1], k, dtype=torch.int64)


@torch.library.custom_op(
    "pointcanon::ball_query",
    mutates_args=(),
    schema="(Tensor points, Tensor queries, float radius, int k, Tensor? mask) -> Tensor",
)
def _ball_operator(
    points: Tensor, queries: Tensor, radius: float, k: int, mask: Tensor | None
) -> Tensor:
    return _ball(points, queries, radius, k, mask)


@_ball_operator.register_fake
def _(points: Tensor, queries: Tensor, radius: float, k: int, mask: Tensor | None) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1], k, dtype=torch.int64)


@torch.library.custom_op(
    "pointcanon::farthest_point_sample",
    mutates_args=(),
    schema="(Tensor points, int m, Tensor? mask, Tensor start) -> Tensor",
)
def _farthest_operator(points: Tensor, m: int, mask: Tensor | None, start: Tensor) -> Tensor:
    chosen_backend = _farthest_backend(points.device)
    if chosen_backend == "torch":
        return _farthest(points, m, mask, start)
    run = _farthest_pytorch3d if chosen_backend == "pytorch3d" else _farthest_torch_cluster
    # these kernels begin with the first point, so the start goes there
    real = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
    first = torch.arange(points.shape[1], device=points.device) == start[:, None]
    order = torch.where(first, -1, (~real).long()).argsort(dim=1, stable=True)
    packed = points.gather(1, order[..., None].expand_as(points))
    counts = real.sum(dim=1)
    chosen = _cycle(run(packed, counts, m), counts)
    return order.gather(1, chosen)


@_farthest_operator.register_fake
def _(points: Tensor, m: int, mask: Tensor | None, start: Tensor) -> Tensor:
    return points.new_empty(points.shape[0], m, dtype=torch.int64)


# nearest neighbours -------------------------------------------------------------------------------


def _knn(points: Tensor, queries: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Backend-independent part: real points first, and repeats where there are too few."""
    count = points.shape[1]
    if mask is None:
        order = None
        counts = torch.full((points.shape[0],), count, device=points.device)
    else:
        order = (~mask).long().argsort(dim=1, stable=True)
        points = points.gather(1, order[..., None].expand_as(points))
        counts = mask.sum(dim=1)
    with full_precision(points):
        name = _knn_backend(points.device, points.shape[2], k)
        index = _KNN_BACKENDS[name](points, queries, counts, min(k, count))
    if k > count or mask is not None:
        slots = torch.arange(k, device=points.device) % counts.clamp_max(k)[:, None]
        index = index.gather(2, slots[:, None].expand(-1, index.shape[1], -1))
    if order is None:
        return index
    return order[:, None].expand(-1, index.shape[1], -1).gather(2, index)


def _knn_traced(points: Tensor, queries: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Equal distances are ordered as the runtime has it; ONNX says by index."""
    index = _with_room(_distances(points, queries), k, mask).topk(k, largest=False).indices
    counts = torch.full_like(index[:, 0, 0], points.shape[1]) if mask is None else mask.sum(dim=1)
    slots = torch.arange(k, device=points.device) % counts.clamp_max(k)[:, None]
    return index.gather(2, slots[:, None].expand_as(index))


def _with_room(distances: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Distances ``(B, M, N + k)``, infinite to padding and to k more points, where there may be
    fewer than k."""
    if mask is not None:
        distances = distances.masked_fill(~mask[:, None], math.inf)
    return torch.nn.functional.pad(distances, (0, k), value=math.inf)


def _knn_tree(points: Tensor, queries: Tensor, counts: Tensor, k: int) -> Tensor:
    """By a k-d tree for each cloud, clouds spread over as many threads as torch may use."""
    result = torch.zeros(*queries.shape[:2], k, dtype=torch.int64)
    # a power of two keeps squares in range and changes no distance but by that factor
    scale = _power_of_two(points, queries)
    points, queries = points * scale, queries * scale
    clouds, asked, answer = points.numpy(), queries.numpy(), result.numpy()

    def search(item: int) -> None:
        count = int(counts[item])
        width = min(k + 1, count)  # one more shows whether the k-th place is shared
        squared, index = _tree_query(clouds[item, :count], asked[item], width)
        answer[item, :, : min(k, count)] = index[:, :k]
        tied = (squared[:, 1:] == squared[:, :-1]).any(axis=1).nonzero()[0]
        if len(tied):
            rows = torch.from_numpy(tied)
            cloud, query = points[item : item + 1, :count], queries[item : item + 1, rows]
            exact = _knn_dense(cloud, query, counts[item : item + 1], min(k, count))
            result[item, rows, : min(k, count)] = exact[0]

    workers = min(torch.get_num_threads(), len(clouds))
    if workers <= 1:
        for item in range(len(clouds)):
            search(item)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(search, range(len(clouds))))
    return result


def _tree_query(cloud: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances (monotone in the true ones, in any unit) and indices, each ``(M, k)``."""
    kdtree = _optional("pykdtree.kdtree")
    if kdtree is not None:
        tree = kdtree.KDTree(np.ascontiguousarray(cloud))
        distances, index = tree.query(np.ascontiguousarray(queries), k=k, sqr_dists=True)
    else:
        from scipy.spatial import KDTree

        distances, index = KDTree(cloud).query(queries, k=k)
    return distances.reshape(-1, k), index.reshape(-1, k).astype(np.int64)


def _knn_dense(points: Tensor, queries: Tensor, counts: Tensor, k: int) -> Tensor:
    """By distances to all points, for as many queries at a time as the chunk allows."""
    scale = _power_of_two(points, queries)
    padded = torch.arange(points.shape[1], device=points.device) >= counts[:, None]
    pieces = [
        _nearest(distances, k)
        for distances in _distance_chunks(points * scale, queries * scale, padded)
    ]
    if not pieces:
        return queries.new_zeros(*queries.shape[:2], k, dtype=torch.int64)
    return torch.cat([piece.flatten(0, 1) for piece in pieces]).unflatten(0, queries.shape[:2])


def _distance_chunks(points: Tensor, queries: Tensor, padded: Tensor | None) -> Iterator[Tensor]:
    """:func:`_distances` in turn for few queries at a time, infinite to padded points."""
    budget = _CPU_CHUNK if points.device.type == "cpu" else _DEVICE_CHUNK
    rows = min(max(1, budget // points.shape[1]), queries.shape[1])
    clouds = max(1, rows // max(1, queries.shape[1]))
    for b in range(0, len(points), clouds):
        for r in range(0, queries.shape[1], max(1, rows)):
            distances = _distances(points[b : b + clouds], queries[b : b + clouds, r : r + rows])
            if padded is not None:
                distances.masked_fill_(padded[b : b + clouds, None], math.inf)
            yield distances


def _distances(points: Tensor, queries: Tensor) -> Tensor:
    """``(B, M, N)``, in the order of the true distances of each row."""
    if points.shape[-1] > _DIRECT_DIMENSIONS:
        middle = points.mean(dim=1, keepdim=True)  # cancellation is least about the middle
        points, queries = points - middle, queries - middle
        squares = points.square().sum(dim=-1)[:, None]
        return torch.baddbmm(squares, queries, points.mT, alpha=-2)
    total = None
    for x, y in zip(queries.unbind(-1), points.unbind(-1), strict=True):
        square = (x[..., None] - y[:, None]).square_()
        total = square if total is None else total.add_(square)
    assert total is not None
    return total


def _nearest(distances: Tensor, k: int) -> Tensor:
    """Indices ``(B, M, k)`` of the smallest entries, ascending, ties by index."""
    rows = distances.flatten(0, -2)
    values, index = _smallest(rows, min(k + 1, rows.shape[1]))
    shared = ((values[:, 1:] == values[:, :-1]) & values[:, 1:].isfinite()).any(dim=1)
    kth, index = values[:, k - 1 : k], index[:, :k]
    if bool(shared.any()):
        index = index.clone()
        index[shared] = _resolve_ties(rows[shared], kth[shared], k)
    return index.unflatten(0, distances.shape[:-1])


def _smallest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k smallest of each row, ascending.

    In two stages: the k smallest values lie in the k groups of smallest minimum. Groups are
    strided, so that their minima are vectorised.
    """
    count = rows.shape[1]
    members = math.isqrt(count // k)
    if members < 2:
        values, index = rows.topk(k, dim=1, largest=False)
        return values, index
    groups = -(-count // members)
    rows = torch.nn.functional.pad(rows, (0, groups * members - count), value=math.inf)
    minima = rows.view(-1, members, groups).amin(dim=1)
    best = minima.topk(k, dim=1, largest=False, sorted=False).indices
    offsets = torch.arange(members, device=rows.device)[:, None] * groups
    candidates = (best[:, None] + offsets).flatten(1)
    values, place = rows.gather(1, candidates).topk(k, dim=1, largest=False)
    return values, candidates.gather(1, place)


def _resolve_ties(rows: Tensor, kth: Tensor, k: int) -> Tensor:
    """The k smallest of each row given the k-th value: all below it, then the first equal ones."""
    count = rows.shape[1]
    place = torch.arange(count, device=rows.device)
    rank = torch.where(rows < kth, place - count, torch.where(rows == kth, place, place + count))
    index = rank.topk(k, dim=1, largest=False).indices.sort(dim=1).values
    order = rows.gather(1, index).sort(dim=1, stable=True).indices
    return index.gather(1, order)


def _knn_pytorch3d(points: Tensor, queries: Tensor, counts: Tensor, k: int) -> Tensor:
    ops = _optional("pytorch3d.ops")
    assert ops is not None
    return ops.knn_points(queries, points, lengths2=counts, K=k).idx


def _knn_torch_cluster(points: Tensor, queries: Tensor, counts: Tensor, k: int) -> Tensor:
    library = _optional("torch_cluster")
    assert library is not None
    batch, number = queries.shape[:2]
    real, cloud_of_point, first = _flat_clouds(points, counts)
    cloud_of_query = torch.arange(batch, device=points.device).repeat_interleave(number)
    row, column = library.knn(real, queries.flatten(0, 1), k, cloud_of_point, cloud_of_query)
    # clouds of fewer than k points have shorter lists
    slot = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    index = row.new_zeros(batch * number, k)
    index[row, slot] = column - first[cloud_of_query[row]]
    return index.view(batch, number, k)


_KNN_BACKENDS = {
    "pykdtree": _knn_tree,
    "scipy": _knn_tree,
    "two-stage top-k": _knn_dense,
    "pytorch3d": _knn_pytorch3d,
    "torch-cluster": _knn_torch_cluster,
}


# balls --------------------------------------------------------------------------------------------


def _ball(points: Tensor, queries: Tensor, radius: float, k: int, mask: Tensor | None) -> Tensor:
    """By distances to all points, for as many queries at a time as the chunk allows."""
    scale = _power_of_two(points, queries)
    # in double precision, so that the rounded limit is that of the plain radius
    limits = (radius * scale.to("cpu", torch.float64)).square().to(points)
    limits = limits.expand(-1, queries.shape[1], 1).flatten()
    chunks = _distance_chunks(points * scale, queries * scale, None if mask is None else ~mask)
    pieces, done = [], 0
    with full_precision(points):
        for distances in chunks:
            rows = distances.flatten(0, 1)
            pieces.append(_first_inside(rows, limits[done : done + len(rows), None], k))
            done += len(rows)
    if not pieces:
        return queries.new_zeros(*queries.shape[:2], k, dtype=torch.int64)
    return torch.cat(pieces).unflatten(0, queries.shape[:2])


def _ball_traced(
    points: Tensor, queries: Tensor, radius: float, k: int, mask: Tensor | None
) -> Tensor:
    distances = _with_room(_distances(points, queries), k, mask)
    reach = distances.amin(dim=-1, keepdim=True).clamp_min(radius**2)  # never an empty ball
    place = torch.arange(distances.shape[-1], device=points.device)
    outside = torch.iinfo(place.dtype).max
    found = torch.where(distances <= reach, place, outside).topk(k, largest=False).values
    return torch.where(found < outside, found, found[..., :1])


def _first_inside(distances: Tensor, limits: Tensor, k: int) -> Tensor:
    """The first k columns of each row up to its limit, ``(rows, k)``, the first repeated."""
    reach = torch.maximum(limits, distances.amin(dim=1, keepdim=True))  # never an empty ball
    inside = distances <= reach
    slot = torch.arange(k, device=distances.device)
    counts = inside.sum(dim=1, keepdim=True)
    first = counts.cumsum(dim=0) - counts
    places = inside.flatten().nonzero()[:, 0] % distances.shape[1]
    return places[first + torch.where(slot < counts, slot, 0)]


# farthest points ----------------------------------------------------------------------------------


def _farthest(points: Tensor, m: int, mask: Tensor | None, start: Tensor) -> Tensor:
    """One array per coordinate and everything in place: the loop is bound by memory traffic."""
    scale = _power_of_two(points, points)
    axes = [axis.contiguous() for axis in (points * scale).unbind(-1)]
    nearest = torch.full_like(axes[0], math.inf)
    if mask is not None:
        nearest.masked_fill_(~mask, -1.0)
    difference, squared = torch.empty_like(nearest), torch.empty_like(nearest)
    current = start[:, None]
    chosen = [current]
    for _ in range(min(m, points.shape[1]) - 1):
        squared.zero_()
        for axis in axes:
            torch.sub(axis, axis.gather(1, current), out=difference)
            squared.addcmul_(difference, difference)
        torch.minimum(nearest, squared, out=nearest)
        nearest.scatter_(1, current, -1.0)  # below a double of it, which may still be chosen
        current = nearest.argmax(dim=1, keepdim=True)
        chosen.append(current)
    index = torch.cat(chosen, dim=1)
    if m <= points.shape[1] and mask is None:
        return index
    counts = torch.full_like(start, points.shape[1]) if mask is None else mask.sum(dim=1)
    index = torch.nn.functional.pad(index, (0, m - index.shape[1]))
    return _cycle(index, counts)


def _farthest_traced(points: Tensor, m: int, mask: Tensor | None, start: Tensor) -> Tensor:
    nearest = torch.full_like(points[..., 0], math.inf)
    if mask is not None:
        nearest = nearest.masked_fill(~mask, -1.0)

    def choose(carry: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        nearest, current = carry
        last = points.gather(1, current[..., None].expand(-1, -1, points.shape[2]))
        nearest = torch.minimum(nearest, (points - last).square().sum(dim=-1))
        nearest = nearest.scatter(1, current, -1.0)
        return (nearest, nearest.argmax(dim=1, keepdim=True)), current

    _, chosen = repeat(choose, (nearest, start[:, None]), m)
    counts = torch.full_like(start, points.shape[1]) if mask is None else mask.sum(dim=1)
    return _cycle(chosen[..., 0].mT, counts)


def _cycle(index: Tensor, counts: Tensor) -> Tensor:
    """Columns past the count of a cloud repeat its first ones."""
    slots = torch.arange(index.shape[1], device=index.device) % counts[:, None]
    return index.gather(1, slots)


def _farthest_from_centroid(points: Tensor, mask: Tensor | None) -> Tensor:
    scale = _power_of_two(points, points)
    scaled = points * scale
    squared = (scaled - centroid(scaled, mask)[:, None]).square().sum(dim=-1)
    if mask is not None:
        squared = squared.masked_fill(~mask, -1.0)
    return squared.argmax(dim=1)


def _farthest_pytorch3d(points: Tensor, counts: Tensor, m: int) -> Tensor:
    ops = _optional("pytorch3d.ops")
    assert ops is not None
    return ops.sample_farthest_points(points, lengths=counts, K=m)[1]


def _farthest_torch_cluster(points: Tensor, counts: Tensor, m: int) -> Tensor:
    library = _optional("torch_cluster")
    assert library is not None
    real, cloud_of_point, first = _flat_clouds(points, counts)
    # the kernel takes ceil(ratio * count) points: half a point less leaves rounding no say
    taken = counts.clamp_max(m)
    ratio = (taken - 0.5) / counts
    flat = library.fps(real, cloud_of_point, ratio.to(points.dtype), random_start=False)
    cloud = cloud_of_point[flat]
    slot = torch.arange(len(flat), device=flat.device) - (taken.cumsum(0) - taken)[cloud]
    index = flat.new_zeros(len(points), m)
    index[cloud, slot] = flat - first[cloud]
    return index


def _flat_clouds(points: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real points ``(sum, D)``, the cloud of each, and where each cloud begins."""
    cloud = torch.arange(len(points), device=points.device).repeat_interleave(counts)
    real = torch.arange(points.shape[1], device=points.device) < counts[:, None]
    return points[real], cloud, counts.cumsum(0) - counts


# input --------------------------------------------------------------------------------------------


def _prepared(
    points: Tensor, k: int, mask: Tensor | None, queries: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Checked points and queries, in one dtype of at least float32."""
    _check_points("points", points, mask)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k is {k!r}; ask for at least 1 neighbour")
    if queries is not None:
        _check_points("queries", queries, None)
        if queries.shape[0] != points.shape[0] or queries.shape[2] != points.shape[2]:
            raise InputError(
                f"queries has shape {tuple(queries.shape)}, "
                f"expected ({points.shape[0]}, M, {points.shape[2]}) as of points"
            )
        if queries.device != points.device:
            raise InputError(f"queries is on {queries.device}, points on {points.device}")
    points = _at_least_float32(points, mask)
    return points, points if queries is None else _at_least_float32(queries, None).to(points.dtype)


def _power_of_two(points: Tensor, queries: Tensor) -> Tensor:
    """Factor ``(B, 1, 1)`` that brings the largest coordinate of a cloud near 1, exactly."""
    if exporting():  # no format knows frexp: squares must be in range
        return torch.ones_like(points[:, :1, :1])
    largest = points.abs().amax(dim=(1, 2), keepdim=True)
    if queries is not points and queries.shape[1]:
        largest = torch.maximum(largest, queries.abs().amax(dim=(1, 2), keepdim=True))
    exponent = torch.frexp(largest).exponent
    most = 126 if points.dtype == torch.float32 else 1022
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-most, most))


def _at_least_float32(points: Tensor, mask: Tensor | None) -> Tensor:
    points = points.detach().to(torch.promote_types(points.dtype, torch.float32))
    if mask is not None:
        points = torch.where(mask[..., None], points, points.new_zeros(()))
    return points


def _check_points(name: str, points: Tensor, mask: Tensor | None) -> None:
    if not isinstance(points, Tensor):
        raise InputError(f"{name} is a {type(points).__name__}; pass a torch tensor (B, N, D)")
    if points.ndim != 3 or points.shape[2] < 1:
        raise InputError(f"{name} has shape {tuple(points.shape)}, expected (B, N, D)")
    if not points.is_floating_point():
        raise InputError(f"{name} has dtype {points.dtype}; convert it with {name}.float()")
    if points.shape[1] == 0 and name == "points":
        raise InputError("points holds empty clouds (N = 0); a cloud needs at least one point")
    check_mask(mask, points)
    if torch.compiler.is_compiling():
        return  # what follows reads values, which would break the graph
    finite = points.isfinite().all(dim=-1)
    if mask is not None:
        finite = finite | ~mask
    if not bool(finite.all()):
        cloud, point = (int(i) for i in (~finite).nonzero()[0])
        raise InputError(
            f"{name}[{cloud}, {point}] is not finite: "
            "remove NaN and infinite points or hide them with the mask"
        )


def _check_start(start: Tensor, points: Tensor, mask: Tensor | None) -> None:
    if start.shape != points.shape[:1] or start.dtype != torch.int64:
        raise InputError(
            f"start has shape {tuple(start.shape)} and dtype {start.dtype}, "
            f"expected ({points.shape[0]},) int64"
        )
    if torch.compiler.is_compiling():
        return
    inside = (start >= 0) & (start < points.shape[1])
    if mask is not None:
        inside &= mask.gather(1, start.clamp(0, points.shape[1] - 1)[:, None])[:, 0]
    if not bool(inside.all()):
        cloud = int((~inside).nonzero()[0])
        raise InputError(f"start[{cloud}] is {int(start[cloud])}: not a real point of its cloud")
