"""Canonicalized: any predictor behind any canonicalizer is invariant, and survives a file."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pointcanon import canonicalizers, checkpoint, rotations, testing
from pointcanon.canonicalizers import PCA, Canonicalizer, Identity, Optimized, Search
from pointcanon.errors import CheckpointError, InputError, NotFiniteError
from pointcanon.frames import Frames
from pointcanon.model import Canonicalized, load, vote_before
from pointcanon.predictors import PointNet, create

CLASSES = ("chair", "lamp", "sofa", "table", "vase")
CANONICALIZERS = {
    "pca-1": lambda: PCA(1),
    "pca-4": lambda: PCA(4),
    "optimized": lambda: Optimized(keep=2, steps=1, scorer_widths=(8, 16), refiner_widths=(8, 16)),
}


def network() -> PointNet:
    torch.manual_seed(0)
    built = PointNet(len(CLASSES), widths=(8, 8, 12), embedding=16, dropout=0.5)
    # logits of a trained network's size, so that a changed vote would show
    nn.init.normal_(list(built.parameters())[-2], std=2.0)
    return built


def model(canonicalizer: Canonicalizer | str = "pca-4", **options: Any) -> Canonicalized:
    predictor = network()
    if isinstance(canonicalizer, str):
        canonicalizer = CANONICALIZERS[canonicalizer]()
    return Canonicalized(predictor, canonicalizer, **options).eval()


class Moments(nn.Module):
    """A foreign predictor: points only, one output the third moment along each axis."""

    def forward(self, points: Tensor) -> Tensor:
        return points.pow(3).mean(dim=1)


@pytest.mark.parametrize("vote", ["probabilities", "certainty", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", CANONICALIZERS)
def test_outputs_are_invariant_to_rotation(name: str, dtype: torch.dtype, vote: Any) -> None:
    points = testing.generic_clouds(50, 64, dtype=dtype)
    whole = model(name, vote=vote).to(dtype)
    testing.assert_invariant(whole, points)
    assert whole(points).std(dim=0).min() > 1e-4  # and they do depend on the cloud
    with pytest.raises(AssertionError, match="invariance"):
        testing.assert_invariant(network().to(dtype), points)


def test_masked_outputs_are_invariant_and_ignore_padding() -> None:
    points = testing.generic_clouds(20, 64, dtype=torch.float64)
    mask = (torch.arange(64) < 40).expand(20, 64)
    whole = model().double()
    testing.assert_invariant(whole, points, mask=mask)
    garbage = torch.where(mask[..., None], points, torch.nan)
    torch.testing.assert_close(whole(garbage, mask), whole(points[:, :40]))


def test_outputs_are_those_of_the_posed_cloud() -> None:
    points = testing.generic_clouds(6, 32)
    whole = model("pca-1")
    posed = whole.canonicalizer(points).apply(points)[:, 0]
    torch.testing.assert_close(whole(points), whole.predictor(posed))


def test_votes_over_frames() -> None:
    points = testing.generic_clouds(6, 32, dtype=torch.float64)
    mixed, averaged = model(vote="probabilities").double(), model(vote="mean").double()
    posed = mixed.canonicalizer(points).apply(points)
    logits = mixed.predictor(posed.flatten(0, 1)).view(6, 4, 5)
    torch.testing.assert_close(mixed(points).exp(), logits.softmax(dim=-1).mean(dim=1))
    torch.testing.assert_close(averaged(points), logits.mean(dim=1))
    with pytest.raises(InputError, match="vote is 'majority'"):
        model(vote="majority")


@pytest.mark.parametrize("answers", [1, 3])
def test_the_canonicalizer_has_a_say_in_a_product_vote(answers: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing = Optimized(keep=2, answers=answers, classes=5, **sizes).double()
    whole = model(knowing, vote="product").double()
    points = testing.generic_clouds(12, 64, dtype=torch.float64)
    alone = Canonicalized(whole.predictor, knowing, "agreement").eval()(points)
    opinion = knowing(points).class_logits
    assert opinion is not None
    product = alone.softmax(dim=-1) * opinion.softmax(dim=-1)
    torch.testing.assert_close(
        whole(points).softmax(dim=-1), product / product.sum(dim=-1, keepdim=True)
    )
    testing.assert_invariant(whole, points)


class Steep(nn.Module):
    """Answers that depend on the pose, and much: products of coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = 0

    def forward(self, points: Tensor) -> Tensor:
        self.shown += len(points)
        return 60 * (points.mT @ points / points.shape[1]).flatten(1)[:, [0, 1, 2, 4, 5]]


def test_the_predictor_alone_answers_where_the_canonicalizer_agrees_best() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing = Optimized(keep=2, answers=4, classes=5, **sizes).double().eval()
    assert knowing.scorer.recognise is not None
    nn.init.normal_(knowing.scorer.recognise[-1].weight)
    whole = Canonicalized(Steep(), knowing, "agreement").eval()
    points = testing.generic_clouds(40, 64, dtype=torch.float64)
    frames, clouds = knowing(points), torch.arange(40)
    assert frames.class_logits is not None
    answers = torch.stack([whole.predictor(posed) for posed in frames.apply(points).unbind(1)], 1)
    opinion = frames.class_logits.softmax(dim=-1)
    given = opinion[clouds[:, None], answers.argmax(dim=-1)]
    enough = given >= 0.3 * opinion.amax(dim=-1, keepdim=True)
    assert not enough.any(dim=1).all()  # both cases come
    assert (enough.any(dim=1) & ~enough[:, 0]).any()

    def choice(weights: Tensor) -> Tensor:
        first = (weights * enough).argmax(dim=1)
        likely = given * (weights > 0)
        best = (weights * (likely == likely.amax(dim=1, keepdim=True))).argmax(dim=1)
        return torch.where((weights * enough).any(dim=1), first, best)

    chosen = choice(frames.weights)
    assert len(set(chosen.tolist())) > 1
    torch.testing.assert_close(whole(points), answers[clouds, chosen])
    testing.assert_invariant(whole, points)
    # it is asked frame by frame, heaviest first, until it agrees
    whole.predictor.shown = 0
    found = whole.answer(frames, points)
    turn = enough.gather(1, frames.log_weights.argsort(dim=1, descending=True))
    asked = torch.where(turn.any(dim=1), turn.int().argmax(dim=1) + 1, 4)
    assert torch.equal(found.passes, asked)
    assert whole.predictor.shown == asked.sum() < 4 * 40
    poses = frames.rotations[clouds, found.frame]  # the refiner proposes some poses twice
    assert torch.equal(poses, frames.rotations[clouds, chosen])
    # the pose that is told is the one of the answer
    found = whole.predict(points)
    torch.testing.assert_close(found.rotation, frames.rotations[clouds, chosen])
    torch.testing.assert_close(found.frame_weight, frames.weights[clouds, chosen])
    assert torch.equal(found.labels, answers[clouds, chosen].argmax(dim=1))
    # an answer that nobody asked for has no say
    rare = knowing.with_options(negligible=0.999)
    few = Canonicalized(whole.predictor, rare, "agreement").eval()
    weights = rare(points).weights
    assert (weights == 0).any()
    chosen = choice(weights)
    torch.testing.assert_close(few(points), answers[clouds, chosen])
    # an opinion that says nothing leaves the heaviest
    flat = frames.class_logits.new_zeros(40, 5).log_softmax(dim=-1)
    assert torch.equal(frames.agreeing(answers, flat), frames.heaviest)
    # and how sure a network is of itself makes no difference
    spoken = frames.class_logits.log_softmax(dim=-1)
    for tempered in (answers / 8, 8 * answers):
        assert torch.equal(frames.agreeing(tempered, spoken), frames.agreeing(answers, spoken))


@pytest.mark.parametrize("vote", ["agreement", "product"])
def test_an_opinion_of_other_classes_is_refused(vote: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing = Optimized(keep=2, classes=5, **sizes).double()
    whole = model(knowing, vote=vote).double()
    points = testing.generic_clouds(2, 64, dtype=torch.float64)
    strangers: list[Any] = [Optimized(keep=2, classes=7, **sizes).double(), PCA(4)]
    for stranger, known in zip(strangers, ("7", "no"), strict=True):
        with pytest.raises(InputError, match=rf"{vote}.*knows {known} classes .* tells 5 apart"):
            Canonicalized(whole.predictor, stranger, vote).eval()(points)
    knowing.class_names = CLASSES[::-1]
    whole.predictor.classes = CLASSES
    with pytest.raises(InputError, match="class 0 is 'chair' for the predictor, 'vase' for the"):
        Canonicalized(whole.predictor, knowing, vote)
    parts = create("pointnet-parts", num_parts=4, num_categories=0)
    with pytest.raises(InputError, match="labels parts"):
        Canonicalized(parts, knowing, vote)
    pointwise = Canonicalized(nn.Linear(3, 5).double(), knowing, vote).eval()
    with pytest.raises(InputError, match="labels points"):
        pointwise(points)


def test_another_canonicalizer_is_heeded_if_it_knows_the_classes() -> None:
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing, predictor = Optimized(classes=5, **sizes), model(Identity()).predictor
    for ours, theirs, heeded in (
        (None, None, True),
        (CLASSES, CLASSES, True),
        (CLASSES, CLASSES[::-1], False),
        (CLASSES, None, False),
        (None, CLASSES, False),
    ):
        predictor.classes, knowing.class_names = ours, theirs
        assert vote_before(predictor, knowing, "agreement") == (
            "agreement" if heeded else "certainty"
        )
    assert vote_before(predictor, PCA(4), "product") == "certainty"
    assert vote_before(predictor, PCA(4), "mean") == "mean"


def test_identity_is_the_bare_predictor() -> None:
    points = testing.generic_clouds(6, 32)
    whole = model(Identity())
    assert torch.equal(whole(points), whole.predictor(points))


def test_a_predictor_that_takes_points_only_will_do() -> None:
    assert list(inspect.signature(Moments.forward).parameters) == ["self", "points"]
    points = testing.generic_clouds(30, 64, dtype=torch.float64)
    testing.assert_invariant(Canonicalized(Moments(), PCA(1)), points)


def test_normals_reach_the_predictor_in_canonical_pose() -> None:
    class AlongNormals(nn.Module):
        def forward(self, points: Tensor, normals: Tensor) -> Tensor:
            return (normals * points.pow(3)).sum(dim=1)

    points = testing.generic_clouds(20, 64, dtype=torch.float64)
    normals = nn.functional.normalize(points.flip(1) - 1, dim=-1)
    testing.assert_invariant(
        Canonicalized(AlongNormals(), PCA(1)), points, normals=normals, tolerance=1e-8
    )


def test_frames_that_are_known_are_not_found_again() -> None:
    points = testing.generic_clouds(4, 32)
    whole = model("optimized")
    frames = whole.canonicalizer(points)
    assert torch.equal(whole.predict_in(frames, points), whole(points))


def test_prediction() -> None:
    points = testing.generic_clouds(8, 64, dtype=torch.float64)
    points[3] = points[3, :1]
    whole = model("optimized").double()
    answer = whole.predict(points)
    torch.testing.assert_close(answer.probabilities.sum(dim=1).double(), torch.ones(8).double())
    assert torch.equal(answer.labels, whole(points).argmax(dim=1))
    assert torch.equal(answer.confidence, answer.probabilities.amax(dim=1))
    assert answer.degenerate.tolist() == [False] * 3 + [True] + [False] * 4
    testing.assert_proper(answer.rotation)
    turn = rotations.so3_grid(8, torch.float64)
    turned = whole.predict(points @ turn.mT)
    settled = ~answer.degenerate
    assert torch.equal(turned.labels[settled], answer.labels[settled])
    torch.testing.assert_close(turned.rotation[settled], (turn @ answer.rotation)[settled])


def test_prediction_is_in_eval_mode_and_restores_each_mode() -> None:
    points = testing.generic_clouds(4, 32)
    whole = model("optimized")
    expected = whole.predict(points).probabilities
    whole.train()
    whole.predictor.eval()
    modes = [part.training for part in whole.modules()]
    answer = whole.predict(points)
    assert torch.equal(answer.probabilities, expected)
    assert not answer.probabilities.requires_grad
    assert [part.training for part in whole.modules()] == modes
    with pytest.raises(InputError):
        whole.predict(points[0])
    assert [part.training for part in whole.modules()] == modes


def test_training_reaches_predictor_and_canonicalizer() -> None:
    whole = model("optimized").train()
    nn.init.normal_(whole.canonicalizer.refiner.head[-1].weight, std=0.1)
    whole(testing.generic_clouds(4, 32)).log_softmax(dim=-1)[:, 0].sum().backward()
    for part in (whole.predictor, whole.canonicalizer.refiner):
        assert all(torch.isfinite(weight.grad).all() for weight in part.parameters())
        assert any(weight.grad.any() for weight in part.parameters())


@pytest.mark.parametrize("name", CANONICALIZERS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    points = testing.generic_clouds(4, 32)
    whole = model(name, vote="mean")
    whole.coordinate_frame, whole.classes = "z-up", CLASSES
    path = tmp_path / "robust.safetensors"
    whole.save(path, metrics={"overall_accuracy": 0.5})
    again = load(path)
    assert isinstance(again, Canonicalized)
    assert not again.training
    assert again.vote == "mean"
    assert torch.equal(again(points), whole(points))
    assert again.coordinate_frame == "z-up"
    assert tuple(again.classes) == CLASSES
    card = checkpoint.read_card(path)
    assert card.kind == "canonicalized"
    assert card.metrics == {"overall_accuracy": 0.5}


class Weighed(Canonicalizer):
    """The four poses of the principal axes, at given odds."""

    def __init__(self, odds: list[list[float]]) -> None:
        super().__init__()
        self.odds, self.axes = torch.tensor(odds, dtype=torch.float64), PCA(4)

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        poses = self.axes.propose(points, mask, normals).rotations
        return Frames.of(poses, self.odds.log().to(points))


class Counted(nn.Module):
    """PointNet, and how many clouds it was asked about, last of all those given to it."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.asked, self.bad = network(), 0, -1

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        self.asked = len(points)
        if self.bad >= 0:
            raise NotFiniteError(self.bad, "mend it")
        return self.network(points, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vote", ["probabilities", "certainty", "mean"])
def test_a_predictor_is_not_asked_about_frames_that_weigh_nothing(vote: Any, masked: bool) -> None:
    points = testing.generic_clouds(3, 32, dtype=torch.float64)
    mask = torch.arange(32) < torch.tensor([[32], [20], [32]]) if masked else None
    nothing = [[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
    next_to_nothing = [[max(odds, 1e-12) for odds in cloud] for cloud in nothing]
    found, expected = (
        Canonicalized(Counted(), Weighed(odds), vote=vote).double().eval()
        for odds in (nothing, next_to_nothing)
    )
    torch.testing.assert_close(found(points, mask), expected(points, mask), atol=1e-9, rtol=0)
    assert (found.predictor.asked, expected.predictor.asked) == (6, 12)
    found.predictor.bad = 2  # the third that is asked about is the second cloud
    with pytest.raises(NotFiniteError) as caught:
        found(points, mask)
    assert caught.value.cloud == 1


def test_options_that_need_no_training_change_and_the_weights_stay(tmp_path: Path) -> None:
    points = testing.generic_clouds(4, 32, dtype=torch.float64)
    whole = model("optimized").double()
    before = whole.canonicalizer
    nn.init.normal_(before.refiner.head[-1].weight, std=0.1)
    after = before.with_options(answers=1, looks=2)
    assert after.options == {**before.options, "answers": 1, "looks": 2}
    assert "proposal" not in before.options
    assert not after.training
    for name, weight in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], weight)
    fewer = before.with_options(answers=1)
    frames = fewer(points)
    assert frames.count == 1
    assert torch.equal(frames.rotations, before(points).best().rotations)
    # two canonicalizers, nothing of which is shared
    assert not set(after.modules()) & set(before.modules())
    nn.init.zeros_(fewer.scorer.score.weight)
    assert before.scorer.score.weight.any()
    # as good as any other in a file
    Canonicalized(whole.predictor, after).save(tmp_path / "changed.safetensors")
    again = load(tmp_path / "changed.safetensors").canonicalizer
    assert again.options == after.options
    assert torch.equal(again(points).rotations, after(points).rotations)


def test_what_is_frozen_or_evaluated_stays_so_when_options_change() -> None:
    before = model("optimized").canonicalizer.train()
    before.scorer.requires_grad_(False).eval()
    before.coordinate_frame = "z-up"
    after = before.with_options(answers=1)
    assert after.coordinate_frame == "z-up"
    for kept, changed in zip(before.modules(), after.modules(), strict=True):
        assert changed.training is kept.training
    for name, weight in after.named_parameters():
        assert weight.requires_grad is not name.startswith("scorer.")


def test_a_search_keeps_its_network_when_its_options_change() -> None:
    points = testing.generic_clouds(3, 24)
    search = Canonicalized(network(), Search(budget=8, keep=1)).eval().canonicalizer
    again = search.with_options(budget=8)
    assert torch.equal(again(points).rotations, search(points).rotations)
    assert search.with_options(keep=2)(points).count == 2


@pytest.mark.parametrize(
    ("canonicalizer", "changes", "message"),
    [
        ("optimized", {"look": 4}, r"Optimized has no option 'look'; it has: keep, steps, answers"),
        ("optimized", {"proposal": PCA(1)}, r"no option 'proposal'"),
        ("optimized", {"answers": 0}, r"answers is 0; choose at least 1"),
        ("optimized", {"scorer_hidden": 8}, r"the weights do not fit: .*a training of its own"),
        ("pca-4", {"poses": 5}, r"poses is 5"),
        (Identity(), {"looks": 4}, r"Identity has no option 'looks'; it has: none"),
    ],
)
def test_options_that_cannot_change_are_refused(
    canonicalizer: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model(canonicalizer).canonicalizer.with_options(**changes)


def test_what_the_predictor_was_trained_on_is_remembered(tmp_path: Path) -> None:
    predictor = network()
    predictor.coordinate_frame, predictor.classes = "y-up-mirrored", CLASSES
    predictor.normalisation = "unit-ball"
    path = tmp_path / "robust.safetensors"
    Canonicalized(predictor, PCA(4)).save(path)
    card = checkpoint.read_card(path)
    assert (card.coordinate_frame, card.classes) == ("y-up-mirrored", CLASSES)
    assert card.normalisation == load(path).normalisation == "unit-ball"


def test_a_predictor_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "pointnet.safetensors"
    checkpoint.save(path, network(), checkpoint.Card(kind="predictor"))
    with pytest.raises(CheckpointError, match=r"predictor.*predictors\.load"):
        load(path)
    with pytest.raises(CheckpointError, match="no file"):
        load(tmp_path / "absent.safetensors")


def test_bad_clouds_are_refused_by_the_whole_model() -> None:
    with pytest.raises(InputError, match=r"points\.mT"):
        model()(torch.zeros(2, 3, 50))
    with pytest.raises(InputError, match="nan"):
        model()(torch.full((2, 50, 3), torch.nan))


@pytest.mark.parametrize("theirs", [CLASSES[::-1], ("a", "b", "c"), CLASSES, None])
def test_what_the_canonicalizer_was_trained_on_is_remembered(tmp_path: Path, theirs: Any) -> None:
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing = Optimized(keep=2, classes=len(theirs or CLASSES), **sizes)
    knowing.coordinate_frame, knowing.class_names = "y-up", theirs
    predictor, path = network(), tmp_path / "robust.safetensors"
    predictor.classes = CLASSES
    Canonicalized(predictor, knowing, "certainty").save(path)
    for again in (load(path).canonicalizer, canonicalizers.load(path)):
        assert again.coordinate_frame == "y-up"
        assert again.class_names == (theirs or CLASSES)  # without names, those of as many classes
        assert vote_before(predictor, again, "agreement") == (
            "agreement" if theirs in (CLASSES, None) else "certainty"
        )
    stranger = network()
    stranger.coordinate_frame = "z-up"
    with pytest.raises(InputError, match=r"frame y-up.*trained in z-up"):
        Canonicalized(stranger, load(path).canonicalizer)


def test_without_a_vote_the_classes_decide() -> None:
    sizes: dict[str, Any] = {"scorer_widths": (8, 16), "refiner_widths": (8, 16)}
    knowing, predictor = Optimized(keep=2, classes=5, **sizes), network()
    assert Canonicalized(predictor, PCA(4)).vote == "certainty"
    assert Canonicalized(predictor, knowing).vote == "certainty"  # of classes without names
    predictor.classes, knowing.class_names = CLASSES, CLASSES[::-1]
    assert Canonicalized(predictor, knowing).vote == "certainty"
    knowing.class_names = list(CLASSES)
    assert Canonicalized(predictor, knowing).vote == "agreement"
    assert Canonicalized(predictor, knowing, "mean").vote == "mean"
    parts = create("pointnet-parts", num_parts=4, num_categories=5)
    parts.classes = CLASSES
    assert Canonicalized(parts, knowing).vote == "certainty"


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (None, r"give category, \(2,\) integers in \[0, 5\)"),
        ([1, 2], r"category is a list; pass a tensor \(2,\)"),
        (torch.tensor([1]), r"category has shape \(1,\) .* expected \(2,\)"),
        (torch.tensor([1, 9]), r"in \[0, 5\), got \[1, 9\]$"),
    ],
)
def test_categories_are_named_as_they_were_given(category: Any, message: str) -> None:
    torch.manual_seed(0)
    parts = Canonicalized(create("pointnet-parts", num_parts=4, num_categories=5), PCA(4)).eval()
    with pytest.raises(InputError, match=message):
        parts.predict(testing.generic_clouds(2, 30), category=category)


def test_half_precision_is_told_what_frames_take() -> None:
    points = testing.generic_clouds(2, 30).half()
    with pytest.raises(
        InputError, match=r"float16 weights; convert it with \.to\(torch\.float32\)$"
    ):
        model("optimized").half().predict(points)
