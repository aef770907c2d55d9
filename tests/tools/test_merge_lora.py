"""merge_lora.py: merged weights do what the attached LoRA did, and everything else stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.common.safetensors_header import read_header
from library.sd3.checkpoint import locate_parts
from library.sd3.models import load_mmdit
from networks.diffusers_layout import to_diffusers
from networks.lora_sd3 import create_network_from_weights
from tests.sd3.tiny import PREFIXES, tiny_checkpoint, tiny_clip, tiny_parts
from tests.tools.loras import changes, lora_for_checkpoint, lora_tensors, run_script, write_lora
from tools.merge_lora import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors", "5-medium")


def forward(path: Path, *loras: tuple[dict, float]) -> torch.Tensor:
    model = load_mmdit(locate_parts(path).mmdit, "cpu", torch.float32)
    for tensors, ratio in loras:
        create_network_from_weights(ratio, None, None, None, model, weights_sd=tensors)[0].attach()
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 16, 8, 6, generator=generator), torch.randn(2, 5, 192, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([30.0, 800.0]), context, torch.randn(2, 192, generator=generator))


def test_the_real_command_makes_a_checkpoint_that_does_what_the_loras_did(checkpoint: Path, tmp_path: Path):
    encoders = [tiny_clip("clip_l"), tiny_clip("clip_g")]
    first, second = lora_for_checkpoint(encoders=encoders), lora_for_checkpoint(seed=8)
    files = [
        write_lora(tmp_path / "a.safetensors", first),
        write_lora(tmp_path / "b.safetensors", to_diffusers(second)),
    ]
    out = tmp_path / "merged.safetensors"
    ran = run_script(
        "merge_lora", "--models", *files, "--ratios", 0.5, -0.25, "--base_model", checkpoint, "--save_to", out
    )
    assert ran.returncode == 0, ran.stderr
    unet = {key: value for key, value in first.items() if key.startswith("lora_unet_")}
    expected = forward(checkpoint, (unet, 0.5), (second, -0.25))
    assert (expected - forward(checkpoint)).abs().max() > 0.1
    torch.testing.assert_close(forward(out), expected, rtol=1e-4, atol=1e-4)
    before, after = load_file(checkpoint), load_file(out)
    assert list(before) == list(after)
    key = PREFIXES["clip_g"] + "text_model.encoder.layers.1.mlp.fc1.weight"
    reference = before[key] + 0.5 * changes(first)["lora_te2_text_model_encoder_layers_1_mlp_fc1"].float()
    torch.testing.assert_close(after[key], reference)
    untouched = [k for k in before if k.startswith((PREFIXES["vae"], PREFIXES["t5xxl"])) or k.endswith("bias")]
    assert untouched and all(torch.equal(before[k], after[k]) for k in untouched)
    assert read_header(out).metadata["merged_loras"] == "a.safetensors x 0.5, b.safetensors x -0.25"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_prefixes_and_metadata_of_the_checkpoint_stay(prefix: str, dtype: torch.dtype, tmp_path: Path):
    mmdit = tiny_parts("5-medium")["mmdit"]
    stored = {prefix + k: v.to(dtype) if v.dim() == 2 else v.half() for k, v in mmdit.items()}
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(stored, str(base), {"modelspec.title": "mine"})
    lora = lora_for_checkpoint()
    file = write_lora(tmp_path / "lora.safetensors", lora)
    assert main(["--models", str(file), "--base_model", str(base), "--save_to", str(out), "--device", "cpu"]) == 0
    actual = load_file(out)
    assert {k: (v.dtype, v.shape) for k, v in actual.items()} == {k: (v.dtype, v.shape) for k, v in stored.items()}
    key = prefix + "joint_blocks.1.x_block.mlp.fc2.weight"
    reference = stored[key].float() + changes(lora)["lora_unet_joint_blocks_1_x_block_mlp_fc2"].float()
    half_a_step = 0.51 * torch.finfo(dtype).eps
    smallest = 0.51 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[key].float(), reference, rtol=half_a_step, atol=smallest + 1e-7)
    assert read_header(out).metadata["modelspec.title"] == "mine"


def test_a_scaled_float8_encoder_is_merged_in_its_own_scale(checkpoint: Path, tmp_path: Path):
    from tests.sd3.tiny import tiny_t5

    tensors = load_file(checkpoint)
    key = PREFIXES["t5xxl"] + "encoder.block.0.layer.0.SelfAttention.q.weight"
    original = tensors[key]
    scale = original.abs().max() / 448
    tensors[key] = (original / scale).to(torch.float8_e4m3fn)
    tensors[key.replace(".weight", ".scale_weight")] = scale.reshape(1)
    tensors[PREFIXES["t5xxl"].replace("transformer.", "") + "transformer.scaled_fp8"] = torch.zeros(2).to(
        torch.float8_e4m3fn
    )
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, str(base))
    lora = lora_for_checkpoint(encoders=(None, None, tiny_t5()), train_t5xxl="True")
    file = write_lora(tmp_path / "lora.safetensors", lora)
    assert main(["--models", str(file), "--ratios", "0.1", "--base_model", str(base), "--save_to", str(out)]) == 0
    actual = load_file(out)[key].float() * scale
    reference = original + 0.1 * changes(lora)["lora_te3_encoder_block_0_layer_0_SelfAttention_q"].float()
    assert (actual - reference).norm() < 0.06 * reference.norm()
    assert (actual - original).norm() > 0.5 * (reference - original).norm()


@pytest.mark.parametrize("arguments", [{"use_dora": "True"}, {"split_qkv": "True"}])
def test_dora_and_split_files_merge_into_a_checkpoint_exactly(arguments: dict, checkpoint: Path, tmp_path: Path):
    from library.sd3.mmdit import MMDiT
    from networks.lora_sd3 import create_network
    from tests.networks.models import trained
    from tests.sd3.tiny import tiny_mmdit_config

    model = load_mmdit(locate_parts(checkpoint).mmdit, "cpu", torch.float32)
    assert isinstance(model, MMDiT) and model.config == tiny_mmdit_config("5-medium")
    lora = trained(create_network(1.0, 4, 4.0, None, [], model, **arguments)).state_dict_for_saving()
    file, out = write_lora(tmp_path / "lora.safetensors", lora), tmp_path / "out.safetensors"
    assert main(["--models", str(file), "--base_model", str(checkpoint), "--save_to", str(out), "--ratios", "0.7"]) == 0
    torch.testing.assert_close(forward(out), forward(checkpoint, (lora, 0.7)), rtol=1e-4, atol=1e-4)


def test_several_loras_become_one_that_does_exactly_the_same(tmp_path: Path):
    first, second = lora_tensors(alpha=2.0, dtype=torch.bfloat16), lora_tensors(seed=9, rank=3, split_qkv="True")
    del second["lora_unet_final_layer_linear.alpha"]
    files = [write_lora(tmp_path / "a.safetensors", first, ss_base_model_version="5-medium", ss_steps="5")]
    files += [write_lora(tmp_path / "b.safetensors", second, ss_base_model_version="5-medium", ss_steps="6")]
    out = tmp_path / "out.safetensors"
    words = ["--models", *map(str, files), "--ratios", "0.5", "1.5", "--save_to", str(out)]
    assert main(words) == 0
    actual = changes(load_file(out))
    second["lora_unet_final_layer_linear.alpha"] = torch.tensor(2.0)  # no alpha means the rank, which is 2 there
    for name, change in changes(first).items():
        torch.testing.assert_close(actual[name], 0.5 * change + 1.5 * changes(second)[name], rtol=1e-6, atol=1e-7)
    metadata = safe_open(out, "pt").metadata()
    assert metadata["ss_base_model_version"] == "5-medium" and "ss_steps" not in metadata
    assert main([*words, "--force", "--new_rank", "3"]) == 0
    near = load_file(out)
    for name, change in actual.items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        assert near[name + ".lora_down.weight"].shape[0] == 3
        torch.testing.assert_close(changes(near)[name], u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "{lora}", "--ratios", "1", "2"], "--ratios has 2 values for 1 files"),
        (["--models", "{dora}", "{lora}"], "is not a plain LoRA"),
        (["--models", "{other}", "--base_model", "{base}"], "is no layer of"),
        (["--models", "{lora}", "--base_model", "{base}"], "does not fit a layer of"),
        (["--models", "{clip}", "--base_model", "{alone}"], "layers of CLIP-L, which"),
        (["--models", "{fits}", "--base_model", "{base}", "--new_rank", "4"], "are for merging into one LoRA"),
        (["--models", "{nan}", "--base_model", "{base}"], "or the LoRA holds NaN"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fits = lora_for_checkpoint()
    nan = {key: value * torch.nan if key.endswith("up.weight") else value for key, value in fits.items()}
    alone = {k: v for k, v in load_file(checkpoint).items() if k.startswith(PREFIXES["mmdit"])}
    save_file(alone, str(tmp_path / "alone.safetensors"))
    files = {
        "base": checkpoint,
        "alone": tmp_path / "alone.safetensors",
        "fits": write_lora(tmp_path / "fits.safetensors", fits),
        "nan": write_lora(tmp_path / "nan.safetensors", nan),
        "lora": write_lora(tmp_path / "lora.safetensors", lora_tensors()),
        "dora": write_lora(tmp_path / "dora.safetensors", lora_tensors(use_dora="True")),
        "clip": write_lora(tmp_path / "clip.safetensors", lora_for_checkpoint(encoders=[tiny_clip("clip_l")])),
        "other": write_lora(tmp_path / "other.safetensors", {"lora_unet_blocks_9.diff": torch.zeros(2, 2)}),
    }
    out = tmp_path / "out.safetensors"
    assert main([word.format(**files) for word in words] + ["--save_to", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_layers_of_absent_encoders_can_be_left_out(checkpoint: Path, tmp_path: Path):
    alone = {k: v for k, v in load_file(checkpoint).items() if k.startswith(PREFIXES["mmdit"])}
    save_file(alone, str(tmp_path / "alone.safetensors"))
    lora = write_lora(tmp_path / "clip.safetensors", lora_for_checkpoint(encoders=[tiny_clip("clip_l")]))
    out = tmp_path / "out.safetensors"
    words = ["--models", lora, "--base_model", tmp_path / "alone.safetensors", "--save_to", out, "--skip_missing"]
    assert main([str(word) for word in words]) == 0
    assert load_file(out).keys() == alone.keys()
