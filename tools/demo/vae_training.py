"""Pre-training of the demo's VAE: scenes and doodles, absolute error, and latents with the mean and deviation of SD3's."""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.sd3.vae import LATENT_SCALE, LATENT_SHIFT, Vae, VaeConfig, sample_posterior
from tools.demo.figures import ellipse, regular
from tools.demo.scenes import COLOURS, FINE, PAPERS, SIDE, draw, fill_down, line_colour, random_pose, random_scene

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

VAE_CONFIG = VaeConfig(base_channels=16, multipliers=(1, 2, 4, 4), res_blocks=1, latent_channels=16)
LATENT_DEVIATION = 1.0 / LATENT_SCALE


@dataclass(frozen=True)
class VaeTraining:
    steps: int = 3200
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    doodles: float = 0.5  # share of pictures without any figure of the captions' words
    crops: float = 0.6  # share of batches made of pieces of 32 x 32 pixels, twice as many
    edge_weight: float = 0.5
    kl_weight: float = 1e-3
    statistics_weight: float = 0.02
    decoder_only: bool = False  # the latents stay what they are
    latent_noise: float = 0.0  # deviation of noise on the decoder's input, as a denoiser's latents have some
    calibration_pictures: int = 256  # from which the latents' deviation is set in the end
    seed: int = 0


def train_vae(settings: VaeTraining, start_from: Vae | None = None) -> Vae:
    """The moving average of the trained weights, in eval mode; about 25 ms a picture on one core."""
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    vae = start_from if start_from is not None else new_vae()
    vae.train().requires_grad_(True)
    vae.encoder.requires_grad_(not settings.decoder_only)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    trained_parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    started = time.monotonic()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm_cosine(step, settings.steps)
        images = training_images(rng, settings)
        loss, error = vae_loss(vae, images, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained_parameters, 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if step % 50 == 0 or step == settings.steps - 1:
            seconds = time.monotonic() - started
            logger.info("vae step %d loss %.4f psnr %.2f dB, %.0f s", step, loss.detach(), psnr(error), seconds)
    trained = cast(Vae, average.module).eval().requires_grad_(False)
    if not settings.decoder_only:
        match_deviation(trained, settings.seed, settings.calibration_pictures)
    return trained


def match_deviation(vae: Vae, seed: int, pictures: int) -> None:
    """Scale the latents of scenes to SD3's deviation, and the decoder's input back: the pictures stay as they are."""
    rng = random.Random(seed + 1)
    with torch.no_grad():
        images = [draw(random_scene(rng), random_pose(rng)) for _ in range(pictures)]
        means = [vae.encode(to_tensor(images[start : start + 32]))[0] for start in range(0, pictures, 32)]
        factor = LATENT_DEVIATION / torch.cat(means).std()
        out, entry = vae.encoder.conv_out, vae.decoder.conv_in
        assert out.bias is not None
        channels = VAE_CONFIG.latent_channels
        out.weight[:channels] *= factor
        out.bias[:channels] *= factor
        out.bias[channels:] += 2 * factor.log()
        entry.weight /= factor


def vae_loss(vae: Vae, images: Tensor, settings: VaeTraining) -> tuple[Tensor, Tensor]:
    """images [B, 3, H, W] -> the loss, and the mean squared error for the log."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, log_variance = vae.encode(images)
        latents = sample_posterior(mean, log_variance, torch.randn_like(mean))
        made = vae.decode(latents + settings.latent_noise * torch.randn_like(mean))
    error = (made - images).abs().mean() + settings.edge_weight * edge_error(made, images)
    centred = (mean - LATENT_SHIFT) / LATENT_DEVIATION
    relative = log_variance - 2 * math.log(LATENT_DEVIATION)
    divergence = 0.5 * (centred**2 + relative.exp() - 1 - relative).mean()  # Kingma & Welling 2014, appendix B
    channel = centred.transpose(0, 1).flatten(1)  # [16, B * h * w]
    statistics = (channel.mean(1) ** 2 + channel.std(1).clamp_min(1e-3).log() ** 2).mean()
    loss = error + settings.kl_weight * divergence + settings.statistics_weight * statistics
    return loss, F.mse_loss(made.detach(), images)


def edge_error(made: Tensor, target: Tensor) -> Tensor:
    """Absolute error of the differences between neighbouring pixels: keeps outlines sharp."""
    error = made - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def new_vae() -> Vae:
    """Each residual block starts as the identity, and each change of width or size as an orthogonal map of its inputs."""
    vae = Vae(VAE_CONFIG)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            nn.init.zeros_(module.bias)
            if name.endswith(("conv2", "proj_out")):
                nn.init.zeros_(module.weight)
            elif name.endswith(("nin_shortcut", "downsample.conv", "upsample.conv")):
                spread_orthogonally(module)
    bias = vae.encoder.conv_out.bias
    assert bias is not None
    bias.data = torch.cat(
        [torch.full((16,), LATENT_SHIFT), torch.full((16,), -4.0)]
    )  # means, and little noise at first
    return vae


def spread_orthogonally(conv: nn.Conv2d) -> None:
    """Orthogonal over (inputs x a square of taps): 2 x 2 of a downsampling conv, the middle of any other."""
    weight = conv.weight
    taps = slice(0, 2) if conv.stride[0] == 2 else slice(weight.shape[-1] // 2, weight.shape[-1] // 2 + 1)
    with torch.no_grad():
        weight.mul_(0.1)
        nn.init.orthogonal_(core := torch.empty_like(weight[:, :, taps, taps]))
        weight[:, :, taps, taps] = core


def random_picture(rng: random.Random, doodles: float) -> Image:
    return doodle(rng) if rng.random() < doodles else draw(random_scene(rng), random_pose(rng))


def training_images(rng: random.Random, settings: VaeTraining) -> Tensor:
    """A batch of whole pictures, or twice as many pieces: most of a picture is plain, a piece has much detail at little cost."""
    if rng.random() >= settings.crops:
        return to_tensor([random_picture(rng, settings.doodles) for _ in range(settings.batch_size)])
    return to_tensor([random_crop(random_picture(rng, settings.doodles), rng) for _ in range(2 * settings.batch_size)])


def random_crop(image: Image, rng: random.Random) -> Image:
    """A quarter of the picture from around its middle."""
    half = SIDE // 2
    left, top = (min(half, max(0, round(rng.gauss(half / 2, half / 4)))) for _ in range(2))
    return image.crop((left, top, left + half, top + half))


def doodle(rng: random.Random) -> Image:
    """Anything: a few outlined or plain ellipses, polygons and lines on a plain or graded ground."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE))
    brush = ImageDraw.Draw(image)
    palette = [*COLOURS.values(), *PAPERS.values(), (255, 255, 255), (20, 20, 24)]

    def colour() -> tuple[int, ...]:
        if rng.random() < 0.7:
            return rng.choice(palette)
        return tuple(rng.randrange(256) for _ in range(3))

    ground = colour()
    fill_down(brush, [(0, ground), (SIDE, colour() if rng.random() < 0.5 else ground)])  # type: ignore[list-item]
    for _ in range(rng.randint(1, 9)):
        fill, size = colour(), rng.choice((2.5, 5, 9, 14, 22)) * rng.uniform(0.8, 1.3) * FINE
        x, y = rng.uniform(0, SIDE) * FINE, rng.uniform(0, SIDE) * FINE
        kind = rng.choice(("ellipse", "ellipse", "polygon", "line", "rings"))
        if kind == "line":
            end = (x + rng.uniform(-2, 2) * size, y + rng.uniform(-2, 2) * size)
            brush.line([(x, y), end], fill=fill, width=round(rng.uniform(1, 4) * FINE))
            continue
        if kind == "rings":
            for part in (1.0, rng.uniform(0.5, 0.75), rng.uniform(0.2, 0.4)):
                box = [x - size * part, y - size * part, x + size * part, y + size * part]
                brush.ellipse(box, fill=colour(), outline=rng.choice((None, (30, 30, 30))), width=round(1.5 * FINE))
            continue
        squeeze = rng.uniform(0.5, 1)
        outline = (
            ellipse(0, 0, 1, squeeze, 40) if kind == "ellipse" else regular(rng.randint(3, 7), 1, rng.uniform(0, 360))
        )
        points = [(x + a * size, y + b * size) for a, b in outline]
        brush.polygon(points, fill=fill)
        if rng.random() < 0.7:
            edge = line_colour(fill)  # type: ignore[arg-type]
            brush.line([*points, points[0], points[1]], fill=edge, width=round(1.5 * FINE), joint="curve")
    return image.reduce(FINE)


def to_tensor(images: list[Image]) -> Tensor:
    """RGB pictures of one size -> [B, 3, H, W] float32 in -1..1."""
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(stacked / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def warm_cosine(step: int, steps: int, warmup: int = 50, last: float = 0.02) -> float:
    """Learning rate as a part of its highest: a linear rise, then half a cosine down to `last`."""
    if step < warmup:
        return (step + 1) / warmup
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def psnr(squared_error: Tensor) -> float:
    """Of pictures in -1..1, in decibels."""
    return 10 * math.log10(4.0 / max(squared_error.item(), 1e-12))


def measure_vae(vae: Vae, seed: int = 1, pictures: int = 64) -> dict[str, float]:
    """PSNR of scenes and of doodles, and the mean and deviation of scene latents, on pictures not trained on."""
    rng = random.Random(seed)
    measures = {}
    with torch.no_grad():
        for name, share in (("scenes", 0.0), ("doodles", 1.0)):
            images = to_tensor([random_picture(rng, share) for _ in range(pictures)])
            mean, _ = vae.encode(images)
            measures[f"psnr_{name}"] = psnr(F.mse_loss(vae.decode(mean), images))
            measures[f"latent_mean_{name}"], measures[f"latent_deviation_{name}"] = mean.mean().item(), mean.std().item()
    return measures
