"""Any network at all, which tells the poses of an orbit apart and chooses one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.pca import PCA
from pointcanon.errors import InputError
from pointcanon.frames import Frames

__all__ = ["Contrastive"]


class Contrastive(Canonicalizer):
    """The pose of an orbit in which a network's answer is nearest to a learned direction.

    Optimised canonicalization with the contrastive loss (Panigrahi & Mondal, arXiv 2405.14089): any
    network s, which need not be equivariant, answers each posed cloud with an embedding, and the
    energy of the pose is ``E_k = -cos(s(x R_k), v)`` with a learned vector v. Trained with
    :func:`pointcanon.losses.contrastive_loss`, which keeps the answers over an orbit distinct, and
    the prior, which says the one that shall win. The proposal carries this from the finite
    groups of the paper to all rotations: its candidates turn with the cloud, so each posed cloud is
    invariant, and whatever the network says of it is so too.

    All poses are shown to the network as one batch: it costs K forward passes.

    Args:
        network: From clouds ``(M, N, 3)``, centred and in the unit ball, to embeddings ``(M, D)``:
            a predictor whose classes are the D numbers, loaded from a checkpoint or not, or any
            other module. ``mask`` and ``normals`` are handed on, as keywords, when they are given.
        proposal: Equivariant candidates; the default is ``PCA(24)``. An ``Orbit`` has those of any
            finite group.
        width: D; None asks the network for its ``num_classes``.
        temperature: The candidates' weights are ``softmax(-E / temperature)`` times those of the
            proposal.
        choice: ``"hard"`` returns the best candidate alone, with the straight-through gradient to
            the weights of all (:meth:`pointcanon.frames.Frames.straight_through`); ``"soft"``
            returns all, to be voted on. The loss of the pose sees all of them either way.

    Raises:
        InputError: If the network is no module, or does not say its width; on a temperature that is
            not positive, or any other choice.
    """

    def __init__(
        self,
        network: nn.Module,
        proposal: Canonicalizer | None = None,
        width: int | None = None,
        temperature: float = 0.1,
        choice: Literal["hard", "soft"] = "hard",
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputError(f"network is a {type(network).__name__}; pass a torch.nn.Module")
        width = getattr(network, "num_classes", None) if width is None else width
        if not isinstance(width, int) or width < 1:
            raise InputError(
                f"width is {width}; say how many numbers {type(network).__name__} answers"
            )
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; choose a positive number")
        if choice not in ("hard", "soft"):
            raise InputError(f"choice is {choice!r}; choose 'hard' or 'soft'")
        self.network = network
        self.proposal = PCA(24) if proposal is None else proposal
        self.width, self.temperature = width, temperature
        self.choice: Literal["hard", "soft"] = choice
        self.target = nn.Parameter(torch.randn(width))

    @property
    def hyperparameters(self) -> dict[str, object]:
        names = ("network", "proposal", "width", "temperature", "choice")
        return {name: getattr(self, name) for name in names}

    @property
    def candidate_group(self) -> Tensor:
        # the best of an orbit comes alone
        return super().candidate_group if self.choice == "hard" else self.proposal.candidate_group

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        proposals = self.proposal.propose(points, mask, normals)
        embeddings = self._embed(proposals, clouds.unit_ball(points, mask), mask, normals)
        likeness = nn.functional.cosine_similarity(embeddings, self.target, dim=-1)
        orbit = Frames.of(
            proposals.rotations,
            proposals.log_weights + likeness / self.temperature,
            degenerate=proposals.degenerate,
            embeddings=embeddings,
        )
        if self.choice == "soft":
            return orbit
        degenerate = orbit.degenerate | orbit.contested
        return replace(orbit.straight_through(), degenerate=degenerate, stages=(orbit,))

    def _embed(
        self, frames: Frames, points: Tensor, mask: Tensor | None, normals: Tensor | None
    ) -> Tensor:
        """What the network answers to the clouds in K poses, ``(B, K, D)``."""
        extras: dict[str, Tensor] = {}
        if mask is not None:
            extras["mask"] = mask.repeat_interleave(frames.count, dim=0)
        if normals is not None:
            extras["normals"] = frames.apply_vectors(normals).flatten(0, 1)
        posed = frames.apply_vectors(points).flatten(0, 1)
        if posed.shape[0] == 0:  # a batch of no clouds is not shown to the network
            return posed.new_zeros(0, frames.count, self.width)
        answer: Tensor = self.network(posed, **extras)
        if answer.shape != (posed.shape[0], self.width):
            raise InputError(
                f"the network answered {tuple(answer.shape)} to {tuple(posed.shape)}; expected "
                f"{(posed.shape[0], self.width)}: give its width"
            )
        return answer.unflatten(0, frames.rotations.shape[:2])
