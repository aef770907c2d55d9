"""A LoRA means the same in both layouts: shown by diffusers' own loaders, and by going there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from library.common.errors import UserError
from library.sd3.mmdit import MMDiT
from networks.diffusers_layout import diffusers_problems, is_diffusers, to_diffusers, to_kohya, unread_by_diffusers
from networks.lora_file import read_lora
from networks.lora_sd3 import create_network, create_network_from_weights
from tests.networks.models import QKV, mmdit_inputs, tiny_clip, tiny_mmdit, tiny_t5, trained
from tests.tools.loras import write_lora
from tools import convert_lora

EVERYTHING = {"emb_dims": "[2,3,4,2,3,2]", "context_mod_dim": "5", "x_mlp_dim": "2"}
VARIANTS = {
    "sd3-medium": {"qk_norm": False, "dual_attention_blocks": ()},
    "sd3.5-medium": {"qk_norm": True, "dual_attention_blocks": (0,)},
    "sd3.5-large": {"qk_norm": True, "dual_attention_blocks": ()},
}


def base(**variant) -> MMDiT:
    return tiny_mmdit(mlp_hidden_size=256, **variant)  # diffusers knows four times the width alone


def lora_of(mmdit: MMDiT | None, encoders: list[nn.Module | None] | None = None, **arguments: str) -> dict[str, Tensor]:
    network = trained(create_network(1.0, 4, 3.0, None, encoders or [], mmdit, **arguments))
    return network.state_dict_for_saving()


def our_output(tensors: dict[str, Tensor] | None = None, **variant) -> Tensor:
    model = base(**variant)
    if tensors is not None:
        create_network_from_weights(1.0, None, None, None, model, weights_sd=tensors)[0].attach()
    with torch.no_grad():
        return model(**mmdit_inputs())


def diffusers_output(tensors: dict[str, Tensor], metadata: dict | None = None, **variant) -> Tensor:
    from diffusers import StableDiffusion3Pipeline

    from tests.sd3.diffusers_models import diffusers_transformer

    transformer = diffusers_transformer(base(**variant))
    pipeline = StableDiffusion3Pipeline(transformer, None, None, None, None, None, None, None, None)
    if metadata is None:
        pipeline.load_lora_into_transformer(pipeline.lora_state_dict(tensors), transformer)
    else:
        pipeline.load_lora_into_transformer(tensors, transformer, metadata=metadata)
    inputs = mmdit_inputs()
    with torch.no_grad():
        return transformer(
            hidden_states=inputs["x"],
            encoder_hidden_states=inputs["context"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["timestep"],
            return_dict=False,
        )[0]


def assert_same(ours: Tensor, theirs: Tensor):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "True"}])
def test_diffusers_computes_with_the_converted_file_what_we_compute(variant: str, arguments: dict[str, str]):
    model = base(**VARIANTS[variant])
    tensors = lora_of(model, **EVERYTHING, **arguments)
    ours = our_output(tensors, **VARIANTS[variant])
    assert (ours - our_output(**VARIANTS[variant])).abs().max() > 0.05 * ours.abs().max()
    assert_same(ours, diffusers_output(to_diffusers(tensors), **VARIANTS[variant]))


def test_each_target_alone_gives_what_diffusers_gives():
    """So that no layer's error hides behind another's: one LoRA of every name, on the smallest model."""
    tensors = lora_of(base(), **EVERYTHING)
    names = sorted({key.partition(".")[0] for key in tensors if "_blocks_1_" not in key})
    for name in names:
        one = {key: value for key, value in tensors.items() if key.startswith(name + ".")}
        assert_same(our_output(one), diffusers_output(to_diffusers(one)))


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_diffusers_loads_the_clip_loras(encoder: str):
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(0)
    clips = [tiny_clip(), tiny_clip(hidden=24)]
    tensors = lora_of(None, clips)
    index = ["text_encoder", "text_encoder_2"].index(encoder)
    clip, tokens = clips[index], torch.arange(1, 9).reshape(2, 4)
    before = clip(tokens).text_embeds
    network, _ = create_network_from_weights(1.0, None, None, clips, None, weights_sd=tensors)
    network.attach()
    ours = clip(tokens).text_embeds
    network.detach()
    assert (ours - before).abs().max() > 0.01 * before.abs().max()
    pipeline = StableDiffusion3Pipeline(None, None, None, clips[0], None, clips[1], None, None, None)
    pipeline.load_lora_into_text_encoder(to_diffusers(tensors), None, clip, prefix=encoder)
    assert_same(ours, clip(tokens).text_embeds)


def test_the_pipeline_of_diffusers_loads_a_converted_file_into_all_its_models(tmp_path: Path):
    from diffusers import StableDiffusion3Pipeline

    from tests.sd3.diffusers_models import diffusers_transformer

    torch.manual_seed(0)
    clips, tokens = [tiny_clip(), tiny_clip(hidden=24)], torch.arange(1, 9).reshape(2, 4)
    tensors = lora_of(base(), clips, **EVERYTHING)
    network, _ = create_network_from_weights(1.0, None, None, clips, None, weights_sd=of_clips(tensors))
    network.attach()
    ours = [clip(tokens).text_embeds for clip in clips]
    network.detach()
    kohya = write_lora(tmp_path / "kohya.safetensors", tensors, ss_network_dim="4")
    assert convert_lora.main(["--model", str(kohya), "--save_to", str(tmp_path / "theirs.safetensors")]) == 0
    transformer = diffusers_transformer(base())
    pipeline = StableDiffusion3Pipeline(transformer, None, None, clips[0], None, clips[1], None, None, None)
    pipeline.load_lora_weights(str(tmp_path), weight_name="theirs.safetensors")
    for clip, expected in zip(clips, ours):
        assert_same(expected, clip(tokens).text_embeds)
    inputs = mmdit_inputs()
    inputs = {"hidden_states": inputs["x"], "encoder_hidden_states": inputs["context"], "timestep": inputs["timestep"]}
    with torch.no_grad():
        actual = transformer(**inputs, pooled_projections=mmdit_inputs()["pooled"], return_dict=False)[0]
    assert_same(our_output({key: value for key, value in tensors.items() if key.startswith("lora_unet_")}), actual)


def of_clips(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith("lora_te")}


@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "True"}])
def test_there_and_back_changes_nothing_but_the_alphas(arguments: dict[str, str]):
    tensors = lora_of(base(), [tiny_clip(), tiny_clip(24), tiny_t5()], train_t5xxl="True", **EVERYTHING, **arguments)
    back = to_kohya(to_diffusers(tensors))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].shape == tensor.shape
        if key.endswith("lora_down.weight"):
            assert torch.equal(back[key], tensor), key
            name = key.removesuffix(".lora_down.weight")
            scales = [each[name + ".alpha"] / tensor.shape[0] for each in (back, tensors)]
            ups = [each[name + ".lora_up.weight"] * scale for each, scale in zip((back, tensors), scales)]
            torch.testing.assert_close(ups[0], ups[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_where_it_holds_the_scale_and_no_digit_is_lost_elsewhere(dtype: torch.dtype):
    for alpha, expected in ((2.0, dtype), (3.0, torch.float32)):
        network = trained(create_network(1.0, 4, alpha, None, [], base()))
        tensors = network.state_dict_for_saving(dtype)
        up = to_diffusers(tensors)["transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight"]
        own = tensors["lora_unet_joint_blocks_0_x_block_attn_proj.lora_up.weight"]
        assert up.dtype == expected
        assert torch.equal(up.double(), own.double() * alpha / 4)


def test_q_k_v_of_different_loras_become_one_block_diagonal_pair():
    """A file that diffusers' own training makes: alphas in the metadata, one lora_A each for q, k and v."""
    torch.manual_seed(1)
    theirs = {}
    for layer, rank in (("attn.to_q", 2), ("attn.to_k", 2), ("attn.to_v", 4), ("attn.to_out.0", 2)):
        theirs[f"transformer.transformer_blocks.0.{layer}.lora_A.weight"] = torch.randn(rank, 64) / 8
        theirs[f"transformer.transformer_blocks.0.{layer}.lora_B.weight"] = torch.randn(64, rank) / 2
    config = {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_v": 4}, "alpha_pattern": {"to_v": 2}}
    config |= {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    metadata = {f"transformer.{key}": value for key, value in config.items()}
    kohya = to_kohya(theirs, {"lora_adapter_metadata": json.dumps(metadata)})
    assert kohya[QKV + ".lora_down.weight"].shape == (8, 64)
    assert_same(our_output(kohya), diffusers_output(theirs, metadata))


def test_a_file_that_diffusers_writes_is_read_as_diffusers_computes(tmp_path: Path):
    """Adapters of PEFT with alphas of their own, saved by the pipeline: the file goes on training and merges here."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from tests.sd3.diffusers_models import diffusers_transformer

    torch.manual_seed(2)
    transformer, clip, tokens = diffusers_transformer(base()), tiny_clip(), torch.arange(1, 9).reshape(2, 4)
    layers = ["attn.add_k_proj", "attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2", "norm1_context.linear"]
    patterns = {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 5}}
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, target_modules=layers, init_lora_weights="gaussian", **patterns)
    )
    clip.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "fc2"], init_lora_weights="gaussian"))
    for model in (transformer, clip):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        text_encoder_lora_layers=get_peft_model_state_dict(clip),
        **_collate_lora_metadata({"transformer": transformer, "text_encoder": clip}),
    )
    lora = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    inputs = mmdit_inputs()
    with torch.no_grad():
        theirs = transformer(inputs["x"], inputs["context"], inputs["pooled"], inputs["timestep"], return_dict=False)[0]
        expected = clip(tokens).text_embeds
    clip.disable_adapters()
    ours_alone = {key: tensor for key, tensor in lora.tensors.items() if key.startswith("lora_unet_")}
    assert_same(our_output(ours_alone), theirs)
    torch.manual_seed(2)
    plain = tiny_clip()
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in clip.state_dict().items() if "lora_" not in k})
    assert (plain(tokens).text_embeds - expected).abs().max() > 0.01
    create_network_from_weights(1.0, None, None, [plain], None, weights_sd=of_clips(lora.tensors))[0].attach()
    assert_same(plain(tokens).text_embeds, expected)


def test_an_absent_third_is_not_changed():
    theirs = {
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": torch.randn(2, 64) / 8,
        "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": torch.randn(64, 2),
    }
    assert_same(our_output(to_kohya(theirs)), diffusers_output(theirs))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("transformer."),
        lambda key: "base_model.model." + key.removeprefix("transformer."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    ],
    ids=["no prefix", "PEFT", "adapter name", "old diffusers"],
)
def test_other_spellings_of_the_same_file_are_read(rename):
    tensors = lora_of(base(), **EVERYTHING)
    usual = to_diffusers(tensors)
    renamed = {rename(key): value for key, value in usual.items()}
    assert is_diffusers(renamed) and not is_diffusers(tensors)
    for key, tensor in to_kohya(usual).items():
        assert torch.equal(to_kohya(renamed)[key], tensor)


def test_the_checkpoints_own_paths_with_dots_are_read():
    tensors = lora_of(base(), **EVERYTHING)
    paths = {name.replace(".", "_"): name for name, _ in base().named_modules()}
    dotted = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        ending = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(suffix, suffix)
        dotted[f"diffusion_model.{paths[name.removeprefix('lora_unet_')]}.{ending}"] = tensor
    back = to_kohya(dotted)
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in back)


def test_what_diffusers_has_no_form_for_is_told():
    dora = lora_of(base(), use_dora="True")
    with pytest.raises(UserError, match="is a DoRA, which diffusers does not read"):
        to_diffusers(dora)
    loha = {QKV + ".hada_w1_a": torch.zeros(2, 2)}
    assert "not a plain LoRA" in diffusers_problems(loha)[0]
    unknown = {"lora_unet_joint_blocks_0_y_block_attn_qkv.lora_down.weight": torch.zeros(1, 1)}
    assert "layers that SD3 does not have" in diffusers_problems(unknown)[0]
    t5 = lora_of(None, [None, None, tiny_t5()], train_t5xxl="True")
    assert len(unread_by_diffusers(t5)) == 14 and not unread_by_diffusers(lora_of(base()))
    converted = to_diffusers(t5)
    assert all(key.startswith("text_encoders.t5xxl.transformer.encoder.block.") for key in converted)
    older = {key.replace("text_encoders.t5xxl.transformer.", "text_encoder_3."): t for key, t in converted.items()}
    for file in (converted, older):
        assert is_diffusers(file) and to_kohya(file).keys() == t5.keys()


def test_names_that_mean_nothing_are_told():
    strange = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)}
    strange["transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.zeros(4, 2)
    with pytest.raises(UserError, match=r"no layer of SD3: transformer\.single_transformer_blocks\.0\.attn\.to_q"):
        to_kohya(strange)
    with pytest.raises(UserError, match="no part of a plain LoRA"):
        to_kohya({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.zeros(3)})
    with pytest.raises(UserError, match="lora_A or lora_B is missing"):
        to_kohya({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)})


SHAPES = st.lists(st.integers(0, 3), max_size=4)
PATHS = st.sampled_from(
    [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.transformer_blocks.0.attn.to_k",
        "transformer.transformer_blocks.0.norm1_context.linear",
        "transformer.norm_out.linear",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
        "elsewhere",
        "",
    ]
)
ENDINGS = st.sampled_from([".lora_A.weight", ".lora_B.weight", ".alpha", ".lora.up.weight", "", ".lora_B.bias"])
CONFIGS = st.sampled_from(
    ["{", "[]", '{"transformer.lora_alpha": "x"}', '{"transformer.alpha_pattern": {"(": 1}}', "{}"]
)


@given(st.dictionaries(st.tuples(PATHS, ENDINGS), SHAPES, max_size=6), CONFIGS)
@settings(max_examples=200, deadline=None)
def test_any_damaged_file_is_converted_or_told_and_never_a_crash(keys: dict, config: str):
    tensors = {path + ending: torch.zeros(shape) for (path, ending), shape in keys.items()}
    try:
        kohya = to_kohya(tensors, {"lora_adapter_metadata": config})
    except UserError:
        return
    assert all(key.startswith(("lora_unet_", "lora_te")) for key in kohya)
