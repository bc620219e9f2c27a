"""The documentation: made from the code, with links that lead somewhere; nothing in it asks anything of the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from pydantic import Field

from sievit.pipeline.stage import Config
from sievit.stages.__main__ import STAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    pytest.importorskip("mkdocs")
    import importlib.util

    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation; --strict ends in an error for a link that leads nowhere."""
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_stage_decision_and_command_has_its_place(site: Path) -> None:
    assert {path.stem for path in (site / "stages").glob("*.html")} == {stage.name for stage in STAGES}
    decisions = {path.stem for path in (ROOT / "docs" / "decisions").glob("*.md")}
    assert {path.stem for path in (site / "decisions").glob("*.html")} == decisions
    home = (site / "index.html").read_text(encoding="utf-8")
    for name in decisions:
        assert f"decisions/{name}.html" in home
    commands = (site / "commands.html").read_text(encoding="utf-8")
    from test_architecture import OPTIONS

    for name in filter(None, OPTIONS):
        assert f'id="sievit-{name}"' in commands
    assert not list(site.glob("**/*.py"))


def test_no_page_fetches_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?://[^"]*)"', text)
        assert not fetched, page


def test_every_setting_of_every_stage_is_in_its_table_with_a_meaning(site: Path) -> None:
    for stage in STAGES:
        text = (site / "stages" / f"{stage.name}.html").read_text(encoding="utf-8")
        rows = re.findall(r"<tr>\s*<td><code>([\w.]+)</code></td>(.*?)</tr>", text, re.DOTALL)
        shown = {name for name, _ in rows}
        assert set(stage.config.model_fields) <= shown
        assert all(len(re.findall(r"<td", rest)) == 3 for _, rest in rows), "a bar in a cell has split it"
        assert "\\|" not in text


class Inner(Config):
    """What lies within."""

    rate: float = Field(default=0.5, gt=0, le=1, description="a <rate> with | a bar and_an_underscore")


class Outer(Config):
    way: Literal["one", "two"] | None = None
    inner: Inner | None = None
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 8)
    pair: tuple[float, float] = (0.0, 1.0)
    whole: Inner = Inner(rate=0.25)
    must: str


def test_settings_are_told_with_type_default_and_bounds(pages: ModuleType) -> None:
    found = {path: (kind, default) for path, kind, default, _ in pages.settings(Outer)}
    assert found == {
        "way": ("one | two | null", "null"),
        "inner": ("mapping | null", "null"),
        "inner.rate": ("number > 0, ≤ 1", "0.5"),
        "sizes": ("list of whole number ≥ 1", "[1, 8]"),
        "pair": ("[number, number]", "[0.0, 1.0]"),
        "whole": ("mapping", '{"rate": 0.25}'),
        "whole.rate": ("number > 0, ≤ 1", "0.5"),
        "must": ("text", "(must be given)"),
    }
    meaning = {path: meaning for path, _, _, meaning in pages.settings(Outer)}
    assert meaning["inner"] == "What lies within."


def test_what_markdown_would_take_for_markup_stands_for_itself(pages: ModuleType) -> None:
    import markdown

    text = "a <b> of *all* `x_<y>` and_so_on [here]{there}"
    html = markdown.markdown(pages.escaped(text))
    plain = re.sub(r"</?(?:p|code)>", "", html).replace("&lt;", "<").replace("&gt;", ">")
    assert plain == text.replace("`", "")


def test_links_without_a_form_that_can_be_followed_are_found(pages: ModuleType) -> None:
    good = "[a](https://example.org/x) [b](numbers.md)"
    assert pages.wrong_links(good) == []
    bad = ["http://example.org", "https://", "https:/example.org", "https://localhost/x"]
    assert pages.wrong_links(" ".join(f"[x]({link})" for link in bad)) == bad


def test_a_broken_link_fails_the_strict_build(tmp_path: Path, site: Path) -> None:
    """The silence above is worth something only if it is not silent here."""
    import shutil

    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (docs / "numbers.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](nothing.md) and [no scheme](http://example.org)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "out")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "nothing.md" in done.stderr and "http://example.org" in done.stderr
