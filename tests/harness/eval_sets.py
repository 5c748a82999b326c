"""Small evaluation sets in the official schemas; a label follows from one word, so that a tiny model learns it."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.harness.tiny import ENDINGS, OBJECTS, SUBJECTS

TYPES = {"juge": 2, "médecin": 2, "préfecture": 1, "convention": 3, "employeur": 4}
PLAIN = ("le", "signe", "refuse", "vérifie", "attestation", "un", "avant")
VERBS = ("signe", "refuse", "demande")
"""The verb of the second sentence is the label: entailment, neutral, contradiction."""


def write_pairs(folder: Path, name: str = "xnli", train: int = 120, test: int = 30, seed: int = 0) -> Path:
    """XNLI or PAWS-X: three splits of random sentences."""
    draw = random.Random(seed)
    first, second, labels = ("premise", "hypothesis", 3) if name == "xnli" else ("sentence1", "sentence2", 2)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", test), ("test", test)):
        label = [draw.randrange(labels) for _ in range(rows)]
        table = {
            first: [f"{draw.choice(SUBJECTS)} vérifie {draw.choice(OBJECTS)} {draw.choice(ENDINGS)}." for _ in label],
            second: [f"{draw.choice(SUBJECTS)} {VERBS[one]} {draw.choice(OBJECTS)}." for one in label],
            "label": label,
        }
        pq.write_table(pa.table(table), folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_ner(
    folder: Path, train: int = 200, test: int = 30, seed: int = 0, extra_test: tuple[list[str], ...] = ()
) -> Path:
    """wikiner: train and test, the tag of a word given by the word alone."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        tokens = [draw.choices((*TYPES, *PLAIN), k=draw.randint(2, 6)) for _ in range(rows)]
        tokens += [list(words) for words in extra_test] if split == "test" else []
        tags = [[TYPES.get(word, 0) for word in words] for words in tokens]
        table = pa.table({"id": list(range(len(tokens))), "tokens": tokens, "ner_tags": tags})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def review(text: str = "Un bon livre.", rating: str = "5.0", dvd: bool = False, url: bool = True) -> str:
    """One review as an unprocessed .review file has it."""
    link = "<url>http://exemple</url>" if url else ""
    stars = f"<rating>{rating}</rating>" if rating else ""
    body = f"<text>{text}</text><title>Titre</title><summary>Court</summary>" if text else ""
    if dvd and text:
        body = f"<text>{text}<title>Titre</title><summary>Court</summary>"
    return f"<item><category>livres</category>{stars}{link}{body}</item>"


def write_reviews(folder: Path, train: int = 20, test: int = 6) -> Path:
    """CLS: books, dvd and music, half of them positive."""
    for category in ("books", "dvd", "music"):
        (folder / category).mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("test", test)):
            reviews = [
                review(
                    f"Le juge {VERBS[number % 2]} {category} {split} {number}.",
                    str(1 + 4 * (number % 2)),
                    category == "dvd",
                )
                for number in range(rows)
            ]
            text = "<?xml version='1.0'?>\n" + "\n\n".join(reviews) + "\n"
            (folder / category / f"{split}.review").write_text(text, encoding="utf-8")
    return folder
