"""DGCNN for classification and for part segmentation (Wang et al. 2019, arXiv 1801.07829)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.errors import InputError
from pointcanon.layers.edge_conv import SLOPE, DeepEdgeConv, EdgeConv, Layer
from pointcanon.layers.pointwise import PooledLinear, linear_of_parts, masked_max, masked_mean
from pointcanon.layers.shared_batch import Dropout
from pointcanon.portable import full_precision
from pointcanon.predictors.base import PartPredictor, Predictor, check_sizes

__all__ = ["DGCNN", "DGCNNParts"]

WIDTHS = (64, 64, 128, 256)
"""Of the edge convolutions for classification, as in the paper."""

PART_WIDTH = 64
"""Of every edge convolution for part segmentation, and of the code of the category."""


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
            Dropout(dropout),
            Layer(512, 256, bias=True),
            Dropout(dropout),
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

    def predict(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Tensor:
        _check_count(points, mask, self.k)
        shared = self.shared(_levels(self.edges, points, mask), mask)
        return self.head(torch.cat((masked_max(shared, mask), masked_mean(shared, mask)), dim=-1))


class AlignmentNet(nn.Module):
    """A matrix for each cloud, from an edge convolution; the identity at initialisation.

    Args:
        k: Neighbours of a point, itself among them.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.edges = DeepEdgeConv(3, 64, 128, k)
        self.pool = PooledLinear(128, 1024, bias=False)
        self.head = nn.Sequential(Layer(1024, 512), Layer(512, 256))
        self.matrix = nn.Linear(256, 9)
        nn.init.zeros_(self.matrix.weight)
        with torch.no_grad():
            self.matrix.bias.copy_(torch.eye(3).flatten())

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform ``(B, N, 3)``."""
        code = F.leaky_relu(self.pool(self.edges(points, mask), mask), SLOPE)
        matrix = self.matrix(self.head(code)).unflatten(-1, (3, 3))
        with full_precision(points):  # neighbours hang on these points
            return points @ matrix.to(points.dtype)


class DGCNNParts(PartPredictor):
    """Aligned points, three edge convolutions, and their features beside a code of the cloud.

    Args:
        num_parts: Number of logits of each point.
        num_categories: Length of the category one-hot; 0 for a network without it.
        k: Neighbours of a point, itself among them; a smaller cloud is refused with an InputError.
        embedding: Width of the layer that is pooled into the code of the cloud.
        dropout: After the first and the second layer of the head.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(
        self,
        num_parts: int,
        *,
        num_categories: int = 16,
        k: int = 40,
        embedding: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        check_sizes(
            dropout, num_parts=num_parts, k=k, embedding=embedding, num_categories=num_categories
        )
        self.num_parts, self.num_categories, self.k = num_parts, num_categories, k
        self.embedding, self.dropout = embedding, dropout
        width = PART_WIDTH
        self.align = AlignmentNet(k)
        self.edges = nn.ModuleList(
            [
                DeepEdgeConv(3, width, width, k),
                DeepEdgeConv(width, width, width, k),
                EdgeConv(width, width, k),
            ]
        )
        self.pool = PooledLinear(3 * width, embedding, bias=False)
        self.category = Layer(num_categories, width) if num_categories else None
        self.joint = Layer(embedding + (width if num_categories else 0) + 3 * width, 256)
        self.head = nn.ModuleList([Layer(256, 256), Layer(256, 128)])
        self.drop = Dropout(dropout)
        self.logits = nn.Linear(128, num_parts, bias=False)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_parts": self.num_parts,
            "num_categories": self.num_categories,
            "k": self.k,
            "embedding": self.embedding,
            "dropout": self.dropout,
        }

    def predict(
        self,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
    ) -> Tensor:
        _check_count(points, mask, self.k)
        local = _levels(self.edges, self.align(points, mask), mask)
        code = F.leaky_relu(self.pool(local, mask), SLOPE)
        if self.category is not None:
            code = torch.cat((code, self.category(category)), dim=-1)
        joint = linear_of_parts(self.joint.linear, code[:, None], local)
        features = self.joint.activate(joint, mask)
        for layer in self.head:
            features = layer(self.drop(features), mask)
        return self.logits(features)


def _levels(edges: nn.ModuleList, features: Tensor, mask: Tensor | None) -> Tensor:
    """What each edge convolution makes of the one before, side by side."""
    levels = []
    for convolution in edges:
        features = convolution(features, mask)
        levels.append(features)
    return torch.cat(levels, dim=-1)


def _check_count(points: Tensor, mask: Tensor | None, k: int) -> None:
    smallest = points.shape[1]
    if mask is not None and len(mask) and not torch.compiler.is_compiling():
        smallest = int(mask.sum(dim=1).min())
    if smallest < k:
        raise InputError(
            f"DGCNN looks at k = {k} neighbours, but a cloud has {smallest} points: "
            "sample more points, or build the network with a smaller k"
        )
