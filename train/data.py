"""The clouds of one training: train and validation loaders over a data set of the registry."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from pointcanon import datasets
from pointcanon.datasets import CloudDataset, CloudItem
from pointcanon.datasets.collate import collate
from pointcanon.errors import UsageError

__all__ = ["Clouds", "EpochSampler", "Epochs", "EpochsSampler", "Position"]


class EpochSampler(Sampler[int]):
    """A shuffle that depends on the seed and the epoch alone, so that a resumed run repeats it."""

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.size, self.seed, self.epoch = size, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(_shuffled(self.size, self.seed, self.epoch()).tolist())


def _shuffled(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


class Position(NamedTuple):
    """Where a training is: its epoch, and the batch of it that is to be read next."""

    epoch: int = 0
    batch: int = 0


class EpochsSampler(DistributedSampler[int]):
    """What one process reads of :class:`Epochs`: its part of every batch, from a position on.

    The shuffle depends on the seed and the epoch alone, and the processes divide each batch among
    them: P of them take the steps of one with a batch P times as large. What does not fill a batch
    for all is left out of an epoch; of fewer clouds than one batch, each process takes as many as
    the others, a few of them twice where the number does not divide.

    (A ``DistributedSampler`` is what Lightning leaves as it is. Lightning tells the epoch too late:
    loader processes ask before a resumed run is moved on.)

    Args:
        size: Clouds of the data set.
        batch_size: Clouds of a step, per process.
        seed: Of the shuffle.
        position: Asked each time an epoch is begun, or gone on with.
        rank: Of this process.
        processes: Their number.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        position: Callable[[], Position],
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self.position = size, batch_size, seed, position
        self.rank, self.processes = rank, processes
        self.batches = size // (batch_size * processes)

    def __len__(self) -> int:
        return self.batches * self.batch_size if self.batches else -(-self.size // self.processes)

    def __iter__(self) -> Iterator[int]:
        epoch, batch = self.position()
        order = _shuffled(self.size, self.seed, epoch)
        if self.batches:
            shape = (self.batches, self.processes, self.batch_size)
            share = order[: self.batches * self.processes * self.batch_size].view(shape)
            order = share[batch:, self.rank].flatten()
        else:
            wanted = torch.arange(self.rank, len(self) * self.processes, self.processes)
            order = order[wanted % self.size]
        return iter((epoch * self.size + order).tolist())


class Epochs(Dataset[Any]):
    """A data set, epoch after epoch: item ``n`` is its item ``n % len(dataset)``.

    What is random in reading it depends on the seed and ``n`` alone, so that a resumed run repeats
    it, whichever process reads.
    """

    def __init__(self, dataset: CloudDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, n: int) -> CloudItem:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + n)
            return self.dataset[n % len(self.dataset)]


class Clouds(lightning.LightningDataModule):
    """A data set's official train split, with a validation split held out of it.

    Args:
        name: A data set of :data:`pointcanon.datasets.REGISTRY`.
        root: Folder of its files; None for data that is generated.
        num_points: Points of each cloud; "all" for all there are, of a data set that offers it.
        batch_size: Clouds of a training step, per process.
        eval_batch_size: Clouds of a validation step.
        num_workers: Loader processes; 0 loads in the training process.
        coordinate_frame: Frame to convert to; None keeps the files' own.
        layout: Which layout to read where a root holds several.
        normals: Read normals too, for networks that look at them.
        resample: Draw the points of training clouds anew in each epoch, where a data set offers it.
        missing: "warn" goes on without files that should be there but are not; None leaves the
            choice to the data set, which raises an error.
        variant: Of a data set that has several, such as OBJ_BG or PB_T50_RS of ScanObjectNN.
        size: Clouds of the train split, for generated data; None for its default.
        seed: Of the shuffle.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        num_points: int | Literal["all"] = 1024,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        coordinate_frame: str | None = None,
        layout: str | None = None,
        normals: bool = False,
        resample: bool = False,
        missing: Literal["raise", "warn"] | None = None,
        variant: str | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise UsageError(f"data.{option} is {value}; choose at least {least}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.resumed = Position()
        options = {
            "num_points": num_points,
            "coordinate_frame": coordinate_frame,
            "layout": layout,
            "normals": normals or None,  # not every data set has them, or the two that follow
            "resample": resample or None,
            "missing": missing,
            "variant": variant,
        }
        options = {key: value for key, value in options.items() if value is not None}
        training = {**options, "size": size} if size is not None else options
        self.train_set = datasets.load(name, root, "train", **training)
        self.val_set = datasets.load(name, root, "val", **options)

    @property
    def _rank_and_processes(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _position(self) -> Position:
        """Of the epoch that is begun now, or gone on with."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return max(self.resumed, Position(epoch))

    def state_dict(self) -> dict[str, int]:
        """Kept with the state of the training, between two batches or at the end of an epoch."""
        if self.trainer is None:
            return Position()._asdict()
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        ended = epochs.processed > epochs.completed
        return Position(epochs.processed, 0 if ended else loop.batch_idx + 1)._asdict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resumed = Position(**state_dict)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        rank, processes = self._rank_and_processes
        sampler = EpochsSampler(
            len(self.train_set),
            self.batch_size,
            self.seed,
            self._position,
            rank=rank,
            processes=processes,
        )
        return DataLoader(
            Epochs(self.train_set, self.seed),
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        # Lightning's own sampler would pad the shares of the processes and count clouds twice
        sampler = None
        rank, processes = self._rank_and_processes
        if processes > len(self.val_set):
            raise UsageError(
                f"{processes} processes cannot share {len(self.val_set)} clouds of validation; "
                "start fewer"
            )
        if processes > 1:
            sampler = UnrepeatedDistributedSampler(
                self.val_set, num_replicas=processes, rank=rank, shuffle=False
            )
        return DataLoader(
            self.val_set,  # type: ignore[arg-type]
            self.eval_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals,
        )


def _leave_signals(worker: int) -> None:
    """Ctrl-C reaches the whole group of processes: the training decides when its readers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
