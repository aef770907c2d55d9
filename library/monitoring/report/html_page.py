"""The report of a run: one HTML file that needs nothing else, rewritten during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from library.common.progress import clock
from library.monitoring.metrics_file import Curves
from library.monitoring.report.svg_charts import Chart, Line, bar_chart, line_chart, smoothed

ASSETS = Path(__file__).parent / "report_assets"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NORMS = {"norm/avg_key_norm": "mean", "max_norm/max_key_norm": "largest"}


@dataclass(frozen=True)
class Picture:
    """A small picture in a data URL. tiny: shown larger than it is, with hard edges."""

    url: str
    text: str
    tiny: bool = False


@dataclass(frozen=True)
class DatasetSection:
    """A dataset as the report shows it. rows: bucket, images, repeats, batches."""

    title: str
    rows: Sequence[tuple[str, int, int, int]]
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Sheet:
    """Previews: a title for each column, and for each prompt a picture or None in each column."""

    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[Picture | None]]] = ()


@dataclass(frozen=True)
class RunDescription:
    """The facts that stay the same during a run."""

    title: str
    max_steps: int
    epochs: int
    about: Sequence[str]  # a few words each: the model, the network, the optimizer
    options: Mapping[str, str]  # with values other than their defaults
    other_options: Mapping[str, str]  # at their defaults
    versions: Mapping[str, str]
    resume_command: str
    again_command: str
    datasets: Sequence[DatasetSection] = ()


@dataclass(frozen=True)
class RunState:
    """The facts that change. status: "training", "finished" or what ended it. by_timestep: mean losses of equal ranges of 0..1000."""

    status: str
    step: int
    epoch: int
    seconds: float  # since the start
    time: str  # of writing
    curves: Curves
    by_timestep: Sequence[float | None] = ()
    sheet: Sheet = field(default_factory=Sheet)
    skipped_steps: int = 0
    has_state: bool = False  # whether the run can be resumed

    @property
    def running(self) -> bool:
        return self.status == "training"


def render(run: RunDescription, state: RunState) -> str:
    """The whole page."""
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    running = ' data-running="1"' if state.running else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(run.title)}: training report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body{running}>
{_head(run, state)}
<h2>Curves</h2>
<div class="charts">
{"".join(charts(state))}
</div>
{_previews(state.sheet)}
<h2>Dataset</h2>
{"".join(_dataset(dataset) for dataset in run.datasets)}
{_command(run, state)}
<h2>Options</h2>
<div class="card">{_table(run.options)}<details><summary>Options at their defaults</summary>{_table(run.other_options)}</details></div>
<h2>Versions</h2>
<div class="card">{_table(run.versions)}</div>
<dialog><img alt="" src="data:,"><p></p></dialog>
<script>{script}</script>
</body>
</html>
"""


def charts(state: RunState) -> list[str]:
    """Loss, rates, loss by timestep, gradient norm, time and memory; weight norms where they are capped."""
    curves = state.curves
    x, loss = curves["loss/current"]
    lines = [Line("each step", x, loss, 0, "faint"), Line("smoothed", x, smoothed(loss), 0)]
    for kind in ("step", "epoch"):
        steps, values = curves[f"loss/validation/{kind}_average"]
        lines.append(Line("validation", steps, values, 1, "dots"))
    rates = [name for name in curves.names() if name.startswith("lr/")]
    rate_lines = [Line(name.removeprefix("lr/"), *curves[name], color) for color, name in enumerate(rates)]
    norm_x, norms = curves["gradient_norm"]
    figures = [
        line_chart(Chart("Loss", lines, y_label="loss")),
        line_chart(Chart("Learning rate", rate_lines, y_label="learning rate")),
        bar_chart("Loss by timestep", _ranges(len(state.by_timestep)), state.by_timestep, "timestep", "loss"),
        line_chart(
            Chart(
                "Gradient norm before clipping",
                [Line("each step", norm_x, norms, 2, "faint"), Line("smoothed", norm_x, smoothed(norms), 2)],
                y_label="norm",
                log=True,
            )
        ),
        line_chart(Chart("Time per step", [Line("s/step", *curves["seconds"], 3)], y_label="s/step", from_zero=True)),
        line_chart(Chart("Memory", [Line("GiB", *curves["memory_gib"], 4)], y_label="GiB", from_zero=True)),
    ]
    if curves["norm/avg_key_norm"][0]:
        capped = [Line(label, *curves[name], color) for color, (name, label) in enumerate(NORMS.items())]
        figures.append(line_chart(Chart("Norms of the layers' changes", capped, y_label="norm")))
    return figures


def _head(run: RunDescription, state: RunState) -> str:
    curves = state.curves
    tiles = {"Step": f"{state.step} / {run.max_steps}", "Epoch": f"{state.epoch} / {run.epochs}"}
    if curves["loss/average"][1]:
        tiles["Loss, average"] = f"{curves['loss/average'][1][-1]:.4f}"
    seconds = sorted(curves["seconds"][1][-101:])
    if seconds:
        middle = seconds[len(seconds) // 2]
        tiles["s/step"] = f"{middle:.2f}"
        if state.running:
            tiles["Time left"] = clock(middle * (run.max_steps - state.step))
    if curves["memory_gib"][1]:
        tiles["Peak memory"] = f"{max(curves['memory_gib'][1]):.1f} GiB"
    tiles["Elapsed" if state.running else "Took"] = clock(state.seconds)
    if state.skipped_steps:
        tiles["Skipped steps"] = str(state.skipped_steps)
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles.items())
    share = 100 * state.step / max(1, run.max_steps)
    return (
        f'<header><h1>{escape(run.title)}</h1><span class="status">{escape(state.status)}, {escape(state.time)}</span></header>'
        f'<p class="note">{escape(" · ".join(run.about))}</p>'
        f'<div class="bar-of-run"><div style="width:{share:.1f}%"></div></div><dl class="tiles">{shown}</dl>'
    )


def _command(run: RunDescription, state: RunState) -> str:
    """How to resume, where there is a state, or how to train again."""
    title, command = ("Resume", run.resume_command) if state.has_state else ("Run again", run.again_command)
    note = "States are saved with --save_state, and when Ctrl-C or SIGTERM ends the run."
    if state.has_state and state.status == "finished":
        note = "The run is finished: raise --max_train_steps or --max_train_epochs to train longer."
    elif not state.has_state:
        note = f"With a new --output_name, so that the files of this run stay. {note}"
    return (
        f'<h2>{title}</h2><div class="card"><pre id="command">{escape(command)}</pre>'
        f'<button data-copy="command">Copy</button><p class="note">{note}</p></div>'
    )


def _previews(sheet: Sheet) -> str:
    if not sheet.rows:
        return ""
    titles = "".join(f"<th>{escape(title)}</th>" for title in sheet.columns)
    rows = "".join(
        f"<tr><th>{escape(prompt)}</th>{''.join(f'<td>{_image(picture)}</td>' for picture in pictures)}</tr>"
        for prompt, pictures in sheet.rows
    )
    return (
        '<h2>Previews</h2><div class="card scroll"><table class="sheet">'
        f"<thead><tr><th>prompt</th>{titles}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _dataset(dataset: DatasetSection) -> str:
    head = "".join(f'<th class="number">{name}</th>' for name in ("images", "repeats", "batches"))
    rows = "".join(
        f"<tr><td>{escape(bucket)}</td>{''.join(f'<td class=number>{number}</td>' for number in numbers)}</tr>"
        for bucket, *numbers in dataset.rows
    )
    pictures = "".join(_image(picture) for picture in dataset.pictures)
    return (
        f'<div class="card"><strong>{escape(dataset.title)}</strong><div class="scroll"><table>'
        f"<thead><tr><th>bucket</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<div class="thumbs">{pictures}</div></div>'
    )


def _image(picture: Picture | None) -> str:
    if picture is None:
        return ""
    text, tiny = escape(picture.text), ' class="tiny"' if picture.tiny else ""
    return f'<img src="{picture.url}" alt="{text}" title="{text}"{tiny}>'


def _table(values: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f'<table class="options"><tbody>{rows}</tbody></table>'


def _ranges(count: int) -> list[str]:
    """Labels of `count` equal ranges of timesteps."""
    return [f"{1000 * index // count}–{1000 * (index + 1) // count}" for index in range(count)]
