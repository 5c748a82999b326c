"""Protocol files: the bundled protocols, tuning per set, and errors with the file and field."""

import pytest
from pydantic import BaseModel

from storage.errors import FatalError
from tasks.eval.protocol import Protocol, SetPlan, Tuning, load_protocol
from tests.conftest import REPO

TEXT = """
name = "tiny"
[tuning]
epochs = 5
lr = [1e-3]
[sets.xnli]
hub = "facebook/xnli"
tuning = { epochs = 2 }
[sets.ner]
"""


def written(folder, text):
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((REPO / "deployments" / "score").glob("*.toml")), ids=lambda path: path.stem)
def test_bundled_protocols(path):
    protocol = load_protocol(path)
    assert protocol.name == path.stem
    assert len(protocol.seeds) >= 3
    assert all(len(protocol.tuning_of(name).lr) > 1 for name in protocol.sets)


def test_flue_protocol_has_every_set():
    protocol = load_protocol(REPO / "deployments" / "score" / "flue.toml")
    assert set(protocol.sets) == {"cls", "cls-books", "cls-dvd", "cls-music", "paws-x", "xnli", "ner"}


def test_set_overrides_the_common_tuning(tmp_path):
    protocol = load_protocol(written(tmp_path, TEXT))
    assert (protocol.tuning_of("xnli").epochs, protocol.tuning_of("ner").epochs) == (2, 5)
    assert protocol.tuning_of("xnli").lr == protocol.tuning_of("ner").lr == (1e-3,)


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ("epochs = 5", "epochs = 0", "tuning.epochs"),
        ("epochs = 5", "epoch = 5", "tuning.epoch"),
        ("{ epochs = 2 }", "{ epochs = 0 }", "epochs"),
        ("{ epochs = 2 }", "{ lerning = 2 }", "lerning"),
        ("[sets.ner]", "[sets.squad]", "sets.squad"),
        ('name = "tiny"', 'name = "tiny"\nseeds = [0, 1]', "seeds"),
        ('name = "tiny"', 'name = "tiny"\nseeds = [0, 1, 1]', "seeds: contains a duplicate"),
        ("lr = [1e-3]", "lr = []", "tuning.lr"),
        ("lr = [1e-3]", "lr = [2.0]", "tuning.lr"),
    ],
)
def test_invalid_field_fails_with_its_name_and_file(tmp_path, before, after, field):
    path = written(tmp_path, TEXT.replace(before, after))
    with pytest.raises(FatalError) as caught:
        load_protocol(path)
    assert str(path) in str(caught.value)
    assert field in str(caught.value)


def test_missing_file_fails(tmp_path):
    with pytest.raises(FatalError, match="this protocol file does not exist"):
        load_protocol(tmp_path / "absent.toml")


@pytest.mark.parametrize("section", [Protocol, SetPlan, Tuning])
def test_every_field_has_a_description(section: type[BaseModel]):
    assert all(field.description for field in section.model_fields.values())
