"""One Lightning module for every training: a predictor, a canonicalizer for it, or both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from pointcanon import canonicalizers, predictors
from pointcanon.canonicalizers import Canonicalizer, Identity, Optimized, Search
from pointcanon.datasets import UNLABELLED, CloudDataset, PartDataset
from pointcanon.datasets.augment import Augmentation
from pointcanon.datasets.augment import augmentation as find_augmentation
from pointcanon.errors import UsageError
from pointcanon.eval.evaluate import check_fit
from pointcanon.eval.metrics import InstanceIoU, PointAccuracy
from pointcanon.eval.protocols import pose_rotations, protocol, random_pose
from pointcanon.frames import Frames
from pointcanon.layers.shared_batch import mean, synchronise
from pointcanon.losses import (
    Refines,
    contrastive_loss,
    matrix_fisher_loss,
    prior_loss,
    quotient_loss,
    refinement_loss,
    refinement_starts,
)
from pointcanon.model import HEEDING, RECOMMENDED_VOTE, Canonicalized, Vote
from pointcanon.predictors import PartPredictor
from pointcanon.priors import Prior
from pointcanon.rotations import group, product

__all__ = ["CloudTask", "find_predictor"]

Trained = Literal["predictor", "canonicalizer", "joint"]


def find_predictor(name: str, dataset: CloudDataset, options: dict[str, Any]) -> nn.Module:
    """A network by its registered name, freshly initialised, or else from the file of that name.

    A part network is told the class of an object where there are several, unless ``options`` say
    ``num_categories: 0``.

    Raises:
        UsageError: If it is neither, options are given for a file, or there are no parts to learn.
        CheckpointError: If the file cannot be used.
    """
    if name in predictors.PREDICTORS:
        return predictors.create(name, **{**_outputs(name, dataset), **options})
    if not Path(name).exists():
        known = ", ".join(predictors.PREDICTORS)
        raise UsageError(f"predictor {name!r} is neither a file nor one of: {known}")
    if options:
        raise UsageError(f"{name} says its own architecture; leave out predictor_options")
    return predictors.load(name)


def _outputs(name: str, dataset: CloudDataset) -> dict[str, int]:
    """How many classes or parts the network of that name is to tell apart."""
    classes = len(dataset.classes)
    if not issubclass(predictors.PREDICTORS[name], PartPredictor):
        return {"num_classes": classes}
    if not isinstance(dataset, PartDataset):
        raise UsageError(
            f"predictor {name!r} labels parts, and {dataset.name} has none: choose a classifier, "
            "or data with parts, such as shapenet-part"
        )
    return {"num_parts": len(dataset.parts), "num_categories": classes if classes > 1 else 0}


class CloudTask(lightning.LightningModule):
    """Train ``Canonicalized(predictor, canonicalizer)``, whole or in part.

    The loss is ``task_weight`` times the cross-entropy of the predictor on the canonical clouds, or
    on all their labelled points where it labels parts, plus ``prior_weight`` times the prior loss
    of the frames. Learned canonicalization has the first only, prior-regularised both; the second
    alone never runs the predictor while training. Further losses of the frames come in where their
    weight is not zero.

    Args:
        predictor: A registered name, or the file of a checkpoint to start from. What it labels,
            clouds or their parts, is what is learned.
        canonicalizer: None trains the predictor as it is.
        trained: Which of the two learns; the other is frozen, in evaluation mode.
        prior: Over the poses of the predictor's training data.
        prior_weight: Of the prior loss.
        outliers: Share of clouds whose pose the prior loss gives up on; for several candidates.
        refinement_weight: Of the refinement loss, for a canonicalizer that refines.
        contrastive_weight: Of the contrastive loss, for ``Contrastive``.
        matrix_fisher_weight: Of the matrix Fisher loss, for a canonicalizer that says how sure it
            is, such as ``VectorNeuron(orthonormalise="matrix-fisher")``. It takes the pose of the
            data for the canonical one, and needs no prior.
        quotient_weight: Of the quotient loss, which takes the pose of the data for the canonical
            one up to a finite group; of several candidates it looks at the first that is proposed.
        quotient_group: That group: C<n>, T, O or I.
        class_weight: Of the cross-entropy of what the canonicalizer itself takes the clouds for,
            where it learns the classes as well (``classes`` of ``Optimized``).
        task_weight: Of the cross-entropy.
        vote: How the predictor's outputs in several frames are joined, as in ``Canonicalized``.
        protocol: Train and test poses, such as ``z/SO3``.
        augmentation: Of the clouds, before they are turned; or the name of one of
            :data:`pointcanon.datasets.augment.AUGMENTATIONS`.
        label_smoothing: Of both cross-entropies, the predictor's and the canonicalizer's.
        optimizer: ``adamw``, or ``sgd`` with momentum 0.9.
        learning_rate: At its highest.
        weight_decay: Of the optimizer.
        warmup: Share of the training in which the rate rises; it then falls along a cosine.
        final_rate: Share of the learning rate that is left at the end.
        predictor_options: Hyper-parameters of a predictor that is created by name.
        start: A trained canonicalizer of the kind to be trained, by name or the file of a
            checkpoint, whose weights it begins with; None begins from nothing.
        seed: Of poses, augmentation, and everything random in a step.
        refinement_spread: Largest turn away from the data's pose that the refinement loss is to
            undo, in degrees.
        dataset: The :class:`~pointcanon.datasets.CloudDataset` that is trained on; the command line
            fills it in (untyped, because its parser takes protocols for configurable classes).
    """

    def __init__(
        self,
        predictor: str,
        canonicalizer: Canonicalizer | None = None,
        trained: Trained = "canonicalizer",
        prior: Prior | None = None,
        prior_weight: float = 1.0,
        outliers: float = 0.0,
        refinement_weight: float = 0.0,
        contrastive_weight: float = 0.0,
        matrix_fisher_weight: float = 0.0,
        quotient_weight: float = 0.0,
        quotient_group: str = "O",
        class_weight: float = 0.0,
        task_weight: float = 1.0,
        vote: Vote = "probabilities",
        protocol: str = "I/SO3",
        augmentation: str | Augmentation = "none",
        label_smoothing: float = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.05,
        final_rate: float = 0.01,
        predictor_options: dict[str, Any] | None = None,
        start: str | None = None,
        seed: int = 0,
        refinement_spread: float = 30.0,
        *,
        dataset: Any,
    ) -> None:
        super().__init__()
        if trained == "canonicalizer" and predictor in predictors.PREDICTORS:
            raise UsageError(
                f"a canonicalizer is trained for a predictor that is trained already, and "
                f"{predictor!r} is a new one: give a checkpoint with --model.predictor FILE"
            )
        network = find_predictor(predictor, dataset, predictor_options or {})
        if start is not None:
            _begin_with(start, canonicalizer, str(dataset.coordinate_frame))
        self.model = Canonicalized(network, canonicalizer or Identity(), vote)
        check_fit(self.model, dataset)
        self.model.classes = tuple(dataset.classes)
        if self.model.segments:
            self.model.parts = tuple(dataset.parts)
        self.model.coordinate_frame = str(dataset.coordinate_frame)
        self.trained: Trained = trained
        if self.frozen is not None:
            self.frozen.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UsageError(
                f"nothing to train: the {trained} has no parameters; choose another canonicalizer"
            )
        if any(isinstance(part, Search) for part in self.model.canonicalizer.modules()):
            raise UsageError(
                "Search looks for poses by a copy of the predictor as it is now: train the "
                "predictor first, then put Search in front of it, pointcanon eval FILE "
                "--canonicalizer Search"
            )
        weights = (task_weight, contrastive_weight, matrix_fisher_weight, quotient_weight)
        if prior is None and not any(weights):
            raise UsageError("nothing to learn from: task_weight is 0 and there is no prior")
        if prior is None and isinstance(self.model.canonicalizer, Optimized):
            raise UsageError("Optimized learns which candidate is right from a prior: give one")
        self.prior, self.prior_weight, self.task_weight = prior, prior_weight, task_weight
        self.outliers, self.refinement_weight = outliers, refinement_weight
        self.contrastive_weight = contrastive_weight
        self.matrix_fisher_weight = matrix_fisher_weight
        self.quotient_weight, self.quotient_group = quotient_weight, group(quotient_group)
        self.class_weight = class_weight
        if refinement_weight > 0 and not (prior and hasattr(self.model.canonicalizer, "refine")):
            raise UsageError(
                "refinement_weight needs a prior and a canonicalizer that refines (Optimized)"
            )
        if not 0 < refinement_spread <= 180:
            raise UsageError(
                f"refinement_spread is {refinement_spread}; choose degrees in (0, 180]"
            )
        self.refinement_spread = math.radians(refinement_spread)
        if refinement_weight > 0 and getattr(dataset, "num_points", None) == "all":
            raise UsageError(
                "refinement_weight needs clouds of one size: give --data.num_points a number"
            )
        told_apart = getattr(self.model.canonicalizer, "classes", None)
        if class_weight > 0 and told_apart != len(dataset.classes):
            raise UsageError(
                f"class_weight needs a canonicalizer that learns {len(dataset.classes)} classes, "
                f"as {dataset.name} has, and this one learns {told_apart or 'none'}: give "
                f"--model.canonicalizer.classes {len(dataset.classes)} (Optimized), or for another "
                f"canonicalizer --model.class_weight 0 --model.vote {RECOMMENDED_VOTE}"
            )
        if vote in HEEDING and class_weight <= 0:
            raise UsageError(
                f"vote {vote} heeds what the canonicalizer takes a cloud for, and class_weight is "
                f"{class_weight:g}, so it learns no classes: give --model.vote {RECOMMENDED_VOTE}"
            )
        self.protocol = _protocol(protocol)
        self.augmentation = find_augmentation(augmentation)
        _check_augmentation(
            self.augmentation, parts=self.model.segments, normals=getattr(dataset, "normals", False)
        )
        self.label_smoothing = label_smoothing
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.weight_decay, self.warmup, self.final_rate = weight_decay, warmup, final_rate
        self.seed = seed
        self.up_axis = dataset.coordinate_frame.up_axis
        self.accuracy: Metric
        if self.model.segments:
            self.accuracy = PointAccuracy(dataset.part_ranges)
            self.instance_miou = InstanceIoU(dataset.part_ranges)
        else:
            self.accuracy = MulticlassAccuracy(len(dataset.classes), average="micro")
        self.val_loss = MeanMetric()

    @property
    def monitor(self) -> str:
        """Name of the figure that says which epoch is the best."""
        return "val/instance_miou" if self.model.segments else "val/accuracy"

    @property
    def frozen(self) -> nn.Module | None:
        """The part that does not learn."""
        parts = {"predictor": self.model.canonicalizer, "canonicalizer": self.model.predictor}
        return parts.get(self.trained)

    def setup(self, stage: str) -> None:
        synchronise(self.model, stage == "fit" and self.trainer.world_size > 1)

    def teardown(self, stage: str) -> None:
        synchronise(self.model, False)

    def train(self, mode: bool = True) -> CloudTask:
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # randomness is a function of the step, so a resumed run repeats an undisturbed one; it is
        # the same in all processes, and a SharesBatch takes its part of it
        torch.manual_seed(self._step_seed(batch_idx))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._step_seed(batch_idx) + 1)
        # drawn for the clouds of all processes: those of a cloud do not depend on their number
        processes, count = self.trainer.world_size, len(batch["points"])
        mine = slice(self.global_rank * count, (self.global_rank + 1) * count)
        points = self.augmentation(batch["points"].repeat(processes, 1, 1), generator)[mine]
        turns = random_pose(self.protocol.train, processes * count, self.up_axis, generator)
        turn = turns[mine].to(points)
        turns_away = refinement_starts(
            processes * count, spread=self.refinement_spread, generator=generator
        )
        starts = turns_away[mine]
        loss = self._loss(_turned({**batch, "points": points}, turn), turn, starts)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(points))
        return loss

    def on_validation_epoch_start(self) -> None:
        count = len(self.trainer.datamodule.val_set)  # type: ignore[attr-defined]
        self.val_turns = pose_rotations(self.protocol.test, count, self.up_axis, seed=self.seed)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        turn = self.val_turns[batch["index"].cpu()].to(batch["points"])
        batch = _turned(batch, turn)
        logits = self.model(*_geometry(batch), self._category(batch))
        target = self._target(batch)
        if self.model.segments:
            scored = logits, target, batch["label"], batch.get("mask")
            self.instance_miou.update(*scored)
            self.accuracy.update(*scored)
            self.log("val/instance_miou", self.instance_miou, on_epoch=True, prog_bar=True)
        else:
            self.accuracy.update(logits, target)
        labelled = (target != UNLABELLED).sum()
        self.val_loss.update(_cross_entropy(logits, target, labelled), labelled)
        self.log("val/accuracy", self.accuracy, on_epoch=True, prog_bar=True)
        self.log("val/loss", self.val_loss, on_epoch=True, prog_bar=True)

    def _target(self, batch: dict[str, Tensor]) -> Tensor:
        """What is to be answered: ``(B,)`` classes, or ``(B, N)`` parts."""
        return batch["parts" if self.model.segments else "label"]

    def _category(self, batch: dict[str, Tensor]) -> Tensor | None:
        """What a part network is told, and a classifier is not."""
        return batch["label"] if self.model.segments else None

    def _loss(self, batch: dict[str, Tensor], turn: Tensor, starts: Tensor | None = None) -> Tensor:
        geometry = _geometry(batch)
        frames = self.model.canonicalizer(*geometry)
        loss = turn.new_zeros(())
        if self.task_weight > 0:
            logits = self.model.predict_in(frames, *geometry, self._category(batch))
            loss = loss + self.task_weight * self._taught(logits, self._target(batch))
        if self.class_weight > 0:
            assert frames.class_logits is not None  # as many as there are classes
            loss = loss + self.class_weight * self._taught(frames.class_logits, batch["label"])
        return loss + self._pose_loss(frames, batch["points"], turn, starts)

    def _taught(self, logits: Tensor, target: Tensor) -> Tensor:
        """Smoothed cross-entropy: its mean over processes is one over what is labelled in all."""
        labelled = (target != UNLABELLED).sum().to(torch.float32)
        return _cross_entropy(logits, target, mean(labelled), self.label_smoothing)

    def _pose_loss(
        self, frames: Frames, points: Tensor, turn: Tensor, starts: Tensor | None
    ) -> Tensor:
        """What is asked of the frames, whatever the predictor makes of them."""
        loss = turn.new_zeros(())
        if self.prior is not None:
            prior = prior_loss(frames, self.prior, turn, self.outliers)
            loss = loss + self.prior_weight * prior
        if self.prior is not None and self.refinement_weight > 0:
            canonicalizer = cast(Refines, self.model.canonicalizer)
            refinement = refinement_loss(canonicalizer, points, self.prior, turn, starts=starts)
            loss = loss + self.refinement_weight * refinement
        if self.contrastive_weight > 0:
            if frames.embeddings is None:
                raise UsageError(
                    "contrastive_weight needs a canonicalizer with embeddings (Contrastive)"
                )
            loss = loss + self.contrastive_weight * contrastive_loss(frames.embeddings)
        if self.matrix_fisher_weight > 0:
            if frames.fisher is None:
                raise UsageError(
                    "matrix_fisher_weight needs a canonicalizer that says how sure it is, such as "
                    "VectorNeuron with orthonormalise: matrix-fisher"
                )
            fisher = matrix_fisher_loss(frames.fisher[:, 0], turn)
            loss = loss + self.matrix_fisher_weight * fisher
        if self.quotient_weight > 0:
            first = (frames.stages or (frames,))[0].rotations[:, 0]
            quotient = quotient_loss(first, self.quotient_group, turn)
            loss = loss + self.quotient_weight * quotient
        return loss

    def _step_seed(self, batch_idx: int) -> int:
        step = (self.current_epoch * 1_000_003 + batch_idx) * 1_009
        return (self.seed * 7_368_787 + step) * 2 % (1 << 62)

    def configure_optimizers(self) -> Any:
        learning = [p for p in self.model.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                learning, self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(
                learning, self.learning_rate, weight_decay=self.weight_decay
            )
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _rate(step / steps, self.warmup, self.final_rate)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _begin_with(start: str, canonicalizer: Canonicalizer | None, coordinate_frame: str) -> None:
    """Give a canonicalizer the weights of one that is trained.

    Raises:
        CheckpointError: If there is no such name or file, or it holds no canonicalizer.
        UsageError: If the weights do not fit, or mean other poses than the data's.
    """
    trained = canonicalizers.load(start)
    if type(canonicalizer) is not type(trained):
        ours = "none" if canonicalizer is None else type(canonicalizer).__name__
        raise UsageError(
            f"start {start} holds {type(trained).__name__} and the canonicalizer to be trained is "
            f"{ours}: give --model.canonicalizer {type(trained).__name__}"
        )
    if trained.coordinate_frame not in (None, coordinate_frame):
        raise UsageError(
            f"start {start} was trained on clouds in {trained.coordinate_frame}, and these are in "
            f"{coordinate_frame}: give --data.coordinate_frame {trained.coordinate_frame}"
        )
    try:
        canonicalizer.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise UsageError(
            f"the weights of start {start} do not fit the canonicalizer to be trained: give it the "
            "options that one was trained with, which pointcanon info shows of a file"
        ) from error


def _turned(batch: dict[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    vectors = {key: batch[key] for key in ("points", "normals") if key in batch}
    return {**batch, **{key: product(value, turn.mT) for key, value in vectors.items()}}


def _geometry(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Points, mask and normals, where there are any: what both halves of a model are given."""
    return batch["points"], batch.get("mask"), batch.get("normals")


def _cross_entropy(
    logits: Tensor, target: Tensor, count: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Of logits ``(..., C)``, summed over what is labelled and divided by ``count``; 0 of none."""
    summed = functional.cross_entropy(
        logits.flatten(0, -2),
        target.flatten(),
        ignore_index=UNLABELLED,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return summed / count.to(summed).clamp_min(1e-6)


def _check_augmentation(augmentation: Augmentation, *, parts: bool, normals: bool) -> None:
    """Refuse what would make the parts or the normals of the points wrong."""
    told = [name for name, given in (("parts", parts), ("normals", normals)) if given]
    if told and (augmentation.dropout > 0 or augmentation.corruptions):
        does = "damages clouds" if augmentation.corruptions else "moves dropped points onto others"
        raise UsageError(
            f"this augmentation {does}, which makes their {' and '.join(told)} wrong: choose one "
            "without, such as 'dgcnn'"
        )
    if normals and augmentation.scale != (1.0, 1.0) and not augmentation.isotropic:
        low, high = augmentation.scale
        raise UsageError(
            "this augmentation stretches the axes differently, which makes normals wrong: choose "
            f"--model.augmentation.scale [{low:.3g},{high:.3g}] --model.augmentation.isotropic true"
        )


def _rate(progress: float, warmup: float, final: float) -> float:
    """Share of the highest learning rate after a share ``progress`` of all steps."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    fall = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * fall)) / 2


_protocol = protocol  # the constructor has an argument of that name
