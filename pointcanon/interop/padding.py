"""Clouds of different sizes in one tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pointcanon.errors import InputError

__all__ = ["Clouds", "pad", "unpad"]


class Clouds(NamedTuple):
    """A batch as the library takes it: ``model(*clouds)``.

    Attributes:
        points: ``(B, N, 3)``, N being the largest size; padded points lie at the origin.
        mask: ``(B, N)`` bool, True = a real point; None if all clouds are of one size.
        normals: ``(B, N, 3)``, or None unless every cloud has normals.
    """

    points: Tensor
    mask: Tensor | None = None
    normals: Tensor | None = None


def pad(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """One tensor of clouds ``(N_i, ...)`` that may differ in size.

    Args:
        clouds: At least one, alike in all but size; any values of points, such as labels, too.

    Returns:
        ``(B, N, ...)``, zero in padded rows, and the mask ``(B, N)`` bool, True = a real point, or
        None where nothing is padded.

    Raises:
        InputError: If there is none, or dtypes, devices or channels differ.
    """
    if not len(clouds):
        raise InputError("there are no clouds; give at least one")
    first = clouds[0]
    for i, cloud in enumerate(clouds):
        kind = (cloud.dtype, cloud.device, tuple(cloud.shape[1:]))
        expected = (first.dtype, first.device, tuple(first.shape[1:]))
        if kind != expected:
            told, hoped = (" ".join(map(str, words)) for words in (kind, expected))
            raise InputError(f"cloud {i} is {told}, cloud 0 {hoped}; make them alike")
    sizes = torch.tensor([len(cloud) for cloud in clouds], device=first.device)
    return dense(torch.cat(list(clouds)), sizes)


def dense(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """:func:`pad` of clouds that follow one another in ``rows (sum of sizes, ...)``."""
    longest = int(sizes.max())
    if bool((sizes == longest).all()):
        return rows.unflatten(0, (len(sizes), longest)), None
    mask = torch.arange(longest, device=sizes.device) < sizes[:, None]
    padded = rows.new_zeros(len(sizes), longest, *rows.shape[1:])
    return padded.masked_scatter(mask.view(*mask.shape, *(1,) * (rows.ndim - 1)), rows), mask


def unpad(values: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The real rows ``(N_i, ...)`` of each cloud of ``values (B, N, ...)``, in their order."""
    if mask is None:
        return list(values)
    return [value[real] for value, real in zip(values, mask, strict=True)]
