"""Makes small inputs for tests: French text, a Unigram tokenizer, teachers of each family, a corpus, manifest parts."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from storage.arrow import TEXT_FILE, TEXT_SCHEMA, ArrowWriter
from storage.artifact import Ref
from storage.fingerprint import key_of
from storage.store import Store
from tasks.recipe.config import BlockSettings
from tasks.recipe.run_json import Part
from tasks.tokens.blocks import blocks_ref, make_blocks
from tasks.tokens.vocabulary import load_vocabulary

SUBJECTS = ("Le maire", "La salariée", "Un employeur", "Le juge", "Votre médecin", "La préfecture", "Ce contrat")
VERBS = ("signe", "refuse", "demande", "transmet", "conserve", "vérifie", "modifie", "présente")
OBJECTS = ("le dossier", "une attestation", "la convention collective", "un congé payé", "les documents", "sa carte")
ENDINGS = ("avant la fin du mois", "dans un délai de deux mois", "sans motif", "à la mairie", "par écrit", "le 3 mai")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Returns plausible French sentences, always the same for a seed."""
    draw = random.Random(seed)
    return [
        f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)} {draw.choice(ENDINGS)}."
        for _ in range(count)
    ]


def documents(count: int, seed: int = 0) -> list[str]:
    """Returns documents of 3 to 12 sentences."""
    draw = random.Random(seed)
    return [" ".join(sentences(draw.randint(3, 12), seed * 1_000_003 + i)) for i in range(count)]


def save_tokenizer(folder: Path) -> Path:
    """Saves a Unigram tokenizer like CamemBERT's in `folder`: complete words, halves of words, and letters.

    Its pieces are computed, not trained, because the trainer orders pieces differently in each process.
    """
    words = sorted({word.strip(".") for sentence in sentences(2000) for word in sentence.split()})
    halves = sorted({part for word in words for part in (word[: len(word) // 2], word[len(word) // 2 :]) if part})
    letters = sorted({letter for word in words for letter in word})
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    plain = dict.fromkeys(["▁", ".", *(f"▁{word}" for word in words), *halves, *letters, *(f"▁{h}" for h in halves)])
    scores = [(piece, -3.0 - 0.01 * number) for number, piece in enumerate(plain)]
    tokenizer = Tokenizer(models.Unigram([*((piece, 0.0) for piece in special), *scores], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )
    fast.save_pretrained(folder)
    return folder


def make_teacher(folder: Path, family: str = "camembert", layers: int = 4, width: int = 32) -> PreTrainedModel:
    """Makes a random teacher with peaked predictions, and saves it with its tokenizer in `folder`."""
    save_tokenizer(folder)
    vocabulary = load_vocabulary(str(folder))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocabulary.size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=130,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        cls_token_id=vocabulary.bos,
        sep_token_id=vocabulary.eos,
        initializer_range=0.2,
    )
    model: PreTrainedModel = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Changes entries of a model's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=1))


def save_text_shard(store: Store, texts: list[str], label: str) -> Ref:
    """Commits a text shard like those of tasks.corpus.shard."""
    ref = Ref("shard", key_of("shard", 1, {"label": label}, []), label)
    with store.scratch() as folder:
        with ArrowWriter(folder / TEXT_FILE, TEXT_SCHEMA) as writer:
            writer.write({"text": texts, "line": list(range(1, len(texts) + 1))})
        store.commit(ref, folder, schema=1, rows=len(texts), tokens=0, settings={}, parents=[])
    return ref


def make_parts(store: Store, teacher: Path, shards: int = 2, texts: int = 40, length: int = 32) -> tuple[Part, ...]:
    """Makes the blocks of a few text shards and returns them as parts of a manifest."""
    vocabulary, settings = load_vocabulary(str(teacher)), BlockSettings(length=length)
    parts = []
    for number in range(shards):
        shard = save_text_shard(store, documents(texts, seed=number), f"part-{number:04d}")
        receipt = make_blocks(store, shard, settings, vocabulary)
        assert receipt.key == blocks_ref(shard, settings, vocabulary).key
        parts.append(Part(label=shard.label, blocks=receipt.key, rows=receipt.rows, tokens=receipt.tokens))
    return tuple(parts)


def write_oscar(folder: Path, parts: int = 3, texts: int = 60) -> Path:
    """Writes an uncompressed corpus in the OSCAR 23.01 schema. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, parts + 1):
        lines = [json.dumps({"content": text, "metadata": {}}) for text in documents(texts, seed=number)]
        (folder / f"fr_meta_part_{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_sums(folder: Path, *files: Path) -> None:
    """Writes a checksum file in OSCAR's format for these files to `folder`, which need not contain them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()} {file.name}\n" for file in files]
    (folder / "fr_sha256.txt").write_text("".join(lines))
