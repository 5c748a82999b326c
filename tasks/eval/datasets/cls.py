"""Loads the French product reviews of CLS (cls-acl10-unprocessed), labelled positive or negative.

    books = load_reviews("cls-books", SetLocation("/data/cls-acl10-unprocessed/fr"))
    merged = load_reviews("cls", SetLocation("s3://bucket/cls/fr"))        # books, dvd and music together

CLS is the Cross-Lingual Sentiment data set (Prettenhofer and Stein, 2010); text and labels follow FLUE (Le et al.,
2020). Each file {books,dvd,music}/{train,test}.review contains a first line, then reviews separated by blank lines. The
text of a review is between `</url><text>` and `</text><title>`; for dvd it ends at `</title><summary>` and includes the
title. Tags in the text are replaced by spaces and HTML entities by characters. A rating above 3 is positive. Reviews
without text or rating, or with rating 3, are dropped and counted. One fifth of the train split, selected by the hash of
the text, is held out for validation.
"""

import html
import re
from collections.abc import Iterator

from storage.errors import FatalError
from storage.files.filesystem import open_url
from tasks.eval.datasets.dataset_files import SetLocation, translate_read_errors, url_of
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


def load_reviews(name: str, location: SetLocation) -> LabelledSet:
    """Reads and checks `cls` (all categories), `cls-books`, `cls-dvd` or `cls-music`.

    FatalError if a file is missing, cannot be decoded or contains no review, or if a rating is not between 1 and 5.
    RetryableError if the network does not respond.
    """
    categories = CATEGORIES if name == "cls" else (name.removeprefix("cls-"),)
    url = url_of(location, "*.review")
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    counts = {split: {"rows": 0, "dropped": 0, "kept": 0} for split in ("train", "test")}
    for category in categories:
        for split in ("train", "test"):
            file = f"{url.rstrip('/')}/{category}/{split}.review"
            reviews = list(parse_reviews(_read(file, location.source), category, file))
            splits[split] += [row for row in reviews if row is not None]
            counts[split]["rows"] += len(reviews)
            counts[split]["dropped"] += sum(row is None for row in reviews)
    splits["train"], splits["validation"] = hold_out(splits["train"], lambda row: row.first, VALIDATION_SHARE)
    counts["validation"] = {"rows": 0, "dropped": 0}
    for split, rows in splits.items():
        counts[split]["kept"] = len(rows)
    rule = "a fifth of train held out for validation, by the lowest sha256 of the text; rating above 3 is positive"
    return labelled_set(name, location.source, LABELS, splits, counts, rule)


def parse_reviews(data: bytes, category: str, file: str) -> Iterator[Example | None]:
    """Yields one example per review of a file, or None for a review without text or rating, or with rating 3.

    FatalError if the file cannot be decoded or contains no review, or if a rating is not between 1 and 5.
    """
    text = _decode(data, file).replace("\r\n", "\n")
    pattern = _DVD_TEXT if category == "dvd" else _TEXT
    reviews = [part for part in _BLANK.split(text.partition("\n")[2]) if part.strip() and "<" in part]
    if not any("<text>" in review for review in reviews):
        raise FatalError(f"{file}: contains no review with a <text> field; use an unprocessed .review file", file)
    for number, review in enumerate(reviews, start=1):
        body, rating = pattern.search(review), _RATING.search(review)
        content = " ".join(html.unescape(_TAG.sub(" ", body[1])).split()) if body else ""
        stars = _stars(rating[1], file, number) if rating and rating[1].strip() else NEUTRAL
        yield Example(content, "", int(stars > NEUTRAL)) if content and stars != NEUTRAL else None


def _stars(raw: str, file: str, number: int) -> float:
    try:
        stars = float(raw)
    except ValueError:
        stars = 0.0
    if not 1 <= stars <= 5:
        raise FatalError(
            f"{file}, review {number}: the rating {raw.strip()!r} is not between 1 and 5; correct the field", file
        )
    return stars


def _read(file: str, source: str) -> bytes:
    with translate_read_errors(source):
        fs, path = open_url(file)
        if not fs.exists(path):
            raise FatalError(
                f"{file}: no such file; unpack cls-acl10-unprocessed.tar.gz so that this file exists, or correct "
                "score.sets",
                file,
            )
        data: bytes = fs.cat_file(path)
        return data


def _decode(data: bytes, file: str) -> str:
    """Decodes a file as the encoding that its first line declares, by default UTF-8 (a byte-order mark is removed)."""
    declared = _ENCODING.search(data[:200])
    encoding = declared[1].decode("ascii") if declared else "utf-8"
    try:
        return data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise FatalError(
            f"{file}: the first line declares an unknown encoding, {encoding}; correct it", file
        ) from error
    except UnicodeDecodeError as error:
        raise FatalError(
            f"{file} is not valid {encoding} at byte offset {error.start}; convert the file to UTF-8, or declare its "
            'encoding in the first line, as in <?xml version="1.0" encoding="ISO-8859-1"?>',
            file,
        ) from error
