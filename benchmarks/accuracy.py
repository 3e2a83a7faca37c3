"""The tables of accuracy in docs/results.md, as Markdown.

    python benchmarks/accuracy.py demo
    python benchmarks/accuracy.py modelnet40 --root DATA --predictor POINTNET \\
        --model "\\`Optimized\\`=runs/optimized/best.safetensors"

``demo`` trains from nothing, as ``pointcanon demo`` does, in minutes. ``modelnet40`` evaluates a
frozen predictor alone and behind canonicalizers that were trained for it, on the official test
split, as ``pointcanon eval --protocol I/SO3`` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pointcanon import datasets
from pointcanon.cli import main as pointcanon
from pointcanon.cli.options import open_checkpoint
from pointcanon.eval.evaluate import evaluate
from pointcanon.eval.report import to_json

Report = dict[str, Any]
"""What ``pointcanon eval --json`` writes."""


def share(figure: float, deviation: float | None = None) -> str:
    """A share of 1 in per cent."""
    return f"{100 * figure:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def both(figures: dict[str, float], deviations: dict[str, float] | None = None) -> str:
    """Overall and mean class accuracy."""
    names = ("overall_accuracy", "mean_class_accuracy")
    return " / ".join(share(figures[name], deviations and deviations[name]) for name in names)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def demo_rows(report: Report) -> list[str]:
    def accuracies(trials: Report) -> tuple[str, str]:
        name = "overall_accuracy"
        turned = share(trials["metrics"][name], trials["metrics_sd"][name])
        return share(trials["aligned"][name]), turned

    flips = f"{100 * report['invariance']['prediction_flip_rate']:.2f} %"
    return [
        row("overall accuracy %", "as they come", "under SO(3)", "prediction flips"),
        "|---|---|---|---|",
        row("PointNet alone", *accuracies(report["bare"]), ""),
        row(f"behind `{report['canonicalizer']}`", *accuracies(report), flips),
    ]


def frozen_row(name: str, report: Report) -> str:
    """Of a predictor alone, or behind the canonicalizer of that name."""
    alone = report["bare"] is None
    accuracies = (
        both(report["aligned"]),
        both(report["metrics"], report["metrics_sd"]),
    )
    time = f"{report['timing']['total_ms']:.0f} ms"
    if alone:
        return row(name, *accuracies, "", "", "", time)
    return row(
        f"behind {name}",
        *accuracies,
        share(report["aligned_tax"]["overall_accuracy"]),
        f"{100 * report['invariance']['prediction_flip_rate']:.2f} %",
        str(report["frames"]["count"]),
        time,
    )


def demo(seed: int) -> Report:
    """Train and evaluate as ``pointcanon demo`` does."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo.json"
        arguments = ["--output", f"{folder}/demo", "--seed", str(seed), "--json", str(file)]
        if pointcanon(["demo", *arguments]) != 0:
            raise SystemExit("the demo failed")
        return json.loads(file.read_text())


def frozen(root: Path, checkpoint: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Report:
    """Evaluate as ``pointcanon eval`` does."""
    data = datasets.load("modelnet40", root, "test", num_points=1024)
    model = open_checkpoint(checkpoint)
    return to_json(evaluate(model, data, "I/SO3", seeds=seeds, batch_size=64, progress=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("demo", "modelnet40"))
    parser.add_argument("--seed", type=int, default=0, help="of the demo's trainings")
    parser.add_argument("--root", type=Path, help="folder of ModelNet40")
    parser.add_argument("--predictor", type=Path, help="the weights of the frozen predictor")
    parser.add_argument("--model", action="append", default=[], help="NAME=CHECKPOINT")
    options = parser.parse_args()
    if options.table == "demo":
        print("\n".join(demo_rows(demo(options.seed))))
        return
    if options.root is None or options.predictor is None:
        parser.error("modelnet40 needs --root and --predictor")
    columns = ("as they come", "under SO(3)", "tax", "flips", "frames", "time a cloud")
    print(row("overall / mean class accuracy %", *columns))
    print("|---|---|---|---|---|---|---|")
    print(frozen_row("PointNet alone", frozen(options.root, options.predictor)))
    for named in options.model:
        name, _, checkpoint = named.partition("=")
        print(frozen_row(name, frozen(options.root, Path(checkpoint))), flush=True)


if __name__ == "__main__":
    main()
