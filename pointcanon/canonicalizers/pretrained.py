"""Trained canonicalizers that come with the package, and those in files."""

from __future__ import annotations

from pathlib import Path

from pointcanon import checkpoint
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import CheckpointError

__all__ = ["PRETRAINED", "load"]

_FOLDER = Path(__file__).parent / "weights"

PRETRAINED: dict[str, Path] = {path.stem: path for path in sorted(_FOLDER.glob("*.safetensors"))}
"""Trained canonicalizers by name. Taught without a predictor, each serves any that was trained
on the same clouds in the same pose."""


def load(name: str | Path) -> Canonicalizer:
    """A trained canonicalizer in eval mode: one of :data:`PRETRAINED`, or that of a checkpoint.

    Its ``coordinate_frame`` says in which frame canonical poses are upright and aligned, and its
    ``class_names`` which classes it tells apart, if it does.

    Raises:
        CheckpointError: If there is no such name or file, or the file holds no canonicalizer.
    """
    path = PRETRAINED.get(str(name), Path(name))
    if not path.exists():
        known = ", ".join(PRETRAINED)
        raise CheckpointError(f"{name} is neither a file nor a trained canonicalizer: {known}")
    module, card = checkpoint.load(path)
    canonicalizer = getattr(module, "canonicalizer", module)
    if not isinstance(canonicalizer, Canonicalizer):
        raise CheckpointError(
            f"{path} holds a {card.kind} and no canonicalizer; "
            f"load it with {checkpoint.KINDS[card.kind]}"
        )
    canonicalizer.read_card(card)
    return canonicalizer
