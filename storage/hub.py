"""Downloads from the Hugging Face hub, with errors that say what to do.

For tasks.vocabulary, tasks.model_files and tasks.set_files.
"""

import re
from functools import lru_cache
from pathlib import Path

from storage.errors import FatalError, RetryableError

DATA_SET = "data set"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """True if `name` could be a model or data set on the hub: `owner/name` or `name`."""
    return _ID.fullmatch(name) is not None


@lru_cache(maxsize=8)
def download_repository(kind: str, name: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """The local folder of a hub id with the files that fit `patterns`.

    `kind` opens the sentences: model, tokenizer, or data set, which is looked for among the hub's data sets.

    FatalError: no such id or revision, or offline and not cached. RetryableError: the hub does not answer.
    """
    # Deferred: who names a folder needs no HTTP stack.
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
        sort = "dataset" if kind == DATA_SET else "model"
        files = list(patterns)
        return Path(snapshot_download(name, repo_type=sort, revision=revision or None, allow_patterns=files))
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
                f"{kind} {name}: no such folder here, not in the hub's local cache, and HF_HUB_OFFLINE forbids to ask; "
                "name a local folder or unset HF_HUB_OFFLINE",
                name,
            ) from error
        raise RetryableError(
            f"{kind} {name}: no such folder here and the hub did not answer; check the name or the network (a local "
            "folder always works)",
            name,
        ) from error
