"""The page of `megatron-oreal report` in a real browser: charts are drawn, nothing is fetched, narrow screens fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_oreal.config import AlarmsConfig
from megatron_oreal.observability.alarm_log import AlarmLog
from megatron_oreal.reports.run_report.command import write_report
from tests.support.browser import INSTALL, open_browser, open_watched
from tests.support.reported_runs import write_training_run

pytestmark = pytest.mark.browser


def test_the_page_draws_its_charts(tmp_path: Path) -> None:
    runs = [write_training_run(tmp_path / f"run{seed}", 12, seed) for seed in range(2)]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "eval/<img src=x onerror='document.title=1'>/greedy": 0.5}) + "\n")
    log = AlarmLog(runs[0], 0, AlarmsConfig(), lambda _line: None)
    log.observe(4, {"policy/mismatch": 0.5})
    out = tmp_path / "report.html"
    write_report([*runs, write_training_run(tmp_path / "other", 12, group_size=8)], out)
    problems: list[str] = []
    with open_browser() as browser:
        if browser is None:
            pytest.skip(INSTALL)
        context = browser.new_context(viewport={"width": 1300, "height": 900}, offline=True, color_scheme="light")
        page = open_watched(context, out, problems)
        page.wait_for_selector("figure canvas")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")  # draws all, as for a printer
        assert page.locator("figure").count() == page.locator("figure canvas").count() > 20
        assert page.title().startswith("Report: run0") and page.locator("img").count() == 0
        label = page.locator("figure .plot").first.get_attribute("aria-label")
        assert label is not None and "mean of 2 seeds" in label
        assert page.locator("figure .plot[aria-label*='alarm run0: mismatch at step 4']").count() == 1
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
