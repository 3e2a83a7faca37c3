"""Names of the classes of public data sets, in the order of their labels.

Data sets and the checkpoints that others published for them share these.
"""

from __future__ import annotations

__all__ = ["MODELNET10_CLASSES", "MODELNET40_CLASSES", "SHAPENET_PART_CATEGORIES"]

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
