"""The errors a user can meet: each names the thing, its value and the remedy.

The command line turns any of them into one line on standard error and an exit status:
2 for :class:`UsageError`, 1 for the others.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "DataError", "InputError", "PointcanonError", "UsageError"]


class PointcanonError(Exception):
    """Base of every error raised on purpose by pointcanon."""


class InputError(PointcanonError, ValueError):
    """An argument (a cloud, a mask, an option) that cannot be used as given."""


class DataError(PointcanonError):
    """A file or folder of data that is missing, damaged, or of another kind than asked for."""


class CheckpointError(PointcanonError):
    """A weights file that is damaged, of another architecture, or in another coordinate frame."""


class UsageError(PointcanonError):
    """A command line that asks for something that does not exist (recipe, protocol, option)."""
