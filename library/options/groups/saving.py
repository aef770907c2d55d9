"""Options of the files that the run leaves."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Saving",
    (
        Option(
            "--output_dir",
            "The folder for the LoRA, the states, the previews and the report. It is made when missing. Required.",
            path,
        ),
        Option(
            "--output_name",
            'The name of the files, without ending. Unset, it is "last" for the final file, "epoch" and "at" for the others.',
        ),
        Option(
            "--save_precision",
            "The number format of the saved LoRA. Unset, it is that of training.",
            str,
            None,
            ("float", "fp16", "bf16"),
        ),
        Option(
            "--save_model_as",
            "The kind of file. ckpt and pt are pickles, which many programs refuse: keep safetensors.",
            str,
            "safetensors",
            ("ckpt", "pt", "safetensors"),
        ),
        Option(
            "--save_format",
            "The names of the LoRA's tensors: kohya's (ComfyUI, Forge and others), those of diffusers, or a file of each.",
            str,
            "kohya",
            ("kohya", "diffusers", "both"),
        ),
        Option("--save_every_n_epochs", "Save the LoRA at the end of every Nth epoch.", int),
        Option("--save_every_n_steps", "Save the LoRA every N steps.", int),
        Option("--save_every_n_minutes", "Save the LoRA and the state whenever N minutes have gone by.", int),
        Option("--save_n_epoch_ratio", "Save about this many times over the run, at the ends of epochs.", int),
        Option("--save_last_n_epochs", "Keep the files of the last N saved epochs only.", int),
        Option("--save_last_n_steps", "Keep the step files of the last N steps only.", int),
        switch(
            "--save_clip", "Save the CLIP encoders, with their LoRA merged in where it was trained, beside the LoRA."
        ),
        switch("--save_t5xxl", "Save the T5 encoder, with its LoRA merged in where it was trained, beside the LoRA."),
    ),
)
