"""A synthetic corpus: a recipe, and a store with receipts of all artifacts from sources to targets, one byte each.

    make_paper(folder, folder / "store", shards=2000)
    recipe = recipe_of(folder, str(folder / "store"))

For the benchmarks that measure bookkeeping alone: listing, planning, status, submitting.
"""

from pathlib import Path
from typing import Any

from flows.pipeline.preparation import prepare_corpus
from storage import layout
from storage.artifact import DataFile, Receipt, Ref, digest_of_files
from storage.fingerprint import sha256_bytes
from storage.store import Store
from tasks.corpus.snapshot import remember_source_content
from tasks.lineage import Workspace
from tasks.recipe.config import Recipe
from tasks.recipe.load import make_recipe
from tests.benchmarks.results import TEACHER
from tests.harness.tiny import write_oscar

SOURCES = 20
BYTE = b"x"


def recipe_of(folder: Path, root: str) -> Recipe:
    """A recipe over the synthetic corpus; `root` is the address of the store."""
    values = {
        "name": "scale",
        "home": str(folder / "home"),
        "store": root,
        "corpus": {"url": str(folder / "corpus")},
        "blocks": {"length": 128},
        "teacher": {"model": str(TEACHER)},
    }
    return make_recipe(values, "benchmark")


def make_paper(folder: Path, root: Path, shards: int) -> None:
    """Writes receipts and data of all artifacts from sources to targets, as a complete run leaves them; no fsync."""
    write_oscar(folder / "corpus", parts=SOURCES, texts=1)
    recipe, store = recipe_of(folder, str(root)), Store(root)
    for source in Workspace(store, recipe).lineage.snapshot.sources:
        remember_source_content(store, source, sha256_bytes(source.name.encode()))
    for number, (source, ref) in enumerate(Workspace(store, recipe).lineage.sources):
        assert ref
        own = range(number, shards, SOURCES)
        listed = [{"key": f"{one:064x}", "label": f"{source.label}-{one:04d}", "rows": 1, "bytes": 1} for one in own]
        _write(store, ref, {"shards": listed, "heldout": []})
    for _ in range(2):  # the calibration sample is only known once the blocks exist
        lineage = Workspace(store, recipe).lineage
        for refs in lineage.stages().values():
            for ref in store.missing(refs):
                _write(store, ref)
        prepare_corpus(Workspace(store, recipe))


def _write(store: Store, ref: Ref, info: dict[str, Any] | None = None) -> None:
    files = (DataFile("data", len(BYTE), sha256_bytes(BYTE)),)
    receipt = Receipt(
        kind=ref.kind,
        key=ref.key,
        label=ref.label,
        schema=1,
        files=files,
        rows=1,
        tokens=1,
        parents=(),
        settings={},
        info=info or {},
        versions={},
        timings={},
        host="paper",
        created="2026-01-01T00:00:00+00:00",
    )
    contents = {
        f"{layout.content_folder(ref.kind, ref.key, digest_of_files(files))}/data": BYTE,
        layout.receipt_path(ref.kind, ref.key): receipt.to_json(),
    }
    for name, data in contents.items():
        path = Path(store.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
