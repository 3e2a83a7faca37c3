"""A frame from vectors that turn with the cloud, as equivariant networks give them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from pointcanon import clouds, rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Orthonormalise", "vector_frames", "vectors_needed"]

Orthonormalise = Literal["gram-schmidt", "svd", "matrix-fisher"]
"""How vectors that turn with the cloud are made a rotation."""


def vectors_needed(orthonormalise: Orthonormalise) -> int:
    """How many vectors make a rotation in that way.

    Raises:
        InputError: If there is no such way.
    """
    if orthonormalise not in get_args(Orthonormalise):
        raise InputError(
            f"unknown orthonormalisation {orthonormalise!r}; choose one of: "
            f"{', '.join(get_args(Orthonormalise))}"
        )
    return 2 if orthonormalise == "gram-schmidt" else 3


def vector_frames(
    vectors: Tensor, size: Tensor, points: Tensor, orthonormalise: Orthonormalise
) -> Frames:
    """One frame of each cloud, about the origin.

    Args:
        vectors: ``(B, 3, C)``, in the columns, with C as :func:`vectors_needed` says.
        size: ``(B,)``, of what the vectors are the mean of: by it they are told apart from zero.
        points: ``(B, N, 3)`` of the clouds, centred.
        orthonormalise: How they are made a rotation.
    """
    if orthonormalise == "gram-schmidt":
        frame = rotations.gram_schmidt(vectors)
    else:
        frame = rotations.svd_project(vectors)
    vanishing = rotations.near_singular(vectors, size, vectors.shape[-1])
    raw = vectors[:, None]
    return Frames.of(
        frame,
        degenerate=vanishing | clouds.collinear(points),
        raw=raw,
        fisher=raw if orthonormalise == "matrix-fisher" else None,
    )
