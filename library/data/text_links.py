"""Which text files that are symbolic links may be read.

A caption's words are published: in the metadata of the LoRA and in the report. An archive of images could carry
`x.txt -> a secret file`, so a linked text is read only where its target belongs to the dataset. Linked images and folders are free.
"""
# ruff: noqa: PTH100, PTH114, PTH118, PTH120, PTH122 - strings instead of Path objects, for speed and memory

from __future__ import annotations

import os

CAPTION_EXTENSIONS = (".txt", ".caption")
ADVICE = (
    "It is not read, since a caption is published with the LoRA. Copy the text here, link its image too, or pass"
    " --allow_external_links."
)


def caption_link_problem(folder: str, caption: str, image: str, extension: str) -> str:
    """Why the linked file `caption` of `image`, both names in `folder`, is not read; "" where it may be.

    Its target is in the folder, or beside the target of the image, with that one's stem and a caption's extension.
    """
    target = os.path.realpath(os.path.join(folder, caption))
    if _is_within(target, folder):
        return ""
    source = os.path.realpath(os.path.join(folder, image))
    stem, end = os.path.splitext(target)
    if stem == os.path.splitext(source)[0] and end.lower() in (*CAPTION_EXTENSIONS, extension.lower()):
        return ""
    return f"the caption file is a link to {target}, outside of the dataset. {ADVICE}"


def metadata_link_problem(metadata: str, image_dir: str | None) -> str:
    """Why a metadata file that is a link is not read; "" where it is none, or its target is in its folder or the images'."""
    if not os.path.islink(metadata):
        return ""
    target = os.path.realpath(metadata)
    folders = [os.path.dirname(os.path.abspath(metadata)), *([image_dir] if image_dir is not None else [])]
    if any(_is_within(target, folder) for folder in folders):
        return ""
    return f"the metadata file {metadata} is a link to {target}, outside of the dataset. {ADVICE}"


def _is_within(target: str, folder: str) -> bool:
    return target.startswith(os.path.join(os.path.realpath(folder), ""))
