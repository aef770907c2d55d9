"""Our MMDiT gives what diffusers' SD3Transformer2DModel gives on the same weights."""

from __future__ import annotations

import pytest
import torch

from library.sd3.mmdit import MMDiT, timestep_embedding
from library.sd3.mmdit_config import MMDiTConfig
from tests.sd3.diffusers_models import diffusers_transformer, randomised
from tests.sd3.real_sizes import MMDITS

VARIANTS = {
    "sd3-medium": {"qk_norm": False, "dual_attention_blocks": ()},
    "sd3.5-medium": {"qk_norm": True, "dual_attention_blocks": (0, 1)},
    "sd3.5-large": {"qk_norm": True, "dual_attention_blocks": ()},
}


def tiny_config(**changes) -> MMDiTConfig:
    sizes = {
        "depth": 3,
        "hidden_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "context_size": 96,
        "pooled_size": 40,
        "mlp_hidden_size": 512,
        "pos_embed_max_size": 12,
        "qk_norm": False,
        "dual_attention_blocks": (),
    }
    return MMDiTConfig(**{**sizes, **changes})


def inputs(config: MMDiTConfig, height: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "x": torch.randn(2, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([3.0, 871.0]),
        "context": torch.randn(2, 9, config.context_size, generator=generator),
        "pooled": torch.randn(2, config.pooled_size, generator=generator),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 20), (24, 10)])
def test_forward_equals_diffusers(variant: str, height: int, width: int):
    model = randomised(MMDiT(tiny_config(**VARIANTS[variant])))
    reference = diffusers_transformer(model)
    given = inputs(model.config, height, width)
    ours = model(**given)
    theirs = reference(
        hidden_states=given["x"],
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        timestep=given["timestep"],
        return_dict=False,
    )[0]
    assert ours.shape == (2, 16, height, width)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_read_from_shapes(variant: str):
    config = tiny_config(**VARIANTS[variant])
    shapes = {key: tuple(tensor.shape) for key, tensor in MMDiT(config).state_dict().items()}
    assert MMDiTConfig.from_shapes(shapes) == config
    assert config.kind == {"sd3-medium": "medium", "sd3.5-medium": "5-medium", "sd3.5-large": "5-large"}[variant]


def test_real_sizes_have_the_published_number_of_parameters():
    """2.03, 2.24 and 8.06 billion; table of context 4096 and pooled 2048."""
    real = {"context_size": 4096, "pooled_size": 2048, "mlp_hidden_size": 4 * 1536, "depth": 24, "hidden_size": 1536}
    with torch.device("meta"):
        medium = MMDiT(tiny_config(**real, pos_embed_max_size=192))
        medium35 = MMDiT(
            tiny_config(**real, pos_embed_max_size=384, qk_norm=True, dual_attention_blocks=tuple(range(13)))
        )
        large = MMDiT(
            tiny_config(**{**real, "depth": 38, "hidden_size": 2432, "mlp_hidden_size": 4 * 2432}, qk_norm=True)
        )
    counts = [sum(p.numel() for p in model.parameters()) / 1e9 for model in (medium, medium35, large)]
    assert counts == pytest.approx([2.03, 2.24, 8.06], abs=0.01)


def test_float16_streams_do_not_overflow():
    """Residual streams beyond 65504 stay finite because they are kept in float32."""
    model = randomised(MMDiT(tiny_config(qk_norm=True)))
    with torch.no_grad():
        model.joint_blocks[0].x_block.mlp.fc2.bias.fill_(3e4)
        model.joint_blocks[1].x_block.mlp.fc2.bias.fill_(3e4)
        for block in model.joint_blocks[:2]:
            block.x_block.adaLN_modulation[1].bias[5 * 128 : 6 * 128] = 4.0
    given = inputs(model.config, 8, 8)
    expected = model(**given)
    half = model.half()(**given)
    assert half.dtype == torch.float16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_timestep_embedding_equals_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0.0, 0.5, 123.0, 999.0])
    theirs = get_timestep_embedding(timesteps, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps), theirs, rtol=1e-5, atol=1e-5)


def test_a_model_is_named_after_a_released_one_only_where_it_has_its_size():
    titles = {kind: config.title for kind, config in MMDITS.items()}
    assert titles == {
        "sd3m": "Stable Diffusion 3 Medium",
        "sd35m": "Stable Diffusion 3.5 Medium",
        "sd35l": "Stable Diffusion 3.5 Large",
    }
    assert tiny_config(qk_norm=True).title == "MMDiT, 3 blocks, hidden 128"
