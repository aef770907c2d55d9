"""Finding the parts of a model in every layout, saying what a wrong file is, and getting tensors out unchanged."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.common.errors import UserError
from library.common.tensor_io import fingerprint, load_tensors
from library.sd3.checkpoint import locate_parts
from library.sd3.text_encoder_sizes import ClipSizes
from tests.sd3 import tiny

ENCODERS = ("clip_l", "clip_g", "t5xxl")


@pytest.fixture(scope="module")
def parts():
    return tiny.tiny_parts()


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    return tiny.save_single_file(tmp_path_factory.mktemp("whole") / "sd3.safetensors", parts)


def write(path: Path, tensors, prefix: str = "") -> Path:
    save_file({prefix + key: value.contiguous().clone() for key, value in tensors.items()}, str(path))
    return path


def assert_same(part, state):
    loaded = load_tensors(part)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def message(**paths) -> str:
    with pytest.raises(UserError) as error:
        locate_parts(**paths)
    return error.value.as_text()


# --- layouts ---


def test_a_single_file_holds_every_part(whole, parts):
    files = locate_parts(whole)
    for name in tiny.PREFIXES:
        part = getattr(files, name)
        assert (part.name, part.path, part.prefix) == (name, whole, tiny.PREFIXES[name])
        assert_same(part, parts[name])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_a_denoiser_alone_loads_with_and_without_its_prefix(prefix, parts, tmp_path):
    files = locate_parts(write(tmp_path / "mmdit.safetensors", parts["mmdit"], prefix))
    assert_same(files.mmdit, parts["mmdit"])
    assert (files.clip_l, files.clip_g, files.t5xxl, files.vae) == (None, None, None, None)


def test_a_bare_denoiser_beside_other_parts_keeps_to_its_own_tensors(parts, tmp_path):
    path = tiny.save_single_file(tmp_path / "bare.safetensors", parts, prefixes={**tiny.PREFIXES, "mmdit": ""})
    files = locate_parts(path)
    assert_same(files.mmdit, parts["mmdit"])
    assert_same(files.vae, parts["vae"])


@pytest.mark.parametrize("name", [*ENCODERS, "vae"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "own", "model."])
def test_a_separate_file_loads_plain_or_prefixed(name, prefix, parts, tmp_path):
    mmdit = write(tmp_path / "mmdit.safetensors", parts["mmdit"])
    path = write(tmp_path / "part.safetensors", parts[name], tiny.PREFIXES[name] if prefix == "own" else prefix)
    files = locate_parts(mmdit, **{name: path})
    assert_same(getattr(files, name), parts[name])


@pytest.mark.parametrize("name", [*ENCODERS, "vae"])
def test_a_whole_checkpoint_serves_as_the_file_of_any_part(name, whole, parts, tmp_path):
    mmdit = write(tmp_path / "mmdit.safetensors", parts["mmdit"])
    assert_same(getattr(locate_parts(mmdit, **{name: whole}), name), parts[name])


@pytest.mark.parametrize("name", [*ENCODERS, "vae"])
def test_a_given_path_wins_over_the_copy_in_the_checkpoint(name, whole, parts, tmp_path):
    changed = {key: value + 1 for key, value in parts[name].items()}
    path = write(tmp_path / "other.safetensors", changed)
    files = locate_parts(whole, **{name: path})
    assert_same(getattr(files, name), changed)
    for other in {*ENCODERS, "vae"} - {name}:
        assert getattr(files, other).path == whole


def test_an_empty_string_means_not_given(whole):
    assert locate_parts(whole, clip_l="", clip_g="", t5xxl="", vae="") == locate_parts(whole)


def test_a_missing_encoder_is_none(parts, tmp_path):
    without = {name: state for name, state in parts.items() if name not in ("clip_g", "vae")}
    files = locate_parts(tiny.save_single_file(tmp_path / "a.safetensors", without))
    assert files.clip_g is None and files.vae is None
    assert files.encoders()["t5xxl"] is files.t5xxl


def test_the_projection_one_level_above_the_transformer_belongs_to_the_encoder(parts, tmp_path):
    state = {"text_encoders.clip_g.transformer." + key: value for key, value in parts["clip_g"].items()}
    projection = state.pop("text_encoders.clip_g.transformer.text_projection.weight")
    state["text_encoders.clip_g.text_projection"] = projection.t().contiguous()
    state["text_encoders.clip_g.logit_scale"] = torch.tensor(4.6)
    mmdit = write(tmp_path / "mmdit.safetensors", parts["mmdit"])
    files = locate_parts(mmdit, clip_g=write(tmp_path / "g.safetensors", state))
    loaded = load_tensors(files.clip_g)
    assert torch.equal(loaded["text_projection"], projection.t())
    assert "logit_scale" not in loaded


def test_the_sd35_and_sd3_denoisers_are_all_recognised(tmp_path):
    for kind in ("medium", "5-medium", "5-large"):
        state = tiny.MMDiT(tiny.tiny_mmdit_config(kind)).state_dict()
        assert_same(locate_parts(write(tmp_path / f"{kind}.safetensors", state)).mmdit, state)


# --- what a wrong file is ---

ONE = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"], "SD 1.x"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.ln_final.weight"], "SD 2.x"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.transformer.x"], "SDXL model"),
        (["input_blocks.0.0.weight", "label_emb.0.0.weight"], "U-Net of SDXL"),
        (["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"], "diffusers format"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX model"),
        (["single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.weight"], "FLUX"),
        (["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"], "SD3 transformer in diffusers format"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"], "a LoRA file"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "a LoRA file"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1"], "a LoRA file"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"], "a VAE"),
        (["encoder.down_blocks.0.resnets.0.x", "decoder.up_blocks.0.resnets.0.x"], "a VAE in diffusers format"),
        (["transformer.resblocks.0.attn.in_proj_weight", "visual.conv1.weight"], "OpenCLIP"),
        (["controlnet_blocks.0.weight"], "a ControlNet"),
        (["clip_l", "clip_g"], "a textual-inversion embedding"),
        (["something.else"], "of an unknown kind: 1 tensors"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_sd3_is_named_for_what_it_is(keys, says, tmp_path):
    path = write(tmp_path / "model.safetensors", dict.fromkeys(keys, ONE))
    text = message(checkpoint=path)
    assert says in text and str(path) in text and "--pretrained_model_name_or_path" in text


def test_a_wrong_file_for_a_part_is_named_too(whole, parts, tmp_path):
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": ONE})
    mmdit = write(tmp_path / "mmdit.safetensors", parts["mmdit"])
    text = message(checkpoint=whole, clip_l=mmdit, clip_g=lora, t5xxl=tmp_path / "none.safetensors", vae=lora)
    assert text.count("\n") == 3, "all four problems at once"
    assert "--clip_l" in text and "an SD3 model; the CLIP-L text encoder is needed" in text
    assert "--clip_g" in text and "a LoRA file" in text
    assert "none.safetensors does not exist" in text and "a VAE is needed" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"abc", "only 3 bytes"),
        (b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
        (b"<!DOCTYPE html><html>" + bytes(99), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b'{"error": "not found"}', "a JSON text"),
        (bytes([200, 0, 0, 0, 0, 0, 0, 0]) + b'{"a": ', "cut short"),
        (b"\x80\x02nonsense", "can be loaded safely"),
        (b"PK\x03\x04nonsense", "can be loaded safely"),
    ],
)
def test_a_file_that_is_not_safetensors_is_named_for_what_it_is(content, says, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert says in message(checkpoint=path)


def test_a_truncated_file_is_said_to_be_cut_short(whole, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole.read_bytes()[:-1000])
    assert "cut short: 1,000 of" in message(checkpoint=path)


def test_a_folder_or_a_hub_name_is_answered_with_what_to_give(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "folder in diffusers format" in message(checkpoint=tmp_path)
    assert "Hugging Face Hub is not enough" in message(checkpoint="stabilityai/stable-diffusion-3-medium")
    assert "is empty: give the path" in message(checkpoint="")


def test_a_shard_of_a_split_encoder_is_recognised(whole, parts, tmp_path):
    half = {key: value for key, value in parts["t5xxl"].items() if "block.1" in key}
    path = write(tmp_path / "model-00002-of-00002.safetensors", half)
    assert "number 2 of 2" in message(checkpoint=whole, t5xxl=path)


def test_parts_of_other_sizes_are_refused(whole, parts, tmp_path):
    wide = {key: torch.zeros(shape) for key, shape in ClipSizes(186, 77, 1280, 64, 1, 1280, True).tensors.items()}
    assert "is CLIP-G; the CLIP-L" in message(checkpoint=whole, clip_l=write(tmp_path / "l.safetensors", wide))
    assert "give 128 + 128 pooled" in message(
        checkpoint=whole, clip_l=write(tmp_path / "g.safetensors", parts["clip_g"])
    )
    t5 = tiny.tiny_t5(width=128).state_dict()
    assert "128 wide, the model takes 192" in message(checkpoint=whole, t5xxl=write(tmp_path / "t.safetensors", t5))
    vae = {key: value[:, :4] if key == "decoder.conv_in.weight" else value for key, value in parts["vae"].items()}
    assert "with 4 latent channels" in message(checkpoint=whole, vae=write(tmp_path / "v.safetensors", vae))


def test_a_denoiser_without_the_tensors_that_tell_its_size_is_an_error(parts, tmp_path):
    state = {key: value for key, value in parts["mmdit"].items() if key != "pos_embed"}
    assert "pos_embed is missing" in message(checkpoint=write(tmp_path / "a.safetensors", state))


def test_an_encoder_with_a_missing_tensor_is_refused_by_its_header(whole, parts, tmp_path):
    state = {key: value for key, value in parts["clip_g"].items() if not key.endswith("layers.1.mlp.fc2.bias")}
    text = message(checkpoint=whole, clip_g=write(tmp_path / "g.safetensors", state))
    assert "tensors of clip_g missing: text_model.encoder.layers.1.mlp.fc2.bias" in text


# --- PyTorch files ---


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pytorch_file_gives_the_same_tensors_and_fingerprint(wrapped, whole, parts, tmp_path):
    path = tmp_path / "clip_l.bin"
    torch.save({"state_dict": parts["clip_l"], "step": 3} if wrapped else parts["clip_l"], path)
    part = locate_parts(whole, clip_l=path).clip_l
    assert_same(part, parts["clip_l"])
    assert fingerprint(part) == fingerprint(locate_parts(whole).clip_l)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb_went_off",))


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_would_run_code_is_refused(zipped, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    if zipped:
        torch.save({"a": Bomb()}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps({"a": Bomb()}, protocol=2))
    assert "safely" in message(checkpoint=whole, vae=path)
    assert not (tmp_path / "bomb_went_off").exists()


# --- tensors ---


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_mapped_and_plain_reading_agree_and_convert_as_torch_does(dtype, parts, tmp_path):
    state = {key: value.to(torch.bfloat16) for key, value in parts["mmdit"].items()}
    part = locate_parts(write(tmp_path / "a.safetensors", state)).mmdit
    mapped, plain = load_tensors(part, "cpu", dtype, mmap=True), load_tensors(part, "cpu", dtype, mmap=False)
    for key, value in state.items():
        assert mapped[key].dtype == (dtype or torch.bfloat16)
        assert torch.equal(mapped[key], value.to(dtype or torch.bfloat16)) and torch.equal(mapped[key], plain[key])


def test_integer_tensors_keep_their_dtype(whole, parts, tmp_path):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = write(tmp_path / "l.safetensors", {**parts["clip_l"], **ids})
    loaded = load_tensors(locate_parts(whole, clip_l=path).clip_l, dtype=torch.bfloat16)
    assert loaded["text_model.embeddings.position_ids"].dtype == torch.int64


def test_writing_to_mapped_tensors_leaves_the_file_as_it_is(whole, parts):
    loaded = load_tensors(locate_parts(whole).vae)
    loaded["decoder.conv_in.weight"].add_(1)
    assert_same(locate_parts(whole).vae, parts["vae"])


def test_float8_weights_load_as_they_are_or_converted(whole, parts, tmp_path):
    fp8 = {key: value.to(torch.float8_e4m3fn) for key, value in parts["t5xxl"].items()}
    part = locate_parts(whole, t5xxl=write(tmp_path / "t5.safetensors", fp8)).t5xxl
    stored, wide = load_tensors(part), load_tensors(part, dtype=torch.float32)
    for key, value in fp8.items():
        assert stored[key].dtype == torch.float8_e4m3fn
        assert torch.equal(wide[key], value.float())


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_float8_weights_mean_weight_times_scale(suffix, per_row, whole, parts, tmp_path):
    stored, wanted = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}, {}
    for key, value in parts["t5xxl"].items():
        if value.dim() < 2 or key == "shared.weight":
            stored[key] = wanted[key] = value
            continue
        peak = value.abs().amax(dim=1) if per_row else value.abs().max()
        scale = peak / 448
        stored[key] = (value / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
        stored[key.removesuffix("weight") + suffix] = scale
        stored[key.removesuffix("weight") + "scale_input"] = torch.ones(())
        wanted[key] = stored[key].float() * (scale[:, None] if per_row else scale)
    path = write(tmp_path / "t5.safetensors", stored, tiny.PREFIXES["t5xxl"])
    part = locate_parts(whole, t5xxl=path).t5xxl
    assert part.tensors.keys() == parts["t5xxl"].keys(), "scales are not tensors of the model"
    loaded = load_tensors(part, dtype=torch.float32)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value)
        assert (loaded[key] - parts["t5xxl"][key]).abs().max() <= 0.07 * parts["t5xxl"][key].abs().max()
    unasked = load_tensors(part)
    assert {unasked[key].dtype for key in part.scales} == {torch.bfloat16}, "never float8 without its scale"


def test_a_fingerprint_knows_the_weights_and_not_the_file(whole, parts, tmp_path):
    first = fingerprint(locate_parts(whole).clip_l)
    moved = write(tmp_path / "clip_l.safetensors", parts["clip_l"])
    assert fingerprint(locate_parts(whole, clip_l=moved).clip_l) == first
    changed = {key: value.clone() for key, value in parts["clip_l"].items()}
    changed["text_model.encoder.layers.1.mlp.fc2.bias"][0] += 1e-3
    others = [changed, {key: value.to(torch.bfloat16) for key, value in parts["clip_l"].items()}]
    prints = {first}
    for index, state in enumerate(others):
        path = write(tmp_path / f"{index}.safetensors", state)
        prints.add(fingerprint(locate_parts(whole, clip_l=path).clip_l))
    assert len(prints) == 3 and all(len(text) == 16 for text in prints)


PEAK = """
import resource, sys, torch
from library.common.safetensors_header import read_header
from library.sd3.parts import make_part
from library.common.tensor_io import load_tensors
from pathlib import Path
path, mmap = Path(sys.argv[1]), sys.argv[2] == "mmap"
torch.ones(8).to(torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors = load_tensors(make_part("mmdit", path, "", read_header(path)), "cpu", torch.bfloat16, mmap)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux tells it")
def test_plain_reading_with_conversion_peaks_at_one_copy_and_one_tensor(tmp_path):
    tensors = {f"layer.{index}": torch.randn(1024, 1024) for index in range(32)}  # 128 MiB in float32, 64 in bfloat16
    path = write(tmp_path / "big.safetensors", tensors)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), "plain"], capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 64 + 24, "MiB above what was in use before"
