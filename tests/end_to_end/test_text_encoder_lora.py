"""LoRA of the text encoders, and LoRA files that a run starts from, in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.common.errors import UserError
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, dataset_file, image_folder, train

T5 = ("--network_args", "train_t5xxl=True")


def rates(run) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in run.trainer.optimization.optimizer.optimizer.param_groups}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["2e-3"], [2e-3, 2e-3, 2e-3]),
        (["2e-3", "3e-3"], [2e-3, 3e-3, 3e-3]),
        (["2e-3", "3e-3", "4e-3"], [2e-3, 3e-3, 4e-3]),
    ],
)
def test_one_to_three_text_encoder_rates_train_the_three_encoders(workshop: Workshop, tmp_path: Path, given, expected):
    run = train(workshop, tmp_path, *T5, "--text_encoder_lr", *given, unet_lr="5e-3", max_train_steps=1)
    names = ["textencoder 1", "textencoder 2", "textencoder 3", "unet"]
    assert rates(run) == pytest.approx(dict(zip(names, [*expected, 5e-3])))
    # AdamW's first step moves a weight that has a gradient by just its rate
    assert run.moved() == pytest.approx(dict(zip(["te1", "te2", "te3", "unet"], [*expected, 5e-3])), rel=0.01)
    assert [name for name in run.lines()[0] if name.startswith("lr/")] == [f"lr/{name}" for name in names]


def test_an_encoder_of_rate_zero_gets_no_lora(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, "--text_encoder_lr", "0", "1e-3", max_train_steps=1)
    assert set(run.moved()) == {"te2", "unet"}


def test_only_trained_encoders_build_a_graph_and_all_stay_in_eval_mode(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, "--text_encoder_lr", "1e-3", "0", "--gradient_checkpointing", max_train_steps=1)
    roles = run.trainer.texts.roles
    encoding = run.trainer.encoders.encode(["a cat"], roles.live, roles.trained)
    graphs = {name: tensor.requires_grad for name, tensor in encoding.to_dict().items()}
    assert graphs == {"clip_l": True, "pooled_l": True, "clip_g": False, "pooled_g": False, "t5": False}
    assert not any(module.training for model in run.trainer.encoders.models.values() for module in model.modules())
    assert run.trainer.network.training


def test_checkpointing_changes_no_gradient_of_the_encoders(workshop: Workshop, tmp_path: Path):
    plain = train(workshop, tmp_path / "a", *T5, optimizer_type="SGD").weights()
    spared = train(workshop, tmp_path / "b", *T5, "--gradient_checkpointing", optimizer_type="SGD").weights()
    assert all(torch.allclose(plain[key], spared[key], rtol=1e-4, atol=1e-9) for key in plain)
    assert plain["lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"].abs().max() > 0


def test_untrained_encoders_can_be_cached_while_others_are_trained(workshop: Workshop, tmp_path: Path):
    live = train(workshop, tmp_path / "a")
    cached = train(workshop, tmp_path / "b", "--cache_text_encoder_outputs")
    a, b = live.weights(), cached.weights()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert set(cached.trainer.encoders.models) == {"clip_l", "clip_g"}  # T5 was freed


def test_text_encoders_alone_are_trained_through_the_frozen_denoiser(workshop: Workshop, tmp_path: Path):
    run = train(workshop, tmp_path, "--network_train_text_encoder_only", "--gradient_checkpointing", max_train_steps=1)
    assert set(run.moved()) == {"te1", "te2"} and min(run.moved().values()) > 0


def test_a_missing_encoder_is_left_out_of_training(workshop: Workshop, tmp_path: Path):
    tensors = {key: value for key, value in load_file(workshop.model).items() if "clip_g" not in key}
    model = tmp_path / "model" / "no_g.safetensors"
    model.parent.mkdir()
    save_file(tensors, model)
    tokenizers = workshop.model.parent / "tokenizers"
    run = train(
        workshop,
        tmp_path / "out",
        pretrained_model_name_or_path=model,
        tokenizer_cache_dir=tokenizers,
        max_train_steps=1,
    )
    assert set(run.moved()) == {"te1", "unet"}


@pytest.fixture(scope="module")
def lora_file(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of all four parts that changes much."""
    folder = tmp_path_factory.mktemp("lora")
    train(workshop, folder, *T5, learning_rate="0.05", network_dim=3, network_alpha=2)
    return folder / "lora.safetensors"


@pytest.mark.parametrize("more", [(), ("--cache_text_encoder_outputs",)], ids=["live", "cached"])
def test_base_weights_change_what_the_run_starts_from(workshop: Workshop, tmp_path: Path, lora_file: Path, more):
    """The first loss is that of a run whose LoRA is the merged file."""
    as_lora = train(workshop, tmp_path / "a", *T5, "--dim_from_weights", network_weights=lora_file, max_train_steps=1)
    merged = train(workshop, tmp_path / "b", UNET, *more, base_weights=lora_file, max_train_steps=1)
    bare = train(workshop, tmp_path / "c", UNET, max_train_steps=1)
    assert merged.losses == pytest.approx(as_lora.losses, rel=1e-4)
    assert abs(merged.losses[0] - bare.losses[0]) > 0.01
    twice = ("--base_weights", str(lora_file), str(lora_file), "--base_weights_multiplier", "0.25", "0.75")
    assert train(workshop, tmp_path / "d", UNET, *twice, max_train_steps=1).losses == pytest.approx(
        merged.losses, rel=1e-4
    )


def test_base_weights_go_in_before_quantising(workshop: Workshop, tmp_path: Path, lora_file: Path):
    wide = train(workshop, tmp_path / "a", UNET, base_weights=lora_file, max_train_steps=1)
    words = ("--fp8_base", "--lowram")
    narrow = train(workshop, tmp_path / "b", UNET, *words, base_weights=lora_file, max_train_steps=1)
    assert narrow.losses == pytest.approx(wide.losses, rel=0.05) and narrow.losses != wide.losses


def test_caches_know_the_base_weights(workshop: Workshop, tmp_path: Path, lora_file: Path):
    words = (UNET, "--cache_text_encoder_outputs_to_disk", "--cache_dir", str(tmp_path / "cache"))
    bare = train(workshop, tmp_path / "a", *words, max_train_steps=1)
    merged = train(workshop, tmp_path / "b", *words, base_weights=lora_file, max_train_steps=1)
    live = train(workshop, tmp_path / "c", UNET, base_weights=lora_file, max_train_steps=1)
    assert merged.losses == pytest.approx(live.losses, rel=1e-5) and merged.losses != bare.losses


def test_a_file_decides_ranks_and_alphas_with_dim_from_weights(workshop: Workshop, tmp_path: Path, lora_file: Path):
    run = train(workshop, tmp_path, *T5, "--dim_from_weights", network_weights=lora_file, max_train_steps=1)
    start, end = load_file(lora_file), run.weights()
    assert {key: tensor.shape for key, tensor in start.items()} == {key: tensor.shape for key, tensor in end.items()}
    assert all(torch.equal(start[key], end[key]) for key in start if key.endswith("alpha"))


def test_network_weights_of_another_shape_are_named(workshop: Workshop, tmp_path: Path, lora_file: Path):
    with pytest.raises(UserError, match=r"differs in shape: .*lora_down.weight is \[3, 64\], here \[4, 64\]"):
        train(workshop, tmp_path, *T5, network_weights=lora_file, network_dim=4)


def test_a_trained_t5_must_be_on_the_training_device(workshop: Workshop, tmp_path: Path, monkeypatch):
    from sd3_train_network import Sd3NetworkTrainer

    start = Sd3NetworkTrainer.start

    def elsewhere(self) -> None:
        start(self)
        self.device = torch.device("cuda", 0)

    monkeypatch.setattr(Sd3NetworkTrainer, "start", elsewhere)
    with pytest.raises(UserError, match="t5xxl_device cpu can't be combined with train_t5xxl"):
        train(workshop, tmp_path, *T5, t5xxl_device="cpu")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_told(workshop: Workshop, tmp_path: Path, device: str):
    with pytest.raises(UserError, match=f"t5xxl_device {device}: there is no such device"):
        train(workshop, tmp_path, t5xxl_device=device)


def test_preserved_images_keep_the_base_encoders_meaning_too(workshop: Workshop, tmp_path: Path, lora_file: Path):
    """Only the encoders have a LoRA: what it changes in the text is what the loss sees, with the same dropout on both sides."""
    images = image_folder(tmp_path / "images")
    subset = f"image_dir = {str(images)!r}\ncustom_attributes = {{diff_output_preservation = true}}"
    data = dataset_file(tmp_path / "data.toml", [subset])
    words = ("--network_train_text_encoder_only", "--dim_from_weights")
    for name, more, counts in (("a", {}, True), ("b", {"clip_l_dropout_rate": 1, "clip_g_dropout_rate": 1}, False)):
        run = train(workshop, tmp_path / name, *words, dataset_config=data, network_weights=lora_file, **more)
        assert (run.losses[0] > 1e-6) == counts
    half = {"clip_l_dropout_rate": 0.5, "clip_g_dropout_rate": 0.5, "max_train_steps": 6}
    fresh = train(workshop, tmp_path / "c", "--network_train_text_encoder_only", dataset_config=data, **half)
    assert fresh.losses[0] == 0  # an untouched LoRA is the base model
