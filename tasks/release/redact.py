"""Removes paths and URLs from published texts, since they may contain host names, user names or credentials.

    public_name("s3://bucket/models/teacher?token=abc")         # teacher
    without_paths("/data/sets/ner: no such folder")             # ner: no such folder

Hugging Face Hub ids are not changed.
"""

import re

from storage.hub import is_hub_id

LOCATION = re.compile(r"""[a-z][a-z0-9+.-]*://[^\s'"]+|(?:/[^\s/;:,'"]+){2,}/?""")


def public_name(location: str) -> str:
    """Returns a hub id unchanged, and only the last component of a path or URL: no host, folder or credential."""
    if is_hub_id(location):
        return location
    return location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def without_paths(text: str) -> str:
    """Returns the text with each path and URL in it reduced to its last component."""
    return LOCATION.sub(lambda match: public_name(match.group()), text)
