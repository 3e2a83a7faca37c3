"""A predictor that sees every so-many-th point, behind a canonicalizer that sees all of them.

    python benchmarks/fewer_points.py --root DATA --predictor runs/dgcnn/best.safetensors
    python benchmarks/fewer_points.py --root DATA --predictor runs/dgcnn/best.safetensors \\
        --canonicalizer runs/optimized/best.safetensors --vote product --seeds 0

The test split of ModelNet40, whose points come in no order. A pose takes more points than a class,
and a network that was trained on few is fast, and no better with more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from pointcanon import Canonicalized, canonicalizers, predictors
from pointcanon.datasets import ModelNet40
from pointcanon.eval.evaluate import evaluate
from pointcanon.eval.report import render, write_json


class EverySo(nn.Module):
    """A network that is shown every ``step``-th point."""

    def __init__(self, network: nn.Module, step: int) -> None:
        super().__init__()
        self.network, self.step = network, step

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.network(points[:, :: self.step])
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--canonicalizer", help="none for the predictor alone")
    parser.add_argument("--vote", default="certainty")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="test")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model: nn.Module = EverySo(predictors.load(options.predictor), options.every).eval()
    if options.canonicalizer:
        front = canonicalizers.load(options.canonicalizer)
        model = Canonicalized(model, front, options.vote)
    data = ModelNet40(options.root, options.split)
    found = evaluate(model, data, "I/SO3", seeds=options.seeds, batch_size=64, progress=True)
    render(found, Console())
    if options.json:
        write_json(found, options.json)


if __name__ == "__main__":
    main()
