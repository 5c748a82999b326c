"""Calibration and targets: stored values match the live teacher, and every wrong or damaged file is detected."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from storage.arrow import TARGETS_FILE, TARGETS_SCHEMA, ArrowWriter, metadata_of, open_arrow
from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.models.teacher import load_teacher
from tasks.recipe.config import BlockSettings, MaskSettings, Recipe, TargetSettings, TeacherSettings
from tasks.recipe.run_json import Part, make_run
from tasks.targets.calibration import calibrate, read_calibration
from tasks.targets.capture import Capture, masked_inputs
from tasks.targets.compute import make_targets, open_capture
from tasks.targets.keys import targets_ref
from tasks.targets.parity import LIMIT, fidelity, probe, probe_cache
from tasks.targets.targets_file import check_digests, file_metadata, open_targets, read_targets, write_rows
from tasks.tokens.blocks import make_blocks, open_blocks
from tasks.tokens.mask import row_digests
from tasks.tokens.token_counts import count_tokens, counts_ref
from tests.harness.tiny import documents, make_parts, save_text_shard

ENCODINGS = ["int8", "int4", "bf16", "topk"]
DEFAULT_MASK = MaskSettings()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def parts(store: Store, teacher_folder: Path) -> tuple[Part, ...]:
    return make_parts(store, teacher_folder, texts=8)


@pytest.fixture
def capture(store: Store, teacher_folder: Path, parts: tuple[Part, ...]) -> Capture:
    """A capture with calibration, for int8 on masked positions."""
    return capture_for(store, teacher_folder, parts)


def capture_for(
    store: Store, folder: Path, parts: tuple[Part, ...], mask: MaskSettings = DEFAULT_MASK, **targets: object
) -> Capture:
    settings = TargetSettings(calibration_rows=24, **targets)
    sample = [part.blocks_ref() for part in parts]
    model = load_teacher(TeacherSettings(model=str(folder), batch_rows=7), "cpu")  # 7: the last batch is smaller
    bare = Capture(model, model.vocabulary, mask, settings)
    receipt = calibrate(store, sample, bare)
    return replace(bare, calibration=read_calibration(store, receipt.ref), calibration_key=receipt.key)


def ref_of(capture: Capture, blocks: Ref, variant: int = 0) -> Ref:
    model = capture.teacher
    keys = (capture.calibration_key, capture.counts_key)
    return targets_ref(blocks, model.fingerprint, model.settings, capture.mask, capture.targets, *keys, variant)


@torch.no_grad()
def live_hidden(capture: Capture, input_ids: np.ndarray, length: int) -> torch.Tensor:
    """Hidden states [L, D] of one row by the model's own forward, without padding and fast path."""
    ids = torch.from_numpy(input_ids[None, :length])
    return capture.teacher.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]


# ---- stored values --------------------------------------------------------------------------------------------


def test_targets_match_the_teacher_at_the_masked_positions(store, parts, capture):
    refs = [part.blocks_ref() for part in parts]
    receipt = make_targets(store, refs[1], capture)
    blocks, targets = open_blocks(store, refs[1]), open_targets(store, receipt.ref)
    rows = np.array([len(blocks) - 1, 3, 0, 3, 11])  # unsorted, one row twice; the last block is padded
    inputs = masked_inputs(capture, blocks, rows, 0)
    expected = [
        live_hidden(capture, ids, length)[positions[valid]]
        for ids, length, positions, valid in zip(
            inputs.input_ids, inputs.lengths, inputs.positions, inputs.valid, strict=True
        )
    ]
    decoded = targets.codec.decode(torch.from_numpy(targets.payload(rows)))
    assert targets.counts[rows].tolist() == [len(part) for part in expected]
    std = capture.calibration.std
    assert float(((decoded - torch.cat(expected)) / std).abs().max()) < 0.03
    assert targets.payload(np.array([], np.int64)).shape == (0, 34)
    check_digests(targets, rows, row_digests(inputs.input_ids, inputs.lengths))


def test_positions_all_covers_every_attended_position(store, teacher_folder):
    shard = save_text_shard(store, documents(6, seed=3), "short-0000")
    settings = BlockSettings(length=48, packing="documents")
    model = load_teacher(TeacherSettings(model=str(teacher_folder)), "cpu")
    blocks_receipt = make_blocks(store, shard, settings, model.vocabulary)
    part = Part(label="short-0000", blocks=blocks_receipt.key, rows=blocks_receipt.rows, tokens=blocks_receipt.tokens)
    capture = capture_for(store, teacher_folder, (part,), positions="all", encoding="bf16")
    receipt = make_targets(store, part.blocks_ref(), capture)
    blocks, targets = open_blocks(store, part.blocks_ref()), open_targets(store, receipt.ref)
    assert len(set(blocks.lengths.tolist())) > 1
    assert targets.counts.tolist() == blocks.lengths.tolist()
    assert receipt.info["positions"] == receipt.tokens == part.tokens
    row = int(blocks.lengths.argmin())
    inputs = masked_inputs(capture, blocks, np.array([row]), 0)
    decoded = targets.codec.decode(torch.from_numpy(targets.payload(np.array([row]))))
    expected = live_hidden(capture, inputs.input_ids[0], int(blocks.lengths[row]))
    torch.testing.assert_close(decoded, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_receipt_and_metadata_describe_the_file(store, teacher_folder, parts, encoding):
    capture = capture_for(store, teacher_folder, parts, encoding=encoding)
    part = parts[0]
    receipt = make_targets(store, part.blocks_ref(), capture)
    assert receipt.ref == ref_of(capture, part.blocks_ref())
    assert (receipt.rows, receipt.tokens) == (part.rows, part.tokens)
    assert part.blocks in receipt.parents
    assert receipt.info["probe"]["rows"] == 6
    assert receipt.info["probe"]["kl"] < 5e-3
    assert receipt.info["probe"]["cosine"] < 6e-3
    table = open_arrow(store.local_folder(receipt) / TARGETS_FILE).read_all()
    assert table.schema.remove_metadata().equals(TARGETS_SCHEMA)
    lengths = {len(value) for value in table.column("payload").to_pylist()}
    sizes = {count * receipt.info["bytes"] for count in table.column("positions").to_pylist()}
    assert lengths == sizes
    metadata = metadata_of(table.schema)
    named = {name: metadata[name] for name in ("encoding", "width", "blocks", "positions", "variant", "mask_seed")}
    assert named == {
        "encoding": encoding,
        "width": "32",
        "blocks": part.blocks,
        "positions": "masked",
        "variant": "0",
        "mask_seed": "0",
    }
    assert metadata["teacher"] == capture.teacher.fingerprint
    assert bool(metadata["calibration"]) == (encoding in ("int8", "int4"))


def test_existing_targets_are_kept_unless_forced(store, parts, capture, monkeypatch):
    blocks = parts[0].blocks_ref()
    first = make_targets(store, blocks, capture)
    monkeypatch.setattr(capture.teacher.model, "forward", None)
    monkeypatch.setattr("tasks.targets.capture.hidden_states", lambda *_: pytest.fail("the teacher ran"))
    assert make_targets(store, blocks, capture) == first
    assert calibrate(store, [part.blocks_ref() for part in parts], capture).key == capture.calibration_key
    monkeypatch.undo()
    again = make_targets(store, blocks, capture, force=True)
    assert again.files == first.files  # deterministic on one machine
    assert again.created >= first.created


def test_mask_variants_are_separate_targets(store, teacher_folder, parts):
    capture = capture_for(store, teacher_folder, parts, MaskSettings(variants=2))
    receipts = [make_targets(store, parts[0].blocks_ref(), capture, variant) for variant in (0, 1)]
    assert [receipt.label for receipt in receipts] == ["part-0000.v0", "part-0000.v1"]
    digests = [open_targets(store, receipt.ref).digests for receipt in receipts]
    assert not np.isin(digests[0], digests[1]).any()


def test_smoothed_masks_use_token_counts(store, teacher_folder, parts):
    sample = [part.blocks_ref() for part in parts]
    teacher = TeacherSettings(model=str(teacher_folder))
    counts = count_tokens(store, sample, load_teacher(teacher, "cpu").vocabulary)
    assert counts.ref == counts_ref(sample)
    settings = (MaskSettings(kind="smoothed"), TargetSettings(encoding="bf16"), counts.ref)
    capture = open_capture(store, teacher, load_teacher(teacher, "cpu").vocabulary, *settings, device="cpu")
    receipt = make_targets(store, sample[0], capture)
    assert receipt.info["probe"]["kl"] < 1e-3
    assert counts.key in receipt.parents


def test_a_shard_without_blocks_has_empty_targets(store, parts, capture):
    shard = save_text_shard(store, [], "empty-0000")
    blocks = make_blocks(store, shard, BlockSettings(length=32), capture.vocabulary)
    receipt = make_targets(store, blocks.ref, capture)
    targets = open_targets(store, receipt.ref)
    assert (receipt.rows, len(targets), receipt.info["positions"]) == (0, 0, 0)
    assert targets.payload(np.array([], np.int64)).shape == (0, 34)


# ---- calibration ---------------------------------------------------------------------------------------------


def test_calibration_is_mean_and_std_over_the_sample(store, teacher_folder, parts):
    capture = capture_for(store, teacher_folder, parts)
    everything = replace(capture, targets=TargetSettings(calibration_rows=10_000))
    receipt = calibrate(store, [part.blocks_ref() for part in parts], everything)
    assert receipt.rows == sum(part.rows for part in parts)
    vectors = []
    for part in parts:
        blocks = open_blocks(store, part.blocks_ref())
        inputs = masked_inputs(capture, blocks, np.arange(len(blocks)), 0)
        for ids, length, positions, valid in zip(*inputs[1:5], strict=True):
            vectors.append(live_hidden(capture, ids, length)[positions[valid]])
    everywhere = torch.cat(vectors)
    assert len(everywhere) == receipt.info["positions"]
    found = read_calibration(store, receipt.ref)
    torch.testing.assert_close(found.mean, everywhere.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.std, everywhere.std(0, correction=0), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found.mean, capture.calibration.mean)  # which is of 24 blocks


def test_a_calibrated_encoding_without_calibration_fails(store, parts, capture):
    with pytest.raises(FatalError, match="int8 needs a calibration of 32 channels"):
        make_targets(store, parts[0].blocks_ref(), replace(capture, calibration=None))


def test_calibrating_on_empty_blocks_fails(store, capture):
    blocks = make_blocks(store, save_text_shard(store, [], "empty-0000"), BlockSettings(length=32), capture.vocabulary)
    with pytest.raises(FatalError, match="no position to calibrate on"):
        calibrate(store, [blocks.ref], capture)


# ---- fidelity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 50])
def test_int8_stays_below_the_limit_with_two_outlier_channels(store, parts, capture, factor):
    """Multiplies two channels of the last norm, and divides their weights in the LM head, by `factor`: equal logits."""
    model, channels = capture.teacher.model, [3, 17]
    norm = model.base_model.encoder.layer[-1].output.LayerNorm
    norm.weight[channels] *= factor
    norm.bias[channels] *= factor
    model.lm_head.dense.weight[:, channels] /= factor
    blocks = open_blocks(store, parts[0].blocks_ref())
    rows = np.arange(0, len(blocks), 3)
    table = fidelity(capture, blocks, rows, [TargetSettings(encoding=name) for name in ENCODINGS])
    figures = {line.encoding: line for line in table}
    assert figures["int8"].kl <= 1e-4
    assert figures["int8"].cosine <= 1e-4
    assert figures["int8"].kl < figures["int4"].kl < LIMIT
    assert figures["bf16"].kl <= 1e-4
    assert [figures[name].bytes for name in ENCODINGS] == [34, 17, 64, 258]
    assert figures["topk"].cosine is None
    assert figures["int8"].positions == sum(
        len(masked.digests) * 5 for masked in [masked_inputs(capture, blocks, rows, 0)]
    )


# ---- corruption ----------------------------------------------------------------------------------------------


def forge(store: Store, capture: Capture, of: Ref, source: Ref, shift_rows: int = 0, shift_vectors: int = 0) -> None:
    """Commits the targets of `source` under the key of `of`, rolled by rows or by vectors."""
    original = open_targets(store, ref_of(capture, source))
    rows = np.roll(np.arange(len(original)), shift_rows)
    ref = ref_of(capture, of)
    with store.scratch() as folder:
        with ArrowWriter(folder / TARGETS_FILE, TARGETS_SCHEMA, file_metadata(original.codec, ref, {})) as writer:
            digests = [int(value).to_bytes(8, "little") for value in original.digests[rows]]
            payload = np.roll(original.payload(rows), shift_vectors, axis=0)
            write_rows(writer, digests, original.counts[rows], payload)
        store.commit(ref, folder, schema=1, rows=len(rows), tokens=0, settings={}, parents=[])


def check_all_rows(store: Store, capture: Capture, blocks_ref: Ref) -> None:
    """Checks every row as the dataloader does."""
    blocks, targets = open_blocks(store, blocks_ref), open_targets(store, ref_of(capture, blocks_ref))
    rows = np.arange(len(blocks))
    check_digests(targets, rows, masked_inputs(capture, blocks, rows, 0).digests)


def test_a_flipped_byte_is_detected_on_open(store, parts, capture):
    receipt = make_targets(store, parts[0].blocks_ref(), capture)
    path = store.local_folder(receipt) / TARGETS_FILE
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FatalError, match=r"targets part-0000: the sha256 of .*targets.arrow differs"):
        open_targets(store, receipt.ref)


def test_a_truncated_file_is_detected_on_open(store, parts, capture):
    receipt = make_targets(store, parts[0].blocks_ref(), capture)
    path = store.local_folder(receipt) / TARGETS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FatalError, match=r"targets part-0000: .*its size differs"):
        open_targets(store, receipt.ref)


def test_swapped_files_are_detected_even_without_hashes(store, parts, capture):
    paths, refs = [], []
    for part in parts:
        receipt = make_targets(store, part.blocks_ref(), capture)
        refs.append(receipt.ref)
        paths.append(store.local_folder(receipt) / TARGETS_FILE)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    with pytest.raises(FatalError, match="targets part-0000"):
        open_targets(store, refs[0])
    with pytest.raises(FatalError, match=r"targets part-0001: .* belongs to a different artifact"):
        read_targets(paths[1], refs[1])


def test_a_receipt_of_another_shard_is_detected(store, parts, capture):
    refs = [make_targets(store, part.blocks_ref(), capture).ref for part in parts]
    receipts = {path.name[:64]: path for path in Path(store.root).glob("receipts/targets/*.receipt.json")}
    receipts[refs[0].key].write_bytes(receipts[refs[1].key].read_bytes())
    with pytest.raises(FatalError, match="this receipt belongs to targets part-0001, not to part-0000"):
        open_targets(store, refs[0])


@pytest.mark.parametrize("shift", [1, -1, 5])
def test_shifted_rows_are_detected_by_their_digests(store, parts, capture, shift):
    blocks = parts[0].blocks_ref()
    make_targets(store, blocks, capture)
    forge(store, capture, blocks, blocks, shift_rows=shift)
    with pytest.raises(FatalError, match="targets part-0000: row 0 was computed from a different input"):
        check_all_rows(store, capture, blocks)
    with pytest.raises(FatalError, match="targets part-0000: row 0"):
        probe(capture, open_blocks(store, blocks), open_targets(store, ref_of(capture, blocks)), 0)


def test_targets_of_another_shard_are_detected_by_their_digests(store, parts, capture):
    first, second = (part.blocks_ref() for part in parts)
    make_targets(store, second, capture)
    forge(store, capture, first, second)
    with pytest.raises(FatalError, match="targets part-0000"):
        check_all_rows(store, capture, first)


def test_another_mask_is_detected_by_the_digests(store, teacher_folder, parts, capture):
    blocks = parts[0].blocks_ref()
    make_targets(store, blocks, capture)
    check_all_rows(store, capture, blocks)
    opened, targets = open_blocks(store, blocks), open_targets(store, ref_of(capture, blocks))
    for other, variant in ((replace(capture, mask=MaskSettings(seed=1)), 0), (capture, 1)):
        rows = np.array([4, 2])
        with pytest.raises(FatalError, match="targets part-0000: row 4 was computed from a different input"):
            check_digests(targets, rows, masked_inputs(other, opened, rows, variant).digests)
        with pytest.raises(FatalError, match="targets part-0000: row 0"):
            probe(other, opened, targets, variant)


def test_a_row_beyond_the_end_is_detected(store, parts, capture):
    blocks = parts[0].blocks_ref()
    make_targets(store, blocks, capture)
    targets = open_targets(store, ref_of(capture, blocks))
    with pytest.raises(FatalError, match=f"row {len(targets)} was"):
        check_digests(targets, np.array([len(targets)]), [b"12345678"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shifted_vectors_under_correct_digests_fail_the_probe(store, teacher_folder, parts, encoding):
    capture = capture_for(store, teacher_folder, parts, encoding=encoding)
    blocks = parts[0].blocks_ref()
    make_targets(store, blocks, capture)
    forge(store, capture, blocks, blocks, shift_vectors=1)
    check_all_rows(store, capture, blocks)
    with pytest.raises(FatalError, match="targets part-0000 differ from the live teacher"):
        probe(capture, open_blocks(store, blocks), open_targets(store, ref_of(capture, blocks)), 0)


def test_another_teacher_fails_the_probe(store, parts, capture):
    blocks = parts[0].blocks_ref()
    make_targets(store, blocks, capture)
    with torch.no_grad():
        for parameter in capture.teacher.model.base_model.encoder.layer[1].parameters():
            parameter.mul_(1.3)
    with pytest.raises(FatalError, match=r"part-0000 differ from the live teacher .*run `distil verify`"):
        probe(capture, open_blocks(store, blocks), open_targets(store, ref_of(capture, blocks)), 0)


def test_targets_that_fail_the_probe_are_not_committed(store, parts, capture, monkeypatch):
    """With a codec that loses too much, the message names the remedy and nothing is committed."""
    far = replace(capture.calibration, std=capture.calibration.std * 1e6)
    with pytest.raises(FatalError, match=r"part-0000 differ .* use a more precise targets.encoding"):
        make_targets(store, parts[0].blocks_ref(), replace(capture, calibration=far))
    assert not store.keys("targets")


def test_topk_that_decodes_to_nan_fails_the_probe(store, teacher_folder, parts):
    capture = capture_for(store, teacher_folder, parts, encoding="topk")
    blocks = open_blocks(store, parts[0].blocks_ref())
    targets = open_targets(store, make_targets(store, parts[0].blocks_ref(), capture).ref)
    nan = tuple(np.full_like(batch, 0xFF) for batch in targets._batches)  # 0xFFFF is NaN in fp16
    ids_of_0 = 2 * targets.codec.top_k
    for batch in nan:
        batch.reshape(-1, targets.codec.bytes_per_position)[:, :ids_of_0] = 0
    with pytest.raises(FatalError, match="differ from the live teacher"):
        probe(capture, blocks, replace(targets, _batches=nan), 0)


def first_new_token(rows):
    """The last row that contains a token of no earlier row, and that token."""
    return max((min(n for n, row in enumerate(rows) if token in row), token) for token in set().union(*rows))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_non_finite_teacher_output_names_shard_and_row(store, teacher_folder, parts, encoding):
    capture = capture_for(store, teacher_folder, parts, encoding=encoding)
    blocks = open_blocks(store, parts[0].blocks_ref())
    inputs = masked_inputs(capture, blocks, np.arange(len(blocks)), 0)
    rows = [set(ids[:length].tolist()) for ids, length in zip(inputs.input_ids, inputs.lengths, strict=True)]
    first, token = first_new_token(rows)
    with torch.no_grad():
        embeddings = capture.teacher.model.base_model.embeddings.word_embeddings
        embeddings.weight = nn.Parameter(embeddings.weight.clone())  # untied from the decoder
        embeddings.weight[token] = torch.inf
    with pytest.raises(
        FatalError, match=rf"blocks part-0000, row {first}: the output of the teacher .* is NaN or infinite"
    ):
        make_targets(store, parts[0].blocks_ref(), capture)
    assert not store.keys("targets")


def test_blocks_longer_than_the_maximum_input_are_refused(store, capture):
    shard = save_text_shard(store, documents(4), "long-0000")
    blocks = make_blocks(store, shard, BlockSettings(length=256), capture.vocabulary)
    with pytest.raises(FatalError, match=r"blocks.length = 256, but the teacher .* reads at most 128 tokens"):
        make_targets(store, blocks.ref, capture)


def test_a_tokenizer_that_does_not_fit_the_teacher_is_refused(store, teacher_folder, capture):
    other = replace(capture.vocabulary, name="other", size=capture.vocabulary.size + 1)
    with pytest.raises(FatalError, match="the tokenizer other has"):
        open_capture(
            store, TeacherSettings(model=str(teacher_folder)), other, MaskSettings(), TargetSettings(), device="cpu"
        )


# ---- probe before training --------------------------------------------------------------------------------


def run_over(store: Store, folder: Path, parts: tuple[Part, ...], capture: Capture):
    recipe = Recipe(
        name="tiny",
        corpus={"url": "none"},
        store=store.root,
        home=str(folder),
        teacher=capture.teacher.settings,
        targets=capture.targets,
    )
    manifest = tuple(
        part.model_copy(update={"targets": (make_targets(store, part.blocks_ref(), capture).key,)}) for part in parts
    )
    fingerprint = capture.teacher.fingerprint
    return make_run(recipe, manifest=manifest, heldout=(), teacher_fingerprint=fingerprint, start="", counts="")


def test_probe_cache_checks_parts_of_the_manifest(store, tmp_path, parts, capture):
    run = run_over(store, tmp_path, parts, capture)
    found = probe_cache(store, run, capture.teacher)
    assert [parity.rows for parity in found] == [6, 6]
    assert max(parity.kl for parity in found) < 1e-4
    forge(store, capture, parts[1].blocks_ref(), parts[1].blocks_ref(), shift_vectors=3)
    with pytest.raises(FatalError, match="targets part-0001 differ from the live teacher"):
        probe_cache(store, run, capture.teacher)


def test_a_file_with_unknown_metadata_is_refused(store, parts, capture):
    blocks = parts[0].blocks_ref()
    ref = make_targets(store, blocks, capture).ref
    table = open_arrow(store.local_folder(store.receipt(ref)) / TARGETS_FILE).read_all()
    metadata = metadata_of(table.schema)
    del metadata["top_k"]
    with store.scratch() as folder:
        with (
            pa.OSFile(str(folder / TARGETS_FILE), "wb") as file,
            pa.ipc.new_file(file, TARGETS_SCHEMA.with_metadata(metadata)) as writer,
        ):
            writer.write_table(table.replace_schema_metadata(metadata))
        store.commit(ref, folder, schema=1, rows=1, tokens=0, settings={}, parents=[])
    with pytest.raises(FatalError, match="does not have the metadata of a targets file of this version"):
        open_targets(store, ref)
