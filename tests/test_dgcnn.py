"""DGCNN for classes and for parts: the published functions, under padding, compiled, learning."""

from __future__ import annotations

import copy

import pytest
import torch
from test_edge_conv import after_training, plain
from torch import Tensor, nn
from torch.nn import functional as F

from pointcanon import checkpoint, predictors
from pointcanon.errors import InputError
from pointcanon.predictors import DGCNN, DGCNNParts

CATEGORY = torch.tensor([2, 0, 1])


def classifier() -> DGCNN:
    return after_training(DGCNN(5, k=4, embedding=16, dropout=0.0))


def labeller() -> DGCNNParts:
    network = DGCNNParts(6, num_categories=3, k=4, embedding=16, dropout=0.0)
    nn.init.normal_(network.align.matrix.weight, std=0.05)  # no longer the identity
    return after_training(network)


def batch(generator: torch.Generator, points: int = 20) -> Tensor:
    return torch.randn(3, points, 3, generator=generator, dtype=torch.float64)


def padded(points: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """The same clouds with NaN padding mixed in among the points, and the mask."""
    clouds, real = points.shape[:2]
    order = torch.rand(clouds, real + extra).argsort(dim=1)
    mask = order < real
    wide = torch.full((clouds, real + extra, 3), torch.nan, dtype=points.dtype)
    wide[mask] = points.flatten(0, 1)
    return wide, mask


# the published functions, in the order of their layers, with torch's own normalisation


def layer(module: nn.Module, rows: Tensor) -> Tensor:
    shape = rows.shape[:-1]
    linear = module.linear(rows).flatten(0, -2)
    return F.leaky_relu(nn.BatchNorm1d.forward(module.norm, linear), 0.2).unflatten(0, shape)


def published_classifier(network: DGCNN, points: Tensor) -> Tensor:
    features, levels = points, []
    for convolution in network.edges:
        features = plain(convolution, features)
        levels.append(features)
    rows = layer(network.shared, torch.cat(levels, dim=-1))
    code = torch.cat((rows.max(dim=1).values, rows.mean(dim=1)), dim=-1)
    first, _, second, _, logits = network.head
    return logits(layer(second, layer(first, code)))


def published_labeller(network: DGCNNParts, points: Tensor, category: Tensor) -> Tensor:
    align = network.align
    code = layer(align.pool, plain(align.edges, points)).max(dim=1).values
    for part in align.head:
        code = layer(part, code)
    features, levels = points @ align.matrix(code).view(-1, 3, 3), []
    for convolution in network.edges:
        features = plain(convolution, features)
        levels.append(features)
    local = torch.cat(levels, dim=-1)
    whole = layer(network.pool, local).max(dim=1).values
    kind = layer(network.category, F.one_hot(category, 3).to(points))
    code = torch.cat((whole, kind), dim=-1)[:, None].expand(-1, points.shape[1], -1)
    rows = layer(network.joint, torch.cat((code, local), dim=-1))
    for part in network.head:
        rows = layer(part, rows)
    return network.logits(rows)


def outcome(network: nn.Module, function, points: Tensor, *rest: Tensor):
    """Logits, running statistics, and gradients of the parameters and of the points."""
    network = copy.deepcopy(network)
    inputs = points.clone().requires_grad_()
    logits = function(network, inputs, *rest)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), [inputs, *network.parameters()])
    return logits.detach(), network.state_dict(), list(gradients)


@pytest.mark.parametrize("training", [False, True])
def test_classifier_is_the_published_function(generator: torch.Generator, training: bool) -> None:
    network, points = classifier().train(training), batch(generator)
    ours = outcome(network, lambda net, x: net(x), points)
    theirs = outcome(network, published_classifier, points)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_labeller_is_the_published_function(generator: torch.Generator, training: bool) -> None:
    network, points = labeller().train(training), batch(generator)
    ours = outcome(network, lambda net, x, c: net(x, category=c), points, CATEGORY)
    theirs = outcome(network, published_labeller, points, CATEGORY)
    assert ours[0].shape == (3, 20, 6)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_public_widths() -> None:
    def shapes(network: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Linear)]

    assert shapes(DGCNN(40)) == [
        (64, 6), (64, 128), (128, 128), (256, 256), (1024, 512), (512, 2048), (256, 512), (40, 256)
    ]  # fmt: skip
    assert shapes(DGCNNParts(50)) == [
        (64, 6), (128, 64), (1024, 128), (512, 1024), (256, 512), (9, 256),
        (64, 6), (64, 64), (64, 128), (64, 64), (64, 128), (1024, 192), (64, 16), (256, 1280),
        (256, 256), (128, 256), (50, 128),
    ]  # fmt: skip
    biased = [n for n, m in DGCNNParts(50).named_modules() if getattr(m, "bias", None) is not None]
    assert [n for n in biased if "norm" not in n] == ["align.matrix"]


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_no_part(generator: torch.Generator, training: bool) -> None:
    network, points = labeller().train(training), batch(generator)
    wide, mask = padded(points, extra=7)
    twin = copy.deepcopy(network)
    logits = network(points, category=CATEGORY)
    masked = twin(wide, mask, category=CATEGORY)[mask].unflatten(0, (3, 20))
    torch.testing.assert_close(masked, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twin.state_dict(), network.state_dict(), rtol=1e-10, atol=1e-12)


def test_parts_follow_the_points_and_ignore_the_rest_of_the_batch(
    generator: torch.Generator,
) -> None:
    network, points = labeller().eval(), batch(generator)
    logits = network(points, category=CATEGORY)
    order = torch.randperm(20, generator=generator)
    shuffled = network(points[:, order], category=CATEGORY)
    torch.testing.assert_close(shuffled, logits[:, order], rtol=1e-9, atol=1e-9)
    alone = network(points[1:2], category=CATEGORY[1:2])
    torch.testing.assert_close(alone, logits[1:2], rtol=1e-9, atol=1e-9)
    other = network(points, category=CATEGORY.roll(1))
    assert (other - logits).abs().amax() > 1e-3


def test_parts_without_category(generator: torch.Generator) -> None:
    network = predictors.create("dgcnn-parts", num_parts=4, num_categories=0, k=4, embedding=8)
    assert network.category is None
    assert network(batch(generator).float()).shape == (3, 20, 4)


@pytest.mark.parametrize("build", [classifier, labeller])
def test_a_whole_network_compiles_in_one_graph(generator: torch.Generator, build) -> None:
    network = build().eval()
    inputs = {"category": CATEGORY} if build is labeller else {}
    wide, mask = padded(batch(generator), extra=3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")(wide, mask, **inputs)
    expected = network(wide, mask, **inputs)
    if build is labeller:
        compiled, expected = compiled[mask], expected[mask]
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("build", [classifier, labeller])
def test_a_training_step_runs_in_mixed_precision(generator: torch.Generator, build) -> None:
    network, points = build().float().eval(), batch(generator).float()
    inputs = {"category": CATEGORY} if build is labeller else {}
    exact = network(points, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(points, **inputs)
        logits = network.train()(points, **inputs)
    assert (low.float() - exact).norm() < 0.1 * exact.norm()
    gradients = torch.autograd.grad(logits.float().square().sum(), list(network.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("build", [classifier, labeller])
def test_a_cloud_smaller_than_the_neighbourhood_is_refused(build) -> None:
    network = build().float().eval()
    inputs = {"category": CATEGORY[:2]} if build is labeller else {}
    assert network(torch.randn(2, 4, 3), **inputs).isfinite().all()
    with pytest.raises(InputError, match="k = 4 neighbours, but a cloud has 3 points"):
        network(torch.randn(2, 3, 3), **inputs)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    with pytest.raises(InputError, match="a cloud has 2 points"):
        network(torch.randn(2, 6, 3), mask, **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_parts": 0}, "num_parts is 0"),
        ({"num_categories": -1}, "num_categories is -1; choose at least 0"),
        ({"k": 0}, "k is 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DGCNNParts(**{"num_parts": 4} | options)


def test_parts_are_saved_and_loaded(generator: torch.Generator, tmp_path) -> None:
    network, points = labeller().float().eval(), batch(generator).float()
    checkpoint.save(tmp_path / "parts.safetensors", network, checkpoint.Card("predictor"))
    again = predictors.load(tmp_path / "parts.safetensors")
    assert isinstance(again, DGCNNParts)
    expected = network(points, category=CATEGORY)
    assert torch.equal(again(points, category=CATEGORY), expected)


def test_parts_learn_the_upper_half_of_a_ball() -> None:
    torch.manual_seed(0)
    network = DGCNNParts(2, num_categories=0, k=4, embedding=32, dropout=0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(20):
        points = torch.randn(8, 16, 3)
        labels = (points[..., 2] > 0).long()
        loss = F.cross_entropy(network(points).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points = torch.randn(16, 24, 3)
    found = network.eval()(points).argmax(dim=-1)
    assert (found == (points[..., 2] > 0)).float().mean() >= 0.85
