"""Edge convolutions without edges: equal to their plain form in every respect, and small."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pointcanon.layers import edge_conv
from pointcanon.layers.edge_conv import DeepEdgeConv, EdgeConv, Layer, neighbor_max
from pointcanon.neighbors import knn

K = 6

CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "points": lambda: EdgeConv(3, 8, K),
    "features": lambda: EdgeConv(7, 5, K),
    "deep": lambda: DeepEdgeConv(3, 8, 10, K),
    "deep-features": lambda: DeepEdgeConv(6, 4, 5, K),
}

EXACT = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


@pytest.fixture(params=CONVOLUTIONS)
def convolution(request: pytest.FixtureRequest) -> nn.Module:
    return after_training(CONVOLUTIONS[request.param]())


def after_training(network: nn.Module) -> nn.Module:
    """Scales of both signs, and statistics that are not the initial ones; float64."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.double()


def in_channels(convolution: nn.Module) -> int:
    return next(convolution.parameters()).shape[1] // 2


def layers(convolution: nn.Module) -> list[Layer]:
    return [m for m in convolution.modules() if isinstance(m, Layer)]


def plain(convolution: nn.Module, features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every edge a row: layers with torch's own normalisation over those of real points."""
    neighbors = knn(features.detach(), convolution.k, mask)
    clouds = torch.arange(len(features))[:, None, None]
    centres = features[:, :, None].expand(-1, -1, convolution.k, -1)
    edges = torch.cat((features[clouds, neighbors] - centres, centres), dim=-1)
    real = torch.ones(features.shape[:2], dtype=torch.bool) if mask is None else mask
    rows = edges[real].flatten(0, 1)
    for layer in layers(convolution):
        rows = F.leaky_relu(nn.BatchNorm1d.forward(layer.norm, layer.linear(rows)), 0.2)
    maxima = rows.unflatten(0, (-1, convolution.k)).max(dim=1).values
    return features.new_zeros(*real.shape, maxima.shape[-1]).index_put((real,), maxima)


def batch(generator: torch.Generator, channels: int, points: int = 20) -> Tensor:
    return torch.randn(3, points, channels, generator=generator, dtype=torch.float64)


def assert_equal(
    convolution: nn.Module, features: Tensor, mask: Tensor | None, exact: dict[str, float]
) -> None:
    """Outputs, running statistics and gradients, those of the features among them."""
    results = []
    cotangent = torch.randn(features.shape[:2], generator=torch.Generator().manual_seed(1))
    for form in (lambda network, *inputs: network(*inputs), plain):
        network = copy.deepcopy(convolution)
        inputs = features.clone().requires_grad_()
        outputs = form(network, inputs, mask)
        loss = (outputs * cotangent.to(outputs)[..., None]).sum()
        gradients = torch.autograd.grad(loss, [inputs, *network.parameters()])
        largest = [gradient.abs().max().clamp_min(1) for gradient in gradients]
        scaled = [g / size for g, size in zip(gradients, largest, strict=True)]
        results.append((outputs.detach(), network.state_dict(), scaled))
    torch.testing.assert_close(*results, **exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_plain_form(
    convolution: nn.Module,
    generator: torch.Generator,
    training: bool,
    masked: bool,
    dtype: torch.dtype,
) -> None:
    features = batch(generator, in_channels(convolution)).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(features.shape[:2], generator=generator) < 0.7
        features = features.masked_fill(~mask[..., None], 7.0)
    assert_equal(convolution.to(dtype).train(training), features, mask, EXACT[dtype])


@pytest.mark.parametrize("training", [False, True])
def test_blocks_change_nothing(
    convolution: nn.Module,
    generator: torch.Generator,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = batch(generator, in_channels(convolution))
    mask = torch.arange(20) < torch.tensor([20, 13, 9])[:, None]
    # a point, or a few, at a time: some blocks then hold padding only
    for elements in (1, 200):
        monkeypatch.setattr(edge_conv, "_CPU_BLOCK", elements)
        assert_equal(convolution.train(training), features, mask, EXACT[torch.float64])


def test_a_vanishing_scale_gives_the_shift(generator: torch.Generator) -> None:
    convolution = after_training(EdgeConv(3, 4, K)).train()
    norm = layers(convolution)[0].norm
    nn.init.zeros_(norm.weight)
    outputs = convolution(batch(generator, 3))
    torch.testing.assert_close(outputs, F.leaky_relu(norm.bias, 0.2).expand_as(outputs))
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs.sum(), norm.parameters()))


def test_statistics_survive_a_cloud_far_from_the_origin(generator: torch.Generator) -> None:
    near = after_training(EdgeConv(3, 8, K)).float().train()
    far = copy.deepcopy(near)
    points = batch(generator, 3, points=40).float()
    near(points)
    far(points + 100)
    # all that moves is the mean
    torch.testing.assert_close(
        far.layer.norm.running_var, near.layer.norm.running_var, rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("convolution", [EdgeConv(4, 4, 2), DeepEdgeConv(4, 4, 4, 2)])
def test_padding_does_not_grow_beside_points_that_coincide(convolution: nn.Module) -> None:
    """Divided by their deviation of zero, it would be 316 times as far off after every layer."""
    features = torch.full((1, 6, 4), 9.0).index_fill(1, torch.tensor([4, 5]), -9.0)
    mask = torch.arange(6)[None] < 4
    for _ in range(20):
        layer = copy.deepcopy(convolution).train()
        features = layer(features, mask)
        assert features.abs().max() < 10
        assert all(norm.norm.running_var.isfinite().all() for norm in layers(layer))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_has_a_row_for_every_edge(training: bool) -> None:
    convolution = EdgeConv(16, 32, k=20).train(training)
    features = torch.randn(4, 200, 16, requires_grad=training)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        outputs = convolution(features)
        if training:
            outputs.sum().backward()
    assert largest.elements <= 4 * 200 * 32  # as the output; edges would be twenty times that


def test_neighbor_max_is_a_maximum_of_gathered_rows(generator: torch.Generator) -> None:
    values = batch(generator, 5).requires_grad_()
    neighbors = torch.randint(0, 20, (3, 11, 4), generator=generator)
    clouds = torch.arange(3)[:, None, None]
    found, expected = neighbor_max(values, neighbors), values[clouds, neighbors].amax(dim=2)
    assert torch.equal(found, expected)
    cotangent = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(maxima, values, cotangent) for maxima in (found, expected)]
    torch.testing.assert_close(*gradients)
    many = torch.randint(0, 20, (3, 2, 300), generator=generator)  # more than a byte can count
    (gradient,) = torch.autograd.grad(neighbor_max(values, many).sum(), values)
    assert torch.equal(gradient.sum(dim=1), torch.full((3, 5), 2.0, dtype=torch.float64))


def test_neighbor_max_is_an_operator_as_torch_wants_it(generator: torch.Generator) -> None:
    values = batch(generator, 5).requires_grad_()
    neighbors = torch.randint(0, 20, (3, 11, 4), generator=generator)
    torch.library.opcheck(torch.ops.pointcanon.neighbor_max.default, (values, neighbors, True))


def test_neighbor_max_carries_nan(generator: torch.Generator) -> None:
    values = batch(generator, 2)
    values[0, 3] = torch.nan
    maxima = neighbor_max(values, torch.tensor([[[2, 3, 4]]]).expand(3, -1, -1))
    assert maxima[0].isnan().all()
    assert maxima[1:].isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_forward_compiles_in_one_graph(
    convolution: nn.Module, generator: torch.Generator, training: bool
) -> None:
    features = batch(generator, in_channels(convolution))
    mask = torch.arange(20) < torch.tensor([20, 13, 9])[:, None]
    compiled = copy.deepcopy(convolution).train(training)
    expected = convolution.train(training)(features, mask)
    outputs = torch.compile(compiled, fullgraph=True, backend="aot_eager")(features, mask)
    torch.testing.assert_close(outputs[mask], expected[mask])


def test_autocast_keeps_edges_exact(convolution: nn.Module, generator: torch.Generator) -> None:
    convolution.float().eval()
    features = batch(generator, in_channels(convolution)).float()
    expected = convolution(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(convolution(features), expected)
    low = convolution.bfloat16()(features.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.3)
