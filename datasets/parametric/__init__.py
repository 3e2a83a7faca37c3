"""Parametric objects: ``primitives`` (surfaces), ``shapes`` (the categories), ``dataset``."""

from pointcanon.datasets.parametric.dataset import ParametricShapes
from pointcanon.datasets.parametric.shapes import CATEGORIES, Category, category

__all__ = ["CATEGORIES", "Category", "ParametricShapes", "category"]
