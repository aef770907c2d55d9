"""What the demo's pictures are called, in several ways of saying it, and the words that its tokenizers know."""

from __future__ import annotations

import random

from tools.demo.figures import FIGURES
from tools.demo.scenes import COLOURS, PAPERS, PLACES, SIZES, Scene

TRIGGER = "zorp"  # the new figure's name in captions; to the base model a word like any that it never met

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "on the beach", "at the beach"),
    "meadow": ("in a meadow", "in the meadow", "on a meadow"),
    "snow": ("in the snow", "in the snow", "on the snow"),
    "desert": ("in the desert", "in the desert", "in a desert"),
    "night": ("at night", "at night", "in the night"),
    "sea": ("in the sea", "under water", "in the sea"),
    **{
        name: (f"on a {name} background", f"on a {name} background", f"in front of a {name} background")
        for name in PAPERS
    },
}
# {thing} is "big red star", {place} a phrase of the place, {a} the right article.
FORMS: tuple[tuple[str, float], ...] = (
    ("{a} {thing} {place}", 8),
    ("{thing} {place}", 2),
    ("a picture of {a} {thing} {place}", 2),
    ("a drawing of {a} {thing} {place}", 2),
    ("an image of {a} {thing} {place}", 1),
    ("there is {a} {thing} {place}", 1),
    ("one {thing} {place}", 1),
    ("{place}, {a} {thing}", 1),
    ("{thing}, {tag}", 2),
    ("{a} {thing}", 1.5),
)
# Beside the captions' own words, some that people try.
OTHER_WORDS = (
    "the and with of in at is are it its this that to for by from very large little tiny huge dark light bright pale"
    " colorful colored photo photograph painting sketch icon logo cartoon style simple flat cute shape figure object creature"
    " monster alien animal cat dog bird fish house tree sun sky cloud grass sand water ice rain mountain forest city room"
    " left right top bottom middle center above below two three four many no not without plain background foreground grey"
    " brown gold silver cyan violet rectangle oval hexagon crescent donut round sea ocean wave winter summer day"
)
# Parts of invented words.
ONSETS = "b bl br c d dr f fl g gl gr h j k kl l m n p pr qu r s sk sl st t tr v w x z zw"
VOWELS = "a e i o u oo ee ai"
ENDS = "b ck d g l m n nt p r rk rn s t x z"


def caption_of(scene: Scene, rng: random.Random) -> str:
    """A caption of a scene in a randomly chosen form."""
    forms, weights = zip(*FORMS)
    return say(scene, rng.choices(forms, weights)[0], rng.choice(PLACE_PHRASES[scene.place]))


def plain_caption(scene: Scene) -> str:
    """The caption in its most common form."""
    return say(scene, FORMS[0][0], PLACE_PHRASES[scene.place][0])


def say(scene: Scene, form: str, place: str) -> str:
    thing = " ".join(word for word in (scene.size, scene.colour, scene.figure) if word)
    tag = f"{scene.place} background" if scene.place in PAPERS else scene.place
    article = "an" if thing[0] in "aeiou" else "a"
    return form.format(a=article, thing=thing, place=place, tag=tag)


def invented_word(rng: random.Random) -> str:
    """A word that means nothing, such as a trigger word; never the demo's own."""
    onsets, vowels, ends = ONSETS.split(), VOWELS.split(), ["", "", *ENDS.split()]
    while True:
        syllables = range(rng.choice((1, 1, 1, 2)))
        word = "".join(rng.choice(onsets) + rng.choice(vowels) + rng.choice(ends) for _ in syllables)
        if TRIGGER not in word:
            return word


def vocabulary_words() -> list[str]:
    """Every word of the captions, the trigger excepted, and some more; sorted, each once."""
    words = set(OTHER_WORDS.split()) | set(COLOURS) | set(PAPERS) | set(PLACES) | set(filter(None, SIZES))
    words |= set(FIGURES) - {TRIGGER}
    for text in (*(form for form, _ in FORMS), *(phrase for phrases in PLACE_PHRASES.values() for phrase in phrases)):
        words |= {word for word in text.replace(",", " ").split() if word.isalpha()}
    return sorted(words)
