"""Promotion: the gate's word on a version, kept as tags and as a Prefect artifact, and the alias `champion`.

    distil promote RECIPE.toml [--version V] [--force --reason "..."]
    flows/promote.py:promote                    entry point of the deployments `promote/NAME` (queue `promote`)
    judgement = gate(recipe, registry, version) the same inside `distill`, after its scores

All that a judgement needs is in MLflow: `record_standings` keeps the deciding figures as tags of the version. MLflow's
aliases have no compare-and-set: below one home promotions take turns by a file lock; among machines the champion is
looked at again right before the alias is moved, and if it is another one the candidate is judged anew.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import State, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, Failed

from flows.approval import ask
from flows.bind import bound_flow, run_one
from flows.home import user
from flows.registry import Registry, Version, open_registry
from flows.report import Rows, TextTable, markdown_sheet, markdown_table, show_sheet
from storage.error import FatalError
from tasks.config import Gate, Recipe
from tasks.gate import Row, Verdict, judge
from tasks.recipe import placed
from tasks.standing import NOT_RUN, Standing

STANDING = "distil.standing."
"""Tag of a standing: STANDING + set + "." + name of the protocol."""
PROTOCOL = "distil.protocol."
"""Tag that says by which protocol a set was scored last: PROTOCOL + set."""
PROTOCOL_DIGITS = 12
PROMOTED, FORCED, REFUSED, DECLINED, STANDS = "promoted", "forced", "refused", "declined", "champion already"


@dataclass(frozen=True)
class Judgement:
    """What was decided about a version, against which champion ("" for none), and why."""

    version: Version
    against: str
    decision: str
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def is_champion(self) -> bool:
        """Whether the version has the alias now."""
        return self.decision in (PROMOTED, FORCED, STANDS)

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.version}: {self.decision}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Order:
    """Who asks for a promotion; with `force` whatever the gate says, for `reason`."""

    by: str
    force: bool = False
    reason: str = ""


# ---- standings ---------------------------------------------------------------------------------------------


def record_standings(
    registry: Registry, version: Version, standings: Sequence[Standing], protocols: Mapping[str, str]
) -> Version:
    """Keeps standings as tags of a version, each under the protocol of its set (any long hash); older ones stay.

    Only what was once not run and is no longer asked for is forgotten: it must not block.
    """
    asked = {standing.set_name for standing in standings}
    lacked = [name for name, protocol in protocols_by_set(version).items() if protocol == NOT_RUN]
    tags = {f"{PROTOCOL}{name}": "" for name in lacked if name not in asked}
    for standing in standings:
        name, protocol = standing.set_name, protocols[standing.set_name][:PROTOCOL_DIGITS]
        tags[f"{STANDING}{name}.{protocol}"] = json.dumps(standing.to_json(), ensure_ascii=False)
        tags[f"{PROTOCOL}{name}"] = protocol
    registry.tag_version(version, tags)
    return replace(version, tags={name: value for name, value in {**version.tags, **tags}.items() if value})


def protocols_by_set(version: Version) -> dict[str, str]:
    """For each set of a version the protocol by which it was scored last."""
    return {tag.removeprefix(PROTOCOL): value for tag, value in version.tags.items() if tag.startswith(PROTOCOL)}


def standing_of(version: Version, set_name: str, protocol: str) -> Standing | None:
    """A version's standing on a set by one protocol, or None where it was not scored so."""
    text = version.tags.get(f"{STANDING}{set_name}.{protocol[:PROTOCOL_DIGITS]}")
    return Standing.from_json(json.loads(text)) if text else None


def standings_of(version: Version) -> list[Standing]:
    """A version's newest standing on each set."""
    found = (standing_of(version, name, protocol) for name, protocol in protocols_by_set(version).items())
    return [standing for standing in found if standing]


# ---- the decision ------------------------------------------------------------------------------------------


def examine(registry: Registry, version: Version, rules: Gate) -> tuple[Verdict, Version | None]:
    """The gate's word on a version, and the champion that stands now; changes nothing."""
    champions = registry.champions(version.name)
    wanted = protocols_by_set(version)
    now = registry.champion(version.name)
    past = [_comparable(one, wanted, strict=one == now) for one in champions]
    return judge(standings_of(version), past, rules), now


def _comparable(champion: Version, wanted: Mapping[str, str], *, strict: bool) -> list[Standing]:
    """A champion's standings by the protocols of the candidate; the newest on sets that the candidate has not.

    What was not run cannot be compared with and is left out. `strict`, for the present champion: a set that it was
    never scored on by this protocol stays, without values, and blocks.
    """
    found = []
    for name, protocol in {**protocols_by_set(champion), **wanted}.items():
        standing = standing_of(champion, name, protocol)
        if standing is None and strict:
            reason = (
                f"{champion}, the champion, has no score by this protocol; "
                f"score it by the same recipe (`distil score {champion.uri} RECIPE.toml`), or force"
            )
            found.append(Standing(name, "", (), reason))
        elif standing is not None and standing.was_run:
            found.append(standing)
    return found


@contextmanager
def turn(recipe: Recipe, model: str) -> Iterator[None]:
    """Waits until nobody else below this home decides about the model, and keeps others out."""
    path = Path(recipe.home) / "run" / f"promote-{model}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go when the file is closed or the process dies
        yield


def decide(recipe: Recipe, registry: Registry, version: Version, order: Order) -> Judgement:
    """Judges, records the decision and moves the alias, in turn. RetryableError if MLflow is away or somebody
    else moved the alias meanwhile: then it is judged anew.
    """
    with turn(recipe, version.name):
        version = registry.version(version.name, version.version)
        verdict, champion = examine(registry, version, recipe.gate)
        against = champion.version if champion else ""
        if champion == version:
            return Judgement(version, against, STANDS, ("it has the alias already",), verdict.rows)
        forced = order.force and not verdict.promote
        decision = PROMOTED if verdict.promote else FORCED if forced else REFUSED
        reasons = (f"{order.reason} (against the gate: {'; '.join(verdict.reasons)})",) if forced else verdict.reasons
        judgement = Judgement(version, against, decision, reasons, verdict.rows)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        record(registry, judgement, order, now)
        # The tags come first: killed in between, the version is not champion and the next call decides again.
        if judgement.is_champion:
            registry.crown(version, now, champion)
        return judgement


def record(registry: Registry, judgement: Judgement, order: Order, when: str) -> None:
    """Keeps a decision as tags of the version; the newest replaces the one before."""
    tags = {
        "decision": judgement.decision,
        "reason": "; ".join(judgement.reasons),
        "table": json.dumps([row.to_json() for row in judgement.rows], ensure_ascii=False),
        "protocol": json.dumps(protocols_by_set(judgement.version)),
        "against": judgement.against or "no champion",
        "by": order.by,
        "at": when,
        "prefect_run_url": str(runtime.flow_run.ui_url or ""),
    }
    registry.tag_version(judgement.version, {f"distil.gate.{name}": value for name, value in tags.items()})


# ---- in a flow ---------------------------------------------------------------------------------------------


def gate(recipe: Recipe, registry: Registry, version: Version, order: Order | None = None) -> Judgement:
    """Decides about a version inside a flow; where the recipe says so, a person is asked before it is promoted.

    Nobody waits in turn for that person: afterwards it is judged again, against the champion of that moment.
    """
    order = order or Order(by=_who())
    if recipe.gate.approval and not order.force:
        judgement = _asked(recipe, registry, version, order)
        if judgement:
            publish(judgement)
            return judgement
    judgement = run_one("gate", str(version), partial(decide, recipe, registry, version, order), recipe.run)
    publish(judgement)
    return judgement


def _asked(recipe: Recipe, registry: Registry, version: Version, order: Order) -> Judgement | None:
    """Pauses the flow for a person's word if the gate would promote; the judgement if that word is no."""
    version = registry.version(version.name, version.version)
    verdict, champion = examine(registry, version, recipe.gate)
    if not verdict.promote or champion == version:
        return None
    answer = ask(f"{version} passed the gate", verdict.reasons, recipe.gate.approval_hours)
    if answer.approve:
        registry.tag_version(version, {"distil.gate.approved_by": answer.by, "distil.gate.approval": answer.reason})
        return None
    reason = f"declined by {answer.by or 'nobody named'}: {answer.reason or 'no reason given'}"
    against = champion.version if champion else ""
    judgement = Judgement(version, against, DECLINED, (reason,), verdict.rows)
    record(registry, judgement, order, datetime.now(UTC).isoformat(timespec="microseconds"))
    return judgement


def publish(judgement: Judgement) -> None:
    """The decision with its table as a Prefect artifact of this run."""
    create_markdown_artifact(
        markdown_sheet(f"{judgement.version}: {judgement.decision}", {"Gate": gate_rows(judgement)})
        + "\n\n"
        + markdown_table(table(judgement.rows)),
        "gate",
        judgement.sentence[:250],
    )


def gate_rows(judgement: Judgement) -> Rows:
    """The decision as rows of a sheet."""
    against = f"against version {judgement.against}" if judgement.against else "there was no champion"
    return [("decision", f"{judgement.decision}, {against}"), ("because", "; ".join(judgement.reasons))]


def table(rows: Sequence[Row]) -> TextTable:
    """Set by set."""
    lines = []
    for row in rows:
        figures = [f"{value:.4f}" if value is not None else "–" for value in (row.candidate, row.best, row.tolerance)]
        lines.append([row.set_name, row.metric, *figures, "passed" if row.passed else "refused"])
    return ["set", "metric", "candidate", "best so far", "tolerance", ""], lines


def _who() -> str:
    run = runtime.flow_run.id
    return f"Prefect flow run {run}" if run else user()


# ---- the flow ----------------------------------------------------------------------------------------------


def run_promote(
    recipe: Recipe, model: str = "", version: str = "", force: bool = False, reason: str = "", by: str = ""
) -> State[Any]:
    """Makes a registered version the champion if the gate lets it through; the decision is kept with the version.

    Args:
        recipe: Whose gate rules and whose MLflow are taken.
        model: Name of the registered model, to make sure; empty means the recipe's own, and no other will do.
        version: Number of the version; empty means the challenger.
        force: Make it the champion whatever the gate says; needs a reason.
        reason: Why it is forced; kept with the version.
        by: Who asks; empty means this flow run.
    """
    if force and not reason.strip():
        raise FatalError("force needs a reason, which is kept with the version; give --reason")
    recipe = placed(recipe)
    own = recipe.register_as.name
    if model and model != own:
        raise FatalError(
            f"recipe {recipe.name} registers {own}, so its gate says nothing about {model}; name the recipe of {model}"
        )
    registry = open_registry(recipe)
    candidate = registry.version(own, version)
    judgement = gate(recipe, registry, candidate, Order(by or _who(), force, reason.strip()))
    show_sheet(str(candidate), {"Gate": gate_rows(judgement), "Sets": set_rows(judgement.rows)})
    if judgement.is_champion:
        return Completed(message=judgement.sentence)
    return Failed(name="Refused", message=judgement.sentence)


promote = bound_flow(run_promote, "promote", run_name="{name} {model} {version}")


def set_rows(rows: Sequence[Row]) -> Rows:
    """Set by set as rows of a sheet."""
    return [(row.set_name, f"{'passed' if row.passed else 'refused'}: {row.note}") for row in rows]
