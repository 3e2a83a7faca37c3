"""The canonicalizer that leaves every cloud as it came: the bare predictor, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.frames import Frames

__all__ = ["Identity"]


class Identity(Canonicalizer):
    """The identity as the only frame. Not equivariant, and not centring: ``centre`` is zero."""

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {}

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Frames:
        frames = super().forward(points, mask, normals)
        # the predictor shall receive exactly what it would receive without a canonicalizer
        return Frames.of(frames.rotations, degenerate=frames.degenerate)

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        eye = torch.eye(3, dtype=points.dtype, device=points.device)
        return Frames.of(eye.expand(points.shape[0], 3, 3))
