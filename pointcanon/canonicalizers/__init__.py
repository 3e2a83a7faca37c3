"""Canonicalizers: modules from clouds to frames, one method a file.

A new one is a file in this folder and a line in ``CANONICALIZERS``.
"""

from __future__ import annotations

from pointcanon import checkpoint
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.contrastive import Contrastive
from pointcanon.canonicalizers.for_group import ForGroup
from pointcanon.canonicalizers.identity import Identity
from pointcanon.canonicalizers.manhattan import Manhattan
from pointcanon.canonicalizers.optimized import Optimized
from pointcanon.canonicalizers.orbit import Orbit
from pointcanon.canonicalizers.pca import PCA
from pointcanon.canonicalizers.pretrained import PRETRAINED, load
from pointcanon.canonicalizers.search import Search
from pointcanon.canonicalizers.steerable import Steerable
from pointcanon.canonicalizers.union import Union
from pointcanon.canonicalizers.vector_neuron import VectorNeuron

__all__ = [
    "CANONICALIZERS",
    "PCA",
    "PRETRAINED",
    "Canonicalizer",
    "Contrastive",
    "ForGroup",
    "Identity",
    "Manhattan",
    "Optimized",
    "Orbit",
    "Search",
    "Steerable",
    "Union",
    "VectorNeuron",
    "load",
]

CANONICALIZERS: dict[str, type[Canonicalizer]] = {
    cls.__name__: cls
    for cls in (
        Identity,
        PCA,
        Manhattan,
        VectorNeuron,
        Steerable,
        Union,
        Orbit,
        Optimized,
        Contrastive,
        Search,
        ForGroup,
    )
}
"""Every canonicalizer by its name in recipes and checkpoints."""

checkpoint.register(*CANONICALIZERS.values())
