"""The candidates of several canonicalizers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Union"]


class Union(Canonicalizer):
    """All the candidates of several canonicalizers, each of which counts for the same share.

    Where one fails another may do: a scorer that chooses among them all (``Optimized``) needs only
    one that is right. A cloud is degenerate if it is so for any of them.

    Args:
        parts: At least one.

    Raises:
        InputError: If there is none.
    """

    def __init__(self, parts: Sequence[Canonicalizer]) -> None:
        super().__init__()
        if not parts:
            raise InputError("parts is empty; give at least one canonicalizer")
        self.parts = nn.ModuleList(parts)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {"parts": list(self.parts)}

    @property
    def candidate_group(self) -> Tensor:
        first, *others = [cast(Canonicalizer, part).candidate_group for part in self.parts]
        same = all(first.shape == other.shape and torch.equal(first, other) for other in others)
        return first if same else super().candidate_group

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        found = [part.propose(points, mask, normals) for part in self.parts]  # type: ignore[operator]
        return Frames.of(
            torch.cat([frames.rotations for frames in found], dim=1),
            torch.cat([frames.log_weights for frames in found], dim=1),
            degenerate=torch.stack([frames.degenerate for frames in found]).any(dim=0),
        )
