"""Removes paths and URLs from texts that are published, since they may hold host names, user names or credentials.

    public_name("s3://bucket/models/teacher?token=abc")         # teacher
    without_paths("/data/sets/ner: no such folder")             # ner: no such folder

Ids of the Hugging Face Hub stay as they are.
"""

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

LOCATION = re.compile(r"""[a-z][a-z0-9+.-]*://[^\s'"]+|(?:/[^\s/;:,'"]+){2,}/?""")


def public_name(location: str) -> str:
    """A hub id unchanged; for a path or URL only its last part, so that the card holds no host, path or credential."""
    if HUB_ID.fullmatch(location):
        return location
    return location.split("?")[0].rstrip("/").rsplit("/", 1)[-1]


def without_paths(text: str) -> str:
    """The text with each path and URL in it reduced to its last part."""
    return LOCATION.sub(lambda match: public_name(match.group()), text)
