"""Vocabularies of the supported tokenizer families, and the errors of a broken folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from httpx import Request, Response
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from storage.errors import FatalError, RetryableError
from tasks.recipe.config import BlockSettings, TeacherSettings
from tasks.tokens.vocabulary import check_vocabulary_fits, load_tokenizer, load_vocabulary, vocabulary_for

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "le", "chat", "##s"]


def save(folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def word_piece(words: list[str] = BERT) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([word for word in words if word.startswith("[")])
    return tokenizer


def byte_level(specials: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def test_the_size_of_camembert_is_32005_although_its_tokenizer_has_32006_tokens(shared_data: Path) -> None:
    vocabulary = load_vocabulary(str(shared_data / "tokenizer" / "camembert-base"))
    assert vocabulary.size == 32005
    assert (vocabulary.mask, vocabulary.pad, vocabulary.bos, vocabulary.eos, vocabulary.unk) == (32004, 1, 5, 6, 4)
    assert vocabulary.specials == (0, 1, 2, 3, 4, 5, 6, 32004)
    assert vocabulary.unknowns == (3, 4)
    assert load_tokenizer(vocabulary).encode("Le camembert", add_special_tokens=False).tokens[0] == "▁Le"


def test_bert_uses_cls_and_sep_as_bos_and_eos(tmp_path: Path) -> None:
    config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": {"content": "[MASK]"}}
    vocabulary = load_vocabulary(save(tmp_path, word_piece(), config))
    assert (vocabulary.size, vocabulary.pad, vocabulary.unk) == (8, 0, 1)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.mask) == (2, 3, 4)
    assert vocabulary.specials == (0, 1, 2, 3, 4)


def test_special_tokens_with_a_role_after_the_vocabulary_count(tmp_path: Path) -> None:
    # As in ModernBERT: 256 bytes, specials with a role, and a spare one without an embedding row.
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[spare]"]
    vocabulary = load_vocabulary(save(tmp_path, byte_level(specials), {}))
    assert (vocabulary.unk, vocabulary.bos, vocabulary.eos, vocabulary.pad, vocabulary.mask) == (
        256,
        257,
        258,
        259,
        260,
    )
    assert vocabulary.size == 261
    assert vocabulary.specials == (256, 257, 258, 259, 260)


def test_usual_spellings_are_used_without_a_configuration(tmp_path: Path) -> None:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    folder = save(tmp_path, byte_level(specials), None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<pad>", "sep_token": "</s>"}))
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk, vocabulary.mask) == (
        256,
        257,
        258,
        259,
        260,
    )


def test_ordinary_added_tokens_count(tmp_path: Path) -> None:
    tokenizer = word_piece()
    tokenizer.add_tokens([AddedToken("camembert")])
    assert load_vocabulary(save(tmp_path, tokenizer, {})).size == len(BERT) + 1


def test_the_fingerprint_follows_the_ids_and_nothing_else(tmp_path: Path) -> None:
    first = load_vocabulary(save(tmp_path / "a", word_piece(), {}))
    truncating = word_piece()
    truncating.enable_truncation(5)
    truncating.enable_padding()
    same = load_vocabulary(save(tmp_path / "b", truncating, {}))
    assert same == first
    assert len(load_tokenizer(same).encode("le chat le chat le chats").ids) == 7
    other_words = load_vocabulary(save(tmp_path / "c", word_piece([*BERT, "chien"]), {}))
    other_role = load_vocabulary(save(tmp_path / "d", word_piece(), {"mask_token": "[UNK]"}))
    assert len({first.fingerprint, other_words.fingerprint, other_role.fingerprint}) == 3


def test_a_model_needs_an_embedding_row_for_every_token(shared_data: Path) -> None:
    vocabulary = load_vocabulary(str(shared_data / "tokenizer" / "camembert-base"))
    check_vocabulary_fits(vocabulary, 32005, "camembert-base")
    check_vocabulary_fits(vocabulary, 32064, "padded to a multiple of 64")
    for rows in (32004, 50265, 8000):
        with pytest.raises(
            FatalError, match=f"32005 tokens, but the model other has {rows} embedding rows; set blocks"
        ):
            check_vocabulary_fits(vocabulary, rows, "other")


def test_an_invalid_tokenizer_fails_with_cause_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FatalError, match=r"empty has no tokenizer\.json; create it with .*save_pretrained"):
        load_vocabulary(str(tmp_path / "empty"))
    with pytest.raises(FatalError, match="neither a local folder nor a Hugging Face Hub id; use a folder"):
        load_vocabulary(str(tmp_path / "nowhere"))
    with pytest.raises(FatalError, match="neither a local folder nor a Hugging Face Hub id"):
        load_vocabulary("")
    with pytest.raises(FatalError, match="has no mask_token, which a masked language model needs"):
        load_vocabulary(save(tmp_path / "no_mask", word_piece([word for word in BERT if word != "[MASK]"]), {}))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "tokenizer.json").write_text('{"model": {"type": "Uni')
    with pytest.raises(FatalError, match=r"tokenizer\.json cannot be read"):
        load_vocabulary(str(tmp_path / "cut"))
    (tmp_path / "cut" / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(FatalError, match="is not a valid tokenizer file"):
        load_vocabulary(str(tmp_path / "cut"))


def test_hub_ids_are_downloaded_and_their_errors_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "cache", word_piece(), {})
    requested: list[tuple[str, str | None]] = []

    def download(name: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        requested.append((name, revision))
        assert not any(pattern.endswith(("safetensors", "bin", "*")) for pattern in allow_patterns)
        if name == "hub/unknown":
            raise RepositoryNotFoundError("404", response=Response(404, request=Request("GET", "https://hub")))
        if name == "hub/silent":
            raise LocalEntryNotFoundError("no connection")
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert load_vocabulary("hub/known", "v1") == load_vocabulary(folder)
    with pytest.raises(FatalError, match="tokenizer hub/unknown is neither a local folder nor an accessible"):
        load_vocabulary("hub/unknown")
    with pytest.raises(RetryableError, match=r"hub/silent is not a local folder, and .* did not respond"):
        load_vocabulary("hub/silent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FatalError, match="HF_HUB_OFFLINE"):
        load_vocabulary("hub/silent")
    shutil.rmtree(folder)
    Path(folder).mkdir()
    with pytest.raises(FatalError, match=r"has no tokenizer\.json"):
        load_vocabulary("hub/known", "v2")
    assert requested[0] == ("hub/known", "v1")


def test_tokens_import_neither_torch_nor_transformers(repo: Path) -> None:
    code = (
        "import sys, tasks.tokens.blocks, tasks.tokens.mask\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'prefect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("tokenizer", "expected"), [("", ("bert", "v2")), ("own", ("own",))])
def test_the_teachers_revision_is_not_used_for_another_tokenizer(
    tokenizer: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tokens.vocabulary.load_vocabulary", lambda *names: names)
    assert vocabulary_for(BlockSettings(tokenizer=tokenizer), TeacherSettings(model="bert", revision="v2")) == expected
