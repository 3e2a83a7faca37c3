"""Optimised canonicalization with the contrastive loss: any network chooses the pose of an orbit.

What every canonicalizer owes is asked of it in test_canonicalizers.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pointcanon import rotations, testing
from pointcanon.canonicalizers import (
    PCA,
    Canonicalizer,
    Contrastive,
    Identity,
    Optimized,
    Orbit,
    VectorNeuron,
)
from pointcanon.errors import InputError
from pointcanon.losses import contrastive_loss, prior_loss
from pointcanon.predictors import PointNet
from pointcanon.priors import Aligned
from pointcanon.rotations import product


class Counting(nn.Module):
    """Moments of a cloud, and how often it was asked."""

    calls = 0

    def forward(self, points: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat((points.pow(3).mean(dim=1), points.abs().mean(dim=1)), dim=1)


def test_weights_are_those_of_the_energies_and_the_orbit_is_one_batch() -> None:
    torch.manual_seed(0)
    network, points = Counting(), 5 * testing.generic_clouds(4, 30, dtype=torch.float64)
    module = Contrastive(network, PCA(24), width=6, temperature=0.2, choice="soft").double()
    frames = module(points)
    assert network.calls == 1
    posed = PCA(24)(points).apply(points)
    posed = posed / posed.norm(dim=-1).amax(dim=2)[..., None, None]
    answers = torch.stack([network(poses) for poses in posed])
    energies = -torch.cosine_similarity(answers, module.target.expand_as(answers), dim=-1)
    torch.testing.assert_close(frames.embeddings, answers)
    torch.testing.assert_close(frames.weights, (-energies / 0.2).softmax(dim=1))
    torch.testing.assert_close(frames.rotations, PCA(24)(points).rotations)


def test_the_hard_choice_is_the_best_with_a_gradient_to_all() -> None:
    torch.manual_seed(0)
    points, network = testing.generic_clouds(4, 30, dtype=torch.float64), Counting()
    module = Contrastive(network, width=6).double()
    soft = Contrastive(network, width=6, choice="soft").double()
    soft.load_state_dict(module.state_dict())
    hard, orbit = module(points), soft(points)
    assert (hard.count, orbit.count) == (1, 24)
    assert torch.equal(hard.rotations, orbit.best().rotations)
    (stage,) = hard.stages
    torch.testing.assert_close(stage.weights, orbit.weights)
    mean = (orbit.weights[..., None, None] * orbit.rotations).sum(dim=1, keepdim=True)
    for row, column in ((0, 1), (2, 2)):
        entry = hard.rotations[..., row, column].sum(), mean[..., row, column].sum()
        (found,) = torch.autograd.grad(entry[0], module.target, retain_graph=True)
        (wanted,) = torch.autograd.grad(entry[1], soft.target, retain_graph=True)
        assert found.any()
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("network", "proposal"),
    [
        (PointNet(7, widths=(8, 8), embedding=16), PCA(4)),
        (PointNet(7, widths=(8, 8), embedding=16), Orbit(VectorNeuron(k=8), "T")),
        (Counting(), PCA(4)),
    ],
    ids=["predictor", "learned proposal", "foreign"],
)
def test_any_network_and_any_proposal_will_do(network: nn.Module, proposal: Canonicalizer) -> None:
    torch.manual_seed(0)
    width = 6 if isinstance(network, Counting) else None
    module = Contrastive(network, proposal, width).double()
    testing.assert_equivariant(module, testing.generic_clouds(10, 40, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "axis"), [("C4", (0, 0, 1)), ("C5", (1, 2, 3)), ("T", None), ("O", None), ("I", None)]
)
def test_over_a_finite_group_alone_as_in_the_paper(
    name: str, axis: tuple[int, int, int] | None
) -> None:
    """With no coarse frame it is equivariant to that group, and to that group alone."""
    torch.manual_seed(0)
    orbit = Orbit(Identity(), name, axis)
    module = Contrastive(PointNet(7, widths=(8, 8), embedding=16), orbit).double().eval()
    points = testing.generic_clouds(6, 40, dtype=torch.float64)
    found = module(points).rotations[:, 0]
    for element in orbit.elements:
        turned = module(product(points, element.mT.expand(6, 3, 3))).rotations[:, 0]
        torch.testing.assert_close(turned, element @ found, rtol=0, atol=1e-9)
    other = rotations.random_rotations(6, dtype=torch.float64)
    turned = module(product(points, other.mT)).rotations[:, 0]
    assert (turned - other @ found).abs().amax(dim=(1, 2)).min() > 1e-3


def test_it_learns_the_pose_of_its_data() -> None:
    """From one shape: its answers come apart, and the pose of the data wins in every position."""
    torch.manual_seed(0)
    shape = testing.generic_clouds(1, 64)
    (axes,) = PCA(1)(shape).rotations[:, 0]
    shape = (shape - shape.mean(dim=1)) @ axes  # so that the right pose is among the candidates
    module = Contrastive(PointNet(16, widths=(16, 32), embedding=32))
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    for _ in range(30):
        turn = rotations.random_rotations(4)
        frames = module(product(shape, turn.mT))
        assert frames.embeddings is not None
        loss = contrastive_loss(frames.embeddings) + prior_loss(frames, Aligned(5.0), turn)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    module.eval()
    turn = rotations.random_rotations(50)
    frames = module(product(shape, turn.mT))
    assert rotations.geodesic_angle(frames.rotations[:, 0], turn).max() < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": len}, "network is a builtin_function_or_method; pass a torch.nn.Module"),
        ({"network": Counting()}, "width is None; say how many numbers Counting answers"),
        ({"network": Counting(), "width": 0}, "width is 0"),
        ({"network": Counting(), "width": 6, "temperature": 0.0}, "choose a positive number"),
        ({"network": Counting(), "width": 6, "choice": "best"}, "choose 'hard' or 'soft'"),
    ],
)
def test_bad_options_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Contrastive(**options)


def test_an_answer_of_another_width_is_named() -> None:
    with pytest.raises(InputError, match=r"answered \(48, 6\).*expected \(48, 8\)"):
        Contrastive(Counting(), width=8)(testing.generic_clouds(2, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Contrastive", "Optimized"])
def test_a_cloud_that_looks_alike_in_two_poses_is_flagged(name: str, dtype: torch.dtype) -> None:
    """A twofold axis leaves principal axes as they are, but two of 24 poses show one cloud."""
    torch.manual_seed(0)
    canonicalizer: Canonicalizer = Contrastive(PointNet(8, widths=(8, 16), embedding=16))
    if name == "Optimized":
        canonicalizer = Optimized(PCA(24), answers=1, scorer_widths=(8, 16), refiner_widths=(8, 16))
    canonicalizer = canonicalizer.to(dtype).eval()
    half = testing.generic_clouds(20, 30, dtype=torch.float64)
    twofold = torch.cat((half, half * torch.tensor([-1.0, -1.0, 1.0])), dim=1)
    turned = twofold @ rotations.random_rotations(20, dtype=torch.float64).mT
    assert canonicalizer(turned.to(dtype)).degenerate.all()
    generic = testing.generic_clouds(20, 60, dtype=dtype)
    assert not canonicalizer(generic).degenerate.any()
