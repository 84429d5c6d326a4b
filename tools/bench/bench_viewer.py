"""Measures how long a browser takes to open the page of `megatron-oreal view`, and to answer a search.

    pip install -e '.[browser]' && apt-get install chromium
    python -m tools.bench.bench_viewer

The samples are random: 500 words a response on average, from 20 steps. "tokens" records the tokens of an eighth of
them. Opening ends when the first rows are painted and the keys work. The bound is 3 s for 10,000 samples.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click

from megatron_oreal.reports.curves import format_table
from megatron_oreal.reports.viewer.page import write_page
from megatron_oreal.reports.viewer.samples import read_run
from tests.support.browser import INSTALL, open_browser, wait_until_ready
from tests.support.viewed_runs import write_run

NUM_STEPS, GROUPS_PER_STEP, GROUP_SIZE = 20, 64, 8
SEARCH = "state => { const start = performance.now(); select(state, 'worst'); return performance.now() - start; }"


@click.command()
@click.option("--samples", default=10_000, type=click.IntRange(1, NUM_STEPS * GROUPS_PER_STEP * GROUP_SIZE))
@click.option("--repeats", default=5, type=click.IntRange(min=1))
def main(samples: int, repeats: int) -> None:
    """Opens the page several times, each time in a new tab."""
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        if browser is None:
            raise click.ClickException(INSTALL)
        for name, recorded_groups in (("responses", 0), ("tokens", GROUPS_PER_STEP // 8)):
            run_dir = write_run(
                Path(folder) / name, NUM_STEPS, GROUPS_PER_STEP, GROUP_SIZE, recorded_groups=recorded_groups
            )
            file = Path(folder) / f"{name}.html"
            start = time.perf_counter()
            size = write_page(file, read_run(run_dir, limit=samples))
            seconds_to_write = time.perf_counter() - start
            opened, searched = [], []
            for _ in range(repeats):
                page = browser.new_page()
                page.goto(file.as_uri())
                opened.append(wait_until_ready(page) / 1000)
                filters = "{ ...noFilters(), search: 'discriminant is' }"
                searched.append([page.evaluate(f"({SEARCH})({filters})") / 1000 for _ in range(2)])
                page.close()
            first, again = (statistics.median(times) for times in zip(*searched, strict=True))
            opening = [statistics.median(opened), max(opened)]
            rows.append([name, samples, size / 1e6, seconds_to_write, *opening, first, again])
    header = ["page", "samples", "MB", "write s", "open s, median", "slowest", "first search s", "next search s"]
    click.echo(format_table(rows, header))


if __name__ == "__main__":
    main()
