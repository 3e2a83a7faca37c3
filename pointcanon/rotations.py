"""Rotation matrices: orthonormalisation, sampling, angles, finite groups and grids.

Every rotation is a ``(..., 3, 3)`` matrix with det = +1 that maps canonical to input coordinates.
roma does what roma does (SVD projection with a safe derivative, Haar sampling, conversions); this
module adds what a canonicalizer needs beyond it: a Gram-Schmidt that is defined everywhere,
an angle that is accurate at both ends, the finite rotation groups and near-uniform grids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

import roma
import torch
from torch import Tensor

from pointcanon import portable
from pointcanon.errors import InputError

__all__ = [
    "about_axis",
    "direction",
    "from_rotvec",
    "geodesic_angle",
    "gram_schmidt",
    "group",
    "near_singular",
    "product",
    "random_about_axis",
    "random_rotations",
    "so3_grid",
    "svd_project",
]

DEGENERATE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Relative size below which a direction is rounding noise, for each dtype frames come in."""


def gram_schmidt(vectors: Tensor) -> Tensor:
    """Rotation whose first two columns span the first two columns of ``vectors``.

    The third column is their cross product, so det = +1 by construction (Zhou et al. 2019,
    arXiv 1812.07035). Defined for every finite input: a vanishing first vector becomes the x axis,
    and a second one that vanishes or is parallel to the first becomes the coordinate axis least
    aligned with it, made orthogonal. No NaN arises in value or gradient; use
    :func:`near_singular` to know where the fallback was taken.

    Args:
        vectors: ``(..., 3, C)`` with C >= 2; the columns are the vectors, any further are ignored.

    Returns:
        ``(..., 3, 3)`` rotations of the same dtype.

    Raises:
        InputError: If the shape is not ``(..., 3, C >= 2)``.
    """
    _check_columns(vectors, 2)
    first, second = vectors[..., 0], vectors[..., 1]
    axes = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    x = _unit_or(first, axes[0].expand_as(first))
    y = _reject(_unit_or(second, torch.zeros_like(second)), x)
    # the least aligned axis is at least 54 degrees away from x: always a safe second direction
    least = axes[x.detach().abs().argmin(dim=-1)]
    y = _unit_or(y, _unit_or(_reject(least, x), axes[1].expand_as(x)), relative_to=1.0)
    # once more: cancellation in the rejection leaves y off by eps / sin(angle)
    y = _unit_or(_reject(y, x), axes[1].expand_as(x))
    return torch.stack((x, y, torch.linalg.cross(x, y)), dim=-1)


def svd_project(matrices: Tensor) -> Tensor:
    """Rotation nearest to each ``(..., 3, 3)`` matrix in Frobenius norm (orthogonal Procrustes).

    roma's ``special_procrustes``: det = +1 always, and a damped derivative that stays finite at
    equal singular values. A zero matrix gives the identity.

    Raises:
        InputError: If the shape is not ``(..., 3, 3)``.
    """
    _check_columns(matrices, 3, exact=True)
    if not (portable.exporting() or (torch.is_grad_enabled() and matrices.requires_grad)):
        return _nearest_rotation(matrices)
    # the projection does not depend on scale; roma's damping does, so work at unit size
    size = matrices.detach().abs().amax(dim=(-1, -2), keepdim=True)
    usable = size > _smallest(matrices.dtype)
    unit = matrices / torch.where(usable, size, torch.ones_like(size))
    eye = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    unit = torch.where(usable, unit, unit + eye)
    if portable.exporting():
        return roma.unitquat_to_rotmat(portable.largest_eigenvector(_davenport(unit)))
    rotation = roma.special_procrustes(unit, method="svd")
    assert isinstance(rotation, Tensor)  # a pair only where singular values are asked for
    return rotation


def _nearest_rotation(matrices: Tensor) -> Tensor:
    """The same without a derivative, for which roma prepares several times as long."""
    left, values, right = torch.linalg.svd(matrices)
    first, second, third = (left @ right).unbind(dim=-2)
    handedness = (torch.linalg.cross(first, second, dim=-1) * third).sum(dim=-1).sign()
    last = left[..., 2:] * handedness[..., None, None]
    rotation = torch.cat((left[..., :2], last), dim=-1) @ right
    usable = values[..., :1, None] > _smallest(matrices.dtype)
    eye = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    return torch.where(usable, rotation, eye)


def near_singular(vectors: Tensor, size: Tensor | float, columns: int = 2) -> Tensor:
    """Whether the first ``columns`` columns do not determine a rotation, ``(...)`` bool.

    Args:
        vectors: ``(..., 3, C)``.
        size: ``(...)`` or scalar; the magnitude these vectors have when they carry a direction.
            The second singular value is compared with it.
        columns: 2 for Gram-Schmidt, 3 for the SVD (whose mode needs s2 + s3 sign(det) > 0).
    """
    tolerance = DEGENERATE_TOLERANCE[vectors.dtype]
    if portable.exporting():
        missing = vectors.new_zeros(*vectors.shape[:-1], 3 - columns)
        square = torch.cat((vectors[..., :columns].detach(), missing), dim=-1)
        values = portable.eigvalsh(_davenport(square))
        return (values[..., 3] - values[..., 2]) / 2 <= tolerance * size
    singular = torch.linalg.svdvals(vectors[..., :columns].detach())
    certainty = singular[..., 1]
    if columns == 3:
        sign = torch.linalg.det(vectors[..., :3].detach()).sign()
        certainty = certainty + sign * singular[..., 2]
    return certainty <= tolerance * size


def _davenport(matrices: Tensor) -> Tensor:
    """Davenport's K ``(..., 4, 4)``: ``q K q = <R(q), M>`` for unit quaternions q = xyzw.

    So the eigenvector of its largest eigenvalue is the rotation nearest to M (Davenport 1968), and
    with the singular values of M, s3 signed as det M, its two largest eigenvalues are
    ``s1 + s2 + s3`` and ``s1 - s2 - s3``.
    """
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    eye = torch.eye(3, dtype=matrices.dtype, device=matrices.device)
    skew = matrices - matrices.mT
    axial = torch.stack((skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]), dim=-1)[..., None]
    upper = torch.cat((matrices + matrices.mT - trace * eye, axial), dim=-1)
    return torch.cat((upper, torch.cat((axial.mT, trace), dim=-1)), dim=-2)


def product(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second``, rounded as their own dtype is, also under autocast.

    Autocast would multiply poses in bfloat16, whose steps are half a percent of the cloud.
    """
    with portable.full_precision(first):
        return first @ second


def random_rotations(
    *size: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Haar-uniform rotations ``(*size, 3, 3)``; the mean angle is 126.476 degrees."""
    return roma.random_rotmat(size, dtype=dtype, device=device, generator=generator)


def random_about_axis(
    *size: int,
    axis: Tensor,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rotations ``(*size, 3, 3)`` by uniform angles about one ``axis (3,)``."""
    angle = torch.rand(size, dtype=dtype, device=device, generator=generator) * (2 * math.pi)
    return about_axis(axis.to(dtype=dtype, device=device), angle)


def about_axis(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotation by ``angle (...)`` in radians about ``axis (..., 3)``, right-handed.

    Raises:
        InputError: If an axis is zero or not finite.
    """
    size = axis.detach().abs().amax(dim=-1, keepdim=True)
    # a check of values would break the graph
    if not torch.compiler.is_compiling() and not bool(((size > 0) & size.isfinite()).all()):
        raise InputError("a rotation axis is zero or not finite; give a vector with a direction")
    unit = axis / size  # its squares neither overflow nor vanish
    unit = unit / unit.norm(dim=-1, keepdim=True)
    return roma.rotvec_to_rotmat(unit * angle[..., None])


def direction(axis: int | Sequence[float] | Tensor) -> Tensor:
    """The unit vector ``(3,)`` float64 of an axis: its index (0, 1, 2) or three numbers.

    Raises:
        InputError: If it is no axis, or has no direction.
    """
    if isinstance(axis, int):
        if axis not in (0, 1, 2):
            raise InputError(f"the index of an axis must be 0, 1 or 2, got {axis}")
        return torch.eye(3, dtype=torch.float64)[axis]
    vector = torch.as_tensor(axis, dtype=torch.float64)
    if vector.shape != (3,) or not 0 < float(vector.norm()) < math.inf:
        raise InputError(f"an axis must be three finite numbers, not all zero, got {axis}")
    return vector / vector.norm()


def from_rotvec(rotvec: Tensor) -> Tensor:
    """Exponential map: axis times angle in radians, ``(..., 3)``, to ``(..., 3, 3)``."""
    return roma.rotvec_to_rotmat(rotvec)


def geodesic_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in radians, in [0, pi], of the rotation between two ``(..., 3, 3)`` (broadcast).

    ``atan2(|R - R^T| / (2 sqrt 2), (tr R - 1) / 2)`` for the relative rotation: accurate near 0,
    where arccos is not, and near pi, where arcsin is not. The gradient at 0 is 0, not NaN.
    """
    relative = product(first.mT, second)
    skew = relative - relative.mT
    squared = skew.square().sum(dim=(-1, -2))
    positive = squared > 0
    sine = torch.where(positive, squared, 1.0).sqrt() / (2 * math.sqrt(2))
    sine = torch.where(positive, sine, 0.0)
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 1) / 2
    return torch.atan2(sine, cosine)


@cache
def _group_float64(name: str) -> Tensor:
    generators = _generators(name)
    elements = [torch.eye(3, dtype=torch.float64)]
    frontier = list(elements)
    while frontier:
        products = [g @ e for e in frontier for g in generators]
        frontier = []
        for product in products:
            if all((product - known).abs().max() > 1e-6 for known in elements):
                elements.append(product)
                frontier.append(product)
    # re-projecting removes the rounding that long products gather
    return svd_project(torch.stack(elements))


def _generators(name: str) -> list[Tensor]:
    def turn(axis: tuple[float, float, float], fold: int) -> Tensor:
        angle = torch.tensor(2 * math.pi / fold, dtype=torch.float64)
        return about_axis(torch.tensor(axis, dtype=torch.float64), angle)

    golden = (1 + math.sqrt(5)) / 2
    if name == "T":
        return [turn((0, 0, 1), 2), turn((1, 1, 1), 3)]
    if name == "O":
        return [turn((0, 0, 1), 4), turn((1, 1, 1), 3)]
    if name == "I":
        return [turn((0, 1, golden), 5), turn((1, 1, 1), 3)]
    if re.fullmatch(r"C[1-9]\d{0,2}", name):
        return [turn((0, 0, 1), int(name[1:]))]
    raise InputError(
        f"unknown rotation group {name!r}; choose C<n> (cyclic about z, such as C4; n < 1000), "
        "T (tetrahedral, 12), O (octahedral, 24) or I (icosahedral, 60)"
    )


def group(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    """Elements ``(|G|, 3, 3)`` of a finite rotation group; the first is the identity.

    Args:
        name: ``"C<n>"`` (cyclic of order n), ``"T"`` (12), ``"O"`` (24) or ``"I"`` (60 elements).
        dtype: Of the result.
        device: Of the result.
        axis: ``(3,)`` axis of a cyclic group; the default is z.

    Raises:
        InputError: For any other name, an axis for a group that is not cyclic, or an axis without
            direction.
    """
    elements = _group_float64(name)
    if axis is not None:
        if not name.startswith("C"):
            raise InputError(f"axis turns a cyclic group; {name!r} has no single axis")
        angles = torch.arange(len(elements), dtype=torch.float64) * (2 * math.pi / len(elements))
        elements = about_axis(axis.to(torch.float64), angles)
    return elements.to(dtype=dtype, device=device, copy=True)


def so3_grid(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """``size`` near-uniform rotations ``(size, 3, 3)``, deterministic.

    Super-Fibonacci spirals (Alexa, CVPR 2022): any size, low discrepancy on SO(3).

    Raises:
        InputError: If ``size`` < 1.
    """
    if size < 1:
        raise InputError(f"a grid needs size >= 1, got {size}")
    phi, psi = math.sqrt(2), 1.533751168755204288118041
    s = torch.arange(size, dtype=torch.float64) + 0.5
    inner, outer = (s / size).sqrt(), (1 - s / size).sqrt()
    alpha, beta = 2 * math.pi * s / phi, 2 * math.pi * s / psi
    quaternions = torch.stack(
        (inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()), dim=-1
    )
    return roma.unitquat_to_rotmat(quaternions).to(dtype=dtype, device=device)


def _check_columns(matrices: Tensor, columns: int, exact: bool = False) -> None:
    shape = tuple(matrices.shape)
    fits = matrices.ndim >= 2 and shape[-2] == 3
    fits = fits and (shape[-1] == columns if exact else shape[-1] >= columns)
    if not fits:
        wanted = f"{columns}" if exact else f"C >= {columns}"
        raise InputError(f"expected matrices of shape (..., 3, {wanted}), got {shape}")


def _smallest(dtype: torch.dtype) -> float:
    """Size at which numbers vanish: their reciprocals, which gradients hold, must not overflow."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def _reject(vector: Tensor, unit: Tensor) -> Tensor:
    """The part of ``vector`` orthogonal to ``unit``."""
    return vector - (vector * unit).sum(dim=-1, keepdim=True) * unit


def _unit_or(vector: Tensor, fallback: Tensor, relative_to: float | None = None) -> Tensor:
    """``vector`` normalised, or ``fallback`` where it vanishes, with finite gradients.

    Without ``relative_to`` only an exact zero (or underflow) vanishes; with it, whatever is within
    a few rounding errors of that size.
    """
    info = torch.finfo(vector.dtype)
    # scaling by the largest entry first keeps 1e-30 and 1e30 inside the range of a square
    largest = vector.detach().abs().amax(dim=-1, keepdim=True)
    floor = _smallest(vector.dtype) if relative_to is None else 8 * info.eps * relative_to
    usable = largest > floor
    scaled = torch.where(usable, vector, torch.ones_like(vector))
    scaled = scaled / torch.where(usable, largest, torch.ones_like(largest))
    return torch.where(usable, scaled / scaled.norm(dim=-1, keepdim=True), fallback)
