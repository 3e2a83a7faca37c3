"""A predictor behind a canonicalizer, as one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pointcanon import checkpoint
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.coordinates import CoordinateFrame, coordinate_frame
from pointcanon.errors import InputError, NotFiniteError
from pointcanon.frames import Frames
from pointcanon.portable import exporting
from pointcanon.predictors.base import TRAINED_ON, PartPredictor

__all__ = [
    "HEEDING",
    "RECOMMENDED_VOTE",
    "Answer",
    "Canonicalized",
    "Prediction",
    "Vote",
    "load",
    "vote_before",
]

Vote: TypeAlias = Literal["probabilities", "certainty", "agreement", "product", "mean"]
"""How the outputs of several frames are joined."""

HEEDING: tuple[Vote, ...] = ("agreement", "product")
"""Those that heed what the canonicalizer itself takes a cloud for. ``"agreement"`` is the choice of
``adapt`` and of recipes, where it has learned the predictor's own classes."""

RECOMMENDED_VOTE: Vote = "certainty"
"""Of any canonicalizer that tells no classes apart, where nothing else is said."""


class Answer(NamedTuple):
    """What :meth:`Canonicalized.answer` says of B clouds.

    Attributes:
        outputs: ``(B, C)`` or ``(B, N, P)``, the vote.
        frame: ``(B,)`` int64, the frame of the answer where the vote chose one (:data:`HEEDING`),
            else the heaviest.
        passes: ``(B,)`` int64, in how many frames the predictor was asked about each cloud.
    """

    outputs: Tensor
    frame: Tensor
    passes: Tensor


class Prediction(NamedTuple):
    """What :meth:`Canonicalized.predict` answers for B clouds.

    A classifier gives each cloud one of C classes; a part network gives each of its N points one of
    P parts, in the order of the points, and what it says of padded points means nothing.

    Attributes:
        labels: ``(B,)`` or ``(B, N)`` int64, the most probable class or part.
        probabilities: ``(B, C)`` or ``(B, N, P)``.
        rotation: ``(B, 3, 3)``, the heaviest frame, or that of the answer where the vote chose one
            (:data:`HEEDING`); it maps canonical to input. det = +1, but where a canonicalizer for
            reflections (``ForGroup``) saw the cloud mirrored.
        confidence: As ``labels``, in [0, 1], the probability of the label.
        degenerate: ``(B,)`` bool, True where the cloud does not determine a frame.
        frame_weight: ``(B,)``, in (0, 1], the weight of that frame: 1 where it is the only one,
            1 / K where the canonicalizer prefers none of K.
        frame_confidence: ``(B,)`` in [0, 1] or None, how sure the heaviest frame is
            (``Frames.confidence``), of a canonicalizer that says it.
        scale: ``(B,)`` or None, the size by which each cloud was divided (``Frames.scale``); None
            where clouds keep theirs.
    """

    labels: Tensor
    probabilities: Tensor
    rotation: Tensor
    confidence: Tensor
    degenerate: Tensor
    frame_weight: Tensor
    frame_confidence: Tensor | None
    scale: Tensor | None


class Canonicalized(nn.Module):
    """Pose each cloud by the canonicalizer's frames, predict, vote over the frames.

    Args:
        predictor: Any module from clouds ``(B, N, 3)`` to outputs ``(B, C)``, one of each cloud, or
            ``(B, N, P)``, one of each point. ``mask``, ``normals`` and ``category`` are handed on,
            as keywords, when they are given.
        canonicalizer: Proposes the frames.
        vote: How the outputs of several frames are joined, cloud by cloud or point by point:
            ``"probabilities"`` takes outputs as logits and mixes the probabilities;
            ``"certainty"`` does, and a frame counts the more, the surer the predictor is there
            (``Frames.vote_logits``). Two heed what the canonicalizer itself takes the cloud for
            (``Frames.class_logits``): ``"agreement"`` is the predictor's answer in the heaviest
            frame in which it agrees with that, or in the one in which it agrees best
            (``Frames.agreeing``), so that the predictor alone decides, in a pose that the other had
            a say in; it is asked frame by frame, mostly once. ``"product"`` multiplies that answer
            by the opinion, so that two networks decide, a product of experts.
            ``"mean"`` averages the outputs as they are (frame averaging). With one frame all but
            ``"product"`` leave the output as it is. None chooses ``"agreement"`` where both halves
            are known to tell the same classes apart, else ``"certainty"``.

    Raises:
        InputError: On any other vote, or ``"agreement"`` or ``"product"`` for a network that labels
            parts or knows other classes than the canonicalizer.
    """

    def __init__(
        self,
        predictor: nn.Module,
        canonicalizer: Canonicalizer,
        vote: Vote | None = None,
    ) -> None:
        super().__init__()
        vote = usual_vote(predictor, canonicalizer) if vote is None else vote
        if vote not in get_args(Vote):
            raise InputError(f"vote is {vote!r}; choose one of {', '.join(get_args(Vote))}")
        if vote in HEEDING:
            _check_classes(predictor, canonicalizer, vote)
        self.predictor = predictor
        self.canonicalizer = canonicalizer
        for part in canonicalizer.modules():
            if isinstance(part, Canonicalizer):
                part.serve(predictor)
        self.vote: Vote = vote
        self.coordinate_frame = _common_frame(predictor, canonicalizer)
        self.classes: Sequence[str] | None = getattr(predictor, "classes", None)
        self.parts: Sequence[str] | None = getattr(predictor, "parts", None)
        self.normalisation: str | None = getattr(predictor, "normalisation", None)

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {
            "predictor": self.predictor,
            "canonicalizer": self.canonicalizer,
            "vote": self.vote,
        }

    @property
    def segments(self) -> bool:
        """Whether the predictor labels points rather than clouds."""
        return isinstance(self.predictor, PartPredictor)

    def forward(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
        category: Tensor | None = None,
    ) -> Tensor:
        """Outputs ``(B, C)`` or ``(B, N, P)`` of clouds, invariant to their rotation.

        Args:
            points: ``(B, N, 3)`` floating point, N >= 1.
            mask: ``(B, N)`` bool, True = a real point.
            normals: ``(B, N, 3)``, for those halves that look at them.
            category: ``(B,)`` integers, for part networks that are told the category.

        Raises:
            InputError: On clouds that no answer can be given for.
        """
        frames = self.canonicalizer(points, mask, normals)
        return self.predict_in(frames, points, mask, normals, category)

    def predict_in(
        self,
        frames: Frames,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
        category: Tensor | None = None,
        *,
        max_points: int | None = None,
    ) -> Tensor:
        """Outputs of clouds in frames that are already known.

        Args:
            frames: Of these clouds.
            points: As for :meth:`forward`, and so are ``mask``, ``normals`` and ``category``.
            max_points: Bounds the memory of part networks: a cloud of more points is dealt out into
                as few shares as will do, every so-many-th point each, so that each is a thinner
                sample of the whole object, in the pose of the whole. The network sees them one by
                one: it takes them for objects sampled less densely, so ask for about the density it
                was trained at.

        Raises:
            InputError: If ``max_points`` < 1, or is given to a predictor that labels no points.
        """
        given = (points, mask, normals, category)
        return self.answer(frames, *given, max_points=max_points).outputs

    def answer(
        self,
        frames: Frames,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
        category: Tensor | None = None,
        *,
        max_points: int | None = None,
    ) -> Answer:
        """What :meth:`predict_in` says, in which frame, and after how many passes.

        Args:
            frames: As for :meth:`predict_in`, and so is everything else.

        Raises:
            InputError: As there.
        """
        if isinstance(self.predictor, PartPredictor):  # before each cloud stands for K
            self.predictor.check_category(category, len(points))
        if max_points is not None:
            if max_points < 1:
                raise InputError(f"max_points is {max_points}; choose at least 1")
            if not self.segments:
                raise InputError(
                    f"max_points is for networks that label points: leave it out, "
                    f"{type(self.predictor).__name__} gives each cloud one answer"
                )
            if points.shape[1] > max_points:
                shared = self._predict_shares(frames, points, mask, normals, category, max_points)
                return Answer(shared, frames.heaviest, frames.voters)
        posed = {"points": frames.apply(points)}
        if normals is not None:
            posed["normals"] = frames.apply_vectors(normals)
        for name, given in (("mask", mask), ("category", category)):
            if given is not None:
                posed[name] = given[:, None].expand(-1, frames.count, *given.shape[1:])
        if self.vote in HEEDING and not self._asks_all(frames):
            frames, outputs = self._asked_in_turn(frames, posed)
        else:
            outputs = self._outputs(posed, self._asked(frames))
        voted, chosen = self._voted(frames, outputs)
        return Answer(voted, chosen, frames.voters)

    def _voted(self, frames: Frames, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs in K frames joined, and the place of the one chosen, or of the heaviest."""
        if self.vote == "mean":
            return frames.vote(outputs), frames.heaviest
        if self.vote in HEEDING:
            opinion = self._opinion(frames, outputs)
            chosen = frames.agreeing(outputs, opinion)
            index = chosen[:, None, None].expand(-1, 1, outputs.shape[-1])
            answer = outputs.gather(1, index)[:, 0]
            if self.vote == "product":
                answer = answer.log_softmax(dim=-1) + opinion
            return answer, chosen
        by_certainty = self.vote == "certainty"
        return frames.vote_logits(outputs, by_certainty=by_certainty), frames.heaviest

    def _opinion(self, frames: Frames, outputs: Tensor) -> Tensor:
        """Log-probabilities ``(B, C)`` of what the canonicalizer takes the clouds for."""
        opinion, told = frames.class_logits, outputs.shape[-1]
        if outputs.ndim != 3:
            raise InputError(
                f"vote is {self.vote!r}, and the predictor labels points, which no canonicalizer "
                f"knows: choose {RECOMMENDED_VOTE!r}"
            )
        if opinion is None or opinion.shape[1] != told:
            known = "no" if opinion is None else opinion.shape[1]
            raise InputError(
                f"vote is {self.vote!r}, and the canonicalizer knows {known} classes where the "
                f"predictor tells {told} apart (a Union knows those that all of its parts do): "
                f"train Optimized(classes={told}), or choose vote "
                f"{RECOMMENDED_VOTE!r}"
            )
        return opinion.to(outputs.dtype).log_softmax(dim=-1)

    def _asks_all(self, frames: Frames) -> bool:
        """Whether the predictor is shown every frame, whatever it weighs and others have said.

        A program has no branches; and in training a network's batch statistics, and the gradient of
        a weight, want every frame.
        """
        one = frames.count == 1
        return self.training or one or exporting() or torch.compiler.is_compiling()

    def _asked(self, frames: Frames) -> Tensor | None:
        """Which frames ``(B, K)`` have a say in the vote; None asks them all."""
        if self._asks_all(frames):
            return None
        asked = frames.log_weights > -torch.inf
        return None if asked.all() else asked

    def _asked_in_turn(self, frames: Frames, posed: dict[str, Tensor]) -> tuple[Frames, Tensor]:
        """Frames with those alone that were asked, and what the predictor answered there.

        A cloud's frames are asked heaviest first, until the predictor agrees in one with what the
        canonicalizer takes the cloud for: none of the others would be chosen.
        """
        order = frames.log_weights.topk(frames.count, dim=1).indices
        every = torch.arange(frames.count, device=order.device)
        asked = every == order[:, :1]
        outputs = self._outputs(posed, asked)
        opinion = self._opinion(frames, outputs)
        for place in order[:, 1:].unbind(dim=1):
            agreed = (asked & frames.agreed(outputs, opinion)).any(dim=1, keepdim=True)
            now = (every == place[:, None]) & (frames.log_weights > -torch.inf) & ~agreed
            if not now.any():
                break
            outputs = outputs + self._outputs(posed, now)
            asked = asked | now
        told = frames.log_weights.masked_fill(~asked, -torch.inf)
        return replace(frames, log_weights=told), outputs

    def _outputs(self, posed: dict[str, Tensor], asked: Tensor | None) -> Tensor:
        """What the predictor answers to its inputs ``(B, K, ...)``; 0 where it is not asked."""
        batch, count = posed["points"].shape[:2]
        rows = {name: given.flatten(0, 1) for name, given in posed.items()}
        if asked is not None:
            index = asked.flatten().nonzero()[:, 0]
            rows = {name: given[index] for name, given in rows.items()}
        points = rows.pop("points")
        try:
            outputs: Tensor = self.predictor(points, **rows)
        except NotFiniteError as error:
            row = error.cloud if asked is None else int(index[error.cloud])
            raise NotFiniteError(row // count, error.remedy) from error
        if asked is not None:
            every = outputs.new_zeros(batch * count, *outputs.shape[1:])
            outputs = every.index_copy(0, index, outputs)
        return outputs.unflatten(0, (batch, count))

    def _predict_shares(
        self,
        frames: Frames,
        points: Tensor,
        mask: Tensor | None,
        normals: Tensor | None,
        category: Tensor | None,
        max_points: int,
    ) -> Tensor:
        """Outputs of the real points of each cloud, share by share; zero at padded points."""
        clouds = []
        for cloud in range(len(points)):
            one = slice(cloud, cloud + 1)
            alone = frames[one]
            real = torch.arange(points.shape[1], device=points.device)
            if mask is not None:
                real = real[mask[cloud]]
            count = -(-len(real) // max_points)
            shares = [real[first::count] for first in range(count)]
            try:
                outputs = [
                    self.predict_in(
                        alone,
                        points[one, share],
                        normals=None if normals is None else normals[one, share],
                        category=None if category is None else category[one],
                    )[0]
                    for share in shares
                ]
            except NotFiniteError as error:
                raise NotFiniteError(cloud, error.remedy) from error
            whole = outputs[0].new_zeros(points.shape[1], outputs[0].shape[-1])
            clouds.append(whole.index_copy(0, torch.cat(shares), torch.cat(outputs)))
        return torch.stack(clouds)

    @torch.no_grad()
    def predict(
        self,
        points: Tensor,
        mask: Tensor | None = None,
        normals: Tensor | None = None,
        category: Tensor | None = None,
        *,
        max_points: int | None = None,
    ) -> Prediction:
        """Labels, probabilities and poses of clouds ``(B, N, 3)``, in evaluation mode.

        Args:
            points: As for :meth:`forward`, and so are ``mask``, ``normals`` and ``category``.
            max_points: As for :meth:`predict_in`.

        Raises:
            InputError: On clouds that no answer can be given for.
        """
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            given = (points, mask, normals)
            frames = self.canonicalizer(*given)
            logits, chosen, _ = self.answer(frames, *given, category, max_points=max_points)
        finally:
            for module, training in modes.items():
                module.training = training
        probabilities = logits.float().softmax(dim=-1)
        confidence, labels = probabilities.max(dim=-1)
        return Prediction(
            labels,
            probabilities,
            frames.select(chosen[:, None]).rotations[:, 0],
            confidence,
            frames.degenerate,
            frames.weights.gather(1, chosen[:, None])[:, 0],
            frames.confidence,
            frames.scale,
        )

    def save(self, path: str | Path, **card: Any) -> None:
        """Write weights and card to ``path`` (safetensors), atomically.

        Args:
            path: Ends in ``.safetensors``.
            **card: Further fields of :class:`pointcanon.checkpoint.Card`, such as ``metrics``.
        """
        card.setdefault("coordinate_frame", _name(self.coordinate_frame))
        for name in ("classes", "parts"):
            names = getattr(self, name)
            card.setdefault(name, None if names is None else tuple(names))
        card.setdefault("normalisation", self.normalisation)
        told = self.canonicalizer.class_names
        if told is not None and card["classes"] != tuple(told):
            card.setdefault("canonicalizer_classes", tuple(told))
        checkpoint.save(path, self, checkpoint.Card(kind="canonicalized", **card))


def load(path: str | Path) -> Canonicalized:
    """A model that :meth:`Canonicalized.save` wrote; the file says all that is needed.

    Raises:
        CheckpointError: If the file is missing, damaged, or holds something else.
    """
    from pointcanon import canonicalizers, predictors  # noqa: F401  (they register their classes)

    module, card = checkpoint.load(path)
    if not isinstance(module, Canonicalized):
        raise checkpoint.CheckpointError(
            f"{path} holds a {card.kind}, not a canonicalized model; "
            f"load it with {checkpoint.KINDS[card.kind]}"
        )
    module.canonicalizer.read_card(card)
    for part in (module, module.predictor):  # the predictor may be put behind another frame
        for name in TRAINED_ON:
            setattr(part, name, getattr(card, name))
    return module


def _common_frame(predictor: nn.Module, canonicalizer: Canonicalizer) -> str | None:
    """The coordinate frame that both halves were trained in, as far as it is known."""
    ours: str | None = getattr(predictor, "coordinate_frame", None)
    theirs = canonicalizer.coordinate_frame
    if ours is None or theirs is None or coordinate_frame(ours) == coordinate_frame(theirs):
        return ours or theirs
    raise InputError(
        f"the canonicalizer turns clouds upright in the frame {theirs}, and the predictor was "
        f"trained in {ours}: train a canonicalizer on clouds in {ours}"
    )


def usual_vote(predictor: nn.Module, canonicalizer: Canonicalizer) -> Vote:
    """How a model votes for which nothing is said: by agreement where both halves are known to tell
    the same classes apart."""
    if isinstance(predictor, PartPredictor) or not getattr(predictor, "classes", None):
        return RECOMMENDED_VOTE
    return vote_before(predictor, canonicalizer, "agreement")


def vote_before(predictor: nn.Module, canonicalizer: Canonicalizer, vote: Vote) -> Vote:
    """A model's ``vote`` once another canonicalizer stands in its place.

    One that heeds an opinion needs a canonicalizer that has learned the same classes; in front of
    another it is the recommended one.
    """
    ours, theirs = getattr(predictor, "classes", None), canonicalizer.class_names
    known = getattr(canonicalizer, "classes", None) is not None
    same = known and (ours and list(ours)) == (theirs and list(theirs))
    return vote if same or vote not in HEEDING else RECOMMENDED_VOTE


def _check_classes(predictor: nn.Module, canonicalizer: Canonicalizer, vote: Vote) -> None:
    """Refuse to compare what two networks say of classes that have other names."""
    if isinstance(predictor, PartPredictor):
        raise InputError(
            f"vote is {vote!r}, and {type(predictor).__name__} labels parts, which no "
            f"canonicalizer knows: choose {RECOMMENDED_VOTE!r}"
        )
    ours: Sequence[str] | None = getattr(predictor, "classes", None)
    theirs = canonicalizer.class_names
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    place = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1])
    names = [repr(names[place]) if place < len(names) else "none" for names in (ours, theirs)]
    raise InputError(
        f"vote is {vote!r}, and class {place} is {names[0]} for the predictor, {names[1]} for the "
        f"canonicalizer: choose {RECOMMENDED_VOTE!r}, or train a canonicalizer on the same classes"
    )


def _name(frame: str | CoordinateFrame | None) -> str | None:
    return None if frame is None else str(frame)


checkpoint.register(Canonicalized)
