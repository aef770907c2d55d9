"""--save_clip and --save_t5xxl: encoders as files that load by themselves and speak as they did in training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from library.sd3.checkpoint import locate_parts
from library.sd3.conditioning import encode_clip, encode_t5
from library.sd3.text_encoders import load_clip, load_t5
from networks.base_weights import BaseWeights
from networks.lora_sd3 import create_network_from_weights
from sd3_train_network import main
from tests.end_to_end.conftest import Workshop


def test_saved_encoders_equal_the_base_encoders_with_the_lora_attached(workshop: Workshop, tmp_path: Path):
    words = workshop.arguments(
        tmp_path, "--save_clip", "--save_t5xxl", "--network_args", "train_t5xxl=True", max_train_steps=3
    )
    assert main(words) == 0
    base = locate_parts(workshop.model)
    saved = locate_parts(
        workshop.model, *(str(tmp_path / f"lora_{name}.safetensors") for name in ("clip_l", "clip_g", "t5xxl"))
    )
    ids = torch.randint(0, 20, (2, 77), generator=torch.Generator().manual_seed(0))
    encoders = [load_clip(base.clip_l, "cpu", torch.float32), load_clip(base.clip_g, "cpu", torch.float32)]
    encoders.append(load_t5(base.t5xxl, "cpu", torch.float32))
    plain = encode_clip(encoders[0], ids)[0]
    network, _ = create_network_from_weights(1.0, str(tmp_path / "lora.safetensors"), None, encoders, None)
    network.eval().attach()
    for part, encoder in ((saved.clip_l, encoders[0]), (saved.clip_g, encoders[1])):
        for found, wanted in zip(encode_clip(load_clip(part, "cpu", torch.float32), ids), encode_clip(encoder, ids)):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found, wanted = encode_t5(load_t5(saved.t5xxl, "cpu", torch.float32), ids), encode_t5(encoders[2], ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert not torch.allclose(encode_clip(load_clip(saved.clip_l, "cpu", torch.float32), ids)[0], plain, atol=1e-4)


def test_saved_encoders_hold_the_base_weights_that_the_lora_was_trained_on(workshop: Workshop, tmp_path: Path):
    """What is saved is the base with --base_weights and the LoRA that was trained on them."""
    earlier = tmp_path / "earlier.safetensors"
    words = workshop.arguments(tmp_path / "first", max_train_steps=1)
    assert main(words) == 0
    lora = load_file(tmp_path / "first" / "lora.safetensors")
    generator = torch.Generator().manual_seed(3)
    for key, tensor in lora.items():
        if "lora_te1" in key and not key.endswith("alpha"):
            lora[key] = 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(lora, earlier)
    out = tmp_path / "second"
    words = workshop.arguments(
        out, "--save_clip", "--base_weights", str(earlier), "--base_weights_multiplier", "0.5", max_train_steps=1
    )
    assert main(words) == 0
    base, saved = locate_parts(workshop.model), locate_parts(workshop.model, str(out / "lora_clip_l.safetensors"))
    encoder = load_clip(base.clip_l, "cpu", torch.float32)
    ids = torch.randint(0, 20, (2, 77), generator=torch.Generator().manual_seed(0))
    plain = encode_clip(encoder, ids)[0]
    for path, strength in ((earlier, 0.5), (out / "lora.safetensors", 1.0)):
        BaseWeights([(str(path), strength)]).merge([encoder, None, None], None)
    found = encode_clip(load_clip(saved.clip_l, "cpu", torch.float32), ids)[0]
    torch.testing.assert_close(found, encode_clip(encoder, ids)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
