"""The pages in a real browser, from file://, on a desk, a phone and paper."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Error, Page, sync_playwright

from dafm_ray.config import DatasetConfig, EvaluateConfig, StudyConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.fusion.search import Found
from dafm_ray.fusion.study import settings_of
from dafm_ray.fusion.trial import run_trial
from dafm_ray.report.answer import answer_page
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.figures import read_figure
from dafm_ray.report.study import report_study
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid
from dafm_ray.tiles.store import Failure, TileStore
from tests.samples import cirr_dataset, labelled_dataset, picture, score_store

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESK, PHONE, A4 = 1280, 390, 794  # widths in pixels
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
MOST_BYTES = 3_000_000

HOSTILE = (
    "<script>console.error(1)</script>",
    "\"'><img src=x onerror=console.error(2)>",
    "</style></title></h4>",
    "\u202e\u05d0\u05d7\u05e8 \u0623\u062d\u0645\u0631",
)
LONG = "blip2_pretrain_coco_with_an_unusually_long_name_of_its_checkpoint"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """DAFM_BROWSER, one that is installed, or playwright's own."""
    found = os.environ.get("DAFM_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            message = f"there is no browser to open the pages with: {error}"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        yield started
        started.close()


def hostile_icons(root: Path) -> TileStore:
    dataset = load_dataset(DatasetConfig("icons", "val"))
    queries = tuple(replace(query, captions=HOSTILE) for query in dataset.queries[:200])
    grid = Grid(64, 200, 2048)
    return score_store(root, replace(dataset, queries=queries), ("a", LONG), grid, signal=3.0)


def report(root: Path, stores: Sequence[TileStore], *fusions: str) -> Path:
    uris = tuple(store.uri for store in stores)
    return evaluate(EvaluateConfig(store=uris, out=str(root / "out"), fusions=fusions)).report


def icons(root: Path) -> Path:
    return report(root, [hostile_icons(root / "store")], "mean@zscore", "rrf")


def cirr(root: Path) -> Path:
    """With published rows, fusions that are compared, and items that failed."""
    store = score_store(root / "store", cirr_dataset(60, 90), ("clip4cir-sum", "tgcir", "sprc"))
    reason = "it cannot be decoded: the file is truncated after 12,288 of 40,960 bytes"
    store.quarantine("gallery", 0, [Failure("gallery", store.gallery_ids[0], reason)])
    return report(root, [store], "mean@zscore", "rrf", "borda", "combmnz@minmax")


def fashioniq(root: Path) -> Path:
    stores = []
    for seed, category in enumerate(("dress", "shirt", "toptee")):
        made = labelled_dataset(60, 30, seed, policy="keep")
        queries = tuple(
            replace(q, id=f"{category} {q.id}", category=category) for q in made.queries
        )
        dataset = replace(made, name="fashioniq", protocol="fashioniq", queries=queries)
        stores.append(score_store(root / category, dataset, seed=seed))
    return report(root, stores, "mean@zscore", "rrf")


def study(root: Path) -> Path:
    """All its trials are recorded before, so that it has none to start."""
    store = score_store(root / "store", labelled_dataset(60, 90), ("tgcir", LONG))
    fusion = {"store": store.uri, "recipe": {"epochs": 1, "batch": 64}, "network": {"width": 2}}
    config = StudyConfig("orders", fusion, str(root / "study"), first="tgcir")
    for setting in settings_of(config, store.models, "tgcir"):
        run_trial(config, setting, open_storage(config.out))
    return Path(report_study(config).out, "report.html")


def answer(root: Path) -> Path:
    store = hostile_icons(root / "store")
    found = [Found(n, id, 1 / n) for n, id in enumerate(store.gallery_ids[:12], 1)]
    text = answer_page(store, LONG, picture(0), HOSTILE, found, ["Query bank: none."])
    (root / "answer.html").write_text(text, encoding="utf-8")
    return root / "answer.html"


@pytest.fixture(
    scope="module", params=[icons, cirr, fashioniq, study, answer], ids=lambda f: f.__name__
)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Page:
    return browser.new_page()


@pytest.fixture
def page(tab: Page, file: Path) -> Page:
    tab.set_viewport_size({"width": DESK, "height": 800})
    tab.goto(file.as_uri())
    return tab


def test_a_page_loads_nothing_runs_nothing_and_complains_of_nothing(browser, file):
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert page.locator("script").count() == 0
    assert page.locator("style").count() == 1
    assert file.stat().st_size < MOST_BYTES
    page.close()


@pytest.mark.parametrize("file", [icons, answer], indirect=True)
def test_hostile_text_is_shown_as_it_is(page):
    for caption in HOSTILE:
        assert caption in page.locator(".query").first.text_content()


def test_every_image_is_drawn_and_described(page):
    images = page.locator("img").evaluate_all(
        "all => all.map(e => [e.complete && e.naturalWidth > 0, e.alt.trim()])"
    )
    assert images
    assert all(drawn and alt for drawn, alt in images)


def test_every_link_within_the_page_has_one_target(page):
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    links = page.locator("a[href^='#']").evaluate_all("all => all.map(e => e.hash.slice(1))")
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)


def test_headings_skip_no_level(page):
    levels = page.locator("h1, h2, h3, h4, h5, h6").evaluate_all(
        "all => all.map(e => +e.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_axe_finds_nothing(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    found = Axe().run(page, options={"runOnly": RULES, "resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page):
    page.set_viewport_size({"width": PHONE, "height": 800})
    expected = page.evaluate(
        """() => {
            const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
            const all = [...document.body.querySelectorAll("*")];
            const wanted = all.filter(e => e.matches("a[href], summary") || scrolls(e));
            return wanted.map((e, n) => (e.dataset.stop = n, n));
        }"""
    )
    reached = []
    for _ in range(len(expected) + 1):
        page.keyboard.press("Tab")
        stop, outline = page.evaluate(
            """() => {
                const style = getComputedStyle(document.activeElement);
                const outline = style.outlineStyle == "none" ? 0 : parseFloat(style.outlineWidth);
                return [document.activeElement.dataset.stop, outline];
            }"""
        )
        if stop is None:
            break
        reached.append(int(stop))
        assert outline >= 2
    assert reached == expected


# What sticks out to the right, of the page or of its table's region, or does not fit its own box;
# `scrolls`: unless that region can be scrolled.
CUT_OFF = """scrolls => [...document.body.querySelectorAll("*")].filter(e => {
    const region = e.parentElement.closest(".scroll");
    if (scrolls && region && getComputedStyle(region).overflowX == "auto") return false;
    const edge = (region ?? document.body).getBoundingClientRect().right;
    const spills = getComputedStyle(e).overflowX == "visible" && e.scrollWidth > e.clientWidth + 1;
    return e.getBoundingClientRect().right > edge + 1 || (e.clientWidth && spills);
}).map(e => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize(("width", "scrolls"), [(DESK, False), (PHONE, True)])
def test_nothing_is_cut_off_and_only_tables_scroll_sideways(page, width, scrolls):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CUT_OFF, scrolls) == []


def test_a_print_is_whole(page):
    """Measured while the browser lays the sheets out."""
    page.evaluate(
        f"""() => matchMedia("print").addEventListener("change", print => {{
            if (print.matches) window.printed = [document.body.clientWidth, ({CUT_OFF})(false)];
        }})"""
    )
    page.pdf(format="A4", prefer_css_page_size=True)
    width, cut_off = page.evaluate("printed")
    assert width < A4
    assert cut_off == []


@pytest.mark.parametrize("file", [study], indirect=True)
def test_the_orders_of_a_study_are_a_figure_for_other_reports(file):
    assert "fused models" in read_figure(file.parent / "figures" / "orders.svg").caption
