"""The command line: ``pointcanon COMMAND ...``; one module a command."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module

from pointcanon.errors import PointcanonError, UsageError

__all__ = ["main", "printable"]

COMMANDS = {
    "demo": ("demo", "train on the built-in shapes and show what canonicalization does"),
    "train": ("train", "train a predictor, a canonicalizer or both from a recipe"),
    "eval": ("evaluate", "accuracy of a checkpoint under rotation"),
    "audit": ("audit", "say how far any network can be trusted under rotation"),
    "adapt": ("adapt", "train a canonicalizer for a network that is there already"),
    "predict": ("predict", "labels, confidence and pose of clouds in files"),
    "canonicalize": ("canonicalize", "write clouds in canonical pose"),
    "data": ("data", "say what is at a data root, in which layout and frame"),
    "export": ("export", "write a program that runs without pointcanon: ONNX, torch.export"),
    "info": ("info", "print the card inside a checkpoint"),
}
"""Command: its module in this package, and what it does."""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Exit status: 0 done, 1 failed, 2 bad usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"pointcanon {version('pointcanon')}")
        return 0
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}; choose one of: {', '.join(COMMANDS)}")
        status: int = import_module(f"pointcanon.cli.{COMMANDS[command][0]}").run(rest)
        sys.stdout.flush()
        return status
    except PointcanonError as error:
        print(f"pointcanon: {_reason(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # who reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("pointcanon: interrupted", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(
            "pointcanon: a process that reads data died, as happens where memory is short: choose "
            "fewer --num_workers",
            file=sys.stderr,
        )
        return 1


def _reason(error: PointcanonError) -> str:
    """The message; a process that loads data wraps its own in a traceback."""
    text = str(error).strip()
    if "\nOriginal Traceback" in text:
        kind = type(error)
        text = text.splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
    return printable(text)


def printable(text: str) -> str:
    """Text as one line that commands no terminal, as names of files and of what they hold could."""
    letters = re.sub(r"\s", " ", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in letters)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        (
            "usage: pointcanon COMMAND [options]",
            "",
            "Make a 3D point-cloud network work at every orientation.",
            "",
            *lines,
            "",
            "pointcanon COMMAND --help says more of each.",
        )
    )
