"""resize_lora.py: the nearest LoRA of a lower rank, as a full SVD of each layer's change says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests.tools.loras import changes, lora_tensors, run_script, write_lora
from tools.low_rank import METHODS, RankRule, decompose, decompose_product
from tools.resize_lora import main


def test_the_real_command_gives_the_best_approximation_of_each_layer(tmp_path: Path):
    tensors = lora_tensors(rank=6, use_dora="True")
    big = write_lora(tmp_path / "big.safetensors", tensors, ss_network_dim="6", ss_training_comment="mine")
    small = tmp_path / "small.safetensors"
    ran = run_script("resize_lora", "--model", big, "--save_to", small, "--new_rank", 2)
    assert ran.returncode == 0, ran.stderr
    assert "layers, mean rank" in ran.stdout
    actual = load_file(small)
    for name, change in changes(tensors).items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(changes(actual)[name], u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-6)
        assert actual[name + ".lora_down.weight"].shape[0] == 2
        assert torch.equal(actual[name + ".dora_scale"], tensors[name + ".dora_scale"])
        ratios = [float(t[name + ".alpha"]) / t[name + ".lora_down.weight"].shape[0] for t in (tensors, actual)]
        assert ratios[0] == pytest.approx(ratios[1])
    metadata = safe_open(small, "pt").metadata()
    assert metadata["ss_network_dim"] == "2" and metadata["ss_training_comment"].endswith("; mine")


def test_a_rank_that_is_enough_leaves_a_layer_as_it_is(tmp_path: Path):
    tensors = lora_tensors(dtype=torch.bfloat16)
    file = write_lora(tmp_path / "a.safetensors", tensors)
    assert main(["--model", str(file), "--save_to", str(tmp_path / "b.safetensors"), "--new_rank", "64"]) == 0
    actual = load_file(tmp_path / "b.safetensors")
    assert actual.keys() == tensors.keys() and all(torch.equal(actual[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    ("method", "value"), [("energy", 0.8), ("sv_fro", 0.9), ("sv_cumulative", 0.6), ("sv_ratio", 2)]
)
def test_every_method_keeps_what_it_promises_and_no_rank_more(method: str, value: float):
    s = torch.tensor([4.0, 3.0, 1.5, 1.0, 0.25], dtype=torch.float64)
    rank = RankRule(5, method, value).rank(s)
    shares = {
        "energy": s.square().cumsum(0) / s.square().sum(),
        "sv_fro": (s.square().cumsum(0) / s.square().sum()).sqrt(),
        "sv_cumulative": s.cumsum(0) / s.sum(),
        "sv_ratio": -s.roll(-1) / s[0],
    }
    expected = -1 / value if method == "sv_ratio" else value
    assert 1 < rank < 5 and shares[method][rank - 1] > expected - 1e-9
    assert shares[method][rank - 2] <= expected
    assert RankRule(1, method, value).rank(s) == 1
    assert RankRule(5, method, value).rank(torch.zeros(5, dtype=torch.float64)) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_decompositions_equal_torch_s_svd(out: int, inner: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator)
    product = up.double() @ down.double()
    exact = torch.linalg.svdvals(product)
    for actual in (decompose_product(up, down), decompose(product, most=30)):
        count = min(len(exact), len(actual.s))
        torch.testing.assert_close(actual.s[:count], exact[:count], rtol=1e-6, atol=1e-6 * float(exact[0]))
        new_down, new_up = actual.factors(min(count, rank))
        torch.testing.assert_close((new_up @ new_down).double(), product, rtol=1e-4, atol=1e-5 * float(exact[0]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--new_rank", "0"], "--new_rank must be 1 or more"),
        (["--new_rank", "4", "--dynamic_method", "energy"], "belong together"),
        (["--new_rank", "4", "--dynamic_method", "energy", "--dynamic_param", "1.5"], "a share is above 0"),
        (["--new_rank", "4", "--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "is 1 or more"),
        (["--new_rank", "4", "--device", "abacus"], "there is no such device"),
        (["--new_rank", "4"], "only LoRA layers can be resized"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    loha = {"lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a": torch.ones(4, 2)}
    file = write_lora(tmp_path / "a.safetensors", loha)
    assert main(["--model", str(file), "--save_to", str(tmp_path / "b.safetensors"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def test_the_help_says_what_every_method_means(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{method}:" in text for method in METHODS)


def test_magnitudes_keep_float32_whatever_the_precision(tmp_path: Path):
    tensors = lora_tensors(rank=6, use_dora="True")
    file, small = write_lora(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    words = ["--model", str(file), "--save_to", str(small), "--new_rank", "2", "--save_precision", "bf16"]
    assert main(words) == 0
    actual = load_file(small)
    scales = [key for key in tensors if key.endswith(".dora_scale")]
    assert scales and all(torch.equal(actual[key], tensors[key]) for key in scales)
    assert {actual[key].dtype for key in actual if key.endswith(".alpha")} == {torch.float32}
