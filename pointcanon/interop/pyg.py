"""A transform of PyG pipelines."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch_geometric.transforms import BaseTransform

from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.interop.clouds import batch
from pointcanon.interop.padding import unpad
from pointcanon.model import Canonicalized

__all__ = ["Canonicalize"]


class Canonicalize(BaseTransform):
    """Turns clouds into their canonical pose: ``pos``, and ``normal`` where there is one.

    For a ``Data``, in a data set, or for a ``Batch`` as a loader gives it, where a learned
    canonicalizer is faster. It adds ``rotation (B, 3, 3)`` and ``centre (B, 3)`` of the heaviest
    frame, which batch as ``y`` does: ``pos_before = pos @ rotation.mT + centre``. Put it before
    transforms that derive coordinates from positions, such as ``Cartesian``.

    Args:
        canonicalizer: Or a model that has one. A copy of it is used, in evaluation mode.
    """

    def __init__(self, canonicalizer: Canonicalizer | Canonicalized) -> None:
        if isinstance(canonicalizer, Canonicalized):
            canonicalizer = canonicalizer.canonicalizer
        self.canonicalizer = deepcopy(canonicalizer).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, data: Any) -> Any:
        """The same ``Data`` or ``Batch``, in canonical pose.

        Raises:
            InputError: On clouds that cannot be used, as :func:`~pointcanon.interop.batch` and
                canonicalizers.
        """
        clouds = batch(data)
        frames = self.canonicalizer(*clouds).best()
        data.pos = torch.cat(unpad(frames.apply(clouds.points)[:, 0], clouds.mask))
        if clouds.normals is not None:
            data.normal = torch.cat(unpad(frames.apply_vectors(clouds.normals)[:, 0], clouds.mask))
        data.rotation, data.centre = frames.rotations[:, 0], frames.centre
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.canonicalizer).__name__})"
