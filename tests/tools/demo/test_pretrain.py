"""tools/demo/pretrain.py: each stage learns, and what it packs is what the trainer reads."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.sd3.checkpoint import locate_parts
from library.sd3.models import load_mmdit, load_vae
from library.sd3.text_encoders import load_clip, load_t5
from library.sd3.vae import LATENT_SCALE, LATENT_SHIFT
from tools.demo.captions import TRIGGER, caption_of, invented_word, vocabulary_words
from tools.demo.denoiser_training import SHORT, DenoiserTraining, batch_loss, make_pool, new_mmdit, train_denoiser
from tools.demo.scenes import SIDE, random_scene
from tools.demo.text_training import TextTraining, sentence, train_text_encoders
from tools.demo.vae_training import (
    VaeTraining,
    match_deviation,
    measure_vae,
    new_vae,
    random_crop,
    random_picture,
    to_tensor,
    train_vae,
)
from tools.demo.pretrain import pack, read_encoders, read_tokenizers, read_vae, save, save_tokenizers


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage run for a few steps."""
    folder = tmp_path_factory.mktemp("pretraining")
    save_tokenizers(folder / "tokenizers")
    save(folder, "vae", train_vae(VaeTraining(steps=6, batch_size=2, calibration_pictures=8)))
    encoders = train_text_encoders(read_tokenizers(folder), TextTraining(steps=4, batch_size=4))
    for name, model in (("clip_l", encoders.clip_l), ("clip_g", encoders.clip_g), ("t5xxl", encoders.t5)):
        save(folder, name, model)
    settings = DenoiserTraining(steps=4, batch_size=4, pictures=8, long_from=0.5, long_share=1.0)
    pool = make_pool(read_vae(folder), settings.pictures, seed=0)
    save(folder, "mmdit", train_denoiser(pool, read_encoders(folder), read_tokenizers(folder), settings))
    return folder


def test_what_is_packed_loads_as_any_checkpoint_does(work: Path, tmp_path: Path) -> None:
    pack(work, tmp_path)
    files = locate_parts(tmp_path / "sd3_demo.safetensors")
    assert files.clip_l is not None and files.clip_g is not None and files.t5xxl is not None and files.vae is not None
    packed = load_vae(files.vae, "cpu", torch.float32).state_dict()
    for name, trained in read_vae(work).state_dict().items():
        assert torch.equal(packed[name], trained.to(torch.bfloat16).float())
    assert load_mmdit(files.mmdit, "cpu", None).dtype == torch.bfloat16
    for part in (files.clip_l, files.clip_g):
        load_clip(part, "cpu", torch.float32)
    load_t5(files.t5xxl, "cpu", torch.float32)
    assert (tmp_path / "tokenizers" / "google_t5-v1_1-xxl" / "tokenizer.json").is_file()


def test_a_new_vae_keeps_the_latents_near_their_mean() -> None:
    measured = measure_vae(new_vae(), pictures=4)
    assert measured["latent_mean_scenes"] == pytest.approx(LATENT_SHIFT, abs=0.5)


def test_vae_training_lowers_the_error() -> None:
    settings = VaeTraining(batch_size=2, calibration_pictures=8)
    before, after = (measure_vae(train_vae(replace(settings, steps=n)), pictures=8) for n in (1, 25))
    assert after["psnr_scenes"] > before["psnr_scenes"] + 1


def test_latents_have_the_deviation_that_sd3_divides_by() -> None:
    vae = new_vae()
    images = to_tensor([random_picture(random.Random(i), 0.0) for i in range(8)])
    before = vae.decode(vae.encode(images)[0])
    match_deviation(vae, seed=0, pictures=32)
    assert measure_vae(vae, pictures=32)["latent_deviation_scenes"] == pytest.approx(1 / LATENT_SCALE, rel=0.1)
    torch.testing.assert_close(vae.decode(vae.encode(images)[0]), before, atol=1e-4, rtol=1e-4)


def test_the_denoiser_learns(work: Path) -> None:
    """The loss on the pictures that it is trained on falls below what predicting the mean would give."""
    encoders, tokenizers = read_encoders(work), read_tokenizers(work)
    settings = DenoiserTraining(steps=60, batch_size=8, pictures=8, learning_rate=2e-3, average_decay=0.9)
    pool = make_pool(read_vae(work), settings.pictures, seed=0)

    def loss(model: torch.nn.Module) -> float:
        generator = torch.Generator().manual_seed(7)
        values = [
            batch_loss(model, pool, range(8), SHORT, encoders, tokenizers, settings, random.Random(7), generator)  # type: ignore[arg-type]
            for _ in range(8)
        ]
        return float(torch.stack(values).mean())

    with torch.no_grad():
        before = loss(new_mmdit())
    trained = train_denoiser(pool, encoders, tokenizers, settings)
    with torch.no_grad():
        assert loss(trained) < 0.9 * before


def test_the_trigger_word_is_in_nothing_that_the_base_model_learns() -> None:
    rng = random.Random(0)
    assert TRIGGER not in vocabulary_words()
    assert not any(TRIGGER in sentence(rng) or TRIGGER in caption_of(random_scene(rng), rng) for _ in range(2000))
    assert not any(TRIGGER in invented_word(rng) for _ in range(2000))


def test_pieces_of_pictures_are_a_quarter_and_inside() -> None:
    rng = random.Random(0)
    for _ in range(20):
        assert random_crop(random_picture(rng, 0.5), rng).size == (SIDE // 2, SIDE // 2)
