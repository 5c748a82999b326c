"""Writes small evaluation sets in the official schemas; one word determines the label, so that tiny models learn it.

    write_pairs(folder / "xnli" / "fr")
    write_ner(folder / "wikiner")
    write_reviews(folder / "cls")

Each function returns the folder that it was passed.
"""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.harness.tiny import ENDINGS, OBJECTS, SUBJECTS

TAG_OF_WORD = {"juge": 2, "médecin": 2, "préfecture": 1, "convention": 3, "employeur": 4}
OTHER_WORDS = ("le", "signe", "refuse", "vérifie", "attestation", "un", "avant")
VERBS = ("signe", "refuse", "demande")
"""The verb of the second sentence determines the label: entailment, neutral, contradiction."""


def write_pairs(folder: Path, name: str = "xnli", train: int = 120, test: int = 30, seed: int = 0) -> Path:
    """Writes XNLI or PAWS-X with three splits of random sentences."""
    rng = random.Random(seed)
    first, second, labels = ("premise", "hypothesis", 3) if name == "xnli" else ("sentence1", "sentence2", 2)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", test), ("test", test)):
        label = [rng.randrange(labels) for _ in range(rows)]
        table = {
            first: [f"{rng.choice(SUBJECTS)} vérifie {rng.choice(OBJECTS)} {rng.choice(ENDINGS)}." for _ in label],
            second: [f"{rng.choice(SUBJECTS)} {VERBS[one]} {rng.choice(OBJECTS)}." for one in label],
            "label": label,
        }
        pq.write_table(pa.table(table), folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_ner(
    folder: Path, train: int = 200, test: int = 30, seed: int = 0, extra_test: tuple[list[str], ...] = ()
) -> Path:
    """Writes a train and a test split in the schema of wikiner_fr; each word determines its own tag."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        tokens = [rng.choices((*TAG_OF_WORD, *OTHER_WORDS), k=rng.randint(2, 6)) for _ in range(rows)]
        tokens += [list(words) for words in extra_test] if split == "test" else []
        tags = [[TAG_OF_WORD.get(word, 0) for word in words] for words in tokens]
        table = pa.table({"id": list(range(len(tokens))), "tokens": tokens, "ner_tags": tags})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def review(text: str = "Un bon livre.", rating: str = "5.0", dvd: bool = False, url: bool = True) -> str:
    """Returns one review in the format of an unprocessed .review file."""
    link = "<url>http://exemple</url>" if url else ""
    stars = f"<rating>{rating}</rating>" if rating else ""
    body = f"<text>{text}</text><title>Titre</title><summary>Court</summary>" if text else ""
    if dvd and text:
        body = f"<text>{text}<title>Titre</title><summary>Court</summary>"
    return f"<item><category>livres</category>{stars}{link}{body}</item>"


def write_reviews(folder: Path, train: int = 20, test: int = 6) -> Path:
    """Writes the books, dvd and music reviews of CLS, half of them positive."""
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
