"""Frames known up to a finite group: every element of it is a candidate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pointcanon import rotations
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.vector_neuron import VectorNeuron
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Orbit"]


class Orbit(Canonicalizer):
    """The frames of another canonicalizer times the elements of a finite group.

    Many objects nearly look the same after a quarter or half turn, and a single learned frame then
    lands between their poses. Learned modulo the group instead (``losses.quotient_loss``, or the
    prior loss, which asks one candidate only to be near), a frame R is right up to a group element,
    and every ``R Q`` is a candidate (Scarvelis et al. 2025, arXiv 2410.02101). All count alike:
    ``Optimized(Orbit(...))`` has an ordinary network tell which is right.

    As ``R(g x) Q = g R(x) Q``, the candidates are equivariant one by one, in a fixed order.
    ``Orbit(PCA(1), "O")`` has the frames of ``PCA(24)``.

    Args:
        canonicalizer: Of the frames R; the default is ``VectorNeuron(orthonormalise="svd")``, as
            the rotation nearest to ``F Q`` is the one nearest to F, times Q.
        group: ``"C<n>"`` (cyclic, about ``axis``), ``"T"`` (12), ``"O"`` (24) or ``"I"`` (60).
        axis: Three numbers, of a cyclic group, in canonical coordinates; the default is z.

    Raises:
        InputError: For any other group, an axis for a group that is not cyclic, or an axis that
            is not three numbers or has no direction.
    """

    elements: Tensor

    def __init__(
        self,
        canonicalizer: Canonicalizer | None = None,
        group: str = "O",
        axis: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if canonicalizer is None:
            canonicalizer = VectorNeuron(orthonormalise="svd")
        self.canonicalizer = canonicalizer
        self.group = group
        self.axis = None if axis is None else tuple(axis)
        if self.axis is not None and len(self.axis) != 3:
            raise InputError(f"axis is {self.axis}; give three numbers")
        direction = None if axis is None else torch.tensor(self.axis, dtype=torch.float64)
        elements = rotations.group(group, torch.float64, axis=direction)
        self.register_buffer("elements", elements, persistent=False)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"canonicalizer": self.canonicalizer, "group": self.group, "axis": self.axis}

    @property
    def candidate_group(self) -> Tensor:
        return self.elements

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        frames = self.canonicalizer.propose(points, mask, normals)
        elements = self.elements.to(frames.rotations)
        count = points.shape[0] * frames.count
        return frames.compose(Frames.of(elements.expand(count, *elements.shape)))
