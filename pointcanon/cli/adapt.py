"""``pointcanon adapt``: make a network that is there already rotation-robust."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from pointcanon.canonicalizers import Canonicalizer

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Adapt as the arguments say, print the report, write the model; 0.

    Raises:
        PointcanonError: On arguments, files, data or networks that cannot be used.
    """
    from rich.console import Console

    from pointcanon import checkpoint
    from pointcanon.cli.given import open_clouds
    from pointcanon.cli.networks import open_network
    from pointcanon.cli.options import parse, pick_device
    from pointcanon.errors import UsageError
    from pointcanon.eval.audit import meet
    from pointcanon.files import atomic_write, require_writable
    from pointcanon.model import Canonicalized
    from pointcanon.train.adapt import adapt

    parser = _parser()
    options = parse(parser, argv)
    canonicalizer: Canonicalizer | None = parser.instantiate(options).canonicalizer
    # all that can be found out now rather than after an hour
    out = require_writable(options.out)
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out} does not end in .safetensors, as the model will be")
    file = None if options.json is None else require_writable(options.json)
    plot = None if options.plot is None else require_writable(options.plot)
    network = open_network(options.network)
    if isinstance(network, Canonicalized):
        network = network.predictor
    dataset = open_clouds(options, network, num_workers=options.num_workers)
    predictor, _ = meet(network, dataset)
    checkpoint.describe(predictor)
    require_writable(out, sum(value.nbytes for value in predictor.state_dict().values()))
    model = adapt(
        predictor,
        dataset,
        canonicalizer=canonicalizer,
        minutes=options.minutes,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        device=pick_device(options.device),
        num_workers=options.num_workers,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )
    model.report.render(Console())
    history = model.history
    print(f"trained for {history.epochs} epochs, {history.seconds:.0f} s: {history.stopped}")
    command = shlex.join(["pointcanon", "adapt", *argv])
    model.save(out, training_command=command)
    if file is not None:
        atomic_write(file, model.report.to_json() + "\n")
    if plot is not None:
        model.report.plot(plot)
    print(f"the rotation-robust network: {out}")
    return 0


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

    from pointcanon.canonicalizers import Canonicalizer
    from pointcanon.cli.given import add_clouds
    from pointcanon.cli.options import add_machine

    parser = ArgumentParser(
        prog="pointcanon adapt",
        description="Train a canonicalizer for a network that is there already and stays as it is, "
        "on clouds it was trained on.",
        exit_on_error=False,
    )
    parser.add_argument(
        "network",
        type=str,
        help="a checkpoint, ours or public; or import.path:name of a torch module, or of a "
        "function that makes one (its class must be registered, so that it can be saved)",
    )
    add_clouds(parser)
    parser.set_defaults({"data.split": "train"})
    parser.add_argument("--out", type=Path, required=True, help="of the model: FILE.safetensors")
    parser.add_argument(
        "--canonicalizer",
        type=Canonicalizer | None,
        default=None,
        help="in place of the recommended one: VectorNeuron, Steerable, PCA or any other; with "
        "options of its own, such as --canonicalizer.size large",
    )
    parser.add_argument("--minutes", type=PositiveFloat, default=None, help="of training, at most")
    parser.add_argument("--epochs", type=PositiveInt, default=None, help="at most")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="clouds of a step")
    parser.add_argument("--learning_rate", type=PositiveFloat, default=1e-3, help="at its highest")
    add_machine(parser)
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of everything random")
    parser.add_argument("--json", type=Path | None, default=None, help="write the report here")
    parser.add_argument(
        "--plot", type=Path | None, default=None, help="PNG of the accuracy against the angle"
    )
    return parser
