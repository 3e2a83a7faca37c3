"""PointNet++ for classification and part segmentation (Qi et al. 2017, arXiv 1706.02413).

Sizes are those of yanx27/Pointnet_Pointnet2_pytorch, at a single scale (SSG) and at several (MSG).
Radii are absolute: clouds come in the unit ball. Centres are chosen deterministically, where public
code begins with a random point (:class:`pointcanon.layers.set_abstraction.SetAbstraction`); balls
that are full keep the points of lowest index, as there, so answers depend a little on the order of
the points.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.errors import InputError
from pointcanon.layers.pointwise import PooledLinear, SharedLayer, class_head
from pointcanon.layers.set_abstraction import FeaturePropagation, Scale, SetAbstraction
from pointcanon.layers.shared_batch import Dropout
from pointcanon.predictors.base import PartPredictor, Predictor, check_sizes

__all__ = ["PointNet2", "PointNet2Parts"]

Scales = Literal["ssg", "msg"]


class Level(NamedTuple):
    """A set abstraction: how many centres, and the balls about each."""

    centres: int
    scales: tuple[Scale, ...]


SSG = (
    Level(512, (Scale(0.2, 32, (64, 64, 128)),)),
    Level(128, (Scale(0.4, 64, (128, 128, 256)),)),
)

CLASSIFICATION: dict[str, tuple[Level, ...]] = {
    "ssg": SSG,
    "msg": (
        Level(
            512,
            (
                Scale(0.1, 16, (32, 32, 64)),
                Scale(0.2, 32, (64, 64, 128)),
                Scale(0.4, 128, (64, 96, 128)),
            ),
        ),
        Level(
            128,
            (
                Scale(0.2, 32, (64, 64, 128)),
                Scale(0.4, 64, (128, 128, 256)),
                Scale(0.8, 128, (128, 128, 256)),
            ),
        ),
    ),
}

PARTS: dict[str, tuple[Level, ...]] = {
    "ssg": SSG,
    "msg": (
        Level(
            512,
            (
                Scale(0.1, 32, (32, 32, 64)),
                Scale(0.2, 64, (64, 64, 128)),
                Scale(0.4, 128, (64, 96, 128)),
            ),
        ),
        Level(128, (Scale(0.4, 64, (128, 128, 256)), Scale(0.8, 128, (128, 196, 256)))),
    ),
}

PROPAGATION = {
    "ssg": ((256, 256), (256, 128), (128, 128, 128)),
    "msg": ((256, 256), (256, 128), (128, 128)),
}
"""Widths of the layers that bring features back to the points, from the coarsest."""


class Pyramid(nn.Module):
    """Two set abstractions and a description of the whole cloud.

    Args:
        in_channels: Of the features of a point beside its position.
        levels: Of the set abstractions.
    """

    def __init__(self, in_channels: int, levels: tuple[Level, ...]) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.abstractions = nn.ModuleList()
        for level in levels:
            self.abstractions.append(SetAbstraction(in_channels, *level))
            in_channels = sum(scale.widths[-1] for scale in level.scales)
            self.widths.append(in_channels)
        self.shared = nn.ModuleList([SharedLayer(3 + in_channels, 256), SharedLayer(256, 512)])
        self.pool = PooledLinear(512, 1024)

    def forward(
        self, points: Tensor, features: Tensor | None, mask: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Points and features of each level, and the whole cloud, ``(B, 1024)``."""
        levels = []
        for abstraction in self.abstractions:
            points, features = abstraction(points, features, mask)
            levels.append((points, features))
            mask = None  # centres are real
        assert features is not None
        hidden = torch.cat((points, features), dim=-1)
        for layer in self.shared:
            hidden = layer(hidden)
        return levels, F.relu(self.pool(hidden))


def _check_scales(scales: str) -> None:
    if scales not in CLASSIFICATION:
        raise InputError(f"scales is {scales!r}; choose one of: {', '.join(CLASSIFICATION)}")


class PointNet2(Predictor):
    """Set abstraction twice, a PointNet on the centres, a dense head.

    Args:
        num_classes: Number of logits.
        scales: ``"ssg"``, balls of one size about each centre, or ``"msg"``, of three.
        normals: Look at normals beside positions.
        dropout: Before the second and the last layer of the head.

    Raises:
        InputError: On a number out of range, or unknown scales.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        scales: Scales = "ssg",
        normals: bool = False,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        check_sizes(dropout, num_classes=num_classes)
        _check_scales(scales)
        self.num_classes, self.normals = num_classes, normals
        self.scales: Scales = scales
        self.dropout = dropout
        self.pyramid = Pyramid(3 if normals else 0, CLASSIFICATION[scales])
        self.head = class_head(1024, num_classes, dropout)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_classes": self.num_classes,
            "scales": self.scales,
            "normals": self.normals,
            "dropout": self.dropout,
        }

    def predict(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Tensor:
        _, whole = self.pyramid(points, normals, mask)
        return self.head(whole)


class PointNet2Parts(PartPredictor):
    """PointNet++ for part segmentation: down to the whole cloud, and back to the points.

    Args:
        num_parts: Number of logits of a point.
        num_categories: Length of the category one-hot; 0 where the category is not given.
        scales: ``"ssg"``, balls of one size about each centre, or ``"msg"``, of several.
        normals: Look at normals beside positions.
        dropout: Before the last layer.

    Raises:
        InputError: On a number out of range, or unknown scales.
    """

    def __init__(
        self,
        num_parts: int,
        *,
        num_categories: int = 16,
        scales: Scales = "ssg",
        normals: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes(dropout, num_parts=num_parts, num_categories=num_categories)
        _check_scales(scales)
        self.num_parts, self.num_categories, self.normals = num_parts, num_categories, normals
        self.scales: Scales = scales
        self.dropout = dropout
        channels = 6 if normals else 3  # positions count as features here, too
        self.pyramid = Pyramid(channels, PARTS[scales])
        fine = [3 + channels + num_categories, *self.pyramid.widths]
        self.propagations = nn.ModuleList()
        coarse = 1024
        for known, widths in zip(reversed(fine), PROPAGATION[scales], strict=True):
            self.propagations.append(FeaturePropagation(known, coarse, widths))
            coarse = widths[-1]
        self.head = SharedLayer(coarse, 128)
        self.drop = Dropout(dropout)
        self.logits = nn.Linear(128, num_parts)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_parts": self.num_parts,
            "num_categories": self.num_categories,
            "scales": self.scales,
            "normals": self.normals,
            "dropout": self.dropout,
        }

    def predict(
        self,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
    ) -> Tensor:
        inputs = points if normals is None else torch.cat((points, normals), dim=-1)
        levels, whole = self.pyramid(points, inputs, mask)
        known = [points, inputs]
        if category is not None:
            known.insert(0, category[:, None].expand(-1, points.shape[1], -1))
        levels = [(points, torch.cat(known, dim=-1)), *levels]
        coarse = (points[:, :1], whole[:, None])  # the whole cloud is everywhere
        masks = (None, None, mask)
        for propagation, fine, real in zip(self.propagations, reversed(levels), masks, strict=True):
            coarse = (fine[0], propagation(fine, coarse, real))
        return self.logits(self.drop(self.head(coarse[1], mask)))
