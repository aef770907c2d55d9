"""What is fuzzed: for each kind of input a function that makes one of a random generator, and returns the call that reads it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from library.common.safetensors_header import parse_header, read_header
from library.data.command_line import CommandLineData
from library.data.config import read_datasets
from library.data.index import build_index
from library.data.prompts import read_prompts
from library.data.settings import DatasetSettings, SubsetSettings
from library.options.config_file import read_config
from library.options.resolve import resolve_options
from library.options.table import OPTIONS
from library.saving.restore import restore
from library.saving.state import Snapshot, open_state, random_states, write_state
from library.training.ema import WeightEma
from library.training.optimizer_args import parse_keyword_args
from library.training.train_progress import TrainProgress
from networks import lora_sd3
from networks.lora_file import check_lora_file, read_lora
from networks.merging import check_change
from tests.data.folders import image
from tests.faults.inputs import plan_of
from tests.sd3.tiny import tiny_checkpoint, tiny_model_folder

Target = Callable[[random.Random], Callable[[], object]]
NUMBERS = ["0", "-1", "1e999", "nan", "-inf", "9" * 400, "9" * 5000, "2147483648", "0.5", "1e-400", "0x10", "٣", "1_0"]
WORDS = [
    "",
    " ",
    "\0",
    "\x1b[31m",
    "\ud800",
    "é" * 300,
    "../" * 50,
    "a" * 5000,
    "true",
    "[]",
    "{}",
    "'",
    '"',
    "\\",
    "\n",
    "..x",
    "/",
    "null",
]
DEEP = [
    "[" * 5000,
    "{" * 5000,
    '{"a":' * 200,
    "[" * 100 + "]" * 100,
    "(" * 200,
    "-" * 3000 + "1",
    "a." * 3000 + "b = 1",
]
VALUES = [
    "0", "-1", "1", "3", "64", "2147483648", "9" * 30, "0.5", "-0.5", "1e300", "1e-300", "true", "false", '""', '" "', '"a"', '"1"', '"0.5,0.7"', "[]",
    "[1]", "[64, 64]", "[0, 0]", "[0.1, 0.5]", "[[1]]", '["a"]', '"/"', '"."', '".png"', '"AdamW"', '"../x"', '"\\n"', '"\\u001b[0m"',
]  # fmt: skip
SHAPES = [
    (),
    (0,),
    (1,),
    (4,),
    (4, 4),
    (0, 4),
    (4, 0),
    (4, 192),
    (192, 4),
    (1, 4, 4),
    (2, 2, 2, 2),
    (192, 192),
    (576, 4),
]


def junk(rng: random.Random) -> str:
    return rng.choice([*NUMBERS, *WORDS, *DEEP, rng.randbytes(rng.randrange(30)).decode("latin-1")])


def mutated(rng: random.Random, text: str) -> str:
    """A text with some pieces changed, cut out, doubled or filled with junk."""
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 1, 3, 10]))
        kind = rng.randrange(4)
        middle = (
            junk(rng)
            if kind == 0
            else ""
            if kind == 1
            else text[start:end] * 2
            if kind == 2
            else chr(rng.randrange(1, 0x300))
        )
        text = text[:start] + middle + text[end:]
    return text


def revalued(rng: random.Random, text: str) -> str:
    """A TOML text with the values of some keys replaced by other valid ones, and sometimes mutated besides."""
    lines = text.split("\n")
    for number in rng.sample(range(len(lines)), min(len(lines), rng.randrange(1, 4))):
        key, equals, _ = lines[number].partition(" = ")
        if equals:
            lines[number] = f"{key} = {json.dumps(json.loads(rng.choice(VALUES)))}"
    text = "\n".join(lines)
    return mutated(rng, text) if rng.random() < 0.3 else text


def value(rng: random.Random, depth: int = 0) -> object:
    """A random JSON value."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 6:
        return [None, True, rng.randrange(-3, 3000), rng.uniform(-2, 2), junk(rng), 10 ** rng.randrange(30)][kind]
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice(["caption", "prompt", "tags", "image_size", "image_path", "width", "seed", junk(rng)]): value(
            rng, depth + 1
        )
        for _ in range(3)
    }


def writes(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def targets(folder: Path) -> dict[str, Target]:
    """Every target by name. They write into `folder`."""
    for number in range(2):
        image(folder / "images" / f"{number}.png")
    made = (
        _headers,
        _datasets,
        _option_lines,
        _config_files,
        _prompts,
        _metadata,
        _lora_files,
        _states,
        _arguments,
        _captions,
        _plans,
    )
    return {each.__name__.strip("_"): each(folder) for each in made}


def _headers(folder: Path) -> Target:
    path = tiny_checkpoint(folder / "model.safetensors", "5-medium")
    start = path.open("rb").read(8)
    length = struct.unpack("<Q", start)[0]
    header, size = path.open("rb").read(8 + length)[8:].decode(), path.stat().st_size

    def make(rng: random.Random) -> Callable[[], object]:
        text = mutated(rng, header).encode("utf-8", "surrogatepass")
        data = (
            struct.pack("<Q", len(text) + rng.choice([0, 0, 0, 1, -1, 2**40])) + text
            if rng.random() < 0.9
            else rng.randbytes(40)
        )
        return lambda: parse_header(data, size + len(data) - 8 - length)

    return make


DATASET = """[general]
resolution = 64
enable_bucket = true
caption_extension = ".txt"
[[datasets]]
batch_size = 2
max_bucket_reso = 256
[[datasets.subsets]]
image_dir = "FOLDER"
num_repeats = 2
keep_tokens = 1
caption_prefix = "a, b"
token_warmup_step = 0.5
custom_attributes = {a = [1, {b = 2}]}
"""
JSON_DATASET = {"datasets": [{"resolution": [64, 64], "subsets": [{"image_dir": "FOLDER", "num_repeats": 3}]}]}


def _datasets(folder: Path) -> Target:
    def make(rng: random.Random) -> Callable[[], object]:
        if rng.random() < 0.5:
            path = writes(folder / "d.toml", revalued(rng, DATASET.replace("FOLDER", str(folder / "images"))))
        else:
            path = writes(
                folder / "d.json", mutated(rng, json.dumps(JSON_DATASET).replace("FOLDER", str(folder / "images")))
            )
        return lambda: build_index(read_datasets(path, CommandLineData()))

    return make


def _option_lines(folder: Path) -> Target:
    def make(rng: random.Random) -> Callable[[], object]:
        words = []
        for option in rng.sample(OPTIONS, 6):
            # read_config opens what config_file names; everything else stays a value
            if option.name not in ("config_file", "output_config"):
                words += [option.flag, *(mutated(rng, junk(rng)) for _ in range(rng.randrange(3)))]
        return lambda: resolve_options([word for word in words if word not in ("-h", "--help")])

    return make


def _config_files(folder: Path) -> Target:
    text = '[a]\nlearning_rate = 1e-4\noptimizer_args = ["a=1", "b=2"]\n[b]\nseed = 7\nfp8_base = true\noutput_name = "x"\nmax_train_epochs = 3\n'

    def make(rng: random.Random) -> Callable[[], object]:
        path = writes(folder / "c.toml", revalued(rng, text))
        if rng.random() < 0.5:
            return lambda: read_config(path)
        return lambda: resolve_options(["--config_file", str(path)])

    return make


PROMPTS = {
    ".txt": "a cat --w 512 --h 768 --d 1 --s 20 --l 4.5 --n bad\n# no\na dog --fs 3\n",
    ".toml": '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "a cat"\nscale = 4\n[[prompt.subset]]\nprompt = "b"\nseed = 3\n',
    ".json": '[{"prompt": "a cat", "width": 512, "seed": 3, "negative_prompt": null}, "a dog --w 64"]',
}


def _prompts(folder: Path) -> Target:
    def make(rng: random.Random) -> Callable[[], object]:
        end = rng.choice(list(PROMPTS))
        text = (
            json.dumps([value(rng), value(rng)])
            if end == ".json" and rng.random() < 0.5
            else mutated(rng, PROMPTS[end])
        )
        path = writes(folder / f"p{end}", text)
        return lambda: read_prompts(path, {"euler": "euler"}, ["ddim"])

    return make


def _metadata(folder: Path) -> Target:
    table = {"0.png": {"caption": "a", "tags": "b", "image_size": [64, 64]}, "1.png": {"caption": "c"}}

    def make(rng: random.Random) -> Callable[[], object]:
        end = rng.choice([".json", ".jsonl"])
        if rng.random() < 0.5:
            text = json.dumps({"0.png": value(rng), junk(rng): value(rng)})
        elif end == ".json":
            text = mutated(rng, json.dumps(table))
        else:
            text = mutated(rng, "\n".join(json.dumps({"image_path": name, **fields}) for name, fields in table.items()))
        subset = SubsetSettings("s", image_dir=folder / "images", metadata_file=writes(folder / f"m{end}", text))
        return lambda: build_index([DatasetSettings("d", (subset,), (64, 64))])

    return make


def _captions(folder: Path) -> Target:
    def make(rng: random.Random) -> Callable[[], object]:
        writes(folder / "images" / "0.txt", mutated(rng, "a cat, on grass\nsecond {a|b}"))
        writes(
            folder / "images" / "index_cache.json",
            mutated(
                rng,
                '{"version":1,"image":["0.png"],"image_bytes":[1],"image_mtime":[2],"width":[3],"height":[4],"caption":[],"caption_bytes":[],"caption_mtime":[],"text":[]}',
            ),
        )
        subset = SubsetSettings("s", image_dir=folder / "images", caption_extension=".txt", cache_info=True)
        return lambda: build_index([DatasetSettings("d", (subset,), (64, 64))])

    return make


KEYS = [
    "lora_down.weight",
    "lora_up.weight",
    "alpha",
    "dora_scale",
    "lora_mid.weight",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w2",
    "lokr_w1_a",
    "lokr_w1_b",
    "diff",
    "diff_b",
    "oft_blocks",
    "a1.weight",
    "a2.weight",
    "b1.weight",
    "b2.weight",
    "lora_A.weight",
    "lora_B.weight",
    "",
]
LAYERS = [
    "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "lora_unet_x_embedder_proj",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "transformer.transformer_blocks.0.attn.to_q",
    "lora_unet_nothing",
    "x",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool, torch.float8_e4m3fn]


def _lora_files(folder: Path) -> Target:
    path = tiny_checkpoint(folder / "base.safetensors", "5-medium")
    from library.sd3.checkpoint import locate_parts
    from library.sd3.models import empty_mmdit

    model = empty_mmdit(locate_parts(path).mmdit)
    layers = lora_sd3.layers_by_name([], model)

    def make(rng: random.Random) -> Callable[[], object]:
        kinds = (
            rng.sample(KEYS, 3)
            if rng.random() < 0.5
            else ["lora_down.weight", "lora_up.weight", "alpha", *rng.sample(KEYS, 1)]
        )
        name = rng.choice(LAYERS[:4] if rng.random() < 0.8 else LAYERS)
        tensors = {f"{name}.{kind}": torch.zeros(rng.choice(SHAPES)).to(rng.choice(DTYPES)) for kind in kinds}
        metadata = {
            "lora_adapter_metadata": mutated(
                rng, '{"transformer.lora_alpha": 4, "transformer.r": 4, "transformer.alpha_pattern": {"a.*": 3}}'
            )
        }
        clean = {key: text.encode("utf-8", "replace").decode() for key, text in metadata.items()}
        content = save(tensors, clean if rng.random() < 0.3 else None)
        if rng.random() < 0.3:
            place = rng.randrange(len(content))
            content = content[:place] + rng.randbytes(3) + content[place + rng.choice([0, 3]) :]
        file = writes(folder / "lora.safetensors", content)
        return rng.choice(
            [
                lambda: lora_sd3.create_network_from_weights(1.0, str(file), None, [], model),
                lambda: lora_sd3.create_network(1.0, 4, 4.0, None, [], model).load_weights(file),
                lambda: [
                    check_change(name, tensors, layers[name])
                    for name, tensors in read_lora(file, damaged=True).layers.items()
                    if name in layers
                ],
                lambda: check_lora_file(file),
                lambda: read_header(file),
            ]
        )

    return make


def _arguments(folder: Path) -> Target:
    def make(rng: random.Random) -> Callable[[], object]:
        pair = mutated(rng, rng.choice(["betas=0.9,0.99", "decouple=True", "eps={'a': (1, [2])}", f"a={junk(rng)}"]))
        return lambda: parse_keyword_args("--optimizer_args", [pair])

    return make


def _states(folder: Path) -> Target:
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4)).sum().backward()
    optimizer.step()
    averages = WeightEma(dict(network.named_parameters()), 0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    components = {"optimizer": optimizer, "ema": averages, "scheduler": scheduler}
    good = folder / "good-state"
    states = {name: component.state_dict() for name, component in components.items()}
    write_state(good, Snapshot(TrainProgress(), {"seed": 1}, dict(network.state_dict()), states, random_states()))
    facts = (good / "train_state.json").read_text(encoding="utf-8")

    def damaged(rng: random.Random, state: object) -> object:
        if isinstance(state, dict) and state and rng.random() < 0.9:
            key = rng.choice(list(state))
            changed = dict(state)
            changed[key] = damaged(rng, changed[key])
            if rng.random() < 0.1:
                del changed[key]
            return changed
        if isinstance(state, list) and state and rng.random() < 0.8:
            return [damaged(rng, state[0]), *state[1:]]
        return rng.choice([torch.zeros(rng.choice(SHAPES)), value(rng), junk(rng)])

    def make(rng: random.Random) -> Callable[[], object]:
        from library.training.optimizers import OptimizerBundle

        (good / "train_state.json").write_text(facts, encoding="utf-8")
        kind = rng.choice([*states, "progress"])
        for name, state in states.items():
            torch.save(damaged(rng, state) if name == kind else state, good / f"{name}.pt")
        if kind == "progress":
            writes(good / "train_state.json", mutated(rng, facts))
        fresh = torch.optim.AdamW(network.parameters())
        bundle = OptimizerBundle(fresh, "", False, None)
        parts = {"optimizer": bundle, "ema": averages, "scheduler": torch.optim.lr_scheduler.StepLR(fresh, 2)}
        return lambda: restore(open_state(good), network, parts)

    return make


# They reach other machines, make folders, or print help
KEPT = (
    "huggingface",
    "resume",
    "wandb",
    "log_with",
    "_dir",
    "output",
    "config",
    "deepspeed",
    "tracker",
    "debug_dataset",
    "help",
)


def _plans(folder: Path) -> Target:
    model = tiny_model_folder(folder / "tiny", "5-medium")
    subset = f"image_dir = {str(folder / 'images')!r}"
    options = [option for option in OPTIONS if not any(part in option.name for part in KEPT)]

    def make(rng: random.Random) -> Callable[[], object]:
        dataset = revalued(rng, DATASET.replace("FOLDER", str(folder / "images"))) if rng.random() < 0.5 else ""
        file = writes(
            folder / "plan.toml", dataset or f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{subset}\n"
        )
        words = ["--pretrained_model_name_or_path", str(model), "--dataset_config", str(file)]
        words += ["--output_dir", str(folder / "out"), "--network_module", "networks.lora_sd3"]
        for option in rng.sample(options, rng.randrange(1, 4)):
            words.append(option.flag)
            if not option.is_switch:
                words.append(str(rng.choice(option.choices)) if option.choices and rng.random() < 0.8 else _text(rng))
        return lambda: plan_of(words)

    return make


def _text(rng: random.Random) -> str:
    return (
        json.loads(chosen)
        if (chosen := rng.choice([*VALUES, *VALUES, '"10%"', '"auto"', '"a=1"', '"bf16"'])).startswith('"')
        else chosen
    )
