"""Automations of the Prefect server: runs whose process died are marked Crashed, and failures are told.

    mark_dead_runs(client)                              "distil: mark dead runs"
    tell_of_failures(client, "custom-webhook/on-call")  "distil: tell of failures"

`distil deploy` makes both. They look at runs with the tag `distil` only, which all our deployments carry. One that is
there already is changed only where it differs, since a change forgets the heartbeats it was waiting for.
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
"""Three heartbeats of 30 s, the least that Prefect allows."""

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
"""The address needs PREFECT_UI_URL (or PREFECT_API_URL) in the server's own environment; without it the id is told."""


def mark_dead_runs(client: SyncPrefectClient) -> None:
    """Runs that had a heartbeat, and then neither another nor an end for 90 seconds, become Crashed."""
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
        "retry it, and it goes on where it was",
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
    """Sends a notification for each run that fails or crashes, through a notification block TYPE/NAME.

    FatalError if there is no such block or it cannot notify.
    """
    send = SendNotification(block_document_id=_notifier(client, block).id, subject=SUBJECT, body=BODY)
    _make(
        client,
        AutomationCore(
            name="distil: tell of failures",
            description=f"Tells {block} of runs that failed or crashed.",
            trigger=EventTrigger(**OUR_RUNS, posture=Posture.Reactive, expect=FAILED, threshold=1),
            actions=[send],
        ),
    )


def _notifier(client: SyncPrefectClient, block: str) -> BlockDocument:
    """The document of a block that can notify."""
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
    """Creates the automation of this name, or changes the one that is there if it does something else."""
    there = client.read_automations_by_name(wanted.name)
    if not there:
        client.create_automation(wanted)
    elif _does(there[0]) != _does(wanted):
        client.update_automation(there[0].id, wanted)


def _does(automation: AutomationCore) -> dict[str, Any]:
    """What an automation does; not whether it is switched on, which is its user's to say."""
    return automation.model_dump(include={"description", "trigger", "actions"})
