"""``pointcanon demo``: the main job on the built-in shapes, from nothing, in minutes on a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from pointcanon.cli.options import Parser
from pointcanon.errors import UsageError
from pointcanon.files import require_writable

__all__ = ["run"]


def run(argv: list[str]) -> int:
    parser = Parser(prog="pointcanon demo", description=__doc__)
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

    if options.json is not None:
        require_writable(options.json)  # found out now rather than after the trainings
    _claim(options.output)
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


MARK = "made-by-pointcanon-demo"


def _claim(folder: Path) -> None:
    """Empty what an earlier demo left; refuse a folder that holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another --output for the demo")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UsageError(f"{folder} holds other files; choose another --output for the demo")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def _train(recipe: str, folder: Path, options: list[str]) -> Path:
    """Train a recipe in ``folder``; the best checkpoint."""
    from pointcanon.train.run import train

    return train(["--config", recipe, "--output", str(folder), *options]) / "best.safetensors"
