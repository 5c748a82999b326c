"""Decides whether a version becomes champion, records the decision and its reasons, and moves the alias."""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prefect import runtime
from prefect.artifacts import create_markdown_artifact

from flows.home import user
from flows.pipeline.task_policy import run_one
from flows.release.approval import ask_for_approval
from flows.release.version_results import newest_results, protocols_by_set, result_on
from flows.tracking.registry import ModelRegistry, Version
from flows.views.tables import Rows, TextTable, markdown_sheet, markdown_table
from tasks.recipe.config import GateSettings, Recipe
from tasks.release.gate import Row, Verdict, judge
from tasks.release.results import SetResult

PROMOTED, FORCED, REFUSED, DECLINED, ALREADY_CHAMPION = "promoted", "forced", "refused", "declined", "champion already"


@dataclass(frozen=True)
class GateDecision:
    """What was decided about a version, against which champion ("" for none), and why."""

    version: Version
    against: str
    decision: str
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def is_champion(self) -> bool:
        """Whether the version has the alias now."""
        return self.decision in (PROMOTED, FORCED, ALREADY_CHAMPION)

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.version}: {self.decision}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class PromotionRequest:
    """Who asks for a promotion; with `force` whatever the gate says, for `reason`."""

    by: str
    force: bool = False
    reason: str = ""


# ---- the decision ------------------------------------------------------------------------------------------


def examine(registry: ModelRegistry, version: Version, rules: GateSettings) -> tuple[Verdict, Version | None]:
    """The gate's word on a version, and the champion that stands now; changes nothing."""
    champions = registry.champions(version.name)
    wanted = protocols_by_set(version)
    now = registry.champion(version.name)
    past = [_comparable(one, wanted, strict=one == now) for one in champions]
    return judge(newest_results(version), past, rules), now


def _comparable(champion: Version, wanted: Mapping[str, str], *, strict: bool) -> list[SetResult]:
    """A champion's standings by the protocols of the candidate; the newest on sets that the candidate has not.

    What was not run cannot be compared with and is left out. `strict`, for the present champion: a set that it was
    never scored on by this protocol stays, without values, and blocks.
    """
    found = []
    for name, protocol in {**protocols_by_set(champion), **wanted}.items():
        standing = result_on(champion, name, protocol)
        if standing is None and strict:
            reason = (
                f"{champion}, the champion, has no score by this protocol; "
                f"score it by the same recipe (`distil score {champion.uri} RECIPE.toml`), or force"
            )
            found.append(SetResult(name, "", (), reason))
        elif standing is not None and standing.was_run:
            found.append(standing)
    return found


@contextmanager
def promotion_lock(recipe: Recipe, model: str) -> Iterator[None]:
    """Waits until nobody else below this home decides about the model, and keeps others out."""
    path = Path(recipe.home) / "run" / f"promote-{model}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system lets go when the file is closed or the process dies
        yield


def decide(recipe: Recipe, registry: ModelRegistry, version: Version, order: PromotionRequest) -> GateDecision:
    """Judges, records the decision and moves the alias, in turn. RetryableError if MLflow is away or somebody
    else moved the alias meanwhile: then it is judged anew.
    """
    with promotion_lock(recipe, version.name):
        version = registry.version(version.name, version.version)
        verdict, champion = examine(registry, version, recipe.gate)
        against = champion.version if champion else ""
        if champion == version:
            return GateDecision(version, against, ALREADY_CHAMPION, ("it has the alias already",), verdict.rows)
        forced = order.force and not verdict.promote
        decision = PROMOTED if verdict.promote else FORCED if forced else REFUSED
        reasons = (f"{order.reason} (against the gate: {'; '.join(verdict.reasons)})",) if forced else verdict.reasons
        judgement = GateDecision(version, against, decision, reasons, verdict.rows)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        record_decision(registry, judgement, order, now)
        # The tags come first: killed in between, the version is not champion and the next call decides again.
        if judgement.is_champion:
            registry.set_champion(version, now, champion)
        return judgement


def record_decision(registry: ModelRegistry, judgement: GateDecision, order: PromotionRequest, when: str) -> None:
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


def decide_in_flow(
    recipe: Recipe, registry: ModelRegistry, version: Version, order: PromotionRequest | None = None
) -> GateDecision:
    """Decides about a version inside a flow; where the recipe says so, a person is asked before it is promoted.

    Nobody waits in turn for that person: afterwards it is judged again, against the champion of that moment.
    """
    order = order or PromotionRequest(by=_who())
    if recipe.gate.approval and not order.force:
        judgement = _ask_for_approval(recipe, registry, version, order)
        if judgement:
            publish_decision(judgement)
            return judgement
    judgement = run_one("gate", str(version), partial(decide, recipe, registry, version, order), recipe.run)
    publish_decision(judgement)
    return judgement


def _ask_for_approval(
    recipe: Recipe, registry: ModelRegistry, version: Version, order: PromotionRequest
) -> GateDecision | None:
    """Pauses the flow for a person's word if the gate would promote; the judgement if that word is no."""
    version = registry.version(version.name, version.version)
    verdict, champion = examine(registry, version, recipe.gate)
    if not verdict.promote or champion == version:
        return None
    answer = ask_for_approval(f"{version} passed the gate", verdict.reasons, recipe.gate.approval_hours)
    if answer.approve:
        registry.tag_version(version, {"distil.gate.approved_by": answer.by, "distil.gate.approval": answer.reason})
        return None
    reason = f"declined by {answer.by or 'nobody named'}: {answer.reason or 'no reason given'}"
    against = champion.version if champion else ""
    judgement = GateDecision(version, against, DECLINED, (reason,), verdict.rows)
    record_decision(registry, judgement, order, datetime.now(UTC).isoformat(timespec="microseconds"))
    return judgement


def publish_decision(judgement: GateDecision) -> None:
    """The decision with its table as a Prefect artifact of this run."""
    create_markdown_artifact(
        markdown_sheet(f"{judgement.version}: {judgement.decision}", {"Gate": gate_rows(judgement)})
        + "\n\n"
        + markdown_table(decision_table(judgement.rows)),
        "gate",
        judgement.sentence[:250],
    )


def gate_rows(judgement: GateDecision) -> Rows:
    """The decision as rows of a sheet."""
    against = f"against version {judgement.against}" if judgement.against else "there was no champion"
    return [("decision", f"{judgement.decision}, {against}"), ("because", "; ".join(judgement.reasons))]


def decision_table(rows: Sequence[Row]) -> TextTable:
    """Set by set."""
    lines = []
    for row in rows:
        figures = [f"{value:.4f}" if value is not None else "–" for value in (row.candidate, row.best, row.tolerance)]
        lines.append([row.set_name, row.metric, *figures, "passed" if row.passed else "refused"])
    return ["set", "metric", "candidate", "best so far", "tolerance", ""], lines


def _who() -> str:
    run = runtime.flow_run.id
    return f"Prefect flow run {run}" if run else user()


def set_rows(rows: Sequence[Row]) -> Rows:
    """Set by set as rows of a sheet."""
    return [(row.set_name, f"{'passed' if row.passed else 'refused'}: {row.note}") for row in rows]
