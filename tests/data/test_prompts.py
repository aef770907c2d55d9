"""Preview prompts: what a file says, and what is wrong with it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from library.common.errors import UserError
from library.data.prompts import PreviewPrompt, read_prompts as read_prompts_with
from library.flow.samplers import SAMPLERS
from library.options.table import BY_NAME


def read_prompts(path: Path) -> list[PreviewPrompt]:
    return read_prompts_with(path, SAMPLERS, BY_NAME["sample_sampler"].choices or ())


def prompts_of(folder: Path, text: str, ending: str = ".txt") -> list[PreviewPrompt]:
    path = folder / f"prompts{ending}"
    path.write_bytes(text.encode("utf-8"))
    return read_prompts(path)


def problems_of(folder: Path, text: str, ending: str = ".txt") -> list[str]:
    with pytest.raises(UserError) as caught:
        prompts_of(folder, text, ending)
    return caught.value.problems


def test_a_line_with_every_option(tmp_path: Path) -> None:
    (prompt,) = prompts_of(
        tmp_path, "a cat on grass --w 512 --h 768 --d 42 --s 20 --l 5.5 --n blurry, dark --fs 2.5 --ss heun\n"
    )
    assert prompt == PreviewPrompt("a cat on grass", "blurry, dark", 512, 768, 20, 5.5, 42, 2.5, "heun")


def test_what_is_not_given_has_sd_scripts_defaults(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, "a cat") == [PreviewPrompt("a cat", "", 512, 512, 30, 7.5, None, 3.0, None)]


def test_both_names_of_guidance_work(tmp_path: Path) -> None:
    assert [p.guidance for p in prompts_of(tmp_path, "a --g 3\nb --l 4")] == [3.0, 4.0]


def test_blank_lines_comments_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, "\ufeff# prompts\r\n\r\n  a cat  --d 1\r\n#no\r\na dog\r\n")
    assert [(p.prompt, p.seed) for p in found] == [("a cat", 1), ("a dog", None)]


@pytest.mark.parametrize(
    "text", ["n is a letter", "w 12 h 13", "s 5 people", "d 3", "a well--known cat", "a -- b", "x --9"]
)
def test_prompt_text_is_never_taken_for_an_option(tmp_path: Path, text: str) -> None:
    assert prompts_of(tmp_path, text) == [PreviewPrompt(text)]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp", "Zs"]), min_size=1).filter(
    lambda word: not word.startswith(("--", "#"))
)


@given(st.lists(words, min_size=1, max_size=8), st.lists(words, max_size=4), st.integers(0, 2**32 - 1))
def test_any_words_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, prompt: list[str], negative: list[str], seed: int
) -> None:
    text, unwanted = " ".join(prompt), " ".join(negative)
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes(f"{text} --n {unwanted} --d {seed}".encode())
    (found,) = read_prompts(path)
    assert (found.prompt, found.negative_prompt, found.seed) == (text, unwanted, seed)
    path = path.with_suffix(".json")
    path.write_text(json.dumps([{"prompt": text, "negative_prompt": unwanted, "seed": seed}]), encoding="utf-8")
    assert read_prompts(path) == [found]


@pytest.mark.parametrize(("given_side", "used"), [(500, 496), (504, 512), (512, 512), (10, 64), (1000, 1008)])
def test_sizes_are_rounded_to_a_multiple_of_16(tmp_path: Path, given_side: int, used: int) -> None:
    (prompt,) = prompts_of(tmp_path, f"a --w {given_side} --h {given_side}")
    assert (prompt.width, prompt.height) == (used, used)


def test_steps_stay_between_1_and_1000(tmp_path: Path) -> None:
    assert [p.steps for p in prompts_of(tmp_path, "a --s 0\nb --s 5000\nc --s 12")] == [1, 1000, 12]


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        "a --w wide\n# comment\nb --zz 3\nc --ss magic\nd --l nan\ne --d -1\nf --fs 0\ng --w 99999\nh --d 1.5\nfine",
    )
    assert [problem.split(": ")[0].rpartition(", ")[2] for problem in problems] == [
        "line 1",
        "line 3",
        "line 4",
        "line 5",
        "line 6",
        "line 7",
        "line 8",
        "line 9",
    ]
    assert "--zz is not known" in problems[1] and "'magic'" in problems[2]


def test_what_sd3_has_no_use_for_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prompts_of(tmp_path, "a --cn image.png\nb --cn other.png --rcfg 1\n")
    assert sorted(record.getMessage().split(": ")[1].split(" (")[0] for record in caplog.records) == ["--cn", "--rcfg"]


def test_samplers_of_older_models_are_said_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """sd-scripts took them and used Euler; `None` is the sampler of the command line."""
    with caplog.at_level(logging.WARNING):
        found = prompts_of(tmp_path, "a --ss euler_a\nb --ss euler_a\nc --ss dpmsolver++\n")
    assert [prompt.sampler for prompt in found] == [None, None, "dpmpp_2m"]
    assert [record.getMessage().split(": ")[1].split(" (")[0] for record in caplog.records] == ["--ss euler_a"]


def test_options_may_be_in_capitals_as_in_sd_scripts(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, "a Cat --W 256 --N Dark --FS 2") == [PreviewPrompt("a Cat", "Dark", 256, shift=2.0)]


def test_toml_subsets_override_the_defaults(tmp_path: Path) -> None:
    text = """
    [prompt]
    width = 768
    negative_prompt = "dark"
    scale = 4
    [[prompt.subset]]
    prompt = "a cat"
    [[prompt.subset]]
    prompt = "a dog"
    width = 512
    sample_sampler = "euler"
    sample_steps = 5
    """
    cat, dog = prompts_of(tmp_path, text, ".toml")
    assert cat == PreviewPrompt("a cat", "dark", 768, 512, 30, 4.0)
    assert dog == PreviewPrompt("a dog", "dark", 512, 512, 5, 4.0, sampler="euler")


def test_a_toml_prompt_without_subsets_is_one_prompt(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, '[prompt]\nprompt = "a cat"\nseed = 3\n', ".toml") == [PreviewPrompt("a cat", seed=3)]


def test_json_entries_are_lines_or_tables(tmp_path: Path) -> None:
    data = ["# 1 fan of cats --d 4", {"prompt": "a dog --d 4", "seed": None, "height": 640.0}]
    cat, dog = prompts_of(tmp_path, json.dumps(data), ".json")
    assert (cat.prompt, cat.seed) == ("# 1 fan of cats", 4)  # no comments in JSON
    assert (dog.prompt, dog.seed, dog.height) == ("a dog --d 4", None, 640)


@pytest.mark.parametrize(
    ("ending", "text", "told"),
    [
        (".txt", "# nothing\n", "no prompt"),
        (".toml", "x = 1", "[[prompt.subset]]"),
        (".toml", '[prompt.subset]\nprompt = "a"', "[[prompt.subset]]"),
        (".toml", "[prompt", "prompts.toml"),
        (".json", '{"prompt": "a"}', "list"),
        (".json", "[1]", "prompt 1"),
        (".json", '[{"prompt": null}]', "prompt 1"),
        (".json", '[{"seed": 1}]', "there is no prompt"),
        (".json", '[{"prompt": "a", "width": 512.5}]', "whole number"),
        (".json", '[{"prompt": "a", "width": true}]', "whole number"),
        (".json", '[{"prompt": "a", "widht": 512}]', "width"),
        (".json", r'["a \ud83d"]', "half of a character"),
        (".json", r'[{"prompt": "a", "negative_prompt": "\udc00"}]', "half of a character"),
        (".json", "[", "prompts.json"),
        (".csv", "a", ".txt, .toml or .json"),
    ],
)
def test_a_wrong_file_is_told_with_its_place(tmp_path: Path, ending: str, text: str, told: str) -> None:
    (problem,) = problems_of(tmp_path, text, ending)
    assert told in problem and f"prompts{ending}" in problem


def test_a_missing_or_binary_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "b.txt")
