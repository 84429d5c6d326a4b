"""Opens a real headless browser for the tests of pages: Playwright drives the system's Chromium or its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
INSTALL = "needs a browser: pip install -e '.[browser]', and apt-get install chromium or playwright install chromium"


@contextmanager
def open_browser() -> Iterator[Browser | None]:
    """Yields a browser, or None if Playwright or Chromium is missing."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        yield None
        return
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, as in most containers; the tests open our own pages only.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            browser = playwright.chromium.launch(executable_path=found, args=arguments)
        except Error:
            yield None
            return
        try:
            yield browser
        finally:
            browser.close()


def open_watched(context: BrowserContext, path: Path, problems: list[str]) -> Page:
    """Opens a file; adds the errors of its scripts, and every request for another file, to `problems`."""
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    wait_until_ready(page)
    return page


def wait_until_ready(page: Page, timeout_seconds: float = 60) -> float:
    """Waits until a page of the viewer can be used; returns the milliseconds since its navigation began."""
    page.wait_for_selector("html[data-ready]", timeout=1000 * timeout_seconds)
    return float(page.evaluate("document.documentElement.dataset.ready"))
