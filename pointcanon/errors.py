"""The errors a user can meet: each names the thing, its value and the remedy.

The command line turns any of them into one line on standard error and an exit status:
2 for :class:`UsageError`, 1 for the others.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "ExportError",
    "InputError",
    "NotFiniteError",
    "PointcanonError",
    "UsageError",
]


class PointcanonError(Exception):
    """Base of every error raised on purpose by pointcanon."""


class InputError(PointcanonError, ValueError):
    """An argument (a cloud, a mask, an option) that cannot be used as given."""


class NotFiniteError(InputError):
    """A network answers NaN or infinity for a cloud.

    Attributes:
        cloud: Its place, in the batch or wherever the one who raises it counts.
        remedy: What to do.
    """

    def __init__(self, cloud: int, remedy: str) -> None:
        super().__init__(f"the network answers NaN or infinity for cloud {cloud}: {remedy}")
        self.cloud, self.remedy = cloud, remedy


class DataError(PointcanonError):
    """A file or folder of data that is missing, damaged, or of another kind than asked for."""


class CheckpointError(PointcanonError):
    """A weights file that is damaged, of another architecture, or in another coordinate frame."""


class ExportError(PointcanonError):
    """A model that has no portable form, or whose program does not answer as the model does."""


class UsageError(PointcanonError):
    """A command line that asks for something that does not exist (recipe, protocol, option)."""
