"""Curves, poses, galleries and the page of an evaluation, of clouds whose answers are known."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import test_segmentation as segmentation
import torch
from test_eval import CLASSES, COLLAPSED, LABELS, SHAPES, SPECK, Boxes, Longest, Marked, box
from torch import Tensor, nn

from pointcanon.canonicalizers import Canonicalizer
from pointcanon.coordinates import COORDINATE_FRAMES, convert
from pointcanon.datasets import UNLABELLED
from pointcanon.errors import CheckpointError, DataError, InputError
from pointcanon.eval import style
from pointcanon.eval.curve import curve_figure, describe_curve
from pointcanon.eval.evaluate import chosen_clouds, evaluate
from pointcanon.eval.page import page, write_pictures
from pointcanon.eval.part_pictures import OF_ANOTHER_CLASS, UNKNOWN, colour_of, part_pictures
from pointcanon.eval.pictures import (
    ClassPicture,
    Verdict,
    as_seen,
    canonical_gallery,
    class_pictures,
    gallery,
    heights,
)
from pointcanon.eval.protocols import pose_rotations
from pointcanon.eval.sphere import describe_poses, equal_area, poses_figure
from pointcanon.eval.sweep import Sweep, Swept, sweep, wilson
from pointcanon.eval.viewer import MOST_NAMES, MOST_POINTS, Paint, Scene, View, viewer
from pointcanon.frames import Frames
from pointcanon.model import Canonicalized
from pointcanon.rotations import about_axis

PARTS, RANGES = segmentation.PARTS, segmentation.RANGES
UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


@pytest.fixture
def boxes() -> Boxes:
    return Boxes(SHAPES, LABELS)


@pytest.fixture
def model() -> Canonicalized:
    return Canonicalized(Longest(), Marked())


# what is measured


class Tipped(Marked):
    """The pose, but for a quarter turn about x, so that up comes to lie along y."""

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]).to(points)
        return Frames.of(super().propose(points, mask, normals).rotations @ turn)


@pytest.mark.parametrize("frame", COORDINATE_FRAMES)
def test_up_is_found_at_the_pole_in_every_frame(frame: str) -> None:
    boxes = Boxes(SHAPES, LABELS, frame)
    marked = CanonicalIn(frame)
    found = sweep(Canonicalized(Longest(), marked), boxes, "I/SO3", angles=(0, 90))
    alone, behind = found.networks
    torch.testing.assert_close(behind.up, UP.expand(9, 3), atol=1e-5, rtol=0)
    turns = pose_rotations("SO3", 9, boxes.coordinate_frame.up_axis, seed=0, dtype=torch.float64)
    up = convert(turns @ boxes.coordinate_frame.up_axis, frame, "z-up")
    torch.testing.assert_close(alone.up, up)


class CanonicalIn(Marked):
    """The pose in which the marked points lie along the axes of some coordinate frame."""

    def __init__(self, frame: str) -> None:
        super().__init__()
        self.frame = frame

    def propose(self, points: Tensor, mask: Tensor | None, normals: Tensor | None) -> Frames:
        marks = box(0, 0)[:4].to(points)
        upright = convert(marks, "z-up", self.frame)[None]
        found = super().propose(points, None, None).rotations
        return Frames.of(found @ super().propose(upright, None, None).rotations.mT)


def test_a_tipped_pose_lies_on_the_equator(boxes: Boxes) -> None:
    behind = sweep(Canonicalized(Longest(), Tipped()), boxes, "I/SO3", angles=(0,)).networks[1]
    assert behind.up[:, 2].abs().max() < 1e-5
    assert behind.up[:, 1].abs().min() > 1 - 1e-5


def test_scores_at_every_angle_by_hand(boxes: Boxes, model: Canonicalized) -> None:
    found = sweep(model, boxes, "I/z", angles=(0, 40, 180), seed=5)
    assert found.measure == "overall_accuracy"
    assert (found.clouds, found.total, found.pose) == (tuple(range(9)), 9, "z")
    alone, behind = found.networks
    assert (alone.name, behind.name) == ("Longest alone", "behind Marked")
    right = torch.tensor(SHAPES) == torch.tensor(LABELS)
    assert torch.equal(behind.by_angle, right.double().expand(3, 9))
    assert torch.equal(alone.by_angle[0], right.double())
    generator = torch.Generator().manual_seed(5)
    torch.randperm(9, generator=generator)
    axes = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    turn = about_axis(axes, torch.full((9,), math.radians(40), dtype=torch.float64)).float()
    points = torch.stack([boxes[i]["points"] for i in range(9)]) @ turn.mT
    by_hand = Longest()(points).argmax(dim=1) == torch.tensor(LABELS)
    assert torch.equal(alone.by_angle[1], by_hand.double())
    about_up = pose_rotations("z", 9, boxes.coordinate_frame.up_axis, seed=5)
    points = torch.stack([boxes[i]["points"] for i in range(9)]) @ about_up.mT
    by_hand = Longest()(points).argmax(dim=1) == torch.tensor(LABELS)
    assert torch.equal(alone.score, by_hand.double())


def test_clouds_are_drawn_by_the_seed_among_those_of_the_limit(boxes: Boxes) -> None:
    model = Canonicalized(Longest(), Marked())

    def drawn(**options: Any) -> tuple[int, ...]:
        return sweep(model, boxes, "I/SO3", angles=(0,), **options).clouds

    assert drawn(clouds=4) == drawn(clouds=4, batch_size=1)
    assert len({drawn(clouds=4, seed=seed) for seed in range(5)}) > 1
    assert set(drawn(clouds=2, limit=3)) < set(chosen_clouds(boxes, 3))


def test_a_predictor_alone_is_one_network(boxes: Boxes) -> None:
    from pointcanon.canonicalizers import Identity

    found = sweep(Canonicalized(Longest(), Identity()), boxes, "I/SO3", angles=(0,))
    assert [network.name for network in found.networks] == ["Longest"]


def test_parts_are_scored_as_the_evaluation_scores_them() -> None:
    clouds = segmentation.Boxes([0, 1, 1, 0, 1], sizes=(60, 44))
    clouds.mislabelled = {1: 20}
    model = Canonicalized(segmentation.Cutter(), segmentation.Marked())
    found = sweep(model, clouds, "I/SO3", angles=(0, 120), batch_size=2)
    expected = evaluate(model, clouds, "I/SO3", seeds=(0,))
    assert found.measure == "instance_miou"
    alone, behind = found.networks
    assert behind.by_angle[0].mean().item() == pytest.approx(expected.trials.aligned.instance_miou)
    assert behind.score.mean().item() == pytest.approx(expected.trials.turned[0].instance_miou)
    assert expected.bare is not None
    assert alone.score.mean().item() == pytest.approx(expected.bare.turned[0].instance_miou)
    assert behind.by_angle[1, 1] < 1 == behind.by_angle[1, 0]


def test_what_cannot_be_swept_is_refused(boxes: Boxes, model: Canonicalized) -> None:
    class Broken(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return points.mean(dim=1).log()[:, [0, 1, 2, 2]]

    with pytest.raises(InputError, match="clouds is 0"):
        sweep(model, boxes, "I/SO3", clouds=0)
    with pytest.raises(InputError, match="NaN or infinity"):
        sweep(Canonicalized(Broken(), Marked()), boxes, "I/SO3")
    model.classes = ["cat", "dog"]
    with pytest.raises(CheckpointError, match="2 classes"):
        sweep(model, boxes, "I/SO3")


def test_intervals_of_wilson() -> None:
    """Against the closed values of the formula that textbooks print."""
    low, high = wilson(torch.tensor([0.0, 0.5, 1.0]), 10)
    torch.testing.assert_close(low, torch.tensor([0.0, 0.2366, 0.7225]), atol=1e-4, rtol=0)
    torch.testing.assert_close(high, torch.tensor([0.2775, 0.7634, 1.0]), atol=1e-4, rtol=0)


# figures


def test_the_projection_keeps_areas() -> None:
    tilt = torch.tensor([0.0, 60.0, 90.0, 120.0, 180.0], dtype=torch.float64).deg2rad()
    directions = torch.stack((tilt.sin(), 0 * tilt, tilt.cos()), dim=-1)
    expected = torch.tensor([0.0, 0.5**0.5, 1.0, 0.5**0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(equal_area(directions)[:, 0], expected)
    assert not equal_area(directions)[:, 1].any()
    generator = torch.Generator().manual_seed(0)
    uniform = nn.functional.normalize(torch.randn(20_000, 3, generator=generator), dim=-1)
    radius = equal_area(uniform).norm(dim=-1)
    for share in (0.1, 0.5, 0.9):  # of the disc's area
        assert (radius < share**0.5).double().mean().item() == pytest.approx(share, abs=0.01)
    with pytest.raises(InputError, match=r"\(5, 2\)"):
        equal_area(torch.zeros(5, 2))


@pytest.fixture
def swept() -> Sweep:
    """Four clouds: upright and right, upright and wrong, tilted by 60 degrees, upside down."""
    up = torch.tensor([[0, 0, 1], [0, 0, 1], [0, 0.75**0.5, 0.5], [0, 0, -1]], dtype=torch.float64)
    score = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    by_angle = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.float64)
    networks = tuple(Swept(name, by_angle, score, up) for name in ("Net alone", "behind PCA"))
    return Sweep("overall_accuracy", (0, 90), "SO3", (1, 3, 5, 7), 2468, 3, networks)


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_curve_says_what_it_shows(swept: Sweep) -> None:
    figure = curve_figure(swept)
    (panel,) = figure.axes
    lines = panel.get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[75, 25], [75, 25]]
    assert len({line.get_linestyle() for line in lines}) == 2  # not by colour alone
    for words in ("overall accuracy (%)", "(degrees)", "4 of 2,468 clouds (seed 3)", "95 %"):
        assert words in texts(figure)
    assert "Net alone, 75.0 % at 0 degrees, and between 25.0 and 75.0 %" in describe_curve(swept)


def test_the_poses_are_counted(swept: Sweep) -> None:
    figure = poses_figure(swept)
    shown = texts(figure)
    for words in ("75 % of clouds\n50 % within 10° of up", "25 % of clouds\n25 % within 10° of d"):
        assert shown.count(words) == 2
    assert "class labelled wrong" in shown
    panels = figure.axes
    assert len(panels) == 4
    drawn = [[len(marks.get_offsets()) for marks in panel.collections] for panel in panels]
    assert drawn == [[2, 1], [0, 1]] * 2  # right and wrong, above and below
    assert "50 % within 10 degrees of up, 75 % in the upper" in describe_poses(swept)


def overlaps(figure: Any) -> list[str]:
    """Pairs of texts whose boxes meet."""
    from matplotlib.text import Text

    figure.canvas.draw()
    drawn = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in drawn]
    return [
        f"{one.get_text()!r} on {other.get_text()!r}"
        for i, one in enumerate(drawn)
        for j, other in enumerate(drawn[:i])
        if boxes[i].overlaps(boxes[j]) and boxes[i].width and boxes[j].width
    ]


def test_no_text_lies_on_another(swept: Sweep) -> None:
    assert not overlaps(curve_figure(swept))
    assert not overlaps(poses_figure(swept))


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_same_figure_is_the_same_file(suffix: str, swept: Sweep, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for file in files:
        style.write(curve_figure(swept), file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_picture_needs_a_suffix(swept: Sweep, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"end it in \.png"):
        style.write(curve_figure(swept), tmp_path / "curve.bmp")


# galleries


def png_size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def picture(cloud: Tensor, title: str = "a") -> ClassPicture:
    return ClassPicture(title, cloud, cloud, torch.zeros(len(cloud)))


def test_a_gallery_has_a_column_for_each_cloud(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "new" / "wide.png", tmp_path / "narrow.png"
    gallery([picture(box(i, i), f"a{i}") for i in range(3)], wide, coordinate_frame="y-up")
    said = (Verdict("chair", True), Verdict("sofa", False))
    gallery([picture(box(0, 0))._replace(verdicts=said)], narrow, speakers=("one", "two"))
    assert png_size(wide)[0] > png_size(narrow)[0]
    assert png_size(wide)[1] == png_size(narrow)[1]
    assert [str(verdict) for verdict in said] == ["✓ chair", "✗ sofa"]


def test_up_is_up_in_every_frame() -> None:
    tower = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.3, 0.0, -1.0]])
    given = [(convert(tower, "z-up", frame), frame) for frame in COORDINATE_FRAMES]
    views = [as_seen(*each) for each in given]
    assert all(torch.allclose(view, views[0]) for view in views)
    across, up = (views[0][1] - views[0][0])[:2]
    assert abs(across) < 1e-12
    assert up > 1
    assert all(heights(*each).tolist() == [0, 1, 0] for each in given)


def test_a_single_point_can_be_drawn(tmp_path: Path) -> None:
    gallery([picture(torch.zeros(1, 3))], tmp_path / "point.png")
    assert heights(torch.ones(1, 3), "z-up").tolist() == [0]


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path: Path) -> None:
    cloud, file = box(0, 0), tmp_path / "picture.png"
    with pytest.raises(InputError, match="0 clouds to draw"):
        gallery([], file)
    with pytest.raises(InputError, match=r"\(3, 64\)"):
        gallery([picture(cloud.mT)], file)
    with pytest.raises(InputError, match="NaN or infinite"):
        gallery([picture(cloud / 0)], file)
    with pytest.raises(DataError, match="cannot write"):
        gallery([picture(cloud)], Path("/dev/null/picture.png"))
    assert not list(tmp_path.iterdir())


def test_the_pictures_of_a_classifier(boxes: Boxes, model: Canonicalized, tmp_path: Path) -> None:
    drawn = class_pictures(model, boxes, "I/SO3", seed=3, count=3)
    titles = [each.title for each in drawn]
    assert titles == ["along-x", "along-y", "along-z"]  # first cloud of each class
    assert [each.verdicts[1] for each in drawn if each.verdicts] == [(t, True) for t in titles]
    turns = pose_rotations("SO3", 9, boxes.coordinate_frame.up_axis, seed=3)
    for each, index in zip(drawn, (0, 4, 7), strict=True):
        points = boxes[index]["points"]
        assert torch.allclose(each.received, points @ turns[index].mT, atol=1e-6)
        assert torch.allclose(each.canonical, points, atol=1e-5)
        assert each.height.argmax() == points[:, 2].argmax()
    assert len(class_pictures(model, boxes, "I/SO3", count=5)) == 5
    canonical_gallery(model, boxes, "I/SO3", tmp_path / "x.png", count=1)
    png_size(tmp_path / "x.png")


def test_colours_of_parts() -> None:
    few = [colour_of(part, RANGES[1]) for part in RANGES[1]]
    assert len(set(few)) == 3
    assert colour_of(0, RANGES[1]) == OF_ANOTHER_CLASS
    assert colour_of(UNLABELLED, RANGES[1]) == UNKNOWN
    many = [colour_of(part, range(160)) for part in range(160)]
    assert len(set(many)) > 150
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in few + many)


# the page


class Reader(HTMLParser):
    """Elements that are opened and closed in order; what an image shows; what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, list[dict[str, str | None]]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append(dict(attrs))
        if tag not in ("meta", "img", "br", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_data(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def int16(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<i2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of a classifier of boxes."""
    folder = tmp_path_factory.mktemp("pictures")
    model, boxes = Canonicalized(Longest(), Marked()), Boxes(SHAPES, LABELS)
    boxes.name = "Boxes <&> more"
    evaluation = evaluate(model, boxes, "I/SO3", seeds=(0, 1))
    files = write_pictures(model, boxes, evaluation, folder, clouds=7, count=3)
    assert [file.name for file in files] == ["curve.png", "poses.png", "gallery.png", "report.html"]
    return folder


def test_the_page_holds_all_and_loads_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    found = Reader(text).found
    assert "://" not in text
    assert "default-src 'none'" in text
    assert not any("src" in each for each in found["script"])
    assert all(str(image["src"]).startswith("data:image/svg+xml;base64,") for image in found["img"])
    assert all(len(image["alt"] or "") > 50 for image in found["img"])
    assert len(found["canvas"]) == 6
    assert all("along-" in (canvas["aria-label"] or "") for canvas in found["canvas"])
    assert sum(each.get("tabindex") == "0" for each in found["div"]) == 3
    assert found["html"] == [{"lang": "en"}]
    assert "<h1>Longest behind Marked on Boxes &lt;&amp;&gt; more test</h1>" in text
    for words in (
        'behind Marked<br><span class="right">✓ along-x</span>',
        "prediction flips",
        "7 of 9 clouds",
        "66.7",
    ):
        assert words in text
    assert len(text) < 5e6


def test_the_page_of_parts(tmp_path: Path) -> None:
    clouds = segmentation.Boxes([0, 1, 1])
    clouds.mislabelled = {1: 20}
    model = Canonicalized(segmentation.Cutter(), segmentation.Marked())
    evaluation = evaluate(model, clouds, "I/SO3", seeds=(0,))
    write_pictures(model, clouds, evaluation, tmp_path, count=3)
    text = (tmp_path / "report.html").read_text()
    Reader(text)
    assert re.findall("<h3>(.*?)</h3>", text) == ["slab", "stack", "stack"]
    shown = [part_pictures(model, clouds, "I/SO3", count=3)[i].notes[1] for i in range(3)]
    assert [note == "mIoU 100 %" for note in shown] == [True, False, True]
    for index, scene in enumerate(page_data(text)):
        item = cast(Any, clouds[index])
        truth, found, errors = (
            [paint["labels"][i] for i in int16(paint["shade"])] if paint["labels"] else paint
            for paint in scene["paints"]
        )
        assert truth == [PARTS[part] for part in item["parts"].tolist()]
        expected = segmentation.truth_of(item["points"], item["label"])
        assert found == [PARTS[part] for part in expected.tolist()]
        wrong = int16(errors["shade"]).tolist()
        assert wrong == (item["parts"] != expected).long().tolist()
        received, canonical = (
            torch.from_numpy(int16(cloud).astype(np.float32)).view(-1, 3)
            for cloud in scene["points"]
        )
        moved = item["points"] - item["points"].amin(dim=0)
        seen = canonical - canonical.amin(dim=0)
        torch.testing.assert_close(seen / seen.norm(), moved / moved.norm(), atol=1e-3, rtol=0)
        assert (received - canonical).abs().max() > 1000
    assert png_size(tmp_path / "gallery.png")[1] > png_size(tmp_path / "curve.png")[1]


def test_large_clouds_and_many_names_stay_small() -> None:
    size = 200_000
    cloud, shade = torch.randn(size, 3), torch.arange(size) % 160
    names = [f"part <{i}>" for i in range(160)]
    paints = [Paint("truth", shade, ["#000000"] * 160, names)] * 3
    views = [View("", 0, 0), View("", 1, 1), View("", 1, 2), View("", 1, 0)]
    text = viewer([Scene("big", [cloud, cloud], paints, views)] * 8)
    assert len(text) < 4e6
    assert len(int16(page_data(text)[0]["paints"][0]["shade"])) <= MOST_POINTS
    assert text.count("<li>") <= 8 * MOST_NAMES
    assert "part &lt;0&gt;" in text


def test_the_same_evaluation_is_the_same_page(boxes: Boxes, model: Canonicalized) -> None:
    evaluation = evaluate(model, boxes, "I/I")
    found = sweep(model, boxes, "I/I", angles=(0, 90))
    pages = {
        page(evaluation, found, [], curve_figure(found), poses_figure(found)) for _ in range(2)
    }
    assert len(pages) == 1


def test_a_cloud_without_a_frame_is_drawn_too(tmp_path: Path) -> None:
    boxes = Boxes([COLLAPSED, SPECK], [3, 3])
    model = Canonicalized(Longest(), cast(Canonicalizer, Marked()))
    evaluation = evaluate(model, boxes, "I/SO3", seeds=(0,))
    files = write_pictures(model, boxes, evaluation, tmp_path)
    assert all(file.stat().st_size for file in files)
    assert boxes.classes == CLASSES


# in a browser


BROWSER = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1160,2400", "--virtual-time-budget=20000"),
]

# frames of a headless browser do not keep its virtual time; timers do
TIMED = "<script>window.requestAnimationFrame = (draw) => setTimeout(draw, 0);</script>"

PROBE = """
<script>
addEventListener("error", (event) => { document.body.dataset.error = event.message; });
const frame = () => new Promise((done) => setTimeout(done, 50));
const canvases = [...document.querySelectorAll("canvas")];
const inked = (canvas) => {
  const { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  return pixels.filter((value, i) => i % 4 === 3 && value).length / (width * height);
};
const group = document.querySelector(".views"), canvas = canvases[0];
const acts = {
  key: () => group.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" })),
  zoom: () => group.dispatchEvent(new KeyboardEvent("keydown", { key: "+" })),
  drag: () => canvas.dispatchEvent(new PointerEvent("pointermove", { buttons: 1, movementX: 40 })),
  home: () => group.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" })),
};
(async () => {
  await frame();
  const images = [canvas.toDataURL()];
  document.body.dataset.inked = Math.min(...canvases.map(inked)).toFixed(4);
  for (const act of Object.values(acts)) {
    act();
    await frame();
    images.push(canvas.toDataURL());
  }
  document.body.dataset.changed = images.slice(1).map((image, i) => +(image !== images[i]));
  document.body.dataset.back = images.at(-1) === images[0];
  document.body.dataset.sized = [...document.images].every((image) => image.naturalWidth > 100);
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
})();
</script>
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium")
    return found


@pytest.mark.slow
def test_the_page_works_in_a_browser(chromium: str, written: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    text = (written / "report.html").read_text()
    text = text.replace("<body>", f"<body>{TIMED}").replace("</body>", f"{PROBE}</body>")
    probed.write_text(text)
    command = [chromium, *BROWSER, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
    done = subprocess.run(
        [*command, probed.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    body = re.search("<body[^>]*>", done.stdout)
    assert body is not None
    told = dict(re.findall(r'data-(\w+)="([^"]*)"', body[0]))
    assert "error" not in told
    assert float(told["inked"]) > 0.005  # every canvas shows a cloud
    assert told["changed"] == "1,1,1,1"  # by key, zoom, drag and Home
    assert (told["back"], told["sized"], told["wide"]) == ("true", "true", "false")


@pytest.mark.slow
def test_the_page_looks_right(chromium: str, written: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    shot = tmp_path / "page.png"
    command = [chromium, *BROWSER, f"--user-data-dir={tmp_path / 'user'}", f"--screenshot={shot}"]
    subprocess.run(
        [*command, (written / "report.html").as_uri()], capture_output=True, timeout=240, check=True
    )
    image = imread(shot)[..., :3]
    assert image.shape[1] == 1160
    inked = (image < 0.9).any(axis=-1)
    assert 0.01 < inked.mean() < 0.5
    assert not inked[:, -4:].any()  # nothing runs off the page
    orange = np.abs(image - [0xD5 / 255, 0x5E / 255, 0]).max(axis=-1) < 0.05
    assert orange.sum() > 200  # the curve of the predictor alone


def test_parts_that_all_but_vanish_are_still_told_apart() -> None:
    """A score goes by the logits, as that of ``evaluate``: softmax may leave nothing of them."""
    from pointcanon.eval.sweep import _score

    class Halves:
        part_ranges = (range(2), range(2, 4))

    logits = torch.tensor([[[0.0, 5.0, 200.0, 0.0]] * 3])
    batch = {
        "label": torch.tensor([0]),
        "parts": torch.tensor([[1, 1, 1]]),
        "index": torch.tensor([0]),
    }
    assert _score(logits, batch, Halves(), restricted=True).tolist() == [1.0]  # type: ignore[arg-type]
