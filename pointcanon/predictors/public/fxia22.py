"""PointNets of fxia22/pointnet.pytorch, trained on the categories of ShapeNet-Part.

It also reads ModelNet40 from .ply files of the user's own, in a frame of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pointcanon.classes import SHAPENET_PART_CATEGORIES
from pointcanon.predictors.pointnet import PointNet, PointNetParts
from pointcanon.predictors.public.layout import Layout, Origin, numbered, width

__all__ = ["CLASSIFIER_MODULES", "POINTNET", "POINTNET_PARTS", "alignment", "classifier"]

ONE_CATEGORY = Origin("y-up", "unit-ball", None)


def alignment(ours: str, theirs: str) -> dict[str, str]:
    """The modules of a T-net, there and in code derived from it."""
    return {
        **numbered(f"{ours}.shared.{{}}.linear", f"{theirs}.conv{{}}", 2),
        **numbered(f"{ours}.shared.{{}}.norm", f"{theirs}.bn{{}}", 2),
        f"{ours}.pool.linear": f"{theirs}.conv3",
        f"{ours}.pool.norm": f"{theirs}.bn3",
        **numbered(f"{ours}.head.{{}}.linear", f"{theirs}.fc{{}}", 2),
        **numbered(f"{ours}.head.{{}}.norm", f"{theirs}.bn{{}}", 2, shift=4),
        f"{ours}.matrix": f"{theirs}.fc3",
    }


FEATURE_MODULES = {
    **alignment("align.0", "feat.stn"),
    **alignment("align.1", "feat.fstn"),
    **numbered("shared.{}.linear", "feat.conv{}", 2),
    **numbered("shared.{}.norm", "feat.bn{}", 2),
    "pool.linear": "feat.conv3",
    "pool.norm": "feat.bn3",
}

CLASSIFIER_MODULES = {
    **FEATURE_MODULES,
    "head.0.linear": "fc1",
    "head.0.norm": "bn1",
    "head.2.linear": "fc2",
    "head.2.norm": "bn2",
    "head.4": "fc3",
}


def _features(state: Mapping[str, Tensor]) -> dict[str, object]:
    second = "feat.fstn.fc3.bias" in state
    return {
        "transforms": (0, 1) if second else (0,),
        "widths": (width(state, "feat.conv1"), width(state, "feat.conv2")),
        "embedding": width(state, "feat.conv3"),
    }


def classifier(state: Mapping[str, Tensor], dropout: float) -> PointNet:
    """Of this repository and of yanx27's, which may look at normals too."""
    return PointNet(
        width(state, "fc3"),
        normals=width(state, "feat.conv1", 1) == 6,
        rectified=False,
        dropout=dropout,
        **_features(state),  # type: ignore[arg-type]
    )


def _parts(state: Mapping[str, Tensor]) -> PointNetParts:
    return PointNetParts(
        width(state, "conv4"),
        num_categories=0,
        skip="aligned",
        head=[width(state, f"conv{i}") for i in (1, 2, 3)],
        **_features(state),  # type: ignore[arg-type]
    )


POINTNET = Layout(
    name="PointNet of fxia22/pointnet.pytorch",
    modules=CLASSIFIER_MODULES,
    build=lambda state: classifier(state, dropout=0.3),
    origins={16: Origin("y-up", "unit-ball", SHAPENET_PART_CATEGORIES)},
)

POINTNET_PARTS = Layout(
    name="part segmentation of fxia22/pointnet.pytorch",
    modules={
        **FEATURE_MODULES,
        **numbered("head.{}.linear", "conv{}", 3),
        **numbered("head.{}.norm", "bn{}", 3),
        "logits": "conv4",
    },
    build=_parts,
    # a network for each category, and categories have 2 to 6 parts
    origins=dict.fromkeys(range(2, 7), ONE_CATEGORY),
)
