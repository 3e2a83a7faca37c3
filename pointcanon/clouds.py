"""Clouds as the library takes them: checked once at the door, and the few statistics of a cloud.

A cloud batch is ``points (B, N, 3)`` floating point with an optional ``mask (B, N)`` bool, True
where a point is real. Whatever padded points hold is ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pointcanon import portable
from pointcanon.errors import InputError
from pointcanon.rotations import DEGENERATE_TOLERANCE

__all__ = [
    "centroid",
    "check_cloud",
    "check_mask",
    "collinear",
    "normalise",
    "radius",
    "recentre",
    "spread",
    "unit_ball",
    "unit_scale",
]


def check_cloud(points: Tensor, mask: Tensor | None = None, **vectors: Tensor | None) -> None:
    """Refuse a cloud that no answer can be given for, in one readable sentence.

    Args:
        points: ``(B, N, 3)`` floating point, N >= 1.
        mask: ``(B, N)`` bool, at least one True per cloud.
        **vectors: Further per-point vectors that rotate with the points, such as ``normals``.

    Raises:
        InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf.
    """
    if not isinstance(points, Tensor):
        raise InputError(
            f"points is a {type(points).__name__}; pass a torch tensor of shape (B, N, 3)"
        )
    if points.ndim != 3 or points.shape[-1] != 3:
        hint = ""
        if points.ndim == 3 and points.shape[1] == 3:
            hint = "; it looks like (B, 3, N): pass points.mT"
        elif points.ndim == 2 and points.shape[-1] == 3:
            hint = "; for a single cloud pass points[None]"
        raise InputError(f"points has shape {tuple(points.shape)}, expected (B, N, 3){hint}")
    if not points.is_floating_point():
        raise InputError(f"points has dtype {points.dtype}; convert it with points.float()")
    if points.shape[1] == 0:
        raise InputError("points holds empty clouds (N = 0); a cloud needs at least one point")
    for name, value in vectors.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise InputError(
                f"{name} is a {type(value).__name__}; pass a torch tensor of shape (B, N, 3)"
            )
        if value.shape != points.shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)}, "
                f"expected that of points, {tuple(points.shape)}"
            )
        _check_companion(name, value, points)
    check_mask(mask, points)
    if torch.compiler.is_compiling():
        return  # what follows reads values, which would break the graph
    for name, value in {"points": points, **vectors}.items():
        if value is not None:
            _check_finite(name, value, mask)


def check_mask(mask: Tensor | None, points: Tensor) -> None:
    """Refuse what says nothing of the points ``(B, N, D)``; None says that all are real.

    Raises:
        InputError: On a wrong type, shape, dtype or device, or a cloud without a real point.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise InputError(f"mask is a {type(mask).__name__}; pass a bool tensor of shape (B, N)")
    if mask.dtype != torch.bool:
        raise InputError(f"mask has dtype {mask.dtype}; pass a bool tensor, True = real point")
    if mask.shape != points.shape[:2]:
        raise InputError(f"mask has shape {tuple(mask.shape)}, expected {tuple(points.shape[:2])}")
    if mask.device != points.device:
        raise InputError(f"mask is on {mask.device}, points on {points.device}")
    if torch.compiler.is_compiling():
        return  # what follows reads values, which would break the graph
    if not bool(mask.any(dim=1).all()):
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise InputError(f"cloud {empty} of the batch is empty: its mask has no True entry")


def _check_companion(name: str, value: Tensor, points: Tensor) -> None:
    if value.dtype != points.dtype:
        raise InputError(f"{name} has dtype {value.dtype}, points {points.dtype}; make them equal")
    if value.device != points.device:
        raise InputError(f"{name} is on {value.device}, points on {points.device}")


def _check_finite(name: str, value: Tensor, mask: Tensor | None) -> None:
    finite = torch.isfinite(value).all(dim=-1)
    if mask is not None:
        finite = finite | ~mask
    if bool(finite.all()):
        return
    cloud, point = (int(i) for i in (~finite).nonzero()[0])
    raise InputError(
        f"{name}[{cloud}, {point}] is {value[cloud, point].tolist()}: "
        "remove NaN and infinite points or hide them with the mask"
    )


def centroid(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the real points, ``(B, 3)``."""
    if mask is None:
        return points.mean(dim=1)
    kept = torch.where(mask[..., None], points, points.new_zeros(()))
    return kept.sum(dim=1) / mask.sum(dim=1).clamp_min(1)[:, None].to(points.dtype)


def recentre(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Centred clouds ``(B, N, 3)`` without what rounding left of their mean; padding stays.

    Rounding of single points averages out over the cloud. That of their centre moves them all
    alike, which in float32 made up most of the error of a learned frame.
    """
    rest = centroid(points.to(torch.float64), mask).to(points.dtype)[:, None]
    return points - (rest if mask is None else torch.where(mask[..., None], rest, 0.0))


def spread(
    points: Tensor, mask: Tensor | None, normals: Tensor | None, most: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """At most ``most`` points of each cloud, spread evenly over the order they come in.

    Which they are depends on the numbers of points alone, so a cloud that is turned keeps the same.
    """
    if points.shape[1] <= most:
        return points, mask, normals
    place = torch.arange(most, device=points.device)
    if mask is None:
        index = place * points.shape[1] // most
        return points[:, index], None, None if normals is None else normals[:, index]
    counts = mask.sum(dim=1, keepdim=True)
    real_first = (~mask).byte().argsort(dim=1, stable=True)
    index = real_first.gather(1, torch.where(counts > most, place * counts // most, place))
    rows = index[..., None].expand(-1, -1, 3)
    normals = None if normals is None else normals.gather(1, rows)
    return points.gather(1, rows), place < counts, normals


def collinear(points: Tensor) -> Tensor:
    """Whether all points of a centred cloud lie on one line through the origin, ``(B,)`` bool."""
    tolerance = DEGENERATE_TOLERANCE[points.dtype]
    exact = points.detach().to(torch.float64)  # squares of what float32 tells apart
    moments = portable.eigvalsh(exact.mT @ exact)
    return moments[..., 1] <= tolerance**2 * moments[..., 2]


def radius(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Largest distance of a real point from the origin, ``(B,)``."""
    if mask is not None:
        points = torch.where(mask[..., None], points, points.new_zeros(()))
    # no square of a coordinate is taken before the largest is 1
    largest = points.detach().abs().amax(dim=(1, 2))
    unit = points / torch.where(largest > 0, largest, torch.ones_like(largest))[:, None, None]
    return largest * unit.norm(dim=-1).amax(dim=1)


def unit_ball(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divide each centred cloud by its radius.

    A cloud at the origin stays there; padded points come out there.
    """
    if mask is not None:
        points = torch.where(mask[..., None], points, points.new_zeros(()))
    size = radius(points)[:, None, None]
    return points / torch.where(size > 0, size, torch.ones_like(size))


def unit_scale(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divide each cloud by the root mean square distance of its points from the origin.

    Sizes from the smallest normal number to the largest are brought to 1, since no square of a
    coordinate is taken before the largest is 1. A cloud at the origin stays there; padded points
    come out there.
    """
    if mask is not None:
        points = torch.where(mask[..., None], points, points.new_zeros(()))
    largest = points.detach().abs().amax(dim=(1, 2), keepdim=True)
    points = points / torch.where(largest > 0, largest, torch.ones_like(largest))
    _bound_gradient(points, largest)
    power = centroid(points.square(), mask).sum(dim=-1)[:, None, None]
    return points * torch.where(power > 0, power, torch.ones_like(power)).rsqrt()


def _bound_gradient(quotient: Tensor, divisor: Tensor) -> None:
    """Keep what flows back through a quotient within the range of its dtype.

    Of an almost symmetric cloud of size 1e-27 it would leave it, and infinities of both signs, once
    summed, are NaN.
    """
    if not quotient.requires_grad or torch.compiler.is_compiling():
        return
    most = divisor * (torch.finfo(quotient.dtype).max / max(1, quotient.shape[1:].numel()))
    quotient.register_hook(lambda gradient: gradient.clamp(-most, most))


def normalise(points: Tensor, mask: Tensor | None = None) -> Tensor:
    """Centre each cloud and divide by its largest norm, as the field does (unit ball).

    Padded points come out at the origin.
    """
    return unit_ball(points - centroid(points, mask)[:, None], mask)
