"""Loads the French reviews of CLS (cls-acl10-unprocessed), which FLUE judges by: positive or negative.

    books = load_reviews("cls-books", Place("/data/cls-acl10-unprocessed/fr"))
    merged = load_reviews("cls", Place("s3://bucket/cls/fr"))        # books, dvd and music in one

Files are {books,dvd,music}/{train,test}.review: a first line, then reviews with a blank line between. What is taken is
FLUE's choice: the text between `</url><text>` and `</text><title>`, for dvd up to `</title><summary>`, so with the
title (tags in it become spaces, entities characters); positive where the rating is above 3. A review without text or
rating, or with 3, is dropped and counted. A fifth of train is held out for validation, by the hash of the text.
Called by tasks.sets.
"""

import html
import re
from collections.abc import Iterator

from storage.errors import FatalError
from storage.filesystem import open_url
from tasks.eval.datasets.files import Place, reading, url_of
from tasks.eval.datasets.labelled import Example, LabelledSet, hold_out, labelled_set

CATEGORIES = ("books", "dvd", "music")

LABELS = ("negative", "positive")

VALIDATION_SHARE = 0.2

NEUTRAL = 3.0

_BLANK = re.compile(r"\n[ \t]*\n")

_RATING = re.compile(r"<rating>(.*?)</rating>", re.DOTALL)

_TEXT = re.compile(r"</url>\s*<text>(.*?)</text>\s*<title>", re.DOTALL)

_DVD_TEXT = re.compile(r"</url>\s*<text>(.*?)</title>\s*<summary>", re.DOTALL)

_TAG = re.compile(r"</?\w+>")

_ENCODING = re.compile(rb"""<\?xml[^>]*encoding=["']([\w.-]+)["']""")


def load_reviews(name: str, place: Place) -> LabelledSet:
    """Reads and checks `cls` (all categories), `cls-books`, `cls-dvd` or `cls-music`.

    FatalError: a file that is not there, cannot be decoded or holds no review, a rating that is no number of stars.
    RetryableError where the network does not answer.
    """
    categories = CATEGORIES if name == "cls" else (name.removeprefix("cls-"),)
    url = url_of(place, "*.review")
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    counts = {split: {"rows": 0, "dropped": 0, "kept": 0} for split in ("train", "test")}
    for category in categories:
        for split in ("train", "test"):
            file = f"{url.rstrip('/')}/{category}/{split}.review"
            found = list(parse_reviews(_read(file, place.source), category, file))
            splits[split] += [row for row in found if row is not None]
            counts[split]["rows"] += len(found)
            counts[split]["dropped"] += sum(row is None for row in found)
    splits["train"], splits["validation"] = hold_out(splits["train"], lambda row: row.first, VALIDATION_SHARE)
    counts["validation"] = {"rows": 0, "dropped": 0}
    for split, rows in splits.items():
        counts[split]["kept"] = len(rows)
    rule = "a fifth of train held out for validation, by the lowest sha256 of the text; rating above 3 is positive"
    return labelled_set(name, place.source, LABELS, splits, counts, rule)


def parse_reviews(data: bytes, category: str, file: str) -> Iterator[Example | None]:
    """The reviews of one file; None for one that lacks text or rating, or has the rating 3.

    FatalError: bytes that are not text, no review at all, a rating outside of 1 to 5.
    """
    text = _decode(data, file).replace("\r\n", "\n")
    pattern = _DVD_TEXT if category == "dvd" else _TEXT
    reviews = [part for part in _BLANK.split(text.partition("\n")[2]) if part.strip() and "<" in part]
    if not any("<text>" in review for review in reviews):
        raise FatalError(f"{file}: there is no review in it (field text); give an unprocessed .review file", file)
    for number, review in enumerate(reviews, start=1):
        found, rated = pattern.search(review), _RATING.search(review)
        words = " ".join(html.unescape(_TAG.sub(" ", found[1])).split()) if found else ""
        stars = _stars(rated[1], file, number) if rated and rated[1].strip() else NEUTRAL
        yield Example(words, "", int(stars > NEUTRAL)) if words and stars != NEUTRAL else None


def _stars(raw: str, file: str, number: int) -> float:
    try:
        stars = float(raw)
    except ValueError:
        stars = 0.0
    if not 1 <= stars <= 5:
        raise FatalError(f"{file}, review {number}: rating is {raw.strip()!r}, not 1 to 5; mend the field", file)
    return stars


def _read(file: str, source: str) -> bytes:
    with reading(source):
        fs, path = open_url(file)
        if not fs.exists(path):
            raise FatalError(
                f"{file}: no such file; unpack cls-acl10-unprocessed.tar.gz and name the folder that holds books, dvd "
                "and music",
                file,
            )
        data: bytes = fs.cat_file(path)
        return data


def _decode(data: bytes, file: str) -> str:
    """UTF-8, with a byte-order mark or without, or what the first line declares."""
    declared = _ENCODING.search(data[:200])
    encoding = declared[1].decode("ascii") if declared else "utf-8"
    try:
        return data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise FatalError(f"{file}: unknown encoding {encoding} in its first line; correct the line", file) from error
    except UnicodeDecodeError as error:
        raise FatalError(
            f"{file}: byte {error.start} is not {encoding}; convert the file to UTF-8 or declare its encoding", file
        ) from error
