"""What several commands have in common: the options that name data, and opening a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, cast, get_args

from torch import nn

from pointcanon.errors import InputError, UsageError

if TYPE_CHECKING:
    import jsonargparse
    import torch

    from pointcanon.canonicalizers import Canonicalizer
    from pointcanon.datasets import CloudDataset
    from pointcanon.model import Canonicalized

__all__ = [
    "UNTRAINED",
    "DataOptions",
    "Parser",
    "add_canonicalizer",
    "add_computing",
    "add_machine",
    "add_vote",
    "open_canonicalizer",
    "open_checkpoint",
    "open_model",
    "parse",
    "pick_device",
    "with_options",
]


class Parser(argparse.ArgumentParser):
    """Of the small commands: bad usage is a UsageError, reported as every other error is."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class DataOptions:
    """The data set a command works on; None leaves a choice to the data set.

    Args:
        name: As pointcanon data list has it, such as modelnet40 or shapenet-part.
        root: Folder that holds the files; none for generated data.
        split: train, val, trainval or test.
        num_points: Points per cloud; "all" for all there are, of a data set that offers it.
        layout: h5, off, txt or pyg, where a root holds several.
        coordinate_frame: Frame to convert the clouds to: z-up, y-up or y-up-mirrored.
        normals: Read normals too, for networks that look at them.
        missing: "warn" goes on without files that should be there but are not.
        variant: Of ScanObjectNN, such as OBJ_BG or PB_T50_RS; of ModelNet40-C, such as gaussian_3.
    """

    name: str = "modelnet40"
    root: str | None = None
    split: str = "test"
    num_points: int | Literal["all"] | None = None
    layout: str | None = None
    coordinate_frame: str | None = None
    normals: bool = False
    missing: Literal["raise", "warn"] | None = None
    variant: str | None = None

    def open(self) -> CloudDataset:
        """The data set.

        Raises:
            UsageError: On an unknown name, or an option that data set does not have, or cannot
                meet.
            DataError: If the root does not hold the data set.
        """
        from pointcanon import datasets

        options = asdict(self)
        name, root, split = (options.pop(key) for key in ("name", "root", "split"))
        given = {key: value for key, value in options.items() if value not in (None, False)}
        try:
            return datasets.load(name, root, split, **given)
        except InputError as error:  # all that is given here was typed by the user
            raise UsageError(str(error)) from error


def parse(parser: jsonargparse.ArgumentParser, argv: list[str]) -> jsonargparse.Namespace:
    """What the arguments say.

    Raises:
        UsageError: On arguments that the parser, made with ``exit_on_error=False``, refuses.
    """
    import jsonargparse

    try:
        return parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        reason = " ".join(str(error).split())  # it may span lines
        raise UsageError(f"{reason}; see {parser.prog} --help") from error


def add_computing(parser: jsonargparse.ArgumentParser) -> None:
    """The options that say how clouds are run through a network, and how many of them."""
    from jsonargparse.typing import PositiveInt

    parser.add_argument("--batch_size", type=PositiveInt, default=32, help="clouds at once")
    add_machine(parser)
    parser.add_argument(
        "--limit",
        type=PositiveInt,
        default=None,
        help="use n clouds, drawn from all of the data set: the same ones every time",
    )


def add_machine(parser: jsonargparse.ArgumentParser) -> None:
    """The options that say what computes and what reads."""
    from jsonargparse.typing import NonNegativeInt

    parser.add_argument(
        "--num_workers", type=NonNegativeInt, default=0, help="processes that read the data"
    )
    parser.add_argument(
        "--device",
        type=str | None,
        default=None,
        help="such as cpu or cuda; cuda where there is one",
    )


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """The device of that name; by default a GPU where there is one.

    Args:
        name: As torch has it.
        local_rank: Of several processes on this machine which, each with a GPU of its own.

    Raises:
        UsageError: If there is none here.
    """
    import torch

    name = name or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return torch.device(name)


def open_checkpoint(path: str | Path) -> nn.Module:
    """What a checkpoint holds, in eval mode: a :class:`~pointcanon.model.Canonicalized` where
    pointcanon saved one, else a predictor, ours or public.

    Raises:
        CheckpointError: If the file cannot be read, or fits nothing that is known.
    """
    from pointcanon import checkpoint, model, predictors

    if checkpoint.is_safetensors(path):
        card = checkpoint.read_card(path)
        if card is not None and card.kind == "canonicalized":
            return model.load(path)
    return predictors.load(path)


UNTRAINED = ("PCA", "Manhattan", "Search")
"""Canonicalizers that have nothing to learn, so that their names alone are enough."""


def add_canonicalizer(parser: argparse.ArgumentParser, purpose: str) -> None:
    """The options that say which canonicalizer, and how it is set.

    Args:
        parser: Of either kind.
        purpose: Of the canonicalizer, for the help.
    """
    from pointcanon.canonicalizers import PRETRAINED

    trained, untrained = " or ".join(PRETRAINED), " or ".join(UNTRAINED)
    parser.add_argument(
        "--canonicalizer",
        type=str,
        help=f"{purpose}: a checkpoint that has one, {trained}, which come trained, {untrained}, "
        "which need no training; several with commas between them propose together",
    )
    parser.add_argument(
        "--canonicalizer_options",
        type=str,
        metavar="JSON",
        help="options that the canonicalizer is to have in place of its own, of those that need no "
        'training, such as {"looks": 4, "answers": 10}',
    )


def add_vote(parser: argparse.ArgumentParser) -> None:
    """The option that says how the answers in several frames are joined."""
    from pointcanon.model import Vote

    parser.add_argument(
        "--vote",
        choices=get_args(Vote),
        help="how what the predictor says in several frames is joined, in place of the "
        "checkpoint's own way, or of agreement where both halves are known to tell the same "
        "classes apart, and certainty elsewhere; agreement and product heed what the canonicalizer "
        "takes the cloud for, to choose the pose or to decide with the predictor",
    )


def open_canonicalizer(name: str | Path) -> Canonicalizer:
    """A canonicalizer by its name where it needs no training or has had it, or of a checkpoint.

    Several names with commas between them are a :class:`~pointcanon.canonicalizers.Union`.

    Raises:
        CheckpointError: If the file cannot be read, or holds no canonicalizer.
        UsageError: If it is none of these.
    """
    from pointcanon import canonicalizers

    if str(name) in canonicalizers.PRETRAINED or Path(name).exists():
        return canonicalizers.load(name)
    if "," in str(name):
        return canonicalizers.Union([open_canonicalizer(part) for part in str(name).split(",")])
    if name not in UNTRAINED:
        known = ", ".join((*canonicalizers.PRETRAINED, *UNTRAINED))
        raise UsageError(f"--canonicalizer {name!r} is neither a checkpoint nor one of: {known}")
    return canonicalizers.CANONICALIZERS[str(name)]()


def with_options(canonicalizer: Canonicalizer, text: str | None) -> Canonicalizer:
    """A canonicalizer with the options that ``--canonicalizer_options`` gives it, if any.

    Raises:
        UsageError: If they are no JSON object, the canonicalizer has no such options or refuses a
            value, or its weights do not fit them.
    """
    import jsonargparse

    if text is None:
        return canonicalizer
    kind, known = type(canonicalizer), canonicalizer.options
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UsageError(
            f"--canonicalizer_options is {text!r}; give JSON, such as '{{\"answers\": 10}}'"
        )
    names: Iterable[str] = getattr(canonicalizer, "hyperparameters", ())
    fixed: set[str | int] = {name for name in names if name not in known}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=fixed)
    try:
        typed = parser.parse_object(
            {name: value for name, value in options.items() if name in known}, defaults=False
        )
        made = parser.instantiate(typed)  # an energy is a module
        return canonicalizer.with_options(**{**options, **made.as_dict()})
    except (InputError, jsonargparse.ArgumentError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--canonicalizer_options, {kind.__name__}: {reason}") from error


def open_model(
    path: str | Path,
    canonicalizer: str | Path | None = None,
    canonicalizer_options: str | None = None,
    vote: str | None = None,
) -> Canonicalized:
    """The model in a checkpoint, in eval mode; a predictor alone is put behind no canonicalizer.

    Args:
        path: As for :func:`open_checkpoint`.
        canonicalizer: As for :func:`open_canonicalizer`, put in the place of the checkpoint's.
        canonicalizer_options: As for :func:`with_options`.
        vote: In the place of the checkpoint's, which another canonicalizer keeps as far as it knows
            the classes.

    Raises:
        CheckpointError: As for the first two.
        InputError: If the predictor cannot vote so.
        UsageError: As for the canonicalizer.
    """
    from pointcanon.canonicalizers import Identity
    from pointcanon.model import Canonicalized, Vote, vote_before

    whole = open_checkpoint(path)
    alone = not isinstance(whole, Canonicalized)
    model = Canonicalized(whole, Identity()) if alone else cast(Canonicalized, whole)
    if alone and canonicalizer is None and canonicalizer_options is not None:
        raise UsageError(
            f"--canonicalizer_options, and {path} has no canonicalizer: give one by --canonicalizer"
        )
    front = model.canonicalizer if canonicalizer is None else open_canonicalizer(canonicalizer)
    front = with_options(front, canonicalizer_options)
    if vote is None and not alone:
        vote = model.vote
        if canonicalizer is not None:
            vote = vote_before(model.predictor, front, model.vote)
    if front is not model.canonicalizer or vote != model.vote:
        model = Canonicalized(model.predictor, front, cast("Vote | None", vote))
    return model.eval()
