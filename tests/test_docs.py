"""README and docs are true: Python and shell snippets run, commands parse, links lead somewhere.

The snippets of a page run in order, as one program, in a folder that holds what they name. What
needs a data set, or trains for minutes, is not run: its command line must parse.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trimesh
from public_formats import PublicPointNet

import pointcanon as pc
from pointcanon import checkpoint
from pointcanon.canonicalizers import PCA, Optimized
from pointcanon.cli import main, options
from pointcanon.datasets.parametric import ParametricShapes
from pointcanon.predictors import PointNet, PointNetParts
from pointcanon.train import run as training

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)

SOONER = {"minutes=30": "minutes=0.01, progress=False", "rotations=2": "rotations=1"}
"""What takes long in Python, and in its place."""

SECONDS = ["--minutes", "0.1"]
"""Of ``adapt``, whatever the snippet says."""

NOT_RUN = ("demo", "train")
"""Commands with tests of their own that take minutes."""

TRAINED = {"parts.md": "runs/parts/", "results.md": "runs/"}
"""What a page evaluates once its own training commands have run, for many minutes."""


def snippets(page: Path, language: str) -> list[str]:
    return [text for kind, text in SNIPPET.findall(page.read_text()) if kind == language]


def command_lines(page: Path) -> list[list[str]]:
    return [
        words
        for text in snippets(page, "bash")
        for line in text.replace("\\\n", " ").splitlines()
        for words in [shlex.split(line, comments=True)]
        if words
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [page for page in PAGES if snippets(page, "python")]
WITH_COMMANDS = [page for page in PAGES if command_lines(page)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages name, written by untrained networks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    shapes = ParametricShapes("test", num_points=64, size=16)
    known = {"coordinate_frame": "z-up", "normalisation": "unit-ball"}
    known["classes"] = tuple(shapes.classes)

    def described(network: torch.nn.Module, **more: object) -> torch.nn.Module:
        for name, value in {**known, **more}.items():
            setattr(network, name, value)
        return network.eval()

    network = described(PointNet(num_classes=16, widths=(8, 16), embedding=32))
    parts = described(
        PointNetParts(len(shapes.parts), widths=(8, 16, 16), embedding=32), parts=shapes.parts
    )
    for place in ("demo/predictor", "demo/canonicalizer", "runs/robust", "runs/parts-robust"):
        (folder / place).mkdir(parents=True)
    checkpoint.save(
        folder / "demo/predictor/best.safetensors", network, checkpoint.Card("predictor", **known)
    )
    small = Optimized(PCA(4), points=32, refiner_widths=(8, 16))
    pc.Canonicalized(network, small).save(folder / "demo/canonicalizer/best.safetensors")
    for place in ("robust.safetensors", "runs/robust/best.safetensors"):
        pc.Canonicalized(network, PCA(4)).save(folder / place)
    for place in ("parts.safetensors", "runs/parts-robust/best.safetensors"):
        pc.Canonicalized(parts, PCA(4)).save(folder / place)
    for name in ("pointnet.t7", "net.t7"):
        torch.save(PublicPointNet(40).state_dict(), folder / name)
    (folder / "my_package").mkdir()
    (folder / "my_package" / "networks.py").write_text(
        "def build():\n    return lambda points: points.square().sum(dim=1)\n"
    )
    for place in ("scans", "upright"):
        for item in (shapes[index] for index in range(16)):
            file = folder / place / shapes.classes[item["label"]] / "0.ply"
            file.parent.mkdir(parents=True)
            trimesh.PointCloud(item["points"].numpy()).export(file)
    return folder


@pytest.fixture
def workspace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the files, and the user's package."""
    folder = tmp_path / "workspace"
    shutil.copytree(models, folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    monkeypatch.delitem(sys.modules, "my_package.networks", raising=False)
    monkeypatch.setattr(checkpoint, "_CLASSES", dict(checkpoint._CLASSES))
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(page: Path, workspace: Path) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "snippet"}
    for snippet in snippets(page, "python"):
        for long, short in SOONER.items():
            snippet = snippet.replace(long, short)
        exec(compile(snippet, named(page), "exec"), names)
    if page.name == "README.md":
        back, points = names["back"], names["points"]
        assert isinstance(back, torch.Tensor)
        assert isinstance(points, torch.Tensor)
        torch.testing.assert_close(back, points[:, None].expand_as(back), atol=1e-5, rtol=0)


class Parsed(BaseException):
    """The arguments have been understood: nothing else is to be done."""


@pytest.fixture
def parsing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop once their arguments are parsed."""

    def stops(function):  # type: ignore[no-untyped-def]
        def stopped(*args: object, **kwargs: object) -> None:
            function(*args, **kwargs)
            raise Parsed

        return stopped

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(options.Parser, name, stops(getattr(options.Parser, name)))
    monkeypatch.setattr(options, "parse", stops(options.parse))
    monkeypatch.setattr(
        training._CLI, "before_instantiate_classes", stops(lambda self: None), raising=True
    )


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_the_commands_of_a_page_are_understood(
    page: Path, parsing_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for program, *arguments in command_lines(page):
        shown = shlex.join([program, *arguments])
        if program == "pointcanon":
            try:
                status: object = main(arguments)
            except Parsed:
                continue
            pytest.fail(f"{shown}: {status}")
        elif program == "make":
            assert {word for word in arguments if "=" not in word} <= {*targets}, shown
        elif program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).is_file(), shown
        else:
            assert program in ("python", "pip", "git", "conda", "torchrun"), shown


def runnable(words: list[str]) -> bool:
    """Whether a command needs neither a data set nor minutes."""
    return words[0] == "pointcanon" and words[1] not in NOT_RUN and "--data.root" not in words


def runs(page: Path) -> list[list[str]]:
    trained = TRAINED.get(page.name, "\0")
    return [
        words
        for words in command_lines(page)
        if runnable(words) and not any(word.startswith(trained) for word in words)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if runs(page)], ids=named)
def test_the_commands_of_a_page_run(
    page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _, command, *arguments in runs(page):
        if command == "adapt":
            arguments += SECONDS
        if command == "export":
            pytest.importorskip("onnxscript")
        status = main([command, *arguments])
        said = capsys.readouterr().err
        expected = {0, 1} if "--min-agreement" in arguments else {0}
        assert status in expected, f"{shlex.join([command, *arguments])}: {said}"


def test_every_relative_link_leads_to_a_file() -> None:
    for page in [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{named(page)}: {link}"


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    remote = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\"> ]+")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        assert remote.findall(page.read_text()) == [], page
