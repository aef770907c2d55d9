"""Options of the SD3 model family: text conditioning and the position table."""

from __future__ import annotations

from library.options.option import Group, Option, finite, switch

GROUP = Group(
    "Stable Diffusion 3",
    (
        Option(
            "--t5xxl_max_token_length",
            "How many tokens of a caption T5 sees, from 1 to 512. Longer captions are cut.",
            int,
            256,
        ),
        switch(
            "--apply_lg_attn_mask",
            "Give CLIP-L and CLIP-G the tokenizer's mask, and set the padded positions of their output to zero.",
        ),
        switch(
            "--apply_t5_attn_mask", "Give T5 the tokenizer's mask, and set the padded positions of its output to zero."
        ),
        Option(
            "--clip_l_dropout_rate",
            "The probability, for each image and step, that CLIP-L's output is replaced by zeros. It acts in training alone.",
            finite,
            0.0,
        ),
        Option(
            "--clip_g_dropout_rate",
            "The probability, for each image and step, that CLIP-G's output is replaced by zeros. It acts in training alone.",
            finite,
            0.0,
        ),
        Option(
            "--t5_dropout_rate",
            "The probability, for each image and step, that T5's output is replaced by zeros. It acts in training alone.",
            finite,
            0.0,
        ),
        Option(
            "--pos_emb_random_crop_rate",
            "The probability that the position table is cropped at a random place instead of its centre. For SD3.5.",
            finite,
            0.0,
        ),
        switch(
            "--enable_scaled_pos_embed",
            "Scale the position table to each resolution of the dataset, for training at several resolutions. For SD3.5, experimental.",
        ),
    ),
)
