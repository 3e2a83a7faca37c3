"""The networks that commands take: a checkpoint, or anything that can be imported."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pointcanon.cli.options import open_checkpoint
from pointcanon.errors import UsageError

__all__ = ["open_network"]


def open_network(name: str) -> Callable[..., Any]:
    """The network in a checkpoint, or the one that ``import.path:name`` stands for.

    The name stands for a module, a function from clouds to logits, or a class or function that
    makes one when called without arguments. The current folder is searched too.

    Raises:
        CheckpointError: If the file cannot be read, or fits nothing that is known.
        UsageError: If nothing of that name can be imported, or making the network fails.
    """
    place, colon, attribute = name.partition(":")
    if Path(name).exists() or not colon:
        return open_checkpoint(name)
    found = _imported(name, place, attribute)
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}, which is neither network nor maker")
    if isinstance(found, nn.Module):
        return found.eval()
    if not (isinstance(found, type) or _takes_nothing(found)):
        return found
    try:
        made = found()
    except Exception as error:  # whatever the user's own code may raise
        raise UsageError(f"{name}() raises {type(error).__name__}: {_first_line(error)}") from error
    if not callable(made):
        raise UsageError(f"{name}() makes a {type(made).__name__}; it should make a network")
    return made.eval() if isinstance(made, nn.Module) else made


def _imported(name: str, place: str, attribute: str) -> Any:
    if not (place and attribute):
        raise UsageError(f"{name!r} is no file; write import.path:name, such as my.models:net")
    here = str(Path.cwd())
    if here not in sys.path:  # where python -m would look
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(place)
    except Exception as error:  # whatever the user's own code may raise
        raise UsageError(
            f"{place} cannot be imported ({type(error).__name__}: {_first_line(error)}); it is "
            f"looked for in {here} and among the installed packages"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if callable(value)]
            known = ", ".join(key for key in names if not key.startswith("_")) or "nothing"
            raise UsageError(f"{place} has no {attribute!r}; what can be called there: {known}")
        found = getattr(found, part)
    return found


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        return not inspect.signature(function).parameters
    except ValueError:  # some compiled functions do not say
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
