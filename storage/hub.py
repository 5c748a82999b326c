"""Downloads from the Hugging Face hub, with errors that name the remedy.

folder = download_repository("model", "almanach/camembert-base", "", ("*.json", "*.safetensors"))
"""

import re
from functools import lru_cache
from pathlib import Path

from storage.errors import FatalError, RetryableError

DATA_SET = "data set"
"""The `kind` of a data set; every other kind is a model on the hub."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """True if `name` has the form of a hub id: `owner/name` or `name`."""
    return _ID.fullmatch(name) is not None


@lru_cache(maxsize=8)
def download_repository(kind: str, name: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """The local folder of a hub repository, with the files that match the glob `patterns`; "" is the newest revision.

    `kind` is used in messages: model, tokenizer or DATA_SET.

    FatalError: no such id or revision, or offline and not cached. RetryableError: the hub does not answer.
    """
    # Deferred: local folders need no HTTP client.
    from httpx import HTTPError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        repo_type = "dataset" if kind == DATA_SET else "model"
        folder = snapshot_download(name, repo_type=repo_type, revision=revision or None, allow_patterns=list(patterns))
        return Path(folder)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        wanted = f"{name} at revision {revision}" if revision else name
        raise FatalError(
            f"{kind} {wanted}: there is no such folder here and no such {kind} on the hub (or it is private and needs "
            "a token); correct the name",
            name,
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, ConnectionError, TimeoutError) as error:
        if constants.HF_HUB_OFFLINE:
            raise FatalError(
                f"{kind} {name}: no such folder here, not in the hub's cache, and HF_HUB_OFFLINE forbids downloads; "
                "name a local folder or unset HF_HUB_OFFLINE",
                name,
            ) from error
        raise RetryableError(
            f"{kind} {name}: no such folder here and the hub did not answer; check the name or the network (a local "
            "folder always works)",
            name,
        ) from error
