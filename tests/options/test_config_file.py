"""--config_file is checked like the command line, and --output_config writes what reads back, without secrets."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from library.common.errors import UserError
from library.options.config_file import config_path, config_text, read_config, write_config
from library.options.option import Option, finite, int_or_auto, int_or_float
from library.options.parser import parse_arguments
from library.options.resolve import resolve_options
from library.options.table import OPTIONS

SECRETS = ("wandb_api_key", "huggingface_token")


def config(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        read_config(path)
    return caught.value.problems


def test_sections_are_flattened_and_types_are_the_options(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        'network_dim = 8\n[a]\nlearning_rate = 1\nresolution = 512\ntext_encoder_lr = 1e-5\nv2 = false\n[b]\nlr_warmup_steps = "5%"\n'
        'blocks_to_swap = "auto"\nnetwork_args = ["a=1", "b=2"]\nreport = false\n',
    )
    values = read_config(path)
    assert values == {
        "network_dim": 8,
        "learning_rate": 1.0,
        "resolution": "512",
        "text_encoder_lr": [1e-5],
        "v2": False,
        "lr_warmup_steps": 0.05,
        "blocks_to_swap": "auto",
        "network_args": ["a=1", "b=2"],
        "report": False,
    }
    assert type(values["learning_rate"]) is float


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = config(tmp_path, "network_dim = 8\nnetwork_alpha = 2\nsdpa = true\nmax_train_steps = 5\n")
    line = f"--config_file {path.with_suffix('')} --network_dim 16 --max_train_steps 1600 --sdpa=false"
    args = resolve_options(line.split()).args
    assert (args.network_dim, args.network_alpha, args.max_train_steps, args.sdpa) == (16, 2.0, 1600, False)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("netwrk_dim = 1", "netwrk_dim is not an option. Did you mean network_dim"),
        ('network_dim = "8"', "it must be a whole number, but it is '8'"),
        ("network_dim = 8.5", "it must be a whole number, but it is 8.5"),
        ("network_dim = true", "it must be text or a number, but it is True"),
        ("network_dim = [1]", "it must be a single value, but it is [1]"),
        ('learning_rate = "1e-4"', "it must be a number, but it is the text '1e-4'; take the quotes away"),
        ("learning_rate = nan", "it must be a number, but it is 'nan'"),
        ("sdpa = 1", "it must be true or false, but it is 1"),
        ('loss_type = "l3"', "it must be one of l1, l2, huber, smooth_l1, but it is 'l3'"),
        ("zero_stage = 7", "it must be one of 0, 1, 2, 3, but it is '7'"),
        ("network_args = [[1]]", "it must be a single value, but it is [1]"),
        ("output_name = {a = {}}", "it must be text or a number, but it is {'a': {}}"),
        ("seed = 1979-05-27", "it must be text or a number, but it is 1979-05-27"),
        ('config_file = "x"', "this option is for the command line alone"),
        ("report = true\nno_report = true", "report sets this already"),
    ],
)
def test_a_wrong_entry_names_file_section_key_and_remedy(tmp_path: Path, entry: str, said: str) -> None:
    path = config(tmp_path, f"[part]\n{entry}\n")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}, [part") and said in problem


def test_all_entries_are_told_at_once(tmp_path: Path) -> None:
    path = config(tmp_path, 'a = 1\nseed = "x"\n[s]\nseed = 2\nsdpa = 3\n')
    assert len(problems_of(path)) == 4


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2", b"[[[", None])
def test_an_unreadable_file_is_a_user_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    (problem,) = problems_of(path)
    assert str(path) in problem and problem.startswith("--config_file: ")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 1\n")
    assert read_config(path) == {"seed": 1}


names = st.sampled_from([option.name for option in OPTIONS])
scalars = st.sampled_from(
    ["1", "-1", "1.5", "inf", "nan", "true", "0xFF", '"x"', '""', "'a'", "1979-05-27", "[]", "[1, 'a']", "{}", "9" * 50]
)
entries = st.builds(lambda name, value: f"{name} = {value}", names, scalars)
junk = st.text(alphabet=string.printable, max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(entries, junk, st.just("[section]"), st.just("[[list]]")), max_size=6))
def test_any_text_is_read_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        read_config(path)
    except UserError as error:
        assert error.problems


def value_of(option: Option) -> st.SearchStrategy[Any]:
    if option.is_switch:
        return st.booleans()
    if option.choices:
        return st.sampled_from(option.choices)
    single: st.SearchStrategy[Any] = {
        int: st.integers(-(2**40), 2**40),
        finite: st.floats(allow_nan=False, allow_infinity=False),
        int_or_float: st.one_of(st.integers(1, 10**6), st.floats(0.001, 0.999)),
        int_or_auto: st.one_of(st.integers(0, 99), st.just("auto")),
    }.get(option.type, st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12))
    return st.lists(single, max_size=3) if option.nargs else single


WRITTEN = [option for option in OPTIONS if not (option.secret or option.turns_off or "config" in option.name)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_what_is_written_reads_back_the_same(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    args = parse_arguments([])
    for option in data.draw(st.lists(st.sampled_from(WRITTEN), max_size=8, unique=True)):
        setattr(args, option.dest, data.draw(value_of(option)))
    path = tmp_path_factory.getbasetemp() / "written.toml"
    path.write_text(config_text(args), encoding="utf-8")
    values = read_config(path)
    assert {**vars(parse_arguments([])), **values} == vars(args)
    assert set(values) == {option.dest for option in WRITTEN if getattr(args, option.dest) != option.default}


def test_output_config_writes_no_secret_no_default_and_only_once(tmp_path: Path) -> None:
    line = [
        "--config_file",
        str(tmp_path / "new"),
        "--output_config",
        "--seed",
        "3",
        "--network_alpha",
        "1",
        "--no_report",
    ]
    for secret in SECRETS:
        line += [f"--{secret}", "hunter2"]
    options = resolve_options(line)
    path = write_config(options.as_given)
    text = path.read_text(encoding="utf-8")
    assert path == config_path(str(tmp_path / "new")) == tmp_path / "new.toml"
    assert read_config(path) == {"seed": 3, "report": False}
    assert "hunter2" not in text and not any(secret in text for secret in SECRETS)
    with pytest.raises(UserError, match="exists already"):
        write_config(options.as_given)
    assert [each.name for each in tmp_path.iterdir()] == ["new.toml"]


def test_secrets_are_marked_in_the_table() -> None:
    assert {option.name for option in OPTIONS if option.secret} == set(SECRETS)


def test_output_config_into_a_folder_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write_config(parse_arguments(["--config_file", str(tmp_path / "file" / "x.toml")]))
    with pytest.raises(UserError, match="needs --config_file"):
        write_config(parse_arguments([]))
