"""Checks a store that an older version wrote, for each kind of artifact.

Artifacts with an older schema number are kept and made again; receipts in a different format are rejected with one
sentence that contains the remedy.
"""

import json
from pathlib import Path

import pytest

from storage import layout
from storage.artifact import KINDS, Ref
from storage.errors import FatalError
from storage.fingerprint import canonical_json, sha256_bytes
from storage.store import Store
from storage.verify import verify
from tasks.recipe.run_json import RUN_SCHEMA
from tests.hard.stages import STAGES, Bench, make_bench

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE_OF = {kind: kind for kind in KINDS} | {"shard": "source", "model": "checkpoint"}
"""The call of stages.py that makes each kind; training makes checkpoints and the model."""
NUMBERS = {
    "source": ["tasks.corpus.shard"],
    "blocks": ["tasks.tokens.blocks"],
    "counts": ["tasks.tokens.token_counts"],
    "calibration": ["tasks.targets.keys", "tasks.targets.calibration"],
    "targets": ["tasks.targets.keys", "tasks.targets.compute"],
    "checkpoint": ["tasks.recipe.run_json", "tasks.train.checkpoint", "tasks.train.export"],
    "scores": ["tasks.eval.scores"],
}
"""The modules that contain the schema number of each stage."""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return make_bench(Store(tmp_path / "store"), tmp_path)


def made(bench: Bench, kind: str) -> Ref:
    """Runs the stage that makes a kind. Returns a reference to one new artifact of that kind."""
    before = bench.store.keys(kind)
    STAGES[STAGE_OF[kind]](bench)()
    fresh = sorted(bench.store.keys(kind) - before)
    assert fresh, f"no artifact of the kind {kind} was made"
    return bench.store.receipt(Ref(kind, fresh[0], "")).ref


@pytest.mark.parametrize("kind", KINDS)
def test_another_schema_number_is_another_artifact(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = made(bench, kind)
    receipt = bench.store.receipt(old)
    assert receipt.schema == 1
    assert {"pyarrow", "numpy", "tokenizers", "transformers", "torch"} <= receipt.versions.keys()
    for module in NUMBERS[STAGE_OF[kind]]:
        monkeypatch.setattr(f"{module}.SCHEMA", 2)
    if STAGE_OF[kind] == "checkpoint":  # a checkpoint's key is the run key, which has its own schema number
        for module in ("tasks.recipe.run_json", "tasks.train.checkpoint"):
            monkeypatch.setattr(f"{module}.RUN_SCHEMA", RUN_SCHEMA + 1)
    new = made(bench, kind)
    assert new.key != old.key
    assert bench.store.receipt(new).schema == 2
    assert bench.store.receipt(old) == receipt, "the older artifact must remain until `distil gc` deletes it"
    assert verify(bench.store) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_receipt_of_another_form_is_refused_withdrawn_and_made_again(kind: str, bench: Bench) -> None:
    ref = made(bench, kind)
    path = Path(bench.store.path(layout.receipt_path(kind, ref.key)))
    body = {name: value for name, value in json.loads(path.read_bytes()).items() if name not in ("seal", "host")}
    path.write_bytes(canonical_json(body | {"seal": sha256_bytes(canonical_json(body))}))
    with pytest.raises(FatalError, match=r"not a receipt of this version .*host.*; run `distil verify`") as caught:
        bench.store.receipt(ref)
    assert "\n" not in str(caught.value)
    assert [fault.ref.key for fault in verify(bench.store)] == [ref.key]
    assert bench.store.missing([ref]) == [ref]
    if kind == "checkpoint":  # not needed once the model exists
        for key in bench.store.keys("model"):
            bench.store.withdraw(Ref("model", key, ""))
    STAGES[STAGE_OF[kind]](bench)()
    assert bench.store.missing([ref]) == []
    assert verify(bench.store) == []
