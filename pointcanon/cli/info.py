"""``pointcanon info FILE``: the card inside a checkpoint."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pointcanon import checkpoint
from pointcanon.canonicalizers import PRETRAINED
from pointcanon.cli.options import Parser
from pointcanon.errors import CheckpointError

__all__ = ["run"]

WIDTH = 100

GLUE = "\N{NO-BREAK SPACE}"
"""Keeps a name on its line; in JSON as written here there is none."""


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon info", description="the card of a checkpoint, as JSON")
    parser.add_argument("file", help=f"a checkpoint, or {' or '.join(PRETRAINED)}")
    name: str = parser.parse_args(argv).file
    file = PRETRAINED.get(name, Path(name))
    card = checkpoint.read_card(file)
    if card is None:
        raise CheckpointError(f"{file} carries no pointcanon card")
    print(_laid_out(asdict(card)))
    return 0


def _laid_out(value: Any, indent: int = 0) -> str:
    """JSON in which what fits on a line stays on it, and long lists fill theirs."""
    flat = json.dumps(value)
    if len(flat) + 2 * indent < WIDTH - 24 or not value or isinstance(value, str):
        return flat
    inner, outer = "  " * (indent + 1), "  " * indent
    if isinstance(value, Mapping):
        entries = (f"{inner}{json.dumps(k)}: {_laid_out(v, indent + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(entries) + f"\n{outer}}}"
    if all(isinstance(entry, str | int | float) for entry in value):
        whole = ", ".join(json.dumps(entry).replace(" ", GLUE) for entry in value)
        lines = textwrap.wrap(whole, WIDTH - len(inner), break_on_hyphens=False)
        return "[\n" + textwrap.indent("\n".join(lines), inner).replace(GLUE, " ") + f"\n{outer}]"
    return (
        "[\n" + ",\n".join(inner + _laid_out(entry, indent + 1) for entry in value) + f"\n{outer}]"
    )
