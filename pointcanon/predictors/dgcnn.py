"""DGCNN for classification (Wang et al. 2019, arXiv 1801.07829)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.errors import InputError
from pointcanon.layers.pointwise import BatchNorm, masked_max, masked_mean
from pointcanon.neighbors import knn
from pointcanon.predictors.base import Predictor, check_sizes

__all__ = ["DGCNN"]

WIDTHS = (64, 64, 128, 256)
"""Of the edge convolutions, as in the paper."""

SLOPE = 0.2
"""Of every leaky ReLU."""


class Layer(nn.Module):
    """Linear, batch normalisation over real rows, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels, bias=bias)
        self.norm = BatchNorm(out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(..., C)`` to ``(..., D)``; ``mask`` is broadcastable to ``(...)``."""
        return F.leaky_relu(self.norm(self.linear(features), mask), SLOPE)


class EdgeConv(nn.Module):
    """A layer on the edges to the k nearest neighbours in feature space, and a maximum over them.

    Args:
        in_channels: C.
        out_channels: D.
        k: Neighbours of a point, itself among them.
    """

    def __init__(self, in_channels: int, out_channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.layer = Layer(2 * in_channels, out_channels)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` to ``(B, N, D)``."""
        edges = edge_features(features, knn(features.detach(), self.k, mask))
        edge_mask = None if mask is None else mask[..., None]
        return self.layer(edges, edge_mask).amax(dim=2)


def edge_features(features: Tensor, neighbors: Tensor) -> Tensor:
    """``[x_j - x_i, x_i]`` for each edge.

    Args:
        features: ``(B, N, C)``.
        neighbors: ``(B, N, k)`` int64 indices of points.

    Returns:
        ``(B, N, k, 2C)``.
    """
    clouds, points, k = neighbors.shape
    flat = neighbors.reshape(clouds, points * k, 1).expand(-1, -1, features.shape[-1])
    ends = features.gather(1, flat).unflatten(1, (points, k))
    centres = features[:, :, None].expand_as(ends)
    return torch.cat((ends - centres, centres), dim=-1)


class DGCNN(Predictor):
    """Four edge convolutions, each on neighbours in the features of the one before.

    Args:
        num_classes: Number of logits.
        k: Neighbours of a point, itself among them; a smaller cloud is refused with an InputError.
        embedding: Width of the layer that is pooled, by maximum and by mean.
        dropout: After the first and the second layer of the head.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(
        self, num_classes: int, *, k: int = 20, embedding: int = 1024, dropout: float = 0.5
    ) -> None:
        super().__init__()
        check_sizes(dropout, num_classes=num_classes, k=k, embedding=embedding)
        self.num_classes, self.k = num_classes, k
        self.embedding, self.dropout = embedding, dropout
        self.edges = nn.ModuleList(EdgeConv(*pair, k) for pair in pairwise((3, *WIDTHS)))
        self.shared = Layer(sum(WIDTHS), embedding)
        self.head = nn.Sequential(
            Layer(2 * embedding, 512),
            nn.Dropout(dropout),
            Layer(512, 256, bias=True),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_classes": self.num_classes,
            "k": self.k,
            "embedding": self.embedding,
            "dropout": self.dropout,
        }

    def predict(self, points: Tensor, mask: Tensor | None) -> Tensor:
        self._check_count(points, mask)
        features, levels = points, []
        for convolution in self.edges:
            features = convolution(features, mask)
            levels.append(features)
        shared = self.shared(torch.cat(levels, dim=-1), mask)
        return self.head(torch.cat((masked_max(shared, mask), masked_mean(shared, mask)), dim=-1))

    def _check_count(self, points: Tensor, mask: Tensor | None) -> None:
        smallest = points.shape[1]
        if mask is not None and len(mask) and not torch.compiler.is_compiling():
            smallest = int(mask.sum(dim=1).min())
        if smallest < self.k:
            raise InputError(
                f"DGCNN looks at k = {self.k} neighbours, but a cloud has {smallest} points: "
                "sample more points, or build the network with a smaller k"
            )
