"""Operations in the form that an exported program can hold: tensors, and loops of fixed length.

Outside of an export each is what torch does best. Inside, eigenvectors of small matrices come from
a fixed number of Jacobi sweeps, since ONNX has no operator for them, and a loop becomes a single
operator of the graph rather than as many copies of its body.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "atan2",
    "eigh",
    "eigvalsh",
    "exporting",
    "full_precision",
    "largest_eigenvector",
    "repeat",
]

SWEEPS = 6
"""Of the Jacobi method: it converges quadratically, and float64 needs five for 4 x 4 matrices."""

SQUARINGS = 30
"""Of :func:`largest_eigenvector`."""

Carry = tuple[Tensor, ...]


def exporting() -> bool:
    """Whether ``torch.export`` is tracing."""
    # torch.compiler.is_exporting came with torch 2.7
    return bool(getattr(torch.compiler, "is_exporting", lambda: False)())


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Where autocast has no say, on the tensor's device.

    A program knows no autocast, and a block that refuses it would become a graph of its own.
    """
    return nullcontext() if exporting() else torch.autocast(tensor.device.type, enabled=False)


def repeat(
    step: Callable[[Carry], tuple[Carry, Tensor]], carry: Carry, times: int
) -> tuple[Carry, Tensor]:
    """``step`` applied ``times`` times, at least once.

    Args:
        step: From what is carried to what is carried next, of the same shapes and types, and an
            output. It may not itself repeat something, nor call :func:`eigh`.
        carry: What the first step is given.
        times: A number, not a size that an exported program leaves open.

    Returns:
        What the last step leaves, and the outputs of all steps stacked first, ``(times, ...)``.
    """
    if not exporting():
        outputs = []
        for _ in range(times):
            carry, output = step(carry)
            outputs.append(output)
        return carry, torch.stack(outputs)
    from torch._higher_order_ops.scan import scan

    def body(carry: list[Tensor], _: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        following, output = step(tuple(carry))
        return _own(*following), _own(output)

    last, outputs = scan(body, _own(*carry), [torch.zeros(times)], dim=0)
    return tuple(last), outputs[0]


def _own(*tensors: Tensor) -> list[Tensor]:
    """In memory of their own, in one order: a loop must carry out what it carries in."""
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., n)``, ascending, and orthonormal eigenvectors ``(..., n, n)``, columns.

    Args:
        matrices: ``(..., n, n)``, symmetric; in an export n is 3 or 4, say, not hundreds.
    """
    if not exporting():
        return tuple(torch.linalg.eigh(matrices))
    return _jacobi(matrices)


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of ``(x, y)``; in an export to single precision, as onnxruntime knows no other."""
    return torch.atan2(y, x) if not exporting() else torch.atan2(y.float(), x.float()).to(y.dtype)


def largest_eigenvector(matrices: Tensor) -> Tensor:
    """A unit eigenvector ``(..., n)`` of the largest eigenvalue of symmetric ``(..., n, n)``.

    By squaring again and again, which is stable, needs no loop in an export, and tells eigenvalues
    apart that differ by 1e-8 of the largest.
    """
    if not exporting():
        return torch.linalg.eigh(matrices).eigenvectors[..., -1]
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    size = matrices.square().sum(dim=(-1, -2), keepdim=True).sqrt()
    power = matrices + torch.where(size > 0, size, torch.ones_like(size)) * eye
    for _ in range(SQUARINGS):
        power = power / power.abs().amax(dim=(-1, -2), keepdim=True)
        power = power @ power
    # all columns are multiples of it, the one with the largest diagonal entry the longest
    best = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None]
    column = power.gather(-1, best.expand(*matrices.shape[:-1], 1))[..., 0]
    return column / column.square().sum(dim=-1, keepdim=True).sqrt()


def eigvalsh(matrices: Tensor) -> Tensor:
    """Eigenvalues alone, ``(..., n)``, ascending."""
    return torch.linalg.eigvalsh(matrices) if not exporting() else _jacobi(matrices)[0]


def _jacobi(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """By cyclic sweeps, pairs that do not touch at once (Golub & Van Loan 2013, section 8.5)."""
    size = matrices.shape[-1]
    eye = torch.eye(size, dtype=matrices.dtype, device=matrices.device)

    def sweep(carry: Carry) -> tuple[Carry, Tensor]:
        matrices, vectors = carry
        for first, second in _ROUNDS[size]:
            turn = _plane_rotations(matrices, first, second, eye)
            matrices = turn.mT @ matrices @ turn
            vectors = vectors @ turn
        return (matrices, vectors), matrices.diagonal(dim1=-2, dim2=-1)

    (_, vectors), diagonals = repeat(sweep, (matrices, eye.expand_as(matrices)), SWEEPS)
    values, order = diagonals[-1].sort(dim=-1)
    return values, vectors.gather(-1, order[..., None, :].expand_as(vectors))


_ROUNDS = {
    3: (((0,), (1,)), ((0,), (2,)), ((1,), (2,))),
    4: (((0, 2), (1, 3)), ((0, 1), (2, 3)), ((0, 1), (3, 2))),
}
"""Rounds of a sweep, by size: rows p and columns q of the pairs whose entries are made zero."""


def _plane_rotations(
    matrices: Tensor, first: tuple[int, ...], second: tuple[int, ...], eye: Tensor
) -> Tensor:
    """The rotation in the planes of all pairs that makes their entries zero, ``(..., n, n)``."""
    p, q = (torch.stack([eye[axis] for axis in axes]) for axes in (first, second))
    across = (p @ matrices * q).sum(dim=-1)
    apart = ((q @ matrices * q) - (p @ matrices * p)).sum(dim=-1)
    # the smaller of the two angles, by a form that divides by nothing small
    side = torch.where(apart < 0, -2.0, 2.0) * across
    reach = apart.abs() + (apart.square() + side.square()).sqrt()
    tangent = side / torch.where(reach > 0, reach, torch.ones_like(reach))
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    planes = (p[:, :, None] * p[:, None] + q[:, :, None] * q[:, None]).flatten(1)
    swaps = (p[:, :, None] * q[:, None] - q[:, :, None] * p[:, None]).flatten(1)
    change = (cosine - 1) @ planes + sine @ swaps
    return eye + change.unflatten(-1, eye.shape)
