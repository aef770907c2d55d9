"""What options of the loss, the data, the precision and the conditioning do to a real run."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.common.errors import UserError
from library.common.seeds import StepGenerators, seed_everything
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, dataset_file, image_folder, train

SGD = {"optimizer_type": "SGD", "learning_rate": "1", "max_train_steps": 1}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_accumulated_batches_are_one_large_batch(workshop: Workshop, tmp_path: Path, monkeypatch):
    """Four samples at once, two and two, and three and one: the same step, with the same noise for each sample."""
    images = image_folder(tmp_path / "images")
    seed_generators = StepGenerators.seed

    def seed_once(self: StepGenerators, seed: int) -> None:
        if not hasattr(self, "seeded"):
            seed_generators(self, 0)
        self.seeded = True  # type: ignore[attr-defined]

    monkeypatch.setattr("library.training.step.sample_timesteps", lambda flow, count, *_: torch.full((count,), 500.0))
    found = {}
    for batch, accumulation in ((4, 1), (2, 2), (1, 4), (3, 2)):
        data = dataset_file(
            tmp_path / f"{batch}.toml", [f"image_dir = {str(images)!r}\nnum_repeats = 4"], f"batch_size = {batch}"
        )
        with monkeypatch.context() as patch:
            folder = tmp_path / f"out{batch}"
            words = ("--cache_latents", "--cache_latents_to_disk", "--cache_dir", str(tmp_path / "cache"))
            patch.setattr(StepGenerators, "seed", seed_once)
            more = {"dataset_config": data, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0}
            found[batch] = train(workshop, folder, UNET, *words, **SGD, **more).weights()
    for batch in (2, 1, 3):
        for key, tensor in found[4].items():
            assert torch.allclose(tensor, found[batch][key], rtol=1e-4, atol=1e-7), (batch, key)
    assert max(t.abs().max() for key, t in found[4].items() if "lora_up" in key) > 1e-4


def test_the_gradient_is_clipped_to_max_grad_norm_and_zero_turns_it_off(workshop: Workshop, tmp_path: Path):
    """With plain SGD at rate 1 the step's length is the gradient's."""
    length = {}
    for limit in ("0", "0.001"):
        run = train(workshop, tmp_path / limit, UNET, **SGD, max_grad_norm=limit)
        ups = [t.float().norm() ** 2 for key, t in run.weights().items() if "lora_up" in key]
        length[limit] = float(sum(ups) ** 0.5)
        assert run.values("gradient_norm") == pytest.approx(
            [length["0"]], rel=0.01
        )  # what is logged is the unclipped one
    assert length["0"] > 0.01 and length["0.001"] == pytest.approx(0.001, rel=0.01)


def test_averaged_weights_are_saved_beside_or_instead(workshop: Workshop, tmp_path: Path):
    plain = train(workshop, tmp_path / "a", UNET).weights()
    beside = train(workshop, tmp_path / "b", UNET, ema_decay="0.5")
    instead = train(workshop, tmp_path / "c", UNET, ema_decay="0.5", ema_save="instead")
    assert same(plain, beside.weights())
    averaged = beside.weights("lora-ema.safetensors")
    assert same(averaged, instead.weights()) and not (instead.folder / "lora-ema.safetensors").exists()
    assert not same(averaged, plain)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ({"initial_step": 4}, [(5, 1), (6, 1), (7, 1)]),
        ({"initial_epoch": 2}, [(7, 2)]),
    ],
)
def test_a_run_starts_at_the_step_that_is_given(workshop: Workshop, tmp_path: Path, words, steps):
    whole = train(workshop, tmp_path / "a", UNET, max_train_steps=7, lr_scheduler="linear")
    run = train(workshop, tmp_path / "b", UNET, max_train_steps=7, lr_scheduler="linear", **words)
    logged = [(line["step"], line["epoch"]) for line in run.lines() if "loss/current" in line]
    assert logged == steps
    assert run.values("lr/unet") == whole.values("lr/unet")[-len(steps) :]


def test_data_before_the_first_step_is_passed_over_when_asked(workshop: Workshop, tmp_path: Path):
    """With the weights at rest the losses are those of the same batches of a whole run."""
    still = {"learning_rate": "1e-12", "max_train_steps": 7}
    whole = train(workshop, tmp_path / "a", UNET, **still).losses
    skipped = train(workshop, tmp_path / "b", UNET, "--skip_until_initial_step", initial_step=4, **still).losses
    again = train(workshop, tmp_path / "c", UNET, initial_step=4, **still).losses
    assert skipped == pytest.approx(whole[4:]) and again == pytest.approx(whole[:3])


def test_a_start_beyond_the_end_is_told(workshop: Workshop, tmp_path: Path):
    with pytest.raises(UserError, match="initial_step 9 starts at step 9, but the run ends at step 2"):
        train(workshop, tmp_path, UNET, initial_step=9)


# --- masks, prior loss, preservation, multiplier -----------------------------------------------------------------------


def test_transparent_parts_do_not_count(workshop: Workshop, tmp_path: Path):
    """Left half transparent: half of the loss is left where the loss is even; fully transparent: none."""
    alpha = np.zeros((64, 64), dtype=np.uint8)
    losses = {}
    for name, opaque in (("none", 0), ("half", 32), ("all", 64)):
        alpha[:, :opaque] = 255
        images = image_folder(tmp_path / "images" / "x", alpha=alpha)
        for words in ((), ("--alpha_mask",), ("--alpha_mask", "--cache_latents")):
            data = dataset_file(tmp_path / "data.toml", [f"image_dir = {str(images)!r}"])
            run = train(workshop, tmp_path / "out" / f"{name}{len(words)}", UNET, *words, dataset_config=data)
            losses[name, len(words)] = run.losses[0]
    assert losses["none", 1] == losses["none", 2] == 0
    assert losses["all", 1] == losses["all", 0] == losses["none", 0]
    for way in (1, 2):  # a cached latent is another draw of the posterior
        assert 0.2 * losses["all", way] < losses["half", way] < 0.8 * losses["all", way]


def test_mask_images_weigh_the_loss_only_with_masked_loss(workshop: Workshop, tmp_path: Path):
    images, losses = image_folder(tmp_path / "images"), {}
    for name, value in (("black", 0), ("grey", 51), ("white", 255)):
        masks = tmp_path / name
        masks.mkdir()
        Image.new("RGB", (64, 64), (value, 0, 0)).save(masks / "0.png")  # the red channel counts
        subset = f"image_dir = {str(images)!r}\nconditioning_data_dir = {str(masks)!r}"
        data = dataset_file(tmp_path / f"{name}.toml", [subset])
        losses[name] = train(workshop, tmp_path / "out" / name, UNET, "--masked_loss", dataset_config=data).losses[0]
        with pytest.raises(UserError, match="needs --masked_loss"):
            train(workshop, tmp_path / "out" / name, UNET, dataset_config=data)
    assert losses["black"] == 0 and losses["grey"] == pytest.approx(0.2 * losses["white"], rel=1e-3)


def test_a_masked_loss_without_masks_is_told(workshop: Workshop, tmp_path: Path, caplog):
    train(workshop, tmp_path, UNET, "--masked_loss", max_train_steps=1)
    assert "--masked_loss changes nothing: no subset has masks" in caplog.text


def test_regularisation_images_weigh_prior_loss_weight(workshop: Workshop, tmp_path: Path):
    subsets = [f"image_dir = {str(image_folder(tmp_path / 'train'))!r}"]
    subsets.append(f"image_dir = {str(image_folder(tmp_path / 'prior'))!r}\nis_reg = true")
    data = dataset_file(tmp_path / "data.toml", subsets)
    found = {}
    for weight in ("1", "0.25", "0"):
        run = train(
            workshop,
            tmp_path / weight,
            UNET,
            dataset_config=data,
            prior_loss_weight=weight,
            learning_rate="1e-12",
        )
        found[weight] = sorted(run.losses)
    assert found["0"][0] == 0 and max(found["0"]) > 0
    changed = [b / a for a, b in zip(found["1"], sorted(found["0.25"])) if b != pytest.approx(a)]
    assert sum(found["1"]) - sum(found["0.25"]) == pytest.approx(0.75 * (sum(found["1"]) - sum(found["0"]))), changed


def test_preserved_images_are_trained_towards_the_base_model(workshop: Workshop, tmp_path: Path):
    """An untouched LoRA predicts what the base model does: the first loss is 0, and nothing moves."""
    subset = f"image_dir = {str(image_folder(tmp_path / 'images'))!r}\ncustom_attributes = {{diff_output_preservation = true}}"
    data = dataset_file(tmp_path / "data.toml", [subset])
    run = train(workshop, tmp_path / "out", UNET, dataset_config=data, max_train_steps=1)
    assert run.losses == [0] and run.moved() == {"unet": 0}


def test_a_datasets_network_multiplier_reaches_the_lora(workshop: Workshop, tmp_path: Path):
    """At the first step the change is zero, and its gradient is in proportion to the multiplier."""
    images, moved = image_folder(tmp_path / "images"), {}
    for multiplier in (0, 1, 2):
        dataset = f"batch_size = 1\nnetwork_multiplier = {multiplier}"
        data = dataset_file(tmp_path / "data.toml", [f"image_dir = {str(images)!r}"], dataset)
        run = train(workshop, tmp_path / str(multiplier), UNET, **SGD, dataset_config=data, max_grad_norm=0)
        moved[multiplier] = run.moved()["unet"]
    assert moved[0] == 0 < moved[1] and moved[2] == pytest.approx(2 * moved[1], rel=1e-4)


# --- number formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "computes", "trained", "vae"),
    [
        ((), torch.float32, torch.float32, torch.float32),
        (("--mixed_precision", "bf16"), torch.bfloat16, torch.float32, torch.bfloat16),
        (("--mixed_precision", "bf16", "--full_bf16"), torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (("--mixed_precision", "bf16", "--no_half_vae"), torch.bfloat16, torch.float32, torch.float32),
        (("--mixed_precision", "fp16", "--full_fp16"), torch.bfloat16, torch.bfloat16, torch.bfloat16),  # on a CPU
    ],
)
def test_number_formats(workshop: Workshop, tmp_path: Path, words, computes, trained, vae):
    run = train(workshop, tmp_path, UNET, *words, max_train_steps=1)
    trainer = run.trainer
    assert trainer.denoiser.dtype == computes and trainer.encoders.model("t5xxl").dtype == computes
    assert {parameter.dtype for parameter in trainer.optimization.parameters} == {trained}
    assert next(trainer.codec.vae.parameters()).dtype == vae
    assert all(np.isfinite(loss) for loss in run.losses) and run.moved()["unet"] > 0


# --- conditioning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 77, 512])
def test_t5_gives_as_many_rows_as_asked(workshop: Workshop, tmp_path: Path, length: int):
    for folder, more in (("live", ()), ("cached", ("--cache_text_encoder_outputs",))):
        run = train(
            workshop,
            tmp_path / folder,
            UNET,
            *more,
            t5xxl_max_token_length=length,
            max_train_steps=1,
            train_batch_size=1,
        )
        batch = next(iter(run.trainer.session_data().loader.batches(0)))
        context, pooled, _ = run.trainer.make_conditioner().of_batch(
            batch, StepGenerators(torch.device("cpu")), training=True
        )
        assert context.shape[1] == 77 + length and pooled.shape == (2, 192)


def test_masks_act_alike_live_and_cached(workshop: Workshop, tmp_path: Path):
    masks = ("--apply_lg_attn_mask", "--apply_t5_attn_mask")
    live = train(workshop, tmp_path / "a", UNET, *masks, max_train_steps=1).losses
    cached = train(workshop, tmp_path / "b", UNET, *masks, "--cache_text_encoder_outputs", max_train_steps=1).losses
    single = [train(workshop, tmp_path / mask, UNET, mask, max_train_steps=1).losses for mask in masks]
    plain = train(workshop, tmp_path / "c", UNET, max_train_steps=1).losses
    assert live == pytest.approx(cached, rel=1e-6)
    assert len({round(losses[0], 6) for losses in (live, plain, *single)}) == 4


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_a_dropout_rate_zeroes_its_own_encoder_in_training_alone(workshop: Workshop, tmp_path: Path, name: str):
    run = train(workshop, tmp_path, UNET, max_train_steps=1, **{f"{name}_dropout_rate": "1"})
    batch = next(iter(run.trainer.session_data().loader.batches(0)))
    draws = StepGenerators(torch.device("cpu"))
    trained, _, _ = run.trainer.make_conditioner().of_batch(batch, draws, training=True)
    checked, _, _ = run.trainer.make_conditioner().of_batch(batch, draws, training=False)
    shares = {"clip_l": np.s_[:, :77, :64], "clip_g": np.s_[:, :77, 64:192], "t5": np.s_[:, 77:]}
    for share, place in shares.items():
        assert checked[place].abs().max() > 0
        assert torch.equal(trained[place], torch.zeros_like(trained[place]) if share == name else checked[place])


def test_the_position_table_is_cropped_at_random_in_training_alone(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, UNET, pos_emb_random_crop_rate="1", max_train_steps=1)
    seed_everything(3)
    positions = run.trainer.make_conditioner().positions
    crops = [positions.of_size((64, 64), training=True) for _ in range(8)]
    assert len({float(crop.sum()) for crop in crops if crop is not None}) > 4
    assert positions.of_size((64, 64), training=False) is None
    state = random.getstate()
    positions.of_size((64, 64), training=False)
    assert random.getstate() == state


def test_the_position_table_is_scaled_to_the_datasets_resolution(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, UNET, "--enable_scaled_pos_embed", max_train_steps=1)
    plain = train(workshop, tmp_path / "plain", UNET, max_train_steps=1)
    table = run.trainer.make_conditioner().positions.of_size((64, 64), training=False)
    assert table is not None and table.shape == (1, 16, 128)
    assert run.losses != plain.losses


# --- the compiler --------------------------------------------------------------------------------------------------------


def test_a_compiled_block_trains_the_same(workshop: Workshop, tmp_path: Path):
    plain = train(workshop, tmp_path / "a", UNET, max_train_steps=1)
    compiled = train(workshop, tmp_path / "b", UNET, "--torch_compile", dynamo_backend="eager", max_train_steps=1)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert compiled.moved() == pytest.approx(plain.moved(), rel=1e-3)


@pytest.mark.parametrize(("backend", "why"), [("ofi", "has no such backend"), ("tvm", "needs the package tvm")])
def test_a_compiler_that_is_not_there_is_told(workshop: Workshop, tmp_path: Path, backend: str, why: str):
    with pytest.raises(UserError, match=f"dynamo_backend {backend}.* {why}"):
        train(workshop, tmp_path, UNET, "--torch_compile", dynamo_backend=backend)
