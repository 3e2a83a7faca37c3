"""Search: finds the pose a network knows, within its budget, and touches nothing on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pointcanon as pc
from pointcanon import checkpoint, clouds, rotations, testing
from pointcanon.canonicalizers import PCA, ForGroup, Search, search
from pointcanon.cli.options import with_options
from pointcanon.energies import Entropy, FeatureDistance, FreeEnergy, MaxLogit
from pointcanon.errors import CheckpointError, InputError, NotFiniteError, UsageError
from pointcanon.predictors import PointNet


def pointnet() -> PointNet:
    """With statistics, gradients and logits as a network in use has them."""
    torch.manual_seed(0)
    built = PointNet(5, widths=(8, 8), embedding=16)
    nn.init.normal_(list(built.parameters())[-2], std=2.0)
    return built


def generic(batch: int, count: int = 48, dtype: torch.dtype = torch.float32) -> Tensor:
    return testing.generic_clouds(batch, count, dtype=dtype)


class Knows(nn.Module):
    """Has one logit, the larger the nearer the posed cloud is to the one it knows."""

    def __init__(self, template: Tensor) -> None:
        super().__init__()
        self.register_buffer("template", template)
        self.seen = 0

    template: Tensor

    def forward(self, points: Tensor) -> Tensor:
        self.seen += len(points)
        return -(points - self.template).square().sum(dim=(1, 2))[:, None]


def known_cloud(dtype: torch.dtype = torch.float64) -> Tensor:
    """Centred, in the unit ball, and in no special pose."""
    points = generic(1, 30, torch.float64)[0]
    points = points - points.mean(dim=0)
    return (points / points.norm(dim=-1).max()).to(dtype)


class Fails(Knows):
    """Answers NaN in the sixth pose of the second share it is shown."""

    def forward(self, points: Tensor) -> Tensor:
        if self.seen:
            raise NotFiniteError(5, "mend it")
        return super().forward(points)


def test_a_cloud_without_an_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "POINTS_AT_ONCE", 30 * 10)  # ten poses in one call
    with pytest.raises(NotFiniteError) as caught:
        Search(Fails(known_cloud()), budget=8, proposal=PCA(4))(generic(9, 30, torch.float64))
    assert caught.value.cloud == 15 // 4


@pytest.mark.parametrize("proposal", [PCA(1), PCA(4), PCA(24)], ids=["1", "4", "24"])
def test_the_pose_a_network_knows_is_found(proposal: PCA) -> None:
    template = known_cloud()
    turns = rotations.so3_grid(10, torch.float64)
    found = Search(Knows(template), budget=256, proposal=proposal)(template @ turns.mT)
    angle = rotations.geodesic_angle(found.rotations[:, 0], turns)
    assert angle.max() < math.radians(1)
    coarse = Search(Knows(template), budget=24, keep=24, proposal=proposal)(template @ turns.mT)
    assert rotations.geodesic_angle(coarse.rotations[:, 0], turns).max() > math.radians(5)


def test_the_slope_is_the_gradient_on_the_group() -> None:
    torch.manual_seed(0)
    module = Search(pointnet().double())
    unit = known_cloud().expand(3, -1, -1)
    poses = rotations.so3_grid(6, torch.float64).view(3, 2, 3, 3)
    energies, slopes = module._energies_and_slopes(poses, unit, None)
    torch.testing.assert_close(energies, module._energies(poses, unit, None))
    for axis in torch.eye(3, dtype=torch.float64):
        ahead, behind = (
            module._energies(poses @ rotations.from_rotvec(step * axis), unit, None)
            for step in (1e-6, -1e-6)
        )
        torch.testing.assert_close(slopes @ axis, (ahead - behind) / 2e-6, atol=1e-6, rtol=1e-6)


def test_no_pose_ends_up_worse_than_the_grid_had_it() -> None:
    module, points = Search(pointnet(), budget=64), generic(8)
    grid = Search(pointnet(), budget=32, keep=32)(points)  # the same grid and no descent
    before = -grid.log_weights[:, :1] + grid.log_weights  # relative to the best
    assert grid.count == 24
    assert (before <= 0).all()
    frames = module(points)
    unit = clouds.unit_ball(points - points.mean(dim=1, keepdim=True))
    after = module._energies(frames.rotations, unit, None)
    best = module._energies(grid.rotations[:, :4], unit, None)
    assert (after[:, 0] < best[:, 0]).all()
    assert (after.sort(dim=1).values <= best + 1e-6).all()


@pytest.mark.parametrize("poses", [1, 4, 24])
@pytest.mark.parametrize("budget", [1, 7, 24, 48, 100])
def test_the_budget_bounds_the_forward_passes(poses: Any, budget: int) -> None:
    module = Search(Knows(known_cloud()), budget=budget, proposal=PCA(poses), keep=3)
    module(generic(5, 30, torch.float64))
    assert isinstance(module.network, Knows)
    assert budget / 3 < module.network.seen / 5 <= budget
    ungated = module.network.seen
    module.gate, module.network.seen = -1e9, 0
    module(generic(5, 30, torch.float64))
    assert module.network.seen == ungated + 5


def test_candidates_are_weighed_by_their_energies() -> None:
    points = generic(6)
    for temperature in (0.5, 2.0):
        module = Search(pointnet(), MaxLogit(), budget=32, keep=3, temperature=temperature)
        frames = module(points)
        posed = frames.apply(points).flatten(0, 1)
        unit = posed / posed.norm(dim=-1).amax(dim=1)[:, None, None]
        energies = -module.network(unit).amax(dim=-1).view(6, 3)
        torch.testing.assert_close(
            frames.weights, (-energies / temperature).softmax(dim=1), atol=1e-4, rtol=0
        )
        assert (frames.log_weights.diff(dim=1) <= 0).all()  # heaviest first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_taken_whatever_the_caller_switched_off(mode: Any) -> None:
    points = generic(3)
    expected = Search(pointnet(), budget=48)(points)
    with mode():
        fresh = generic(3)  # an inference tensor in inference mode, and so would weights be
        module = Search(pointnet(), budget=48)
        found = module(fresh)
        logits = pc.Canonicalized(pointnet().eval(), module)(fresh)
    assert torch.equal(found.rotations, expected.rotations)
    assert torch.isfinite(logits).all()
    assert not found.rotations.requires_grad
    assert not Search(pointnet(), budget=48)(points.requires_grad_()).rotations.requires_grad


def test_the_network_is_left_alone() -> None:
    network = pointnet().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = Search(network, budget=32).train()
    first = module(generic(4))
    assert network.training
    assert all(weight.requires_grad and weight.grad is None for weight in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(weight.requires_grad for weight in module.parameters())
    assert not any(part.training for part in module.network.modules())
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert torch.equal(module(generic(4)).rotations, first.rotations)


class Older(torch.autograd.Function):
    """In the style of compiled point-cloud operators, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        return points.pow(3)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].square() * gradients[0]


class Foreign(nn.Module):
    def forward(self, points: Tensor) -> Tensor:
        # no two poses of a cloud are alike to it
        return Older.apply(points).mean(dim=1) * torch.tensor([1.0, 2.0, 3.0]).to(points)


def test_networks_with_operators_of_their_own_will_do() -> None:
    testing.assert_equivariant(Search(Foreign(), budget=36), generic(10, dtype=torch.float64))


def test_without_a_network_it_asks_the_predictor_it_is_put_in_front_of(tmp_path: Path) -> None:
    predictor, points = pointnet().eval(), generic(4)
    expected = Search(predictor, budget=32)(points)
    for nested in (lambda search: search, lambda search: ForGroup(search, "O2", 2)):
        model = pc.Canonicalized(predictor, nested(Search(budget=32))).eval()
        (search,) = (part for part in model.modules() if isinstance(part, Search))
        assert torch.equal(search(points).rotations, expected.rotations)
        assert not any(weight.requires_grad for weight in search.parameters())
        model.save(tmp_path / "model.safetensors")
        assert torch.equal(pc.load(tmp_path / "model.safetensors")(points), model(points))
    other = pointnet()
    kept = pc.Canonicalized(other, Search(predictor, budget=32)).canonicalizer
    assert torch.equal(kept(points).rotations, expected.rotations)
    with pytest.raises(InputError, match=r"no network to ask.*Canonicalized\(predictor, Search"):
        Search()(points)


def test_a_network_that_labels_points_is_refused() -> None:
    network = pc.predictors.create("pointnet-parts", num_parts=3, num_categories=0).eval()
    with pytest.raises(InputError, match="gives each cloud one answer"):
        pc.Canonicalized(network, Search()).eval()(generic(2))


def test_masks_reach_the_network() -> None:
    points = generic(4, dtype=torch.float64)
    mask = torch.arange(48) < torch.tensor([[48], [40], [30], [20]])
    module = Search(pointnet().double(), budget=36)
    together = module(points, mask)
    for i, cloud in enumerate(points):
        alone = module(cloud[None, mask[i]])
        torch.testing.assert_close(together.rotations[i], alone.rotations[0])


def test_clouds_of_another_dtype_than_the_network_are_named() -> None:
    with pytest.raises(InputError, match=r"float64.*float32 weights.*convert"):
        Search(pointnet())(generic(2, dtype=torch.float64))


def test_work_in_tiles_is_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    module, points = Search(pointnet().double(), budget=36), generic(3, dtype=torch.float64)
    whole = module(points)
    monkeypatch.setattr(search, "POINTS_AT_ONCE", 5 * 48)
    torch.testing.assert_close(module(points).rotations, whole.rotations)


def test_a_gate_leaves_familiar_clouds_as_they_are() -> None:
    points = generic(40)
    module = Search(pointnet(), budget=32, keep=2)
    module.gate = module.calibrate(points, quantile=0.25)
    ungated, frames = Search(pointnet(), budget=32, keep=2)(points), module(points)
    eye = torch.eye(3).expand(2, 3, 3)
    kept = torch.tensor([torch.equal(pair, eye) for pair in frames.rotations])
    assert kept.sum() == 10
    assert torch.equal(frames.rotations[~kept], ungated.rotations[~kept])
    assert torch.equal(frames.weights, ungated.weights)
    assert module.calibrate(points, 0.0) < module.gate < module.calibrate(points, 1.0)
    with pytest.raises(AssertionError, match="equivariance"):
        testing.assert_equivariant(module, points)


def test_a_gated_cloud_needs_no_frame() -> None:
    cube = testing.degenerate_clouds()["cube corners"]
    assert Search(pointnet(), budget=32)(cube).degenerate.all()
    assert not Search(pointnet(), budget=32, gate=1e9)(cube).degenerate.any()


def test_calibration_sees_clouds_of_any_size_place_and_padding() -> None:
    module, points = Search(pointnet()), generic(9)
    gate = module.calibrate(points)
    assert module.calibrate(100 * points + 3) == pytest.approx(gate, abs=1e-3)
    padded = torch.cat((points, torch.full((9, 4, 3), torch.nan)), dim=1)
    mask = torch.arange(52) < torch.full((9, 1), 48)
    assert module.calibrate(padded, mask=mask) == pytest.approx(gate, abs=1e-5)


def test_a_search_survives_a_file(tmp_path: Path) -> None:
    network, points = pointnet().eval(), generic(6)
    with torch.no_grad():
        energy = FeatureDistance.fit(network(points), torch.tensor([0, 0, 1, 1, 2, 2]), k=2)
    whole = pc.Canonicalized(network, Search(network, energy, budget=32, gate=-1.5)).eval()
    whole.save(tmp_path / "search.safetensors")
    again = pc.load(tmp_path / "search.safetensors")
    assert torch.equal(again(points), whole(points))
    assert isinstance(again.canonicalizer, Search)
    assert again.canonicalizer.gate == -1.5
    assert not any(weight.requires_grad for weight in again.canonicalizer.parameters())


def test_a_foreign_network_cannot_be_saved_by_accident(tmp_path: Path) -> None:
    whole = pc.Canonicalized(pointnet(), Search(Foreign()))
    with pytest.raises(CheckpointError, match="Foreign is not registered"):
        whole.save(tmp_path / "search.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": lambda points: points}, "network is a function; pass a torch.nn.Module"),
        ({"energy": "entropy"}, "energy is a str; pass a torch.nn.Module"),
        ({"budget": 0}, "budget is 0; choose at least 1"),
        ({"keep": 0}, "keep is 0; choose at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; choose a positive number"),
    ],
)
def test_options_out_of_range_are_one_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(**{"network": pointnet(), **options})


def test_a_gate_is_a_quantile_of_clouds() -> None:
    with pytest.raises(InputError, match=r"quantile is 95; choose a share"):
        Search(pointnet()).calibrate(generic(2), 95)
    with pytest.raises(InputError, match=r"points\.mT"):
        Search(pointnet()).calibrate(torch.zeros(2, 3, 9))


# energies

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-50.0, 80.0, 80.0]]).double()


def test_energies_of_logits_are_what_they_say() -> None:
    exponentials = LOGITS.exp()
    probabilities = exponentials / exponentials.sum(dim=1, keepdim=True)
    terms = torch.where(probabilities > 0, probabilities * probabilities.log(), 0.0)
    torch.testing.assert_close(Entropy()(LOGITS), -terms.sum(dim=1))
    torch.testing.assert_close(FreeEnergy()(LOGITS), -exponentials.sum(dim=1).log())
    torch.testing.assert_close(FreeEnergy(1e-3)(LOGITS), MaxLogit()(LOGITS), atol=2e-3, rtol=0)
    torch.testing.assert_close(MaxLogit()(LOGITS), torch.tensor([-2.0, 0.0, -80.0]).double())


def test_energies_shift_with_the_logits_or_not_at_all() -> None:
    for energy, change in ((FreeEnergy(), -7.0), (MaxLogit(), -7.0), (Entropy(), 0.0)):
        torch.testing.assert_close(energy(LOGITS + 7), energy(LOGITS) + change)


@pytest.mark.parametrize("k", [1, 3])
def test_feature_distance_is_that_to_the_nearest_of_one_class(k: int) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(40, 6).double(), torch.randint(4, (40,)) * 5
    queries = torch.randn(7, 6).double()
    energy = FeatureDistance.fit(features, labels, k)
    for query, found in zip(queries, energy(queries), strict=True):
        classes = [features[labels == label] for label in labels.unique()]
        wanted = min((query - c).norm(dim=-1).sort().values[:k].mean() for c in classes)
        torch.testing.assert_close(found, wanted)
    if k == 1:
        assert energy(features).abs().max() < 1e-6
        pulled = features[:3].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(pulled).sum(), pulled)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("energy", [FreeEnergy(0.5), Entropy(), MaxLogit()])
def test_energies_are_rebuilt_from_their_hyperparameters(energy: nn.Module) -> None:
    again = checkpoint.build(checkpoint.describe(energy))
    assert torch.equal(again(LOGITS), energy(LOGITS))


def test_bad_features_are_one_clear_error() -> None:
    features, labels = torch.randn(5, 3), torch.tensor([0, 0, 0, 1, 1])
    with pytest.raises(InputError, match=r"k is 3.*smallest class has 2"):
        FeatureDistance.fit(features, labels, k=3)
    with pytest.raises(InputError, match=r"features has shape \(5, 3\), labels \(4,\)"):
        FeatureDistance.fit(features, labels[:4])
    with pytest.raises(InputError, match=r"features has shape \(2, 4\).*\(n, 3\)"):
        FeatureDistance.fit(features, labels)(torch.zeros(2, 4))
    with pytest.raises(InputError, match="nothing to be near"):
        FeatureDistance(0, [])
    with pytest.raises(InputError, match="temperature is -1"):
        FreeEnergy(-1)


@pytest.mark.parametrize("kind", [FreeEnergy, Entropy, MaxLogit])
def test_the_command_line_chooses_an_energy_by_its_name(kind: type[nn.Module]) -> None:
    text = json.dumps({"energy": kind.__name__, "budget": 12, "gate": -2.0})
    search = with_options(Search(), text)
    assert isinstance(search, Search)
    assert type(search.energy) is kind
    assert (search.budget, search.gate) == (12, -2.0)
    assert type(search.with_options(**search.options).options["energy"]) is kind
    by_path = '{"energy": {"class_path": "pointcanon.energies.FreeEnergy", "init_args": '
    cold = with_options(Search(), by_path + '{"temperature": 0.5}}}')
    assert isinstance(cold, Search)
    assert isinstance(cold.energy, FreeEnergy)
    assert cold.energy.temperature == 0.5


def test_an_energy_that_there_is_not_is_named() -> None:
    with pytest.raises(UsageError, match=r"--canonicalizer_options, Search: .*energy.*Joy"):
        with_options(Search(), '{"energy": "Joy"}')


def test_a_search_in_front_of_one_predictor_refuses_another() -> None:
    first, points = pointnet().eval(), generic(4)
    search = Search(budget=32)
    pc.Canonicalized(first, search)
    with torch.no_grad():
        list(first.parameters())[-2].mul_(-1)
    pc.Canonicalized(first, search)  # has learned something since
    assert torch.equal(search(points).rotations, Search(first, budget=32)(points).rotations)
    with pytest.raises(InputError, match="here is another: construct a Search for each"):
        pc.Canonicalized(pointnet(), search)
