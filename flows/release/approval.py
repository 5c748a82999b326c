"""A person's word in the middle of a flow: the run pauses, the Prefect UI shows a form behind its Resume button.

answer = ask("distilled version 3 passed the gate", reasons, hours=72)

The run waits in its process; a paused run holds no slot of its work queue. Prefect checks the form: an answer that
does not fit leaves the run paused.
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
    """What the form asks."""

    approve: bool = Field(description="May this version become champion?")
    by: str = Field(min_length=1, description="Who decides; kept with the version")
    reason: str = Field("", description="Why; kept with the version")


def ask_for_approval(question: str, details: Sequence[str], hours: float) -> Approval:
    """Pauses the flow until somebody answers. Nobody within `hours` counts as no."""
    where = current_link(runtime.flow_run.ui_url) if runtime.flow_run.ui_url else "the Prefect UI"
    print(f"waiting for approval: {question}; answer in {where}", file=sys.stderr)
    form = Approval.with_initial_data(description=f"# {question}\n\n" + "\n".join(f"- {line}" for line in details))
    # A key of its own: Prefect counts pauses in the process, and a retried run may not ask under the same key again.
    key = uuid4().hex
    try:
        return pause_flow_run(wait_for_input=form, timeout=int(hours * 3600), poll_interval=POLL_SECONDS, key=key)
    except FlowPauseTimeout:
        with get_client(sync_client=True) as client:
            # Still paused for the server, which would call whatever end the run comes to Failed, as its time is over.
            client.set_flow_run_state(runtime.flow_run.id, Running(), force=True)
        return Approval(approve=False, by="the clock", reason=f"nobody answered within {hours:g} hours")
