#!/usr/bin/env python3
"""Show what a LoRA file (or any safetensors file) says about itself, and edit it.

    python tools/show_metadata.py my_lora.safetensors
    python tools/show_metadata.py my_lora.safetensors --title "My style" --author me --trigger "in the style of zorp"

Editing rewrites the metadata alone: the tensors stay byte for byte, so the hash by which sites know the model (sshs_model_hash) does
too. The file is replaced when the new one is whole; --save_to writes another file instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, Python looks into tools/ alone

from library.common.errors import UserError
from library.common.safetensors_header import Header, read_header
from tools.lora_files import check_target, rewrite_safetensors, run_tool, tool_parser

# option -> key and help
EDITS = {
    "title": ("modelspec.title", "the name to show"),
    "author": ("modelspec.author", "who made it"),
    "description": ("modelspec.description", "what it is"),
    "license": ("modelspec.license", "under which licence it is"),
    "tags": ("modelspec.tags", "words to find it by, separated by commas"),
    "trigger": ("modelspec.trigger_phrase", "the words that call up what was learned"),
    "usage_hint": ("modelspec.usage_hint", "how to use it"),
}
FACTS = (
    ("Title", "modelspec.title"),
    ("Author", "modelspec.author"),
    ("Description", "modelspec.description"),
    ("Licence", "modelspec.license"),
    ("Tags", "modelspec.tags"),
    ("Trigger phrase", "modelspec.trigger_phrase"),
    ("Usage", "modelspec.usage_hint"),
    ("Merged from", "modelspec.merged_from"),
    ("Architecture", "modelspec.architecture"),
    ("Date", "modelspec.date"),
    ("Base model", "ss_sd_model_name"),
    ("Model kind", "ss_base_model_version"),
    ("Network", "ss_network_module"),
    ("Rank", "ss_network_dim"),
    ("Alpha", "ss_network_alpha"),
    ("Network args", "ss_network_args"),
    ("Learning rate", "ss_learning_rate"),
    ("MMDiT's rate", "ss_unet_lr"),
    ("Encoders' rate", "ss_text_encoder_lr"),
    ("Optimizer", "ss_optimizer"),
    ("Schedule", "ss_lr_scheduler"),
    ("Steps", "ss_steps"),
    ("Epochs", "ss_epoch"),
    ("Images", "ss_num_train_images"),
    ("Resolution", "ss_resolution"),
    ("Seed", "ss_seed"),
    ("Precision", "ss_mixed_precision"),
    ("Comment", "ss_training_comment"),
    ("Hash", "sshs_model_hash"),
)
MOST_TAGS = 20


def main(arguments: list[str] | None = None) -> int:
    parser = tool_parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, metavar="FILE", help="the .safetensors file")
    parser.add_argument("--model", dest="named_model", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print all metadata as one JSON object")
    parser.add_argument("--all", action="store_true", help="print every key as it is, instead of the summary")
    for option, (key, meaning) in EDITS.items():
        parser.add_argument(f"--{option}", metavar="TEXT", help=f"set {key}: {meaning}; an empty text takes it out")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=TEXT", help="set any key but those with ss_ or sshs_"
    )
    parser.add_argument("--remove", nargs="+", default=[], metavar="KEY", help="take keys out")
    parser.add_argument("--save_to", type=Path, metavar="FILE", help="write the edited file here; default: in place")
    parser.add_argument("--force", action="store_true", help="replace the file of --save_to if it is there")
    chosen = parser.parse_args(arguments)
    path = chosen.model or chosen.named_model
    if path is None:
        parser.error("give a file")

    def work() -> int:
        header = read_header(path)
        metadata = edited(header.metadata, edits_from(chosen), chosen.remove)
        if metadata != header.metadata:
            if chosen.save_to:
                check_target(chosen.save_to, chosen.force, [path])
            rewrite_safetensors(path, chosen.save_to or path, metadata)
        elif chosen.save_to:
            raise UserError("--save_to: nothing was edited, so there is nothing to write.")
        if chosen.json:
            print(json.dumps(metadata, ensure_ascii=False, indent=2))
        elif chosen.all:
            print("\n".join(f"{key} = {value}" for key, value in sorted(metadata.items())))
        else:
            print(summary(path, header, metadata))
        return 0

    return run_tool(work)


def edits_from(chosen: argparse.Namespace) -> dict[str, str]:
    """Keys with their new texts; "" for those to take out."""
    edits = {key: getattr(chosen, option) for option, (key, _) in EDITS.items() if getattr(chosen, option) is not None}
    for word in chosen.set:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"--set {word}: write KEY=TEXT.")
        edits[key] = text
    return edits


def edited(metadata: Mapping[str, str], edits: Mapping[str, str], remove: list[str]) -> dict[str, str]:
    """UserError for keys that record the training (ss_) or hashes (sshs_), and for removing what is not there."""
    recorded = [key for key in [*edits, *remove] if key.startswith(("ss_", "sshs_"))]
    if recorded:
        raise UserError(
            f"{', '.join(recorded)}: keys with ss_ and sshs_ tell how the file was made and stay as they are."
        )
    absent = [key for key in remove if key not in metadata]
    if absent:
        raise UserError(f"--remove {' '.join(absent)}: the file has no such key.")
    changed = {**metadata, **edits}
    return {key: text for key, text in changed.items() if key not in remove and (text or key not in edits)}


def summary(path: Path, header: Header, metadata: Mapping[str, str]) -> str:
    """The facts that people look for."""
    dtypes = Counter(info.dtype for info in header.tensors.values())
    size = path.stat().st_size / 2**20
    lines = [
        (
            "File",
            f"{path}, {size:.1f} MiB, {len(header.tensors)} tensors, {dtypes.most_common(1)[0][0] if dtypes else 'none'}",
        )
    ]
    lines += [(title, metadata[key]) for title, key in FACTS if metadata.get(key, "None") not in ("None", "")]
    started, finished = (number(metadata.get(f"ss_training_{word}_at")) for word in ("started", "finished"))
    if finished:
        when = datetime.fromtimestamp(finished).strftime("%Y-%m-%d %H:%M")
        lines.append(("Trained", when + (f", {(finished - started) / 60:.0f} minutes" if started else "")))
    tags = tag_counts(metadata.get("ss_tag_frequency"))
    if tags:
        shown = ", ".join(f"{tag} ({count})" for tag, count in tags.most_common(MOST_TAGS))
        lines.append(("Captions", shown + (f" and {len(tags) - MOST_TAGS} more" if len(tags) > MOST_TAGS else "")))
    if not metadata:
        lines.append(("Metadata", "none"))
    width = max(len(title) for title, _ in lines) + 2
    return "\n".join(f"{title:<{width}}{text}" for title, text in lines)


def number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def tag_counts(text: str | None) -> Counter[str]:
    """How often each tag stands in the captions, over all folders."""
    counts: Counter[str] = Counter()
    try:
        folders: object = json.loads(text or "{}")
    except ValueError:
        return counts
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({str(tag): count for tag, count in tags.items() if isinstance(count, int)})
    return counts


if __name__ == "__main__":
    sys.exit(main())
