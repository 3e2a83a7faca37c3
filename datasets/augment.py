"""The field's augmentations, as pure functions of a batch of clouds and a generator.

Each takes ``points (B, N, 3)``, returns new points of the same shape, dtype and device, and draws
only from the generator it is given, on that generator's device: a generator on the CPU gives the
same augmentation wherever the points are. Rotations are not here: they belong to the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pointcanon.clouds import normalise
from pointcanon.datasets.corruptions import SEVERITIES, corruption
from pointcanon.errors import InputError, UsageError

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "augmentation",
    "damage",
    "drop_points",
    "jitter",
    "scale",
    "shift",
]


def jitter(
    points: Tensor, generator: Generator, *, sigma: float = 0.01, clip: float = 0.05
) -> Tensor:
    """Add to every coordinate a normal deviate of deviation ``sigma``, cut off at ``±clip``."""
    noise = torch.randn(points.shape, generator=generator, device=generator.device)
    return points + (sigma * noise).clamp(-clip, clip).to(points)


def scale(
    points: Tensor,
    generator: Generator,
    *,
    low: float = 2 / 3,
    high: float = 3 / 2,
    isotropic: bool = False,
) -> Tensor:
    """Multiply each cloud by factors from U(low, high): one an axis, or one for all (isotropic).

    The axes are those of the points as given, so apply it before any rotation.
    """
    factors = _uniform((len(points), 1, 1 if isotropic else 3), low, high, generator)
    return points * factors.to(points)


def shift(points: Tensor, generator: Generator, *, limit: float = 0.2) -> Tensor:
    """Move each cloud by a vector with components from U(-limit, limit)."""
    return points + _uniform((len(points), 1, 3), -limit, limit, generator).to(points)


def drop_points(points: Tensor, generator: Generator, *, largest: float = 0.875) -> Tensor:
    """Drop each point with a probability drawn per cloud from U(0, largest).

    A dropped point becomes the cloud's first point, so that the shape of the batch remains.
    """
    ratio = _uniform((len(points), 1), 0.0, largest, generator)
    draw = torch.rand(points.shape[:2], generator=generator, device=generator.device)
    dropped = (draw < ratio).to(points.device)
    return torch.where(dropped[..., None], points[:, :1], points)


def damage(
    points: Tensor, generator: Generator, *, names: tuple[str, ...], share: float = 0.5
) -> Tensor:
    """Damage a batch, or leave it alone: one corruption of those named, at one severity, for all.

    Which, and how severe, is drawn for the batch, because it decides how many points are left
    (M differs from N); where a cloud is damaged is its own. Damaged clouds come centred and in the
    unit ball, as those of :class:`~pointcanon.datasets.corruptions.Corrupted` do.

    Args:
        points: ``(B, N, 3)``.
        generator: The only source of randomness.
        names: Of :data:`~pointcanon.datasets.corruptions.CORRUPTIONS`, at least one.
        share: Of the batches that are damaged.
    """
    drawn = torch.rand(3, generator=generator, device=generator.device).tolist()
    if drawn[0] >= share:
        return points
    name = names[int(drawn[1] * len(names))]
    severity = SEVERITIES[int(drawn[2] * len(SEVERITIES))]
    return normalise(corruption(name)(points, severity, generator))


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


@dataclass(frozen=True)
class Augmentation:
    """Damage, dropout, scale, shift and jitter, in that order; what is zero or one is left out.

    Attributes:
        corruptions: Names of those one of which damages a batch (:func:`damage`).
        corrupted: Share of the batches that are damaged, where corruptions are named.
        dropout: Largest share of points dropped, in [0, 1).
        scale: Bounds of the factors, (1, 1) for none.
        isotropic: Whether one factor serves all three axes.
        shift: Largest movement along an axis.
        jitter: Standard deviation of the noise on every coordinate.
        clip: Largest noise.
    """

    dropout: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    isotropic: bool = False
    shift: float = 0.0
    jitter: float = 0.0
    clip: float = 0.05
    corruptions: tuple[str, ...] = ()
    corrupted: float = 0.5

    def __post_init__(self) -> None:
        for name in self.corruptions:
            corruption(name)
        if not 0 <= self.corrupted <= 1:
            raise InputError(f"corrupted is {self.corrupted}; choose a share in [0, 1]")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; choose a share in [0, 1)")
        if not 0 < self.scale[0] <= self.scale[1] < float("inf"):
            raise InputError(f"scale is {self.scale}; choose bounds with 0 < low <= high")
        for name in ("shift", "jitter", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; choose a number from 0 up")

    def __call__(self, points: Tensor, generator: Generator) -> Tensor:
        """Augmented ``points (B, N, 3)``, of another N where they are damaged; the input is not
        changed."""
        if self.corruptions:
            names, share = self.corruptions, self.corrupted
            points = damage(points, generator, names=names, share=share)
        if self.dropout > 0:
            points = drop_points(points, generator, largest=self.dropout)
        if self.scale != (1.0, 1.0):
            low, high = self.scale
            points = scale(points, generator, low=low, high=high, isotropic=self.isotropic)
        if self.shift > 0:
            points = shift(points, generator, limit=self.shift)
        if self.jitter > 0:
            points = jitter(points, generator, sigma=self.jitter, clip=self.clip)
        return points


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "scale": Augmentation(scale=(0.75, 1.35)),
    "damage": Augmentation(
        scale=(0.75, 1.35), corruptions=("points", "crop", "outliers", "distortion")
    ),
    "pointnet": Augmentation(jitter=0.01),
    "dgcnn": Augmentation(scale=(2 / 3, 3 / 2), shift=0.2),
    "vnn": Augmentation(dropout=0.875, scale=(0.8, 1.25), isotropic=True, shift=0.1),
}
"""``scale``: another proportion each time, for canonicalizers, which centre and measure the cloud
themselves. ``damage``: half of the batches besides with points missing, cut off, strewn about or
bent, for canonicalizers that are to stand it. ``pointnet``: as PointNet's training, its rotation
left to the protocol. ``dgcnn``: as DGCNN's (also equiadapt, PaRot, LocoTrans). ``vnn``: as that of
the vector neurons and of yanx27's PointNet++."""


def augmentation(name: str | Augmentation) -> Augmentation:
    """The augmentation called ``name``.

    Raises:
        UsageError: If there is none.
    """
    if isinstance(name, Augmentation):
        return name
    if name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise UsageError(f"unknown augmentation {name!r}; choose one of: {known}")
    return AUGMENTATIONS[name]
