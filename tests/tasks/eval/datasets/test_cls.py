"""The reviews of CLS: files of all categories, dropped reviews, errors, and unusual encodings."""

import fsspec
import pytest

from storage.errors import FatalError
from tasks.eval.datasets.cls import load_reviews, parse_reviews
from tasks.eval.datasets.dataset_files import SetLocation
from tests.harness.eval_sets import review, write_reviews

FIRST = "<?xml version='1.0'?>\n"


def parsed(*reviews, category="books", first=FIRST, join="\n\n", encoding="utf-8"):
    return list(parse_reviews((first + join.join(reviews)).encode(encoding), category, "x/train.review"))


def test_ratings_above_three_are_positive():
    rows = parsed(*(review(f"Livre {stars}.", f"{stars}.0") for stars in (1, 2, 4, 5)))
    assert [(row.first, row.second, row.label) for row in rows] == [
        ("Livre 1.", "", 0),
        ("Livre 2.", "", 0),
        ("Livre 4.", "", 1),
        ("Livre 5.", "", 1),
    ]


def test_dvd_text_ends_at_the_summary():
    assert parsed(review("Un film.", dvd=True), category="dvd")[0].first == "Un film. Titre"
    # The same where the text is closed before the title, as in the other categories.
    assert parsed(review("Un film."), category="dvd")[0].first == "Un film. Titre"
    assert parsed(review("Un disque."), category="music")[0].first == "Un disque."


@pytest.mark.parametrize(
    "broken",
    [
        review("Sans note.", rating=""),
        review(""),
        review("Sans adresse.", url=False),
        review("Neutre.", rating="3.0"),
        review("Jamais fermé.").replace("</text>", ""),
        review("   "),
        review("Note vide.", rating=" "),
    ],
)
def test_review_without_text_or_rating_is_dropped(broken):
    assert [row and row.first for row in parsed(review("Avant."), broken, review("Après."))] == [
        "Avant.",
        None,
        "Après.",
    ]


@pytest.mark.parametrize("rating", ["6.0", "0", "-1", "cinq", "nan"])
def test_invalid_rating_fails_with_its_file_and_review(rating):
    with pytest.raises(FatalError, match=r"x/train\.review, review 2: the rating '.*' is not between 1 and 5"):
        parsed(review(), review(rating=rating))


def test_text_has_no_markup_and_may_span_lines():
    text = "Un &eacute;t&eacute; &amp; un   hiver,\nl'&quot;automne&quot;"
    assert parsed(review(text))[0].first == 'Un été & un hiver, l\'"automne"'
    assert parsed(review().replace("</url><text>", "</url>\n<text>").replace("</text><title>", "</text>\n<title>"))[0]


def test_encodings():
    text = review("L'œuvre à l'été.")
    assert parsed(text, encoding="utf-8-sig")[0].first == "L'œuvre à l'été."
    assert [row.first for row in parsed(text, text, join="\r\n\r\n", first="<items>\r\n")] == ["L'œuvre à l'été."] * 2
    declared = '<?xml version="1.0" encoding="ISO-8859-15"?>\n'
    assert parsed(text, first=declared, encoding="iso-8859-15")[0].first == "L'œuvre à l'été."
    with pytest.raises(FatalError, match=r"x/train\.review is not valid utf-8 at byte offset \d+"):
        parsed(text, encoding="iso-8859-15")
    with pytest.raises(FatalError, match="an unknown encoding, klingon"):
        parsed(text, first='<?xml version="1.0" encoding="klingon"?>\n')


@pytest.mark.parametrize("data", [b"", b"<items>\n", b"<html>\n\n<p>404</p>\n"])
def test_file_without_reviews_fails(data):
    with pytest.raises(FatalError, match=r"x/train\.review: contains no review"):
        list(parse_reviews(data, "books", "x/train.review"))


def test_single_and_merged_categories(tmp_path):
    write_reviews(tmp_path, train=20, test=6)
    apart = {name: load_reviews(f"cls-{name}", SetLocation(str(tmp_path))) for name in ("books", "dvd", "music")}
    merged = load_reviews("cls", SetLocation(str(tmp_path)))
    for name, data in apart.items():
        assert data.labels == ("negative", "positive")
        assert {split: counts["kept"] for split, counts in data.counts.items()} == {
            "train": 16,
            "validation": 4,
            "test": 6,
        }
        assert all(f" {name} " in row.first for row in (*data.train, *data.validation, *data.test))
    assert len(merged.test) == 18
    assert len(merged.validation) == round(0.2 * 60)
    assert set(merged.test) == {row for data in apart.values() for row in data.test}
    assert merged.counts["train"]["rows"] == 60


def test_validation_split_ignores_order_and_keeps_equal_texts_together(tmp_path):
    write_reviews(tmp_path, train=20)
    file = tmp_path / "books" / "train.review"
    head, _, rest = file.read_text().partition("\n")
    reviews = rest.strip().split("\n\n")
    file.write_text(f"{head}\n" + "\n\n".join([*reversed(reviews), *reviews]))
    data = load_reviews("cls-books", SetLocation(str(tmp_path)))
    assert not {row.first for row in data.train} & {row.first for row in data.validation}
    assert len(data.train) + len(data.validation) == 40


def test_texts_in_both_train_and_test_are_counted(tmp_path):
    write_reviews(tmp_path)
    test = tmp_path / "music" / "test.review"
    test.write_text((tmp_path / "music" / "train.review").read_text())
    data = load_reviews("cls-music", SetLocation(str(tmp_path)))
    assert data.counts["test"]["also_in_train"] == len(data.train)


def test_any_url_loads_and_missing_files_fail(tmp_path):
    write_reviews(tmp_path)
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/cls-set/", recursive=True)
    data = load_reviews("cls", SetLocation("memory://cls-set"))
    assert data.fingerprint == load_reviews("cls", SetLocation(str(tmp_path))).fingerprint
    (tmp_path / "dvd" / "test.review").unlink()
    with pytest.raises(FatalError, match=r"dvd/test\.review: no such file; unpack cls-acl10"):
        load_reviews("cls", SetLocation(str(tmp_path)))
    with pytest.raises(FatalError, match="no such folder"):
        load_reviews("cls", SetLocation(str(tmp_path / "absent")))
