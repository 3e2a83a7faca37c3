"""What each loss is least at, against the formula written out. (``prior_loss``: test_priors.py.)"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pointcanon import rotations
from pointcanon.canonicalizers import VectorNeuron
from pointcanon.canonicalizers.optimized import PoseNet
from pointcanon.errors import InputError
from pointcanon.frames import Frames
from pointcanon.losses import contrastive_loss, matrix_fisher_loss, prior_loss, quotient_loss
from pointcanon.priors import Aligned, MatrixFisher, confidence
from pointcanon.testing import surface_clouds

DTYPE = torch.float64
EYE = torch.eye(3, dtype=DTYPE)
TURNS = rotations.so3_grid(12, DTYPE)


def about(axis: int, degrees: float) -> Tensor:
    return rotations.about_axis(EYE[axis], torch.tensor(math.radians(degrees), dtype=DTYPE))


# contrastive


def test_contrastive_loss_is_the_mean_cosine_between_poses() -> None:
    embeddings = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    cosines = [
        abs(float(nn.functional.cosine_similarity(cloud[i], cloud[j], dim=0)))
        for cloud in embeddings
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    expected = sum(cosines) / len(cosines)
    assert contrastive_loss(embeddings).item() == pytest.approx(expected)
    # neither the lengths of the answers nor their signs count
    assert contrastive_loss(-3 * embeddings).item() == pytest.approx(expected)


def test_contrastive_loss_is_one_for_an_invariant_network_and_nought_at_right_angles() -> None:
    alike = torch.ones(2, 24, 8, requires_grad=True)
    assert contrastive_loss(alike).item() == pytest.approx(1)
    assert contrastive_loss(5 * torch.eye(24).expand(2, 24, 24)).item() == 0
    zeros = torch.zeros(2, 3, 8, requires_grad=True)
    for given in (alike, zeros):
        contrastive_loss(given).backward()
        assert torch.isfinite(given.grad).all()
    with pytest.raises(InputError, match="G >= 2"):
        contrastive_loss(torch.ones(2, 1, 8))
    with pytest.raises(InputError, match=r"expected \(B, G, D\)"):
        contrastive_loss(torch.ones(2, 8))


def test_contrastive_loss_keeps_its_precision_under_autocast() -> None:
    embeddings = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(embeddings)
    torch.testing.assert_close(inside, contrastive_loss(embeddings))


def test_an_ordinary_network_learns_to_choose_among_a_group() -> None:
    """The method of arXiv 2405.14089 as the docstring writes it."""
    torch.manual_seed(0)
    group = rotations.group("C4")
    shapes = surface_clouds(3, 48)
    shapes = shapes - shapes.mean(dim=1, keepdim=True)
    network, reference = PoseNet((16, 32), outputs=8), nn.Parameter(torch.randn(8))
    optimizer = torch.optim.Adam([*network.parameters(), reference], lr=3e-3)

    def look(points: Tensor) -> tuple[Tensor, Frames]:
        candidates = Frames.of(group.expand(len(points), -1, 3, 3))
        embeddings = network(points, candidates.rotations)
        scores = nn.functional.cosine_similarity(embeddings, reference, dim=-1)
        return embeddings, Frames.of(candidates.rotations, 5 * scores)

    for _ in range(60):
        which, turn = torch.randint(3, (24,)), group[torch.randint(4, (24,))]
        embeddings, frames = look(shapes[which] @ turn.mT)
        loss = contrastive_loss(embeddings) + prior_loss(frames, Aligned(5.0), turn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    turned = shapes[:, None] @ group.mT
    with torch.no_grad():
        embeddings, frames = look(turned.flatten(0, 1))
    chosen = frames.best().rotations[:, 0]
    torch.testing.assert_close(chosen, group.repeat(3, 1, 1), atol=1e-5, rtol=0)
    assert contrastive_loss(embeddings) < 0.5


# quotient


def test_quotient_loss_is_the_least_distance_over_the_group() -> None:
    group = rotations.group("T", DTYPE)
    raw = torch.randn(12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    squared = torch.stack([(raw - TURNS @ q).square().sum(dim=(-1, -2)) for q in group])
    expected = squared.min(dim=0).values.mean()
    torch.testing.assert_close(quotient_loss(raw, group, TURNS), expected)
    torch.testing.assert_close(quotient_loss(raw, "T", TURNS), expected)
    trivial = (raw - TURNS).square().sum(dim=(-1, -2)).mean()
    torch.testing.assert_close(quotient_loss(raw, "C1", TURNS), trivial)


@pytest.mark.parametrize("name", ["C4", "T", "O", "I"])
def test_quotient_loss_knows_poses_up_to_turns_of_the_canonical_cloud(name: str) -> None:
    group = rotations.group(name, DTYPE)
    raw = torch.randn(12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    expected = quotient_loss(raw, group, TURNS)
    for element in group[1::3]:
        # R and R Q are one pose: on the side of the canonical cloud
        torch.testing.assert_close(quotient_loss(raw, group, TURNS @ element), expected)
        torch.testing.assert_close(quotient_loss(raw @ element, group, TURNS), expected)
        assert quotient_loss(TURNS @ element, group, TURNS).item() == pytest.approx(0, abs=1e-20)
    # and not on the side of the input, but that is where equivariance turns both
    assert quotient_loss(group[1] @ TURNS, group, TURNS) > 0.01
    torch.testing.assert_close(quotient_loss(TURNS[1] @ raw, group, TURNS[1] @ TURNS), expected)


def test_a_symmetric_cloud_is_learned_modulo_its_symmetry_only() -> None:
    """Poses R and R Q alike: the squared distance settles between them, the quotient at one."""
    targets = torch.stack((EYE, about(2, 180)))

    def settle(group: str) -> Tensor:
        raw = about(1, 40).clone().requires_grad_()
        optimizer = torch.optim.SGD([raw], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            quotient_loss(raw.expand(2, 3, 3), group, targets).backward()
            optimizer.step()
        return raw.detach()

    torch.testing.assert_close(settle("C2"), EYE, atol=1e-6, rtol=0)
    between = settle("C1")
    torch.testing.assert_close(between, targets.mean(dim=0), atol=1e-6, rtol=0)
    assert torch.linalg.det(between).abs() < 1e-6  # no pose at all


# matrix Fisher


def test_matrix_fisher_loss_is_the_negative_log_likelihood() -> None:
    raw = torch.randn(12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    each = zip(raw, TURNS, strict=True)
    expected = -torch.stack([MatrixFisher(one).log_prob(turn) for one, turn in each]).mean()
    torch.testing.assert_close(matrix_fisher_loss(raw, TURNS), expected)
    assert matrix_fisher_loss(0 * raw, TURNS).item() == pytest.approx(0, abs=1e-12)
    # of a fixed concentration it is the squared distance, up to scale and constant
    found = matrix_fisher_loss(4 * TURNS[:6], TURNS[6:]) - matrix_fisher_loss(4 * TURNS, TURNS)
    squared = (TURNS[:6] - TURNS[6:]).square().sum(dim=(-1, -2)).mean()
    torch.testing.assert_close(found, 4 / 2 * squared)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e4, 1e12])
def test_matrix_fisher_loss_is_finite_for_any_answer(size: float) -> None:
    answers = [torch.randn(3, 3), torch.eye(3), -torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)]
    raw = (size * torch.stack(answers)).requires_grad_()
    loss = matrix_fisher_loss(raw, TURNS[:5].float())
    loss.backward()
    assert loss.dtype == raw.grad.dtype == torch.float32
    assert loss.isfinite()
    assert raw.grad.isfinite().all()


def test_matrix_fisher_loss_learns_mean_and_spread(generator: torch.Generator) -> None:
    """Its minimum over samples is the maximum of likelihood: the parameter they were drawn from."""
    truth = TURNS[1] @ torch.diag(torch.tensor([9.0, 6.0, 3.0], dtype=DTYPE)) @ TURNS[2]
    sample = MatrixFisher(truth).sample(4_000, generator=generator, dtype=DTYPE)
    raw = torch.zeros(3, 3, dtype=DTYPE, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=60, line_search_fn="strong_wolfe")
    # the likelihood depends on the sample through its mean alone
    mean = sample.mean(dim=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = matrix_fisher_loss(raw, mean)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(matrix_fisher_loss(raw, mean), closure())
    assert (raw - truth).norm() / truth.norm() < 0.1
    torch.testing.assert_close(MatrixFisher(raw.detach()).mean, mean, atol=1e-4, rtol=0)


def test_a_network_learns_pose_and_confidence_together() -> None:
    """Sure of a cloud with one pose, unsure of one whose pose the data give up to a half turn."""
    torch.manual_seed(0)
    canon = VectorNeuron(k=6, orthonormalise="svd")
    clear, doubtful = surface_clouds(2, 32)
    clouds = torch.stack((clear, doubtful)).repeat(4, 1, 1)
    # every second sight of the doubtful cloud is labelled half a turn away
    flips = torch.stack([EYE, EYE, EYE, about(2, 180)]).float().repeat(2, 1, 1)
    optimizer = torch.optim.Adam(canon.parameters(), lr=0.06)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=80)
    for _ in range(80):
        turn = rotations.random_rotations(8)
        raw = canon(clouds @ turn.mT).raw[:, 0]
        optimizer.zero_grad()
        matrix_fisher_loss(raw, turn @ flips).backward()
        optimizer.step()
        schedule.step()
    frames = canon.eval()(clouds[:2])
    assert rotations.geodesic_angle(frames.rotations[0, 0], torch.eye(3)) < 0.2
    sure = confidence(frames.raw[:, 0])
    assert sure[0] > 0.9 > 0.6 > sure[1]


@pytest.mark.parametrize("loss", [lambda a, b: quotient_loss(a, "O", b), matrix_fisher_loss])
def test_losses_of_matrices_refuse_other_shapes(loss: Callable[..., Tensor]) -> None:
    for raw, reference in (
        (torch.ones(2, 3, 2), torch.ones(2, 3, 2)),
        (torch.ones(2, 4, 3, 3), torch.ones(2, 3, 3)),
        (torch.ones(3), torch.ones(3)),
    ):
        with pytest.raises(InputError, match="raw has shape"):
            loss(raw, reference)
    with pytest.raises(InputError, match="unknown rotation group"):
        quotient_loss(TURNS, "D4", TURNS)
