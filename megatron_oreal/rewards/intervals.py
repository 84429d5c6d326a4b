"""Builds unions of intervals from conditions and sets: sorted, joined where they touch, without excluded points."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.rewards.algebra_needed import Algebra
from megatron_oreal.rewards.form_types import INFINITE, Collection, Form, Interval, Region, Scalar


def as_region(form: Form, algebra: Algebra) -> Region | None:
    if isinstance(form, Region):
        return form
    if not isinstance(form, Collection):
        return None
    elements = form.elements
    if form.kind == "tuple" and len(elements) == 2 and all(isinstance(element, Scalar) for element in elements):
        start, end = (element.text for element in elements if isinstance(element, Scalar))
        return Region((Interval(start, end, True, True),))
    if form.kind == "set" and all(isinstance(element, Scalar) for element in elements):
        points = [element.text for element in elements if isinstance(element, Scalar)]
        return Region(tuple(Interval(point, point, False, False) for point in points))
    regions = [element for element in elements if isinstance(element, Region)]
    if form.kind != "list" or len(regions) < len(elements) or len({region.variable for region in regions}) > 1:
        return None
    return combined(regions, form.joint, algebra)


def combined(regions: Sequence[Region], joint: str, algebra: Algebra) -> Region | None:
    """Returns the union of conditions joined by "or"; the intersection for "and", or for a comma if they overlap."""
    variable = regions[0].variable
    excluded = tuple(point for region in regions for point in region.excluded)
    intervals = [interval for region in regions for interval in region.intervals]
    bounded = [interval for interval in intervals if (interval.start, interval.end) != (r"-\infty", r"\infty")]
    if excluded and joint != "or":
        rest = [Region((interval,), variable) for interval in bounded]
        inner = combined(rest, joint, algebra) if len(rest) > 1 else Region(tuple(bounded) or (INFINITE,))
        return None if inner is None else Region(inner.intervals, variable, excluded)
    lower = [interval for interval in intervals if interval.end == r"\infty" and interval.start != r"-\infty"]
    upper = [interval for interval in intervals if interval.start == r"-\infty" and interval.end != r"\infty"]
    if joint != "or" and len(lower) == len(upper) == 1 and len(intervals) == 2:
        start, end = algebra.order_key(lower[0].start), algebra.order_key(upper[0].end)
        if joint == "and" or (start is not None and end is not None and start < end):
            both = Interval(lower[0].start, upper[0].end, lower[0].is_start_open, upper[0].is_end_open)
            return Region((both,), variable)
    return None if joint == "and" else Region(tuple(intervals), variable)


def canonical_intervals(region: Region, algebra: Algebra) -> list[Interval]:
    """Sorts intervals, joins those that touch and removes points; does not change intervals whose ends have symbols."""
    keyed = []
    for interval in region.intervals:
        start, end = algebra.order_key(interval.start), algebra.order_key(interval.end)
        if start is None or end is None:
            return list(region.intervals)
        if start < end or (start == end and not (interval.is_start_open or interval.is_end_open)):
            keyed.append((start, end, interval))
    keyed.sort(key=lambda item: (item[0], item[2].is_start_open, item[1]))
    merged: list[tuple[float, float, Interval]] = []
    for start, end, interval in keyed:
        if merged and touches(merged[-1], start, interval):
            _, last_end, last = merged[-1]
            if (end, not interval.is_end_open) > (last_end, not last.is_end_open):
                last = Interval(last.start, interval.end, last.is_start_open, interval.is_end_open)
                last_end = end
            merged[-1] = (merged[-1][0], last_end, last)
        else:
            merged.append((start, end, interval))
    return without_points(merged, region.excluded, algebra)


def touches(last: tuple[float, float, Interval], start: float, interval: Interval) -> bool:
    return start < last[1] or (start == last[1] and not (last[2].is_end_open and interval.is_start_open))


def without_points(
    keyed: Sequence[tuple[float, float, Interval]], excluded: Sequence[str], algebra: Algebra
) -> list[Interval]:
    points = sorted((key, text) for text in excluded if (key := algebra.order_key(text)) is not None)
    intervals: list[Interval] = []
    for start, end, whole in keyed:
        interval = whole
        for key, text in points:
            if start < key < end:
                intervals.append(Interval(interval.start, text, interval.is_start_open, True))
                interval = Interval(text, interval.end, True, interval.is_end_open)
            elif key == start:
                interval = Interval(interval.start, interval.end, True, interval.is_end_open)
            elif key == end:
                interval = Interval(interval.start, interval.end, interval.is_start_open, True)
        intervals.append(interval)
    return intervals
