"""The conditioning equals diffusers' on the same weights and tokens; masks, dropout and missing encoders do what they say."""

import sys

import pytest
import torch

from library.common.errors import UserError
from library.sd3.checkpoint import locate_parts
from library.sd3.conditioning import (
    ContextSizes,
    DropoutRates,
    TextEncoding,
    TextSettings,
    apply_dropout,
    encode_captions,
    encode_clip,
    missing_encoder_notes,
    to_context,
)
from library.sd3.text_encoders import load_clip, load_t5
from library.sd3.tokenizers import load_tokenizers
from tests.sd3 import tiny

CAPTIONS = ["a red cat", "", "a small photo of the blue house on a circle", "cat " * 100]
SETTINGS = TextSettings(t5_tokens=40)
NAMES = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(checkpoint):
    return locate_parts(checkpoint)


@pytest.fixture(scope="module")
def tokenizers(checkpoint):
    return load_tokenizers(None, checkpoint)


@pytest.fixture(scope="module")
def encoders(files):
    return {
        "clip_l": load_clip(files.clip_l, "cpu", torch.float32),
        "clip_g": load_clip(files.clip_g, "cpu", torch.float32),
        "t5": load_t5(files.t5xxl, "cpu", torch.float32),
    }


@pytest.fixture(scope="module")
def encoding(tokenizers, encoders):
    return encode_captions(CAPTIONS, tokenizers, SETTINGS, **encoders)


def context_of(files, encoding, settings=SETTINGS):
    return to_context(encoding, ContextSizes.from_files(files, settings.t5_tokens), "cpu", torch.float32)


# --- equality with diffusers ---


@pytest.fixture(scope="module")
def pipeline(encoders, tokenizers):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=1,
                                        joint_attention_dim=tiny.T5_WIDTH, caption_projection_dim=8,
                                        pooled_projection_dim=192)  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        text_encoder=tiny.tiny_clip("clip_l", seed=2),
        text_encoder_2=tiny.tiny_clip("clip_g", seed=3),
        text_encoder_3=tiny.tiny_t5(seed=4),
        tokenizer=tokenizers.clip_l.inner,
        tokenizer_2=with_pad_id_0(tokenizers.clip_l.inner),
        tokenizer_3=tokenizers.t5.inner,
    )


def with_pad_id_0(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.pad_token = "!"
    assert other.pad_token_id == 0
    return other


def diffusers_conditioning(pipeline):
    context, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, CAPTIONS, CAPTIONS, device="cpu", do_classifier_free_guidance=False,
        max_sequence_length=SETTINGS.t5_tokens,
    )  # fmt: skip
    return context, pooled


def test_conditioning_equals_diffusers_encode_prompt(files, encoding, pipeline):
    context, pooled = context_of(files, encoding)
    wanted_context, wanted_pooled = diffusers_conditioning(pipeline)
    assert context.shape == (4, 77 + 40, tiny.T5_WIDTH) and pooled.shape == (4, 192)
    torch.testing.assert_close(context, wanted_context, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, wanted_pooled, rtol=1e-5, atol=1e-6)


def test_without_t5_conditioning_equals_diffusers_without_t5(files, tokenizers, encoders, pipeline):
    t5, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    try:
        wanted_context, wanted_pooled = diffusers_conditioning(pipeline)
    finally:
        pipeline.text_encoder_3 = t5
    two = encode_captions(CAPTIONS, tokenizers, SETTINGS, clip_l=encoders["clip_l"], clip_g=encoders["clip_g"])
    context, pooled = context_of(files, two)
    torch.testing.assert_close(context, wanted_context, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pooled, wanted_pooled, rtol=1e-5, atol=1e-6)


# --- masks (defect 10) ---


def test_masks_reach_the_encoder_and_zero_the_padding(tokenizers, encoders, encoding):
    masked = encode_captions(CAPTIONS, tokenizers, TextSettings(t5_tokens=40, mask_clip=True, mask_t5=True), **encoders)
    for name, tokenizer, model in (
        ("clip_l", tokenizers.clip_l, encoders["clip_l"]),
        ("clip_g", tokenizers.clip_g, encoders["clip_g"]),
        ("t5", tokenizers.t5, encoders["t5"]),
    ):
        hidden, plain = getattr(masked, name), getattr(encoding, name)
        ids, mask = tokenizer(CAPTIONS, hidden.shape[1])
        assert bool((hidden[mask == 0] == 0).all()) and bool((plain[mask == 0] != 0).any())
        if name == "t5":  # it sees all places at once: with the mask, the text is encoded as if it had no padding
            for row, row_mask, row_ids in zip(hidden, mask, ids):
                length = int(row_mask.sum())
                alone = model(input_ids=row_ids[None, :length]).last_hidden_state[0]
                torch.testing.assert_close(row[:length], alone, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(hidden[mask == 1], plain[mask == 1], atol=1e-3)
        else:  # causal: padding comes later and never reaches the text
            torch.testing.assert_close(hidden[mask == 1], plain[mask == 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked.pooled_l, encoding.pooled_l, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked.pooled_g, encoding.pooled_g, rtol=1e-4, atol=1e-5)


def test_each_mask_switch_touches_its_own_encoders_only(tokenizers, encoders, encoding):
    clip = encode_captions(CAPTIONS, tokenizers, TextSettings(t5_tokens=40, mask_clip=True), **encoders)
    t5 = encode_captions(CAPTIONS, tokenizers, TextSettings(t5_tokens=40, mask_t5=True), **encoders)
    assert torch.equal(clip.t5, encoding.t5) and not torch.equal(clip.clip_l, encoding.clip_l)
    assert torch.equal(t5.clip_g, encoding.clip_g) and not torch.equal(t5.t5, encoding.t5)


def test_cached_and_live_conditioning_are_the_same_to_the_bit(files, tokenizers, encoders):
    settings = TextSettings(t5_tokens=40, mask_clip=True, mask_t5=True)
    live = encode_captions(CAPTIONS, tokenizers, settings, **encoders)
    cached = TextEncoding.stack(live.rows())
    for a, b in zip(context_of(files, live, settings), context_of(files, cached, settings)):
        assert torch.equal(a, b)


# --- one encoder after another ---


def test_encoders_used_one_after_another_give_what_they_give_together(tokenizers, encoders, encoding):
    found = TextEncoding()
    for name in NAMES:
        found = found.merged(encode_captions(CAPTIONS, tokenizers, SETTINGS, **{name: encoders[name]}))
    for name, tensor in encoding.to_dict().items():
        assert torch.equal(getattr(found, name), tensor)


def test_equal_captions_are_encoded_once_and_given_back_in_order(tokenizers, encoders):
    rows = []
    hook = encoders["t5"].shared.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    captions = ["a cat", "a dog", "a cat", "a cat"]
    found = encode_captions(captions, tokenizers, SETTINGS, **encoders)
    hook.remove()
    assert rows == [2]
    for index, caption in enumerate(captions):
        alone = encode_captions([caption], tokenizers, SETTINGS, **encoders)
        for name, tensor in found.to_dict().items():
            torch.testing.assert_close(tensor[index], getattr(alone, name)[0], rtol=1e-4, atol=1e-5)


def test_what_is_sent_to_the_encoders_device_is_not_waited_for(tokenizers, encoders, monkeypatch):
    """A plain copy to a GPU first waits for all that it is still computing, the step before for instance."""
    sent: list[bool] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *args, **more):
        if sys._getframe(1).f_code.co_filename == encode_captions.__code__.co_filename:
            sent.append(more.get("non_blocking", False))
        return to(tensor, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    encode_captions(["a cat", "a dog", "a cat"], tokenizers, TextSettings(8, mask_clip=True, mask_t5=True), **encoders)
    assert sent and all(sent)


def test_dicts_and_rows_carry_everything_there_and_back(encoding):
    again = TextEncoding.from_dict(encoding.to_dict())
    rows = encoding.rows()
    stacked = TextEncoding.stack([rows[2], rows[0]])
    for name, tensor in encoding.to_dict().items():
        assert torch.equal(getattr(again, name), tensor)
        assert torch.equal(getattr(stacked, name), tensor[[2, 0]])
        assert rows[1][name].untyped_storage().nbytes() == tensor[1].nbytes, "a row does not keep its batch alive"
    partial = TextEncoding(t5=encoding.t5)
    assert partial.to_dict().keys() == {"t5"} and TextEncoding.stack(partial.rows()).clip_l is None


def test_gradients_reach_a_trained_encoder(tokenizers, files):
    model = load_clip(files.clip_l, "cpu", torch.float32)
    weight = model.text_model.encoder.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    hidden, pooled = encode_clip(model, *tokenizers.clip_l(CAPTIONS[:2], 77))
    (hidden.square().mean() + pooled.square().mean()).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_text_settings_refuse_token_counts_out_of_range():
    for count in (1, 512):
        TextSettings(t5_tokens=count)
    for count in (0, 513):
        with pytest.raises(UserError, match="t5xxl_max_token_length"):
            TextSettings(t5_tokens=count)


# --- missing encoders (defect 3) ---


@pytest.mark.parametrize("missing", [{"clip_l"}, {"clip_g"}, {"t5"}, {"clip_l", "clip_g"}, {"clip_g", "t5"}])
def test_a_missing_encoders_share_is_zeros_and_the_rest_stays(missing, files, encoding, tmp_path):
    context, pooled = context_of(files, encoding)
    part_names = {"t5xxl" if name == "t5" else name for name in missing}
    parts = {name: state for name, state in tiny.tiny_parts().items() if name not in part_names}
    fewer = locate_parts(tiny.save_single_file(tmp_path / "fewer.safetensors", parts))
    gone = missing | {name.replace("clip", "pooled") for name in missing}
    rest = TextEncoding.from_dict({name: value for name, value in encoding.to_dict().items() if name not in gone})
    found_context, found_pooled = context_of(fewer, rest)

    if "clip_l" in missing:
        context[:, :77, :64], pooled[:, :64] = 0, 0
    if "clip_g" in missing:
        context[:, :77, 64:], pooled[:, 64:] = 0, 0
    if "t5" in missing:
        context[:, 77:] = 0
    assert torch.equal(found_context, context) and torch.equal(found_pooled, pooled)
    notes = missing_encoder_notes(fewer)
    assert len(notes) == len(missing) and all("share of the conditioning is zeros" in note for note in notes)


def test_an_encoder_that_is_there_but_was_not_asked_leaves_zeros_of_its_own_width(files, encoding):
    context, pooled = context_of(files, encoding)
    context[:, :77, :64], pooled[:, :64] = 0, 0
    rest = {name: tensor for name, tensor in encoding.to_dict().items() if name not in ("clip_l", "pooled_l")}
    found_context, found_pooled = context_of(files, TextEncoding.from_dict(rest))
    assert torch.equal(found_context, context) and torch.equal(found_pooled, pooled)
    sizes = ContextSizes.from_files(files, 40)
    assert (sizes.clip_l, sizes.pooled_l, sizes.pooled, sizes.context) == (64, 64, 192, 192)


def test_no_encoder_at_all_is_an_error(tmp_path):
    files = locate_parts(tiny.save_single_file(tmp_path / "none.safetensors", {"mmdit": tiny.tiny_parts()["mmdit"]}))
    with pytest.raises(UserError, match="No text encoder was found"):
        missing_encoder_notes(files)


def test_nothing_is_noted_when_all_encoders_are_there(files):
    assert missing_encoder_notes(files) == []


# --- dropout (defect 13) ---


def ones(batch):
    return TextEncoding(
        clip_l=torch.ones(batch, 3, 4), pooled_l=torch.ones(batch, 4), clip_g=torch.ones(batch, 3, 5),
        pooled_g=torch.ones(batch, 5), t5=torch.ones(batch, 2, 9),
    )  # fmt: skip


def dropped(encoding):
    """bool [3, B]: which captions lost CLIP-L, CLIP-G, T5; checks that each is whole or zero, pooled vector included."""
    tensors = encoding.to_dict()
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.flatten(1)
        assert bool(((flat == 0).all(1) | (flat == 1).all(1)).all())
        found[name] = (flat == 0).all(1)
    assert torch.equal(found["clip_l"], found["pooled_l"]) and torch.equal(found["clip_g"], found["pooled_g"])
    return torch.stack([found["clip_l"], found["clip_g"], found["t5"]])


def test_dropout_is_independent_for_each_encoder_and_caption():
    rates = DropoutRates(clip_l=0.1, clip_g=0.3, t5=0.6)
    drops = dropped(apply_dropout(ones(40_000), rates, torch.Generator().manual_seed(0))).double()
    torch.testing.assert_close(drops.mean(1), torch.tensor([0.1, 0.3, 0.6]).double(), rtol=0, atol=0.01)
    assert (torch.corrcoef(drops) - torch.eye(3)).abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([drops[2, :-1], drops[2, 1:]]))[0, 1]
    assert abs(neighbours) < 0.02


def test_dropout_never_changes_the_given_tensors_and_never_accumulates():
    encoding, generator = ones(2000), torch.Generator().manual_seed(1)
    rates = DropoutRates(0.5, 0.5, 0.5)
    for _ in range(5):
        drops = dropped(apply_dropout(encoding, rates, generator))
        assert 0.45 < drops.double().mean() < 0.55
    assert not dropped(encoding).any()


def test_dropout_follows_its_generator_and_rates():
    rates = DropoutRates(t5=0.5)
    first, again = (dropped(apply_dropout(ones(64), rates, torch.Generator().manual_seed(7))) for _ in range(2))
    assert torch.equal(first, again) and not first[:2].any() and first[2].any()
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    encoding = ones(4)
    assert apply_dropout(encoding, DropoutRates(), generator) is encoding
    assert torch.equal(generator.get_state(), before)
    assert dropped(apply_dropout(ones(8), DropoutRates(1.0, 1.0, 1.0), generator)).all()


def test_dropout_turns_even_nan_into_zeros_and_blocks_gradients():
    t5 = torch.full((3, 2, 4), float("nan"), requires_grad=True)
    found = apply_dropout(TextEncoding(t5=t5), DropoutRates(t5=1.0), torch.Generator())
    assert bool((found.t5 == 0).all())
    found.t5.sum().backward()
    assert bool((t5.grad == 0).all())


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_dropout_rates_out_of_range_are_refused(rate):
    with pytest.raises(UserError, match="clip_g_dropout_rate"):
        DropoutRates(clip_g=rate)
