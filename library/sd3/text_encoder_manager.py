"""Loads and runs the text encoders: one after another to precompute captions, together in training steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from library.common.tensor_io import Part, fingerprint
from library.sd3.checkpoint import ModelFiles
from library.sd3.conditioning import TextEncoding, TextSettings, encode_captions
from library.sd3.text_encoders import load_clip, load_t5, quantize_t5
from library.sd3.tokenizers import Tokenizers

logger = logging.getLogger(__name__)
ENCODERS = ("clip_l", "clip_g", "t5xxl")
QUANTIZED = ("fp8", "int8", "nf4")
Batches = Sequence[Sequence[str]]


@dataclass(frozen=True)
class WeightChange:
    """What is done to an encoder's wide weights before use (a LoRA merged in), and what tells it from other changes."""

    apply: Callable[[nn.Module], object]
    fingerprint: str


@dataclass(frozen=True)
class EncoderPlacement:
    """Where and in what format encoders work."""

    device: torch.device
    dtype: torch.dtype
    t5_device: torch.device
    t5_dtype: torch.dtype
    t5_quantization: str | None = None  # one of QUANTIZED
    quantize: Callable[[nn.Module, str], object] | None = (
        None  # replaces a block's linear layers, see library.memory.quantization
    )
    mmap: bool = True
    change: Mapping[str, WeightChange] = field(
        default_factory=dict
    )  # by encoder: done to its weights when it is loaded
    keep_freed_memory: bool = False  # leave a freed encoder's device memory to torch's allocator

    def maps(self, device: torch.device) -> bool:
        """Whether to map the file of an encoder on `device`. Weights in a mapped file would be lost with it."""
        return self.mmap and device.type != "cpu"


class TextEncoderManager:
    """Loads encoders when they are needed and frees them when asked. A missing encoder is never asked for."""

    def __init__(self, files: ModelFiles, tokenizers: Tokenizers, settings: TextSettings, placement: EncoderPlacement):
        self.files, self.tokenizers, self.settings, self.placement = files, tokenizers, settings, placement
        self.models: dict[str, nn.Module] = {}

    @property
    def present(self) -> list[str]:
        """The encoders that the files hold."""
        return [name for name, part in self.files.encoders().items() if part is not None]

    def fingerprint(self, names: Sequence[str]) -> str:
        """What a cache of these encoders' outputs depends on beside the captions."""
        parts = [f"{name}={fingerprint(part)}" for name, part in self._parts(names).items()]
        settings = self.settings
        facts = [f"t5_tokens={settings.t5_tokens}", f"mask_clip={settings.mask_clip}", f"mask_t5={settings.mask_t5}"]
        changes = [
            f"{name}+{self.placement.change[name].fingerprint}" for name in names if name in self.placement.change
        ]
        words = [
            f"{name}~{t.fingerprint}" for name in self._parts(names) if (t := self.tokenizers.of(name)) is not None
        ]
        return ";".join([*parts, *words, *facts, f"dtype={self.placement.dtype}", f"t5={self._t5_format()}", *changes])

    def precompute(
        self,
        captions: Sequence[str],
        names: Sequence[str],
        batch_size: int,
        wrap: Callable[[Batches], Iterable[Sequence[str]]] = lambda batches: batches,
    ) -> list[dict[str, Tensor]]:
        """The outputs of the named encoders for each caption, on the CPU: one encoder in memory at a time.

        wrap: puts a progress bar around the batches of an encoder.
        """
        batches = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        rows: list[dict[str, Tensor]] = [{} for _ in captions]
        for name in self._parts(names):
            alone = name not in self.models
            model = self.model(name)
            row = 0
            for batch in wrap(batches):
                with torch.no_grad():
                    encoding = self._encode(batch, {name: model})
                for outputs in TextEncoding(**{k: v.cpu() for k, v in encoding.to_dict().items()}).rows():
                    rows[row].update(outputs)
                    row += 1
            if alone:
                del model
                self.free(name)
        return rows

    def encode(self, captions: Sequence[str], names: Sequence[str], trained: Sequence[str] = ()) -> TextEncoding:
        """The outputs of the named encoders, which stay loaded. Those of `trained` carry a graph for the LoRA's gradients."""
        encoding = TextEncoding()
        for name in self._parts(names):
            with nullcontext() if name in trained else torch.no_grad():
                encoding = encoding.merged(self._encode(captions, {name: self.model(name)}))
        return encoding

    def model(self, name: str) -> nn.Module:
        """An encoder, loaded on first use."""
        if name not in self.models:
            self.models[name] = self._load(name)
        return self.models[name]

    def free(self, *names: str) -> None:
        """Forget encoders (all of them without names) and give their memory back."""
        for name in names or tuple(self.models):
            self.models.pop(name, None)
        if torch.cuda.is_available() and not self.placement.keep_freed_memory:
            torch.cuda.empty_cache()

    def _parts(self, names: Sequence[str]) -> dict[str, Part]:
        return {name: part for name, part in self.files.encoders().items() if part is not None and name in names}

    def _encode(self, captions: Sequence[str], models: dict[str, nn.Module]) -> TextEncoding:
        return encode_captions(
            captions,
            self.tokenizers,
            self.settings,
            clip_l=models.get("clip_l"),
            clip_g=models.get("clip_g"),
            t5=models.get("t5xxl"),
        )

    def _load(self, name: str) -> nn.Module:
        part, placement = self.files.encoders()[name], self.placement
        assert part is not None
        logger.info("Loading %s from %s", name, part.path)
        change = placement.change.get(name)
        if name != "t5xxl":
            model: nn.Module = load_clip(part, placement.device, placement.dtype, placement.maps(placement.device))
        else:  # a change is made to the wide weights, so that all of them are there before they are quantized
            quantize_block = self._block_quantizer() if change is None else None
            model = load_t5(
                part, placement.t5_device, placement.t5_dtype, placement.maps(placement.t5_device), quantize_block
            )
        if change is not None:
            change.apply(model)
            quantize_block = self._block_quantizer() if name == "t5xxl" else None
            if quantize_block is not None:
                quantize_t5(model, quantize_block)
        return model

    def _block_quantizer(self) -> Callable[[nn.Module], None] | None:
        kind, quantize = self.placement.t5_quantization, self.placement.quantize
        if kind is None or quantize is None:
            return None

        def quantize_block(block: nn.Module) -> None:
            quantize(block, kind)

        return quantize_block

    def _t5_format(self) -> str:
        return f"{self.placement.t5_dtype}/{self.placement.t5_quantization}"


def parse_t5_dtype(text: str | None, default: torch.dtype) -> tuple[torch.dtype, str | None]:
    """`--t5xxl_dtype` -> the dtype to compute in and the format to store in (None: the same)."""
    if text in QUANTIZED:
        return (torch.bfloat16 if default == torch.float32 else default), text
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "float16": torch.float16,
        "fp16": torch.float16,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    with suppress(KeyError):
        return names[text or ""], None
    return default, None
