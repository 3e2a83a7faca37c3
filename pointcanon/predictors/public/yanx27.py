"""PointNet and PointNet++ of yanx27/Pointnet_Pointnet2_pytorch.

Classifiers are trained on ``modelnet40_normal_resampled``, part networks on
``shapenetcore_partanno_segmentation_benchmark_v0_normal``; both centre each cloud and divide it by
its largest norm.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pointcanon.classes import (
    MODELNET10_CLASSES,
    MODELNET40_CLASSES,
    SHAPENET_PART_CATEGORIES,
    SHAPENET_PART_PARTS,
)
from pointcanon.predictors.pointnet import PointNetParts
from pointcanon.predictors.pointnet2 import PointNet2, PointNet2Parts, Scales
from pointcanon.predictors.public import fxia22
from pointcanon.predictors.public.layout import Layout, Origin, numbered, width

__all__ = [
    "POINTNET",
    "POINTNET2_MSG",
    "POINTNET2_PARTS_MSG",
    "POINTNET2_PARTS_SSG",
    "POINTNET2_SSG",
    "POINTNET_PARTS",
]

REPOSITORY = "yanx27/Pointnet_Pointnet2_pytorch"

MODELNET = {
    40: Origin("y-up-mirrored", "unit-ball", MODELNET40_CLASSES),
    10: Origin("y-up-mirrored", "unit-ball", MODELNET10_CLASSES),
}

SHAPENET_PART = {50: Origin("y-up", "unit-ball", SHAPENET_PART_CATEGORIES, SHAPENET_PART_PARTS)}

# PointNet -----------------------------------------------------------------------------------------

POINTNET = Layout(
    name=f"PointNet of {REPOSITORY}",
    modules=fxia22.CLASSIFIER_MODULES,
    build=lambda state: fxia22.classifier(state, dropout=0.4),
    origins=MODELNET,
    wrapper="model_state_dict",  # the names are those of the code it derives from
)


def _pointnet_parts(state: Mapping[str, Tensor]) -> PointNetParts:
    *widths, embedding = (width(state, f"conv{i}") for i in range(1, 6))
    point = sum(widths) + 2 * embedding
    return PointNetParts(
        width(state, "convs4"),
        num_categories=width(state, "convs1", 1) - point,
        normals=width(state, "conv1", 1) == 6,
        widths=widths,
        embedding=embedding,
        head=[width(state, f"convs{i}") for i in (1, 2, 3)],
    )


POINTNET_PARTS = Layout(
    name=f"PointNet part segmentation of {REPOSITORY}",
    modules={
        **fxia22.alignment("align.0", "stn"),
        **fxia22.alignment("align.3", "fstn"),
        **numbered("shared.{}.linear", "conv{}", 4),
        **numbered("shared.{}.norm", "bn{}", 4),
        "pool.linear": "conv5",
        "pool.norm": "bn5",
        **numbered("head.{}.linear", "convs{}", 3),
        **numbered("head.{}.norm", "bns{}", 3),
        "logits": "convs4",
    },
    build=_pointnet_parts,
    origins=SHAPENET_PART,
)

# PointNet++ ---------------------------------------------------------------------------------------


def _shared(ours: str, convolutions: str, norms: str) -> dict[str, str]:
    """Up to three shared layers, numbered from 0 in both."""
    return {
        **numbered(f"{ours}.{{}}.linear", f"{convolutions}.{{}}", 3, shift=0),
        **numbered(f"{ours}.{{}}.norm", f"{norms}.{{}}", 3, shift=0),
    }


def _single_scale() -> dict[str, str]:
    modules: dict[str, str] = {}
    for level in range(2):
        theirs = f"sa{level + 1}"
        ours = f"pyramid.abstractions.{level}.balls.0.layers"
        modules |= _shared(ours, f"{theirs}.mlp_convs", f"{theirs}.mlp_bns")
    return modules


def _several_scales() -> dict[str, str]:
    modules: dict[str, str] = {}
    for level in range(2):
        for scale in range(3):
            theirs = f"sa{level + 1}"
            ours = f"pyramid.abstractions.{level}.balls.{scale}.layers"
            blocks = (f"{theirs}.{kind}_blocks.{scale}" for kind in ("conv", "bn"))
            modules |= _shared(ours, *blocks)
    return modules


WHOLE_MODULES = {
    **_shared("pyramid.shared", "sa3.mlp_convs", "sa3.mlp_bns"),
    "pyramid.pool.linear": "sa3.mlp_convs.2",
    "pyramid.pool.norm": "sa3.mlp_bns.2",
}

HEAD_MODULES = {
    "head.0.linear": "fc1",
    "head.0.norm": "bn1",
    "head.2.linear": "fc2",
    "head.2.norm": "bn2",
    "head.4": "fc3",
}

PART_MODULES = {
    **_shared("propagations.0.layers", "fp3.mlp_convs", "fp3.mlp_bns"),
    **_shared("propagations.1.layers", "fp2.mlp_convs", "fp2.mlp_bns"),
    **_shared("propagations.2.layers", "fp1.mlp_convs", "fp1.mlp_bns"),
    "head.linear": "conv1",
    "head.norm": "bn1",
    "logits": "conv2",
}


def positions_first(name: str, value: Tensor) -> Tensor:
    """With several scales, theirs puts relative positions behind the features of a point."""
    first = "conv_blocks" in name and name.endswith(".0.weight")
    return value.roll(3, dims=1) if first else value


def _first_layer(scales: Scales) -> str:
    return "sa1.mlp_convs.0" if scales == "ssg" else "sa1.conv_blocks.0.0"


def _classifier(state: Mapping[str, Tensor], scales: Scales) -> PointNet2:
    normals = width(state, _first_layer(scales), 1) == 6
    return PointNet2(width(state, "fc3"), scales=scales, normals=normals)


def _parts(state: Mapping[str, Tensor], scales: Scales) -> PointNet2Parts:
    channels = width(state, _first_layer(scales), 1) - 3
    coarse = width(state, "fp2.mlp_convs.1")
    return PointNet2Parts(
        width(state, "conv2"),
        num_categories=width(state, "fp1.mlp_convs.0", 1) - coarse - 3 - channels,
        scales=scales,
        normals=channels == 6,
    )


POINTNET2_SSG = Layout(
    name=f"PointNet++ (SSG) of {REPOSITORY}",
    modules=_single_scale() | WHOLE_MODULES | HEAD_MODULES,
    build=lambda state: _classifier(state, "ssg"),
    origins=MODELNET,
)

POINTNET2_MSG = Layout(
    name=f"PointNet++ (MSG) of {REPOSITORY}",
    modules=_several_scales() | WHOLE_MODULES | HEAD_MODULES,
    build=lambda state: _classifier(state, "msg"),
    origins=MODELNET,
    convert=positions_first,
)

POINTNET2_PARTS_SSG = Layout(
    name=f"PointNet++ (SSG) part segmentation of {REPOSITORY}",
    modules=_single_scale() | WHOLE_MODULES | PART_MODULES,
    build=lambda state: _parts(state, "ssg"),
    origins=SHAPENET_PART,
)

POINTNET2_PARTS_MSG = Layout(
    name=f"PointNet++ (MSG) part segmentation of {REPOSITORY}",
    modules=_several_scales() | WHOLE_MODULES | PART_MODULES,
    build=lambda state: _parts(state, "msg"),
    origins=SHAPENET_PART,
    convert=positions_first,
)
