"""``pointcanon eval``: what a checkpoint is worth under rotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Evaluate as the arguments say, print the table, write what is asked for; 0.

    Raises:
        PointcanonError: On arguments, files or data that cannot be used.
    """
    import torch
    from rich.console import Console

    from pointcanon.canonicalizers import Identity
    from pointcanon.cli.options import DataOptions, open_checkpoint, parse, pick_device
    from pointcanon.datasets import PartDataset
    from pointcanon.eval.evaluate import evaluate
    from pointcanon.eval.part_pictures import part_gallery
    from pointcanon.eval.pictures import canonical_gallery
    from pointcanon.eval.protocols import protocol
    from pointcanon.eval.report import render, write_json
    from pointcanon.files import require_writable
    from pointcanon.model import Canonicalized

    parser = _parser()
    options = parse(parser, argv)
    chosen = protocol(options.protocol)
    # found out now rather than after an hour
    file = None if options.json is None else require_writable(options.json)
    folder = options.pictures
    if folder is not None:
        require_writable(folder / "gallery.png")
    seeds = _seeds(options.seeds)

    model = open_checkpoint(options.checkpoint)
    if not isinstance(model, Canonicalized):
        model = Canonicalized(model, Identity())
    elif options.bare:
        model.canonicalizer = Identity()
    if options.max_points is not None and not model.segments:
        raise UsageError("--max_points is for networks that label parts: leave it out")
    dataset = DataOptions(**options.data.as_dict()).open()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = evaluate(
        model,
        dataset,
        chosen,
        seeds=seeds,
        batch_size=options.batch_size,
        device=pick_device(device),
        num_workers=options.num_workers,
        limit=options.limit,
        restricted=options.restricted,
        max_points=options.max_points,
        progress=True,
    )
    render(evaluation, Console())
    if file is not None:
        write_json(evaluation, file)
    if folder is not None and model.segments and isinstance(dataset, PartDataset):
        part_gallery(
            model,
            dataset,
            chosen,
            folder,
            seed=seeds[0],
            restricted=options.restricted,
            max_points=options.max_points,
        )
        print(f"pictures: {folder / 'parts.png'} and, to turn and zoom, {folder / 'parts.html'}")
    elif folder is not None:
        canonical_gallery(model, dataset, chosen, folder / "gallery.png", seed=seeds[0])
        print(f"picture: {folder / 'gallery.png'}")
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ActionYesNo, ArgumentParser
    from jsonargparse.typing import PositiveInt

    from pointcanon.cli.options import DataOptions, add_computing

    parser = ArgumentParser(
        prog="pointcanon eval",
        description="Accuracy, or mIoU of parts, of a checkpoint on data as they come and under "
        "rotation.",
        exit_on_error=False,
    )
    parser.add_argument(
        "checkpoint", type=str, help="a canonicalized model, or a predictor: ours or public"
    )
    parser.add_class_arguments(DataOptions, "data")
    parser.add_argument(
        "--protocol",
        type=str,
        required=True,
        help="train/test poses: I (as they come), z (about up), z3 (about the third coordinate), "
        "SO3; such as z/SO3",
    )
    parser.add_argument(
        "--seeds", type=str, default="0,1,2", help="of the test rotations, such as 0,1,2"
    )
    add_computing(parser)
    parser.add_argument(
        "--restricted",
        action=ActionYesNo(yes_prefix="", no_prefix="un"),
        default=True,
        help="choose a point's part among those of the object's class, or among all",
    )
    parser.add_argument(
        "--max_points",
        type=PositiveInt,
        default=None,
        help="give a part network so many points at once, of clouds that hold more",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="write the figures here")
    parser.add_argument(
        "--pictures",
        type=Path | None,
        default=None,
        help="folder for pictures: clouds in pose, or their parts, as found and in truth",
    )
    parser.add_argument(
        "--bare", action="store_true", help="evaluate the predictor without its canonicalizer"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in text.strip("[]").split(","))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"--seeds is {text!r}; give different whole numbers from 0 up, such as 0,1,2"
        )
    return seeds
