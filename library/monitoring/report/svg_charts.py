"""Charts as SVG text. Colors are CSS variables of the page, so that they follow light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 10, 40
TICKS, X_LABEL, Y_LABEL = 24, 6, 12  # where their text begins, from the bottom and the left
MOST_POINTS = 400  # of a line; more cannot be seen
COLORS = 6  # --series-0 … --series-5


@dataclass(frozen=True)
class Line:
    """A curve. x rises; values that are not finite are left out. color: which of the page's series colors."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    style: str = "line"  # or "faint" (the raw values behind a smoothed line), or "dots"


@dataclass(frozen=True)
class Chart:
    title: str
    lines: Sequence[Line] = field(default_factory=tuple)
    unit: str = "step"  # of x
    y_label: str = ""
    log: bool = False  # logarithmic y
    from_zero: bool = False  # y begins at 0


def line_chart(chart: Chart) -> str:
    """A <figure> with the lines, a grid, a legend where there are several lines, and the data for the pointer."""
    lines = [thinned(line, chart.log) for line in chart.lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption><p class="none">No values yet.</p></figure>'
    low_x, high_x = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    low, high = value_range([value for line in lines for value in line.y], chart.log)
    scale = _Scale(low_x, max(high_x, low_x + 1), 0.0 if chart.from_zero else low, high, chart.log)
    parts = [_grid(scale, chart), _axis_labels(chart.unit, chart.y_label), *(_drawn(line, scale) for line in lines)]
    data = {
        "box": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "domain": [scale.low_x, scale.high_x],
        "unit": chart.unit,
        "lines": [{"name": line.name, "x": line.x, "y": [_short(value) for value in line.y]} for line in lines],
    }
    return _figure(chart.title, "".join(parts), _legend(lines), json.dumps(data))


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float | None], unit: str, y_label: str = "") -> str:
    """A <figure> with a bar for each value; None leaves a gap. unit, y_label: what the axes show."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return (
            f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="none">No values yet.</p></figure>'
        )
    scale = _Scale(0, len(values), 0.0, max(known) * 1.08 or 1.0, False)
    parts = [_axis_labels(unit, y_label)]
    for tick in nice_ticks(0.0, scale.high):
        parts.append(_grid_line(scale.y(tick), _tick(tick)))
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        left, right = scale.x(index) + 2, scale.x(index + 1) - 2
        if value is not None and math.isfinite(value):
            top = scale.y(value)
            parts.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{HEIGHT - BOTTOM - top:.1f}" rx="2">'
                f"<title>{escape(unit)} {escape(label)}: {_short(value)}</title></rect>"
            )
        text = f'<text x="{(left + right) / 2:.1f}" y="{HEIGHT - TICKS}" text-anchor="middle">{escape(label.split("–")[0])}</text>'
        parts.append(text)
    return _figure(title, "".join(parts), "", "")


def smoothed(y: Sequence[float]) -> list[float]:
    """An exponential average whose span is a 25th of the curve, right from the first value on (Adam's bias correction)."""
    keep = 1 - 2 / (max(5.0, len(y) / 25) + 1)
    total, weight, result = 0.0, 0.0, []
    for value in y:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight else math.nan)
    return result


def thinned(line: Line, log: bool = False) -> Line:
    """The line with at most MOST_POINTS points, each the mean of its neighbours, and without what cannot be drawn."""
    pairs = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y) and (y > 0 or not log)]
    size = max(1, math.ceil(len(pairs) / MOST_POINTS))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    x = [group[-1][0] for group in groups]
    y = [sum(value for _, value in group) / len(group) for group in groups]
    return Line(line.name, x, y, line.color, line.style)


def value_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """From the lowest value to the 99th percentile, so that one outlier does not flatten everything, with some room."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.99 * (len(ordered) - 1)))]
    if log:
        return low / 1.2, max(high, low * 1.5) * 1.2
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < 0.5 * high else low - room), high + room


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; where that is not even two, twos and fives as well, or all digits."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) > 1:
            return ticks
    return ticks or [low, high]


# --- inside -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    low_x: float
    high_x: float
    low: float
    high: float
    log: bool

    def x(self, value: float) -> float:
        return LEFT + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _grid(scale: _Scale, chart: Chart) -> str:
    ticks = log_ticks(scale.low, scale.high) if chart.log else nice_ticks(scale.low, scale.high)
    lines = [_grid_line(scale.y(tick), _tick(tick)) for tick in ticks]
    for tick in nice_ticks(scale.low_x, scale.high_x):
        if tick == int(tick):
            x = scale.x(tick)
            lines.append(f'<text x="{x:.1f}" y="{HEIGHT - TICKS}" text-anchor="middle">{int(tick)}</text>')
    return "".join(lines)


def _axis_labels(x: str, y: str) -> str:
    middle, center = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text class="axis" x="{middle:.1f}" y="{HEIGHT - X_LABEL}" text-anchor="middle">{escape(x)}</text>'
        f'<text class="axis" x="{Y_LABEL}" y="{center:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 {Y_LABEL} {center:.1f})">{escape(y)}</text>'
    )


def _grid_line(y: float, label: str) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def _drawn(line: Line, scale: _Scale) -> str:
    top, bottom = TOP - 2, HEIGHT - BOTTOM + 2
    points = [(scale.x(x), min(bottom, max(top, scale.y(y)))) for x, y in zip(line.x, line.y, strict=True)]
    name = f"s{line.color % COLORS}"
    dots = ""
    if line.style == "dots" or len(points) == 1:
        dots = "".join(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{name} {line.style}" d="{path}"/>{dots}'


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    keys = [f'<span class="key s{line.color % COLORS} {line.style}">{escape(line.name)}</span>' for line in lines]
    return f'<div class="legend">{"".join(keys)}</div>'


def _figure(title: str, drawing: str, legend: str, data: str) -> str:
    pointer = f' data-chart="{escape(data)}"' if data else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<output></output></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{pointer}>{drawing}</svg>{legend}</figure>'
    )


def _short(value: float) -> str:
    """Four significant digits: 0.1234, 1e-05, 12.5."""
    return f"{value:.4g}"


def _tick(value: float) -> str:
    """A label of few signs, for which there is room: 1.5e-3 rather than 0.0015."""
    if 0 < abs(value) < 0.01:
        number, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(number):g}e{int(exponent)}"
    return f"{value:.4g}"
