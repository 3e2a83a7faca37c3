"""PointNet for classification (Qi et al. 2017, arXiv 1612.00593)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.errors import InputError
from pointcanon.layers.pointwise import BatchNorm, PooledLinear
from pointcanon.predictors.base import Predictor, check_sizes

__all__ = ["PointNet"]

ALIGNED_LAYER = 2
"""Shared layers before the feature transform, as in the paper."""


class Layer(nn.Module):
    """Linear, batch normalisation over real points, ReLU: the same for every point."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., C)`` to ``(..., D)``; ``mask`` is ``(...)``."""
        return F.relu(self.norm(self.linear(features), mask))


class AlignmentNet(nn.Module):
    """The T-net of PointNet: a matrix from a cloud, the identity at initialisation.

    Args:
        channels: C, of the points or features to transform.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.shared = nn.ModuleList([Layer(channels, 64), Layer(64, 128)])
        self.pool = PooledLinear(128, 1024)
        self.head = nn.Sequential(Layer(1024, 512), Layer(512, 256))
        self.matrix = nn.Linear(256, channels * channels)
        nn.init.zeros_(self.matrix.weight)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(channels).flatten())

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform ``(B, N, C)`` by the matrix found for each cloud."""
        code = features
        for layer in self.shared:
            code = layer(code, mask)
        matrix = self.matrix(self.head(F.relu(self.pool(code, mask))))
        return features @ matrix.unflatten(-1, (self.channels, self.channels))


class PointNet(Predictor):
    """Shared layers, a maximum over the points, a dense head.

    Args:
        num_classes: Number of logits.
        transforms: With the two T-nets of the paper, on the points and on the features of the
            second shared layer. The paper also regularises the second; here it only starts as the
            identity.
        widths: Of the shared layers before the last, at least two.
        embedding: Width of the last shared layer, which is pooled.
        dropout: Before the second and the last layer of the head.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        transforms: bool = False,
        widths: Sequence[int] = (64, 64, 64, 128),
        embedding: int = 1024,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        check_sizes(dropout, num_classes=num_classes, embedding=embedding)
        if len(widths) < ALIGNED_LAYER or min(widths) < 1:
            raise InputError(f"widths is {tuple(widths)}; give at least two, each at least 1")
        self.num_classes, self.transforms, self.widths = num_classes, transforms, tuple(widths)
        self.embedding, self.dropout = embedding, dropout
        self.align_points = AlignmentNet(3) if transforms else None
        self.align_features = AlignmentNet(widths[ALIGNED_LAYER - 1]) if transforms else None
        self.shared = nn.ModuleList(Layer(*pair) for pair in pairwise((3, *widths)))
        self.pool = PooledLinear(widths[-1], embedding)
        self.head = nn.Sequential(
            Layer(embedding, 512),
            nn.Dropout(dropout),
            Layer(512, 256),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_classes": self.num_classes,
            "transforms": self.transforms,
            "widths": self.widths,
            "embedding": self.embedding,
            "dropout": self.dropout,
        }

    def predict(self, points: Tensor, mask: Tensor | None) -> Tensor:
        features = points if self.align_points is None else self.align_points(points, mask)
        for depth, layer in enumerate(self.shared, start=1):
            features = layer(features, mask)
            if depth == ALIGNED_LAYER and self.align_features is not None:
                features = self.align_features(features, mask)
        return self.head(F.relu(self.pool(features, mask)))
