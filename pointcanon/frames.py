"""The one small type between canonicalizers and predictors: weighted candidate rotations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pointcanon.errors import InputError
from pointcanon.rotations import product

__all__ = ["Frames"]


@dataclass(frozen=True)
class Frames:
    """K candidate frames of each cloud, and how much each one counts.

    A rotation R maps canonical to input: ``x = x_canonical @ R.mT + centre`` for rows of points.

    Attributes:
        rotations: ``(B, K, 3, 3)``, det = +1.
        log_weights: ``(B, K)``, log of weights that sum to one over K.
        centre: ``(B, 3)``, the point that is moved to the origin.
        degenerate: ``(B,)`` bool, True where the cloud does not determine a frame (too few points,
            collinear, symmetric): the frame is finite and proper, but arbitrary.
        raw: ``(B, K, 3, C)`` or None, the vectors or matrices before orthonormalisation.
        stages: The intermediate frames of a canonicalizer that works in several steps, first one
            first, so that a loss can be a function of what was returned.
    """

    rotations: Tensor
    log_weights: Tensor
    centre: Tensor
    degenerate: Tensor
    raw: Tensor | None = None
    stages: tuple[Frames, ...] = ()

    @classmethod
    def of(
        cls,
        rotations: Tensor,
        log_weights: Tensor | None = None,
        centre: Tensor | None = None,
        degenerate: Tensor | None = None,
        raw: Tensor | None = None,
        stages: tuple[Frames, ...] = (),
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
        return cls(rotations, log_weights.log_softmax(dim=1), centre, degenerate, raw, stages)

    @property
    def count(self) -> int:
        """K, the number of candidates of each cloud."""
        return self.rotations.shape[1]

    @property
    def weights(self) -> Tensor:
        """``(B, K)``, summing to one over K."""
        return self.log_weights.exp()

    def apply(self, points: Tensor) -> Tensor:
        """Clouds ``(B, N, 3)`` in each canonical pose, ``(B, K, N, 3)``: ``(x - centre) @ R``."""
        return self.apply_vectors(points - self.centre[:, None].to(points.dtype))

    def apply_vectors(self, vectors: Tensor) -> Tensor:
        """Directions such as normals ``(B, N, 3)``, rotated but not moved, ``(B, K, N, 3)``."""
        return product(vectors[:, None], self.rotations.to(vectors.dtype))

    def invert(self, posed: Tensor) -> Tensor:
        """Back from canonical poses ``(B, K, N, 3)`` to the input's, ``(B, K, N, 3)``."""
        return self.invert_vectors(posed) + self.centre[:, None, None].to(posed.dtype)

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
            rotations.flatten(1, 2), log_weights.flatten(1, 2), self.centre, degenerate
        )

    def select(self, index: Tensor) -> Frames:
        """The candidates ``index (B, M)`` of each cloud, weights renormalised over M."""
        rotations = self.rotations.gather(1, index[..., None, None].expand(-1, -1, 3, 3))
        log_weights = self.log_weights.gather(1, index).log_softmax(dim=1)
        raw = self.raw
        if raw is not None:
            raw = raw.gather(1, index[..., None, None].expand(-1, -1, *raw.shape[2:]))
        return replace(self, rotations=rotations, log_weights=log_weights, raw=raw)

    def best(self, count: int = 1) -> Frames:
        """The ``count`` candidates of largest weight, heaviest first (K = count)."""
        return self.select(self.log_weights.topk(min(count, self.count), dim=1).indices)

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

    def vote_logits(self, logits: Tensor) -> Tensor:
        """Logits ``(B, K, ..., C)`` voted as probabilities: log of the mixture, ``(B, ..., C)``.

        With a single candidate the logits come back as they are.
        """
        if self.count == 1:
            return logits[:, 0]
        weights = self.log_weights.to(logits.dtype)
        weights = weights.view(*weights.shape, *(1,) * (logits.ndim - 2))
        return (weights + logits.log_softmax(dim=-1)).logsumexp(dim=1)
