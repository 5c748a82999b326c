"""Reads the fenced code blocks of Markdown files, such as the commands of the README.

commands, *others = code_blocks(text, "sh")
"""

import re

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(text: str, language: str) -> list[str]:
    """Returns the contents of the code blocks in one language, in their order."""
    return [block for found, block in FENCED.findall(text) if found == language]
