"""What a recipe wants, what the store holds of it, what failed.

    rows = stage_rows(store, recipe)        # by stage: wanted, done, missing, failed, bytes

For `distil status`, `verify` and `gc`. Starts no server and imports no Prefect.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows import start
from flows.report import plain, size
from storage.artifact import Ref
from storage.error import FatalError
from storage.lease import read_on_lease
from storage.store import Store
from tasks.config import Recipe
from tasks.lineage import Lineage, trace

NAMES_SHOWN = 20


@dataclass(frozen=True)
class StageRow:
    """One stage: how many artifacts are wanted and done, labels of the missing, label and reason of the failed."""

    stage: str
    wanted: int
    done: int
    bytes: int
    missing: tuple[str, ...]
    failed: Mapping[str, str]


def stage_rows(store: Store, recipe: Recipe) -> list[StageRow]:
    """One row a stage of the chain, from two listings a kind. What has no key before
    something else is made is not in."""
    lineage = trace(store, recipe)
    unread = tuple(source.label for source, ref in lineage.sources if ref is None)
    rows = [_row(store, stage, refs, unread if stage == "source" else ()) for stage, refs in lineage.stages().items()]
    whole = lineage.shards and all(row.done == row.wanted for row in rows)
    model = start.model(recipe, lineage) if whole else None
    return [*rows, _row(store, "model", (model,) if model else (), ())]


def _row(store: Store, stage: str, refs: Iterable[Ref], unread: tuple[str, ...]) -> StageRow:
    """`unread` are labels of sources that have no key yet."""
    wanted = {ref.key: ref.label for ref in refs}
    there = store.sizes(stage)
    done = there.keys() & wanted.keys()
    failures = {failure.key: failure.message for failure in store.failures(stage)}
    absent = {key: label for key, label in wanted.items() if key not in done}
    return StageRow(
        stage=stage,
        wanted=len(wanted) + len(unread),
        done=len(done),
        bytes=sum(there[key] for key in done),
        missing=(*unread, *(label for key, label in absent.items() if key not in failures)),
        failed={label: failures[key] for key, label in absent.items() if key in failures},
    )


def model_ref(store: Store, recipe: Recipe, lineage: Lineage) -> Ref | None:
    """The model that the recipe ends with, once all that it is made of is there."""
    if not lineage.shards or lineage.lacks(store):
        return None
    return start.model(recipe, lineage)


def as_json(rows: Iterable[StageRow]) -> dict[str, object]:
    """The rows as plain values, by stage."""
    return {row.stage: {name: value for name, value in asdict(row).items() if name != "stage"} for row in rows}


def show(recipe: Recipe, rows: Iterable[StageRow]) -> None:
    """Prints the table, then the names of what is missing or failed."""
    rows = list(rows)
    console = Console()
    table = Table(title=f"{recipe.name}: {recipe.store}", title_justify="left")
    table.add_column("stage")
    for name in ("wanted", "done", "missing", "failed", "bytes"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = (row.wanted, row.done, len(row.missing), len(row.failed))
        table.add_row(row.stage, *(str(count) for count in counts), size(row.bytes))
    console.print(table)
    for row in rows:
        for label, reason in row.failed.items():
            console.print(f"failed   {escape(named(row.stage, label, reason))}", soft_wrap=True, highlight=False)
        for label in row.missing[:NAMES_SHOWN]:
            console.print(f"missing  {row.stage} {escape(label)}", soft_wrap=True, highlight=False)
        if len(row.missing) > NAMES_SHOWN:
            console.print(f"missing  {row.stage} and {len(row.missing) - NAMES_SHOWN} more")


def named(kind: str, label: str, reason: str) -> str:
    """The reason with the name of the artifact before it, unless it names it itself."""
    reason = plain(reason)  # it tells of files that others made
    return reason if reason.startswith(f"{kind} {label}") else f"{kind} {label}: {reason}"


def kept(store: Store, recipes: Iterable[Recipe]) -> set[tuple[str, str]]:
    """What `gc` must keep: all that the recipes want, their samples, every model and score, the checkpoints of
    trainings that have not ended, and what those read that go on, of whatever snapshot."""
    from tasks.checkpoint import owed  # deferred: torch takes seconds to import

    keep = {(kind, key) for kind in ("model", "scores") for key in store.keys(kind)}
    keep |= {("checkpoint", key) for key in owed(store)}
    keep |= read_on_lease(store)
    for recipe in recipes:
        lineage = trace(store, recipe)
        unread = [source.label for source, ref in lineage.sources if ref is None or not store.has(ref)]
        if unread:
            raise FatalError(
                f"recipe {recipe.name}: source {unread[0]} is not done, so it is not known what belongs to it and gc "
                "could drop too much; run `distil retry` first"
            )
        keep |= {(ref.kind, ref.key) for refs in lineage.stages().values() for ref in refs}
        keep |= {(ref.kind, ref.key) for ref in lineage.sample}
    return keep
