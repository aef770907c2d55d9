#!/usr/bin/env python3
"""Write docs/options.md, and the tables inside the guides, in both languages, from the rows of options and the dataset file's keys.

A guide has a table between the lines `<!-- options: TITLE -->` and `<!-- end of options -->`, TITLE being that of a group.
`--check` only compares, for the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.common.files import write_text  # noqa: E402
from library.data.keys import STYLES, DeclaredKey, Level  # noqa: E402
from library.data.settings import KEYS  # noqa: E402
from library.options.option import METAVARS, Group, Kind, Option  # noqa: E402
from library.options.table import GROUPS, OPTIONS  # noqa: E402


@dataclass(frozen=True)
class Language:
    path: str
    title: str
    introduction: str
    header: str
    keys_title: str
    keys_introduction: str
    keys_header: str
    japanese: bool = False

    def group_title(self, group: Group) -> str:
        return group.title_ja if self.japanese else group.title

    def help(self, option: Option) -> str:
        if self.japanese:
            return option.help_ja
        return f"{option.help} {option.reason[0].upper()}{option.reason[1:]}." if option.reason else option.help


ENGLISH = Language(
    "docs/options.md",
    "Options",
    "Every option of `sd3_train_network.py`: {total} in all, {works} of which work. The rest are "
    "named at the end: {no_effect} have no meaning here and are accepted with a warning, {refused} are refused. Options can also stand in a TOML file "
    "(`--config_file`), under the same names without dashes; the command line wins. A switch takes no value, but "
    "`--switch=false` turns off one that the file turns on.\n\n"
    "This page is made by `tools/make_option_docs.py` from the same tables that the program reads.",
    "| Option | Value | Default | What it does |",
    "Keys of the dataset file",
    "The keys of the file that `--dataset_config` names, and where each may be written. The innermost value counts: that of the subset, of the "
    "dataset, of `[general]`, of the option, and last the default. In parentheses: the kinds of subset that know the key, where not all do (a folder, a metadata file, a folder with masks).",
    "| Key | Where | Default | Option |",
)
JAPANESE = Language(
    "docs/ja/options.md",
    "オプション一覧",
    "`sd3_train_network.py`の全オプションです(全{total}個、うち{works}個が有効)。残りは末尾にまとめました。{no_effect}個はここでは意味がなく、警告を出して"
    "受け付けます。{refused}個は拒否します。TOMLファイル(`--config_file`)にも、ダッシュを除いた同じ名前で書けます。コマンドラインが優先されます。"
    "スイッチは値を取りませんが、ファイルで有効にしたものを`--switch=false`で無効にできます。\n\n"
    "このページは、プログラムが読むものと同じ表から`tools/make_option_docs.py`が作ります。",
    "| オプション | 値 | 既定値 | 説明 |",
    "データセットファイルの項目",
    "`--dataset_config`のファイルに書ける項目と、書ける場所です。サブセット、データセット、`[general]`、オプション、既定値の順に、"
    "最も内側の値が使われます。括弧内は、その項目を使える種類のサブセットです(folder: 画像フォルダ、metadata: メタデータファイル、mask: マスク付きのフォルダ)。requiredは必須です。",
    "| 項目 | 場所 | 既定値 | オプション |",
    japanese=True,
)


LEVELS: dict[Level, str] = {"general": "[general]", "datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]"}
GUIDES = ("train_network.md", "sd3_train_network.md")
MARKED = re.compile(r"(<!-- options: (.+?) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def page(language: Language) -> str:
    """The whole page as Markdown."""
    count = {kind: sum(option.kind is kind for option in OPTIONS) for kind in Kind}
    introduction = language.introduction.format(
        total=len(OPTIONS),
        works=count[Kind.WORKS],
        no_effect=count[Kind.NO_EFFECT],
        refused=count[Kind.REFUSED],
    )
    parts = [f"# {language.title}\n\n{introduction}\n"]
    parts += [f"## {language.group_title(group)}\n\n{table(group, language)}" for group in GROUPS]
    parts.append(f"## {language.keys_title}\n\n{language.keys_introduction}\n\n{keys_table(language)}")
    return "\n".join(parts)


def table(group: Group, language: Language) -> str:
    """A group's options as a Markdown table."""
    rows = [_row(option, language) for option in group.options]
    return "\n".join([language.header, "|---|---|---|---|", *rows, ""])


def keys_table(language: Language) -> str:
    """The keys of the dataset file as a Markdown table."""
    return "\n".join([language.keys_header, "|---|---|---|---|", *(_key_row(key) for key in KEYS.values()), ""])


def filled(guide: str, language: Language) -> str:
    """A guide's text with its tables as they should be. KeyError for a title that no group has."""
    groups = {group.title: group for group in GROUPS}
    return MARKED.sub(lambda found: f"{found[1]}{table(groups[found[2]], language)}{found[3]}", guide)


def pages() -> dict[Path, str]:
    """The whole text of every page that has tables, by its path."""
    found = {}
    for language in (ENGLISH, JAPANESE):
        path = ROOT / language.path
        found[path] = page(language)
        for name in GUIDES:
            guide = path.with_name(name)
            found[guide] = filled(guide.read_text(encoding="utf-8"), language)
    return found


def _row(option: Option, language: Language) -> str:
    text = language.help(option)
    cells = [f"`{option.flag}`", _value(option), _default(option), text]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _key_row(key: DeclaredKey) -> str:
    where = ", ".join(f"`{LEVELS[level]}`" for level in key.key.levels)
    if key.key.styles != STYLES:
        where += f" ({', '.join(key.key.styles)})"
    if key.key.required:
        where += f"; required: {', '.join(key.key.required)}"
    default = "" if key.default in (None, "", {}) else f"`{json.dumps(key.default)}`"
    return f"| `{key.name}` | {where} | {default} | {f'`--{key.option}`' if key.option else ''} |"


def _value(option: Option) -> str:
    if option.is_switch:
        return ""
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    return f"{METAVARS[option.type]}{' …' if option.nargs else ''}"


def _default(option: Option) -> str:
    if option.is_switch:
        return "on" if option.default and not option.turns_off else ""
    return "" if option.default in (None, "") else f"`{option.default}`"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 where a page is out of date.")
    check = parser.parse_args(arguments).check
    stale = 0
    for path, text in pages().items():
        name = path.relative_to(ROOT).as_posix()
        if check:
            same = path.is_file() and path.read_text(encoding="utf-8") == text
            stale += not same
            print(f"{name}: {'up to date' if same else 'out of date'}")
        else:
            write_text(path, text)
            print(f"wrote {name}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
