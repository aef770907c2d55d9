"""Options that make a caption from what is written beside an image."""

from __future__ import annotations

from library.options.option import Group, Option, finite, switch

GROUP = Group(
    "Captions",
    (
        Option("--caption_extension", "The ending of caption files. A missing dot is added.", str, ".caption"),
        Option(
            "--caption_extention",
            "The same as --caption_extension, under its misspelt older name. It wins when both are given.",
        ),
        Option("--caption_separator", "What stands between the parts (tags) of a caption.", str, ","),
        Option("--caption_prefix", "Text that is put before every caption."),
        Option("--caption_suffix", "Text that is put after every caption."),
        switch("--shuffle_caption", "Put the parts of a caption in a new random order each time that it is used."),
        Option(
            "--keep_tokens",
            "How many parts at a caption's beginning stay where they are, whatever is shuffled or dropped.",
            int,
            0,
        ),
        Option(
            "--keep_tokens_separator",
            "A mark in captions: what stands before its first place is kept at the front, and what stands after its second is kept at the end.",
            str,
            "",
        ),
        Option(
            "--secondary_separator",
            "A separator inside a part, so that what it joins is shuffled and dropped as one. It becomes the caption separator afterwards.",
        ),
        switch("--enable_wildcard", "Choose one of {a|b|c} in captions, and one line of captions that have several."),
        Option(
            "--caption_dropout_rate", "The probability that a whole caption is replaced by an empty one.", finite, 0.0
        ),
        Option("--caption_dropout_every_n_epochs", "Use empty captions in every Nth epoch; 0 is never.", int, 0),
        Option("--caption_tag_dropout_rate", "The probability that a part of a caption is left out.", finite, 0.0),
        Option(
            "--token_warmup_min",
            "With --token_warmup_step: how many parts of a caption are used at the first step.",
            int,
            1,
        ),
        Option(
            "--token_warmup_step",
            "The step from which on all parts of a caption are used; a number below 1 is a share of all steps; 0 is from the start.",
            finite,
            0,
        ),
    ),
)
