"""PointNet of vinits5/learning3d, trained on the h5 files of ModelNet40."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pointcanon.classes import MODELNET40_CLASSES
from pointcanon.predictors.pointnet import PointNet
from pointcanon.predictors.public.layout import Layout, Origin, numbered, width

__all__ = ["POINTNET"]


def _pointnet(state: Mapping[str, Tensor]) -> PointNet:
    *widths, embedding = (width(state, f"feature_model.conv{i}") for i in range(1, 6))
    # dropout as published; it plays no part in the weights
    return PointNet(width(state, "linear3"), widths=widths, embedding=embedding, dropout=0.7)


POINTNET = Layout(
    name="PointNet of vinits5/learning3d",
    modules={
        **numbered("shared.{}.linear", "feature_model.conv{}", 4),
        **numbered("shared.{}.norm", "feature_model.bn{}", 4),
        "pool.linear": "feature_model.conv5",
        "pool.norm": "feature_model.bn5",
        "head.0.linear": "linear1",
        "head.0.norm": "bn1",
        "head.2.linear": "linear2",
        "head.2.norm": "bn2",
        "head.4": "linear3",
    },
    build=_pointnet,
    # the clouds of those files lie in the unit ball; they are taken as they are
    origins={40: Origin("y-up-mirrored", "unit-ball", MODELNET40_CLASSES)},
)
