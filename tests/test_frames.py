"""Frames: R maps canonical to input, apply and invert undo each other, votes are mixtures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pointcanon import rotations
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.testing import assert_proper, frame_distance

DTYPE = torch.float64


def frames(batch: int = 3, count: int = 4, seed: int = 0) -> Frames:
    generator = torch.Generator().manual_seed(seed)
    return Frames.of(
        rotations.random_rotations(batch, count, generator=generator, dtype=DTYPE),
        torch.randn(batch, count, generator=generator, dtype=DTYPE),
        torch.randn(batch, 3, generator=generator, dtype=DTYPE),
    )


def clouds(batch: int = 3, count: int = 10) -> Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(9), dtype=DTYPE)


def test_rotation_maps_canonical_to_input() -> None:
    """R and not R^T: canonical x comes to the input's y under a quarter turn about z."""
    quarter = rotations.about_axis(
        torch.tensor([0.0, 0, 1]).double(), torch.tensor(math.pi / 2).double()
    )
    one = Frames.of(quarter[None], centre=torch.tensor([[10.0, 0, 0]], dtype=DTYPE))
    canonical = torch.tensor([[[[1.0, 0, 0]]]], dtype=DTYPE)
    received = torch.tensor([[[10.0, 1, 0]]], dtype=DTYPE)
    torch.testing.assert_close(one.invert(canonical)[:, 0], received)
    torch.testing.assert_close(one.apply(received), canonical)


def test_apply_recovers_the_canonical_cloud() -> None:
    one = frames(count=1)
    canonical = clouds()
    received = canonical @ one.rotations[:, 0].mT + one.centre[:, None]
    torch.testing.assert_close(one.apply(received)[:, 0], canonical)


def test_invert_undoes_apply_and_apply_undoes_invert() -> None:
    many, points = frames(), clouds()
    posed = many.apply(points)
    assert posed.shape == (3, 4, 10, 3)
    torch.testing.assert_close(many.invert(posed), points[:, None].expand(3, 4, 10, 3))
    torch.testing.assert_close(many.apply(many.invert(posed)[:, 2])[:, 2], posed[:, 2])


def test_vectors_turn_but_do_not_move() -> None:
    many, points = frames(), clouds()
    arrows = many.apply(points[:, 1:]) - many.apply(points[:, :1])
    torch.testing.assert_close(many.apply_vectors(points[:, 1:] - points[:, :1]), arrows)
    torch.testing.assert_close(many.invert_vectors(arrows)[:, 1], points[:, 1:] - points[:, :1])


def test_poses_keep_their_precision_under_autocast() -> None:
    single, points = frames(), clouds().float()
    single = Frames.of(single.rotations.float(), centre=single.centre.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posed = single.apply(points)
        back = single.invert(posed)
        composed = single.compose(Frames.of(single.rotations.flatten(0, 1)))
    assert posed.dtype == back.dtype == torch.float32
    torch.testing.assert_close(back, points[:, None].expand_as(back), atol=1e-5, rtol=1e-5)
    assert_proper(composed)


def test_weights_are_normalised() -> None:
    scores = torch.tensor([[1.0, 2.0], [700.0, -700.0]])
    many = Frames.of(torch.eye(3).expand(2, 2, 3, 3), scores)
    torch.testing.assert_close(many.weights, scores.softmax(dim=1))
    assert many.count == 2
    equal = Frames.of(torch.eye(3).expand(2, 5, 3, 3))
    torch.testing.assert_close(equal.weights, torch.full((2, 5), 0.2))


def test_bare_rotations_are_single_frames() -> None:
    one = Frames.of(torch.eye(3).expand(4, 3, 3))
    assert one.rotations.shape == (4, 1, 3, 3)
    assert not one.centre.any()
    assert one.degenerate.tolist() == [False] * 4


@pytest.mark.parametrize(
    ("rotations_shape", "weights_shape"),
    [((3, 3), None), ((2, 3, 2), None), ((2, 4, 3, 3), (2, 3)), ((2, 4, 3, 3), (4,))],
)
def test_wrong_shapes_are_named(
    rotations_shape: tuple[int, ...], weights_shape: tuple[int, ...] | None
) -> None:
    weights = None if weights_shape is None else torch.zeros(weights_shape)
    with pytest.raises(InputError, match="has shape"):
        Frames.of(torch.zeros(rotations_shape), weights)


def test_compose_poses_as_one_after_the_other() -> None:
    outer, points = frames(), clouds()
    inner = frames(batch=12, count=2, seed=1)
    inner = Frames.of(inner.rotations, inner.log_weights)
    both = outer.compose(inner)
    assert both.count == 8
    in_turn = inner.apply(outer.apply(points).flatten(0, 1))
    torch.testing.assert_close(both.apply(points), in_turn.unflatten(0, (3, 4)).flatten(1, 2))
    expected = (outer.weights[:, :, None] * inner.weights.unflatten(0, (3, 4))).flatten(1)
    torch.testing.assert_close(both.weights, expected)


def test_compose_is_degenerate_where_no_candidate_is_settled() -> None:
    outer = Frames.of(
        torch.eye(3).expand(3, 2, 3, 3), degenerate=torch.tensor([True, False, False])
    )
    flags = torch.tensor([False, False, True, False, True, True])
    inner = Frames.of(torch.eye(3).expand(6, 1, 3, 3), degenerate=flags)
    assert outer.compose(inner).degenerate.tolist() == [True, False, True]


def test_best_are_the_heaviest_in_order() -> None:
    many = frames(count=6)
    order = many.log_weights.argsort(dim=1, descending=True)
    top = many.best(3)
    assert top.count == 3
    for cloud in range(3):
        assert torch.equal(top.rotations[cloud], many.rotations[cloud, order[cloud, :3]])
    kept = many.weights.gather(1, order[:, :3])
    torch.testing.assert_close(top.weights, kept / kept.sum(dim=1, keepdim=True))
    assert torch.equal(top.centre, many.centre)
    torch.testing.assert_close(many.best().weights, torch.ones(3, 1, dtype=DTYPE))
    assert many.best(100).count == 6


def test_select_takes_the_raw_vectors_along() -> None:
    raw = torch.arange(2 * 3 * 3 * 2.0).view(2, 3, 3, 2)
    many = Frames.of(torch.eye(3).expand(2, 3, 3, 3), raw=raw)
    chosen = many.select(torch.tensor([[2, 0], [1, 1]]))
    assert torch.equal(chosen.raw[0], raw[0, [2, 0]])
    assert torch.equal(chosen.raw[1], raw[1, [1, 1]])


def test_vote_is_the_weighted_mean() -> None:
    many = frames()
    outputs = torch.randn(3, 4, 7, 2, dtype=DTYPE)
    expected = torch.einsum("bk,bknc->bnc", many.weights, outputs)
    torch.testing.assert_close(many.vote(outputs), expected)
    torch.testing.assert_close(
        many.vote(torch.full((3, 4), 2.5, dtype=DTYPE)).unique(), torch.tensor([2.5], dtype=DTYPE)
    )


def test_a_certain_candidate_counts_more() -> None:
    """Weights times exp(-H): of two equal ones, 1 sure and 1 torn between C classes, 1 to 1 / C."""
    pair = Frames.of(torch.eye(3, dtype=DTYPE).expand(1, 2, 3, 3))
    logits = torch.tensor([[[0.0, 1e3, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]], dtype=DTYPE)
    expected = (torch.tensor([0.0, 1, 0, 0], dtype=DTYPE) + 0.25 * 0.25) / 1.25
    voted = pair.vote_logits(logits, by_certainty=True).exp()
    torch.testing.assert_close(voted[0], expected)
    points = logits[:, :, None].expand(1, 2, 5, 4)
    each = pair.vote_logits(points, by_certainty=True).exp()
    torch.testing.assert_close(each, voted[:, None].expand(1, 5, 4))


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 6, 5)])
def test_logits_are_voted_as_probabilities(shape: tuple[int, ...]) -> None:
    many = frames()
    logits = 5 * torch.randn(shape, dtype=DTYPE)
    mixture = many.vote(logits.softmax(dim=-1))
    torch.testing.assert_close(many.vote_logits(logits).exp(), mixture)


def test_confident_logits_do_not_overflow() -> None:
    many = frames(count=2)
    logits = torch.tensor([[[1e4, 0.0], [0.0, 1e4]]]).expand(3, 2, 2).to(DTYPE)
    torch.testing.assert_close(many.vote_logits(logits), many.log_weights)


def test_single_frame_leaves_logits_untouched() -> None:
    logits = torch.randn(3, 1, 5, dtype=DTYPE)
    assert torch.equal(frames(count=1).vote_logits(logits), logits[:, 0])


def test_frame_distance_matches_candidates_and_weights() -> None:
    many = frames()
    shuffled = many.select(torch.tensor([[2, 0, 3, 1]]).expand(3, 4))
    assert frame_distance(many, shuffled).max() < 1e-14
    angle = 0.1
    turn = rotations.about_axis(torch.ones(3).double(), torch.tensor(angle).double())
    turned = Frames.of(many.rotations @ turn, many.log_weights)
    distance = frame_distance(many, turned)
    torch.testing.assert_close(2 * (distance / math.sqrt(8)).asin(), torch.full_like(distance, 0.1))
    reweighted = Frames.of(many.rotations, many.log_weights.flip(1))
    expected = (many.weights - many.weights.flip(1)).abs().amax(dim=1)
    torch.testing.assert_close(frame_distance(many, reweighted), expected)


def test_straight_through_chooses_hard_and_teaches_softly() -> None:
    scores = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    scores.requires_grad_()
    turns = frames().rotations.requires_grad_()
    many = Frames.of(turns, scores)
    probe = torch.linspace(-1, 1, 9, dtype=DTYPE).view(3, 3)
    one = many.straight_through()
    assert_proper(one)
    assert torch.equal(one.rotations, many.best().rotations)
    assert one.count == 1
    found = torch.autograd.grad((one.rotations * probe).sum(), (scores, turns))
    soft = scores.softmax(dim=1)[..., None, None] * turns.detach() * probe
    (expected,) = torch.autograd.grad(soft.sum(), scores)
    torch.testing.assert_close(found[0], expected)
    assert found[0].all()
    chosen = nn.functional.one_hot(scores.argmax(dim=1), 4).to(DTYPE)[..., None, None]
    torch.testing.assert_close(found[1], chosen * probe)


def test_a_size_is_divided_out_and_put_back() -> None:
    scale = torch.tensor([0.5, 2.0, 30.0], dtype=DTYPE)
    plain, points = frames(), clouds()
    sized = replace(plain, scale=scale)
    torch.testing.assert_close(
        sized.apply(points), plain.apply(points) / scale[:, None, None, None]
    )
    torch.testing.assert_close(
        sized.invert(sized.apply(points)), points[:, None].expand(3, 4, 10, 3)
    )
    assert torch.equal(sized.apply_vectors(points), plain.apply_vectors(points))
    assert sized.best().scale is scale
    inner = Frames.of(torch.eye(3, dtype=DTYPE).expand(12, 3, 3))
    assert sized.compose(inner).scale is scale


def test_frames_of_some_clouds() -> None:
    whole = replace(frames(), scale=torch.arange(1, 4, dtype=DTYPE), stages=(frames(seed=1),))
    part = whole[1:]
    assert torch.equal(part.apply(clouds()[1:]), whole.apply(clouds())[1:])
    assert torch.equal(part.stages[0].rotations, whole.stages[0].rotations[1:])
    assert part.raw is None
    assert torch.equal(whole[torch.tensor([True, False, True])].centre, whole.centre[::2])


def test_confidence_is_that_of_the_heaviest_frame() -> None:
    assert frames().confidence is None
    many = frames()
    sharpness = torch.tensor([0.0, 1.0, 5.0, 50.0], dtype=DTYPE)
    many = replace(many, fisher=sharpness[:, None, None] * many.rotations)
    best = many.log_weights.argmax(dim=1)
    k = 2 * sharpness[best]
    found = many.confidence
    assert found is not None
    torch.testing.assert_close(found, torch.special.i1e(k) / torch.special.i0e(k))
    shuffled = many.select(torch.tensor([[2, 0, 3, 1]]).expand(3, 4))
    assert shuffled.confidence is not None
    assert torch.equal(shuffled.confidence, found)


def test_the_heaviest_is_the_best_of_equals_too() -> None:
    frames = Frames.of(rotations.random_rotations(60).view(5, 12, 3, 3))
    assert torch.equal(
        frames.best().rotations[:, 0], frames.rotations[torch.arange(5), frames.heaviest]
    )


def test_what_a_network_rules_out_is_no_nan() -> None:
    logits = torch.tensor([[[1.0, -torch.inf, 0.5], [-torch.inf, 2.0, 0.0]]])
    frames = Frames.of(rotations.random_rotations(2)[None])
    voted = frames.vote_logits(logits, by_certainty=True).softmax(dim=-1)
    assert torch.isfinite(voted).all()
    torch.testing.assert_close(voted.sum(), torch.tensor(1.0))


def test_only_another_pose_contests_the_heaviest() -> None:
    one, other = rotations.random_rotations(2)
    poses = torch.stack((one, one @ rotations.from_rotvec(torch.tensor([1e-5, 0, 0])), other))
    weights = torch.tensor([[0.0, 0.0, -1.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    contested = Frames.of(poses.expand(4, 3, 3, 3), weights).contested
    assert contested.tolist() == [False, True, True, False]
