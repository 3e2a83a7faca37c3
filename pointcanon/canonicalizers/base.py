"""What every canonicalizer is: a module from clouds to frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Canonicalizer"]


class Canonicalizer(nn.Module, ABC):
    """Base of all canonicalizers.

    A subclass implements :meth:`propose` for clouds that are already checked, centred, at least
    float32 and outside autocast, with padded points at the origin. It returns frames about the
    origin; :meth:`forward` moves them back to the centroid.
    """

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Frames:
        """Frames of each cloud.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point.
            normals: ``(B, N, 3)``, for canonicalizers that use them.

        Returns:
            Frames in float64 for float64 clouds, else float32.

        Raises:
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf.
        """
        clouds.check_cloud(points, mask, normals=normals)
        dtype = torch.promote_types(points.dtype, torch.float32)
        self._check_weights(dtype, points.device)
        points = points.to(dtype)
        if normals is not None:
            normals = normals.to(dtype)
        centre = clouds.centroid(points, mask)
        centred = points - centre[:, None]
        if mask is not None:
            centred = torch.where(mask[..., None], centred, centred.new_zeros(()))
            if normals is not None:
                normals = torch.where(mask[..., None], normals, normals.new_zeros(()))
        with torch.autocast(points.device.type, enabled=False):
            frames = self.propose(centred, mask, normals)
        stages = tuple(replace(stage, centre=centre) for stage in frames.stages)
        return replace(frames, centre=centre, stages=stages)

    def _check_weights(self, dtype: torch.dtype, device: torch.device) -> None:
        weight = next(self.parameters(), None)
        if weight is None:
            return
        if weight.dtype != dtype:
            raise InputError(
                f"frames of these points are computed in {dtype}, but the canonicalizer holds "
                f"{weight.dtype} weights; convert it with .to({dtype}), or the points"
            )
        if weight.device != device:
            raise InputError(f"points is on {device}, the canonicalizer on {weight.device}")

    @abstractmethod
    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        """Frames about the origin of checked, centred clouds ``(B, N, 3)``."""
