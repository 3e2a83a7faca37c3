"""``pointcanon train``."""

from __future__ import annotations

__all__ = ["run"]


def run(argv: list[str]) -> int:
    from pointcanon.train.run import train

    folder = train(argv)
    print(f"trained: {folder / 'best.safetensors'}")
    return 0
