"""A run's first step against diffusers and transformers in float64: the same image, text, noise and LoRA, the same gradient.

Nothing of this project computes the references: pixels come from Pillow, text from diffusers' encode_prompt or transformers,
latents from AutoencoderKL, the velocity from SD3Transformer2DModel with the LoRA added to its weights by plain arithmetic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoTokenizer

from library.caching.latent_entry import posterior_noise
from library.common.seeds import fold_seed
from library.sd3.mmdit import MMDiT
from library.sd3.vae import Vae
from networks.lora_sd3 import create_network
from tests.end_to_end.conftest import Workshop
from tests.end_to_end.runs import UNET, Run, dataset_file, image_folder, train
from tests.sd3.diffusers_models import diffusers_transformer, diffusers_vae
from tests.sd3.tiny import (
    PREFIXES,
    TOKENIZER_FOLDERS,
    fill_with_noise,
    save_single_file,
    save_tokenizers,
    tiny_clip,
    tiny_mmdit_config,
    tiny_parts,
    tiny_t5,
    tiny_vae_config,
)

SEED, ALPHA, RANK = 7, 2.0, 4
RATE = 1000.0  # of plain SGD: the step is large beside float32's rounding of the weights
CAPTION, PROMPT, NEGATIVE = "a red cat", "a blue dog", "the house"
LATENT = (16, 8, 8)  # of images of 64 x 64
CONFIG = replace(
    tiny_mmdit_config("5-medium"), mlp_hidden_size=512
)  # diffusers' MLP is four times as wide as the model
LORA_PREFIXES = {"mmdit": "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
Weights = dict[str, Tensor]


class Reference:
    """A checkpoint file as diffusers and transformers have it, in float64."""

    def __init__(self, model: Path):
        tensors = load_file(model)
        self.parts = {
            name: {k[len(p) :]: v.double() for k, v in tensors.items() if k.startswith(p)}
            for name, p in PREFIXES.items()
        }
        mmdit, vae = MMDiT(CONFIG), Vae(tiny_vae_config())
        mmdit.load_state_dict(self.parts["mmdit"])
        vae.load_state_dict(self.parts["vae"])
        self.transformer, self.vae = diffusers_transformer(mmdit).double(), diffusers_vae(vae).double()
        self.vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
        self.encoders = {"clip_l": tiny_clip("clip_l"), "clip_g": tiny_clip("clip_g"), "t5xxl": tiny_t5()}
        for name, encoder in self.encoders.items():
            fill(encoder, self.parts[name])
            encoder.double().eval().requires_grad_(False)
        folders = {name: model.parent / "tokenizers" / folder for name, folder in TOKENIZER_FOLDERS.items()}
        self.tokenizers = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
        self.tokenizers["clip_g"].pad_token = self.tokenizers["clip_g"].convert_ids_to_tokens(0)

    def pipeline(self, lora: Mapping[str, Tensor]) -> StableDiffusion3Pipeline:
        """diffusers' pipeline with a LoRA fused into all its models."""
        transformer, encoders = copy.deepcopy(self.transformer), copy.deepcopy(self.encoders)
        transformer.load_state_dict(as_diffusers(self.merged("mmdit", lora)))
        for name, encoder in encoders.items():
            fill(encoder, self.merged(name, lora))
        pipe = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=self.vae,
            text_encoder=encoders["clip_l"],
            tokenizer=self.tokenizers["clip_l"],
            text_encoder_2=encoders["clip_g"],
            tokenizer_2=self.tokenizers["clip_g"],
            text_encoder_3=encoders["t5xxl"],
            tokenizer_3=self.tokenizers["t5xxl"],
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def merged(self, part: str, lora: Mapping[str, Tensor], onto: Weights | None = None) -> Weights:
        """A part's weights (or `onto`) with the LoRA in them: W + alpha / rank * Up Down, as readers of the file do it."""
        names = {LORA_PREFIXES[part] + key.removesuffix(".weight").replace(".", "_"): key for key in self.parts[part]}
        weights = dict(onto or self.parts[part])
        for name in {key.partition(".")[0] for key in lora if key.startswith(LORA_PREFIXES[part])}:
            up, down = lora[f"{name}.lora_up.weight"].double(), lora[f"{name}.lora_down.weight"].double()
            change = lora[f"{name}.alpha"].double() / down.shape[0] * (up @ down)
            weights[names[name]] = weights[names[name]] + change
        return weights

    def velocity(self, weights: Weights, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Of the transformer with weights in the names of the checkpoint."""
        given = {"hidden_states": x, "timestep": t, "encoder_hidden_states": context, "pooled_projections": pooled}
        return functional_call(self.transformer, as_diffusers(weights), (), given).sample

    def text(self, caption: str, lora: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """context [1, 77 + 256, 192] and pooled [1, 192] with a LoRA in the encoders."""
        hidden, pools = [], []
        for name in ("clip_l", "clip_g"):
            words = self.tokenizers[name](caption, padding="max_length", max_length=77, return_tensors="pt")
            given = {"input_ids": words.input_ids, "output_hidden_states": True}
            out = functional_call(self.encoders[name], self.merged(name, lora), (), given)
            hidden.append(out.hidden_states[-2])
            pools.append(out.text_embeds)
        words = self.tokenizers["t5xxl"](caption, padding="max_length", max_length=256, return_tensors="pt")
        weights = self.merged("t5xxl", lora)
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        t5 = functional_call(self.encoders["t5xxl"], weights, (), {"input_ids": words.input_ids})[0]
        clip = torch.cat(hidden, -1)
        padded = nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return torch.cat([padded, t5], 1), torch.cat(pools, -1)

    def latent(self, image: Path, noise: Tensor) -> Tensor:
        """The normalised latent [1, 16, 8, 8] of an image file with this draw of the posterior."""
        pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB"))).double() / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist
        return (posterior.mean + posterior.std * noise.double() - 0.0609) * 1.5305


def fill(encoder: nn.Module, weights: Weights) -> None:
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}


def as_diffusers(weights: Weights) -> Weights:
    prefixed = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    return convert_sd3_transformer_checkpoint_to_diffusers(prefixed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A model that diffusers can hold, one image, and its dataset file."""
    folder = tmp_path_factory.mktemp("numerics")
    mmdit = MMDiT(CONFIG)
    fill_with_noise(mmdit)
    save_tokenizers(folder / "tokenizers")
    model = save_single_file(folder / "sd3.safetensors", {**tiny_parts("5-medium"), "mmdit": mmdit.state_dict()})
    images = image_folder(folder / "images")
    return Workshop(folder, model, dataset_file(folder / "data.toml", [f"image_dir = {str(images)!r}"]))


@pytest.fixture(scope="module")
def reference(place: Workshop) -> Reference:
    return Reference(place.model)


@pytest.fixture(scope="module")
def start(place: Workshop, reference: Reference) -> Path:
    """A LoRA file of all four parts in which Up is not zero, so that no gradient is."""
    encoders = [copy.deepcopy(encoder).float() for encoder in reference.encoders.values()]
    network = create_network(1.0, RANK, ALPHA, None, encoders, MMDiT(CONFIG), train_t5xxl="True")
    lora, generator = network.state_dict_for_saving(), torch.Generator().manual_seed(1)
    for key, tensor in lora.items():
        if not key.endswith("alpha"):
            lora[key] = 0.3 * torch.randn(tensor.shape, generator=generator) * tensor.shape[1] ** -0.5
    path = place.folder / "start.safetensors"
    save_file(lora, path)
    return path


@pytest.fixture(scope="module")
def unet_start(place: Workshop, start: Path) -> Path:
    path = place.folder / "unet.safetensors"
    save_file({key: tensor for key, tensor in load_file(start).items() if key.startswith("lora_unet")}, path)
    return path


@dataclass
class Step:
    """One step of plain SGD: the run, and the gradients that it took, by name in the LoRA file."""

    run: Run
    gradients: Weights


def step(place: Workshop, folder: Path, start: Path, *more: str, **options: object) -> Step:
    given = {
        "network_weights": start,
        "network_dim": RANK,
        "network_alpha": ALPHA,
        "max_train_steps": 1,
        "optimizer_type": "SGD",
        "learning_rate": RATE,
        "max_grad_norm": 0,
        "seed": SEED,
    }
    run = train(place, folder, *more, **{**given, **options})
    before, after = load_file(start), run.weights()
    names = [key for key in after if not key.endswith("alpha")]
    return Step(run, {key: (before[key].double() - after[key].double()) / RATE for key in names})


def draws(number: int = 0) -> torch.Generator:
    """The generator of a micro-batch of the first epoch on the CPU."""
    return torch.Generator().manual_seed(fold_seed(fold_seed(SEED, 0, number), "cpu"))


def uniform_timesteps(count: int, generator: torch.Generator) -> Tensor:
    return torch.floor(torch.rand(count, generator=generator) * 1000)


def normal_timesteps(count: int, generator: torch.Generator) -> Tensor:
    return torch.floor(torch.sigmoid(torch.randn(count, generator=generator)) * 1000)


@dataclass
class Sample:
    """What a step is made of, in float64: a latent with noise in it and its timestep, each with a batch dimension of 1."""

    latent: Tensor
    t: Tensor
    noise: Tensor

    @property
    def sigma(self) -> float:
        return self.t.item() / 1000

    @property
    def noisy(self) -> Tensor:
        return self.sigma * self.noise + (1 - self.sigma) * self.latent

    def residual(self, velocity: Tensor) -> Tensor:
        return velocity - (self.noise - self.latent)


def live_samples(
    reference: Reference, images: list[Path], generator: torch.Generator, timesteps=uniform_timesteps
) -> list[Sample]:
    """The samples of a micro-batch of images that are encoded as they come: posterior, timesteps and noise are drawn in turn."""
    posterior = torch.randn(len(images), *LATENT, generator=generator)
    t = timesteps(len(images), generator).double()
    noise = torch.randn(len(images), *LATENT, generator=generator).double()
    return [
        Sample(reference.latent(image, posterior[i : i + 1]), t[i : i + 1], noise[i : i + 1])
        for i, image in enumerate(images)
    ]


def leaves(path: Path) -> Weights:
    """A LoRA file in float64 whose factors ask for gradients."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    return {key: tensor if key.endswith("alpha") else tensor.requires_grad_() for key, tensor in tensors.items()}


def gradients(loss: Tensor, lora: Weights) -> Weights:
    names = [key for key, tensor in lora.items() if tensor.requires_grad]
    return dict(zip(names, torch.autograd.grad(loss, [lora[name] for name in names])))


def assert_same(found: Weights, wanted: Weights, error: float = 1e-4) -> None:
    assert found.keys() == wanted.keys() and found
    for key, gradient in wanted.items():
        assert gradient.norm() > 0, f"{key}: the reference has no gradient, so nothing is compared"
        rounding = gradient.numel() ** 0.5 * 2**-24 / RATE  # of the float32 weights that the gradient is read from
        off = (found[key] - gradient).norm()
        assert off <= error * gradient.norm() + rounding, (key, found[key].norm(), gradient.norm())


def at_strength(lora: Mapping[str, Tensor], strength: float) -> Weights:
    return {key: strength * tensor if key.endswith("alpha") else tensor for key, tensor in lora.items()}


def mean_loss(reference: Reference, lora: Weights, samples: list[Sample]) -> Tensor:
    """sd-scripts' default, the square error of x0, of samples of one caption; only the denoiser has a LoRA."""
    context, pooled = reference.text(CAPTION, {})
    weights = reference.merged("mmdit", lora)
    residuals = [s.residual(reference.velocity(weights, s.noisy, s.t, context, pooled)) for s in samples]
    return torch.stack([(s.sigma * r).square().mean() for s, r in zip(samples, residuals)]).mean()


# --- one step of the denoiser's LoRA -------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor, float], Tensor]
"""(x0_hat - x0, its velocity residual, sigma) -> the loss elementwise, as sd-scripts defines it on x0."""
PAPER = {"timestep_sampling": "logit_normal", "loss_weighting": "velocity"}
LOSSES: dict[str, tuple[dict[str, object], Loss]] = {
    "uniform": ({}, lambda e, r, s: e**2),
    "plain velocity": ({"weighting_scheme": "sigma_sqrt"}, lambda e, r, s: e**2 * s**-2),
    "the paper's": (PAPER, lambda e, r, s: r**2),
    "cosmap": ({"weighting_scheme": "cosmap"}, lambda e, r, s: e**2 * 2 / (math.pi * (1 - 2 * s + 2 * s * s))),
    "l1": ({"loss_type": "l1"}, lambda e, r, s: e.abs()),
    "huber": (
        {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.3},
        lambda e, r, s: 2 * 0.3**s * ((e**2 + 0.3 ** (2 * s)).sqrt() - 0.3**s),
    ),
    "smooth l1": (
        {"loss_type": "smooth_l1", "huber_schedule": "constant", "huber_c": 0.3, "weighting_scheme": "sigma_sqrt"},
        lambda e, r, s: 2 * ((e**2 + 0.3**2).sqrt() - 0.3) * s**-2,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_has_the_gradient_of_diffusers(
    place: Workshop, reference: Reference, unet_start: Path, tmp_path: Path, name: str
):
    """Image file -> pixels -> VAE -> latent -> noise -> text -> transformer -> loss -> Up and Down of every layer."""
    options, loss_of = LOSSES[name]
    done = step(place, tmp_path, unet_start, UNET, **options)
    timesteps = normal_timesteps if options is PAPER else uniform_timesteps
    (sample,) = live_samples(reference, [place.folder / "images/0.png"], draws(), timesteps)
    prompt, _, pooled, _ = reference.pipeline({}).encode_prompt(
        CAPTION, None, None, do_classifier_free_guidance=False, max_sequence_length=256
    )
    lora = leaves(unet_start)
    velocity = reference.velocity(reference.merged("mmdit", lora), sample.noisy, sample.t, prompt, pooled)
    error = sample.noisy - sample.sigma * velocity - sample.latent
    loss = loss_of(error, sample.residual(velocity), sample.sigma).mean()
    assert done.run.losses == pytest.approx([loss.item()], rel=1e-5)
    assert_same(done.gradients, gradients(loss, lora))


def test_what_is_cached_is_what_is_encoded_live(
    place: Workshop, reference: Reference, unet_start: Path, tmp_path: Path
):
    """Only the draw of the posterior is the cache's own, one for each image; the text's rows are the very same."""
    live = step(place, tmp_path / "live", unet_start, UNET)
    text = step(place, tmp_path / "text", unet_start, UNET, "--cache_text_encoder_outputs")
    assert all(torch.equal(live.gradients[key], gradient) for key, gradient in text.gradients.items())

    both = step(place, tmp_path / "both", unet_start, UNET, "--cache_text_encoder_outputs", "--cache_latents")
    (record,) = both.run.trainer.plan.index.training[0].records
    generator, lora = draws(), leaves(unet_start)
    latent = reference.latent(place.folder / "images/0.png", posterior_noise(record)[None])
    t, noise = uniform_timesteps(1, generator).double(), torch.randn(1, *LATENT, generator=generator).double()
    assert_same(both.gradients, gradients(mean_loss(reference, lora, [Sample(latent, t, noise)]), lora))


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 2), (2, 1)])
def test_a_step_on_two_images_has_the_mean_of_their_gradients(
    place: Workshop, reference: Reference, unet_start: Path, tmp_path: Path, batch: int, accumulation: int
):
    images = image_folder(tmp_path / "images", count=2)
    data = dataset_file(tmp_path / "data.toml", [f"image_dir = {str(images)!r}"], f"batch_size = {batch}")
    given = {"dataset_config": data, "gradient_accumulation_steps": accumulation}
    done = step(place, tmp_path / "out", unet_start, UNET, **given)
    plan, samples = done.run.trainer.plan, []
    records = plan.index.training[0].records
    for number, spec in enumerate(plan.training.epoch(0)):
        paths = [Path(records[item].path) for item, _ in spec.items]
        samples += live_samples(reference, paths, draws(number))
    assert len(samples) == 2
    lora = leaves(unet_start)
    assert_same(done.gradients, gradients(mean_loss(reference, lora, samples), lora))


def test_a_mask_weighs_the_latents_cells_by_their_opacity(
    place: Workshop, reference: Reference, unet_start: Path, tmp_path: Path
):
    alpha = np.random.default_rng(5).integers(0, 256, (64, 64), dtype=np.uint8)
    alpha[:20] = 0
    images = image_folder(tmp_path / "images", alpha=alpha)
    data = dataset_file(tmp_path / "data.toml", [f"image_dir = {str(images)!r}\nalpha_mask = true"])
    done = step(place, tmp_path / "out", unet_start, UNET, "--masked_loss", dataset_config=data)
    (sample,) = live_samples(reference, [images / "0.png"], draws())
    mask = torch.from_numpy(alpha / 255.0).reshape(8, 8, 8, 8).mean((1, 3))  # [8, 8], of 8 x 8 pixels each
    context, pooled = reference.text(CAPTION, {})
    lora = leaves(unet_start)
    velocity = reference.velocity(reference.merged("mmdit", lora), sample.noisy, sample.t, context, pooled)
    loss = ((sample.sigma * sample.residual(velocity)).square() * mask).mean()
    assert_same(done.gradients, gradients(loss, lora))


def test_base_weights_are_part_of_the_model_and_take_no_gradient(
    place: Workshop, reference: Reference, start: Path, unet_start: Path, tmp_path: Path
):
    words = {"base_weights": start, "base_weights_multiplier": 0.7}
    done = step(place, tmp_path, unet_start, UNET, **words)
    base, lora = at_strength(load_file(start), 0.7), leaves(unet_start)
    (sample,) = live_samples(reference, [place.folder / "images/0.png"], draws())
    weights = reference.merged("mmdit", lora, onto=reference.merged("mmdit", base))
    velocity = reference.velocity(weights, sample.noisy, sample.t, *reference.text(CAPTION, base))
    loss = (sample.sigma * sample.residual(velocity)).square().mean()
    assert_same(done.gradients, gradients(loss, lora))


def test_a_datasets_multiplier_and_what_it_preserves(
    place: Workshop, reference: Reference, unet_start: Path, tmp_path: Path
):
    """The LoRA at half its strength is pulled towards what the base model says of the same noisy image."""
    subset = f"image_dir = {str(place.folder / 'images')!r}\ncustom_attributes.diff_output_preservation = true"
    data = dataset_file(tmp_path / "data.toml", [subset], "batch_size = 1\nnetwork_multiplier = 0.5")
    done = step(place, tmp_path / "out", unet_start, UNET, dataset_config=data)
    (sample,) = live_samples(reference, [place.folder / "images/0.png"], draws())
    lora, text = leaves(unet_start), reference.text(CAPTION, {})
    weights = reference.merged("mmdit", at_strength(lora, 0.5))
    wanted = reference.velocity(reference.parts["mmdit"], sample.noisy, sample.t, *text)
    velocity = reference.velocity(weights, sample.noisy, sample.t, *text)
    assert_same(done.gradients, gradients((sample.sigma * (velocity - wanted)).square().mean(), lora))


# --- all parts, the file and the picture ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(place: Workshop, start: Path) -> Step:
    """A step of the LoRA of all four parts, a preview before it, and the file in both layouts after it."""
    prompts = place.folder / "prompts.txt"
    prompts.write_text(f"{PROMPT} --n {NEGATIVE} --w 64 --h 64 --s 3 --l 4 --d 11\n", encoding="utf-8")
    words = {"network_args": "train_t5xxl=True", "sample_prompts": prompts, "save_format": "both"}
    return step(place, place.folder / "whole", start, "--sample_at_first", **words)


def test_the_encoders_lora_has_the_gradient_of_transformers(
    place: Workshop, reference: Reference, start: Path, whole: Step
):
    (sample,) = live_samples(reference, [place.folder / "images/0.png"], draws())
    lora = leaves(start)
    context, pooled = reference.text(CAPTION, lora)
    velocity = reference.velocity(reference.merged("mmdit", lora), sample.noisy, sample.t, context, pooled)
    loss = (sample.sigma * sample.residual(velocity)).square().mean()
    assert whole.run.losses == pytest.approx([loss.item()], rel=1e-5)
    assert {key.split("_")[1] for key in whole.gradients} == {"unet", "te1", "te2", "te3"}
    assert_same(whole.gradients, gradients(loss, lora))


@torch.no_grad()
def test_the_saved_files_are_the_trained_network_to_readers_of_both_layouts(reference: Reference, whole: Step):
    trainer, generator = whole.run.trainer, torch.Generator().manual_seed(3)
    x, t = torch.randn(2, *LATENT, generator=generator), torch.tensor([900.0, 250.0])
    context, pooled = (tensor.repeat(2, *[1] * (tensor.dim() - 1)) for tensor in reference.text(PROMPT, {}))
    trainer.network.eval()
    hooks = trainer.predict(x, t, (context.float(), pooled.float(), None)).double()
    trained = (x.double(), t.double(), context, pooled)

    kohya = reference.velocity(reference.merged("mmdit", whole.run.weights()), *trained)
    assert (hooks - kohya).norm() <= 1e-5 * kohya.norm()

    weights = as_diffusers(reference.parts["mmdit"])
    file, used = whole.run.weights("lora-diffusers.safetensors"), 0
    for path in [key.removesuffix(".lora_A.weight") for key in file if key.endswith(".lora_A.weight")]:
        part, _, layer = path.partition(".")
        if part == "transformer":
            change = file[f"{path}.lora_B.weight"].double() @ file[f"{path}.lora_A.weight"].double()
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + change
            used += 1
    given = dict(zip(("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"), trained))
    diffusers = functional_call(reference.transformer, weights, (), given).sample
    assert used > 20 and (hooks - diffusers).norm() <= 1e-5 * diffusers.norm()
    base = reference.velocity(reference.parts["mmdit"], *trained)
    assert (base - kohya).norm() > 1e-2 * base.norm()


@torch.no_grad()
def test_a_preview_is_the_picture_that_diffusers_makes_with_the_lora(reference: Reference, start: Path, whole: Step):
    (path,) = (whole.run.folder / "sample").glob("*.png")
    noise = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(11)).double()
    asked = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 64, "latents": noise}
    made = {}
    for name, lora in (("with", load_file(start)), ("without", {})):
        pipe = reference.pipeline(lora)
        images = pipe(PROMPT, negative_prompt=NEGATIVE, output_type="np", max_sequence_length=256, **asked).images
        made[name] = images[0] * 255
    shown = np.array(Image.open(path)).astype(float)
    assert np.abs(shown - made["with"]).max() <= 0.51  # half a step of eight bits
    assert np.abs(shown - made["without"]).max() > 5
