"""From a network and some of the clouds it was trained on to a rotation-robust model."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from pointcanon.canonicalizers import Canonicalizer, ForGroup, Identity, Optimized
from pointcanon.coordinates import CoordinateFrame
from pointcanon.datasets import UNLABELLED
from pointcanon.datasets.augment import AUGMENTATIONS
from pointcanon.datasets.collate import collate
from pointcanon.datasets.given import GivenClouds
from pointcanon.datasets.split import stratified_split
from pointcanon.errors import InputError, NotFiniteError
from pointcanon.eval.audit import Audit, audit, meet
from pointcanon.eval.protocols import Pose, pose_rotations, random_pose
from pointcanon.frames import Frames
from pointcanon.losses import (
    Refines,
    contrastive_loss,
    matrix_fisher_loss,
    prior_loss,
    refinement_loss,
)
from pointcanon.model import RECOMMENDED_VOTE, Canonicalized, Vote
from pointcanon.predictors.base import TRAINED_ON, PartPredictor, Predictor
from pointcanon.priors import Aligned, Mixture, Prior, Upright
from pointcanon.rotations import product
from pointcanon.train.data import EpochSampler
from pointcanon.train.run import NOT_FOR_USERS

__all__ = ["Adapted", "Training", "adapt"]

MOST_POINTS = 2048
"""Of a cloud in training: its networks look at a few hundred of them."""

LEAST_EPOCHS, LEAST_STEPS = 20, 3000
"""Of a training that nothing stops: few clouds are seen more often."""

VALIDATIONS = 20
"""In a training that nothing stops."""

OUTLIERS, REFINEMENT_WEIGHT, CLASS_WEIGHT = 0.05, 0.1, 0.3
"""As in the recommended recipes."""


@dataclass(frozen=True)
class Training:
    """How a canonicalizer was trained.

    Attributes:
        clouds: It learned from.
        held_out: Clouds it was judged by, during training and in the report.
        epochs: It took.
        seconds: It took.
        stopped: Why it ended.
        losses: Number of epochs and validation loss, at each validation.
    """

    clouds: int
    held_out: int
    epochs: int
    seconds: float
    stopped: Literal["all epochs", "no longer improving", "time is up", "nothing to learn"]
    losses: tuple[tuple[int, float], ...]


class Adapted(Canonicalized):
    """What :func:`adapt` makes: the network behind its canonicalizer, and what became of it.

    Attributes:
        report: On held-out clouds, with and without the canonicalizer: ``print`` it, ``plot`` it.
        history: How the canonicalizer was trained.
    """

    report: Audit
    history: Training

    def __init__(
        self,
        predictor: nn.Module,
        canonicalizer: Canonicalizer,
        vote: Vote,
        report: Audit,
        history: Training,
    ) -> None:
        super().__init__(predictor, canonicalizer, vote)
        self.coordinate_frame = report.coordinate_frame
        self.report, self.history = report, history

    def save(self, path: str | Path, **card: Any) -> None:
        """Write the model, as :meth:`Canonicalized.save`, with the figures of its report."""
        plain = Canonicalized(self.predictor, self.canonicalizer, self.vote)
        for name in TRAINED_ON:
            setattr(plain, name, getattr(self, name))
        what = "accuracy" if self.report.labelled else "agreement"
        names = {"I": "upright", "z": "z", "SO3": "so3"}
        scores = self.report.judged.score
        metrics = {f"held_out_{what}_{names[pose]}": share for pose, share in scores.items()}
        plain.save(path, **{"metrics": metrics, **card})


def adapt(
    predictor: Callable[..., Any],
    clouds: Any,
    labels: Any = None,
    *,
    parts: Any = None,
    canonicalizer: Canonicalizer | None = None,
    prior: Prior | None = None,
    coordinate_frame: str | CoordinateFrame | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    patience: int = 5,
    held_out: float = 0.1,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Adapted:
    """Make an existing network rotation-robust: train a canonicalizer to stand in front of it.

    The network is frozen. The canonicalizer learns from the poses of the clouds, so they must stand
    as those did that the network was trained on; and, of a classifier, to tell the classes apart as
    the network does, which is asked once about each cloud as it comes: knowing what a thing is
    helps to see how it stands. A cloud for which it has no finite answer teaches its pose alone.
    Labels serve the report only; without them it compares with what the network says of the clouds
    as they come.
    The clouds that are held out decide which weights are kept, and the report is about them; use
    :func:`pointcanon.audit` for clouds that neither network has seen.

    In canonical pose a cloud has its centroid at the origin, so the network should have been
    trained on centred clouds; what it loses otherwise is part of the report's ``tax``.

    The training stops when the validation loss no longer falls, after ``epochs``, or when the time
    is up. The same seed gives the same model on the same machine, unless time ran out.

    Args:
        predictor: Anything that :func:`pointcanon.predictors.recognise` takes: a network from
            clouds ``(B, N, 3)`` to logits of classes or parts, in its final state.
        clouds: As :class:`~pointcanon.datasets.given.GivenClouds` takes them: an array
            ``(M, N, 3)``, a list of clouds of different size, or a torch data set. M >= 2.
        labels: ``(M,)`` integers, the classes; for part networks the categories.
        parts: For part networks, the part of each point.
        canonicalizer: Trained instead of the recommended one, in place, where it has anything to
            learn. It learns the classes if it is an ``Optimized`` with as many ``classes`` as the
            network.
        prior: Over the poses of the clouds. By default seven tenths are aligned, the heading of the
            others, which may look alike from all sides, is free.
        coordinate_frame: Which says where up is; None takes that of the clouds, else of the
            network, else z-up.
        epochs: At most; None chooses by the number of clouds.
        minutes: At most, for the training; the learning rate falls in that time.
        patience: Validations without a better one after which it stops, of 20 in all.
        held_out: Share of the clouds that is held out, of every class if labels are given.
        batch_size: Clouds of a step.
        learning_rate: At its highest.
        device: Where to compute; by default where the network is.
        num_workers: Processes that read the data; 0 reads here.
        seed: Of everything random.
        progress: Show a bar.

    Raises:
        CheckpointError: If the network was trained in another coordinate frame or on other classes.
        InputError: On clouds or arguments that cannot be used, or a network that fails.
    """
    _check(epochs, minutes, patience, held_out, batch_size, learning_rate, num_workers, seed)
    if isinstance(predictor, Canonicalized):
        raise InputError("the predictor is canonicalized already: pass its .predictor")
    network, given = meet(predictor, clouds, labels, parts=parts, coordinate_frame=coordinate_frame)
    if len(given) < 2:
        raise InputError("clouds holds 1 cloud: pass at least 2, one of which is held out")
    kept, out = _split(given, held_out, seed)
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))
    device = like.device if device is None else torch.device(device)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked):
        torch.manual_seed(seed)
        classes = None if isinstance(network, PartPredictor) else network.num_classes
        canonicalizer = canonicalizer or recommended(classes)
        canonicalizer.to(torch.promote_types(like.dtype, torch.float32))
        network.to(device)
        history, vote = (
            Training(len(kept), len(out), 0, 0.0, "nothing to learn", ()),
            RECOMMENDED_VOTE,
        )
        if any(weight.requires_grad for weight in canonicalizer.parameters()):
            classify = _classifier(network, canonicalizer, like.dtype)
            if classify is not None:
                canonicalizer.class_names = getattr(network, "classes", None)  # it learns these now
                vote = "agreement"
            canonicalizer.train()  # one that was loaded comes in evaluation mode
            history = _train(
                PoseTask(
                    canonicalizer,
                    prior or usual_prior(given.coordinate_frame),
                    given.coordinate_frame.up_axis,
                    classify=classify,
                    learning_rate=learning_rate,
                    minutes=minutes,
                    seed=seed,
                ),
                given.select(kept),
                given.select(out),
                epochs=epochs,
                minutes=minutes,
                patience=patience,
                batch_size=batch_size,
                num_workers=num_workers,
                device=device,
                progress=progress,
            )
    canonicalizer.to(device).eval()
    report = audit(
        Canonicalized(network, canonicalizer, vote),
        given.select(out),
        rotations=3,
        seed=seed,
        limit=200,
        progress=progress,
    )
    return Adapted(network, canonicalizer, vote, report, history).eval()


def recommended(classes: int | None = None) -> Optimized:
    """The canonicalizer of the recommended recipes, which learns so many classes besides."""
    return Optimized(
        answers=5, looks=2, negligible=0.01, classes=classes, dropout=0.2, class_dropout=0.3
    )


def _classifier(
    network: Predictor | PartPredictor, canonicalizer: Canonicalizer, dtype: torch.dtype
) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """What says which class a cloud is of, if both the network and the canonicalizer know classes.

    Raises:
        InputError: If they do not know the same number of them.
    """
    learned: int | None = getattr(canonicalizer, "classes", None)
    if learned is None:
        return None
    if isinstance(network, PartPredictor) or learned != network.num_classes:
        known = None if isinstance(network, PartPredictor) else network.num_classes
        raise InputError(
            f"canonicalizer.classes is {learned}, and the network tells {known or 'no'} classes "
            f"apart: construct it with classes={known}"
        )
    model = Canonicalized(network, Identity())

    def classify(batch: dict[str, Tensor]) -> Tensor:
        points, *others = (batch.get(key) for key in ("points", "mask", "normals"))
        assert points is not None
        labels = torch.full((len(points),), UNLABELLED, device=points.device)
        asked = torch.arange(len(points), device=points.device)
        while len(asked):
            mask, normals = (None if other is None else other[asked] for other in others)
            normals = None if normals is None else normals.to(dtype)
            try:
                labels[asked] = model.predict(points[asked].to(dtype), mask, normals).labels
                break
            except NotFiniteError as error:  # that cloud teaches its pose alone
                asked = torch.cat((asked[: error.cloud], asked[error.cloud + 1 :]))
        return labels

    return classify


def usual_prior(frame: CoordinateFrame) -> Mixture:
    """The prior of the recommended recipes: most clouds are aligned, some upright only."""
    return Mixture(
        [Aligned(concentration=50.0), Upright(axis=frame.up, concentration=50.0)], [0.7, 0.3]
    )


class PoseTask(lightning.LightningModule):
    """Train a canonicalizer by the poses of clouds; keep the weights that validate best.

    Unlike :class:`~pointcanon.train.task.CloudTask` it needs no labels, and its learning rate falls
    with the time where that is limited.

    Args:
        canonicalizer: Learns.
        prior: Over the poses of the clouds.
        up_axis: ``(3,)``, of the clouds.
        classify: Says of a batch of clouds as they come what they are, ``(B,)`` with ``UNLABELLED``
            for those that teach their pose alone, for canonicalizers that learn the classes as
            well. It is asked once about each cloud.
        learning_rate: At its highest.
        minutes: After which it will be stopped.
        seed: Of everything random in a step.
    """

    def __init__(
        self,
        canonicalizer: Canonicalizer,
        prior: Prior,
        up_axis: Tensor,
        *,
        classify: Callable[[dict[str, Tensor]], Tensor] | None = None,
        learning_rate: float,
        minutes: float | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.canonicalizer, self.prior, self.up_axis = canonicalizer, prior, up_axis
        self.classify, self.answers = classify, dict[int, int]()
        upright = isinstance(canonicalizer, ForGroup) and canonicalizer.group in ("SO2", "O2")
        self.pose: Pose = "z" if upright else "SO3"
        self.learning_rate, self.minutes, self.seed = learning_rate, minutes, seed
        self.mean = MeanMetric()
        self.losses: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self.validated_step = -1
        self.started = time.monotonic()

    # randomness is a function of the step

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        torch.manual_seed(self._step_seed)

    @property
    def _step_seed(self) -> int:
        return (self.seed * 7_368_787 + self.global_step) % (1 << 62)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._step_seed)
        classes = self._classes(batch)
        points, normals = _of_one_size(self._cast(batch), generator)
        points = AUGMENTATIONS["scale" if normals is None else "none"](points, generator)
        turn = random_pose(self.pose, len(points), self.up_axis, generator).to(points)
        points = product(points, turn.mT)
        normals = None if normals is None else product(normals, turn.mT)
        frames = self.canonicalizer(points, normals=normals)
        loss = _pose_loss(frames, self.prior, turn, _outliers(frames))
        if hasattr(self.canonicalizer, "refine"):
            refines = cast(Refines, self.canonicalizer)
            loss = loss + REFINEMENT_WEIGHT * refinement_loss(refines, points, self.prior, turn)
        if classes is not None:
            assert frames.class_logits is not None
            wrong = functional.cross_entropy(
                frames.class_logits, classes, ignore_index=UNLABELLED, reduction="sum"
            )
            loss = loss + CLASS_WEIGHT * wrong / len(classes)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(points))
        return loss

    def _classes(self, batch: dict[str, Tensor]) -> Tensor | None:
        """What the clouds of a batch are, ``(B,)``, where that is to be learned."""
        if self.classify is None:
            return None
        index = batch["index"].tolist()
        if not self.answers.keys() >= set(index):
            self.answers.update(zip(index, self.classify(batch).tolist(), strict=True))
        return torch.tensor([self.answers[cloud] for cloud in index], device=self.device)

    def on_validation_epoch_start(self) -> None:
        dataset = cast(Any, self.trainer.val_dataloaders).dataset
        self.turns = pose_rotations(self.pose, len(dataset), self.up_axis, seed=self.seed)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch = self._cast(batch)
        turn = self.turns[batch["index"].cpu()].to(batch["points"])
        posed = {key: product(batch[key], turn.mT) for key in ("points", "normals") if key in batch}
        frames = self.canonicalizer(posed["points"], batch.get("mask"), posed.get("normals"))
        # the frames that are answered, without the stages before them
        answered = replace(frames, stages=())
        loss = _pose_loss(answered, self.prior, turn, _outliers(frames))
        self.mean.update(loss, len(turn))

    def on_validation_epoch_end(self) -> None:
        loss = self.mean.compute()
        self.mean.reset()
        self.log("val/loss", loss, prog_bar=True)
        finite = [found for _, found in self.losses if math.isfinite(found)]
        if not self.best or loss < min(finite, default=math.inf):
            self.best = deepcopy(self.canonicalizer.state_dict())
        self.losses.append((self.current_epoch + 1, loss.item()))
        self.validated_step = self.global_step

    def on_fit_start(self) -> None:
        self.started = time.monotonic()

    def configure_optimizers(self) -> Any:
        learning = [weight for weight in self.canonicalizer.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(learning, self.learning_rate)
        total = max(1, int(self.trainer.estimated_stepping_batches))

        def share(step: int) -> float:
            """Of the training that is over."""
            over = step / total
            if self.minutes is not None:
                over = max(over, (time.monotonic() - self.started) / (60 * self.minutes))
            return over

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(share(step)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _cast(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Points and normals in the dtype of the weights."""
        dtype = next(self.canonicalizer.parameters()).dtype
        return {
            key: value.to(dtype) if key in ("points", "normals") else value
            for key, value in batch.items()
        }


def _train(
    task: PoseTask,
    train_set: GivenClouds,
    val_set: GivenClouds,
    *,
    epochs: int | None,
    minutes: float | None,
    patience: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    progress: bool,
) -> Training:
    """Train, and leave the best weights in the canonicalizer."""
    steps = max(1, len(train_set) // batch_size)
    epochs = epochs or max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / steps))
    stopping = EarlyStopping(
        "val/loss", patience=patience, check_finite=False, check_on_train_epoch_end=False
    )
    options: dict[str, Any] = {"num_workers": num_workers, "collate_fn": collate}
    with _quietly():
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=epochs,
            max_time=None if minutes is None else timedelta(minutes=minutes),
            check_val_every_n_epoch=max(1, epochs // VALIDATIONS),
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            callbacks=[stopping],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )
        sampler = EpochSampler(len(train_set), task.seed, lambda: trainer.current_epoch)
        train_loader: DataLoader[Any] = DataLoader(
            cast(Any, train_set),
            batch_size,
            sampler=sampler,
            drop_last=len(train_set) >= batch_size,
            persistent_workers=num_workers > 0,
            **options,
        )
        val_loader: DataLoader[Any] = DataLoader(cast(Any, val_set), 2 * batch_size, **options)
        try:
            trainer.fit(task, train_loader, val_loader)
            ended = trainer.current_epoch
            if task.validated_step < task.global_step:  # the time was up between validations
                trainer.validate(task, val_loader, verbose=False)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
    seconds = time.monotonic() - task.started
    task.canonicalizer.load_state_dict(task.best)
    timed_out = minutes is not None and seconds >= 60 * minutes
    return Training(
        clouds=len(train_set),
        held_out=len(val_set),
        epochs=ended,
        seconds=seconds,
        stopped="no longer improving"
        if stopping.stopped_epoch
        else "time is up"
        if timed_out
        else "all epochs",
        losses=tuple(task.losses),
    )


def _pose_loss(frames: Frames, prior: Prior, turn: Tensor, outliers: float) -> Tensor:
    """What the frames of any canonicalizer are to learn of the turn of the data."""
    loss = prior_loss(frames, prior, turn, outliers)
    if frames.embeddings is not None:
        loss = loss + contrastive_loss(frames.embeddings)
    if frames.fisher is not None:
        loss = loss + matrix_fisher_loss(frames.fisher[:, 0], turn)
    return loss


def _outliers(frames: Frames) -> float:
    """Share of clouds that may be wrong at no cost.

    Of several candidates one may be right, and a cloud none of whose candidates is near pulls at
    nothing. A single frame, which is far from right in the beginning, has to be pulled.
    """
    return OUTLIERS if any(each.count > 1 for each in (frames, *frames.stages)) else 0.0


def _of_one_size(
    batch: dict[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Points and normals of a batch without padding: thinned, or repeated where there are fewer."""
    points, mask = batch["points"], batch.get("mask")
    normals = batch.get("normals")
    count = min(MOST_POINTS, points.shape[1])
    if mask is None and count == points.shape[1]:
        return points, normals
    order = torch.rand(points.shape[:2], generator=generator).to(points.device)
    real = torch.full((len(points), 1), points.shape[1], device=points.device)
    if mask is not None:
        order = order + (~mask)  # padding last
        real = mask.sum(dim=1, keepdim=True)
    rank = torch.arange(count, device=points.device) % real
    index = order.argsort(dim=1).gather(1, rank)[..., None].expand(-1, -1, 3)
    return points.gather(1, index), None if normals is None else normals.gather(1, index)


def _rate(over: float) -> float:
    """Share of the highest learning rate: a short rise, then a cosine."""
    rise = min(1.0, (over + 1e-3) / 0.05)
    return rise * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, over))) / 2)


def _split(given: GivenClouds, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and to be judged by, at least one of each."""
    kept, out = stratified_split(given.labels, held_out, seed)
    if not len(out):  # every class has but one cloud
        kept, out = stratified_split(np.zeros(len(given), dtype=np.int64), held_out, seed)
    return kept.tolist(), out.tolist()


def _check(
    epochs: int | None,
    minutes: float | None,
    patience: int,
    held_out: float,
    batch_size: int,
    learning_rate: float,
    num_workers: int,
    seed: int,
) -> None:
    at_least = {
        "epochs": (epochs, 1),
        "patience": (patience, 1),
        "batch_size": (batch_size, 1),
        "num_workers": (num_workers, 0),
        "seed": (seed, 0),
    }
    for name, (value, least) in at_least.items():
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; choose at least {least}")
    for name, positive in {"minutes": minutes, "learning_rate": learning_rate}.items():
        if positive is not None and not 0 < positive < math.inf:
            raise InputError(f"{name} is {positive}; choose a number above 0")
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; choose a share between 0 and 1")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what Lightning says about what is meant to be so."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (*NOT_FOR_USERS, "LeafSpec"):
                warnings.filterwarnings("ignore", f".*{message}")
            yield
    finally:
        logger.setLevel(level)
