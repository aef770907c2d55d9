"""Pre-training of the demo's MMDiT: rectified flow with logit-normal timesteps and plain velocity loss (Esser et al. 2024)."""

from __future__ import annotations

import copy
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.sd3.conditioning import (
    ContextSizes,
    DropoutRates,
    TextEncoding,
    TextSettings,
    apply_dropout,
    encode_clip,
    encode_t5,
    to_context,
)
from library.flow.timesteps import shift
from library.sd3.mmdit import MMDiT
from library.sd3.mmdit_config import MMDiTConfig
from library.sd3.pos_embed import sincos_table
from library.sd3.text_encoder_sizes import CLIP_TOKENS
from library.sd3.tokenizers import Tokenizers
from library.sd3.vae import Vae, normalize, sample_posterior
from tools.demo.captions import caption_of
from tools.demo.scenes import SIDE, Scene, draw, random_pose, random_scene
from tools.demo.text_training import CLIP_WIDTHS, T5_WIDTH, TextEncoders
from tools.demo.vae_training import to_tensor, warm_cosine

logger = logging.getLogger(__name__)

POOLED = sum(CLIP_WIDTHS.values())
TABLE_SIDE = 12  # patches: pictures up to 192 pixels
MMDIT_CONFIG = MMDiTConfig(
    depth=3,
    hidden_size=192,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    context_size=T5_WIDTH,
    pooled_size=POOLED,
    mlp_hidden_size=768,
    pos_embed_max_size=TABLE_SIDE,
    qk_norm=True,
    dual_attention_blocks=(),
)
# Numbers of CLIP tokens and T5 tokens: few are cheap and enough for every caption, many are what the trainer uses.
SHORT = (16, 16)
LONG = ((77, 32), (77, 77), (77, 256))


@dataclass(frozen=True)
class DenoiserTraining:
    steps: int = 6000
    batch_size: int = 64
    pictures: int = 9000
    long_from: float = 0.7  # part of the training after which there are batches of many tokens, a quarter as large
    long_share: float = 0.4
    learning_rate: float = 1e-3
    shift: float = 1.5  # of the timesteps towards noise, where figures take their form
    caption_dropout: float = 0.1
    encoder_dropout: float = 0.1  # of each encoder alone, so that the model works without any one of them
    masked_share: float = (
        0.2  # of batches whose encoders see no padding, as with --apply_lg_attn_mask --apply_t5_attn_mask
    )
    average_decay: float = 0.999
    seed: int = 0


@dataclass(frozen=True)
class LatentPool:
    scenes: Sequence[Scene]
    mean: Tensor  # [N, 16, 8, 8], not normalised
    log_variance: Tensor  # the same


def make_pool(vae: Vae, pictures: int, seed: int) -> LatentPool:
    """Draw and encode random scenes; about 15 ms each on one core."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(pictures)]
    means, log_variances = [], []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, pictures, 64):
            images = to_tensor([draw(scene, random_pose(rng)) for scene in scenes[start : start + 64]])
            mean, log_variance = vae.encode(images)
            means.append(mean)
            log_variances.append(log_variance)
    return LatentPool(scenes, torch.cat(means), torch.cat(log_variances))


def new_mmdit() -> MMDiT:
    """With the initial weights of DiT (Peebles & Xie 2023, section 3.2): every block starts as the identity."""
    model = MMDiT(MMDIT_CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
    model.pos_embed.copy_(sincos_table(TABLE_SIDE, MMDIT_CONFIG.hidden_size, SIDE / 16))  # type: ignore[operator]
    return model


def train_denoiser(
    pool: LatentPool,
    encoders: TextEncoders,
    tokenizers: Tokenizers,
    settings: DenoiserTraining,
    start_from: MMDiT | None = None,
    every: tuple[int, Callable[[int, MMDiT], None]] | None = None,
) -> MMDiT:
    """The moving average of the trained weights, in eval mode; `every` (N, f) calls f(step, average) each N steps."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    master = start_from if start_from is not None else new_mmdit()
    master.train().requires_grad_(True)
    average = copy.deepcopy(master).eval().requires_grad_(False)
    working = copy.deepcopy(master).to(torch.bfloat16)  # computes; the float32 master takes the steps
    pairs = list(zip(master.parameters(), working.parameters()))
    optimizer = torch.optim.AdamW(
        master.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started, recent = time.monotonic(), 0.0
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm_cosine(step, settings.steps, warmup=200)
        is_long = step >= settings.long_from * settings.steps and rng.random() < settings.long_share
        size = settings.batch_size // 4 if is_long else settings.batch_size
        tokens = rng.choice(LONG) if is_long else SHORT
        picked = rng.sample(range(len(pool.scenes)), size)
        loss = batch_loss(working, pool, picked, tokens, encoders, tokenizers, settings, rng, generator)
        loss.backward()
        for own, copied in pairs:
            own.grad, copied.grad = copied.grad.float() if copied.grad is not None else None, None
        nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([copied for _, copied in pairs], [own for own, _ in pairs])
        follow(average, master, min(settings.average_decay, (1 + step) / (10 + step)))
        recent += (loss.item() - recent) * max(0.01, 1 / (step + 1))
        if step % 100 == 0 or step == settings.steps - 1:
            logger.info("mmdit step %d loss %.4f, %.0f s", step, recent, time.monotonic() - started)
        if every is not None and (step + 1) % every[0] == 0:
            every[1](step + 1, average)
    return average


def follow(average: MMDiT, model: MMDiT, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model."""
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def batch_loss(
    model: MMDiT,
    pool: LatentPool,
    picked: Sequence[int],
    tokens: tuple[int, int],
    encoders: TextEncoders,
    tokenizers: Tokenizers,
    settings: DenoiserTraining,
    rng: random.Random,
    generator: torch.Generator,
) -> Tensor:
    """The mean squared error of the velocity on the picked pictures."""
    captions = [
        "" if rng.random() < settings.caption_dropout else with_capitals(caption_of(pool.scenes[i], rng), rng)
        for i in picked
    ]
    clip_tokens, t5_tokens = tokens
    masked = rng.random() < settings.masked_share
    rates = DropoutRates(*[settings.encoder_dropout] * 3)
    with torch.no_grad():
        encoding = encode(captions, encoders, tokenizers, clip_tokens, t5_tokens, masked)
        encoding = apply_dropout(encoding, rates, generator)
        context, pooled = to_context(encoding, context_sizes(clip_tokens, t5_tokens), "cpu", torch.float32)
    mean, log_variance = pool.mean[picked], pool.log_variance[picked]
    latents = normalize(sample_posterior(mean, log_variance, torch.randn(mean.shape, generator=generator)))
    noise = torch.randn(latents.shape, generator=generator)
    sigma = shift(torch.randn(len(picked), generator=generator).sigmoid(), settings.shift)
    noisy = latents + sigma[:, None, None, None] * (noise - latents)
    velocity = model(noisy, 1000 * sigma, context, pooled)
    return F.mse_loss(velocity.float(), noise - latents)


def with_capitals(caption: str, rng: random.Random) -> str:
    """Now and then a capital at the beginning and a full stop, as people write."""
    return caption[:1].upper() + caption[1:] + rng.choice(("", ".")) if rng.random() < 0.1 else caption


def encode(
    captions: Sequence[str],
    encoders: TextEncoders,
    tokenizers: Tokenizers,
    clip_tokens: int = CLIP_TOKENS,
    t5_tokens: int = 256,
    masked: bool = False,
) -> TextEncoding:
    """As the trainer encodes captions, but for CLIP's number of tokens, which there is always 77."""
    assert tokenizers.clip_l is not None and tokenizers.clip_g is not None and tokenizers.t5 is not None
    settings = TextSettings(t5_tokens, mask_clip=masked, mask_t5=masked)
    ids_l, mask = tokenizers.clip_l(captions, clip_tokens)
    ids_g, _ = tokenizers.clip_g(captions, clip_tokens)
    ids_t5, mask_t5 = tokenizers.t5(captions, settings.t5_tokens)
    clip_l, pooled_l = encode_clip(encoders.clip_l, ids_l, mask if settings.mask_clip else None)
    clip_g, pooled_g = encode_clip(encoders.clip_g, ids_g, mask if settings.mask_clip else None)
    t5 = encode_t5(encoders.t5, ids_t5, mask_t5 if settings.mask_t5 else None)
    return TextEncoding(clip_l, pooled_l, clip_g, pooled_g, t5)


def context_sizes(clip_tokens: int, t5_tokens: int) -> ContextSizes:
    return ContextSizes(
        clip_l=CLIP_WIDTHS["clip_l"],
        pooled_l=CLIP_WIDTHS["clip_l"],
        pooled=POOLED,
        context=T5_WIDTH,
        t5_tokens=t5_tokens,
        clip_tokens=clip_tokens,
    )
