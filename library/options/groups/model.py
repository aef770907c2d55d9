"""Options that name the model's files."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Model",
    (
        Option(
            "--pretrained_model_name_or_path",
            "The base model: a safetensors file of Stable Diffusion 3 or 3.5. It may hold the MMDiT alone, or the text encoders and the VAE too. Required.",
            path,
        ),
        Option(
            "--clip_l",
            "A file with the CLIP-L text encoder. It wins over the copy in the base model; an empty string means not given.",
            path,
        ),
        Option(
            "--clip_g",
            "A file with the CLIP-G text encoder. It wins over the copy in the base model; an empty string means not given.",
            path,
        ),
        Option(
            "--t5xxl",
            "A file with the T5-XXL text encoder. It wins over the copy in the base model; an empty string means not given.",
            path,
        ),
        Option(
            "--vae",
            "A file with the VAE. It wins over the copy in the base model, which is used when this is not given.",
            path,
        ),
        Option(
            "--tokenizer_cache_dir",
            "The folder where the three tokenizers are kept and looked for. Without it the usual cache of Hugging Face is used.",
            path,
        ),
        switch(
            "--disable_mmap_load_safetensors",
            "Read safetensors files into memory instead of mapping them. This can be faster on network disks.",
        ),
    ),
)
