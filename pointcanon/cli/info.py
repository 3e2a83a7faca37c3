"""``pointcanon info FILE``: the card inside a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict

from pointcanon import checkpoint
from pointcanon.cli.options import Parser
from pointcanon.errors import CheckpointError

__all__ = ["run"]


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon info", description="the card of a checkpoint")
    parser.add_argument("file")
    file = parser.parse_args(argv).file
    card = checkpoint.read_card(file)
    if card is None:
        raise CheckpointError(f"{file} carries no pointcanon card")
    print(json.dumps(asdict(card), indent=2))
    return 0
