"""Whatever keys and shapes a checkpoint's header holds: a model that loads, or a UserError; never a crash, never a long wait."""

from __future__ import annotations

import json
import random
import time
from math import prod
from pathlib import Path

import pytest

from library.common.errors import UserError
from library.common.safetensors_header import read_header
from library.sd3.checkpoint import locate_parts
from library.sd3.models import mmdit_problems, vae_problems
from tests.sd3.tiny import PREFIXES, tiny_checkpoint

Shapes = dict[str, tuple[int, ...]]
BLOCK, LEVEL = PREFIXES["mmdit"] + "joint_blocks.", PREFIXES["vae"] + "encoder.down."
CLIP, T5 = PREFIXES["clip_l"] + "text_model.encoder.layers.", PREFIXES["t5xxl"] + "encoder.block."
STRANGE_NUMBERS = ["999999999", "x", "", "-1", "1e9", "00", "٣", "7"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    path = tiny_checkpoint(tmp_path_factory.mktemp("fuzz") / "model.safetensors", "5-medium")
    return {key: info.shape for key, info in read_header(path).tensors.items()}


def written(path: Path, shapes: Shapes) -> Path:
    """A float32 file of these shapes whose header is in order; its tensors are a hole in the file."""
    header, position = {}, 0
    for key, shape in shapes.items():
        end = position + 4 * prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return path


def problems_of(path: Path) -> list[str]:
    try:
        files = locate_parts(path)
        return [*mmdit_problems(files.mmdit), *(vae_problems(files.vae) if files.vae else [])]
    except UserError as error:
        return error.problems


def mutated(rng: random.Random, shapes: Shapes) -> Shapes:
    found = dict(shapes)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(found))
        kind = rng.randrange(5)
        if kind == 0:
            prefix = rng.choice([BLOCK, LEVEL, CLIP, T5])
            found[f"{prefix}{rng.choice(STRANGE_NUMBERS)}.{rng.choice(['y', key.rpartition('.')[2]])}"] = (2, 2)
        elif kind == 1:
            del found[key]
        elif kind == 2 and found[key]:
            sizes = list(found[key])
            sizes[rng.randrange(len(sizes))] = rng.choice([0, 1, 2, 3, 63, 100, 128])
            found[key] = tuple(sizes)
        elif kind == 3:
            found[key] = rng.choice([(), (1,), (4, 4), (1, 1, 1), (2, 3, 4, 5)])
        else:
            number = rng.choice(STRANGE_NUMBERS)
            found[".".join(number if word == "0" else word for word in key.split("."))] = found.pop(key)
    return found


def test_150_mutated_checkpoints_give_nothing_but_clear_problems(shapes: Shapes, tmp_path: Path) -> None:
    rng, found = random.Random(0), 0
    for _ in range(150):
        problems = problems_of(written(tmp_path / "model.safetensors", mutated(rng, shapes)))
        assert all(len(problem) < 1500 and "model.safetensors" in problem for problem in problems)
        found += bool(problems)
    assert found > 100


@pytest.mark.parametrize(
    "key",
    [BLOCK + "999999999.x", BLOCK + "x.y", LEVEL + "999999999.y", LEVEL + "x.y", CLIP + "999999999.y", T5 + "x.y"],
)
def test_a_strange_layer_number_is_named_at_once(shapes: Shapes, tmp_path: Path, key: str) -> None:
    path = written(tmp_path / "model.safetensors", {**shapes, key: (1,)})
    start = time.perf_counter()
    problems = problems_of(path)
    assert time.perf_counter() - start < 2
    number = key.split(".")[-2]
    assert any(number in problem or "is missing" in problem for problem in problems)


@pytest.mark.parametrize(
    ("key", "shape", "reason"),
    [
        ("pos_embed", (1, 143, 128), "make no square"),
        ("x_embedder.proj.weight", (100, 16, 2, 2), "multiple of 64"),
        ("x_embedder.proj.weight", (128, 16, 3, 3), "patches of 2 x 2"),
        ("final_layer.linear.weight", (63, 128), "patches of 2 x 2"),
    ],
)
def test_an_impossible_size_is_named(
    shapes: Shapes, tmp_path: Path, key: str, shape: tuple[int, ...], reason: str
) -> None:
    changed = {**shapes, PREFIXES["mmdit"] + key: shape}
    assert any(reason in problem for problem in problems_of(written(tmp_path / "model.safetensors", changed)))


def test_a_block_that_is_left_out_is_named(shapes: Shapes, tmp_path: Path) -> None:
    changed = {key.replace("joint_blocks.1.", "joint_blocks.5."): shape for key, shape in shapes.items()}
    assert any(
        "number 1 is missing" in problem for problem in problems_of(written(tmp_path / "model.safetensors", changed))
    )


def test_a_whole_checkpoint_has_no_problems(shapes: Shapes, tmp_path: Path) -> None:
    assert problems_of(written(tmp_path / "model.safetensors", shapes)) == []
