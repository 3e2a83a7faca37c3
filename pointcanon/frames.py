"""The one small type between canonicalizers and predictors: weighted candidate rotations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pointcanon import priors
from pointcanon.errors import InputError
from pointcanon.rotations import DEGENERATE_TOLERANCE, product

__all__ = ["Frames"]


AGREED = 0.3
"""An answer agrees with another opinion that gives it this share of what it gives its favourite.
Chosen on the validation clouds of ModelNet40."""

SAME_POSE = 1e-3
"""Rotations whose entries differ by no more are one pose, found in two ways."""


@dataclass(frozen=True)
class Frames:
    """K candidate frames of each cloud, and how much each one counts.

    A rotation R maps canonical to input: ``x = scale * x_canonical @ R.mT + centre`` for rows of
    points.

    Attributes:
        rotations: ``(B, K, 3, 3)``, det = +1; -1 only where a cloud was mirrored because that was
            asked for (``ForGroup`` with O(2) or O(3)).
        log_weights: ``(B, K)``, log of weights that sum to one over K.
        centre: ``(B, 3)``, the point that is moved to the origin.
        degenerate: ``(B,)`` bool, True where the cloud does not determine a frame (too few points,
            collinear, symmetric): the frame is finite and proper, but arbitrary.
        raw: ``(B, K, 3, C)`` or None, the vectors or matrices before orthonormalisation.
        stages: The intermediate frames of a canonicalizer that works in several steps, first one
            first, so that a loss can be a function of what was returned.
        scale: ``(B,)`` or None, the size of each cloud, by which its canonical pose is divided;
            None where clouds keep their size.
        fisher: ``(B, K, 3, 3)`` or None, parameters F of matrix Fisher distributions whose modes
            the rotations are, of a canonicalizer that says how sure it is.
        embeddings: ``(B, G, D)`` or None, what a network answered to each of the G poses the frames
            were chosen from.
        class_logits: ``(B, C)`` or None, what a canonicalizer that learned classes as well takes
            each cloud for.
    """

    rotations: Tensor
    log_weights: Tensor
    centre: Tensor
    degenerate: Tensor
    raw: Tensor | None = None
    stages: tuple[Frames, ...] = ()
    scale: Tensor | None = None
    fisher: Tensor | None = None
    embeddings: Tensor | None = None
    class_logits: Tensor | None = None

    @classmethod
    def of(
        cls,
        rotations: Tensor,
        log_weights: Tensor | None = None,
        centre: Tensor | None = None,
        degenerate: Tensor | None = None,
        raw: Tensor | None = None,
        stages: tuple[Frames, ...] = (),
        scale: Tensor | None = None,
        fisher: Tensor | None = None,
        embeddings: Tensor | None = None,
        class_logits: Tensor | None = None,
    ) -> Frames:
        """Frames from rotations ``(B, K, 3, 3)`` or ``(B, 3, 3)``; the rest has plain defaults.

        ``log_weights`` may be unnormalised scores; absent ones mean equal weights. The default
        centre is the origin.

        Raises:
            InputError: If a shape does not fit.
        """
        if rotations.ndim == 3:
            rotations = rotations[:, None]
        if rotations.ndim != 4 or rotations.shape[-2:] != (3, 3):
            raise InputError(
                f"rotations has shape {tuple(rotations.shape)}, expected (B, K, 3, 3) or (B, 3, 3)"
            )
        batch, count = rotations.shape[:2]
        if log_weights is None:
            log_weights = rotations.new_zeros(batch, count)
        if log_weights.shape != (batch, count):
            raise InputError(
                f"log_weights has shape {tuple(log_weights.shape)}, expected ({batch}, {count})"
            )
        if centre is None:
            centre = rotations.new_zeros(batch, 3)
        if degenerate is None:
            degenerate = torch.zeros(batch, dtype=torch.bool, device=rotations.device)
        return cls(
            rotations,
            log_weights.log_softmax(dim=1),
            centre,
            degenerate,
            raw,
            stages,
            scale,
            fisher,
            embeddings,
            class_logits,
        )

    def __getitem__(self, clouds: slice | Tensor) -> Frames:
        """The frames of some of the clouds."""

        def part(value: Tensor | tuple[Frames, ...] | None) -> Tensor | tuple[Frames, ...] | None:
            if isinstance(value, tuple):
                return tuple(stage[clouds] for stage in value)
            return None if value is None else value[clouds]

        parts = {field.name: part(getattr(self, field.name)) for field in fields(self)}
        return Frames(**parts)  # type: ignore[arg-type]

    @property
    def count(self) -> int:
        """K, the number of candidates of each cloud."""
        return self.rotations.shape[1]

    @property
    def weights(self) -> Tensor:
        """``(B, K)``, summing to one over K."""
        return self.log_weights.exp()

    @property
    def voters(self) -> Tensor:
        """``(B,)``, how many candidates have any weight: the others have no say in a vote."""
        return (self.log_weights > -torch.inf).sum(dim=1)

    @property
    def confidence(self) -> Tensor | None:
        """``(B,)``, how sure the heaviest frame is, in [0, 1]; None where nothing says it.

        :func:`pointcanon.priors.confidence` of its matrix Fisher distribution.
        """
        fisher = self.best().fisher
        return None if fisher is None else priors.confidence(fisher[:, 0])

    def apply(self, points: Tensor) -> Tensor:
        """Clouds ``(B, N, 3)`` in each canonical pose, ``(B, K, N, 3)``.

        ``(x - centre) / scale @ R``.
        """
        centred = points - self.centre[:, None].to(points.dtype)
        if self.scale is not None:
            centred = centred / self.scale[:, None, None].to(points.dtype)
        return self.apply_vectors(centred)

    def apply_vectors(self, vectors: Tensor) -> Tensor:
        """Directions such as normals ``(B, N, 3)``, rotated but not moved, ``(B, K, N, 3)``."""
        return product(vectors[:, None], self.rotations.to(vectors.dtype))

    def invert(self, posed: Tensor) -> Tensor:
        """Back from canonical poses ``(B, K, N, 3)`` to the input's, ``(B, K, N, 3)``."""
        turned = self.invert_vectors(posed)
        if self.scale is not None:
            turned = turned * self.scale[:, None, None, None].to(posed.dtype)
        return turned + self.centre[:, None, None].to(posed.dtype)

    def invert_vectors(self, posed: Tensor) -> Tensor:
        """Directions ``(B, K, N, 3)`` predicted in canonical pose, turned into the input's."""
        return product(posed, self.rotations.mT.to(posed.dtype))

    def compose(self, inner: Frames) -> Frames:
        """These frames, followed by frames found on the clouds they posed.

        Args:
            inner: ``(B * K, J)`` frames of the posed clouds (in the order of
                ``apply(points).flatten(0, 1)``), about the origin: posed clouds are centred.

        Returns:
            ``(B, K * J)`` frames with rotations ``R @ R_inner`` and weights multiplied.
        """
        batch, count = self.rotations.shape[:2]
        inner_rotations = inner.rotations.unflatten(0, (batch, count))
        rotations = product(self.rotations[:, :, None], inner_rotations)
        log_weights = self.log_weights[:, :, None] + inner.log_weights.unflatten(0, (batch, count))
        degenerate = self.degenerate | inner.degenerate.unflatten(0, (batch, count)).all(dim=1)
        return Frames.of(
            rotations.flatten(1, 2),
            log_weights.flatten(1, 2),
            self.centre,
            degenerate,
            scale=self.scale,
        )

    def select(self, index: Tensor) -> Frames:
        """The candidates ``index (B, M)`` of each cloud, weights renormalised over M."""
        return replace(
            self,
            rotations=_gather(self.rotations, index),
            log_weights=self.log_weights.gather(1, index).log_softmax(dim=1),
            raw=None if self.raw is None else _gather(self.raw, index),
            fisher=None if self.fisher is None else _gather(self.fisher, index),
        )

    def best(self, count: int = 1) -> Frames:
        """The ``count`` candidates of largest weight, heaviest first (K = count)."""
        return self.select(self.log_weights.topk(min(count, self.count), dim=1).indices)

    @property
    def heaviest(self) -> Tensor:
        """Which candidate :meth:`best` gives, ``(B,)`` int64, of equals too."""
        return self.log_weights.topk(1, dim=1).indices[:, 0]

    @property
    def contested(self) -> Tensor:
        """Whether another pose is as heavy as the heaviest, ``(B,)`` bool.

        Which of them is chosen is then a matter of rounding. So it is with a symmetric cloud, which
        looks alike in several candidate poses. Candidates that are the same pose, as of a plate,
        whose surface is aligned with its principal axes, do not contest each other.
        """
        weights, rotations = self.log_weights.detach(), self.rotations.detach()
        heaviest = weights.argmax(dim=1, keepdim=True)
        behind = weights.gather(1, heaviest) - weights
        differs = (rotations - _gather(rotations, heaviest)).abs().amax(dim=(-1, -2)) > SAME_POSE
        return (differs & (behind <= DEGENERATE_TOLERANCE[rotations.dtype] / 10)).any(dim=1)

    def without_negligible(self, share: float) -> Frames:
        """Candidates that weigh less than ``share`` of the heaviest one get no weight at all.

        K stays, and so does the order: a vote leaves out what weighs nothing.
        """
        if share <= 0 or self.count == 1:
            return self
        least = self.log_weights.amax(dim=1, keepdim=True) + math.log(share)
        kept = self.log_weights.masked_fill(self.log_weights < least, -torch.inf)
        return replace(self, log_weights=kept.log_softmax(dim=1))

    def straight_through(self) -> Frames:
        """The heaviest candidate alone (K = 1), with a gradient to the weights of all of them.

        Forward the choice is hard. Backward the choice passes as the weighted mean
        ``sum_k w_k R_k``, the straight-through estimator, while the chosen rotation keeps its own
        gradient. A vote over all candidates is the soft choice, forward and backward alike.
        """
        chosen = self.best()
        mean = (self.weights[..., None, None] * self.rotations.detach()).sum(dim=1, keepdim=True)
        return replace(chosen, rotations=chosen.rotations + (mean - mean.detach()))

    def vote(self, outputs: Tensor) -> Tensor:
        """Weighted mean over the candidates of ``outputs (B, K, ...)``, giving ``(B, ...)``."""
        weights = self.weights.to(outputs.dtype)
        return (weights.view(*weights.shape, *(1,) * (outputs.ndim - 2)) * outputs).sum(dim=1)

    def vote_logits(self, logits: Tensor, *, by_certainty: bool = False) -> Tensor:
        """Logits ``(B, K, ..., C)`` voted as probabilities: log of the mixture, ``(B, ..., C)``.

        With a single candidate the logits come back as they are.

        Args:
            logits: Of each candidate.
            by_certainty: Whether a candidate's weight is multiplied by ``exp(-H)``, H the entropy
                of its probabilities: a network is surer of an object that stands as it should.
        """
        if self.count == 1:
            return logits[:, 0]
        log_probabilities = logits.log_softmax(dim=-1)
        weights = self.log_weights.to(logits.dtype)
        weights = weights.view(*weights.shape, *(1,) * (logits.ndim - 2))
        if by_certainty:
            # finite where a class is ruled out, forward and backward
            finite = log_probabilities.clamp_min(torch.finfo(logits.dtype).min)
            entropy = -(log_probabilities.exp() * finite).sum(dim=-1, keepdim=True)
            weights = (weights - entropy).log_softmax(dim=1)
        return (weights + log_probabilities).logsumexp(dim=1)

    def agreed(self, logits: Tensor, opinion: Tensor) -> Tensor:
        """In which candidates ``(B, K)`` bool the answer agrees with another opinion.

        It does where the opinion gives the class that is answered at least the share ``AGREED`` of
        what it gives its favourite. How sure the answer is of itself does not count: that hangs on
        how its network was trained.

        Args:
            logits: ``(B, K, C)``, of each candidate.
            opinion: ``(B, C)`` log-probabilities.
        """
        return _granted(logits, opinion) >= math.log(AGREED)

    def agreeing(self, logits: Tensor, opinion: Tensor) -> Tensor:
        """Which candidate to believe, beside another opinion of the clouds, ``(B,)`` int64.

        The heaviest of those whose answer agrees with it (:meth:`agreed`); where there is none, of
        those with the answer that it finds most likely. An opinion that says nothing leaves the
        heaviest. No gradient runs through the choice.

        Args:
            logits: As for :meth:`agreed`, and so is ``opinion``.
        """
        weights = self.log_weights.to(logits.dtype)
        granted = _granted(logits, opinion).masked_fill(weights == -torch.inf, -torch.inf)
        least = granted.amax(dim=1, keepdim=True).clamp_max(math.log(AGREED))
        believed = weights.masked_fill(granted < least, -torch.inf)
        return believed.topk(1, dim=1).indices[:, 0]  # of equals the one that is the heaviest too


def _granted(logits: Tensor, opinion: Tensor) -> Tensor:
    """Log of what an opinion gives the class answered in each candidate ``(B, K)``, its favourite
    being 0."""
    granted = opinion.gather(1, logits.argmax(dim=-1))
    return granted - opinion.amax(dim=-1, keepdim=True)


def _gather(matrices: Tensor, index: Tensor) -> Tensor:
    """Matrices ``index (B, M)`` of ``(B, K, 3, C)``."""
    return matrices.gather(1, index[..., None, None].expand(-1, -1, *matrices.shape[2:]))
