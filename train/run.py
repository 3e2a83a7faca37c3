"""From a recipe to a trained model: the ``train`` command."""

from __future__ import annotations

import shlex
import warnings
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import lightning
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistError

from pointcanon.errors import DataError, PointcanonError, UsageError
from pointcanon.files import atomic_write
from pointcanon.train.callbacks import Interrupted, Patience, SaveBest, SaveState, StateFile
from pointcanon.train.data import Clouds
from pointcanon.train.task import CloudTask

__all__ = ["find_recipe", "recipes", "train"]


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("pointcanon.train") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or the file of that name.

    Raises:
        UsageError: If there is neither, or the file holds no recipe.
    """
    if name in recipes():
        return Path(str(resources.files("pointcanon.train") / "recipes" / f"{name}.yaml"))
    if Path(name).is_file():
        _check_readable(Path(name))
        return Path(name)
    raise UsageError(
        f"there is no recipe and no file {name!r}; the recipes are: {', '.join(recipes())}"
    )


def _check_readable(path: Path) -> None:
    try:
        content = yaml.safe_load(path.read_text())
        size = _written_out(content)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read as a recipe: {reason}") from error
    if size > 10_000:
        raise UsageError(
            f"{path} is no recipe: with its aliases written out it has {size:,} values"
        )
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} holds no recipe: it must be YAML with the keys data, model and trainer"
        )


def _written_out(content: object) -> int:
    """Values in what YAML holds once its aliases are written out, without writing them out."""
    known: dict[int, int] = {}

    def size(value: object) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in known:
            inner = value.values() if isinstance(value, dict) else value
            known[id(value)] = 1 + sum(map(size, inner))  # one in itself recurses without end
        return known[id(value)]

    return size(content)


NOT_FOR_USERS = (
    "LightningCLI's args parameter",  # the arguments do come from a command line
    "Checkpoint directory .* exists",  # _check_folder has looked
    "Found .* module.* in eval mode",  # the frozen part, on purpose
    "does not have many workers",  # reading a cloud is cheap
    "The number of training batches",
    "Experiment logs directory .* exists",
    "You're resuming from a checkpoint that ended before the epoch ended",  # Clouds knows where
)
"""Warnings of Lightning about what is meant to be so."""


class _CLI(LightningCLI):
    """Recipe, data, model and trainer as one command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output", default=None, help="folder of what is kept (default: runs/RECIPE)"
        )
        parser.add_argument(
            "--resume", action="store_true", help="go on where the run in --output stopped"
        )
        parser.add_argument(
            "--patience",
            type=int,
            default=None,
            help="stop after so many validations without a better score",
        )
        parser.add_argument(
            "--save_interval",
            type=float,
            default=300.0,
            help="seconds between states kept in last.ckpt amid an epoch; each epoch ends with one",
        )
        parser.link_arguments("data.train_set", "model.dataset", apply_on="instantiate")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        self.folder = Path(self.config.output)
        _check_folder(self.folder, self.config.resume)
        # the best model is written before the state, so that a resumed run knows what is on disk
        callbacks: list[lightning.Callback] = [
            SaveBest(self.folder, self.command),
            SaveState(self.folder / "last.ckpt", self.config.save_interval),
        ]
        if self.config.patience is not None:
            callbacks.append(
                Patience(self.model.monitor, mode="max", patience=self.config.patience)
            )
        parsed: Any = self.config_init
        asked = parsed.trainer
        if asked.sync_batchnorm:
            raise UsageError(
                "trainer.sync_batchnorm is not for these networks, whose batch norm knows padding: "
                "leave it out; several processes normalise by the clouds of all of them as it is"
            )
        more = asked.callbacks or []
        kwargs["callbacks"] = callbacks + (more if isinstance(more, list) else [more])
        more = asked.plugins or []
        kwargs["plugins"] = [StateFile(), *(more if isinstance(more, list) else [more])]
        if asked.logger in (None, True):
            kwargs["logger"] = _loggers(self.folder)
        return super().instantiate_trainer(**kwargs)

    command = ""
    folder: Path


def _check_folder(folder: Path, resume: bool) -> None:
    state = folder / "last.ckpt"
    if resume and not state.is_file():
        raise UsageError(f"there is nothing to resume: {state} does not exist")
    if not resume and state.exists():
        raise UsageError(
            f"{folder} holds a training already: add --resume to go on with it, "
            "or choose another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_torn(folder)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error}") from error


@rank_zero_only  # of several processes the first may write already when the last looks
def _remove_torn(folder: Path) -> None:
    """Files of a run that was killed while it wrote them."""
    for torn in folder.glob(".*.tmp"):
        torn.unlink(missing_ok=True)


def _loggers(folder: Path) -> list[Logger]:
    table = CSVLogger(folder, name="logs")  # a resumed run writes a new version beside the old
    loggers: list[Logger] = [table]
    with suppress(ModuleNotFoundError):  # optional; the CSV file holds the same figures
        loggers.append(TensorBoardLogger(folder, name="logs", version=table.version))
    return loggers


def train(argv: list[str]) -> Path:
    """Run a training from command-line arguments; see ``pointcanon train --help``.

    Returns:
        The folder that holds ``best.safetensors``, ``last.ckpt``, ``config.yaml`` and ``logs/``.

    Raises:
        PointcanonError: On anything a user can mend.
    """
    arguments = _resolve_recipe(argv)
    _CLI.command = shlex.join(["pointcanon", "train", *argv])
    with warnings.catch_warnings():
        for message in NOT_FOR_USERS:
            warnings.filterwarnings("ignore", f".*{message}")
        return _train(arguments)


def _train(arguments: list[str]) -> Path:
    try:
        cli = _CLI(
            CloudTask,
            Clouds,
            run=False,
            args=arguments,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"max_epochs": 10, "num_sanity_val_steps": 0},
            parser_kwargs={"prog": "pointcanon train", "exit_on_error": False},
        )
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from error
    state = cli.folder / "last.ckpt"
    config = cli.parser.dump(cli.config, skip_validation=True)
    try:
        atomic_write(cli.folder / "config.yaml", config)
        cli.trainer.fit(
            cli.model,
            datamodule=cli.datamodule,
            ckpt_path=str(state) if cli.config.resume else None,
        )
    except (Interrupted, SystemExit):  # the latter is Lightning's answer to Ctrl-C
        raise PointcanonError(f"interrupted; {_left(state, cli.command)}") from None
    except OSError as error:
        raise DataError(f"{error}; {_left(state, cli.command)}") from error
    except RuntimeError as error:
        if isinstance(error, DistError) or "gloo" in str(error):
            raise PointcanonError(
                "another process of the training ended, and said why where it writes; "
                f"{_left(state, cli.command)}"
            ) from error
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads data died ({_sentence(error)}), as happens where memory is "
            f"short: choose fewer --data.num_workers; {_left(state, cli.command)}"
        ) from error
    return cli.folder


def _left(state: Path, command: str) -> str:
    """What a training that ended early leaves, in words."""
    if not state.is_file():
        return "nothing was kept yet"
    return f"go on with: {command if '--resume' in command.split() else f'{command} --resume'}"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _resolve_recipe(argv: list[str]) -> list[str]:
    """Recipe names become files, and the default output folder is named after the recipe."""
    arguments, recipe = list(argv), None
    for position, argument in enumerate(argv):
        if argument == "--config" and position + 1 < len(argv):
            recipe = argv[position + 1]
            arguments[position + 1] = str(find_recipe(recipe))
        elif argument.startswith("--config="):
            recipe = argument.removeprefix("--config=")
            arguments[position] = f"--config={find_recipe(recipe)}"
    helped = any(argument.startswith(("-h", "--help", "--print_config")) for argument in argv)
    if recipe is None and not helped:
        raise UsageError(f"name a recipe: --config {' | '.join(recipes())}")
    if recipe is not None and not any(a.split("=")[0] == "--output" for a in argv):
        # before the recipe, so that an output named in it prevails
        arguments = ["--output", f"runs/{Path(recipe).stem}", *arguments]
    return arguments
