"""Every message of the program is explained, every explained message is one of the program's, in both languages.

An entry of the page quotes a message, or the part of it that tells it from others, with … for what varies. Quotes with few words
stand for the message that is exactly so.
"""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.docs.program_messages import ROOT, messages_in, program_messages, program_texts

PAGES = ("docs/troubleshooting.md", "docs/ja/troubleshooting.md")
LETTERS = 8  # of a quote that may stand for more than one message
FAMILY = 8  # messages that one quote may stand for: with more it tells them apart no longer


@cache
def quotes(page: str) -> tuple[str, ...]:
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return tuple(
        quote
        for row in rows
        for quote in re.findall(r"`` (.+?) ``|`([^`]+)`", row.split(" | ")[0])
        for quote in quote
        if quote
    )


@cache
def pieces_of(quote: str) -> tuple[str, ...]:
    """What must come in a message, in this order; nothing of a quote of few words, which must be the whole message."""
    return tuple(quote.split("…")) if len(re.findall(r"[^\W\d_]", quote)) >= LETTERS else ()


def stands_for(quote: str, message: str) -> bool:
    pieces = pieces_of(quote)
    if not pieces:
        return quote == message.strip()
    place = 0
    for piece in pieces:
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def test_every_message_is_explained():
    known = quotes(PAGES[0])
    missing = [
        f"{message.place}: {message.text}"
        for message in program_messages()
        if not any(stands_for(quote, message.text) for quote in known)
    ]
    assert not missing, "Explain them in docs/troubleshooting.md and docs/ja/troubleshooting.md:\n" + "\n".join(missing)


def test_every_explained_message_is_one_of_the_programs():
    texts = set(program_texts())
    assert [quote for quote in quotes(PAGES[0]) if not any(stands_for(quote, text) for text in texts)] == []


def test_no_entry_explains_away_messages_that_it_does_not_know():
    texts = {message.text for message in program_messages()}
    wide = {quote: sum(stands_for(quote, text) for text in texts) for quote in quotes(PAGES[0])}
    assert {quote: count for quote, count in wide.items() if count > FAMILY} == {}


def test_both_languages_explain_the_same_messages():
    assert quotes(PAGES[0]) == quotes(PAGES[1])
    assert len(quotes(PAGES[0])) > 400


@pytest.mark.parametrize("page", PAGES)
def test_the_contents_of_the_page_lead_to_its_parts(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    links = dict(re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", text))
    assert list(links) == titles and len(titles) > 10
    for title, anchor in links.items():
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "source",
    [
        'raise UserError(f"{path}: no such thing.")',
        'problems.add("the --x of " + name + " is wrong")',
        'logger.warning("%s will not be saved", name)',
        'def f():\n    return [f"--x {x} is too large."]',
        'if a:\n    message = f"{x} has no end."\n    raise UserError(message)',
    ],
)
def test_a_new_message_would_be_found(source: str):
    assert len(list(messages_in(source, {"UserError"}))) == 1


@pytest.mark.parametrize(
    "source", ['"""A docstring says this."""', 'logger.info("%s is saved", x)', 'print("All is well.")']
)
def test_what_is_no_message_is_not_taken_for_one(source: str):
    assert list(messages_in(source, {"UserError"})) == []
