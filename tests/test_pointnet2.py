"""Set abstraction and propagation: equal to their plain forms in every respect, and small."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pointcanon.layers import set_abstraction
from pointcanon.layers.pointwise import BatchNorm, SharedLayer
from pointcanon.layers.set_abstraction import (
    Balls,
    FeaturePropagation,
    Scale,
    SetAbstraction,
    interpolate,
)
from pointcanon.neighbors import ball_query

EXACT = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}


def after_training(network: nn.Module) -> nn.Module:
    """Scales of both signs, and statistics that are not the initial ones."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def plain_layer(layer: SharedLayer, features: Tensor) -> Tensor:
    """Linear, torch's own normalisation over all rows, ReLU."""
    norm = layer.norm
    rows = F.linear(features, layer.linear.weight, layer.linear.bias).flatten(0, -2)
    rows = F.batch_norm(
        rows,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
    )
    return rows.relu().unflatten(0, features.shape[:-1])


def plain_balls(balls: Balls, points: Tensor, features: Tensor | None, centres: Tensor) -> Tensor:
    """Every member of every ball a row, as the paper has it."""
    index = ball_query(points, balls.radius, balls.members, queries=centres)
    cloud = torch.arange(len(points))[:, None, None]
    hidden = points[cloud, index] - centres[:, :, None]
    if features is not None:
        hidden = torch.cat((hidden, features[cloud, index]), dim=-1)
    for layer in balls.layers:
        hidden = plain_layer(layer, hidden)
    return hidden.amax(dim=2)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if "running" in key}


def run(
    module: nn.Module, compute: Callable[..., Tensor], *inputs: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Outputs, gradients to inputs and parameters, and running statistics afterwards."""
    before = {key: value.clone() for key, value in module.state_dict().items()}
    given = [None if x is None else x.clone().requires_grad_() for x in inputs]
    outputs = compute(*given)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    targets = [*(x for x in given if x is not None), *module.parameters()]
    gradients = torch.autograd.grad((outputs * weights).sum(), targets)
    after = statistics(module)
    module.load_state_dict(before)
    return outputs.detach(), gradients, after


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [0, 4])
def test_balls_equal_their_plain_form(
    dtype: torch.dtype, training: bool, channels: int, generator: torch.Generator
) -> None:
    balls = after_training(Balls(channels, Scale(0.8, 6, (8, 12, 10)))).to(dtype).train(training)
    points = torch.rand(3, 40, 3, generator=generator, dtype=dtype)
    features = torch.randn(3, 40, channels, generator=generator, dtype=dtype) if channels else None
    centres = points[:, ::3].clone()
    fast = run(balls, lambda p, f, c: balls(p, f, c, None), points, features, centres)
    slow = run(balls, lambda p, f, c: plain_balls(balls, p, f, c), points, features, centres)
    torch.testing.assert_close(fast[0], slow[0], **EXACT[dtype])
    scale = max(float(gradient.abs().max()) for gradient in slow[1])
    for found, expected in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(found / scale, expected / scale, **EXACT[dtype])
    torch.testing.assert_close(fast[2], slow[2], **EXACT[dtype])


def test_chunks_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    balls = after_training(Balls(0, Scale(0.5, 6, (8, 12)))).double().eval()
    points = torch.rand(2, 30, 3, generator=generator, dtype=torch.float64)
    whole = balls(points, None, points[:, :9], None)
    for chunk in (1, 300):
        monkeypatch.setattr(set_abstraction, "CHUNK", chunk)
        torch.testing.assert_close(balls(points, None, points[:, :9], None), whole)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_evaluation_never_holds_all_members(generator: torch.Generator) -> None:
    balls = Balls(0, Scale(0.3, 32, (64, 128))).eval()
    points = torch.rand(4, 512, 3, generator=generator)
    with torch.no_grad(), LargestTensor() as largest:
        balls(points, None, points, None)
    assert largest.elements <= max(set_abstraction.CHUNK, 4 * 512 * 128)
    assert largest.elements < 4 * 512 * 32 * 64 / 4


def test_low_precision_does_not_drown_relative_positions(generator: torch.Generator) -> None:
    """Far from the origin and with small balls, where x_j and x_i nearly cancel."""
    balls = after_training(Balls(0, Scale(0.05, 8, (16, 16)))).eval()
    points = 3 + 0.1 * torch.rand(2, 60, 3, generator=generator)
    exact = balls(points, None, points, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = balls(points, None, points, None)
    assert (found.float() - exact).norm() < 0.01 * exact.norm()


def test_centres_do_not_depend_on_the_order_of_the_points(generator: torch.Generator) -> None:
    abstraction = SetAbstraction(0, 8, (Scale(0.4, 50, (8, 8)),)).double().eval()
    points = torch.rand(2, 50, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(50, generator=generator)
    for found, expected in zip(abstraction(points[:, order]), abstraction(points), strict=True):
        torch.testing.assert_close(found, expected)


def test_interpolation_is_exact_at_coarse_points_and_a_mean_between_them() -> None:
    coarse = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [9, 9, 9]]], dtype=torch.float64)
    values = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]], dtype=torch.float64)
    middle = torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64)  # as far from three of them
    at = interpolate(torch.cat((coarse, middle), dim=1), coarse, values)[0, :, 0]
    torch.testing.assert_close(at[:4], values[0, :, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(at[4], values[0, :3].mean(), rtol=1e-12, atol=1e-12)
    shared = interpolate(middle, coarse[:, :1], values[:, :1])
    assert torch.equal(shared, values[:, :1])


@pytest.mark.parametrize("training", [False, True])
def test_propagation_equals_its_plain_form(training: bool, generator: torch.Generator) -> None:
    propagation = after_training(FeaturePropagation(4, 6, (8, 5))).double().train(training)
    points = torch.rand(2, 20, 3, generator=generator, dtype=torch.float64)
    known = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
    coarse = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    ends = points[:, :7]

    def plain(known: Tensor, coarse: Tensor) -> Tensor:
        squared = (points[:, :, None] - ends[:, None]).square().sum(dim=-1)
        nearest, index = squared.topk(3, largest=False)
        weights = 1 / (nearest + 1e-8)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        brought = (coarse[torch.arange(2)[:, None, None], index] * weights[..., None]).sum(dim=2)
        hidden = torch.cat((known, brought), dim=-1)
        for layer in propagation.layers:
            hidden = plain_layer(layer, hidden)
        return hidden

    fast = run(propagation, lambda k, c: propagation((points, k), (ends, c)), known, coarse)
    slow = run(propagation, plain, known, coarse)
    for found, expected in zip(fast, slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
