"""Downloads repositories from the Hugging Face Hub. Each error message states a remedy.

folder = download_repository("model", "almanach/camembert-base", "", ("*.json", "*.safetensors"))
"""

import re
from functools import lru_cache
from pathlib import Path

from storage.errors import FatalError, RetryableError

DATA_SET = "data set"
"""The `kind` of a data set; any other kind refers to a model repository."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    """Returns True if `name` has the form of a Hub id: `owner/name` or `name`."""
    return _ID.fullmatch(name) is not None


@lru_cache(maxsize=8)
def download_repository(kind: str, name: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """Downloads the files of a Hub repository that match the glob `patterns`. Returns their local folder.

    `revision` may be "", the newest. `kind` is model, tokenizer or DATA_SET, and appears in error messages.

    Raises FatalError if the id or the revision does not exist, or if the Hub is offline and the repository not cached.
    Raises RetryableError if the Hub does not respond.
    """
    # Imported here because local folders need no HTTP client.
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
            f"{kind} {wanted} is neither a local folder nor an accessible repository on the Hugging Face Hub; correct "
            "the name, or set HF_TOKEN if the repository is private",
            name,
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, HTTPError, ConnectionError, TimeoutError) as error:
        if constants.HF_HUB_OFFLINE:
            raise FatalError(
                f"{kind} {name} is neither a local folder nor in the Hub cache, and HF_HUB_OFFLINE forbids downloads; "
                "use a local folder or unset HF_HUB_OFFLINE",
                name,
            ) from error
        raise RetryableError(
            f"{kind} {name} is not a local folder, and the Hugging Face Hub did not respond; check the name and the "
            "network, or use a local folder",
            name,
        ) from error
