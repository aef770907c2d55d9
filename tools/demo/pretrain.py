#!/usr/bin/env python3
"""Pre-train the demo's model from nothing, on drawings that this program makes itself: VAE, text encoders, MMDiT.

    python tools/demo/pretrain.py all --work_dir pretraining

About an hour on one core of a plain processor. The stages can be run one by one; each reads what the ones before it left in
`--work_dir`. `pack` writes tools/demo/weights/, from which tools/make_demo.py makes the demo without any training.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, Python looks into tools/ alone

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.common.files import save_safetensors
from library.sd3.mmdit import MMDiT
from library.sd3.tokenizers import Tokenizers, load_tokenizers
from library.sd3.vae import Vae
from tools.demo.captions import plain_caption
from tools.demo.denoiser_training import DenoiserTraining, make_pool, new_mmdit, train_denoiser
from tools.demo.judge import judge
from tools.demo.sampling import sample, sheet
from tools.demo.scenes import Scene, random_scene
from tools.demo.text_training import TextEncoders, TextTraining, new_clip, new_t5, train_text_encoders
from tools.demo.vocabularies import save_tokenizers
from tools.demo.vae_training import VAE_CONFIG, VaeTraining, measure_vae, train_vae

logger = logging.getLogger("tools.demo.pretrain")

WEIGHTS = Path(__file__).resolve().parent / "weights"
PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}
METADATA = {
    "modelspec.title": "SD3 demo: coloured figures in simple places, 64 x 64 pixels",
    "modelspec.description": "Trained from nothing by tools/demo/pretrain.py on drawings that it makes itself.",
    "modelspec.resolution": "64x64",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "text", "decoder", "denoiser", "look", "pack", "all"))
    parser.add_argument("--work_dir", type=Path, required=True, help="where the parts and the sample sheets go")
    parser.add_argument("--steps", type=int, help="training steps of the stage; default: its own")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--go_on", action="store_true", help="vae, denoiser: start from the weights in work_dir")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    work: Path = chosen.work_dir
    work.mkdir(parents=True, exist_ok=True)
    steps = {} if chosen.steps is None else {"steps": chosen.steps}
    if chosen.stage in ("vae", "all"):
        vae = train_vae(VaeTraining(**steps), read_vae(work) if chosen.go_on else None)
        logger.info("vae: %s", measure_vae(vae))
        save(work, "vae", vae)
    if chosen.stage in ("text", "all"):
        save_tokenizers(work / "tokenizers")
        encoders = train_text_encoders(read_tokenizers(work), TextTraining(**steps))
        for name, model in (("clip_l", encoders.clip_l), ("clip_g", encoders.clip_g), ("t5xxl", encoders.t5)):
            save(work, name, model)
    if chosen.stage in ("decoder", "all"):
        vae = train_vae(VaeTraining(decoder_only=True, latent_noise=0.06, learning_rate=1e-3, **steps), read_vae(work))
        logger.info("decoder: %s", measure_vae(vae))
        save(work, "vae", vae)
    if chosen.stage in ("denoiser", "all"):
        run_denoiser(work, DenoiserTraining(**steps), chosen.go_on)
    if chosen.stage == "look":
        look(work, read_denoiser(work), 0)
    if chosen.stage in ("pack", "all"):
        pack(work, WEIGHTS)


def run_denoiser(work: Path, settings: DenoiserTraining, go_on: bool) -> None:
    vae, encoders, tokenizers = read_vae(work), read_encoders(work), read_tokenizers(work)
    pool = make_pool(vae, settings.pictures, settings.seed)
    logger.info("%d pictures, latents: mean %.3f, deviation %.3f", len(pool.scenes), pool.mean.mean(), pool.mean.std())

    def keep(step: int, average: MMDiT) -> None:
        save(work, "mmdit", average)
        look(work, average, step)

    start = read_denoiser(work) if go_on else None
    save(work, "mmdit", train_denoiser(pool, encoders, tokenizers, settings, start, every=(500, keep)))


def look(work: Path, mmdit: MMDiT, step: int, prompts: int = 32) -> None:
    """Draw the same captions as always, write them as a sheet, and count how many pictures show what was asked for."""
    rng = random.Random(99)
    scenes = [random_scene(rng) for _ in range(prompts)]
    captions = [plain_caption(scene) for scene in scenes]
    images = sample(captions, mmdit, read_vae(work), read_encoders(work), read_tokenizers(work))
    sheet(images, columns=8, zoom=2).save(work / f"sheet_{step:06d}.png")
    verdicts = [judge(image) for image in images]
    right = {
        part: sum(getattr(scene, part) == getattr(verdict.scene, part) for scene, verdict in zip(scenes, verdicts))
        for part in Scene.__dataclass_fields__
    }
    error = sum(verdict.error for verdict in verdicts) / prompts
    logger.info("step %d, right of %d: %s; distance to the nearest drawing %.4f", step, prompts, right, error)


def save(work: Path, name: str, model: nn.Module) -> None:
    save_safetensors(work / f"{name}.safetensors", plain_state(model))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Without the second name of T5's embedding."""
    return {key: value for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}


def fill(work: Path, name: str, model: nn.Module) -> None:
    missing, unexpected = model.load_state_dict(load_file(work / f"{name}.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}, (missing, unexpected)
    model.eval().requires_grad_(False)


def read_vae(work: Path) -> Vae:
    vae = Vae(VAE_CONFIG)
    fill(work, "vae", vae)
    return vae


def read_denoiser(work: Path) -> MMDiT:
    mmdit = new_mmdit()
    fill(work, "mmdit", mmdit)
    return mmdit


def read_tokenizers(work: Path) -> Tokenizers:
    return load_tokenizers(work / "tokenizers", None)


def read_encoders(work: Path) -> TextEncoders:
    tokenizers = read_tokenizers(work)
    assert tokenizers.clip_l is not None and tokenizers.clip_g is not None and tokenizers.t5 is not None
    clip_l = new_clip("clip_l", tokenizers.clip_l.vocabulary)
    clip_g = new_clip("clip_g", tokenizers.clip_g.vocabulary)
    t5 = new_t5(tokenizers.t5.vocabulary)
    for name, model in (("clip_l", clip_l), ("clip_g", clip_g), ("t5xxl", t5)):
        fill(work, name, model)
    return TextEncoders(clip_l, clip_g, t5)


def pack(work: Path, folder: Path) -> None:
    """Write the single file in bfloat16, keyed as Stability's own, and the tokenizers."""
    tensors = {}
    for name, prefix in PREFIXES.items():
        for key, value in load_file(work / f"{name}.safetensors").items():
            tensors[prefix + key] = value.to(torch.bfloat16)
    save_safetensors(folder / "sd3_demo.safetensors", tensors, METADATA)
    save_tokenizers(folder / "tokenizers")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    logger.info("%s: %.2f MB", folder, size / 1e6)


if __name__ == "__main__":
    main()
