"""Set abstraction and feature propagation of PointNet++ (Qi et al. 2017, arXiv 1706.02413).

A shared layer on the members of a ball is linear in ``[x_j - x_i, f_j]``, so it is one product for
each point less one for each centre, gathered, instead of one for each member of each ball. In
evaluation normalisation is folded into the weights and balls pass through the layers a few at a
time, so that what lies between the layers is never stored whole and stays in cache. Propagation
multiplies the coarse features before it interpolates them. Results are those of the plain form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.layers.pointwise import SharedLayer, exact, shared_layers
from pointcanon.neighbors import ball_query, farthest_point_sample, knn
from pointcanon.portable import full_precision

__all__ = ["FeaturePropagation", "Scale", "SetAbstraction"]

CHUNK = 2**18
"""Elements of the widest intermediate of an evaluation on a CPU: 1 MiB of float32."""

DEVICE_CHUNK = 2**26


class Scale(NamedTuple):
    """One size of ball: ``radius``, at most ``members`` points, ``widths`` of the layers."""

    radius: float
    members: int
    widths: tuple[int, ...]


class Balls(nn.Module):
    """Shared layers on the members of the ball about each centre, and a maximum over them.

    Args:
        in_channels: C, of the features of a point beside its position.
        scale: Of the balls.
    """

    def __init__(self, in_channels: int, scale: Scale) -> None:
        super().__init__()
        self.radius, self.members, widths = scale
        sizes = (3 + in_channels, *widths)
        self.layers = nn.ModuleList(SharedLayer(*pair) for pair in pairwise(sizes))

    def forward(
        self, points: Tensor, features: Tensor | None, centres: Tensor, mask: Tensor | None
    ) -> Tensor:
        """``(B, N, 3)``, ``(B, N, C)`` and ``(B, M, 3)`` to ``(B, M, D)``."""
        members = flat_index(
            ball_query(points, self.radius, self.members, mask, centres), points.shape[1]
        )
        inputs = points if features is None else torch.cat((points, features), dim=-1)
        first, *others = shared_layers(self.layers)
        weight, bias = (first.linear.weight, first.linear.bias) if self.training else first.folded()
        with full_precision(points):
            # both are large where their difference is small: low precision would drown it
            ends = F.linear(inputs.to(weight.dtype), weight, bias).flatten(0, 1)
            starts = F.linear(centres.to(weight.dtype), weight[:, :3]).flatten(0, 1)
        if self.training:
            hidden = F.relu(first.norm(ends[members] - starts[:, None]))
            for layer in others:
                hidden = layer(hidden)
            pooled = hidden.amax(dim=1)
        else:
            pooled = evaluate(ends, starts, members, [layer.folded() for layer in others])
        return pooled.unflatten(0, centres.shape[:2])


def evaluate(
    ends: Tensor, starts: Tensor, members: Tensor, layers: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Layers with folded normalisation on balls, a few balls at a time.

    Args:
        ends: ``(B * N, C)``, the first layer of each point.
        starts: ``(B * M, C)``, what each centre takes off.
        members: ``(B * M, k)`` rows of ``ends``.
        layers: Weights and biases of the others, at least one.

    Returns:
        ``(B * M, D)``.
    """
    *middle, (last_weight, last_bias) = layers
    widest = max(ends.shape[1], *(len(bias) for _, bias in layers))
    budget = CHUNK if ends.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, budget // (widest * members.shape[1]))
    parts = [slice(None)]  # the compiler fuses; unrolled chunks would only make its work longer
    if not torch.compiler.is_compiling():
        parts = [slice(start, start + step) for start in range(0, len(members), step)]
    pooled = []
    for part in parts:
        balls = members[part]
        hidden = ends.index_select(0, balls.flatten()).unflatten(0, balls.shape)
        hidden = hidden.sub_(starts[part, None]).relu_().flatten(0, 1)
        for weight, bias in middle:
            hidden = F.linear(hidden, weight, bias).relu_()
        scores = (hidden @ last_weight.mT).unflatten(0, balls.shape)
        pooled.append(scores.amax(dim=1))  # a bias and a ReLU can wait until after the maximum
    return F.relu(torch.cat(pooled) + last_bias)


class SetAbstraction(nn.Module):
    """Choose centres, and describe the balls about them at one or several scales.

    The centres are the farthest points, begun with the one farthest from the centroid, so the
    choice is deterministic and independent of the order of the points; public code begins with a
    random one. Which points a full ball keeps does depend on their order
    (:func:`pointcanon.neighbors.ball_query`).

    Args:
        in_channels: C, of the features of a point beside its position.
        centres: M.
        scales: Of the balls.
    """

    def __init__(self, in_channels: int, centres: int, scales: Sequence[Scale]) -> None:
        super().__init__()
        self.centres = centres
        self.balls = nn.ModuleList(Balls(in_channels, scale) for scale in scales)

    def forward(
        self, points: Tensor, features: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Centres ``(B, M, 3)`` and their features ``(B, M, D)``, D the sum over the scales.

        Args:
            points: ``(B, N, 3)``.
            features: ``(B, N, C)``, or None for C = 0.
            mask: ``(B, N)`` bool, True = a real point. Centres are real always: a cloud of fewer
                than M points repeats some.
        """
        chosen = farthest_point_sample(points, self.centres, mask)
        centres = points.gather(1, chosen[..., None].expand(-1, -1, 3))
        described = [balls(points, features, centres, mask) for balls in self.balls]
        return centres, torch.cat(described, dim=-1)


class FeaturePropagation(nn.Module):
    """Bring features of coarse points to fine ones, and join them with what is known there.

    Args:
        fine_channels: C, of the features of the fine points.
        coarse_channels: D, of the features of the coarse points.
        widths: Of the shared layers.
    """

    def __init__(self, fine_channels: int, coarse_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.fine_channels = fine_channels
        sizes = (fine_channels + coarse_channels, *widths)
        self.layers = nn.ModuleList(SharedLayer(*pair) for pair in pairwise(sizes))

    def forward(
        self,
        fine: tuple[Tensor, Tensor],
        coarse: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, N, E)``, E the last of the widths.

        Args:
            fine: Points ``(B, N, 3)`` and their features ``(B, N, C)``.
            coarse: Points ``(B, M, 3)``, all real, and their features ``(B, M, D)``.
            mask: ``(B, N)`` bool, True = a real fine point.
        """
        (points, features), (coarse_points, coarse_features) = fine, coarse
        first, *others = shared_layers(self.layers)
        own, brought = first.linear.weight.split(
            [self.fine_channels, coarse_features.shape[-1]], dim=1
        )
        joined = F.linear(features, own, first.linear.bias) + interpolate(
            points, coarse_points, F.linear(coarse_features, brought)
        )
        joined = F.relu(first.norm(joined, mask))
        for layer in others:
            joined = layer(joined, mask)
        return joined


def interpolate(points: Tensor, coarse: Tensor, values: Tensor) -> Tensor:
    """Values ``(B, M, C)`` at coarse points, brought to points: ``(B, N, C)``.

    The mean over the three nearest coarse points, weighted by inverse squared distance. Values
    that all points share, M = 1, come back as they are, ``(B, 1, C)``.
    """
    if values.shape[1] == 1:
        return values
    nearest = flat_index(knn(coarse, 3, queries=points), coarse.shape[1])
    ends = coarse.flatten(0, 1)[nearest].unflatten(0, points.shape[:2])
    squared = exact(points[:, :, None] - ends).square().sum(dim=-1)  # float16 knows no 1e-6
    # in proportion to 1 / (squared + 1e-8); ONNX optimisers take a term of 1e-8 for none at all
    weights = 1 / (100 * squared + 1e-6)
    # of squares beyond the dtype all weights are 0, as those of padding may be
    whole = weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    weights = (weights / whole).to(values.dtype)
    flat = values.flatten(0, 1)
    total = sum(
        flat.index_select(0, column) * weight.flatten()[:, None]
        for column, weight in zip(nearest.unbind(-1), weights.unbind(-1), strict=True)
    )
    assert isinstance(total, Tensor)
    return total.unflatten(0, points.shape[:2])


def flat_index(index: Tensor, count: int) -> Tensor:
    """``(B, M, k)`` indices into N = ``count`` as ``(B * M, k)`` indices into B * N rows."""
    offsets = torch.arange(index.shape[0], device=index.device) * count
    return (index + offsets[:, None, None]).flatten(0, 1)
