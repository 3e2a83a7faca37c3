"""The tables of accuracy in docs/results.md, as Markdown.

    python benchmarks/accuracy.py demo
    python benchmarks/accuracy.py modelnet40 --root DATA --predictor POINTNET \\
        --model "\\`Optimized\\`=runs/optimized/best.safetensors"
    python benchmarks/accuracy.py shapes-parts --predictor PARTS \\
        --model "\\`Optimized\\`=runs/shapes-pointnet-parts-canonicalizer/best.safetensors"

``demo`` trains from nothing, as ``pointcanon demo`` does, in minutes. The others evaluate a frozen
predictor alone and behind canonicalizers, on the official test split of ModelNet40 or on the parts
of the parametric shapes, as ``pointcanon eval --protocol I/SO3`` does. A model is a checkpoint, or
the name of a canonicalizer to put before the predictor, such as ``modelnet40``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from pointcanon import datasets
from pointcanon.canonicalizers.pretrained import PRETRAINED
from pointcanon.cli import main as pointcanon
from pointcanon.cli.options import open_model
from pointcanon.eval.evaluate import evaluate
from pointcanon.eval.report import to_json

Report = dict[str, Any]
"""What ``pointcanon eval --json`` writes."""


def share(figure: float, deviation: float | None = None) -> str:
    """A share of 1 in per cent."""
    return f"{100 * figure:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


PAIRS = {
    "overall / mean class accuracy %": ("overall_accuracy", "mean_class_accuracy"),
    "instance / class mIoU %": ("instance_miou", "class_miou"),
}
"""What a table shows, by its heading."""


def pair(report: Report) -> str:
    """The heading that goes with a report."""
    return next(heading for heading, names in PAIRS.items() if names[0] in report["aligned"])


def both(
    names: tuple[str, str], figures: dict[str, float], deviations: dict[str, float] | None = None
) -> str:
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
    alone, names = report["bare"] is None, PAIRS[pair(report)]
    accuracies = (
        both(names, report["aligned"]),
        both(names, report["metrics"], report["metrics_sd"]),
    )
    time = f"{report['timing']['total_ms']:.0f} ms"
    if alone:
        return row(name, *accuracies, "", "", "", time)
    return row(
        f"behind {name}",
        *accuracies,
        share(report["aligned_tax"][names[0]]),
        f"{100 * report['invariance']['prediction_flip_rate']:.2f} %",
        f"{report['frames']['passes']:.3g}",
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


def frozen(
    root: Path | None,
    checkpoint: Path,
    canonicalizer: str | None = None,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    limit: int | None = None,
) -> Report:
    """Evaluate as ``pointcanon eval`` does, on ModelNet40 or, without a root, on the shapes."""
    if root is None:
        data = datasets.load("parametric-shapes", None, "test", num_points=256)
    else:
        data = datasets.load("modelnet40", root, "test", num_points=1024)
    model = open_model(checkpoint, canonicalizer)
    options: dict[str, Any] = {"seeds": seeds, "batch_size": 64, "limit": limit, "progress": True}
    return to_json(evaluate(model, data, "I/SO3", **options))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("demo", "modelnet40", "shapes-parts"))
    parser.add_argument("--seed", type=int, default=0, help="of the demo's trainings")
    parser.add_argument("--root", type=Path, help="folder of ModelNet40")
    parser.add_argument("--predictor", type=Path, help="the weights of the frozen predictor")
    parser.add_argument(
        "--model", action="append", default=[], help="NAME=CHECKPOINT or NAME=CANONICALIZER"
    )
    options = parser.parse_args()
    if options.table == "demo":
        print("\n".join(demo_rows(demo(options.seed))))
        return
    if options.predictor is None or (options.root is None) != (options.table == "shapes-parts"):
        parser.error("modelnet40 needs --root and --predictor, shapes-parts --predictor alone")
    report = frozen(options.root, options.predictor)
    columns = ("as they come", "under SO(3)", "tax", "flips", "passes", "time a cloud")
    print(row(pair(report), *columns))
    print("|---|---|---|---|---|---|---|")
    print(frozen_row("PointNet alone", report), flush=True)
    for named in options.model:
        name, _, model = named.partition("=")
        parts = (options.predictor, model) if model in PRETRAINED else (Path(model),)
        print(frozen_row(name, frozen(options.root, *parts)), flush=True)


if __name__ == "__main__":
    main()
