"""The right layers get a LoRA of the right rank under the right name."""

from __future__ import annotations

import logging

import pytest
import torch

from library.common.errors import UserError
from networks.base_weights import BaseWeights
from networks.lora_sd3 import create_network, create_network_from_weights
from networks.parameter_groups import LearningRates
from tests.networks.models import (
    QKV,
    meta_mmdit,
    mmdit_inputs,
    relative_error,
    tiny_clip,
    tiny_mmdit,
    tiny_t5,
    trained,
)

BLOCK = "lora_unet_joint_blocks_{}_{}_block_{}"


def real_models() -> dict[str, torch.nn.Module]:
    real = {"context_size": 4096, "pooled_size": 2048, "hidden_size": 1536, "mlp_hidden_size": 6144, "depth": 24}
    return {
        "sd3m": meta_mmdit(**real, qk_norm=False, dual_attention_blocks=(), pos_embed_max_size=192),
        "sd35m": meta_mmdit(**real, dual_attention_blocks=tuple(range(13)), pos_embed_max_size=384),
        "sd35l": meta_mmdit(
            **{**real, "hidden_size": 2432, "mlp_hidden_size": 9728, "depth": 38},
            dual_attention_blocks=(),
            pos_embed_max_size=192,
        ),
    }


def real_text_encoders() -> list[torch.nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    large = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
    t5 = {"d_model": 4096, "num_layers": 24, "d_kv": 64, "num_heads": 64, "d_ff": 10240}
    with torch.device("meta"):
        return [
            CLIPTextModelWithProjection(CLIPTextConfig(**sizes)),
            CLIPTextModelWithProjection(CLIPTextConfig(**large)),
            T5EncoderModel(T5Config(**t5, feed_forward_proj="gated-gelu")),
        ]


@pytest.mark.parametrize(("model", "count"), [("sd3m", 237), ("sd35m", 263), ("sd35l", 377)])
def test_number_of_layers_of_the_real_models(model: str, count: int):
    assert len(create_network(1.0, 1, 1.0, None, [], real_models()[model]).layers) == count


def test_number_of_layers_of_the_real_text_encoders():
    encoders = real_text_encoders()
    names = list(create_network(1.0, 1, 1.0, None, encoders, None, train_t5xxl="True").layers)
    assert [sum(name.startswith(f"lora_te{i}_") for name in names) for i in (1, 2, 3)] == [72, 192, 168]
    assert "lora_te1_text_model_encoder_layers_11_self_attn_out_proj" in names
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc2" in names
    assert "lora_te3_encoder_block_23_layer_0_SelfAttention_o" in names
    assert "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1" in names
    assert not any("text_projection" in name for name in names)
    without_t5 = create_network(1.0, 1, 1.0, None, encoders, None).layers
    assert not any(name.startswith("lora_te3_") for name in without_t5)


def test_keys_shapes_and_alphas_of_a_saved_sd3_medium_lora():
    network = create_network(1.0, 4, 2.0, None, [], real_models()["sd3m"])
    for layer in network.layers.values():  # a LoRA of a model of sizes alone has sizes alone
        layer.lora_down.to_empty(device="cpu")
        layer.lora_up.to_empty(device="cpu")
    saved = network.state_dict_for_saving(torch.bfloat16)
    reference = {}
    for block in range(24):
        for half in ("context", "x"):
            layers = {
                "attn_qkv": (1536, 4608),
                "attn_proj": (1536, 1536),
                "mlp_fc1": (1536, 6144),
                "mlp_fc2": (6144, 1536),
                "adaLN_modulation_1": (1536, 9216),
            }
            if (block, half) == (23, "context"):
                layers = {"attn_qkv": (1536, 4608), "adaLN_modulation_1": (1536, 3072)}
            for layer, (size_in, size_out) in layers.items():
                name = BLOCK.format(block, half, layer)
                reference[f"{name}.lora_down.weight"] = (4, size_in)
                reference[f"{name}.lora_up.weight"] = (size_out, 4)
                reference[f"{name}.alpha"] = ()
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == reference
    assert {(key.endswith(".alpha"), tensor.dtype) for key, tensor in saved.items()} == {
        (False, torch.bfloat16),
        (True, torch.float32),  # never rounded
    }
    assert all(tensor.item() == 2.0 for key, tensor in saved.items() if key.endswith(".alpha"))


def test_second_attention_of_sd35_medium_is_a_target():
    layers = create_network(1.0, 4, 1.0, None, [], real_models()["sd35m"]).layers
    assert layers[BLOCK.format(12, "x", "attn2_qkv")].lora_up.weight.shape == (4608, 4)
    assert layers[BLOCK.format(0, "x", "attn2_proj")].lora_up.weight.shape == (1536, 4)
    assert layers[BLOCK.format(0, "x", "adaLN_modulation_1")].lora_up.weight.shape == (13824, 4)
    assert BLOCK.format(13, "x", "attn2_qkv") not in layers


def ranks(**kwargs) -> dict[str, int]:
    network = create_network(1.0, 8, 1.0, None, [], tiny_mmdit(), **kwargs)
    return {name: layer.settings.rank for name, layer in network.layers.items()}


def test_each_kind_of_layer_has_a_rank_of_its_own():
    actual = ranks(
        context_attn_dim="2", context_mlp_dim="3", context_mod_dim="4", x_attn_dim="5", x_mlp_dim="6", x_mod_dim="7"
    )
    reference = {
        ("context", "attn_qkv"): 2,
        ("context", "attn_proj"): 2,
        ("context", "mlp_fc1"): 3,
        ("context", "mlp_fc2"): 3,
        ("context", "adaLN_modulation_1"): 4,
        ("x", "attn_qkv"): 5,
        ("x", "attn_proj"): 5,
        ("x", "attn2_qkv"): 5,
        ("x", "attn2_proj"): 5,
        ("x", "mlp_fc1"): 6,
        ("x", "mlp_fc2"): 6,
        ("x", "adaLN_modulation_1"): 7,
    }
    assert {(half, layer): actual[BLOCK.format(0, half, layer)] for half, layer in reference} == reference


def test_rank_zero_leaves_a_kind_of_layer_out():
    actual = ranks(x_attn_dim="0")
    assert not any("x_block_attn" in name for name in actual)
    assert actual[BLOCK.format(0, "context", "attn_qkv")] == 8


def test_emb_dims_reach_the_six_embedders():
    actual = {name: rank for name, rank in ranks(emb_dims="[2,3,4,5,6,7]").items() if "joint_blocks" not in name}
    assert actual == {
        "lora_unet_context_embedder": 2,
        "lora_unet_t_embedder_mlp_0": 3,
        "lora_unet_t_embedder_mlp_2": 3,
        "lora_unet_x_embedder_proj": 4,
        "lora_unet_y_embedder_mlp_0": 5,
        "lora_unet_y_embedder_mlp_2": 5,
        "lora_unet_final_layer_adaLN_modulation_1": 6,
        "lora_unet_final_layer_linear": 7,
    }
    some = ranks(emb_dims="4,0,0,4,0,0")
    assert {name for name in some if "joint_blocks" not in name} == {
        "lora_unet_context_embedder",
        "lora_unet_y_embedder_mlp_0",
        "lora_unet_y_embedder_mlp_2",
    }


def test_convolution_has_its_kernel_in_down_and_conv_dim_replaces_its_rank():
    network = create_network(1.0, 8, 4.0, None, [], tiny_mmdit(), emb_dims="[0,0,4,0,0,0]", conv_dim="6")
    saved = network.state_dict_for_saving(None)
    assert saved["lora_unet_x_embedder_proj.lora_down.weight"].shape == (6, 16, 2, 2)
    assert saved["lora_unet_x_embedder_proj.lora_up.weight"].shape == (64, 6, 1, 1)
    assert saved["lora_unet_x_embedder_proj.alpha"].item() == 1.0


def test_conv_dim_without_the_convolution_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        create_network(1.0, 8, 4.0, None, [], tiny_mmdit(), conv_dim="6")
    assert "conv_dim" in caplog.text


def test_train_block_indices_choose_blocks():
    blocks = {name.split("_")[4] for name in ranks(train_block_indices="0,2")}
    assert blocks == {"0", "2"}
    assert ranks(train_block_indices="all") == ranks()
    embedders_only = ranks(train_block_indices="none", emb_dims="[1,0,0,0,0,0]")
    assert set(embedders_only) == {"lora_unet_context_embedder"}


def test_block_beyond_the_models_depth_is_an_error():
    with pytest.raises(UserError, match="names 3, 4; this model has blocks 0 to 2"):
        ranks(train_block_indices="1,3-4")


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="No layer gets a LoRA"):
        ranks(train_block_indices="none")


def test_default_rank_is_four_and_alpha_zero_is_the_rank():
    network = create_network(1.0, None, None, None, [], tiny_mmdit())
    layer = network.layers[QKV]
    assert layer.settings.rank == 4 and layer.scale == 1.0 and layer.alpha.item() == 4.0
    assert create_network(1.0, None, 0, None, [], tiny_mmdit()).layers[QKV].scale == 1.0
    assert create_network(1.0, None, 1, None, [], tiny_mmdit()).layers[QKV].scale == 0.25


def test_encoders_that_are_not_trained_get_no_layers():
    clip_g, mmdit = tiny_clip(), tiny_mmdit()
    network = create_network(1.0, 4, 1.0, None, [None, clip_g, None], mmdit)
    assert network.trained_parts == {"lora_te2_", "lora_unet_"}
    only_text = create_network(1.0, 4, 1.0, None, [tiny_clip(), clip_g, tiny_t5()], None, train_t5xxl=True)
    assert only_text.trained_parts == {"lora_te1_", "lora_te2_", "lora_te3_"}


def test_text_encoder_layers_act_on_their_encoder():
    clip, t5 = tiny_clip(), tiny_t5()
    network = trained(create_network(1.0, 4, 1.0, None, [clip, None, t5], None, train_t5xxl="1"))
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    before = clip(tokens).text_embeds, t5(tokens).last_hidden_state
    network.attach()
    after = clip(tokens).text_embeds, t5(tokens).last_hidden_state
    assert all(not torch.allclose(a, b) for a, b in zip(before, after))


def test_same_seed_gives_the_same_file_and_another_seed_another():
    def saved(seed: int) -> dict[str, torch.Tensor]:
        mmdit, clip = tiny_mmdit(), tiny_clip()
        torch.manual_seed(seed)
        return create_network(1.0, 4, 1.0, None, [clip], mmdit).state_dict_for_saving(torch.float16)

    first, again, other = saved(3), saved(3), saved(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[f"{QKV}.lora_down.weight"], other[f"{QKV}.lora_down.weight"])


def test_verbose_shows_a_table(caplog):
    with caplog.at_level(logging.INFO):
        create_network(1.0, 4, 2.0, None, [], tiny_mmdit(), verbose="True", x_mlp_dim="16", split_qkv="true")
    rows = {line.split()[0]: line.split()[1:] for line in caplog.text.splitlines() if line.startswith("lora_unet")}
    assert rows[BLOCK.format(0, "x", "mlp_fc1")] == ["16", "2", f"{16 * (64 + 128):,}"]
    assert rows[QKV] == ["3", "x", "4", "2", f"{4 * (3 * 64 + 192):,}"]
    assert len(rows) == len(ranks())


def test_dim_from_weights_takes_layers_ranks_and_alphas_from_the_file(tmp_path):
    mmdit, clip = tiny_mmdit(), tiny_clip()
    made = create_network(1.0, 8, 3.0, None, [clip], mmdit, x_mlp_dim="2", x_mod_dim="0", emb_dims="[1,0,3,0,0,0]")
    trained(made).save_weights(tmp_path / "a.safetensors", torch.float32)
    network, tensors = create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [clip, None, None], mmdit, rank_dropout="0.1"
    )
    again = network.state_dict_for_saving(None)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert network.layers[QKV].scale == 3.0 / 8
    assert network.layers[QKV].settings.rank_dropout == 0.1


def test_dim_from_weights_refuses_what_the_file_decides(tmp_path):
    mmdit = tiny_mmdit()
    create_network(1.0, 8, 3.0, None, [], mmdit).save_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="takes x_attn_dim, emb_dims from"):
        create_network_from_weights(
            1.0, str(tmp_path / "a.safetensors"), None, [], mmdit, emb_dims="1,1,1,1,1,1", x_attn_dim="3"
        )


def test_dim_from_weights_names_layers_that_the_model_lacks():
    deep, shallow = tiny_mmdit(depth=4), tiny_mmdit()
    tensors = create_network(1.0, 8, 3.0, None, [], deep).state_dict_for_saving()
    with pytest.raises(UserError, match="joint_blocks_3_x_block_attn_qkv"):
        create_network_from_weights(1.0, None, None, [], shallow, weights_sd=tensors)


def test_dim_from_weights_without_alpha_has_strength_one():
    mmdit = tiny_mmdit()
    tensors = create_network(1.0, 8, 3.0, None, [], mmdit).state_dict_for_saving()
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    network, _ = create_network_from_weights(1.0, None, None, [], mmdit, weights_sd=without)
    assert {layer.scale for layer in network.layers.values()} == {1.0}


def test_dim_from_weights_leaves_untrained_encoders_out_and_says_so(caplog):
    mmdit, clip = tiny_mmdit(), tiny_clip()
    tensors = create_network(1.0, 2, 1.0, None, [clip], mmdit).state_dict_for_saving()
    network, _ = create_network_from_weights(1.0, None, None, [None, None, None], mmdit, weights_sd=tensors)
    assert network.trained_parts == {"lora_unet_"}
    assert "textencoder 1" in caplog.text


def test_optimizer_groups_come_in_the_originals_order_under_names_of_their_own():
    network = create_network(
        1.0,
        4,
        1.0,
        None,
        [tiny_clip(), tiny_clip(), tiny_t5()],
        tiny_mmdit(),
        train_t5xxl="yes",
        loraplus_lr_ratio="16",
    )
    rates = LearningRates.from_options(1e-4, 2e-4, [1e-5, 2e-5], train_t5xxl=True)
    groups = network.parameter_groups(rates)
    assert [group["name"] for group in groups] == [
        "textencoder 1",
        "textencoder 1 plus",
        "textencoder 2",
        "textencoder 2 plus",
        "textencoder 3",
        "textencoder 3 plus",
        "unet",
        "unet plus",
    ]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 1.6e-4, 2e-5, 3.2e-4, 2e-5, 3.2e-4, 2e-4, 3.2e-3])
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    plus = {id(parameter) for group in groups if group["name"].endswith("plus") for parameter in group["params"]}
    assert plus == {id(p) for name, p in network.named_parameters() if "lora_up" in name}


def test_base_weights_change_the_models_they_name(tmp_path, caplog):
    mmdit, clip = tiny_mmdit(), tiny_clip()
    network = trained(create_network(1.0, 4, 2.0, None, [clip], mmdit, emb_dims="1,1,1,1,1,1", use_dora="1"))
    network.save_weights(tmp_path / "a.safetensors")
    network.set_multiplier(0.5)
    network.attach()
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    expected, expected_text = mmdit(**mmdit_inputs()), clip(tokens).text_embeds
    network.detach()
    base = BaseWeights([(str(tmp_path / "a.safetensors"), 0.5)])
    assert base.parts == {"lora_unet_", "lora_te1_"}
    text_layers = base.merge([clip, None, None], None)
    assert text_layers + base.merge([], mmdit) == len(network.layers) and text_layers > 0
    assert relative_error(mmdit(**mmdit_inputs()), expected) < 1e-5
    assert relative_error(clip(tokens).text_embeds, expected_text) < 1e-5


def test_a_part_of_base_weights_has_a_fingerprint_that_follows_its_weights_and_strength(tmp_path):
    network = trained(create_network(1.0, 4, 2.0, None, [tiny_clip()], tiny_mmdit()))
    network.save_weights(tmp_path / "a.safetensors")
    a = str(tmp_path / "a.safetensors")
    one, same, weaker = (BaseWeights([(a, strength)]) for strength in (1.0, 1.0, 0.5))
    assert one.fingerprint("lora_te1_") == same.fingerprint("lora_te1_") != weaker.fingerprint("lora_te1_")
    assert one.fingerprint("lora_te1_") != one.fingerprint("lora_unet_") and one.fingerprint("lora_te3_") == ""


def test_base_weights_that_name_other_layers_change_nothing(tmp_path):
    deep, shallow = tiny_mmdit(depth=4), tiny_mmdit()
    before = {key: tensor.clone() for key, tensor in shallow.state_dict().items()}
    trained(create_network(1.0, 4, 2.0, None, [], deep)).save_weights(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="joint_blocks_3"):
        BaseWeights([(str(tmp_path / "a.safetensors"), 1.0)]).merge([], shallow)
    assert all(torch.equal(before[key], tensor) for key, tensor in shallow.state_dict().items())
