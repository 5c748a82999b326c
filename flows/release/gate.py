"""Decides whether a model version becomes champion, records the decision and its reasons, and moves the alias.

decision = decide_in_flow(recipe, registry, version)        # in a flow, with approval where the recipe requires it
decision = decide(recipe, registry, version, request)       # the gate alone
"""

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
from flows.tracking.model_registry import ModelRegistry, Version
from flows.views.tables import Rows, Table, markdown
from storage.files.lock import acquire
from tasks.recipe.config import GateSettings, Recipe
from tasks.release.promotion_rule import Verdict, VerdictRow, promotion_verdict
from tasks.release.results import SetResult

PROMOTED, FORCED, REFUSED, DECLINED, ALREADY_CHAMPION = "promoted", "forced", "refused", "declined", "champion already"


@dataclass(frozen=True)
class GateDecision:
    """The decision about a version and its reasons; `against` is the champion's version number, or "".

    `outcome` is one of PROMOTED, FORCED, REFUSED, DECLINED, ALREADY_CHAMPION.
    """

    version: Version
    against: str
    outcome: str
    reasons: tuple[str, ...]
    rows: tuple[VerdictRow, ...]

    @property
    def is_champion(self) -> bool:
        """Whether the version has the alias now."""
        return self.outcome in (PROMOTED, FORCED, ALREADY_CHAMPION)

    @property
    def sentence(self) -> str:
        """The decision in one sentence."""
        return f"{self.version}: {self.outcome}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class PromotionRequest:
    """A requested promotion: by which user or flow run, and with `force` even if the gate refuses, for `reason`."""

    by: str
    force: bool = False
    reason: str = ""


# ---- the decision ------------------------------------------------------------------------------------------


def examine(registry: ModelRegistry, version: Version, rules: GateSettings) -> tuple[Verdict, Version | None]:
    """The gate's verdict on a version, and the present champion. Changes nothing."""
    champions = registry.champions(version.name)
    wanted = protocols_by_set(version)
    now = registry.champion(version.name)
    past = [_comparable(one, wanted, strict=one == now) for one in champions]
    return promotion_verdict(newest_results(version), past, rules), now


def _comparable(champion: Version, wanted: Mapping[str, str], *, strict: bool) -> list[SetResult]:
    """A champion's results by the candidate's protocols; on sets that the candidate lacks, its newest results.

    Results that were not run are left out. `strict`, for the present champion: a set without a score by this protocol
    is included without values, and blocks the promotion.
    """
    found = []
    for name, protocol in {**protocols_by_set(champion), **wanted}.items():
        result = result_on(champion, name, protocol)
        if result is None and strict:
            reason = (
                f"{champion}, the champion, has no score by this protocol; "
                f"score it by the same recipe (`distil score {champion.uri} RECIPE.toml`), or force"
            )
            found.append(SetResult(name, "", (), reason))
        elif result is not None and result.was_run:
            found.append(result)
    return found


@contextmanager
def promotion_lock(recipe: Recipe, model: str) -> Iterator[None]:
    """Lets one process of this home at a time decide about the model; the others wait."""
    with acquire(Path(recipe.home) / "run" / f"promote-{model}.lock"):
        yield


def decide(recipe: Recipe, registry: ModelRegistry, version: Version, request: PromotionRequest) -> GateDecision:
    """Decides by the gate, records the decision and moves the alias, one process at a time.

    RetryableError: MLflow does not answer, or another process moved the alias meanwhile; the retry decides again.
    """
    with promotion_lock(recipe, version.name):
        version = registry.version(version.name, version.version)
        verdict, champion = examine(registry, version, recipe.gate)
        against = champion.version if champion else ""
        if champion == version:
            return GateDecision(version, against, ALREADY_CHAMPION, ("it is the champion already",), verdict.rows)
        forced = request.force and not verdict.promote
        outcome = PROMOTED if verdict.promote else FORCED if forced else REFUSED
        reasons = (f"{request.reason} (against the gate: {'; '.join(verdict.reasons)})",) if forced else verdict.reasons
        decision = GateDecision(version, against, outcome, reasons, verdict.rows)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        record_decision(registry, decision, request, now)
        # Tags first: if the process dies in between, the version is not champion and the next call decides again.
        if decision.is_champion:
            registry.set_champion(version, now, champion)
        return decision


def record_decision(registry: ModelRegistry, decision: GateDecision, request: PromotionRequest, when: str) -> None:
    """Stores a decision as tags of the version, replacing an earlier one."""
    tags = {
        "decision": decision.outcome,
        "reason": "; ".join(decision.reasons),
        "table": json.dumps([row.to_json() for row in decision.rows], ensure_ascii=False),
        "protocol": json.dumps(protocols_by_set(decision.version)),
        "against": decision.against or "no champion",
        "by": request.by,
        "at": when,
        "prefect_run_url": str(runtime.flow_run.ui_url or ""),
    }
    registry.tag_version(decision.version, {f"distil.gate.{name}": value for name, value in tags.items()})


# ---- in a flow ---------------------------------------------------------------------------------------------


def decide_in_flow(
    recipe: Recipe, registry: ModelRegistry, version: Version, request: PromotionRequest | None = None
) -> GateDecision:
    """Decides about a version inside a flow; with gate.approval a person approves the promotion first.

    The lock is free while the flow waits; afterwards the gate decides again, against the champion of that moment.
    """
    request = request or PromotionRequest(by=requester())
    if recipe.gate.approval and not request.force:
        decision = _ask_for_approval(recipe, registry, version, request)
        if decision:
            publish_decision(decision)
            return decision
    decision = run_one("gate", str(version), partial(decide, recipe, registry, version, request), recipe.run)
    publish_decision(decision)
    return decision


def _ask_for_approval(
    recipe: Recipe, registry: ModelRegistry, version: Version, request: PromotionRequest
) -> GateDecision | None:
    """Pauses the flow for approval if the gate would promote; returns the decision if it is declined, else None."""
    version = registry.version(version.name, version.version)
    verdict, champion = examine(registry, version, recipe.gate)
    if not verdict.promote or champion == version:
        return None
    answer = ask_for_approval(f"{version} passed the gate", verdict.reasons, recipe.gate.approval_hours)
    if answer.approve:
        registry.tag_version(version, {"distil.gate.approved_by": answer.by, "distil.gate.approval": answer.reason})
        return None
    reason = f"declined by {answer.by or 'an unnamed person'}: {answer.reason or 'no reason given'}"
    against = champion.version if champion else ""
    decision = GateDecision(version, against, DECLINED, (reason,), verdict.rows)
    record_decision(registry, decision, request, datetime.now(UTC).isoformat(timespec="microseconds"))
    return decision


def publish_decision(decision: GateDecision) -> None:
    """Publishes the decision and its table as a Prefect artifact of this run."""
    title = f"{decision.version}: {decision.outcome}"
    text = markdown(Table(title, {"Gate": gate_rows(decision)}), decision_table(decision.rows))
    create_markdown_artifact(text, "gate", decision.sentence[:250])


def gate_rows(decision: GateDecision) -> Rows:
    """The decision as rows of a table."""
    against = f"against version {decision.against}" if decision.against else "no champion so far"
    return [("decision", f"{decision.outcome}, {against}"), ("because", "; ".join(decision.reasons))]


def decision_table(rows: Sequence[VerdictRow]) -> Table:
    """One row per set: candidate, best result so far, tolerance."""
    lines = []
    for row in rows:
        figures = [f"{value:.4f}" if value is not None else "–" for value in (row.candidate, row.best, row.tolerance)]
        lines.append([row.set_name, row.metric, *figures, "passed" if row.passed else "refused"])
    return Table("Sets", {"": lines}, ("set", "metric", "candidate", "best so far", "tolerance", ""))


def requester() -> str:
    """The flow run that requests a promotion, or the user outside of a flow."""
    run = runtime.flow_run.id
    return f"Prefect flow run {run}" if run else user()


def set_rows(rows: Sequence[VerdictRow]) -> Rows:
    """One row per set: passed or refused, and why."""
    return [(row.set_name, f"{'passed' if row.passed else 'refused'}: {row.note}") for row in rows]
