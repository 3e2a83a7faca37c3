"""The clouds of one training: train and validation loaders over a data set of the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pointcanon import datasets
from pointcanon.datasets import CloudDataset, CloudItem
from pointcanon.datasets.collate import collate
from pointcanon.errors import UsageError

__all__ = ["Clouds", "EpochSampler", "Epochs", "EpochsSampler"]


class EpochSampler(Sampler[int]):
    """A shuffle that depends on the seed and the epoch alone, so that a resumed run repeats it.

    It asks for the epoch each time it starts, because under DDP Lightning wraps it and tells the
    epoch to the wrapper only.
    """

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.size, self.seed, self.epoch = size, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        return iter(torch.randperm(self.size, generator=generator).tolist())


class EpochsSampler(EpochSampler):
    """The same, counting on from epoch to epoch, for :class:`Epochs`."""

    def __iter__(self) -> Iterator[int]:
        first = self.epoch() * self.size
        return (first + index for index in super().__iter__())


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
        self.first_epoch = 0
        options = {
            "num_points": num_points,
            "coordinate_frame": coordinate_frame,
            "layout": layout,
            "normals": normals or None,  # not every data set has them, or the two that follow
            "resample": resample or None,
            "missing": missing,
        }
        options = {key: value for key, value in options.items() if value is not None}
        training = {**options, "size": size} if size is not None else options
        self.train_set = datasets.load(name, root, "train", **training)
        self.val_set = datasets.load(name, root, "val", **options)

    @property
    def _processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _epoch(self) -> int:
        # loader processes start before Lightning has moved a resumed run on to its next epoch
        return 0 if self.trainer is None else max(self.first_epoch, self.trainer.current_epoch)

    def state_dict(self) -> dict[str, int]:
        """Kept with the state of the training, at the end of an epoch."""
        return {"first_epoch": 0 if self.trainer is None else self.trainer.current_epoch + 1}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first_epoch = state_dict["first_epoch"]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            Epochs(self.train_set, self.seed),
            self.batch_size,
            sampler=EpochsSampler(len(self.train_set), self.seed, self._epoch),
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            drop_last=len(self.train_set) >= self.batch_size * self._processes,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        # Lightning's own sampler would pad the shares of the processes and count clouds twice
        sampler = None
        if self._processes > 1 and self.trainer is not None:
            rank = self.trainer.global_rank
            sampler = UnrepeatedDistributedSampler(
                self.val_set, num_replicas=self._processes, rank=rank, shuffle=False
            )
        return DataLoader(
            self.val_set,  # type: ignore[arg-type]
            self.eval_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
        )
