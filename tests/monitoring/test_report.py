"""The report: one file, well-formed, that asks nobody for anything and shows what the run did."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from library.common.errors import UserError
from library.monitoring.contact_sheet import PreviewRecord
from library.monitoring.metrics_file import Curves
from library.monitoring.report.background_writer import ReportWriter
from library.monitoring.report.html_page import DatasetSection, RunDescription, RunState, charts, render
from library.monitoring.report.svg_charts import (
    MOST_POINTS,
    Chart,
    Line,
    line_chart,
    log_ticks,
    nice_ticks,
    smoothed,
    thinned,
)
from library.monitoring.report.thumbnails import ThumbnailCache

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "link", "img", "br", "input"}
NASTY = '<script>alert("x")</script> & "quotes" \'single\' ü 日本'


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.count: dict[str, int] = {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data: str) -> None:
        self.text += data


def description() -> RunDescription:
    return RunDescription(
        title=NASTY,
        max_steps=200,
        epochs=10,
        about=["Stable Diffusion 3 5-medium", NASTY],
        datasets=[DatasetSection(NASTY, [("64x64", 3, 6, 2), ("96x64", 1, 2, 1)])],
        options={"learning_rate": "0.001", "output_name": NASTY},
        other_options={"seed": "None"},
        versions={"torch": "2.13"},
        resume_command=f"python sd3_train_network.py --output_name {NASTY} --resume auto",
        again_command=f"python sd3_train_network.py --output_name {NASTY}_2",
    )


def state(folder: Path | None = None, steps: int = 120) -> RunState:
    curves = Curves()
    for step in range(1, steps + 1):
        record = {"step": step, "epoch": 1, "loss/current": 1 / step + (step % 7) / 50, "loss/average": 1 / step}
        record |= {
            "lr/unet": 1e-4,
            "lr/textencoder 1": 5e-5,
            "gradient_norm": 0.1 / step,
            "seconds": 0.5,
            "memory_gib": 3.0,
        }
        curves.add(record)
        if step % 20 == 0:
            curves.add({"step": step, "epoch": 1, "loss/validation/step_average": 0.4})
    curves.add({"step": steps, "loss/current": float("nan"), "gradient_norm": float("inf")})
    records = []
    if folder is not None:
        for step in (0, 50):
            Image.new("RGB", (320, 200), (step, 90, 200)).save(folder / f"{step}.png")
            records.append(PreviewRecord(step, None, 0, NASTY, folder / f"{step}.png"))
    by_timestep = [None, *(0.1 * place for place in range(9))]
    return RunState(
        "training", steps, 6, 61.0, "2026-01-02 03:04", curves, by_timestep, ThumbnailCache().sheet(records), 2
    )


def test_the_page_is_well_formed_and_shows_everything(tmp_path: Path) -> None:
    page = Page(render(description(), state(tmp_path)))
    assert page.count["svg"] == 6 and page.count["script"] == 1 and page.count["img"] == 3
    for text in (
        NASTY,
        "120 / 200",
        "64x64",
        "learning_rate",
        "Peak memory",
        "Elapsed",
        "s/step",
        "torch",
        "textencoder 1",
        "Skipped steps",
    ):
        assert text in page.text
    assert "Time left" in page.text and "0:40" in page.text  # 80 steps of half a second


def test_the_resume_command_is_offered_only_where_a_state_is() -> None:
    for status, has_state, expected in (
        ("training", False, "Run again"),
        ("stopped", True, "Resume"),
        ("finished", True, "Resume"),
        ("finished", False, "Run again"),
        ("ended by KeyError", False, "Run again"),
    ):
        shown = Page(render(description(), RunState(status, 1, 1, 1.0, "now", Curves(), has_state=has_state))).text
        assert expected in shown and ("--resume auto" in shown) == (expected == "Resume"), status
        assert (f"{NASTY}_2" in shown) == (expected == "Run again"), status
        assert ("Took" in shown, "Elapsed" in shown) == (status != "training", status == "training")


def test_every_axis_has_a_label() -> None:
    for chart in charts(state()):
        labels = re.findall(r'<text class="axis"[^>]*>([^<]*)</text>', chart)
        assert len(labels) == 2 and all(labels), labels


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text = render(description(), state(tmp_path))
    page = Page(text)
    assert page.addresses and all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"@import|url\(|//[a-z]", text.replace("http://www.w3.org/2000/svg", ""))
    assert "default-src 'none'" in text


def test_a_run_without_numbers_has_a_page_too() -> None:
    page = Page(render(description(), RunState("training", 0, 0, 0.0, "now", Curves())))
    assert page.text.count("No values yet.") == 6 and "Previews" not in page.text


def test_a_finished_run_does_not_reload() -> None:
    assert 'data-running="1"' in render(description(), state())
    done = RunState("finished", 1, 1, 1.0, "now", Curves())
    assert 'data-running="1"' not in render(description(), done)


def test_a_million_steps_make_a_small_page() -> None:
    line = Line("loss", range(1_000_000), [1.0] * 1_000_000)
    assert len(thinned(line).x) <= MOST_POINTS
    assert len(line_chart(Chart("Loss", [line]))) < 30_000


def test_what_cannot_be_drawn_is_left_out() -> None:
    line = thinned(Line("norm", [1, 2, 3, 4], [float("nan"), 0.0, float("inf"), 2.0]), log=True)
    assert (line.x, line.y) == ([4], [2.0])


@given(st.lists(st.floats(allow_nan=True, width=32), min_size=1, max_size=60), st.booleans())
def test_any_numbers_give_a_well_formed_chart(values: list[float], log: bool) -> None:
    text = line_chart(
        Chart("x", [Line("a", list(range(len(values))), values), Line("b", [1], [values[0]], 1, "dots")], log=log)
    )
    Page(text)
    assert "nan" not in text.lower().replace("none", "")


def test_the_smoothed_line_is_right_from_its_start() -> None:
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)
    noisy = [1.0 + (-1) ** step for step in range(500)]
    assert all(abs(value - 1) < 0.1 for value in smoothed(noisy)[50:])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.1, 0.32, [0.1, 0.15, 0.2, 0.25, 0.3]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.005, 7, [0.01, 0.1, 1]),
        (0.06, 0.4, [0.1, 0.2]),
        (0.15, 0.35, [0.2, 0.3]),
        (0.21, 0.29, [0.21, 0.29]),
    ],
)
def test_logarithmic_ticks_are_round_numbers_and_at_least_two(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_labels_of_the_axis_have_room() -> None:
    """Seven signs are wider than the margin of a phone."""
    rates = [2e-3 * step / 100 for step in range(101)]
    drawn = line_chart(Chart("Learning rate", [Line("unet", list(range(101)), rates)]))
    labels = re.findall(r'text-anchor="end">([^<]*)<', drawn)
    assert labels == ["0", "5e-4", "1e-3", "1.5e-3", "2e-3"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_large_pictures_become_small_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    Image.effect_noise((1600, 1200), 80).convert("RGB").save(tmp_path / "large.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    box = ThumbnailCache()
    picture = box.picture(tmp_path / "large.jpg", "x", 112)
    assert picture is not None and picture.url.startswith("data:image/jpeg") and len(picture.url) < 20_000
    assert box.picture(tmp_path / "broken.png", "x", 112) is None
    (tmp_path / "large.jpg").unlink()
    assert box.picture(tmp_path / "large.jpg", "y", 112) is not None  # made once


# --- writing ----------------------------------------------------------------------------------------------------------


def wait_for(condition: object) -> None:
    end = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_is_written_at_most_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    made: list[str] = []

    def make(status: str) -> str:
        made.append(status)
        return status

    writer = ReportWriter(tmp_path / "report.html", make, seconds_between=1000)
    for _ in range(50):
        writer.notify()
    wait_for((tmp_path / "report.html").exists)
    writer.close("finished")
    assert made == ["training", "finished"]
    assert (tmp_path / "report.html").read_text() == "finished"


def test_training_does_not_wait_for_it(tmp_path: Path) -> None:
    hold = threading.Event()

    def slow(status: str) -> str:
        assert hold.wait(20)
        return status

    writer = ReportWriter(tmp_path / "report.html", slow, seconds_between=0)
    started = time.monotonic()
    for _ in range(100):
        writer.notify()
    assert time.monotonic() - started < 5
    hold.set()
    writer.close("finished")


def test_a_report_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(status: str) -> str:
        raise UserError("a bug in the report")

    writer = ReportWriter(tmp_path / "report.html", fails)
    writer.notify()
    writer.close("finished")
    assert "could not be written" in caplog.text and not (tmp_path / "report.html").exists()


# --- in a browser -----------------------------------------------------------------------------------------------------

PROBE = """
<script>
const svg = document.querySelector("svg[data-chart]"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true}));
document.querySelector(".sheet img").click();
document.title = JSON.stringify({
  told: svg.parentElement.querySelector("output").textContent,
  open: document.querySelector("dialog").open,
  paths: [...document.querySelectorAll("svg path")].filter((path) => path.getTotalLength() > 20).length,
  width: document.documentElement.scrollWidth,
  seen: innerWidth,
  text: getComputedStyle(document.body).color,
  page: getComputedStyle(document.body).backgroundColor,
});
</script></body>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize(("size", "scheme"), [("1200,900", "light"), ("500,900", "dark")])
def test_a_browser_draws_it_without_an_error(tmp_path: Path, size: str, scheme: str) -> None:
    """On a wide screen and a narrow one, in the light and in the dark."""
    assert BROWSER is not None
    path = tmp_path / "report.html"
    path.write_text(render(description(), state(tmp_path)).replace("</body>", PROBE), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={size}"]
    words += ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr
    seen = json.loads(title.group(1))
    assert seen["told"].startswith("step ") and "smoothed" in seen["told"] and seen["open"] is True
    assert seen["paths"] >= 8
    assert seen["width"] <= seen["seen"]  # no sideways scrolling of the page
    text, page = (sum(map(int, re.findall(r"\d+", seen[part])[:3])) / 3 for part in ("text", "page"))
    assert (text > 200 and page < 60) if scheme == "dark" else (text < 60 and page > 200)
