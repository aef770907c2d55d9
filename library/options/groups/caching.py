"""Options of the caches of latents and of text encoder outputs."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Caching",
    (
        switch(
            "--cache_latents",
            "Encode every image once, before training, and keep the latents in memory. The VAE leaves the device then.",
        ),
        switch("--cache_latents_to_disk", "Keep the latents in files, for later runs too. It implies --cache_latents."),
        Option("--vae_batch_size", "How many images the VAE encodes at once.", int, 1),
        switch(
            "--cache_text_encoder_outputs", "Encode every caption once, before training, and free the text encoders."
        ),
        switch(
            "--cache_text_encoder_outputs_to_disk",
            "Keep the encoded captions in files, for later runs too. It implies --cache_text_encoder_outputs.",
        ),
        Option(
            "--text_encoder_batch_size",
            "How many captions are encoded at once while they are cached. Unset, it is the batch size.",
            int,
        ),
        Option(
            "--text_cache_variants",
            "How many random variants of each caption are cached, where captions are shuffled, dropped or chosen at random. Training then draws among them.",
            int,
        ),
        Option("--cache_dir", "The folder for cache files. Unset, they are written beside the images.", path),
        switch(
            "--skip_cache_check",
            "Trust cache files that exist without opening them. Quicker to start, but a stale cache goes unseen.",
        ),
    ),
)
