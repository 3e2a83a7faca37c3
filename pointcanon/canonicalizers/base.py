"""What every canonicalizer is: a module from clouds to frames."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pointcanon import checkpoint, clouds
from pointcanon.errors import CheckpointError, InputError
from pointcanon.frames import Frames
from pointcanon.layers.constants import KeepsConstants
from pointcanon.portable import full_precision

__all__ = ["MOST_POINTS", "Canonicalizer"]

MOST_POINTS = 1 << 17
"""A frame is found by looking at this many points of a larger cloud: what more of them say is lost
in the noise, and their neighbourhoods take kilobytes each."""


class Canonicalizer(KeepsConstants, ABC):
    """Base of all canonicalizers.

    A subclass implements :meth:`propose` for clouds that are already checked, centred, at least
    float32 and outside autocast, with padded points at the origin. It returns frames about the
    origin; :meth:`forward` moves them back to the centroid.
    """

    coordinate_frame: str | None = None
    """Name of the frame in which canonical poses stand upright, of a trained one where known."""

    class_names: Sequence[str] | None = None
    """Of the classes in ``Frames.class_logits``, of a trained one where known."""

    def read_card(self, card: checkpoint.Card) -> None:
        """Take over what the card of a checkpoint says that poses and classes mean."""
        self.coordinate_frame = card.coordinate_frame
        learned = getattr(self, "classes", None)
        names = card.canonicalizer_classes or card.classes or ()
        self.class_names = names if len(names) == learned else None

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Frames:
        """Frames of each cloud.

        Of a cloud of more than ``MOST_POINTS`` the centre is that of all, the rotations are those
        of so many, spread evenly over their order: still exactly equivariant, but to the order of
        the points no longer indifferent.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point.
            normals: ``(B, N, 3)``, for canonicalizers that use them.

        Returns:
            Frames in float64 for float64 clouds, else float32.

        Raises:
            InputError: On a wrong type, shape, dtype or device, an empty cloud, NaN or inf.
        """
        clouds.check_cloud(points, mask, normals=normals)
        dtype = torch.promote_types(points.dtype, torch.float32)
        self._check_weights(dtype, points.device)
        points = points.to(dtype)
        centre = clouds.centroid(points, mask)
        points, mask, normals = clouds.spread(points, mask, normals, MOST_POINTS)
        if normals is not None:
            normals = normals.to(dtype)
        centred = points - centre[:, None]
        if mask is not None:
            centred = torch.where(mask[..., None], centred, centred.new_zeros(()))
            if normals is not None:
                normals = torch.where(mask[..., None], normals, normals.new_zeros(()))
        with full_precision(points):
            frames = self.propose(centred, mask, normals)
        stages = tuple(replace(stage, centre=centre) for stage in frames.stages)
        return replace(frames, centre=centre, stages=stages)

    def _check_weights(self, dtype: torch.dtype, device: torch.device) -> None:
        weight = next(self.parameters(), None)
        if weight is None:
            return
        if weight.dtype != dtype:
            points = ", or the points" if weight.dtype in (torch.float32, torch.float64) else ""
            raise InputError(
                f"frames of these points are computed in {dtype}, but the canonicalizer holds "
                f"{weight.dtype} weights; convert it with .to({dtype}){points}"
            )
        if weight.device != device:
            raise InputError(f"points is on {device}, the canonicalizer on {weight.device}")

    @property
    def candidate_group(self) -> Tensor:
        """``(G, 3, 3)``, the finite group in whose orbits the candidates come.

        Candidates ``c G`` to ``c G + G - 1`` are some frame times each element, in this order. By
        default it is the identity alone: nothing is known of how candidates hang together.
        """
        return torch.eye(3, dtype=torch.float64)[None]

    def serve(self, predictor: nn.Module) -> None:
        """Be put in front of a predictor: for those that ask it something, such as ``Search``.

        :class:`pointcanon.model.Canonicalized` tells every canonicalizer it holds, nested or not.
        """

    @property
    def options(self) -> dict[str, object]:
        """Its hyper-parameters, but for those that are modules, such as nested canonicalizers."""
        all_of_them: Mapping[str, object] = getattr(self, "hyperparameters", {})
        return {name: value for name, value in all_of_them.items() if not _holds_modules(value)}

    def with_options(self, /, **changes: Any) -> Canonicalizer:
        """A copy with other options and the same weights, frozen where they are, in the same mode.

        For options that can be changed without training, such as ``looks``, ``answers`` and
        ``gate`` of ``Optimized``. Nested canonicalizers stay as they are; nothing is shared.

        Args:
            **changes: Some of :attr:`options`.

        Raises:
            InputError: If there is no such option, it cannot have that value, or the weights do not
                fit any more.
        """
        name, known = type(self).__name__, self.options
        unknown = next((option for option in changes if option not in known), None)
        if unknown is not None:
            raise InputError(
                f"{name} has no option {unknown!r}; it has: {', '.join(known) or 'none'}"
            )
        original = copy.deepcopy(self)
        state = original.state_dict()
        changed = type(self)(**{**getattr(original, "hyperparameters", {}), **changes})
        try:
            checkpoint.check_fit(changed.state_dict(), state, f"{name} with {changes}")
        except CheckpointError as error:
            raise InputError(f"{error}; that takes a training of its own") from error
        changed.load_state_dict(state, assign=True)  # in the dtype that they have
        changed.coordinate_frame = self.coordinate_frame
        changed.class_names = self.class_names
        trainable = dict(self.named_parameters(remove_duplicate=False))
        for name, weight in changed.named_parameters(remove_duplicate=False):
            weight.requires_grad_(trainable[name].requires_grad)
        modes = {name: module.training for name, module in self.named_modules()}
        for name, module in changed.named_modules():
            module.training = modes.get(name, self.training)
        held = next(chain(self.parameters(), self.buffers()), torch.empty(0))
        return changed.to(held.device)

    @abstractmethod
    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        """Frames about the origin of checked, centred clouds ``(B, N, 3)``."""


def _holds_modules(value: object) -> bool:
    parts = value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(part, nn.Module) for part in parts)
