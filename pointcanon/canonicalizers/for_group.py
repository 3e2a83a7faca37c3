"""Any canonicalizer, made to serve other motions than the rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pointcanon import clouds, rotations
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.rotations import product

__all__ = ["ForGroup", "chirality"]

ACHIRAL = 1e-7
"""A chirality below this is rounding: the cloud is its own mirror image."""


class ForGroup(Canonicalizer):
    """The frames of another canonicalizer, made equivariant to another group.

    Translations always belong to it; ``scale=True`` adds changes of size (similarity).

    * ``"SO3"``: the rotations, as every canonicalizer has them.
    * ``"SO2"``: the turns about one axis, for clouds that know where up is. Each frame becomes the
      turn about the axis nearest to it, the twist of its swing-twist decomposition. Seen in that
      pose a cloud stands as it came, only its heading is canonical. A frame R that turns the axis u
      upside down has no nearest turn, and the closer it comes to that the less it counts: its
      weight is multiplied by ``(1 + u.R u) / 2``.
    * ``"O3"``: rotations and reflections. A cloud and its mirror image are posed alike. Of x and -x
      the one of positive :func:`chirality` is shown to the canonicalizer, and where that is -x the
      frame is ``-R``: **its determinant is -1**, as that of an equivariant frame has to be.
    * ``"O2"``: turns about the axis and reflections in the planes that contain it. In place of -x
      stands the image in one such plane.

    A cloud that is its own mirror image has no O(3) frame of its own, only two that are equally
    good: it is flagged ``degenerate``. Either leads to the same canonical cloud, as then x and -x
    are turns of each other.

    Put it outermost: what is built on top of it gives back frames without a size.

    Args:
        canonicalizer: Equivariant to rotations.
        group: One of the above.
        axis: Of ``"SO2"`` and ``"O2"``, the up axis of the data: its index (0, 1, 2) or three
            numbers.
        scale: Whether the canonical cloud also has radius 1, as predictors are used to it;
            ``frames.scale`` is the radius it had.

    Raises:
        InputError: For any other group, or an axis that is missing, has no direction, or is given
            for a group without one.
    """

    mirror: Tensor

    def __init__(
        self,
        canonicalizer: Canonicalizer,
        group: Literal["SO3", "SO2", "O3", "O2"] = "SO3",
        axis: int | Sequence[float] | None = None,
        scale: bool = False,
    ) -> None:
        super().__init__()
        if group not in ("SO3", "SO2", "O3", "O2"):
            raise InputError(f"group is {group!r}; choose 'SO3', 'SO2', 'O3' or 'O2'")
        if group in ("SO3", "O3") and axis is not None:
            raise InputError(f"{group} has no single axis; leave axis out, or choose SO2 or O2")
        if group in ("SO2", "O2") and axis is None:
            raise InputError(
                f"{group} turns about an axis; give axis, the up axis of the data: 0, 1, 2 or "
                "three numbers"
            )
        self.canonicalizer = canonicalizer
        self.group: Literal["SO3", "SO2", "O3", "O2"] = group
        self.axis = axis if axis is None or isinstance(axis, int) else tuple(axis)
        self.scale = scale
        up = None if axis is None else rotations.direction(axis)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("mirror", _mirror(up), persistent=False)

    up: Tensor | None

    @property
    def hyperparameters(self) -> dict[str, object]:
        names = ("canonicalizer", "group", "axis", "scale")
        return {name: getattr(self, name) for name in names}

    @property
    def candidate_group(self) -> Tensor:
        # turns about the axis nearest to R Q are not those nearest to R, times Q
        return self.canonicalizer.candidate_group if self.up is None else super().candidate_group

    def forward(
        self, points: Tensor, mask: Tensor | None = None, normals: Tensor | None = None
    ) -> Frames:
        frames = super().forward(points, mask, normals)
        if not self.scale:
            return frames
        size = clouds.radius(points.to(frames.centre) - frames.centre[:, None], mask)
        return replace(frames, scale=torch.where(size > 0, size, torch.ones_like(size)))

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        shown, shown_normals, flips = points, normals, None
        if self.group in ("O3", "O2"):
            handed = chirality(points, self.up)
            eye = torch.eye(3, dtype=points.dtype, device=points.device)
            flips = torch.where((handed < 0)[:, None, None], self.mirror.to(points), eye)
            shown = product(points, flips)
            shown_normals = None if normals is None else product(normals, flips)
        frames = self._within(self.canonicalizer.propose(shown, mask, shown_normals), flips)
        if flips is not None:
            frames = replace(frames, degenerate=frames.degenerate | (handed.abs() <= ACHIRAL))
        return frames

    def _within(self, frames: Frames, flips: Tensor | None) -> Frames:
        """Frames of clouds that were shown flipped, brought into the group, stage by stage."""
        if self.group == "SO3":
            return frames
        stages = tuple(self._within(stage, flips) for stage in frames.stages)
        # what came before orthonormalisation speaks of rotations
        frames = replace(frames, raw=None, fisher=None, stages=stages)
        if self.up is not None:
            frames = _twists(frames, self.up.to(frames.rotations))
        if flips is None:
            return frames
        return replace(frames, rotations=product(flips[:, None], frames.rotations))


def chirality(points: Tensor, axis: Tensor | None = None) -> Tensor:
    """How left- or right-handed centred clouds are: turns keep it, reflections change its sign.

    ``sum_i |x_i| det(x_i, M x_i, M^2 x_i)`` with M the covariance, which is the third moment xyz
    along the principal axes times the gaps of the eigenvalues. With an ``axis`` only turns about it
    and reflections in planes that contain it count, and it takes the place of ``M^2 x_i``.

    Args:
        points: ``(B, N, 3)``, padded points at the origin.
        axis: ``(3,)``, of length 1.

    Returns:
        ``(B,)`` float64 in [-1, 1]; 0 for clouds that are their own mirror image.
    """
    exact = clouds.unit_scale(points.detach().to(torch.float64))
    covariance = exact.mT @ exact / exact.shape[1]
    once = exact @ covariance
    third = once @ covariance if axis is None else axis.to(exact).expand_as(exact)
    volumes = (torch.linalg.cross(exact, once) * third).sum(dim=-1)
    lengths = exact.norm(dim=-1)
    largest = (lengths.square() * once.norm(dim=-1) * third.norm(dim=-1)).sum(dim=1)
    return (lengths * volumes).sum(dim=1) / largest.clamp_min(torch.finfo(torch.float64).tiny)


def _mirror(axis: Tensor | None) -> Tensor:
    """The inversion, or the reflection in some plane that contains the axis, ``(3, 3)``."""
    eye = torch.eye(3, dtype=torch.float64)
    if axis is None:
        return -eye
    normal = rotations.direction(torch.linalg.cross(axis, eye[axis.abs().argmin()]))
    return eye - 2 * normal[:, None] * normal


def _twists(frames: Frames, axis: Tensor) -> Frames:
    """The turns about ``axis (3,)`` nearest to the frames, weighed by how near they are."""
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    along = axis[:, None] * axis
    across = eye - along
    quarter = torch.linalg.cross(axis.expand(3, 3), eye).mT  # v to axis x v
    cosine, sine = ((part * frames.rotations).sum(dim=(-1, -2)) for part in (across, quarter))
    squared = cosine.square() + sine.square()
    usable = squared > rotations.DEGENERATE_TOLERANCE[squared.dtype] ** 2
    size = torch.where(usable, squared, torch.ones_like(squared)).sqrt()
    cosine = torch.where(usable, cosine / size, torch.ones_like(size))[..., None, None]
    sine = torch.where(usable, sine / size, torch.zeros_like(size))[..., None, None]
    # size = 1 + u.R u for a rotation R
    share = torch.where(usable, size / 2, torch.full_like(size, torch.finfo(size.dtype).tiny))
    return replace(
        frames,
        rotations=along + cosine * across + sine * quarter,
        log_weights=(frames.log_weights + share.log()).log_softmax(dim=1),
        degenerate=frames.degenerate | ~usable.any(dim=1),
    )
