"""Corruptions: what scanners and scenes do to clouds, at five severities.

Most are those of ModelNet40-C (Sun et al. 2022, arXiv 2201.12296) under its names, written from
its description for clouds alone: where it renders meshes, points hide each other here. The others
go further than it does, or damage in one way what it damages in several.

A corruption is a pure function of ``points (B, N, 3)``, an amount and a generator. It returns
``(B, M, 3)``, where M depends on N and the amount alone, and draws only from the generator, on that
generator's device. Lengths are in units of a cloud's radius, its largest distance from the centre,
so it does not matter whether clouds are normalised; afterwards they no longer are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Generator, Tensor

from pointcanon.clouds import centroid, normalise, radius
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import CloudDataset, CloudItem
from pointcanon.errors import InputError, UsageError
from pointcanon.rotations import random_rotations

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corrupted", "Corruption", "corruption"]

SEVERITIES = (1, 2, 3, 4, 5)

_PATCH = 100 / 1024
_HOLE = 30 / 1024
_IMPULSE = 0.1
_SPREAD = 0.05
_SPLAT = 0.1
_CONTROL = 5


@dataclass(frozen=True)
class Corruption:
    """A way to damage clouds.

    Attributes:
        damage: From points ``(B, N, 3)``, an amount and a generator to points ``(B, M, 3)``.
        amounts: One for each severity.
        unit: What an amount is, in words.
    """

    damage: Callable[[Tensor, float, Generator], Tensor]
    amounts: tuple[float, float, float, float, float]
    unit: str

    def __call__(self, points: Tensor, severity: int, generator: Generator) -> Tensor:
        """Damaged clouds, of the dtype and on the device of those given, which are not changed.

        Args:
            points: ``(B, N, 3)`` or ``(N, 3)``, and so is what is returned, with another N.
            severity: From 1 to 5.
            generator: The only source of randomness.

        Raises:
            InputError: On another severity, or a cloud with too few points to damage that way.
        """
        if severity not in SEVERITIES:
            raise InputError(f"severity is {severity}; choose one of: 1, 2, 3, 4, 5")
        if points.ndim not in (2, 3) or points.shape[-1] != 3 or not points.shape[-2]:
            raise InputError(
                f"points has shape {tuple(points.shape)}, expected (B, N, 3) or (N, 3), N >= 1"
            )
        amount = self.amounts[severity - 1]
        if points.ndim == 2:
            return self.damage(points[None], amount, generator)[0]
        return self.damage(points, amount, generator)


def corruption(name: str) -> Corruption:
    """The corruption called ``name``.

    Raises:
        UsageError: If there is none.
    """
    if name not in CORRUPTIONS:
        known = ", ".join(CORRUPTIONS)
        raise UsageError(f"unknown corruption {name!r}; choose one of: {known}")
    return CORRUPTIONS[name]


class Corrupted:
    """A data set whose clouds are damaged, each the same way whenever it is read.

    What is drawn is a function of the seed, the corruption and the cloud's index. It does not
    depend on the severity, so that a cloud loses more of the same, and a curve over severities is
    no noisier than it must be. The clouds come centred and in the unit ball again, as a scan that
    has been damaged reaches a network.

    Args:
        dataset: Clouds without normals, which no damage would leave true.
        name: Of the corruption.
        severity: From 1 to 5.
        seed: From 0 up.

    Attributes:
        labels: ``(len(self),)`` int64, those of ``dataset``, as are its classes and its frame.

    Raises:
        InputError: On a severity, a seed or a data set that will not do.
        UsageError: On an unknown corruption.
    """

    normals = False

    def __init__(self, dataset: CloudDataset, name: str, severity: int, seed: int = 0) -> None:
        self._corruption = corruption(name)
        if severity not in SEVERITIES:
            raise InputError(f"severity is {severity}; choose one of: 1, 2, 3, 4, 5")
        if seed < 0:
            raise InputError(f"seed is {seed}; choose a whole number from 0 up")
        if getattr(dataset, "normals", False):
            raise InputError(
                f"{dataset.name} is read with normals, which corrupted clouds do not have: "
                "read it without"
            )
        self.name: str = f"{dataset.name} {name} {severity}"
        self.split: str | None = getattr(dataset, "split", None)
        self.classes: list[str] = list(dataset.classes)
        self.labels: np.ndarray = dataset.labels
        self.coordinate_frame: CoordinateFrame = dataset.coordinate_frame
        self._dataset, self._severity = dataset, severity
        self._place = f"{seed}/{name}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> CloudItem:
        index = range(len(self))[index]
        item = self._dataset[index]
        place = f"{self._place}/{index}".encode()
        seed = int.from_bytes(blake2b(place, digest_size=7).digest(), "little")
        generator = Generator().manual_seed(seed)
        damaged = self._corruption(item["points"], self._severity, generator)
        points = normalise(damaged[None])[0]
        return {"points": points, "label": int(item["label"]), "index": index}


# ---------------------------------------------------------------------------------------- density


def _points(points: Tensor, share: float, generator: Generator) -> Tensor:
    return _take(points, _shuffled(points, generator)[:, : _count(points, share)])


def _crop(points: Tensor, share: float, generator: Generator) -> Tensor:
    height = points @ _directions(points, generator)
    return _take(points, height[..., 0].argsort(dim=1)[:, : _count(points, share)])


def _gradient(points: Tensor, ratio: float, generator: Generator) -> Tensor:
    height = (points @ _directions(points, generator))[..., 0]
    lowest, highest = height.amin(dim=1, keepdim=True), height.amax(dim=1, keepdim=True)
    along = (height - lowest) / (highest - lowest).clamp_min(torch.finfo(points.dtype).tiny)
    # the smallest of exponential deviates are a draw without replacement in proportion to the rates
    waiting = -_uniform(height.shape, points, generator).log() * ratio**along
    return _take(points, waiting.argsort(dim=1)[:, : _count(points, 0.5)])


def _occlusion(points: Tensor, size: float, generator: Generator) -> Tensor:
    seen = _view(points, generator)[0]
    visible = _in_front(seen, size)
    return _take(points, _repeated(visible, points.shape[1], points, generator))


def _lidar(points: Tensor, spacing: float, generator: Generator) -> Tensor:
    seen, back = _view(points, generator)
    visible = _in_front(seen, _SPLAT)
    line = (seen[..., 1] / spacing).floor()
    near = (seen[..., 1] / spacing - line - 0.5).abs() <= 0.25
    hit = visible & near
    hit = torch.where(hit.any(dim=1, keepdim=True), hit, visible)
    scanned = torch.stack((seen[..., 0], (line + 0.5) * spacing, seen[..., 2]), dim=-1)
    return back(_take(scanned, _repeated(hit, _count(points, 0.75), points, generator)))


def _density(points: Tensor, patches: float, generator: Generator) -> Tensor:
    rows = _patches(points, int(patches), _PATCH, generator)
    order = _uniform(rows.shape, points, generator).argsort(dim=-1)
    lost = rows.gather(2, order)[..., : rows.shape[2] * 3 // 4]
    return _without(points, lost.flatten(1))


def _density_inc(points: Tensor, patches: float, generator: Generator) -> Tensor:
    rows = _patches(points, int(patches), _PATCH / 2, generator).flatten(1)
    keys = _uniform(points.shape[:2], points, generator).scatter(1, rows, -1.0)
    return _take(points, keys.argsort(dim=1)[:, : max(rows.shape[1], _count(points, 0.5))])


def _cutout(points: Tensor, holes: float, generator: Generator) -> Tensor:
    return _without(points, _patches(points, int(holes), _HOLE, generator).flatten(1))


# ------------------------------------------------------------------------------------------ noise


def _uniform_noise(points: Tensor, limit: float, generator: Generator) -> Tensor:
    return points + limit * _size(points) * _signed(points.shape, points, generator)


def _gaussian_noise(points: Tensor, sigma: float, generator: Generator) -> Tensor:
    noise = torch.randn(points.shape, generator=generator, device=generator.device)
    return points + sigma * _size(points) * noise.to(points)


def _impulse(points: Tensor, share: float, generator: Generator) -> Tensor:
    rows = _shuffled(points, generator)[:, : _count(points, share)]
    signs = _signed(points.shape, points, generator).sign()
    struck = torch.zeros(points.shape[:2], device=points.device).scatter(1, rows, 1.0).bool()
    return torch.where(struck[..., None], points + _IMPULSE * _size(points) * signs, points)


def _upsampling(points: Tensor, share: float, generator: Generator) -> Tensor:
    copied = _take(points, _shuffled(points, generator)[:, : _count(points, share)])
    noise = _SPREAD * _size(points) * _signed(copied.shape, points, generator)
    return torch.cat((points, copied + noise), dim=1)


def _background(points: Tensor, share: float, generator: Generator) -> Tensor:
    shape = (len(points), _count(points, share), 3)
    strewn = centroid(points)[:, None] + _size(points) * _signed(shape, points, generator)
    return torch.cat((points, strewn), dim=1)


def _outliers(points: Tensor, share: float, generator: Generator) -> Tensor:
    count = _count(points, share)
    rows = _shuffled(points, generator)[:, count:]
    towards = torch.randn((len(points), count, 3), generator=generator, device=generator.device)
    distance = _uniform((len(points), count, 1), points, generator) ** (1 / 3)
    inside = distance * torch.nn.functional.normalize(towards.to(points), dim=-1)
    strewn = centroid(points)[:, None] + _size(points) * inside
    return torch.cat((_take(points, rows), strewn), dim=1)


# --------------------------------------------------------------------------------- transformation


def _shear(points: Tensor, amount: float, generator: Generator) -> Tensor:
    signs = _signed((len(points), 3, 3), points, generator).sign()
    eye = torch.eye(3).to(points)
    centre = centroid(points)[:, None]
    return (points - centre) @ (eye + amount * signs * (1 - eye)) + centre


def _distortion(points: Tensor, amount: float, generator: Generator) -> Tensor:
    """Free-form deformation (Sederberg and Parry 1986): a Bézier volume around the cloud."""
    shape = (len(points), _CONTROL, _CONTROL, _CONTROL, 3)
    moved = amount * _signed(shape, points, generator)
    unit = (points - centroid(points)[:, None]) / (2 * _size(points)) + 0.5
    degree = _CONTROL - 1
    power = torch.arange(_CONTROL, device=points.device)
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).to(points)
    basis = binomial * unit[..., None] ** power * (1 - unit[..., None]) ** (degree - power)
    move = torch.einsum("bni,bnj,bnk,bijkc->bnc", *basis.unbind(dim=2), moved)
    return points + _size(points) * move


CORRUPTIONS: dict[str, Corruption] = {
    "points": Corruption(_points, (3 / 4, 1 / 2, 1 / 4, 1 / 8, 1 / 16), "share of points kept"),
    "crop": Corruption(_crop, (0.9, 0.8, 0.7, 0.6, 0.5), "share kept, on one side of a plane"),
    "gradient": Corruption(
        _gradient, (2, 4, 8, 16, 32), "ratio of the rates at which two ends are drawn"
    ),
    "occlusion": Corruption(
        _occlusion, (0.06, 0.09, 0.12, 0.16, 0.2), "size of what a point hides, seen from one side"
    ),
    "lidar": Corruption(
        _lidar, (0.06, 0.09, 0.12, 0.16, 0.2), "spacing of scan lines, seen from one side"
    ),
    "density": Corruption(_density, (1, 2, 3, 4, 5), "patches that lose three quarters"),
    "density_inc": Corruption(_density_inc, (1, 2, 3, 4, 5), "patches kept while half is lost"),
    "cutout": Corruption(_cutout, (2, 3, 5, 7, 10), "holes"),
    "uniform": Corruption(_uniform_noise, (0.01, 0.02, 0.03, 0.04, 0.05), "limit of the noise"),
    "gaussian": Corruption(_gaussian_noise, (0.01, 0.015, 0.02, 0.025, 0.03), "its deviation"),
    "jitter": Corruption(_gaussian_noise, (0.02, 0.04, 0.06, 0.08, 0.1), "its deviation, further"),
    "impulse": Corruption(_impulse, (1 / 30, 1 / 25, 1 / 20, 1 / 15, 1 / 10), "share struck"),
    "upsampling": Corruption(_upsampling, (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1), "share of noisy copies"),
    "background": Corruption(
        _background, (1 / 45, 1 / 40, 1 / 35, 1 / 30, 1 / 20), "share of points more, in the box"
    ),
    "outliers": Corruption(_outliers, (0.02, 0.05, 0.1, 0.2, 0.3), "share put elsewhere"),
    "shear": Corruption(_shear, (0.05, 0.1, 0.15, 0.2, 0.25), "tangent of the angle"),
    "distortion": Corruption(_distortion, (0.1, 0.2, 0.3, 0.4, 0.5), "movement of control points"),
}
"""By name. Of ModelNet40-C's fifteen, ``rotation`` is a protocol here, and ``distortion_rbf`` and
``distortion_rbf_inv`` are further ways to ``distortion``. There, the severities of ``occlusion``
and ``lidar`` are five points of view; here they hide more and more."""


# ---------------------------------------------------------------------------------------- helpers


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    """From U(0, 1)."""
    return torch.rand(shape, generator=generator, device=generator.device).to(like)


def _signed(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    """From U(-1, 1)."""
    return 2 * _uniform(shape, like, generator) - 1


def _directions(points: Tensor, generator: Generator) -> Tensor:
    """``(B, 3, 1)``, uniform on the sphere."""
    drawn = torch.randn((len(points), 3, 1), generator=generator, device=generator.device)
    return torch.nn.functional.normalize(drawn.to(points), dim=1)


def _size(points: Tensor) -> Tensor:
    """The radius of each cloud ``(B, 1, 1)``; 1 where all points are one."""
    size = radius(points - centroid(points)[:, None])[:, None, None]
    return torch.where(size > 0, size, torch.ones_like(size))


def _count(points: Tensor, share: float) -> int:
    return max(1, int(share * points.shape[1] + 1e-9))


def _take(points: Tensor, rows: Tensor) -> Tensor:
    return points.gather(1, rows[..., None].expand(-1, -1, 3))


def _shuffled(points: Tensor, generator: Generator) -> Tensor:
    return _uniform(points.shape[:2], points, generator).argsort(dim=1)


def _without(points: Tensor, rows: Tensor) -> Tensor:
    """The points that are not in ``rows (B, L)``, in their order."""
    kept = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    return points[kept.scatter(1, rows, False)].view(len(points), -1, 3)


def _patches(points: Tensor, patches: int, share: float, generator: Generator) -> Tensor:
    """Rows ``(B, patches, L)`` of a point each, drawn, and of its nearest; no row comes twice."""
    size = _count(points, share)
    if patches * size >= points.shape[1]:
        raise InputError(
            f"clouds of {points.shape[1]} points have no {patches} patches of {size}: "
            f"give them more than {patches * size} points"
        )
    taken = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    found = []
    for _ in range(patches):
        keys = _uniform(points.shape[:2], points, generator).masked_fill(taken, -1.0)
        middle = _take(points, keys.argmax(dim=1, keepdim=True))
        distance = (points - middle).square().sum(dim=-1).masked_fill(taken, torch.inf)
        rows = distance.topk(size, dim=1, largest=False).indices
        taken = taken.scatter(1, rows, True)
        found.append(rows)
    return torch.stack(found, dim=1)


def _view(points: Tensor, generator: Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Clouds across, up and towards an eye far off in a random direction, in the unit ball; and
    the way back."""
    drawn = random_rotations(
        len(points), generator=generator, dtype=torch.float64, device=generator.device
    )
    turns, centre, size = drawn.to(points), centroid(points)[:, None], _size(points)
    return (points - centre) / size @ turns, lambda seen: size * (seen @ turns.mT) + centre


def _in_front(seen: Tensor, size: float) -> Tensor:
    """Which points of a view no other hides ``(B, N)``: a depth buffer with pixels of ``size``.

    What lies deeper than ``size`` behind the front of its pixel is hidden, the steepest slopes too.
    """
    across = int(2 / size) + 1
    pixel = ((seen[..., :2] + 1) / size).long().clamp(0, across - 1)
    place = pixel[..., 0] * across + pixel[..., 1]
    depth = seen[..., 2]
    front = depth.new_full((len(seen), across * across), -torch.inf)
    front = front.scatter_reduce(1, place, depth, "amax")
    return depth >= front.gather(1, place) - size


def _repeated(kept: Tensor, count: int, like: Tensor, generator: Generator) -> Tensor:
    """``(B, count)`` rows that are kept, in random order, again and again where they are few."""
    keys = _uniform(tuple(kept.shape), like, generator).masked_fill(~kept, 2.0)
    turn = torch.arange(count, device=kept.device) % kept.sum(dim=1, keepdim=True)
    return keys.argsort(dim=1).gather(1, turn)
