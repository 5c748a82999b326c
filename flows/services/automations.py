"""Automations of the Prefect server: mark runs Crashed whose process died, and send notifications of failed runs.

    mark_dead_runs(client)                                  # creates "distil: mark dead runs"
    notify_of_failures(client, "custom-webhook/on-call")    # creates "distil: tell of failures"

`distil deploy` creates both. They apply to runs with the tag `distil`, which all our deployments have. An existing
automation is updated only if it differs: an update discards the heartbeats that it waits for.
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
"""Three heartbeats of 30 s, the shortest interval that Prefect allows."""

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
"""The URL needs PREFECT_UI_URL (or PREFECT_API_URL) in the server's environment; without it the message has the id."""


def mark_dead_runs(client: SyncPrefectClient) -> None:
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
        message=f"the process of this run gave no sign of life for {DEAD_AFTER.seconds} seconds; "
        "retry it, and it resumes where it was",
    )
    _make(
        client,
        AutomationCore(
            name="distil: mark dead runs",
            description="Marks runs Crashed whose process has died, so that they can be retried and block no queue.",
            trigger=trigger,
            actions=[crash],
        ),
    )


def notify_of_failures(client: SyncPrefectClient, block: str) -> None:
    """Creates the automation that sends each failed or crashed run to a notification block TYPE/NAME.

    FatalError if the block does not exist or cannot notify.
    """
    send = SendNotification(block_document_id=_notifier(client, block).id, subject=SUBJECT, body=BODY)
    _make(
        client,
        AutomationCore(
            name="distil: tell of failures",
            description=f"Notifies {block} of runs that failed or crashed.",
            trigger=EventTrigger(**OUR_RUNS, posture=Posture.Reactive, expect=FAILED, threshold=1),
            actions=[send],
        ),
    )


def _notifier(client: SyncPrefectClient, block: str) -> BlockDocument:
    """The block TYPE/NAME. FatalError if it does not exist or cannot notify."""
    kind, _, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        raise FatalError(
            f"the Prefect server has no block {block}; make one under Blocks in its UI, and name it TYPE/NAME "
            "(custom-webhook/on-call)"
        ) from error
    schema = document.block_schema
    if schema is None or "notify" not in schema.capabilities:
        raise FatalError(f"the block {block} cannot notify; take one such as custom-webhook/NAME or slack-webhook/NAME")
    return document


def _make(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Creates the automation, or updates the one of the same name if its rule differs."""
    existing = client.read_automations_by_name(wanted.name)
    if not existing:
        client.create_automation(wanted)
    elif _rule(existing[0]) != _rule(wanted):
        client.update_automation(existing[0].id, wanted)


def _rule(automation: AutomationCore) -> dict[str, Any]:
    """The fields that are compared; `enabled` is not one of them, so that a user can switch an automation off."""
    return automation.model_dump(include={"description", "trigger", "actions"})
