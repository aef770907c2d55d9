"""Options of uploads to the Hugging Face Hub."""

from __future__ import annotations

from library.options.option import Group, Option, switch

GROUP = Group(
    "Hugging Face Hub",
    (
        Option("--huggingface_repo_id", "Upload every saved file to this repository, as in name/repository."),
        Option("--huggingface_repo_type", "The kind of repository: model, dataset or space. Unset, it is model."),
        Option("--huggingface_path_in_repo", "The folder in the repository. Unset, it is the top."),
        Option("--huggingface_token", "The token to log in with. It is never written anywhere.", secret=True),
        Option(
            "--huggingface_repo_visibility",
            "public makes a public repository; anything else, and unset, a private one.",
        ),
        switch("--save_state_to_huggingface", "Upload the states, too."),
        switch("--resume_from_huggingface", "Read --resume as repository/path:revision:type on the Hub."),
        switch("--async_upload", "Upload while training goes on; the last file is waited for."),
    ),
)
