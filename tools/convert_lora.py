#!/usr/bin/env python3
"""Turn a LoRA file from kohya's layout (ComfyUI, Forge, this trainer) into that of diffusers and PEFT, or back.

    python tools/convert_lora.py --model my_lora.safetensors --save_to my_lora_diffusers.safetensors

What the LoRA does stays the same to the last digit. Which way to go follows from the file: a kohya file becomes a diffusers
one and the other way round; --to says it outright. diffusers has no form for DoRA and LyCORIS files and skips the layers of T5,
which ComfyUI reads from a file of either layout.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from library.common.errors import UserError
from networks.diffusers_layout import to_diffusers, unread_by_diffusers
from networks.lora_file import read_lora
from tools.lora_files import add_output_options, check_target, in_precision, run_tool, save_lora, tool_parser

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the LoRA file to convert")
    parser.add_argument(
        "--to", choices=("kohya", "diffusers"), help="the layout to write; default: the one that the file does not have"
    )
    add_output_options(parser)
    chosen = parser.parse_args(arguments)
    return run_tool(lambda: convert(chosen.model, chosen.save_to, chosen.to, chosen.save_precision, chosen.force))


def convert(model: Path, save_to: Path, layout: str | None, precision: str | None, force: bool) -> int:
    check_target(save_to, force, [model])
    lora = read_lora(model)
    layout = layout or ("kohya" if lora.layout == "diffusers" else "diffusers")
    if layout == lora.layout:
        raise UserError(f"{model} is in {layout}'s layout already. Leave out --to for the other one.")
    tensors = lora.tensors
    if layout == "diffusers":
        tensors = to_diffusers(lora.tensors, str(model))
        unread = unread_by_diffusers(lora.tensors)
        if unread:
            logger.warning(
                "%d layers are T5's: ComfyUI reads them from the new file (text_encoders.t5xxl.transformer.…), diffusers skips them.",
                len(unread),
            )
    save_lora(save_to, in_precision(tensors, precision), lora.metadata)
    print(f"{save_to}: {len(lora.layers)} layers in {layout}'s layout.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
