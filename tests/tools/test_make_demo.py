"""tools/make_demo.py: the demo is whole, always the same, in the exact layout, and its model draws what captions say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.data.prompts import read_prompts
from library.flow.samplers import SAMPLERS
from library.sd3.checkpoint import ModelFiles, locate_parts
from library.sd3.conditioning import ContextSizes
from library.sd3.models import load_mmdit, load_vae
from library.sd3.text_encoder_sizes import sizes_of
from library.sd3.text_encoders import load_clip, load_t5
from library.sd3.tokenizers import Tokenizers, load_tokenizers, vocabulary_problems
from tools.demo.captions import FORMS, PLACE_PHRASES, TRIGGER, say
from tools.demo.dataset import PREVIEW_SCENES, reg_scenes, train_scenes
from tools.demo.figures import FIGURES, KNOWN_FIGURES
from tools.demo.judge import judge
from tools.demo.sampling import sample
from tools.demo.scenes import COLOURS, PLACES, Pose, Scene, draw
from tools.demo.text_training import TextEncoders
from tools.make_demo import WEIGHTS, main, make_demo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("library.common.files.flush_to_disk", lambda path: None)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "demo"
    make_demo(folder)
    return folder


@pytest.fixture(scope="module")
def files(demo: Path) -> ModelFiles:
    return locate_parts(demo / "model" / "sd3_demo.safetensors")


@pytest.fixture(scope="module")
def tokenizers(demo: Path) -> Tokenizers:
    def no_hub(name: str) -> object:
        raise AssertionError(f"{name}'s tokenizer was looked for on the Hub")

    return load_tokenizers(None, demo / "model" / "sd3_demo.safetensors", from_hub=no_hub)


# --- the folder ----------------------------------------------------------------------------------------------------


def test_every_picture_has_a_caption_and_64_pixels(demo: Path) -> None:
    for name, count in (("train", len(train_scenes())), ("reg", len(reg_scenes()))):
        pictures = sorted((demo / name).glob("*.png"))
        assert len(pictures) == count
        for picture in pictures:
            assert Image.open(picture).size == (64, 64)
            assert picture.with_suffix(".txt").read_text(encoding="utf-8").strip()


def test_the_demo_is_the_same_every_time(demo: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "demo")
    again = {path.relative_to(tmp_path / "demo"): path for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    assert again.keys() == {path.relative_to(demo) for path in demo.rglob("*") if path.is_file()}
    for name, path in again.items():
        if name.name != "dataset.toml":  # it names its own folder
            assert path.read_bytes() == (demo / name).read_bytes(), name


def test_a_second_run_writes_nothing_and_keeps_edits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert make_demo(folder) > 100
    (folder / "prompts.txt").write_text("my own prompt\n", encoding="utf-8")
    (folder / "train" / f"{sorted((folder / 'train').glob('*.txt'))[0].name}").write_text("my own caption\n")
    main(["--output", str(folder)])
    assert "is there and whole" in capsys.readouterr().out
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == "my own prompt\n"
    main(["--output", str(folder), "--force"])
    assert "my own prompt" not in (folder / "prompts.txt").read_text(encoding="utf-8")


def test_an_older_copy_of_the_model_is_replaced(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model" / "sd3_demo.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"an older model")
    make_demo(tmp_path)
    assert checkpoint.read_bytes() == (WEIGHTS / "sd3_demo.safetensors").read_bytes()


def test_a_broken_run_leaves_no_part_of_a_file_and_the_next_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Image.Image, path: Path, format: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        with pytest.raises(OSError, match="full"):
            make_demo(tmp_path)
    assert not list((tmp_path / "train").iterdir())
    make_demo(tmp_path)
    assert len(list((tmp_path / "train").glob("*.png"))) == len(train_scenes())


def test_making_the_demo_needs_no_torch() -> None:
    code = "import sys; import tools.make_demo; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_it_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    script = ROOT / "tools" / "make_demo.py"
    subprocess.run([sys.executable, str(script), "--output", "here"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "here" / "dataset.toml").is_file()


# --- what is to be learned -----------------------------------------------------------------------------------------


def test_the_new_figure_is_in_every_training_picture_and_nowhere_else() -> None:
    assert {scene.figure for scene in train_scenes()} == {TRIGGER}
    assert {scene.figure for scene in reg_scenes()} == set(KNOWN_FIGURES)
    assert TRIGGER not in KNOWN_FIGURES


def test_training_shows_every_colour_and_place_about_as_often() -> None:
    for scenes in (train_scenes(), reg_scenes()):
        for part, choices in (("colour", tuple(COLOURS)), ("place", PLACES)):
            counts = Counter(getattr(scene, part) for scene in scenes)
            assert set(counts) == set(choices)
            assert max(counts.values()) - min(counts.values()) <= 3


def test_no_preview_asks_for_a_picture_that_was_trained_on(demo: Path) -> None:
    trained = {(scene.colour, scene.place) for scene in train_scenes()}
    assert not trained & {(zorp.colour, zorp.place) for zorp, _ in PREVIEW_SCENES}
    prompts = read_prompts(demo / "prompts.txt", SAMPLERS)
    with_trigger = [TRIGGER in prompt.prompt for prompt in prompts]
    assert with_trigger == [True, False] * len(PREVIEW_SCENES)
    assert {(prompt.width, prompt.height) for prompt in prompts} == {(64, 64)}


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_weights_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12_000_000


def test_the_checkpoint_is_one_file_in_the_exact_layout(files: ModelFiles) -> None:
    """Every part loads strictly, so no tensor is missing, unknown or misshapen; and no tensor belongs to no part."""
    assert files.clip_l is not None and files.clip_g is not None and files.t5xxl is not None and files.vae is not None
    mmdit = load_mmdit(files.mmdit, "cpu", torch.float32)
    assert mmdit.config.hidden_size == 64 * mmdit.config.depth  # so do readers that take one from the other
    vae = load_vae(files.vae, "cpu", torch.float32)
    clip_l, clip_g = (load_clip(part, "cpu", torch.float32) for part in (files.clip_l, files.clip_g))
    t5 = load_t5(files.t5xxl, "cpu", torch.float32)
    prefixes = {
        "model.diffusion_model.": len(mmdit.state_dict()),
        "first_stage_model.": len(vae.state_dict()),
        "text_encoders.clip_l.transformer.": len(clip_l.state_dict()),
        "text_encoders.clip_g.transformer.": len(clip_g.state_dict()),
        "text_encoders.t5xxl.transformer.": len(t5.state_dict()) - 1,  # the embedding has two names in the model
    }
    parts = (files.mmdit, files.vae, files.clip_l, files.clip_g, files.t5xxl)
    assert {part.prefix: len(part.tensors) for part in parts} == prefixes


def test_the_text_conditioning_fits_the_denoiser(files: ModelFiles) -> None:
    sizes = ContextSizes.from_files(files, t5_tokens=256)
    assert files.clip_g is not None and files.t5xxl is not None
    assert sizes.clip_l + sizes_of(files.clip_g).width <= sizes.context == sizes_of(files.t5xxl).width
    assert sizes.pooled == sizes.pooled_l + sizes_of(files.clip_g).width


def test_the_tokenizers_beside_the_checkpoint_belong_to_its_encoders(files: ModelFiles, tokenizers: Tokenizers) -> None:
    vocabularies = {
        name: sizes_of(part).vocabulary for name, part in files.encoders().items() if part is not None
    }  # rows of the embeddings
    assert len(vocabularies) == 3
    assert vocabulary_problems(tokenizers, vocabularies) == []
    assert tokenizers.clip_l is not None and tokenizers.t5 is not None
    assert tokenizers.clip_l.vocabulary == vocabularies["clip_l"]
    assert tokenizers.t5.vocabulary == vocabularies["t5xxl"]


def test_every_caption_is_made_of_known_words(tokenizers: Tokenizers) -> None:
    """One token a word in both kinds of tokenizer; the trigger in a few known pieces; nothing unknown."""
    assert tokenizers.clip_l is not None and tokenizers.clip_g is not None and tokenizers.t5 is not None
    for figure in FIGURES:
        for place, phrases in PLACE_PHRASES.items():
            caption = say(Scene(figure, "orange", place, "big"), FORMS[0][0], phrases[-1])
            words = len(caption.replace(",", " ,").split())
            pieces = 2 if figure == TRIGGER else 0
            for tokenizer, marks in ((tokenizers.clip_l, 2), (tokenizers.clip_g, 2), (tokenizers.t5, 1)):
                assert tokenizer.count(caption) == words + pieces + marks, caption
    for caption in ("a zorp", "A Red Zorp, in the SNOW!", "xyzzy 42", ""):
        ids, mask = tokenizers.t5([caption], 64)
        assert tokenizers.t5.inner.unk_token_id not in ids[mask == 1]
    start, end = tokenizers.clip_l.inner.bos_token_id, tokenizers.clip_l.inner.eos_token_id
    ids, mask = tokenizers.clip_l(["café №5 東京"], 77)
    assert (ids[mask == 1][1:-1] < min(start, end)).all()  # any text is told in bytes, none as an end token


def test_drawings_are_recognized() -> None:
    for figure, colour, place in (("zorp", "white", "white"), ("moon", "purple", "night"), ("star", "black", "sea")):
        scene = Scene(figure, colour, place, "small")
        assert judge(draw(scene, Pose(3.0, -2.0, 1.05, 6.0))).scene == scene


def test_the_base_model_draws_what_the_caption_says(files: ModelFiles, tokenizers: Tokenizers) -> None:
    """Before any LoRA: of the known figures at least three in four are right, and the trigger word gives no zorp."""
    assert files.clip_l is not None and files.clip_g is not None and files.t5xxl is not None
    encoders = TextEncoders(
        load_clip(files.clip_l, "cpu", torch.float32),
        load_clip(files.clip_g, "cpu", torch.float32),
        load_t5(files.t5xxl, "cpu", torch.float32),
    )
    mmdit, vae = load_mmdit(files.mmdit, "cpu", torch.float32), load_vae(files.vae, "cpu", torch.float32)
    asked = [known for _, known in PREVIEW_SCENES]
    prompts = [f"a {scene.colour} {scene.figure} {PLACE_PHRASES[scene.place][0]}" for scene in asked]
    images = sample([*prompts, "a red zorp on the beach"], mmdit, vae, encoders, tokenizers, steps=16)
    seen = [judge(image).scene for image in images]
    for part in ("figure", "colour", "place"):
        right = [getattr(want, part) == getattr(got, part) for want, got in zip(asked, seen)]
        assert sum(right) >= 3, f"{part}: {seen}"
    assert seen[-1].figure != TRIGGER
