"""Options of what the LoRA file tells about itself."""

from __future__ import annotations

from library.options.option import Group, Option, path, switch

GROUP = Group(
    "Metadata",
    (
        switch("--no_metadata", "Leave the training's details out of the file; a few keys that programs need stay."),
        Option("--training_comment", "A comment that is kept in the file (ss_training_comment)."),
        Option("--metadata_title", "The title (modelspec.title). Unset, it is --output_name."),
        Option("--metadata_author", "The author (modelspec.author)."),
        Option("--metadata_description", "The description (modelspec.description)."),
        Option("--metadata_license", "The license (modelspec.license)."),
        Option("--metadata_tags", "Tags, separated by commas (modelspec.tags)."),
        Option("--metadata_usage_hint", "How to use it (modelspec.usage_hint)."),
        Option(
            "--metadata_thumbnail", "An image file, or a data: URL, to be shown for it (modelspec.thumbnail).", path
        ),
        Option("--metadata_merged_from", "What it was merged from (modelspec.merged_from)."),
        Option("--metadata_trigger_phrase", "The words that call it up (modelspec.trigger_phrase)."),
        Option("--metadata_preprocessor", "What the input must be prepared with (modelspec.preprocessor)."),
        Option(
            "--metadata_is_negative_embedding", "Whether it is a negative embedding (modelspec.is_negative_embedding)."
        ),
    ),
)
