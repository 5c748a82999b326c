"""Pauses a flow until a user approves or declines: Resume in the Prefect UI shows a form.

    answer = ask_for_approval("distilled version 3 passed the gate", reasons, hours=72)

The run waits in its process; a paused run occupies no slot of its work queue. Prefect validates the form; after an
invalid answer the run stays paused.
"""

import sys
from collections.abc import Sequence
from uuid import uuid4

from prefect import pause_flow_run, runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.states import Running
from pydantic import Field

from flows.services.servers import current_link

POLL_SECONDS = 5


class Approval(RunInput):
    """Fields of the approval form."""

    approve: bool = Field(description="Promote this version to champion?")
    by: str = Field(min_length=1, description="Your name; stored with the version")
    reason: str = Field("", description="Reason for your decision; stored with the version")


def ask_for_approval(question: str, details: Sequence[str], hours: float) -> Approval:
    """Pauses the flow until the form is submitted, and returns it; after `hours`, returns a form that declines."""
    where = current_link(runtime.flow_run.ui_url) if runtime.flow_run.ui_url else "the Prefect UI"
    print(f"waiting for approval: {question}; approve or decline in {where}", file=sys.stderr)
    form = Approval.with_initial_data(description=f"# {question}\n\n" + "\n".join(f"- {line}" for line in details))
    # A unique key: Prefect numbers pauses per process, and a retried run must not reuse the key of its first pause.
    key = uuid4().hex
    try:
        return pause_flow_run(wait_for_input=form, timeout=int(hours * 3600), poll_interval=POLL_SECONDS, key=key)
    except FlowPauseTimeout:
        with get_client(sync_client=True) as client:
            # On the server the run is still paused: after the time-out, it would replace any final state by Failed.
            client.set_flow_run_state(runtime.flow_run.id, Running(), force=True)
        return Approval(approve=False, by="the time limit", reason=f"no answer within {hours:g} hours")
