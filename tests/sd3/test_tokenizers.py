"""Tokenizers come from the right place, and captions become the tokens and masks that SD3 was trained with."""

import json
import shutil

import pytest
import torch

from library.common.errors import UserError
from library.sd3.tokenizers import HUB_NAMES, Tokenizers, folder_name, load_tokenizers, vocabulary_problems
from tests.sd3 import tiny

CAPTIONS = ["a red cat", "", "Small!! dog on 2 houses", "cat " * 200]


def no_network(name):
    raise OSError("Name or service not known\nsecond line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(folder):
    return load_tokenizers(folder, None, from_hub=no_network)


def copy_as(folder, target, *names):
    for name in names or HUB_NAMES:
        shutil.copytree(folder / folder_name(name), target / folder_name(name))


# --- tokens ---


def test_clip_tokens_are_those_of_transformers_padded_to_77(tokenizers):
    ids, mask = tokenizers.clip_l(CAPTIONS, 77)
    reference = tokenizers.clip_l.inner(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert ids.shape == mask.shape == (4, 77) and ids.dtype == mask.dtype == torch.int64
    assert torch.equal(ids, reference["input_ids"]) and torch.equal(mask, reference["attention_mask"])


def test_clip_g_pads_with_0_and_its_mask_does_not_cover_the_padding(tokenizers):
    ids, mask = tokenizers.clip_g(CAPTIONS, 77)
    same, same_mask = tokenizers.clip_l(CAPTIONS, 77)
    assert torch.equal(mask, same_mask)
    assert torch.equal(ids[mask == 1], same[mask == 1]) and bool((ids[mask == 0] == 0).all())


def test_an_exclamation_mark_is_text_and_not_padding(tokenizers):
    """CLIP-G's padding token is "!": making it special would split it off words and mask it."""
    ids, mask = tokenizers.clip_g(["wow!!", "wow"], 77)
    assert mask[0].sum() > mask[1].sum()
    assert torch.equal(ids[0, : mask[0].sum()], tokenizers.clip_l(["wow!!"], 77)[0][0, : mask[0].sum()])


def test_a_long_caption_keeps_its_end_token(tokenizers):
    ids, mask = tokenizers.clip_l([CAPTIONS[3]], 77)
    assert ids[0, 0] == 184 and ids[0, -1] == 185 and mask.all()
    ids, mask = tokenizers.t5([CAPTIONS[3]], 16)
    assert ids[0, -1] == 1 and mask.all()


@pytest.mark.parametrize("length", [1, 2, 77, 256, 512])
def test_t5_tokens_are_those_of_transformers_at_every_length(length, tokenizers):
    ids, mask = tokenizers.t5(CAPTIONS, length)
    reference = tokenizers.t5.inner(
        CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    assert ids.shape == (4, length)
    assert torch.equal(ids, reference["input_ids"]) and torch.equal(mask, reference["attention_mask"])


def test_counting_tells_how_long_a_caption_is_before_the_cut(tokenizers):
    assert tokenizers.clip_l.count("a red cat") == 5
    assert tokenizers.clip_l.count("cat " * 200) == 202
    assert tokenizers.t5.count("a red cat") == 4


# --- places ---


def test_tokenizers_lie_in_the_cache_folder_beside_the_checkpoint_or_in_a_folder_of_its_name(folder, tmp_path):
    checkpoint = tmp_path / "models" / "sd3.5.safetensors"
    checkpoint.parent.mkdir()
    for place in ("sd3.5_tokenizers", "tokenizers"):
        copy_as(folder, checkpoint.parent / place)
        found = load_tokenizers(None, checkpoint, from_hub=no_network)
        assert all((found.clip_l, found.clip_g, found.t5))
        shutil.rmtree(checkpoint.parent / place)
    found = load_tokenizers(folder, checkpoint, from_hub=no_network)
    assert all((found.clip_l, found.clip_g, found.t5))


def test_the_cache_folder_wins_over_the_one_beside_the_checkpoint(folder, tmp_path):
    copy_as(folder, tmp_path / "tokenizers")
    copy_as(folder, tmp_path / "cache")
    (tmp_path / "tokenizers" / folder_name("t5xxl") / "tokenizer.json").write_text("broken")
    assert load_tokenizers(tmp_path / "cache", tmp_path / "sd3.safetensors", from_hub=no_network).t5 is not None


def test_the_folders_of_a_copied_repository_serve(folder, tmp_path):
    shutil.copytree(folder / folder_name("clip_l"), tmp_path / "tokenizer")
    shutil.copytree(folder / folder_name("t5xxl"), tmp_path / "tokenizer_3")
    found = load_tokenizers(None, tmp_path / "sd3.safetensors", from_hub=no_network)
    assert found.clip_g.pad_id == 0 and found.clip_l.pad_id == 185 and found.t5.pad_id == 0


def test_clip_l_s_tokenizer_serves_for_clip_g(folder, tmp_path):
    copy_as(folder, tmp_path, "clip_l")
    found = load_tokenizers(tmp_path, None, names=("clip_l", "clip_g"), from_hub=no_network)
    assert found.clip_g.pad_id == 0 and found.t5 is None


def test_vocab_and_merges_alone_make_a_clip_tokenizer(tokenizers, tmp_path):
    vocabulary, merges = tiny.clip_vocabulary()
    target = tmp_path / folder_name("clip_l")
    target.mkdir()
    (target / "vocab.json").write_text(json.dumps(vocabulary))
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    found = load_tokenizers(tmp_path, None, names=("clip_l",), from_hub=no_network)
    assert torch.equal(found.clip_l(CAPTIONS, 77)[0], tokenizers.clip_l(CAPTIONS, 77)[0])


def test_a_download_is_kept_in_the_cache_folder(folder, tmp_path):
    asked = []

    def hub(name):
        asked.append(name)
        return folder / folder_name(name)

    first = load_tokenizers(tmp_path / "new", None, from_hub=hub)
    again = load_tokenizers(tmp_path / "new", None, from_hub=no_network)
    assert asked[0] == "clip_l" and "t5xxl" in asked
    for a, b in ((first.clip_l, again.clip_l), (first.clip_g, again.clip_g), (first.t5, again.t5)):
        assert torch.equal(a(CAPTIONS, 77)[0], b(CAPTIONS, 77)[0])
    assert not list((tmp_path / "new").glob(".*")), "no temporary folder is left"


def test_without_network_the_error_says_which_files_to_put_where(tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizers(tmp_path / "cache", tmp_path / "sd3.safetensors", from_hub=no_network)
    text = error.value.as_text()
    for name, hub_name in HUB_NAMES.items():
        assert f"https://huggingface.co/{hub_name}" in text and str(tmp_path / "cache" / folder_name(name)) in text
    assert "Name or service not known" in text and "second line" not in text


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    copy_as(folder, tmp_path)
    broken = tmp_path / folder_name("clip_l") / "tokenizer.json"
    broken.write_text(broken.read_text()[:100])
    with pytest.raises(UserError, match=r"tokenizer in .*clip-vit-large-patch14 cannot be read"):
        load_tokenizers(tmp_path, None, from_hub=no_network)


@pytest.mark.parametrize("name", list(HUB_NAMES))
def test_a_folder_without_a_vocabulary_never_gives_an_empty_tokenizer(name, tmp_path):
    """transformers 5 makes one, and every caption would be unknown tokens."""
    (tmp_path / folder_name(name)).mkdir()
    (tmp_path / folder_name(name) / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizers(tmp_path, None, names=(name,), from_hub=no_network)


def test_a_vocabulary_without_letters_is_refused(tmp_path):
    from transformers import CLIPTokenizer

    CLIPTokenizer().save_pretrained(tmp_path / folder_name("clip_l"))
    with pytest.raises(UserError, match="does not know the letter a"):
        load_tokenizers(tmp_path, None, names=("clip_l",), from_hub=no_network)


def test_a_sentencepiece_model_alone_makes_t5_s_tokenizer(tmp_path):
    import sentencepiece

    target = tmp_path / folder_name("t5xxl")
    target.mkdir()
    lines = [" ".join(tiny.WORDS[i:] + tiny.WORDS[:i]) for i in range(len(tiny.WORDS))] * 10
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(target / "spiece"), vocab_size=60, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (target / "spiece.vocab").unlink()
    t5 = load_tokenizers(tmp_path, None, names=("t5xxl",), from_hub=no_network).t5
    reference = sentencepiece.SentencePieceProcessor(model_file=str(target / "spiece.model"))
    for caption in ("a red  cat", "small painting of unknownthings", " the blue house"):
        ids, mask = t5([caption], 32)
        assert ids[0, : mask.sum()].tolist() == [*reference.encode(caption), 1]


def test_a_tokenizer_of_another_model_is_noticed(tokenizers):
    sizes = {"clip_l": 186, "clip_g": 186, "t5xxl": 128}
    assert vocabulary_problems(tokenizers, {**sizes, "t5xxl": 120}) == []
    assert len(vocabulary_problems(tokenizers, {"clip_l": 49408, "clip_g": 185, "t5xxl": 100})) == 3
    assert vocabulary_problems(Tokenizers(None, None, None), sizes) == []
