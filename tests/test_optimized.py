"""Ordinary networks over equivariant candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pointcanon import clouds, rotations, testing
from pointcanon.canonicalizers import (
    PCA,
    Canonicalizer,
    Identity,
    Manhattan,
    Optimized,
    Orbit,
    Union,
    VectorNeuron,
)
from pointcanon.canonicalizers.optimized import (
    NEIGHBOURS,
    OrbitNet,
    PoseNet,
    _neighbours,
    _spread_parts,
)
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.layers import group_conv, tiles
from pointcanon.layers.group_conv import GroupConv
from pointcanon.losses import prior_loss, refinement_loss
from pointcanon.priors import Aligned

SMALL: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}


def plain(network: PoseNet, points: Tensor, turns: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a PoseNet computes of points alone, written plainly: pose the clouds, look at them."""
    look = network.features
    features = look.first.linear(points[:, None] @ turns)
    for layer in (*look.shared, look.peak):
        features = layer(features.relu())
    if mask is not None:
        features = features.masked_fill(~mask[:, None, :, None], -torch.inf)
    return network.head(features.amax(dim=2).relu())


def network(dtype: torch.dtype = torch.float64) -> PoseNet:
    torch.manual_seed(0)
    return PoseNet((8, 16, 12), outputs=3).to(dtype).eval()


def lesson(clouds: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Clouds, ten poses of each, and a gradient of the network's answers."""
    generator = torch.Generator().manual_seed(0)
    points = testing.generic_clouds(clouds, size, dtype=dtype)
    turns = rotations.random_rotations(10 * clouds, generator=generator, dtype=dtype)
    pull = torch.randn(clouds, 10, 3, generator=generator, dtype=dtype)
    return points, turns.unflatten(0, (clouds, 10)), pull


@pytest.mark.parametrize("tile", [1, 16 * 40 * 3, 1 << 18])
@pytest.mark.parametrize("masked", [False, True])
def test_posenet_equals_its_plain_form(
    masked: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    net, (points, turns, pull) = network(), lesson(6, 40)
    mask = torch.arange(40) < torch.arange(5, 35, 5)[:, None] if masked else None
    expected, answer = plain(net, points, turns, mask), net(points, turns, mask)
    torch.testing.assert_close(answer, expected)
    parameters = list(net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad((answer * pull).sum(), parameters),
        torch.autograd.grad((expected * pull).sum(), parameters),
    )
    with torch.no_grad():
        torch.testing.assert_close(net(points, turns, mask), expected)


def test_sampled_lessons_have_the_gradient_of_all_on_average() -> None:
    net, (points, turns, pull) = network(), lesson(3, 20)
    parameters = list(net.parameters())
    expected = torch.autograd.grad((plain(net, points, turns) * pull).sum(), parameters)
    runs = 300
    mean = [torch.zeros_like(p) for p in parameters]
    for _ in range(runs):
        sample = torch.autograd.grad((net(points, turns, None, 10) * pull).sum(), parameters)
        mean = [m + s / runs for m, s in zip(mean, sample, strict=True)]
    for ours, exact in zip(mean, expected, strict=True):
        assert (ours - exact).norm() < 0.2 * exact.norm()


GROUPS = ["C1", "C5", "T", "O"]


@pytest.mark.parametrize("orbits", [0, 1])
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_convolution_follows_the_orbit(name: str, orbits: int) -> None:
    """Seen from another of its poses an orbit is permuted, and so are the answers."""
    group = rotations.group(name, torch.float64)
    layer = GroupConv(group, 5, 4).double()
    features = torch.randn(group_conv.FEW + orbits, len(group), 5, dtype=torch.float64)
    answer = layer(features)
    for place, turn in enumerate(group):
        moved = (turn @ group)[:, None].sub(group).abs().amax(dim=(-1, -2)).argmin(dim=1)
        torch.testing.assert_close(layer(features[:, moved]), answer[:, moved])
        # plainly, as the paper has it
        torch.testing.assert_close(answer[:, place], layer.linear(features[:, moved].flatten(1)))


def test_a_group_convolution_keeps_its_digits_when_weights_are_rounded() -> None:
    group = rotations.group("T", torch.float64)
    layer = GroupConv(group, 5, 4).half().double()
    features = torch.randn(group_conv.FEW + 1, len(group), 5, dtype=torch.float64)
    few = torch.cat([layer(row[None]) for row in features])  # directly, not in the Fourier domain
    torch.testing.assert_close(layer(features), few, rtol=0, atol=1e-12)


def test_irreducible_representations_are_told_apart() -> None:
    """Their dimensions are those of the books, and their matrices are representations."""
    known = {
        "C1": [(1, 1)],
        "C4": [(1, 1), (1, 1), (1, 2)],  # over the reals a quarter turn takes two dimensions
        "T": [(1, 1), (1, 2), (3, 3)],
        "O": [(1, 1), (1, 1), (2, 2), (3, 3), (3, 3)],
        "I": [(1, 1), (3, 3), (3, 3), (4, 4), (5, 5)],
    }
    for name, kinds in known.items():
        layer = GroupConv(rotations.group(name, torch.float64), 1, 1)
        assert sorted(layer.kinds) == kinds
        torch.testing.assert_close(
            layer.basis.mT @ layer.basis, torch.eye(len(layer.basis)).double()
        )
        for matrices in layer.entries.split([size**2 for _, size in layer.kinds]):
            size = round(len(matrices) ** 0.5)
            turns = matrices.mT.unflatten(1, (size, size))
            table = group_conv._product_table(rotations.group(name, torch.float64))
            torch.testing.assert_close(turns[:, None] @ turns, turns[table])


def test_a_group_convolution_needs_a_group() -> None:
    with pytest.raises(InputError, match="these 2 matrices are no group"):
        GroupConv(rotations.group("C4")[:2], 3, 3)


@pytest.mark.parametrize("name", GROUPS)
def test_the_score_is_one_function_of_the_posed_cloud(name: str) -> None:
    """Whichever pose an orbit starts from, the same pose gets the same score."""
    torch.manual_seed(0)
    group = rotations.group(name, torch.float64)
    net = OrbitNet(group, (8, 12), hidden=16, mixed=4, classes=5).double().eval()

    points = testing.generic_clouds(1, 30, dtype=torch.float64)
    (first,), recognised = net(points, group[None])
    assert len(group) == 1 or first.std() > 1e-4
    for turn in group:
        moved = (turn @ group)[:, None].sub(group).abs().amax(dim=(-1, -2)).argmin(dim=1)
        for cloud, poses in ((points, turn @ group), (points @ turn, group)):
            (scores,), classes = net(cloud, poses[None])
            torch.testing.assert_close(scores, first[moved])
            torch.testing.assert_close(classes, recognised)  # the same whatever comes first


@pytest.mark.parametrize(
    ("canonicalizer", "size"),
    [
        (Identity(), 1),
        (PCA(1), 1),
        (PCA(4), 4),
        (PCA(24), 24),
        (PCA(4, weighting="smooth"), 1),
        (PCA(24, weighting="smooth"), 24),
        (Manhattan(1), 1),
        (Manhattan(24), 24),
        (Orbit(PCA(4), "T"), 12),
        (Union([Manhattan(), PCA(24)]), 24),
        (Union([Manhattan(), PCA(4)]), 1),
    ],
)
def test_candidates_come_in_orbits_of_the_group_they_declare(
    canonicalizer: Canonicalizer, size: int
) -> None:
    group = canonicalizer.candidate_group.double()
    assert len(group) == size
    frames = canonicalizer(testing.surface_clouds(3, 60, dtype=torch.float64)).rotations
    orbits = frames.unflatten(1, (-1, size))
    torch.testing.assert_close(orbits[:, :, :1] @ group, orbits)


def test_learning_in_bfloat16_stays_near() -> None:
    net, (points, turns, _) = network(torch.float32).train(), lesson(6, 40, torch.float32)
    expected = plain(net, points, turns)
    torch.testing.assert_close(net(points, turns), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep is 0; choose at least 1"),
        ({"steps": -1}, "steps is -1; choose at least 0"),
        ({"answers": 0}, "answers is 0; choose at least 1"),
        ({"points": 0}, "points is 0; choose at least 1"),
        ({"looks": 0}, "looks is 0; choose at least 1"),
        ({"negligible": 1.0}, r"negligible is 1.0; choose a share in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout is 1.0; choose a share in \[0, 1\)"),
        ({"class_dropout": -0.1}, r"class_dropout is -0.1; choose a share in \[0, 1\)"),
        ({"scorer_hidden": 0}, "hidden is 0"),
        ({"scorer_widths": (32,)}, r"widths is \(32,\); give at least two"),
        ({"refiner_widths": (32, 0)}, r"widths is \(32, 0\)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Optimized(**options)


def test_features_are_left_out_in_training_alone() -> None:
    orbit, points = rotations.group("O"), testing.generic_clouds(3, 40)
    poses = orbit.expand(3, 24, 3, 3)

    def scored(training: bool, **options: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net = OrbitNet(orbit, (8, 16), 32, 8, classes=5, **options).train(training)
        torch.manual_seed(1)
        scores, classes = net(points, poses)
        assert classes is not None
        return scores.detach(), classes.detach()

    both = {"dropout": 0.5, "class_dropout": 0.5}
    for found, expected in zip(scored(False, **both), scored(False), strict=True):
        assert torch.equal(found, expected)
    plain_scores, plain_classes = scored(True)
    scores, classes = scored(True, dropout=0.5)
    assert torch.equal(classes, plain_classes)
    assert not torch.isclose(scores, plain_scores).any()
    scores, classes = scored(True, class_dropout=0.5)
    assert torch.equal(scores, plain_scores)
    assert not torch.isclose(classes, plain_classes).any()


class Two(Canonicalizer):
    """Proposes two poses, the second at given odds."""

    def __init__(self, odds: float = 1.0) -> None:
        super().__init__()
        self.odds = odds

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        turns = rotations.group("C2", points.dtype).expand(len(points), 2, 3, 3)
        weights = torch.tensor([1.0, self.odds]).log().to(points).expand(len(points), 2)
        return Frames.of(turns, weights)


def test_the_odds_of_the_proposals_count() -> None:
    points = testing.generic_clouds(5, 64)
    torch.manual_seed(0)
    even = Optimized(Two(), **SMALL).eval()
    uneven = Optimized(Two(odds=9.0), **SMALL).eval()
    uneven.load_state_dict(even.state_dict())
    first, second = (module(points).stages[0].log_weights for module in (even, uneven))
    raised = (second - first).diff(dim=1)
    torch.testing.assert_close(raised, torch.full((5, 1), 9.0).log(), atol=1e-5, rtol=0)


def test_untrained_it_answers_with_proposals_as_they_are() -> None:
    """A fresh refiner mends nothing, and every kept pose comes twice."""
    points = testing.generic_clouds(5, 64, dtype=torch.float64)
    torch.manual_seed(0)
    module = Optimized(PCA(4), keep=2, answers=4, **SMALL).double().eval()
    frames = module(points)
    assert frames.rotations.shape == (5, 4, 3, 3)
    assert [stage.count for stage in frames.stages] == [4, 4]
    scored = module(points).stages[0].best(2)
    for pose in range(2):
        nearest = rotations.geodesic_angle(frames.rotations, scored.rotations[:, pose, None])
        assert ((nearest < 1e-6).sum(dim=1) == 2).all()


def test_a_gate_is_the_odds_that_a_cloud_arrives_as_it_should() -> None:
    torch.manual_seed(0)
    points = testing.surface_clouds(6, 64, dtype=torch.float64)
    module = Optimized(PCA(24), steps=0, answers=30, **SMALL).double().eval()
    before = module(points)
    module.gate = 50.0
    sure = module(points).best()
    identity = torch.eye(3, dtype=torch.float64).expand(6, 1, 3, 3)
    torch.testing.assert_close(sure.rotations, identity)
    module.gate = -50.0
    never = module(points)
    assert never.count == 30
    torch.testing.assert_close(never.best(5).rotations, before.best(5).rotations)
    torch.testing.assert_close(never.best(5).log_weights, before.best(5).log_weights)


def test_a_part_of_the_points_teaches() -> None:
    points = testing.generic_clouds(4, 40)
    mask = torch.arange(40) < torch.tensor([[40], [30], [20], [5]])
    seen, kept = Optimized(points=16, **SMALL)._random_part(points, mask)
    assert seen.shape == (4, 16, 3)
    assert kept is not None
    assert kept.sum(dim=1).tolist() == [16, 16, 16, 5]
    module = Optimized(VectorNeuron(normals=True), points=16, **SMALL)
    testing.assert_proper(module.train()(points, mask, points))


def test_the_scored_part_is_real_points_spread_over_the_radius() -> None:
    points = testing.generic_clouds(2, 40)
    mask = torch.arange(40) < torch.tensor([[40], [30]])
    ((seen, kept),) = _spread_parts(points, mask, 10)
    assert kept is None
    for cloud, real, part in zip(points, (40, 30), seen, strict=True):
        order = cloud[:real].norm(dim=-1).argsort()
        expected = cloud[order[torch.arange(10) * real // 10 + real // 20]]
        torch.testing.assert_close(part, expected)
    ((few, _),) = _spread_parts(points, mask & (torch.arange(40) < 3), 10)
    assert (torch.cdist(few, points[:, :3]).amin(dim=-1) == 0).all()
    together = torch.cat([part for part, _ in _spread_parts(points, None, 10, 4)], dim=1)
    radii = (cloud.norm(dim=-1).sort(dim=1).values for cloud in (together, points))
    assert torch.equal(*radii)


def test_every_neighbour_counts_once() -> None:
    """However many points pad a cloud, its neighbourhoods are the same."""
    points = testing.generic_clouds(2, NEIGHBOURS + 300)
    mask = torch.arange(NEIGHBOURS + 300) < torch.tensor([[NEIGHBOURS + 300], [700]])
    chosen, real = _neighbours(points, mask)
    assert chosen.shape == (2, NEIGHBOURS, 3)
    assert real is not None
    assert real.sum(dim=1).tolist() == [NEIGHBOURS, 700]
    found = chosen[1, real[1]]
    assert torch.equal(found.sort(dim=0).values, points[1, :700].sort(dim=0).values)
    assert _neighbours(points[:, :700], None)[0] is not None
    assert torch.equal(_neighbours(points[:, :700], None)[0], points[:, :700])


def test_answers_that_weigh_next_to_nothing_are_left_out() -> None:
    torch.manual_seed(0)
    points = testing.surface_clouds(6, 64, dtype=torch.float64)
    module = Optimized(PCA(24), answers=5, **SMALL).double().eval()
    module.scorer.score.weight.data *= 8
    every = module(points)
    share = (every.weights / every.weights[:, :1]).median().item()
    module.negligible = share
    few = module(points)
    kept = every.weights >= share * every.weights[:, :1]
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(few.weights > 0, kept)
    torch.testing.assert_close(few.rotations, every.rotations)
    expected = torch.where(kept, every.weights, 0.0)
    torch.testing.assert_close(few.weights, expected / expected.sum(dim=1, keepdim=True))


def test_what_several_looks_find_is_averaged() -> None:
    torch.manual_seed(0)
    points = testing.surface_clouds(3, 64, dtype=torch.float64)
    module = Optimized(PCA(24), points=16, looks=2, **SMALL).double().eval()
    unit = clouds.unit_scale(points - points.mean(dim=1, keepdim=True))
    parts = module._parts(unit, None, 2)
    proposals = PCA(24)(points)
    single = [module.scorer.features(part, proposals.rotations, None) for part, _ in parts]
    assert (single[0] - single[1]).abs().max() > 1e-3
    scores, _ = module.scorer.compared((single[0] + single[1]) / 2)
    found = module._score(proposals, parts).log_weights
    torch.testing.assert_close(found, scores.log_softmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_a_part_is_as_equivariant(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Optimized(PCA(24), points=32, **SMALL).to(dtype).eval()
    points = testing.surface_clouds(100 if dtype == torch.float32 else 25, 200, dtype=dtype)
    testing.assert_equivariant(module, points)
    testing.assert_permutation_invariant(module, points)
    mask = torch.arange(200) < torch.arange(100, 200)[: len(points), None]
    testing.assert_equivariant(module, points, mask=mask)
    testing.assert_padding_independent(module, points)


def test_it_learns_to_choose_and_to_mend() -> None:
    """Clouds 30 degrees off their principal axes, of no symmetry."""
    torch.manual_seed(0)
    shape = testing.generic_clouds(1, 64)
    tilted = PCA(1)(shape).rotations[0, 0] @ rotations.from_rotvec(torch.tensor([0.5, 0.0, 0.0]))
    points = (shape - shape.mean(dim=1)) @ tilted
    points = points + 0.02 * torch.randn(16, 64, 3)
    module = Optimized(PCA(4), keep=2, scorer_widths=(16, 32), refiner_widths=(32, 64)).train()
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    prior = Aligned(50.0)
    for _ in range(60):
        turns = rotations.random_rotations(16)
        turned = points @ turns.mT
        loss = prior_loss(module(turned), prior, turns)
        loss = loss + refinement_loss(module, turned, prior, turns, samples=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.eval()
    turns = rotations.random_rotations(16)
    found = module(points @ turns.mT).best().rotations[:, 0]
    angle = torch.rad2deg(rotations.geodesic_angle(found, turns))
    assert angle.median() < 8


def test_plates_and_few_points_are_settled() -> None:
    """Where the frame of the surface is that of the principal axes, every candidate comes twice."""
    torch.manual_seed(0)
    module = Optimized(scorer_widths=(8, 16), refiner_widths=(8, 16)).double().eval()
    plates = testing.generic_clouds(6, 64, dtype=torch.float64)
    plates[..., 2] = 0
    few = [testing.generic_clouds(6, size, dtype=torch.float64) for size in (5, 10)]
    for points in (plates, *few):
        turn = rotations.random_rotations(1, dtype=torch.float64)[0]
        found, turned = module(points), module(points @ turn.mT)
        assert not (found.degenerate | turned.degenerate).any()
        torch.testing.assert_close(
            turned.best().rotations[:, 0], turn @ found.best().rotations[:, 0]
        )


def test_a_look_is_taught_with_the_weights_it_was_given() -> None:
    net, (points, turns, pull) = network(), lesson(4, 30)
    look = net.features
    given = {name: torch.randn_like(p).requires_grad_() for name, p in look.named_parameters()}
    swapped = torch.func.functional_call(look, given, (points, turns))
    pull = torch.randn_like(swapped)
    gradients = torch.autograd.grad((swapped * pull).sum(), list(given.values()))
    look.load_state_dict(given)
    expected = torch.autograd.grad((look(points, turns) * pull).sum(), list(look.parameters()))
    torch.testing.assert_close(gradients, expected)
    (curved,) = torch.autograd.grad(
        look(points, turns).square().sum(), [look.peak.weight], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        curved.sum().backward()
