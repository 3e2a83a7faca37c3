"""DGCNN of antao97/dgcnn.pytorch, and the classifier of WangYueFt/dgcnn, which has the same layout.

Trained on the h5 files of ModelNet40 and of ShapeNet-Part. The number of neighbours leaves no trace
in the weights: it is 20 for classification on 1,024 points and 40 for parts, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pointcanon.classes import (
    MODELNET40_CLASSES,
    SHAPENET_PART_CATEGORIES,
    SHAPENET_PART_PARTS,
)
from pointcanon.predictors.dgcnn import DGCNN, DGCNNParts
from pointcanon.predictors.public.layout import Layout, Origin, numbered, width

__all__ = ["DGCNN_CLASSIFIER", "DGCNN_PARTS"]

SHAPENET_PART = Origin("y-up", "unit-ball", SHAPENET_PART_CATEGORIES, SHAPENET_PART_PARTS)
ONE_CATEGORY = Origin("y-up", "unit-ball", SHAPENET_PART_CATEGORIES)


def _layer(ours: str, theirs: str) -> dict[str, str]:
    """A sequence of convolution, normalisation and activation."""
    return {f"{ours}.linear": f"{theirs}.0", f"{ours}.norm": f"{theirs}.1"}


def _classifier(state: Mapping[str, Tensor]) -> DGCNN:
    return DGCNN(width(state, "linear3"), embedding=width(state, "conv5.0"))


def _parts(state: Mapping[str, Tensor]) -> DGCNNParts:
    return DGCNNParts(
        width(state, "conv11"),
        num_categories=width(state, "conv7.0", 1),
        embedding=width(state, "conv6.0"),
    )


DGCNN_CLASSIFIER = Layout(
    name="DGCNN of antao97/dgcnn.pytorch and WangYueFt/dgcnn",
    modules={
        **_layer("edges.0.layer", "conv1"),
        **_layer("edges.1.layer", "conv2"),
        **_layer("edges.2.layer", "conv3"),
        **_layer("edges.3.layer", "conv4"),
        **_layer("shared", "conv5"),
        "head.0.linear": "linear1",
        "head.0.norm": "bn6",
        "head.2.linear": "linear2",
        "head.2.norm": "bn7",
        "head.4": "linear3",
    },
    build=_classifier,
    origins={40: Origin("y-up-mirrored", "unit-ball", MODELNET40_CLASSES)},
    twins={f"bn{i}": f"conv{i}.1" for i in range(1, 6)},
)

DGCNN_PARTS = Layout(
    name="DGCNN part segmentation of antao97/dgcnn.pytorch",
    modules={
        **_layer("align.edges.layers.0", "transform_net.conv1"),
        **_layer("align.edges.layers.1", "transform_net.conv2"),
        **_layer("align.pool", "transform_net.conv3"),
        **numbered("align.head.{}.linear", "transform_net.linear{}", 2),
        **numbered("align.head.{}.norm", "transform_net.bn{}", 2, shift=3),
        "align.matrix": "transform_net.transform",
        **_layer("edges.0.layers.0", "conv1"),
        **_layer("edges.0.layers.1", "conv2"),
        **_layer("edges.1.layers.0", "conv3"),
        **_layer("edges.1.layers.1", "conv4"),
        **_layer("edges.2.layer", "conv5"),
        **_layer("pool", "conv6"),
        **_layer("category", "conv7"),
        **_layer("joint", "conv8"),
        **_layer("head.0", "conv9"),
        **_layer("head.1", "conv10"),
        "logits": "conv11",
    },
    build=_parts,
    # all parts, or those of one category, of which there are 2 to 6
    origins={50: SHAPENET_PART, **dict.fromkeys(range(2, 7), ONE_CATEGORY)},
    twins={
        **{f"bn{i}": f"conv{i}.1" for i in range(1, 11)},
        **{f"transform_net.bn{i}": f"transform_net.conv{i}.1" for i in (1, 2)},
    },
)
