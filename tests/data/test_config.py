"""The dataset file and the command line: every key, its place, its precedence, and a clear word for every mistake."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from library.common.errors import UserError
from library.data.command_line import CommandLineData, data_options
from library.data.config import read_datasets
from library.data.settings import CaptionSettings, DatasetSettings

NOTHING = CommandLineData()


def data_of(**options: object) -> CommandLineData:
    """What the command line says with these options."""
    return CommandLineData.from_options(options)


def read(
    folder: Path, text: str, command_line: CommandLineData = NOTHING, name: str = "data.toml"
) -> list[DatasetSettings]:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_datasets(path, command_line)


def problems(folder: Path, text: str, command_line: CommandLineData = NOTHING, name: str = "data.toml") -> list[str]:
    with pytest.raises(UserError) as raised:
        read(folder, text, command_line, name)
    return raised.value.problems


# --- what a file says ---

EVERYTHING = """
[general]
shuffle_caption = true
caption_extension = "txt"
cache_info = true
custom_attributes = { source = "general" }

[[datasets]]
resolution = [832, 1216]
batch_size = 4
enable_bucket = true
min_bucket_reso = 300
max_bucket_reso = 1300
bucket_reso_steps = 32
bucket_no_upscale = false
network_multiplier = 2
validation_split = 0
validation_seed = 3
resize_interpolation = "area"
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "one"
  num_repeats = 3
  caption_separator = ";"
  keep_tokens = 1
  keep_tokens_separator = "|||"
  secondary_separator = "&&"
  shuffle_caption = false
  enable_wildcard = true
  caption_prefix = "pre"
  caption_suffix = "suf"
  caption_dropout_rate = 1
  caption_dropout_every_n_epochs = 4
  caption_tag_dropout_rate = 0.5
  token_warmup_min = 2
  token_warmup_step = 10
  color_aug = true
  flip_aug = true
  face_crop_aug_range = [1, 2.5]
  random_crop = true
  custom_attributes = { diff_output_preservation = true }
  resize_interpolation = "box"
  class_tokens = "cat"
  is_reg = true
  alpha_mask = true
  cache_info = false

  [[datasets.subsets]]
  image_dir = "two"
"""


def test_every_key_arrives(tmp_path: Path) -> None:
    (dataset,) = read(tmp_path, EVERYTHING, data_of(prior_loss_weight=0.25))
    assert dataset.resolution == (832, 1216)
    assert (dataset.batch_size, dataset.enable_bucket, dataset.bucket_no_upscale) == (4, True, False)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps) == (288, 1312, 32)
    assert (dataset.network_multiplier, dataset.validation_split, dataset.validation_seed) == (2.0, 0.0, 3)
    one, two = dataset.subsets
    assert one.captions == CaptionSettings(
        caption_separator=";",
        keep_tokens=1,
        keep_tokens_separator="|||",
        secondary_separator="&&",
        shuffle_caption=False,
        enable_wildcard=True,
        caption_prefix="pre",
        caption_suffix="suf",
        caption_dropout_rate=1.0,
        caption_dropout_every_n_epochs=4,
        caption_tag_dropout_rate=0.5,
        token_warmup_min=2,
        token_warmup_step=10.0,
    )
    assert (one.image_dir, one.num_repeats, one.class_tokens, one.is_reg) == (Path("one"), 3, "cat", True)
    assert (one.color_aug, one.flip_aug, one.random_crop, one.alpha_mask) == (True, True, True, True)
    assert (one.face_crop_aug_range, one.resize_interpolation) == ((1.0, 2.5), "box")
    assert one.custom_attributes == {"diff_output_preservation": True}
    assert (one.loss_weight, one.cache_info) == (0.25, False)
    assert (two.captions.keep_tokens, two.captions.shuffle_caption, two.resize_interpolation) == (2, True, "area")
    assert (two.custom_attributes, two.cache_info, two.loss_weight) == ({"source": "general"}, True, 1.0)
    assert (one.caption_extension, two.caption_extension) == (".txt", ".txt")


def test_json_says_the_same_as_toml(tmp_path: Path) -> None:
    from library.data.config_file import read_source

    from_toml = read(tmp_path, EVERYTHING)
    tables = read_source(tmp_path / "data.toml").tables
    assert read(tmp_path, json.dumps(tables), name="data.JSON") == from_toml


def test_null_in_json_means_not_given(tmp_path: Path) -> None:
    tables = {
        "datasets": [{"resolution": 512, "batch_size": None, "subsets": [{"image_dir": "a", "num_repeats": None}]}]
    }
    (dataset,) = read(tmp_path, json.dumps(tables), data_of(train_batch_size=7), "data.json")
    assert (dataset.batch_size, dataset.subsets[0].num_repeats) == (7, 1)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    path.write_bytes(b"\xef\xbb\xbf[[datasets]]\r\nresolution = 512\r\n[[datasets.subsets]]\r\nimage_dir = 'a'\r\n")
    assert read_datasets(path, NOTHING)[0].resolution == (512, 512)


def test_datasets_may_differ_in_style(tmp_path: Path) -> None:
    text = """
    [general]
    resolution = 512
    caption_extension = ".txt"
    class_tokens = "of no use to metadata"
    [[datasets]]
    [[datasets.subsets]]
    image_dir = "a"
    [[datasets]]
    [[datasets.subsets]]
    metadata_file = "b.jsonl"
    cache_info = true
    alpha_mask = true
    """
    folder, metadata = read(tmp_path, text)
    assert folder.subsets[0].style == "folder"
    assert metadata.subsets[0].style == "metadata"
    assert metadata.subsets[0].class_tokens is None
    assert metadata.subsets[0].cache_info
    assert metadata.subsets[0].alpha_mask


# --- precedence ---

_VALUES = {
    "num_repeats": st.integers(1, 9),
    "shuffle_caption": st.booleans(),
    "caption_prefix": st.sampled_from(["a", "b", "c", ""]),
    "caption_dropout_rate": st.sampled_from([0.0, 0.25, 1.0]),
    "flip_aug": st.booleans(),
    "keep_tokens": st.integers(0, 5),
}
_TABLE = st.fixed_dictionaries({}, optional=_VALUES)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_TABLE, _TABLE, _TABLE, _TABLE)
def test_the_innermost_value_wins(
    tmp_path: Path, general: dict, dataset: dict, subset: dict, given_options: dict
) -> None:
    tables = {
        "general": general,
        "datasets": [{"resolution": 512, **dataset, "subsets": [{"image_dir": "a", **subset}]}],
    }
    options = {("dataset_repeats" if key == "num_repeats" else key): value for key, value in given_options.items()}
    (made,) = read(tmp_path, json.dumps(tables), data_of(**options), "data.json")
    default = {"num_repeats": 1, "shuffle_caption": False, "caption_prefix": "", "caption_dropout_rate": 0.0}
    default |= {"flip_aug": False, "keep_tokens": 0}
    (one,) = made.subsets
    for key, wanted in (default | given_options | general | dataset | subset).items():
        found = getattr(one.captions, key) if hasattr(one.captions, key) else getattr(one, key)
        assert found == wanted, key


def test_command_line_values_are_the_fallback(tmp_path: Path) -> None:
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'"
    options = data_of(
        resolution="832,1216",
        train_batch_size=3,
        dataset_repeats=5,
        enable_bucket=True,
        min_bucket_reso=128,
        max_bucket_reso=2048,
        bucket_reso_steps=32,
        face_crop_aug_range="0.5,2",
        validation_split=0.1,
        validation_seed=9,
        caption_extension=".tags",
        resize_interpolation="lanczos",
        token_warmup_step=0.5,
        alpha_mask=True,
    )
    (dataset,) = read(tmp_path, text, options)
    (one,) = dataset.subsets
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((832, 1216), 3, True)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps) == (128, 2048, 32)
    assert (dataset.validation_split, dataset.validation_seed) == (0.1, 9)
    assert (one.num_repeats, one.face_crop_aug_range, one.caption_extension) == (5, (0.5, 2.0), ".tags")
    assert (one.resize_interpolation, one.captions.token_warmup_step, one.alpha_mask) == ("lanczos", 0.5, True)


def test_the_default_bucket_limits_follow_the_resolution_and_given_ones_do_not(tmp_path: Path) -> None:
    text = "[[datasets]]\nresolution = {}\nenable_bucket = true\n{}\n[[datasets.subsets]]\nimage_dir = 'a'"
    assert read(tmp_path, text.format(64, ""))[0].min_bucket_reso == 64
    assert read(tmp_path, text.format(1536, ""))[0].max_bucket_reso == 1536
    assert "min_bucket_reso = 256 is above" in problems(tmp_path, text.format(64, "min_bucket_reso = 256"))[0]
    assert "max_bucket_reso = 1024 is below" in problems(tmp_path, text.format(1536, "max_bucket_reso = 1024"))[0]


# --- mistakes ---


def test_all_mistakes_are_told_together_with_file_line_table_key_and_the_nearest_key(tmp_path: Path) -> None:
    text = """
[general]
shufle_caption = true
enable_bucket = "yes"

[[datasets]]
resolution = [512, 768, 3]
network_multiplier = "1"
  [[datasets.subsets]]
  image_dir = 'a'
  num_repeats = 2.5
  [[datasets.subsets]]
  caption_dropout_rate = 2
  face_crop_aug_range = [1, 0.2]
"""
    found = problems(tmp_path, text, data_of(caption_tag_dropout_rate=-1.0, face_crop_aug_range="7"))
    file = str(tmp_path / "data.toml")
    expected = [
        ("--face_crop_aug_range must be two numbers",),
        ("The command line", "caption_tag_dropout_rate", "at least 0"),
        (file, "line 3,", "[general]", 'unknown key "shufle_caption"', 'did you mean "shuffle_caption"?'),
        (file, "line 4,", "[general]", '"enable_bucket" must be true or false', "'yes'"),
        (file, "line 7,", "dataset 1", '"resolution" must be a whole number or [width, height]'),
        (file, "line 8,", "dataset 1", '"network_multiplier" must be a number'),
        (file, "line 11,", "dataset 1, subset 1", '"num_repeats" must be a whole number', "2.5"),
        (file, "line 13,", "dataset 1, subset 2", '"caption_dropout_rate" must be at most 1'),
        (file, "line 14,", "dataset 1, subset 2", '"face_crop_aug_range"', "smaller one first"),
        (file, "line 12,", "dataset 1, subset 2", 'key "image_dir" is missing'),
    ]
    for parts in expected:
        assert any(all(part in problem for part in parts) for problem in found), (parts, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize("key", ["debug_dataset", "prior_loss_weight", "max_token_length"])
@pytest.mark.parametrize("header", ["[general]", "[[datasets]]", "[[datasets.subsets]]"])
def test_command_line_options_are_refused_in_the_file(tmp_path: Path, key: str, header: str) -> None:
    text = "[general]\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'a'\n".replace(
        header, f"{header}\n{key} = 1"
    )
    (problem,) = problems(tmp_path, text)
    assert f"--{key}" in problem


@pytest.mark.parametrize(
    ("place", "key", "told"),
    [
        ("general", "image_dir = 'x'", "belongs in [[datasets.subsets]]"),
        ("datasets", "is_reg = true", "belongs in [[datasets.subsets]]"),
        ("subsets", "resolution = 64", "belongs in [[datasets]] or [general]"),
        ("subsets", "validation_split = 0.1", "belongs in [[datasets]] or [general]"),
        ("subsets", "conditioning_data_dir = 'x'", "needs --masked_loss"),
        ("datasets", "train_batch_size = 1", 'did you mean "batch_size"?'),
        ("subsets", "repeats = 1", 'did you mean "num_repeats"?'),
        ("subsets", "zzzzz = 1", "known keys: alpha_mask, cache_info"),
        ("top", "resolution = 64", "stands outside of all tables"),
        ("top", "dataset = 64", 'did you mean "datasets"?'),
    ],
)
def test_a_key_in_the_wrong_place_is_told_its_place(tmp_path: Path, place: str, key: str, told: str) -> None:
    lines = {
        "top": "",
        "general": "[general]",
        "datasets": "[[datasets]]\nresolution = 64",
        "subsets": "[[datasets.subsets]]\nimage_dir = 'a'",
    }
    lines[place] += "\n" + key
    (problem,) = problems(tmp_path, "\n".join(lines.values()))
    assert told in problem


@pytest.mark.parametrize("key", ["caption_extension", "class_tokens", "is_reg"])
@pytest.mark.parametrize("level", ["dataset", "subset"])
def test_keys_of_caption_files_are_refused_with_metadata(tmp_path: Path, key: str, level: str) -> None:
    line = f"{key} = true" if key == "is_reg" else f"{key} = 'x'"
    inner, outer = (line, "") if level == "subset" else ("", line)
    text = f"[[datasets]]\nresolution = 64\n{outer}\n[[datasets.subsets]]\nmetadata_file = 'm.json'\n{inner}"
    (problem,) = problems(tmp_path, text)
    assert key in problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no dataset"),
        ("[datasets]\nresolution = 64", "write [[datasets]]"),
        (
            "[[general]]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'",
            "general must be one table",
        ),
        ("[[datasets]]\nresolution = 64", "has no subset"),
        ("[[datasets]]\nresolution = 64\nsubsets = 3", "write [[datasets.subsets]]"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'", "resolution is not set"),
        ("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = ''", "must not be empty"),
        ("[[datasets]]\nresolution = 0\n[[datasets.subsets]]\nimage_dir = 'a'", "must be above 0"),
        ("[[datasets]]\nresolution = true\n[[datasets.subsets]]\nimage_dir = 'a'", "whole number"),
        (
            "[[datasets]]\nresolution = 500\n[[datasets.subsets]]\nimage_dir = 'a'",
            "resolution 500x500 is not a multiple",
        ),
        (
            "[[datasets]]\nresolution = 500\nenable_bucket=true\nbucket_reso_steps=40\n[[datasets.subsets]]\nimage_dir = 'a'",
            "bucket_reso_steps = 40 is not a multiple of 16",
        ),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\n[[datasets.subsets]]\nmetadata_file='b'",
            "mixed",
        ),
        ("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\nnum_repeats = 0", "no subset is left"),
        ("[[datasets]]\nresolution = nan\n[[datasets.subsets]]\nimage_dir='a'", "whole number"),
        ("[[datasets]]\nresolution = 64\nvalidation_split = inf\n[[datasets.subsets]]\nimage_dir='a'", "finite"),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\nresize_interpolation='cubik'",
            "must be one of 'lanczos'",
        ),
        (
            "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\ncaption_extension='png'",
            'caption_extension = ".png" is that of images',
        ),
    ],
)
def test_a_faulty_structure_is_explained(tmp_path: Path, text: str, told: str) -> None:
    found = problems(tmp_path, text)
    assert any(told in problem for problem in found), found


def test_a_windows_path_in_double_quotes_gets_a_hint(tmp_path: Path) -> None:
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "C:\\images\\cats"'
    (problem,) = problems(tmp_path, text)
    assert "line 4" in problem
    assert "'single quotes'" in problem


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.yaml", b"", "must end in .toml or .json"),
        ("data.toml", b"[general\nx = 1", "line 1"),
        ("data.json", b'{"datasets": [}', "line 1"),
        ("data.json", b'{"datasets": [], "datasets": []}', 'key "datasets" stands twice'),
        ("data.json", b"[]", "must hold an object"),
        ("data.toml", b'a = "caf\xe9"', "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_datasets(path, NOTHING)
    assert str(path) in str(raised.value)
    assert told in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.toml"):
        read_datasets(tmp_path / "gone.toml", NOTHING)


def test_line_numbers_are_not_misled_by_text_over_several_lines(tmp_path: Path) -> None:
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "a"\ncaption_prefix = """\n[general]\nkeep = 1\n"""\nnope = 1'
    (problem,) = problems(tmp_path, text)
    assert "line 9, dataset 1, subset 1" in problem


def test_mistakes_in_inline_tables_are_told_without_a_line(tmp_path: Path) -> None:
    text = 'datasets = [{resolution = 64, subsets = [{image_dir = "a", nope = 1}]}]'
    (problem,) = problems(tmp_path, text)
    assert "dataset 1, subset 1" in problem


# --- warnings ---


def test_a_subset_without_repeats_is_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\nnum_repeats = 0\n[[datasets.subsets]]\nimage_dir='b'"
    (dataset,) = read(tmp_path, text)
    assert [subset.image_dir for subset in dataset.subsets] == [Path("b")]
    assert "num_repeats is below 1" in caplog.text


def test_a_folder_listed_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = (
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\n[[datasets.subsets]]\nimage_dir='./b/../a'"
    )
    (dataset,) = read(tmp_path, text)
    assert len(dataset.subsets) == 1
    assert "listed before" in caplog.text


@pytest.mark.parametrize("split", [-0.1, 1.5])
def test_a_split_outside_its_range_holds_nothing_out(
    tmp_path: Path, split: float, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"[[datasets]]\nresolution = 64\nvalidation_split = {split}\n[[datasets.subsets]]\nimage_dir='a'"
    assert read(tmp_path, text)[0].validation_split == 0
    assert "outside 0..1" in caplog.text


def test_data_options_beside_a_file_are_said_to_be_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'"
    with caplog.at_level(logging.WARNING):
        read(tmp_path, text, data_of(train_data_dir="x", in_json="y"))
    assert "--train_data_dir and --in_json" in caplog.text


# --- masks ---

MASKS = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir='a'\nconditioning_data_dir='m'\n"


def test_with_masked_loss_a_folder_of_masks_makes_the_style(tmp_path: Path) -> None:
    (dataset,) = read(tmp_path, MASKS + "custom_attributes = {a = 1}", data_of(masked_loss=True, alpha_mask=True))
    (subset,) = dataset.subsets
    assert (subset.style, subset.conditioning_data_dir) == ("mask", Path("m"))
    assert not subset.alpha_mask
    assert subset.custom_attributes == {"a": 1}


@pytest.mark.parametrize("line", ["random_crop = true", "alpha_mask = true", "is_reg = true"])
def test_what_masks_exclude_is_refused(tmp_path: Path, line: str) -> None:
    (problem,) = problems(tmp_path, MASKS + line, data_of(masked_loss=True))
    assert line.split()[0] in problem


def test_masks_for_some_subsets_only_are_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, MASKS + "[[datasets.subsets]]\nimage_dir='b'", data_of(masked_loss=True))
    assert any("every subset" in problem for problem in found)


# --- the command line alone ---


def test_numbered_folders_become_subsets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ["train/10_a cat_b", "train/3", "train/0_none", "train/name", "train/.hidden", "reg/2_cat"]:
        (tmp_path / name).mkdir(parents=True)
    options = data_of(
        train_data_dir=str(tmp_path / "train"),
        reg_data_dir=str(tmp_path / "reg"),
        resolution="64",
        prior_loss_weight=0.5,
        dataset_repeats=99,
    )
    (dataset,) = read_datasets(None, options)
    found = [
        (one.image_dir.name, one.num_repeats, one.class_tokens, one.is_reg, one.loss_weight) for one in dataset.subsets
    ]
    assert found == [
        ("10_a cat_b", 10, "a cat_b", False, 1.0),
        ("3", 3, "", False, 1.0),
        ("2_cat", 2, "cat", True, 0.5),
    ]
    assert "0_none" in caplog.text
    assert "train/name" in caplog.text.replace("\\", "/")
    assert ".hidden" not in caplog.text


def test_folders_without_a_number_are_an_error_that_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="10_name"):
        read_datasets(None, data_of(train_data_dir=str(tmp_path), resolution="64"))


def test_both_missing_folders_are_told_at_once(tmp_path: Path) -> None:
    options = data_of(train_data_dir=str(tmp_path / "a"), reg_data_dir=str(tmp_path / "b"), resolution="64")
    with pytest.raises(UserError) as raised:
        read_datasets(None, options)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["--train_data_dir", "--reg_data_dir"]


def test_a_metadata_file_on_the_command_line(tmp_path: Path) -> None:
    options = data_of(train_data_dir="images", in_json="meta.jsonl", resolution="64", dataset_repeats=4)
    (dataset,) = read_datasets(None, options)
    (subset,) = dataset.subsets
    assert (subset.style, subset.image_dir, subset.metadata_file) == ("metadata", Path("images"), Path("meta.jsonl"))
    assert subset.num_repeats == 4


def test_masks_on_the_command_line_are_the_fallback_of_every_subset(tmp_path: Path) -> None:
    for name in ["train/1_a", "train/1_b", "masks/1_a"]:
        (tmp_path / name).mkdir(parents=True)
    masks = {"conditioning_data_dir": str(tmp_path / "masks"), "masked_loss": True, "resolution": "64"}
    (dataset,) = read_datasets(None, data_of(train_data_dir=str(tmp_path / "train"), **masks))
    assert [one.conditioning_data_dir for one in dataset.subsets] == [tmp_path / "masks/1_a", tmp_path / "masks"]
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='1_a'\n[[datasets.subsets]]\nimage_dir='x'\nconditioning_data_dir='own'"
    (dataset,) = read(tmp_path, text, data_of(**masks))
    assert [one.conditioning_data_dir for one in dataset.subsets] == [tmp_path / "masks/1_a", Path("own")]


def test_masks_exclude_regularisation_and_pass_over_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1_a").mkdir()
    masks = {"conditioning_data_dir": "masks", "masked_loss": True, "resolution": "64"}
    with pytest.raises(UserError, match="--reg_data_dir can't be used"):
        read_datasets(None, data_of(train_data_dir=str(tmp_path), reg_data_dir=str(tmp_path), **masks))
    (dataset,) = read_datasets(None, data_of(in_json="m.json", **masks))
    assert dataset.subsets[0].style == "metadata"
    assert "no effect on metadata" in caplog.text


def test_no_data_at_all_is_said() -> None:
    with pytest.raises(UserError, match="--dataset_config"):
        read_datasets(None, data_of(resolution="64"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", (512, 512)), ("832,1216", (832, 1216)), ("(832, 1216)", (832, 1216)), ("64x96", (64, 96))],
)
def test_resolution_strings(tmp_path: Path, text: str, size: tuple[int, int]) -> None:
    (tmp_path / "1_a").mkdir()
    assert read_datasets(None, data_of(train_data_dir=str(tmp_path), resolution=text))[0].resolution == size


@pytest.mark.parametrize("text", ["big", "1,2,3", "-5", "1.5", ","])
def test_faulty_resolution_strings(text: str) -> None:
    with pytest.raises(UserError, match="--resolution"):
        read_datasets(None, data_of(in_json="a.json", resolution=text))


OTHER_THAN_DEFAULT = {
    "train_data_dir": "other",
    "reg_data_dir": "reg",
    "in_json": "meta.json",
    "conditioning_data_dir": "masks",
    "masked_loss": True,
    "alpha_mask": True,
    "prior_loss_weight": 0.5,
    "resolution": "128",
    "train_batch_size": 2,
    "dataset_repeats": 2,
    "enable_bucket": True,
    "min_bucket_reso": 64,
    "max_bucket_reso": 2048,
    "bucket_reso_steps": 32,
    "bucket_no_upscale": True,
    "validation_split": 0.5,
    "validation_seed": 1,
    "resize_interpolation": "area",
    "cache_info": True,
    "caption_extension": ".txt",
    "caption_separator": ";",
    "keep_tokens": 1,
    "keep_tokens_separator": "|",
    "secondary_separator": "&",
    "shuffle_caption": True,
    "enable_wildcard": True,
    "caption_prefix": "a",
    "caption_suffix": "b",
    "caption_dropout_rate": 0.5,
    "caption_dropout_every_n_epochs": 1,
    "caption_tag_dropout_rate": 0.5,
    "token_warmup_min": 3,
    "token_warmup_step": 5.0,
    "color_aug": True,
    "flip_aug": True,
    "random_crop": True,
    "face_crop_aug_range": "1,2",
}


@pytest.mark.parametrize("name", data_options())
def test_every_command_line_value_changes_the_settings(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ["train/1_a", "other/2_b", "reg/1_c", "masks/1_a"]:
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base: dict[str, object] = {"train_data_dir": "train", "resolution": "64"}
    needs: dict[str, dict[str, object]] = {
        "min_bucket_reso": {"resolution": "512"},
        "dataset_repeats": {"in_json": "meta.json"},
        "prior_loss_weight": {"reg_data_dir": "reg"},
        "masked_loss": {"conditioning_data_dir": "masks"},
        "conditioning_data_dir": {"masked_loss": True},
    }
    base |= needs.get(name, {})
    without = read_datasets(None, data_of(**base))
    assert read_datasets(None, data_of(**(base | {name: OTHER_THAN_DEFAULT[name]}))) != without
