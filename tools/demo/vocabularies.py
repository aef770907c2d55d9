"""The demo's small tokenizers: a byte-pair vocabulary for both CLIPs, a Unigram vocabulary for T5. Any text can be told in them."""

from __future__ import annotations

import json
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

from library.common.files import write_text
from tools.demo.captions import vocabulary_words

CLIP_FOLDER = "openai_clip-vit-large-patch14"
CLIP_G_FOLDER = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"  # the same files: the CLIPs share their vocabulary
T5_FOLDER = "google_t5-v1_1-xxl"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges). "!" is 0, CLIP-G's padding; begin and end are the highest ids, which is how CLIP finds the end."""
    alphabet = byte_letters()
    merges = byte_pair_merges(vocabulary_words())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def byte_letters() -> list[str]:
    """A printable letter for each byte, in CLIP's order: the printable bytes as themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Join the most frequent pair of neighbours until every word is one token (Sennrich et al. 2016, section 3.2)."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in split:
            for i in reversed(range(len(pieces) - 1)):
                if (pieces[i], pieces[i + 1]) == best:
                    pieces[i : i + 2] = ["".join(best)]
    return merges


def t5_vocabulary() -> list[tuple[str, float]]:
    """(piece, log probability): padding, end and unknown first, as in T5; then words, syllables and letters."""
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -20.0, "▁": -5.0}
    pieces |= {"▁" + spelling: -3.0 for word in vocabulary_words() for spelling in (word, word.capitalize())}
    syllables = [vowel + consonant for vowel in "aeiou" for consonant in "bdglmnprstx"]
    pieces |= dict.fromkeys(syllables, -7.0)
    pieces |= dict.fromkeys(string.ascii_letters + string.digits + string.punctuation, -8.0)
    pieces |= {"▁" + letter: -8.0 for letter in string.ascii_letters if "▁" + letter not in pieces}
    return list(pieces.items())


def save_tokenizers(folder: Path) -> None:
    """Write CLIP's and T5's tokenizers below `folder`, each where the trainer looks for it."""
    vocabulary, merges = clip_vocabulary()
    clip_config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    clip_folder = folder / CLIP_FOLDER
    write_text(clip_folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")))
    write_text(clip_folder / "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    write_text(clip_folder / "tokenizer_config.json", json.dumps(clip_config, indent=1))
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=t5_vocabulary(), extra_ids=0).save_pretrained(folder / T5_FOLDER)
