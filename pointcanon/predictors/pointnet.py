"""PointNet for classification and part segmentation (Qi et al. 2017, arXiv 1612.00593)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon.errors import InputError
from pointcanon.layers.pointwise import (
    PooledLinear,
    SharedLayer,
    class_head,
    linear_of_parts,
    masked_max,
    shared_layers,
)
from pointcanon.predictors.base import PartPredictor, Predictor, check_sizes

__all__ = ["PointNet", "PointNetParts"]

PAPER_TRANSFORMS = (0, 2)
"""Depths of the two T-nets in the paper: the points, and the features of the second layer."""


class AlignmentNet(nn.Module):
    """The T-net of PointNet: a matrix from a cloud, the identity at initialisation.

    Args:
        in_channels: C, of what the matrix is found from.
        channels: D <= C, the leading channels that are transformed; the others pass unchanged.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.shared = nn.ModuleList([SharedLayer(in_channels, 64), SharedLayer(64, 128)])
        self.pool = PooledLinear(128, 1024)
        self.head = nn.Sequential(SharedLayer(1024, 512), SharedLayer(512, 256))
        self.matrix = nn.Linear(256, channels * channels)
        nn.init.zeros_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform ``(B, N, C)`` by the matrix found for each cloud."""
        code = features
        for layer in self.shared:
            code = layer(code, mask)
        change = self.matrix(self.head(F.relu(self.pool(code, mask))))
        matrix = change.unflatten(-1, (self.channels, self.channels))
        matrix = matrix + torch.eye(self.channels).to(matrix)
        moved = features[..., : self.channels] @ matrix
        return torch.cat((moved, features[..., self.channels :]), dim=-1)


def alignments(in_channels: int, widths: Sequence[int], transforms: Sequence[int]) -> nn.ModuleDict:
    """T-nets by depth: 0 transforms the positions among the inputs, n the features of layer n."""
    nets = nn.ModuleDict()
    for depth in transforms:
        channels = widths[depth - 1] if depth else in_channels
        nets[str(depth)] = AlignmentNet(channels, channels if depth else 3)
    return nets


def point_features(
    inputs: Tensor, shared: nn.ModuleList, align: nn.ModuleDict, mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Features of each depth, the inputs first: as they are, and behind the T-net of that depth."""
    features, plain, aligned = inputs, [], []
    for depth in range(len(shared) + 1):
        if depth:
            features = shared[depth - 1](features, mask)
        plain.append(features)
        if str(depth) in align:
            features = align[str(depth)](features, mask)
        aligned.append(features)
    return plain, aligned


def with_normals(points: Tensor, normals: Tensor | None) -> Tensor:
    """``(B, N, 3)`` or, with normals, ``(B, N, 6)``."""
    return points if normals is None else torch.cat((points, normals), dim=-1)


def _check_layers(
    widths: Sequence[int], transforms: bool | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both as tuples, or an InputError."""
    if isinstance(transforms, bool):
        transforms = PAPER_TRANSFORMS if transforms else ()
    widths, transforms = tuple(widths), tuple(transforms)
    if not widths or min(widths) < 1:
        raise InputError(f"widths is {widths}; give at least one, each at least 1")
    if any(not 0 <= depth <= len(widths) for depth in transforms):
        raise InputError(
            f"transforms is {transforms}; with widths {widths} choose depths from 0 to "
            f"{len(widths)}"
        )
    if len(set(transforms)) < len(transforms):
        raise InputError(f"transforms is {transforms}; name each depth once")
    return widths, transforms


class PointNet(Predictor):
    """Shared layers, a maximum over the points, a dense head.

    The paper's network is ``transforms=True``. That of yanx27/Pointnet_Pointnet2_pytorch is
    ``transforms=(0, 1), widths=(64, 128), rectified=False, dropout=0.4``; fxia22/pointnet.pytorch
    has the same, with or without the second T-net and with dropout 0.3; vinits5/learning3d has the
    default, with dropout 0.7. In training the first two drop before the last normalisation only,
    and those that have a second T-net add a penalty for matrices that are not orthogonal; here it
    only starts as the identity.

    Args:
        num_classes: Number of logits.
        normals: Look at normals beside positions.
        transforms: Depths of the T-nets: 0 transforms the positions, n the features of layer n.
            True stands for those of the paper, (0, 2).
        widths: Of the shared layers before the last.
        embedding: Width of the last shared layer, which is pooled.
        rectified: Whether that layer ends in a ReLU.
        dropout: Before the second and the last layer of the head.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        normals: bool = False,
        transforms: bool | Sequence[int] = False,
        widths: Sequence[int] = (64, 64, 64, 128),
        embedding: int = 1024,
        rectified: bool = True,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        check_sizes(dropout, num_classes=num_classes, embedding=embedding)
        self.widths, self.transforms = _check_layers(widths, transforms)
        self.num_classes, self.normals, self.embedding = num_classes, normals, embedding
        self.rectified, self.dropout = rectified, dropout
        channels = 6 if normals else 3
        self.align = alignments(channels, self.widths, self.transforms)
        self.shared = nn.ModuleList(SharedLayer(*pair) for pair in pairwise((channels, *widths)))
        self.pool = PooledLinear(self.widths[-1], embedding)
        self.head = class_head(embedding, num_classes, dropout)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_classes": self.num_classes,
            "normals": self.normals,
            "transforms": self.transforms,
            "widths": self.widths,
            "embedding": self.embedding,
            "rectified": self.rectified,
            "dropout": self.dropout,
        }

    def predict(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Tensor:
        inputs = with_normals(points, normals)
        _, aligned = point_features(inputs, self.shared, self.align, mask)
        pooled = self.pool(aligned[-1], mask)
        return self.head(F.relu(pooled) if self.rectified else pooled)


class PointNetParts(PartPredictor):
    """PointNet for part segmentation: a dense head over what each point and its cloud look like.

    The default is the network of yanx27/Pointnet_Pointnet2_pytorch, after appendix C of the paper.
    That of fxia22/pointnet.pytorch, after its figure 2, is ``num_categories=0, transforms=(0, 1),
    widths=(64, 128), embedding=1024, skip="aligned", head=(512, 256, 128)``, with or without the
    second T-net.

    Args:
        num_parts: Number of logits of a point.
        num_categories: Length of the category one-hot; 0 where the category is not given.
        normals: Look at normals beside positions.
        transforms: Depths of the T-nets: 0 transforms the positions, n the features of layer n.
        widths: Of the shared layers before the last.
        embedding: Width of the last shared layer, which is pooled and has no ReLU.
        skip: What of each point joins the pooled features: ``"all"`` its features of every layer,
            the last included, or ``"aligned"`` only those behind the last T-net of the features
            (of the first layer where there is none).
        head: Widths of the dense layers before the logits.

    Raises:
        InputError: On a number out of range.
    """

    def __init__(
        self,
        num_parts: int,
        *,
        num_categories: int = 16,
        normals: bool = False,
        transforms: bool | Sequence[int] = (0, 3),
        widths: Sequence[int] = (64, 128, 128, 512),
        embedding: int = 2048,
        skip: Literal["all", "aligned"] = "all",
        head: Sequence[int] = (256, 256, 128),
    ) -> None:
        super().__init__()
        check_sizes(0, num_parts=num_parts, embedding=embedding, num_categories=num_categories)
        if skip not in ("all", "aligned"):
            raise InputError(f"skip is {skip!r}; choose 'all' or 'aligned'")
        if not head or min(head) < 1:
            raise InputError(f"head is {tuple(head)}; give at least one width, each at least 1")
        self.widths, self.transforms = _check_layers(widths, transforms)
        self.num_parts, self.num_categories, self.normals = num_parts, num_categories, normals
        self.embedding, self.skip, self.head_widths = embedding, skip, tuple(head)
        channels = 6 if normals else 3
        self.align = alignments(channels, self.widths, self.transforms)
        self.shared = nn.ModuleList(SharedLayer(*pair) for pair in pairwise((channels, *widths)))
        self.pool = PooledLinear(self.widths[-1], embedding)
        self.aligned_depth = max((1, *self.transforms))
        joined = sum(widths) + embedding if skip == "all" else widths[self.aligned_depth - 1]
        sizes = (embedding + num_categories + joined, *head)
        self.head = nn.ModuleList(SharedLayer(*pair) for pair in pairwise(sizes))
        self.logits = nn.Linear(head[-1], num_parts)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "num_parts": self.num_parts,
            "num_categories": self.num_categories,
            "normals": self.normals,
            "transforms": self.transforms,
            "widths": self.widths,
            "embedding": self.embedding,
            "skip": self.skip,
            "head": self.head_widths,
        }

    def predict(
        self,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
    ) -> Tensor:
        inputs = with_normals(points, normals)
        plain, aligned = point_features(inputs, self.shared, self.align, mask)
        if self.skip == "all":
            last = self.pool.norm(self.pool.linear(aligned[-1]), mask)
            pooled, own = masked_max(last, mask), [*plain[1:], last]
        else:
            pooled, own = self.pool(aligned[-1], mask), [aligned[self.aligned_depth]]
        cloud = [pooled] if category is None else [pooled, category]
        first, *others = shared_layers(self.head)
        joined = linear_of_parts(first.linear, *(part[:, None] for part in cloud), *own)
        features = F.relu(first.norm(joined, mask))
        for layer in others:
            features = layer(features, mask)
        return self.logits(features)
