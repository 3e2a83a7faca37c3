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
    one that is right. A cloud is degenerate if it is so for any of them. Trained ones that tell the
    same classes apart have one opinion of them, the mean of their log-probabilities.

    Args:
        parts: At least one.

    Raises:
        InputError: If there is none, or they turn clouds upright in different coordinate frames.
    """

    def __init__(self, parts: Sequence[Canonicalizer]) -> None:
        super().__init__()
        if not parts:
            raise InputError("parts is empty; give at least one canonicalizer")
        self.parts = nn.ModuleList(parts)
        frames = {part.coordinate_frame for part in parts} - {None}
        if len(frames) > 1:
            known = " and ".join(sorted(map(str, frames)))
            raise InputError(f"parts turn clouds upright in the frames {known}; choose one of them")
        self.coordinate_frame = next(iter(frames), None)
        told = {getattr(part, "classes", None) for part in parts}
        names = {tuple(part.class_names) for part in parts if part.class_names is not None}
        self.classes = told.pop() if len(told) == 1 and len(names) <= 1 else None
        """How many classes all of them tell apart; None where they have no common opinion."""
        self.class_names = next(iter(names)) if names and self.classes is not None else None

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
        logits = [frames.class_logits for frames in found if frames.class_logits is not None]
        opinion = None
        if self.classes is not None:
            opinion = torch.stack([each.log_softmax(dim=-1) for each in logits]).mean(dim=0)
        return Frames.of(
            torch.cat([frames.rotations for frames in found], dim=1),
            torch.cat([frames.log_weights for frames in found], dim=1),
            degenerate=torch.stack([frames.degenerate for frames in found]).any(dim=0),
            class_logits=opinion,
        )
