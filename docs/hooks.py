"""What MkDocs has to be told of this repository.

Links in Markdown are those of the repository, so that they work there as well; files that lie
outside ``docs/`` come into the site under their own names. Docstrings are written with the roles of
reStructuredText, which become links.
"""

from __future__ import annotations

import posixpath
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from griffe import Alias, Docstring, Extension, Module, NameResolutionError, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = ("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
"""Files that come into the site beside ``docs/``, and :data:`FOLDERS` of them."""

FOLDERS = ("examples/*.py", "benchmarks/*.py", "train/recipes/*.yaml", "tests/fuzz/*.py")

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
README = "<!-- the beginning of the README -->"
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([^`<]+)`")
TABLE = re.compile(r"^=+(?: +=+)+\n(?:.+\n)+=+(?: +=+)+$", re.MULTILINE)
SESSION = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    paths = [path for pattern in (*OUTSIDE, *FOLDERS) for path in sorted(ROOT.glob(pattern))]
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links of the site; the README's beginning where it is asked for."""
    here = page.file.src_uri
    source = here if here in OUTSIDE else f"docs/{here}"
    markdown = _relinked(markdown, source, here)
    if README not in markdown:
        return markdown
    beginning = (ROOT / "README.md").read_text().split("\n## ")[0].split("\n", 1)[1]
    return markdown.replace(README, _relinked(beginning, "README.md", here))


def _relinked(markdown: str, source: str, here: str) -> str:
    """Links as they lead from the page ``here`` of the site.

    Args:
        markdown: With links as they lead from ``source``.
        source: A file of the repository.
        here: A page of the site.
    """

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        target = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(link, markdown)


class Docstrings(Extension):
    """Docstrings as Markdown."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        self._convert(pkg)

    def _convert(self, found: Object) -> None:
        if found.docstring is not None:
            found.docstring.value = _as_markdown(found.docstring, found)
        for member in found.members.values():
            if not isinstance(member, Alias):
                self._convert(member)


def _as_markdown(docstring: Docstring, owner: Object) -> str:
    text = re.sub(r"::$", ":", docstring.value, flags=re.MULTILINE)
    text = TABLE.sub(r"```text\n\g<0>\n```", text)
    text = SESSION.sub(r"```pycon\n\g<0>\n```", text)
    return ROLE.sub(lambda role: _reference(role, owner), text)


def _reference(role: re.Match[str], owner: Object) -> str:
    """A link where the reference has the name; else the name alone."""
    name = role[2]
    shown = name.rsplit(".", 1)[-1] if role[1] else name
    with suppress(NameResolutionError):  # it is whole already
        name = owner.resolve(name)
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'
