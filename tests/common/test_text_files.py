"""The guarded reader: any bytes give a value or a FormatError, quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from library.common.errors import MAX_CHARACTERS, MAX_PROBLEMS, UserError
from library.common.text_files import FormatError, parse_json, parse_toml, read_text

DEEP = 100_000


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_json, "[" * DEEP, "nested"),
        (parse_json, "[" * 500 + "]" * 500, "nested"),
        (parse_json, '{"a":' * 500 + "1" + "}" * 500, "nested"),
        (parse_json, '{"a": "x\\u0000"}', "NUL"),
        (parse_json, '{"\\ud800": 1}', "half of a character"),
        (parse_json, "9" * 5000, "digits"),
        (parse_json, "{", "line 1"),
        (parse_toml, "a = " + "[" * DEEP, "nested"),
        (parse_toml, "a = " + "[" * 300 + "]" * 300, "nested"),
        (parse_toml, ".".join(["a"] * DEEP) + " = 1", "parts"),
        (parse_toml, "b = {" + ".".join(["a"] * DEEP) + " = 1}", "parts"),
        (parse_toml, "[" + ".".join(['"a"'] * DEEP) + "]", "parts"),
        (parse_toml, 'a = "x\\u0000"', "NUL"),
        (parse_toml, "a = " + "9" * 5000, "digits"),
    ],
)
def test_what_is_no_value_is_refused(parse, text: str, says: str):
    started = time.perf_counter()
    with pytest.raises(FormatError, match=says):
        parse(text)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("content", "says"), [(b"a\0b", "NUL"), (b"\xff\xfe", "UTF-8"), (b"x" * 2_000_000, "larger than 1 MiB")]
)
def test_text_that_is_none_is_refused(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(FormatError, match=says):
        read_text(tmp_path / "a.txt", 1024**2)


def test_a_pipe_or_a_folder_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path, tmp_path / "pipe.toml", Path("a\0b")):
        with pytest.raises(FormatError):
            read_text(path)


def test_valid_text_is_read(tmp_path: Path):
    (tmp_path / "a.json").write_text('\ufeff{"a": ["\\u00e9", "\\ud83d\\ude00"]}', encoding="utf-8")
    assert parse_json(read_text(tmp_path / "a.json")) == {"a": ["é", "😀"]}
    assert parse_toml('a.b = "c"\n[d."e.f"]\ng = [1]') == {"a": {"b": "c"}, "d": {"e.f": {"g": [1]}}}


def test_control_characters_are_escaped_and_the_lines_of_lists_stay():
    text = UserError("\x1b[31mred\x07\r\x9b\u202e\ud800:\n  a: b").as_text()
    assert text == "\\x1b[31mred\\x07\\r\\x9b\\u202e\\ud800:\n  a: b"
    text.encode()


def test_long_messages_are_cut_with_the_count_of_what_was_left_out():
    text = UserError("x" * (MAX_CHARACTERS + 1234)).as_text()
    assert text == "x" * MAX_CHARACTERS + "… (1,234 characters left out)"
    many = UserError([f"problem {number}" for number in range(5000)]).as_text().splitlines()
    assert len(many) == MAX_PROBLEMS + 1 and many[-1] == f"… and {5000 - MAX_PROBLEMS:,} more problems."
