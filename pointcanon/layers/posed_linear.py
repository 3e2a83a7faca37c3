"""A linear layer that looks at clouds in many poses without posing them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pointcanon.layers.local_moments import symmetric_square

__all__ = ["PosedLinear"]


class PosedLinear(nn.Module):
    """A linear layer over what is known of each point, for any pose of the cloud.

    Vectors and tensors turn with the cloud. Instead of turning those of N points for each of K
    poses, this turns the few weights: ``(v R) w = v (R w)``.

    Args:
        vectors: Given of each point, 3 numbers each.
        tensors: Given of each point after the vectors, symmetric, 6 numbers each
            (:func:`~pointcanon.layers.local_moments.symmetric`).
        outputs: Features of each point.
    """

    def __init__(self, vectors: int, tensors: int, outputs: int) -> None:
        super().__init__()
        self.vectors, self.tensors = vectors, tensors
        self.linear = nn.Linear(3 * vectors + 6 * tensors, outputs)

    def turned(self, rotations: Tensor) -> Tensor:
        """The weights ``(..., inputs, outputs)`` with which points as they are given have the
        features that they have in the poses ``x @ R``, for rotations R ``(..., 3, 3)``."""
        vectors, tensors = self.linear.weight.split((3 * self.vectors, 6 * self.tensors), dim=1)
        parts = [(rotations, vectors, 3)]
        if self.tensors:
            parts.append((symmetric_square(rotations), tensors, 6))
        turned = []
        for turns, weights, size in parts:
            # (outputs, v * size) -> (size, v * outputs): one product turns them all
            rows = weights.unflatten(1, (-1, size)).permute(2, 1, 0).flatten(1)
            both = (turns @ rows).unflatten(-1, (-1, len(weights)))
            turned.append(both.transpose(-3, -2).flatten(-3, -2))
        return torch.cat(turned, dim=-2)
