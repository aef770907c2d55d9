"""Every message that the troubleshooting pages explain is one that the program says, in both languages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = re.compile(r"…|--[XY]\b|\b[XNM]\b|cuda:0|“|”|\"X\"")


def texts_of_the_program() -> str:
    """Every string literal of the program, pieces of one f-string side by side."""
    found = []
    for folder in ("library", "networks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("\0".join(str(p.value) for p in node.values if isinstance(p, ast.Constant)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def messages(page: Path) -> list[str]:
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/ja/troubleshooting.md"])
def test_every_explained_message_is_one_of_the_programs(page: str):
    known = texts_of_the_program()
    explained = messages(ROOT / page)
    assert len(explained) > 20
    missing = [
        (message, piece.strip())
        for message in explained
        for piece in PLACEHOLDERS.split(message)
        if len(piece.strip()) > 3 and piece.strip() not in known
    ]
    assert not missing


def test_both_languages_explain_the_same_parts():
    counts = [len(messages(ROOT / page)) for page in ("docs/troubleshooting.md", "docs/ja/troubleshooting.md")]
    assert abs(counts[0] - counts[1]) <= 4
