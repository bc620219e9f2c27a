"""The report in a real browser: it draws, sorts, tells, can be used without a mouse, and lets nothing of a run act."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from report_run import Bench, attribution, benchmark_payload, measurement, train_metrics, whole_run

from sievit.pipeline.report import page as report
from sievit.pipeline.report.facts import collect

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

DESKTOP, PHONE = (1200, 900), (390, 844)
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write(*whole_run(tmp_path_factory.mktemp("run")))[0]


@contextmanager
def opened(chromium: Any, path: Path, size: tuple[int, int] = DESKTOP, **context: Any) -> Iterator[Any]:
    """The page; in the end the console must have stayed empty, no dialog have opened and nothing have been asked of
    the network.
    """
    heard: list[str] = []
    place = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **context)
    page = place.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: heard.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    yield page
    place.close()
    assert heard == []


def violations(page: Any) -> list[tuple[str, str, str]]:
    """What axe-core finds, of whatever impact: rule, impact, the first element."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_whole_and_an_accessibility_checker_finds_nothing(
    chromium: Any, whole: Path, size: tuple[int, int], scheme: str
) -> None:
    with opened(chromium, whole, size, color_scheme=scheme) as page:
        assert page.locator("#tradeoff .point").count() == 5
        drawn = page.evaluate(
            "[...document.querySelectorAll('.canvas canvas')].map(c =>"
            " new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 8)"
        )
        assert drawn == [True] * 5  # loss and top-1 of train and of finetune, and the latencies
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], "the page itself never scrolls sideways"
        assert all(page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert violations(page) == []


def test_tables_sort_by_a_column_with_missing_values_at_the_end(chromium: Any, whole: Path) -> None:
    known = sorted(one["p99_ms"] for one in measurement()["rows"] if one["p99_ms"] is not None)
    with opened(chromium, whole) as page:
        table = page.locator("#deployment table")
        head = table.locator("thead th", has_text="p99")
        column = head.evaluate("head => head.cellIndex")
        for order, expected in (("ascending", known), ("descending", known[::-1])):
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") == order
            values = table.evaluate(
                "(table, column) => [...table.tBodies[0].rows].map(r => r.cells[column].dataset.sort ?? null)", column
            )
            assert [float(value) for value in values[: len(known)]] == expected
            assert set(values[len(known) :]) == {None}


def test_a_mark_tells_its_arm_stage_and_numbers_by_keyboard_pointer_and_finger(chromium: Any, whole: Path) -> None:
    told = "main INT8, by quantize p50 0.894 ms (0.876–0.921) top-1 97.6% (96.0–98.5%) speed-up 2.31×"
    with opened(chromium, whole) as page:
        tip, mark = page.locator("#tip"), page.locator(".point.shipped")
        assert tip.is_hidden()
        page.locator("#verdict").focus()
        for _ in range(12):  # the Tab key alone leads there
            page.keyboard.press("Tab")
            if mark.evaluate("mark => document.activeElement === mark"):
                break
        assert told in " ".join(tip.inner_text().split())
        box = tip.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= DESKTOP[0]
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.locator("h1").click()
        mark.locator("circle").hover()
        assert told in " ".join(tip.inner_text().split())
        page.mouse.move(2, 2)
        assert tip.is_hidden()
    with opened(chromium, whole, PHONE, has_touch=True, is_mobile=True) as page:
        page.locator(".point.baseline circle").tap()
        assert "dense FP32, by export" in page.locator("#tip").inner_text()
        page.locator("h1").tap()
        assert page.locator("#tip").is_hidden()


def test_the_arrow_keys_walk_along_a_curve_and_the_legend_says_the_numbers_of_the_table(
    chromium: Any, whole: Path
) -> None:
    with opened(chromium, whole) as page:
        plot = page.locator('[data-plot="latency"]')
        plot.focus()
        for _ in range(51):
            page.keyboard.press("ArrowRight")
        shown = plot.locator(".u-value").all_inner_texts()
        figure = page.locator(".curve", has=plot)
        figure.locator("summary").click()
        row = figure.locator("details tbody tr").nth(50).locator("th, td").all_inner_texts()
        assert [float(value.removesuffix(" ms")) for value in shown] == [float(value) for value in row]
        assert row[0] == "50"


def test_without_scripts_the_same_numbers_stand_in_tables(chromium: Any, whole: Path) -> None:
    with opened(chromium, whole, java_script_enabled=False) as page:
        assert page.locator(".canvas").first.is_hidden()
        figure = page.locator(".curve", has_text="train: loss").first
        figure.locator("summary").click()
        first = train_metrics(0.9)["curve"][0]
        assert figure.locator("tbody tr").first.inner_text().split() == ["0"] + [f"{first['loss']:.2f}"] * 3
        assert page.locator(".point title").first.text_content()


def test_names_that_look_like_code_show_as_text_in_flips_curves_and_marks(chromium: Any, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = measurement()["rows"]
    for one in rows:
        one["arm"] = HOSTILE if one["arm"] == "random" else one["arm"]
    files = attribution()
    files["files"][1]["arm"] = HOSTILE
    flips = [{**one, "arm": HOSTILE} for one in measurement()["flips"]]
    payload = benchmark_payload((HOSTILE, *"123456789"))
    payload["spread.json"] = payload["spread.json"].replace(b"main/quantize", f"{HOSTILE}/quantize".encode())
    for arm in ("main", "dense", HOSTILE):
        bench.add(arm, "train", train_metrics(0.9))
    metrics = {**measurement(), "rows": rows, "attribution": files, "flips": flips}
    bench.add("main", "benchmark", metrics, payload=payload, data={"classes": [HOSTILE]})
    html, _ = report.write(bench.record(), bench.shelf)
    with opened(chromium, html) as page:
        assert page.locator("script").count() == 2  # the data and our own
        for part in ("#flips .wall", "#blocks thead", "#curves .u-legend >> nth=0", "#latencies .u-legend"):
            assert HOSTILE in page.locator(part).first.inner_text(), part
        page.locator(".point", has_text=HOSTILE).first.focus()
        assert HOSTILE in page.locator("#tip").inner_text()


def test_other_pages_draw_without_errors_and_pass_the_accessibility_checker(chromium: Any, tmp_path: Path) -> None:
    """A run that failed, one that goes on, one of nothing at all, and two runs side by side."""
    failed = Bench(tmp_path / "failed")
    failed.add("main", "train", train_metrics(0.97))
    failed.node("main", "prune", state="failed", error="nothing was pruned: target.macs is 1.0")
    failed.node("main", "export")
    record, shelf = whole_run(tmp_path / "two")
    goes_on = report.render_html(collect(failed.record("running"), failed.shelf), live="going on", every=5)
    (tmp_path / "live.html").write_text(goes_on, encoding="utf-8")
    pages = [
        report.write(failed.record("failed"), failed.shelf)[0],
        tmp_path / "live.html",
        report.write({"id": "empty"}, failed.shelf)[0],
        report.write_beside([record, {**record, "id": "5e1fa0000000"}], shelf)[0],
    ]
    for path in pages:
        with opened(chromium, path, PHONE) as page:
            wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] <= wide[1], path
            assert violations(page) == [], path
