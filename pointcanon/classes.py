"""Names of the classes and parts of public data sets, in the order of their labels.

Data sets and the checkpoints that others published for them share these.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "MODELNET10_CLASSES",
    "MODELNET40_CLASSES",
    "SHAPENET_PART_CATEGORIES",
    "SHAPENET_PART_PARTS",
    "part_ranges",
]

MODELNET40_CLASSES: tuple[str, ...] = (
    *("airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone"),
    *("cup", "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard"),
    *("lamp", "laptop", "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio"),
    *("range_hood", "sink", "sofa", "stairs", "stool", "table", "tent", "toilet", "tv_stand"),
    *("vase", "wardrobe", "xbox"),
)

MODELNET10_CLASSES: tuple[str, ...] = (
    *("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table"),
    "toilet",
)

SHAPENET_PART_CATEGORIES: tuple[str, ...] = (
    *("airplane", "bag", "cap", "car", "chair", "earphone", "guitar", "knife", "lamp", "laptop"),
    *("motorbike", "mug", "pistol", "rocket", "skateboard", "table"),
)

_PARTS_OF: dict[str, tuple[str, ...]] = {
    "airplane": ("body", "wing", "tail", "engine"),
    "bag": ("handle", "body"),
    "cap": ("peak", "panel"),
    "car": ("roof", "hood", "wheel", "body"),
    "chair": ("back", "seat", "leg", "arm"),
    "earphone": ("earphone", "headband", "microphone"),
    "guitar": ("head", "neck", "body"),
    "knife": ("blade", "handle"),
    "lamp": ("base", "shade", "ceiling", "tube"),
    "laptop": ("keyboard", "screen"),
    "motorbike": ("gas tank", "seat", "wheel", "handle", "light", "body"),
    "mug": ("handle", "body"),
    "pistol": ("barrel", "handle", "trigger"),
    "rocket": ("body", "fin", "nose"),
    "skateboard": ("wheel", "deck", "bearing"),
    "table": ("top", "leg", "drawer"),
}
"""The files of ShapeNet-Part number the parts and name none: the names are those in common use."""

SHAPENET_PART_PARTS: tuple[str, ...] = tuple(
    f"{category}/{part}" for category in SHAPENET_PART_CATEGORIES for part in _PARTS_OF[category]
)


def part_ranges(categories: Sequence[str], parts: Sequence[str]) -> tuple[range, ...]:
    """The parts of each category, where their names tell.

    Args:
        categories: Their names.
        parts: Names of all parts. Those of a category, ``"chair/leg"``, stand side by side.

    Returns:
        For each category its parts, or all of them where no name begins with the category's.
    """
    own = [[i for i, part in enumerate(parts) if part.startswith(f"{c}/")] for c in categories]
    return tuple(range(some[0], some[-1] + 1) if some else range(len(parts)) for some in own)


SCAN_OBJECT_NN_CLASSES: tuple[str, ...] = (
    *("bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed"),
    *("pillow", "sink", "sofa", "toilet"),
)
