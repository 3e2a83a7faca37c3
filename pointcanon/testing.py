"""Checks of what must hold for a canonicalizer, for the networks here and for your own.

Each ``assert_...`` raises AssertionError and says what was off, at which cloud, by how much and
against which tolerance. A canonicalizer is any callable from clouds ``(B, N, 3)`` (and ``mask``,
``normals`` where they are given) to :class:`~pointcanon.frames.Frames`, or to bare rotations
``(B, 3, 3)`` or ``(B, K, 3, 3)``. Modules are run in evaluation mode and put back into theirs.

    >>> import torch
    >>> from pointcanon import testing
    >>> from pointcanon.canonicalizers import PCA
    >>> testing.assert_equivariant(PCA(4), testing.generic_clouds(8, 64, dtype=torch.float64))

Transformations are drawn and applied in float64 and rounded once to the dtype of the cloud, so
that what is measured is the canonicalizer and not the preparation of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pointcanon import clouds, rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = [
    "TOLERANCES",
    "assert_batch_independent",
    "assert_degenerate_safe",
    "assert_equivariant",
    "assert_invariant",
    "assert_invertible",
    "assert_padding_independent",
    "assert_permutation_invariant",
    "assert_proper",
    "assert_scale_invariant",
    "assert_translation_invariant",
    "degenerate_clouds",
    "equivariance_error",
    "frame_distance",
    "generic_clouds",
    "random_elements",
    "surface_clouds",
]

Canonicalize = Callable[..., "Frames | Tensor"]
Group = Literal["SO3", "SO2", "O3", "O2"]
Axis = int | Sequence[float] | None


class Tolerance(NamedTuple):
    """Bounds on errors over a batch: ``quantile`` of the clouds stay within them."""

    quantile: float
    frames: float
    outputs: float


TOLERANCES = {
    torch.float64: Tolerance(quantile=1.0, frames=1e-10, outputs=1e-8),
    torch.float32: Tolerance(quantile=0.99, frames=1e-4, outputs=1e-3),
}
"""For each dtype: what share of clouds must be within the bound, on frames (Frobenius norm) and on
the outputs of whole models (relative to the largest output, at least 1). In float32 one cloud in a
hundred may sit on a tie (of neighbours, or of two candidates) that rounding decides."""


def frame_distance(first: Frames, second: Frames) -> Tensor:
    """How far apart two sets of weighted frames are, ``(B,)`` float64.

    Two candidates differ by the Frobenius norm of the difference of their rotations or by the
    difference of their weights, whichever is larger; the distance of two sets is that of the
    candidate farthest from its nearest counterpart, either way (Hausdorff), whatever their order.
    For single frames that is ``|R - R'|``, and ``2 asin(|R - R'| / sqrt(8))`` their angle.
    """
    turn = first.rotations.double()[:, :, None] - second.rotations.double()[:, None]
    weight = first.weights.double()[:, :, None] - second.weights.double()[:, None]
    distance = torch.maximum(turn.square().sum(dim=(-1, -2)).sqrt(), weight.abs())
    return torch.maximum(
        distance.amin(dim=2).amax(dim=1),
        distance.amin(dim=1).amax(dim=1),
    )


def equivariance_error(
    canonicalizer: Canonicalize,
    points: Tensor,
    turns: Tensor,
    mask: Tensor | None = None,
    normals: Tensor | None = None,
) -> Tensor:
    """Distance of ``R(g x)`` and ``g R(x)`` for each cloud, ``(B,)`` float64.

    Args:
        canonicalizer: The canonicalizer, used as it is (put it into evaluation mode first).
        points: ``(B, N, 3)``.
        turns: ``(B, 3, 3)``, the rotations (or reflections) g, in float64 for accurate figures.
        mask: ``(B, N)`` bool.
        normals: ``(B, N, 3)``, turned with the points.

    Returns:
        :func:`frame_distance` of the two: 0 is exact, sqrt(8) is half a turn apart.
    """
    wanted = _frames(canonicalizer, points, mask, normals)
    turned = None if normals is None else _turn(normals, turns)
    found = _frames(canonicalizer, _turn(points, turns), mask, turned)
    carried = turns.double()[:, None] @ wanted.rotations.double()
    return frame_distance(found, Frames.of(carried, wanted.log_weights.double()))


def assert_equivariant(
    canonicalizer: Canonicalize,
    points: Tensor,
    *,
    mask: Tensor | None = None,
    normals: Tensor | None = None,
    group: Group = "SO3",
    axis: Axis = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """``R(g x) = g R(x)`` for random rotations g, candidates and weights alike.

    Clouds that the canonicalizer flags as degenerate have no equivariant frame and are left out.

    Args:
        canonicalizer: What is tested.
        points: ``(B, N, 3)`` float32 or float64.
        mask: ``(B, N)`` bool.
        normals: ``(B, N, 3)``.
        group: That g is drawn from, as for :func:`random_elements`.
        axis: Of that group.
        tolerance: Replaces the bound of :data:`TOLERANCES`.
        generator: Draws the rotations; the default is seeded with 0.

    Raises:
        AssertionError: If it does not hold, or every cloud is flagged as degenerate.
        InputError: On clouds that nothing can be tested with.
    """
    _check(points, mask, normals)
    turns = random_elements(len(points), group, axis, generator).to(points.device)
    with _evaluating(canonicalizer):
        errors = equivariance_error(canonicalizer, points, turns, mask, normals)
        settled = ~_frames(canonicalizer, points, mask, normals).degenerate
    if not bool(settled.any()):
        raise AssertionError(
            f"all {len(points)} clouds are flagged as degenerate: no equivariance to test"
        )
    _judge("equivariance: R(gx) and g R(x)", errors, points.dtype, tolerance, settled)


def assert_proper(
    frames: Frames | Tensor, *, group: Group = "SO3", tolerance: float = 1e-5
) -> None:
    """Every candidate is finite, orthonormal and no reflection: R^T R = 1 and det = +1.

    Args:
        frames: Frames, or rotations ``(B, ..., 3, 3)``.
        group: That they are frames of; reflections may be among those of O2 and O3.
        tolerance: On each entry of R^T R and on det.

    Raises:
        AssertionError: Naming the first cloud whose matrix is not a rotation.
    """
    matrices = (frames.rotations if isinstance(frames, Frames) else frames).detach().double()
    eye = torch.eye(3, dtype=torch.float64, device=matrices.device)
    skewed = (matrices.mT @ matrices - eye).abs().amax(dim=(-1, -2))
    determinant = torch.linalg.det(matrices)
    size = determinant.abs() if group in ("O2", "O3") else determinant
    good = (skewed <= tolerance) & ((size - 1).abs() <= tolerance)
    if bool(good.all()):
        return
    where = tuple(int(i) for i in (~good).nonzero()[0])
    raise AssertionError(
        f"cloud {where[0]}: the frame at {list(where)} is no rotation: R^T R is off by "
        f"{skewed[where]:.3g}, det R is {determinant[where]:.6g}, tolerance {tolerance:.3g}"
    )


def assert_permutation_invariant(
    canonicalizer: Canonicalize,
    points: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """The frames do not depend on the order of the points. Arguments and errors as above."""
    _check(points)
    order = torch.rand(points.shape[:2], generator=_seeded(generator)).argsort(dim=1)
    order = order.to(points.device)[..., None].expand_as(points)
    _compare("permutation", canonicalizer, points, points.gather(1, order), tolerance)


def assert_translation_invariant(
    canonicalizer: Canonicalize,
    points: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """The rotations stay when the cloud moves by about its radius; the centre moves along."""
    _check(points)
    size = clouds.radius(points - clouds.centroid(points)[:, None]).double()
    draw = torch.randn(len(points), 3, generator=_seeded(generator), dtype=torch.float64)
    shift = draw.to(points.device) * size[:, None]
    moved = (points.double() + shift[:, None]).to(points.dtype)
    before, after = _compare("translation", canonicalizer, points, moved, tolerance)
    if bool(before.centre.any()):  # a canonicalizer that does not centre leaves it at zero
        slip = (after.centre.double() - before.centre.double() - shift).norm(dim=-1) / size
        _judge("translation: centre(x + t) and centre(x) + t", slip, points.dtype, tolerance)


def assert_scale_invariant(
    canonicalizer: Canonicalize,
    points: Tensor,
    *,
    factors: tuple[float, ...] = (1e-4, 0.3, 1e4),
    tolerance: float | None = None,
) -> None:
    """The rotations stay when the cloud is scaled by each of ``factors``; the size follows it."""
    _check(points)
    for factor in factors:
        scaled = (points.double() * factor).to(points.dtype)
        what = f"scaling by {factor:g}"
        before, after = _compare(what, canonicalizer, points, scaled, tolerance)
        if before.scale is not None and after.scale is not None:
            slip = (after.scale.double() / (factor * before.scale.double()) - 1).abs()
            _judge(f"{what}: size of a x and a times that of x", slip, points.dtype, tolerance)


def assert_batch_independent(
    canonicalizer: Canonicalize, points: Tensor, *, tolerance: float | None = None
) -> None:
    """Each cloud has the frames it has alone, whatever else is in the batch."""
    _check(points)
    with _evaluating(canonicalizer):
        together = _frames(canonicalizer, points)
        alone = [_frames(canonicalizer, cloud) for cloud in points.split(1)]
    single = Frames.of(
        torch.cat([frames.rotations for frames in alone]),
        torch.cat([frames.log_weights for frames in alone]),
    )
    errors = frame_distance(together, single)
    _judge("batch: frames among others and alone", errors, points.dtype, tolerance)


def assert_padding_independent(
    canonicalizer: Canonicalize,
    points: Tensor,
    *,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Masked points change nothing, whatever they hold: large numbers, NaN, infinity.

    The padding is mixed in among the points; the canonicalizer must accept ``mask``.
    """
    _check(points)
    batch, count = points.shape[:2]
    seeded = _seeded(generator)
    garbage = torch.tensor([1e4, -1.0, torch.nan, torch.inf], dtype=points.dtype)
    kind = torch.randint(len(garbage), (batch, count // 2 + 3, 3), generator=seeded)
    padding = garbage[kind].to(points.device)
    wide = torch.cat((points, padding), dim=1)
    order = torch.rand(wide.shape[:2], generator=seeded).argsort(dim=1).to(points.device)
    wide = wide.gather(1, order[..., None].expand_as(wide))
    with _evaluating(canonicalizer):
        plain = _frames(canonicalizer, points)
        padded = _frames(canonicalizer, wide, order < count)
    errors = frame_distance(plain, padded)
    _judge("padding: frames with and without it", errors, points.dtype, tolerance)


def assert_invertible(
    canonicalizer: Canonicalize, points: Tensor, *, tolerance: float | None = None
) -> None:
    """``frames.invert(frames.apply(x)) = x`` for every candidate, relative to the largest norm."""
    _check(points)
    with _evaluating(canonicalizer):
        frames = _frames(canonicalizer, points)
    back = frames.invert(frames.apply(points)).double()
    size = clouds.radius(points).double().clamp_min(torch.finfo(points.dtype).tiny)
    errors = (back - points.double()[:, None]).abs().amax(dim=(1, 2, 3)) / size
    _judge("inverse: invert(apply(x)) and x", errors, points.dtype, tolerance)


def assert_degenerate_safe(
    canonicalizer: Canonicalize,
    *,
    group: Group = "SO3",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Clouds that determine no frame get finite, proper frames, are flagged, and break no gradient.

    Args:
        canonicalizer: Must return Frames; it is asked about each of :func:`degenerate_clouds`, and
            for the gradient of its frames in the points and, if it is a module, its parameters.
        group: That its frames are of.
        dtype: Of the clouds.
        device: Of the clouds.
        generator: Turns and places the clouds; the default is seeded with 0.

    Raises:
        AssertionError: Naming the cloud.
    """
    parameters = []
    if isinstance(canonicalizer, nn.Module):
        parameters = [weight for weight in canonicalizer.parameters() if weight.requires_grad]
    for name, cloud in degenerate_clouds(dtype=dtype, generator=generator).items():
        points = cloud.to(device).requires_grad_()
        with _evaluating(canonicalizer), torch.enable_grad():
            frames = _frames(canonicalizer, points)
        try:
            assert_proper(frames, group=group)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        if not bool(torch.isfinite(frames.weights).all()):
            raise AssertionError(f"{name}: the weights are {frames.weights.tolist()}")
        if not bool(frames.degenerate.all()):
            raise AssertionError(
                f"{name}: this cloud determines no frame and is not flagged as degenerate"
            )
        # any fixed function of the frames will do, as long as it treats no entry alike
        probe = torch.linspace(-1, 1, frames.rotations.numel(), dtype=dtype, device=device)
        value = (frames.rotations.flatten() * probe).sum()
        value = value + (frames.log_weights * frames.log_weights.detach()).sum()
        if not value.requires_grad:
            continue
        gradients = torch.autograd.grad(value, [points, *parameters], allow_unused=True)
        if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            raise AssertionError(f"{name}: the gradient of its frames is not finite")


def assert_invariant(
    module: Callable[..., Tensor],
    points: Tensor,
    *,
    mask: Tensor | None = None,
    normals: Tensor | None = None,
    group: Group = "SO3",
    axis: Axis = None,
    tolerance: float | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """The outputs ``(B, ...)`` of a whole model stay when each cloud is turned at random.

    Args:
        module: From clouds, and ``mask`` and ``normals`` as keywords where given, to a tensor.
        points: ``(B, N, 3)`` float32 or float64.
        mask: ``(B, N)`` bool.
        normals: ``(B, N, 3)``.
        group: That the turns are drawn from, as for :func:`random_elements`.
        axis: Of that group.
        tolerance: Replaces the bound of :data:`TOLERANCES`, relative to the cloud's largest
            output or 1.
        generator: Draws the rotations; the default is seeded with 0.

    Raises:
        AssertionError: If it does not hold.
        InputError: On clouds that nothing can be tested with.
    """
    _check(points, mask, normals)
    turns = random_elements(len(points), group, axis, generator).to(points.device)
    turned = None if normals is None else _turn(normals, turns)
    with _evaluating(module):
        before = module(points, **_given(mask, normals)).double().flatten(1)
        after = module(_turn(points, turns), **_given(mask, turned)).double().flatten(1)
    errors = (after - before).abs().amax(dim=1) / before.abs().amax(dim=1).clamp_min(1)
    bound = TOLERANCES[points.dtype].outputs if tolerance is None else tolerance
    _judge("invariance: f(gx) and f(x)", errors, points.dtype, bound)


def random_elements(
    count: int,
    group: Group = "SO3",
    axis: Axis = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random elements ``(count, 3, 3)`` float64 of a group.

    Args:
        count: Of elements.
        group: ``"SO3"``, the rotations; ``"SO2"``, those about the axis; ``"O3"`` and ``"O2"``,
            these and the reflections (in planes that contain the axis), which every other is.
        axis: Of ``"SO2"`` and ``"O2"``: its index (0, 1, 2) or three numbers.
        generator: The default is seeded with 0.

    Raises:
        InputError: On an unknown group, or an axis without direction.
    """
    if group not in ("SO3", "SO2", "O3", "O2"):
        raise InputError(f"group is {group!r}; choose 'SO3', 'SO2', 'O3' or 'O2'")
    generator = _seeded(generator)
    if group in ("SO3", "O3"):
        turns = rotations.random_rotations(count, generator=generator, dtype=torch.float64)
        mirror = -torch.eye(3, dtype=torch.float64)
    else:
        up = rotations.direction(() if axis is None else axis)
        turns = rotations.random_about_axis(
            count, axis=up, generator=generator, dtype=torch.float64
        )
        # half a turn about a horizontal axis turns up to down, and the inversion turns it back
        level = torch.linalg.cross(up, torch.eye(3, dtype=torch.float64)[up.abs().argmin()])
        half = torch.tensor(torch.pi, dtype=torch.float64)
        mirror = -rotations.about_axis(level, half)
    if group in ("O3", "O2"):
        turns[::2] = turns[::2] @ mirror
    return turns


def generic_clouds(
    batch: int,
    count: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random clouds ``(batch, count, 3)`` without symmetry: skewed, unequal axes, any pose."""
    generator = _seeded(generator)
    axes = torch.tensor([1.0, 0.7, 0.45], dtype=torch.float64)
    spread = axes * (1 + 0.1 * torch.rand(batch, 1, 3, generator=generator, dtype=torch.float64))
    normal = torch.randn(batch, count, 3, generator=generator, dtype=torch.float64)
    return _anywhere((normal + 0.3 * normal.square()) * spread, generator).to(dtype)


def surface_clouds(
    batch: int,
    count: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    parts: int = 4,
) -> Tensor:
    """Points ``(batch, count, 3)`` on the faces of ``parts`` random boxes per cloud, in any pose.

    Like scanned objects and unlike :func:`generic_clouds`, they lie on flat pieces with edges.
    """
    generator = _seeded(generator)
    faces = 2 * torch.rand(batch, count, 3, generator=generator, dtype=torch.float64) - 1
    side = torch.randint(3, (batch, count, 1), generator=generator)
    faces = faces.scatter(2, side, faces.gather(2, side).sign())
    shape = (batch, parts, 3)
    sizes = 0.1 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64)
    places = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    turns = rotations.random_rotations(batch, parts, generator=generator, dtype=torch.float64)
    part = torch.arange(count) % parts
    points = faces * sizes[:, part]
    points = (turns[:, part] @ points[..., None])[..., 0] + places[:, part]
    return _anywhere(points, generator).to(dtype)


def degenerate_clouds(
    dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Clouds ``(1, N, 3)`` by name that determine no frame: too few points, or a symmetry.

    Each is turned and placed at random, so that its symmetry holds up to rounding, as in practice.
    """
    generator = _seeded(generator)
    line = torch.randn(20, 1, generator=generator, dtype=torch.float64)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(signs, signs, signs)
    fifths = torch.arange(5, dtype=torch.float64) * (2 * torch.pi / 5)
    shapes = {
        "single point": torch.zeros(1, 3, dtype=torch.float64),
        "two points": torch.eye(3, dtype=torch.float64)[:2],
        "coincident points": torch.zeros(20, 3, dtype=torch.float64),
        "collinear points": line * torch.eye(3, dtype=torch.float64)[0],
        "regular tetrahedron": corners[corners.prod(dim=1) > 0],
        "cube corners": corners,
        "regular pentagon": torch.stack((fifths.cos(), fifths.sin(), 0 * fifths), dim=-1),
    }
    return {name: _anywhere(cloud[None], generator).to(dtype) for name, cloud in shapes.items()}


def _anywhere(points: Tensor, generator: torch.Generator) -> Tensor:
    turns = rotations.random_rotations(len(points), generator=generator, dtype=torch.float64)
    places = 0.5 * torch.randn(len(points), 1, 3, generator=generator, dtype=torch.float64)
    return points @ turns.mT + places


def _turn(vectors: Tensor, turns: Tensor) -> Tensor:
    return (vectors.double() @ turns.double().mT).to(vectors.dtype)


def _given(mask: Tensor | None, normals: Tensor | None) -> dict[str, Tensor]:
    """Keywords for what there is, so that a callable that takes points only will do."""
    extras = {"mask": mask, "normals": normals}
    return {name: value for name, value in extras.items() if value is not None}


def _frames(
    canonicalizer: Canonicalize,
    points: Tensor,
    mask: Tensor | None = None,
    normals: Tensor | None = None,
) -> Frames:
    answer = canonicalizer(points, **_given(mask, normals))
    return answer if isinstance(answer, Frames) else Frames.of(answer)


def _compare(
    what: str, canonicalizer: Canonicalize, points: Tensor, other: Tensor, tolerance: float | None
) -> tuple[Frames, Frames]:
    with _evaluating(canonicalizer):
        before, after = _frames(canonicalizer, points), _frames(canonicalizer, other)
    errors = frame_distance(before, after)
    _judge(f"{what}: frames before and after", errors, points.dtype, tolerance, ~before.degenerate)
    return before, after


def _judge(
    what: str,
    errors: Tensor,
    dtype: torch.dtype,
    tolerance: float | None,
    considered: Tensor | None = None,
) -> None:
    share, bound, _ = TOLERANCES[dtype]
    bound = bound if tolerance is None else tolerance
    errors = errors.detach().nan_to_num(nan=torch.inf)
    if considered is not None:
        errors = torch.where(considered, errors, -torch.inf)
    kept = errors[errors > -torch.inf]
    if kept.numel() == 0 or bool((kept <= bound).double().mean() >= share):
        return
    worst = int(errors.argmax())
    raise AssertionError(
        f"{what} differ: cloud {worst} of {len(errors)} by {errors[worst]:.3g}, "
        f"{int((kept > bound).sum())} clouds by more than the tolerance {bound:.3g} "
        f"({dtype}, which at least {share:.0%} of the clouds must keep)"
    )


def _check(points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None) -> None:
    clouds.check_cloud(points, mask, normals=normals)
    if points.dtype not in TOLERANCES:
        known = ", ".join(str(dtype) for dtype in TOLERANCES)
        raise InputError(f"points has dtype {points.dtype}; tolerances are known for {known}")


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


@contextlib.contextmanager
def _evaluating(module: Callable[..., object]) -> Iterator[None]:
    """Without gradients and in evaluation mode, put back afterwards."""
    modes = {}
    if isinstance(module, nn.Module):
        modes = {part: part.training for part in module.modules()}
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
