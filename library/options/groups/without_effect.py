"""Options of older models and of other machinery: accepted so that old commands run, but nothing changes with them."""

from __future__ import annotations

from library.options.option import Group, Kind, Option, finite, switch

OLDER_MODEL = "it belongs to Stable Diffusion 1 and 2"
NOISE = "Stable Diffusion 3 is trained by flow matching, whose noise is plain"
SNR = "it weighs the loss of models that predict noise; see --weighting_scheme and --loss_weighting"
DDP = "processes average a LoRA's few gradients in one message of their own, without PyTorch's DistributedDataParallel"
SDPA = "attention is always PyTorch's scaled_dot_product_attention, with its fastest kernel for the device"


def _switch(flag: str, help: str, reason: str) -> Option:
    return switch(flag, help, Kind.NO_EFFECT, reason)


def _number(flag: str, help: str, reason: str, default: float | None = None) -> Option:
    return Option(flag, help, finite, default, kind=Kind.NO_EFFECT, reason=reason)


GROUP = Group(
    "Accepted, without effect on SD3",
    (
        _switch("--v2", "The base model is Stable Diffusion 2.", OLDER_MODEL),
        Option(
            "--clip_skip",
            "Which of CLIP's last layers is used.",
            int,
            kind=Kind.NO_EFFECT,
            reason="Stable Diffusion 3 always uses CLIP's last but one layer",
        ),
        Option(
            "--max_token_length",
            "How many tokens CLIP sees.",
            int,
            None,
            (150, 225),
            kind=Kind.NO_EFFECT,
            reason="Stable Diffusion 3 always gives CLIP 77 tokens; T5's number is --t5xxl_max_token_length",
        ),
        _switch("--sdpa", "Use PyTorch's attention.", SDPA),
        _switch("--xformers", "Use the attention of xformers.", SDPA),
        _switch("--mem_eff_attn", "Use an attention that spares memory.", SDPA),
        _number("--noise_offset", "Add an offset to the noise.", NOISE),
        _switch("--noise_offset_random_strength", "Draw the strength of that offset.", NOISE),
        _number("--adaptive_noise_scale", "Make the noise offset depend on the latents.", NOISE),
        Option(
            "--multires_noise_iterations", "Add noise of coarser resolutions.", int, kind=Kind.NO_EFFECT, reason=NOISE
        ),
        _number("--multires_noise_discount", "How quickly that noise fades.", NOISE, 0.3),
        _number("--ip_noise_gamma", "Disturb the input with more noise.", NOISE),
        _switch("--ip_noise_gamma_random_strength", "Draw the strength of that disturbance.", NOISE),
        _switch(
            "--zero_terminal_snr",
            "Let the last timestep be pure noise.",
            "flow matching's last timestep is pure noise already",
        ),
        _number("--min_snr_gamma", "Weigh the loss by the bounded signal-to-noise ratio.", SNR),
        _switch("--scale_v_pred_loss_like_noise_pred", "Scale the v-prediction loss.", SNR),
        _number("--v_pred_like_loss", "Add a loss like that of v-prediction.", SNR),
        _switch("--debiased_estimation_loss", "Weigh the loss by the debiased estimation.", SNR),
        _switch("--ddp_gradient_as_bucket_view", "Let gradients be views of the buffers that processes exchange.", DDP),
        _switch("--ddp_static_graph", "Tell PyTorch that every step uses the same layers.", DDP),
        _switch(
            "--zero3_init_flag",
            "With ZeRO stage 3: share out the weights as the models are made.",
            "weights are read through a memory map and go to the device a share at a time, always",
        ),
        _switch(
            "--zero3_save_16bit_model",
            "With ZeRO stage 3: save 16-bit weights.",
            "the LoRA alone is saved, and --save_precision says in which format",
        ),
    ),
)
