"""Fetches models from the Hugging Face hub by `owner/name` or `owner/name@revision`."""

import re
from collections.abc import Sequence
from pathlib import Path

from dinov2cli.errors import InputError

_NAME = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


def parse_hub(spec: str) -> tuple[str, str | None] | None:
    """(owner/name, revision or None) of a hub name; None for anything else."""
    match = _NAME.fullmatch(spec)
    return None if match is None else (match[1], match[2])


def fetch_model(spec: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder that holds the files of these patterns, downloaded unless they are here already.

    `spec` is what the user typed. Raises InputError where the hub, or the model on it, cannot be reached.
    """
    from huggingface_hub import snapshot_download  # slow to import, needed only here

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {spec!r} is no directory here and could not be fetched from the Hugging Face hub ({reason}): "
            "check the name and the network, or give a local directory"
        ) from None
