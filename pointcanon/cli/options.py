"""What several commands have in common: the options that name data, and opening a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from torch import nn

from pointcanon.errors import InputError, UsageError

if TYPE_CHECKING:
    import jsonargparse
    import torch

    from pointcanon.datasets import CloudDataset

__all__ = ["DataOptions", "Parser", "add_computing", "open_checkpoint", "parse", "pick_device"]


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
    """

    name: str = "modelnet40"
    root: str | None = None
    split: str = "test"
    num_points: int | Literal["all"] | None = None
    layout: str | None = None
    coordinate_frame: str | None = None
    normals: bool = False
    missing: Literal["raise", "warn"] | None = None

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
    from jsonargparse.typing import NonNegativeInt, PositiveInt

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


def pick_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: If there is none here.
    """
    import torch

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
