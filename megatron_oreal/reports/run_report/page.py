"""Writes the report as one page of HTML that needs no other file and no network.

uPlot (MIT licence), whose script is part of the page, draws the charts. The page's policy lets a browser run only that
script and the page's own; the page shows everything that a run wrote as text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files

from megatron_oreal.reports.run_report.sections import Section
from megatron_oreal.reports.viewer.page import PLACEHOLDER, as_ascii, data_element, source_hash


def render_report(title: str, lead: str, sections: Sequence[Section]) -> str:
    library, script = read_part("uPlot.iife.min.js"), read_part("report.js")
    style = read_part("uPlot.min.css") + read_part("report.css")
    scripts = f"{source_hash(library)} {source_hash(script)}"
    # uPlot sets the sizes of its elements by script, which every style-src allows.
    policy = f"default-src 'none'; script-src {scripts}; style-src {source_hash(style)}; base-uri 'none'"
    charts = [chart for section in sections for chart in section.charts]
    body, links = [], []
    number = 0
    for index, section in enumerate(sections):
        links.append(f'<a href="#section-{index}">{html.escape(section.title)}</a>')
        body.append(section_html(index, section, number))
        number += len(section.charts)
    parts = {
        "policy": html.escape(policy),
        "title": as_ascii(html.escape(title)),
        "lead": as_ascii(html.escape(lead)),
        "style": style,
        "links": as_ascii("".join(links)),
        "sections": as_ascii("".join(body)),
        "charts": data_element("charts", [chart.as_json() for chart in charts]),
        "library": library,
        "script": script,
    }
    return PLACEHOLDER.sub(lambda match: parts[match[1]], read_part("report.html"))


def section_html(index: int, section: Section, first_chart: int) -> str:
    figures = "".join(
        f'<figure data-chart="{first_chart + offset}"><figcaption>{html.escape(chart.title)}</figcaption>'
        f'<div class="plot"></div>{note_html(chart.note)}</figure>'
        for offset, chart in enumerate(section.charts)
    )
    introduction = f"<p>{html.escape(section.introduction)}</p>" if section.introduction else ""
    grid = f'<div class="charts">{figures}</div>' if figures else ""
    inner = f"{introduction}{''.join(section.tables)}{grid}"
    return f'<section id="section-{index}"><h2>{html.escape(section.title)}</h2>{inner}</section>'


def note_html(note: str) -> str:
    return f'<p class="note">{html.escape(note)}</p>' if note else ""


def read_part(name: str) -> str:
    return (files("megatron_oreal.reports.run_report") / "page" / name).read_text(encoding="ascii")
