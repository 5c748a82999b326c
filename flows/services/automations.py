"""Creates automations in the Prefect server that mark runs without a process Crashed and report failed runs.

    ensure_dead_run_automation(client)                             # creates "distil: mark dead runs"
    ensure_failure_automation(client, "custom-webhook/on-call")    # creates "distil: tell of failures"

`distil deploy` creates the first, and with --notify the second. They apply to runs with the tag `distil`, which all our
deployments have. An existing automation is updated only if its rule differs, since an update discards the heartbeats
that the server waits for.

A dead run sends no heartbeat, and the server marks it. A stale run (stale_runs.py) belongs to an earlier worker of the
same name, and the next worker marks it.
"""

from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events import AutomationCore, ChangeFlowRunState, EventTrigger, SendNotification
from prefect.events.schemas.automations import Posture
from prefect.exceptions import ObjectNotFound

from storage.errors import FatalError

DEAD_AFTER = timedelta(seconds=90)
"""Three heartbeats at intervals of 30 s, the shortest that Prefect allows."""

HEARTBEAT = "prefect.flow-run.heartbeat"

FAILED = {"prefect.flow-run.Failed", "prefect.flow-run.TimedOut", "prefect.flow-run.Crashed"}

ENDED = FAILED | {"prefect.flow-run.Completed", "prefect.flow-run.Cancelled"}

OUR_RUNS: dict[str, Any] = {
    "match": {"prefect.resource.id": "prefect.flow-run.*"},
    "match_related": {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.distil"},
    "for_each": {"prefect.resource.id"},
}

SUBJECT = "{{ flow.name }}/{{ flow_run.name }}: {{ flow_run.state.name }}"

BODY = """{{ flow_run.state.message }}

{{ flow_run|ui_url or flow_run.id }}"""
"""The URL requires PREFECT_UI_URL or PREFECT_API_URL in the server's environment; without them the run id is sent."""


def ensure_dead_run_automation(client: SyncPrefectClient) -> None:
    """Creates the automation that marks runs Crashed if they neither send a heartbeat nor end within DEAD_AFTER."""
    trigger = EventTrigger(
        **OUR_RUNS,
        posture=Posture.Proactive,
        after={HEARTBEAT},
        expect={HEARTBEAT, *ENDED},
        threshold=1,
        within=DEAD_AFTER,
    )
    crash = ChangeFlowRunState(
        state=StateType.CRASHED,
        message=f"the process of this run sent no heartbeat for {DEAD_AFTER.seconds} seconds; "
        "retry the run to resume it from the store",
    )
    _create_or_update(
        client,
        AutomationCore(
            name="distil: mark dead runs",
            description="Marks a run Crashed if its process has died, so that it can be retried and blocks no queue.",
            trigger=trigger,
            actions=[crash],
        ),
    )


def ensure_failure_automation(client: SyncPrefectClient, block: str) -> None:
    """Creates the automation that reports each failed or crashed run through a notification block TYPE/NAME.

    FatalError if the block does not exist or cannot send notifications.
    """
    send = SendNotification(block_document_id=_notifier(client, block).id, subject=SUBJECT, body=BODY)
    _create_or_update(
        client,
        AutomationCore(
            name="distil: tell of failures",
            description=f"Notifies {block} of runs that failed or crashed.",
            trigger=EventTrigger(**OUR_RUNS, posture=Posture.Reactive, expect=FAILED, threshold=1),
            actions=[send],
        ),
    )


def _notifier(client: SyncPrefectClient, block: str) -> BlockDocument:
    """Returns the block TYPE/NAME. FatalError if it does not exist or cannot send notifications."""
    kind, _, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        raise FatalError(
            f"the Prefect server has no block {block}; create one under Blocks in its UI and pass it as TYPE/NAME, "
            "such as custom-webhook/on-call"
        ) from error
    schema = document.block_schema
    if schema is None or "notify" not in schema.capabilities:
        raise FatalError(
            f"the block {block} cannot send notifications; use a notification block such as custom-webhook/NAME or "
            "slack-webhook/NAME"
        )
    return document


def _create_or_update(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Creates the automation, or updates an existing one of the same name if its rule differs."""
    existing = client.read_automations_by_name(wanted.name)
    if not existing:
        client.create_automation(wanted)
    elif _rule(existing[0]) != _rule(wanted):
        client.update_automation(existing[0].id, wanted)


def _rule(automation: AutomationCore) -> dict[str, Any]:
    """Returns the fields to compare. `enabled` is not compared, so that a user can turn an automation off."""
    return automation.model_dump(include={"description", "trigger", "actions"})
