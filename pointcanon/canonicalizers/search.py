"""Search for the pose in which a frozen network finds the cloud most familiar."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pointcanon import clouds
from pointcanon.canonicalizers.base import Canonicalizer
from pointcanon.canonicalizers.pca import PCA
from pointcanon.energies import FreeEnergy
from pointcanon.errors import InputError, NotFiniteError
from pointcanon.frames import Frames
from pointcanon.rotations import from_rotvec, product, so3_grid

__all__ = ["Search"]

FIRST_STEP = math.radians(10)
"""Largest and first angle of the descent; a step that helps doubles it, another halves it."""

POINTS_AT_ONCE = 1 << 16
"""Points shown to the network in one call, which bounds the memory of its activations."""


class Search(Canonicalizer):
    """Poses of least energy under a frozen network; nothing is trained.

    The network sees the cloud in every pose of a coarse grid, and the best are improved by descent
    on SO(3), in the spirit of energy-based test-time canonicalization (FoCal, ICML 2025). The
    grid hangs on an equivariant proposal, so that every posed cloud is invariant, and so is
    whatever the network says of it: the search is exactly equivariant on generic clouds.

    A step of the descent turns by a given angle against the gradient in the Lie algebra. It is
    taken only if the energy falls, so no pose ends up worse than the grid had it. In float32 such
    a decision may hang on rounding: for about one cloud in a hundred the frame then differs.

    Args:
        network: From clouds ``(M, N, 3)``, centred and in the unit ball, to outputs ``(M, C)``;
            ``mask`` is handed on, as a keyword, when it is given. The search keeps a frozen copy,
            in evaluation mode, and leaves the original alone. A checkpoint therefore holds the
            network once more than the model that uses it. None takes the predictor that the search
            is put in front of: ``Canonicalized(predictor, Search())``. What that learns afterwards
            does not reach the copy.
        energy: From outputs ``(M, C)`` to ``(M,)`` (:mod:`pointcanon.energies`); the default is
            ``FreeEnergy()``.
        budget: Forward passes of the network for each cloud: half for the grid, the rest, with as
            many backward passes, for the descent. A gate takes one more.
        proposal: Equivariant candidates, each of which is turned by the grid; the default is
            ``PCA(24)``. With more candidates than ``budget`` the heaviest count.
        keep: Poses that are improved and returned, lowest energy first, weighed by
            ``softmax(-energy / temperature)``.
        temperature: In units of the energy.
        gate: A cloud whose energy as it came is at most this stays as it is: nothing is lost on
            clouds in the pose of the training data. **A gate looks at the input's pose and
            therefore breaks exact equivariance**; the default is none. :meth:`calibrate` finds a
            value.

    Raises:
        InputError: On a number out of range, or a network or energy that is no module.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        energy: nn.Module | None = None,
        budget: int = 128,
        proposal: Canonicalizer | None = None,
        keep: int = 4,
        temperature: float = 1.0,
        gate: float | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("network", network), ("energy", energy)):
            if module is not None and not isinstance(module, nn.Module):
                raise InputError(f"{name} is a {type(module).__name__}; pass a torch.nn.Module")
        for name, value in (("budget", budget), ("keep", keep)):
            if value < 1:
                raise InputError(f"{name} is {value}; choose at least 1")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; choose a positive number")
        self.network = None if network is None else _frozen_copy(network)
        self.energy = FreeEnergy() if energy is None else energy
        self.proposal = PCA(24) if proposal is None else proposal
        self.budget, self.keep, self.temperature, self.gate = budget, keep, temperature, gate
        self._serves: int | None = None
        """The identity of the predictor whose copy the network is, where none was given."""

    @property
    def hyperparameters(self) -> dict[str, object]:
        names = ("network", "energy", "budget", "proposal", "keep", "temperature", "gate")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict[str, object]:
        """Its energy too, which takes no training."""
        return {**super().options, "energy": self.energy}

    def train(self, mode: bool = True) -> Search:
        super().train(mode)
        if self.network is not None:
            self.network.eval()
        return self

    def serve(self, predictor: nn.Module) -> None:
        if self.network is None or self._serves == id(predictor):
            self.network, self._serves = _frozen_copy(predictor), id(predictor)
        elif self._serves is not None:
            raise InputError(
                "this Search asks the predictor that it was put in front of first, and here is "
                "another: construct a Search for each"
            )

    def calibrate(
        self, points: Tensor, quantile: float = 0.95, mask: Tensor | None = None
    ) -> float:
        """The ``gate`` that lets this share of the given clouds pass as they are.

        Args:
            points: ``(B, N, 3)``, clouds in the pose of the network's training data.
            quantile: Share in [0, 1].
            mask: ``(B, N)`` bool.

        Raises:
            InputError: On clouds that no answer can be given for, or a share out of range.
        """
        clouds.check_cloud(points, mask)
        if not 0 <= quantile <= 1:
            raise InputError(f"quantile is {quantile}; choose a share from 0 to 1")
        points = points.to(torch.promote_types(points.dtype, torch.float32))
        centred = points - clouds.centroid(points, mask)[:, None]
        energies = self._energies(_identity(points), clouds.unit_ball(centred.detach(), mask), mask)
        return float(energies.quantile(quantile))

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        unit = clouds.unit_ball(points.detach(), mask)
        proposals = self.proposal.propose(points, mask, normals)
        poses = self._grid(proposals)
        energies = self._energies(poses, unit, mask)
        least = energies.topk(min(self.keep, poses.shape[1]), dim=1, largest=False).indices
        kept = poses.gather(1, least[..., None, None].expand(-1, -1, 3, 3))
        steps = (self.budget - poses.shape[1]) // kept.shape[1]
        found, energies = self._descend(kept, energies.gather(1, least), unit, mask, steps)
        scores = -energies / self.temperature
        frames = Frames.of(found, scores, degenerate=proposals.degenerate)
        frames = frames.best(frames.count)
        if self.gate is None:
            return frames
        eye = _identity(unit)
        familiar = self._energies(eye, unit, mask)[:, 0] <= self.gate
        return replace(
            frames,
            rotations=torch.where(familiar[:, None, None, None], eye, frames.rotations),
            degenerate=frames.degenerate & ~familiar,
        )

    def _grid(self, proposals: Frames) -> Tensor:
        """The poses to look at first: the proposals, and each of them turned, ``(B, K, 3, 3)``."""
        starts = proposals.best(min(self.budget, proposals.count)).rotations.detach()
        turns = max(1, self.budget // 2 // starts.shape[1])
        grid = torch.eye(3, dtype=starts.dtype, device=starts.device)[None]
        if turns > 1:
            grid = torch.cat((grid, so3_grid(turns - 1, starts.dtype, starts.device)))
        return product(starts[:, :, None], grid).flatten(1, 2)

    def _descend(
        self, poses: Tensor, energies: Tensor, unit: Tensor, mask: Tensor | None, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Poses ``(B, K, 3, 3)`` improved, and their energies, in ``steps`` evaluations of each."""
        if steps < 2:  # one evaluation gives the slope, the next the first step
            return poses, energies
        energies, slopes = self._energies_and_slopes(poses, unit, mask)
        angle = torch.full_like(energies, FIRST_STEP)
        for _ in range(steps - 1):
            downhill = -nn.functional.normalize(slopes, dim=-1)
            trial = product(poses, from_rotvec(angle[..., None] * downhill))
            there, slopes_there = self._energies_and_slopes(trial, unit, mask)
            falls = there < energies
            energies = torch.where(falls, there, energies)
            slopes = torch.where(falls[..., None], slopes_there, slopes)
            poses = torch.where(falls[..., None, None], trial, poses)
            angle = torch.where(falls, (2 * angle).clamp_max(FIRST_STEP), angle / 2)
        return poses, energies

    @torch.no_grad()
    def _energies(self, poses: Tensor, unit: Tensor, mask: Tensor | None) -> Tensor:
        """Of each cloud in each of its ``poses (B, K, 3, 3)``, ``(B, K)``."""
        return self._look(self._energy, poses, unit, mask)[..., 0]

    def _energies_and_slopes(
        self, poses: Tensor, unit: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Energies ``(B, K)`` and gradients ``(B, K, 3)`` in w at 0 of the poses ``R exp(w)``."""
        # gradients are needed here, whatever the caller has switched off
        with torch.inference_mode(False), torch.enable_grad():
            both = self._look(self._energy_and_slope, poses, unit, mask)
        return both[..., 0], both[..., 1:]

    @staticmethod
    def _look(
        function: Callable[[Tensor, Tensor | None], Tensor],
        poses: Tensor,
        unit: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """``function`` of the posed clouds and their masks, a few clouds at a time."""
        posed = product(unit[:, None], poses).flatten(0, 1)
        if mask is not None:
            mask = mask.repeat_interleave(poses.shape[1], dim=0)
        rows = max(1, POINTS_AT_ONCE // posed.shape[1])
        parts = [slice(start, start + rows) for start in range(0, len(posed), rows)]
        values = []
        for part in parts:
            try:
                values.append(function(posed[part], None if mask is None else mask[part]))
            except NotFiniteError as error:
                cloud = (part.start + error.cloud) // poses.shape[1]
                raise NotFiniteError(cloud, error.remedy) from error
        # a batch of no clouds is not shown to the network
        seen = torch.cat(values) if values else posed.new_zeros(0, 1 + 3)
        return seen.view(*poses.shape[:2], seen.shape[1])

    def _energy(self, posed: Tensor, mask: Tensor | None) -> Tensor:
        if self.network is None:
            raise InputError(
                "this Search has no network to ask: give one, or put it in front of a predictor, "
                "Canonicalized(predictor, Search())"
            )
        outputs = self.network(posed) if mask is None else self.network(posed, mask=mask)
        if outputs.ndim != 2:
            raise InputError(
                f"the network answers {tuple(outputs.shape)} to {tuple(posed.shape)}; Search needs "
                "one that gives each cloud one answer (M, C)"
            )
        return self.energy(outputs)[:, None]

    def _energy_and_slope(self, posed: Tensor, mask: Tensor | None) -> Tensor:
        def total(posed: Tensor) -> tuple[Tensor, Tensor]:
            energies = self._energy(posed, mask)
            return energies.sum(), energies

        posed = posed.detach().clone()  # an inference tensor cannot be differentiated
        if torch.compiler.is_compiling():
            pull, energies = torch.func.grad(total, has_aux=True)(posed)
        else:  # torch.func refuses networks with autograd functions of the older style
            value, energies = total(posed.requires_grad_())
            (pull,) = torch.autograd.grad(value, posed)
        # y exp(w) = y + y x w + ..., so the slope in w is the torque of the gradient
        slope = torch.linalg.cross(pull, posed).sum(dim=1)
        return torch.cat((energies, slope), dim=1).detach()


def _identity(points: Tensor) -> Tensor:
    """As a single pose of each cloud, ``(B, 1, 3, 3)``."""
    return torch.eye(3, dtype=points.dtype, device=points.device).expand(len(points), 1, 3, 3)


def _frozen_copy(network: nn.Module) -> nn.Module:
    # tensors made in inference mode could never be differentiated through
    with torch.inference_mode(False):
        return copy.deepcopy(network).requires_grad_(False).eval()
