"""The page of `megatron-oreal view` in a real browser: what it shows, its keys, and text that would like to be code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron_oreal.reports.viewer.page import write_page
from megatron_oreal.reports.viewer.samples import ViewedRun, read_run
from megatron_oreal.reports.viewer.selection import ORDERS, Filters, in_order, parse_bounds
from tests.support.browser import INSTALL, open_browser, open_watched, wait_until_ready
from tests.support.viewed_runs import row, write_rows, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

HOSTILE = (
    '</script><script>document.title = "owned"</script><img src=x onerror=\'document.title = "owned"\'>'
    "<!--<script> \u202egnp.exe \x1b[31m \x00 {{script}} $& \ud800 \u2028 ]]> '\"&lt; \\boxed{2}"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        if found is None:
            pytest.skip(INSTALL)
        yield found


Open = Callable[[Path], "Page"]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens a page offline; a script's error, a refused script, or a request for another file fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 800}, offline=True)
    problems: list[str] = []

    yield lambda path: open_watched(context, path, problems)
    context.close()
    assert not problems


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ViewedRun:
    folder = write_run(tmp_path_factory.mktemp("run") / "run", 3, 12, 4, response_tokens=30, recorded_groups=6)
    return read_run(folder)


@pytest.fixture(scope="module")
def page_file(run: ViewedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(file, run)
    return file


def selected(page: Page) -> tuple[int, int]:
    """The step and the row of the sample that is shown."""
    text = page.locator("#facts div", has_text="row").last.locator("dd").inner_text()
    step, number = text.split(", row ")
    return int(step), int(number)


def fill(page: Page, name: str, value: str) -> None:
    page.fill(name, value)
    page.wait_for_timeout(200)  # The page waits a little for the next key.


def num_shown(page: Page) -> int:
    return int(page.inner_text("#count").split()[0])


@pytest.mark.parametrize(
    ("actions", "filters"),
    [
        ([("#step-low", "1"), ("#step-high", "1")], Filters(steps=parse_bounds("1", ""))),
        ([("#reward-high", "0.5")], Filters(rewards=parse_bounds(":0.5", ""))),
        ([("#tokens-low", "20"), ("#tokens-high", "40")], Filters(tokens=parse_bounds("20:40", ""))),
        ([("#search", "DISCRIMINANT is")], Filters(search="discriminant is")),
        ([("#search", "1-7")], Filters(search="1-7")),
    ],
)
def test_the_page_filters_as_the_table_does(
    open_page: Open, page_file: Path, run: ViewedRun, actions: list[tuple[str, str]], filters: Filters
) -> None:
    page = open_page(page_file)
    assert num_shown(page) == len(run.samples)
    for name, value in actions:
        fill(page, name, value)
    expected = len(list(filter(filters.hold, run.samples)))
    assert 0 < expected < len(run.samples)
    assert num_shown(page) == expected
    page.locator("#clear").click()
    assert num_shown(page) == len(run.samples)


def test_boxes_choose_statuses_data_sets_and_disagreement(open_page: Open, page_file: Path, run: ViewedRun) -> None:
    page = open_page(page_file)
    page.locator("#status-set label", has_text="no_answer").locator("input").check()
    page.locator("#source-set label", has_text="gsm8k").locator("input").check()
    page.wait_for_timeout(200)
    both = Filters(statuses=("no_answer",), sources=("gsm8k",))
    assert num_shown(page) == len(list(filter(both.hold, run.samples)))
    page.keyboard.press("x")
    page.keyboard.press("d")
    page.wait_for_timeout(200)
    assert num_shown(page) == sum(sample.judge_disagrees for sample in run.samples) > 0


@pytest.mark.parametrize("order", ORDERS)
def test_the_page_orders_as_the_table_does(open_page: Open, page_file: Path, run: ViewedRun, order: str) -> None:
    page = open_page(page_file)
    page.select_option("#order", order)
    shown = []
    for _ in range(12):
        shown.append(selected(page))
        page.keyboard.press("j")
    assert shown == [(sample.step, sample.row) for sample in in_order(run.samples, order)[:12]]


def test_keys_move_through_samples_groups_and_tokens(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    page.select_option("#order", "run")
    assert selected(page) == (0, 0)
    for key, place in [("End", (2, 47)), ("Home", (0, 0)), ("ArrowDown", (0, 1)), ("k", (0, 0)), ("PageDown", (0, 10)),
                       ("n", (0, 12)), ("p", (0, 11)), ("]", (0, 8)), ("[", (0, 11))]:  # fmt: skip
        page.keyboard.press(key)
        assert selected(page) == place, key
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token-line").startswith("token 1 of ")
    assert "trainer - engine" in page.inner_text("#token-line")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("g")
    assert page.locator(".card").count() == 4 and page.locator(".card.selected").count() == 1
    page.locator(".card").first.click()
    assert selected(page) == (0, 8)
    page.keyboard.press("/")
    page.keyboard.type("jjj")
    page.wait_for_timeout(200)
    assert page.input_value("#search") == "jjj" and num_shown(page) == 0
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible() and page.locator("#keys tr").count() > 15
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


def test_colours_follow_the_recorded_values(open_page: Open, tmp_path: Path) -> None:
    """Weights 0.2, 0.1 and 0 of a sample with a negative advantage: full, half and no strength of "down"."""
    write_rows(tmp_path / "run/rollouts/step_000000.jsonl", [row(reward=0.0, status="incorrect")])
    tokens = {
        "row": 0, "texts": ["a", "\u5b57", ""], "logprobs": [-5.0, -2.5, None], "differences": [0.5, -1.0, 0.0],
        "weights": [0.2, 0.1, 0.0], "advantages": [-0.5],
    }  # fmt: skip
    write_rows(tmp_path / "run/rollout_tokens/step_000000.jsonl", [tokens])
    write_page(tmp_path / "page.html", read_run(tmp_path / "run"))
    page = open_page(tmp_path / "page.html")

    def colours() -> list[tuple[str, str]]:
        script = "all => all.map(t => [t.className, t.style.getPropertyValue('--strength')])"
        found: list[Any] = page.locator(".token").evaluate_all(script)
        return [(name.replace("token", "").strip(), strength) for name, strength in found]

    assert colours() == [("down", "0.620"), ("down", "0.310"), ("down silent", "")]
    page.keyboard.press("c")
    assert page.input_value("#colour") == "difference"
    assert colours() == [("more", "0.310"), ("less", "0.620"), ("less silent", "")]
    page.select_option("#colour", "logprob")
    assert colours() == [("rare", "0.620"), ("rare", "0.310"), ("rare silent", "")]
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token-line").split("   ")[1:] == [
        '"a"', "log-prob -5", "trainer - engine 0.5", "weight 0.2", "advantage -0.5",
    ]  # fmt: skip


def test_what_a_model_writes_is_only_shown(open_page: Open, tmp_path: Path) -> None:
    hostile = row(
        response=HOSTILE, prompt=HOSTILE, answer=HOSTILE, extracted=HOSTILE, source=HOSTILE, status=HOSTILE,
        prompt_id=HOSTILE, finish_reason=HOSTILE, judge=HOSTILE,
    )  # fmt: skip
    folder = tmp_path / "<b>run & {{script}}"
    write_rows(folder / "rollouts/step_000000.jsonl", [hostile, row(response="")])
    token = {"row": 0, "texts": [HOSTILE], "weights": [1.0]}
    write_rows(folder / "rollout_tokens/step_000000.jsonl", [token])
    write_page(tmp_path / "page.html", read_run(folder))
    page = open_page(tmp_path / "page.html")
    for key in ("Home", "j", "g", "ArrowRight", "c", "g", "k", "j"):
        page.keyboard.press(key)
    assert page.title() == "Samples of <b>run & {{script}}"
    assert page.locator("body img, body b, #rows script, #detail script").count() == 0
    text = page.locator("#bodies .text").inner_text()
    assert '</script><script>document.title = "owned"</script>' in text and "{{script}} $&" in text
    assert "\u27e8U+202E\u27e9" in text and "\u241b[31m" in text  # visible, and without effect


def test_the_address_keeps_the_view(open_page: Open, page_file: Path) -> None:
    page = open_page(page_file)
    fill(page, "#step-low", "2")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    before = selected(page), num_shown(page)
    page.reload()
    wait_until_ready(page)
    assert (selected(page), num_shown(page)) == before
    for nonsense in ("#%", "#null", "#[1]", '#{"filters":{"step":"x","status":[1]},"order":"constructor","at":[9,9]}'):
        page.goto("about:blank")
        page.goto(page_file.as_uri() + nonsense)
        wait_until_ready(page)


def test_the_list_holds_only_what_is_in_sight(open_page: Open, page_file: Path, run: ViewedRun) -> None:
    page = open_page(page_file)
    assert page.locator(".row").count() < 40 < len(run.samples)
    page.keyboard.press("End")
    page.wait_for_timeout(100)
    assert page.locator('.row[aria-selected="true"]').count() == 1
    assert page.locator(".row").count() < 40


def test_the_rest_of_a_long_response_is_shown_on_demand(open_page: Open, tmp_path: Path) -> None:
    write_rows(tmp_path / "run/rollouts/step_000000.jsonl", [row(), row(response="x" * 20_001)])
    write_rows(tmp_path / "run/rollout_tokens/step_000000.jsonl", [{"row": 0, "texts": ["y "] * 2001}])
    write_page(tmp_path / "page.html", read_run(tmp_path / "run"))
    page = open_page(tmp_path / "page.html")
    page.select_option("#order", "run")
    page.keyboard.press("g")
    assert page.locator(".token").count() == 2000
    page.locator("button", has_text="show 1 more tokens").click()
    page.locator("button", has_text="show 1 more characters").click()
    assert page.locator(".token").count() == 2001
    assert page.locator(".card").last.locator(".text").inner_text() == "x" * 20_001


def test_a_page_without_samples_says_so(open_page: Open, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/step_000000.jsonl").write_text("")
    write_page(tmp_path / "page.html", read_run(tmp_path))
    page = open_page(tmp_path / "page.html")
    assert num_shown(page) == 0 and "No sample" in page.inner_text("#rows")
    for key in "jknpgcw[]dx":
        page.keyboard.press(key)
    page.keyboard.press("ArrowRight")


def test_text_is_readable_on_every_colour(open_page: Open, page_file: Path) -> None:
    """Text on the strongest colours has a contrast of at least 4.5, as accessibility guidelines ask, in both themes."""
    page = open_page(page_file)
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        assert min(page.evaluate(CONTRASTS)) >= 4.5, theme


CONTRASTS = """() => {
  const style = getComputedStyle(document.documentElement);
  const hex = (name) => style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const [ground, ink, soft] = ["--ground", "--ink", "--soft"].map(hex);
  const on = (name) => style.getPropertyValue(name).trim().split(/\\s+/)
    .map((value, i) => STRONGEST * Number(value) + (1 - STRONGEST) * ground[i]);
  const strong = ["--up", "--down", "--more", "--less", "--rare"].map((name) => contrast(ink, on(name)));
  const words = ["--good", "--bad", "--warn"]
    .map((name) => contrast(style.getPropertyValue(name).trim().split(/\\s+/).map(Number), ground));
  return [...strong, ...words, contrast(ink, ground), contrast(soft, ground)];
}"""
