"""--network_args: every slip is named at once, before any model is loaded."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from library.common.errors import UserError
from networks import lycoris_arguments
from networks.arguments import FALSE_WORDS, TRUE_WORDS, arguments_of, boolean, split_arguments
from networks.lora_arguments import (
    PARSERS,
    LoraSettings,
    block_indices,
    check_network_args,
    embedder_ranks,
    read_settings,
    trains_t5xxl,
)


def test_the_guides_examples():
    texts = arguments_of(
        [
            *("context_attn_dim=2", "context_mlp_dim=3", "context_mod_dim=4"),
            *("x_attn_dim=5", "x_mlp_dim=6", "x_mod_dim=7", "verbose=True"),
            *("emb_dims=[2,3,4,5,6,7]", "train_block_indices=1,2,6-8"),
        ]
    )
    assert read_settings(texts, 16, 1.0) == LoraSettings(
        rank=16,
        alpha=1.0,
        context_attn_dim=2,
        context_mlp_dim=3,
        context_mod_dim=4,
        x_attn_dim=5,
        x_mlp_dim=6,
        x_mod_dim=7,
        verbose=True,
        emb_dims=(2, 3, 4, 5, 6, 7),
        train_block_indices=frozenset({1, 2, 6, 7, 8}),
    )


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("split_qvk=True", "Did you mean split_qkv?"),
        ("split_qkv=maybe", "split_qkv must be true or false"),
        ("x_attn_dim=-1", "x_attn_dim must be a whole number"),
        ("x_attn_dim=2.5", "x_attn_dim must be a whole number"),
        ("emb_dims=[1,2,3]", "emb_dims must be six whole numbers"),
        ("train_block_indices=5-2", "train_block_indices must be all, none"),
        ("train_block_indices=1;2", "train_block_indices must be all, none"),
        ("train_block_indices=22-24", "names 24; this model has blocks 0 to 23"),
        ("rank_dropout=1", "rank_dropout must be a number from 0 to below 1"),
        ("loraplus_lr_ratio=0", "loraplus_lr_ratio must be a positive number"),
        ("conv_alpha=nan", "conv_alpha must be a number"),
        ("init=svd", "init must be one of kaiming, orthogonal, pissa"),
        ("verbose", "not of the form key=value"),
        ("=3", "not of the form key=value"),
    ],
)
def test_each_slip_is_named(argument: str, words: str):
    problems = check_network_args([argument], depth=24)
    assert len(problems) == 1 and words in problems[0]


def test_all_slips_come_at_once():
    with pytest.raises(UserError) as error:
        read_settings({"foo": "1", "emb_dims": "1", "rank_dropout": "2"}, network_dim=-3, network_alpha=-1.0, depth=2)
    assert len(error.value.problems) == 5


def test_a_key_given_twice_is_an_error_unless_it_says_the_same():
    assert "given twice" in check_network_args(["x_attn_dim=2", "x_attn_dim=3"])[0]
    assert not check_network_args(["x_attn_dim=2", "x_attn_dim=2"])


def test_norm_cap_and_pissa_exclude_each_other_before_training():
    assert "init=pissa" in check_network_args(["init=pissa"], max_norm=1.0)[0]
    assert not check_network_args(["init=pissa"])
    assert not check_network_args(["init=orthogonal"], max_norm=1.0)


def test_dropout_in_two_places_must_agree():
    assert read_settings({"dropout": "0.1"}, neuron_dropout=0.1).dropout == 0.1
    assert read_settings({"dropout": "0.1"}).dropout == 0.1
    with pytest.raises(UserError, match="differ"):
        read_settings({"dropout": "0.1"}, neuron_dropout=0.2)


def test_values_may_come_with_their_types():
    settings = read_settings({"split_qkv": True, "x_attn_dim": 3, "emb_dims": [1, 2, 3, 4, 5, 6]})
    assert settings.split_qkv and settings.x_attn_dim == 3 and settings.emb_dims == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("word", [*TRUE_WORDS, "True", "TRUE", "Yes"])
def test_words_for_true(word: str):
    assert boolean(word) is True
    assert trains_t5xxl([f"train_t5xxl={word}"])


@pytest.mark.parametrize("word", [*FALSE_WORDS, "False", "NO"])
def test_words_for_false(word: str):
    assert boolean(word) is False
    assert not trains_t5xxl([f"train_t5xxl={word}"])


def test_t5_is_not_trained_by_default():
    assert not trains_t5xxl(None)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_any_set_of_blocks_can_be_written_as_ranges(blocks: set[int]):
    ranges: list[list[int]] = []
    for block in sorted(blocks):
        if ranges and ranges[-1][1] == block - 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    assert block_indices(text) == blocks
    assert block_indices(f"[{text}]") == blocks


@given(st.lists(st.integers(0, 512), min_size=6, max_size=6), st.booleans())
def test_embedder_ranks_with_and_without_brackets(ranks: list[int], brackets: bool):
    text = ",".join(map(str, ranks))
    assert embedder_ranks(f"[{text}]" if brackets else text) == tuple(ranks)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.text().map(str.strip), max_size=5))
def test_arguments_split_at_the_first_equals_sign(texts: dict[str, str]):
    actual, problems = split_arguments([f"{key}={value}" for key, value in texts.items()])
    assert actual == texts and not problems


@given(st.lists(st.one_of(st.text(), st.tuples(st.sampled_from(sorted(PARSERS)), st.text()).map("=".join))))
def test_whatever_is_given_is_accepted_or_named(arguments: list[str]):
    for check in (check_network_args, lycoris_arguments.check_network_args):
        for problem in check(arguments, 24):
            assert (problem.endswith((".", ":")) and "network" in problem) or "--" in problem or "dropout" in problem


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(lycoris_arguments.PARSERS)),
            st.sampled_from(["1", "0", "True", "loha", "boft", "0.5", "full", "-1", "x"]),
        ).map("=".join),
        max_size=4,
        unique=True,
    )
)
def test_lycoris_settings_are_read_exactly_when_the_check_finds_nothing(arguments: list[str]):
    problems = lycoris_arguments.check_network_args(arguments)
    try:
        lycoris_arguments.read_settings(arguments_of(arguments))
        accepted = True
    except UserError:
        accepted = False
    assert accepted == (not problems)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(PARSERS)),
            st.sampled_from(["1", "0", "True", "all", "0.5", "pissa", "-1", "1,2,3,4,5,6"]),
        ).map("=".join),
        max_size=4,
        unique=True,
    )
)
def test_settings_are_read_exactly_when_the_check_finds_nothing(arguments: list[str]):
    problems = check_network_args(arguments, 24)
    try:
        read_settings(arguments_of(arguments), depth=24)
        accepted = True
    except UserError:
        accepted = False
    assert accepted == (not problems)
