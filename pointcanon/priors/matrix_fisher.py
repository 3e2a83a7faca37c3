"""The matrix Fisher distribution: a pose and how sure it is, in one matrix without constraints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import roma
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pointcanon.errors import InputError
from pointcanon.priors.base import Prior
from pointcanon.rotations import product, svd_project

__all__ = ["MatrixFisher", "confidence", "log_normaliser"]

NODES = 256
"""Of the quadrature: its error is that of rounding at singular values up to 1e8."""


class MatrixFisher(Prior):
    """``p(R) = exp(tr F^T R) / c(F)``, for any matrix F.

    With the proper singular value decomposition ``F = U diag(s) V^T`` (U and V rotations,
    ``s1 >= s2 >= |s3|``) the mode is ``U V^T``, and turns about the i-th column of U away from it
    are concentrated by ``s_j + s_k`` (Downs 1972; Lee 2018, arXiv 1710.03746).

    Args:
        parameter: F, ``(3, 3)``: a tensor, or rows of numbers.

    Attributes:
        parameter: F in float64.
        mode: ``(3, 3)`` the most likely rotation.
        mean: ``(3, 3)`` the expectation of R, which is the gradient of log c.

    Raises:
        InputError: If it is not a finite matrix of that shape.
    """

    def __init__(self, parameter: Tensor | Sequence[Sequence[float]]) -> None:
        parameter = torch.as_tensor(parameter, dtype=torch.float64, device="cpu")
        if parameter.shape != (3, 3) or not bool(parameter.isfinite().all()):
            raise InputError(f"parameter must be a finite matrix of shape (3, 3), got {parameter}")
        self.parameter = parameter
        self.mode = svd_project(parameter)
        log_scale, self.mean = _log_normaliser_and_mean(parameter)
        self.log_normaliser = float(log_scale)

    def log_prob(self, rotation: Tensor) -> Tensor:
        linear = (self.parameter.to(rotation) * rotation).sum(dim=(-1, -2))
        return linear - self.log_normaliser

    def sample(
        self,
        *size: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        left, s, right = _proper_svd(self.parameter)
        # of the quaternion (x, y, z, w) of U^T R V: tr F^T R = s1 + s2 + s3 - sum of these times
        # the squares of its entries, which is a Bingham distribution on the 3-sphere
        slopes = torch.stack((*(2 * (s.sum() - s)), s.new_zeros(())))
        quaternions = _sample_bingham(slopes, math.prod(size), generator, device)
        turns = roma.unitquat_to_rotmat(quaternions).view(*size, 3, 3)
        return (left.to(turns) @ turns @ right.to(turns)).to(dtype)


def log_normaliser(parameter: Tensor) -> Tensor:
    """Log of ``c(F)``, the integral of ``exp(tr F^T R)`` over the Haar measure of mass one.

    One integral over the height of a body axis, of exponentially scaled Bessel functions (Lee 2018,
    arXiv 1710.03746; Mohlin et al. 2020, arXiv 2006.09740). Its gradient is the expectation of R by
    the same integral, not the derivative of an SVD, so it is finite at equal singular values and
    F = 0 too. Differentiable once.

    Args:
        parameter: F, ``(..., 3, 3)``, such as a network answers; worked out in float64.

    Returns:
        ``(...)`` in the dtype of ``parameter``.

    Raises:
        InputError: If the shape is not ``(..., 3, 3)``.
    """
    _check_shape(parameter)
    answer = _LogNormaliser.apply(parameter)
    assert isinstance(answer, Tensor)
    return answer


def confidence(parameter: Tensor) -> Tensor:
    """How sure a matrix Fisher distribution is of its mode, from 0 to 1.

    Turns by t about the least certain axis through the mode have density ``exp(k cos t)`` with
    ``k = s2 + s3``; this is their mean cosine ``I1(k) / I0(k)``: 0 where a whole circle of poses is
    equally likely, 0.45 at k = 1, 0.95 at 10 (an error of about 18 degrees).

    Args:
        parameter: F, ``(..., 3, 3)``, such as ``frames.fisher`` of a network trained with
            :func:`pointcanon.losses.matrix_fisher_loss`.

    Returns:
        ``(...)`` in the dtype of ``parameter``, without gradient.

    Raises:
        InputError: If the shape is not ``(..., 3, 3)``.
    """
    _check_shape(parameter)
    _, s, _ = _proper_svd(parameter.detach().to(torch.float64))
    certainty = (s[..., 1] + s[..., 2]).clamp_min(0)
    return (torch.special.i1e(certainty) / torch.special.i0e(certainty)).to(parameter.dtype)


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        log_scale, mean = _log_normaliser_and_mean(parameter.to(torch.float64))
        ctx.save_for_backward(mean.to(parameter.dtype))
        return log_scale.to(parameter.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (mean,) = ctx.saved_tensors
        return gradient[..., None, None] * mean


def _log_normaliser_and_mean(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """``log c(F)`` and the expectation of R, of ``(..., 3, 3)`` in float64."""
    left, s, right = _proper_svd(parameter)
    # R'_kk of R' = U^T R V has a density on [-1, 1]. In y, with R'_kk = tanh(y / 2), whatever scale
    # it varies on near either end becomes a step of unit width: equal steps converge geometrically
    reach = 36 + s.abs().sum(dim=-1, keepdim=True).log1p()
    y = torch.linspace(-1, 1, NODES, dtype=s.dtype, device=s.device) * reach
    above, below = y.sigmoid(), (-y).sigmoid()  # (1 + R'_kk) / 2 and (1 - R'_kk) / 2
    masses, heights = [], []
    for i, j, k in ((1, 2, 0), (0, 2, 1), (0, 1, 2)):
        first, second, third = s[..., i, None], s[..., j, None], s[..., k, None]
        density = (
            torch.special.i0e((first - second) * below)
            * torch.special.i0e((first + second) * above)
            * torch.exp(-2 * (second + third) * below)
            * (above * below)
        )
        mass = density.sum(dim=-1)
        masses.append(mass)
        heights.append((density * (above - below)).sum(dim=-1) / mass)
    step = 2 * reach[..., 0] / (NODES - 1)
    mean = product(left * torch.stack(heights, dim=-1)[..., None, :], right)
    return s.sum(dim=-1) + (step * masses[2]).log(), mean


def _proper_svd(parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations U and V^T and ``s1 >= s2 >= |s3|`` with ``U diag(s) V^T`` the matrix."""
    left, s, right = torch.linalg.svd(parameter)
    ones = torch.ones_like(s[..., :2])
    left_sign = torch.cat((ones, torch.linalg.det(left).sign()[..., None]), dim=-1)
    right_sign = torch.cat((ones, torch.linalg.det(right).sign()[..., None]), dim=-1)
    return left * left_sign[..., None, :], s * left_sign * right_sign, right * right_sign[..., None]


def _sample_bingham(
    slopes: Tensor,
    count: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Unit vectors ``(count, 4)`` of density proportional to ``exp(-sum_i slopes_i x_i^2)``.

    Exact: rejection from an angular central Gaussian, which accepts about half or more (Kent,
    Ganeiber & Mardia 2013, arXiv 1310.8110). ``slopes (4,)`` are at least 0, and one of them is 0.
    """
    # the best envelope has sum_i 1 / (b + 2 slopes_i) = 1; any b in [1, 4] would be exact
    low, high = 1.0, 4.0
    for _ in range(50):
        b = (low + high) / 2
        low, high = (b, high) if float((1 / (b + 2 * slopes)).sum()) > 1 else (low, b)
    log_bound = (b - 4) / 2 + 2 * math.log(4 / b)
    slopes = slopes.to(device)
    spread = (1 + 2 * slopes / b).rsqrt()
    drawn: list[Tensor] = []
    missing = count
    options: Any = {"generator": generator, "dtype": slopes.dtype, "device": device}
    while missing > 0:
        candidates = torch.randn(2 * missing + 8, 4, **options) * spread
        candidates = candidates / candidates.norm(dim=-1, keepdim=True)
        exponent = (slopes * candidates.square()).sum(dim=-1)
        log_ratio = 2 * (2 * exponent / b).log1p() - exponent - log_bound
        level = torch.rand(len(candidates), **options)
        drawn.append(candidates[level.log() < log_ratio][:missing])
        missing -= len(drawn[-1])
    return torch.cat(drawn) if drawn else slopes.new_zeros(0, 4)


def _check_shape(parameter: Tensor) -> None:
    if parameter.shape[-2:] != (3, 3):
        raise InputError(f"parameter has shape {tuple(parameter.shape)}, expected (..., 3, 3)")
