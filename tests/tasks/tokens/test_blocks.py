"""Blocks contain every token of every document in order, in bytes that depend on the key alone; token counts."""

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from storage.arrow import BLOCKS_FILE, TEXT_FILE, TEXT_SCHEMA, ArrowWriter, open_arrow
from storage.artifact import Ref
from storage.errors import FatalError
from storage.fingerprint import key_of
from storage.store import Store
from tasks.recipe.config import BlockSettings as Settings
from tasks.tokens import tokenize_shard as tokens
from tasks.tokens.blocks import Blocks, blocks_ref, make_blocks, open_blocks
from tasks.tokens.token_counts import count_tokens, counts_ref, read_counts
from tasks.tokens.vocabulary import Vocabulary, load_tokenizer, load_vocabulary

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BOS, PAD, EOS, UNK, MASK = range(5)


def words_vocabulary(folder: Path, size: int) -> Vocabulary:
    """A tokenizer that maps the word `w17` to id 17."""
    words = {word: index for index, word in enumerate(SPECIALS)} | {f"w{index}": index for index in range(5, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIALS, "<spare>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_vocabulary(str(folder))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return words_vocabulary(tmp_path_factory.mktemp("words") / "tokenizer", 100)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write_shard(store: Store, texts: list[str], label: str = "part-0000", batch: int = 3) -> Ref:
    ref = Ref("shard", key_of("shard", 1, {"texts": texts}, []), label)
    with store.scratch() as folder:
        with ArrowWriter(folder / TEXT_FILE, TEXT_SCHEMA) as writer:
            for start in range(0, len(texts), batch):
                part = texts[start : start + batch]
                writer.write({"text": part, "line": list(range(start, start + len(part)))})
        store.commit(ref, folder, schema=1, rows=len(texts), tokens=0, settings={}, parents=[])
    return ref


def to_text(ids: list[int]) -> str:
    return " ".join(f"w{index}" for index in ids)


def blocks_of(store: Store, texts: list[str], settings: Settings, vocabulary: Vocabulary) -> Blocks:
    receipt = make_blocks(store, write_shard(store, texts), settings, vocabulary, force=True)
    blocks = open_blocks(store, receipt.ref)
    assert receipt.rows == len(blocks)
    assert receipt.tokens == blocks.lengths.sum()
    return blocks


def expected(documents: list[list[int]], settings: Settings, vocabulary: Vocabulary) -> list[list[int]]:
    """The same blocks in plain Python."""
    body = settings.length - 2
    documents = [document for document in documents if document]
    if settings.packing == "packed":
        documents = [[token for document in documents for token in [vocabulary.eos, *document]][1:]]
    bodies = [document[start : start + body] for document in documents for start in range(0, len(document), body)]
    return [[vocabulary.bos, *ids, vocabulary.eos] for ids in bodies]


def rows_of(blocks: Blocks, pad: int) -> list[list[int]]:
    """The attended ids of every row; all others must be padding."""
    assert all((ids[length:] == pad).all() for ids, length in zip(blocks.input_ids, blocks.lengths, strict=True))
    return [ids[:length].tolist() for ids, length in zip(blocks.input_ids, blocks.lengths, strict=True)]


# ---- packing -----------------------------------------------------------------------------------------------


def test_packed_joins_documents_and_pads_only_the_tail(store: Store, vocabulary: Vocabulary) -> None:
    blocks = blocks_of(store, ["w10 w11 w12", "w20 w21 w22 w23 w24", "w30"], Settings(length=8), vocabulary)
    assert blocks.input_ids.tolist() == [
        [BOS, 10, 11, 12, EOS, 20, 21, EOS],
        [BOS, 22, 23, 24, EOS, 30, EOS, PAD],
    ]
    assert blocks.lengths.tolist() == [8, 7]
    assert blocks.input_ids.dtype == np.uint16


def test_each_document_starts_a_block_and_long_ones_take_several(store: Store, vocabulary: Vocabulary) -> None:
    settings = Settings(length=8, packing="documents")
    blocks = blocks_of(store, ["w10 w11 w12", to_text(list(range(20, 33))), "w40"], settings, vocabulary)
    assert blocks.input_ids.tolist() == [
        [BOS, 10, 11, 12, EOS, PAD, PAD, PAD],
        [BOS, 20, 21, 22, 23, 24, 25, EOS],
        [BOS, 26, 27, 28, 29, 30, 31, EOS],
        [BOS, 32, EOS, PAD, PAD, PAD, PAD, PAD],
        [BOS, 40, EOS, PAD, PAD, PAD, PAD, PAD],
    ]


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_documents_of_all_sizes_are_packed_without_loss(
    store: Store, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """Compared with plain Python; small pieces split documents into parts, and some documents are empty."""
    for seed in range(25):
        draw = random.Random(seed)
        monkeypatch.setattr(tokens, "PIECE_BYTES", draw.choice([1, 5, 40, 1000]))
        settings = Settings(length=draw.choice([8, 9, 16]), packing=packing)
        sizes = [draw.choice([0, 0, 1, 2, 5, 6, 7, 14, 30]) for _ in range(draw.randint(0, 12))]
        documents = [[draw.randrange(5, 100) for _ in range(size)] for size in sizes]
        texts = [to_text(document) or draw.choice(["", "  \n"]) for document in documents]
        blocks = blocks_of(store, texts, settings, vocabulary)
        assert rows_of(blocks, PAD) == expected(documents, settings, vocabulary)
        info = store.receipt(blocks_ref(write_shard(store, texts), settings, vocabulary)).info
        assert info["documents"] == len(documents)
        assert info["empty"] == sizes.count(0)
        assert info["text_tokens"] == sum(sizes)


@pytest.mark.parametrize("packing", ["packed", "documents"])
@pytest.mark.parametrize("texts", [[], [""], ["w9"], [to_text(list(range(10, 16)))]])
def test_empty_and_minimal_shards(store: Store, vocabulary: Vocabulary, packing: str, texts: list[str]) -> None:
    blocks = blocks_of(store, texts, Settings(length=8, packing=packing), vocabulary)
    assert blocks.input_ids.shape == (1 if any(texts) else 0, 8)
    assert [len(row) - 2 for row in rows_of(blocks, PAD)] == [len(text.split()) for text in texts if text]


def test_ids_above_65535_are_stored_as_uint32(store: Store, tmp_path: Path) -> None:
    wide = words_vocabulary(tmp_path / "wide", 70_000)
    blocks = blocks_of(store, ["w69999 w5"], Settings(length=8), wide)
    assert blocks.input_ids.dtype == np.uint32
    assert rows_of(blocks, PAD) == [[BOS, 69_999, 5, EOS]]


def test_a_special_token_spelled_in_text_becomes_unknown(store: Store, vocabulary: Vocabulary) -> None:
    text = "w10 <s> w11 <mask> w12 </s> <spare> <pad> inconnu w13"
    shard = write_shard(store, [text])
    receipt = make_blocks(store, shard, Settings(length=16), vocabulary)
    rows = rows_of(open_blocks(store, receipt.ref), PAD)
    assert rows == [[BOS, 10, UNK, 11, UNK, 12, UNK, UNK, UNK, UNK, 13, EOS]]
    assert receipt.info["literal_specials"] == 5
    assert receipt.info["unknown"] == 1


# ---- deterministic bytes, keys ----------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_threads_or_pieces(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tiny_texts(shared_data)[:60]
    camembert = load_vocabulary(str(shared_data / "tokenizer" / "camembert-base"))
    files = set()
    for number, (threads, piece, batch) in enumerate(
        [("false", 2_000_000, 1000), ("true", 20_000, 7), ("true", 900, 1)]
    ):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        monkeypatch.setattr(tokens, "PIECE_BYTES", piece)
        store = Store(tmp_path / str(number))
        receipt = make_blocks(store, write_shard(store, texts, batch=batch), Settings(length=64), camembert)
        files.add(receipt.files)
    assert len(files) == 1


def test_existing_blocks_are_kept_unless_forced(store: Store, vocabulary: Vocabulary) -> None:
    shard = write_shard(store, ["w10 w11"])
    first = make_blocks(store, shard, Settings(length=8), vocabulary)
    assert make_blocks(store, shard, Settings(length=8), vocabulary) == first
    again = make_blocks(store, shard, Settings(length=8), vocabulary, force=True)
    assert again.files == first.files
    assert again.created >= first.created
    assert first.ref == blocks_ref(shard, Settings(length=8), vocabulary)
    assert first.parents == (shard.key,)


def test_the_key_depends_on_length_packing_tokenizer_and_shard(
    store: Store, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    shard, other = write_shard(store, ["w10"]), write_shard(store, ["w11"])
    wide = words_vocabulary(tmp_path / "other", 101)
    keys = {
        blocks_ref(shard, Settings(), vocabulary).key,
        blocks_ref(shard, Settings(length=64), vocabulary).key,
        blocks_ref(shard, Settings(packing="documents"), vocabulary).key,
        blocks_ref(shard, Settings(), wide).key,
        blocks_ref(other, Settings(), vocabulary).key,
    }
    assert len(keys) == 5
    elsewhere = Settings(tokenizer="/the/same/tokenizer/elsewhere")
    assert blocks_ref(shard, elsewhere, vocabulary) == blocks_ref(shard, Settings(), vocabulary)


def test_a_flipped_byte_is_detected_on_open(store: Store, vocabulary: Vocabulary) -> None:
    receipt = make_blocks(store, write_shard(store, ["w10 w11"]), Settings(length=8), vocabulary)
    path = store.local_folder(receipt) / BLOCKS_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FatalError, match=r"blocks part-0000: the sha256 of .*blocks\.arrow"):
        open_blocks(store, receipt.ref)


def test_missing_blocks_fail_with_their_label(store: Store, vocabulary: Vocabulary) -> None:
    shard = write_shard(store, ["w10"])
    with pytest.raises(FatalError, match="blocks part-0000 is not in the store"):
        open_blocks(store, blocks_ref(shard, Settings(), vocabulary))


# ---- real text ---------------------------------------------------------------------------------------------


def tiny_texts(shared_data: Path) -> list[str]:
    """One part of the small French corpus, read without the code under test."""
    path = min((shared_data / "corpus" / "tiny").rglob("*.jsonl.zst"))
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        return [json.loads(line)["content"] for line in io.TextIOWrapper(stream, encoding="utf-8")]


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_french_text_gives_the_blocks_of_plain_python(store: Store, shared_data: Path, packing: str) -> None:
    texts = tiny_texts(shared_data)[:150]
    folder = shared_data / "tokenizer" / "camembert-base"
    camembert = load_vocabulary(str(folder))
    settings = Settings(packing=packing)
    receipt = make_blocks(store, write_shard(store, texts), settings, camembert)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert receipt.info["documents"] == len(texts)
    assert receipt.info["text_tokens"] == sum(map(len, documents))
    assert rows_of(open_blocks(store, receipt.ref), 1) == expected(documents, settings, camembert)


def save_byte_level(folder: Path, texts: list[str]) -> None:
    """A small byte-level BPE tokenizer, as in RoBERTa and ModernBERT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def save_word_piece(folder: Path, texts: list[str]) -> None:
    """A small WordPiece tokenizer, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("save", [None, save_byte_level, save_word_piece])
def test_a_document_split_into_parts_gives_the_same_tokens(
    tmp_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path, list[str]], None] | None,
) -> None:
    texts = tiny_texts(shared_data)[:40]
    folder = shared_data / "tokenizer" / "camembert-base"
    if save:
        folder = tmp_path
        save(folder, texts)
    vocabulary = load_vocabulary(str(folder))
    monkeypatch.setattr(tokens, "PIECE_BYTES", 50)
    store, settings = Store(tmp_path / "store"), Settings(length=64)
    text = "\n\n".join(texts) + " " + "a" * 5000
    receipt = make_blocks(store, write_shard(store, [text]), settings, vocabulary)
    unsplit = load_tokenizer(vocabulary).encode(text, add_special_tokens=False).ids
    assert rows_of(open_blocks(store, receipt.ref), vocabulary.pad) == expected([unsplit], settings, vocabulary)


def test_blocks_open_as_a_hugging_face_dataset(store: Store, vocabulary: Vocabulary, tmp_path: Path) -> None:
    from datasets import load_dataset

    receipt = make_blocks(store, write_shard(store, ["w10 w11", "w12"]), Settings(length=8), vocabulary)
    files = str(store.local_folder(receipt) / BLOCKS_FILE)
    rows = load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0] == {"input_ids": [BOS, 10, 11, EOS, 12, EOS, PAD, PAD], "length": 6}


# ---- counts ------------------------------------------------------------------------------------------------


def test_token_counts_exclude_padding(store: Store, vocabulary: Vocabulary) -> None:
    shards = [write_shard(store, ["w10 w11 w10"], "a"), write_shard(store, ["w10 w99"], "b")]
    sample = [make_blocks(store, shard, Settings(length=8), vocabulary).ref for shard in shards]
    receipt = count_tokens(store, sample, vocabulary)
    assert receipt.ref == counts_ref(sample)
    assert count_tokens(store, sample, vocabulary) == receipt
    counts = read_counts(store, receipt.ref)
    assert counts.shape == (100,)
    assert {index: int(count) for index, count in enumerate(counts) if count} == {BOS: 2, EOS: 2, 10: 3, 11: 1, 99: 1}
    assert receipt.tokens == Counter(dict(enumerate(counts.tolist()))).total()
    assert counts_ref(sample[:1]) != counts_ref(sample)


def test_blocks_are_memory_mapped_as_one_array(store: Store, vocabulary: Vocabulary) -> None:
    blocks = blocks_of(store, ["w10 w11"] * 500, Settings(length=8), vocabulary)
    assert not blocks.input_ids.flags.owndata
    assert not blocks.input_ids.flags.writeable
    table = open_arrow(store.local_folder(store.receipt(Ref("blocks", blocks.key, ""))) / BLOCKS_FILE).read_all()
    assert table.column("input_ids").num_chunks == 1
