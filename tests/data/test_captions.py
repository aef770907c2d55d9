"""Captions: what is said to stay stays, what is said to change changes at its rate, and no marker reaches the text encoder."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from library.data.captions import (
    CaptionPipeline,
    deterministic,
    expand_wildcards,
    first_choices,
    is_random,
    joiner,
    lost_in_variants,
    warm_up_length,
)
from library.data.settings import CaptionSettings

WORDS = st.text(st.characters(categories=("Ll", "Nd"), max_codepoint=0x24F), min_size=1, max_size=6)
PIECES = st.lists(WORDS, min_size=1, max_size=8)
SEPARATORS = st.sampled_from([",", ";", ", ", " | ", "、", "|", " ", "--", "."])


def at(caption: str, seed: int = 0, step: int = 0, epoch: int = 1, max_train_steps: int | None = None, **values) -> str:
    pipeline = CaptionPipeline(CaptionSettings(**values), max_train_steps)
    return pipeline.at(caption, random.Random(seed), step, epoch)


def fixed(caption: str, **values) -> str:
    return CaptionPipeline(CaptionSettings(**values)).deterministic(caption)


# --- nothing asked for, nothing changed ---


@given(st.text(st.characters(exclude_characters="\n"), max_size=40))
def test_without_settings_a_caption_is_fed_as_it_is(caption: str) -> None:
    assert fixed(caption) == at(caption) == caption.strip()


def test_only_the_first_line_is_fed_without_wildcards() -> None:
    assert fixed("one, two\nthree") == at("one, two\nthree") == "one, two"


# --- separators (row 28) ---


@given(PIECES, SEPARATORS, st.integers(0, 2**32))
def test_pieces_are_rejoined_with_their_own_separator(pieces: list[str], separator: str, seed: int) -> None:
    if any(separator.strip() in piece for piece in pieces if separator.strip()):
        return
    caption = separator.join(pieces)
    shuffled = at(caption, seed, shuffle_caption=True, caption_separator=separator)
    assert sorted(piece.strip() for piece in shuffled.split(joiner(separator))) == sorted(pieces)
    if separator.strip() != ",":
        assert "," not in shuffled


@pytest.mark.parametrize(
    ("separator", "rejoined"),
    [(",", "a, b"), (";", "a; b"), (", ", "a, b"), (" | ", "a | b"), ("、", "a、b"), (" ", "a b"), ("，", "a，b")],
)
def test_what_stands_between_rejoined_pieces(separator: str, rejoined: str) -> None:
    assert fixed(f"a{separator}b", shuffle_caption=True, caption_separator=separator) == rejoined


def test_the_measured_case_of_the_original() -> None:
    """The original gave "c, PRE a, b" for "a; b; c" with the separator ";" and the prefix "PRE"."""
    for seed in range(20):
        text = at("a; b; c", seed, shuffle_caption=True, caption_separator=";", caption_prefix="PRE")
        assert text.startswith("PRE ")
        assert sorted(text.removeprefix("PRE ").split("; ")) == ["a", "b", "c"]


def test_empty_pieces_vanish() -> None:
    assert fixed(",a,, b , ,", shuffle_caption=True) == "a, b"


def test_the_secondary_separator_becomes_the_separator_at_the_end() -> None:
    caption = "a&&b, c&&d, e"
    assert fixed(caption, secondary_separator="&&") == "a, b, c, d, e"
    for seed in range(20):
        text = at(caption, seed, shuffle_caption=True, secondary_separator="&&")
        assert "a, b" in text
        assert "c, d" in text
        assert "&&" not in text


# --- what stays ---


@given(
    PIECES,
    st.integers(0, 10),
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 20),
)
def test_the_first_keep_tokens_pieces_stay_first_whatever_happens(
    pieces: list[str], keep: int, seed: int, shuffle: bool, rate: float, step: int
) -> None:
    text = at(
        ", ".join(pieces),
        seed,
        step,
        keep_tokens=keep,
        shuffle_caption=shuffle,
        caption_tag_dropout_rate=rate,
        token_warmup_min=0,
        token_warmup_step=10,
    )
    found = text.split(", ") if text else []
    assert found[: min(keep, len(pieces))] == pieces[:keep]
    assert not Counter(found) - Counter(pieces)


@given(PIECES, PIECES, PIECES, st.integers(0, 2**32), st.booleans())
def test_the_marker_fixes_head_and_tail_and_is_never_fed(
    head: list[str], middle: list[str], tail: list[str], seed: int, shuffle: bool
) -> None:
    caption = " ||| ".join(", ".join(part) for part in (head, middle, tail))
    text = at(caption, seed, shuffle_caption=shuffle, keep_tokens_separator="|||", keep_tokens=1)
    assert "|" not in text
    found = text.split(", ")
    assert found[: len(head)] == head
    assert found[len(found) - len(tail) :] == tail
    inside = found[len(head) : len(found) - len(tail)]
    assert sorted(inside) == sorted(middle)
    if not shuffle:
        assert inside == middle
        assert text == fixed(caption, keep_tokens_separator="|||")


@pytest.mark.parametrize("caption", ["a ||| b", "||| b", "a |||", "a ||| b ||| c ||| d", "|||"])
@pytest.mark.parametrize("values", [{}, {"shuffle_caption": True}, {"enable_wildcard": True}])
def test_no_marker_is_left_wherever_it_stands(caption: str, values: dict) -> None:
    text = at(caption, keep_tokens_separator="|||", **values)
    assert "|" not in text
    assert (
        sorted(text.split(", ")) == sorted(piece for piece in caption.replace(" ", "").split("|||") if piece)
        or not text
    )


def test_without_a_marker_in_the_caption_keep_tokens_counts() -> None:
    for seed in range(20):
        text = at("a, b, c, d", seed, shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=2)
        assert text.startswith("a, b, ")


@given(PIECES, st.integers(0, 2**32), st.sampled_from([0.0, 1.0]))
def test_prefix_and_suffix_enclose_the_caption_and_never_move(pieces: list[str], seed: int, rate: float) -> None:
    values = {"caption_prefix": "PRE, PRE,", "caption_suffix": "SUF", "shuffle_caption": True}
    text = at(", ".join(pieces), seed, caption_tag_dropout_rate=rate, **values)
    assert text.startswith("PRE, PRE,")
    assert text.endswith(" SUF")
    assert (text == "PRE, PRE, SUF") == (rate == 1.0)


def test_a_marker_in_the_prefix_makes_the_prefix_the_head() -> None:
    values = {"caption_prefix": "trigger |||", "keep_tokens_separator": "|||"}
    assert fixed("a, b", **values) == "trigger, a, b"
    for seed in range(10):
        assert at("a, b, c", seed, shuffle_caption=True, **values).startswith("trigger, ")


# --- what changes ---


@given(PIECES, st.integers(0, 2**32))
def test_shuffling_loses_and_adds_nothing(pieces: list[str], seed: int) -> None:
    assert sorted(at(",".join(pieces), seed, shuffle_caption=True).split(", ")) == sorted(pieces)


def test_every_order_is_as_likely_as_any_other() -> None:
    rng, pipeline = random.Random(0), CaptionPipeline(CaptionSettings(shuffle_caption=True))
    counts = Counter(pipeline.at("a,b,c", rng, 0, 1) for _ in range(6000))
    assert len(counts) == 6
    assert chi_square(counts.values()) < 20.5  # 5 degrees of freedom, p = 0.001


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**32))
def test_the_caption_dropout_rate_holds(rate: float, seed: int) -> None:
    rng, pipeline = random.Random(seed), CaptionPipeline(CaptionSettings(caption_dropout_rate=rate, caption_prefix="p"))
    empty = sum(pipeline.at("a", rng, 0, 1) == "" for _ in range(2000))
    assert abs(empty - 2000 * rate) <= 5 * (2000 * rate * (1 - rate)) ** 0.5 + 1


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**32))
def test_the_tag_dropout_rate_holds(rate: float, seed: int) -> None:
    caption = ",".join(["keep", *map(str, range(2000))])
    text = at(caption, seed, caption_tag_dropout_rate=rate, keep_tokens=1)
    assert text.startswith("keep")
    kept = len(text.split(",")) - 1
    assert abs(kept - 2000 * (1 - rate)) <= 5 * (2000 * rate * (1 - rate)) ** 0.5 + 1


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_epoch_counted_from_one_is_fed_without_captions(every: int) -> None:
    empty = [epoch for epoch in range(1, 8) if at("a", epoch=epoch, caption_dropout_every_n_epochs=every) == ""]
    assert empty == [epoch for epoch in range(1, 8) if epoch % every == 0]


def test_warm_up_takes_more_and_more_pieces_in_order() -> None:
    lengths = []
    for step in range(12):
        text = at("k,a,b,c,d,e", step=step, keep_tokens=1, token_warmup_min=1, token_warmup_step=10)
        pieces = text.split(", ")
        assert pieces == ["k", "a", "b", "c", "d", "e"][: len(pieces)]
        lengths.append(len(pieces) - 1)
    assert lengths == [1 + step * 4 // 10 for step in range(10)] + [5, 5]


def test_warm_up_may_be_a_fraction_of_the_run() -> None:
    values = {"token_warmup_min": 0, "token_warmup_step": 0.5}
    assert at("a,b", step=0, max_train_steps=100, **values) == ""
    assert at("a,b", step=49, max_train_steps=100, **values) == "a"
    assert at("a,b", step=50, max_train_steps=100, **values) == "a, b"
    with pytest.raises(ValueError, match="max_train_steps"):
        CaptionPipeline(CaptionSettings(**values))


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 500), st.data())
def test_warm_up_lengths_grow_and_stay_within_the_caption(pieces: int, smallest: int, steps: int, data) -> None:
    step = data.draw(st.integers(0, steps - 1))
    length = warm_up_length(pieces, smallest, step, steps)
    assert min(smallest, pieces) <= length <= pieces
    assert length >= warm_up_length(pieces, smallest, max(step - 1, 0), steps)


# --- wildcards ---


def test_wildcards_choose_uniformly() -> None:
    rng, pipeline = random.Random(1), CaptionPipeline(CaptionSettings(enable_wildcard=True))
    counts = Counter(pipeline.at("a {red|green|blue|dark grey} hat", rng, 0, 1) for _ in range(4000))
    assert set(counts) == {f"a {color} hat" for color in ("red", "green", "blue", "dark grey")}
    assert chi_square(counts.values()) < 16.3  # 3 degrees of freedom, p = 0.001


def test_lines_are_chosen_uniformly() -> None:
    rng, pipeline = random.Random(2), CaptionPipeline(CaptionSettings(enable_wildcard=True))
    counts = Counter(pipeline.at("one\ntwo\nthree", rng, 0, 1) for _ in range(3000))
    assert set(counts) == {"one", "two", "three"}
    assert chi_square(counts.values()) < 13.8  # 2 degrees of freedom, p = 0.001


@given(st.text(st.sampled_from("ab|{} ,"), max_size=20))
def test_doubled_braces_are_single_braces_and_nothing_is_chosen_in_them(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert expand_wildcards(escaped, random.Random(0).choice) == text


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("{{a|b}}", "{a|b}"),
        ("{{{a}}}", "{a}"),
        ("{a}", "a"),
        ("{}", "{}"),
        ("{a", "{a"),
        ("a}", "a}"),
        ("{a|}", "a"),
        ("{x, y|z}", "x, y"),
    ],
)
def test_edges_of_wildcards(caption: str, expected: str) -> None:
    assert fixed(caption, enable_wildcard=True) == expected


def test_braces_stay_without_enable_wildcard() -> None:
    assert at("{a|b} {{c}}") == "{a|b} {{c}}"


def test_wildcards_act_in_prefix_and_suffix() -> None:
    values = {"enable_wildcard": True, "caption_prefix": "{p|q}", "caption_suffix": "{{s}}"}
    assert {at("x", seed, **values) for seed in range(30)} == {"p x {s}", "q x {s}"}


def test_a_choice_may_hold_several_pieces() -> None:
    found = {at("{a, b|c}, d", seed, enable_wildcard=True, shuffle_caption=True, keep_tokens=1) for seed in range(60)}
    assert found == {"a, b, d", "a, d, b", "c, d"}


# --- caching (row 11) ---

RANDOM_VALUES = {
    "shuffle_caption": True,
    "enable_wildcard": True,
    "caption_dropout_rate": 0.5,
    "caption_dropout_every_n_epochs": 2,
    "caption_tag_dropout_rate": 0.5,
    "token_warmup_step": 10.0,
}


@pytest.mark.parametrize("name", RANDOM_VALUES)
def test_every_setting_that_makes_captions_random_is_named(name: str) -> None:
    values = CaptionSettings(**{name: RANDOM_VALUES[name]})
    assert is_random(values) == [name]
    pipeline, rng = CaptionPipeline(values), random.Random(0)
    fed = {pipeline.at("{a|b}, c, d", rng, step, 1 + step % 2) for step in range(50)}
    assert len(fed) > 1


CALM = st.fixed_dictionaries(
    {},
    optional={
        "caption_separator": SEPARATORS,
        "keep_tokens": st.integers(0, 5),
        "keep_tokens_separator": st.just("|||"),
        "secondary_separator": st.just("&&"),
        "caption_prefix": st.sampled_from(["", "pre", "{a|b}"]),
        "caption_suffix": st.sampled_from(["", "suf"]),
        "token_warmup_min": st.integers(0, 5),
    },
)


@given(
    CALM,
    st.text(st.sampled_from("ab{}|&,; \n"), max_size=30),
    st.integers(0, 99),
    st.integers(0, 500),
    st.integers(1, 9),
)
def test_what_is_not_random_is_the_same_at_every_step_and_is_what_a_cache_holds(
    values: dict, caption: str, seed: int, step: int, epoch: int
) -> None:
    made = CaptionSettings(**values)
    assert is_random(made) == []
    pipeline = CaptionPipeline(made)
    text = pipeline.at(caption, random.Random(seed), step, epoch)
    assert text == pipeline.deterministic(caption) == pipeline.variant(caption, random.Random(seed))
    assert "|||" not in text or "|||" not in values.values()


def test_variants_are_the_same_for_the_same_seed_and_differ_between_captions_and_seeds() -> None:
    pipeline = CaptionPipeline(CaptionSettings(shuffle_caption=True, caption_dropout_rate=1.0, token_warmup_step=10))
    caption = ", ".join("abcdefgh")
    first = pipeline.variants(caption, 5, seed=1)
    assert first == pipeline.variants(caption, 5, seed=1)
    assert first[:3] == pipeline.variants(caption, 3, seed=1)
    assert len(set(first)) == 5
    assert first != pipeline.variants(caption, 5, seed=2)
    assert all(sorted(text.split(", ")) == list("abcdefgh") for text in first)  # neither dropped nor cut by the warm-up
    assert lost_in_variants(pipeline.settings) == ["token_warmup_step"]
    assert lost_in_variants(CaptionSettings(shuffle_caption=True)) == []


@given(st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 5))
def test_a_fetch_is_repeatable_from_its_random_state(seed: int, step: int, epoch: int) -> None:
    values = {**RANDOM_VALUES, "token_warmup_step": 40}
    assert at("a,{b|c},d,e\nf,g", seed, step, epoch, **values) == at("a,{b|c},d,e\nf,g", seed, step, epoch, **values)


# --- validation ---


def test_validation_captions_have_no_chance_left() -> None:
    random_settings = CaptionSettings(caption_prefix="{p|q}", caption_suffix="{{s}}", keep_tokens=1, **RANDOM_VALUES)
    calm = deterministic(random_settings)
    assert is_random(calm) == []
    text = first_choices("{a|b}, c, {{d}}\nsecond line", random_settings)
    assert CaptionPipeline(calm).at(text, random.Random(0), 0, 2) == "p a, c, {d} {s}"


def chi_square(counts) -> float:
    counts = list(counts)
    mean = sum(counts) / len(counts)
    return sum((count - mean) ** 2 / mean for count in counts)
