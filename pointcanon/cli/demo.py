"""``pointcanon demo``: the main job on the built-in shapes, from nothing, in minutes on a CPU."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

__all__ = ["run"]


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="pointcanon demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures here as well")
    parser.add_argument(
        "--epochs", type=int, default=None, help="of both trainings; the default is the recipes'"
    )
    options = parser.parse_args(argv)

    from rich.console import Console

    from pointcanon import datasets, model
    from pointcanon.eval.evaluate import evaluate
    from pointcanon.eval.pictures import canonical_gallery
    from pointcanon.eval.report import render, write_json

    console = Console()
    shared = ["--seed_everything", str(options.seed)]
    if options.epochs is not None:
        shared += ["--trainer.max_epochs", str(options.epochs)]
    console.rule("1. a PointNet, trained on upright shapes")
    predictor = _train("shapes-pointnet", options.output / "predictor", shared)
    console.rule("2. a canonicalizer for it; the PointNet stays as it is")
    frozen = ["--model.predictor", str(predictor)]
    checkpoint = _train(
        "shapes-pointnet-canonicalizer", options.output / "canonicalizer", shared + frozen
    )
    console.rule("3. both, on shapes neither has seen")
    robust = model.load(checkpoint)
    shapes = datasets.load("parametric-shapes", None, "test", num_points=256)
    evaluation = evaluate(robust, shapes, "I/SO3", seeds=(0, 1, 2), batch_size=64)
    render(evaluation, console)
    if options.json is not None:
        write_json(evaluation, options.json)
    picture = options.output / "gallery.png"
    canonical_gallery(robust, shapes, "I/SO3", picture)
    console.print(f"clouds as received and in canonical pose: {picture}")
    console.print(f"the rotation-robust network: {checkpoint}")
    return 0


def _train(recipe: str, folder: Path, options: list[str]) -> Path:
    """Train a recipe anew in ``folder``; the best checkpoint."""
    from pointcanon.train.run import train

    # a demo starts from nothing each time; only what an earlier demo left is removed
    shutil.rmtree(folder, ignore_errors=True)
    return train(["--config", recipe, "--output", str(folder), *options]) / "best.safetensors"
