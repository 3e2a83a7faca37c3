"""Canonicalizers: modules from clouds to frames, one method a file.

A new one is a file in this folder and a line in ``CANONICALIZERS``.
"""

from __future__ import annotations

from pointcanon import checkpoint
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.identity import Identity
from pointcanon.canonicalizers.optimized import Optimized
from pointcanon.canonicalizers.pca import PCA
from pointcanon.canonicalizers.vector_neuron import VectorNeuron

__all__ = ["CANONICALIZERS", "PCA", "Canonicalizer", "Identity", "Optimized", "VectorNeuron"]

CANONICALIZERS: dict[str, type[Canonicalizer]] = {
    cls.__name__: cls for cls in (Identity, PCA, VectorNeuron, Optimized)
}
"""Every canonicalizer by its name in recipes and checkpoints."""

checkpoint.register(*CANONICALIZERS.values())
