"""The page of `megatron-oreal report` in a real browser: charts are drawn, nothing is fetched, narrow screens fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_oreal.observability.alarm_log import AlarmEvent
from megatron_oreal.reports.run_report.command import write_report
from tests.support.browser import INSTALL, open_browser, wait_until_ready
from tests.support.reported_runs import write_training_run

pytestmark = pytest.mark.browser


def test_the_page_draws_its_charts(tmp_path: Path) -> None:
    runs = [write_training_run(tmp_path / f"run{seed}", 12, seed) for seed in range(2)]
    event = AlarmEvent(4, "entropy", True, "policy/entropy", 0.01, 0.05, "<img src=x onerror='document.title=1'>")
    (runs[0] / "alarms.jsonl").write_text(event.encode())
    out = tmp_path / "report.html"
    write_report([*runs, write_training_run(tmp_path / "other", 12, group_size=8)], out)
    problems: list[str] = []
    with open_browser() as browser:
        if browser is None:
            pytest.skip(INSTALL)
        context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True, color_scheme="light")
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("request", lambda request: problems.append(request.url) if request.url != out.as_uri() else None)
        page.goto(out.as_uri())
        wait_until_ready(page)
        page.wait_for_selector("figure canvas")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws all, as for a printer
        assert page.locator("figure").count() == page.locator("figure canvas").count() > 20
        assert page.title().startswith("Report: run0") and page.locator("img").count() == 0
        label = page.locator("figure .plot").first.get_attribute("aria-label")
        assert label is not None and "mean of 2 seeds" in label
        colours = "getComputedStyle(document.body).backgroundColor"
        light = page.evaluate(colours)
        page.click("#theme")
        assert page.evaluate(colours) != light
        toggle = page.locator("figure .legend button").first
        toggle.click()
        assert toggle.get_attribute("aria-pressed") == "false"
        page.set_viewport_size({"width": 380, "height": 800})
        page.wait_for_function("[...document.querySelectorAll('figure canvas')].every((one) => one.clientWidth < 380)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        context.close()
    assert not problems
