"""What a user installs: one import package, versions that agree, and a light import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pointcanon

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml; Python 3.11 has it")

CHECKOUT = Path(__file__).resolve().parents[1]

CONDA_NAMES = {
    "pytorch": "torch",
    "pytorch_geometric": "torch-geometric",
    "matplotlib-base": "matplotlib",
}
"""conda-forge packages called otherwise on PyPI."""

NAMED_BY_THE_PROJECT = {
    "torch",
    "torch-geometric",
    "pytorch3d",
    "trimesh",
    "h5py",
    "numpy",
    "e3nn",
}

USED = ("export", "fast", "logs")
"""Extras for users; the others are for who works on the project."""

NOT_AT_IMPORT = ("lightning", "e3nn", "trimesh", "matplotlib", "torch_geometric", "h5py")


def project() -> dict:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"].values()
    lines = [*project()["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith("pointcanon[")]


def constraints() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pins}


def environment() -> tuple[dict[str, str | None], list[str]]:
    """Versions of the conda part by their names on PyPI, and the lines of the pip part."""
    *conda, last = yaml.safe_load((CHECKOUT / "environment.yml").read_text())["dependencies"]
    versions: dict[str, str | None] = {}
    for line in conda:
        name, _, version = line.partition("=")
        versions[CONDA_NAMES.get(name, name)] = version or None
    return versions, last["pip"]


@pytest.mark.parametrize("name", ["datasets", "train", "eval"])
def test_the_top_level_folders_are_linked_into_the_package(name: str) -> None:
    link = CHECKOUT / "pointcanon" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (CHECKOUT / name / "__init__.py").is_file()


def test_the_licences_of_all_that_users_install_are_listed() -> None:
    rows = re.findall(r"^\| (.*?) \| .* \|$", (CHECKOUT / "SECURITY.md").read_text(), re.MULTILINE)
    listed = [name for row in rows for name in row.split(", ")]
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for of in USED for line in extras[of])]
    needed = {str(canonicalize_name(Requirement(line).name)) for line in lines}
    assert set(listed) == needed | {"required", "optional"}
    assert needed <= set(constraints())


def test_constraints_pin_every_requirement_within_its_range() -> None:
    pins = constraints()
    for requirement in requirements():
        name = str(canonicalize_name(requirement.name))
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} is not {requirement}"


def test_the_conda_environment_agrees_with_the_constraints() -> None:
    pins = constraints()
    conda, pip = environment()
    assert set(conda) >= NAMED_BY_THE_PROJECT
    pinned = {name: version for name, version in conda.items() if name in pins}
    assert pinned == {name: pins[name] for name in pinned}
    assert pip[0] == "-c constraints.txt"
    assert pip[-1] == "-e .[dev]"
    for line in pip[1:-1]:
        requirement = Requirement(line)
        assert str(requirement.specifier) == f"=={pins[canonicalize_name(requirement.name)]}"


def test_the_conda_environment_has_every_required_package() -> None:
    conda, pip = environment()
    from_pip = {Requirement(line).name for line in pip[1:-1]}
    for line in project()["dependencies"]:
        assert Requirement(line).name in {*conda, *from_pip}


def test_versions_agree() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"] == "Apache-2.0"
    assert "Apache License" in (CHECKOUT / "LICENSE").read_text()


def test_import_is_light() -> None:
    code = (
        "import sys, pointcanon\n"
        f"print(*(name for name in {NOT_AT_IMPORT!r} if name in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert answer.stdout.split() == []


def test_the_upper_floors_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, pointcanon as pc\n"
        "floors = [f'pointcanon.{name}' for name in ('datasets', 'train', 'eval')]\n"
        "assert {'datasets', 'train', 'eval'} <= set(dir(pc))\n"
        "assert not {'pointcanon.train', 'pointcanon.eval'} & set(sys.modules)\n"
        "assert [m.__name__ for m in (pc.datasets, pc.train, pc.eval)] == floors\n"
        "assert callable(pc.datasets.load)\n"
        f"print(*(name for name in {NOT_AT_IMPORT!r} if name in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert answer.stdout.split() == []
    with pytest.raises(AttributeError, match="no attribute 'dataset'"):
        pointcanon.dataset  # noqa: B018


def test_make_and_ci_name_the_same_checks() -> None:
    targets = re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"install", "demo", "test", "lint", "wheel", "clean"} <= set(targets)
    script = CHECKOUT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


@pytest.mark.slow
def test_a_wheel_holds_only_the_import_package(tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    shutil.copytree(
        CHECKOUT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__"),
    )
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"pointcanon"}
    for package in ("", "datasets/", "train/", "eval/", "predictors/", "canonicalizers/", "cli/"):
        assert f"pointcanon/{package}__init__.py" in names
    assert "pointcanon/py.typed" in names
    recipes = {f"pointcanon/train/recipes/{f.name}" for f in CHECKOUT.glob("train/recipes/*.yaml")}
    assert recipes
    assert recipes <= names
    _installs_one_package(wheel, tmp_path / "installed", recipes)


def _installs_one_package(wheel: Path, target: Path, recipes: set[str]) -> None:
    """A package called ``datasets`` beside it would overwrite the one of Hugging Face."""
    options = ["--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *options, str(wheel)], check=True
    )
    found = {path.name for path in target.iterdir() if path.name != "bin"}
    assert found == {"pointcanon", f"pointcanon-{project()['version']}.dist-info"}
    assert all((target / recipe).is_file() for recipe in recipes)
    code = "import pointcanon.datasets, pointcanon.eval.evaluate; print(pointcanon.__file__)"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=target.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(answer.stdout.strip()) == target / "pointcanon" / "__init__.py"
