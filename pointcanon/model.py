"""A predictor behind a canonicalizer, as one module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pointcanon import checkpoint
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.coordinates import CoordinateFrame
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Canonicalized", "Prediction", "load"]


class Prediction(NamedTuple):
    """What :meth:`Canonicalized.predict` answers for B clouds and C classes.

    Attributes:
        labels: ``(B,)`` int64, the most probable class.
        probabilities: ``(B, C)``.
        rotation: ``(B, 3, 3)``, the heaviest frame; it maps canonical to input.
        confidence: ``(B,)`` in [0, 1], the probability of the label.
        degenerate: ``(B,)`` bool, True where the cloud does not determine a frame.
    """

    labels: Tensor
    probabilities: Tensor
    rotation: Tensor
    confidence: Tensor
    degenerate: Tensor


class Canonicalized(nn.Module):
    """Pose each cloud by the canonicalizer's frames, predict, vote over the frames.

    Args:
        predictor: Any module from clouds ``(B, N, 3)`` to outputs ``(B, C)``. ``mask`` and
            ``normals`` are handed on, as keywords, when they are given.
        canonicalizer: Proposes the frames.
        vote: How the outputs of several frames are joined: ``"probabilities"`` takes outputs as
            logits and mixes the probabilities; ``"mean"`` averages the outputs as they are (frame
            averaging). With one frame both leave the output as it is.
    """

    def __init__(
        self,
        predictor: nn.Module,
        canonicalizer: Canonicalizer,
        vote: Literal["probabilities", "mean"] = "probabilities",
    ) -> None:
        super().__init__()
        if vote not in ("probabilities", "mean"):
            raise InputError(f"vote is {vote!r}; choose 'probabilities' or 'mean'")
        self.predictor = predictor
        self.canonicalizer = canonicalizer
        self.vote: Literal["probabilities", "mean"] = vote
        self.coordinate_frame: str | None = getattr(predictor, "coordinate_frame", None)
        self.classes: Sequence[str] | None = getattr(predictor, "classes", None)
        self.normalisation: str | None = getattr(predictor, "normalisation", None)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "predictor": self.predictor,
            "canonicalizer": self.canonicalizer,
            "vote": self.vote,
        }

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Tensor:
        """Outputs ``(B, C)`` of clouds ``(B, N, 3)``, invariant to their rotation.

        Raises:
            InputError: On clouds that no answer can be given for.
        """
        return self.predict_in(self.canonicalizer(points, mask, normals), points, mask, normals)

    def predict_in(
        self,
        frames: Frames,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
    ) -> Tensor:
        """Outputs ``(B, C)`` of clouds in frames that are already known."""
        extras: dict[str, Tensor] = {}
        if mask is not None:
            extras["mask"] = mask.repeat_interleave(frames.count, dim=0)
        if normals is not None:
            extras["normals"] = frames.apply_vectors(normals).flatten(0, 1)
        outputs = self.predictor(frames.apply(points).flatten(0, 1), **extras)
        outputs = outputs.unflatten(0, (len(points), frames.count))
        return frames.vote_logits(outputs) if self.vote == "probabilities" else frames.vote(outputs)

    @torch.no_grad()
    def predict(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Prediction:
        """Labels, probabilities and poses of clouds ``(B, N, 3)``, in evaluation mode.

        Raises:
            InputError: On clouds that no answer can be given for.
        """
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            frames = self.canonicalizer(points, mask, normals)
            logits = self.predict_in(frames, points, mask, normals)
        finally:
            for module, training in modes.items():
                module.training = training
        probabilities = logits.float().softmax(dim=-1)
        confidence, labels = probabilities.max(dim=-1)
        rotation = frames.best().rotations[:, 0]
        return Prediction(labels, probabilities, rotation, confidence, frames.degenerate)

    def save(self, path: str | Path, **card: Any) -> None:
        """Write weights and card to ``path`` (safetensors), atomically.

        Args:
            path: Ends in ``.safetensors``.
            **card: Further fields of :class:`pointcanon.checkpoint.Card`, such as ``metrics``.
        """
        card.setdefault("coordinate_frame", _name(self.coordinate_frame))
        card.setdefault("classes", None if self.classes is None else tuple(self.classes))
        card.setdefault("normalisation", self.normalisation)
        checkpoint.save(path, self, checkpoint.Card(kind="canonicalized", **card))


def load(path: str | Path) -> Canonicalized:
    """A model that :meth:`Canonicalized.save` wrote; the file says all that is needed.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds something else.
    """
    from pointcanon import canonicalizers, predictors  # noqa: F401  (they register their classes)

    module, card = checkpoint.load(path)
    if not isinstance(module, Canonicalized):
        raise checkpoint.CheckpointError(
            f"{path} holds a {card.kind}, not a canonicalized model; "
            "load it with pointcanon.predictors.load"
        )
    for part in (module, module.predictor):  # the predictor may be put behind another frame
        part.coordinate_frame = card.coordinate_frame  # type: ignore[assignment]
        part.classes = card.classes  # type: ignore[assignment]
        part.normalisation = card.normalisation  # type: ignore[assignment]
    return module


def _name(frame: str | CoordinateFrame | None) -> str | None:
    return None if frame is None else str(frame)


checkpoint.register(Canonicalized)
