"""The option reference says what the parser does, in both languages."""

from __future__ import annotations

import re

import pytest

from library.data.settings import KEYS
from library.options.table import BY_NAME, GROUPS, OPTIONS
from tools.make_option_docs import ENGLISH, GUIDES, JAPANESE, MARKED, ROOT, Language, filled, main, page

languages = pytest.mark.parametrize("language", [ENGLISH, JAPANESE], ids=["en", "ja"])


@languages
def test_page_is_what_the_generator_makes(language: Language) -> None:
    written = (ROOT / language.path).read_text(encoding="utf-8")
    assert written == page(language), "run tools/make_option_docs.py"


@languages
def test_page_has_a_row_of_four_cells_for_each_option(language: Language) -> None:
    rows = re.findall(r"^\| `--(\w+)` .*$", page(language), re.MULTILINE)
    assert rows == list(BY_NAME)
    for line in page(language).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


@languages
def test_page_has_a_row_for_each_key_of_the_dataset_file(language: Language) -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`--(\w+)`)? ?\|$", page(language), re.MULTILINE)
    assert rows == [(name, key.option or "") for name, key in KEYS.items()]


def test_every_option_and_title_has_its_japanese_text() -> None:
    texts = [option.help_ja for option in OPTIONS]
    assert all(re.search("[\u3040-\u30ff\u4e00-\u9fff]", text) for text in texts)
    assert all(group.title_ja for group in GROUPS) and len({group.title_ja for group in GROUPS}) == len(GROUPS)


@languages
@pytest.mark.parametrize("guide", GUIDES)
def test_tables_in_guides_are_what_the_generator_makes(language: Language, guide: str) -> None:
    text = (ROOT / language.path).with_name(guide).read_text(encoding="utf-8")
    assert text == filled(text, language), "run tools/make_option_docs.py"


@languages
def test_every_group_has_its_table_in_one_guide(language: Language) -> None:
    texts = [(ROOT / language.path).with_name(guide).read_text(encoding="utf-8") for guide in GUIDES]
    titles = [found[2] for text in texts for found in MARKED.finditer(text)]
    assert sorted(titles) == sorted(group.title for group in GROUPS)


def test_check_tells_that_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    assert capsys.readouterr().out.count("up to date") == 6
