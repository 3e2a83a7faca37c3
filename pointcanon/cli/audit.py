"""``pointcanon audit``: how far a network can be trusted under rotation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pointcanon.cli import printable
from pointcanon.errors import UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Audit as the arguments say; 1 where the agreement is below what is asked for, else 0.

    Raises:
        PointcanonError: On arguments, files, data or networks that cannot be used.
    """
    from rich.console import Console

    from pointcanon.cli.given import open_clouds
    from pointcanon.cli.networks import open_network
    from pointcanon.cli.options import open_canonicalizer, parse, pick_device, with_options
    from pointcanon.datasets.given import GivenClouds
    from pointcanon.eval.audit import audit
    from pointcanon.eval.audit_pictures import curve, worst_gallery
    from pointcanon.files import atomic_write, require_writable
    from pointcanon.model import Canonicalized

    parser = _parser()
    options = parse(parser, argv)
    least = options.min_agreement
    if least is not None and not 0 <= least <= 1:
        raise UsageError(f"--min-agreement is {least}; give a share from 0 to 1, such as 0.99")
    # found out now rather than after an hour
    file = None if options.json is None else require_writable(options.json)
    folder = options.pictures
    if folder is not None:
        require_writable(folder / "curve.png")
    network = open_network(options.network)
    canonicalizer = network.canonicalizer if isinstance(network, Canonicalized) else None
    if options.canonicalizer:
        canonicalizer = open_canonicalizer(options.canonicalizer)
    if canonicalizer is not None:
        canonicalizer = with_options(canonicalizer, options.canonicalizer_options)
    elif options.canonicalizer_options:
        raise UsageError(
            f"--canonicalizer_options: {options.network} has no canonicalizer; give --canonicalizer"
        )
    dataset = open_clouds(
        options, network, canonicalizer, num_workers=options.num_workers, limit=options.limit
    )
    found = audit(
        network,
        dataset,
        canonicalizer=canonicalizer,
        rotations=options.rotations,
        seed=options.seed,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=pick_device(options.device),
        limit=options.limit,
        progress=True,
    )
    found.render(Console())
    for worst in found.judged.worst[:3]:
        change = "" if worst.turned is None else f": {worst.upright} becomes {worst.turned}"
        place = worst.source or f"cloud {worst.index}"
        share = f"{100 * worst.agreement:.0f} %"
        print(f"changes most: {printable(place + change)}, stays for {share}")
    if file is not None:
        atomic_write(file, found.to_json() + "\n")
    if folder is not None:
        curve(found, folder / "curve.png")
        print(f"accuracy against angle: {folder / 'curve.png'}")
        for trial, name in ((found.alone, "worst"), (found.canonicalized, "worst-canonicalized")):
            if trial is not None and trial.worst:
                worst_gallery(trial, GivenClouds(dataset), folder / f"{name}.png")
                print(f"worst clouds, {trial.name}: {folder / name}.png")
    if least is not None and found.agreement < least:
        print(
            f"pointcanon: {found.judged.name} keeps {100 * found.agreement:.2f} % of its answers "
            f"under any rotation, less than the {100 * least:g} % asked for",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    from pointcanon.cli.given import add_clouds
    from pointcanon.cli.options import add_canonicalizer, add_computing

    parser = ArgumentParser(
        prog="pointcanon audit",
        description="How far a network can be trusted under rotation: its accuracy, and whether it "
        "agrees with itself, on data as they come, turned about the up axis, and turned at random.",
        exit_on_error=False,
    )
    parser.add_argument(
        "network",
        type=str,
        help="a checkpoint, ours or public; or import.path:name of a torch module, of a function "
        "from clouds (B, N, 3) to logits, or of one that makes a network when called",
    )
    add_clouds(parser)
    add_canonicalizer(parser, "in front of the network, to compare")
    parser.add_argument(
        "--rotations", type=PositiveInt, default=8, help="of each cloud, of either kind"
    )
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the first rotation")
    add_computing(parser)
    parser.add_argument("--json", type=Path | None, default=None, help="write the figures here")
    parser.add_argument(
        "--pictures",
        type=Path | None,
        default=None,
        help="folder for pictures: accuracy against angle, and the worst clouds",
    )
    parser.add_argument(
        "--min-agreement",
        type=float | None,
        default=None,
        help="exit with status 1 where a smaller share of the answers stays under any rotation; of "
        "the canonicalized network, if there is a canonicalizer",
    )
    return parser
