"""``pointcanon eval``: what a checkpoint is worth under rotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from pointcanon.datasets import CloudDataset
    from pointcanon.eval.evaluate import Evaluation

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Evaluate as the arguments say, print the table, write what is asked for; 0.

    Raises:
        PointcanonError: On arguments, files or data that cannot be used.
    """
    from rich.console import Console

    from pointcanon.canonicalizers import Identity
    from pointcanon.cli.options import DataOptions, open_model, parse, pick_device
    from pointcanon.cli.streaming import Share
    from pointcanon.datasets.without_outliers import WithoutOutliers
    from pointcanon.eval import corruptions
    from pointcanon.eval.corruption_pictures import corruption_curves
    from pointcanon.eval.evaluate import evaluate
    from pointcanon.eval.page import write_pictures
    from pointcanon.eval.protocols import protocol
    from pointcanon.eval.report import render, write_json
    from pointcanon.files import require_writable

    parser = _parser()
    options = parse(parser, argv)
    chosen = protocol(options.protocol)
    # found out now rather than after an hour
    file = None if options.json is None else require_writable(options.json)
    folder = options.pictures
    if folder is not None:
        require_writable(folder / "report.html")
    seeds = _seeds(options.seeds)

    given = (options.canonicalizer, options.canonicalizer_options, options.vote)
    if options.bare and any(given):
        raise UsageError(
            "--bare leaves the canonicalizer out: leave out --canonicalizer, its options and "
            "--vote, or --bare"
        )
    model = open_model(options.checkpoint, *given)
    if options.bare:
        model.canonicalizer = Identity()
    if options.max_points is not None and not model.segments:
        raise UsageError("--max_points is for networks that label parts: leave it out")
    dataset = DataOptions(**options.data.as_dict()).open()
    names = options.corruptions and corruptions.corruption_names(options.corruptions, dataset)
    if names and model.segments:
        raise UsageError("--corruptions is for classifiers: leave it out")
    if names:  # a missing file is found out before the clean clouds are measured
        corruptions.corrupted_sets(dataset, names)
    if options.drop_outliers and model.segments:
        raise UsageError("--drop_outliers is for classifiers: a stray has a part as well")
    share = Share.from_environment()
    device = pick_device(options.device, share.local_rank)

    def as_asked(clouds: CloudDataset) -> CloudDataset:
        return WithoutOutliers(clouds) if options.drop_outliers else clouds

    def measure(clouds: CloudDataset) -> Evaluation:
        return evaluate(
            model,
            as_asked(clouds),
            chosen,
            seeds=seeds,
            batch_size=options.batch_size,
            device=device,
            num_workers=options.num_workers,
            limit=options.limit,
            restricted=options.restricted,
            max_points=options.max_points,
            distributed=share.world > 1,
            progress=share.rank == 0,
        )

    with share.together():
        evaluation = measure(dataset)
        if share.rank == 0:
            render(evaluation, Console())
        report = None
        if names:
            report = corruptions.evaluate_corruptions(measure, dataset, names, clean=evaluation)
    if share.rank > 0:  # all know the same: the first says it
        return 0
    if report is not None:
        corruptions.render(report, Console())
        if file is not None:
            corruptions.write_json(report, file)
        if folder is not None:
            corruption_curves(report, folder / "corruptions.png")
            print(f"accuracy against severity: {folder / 'corruptions.png'}")
    elif file is not None:
        write_json(evaluation, file)
    if folder is not None:
        *pictures, page = write_pictures(
            model,
            as_asked(dataset),
            evaluation,
            folder,
            clouds=options.picture_clouds,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            limit=options.limit,
            max_points=options.max_points,
            progress=True,
        )
        print(f"pictures: {', '.join(map(str, pictures))}")
        print(f"all of it in one page, with clouds to turn: {page}")
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ActionYesNo, ArgumentParser
    from jsonargparse.typing import PositiveInt

    from pointcanon.cli.options import DataOptions, add_canonicalizer, add_computing, add_vote

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
    parser.add_argument(
        "--corruptions",
        type=str | None,
        default=None,
        help="all, or names separated by commas: accuracy on clouds corrupted so as well, at five "
        "severities; with --limit 500 an affordable estimate on a CPU",
    )
    parser.add_argument(
        "--drop_outliers",
        action="store_true",
        help="leave out points whose neighbours are far away, after any corruption",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="write the figures here")
    parser.add_argument(
        "--pictures",
        type=Path | None,
        default=None,
        help="folder for pictures: the score against the angle of rotation, where up axes come to "
        "lie, clouds in pose; and report.html, which has all of it and opens in any browser",
    )
    parser.add_argument(
        "--picture_clouds",
        type=PositiveInt,
        default=200,
        help="draw n clouds, by the first seed, to be asked at 13 angles for the pictures",
    )
    add_canonicalizer(parser, "in front of the predictor, in the place of the checkpoint's own")
    add_vote(parser)
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
