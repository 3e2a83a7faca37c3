"""``pointcanon eval``: what a checkpoint is worth under rotation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pointcanon.errors import UsageError

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Evaluate as the arguments say, print the table, write what is asked for; 0.

    Raises:
        PointcanonError: On arguments, files or data that cannot be used.
    """
    import jsonargparse
    import torch
    from rich.console import Console

    from pointcanon.canonicalizers import Identity
    from pointcanon.cli.options import DataOptions, open_checkpoint
    from pointcanon.eval.evaluate import evaluate
    from pointcanon.eval.pictures import canonical_gallery
    from pointcanon.eval.protocols import protocol
    from pointcanon.eval.report import render, write_json
    from pointcanon.files import require_writable
    from pointcanon.model import Canonicalized

    parser = _parser()
    try:
        options = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        reason = " ".join(str(error).split())  # it may span lines
        raise UsageError(f"{reason}; see pointcanon eval --help") from error
    chosen = protocol(options.protocol)
    # found out now rather than after an hour
    file = None if options.json is None else require_writable(options.json)
    folder = options.pictures
    pictures = None if folder is None else require_writable(folder / "gallery.png")
    seeds = _seeds(options.seeds)

    model = open_checkpoint(options.checkpoint)
    if not isinstance(model, Canonicalized):
        model = Canonicalized(model, Identity())
    elif options.bare:
        model.canonicalizer = Identity()
    dataset = DataOptions(**options.data.as_dict()).open()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = evaluate(
        model,
        dataset,
        chosen,
        seeds=seeds,
        batch_size=options.batch_size,
        device=_device(device),
        num_workers=options.num_workers,
        limit=options.limit,
        progress=True,
    )
    render(evaluation, Console())
    if file is not None:
        write_json(evaluation, file)
    if pictures is not None:
        canonical_gallery(model, dataset, chosen, pictures, seed=seeds[0])
        print(f"picture: {pictures}")
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    from pointcanon.cli.options import DataOptions

    parser = ArgumentParser(
        prog="pointcanon eval",
        description="Accuracy of a checkpoint on data as they come and under rotation.",
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
    parser.add_argument("--batch_size", type=PositiveInt, default=32, help="clouds at once")
    parser.add_argument(
        "--num_workers", type=NonNegativeInt, default=0, help="processes that read the data"
    )
    parser.add_argument(
        "--device",
        type=str | None,
        default=None,
        help="such as cpu or cuda; cuda where there is one",
    )
    parser.add_argument(
        "--limit",
        type=PositiveInt,
        default=None,
        help="use n clouds, spread over the data set",
    )
    parser.add_argument("--json", type=Path | None, default=None, help="write the figures here")
    parser.add_argument(
        "--pictures", type=Path | None, default=None, help="folder for gallery.png, clouds in pose"
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


def _device(name: str) -> torch.device:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return torch.device(name)
