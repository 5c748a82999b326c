"""Decides whether a model version becomes champion, records the decision and its reasons, and moves the alias.

decision = decide_in_flow(recipe, registry, version)        # in a flow, with approval if the recipe requires it
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
    """The decision about a version, and its reasons.

    `against` is the version number of the champion that it was compared with, or "". `outcome` is PROMOTED, FORCED,
    REFUSED, DECLINED or ALREADY_CHAMPION.
    """

    version: Version
    against: str
    outcome: str
    reasons: tuple[str, ...]
    rows: tuple[VerdictRow, ...]

    @property
    def is_champion(self) -> bool:
        """True if the version has the alias `champion` after the decision."""
        return self.outcome in (PROMOTED, FORCED, ALREADY_CHAMPION)

    @property
    def sentence(self) -> str:
        """The decision in one sentence."""
        return f"{self.version}: {self.outcome}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class PromotionRequest:
    """A requested promotion: the user or flow run that requests it, and whether and for what reason it is forced."""

    by: str
    force: bool = False
    reason: str = ""


# ---- the decision ------------------------------------------------------------------------------------------


def examine(registry: ModelRegistry, version: Version, rules: GateSettings) -> tuple[Verdict, Version | None]:
    """Returns the gate's verdict on a version, and the current champion or None. Changes nothing."""
    champions = registry.champions(version.name)
    wanted = protocols_by_set(version)
    now = registry.champion(version.name)
    past = [_comparable(one, wanted, strict=one == now) for one in champions]
    return promotion_verdict(newest_results(version), past, rules), now


def _comparable(champion: Version, wanted: Mapping[str, str], *, strict: bool) -> list[SetResult]:
    """Returns a champion's results that can be compared with the candidate's, which has the protocols `wanted`.

    For data sets without a result of the candidate, these are the champion's newest results. Scores that were not run
    are omitted. With `strict`, for the current champion, a data set that the champion was not scored on by the
    candidate's protocol is included without values, which blocks the promotion.
    """
    found = []
    for name, protocol in {**protocols_by_set(champion), **wanted}.items():
        result = result_on(champion, name, protocol)
        if result is None and strict:
            reason = (
                f"{champion}, the champion, has no score by this protocol; score it with the same recipe "
                f"(`distil score {champion.uri} RECIPE.toml`), or use --force"
            )
            found.append(SetResult(name, "", (), reason))
        elif result is not None and result.was_run:
            found.append(result)
    return found


@contextmanager
def promotion_lock(recipe: Recipe, model: str) -> Iterator[None]:
    """Holds the lock under which only one process of this home at a time decides about the model."""
    with acquire(Path(recipe.home) / "run" / f"promote-{model}.lock"):
        yield


def decide(recipe: Recipe, registry: ModelRegistry, version: Version, request: PromotionRequest) -> GateDecision:
    """Decides by the gate, records the decision and moves the alias, under the promotion lock.

    RetryableError: MLflow does not respond, or another process moved the alias meanwhile; the retry decides again.
    """
    with promotion_lock(recipe, version.name):
        version = registry.version(version.name, version.version)
        verdict, champion = examine(registry, version, recipe.gate)
        against = champion.version if champion else ""
        if champion == version:
            return GateDecision(version, against, ALREADY_CHAMPION, ("it is already the champion",), verdict.rows)
        forced = request.force and not verdict.promote
        outcome = PROMOTED if verdict.promote else FORCED if forced else REFUSED
        reasons = (f"{request.reason} (against the gate: {'; '.join(verdict.reasons)})",) if forced else verdict.reasons
        decision = GateDecision(version, against, outcome, reasons, verdict.rows)
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        record_decision(registry, decision, request, now)
        # Tags are set first: if the process dies in between, the version is not champion and the next call decides.
        if decision.is_champion:
            registry.set_champion(version, now, champion)
        return decision


def record_decision(registry: ModelRegistry, decision: GateDecision, request: PromotionRequest, when: str) -> None:
    """Stores a decision as tags of the version, replacing those of an earlier decision."""
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
    """Decides about a version inside a flow, and publishes the decision. With gate.approval, a user must approve first.

    The promotion lock is not held while the flow waits. After approval the gate decides again, against the champion at
    that time.
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
    """Pauses the flow for approval if the version passes the gate. Returns the decision if declined, else None."""
    version = registry.version(version.name, version.version)
    verdict, champion = examine(registry, version, recipe.gate)
    if not verdict.promote or champion == version:
        return None
    answer = ask_for_approval(f"{version} passed the gate", verdict.reasons, recipe.gate.approval_hours)
    if answer.approve:
        registry.tag_version(version, {"distil.gate.approved_by": answer.by, "distil.gate.approval": answer.reason})
        return None
    reason = f"declined by {answer.by or 'an unnamed user'}: {answer.reason or 'no reason given'}"
    against = champion.version if champion else ""
    decision = GateDecision(version, against, DECLINED, (reason,), verdict.rows)
    record_decision(registry, decision, request, datetime.now(UTC).isoformat(timespec="microseconds"))
    return decision


def publish_decision(decision: GateDecision) -> None:
    """Publishes the decision and its table as a Prefect artifact of the current run."""
    title = f"{decision.version}: {decision.outcome}"
    text = markdown(Table(title, {"Gate": gate_rows(decision)}), decision_table(decision.rows))
    create_markdown_artifact(text, "gate", decision.sentence[:250])


def gate_rows(decision: GateDecision) -> Rows:
    """Returns the decision as rows of a table."""
    against = f"compared with version {decision.against}" if decision.against else "no champion so far"
    return [("decision", f"{decision.outcome}, {against}"), ("reasons", "; ".join(decision.reasons))]


def decision_table(rows: Sequence[VerdictRow]) -> Table:
    """Returns a table with one row per data set: candidate, best result so far, tolerance and outcome."""
    lines = []
    for row in rows:
        figures = [f"{value:.4f}" if value is not None else "–" for value in (row.candidate, row.best, row.tolerance)]
        lines.append([row.set_name, row.metric, *figures, "passed" if row.passed else "failed"])
    return Table("Data sets", {"": lines}, ("data set", "metric", "candidate", "best so far", "tolerance", "outcome"))


def requester() -> str:
    """Returns a name for the current flow run, or the user outside of a flow, as the requester of a promotion."""
    run = runtime.flow_run.id
    return f"Prefect flow run {run}" if run else user()


def verdict_rows(rows: Sequence[VerdictRow]) -> Rows:
    """Returns one row per data set: passed or failed, and why."""
    return [(row.set_name, f"{'passed' if row.passed else 'failed'}: {row.note}") for row in rows]
