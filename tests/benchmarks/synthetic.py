"""Teacher, blocks and targets for the benchmarks: random ones of any size, or a saved teacher and real text.

    bench = random_bench(folder, CAMEMBERT, rows=4096, device="cuda")
    bench = real_bench(folder, TEACHER, CORPUS, length=128, layers=2)
    parts, codec = cache_targets(bench, TargetSettings(positions="all"))

Used by the benchmarks of loader, train step and GPU; random weights do, since speed does not depend on them. Artifacts
are written and read through the store, by the same functions as in production.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from storage.arrow import BLOCKS_FILE, ArrowWriter, blocks_schema
from storage.artifact import Receipt, Ref
from storage.fingerprint import key_of
from storage.store import Store
from tasks.loader.batch import Batch, MaskingRule, make_batch
from tasks.loader.dataset import BlockDataset
from tasks.models.student import make_fresh
from tasks.models.teacher import TeacherModel, load_teacher, resolve_dtype
from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings
from tasks.recipe.run_json import Part
from tasks.targets.calibration import calibrate, read_calibration
from tasks.targets.capture import Capture
from tasks.targets.codec import Codec
from tasks.targets.compute import make_targets
from tasks.targets.targets_file import open_targets
from tasks.tokens.vocabulary import Vocabulary
from tests.benchmarks.encodings import blocks_of


@dataclass(frozen=True)
class Size:
    """Shape of a CamemBERT teacher and its student: `inner` is the feed-forward width, `length` tokens per block."""

    name: str
    layers: int
    student_layers: int
    width: int
    heads: int
    inner: int
    vocab: int
    length: int


CAMEMBERT = Size("camembert-base, 12 layers to 6", 12, 6, 768, 12, 3072, 32_005, 512)
SMALL = Size("4 layers of 128 to 2, vocabulary 8,000", 4, 2, 128, 2, 512, 8_000, 128)
TINY = Size("4 layers of 32 to 2, vocabulary 500", 4, 2, 32, 2, 64, 500, 32)


@dataclass(frozen=True, eq=False)
class Bench:
    """Blocks of one length in a store, their teacher, and the number of layers of its student."""

    name: str
    store: Store
    teacher: TeacherModel
    blocks: tuple[Receipt, ...]
    length: int
    layers: int

    @property
    def parts(self) -> tuple[Part, ...]:
        """The manifest, without targets."""
        return tuple(Part(label=one.label, blocks=one.key, rows=one.rows, tokens=one.tokens) for one in self.blocks)


def random_bench(folder: Path, size: Size, rows: int, device: str, shards: int = 2) -> Bench:
    """A teacher with random weights, and `shards` shards of `rows` full blocks of random ids each."""
    vocabulary = random_vocabulary(size)
    store = Store(folder / "store")
    blocks = tuple(_random_blocks(store, vocabulary, rows, size.length, number) for number in range(shards))
    return Bench(size.name, store, random_teacher(size, vocabulary, device), blocks, size.length, size.student_layers)


def real_bench(folder: Path, teacher: Path, corpus: Path, *, length: int, layers: int, shards: int = 2) -> Bench:
    """A saved teacher on the CPU, and blocks of a few small shards of real text."""
    store = Store(folder / "store")
    blocks = tuple(blocks_of(store, corpus, teacher, length, shard_bytes=200_000, shards=shards))
    loaded = load_teacher(TeacherSettings(model=str(teacher), dtype="float32"), "cpu")
    name = f"demo teacher, {loaded.model.config.num_hidden_layers} layers of {loaded.width} to {layers}"
    return Bench(name, store, loaded, blocks, length, layers)


def random_vocabulary(size: Size) -> Vocabulary:
    """Special ids as in camembert-base, without a tokenizer."""
    mask = size.vocab - 1
    specials = (0, 1, 2, 3, 4, 5, 6, mask)
    return Vocabulary(
        size.name, "", f"random {size.vocab}", size.vocab, 1, 5, 6, mask, 3, specials=specials, unknowns=(3, 4)
    )


def random_teacher(size: Size, vocabulary: Vocabulary, device: str) -> TeacherModel:
    """A frozen teacher, in the default dtype of a teacher on this device."""
    where, settings = torch.device(device), TeacherSettings(model="random")
    dtype = resolve_dtype(settings.dtype, where)
    model = random_model(size, size.layers, vocabulary)
    nn.Module.to(model, where, dtype).requires_grad_(False)
    return TeacherModel(
        model, vocabulary, settings, f"random {size.name}", size.width, size.vocab, device=where, dtype=dtype
    )


def random_model(size: Size, layers: int, vocabulary: Vocabulary) -> PreTrainedModel:
    """A CamemBERT of `layers` layers with random weights."""
    config = {
        "model_type": "camembert",
        "num_hidden_layers": layers,
        "hidden_size": size.width,
        "num_attention_heads": size.heads,
        "intermediate_size": size.inner,
        "vocab_size": size.vocab,
        "max_position_embeddings": size.length + 2,
        "type_vocab_size": 1,
    }
    return make_fresh(config, vocabulary)


def _random_blocks(store: Store, vocabulary: Vocabulary, rows: int, length: int, number: int) -> Receipt:
    """Full blocks of one shard, in the file format of tasks.tokens.blocks."""
    schema = blocks_schema(length, vocabulary.size)
    kind = schema.field("input_ids").type
    ids = np.random.default_rng(number).integers(7, vocabulary.mask, (rows, length))
    ids[:, 0], ids[:, -1] = vocabulary.bos, vocabulary.eos
    flat = pa.array(ids.ravel().astype(str(kind.value_type)))
    ref = Ref("blocks", key_of("blocks", 1, {"rows": rows, "length": length, "number": number}, []), f"random-{number}")
    with store.scratch() as folder:
        with ArrowWriter(folder / BLOCKS_FILE, schema) as writer:
            lengths = pa.array(np.full(rows, length, np.int32))
            writer.write({"input_ids": pa.FixedSizeListArray.from_arrays(flat, type=kind), "length": lengths})
        return store.commit(ref, folder, schema=1, rows=rows, tokens=rows * length, settings={}, parents=[])


# ---- targets and batches -----------------------------------------------------------------------------------


def calibrated_capture(bench: Bench, targets: TargetSettings) -> Capture:
    """Capture settings of the bench's teacher, calibrated on the first shard."""
    capture = Capture(bench.teacher, bench.teacher.vocabulary, MaskSettings(), targets)
    receipt = calibrate(bench.store, [bench.blocks[0].ref], capture)
    calibration = read_calibration(bench.store, receipt.ref)
    return replace(capture, calibration=calibration, calibration_key=receipt.key)


def cache_targets(bench: Bench, targets: TargetSettings) -> tuple[tuple[Part, ...], Codec]:
    """Writes the targets of every shard; returns the manifest that names them and the codec that decodes them."""
    capture = calibrated_capture(bench, targets)
    receipts = [make_targets(bench.store, blocks.ref, capture) for blocks in bench.blocks]
    pairs = zip(bench.parts, receipts, strict=True)
    parts = tuple(part.model_copy(update={"targets": (receipt.key,)}) for part, receipt in pairs)
    return parts, open_targets(bench.store, receipts[0].ref).codec


def masking_rule(bench: Bench, targets: TargetSettings) -> MaskingRule:
    """Default masking of the bench's blocks."""
    return MaskingRule(bench.teacher.vocabulary, MaskSettings(), targets.positions == "all")


def first_batch(bench: Bench, targets: TargetSettings, parts: tuple[Part, ...], rows: int) -> Batch:
    """The first rows of the first shard, with encoded hidden states where the parts name targets."""
    dataset = BlockDataset(bench.store, parts, cached=bool(parts[0].targets))
    zeros = np.zeros(rows, np.int64)
    return make_batch(dataset, masking_rule(bench, targets), zeros, np.arange(rows), zeros)
