"""docs/architecture.md: its picture is that of the source, and the files that it names are there."""

from __future__ import annotations

import re
from pathlib import Path

from tools.import_graph import mermaid, package_imports

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_is_that_of_the_source() -> None:
    (drawn,) = re.findall(r"```mermaid\n(.*?)\n```", PAGE, re.DOTALL)
    assert drawn == mermaid(package_imports(ROOT)), "run python tools/import_graph.py and put its output into the page"


def test_an_arrow_that_follows_from_others_is_left_out() -> None:
    assert mermaid({("a", "b"), ("b", "c"), ("a", "c")}) == "graph TD\n    a --> b\n    b --> c"


def test_every_file_it_names_is_there() -> None:
    rows = re.findall(r"^\| `(library/\w+|networks)` \|.*\| `([\w/]+\.py)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == 13
    named = [f"{package}/{file}" for package, file in rows]
    named += re.findall(r"`((?:library|networks|tests|tools)/[\w/]+\.py)`", PAGE)
    named += [f"library/{name}" for name in re.findall(r"`((?:training|monitoring|data|sd3|memory)/\w+\.py)`", PAGE)]
    assert [name for name in named if not (ROOT / name).is_file()] == []
