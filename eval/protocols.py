"""Protocols: how clouds are turned in training and in test, and the test rotations themselves.

A protocol is written train/test. A pose is one of

====  =============================================================================
I     as the data come
z     turned by a uniform angle about the **up axis** of the data, whichever that is
z3    turned by a uniform angle about the third coordinate
SO3   turned by a Haar-uniform rotation
====  =============================================================================

Papers on ModelNet40 write "z" for a rotation about the third coordinate. In the y-up files most of
them read that is not gravity, so their z is ``z3`` here; in z-up data the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from pointcanon.errors import InputError, UsageError
from pointcanon.rotations import random_about_axis, random_rotations

__all__ = ["POSES", "Pose", "Protocol", "pose_rotations", "protocol", "random_pose"]

Pose = Literal["I", "z", "z3", "SO3"]

POSES: dict[str, str] = {
    "I": "as they come",
    "z": "turned about the up axis",
    "z3": "turned about the third coordinate",
    "SO3": "turned at random",
}
"""Every pose, and what it does to clouds, in words."""


@dataclass(frozen=True)
class Protocol:
    """The poses of training and of test; ``str`` writes it as the field does, ``z/SO3``.

    Raises:
        UsageError: On an unknown pose.
    """

    train: Pose
    test: Pose

    def __post_init__(self) -> None:
        for pose in (self.train, self.test):
            if pose not in get_args(Pose):
                raise UsageError(_unknown(str(self)))

    def __str__(self) -> str:
        return f"{self.train}/{self.test}"


def protocol(name: str | Protocol) -> Protocol:
    """The protocol written ``train/test``, such as ``"z/SO3"`` or ``"I/SO3"``.

    Raises:
        UsageError: If there is none of that name.
    """
    if isinstance(name, Protocol):
        return name
    train, slash, test = name.partition("/")
    if not slash:
        raise UsageError(_unknown(name))
    return Protocol(train, test)  # type: ignore[arg-type]  # checked there


def _unknown(name: str) -> str:
    poses = ", ".join(f"{pose} ({words})" for pose, words in POSES.items())
    return (
        f"unknown protocol {name!r}; write train/test, such as z/z, z/SO3, SO3/SO3 or I/SO3, "
        f"each one of: {poses}"
    )


def random_pose(
    pose: Pose,
    count: int,
    up_axis: Tensor,
    generator: Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rotations ``(count, 3, 3)`` of a pose, on the generator's device.

    They are drawn in float64 and rounded, so a seed means the same rotations in every dtype.

    Args:
        pose: A key of :data:`POSES`.
        count: How many.
        up_axis: ``(3,)``, which way is up in the data, as in ``CoordinateFrame.up_axis``.
        generator: The only source of randomness.
        dtype: Of the result.

    Raises:
        InputError: On an unknown pose.
    """
    exact, device = torch.float64, generator.device
    if pose == "I":
        turns = torch.eye(3, dtype=exact, device=device).repeat(count, 1, 1)
    elif pose in ("z", "z3"):
        axis = up_axis if pose == "z" else torch.tensor([0.0, 0.0, 1.0])
        turns = random_about_axis(count, axis=axis, generator=generator, dtype=exact, device=device)
    elif pose == "SO3":
        turns = random_rotations(count, generator=generator, dtype=exact, device=device)
    else:
        raise InputError(f"unknown pose {pose!r}; choose one of: {', '.join(POSES)}")
    return turns.to(dtype)


def pose_rotations(
    pose: Pose, count: int, up_axis: Tensor, *, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The test rotations ``(count, 3, 3)`` of a data set: row i turns cloud i.

    They are a function of the arguments alone: drawn at once, on the CPU, from a
    :class:`torch.Generator` with this seed. Batch size, order, workers and devices do not matter.

    Args:
        pose: A key of :data:`POSES`.
        count: Clouds in the **whole** split, also where only some of them are used.
        up_axis: ``(3,)``, which way is up in the data.
        seed: Published with the figures.
        dtype: Of the result.

    Raises:
        InputError: On an unknown pose.
    """
    return random_pose(pose, count, up_axis, Generator().manual_seed(seed), dtype)
