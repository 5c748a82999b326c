"""A person's word in the middle of a flow: the run pauses, the Prefect UI shows a form behind its Resume button.

answer = ask("distilled version 3 passed the gate", reasons, hours=72)

The run waits in its process; a paused run holds no slot of its work queue. Prefect checks the form: an answer that
does not fit leaves the run paused.
"""

import sys
from collections.abc import Sequence

from prefect import pause_flow_run, runtime
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from pydantic import Field

from flows.server import page_now

POLL_SECONDS = 5


class Approval(RunInput):
    """What the form asks."""

    approve: bool = Field(description="May this version become champion?")
    by: str = Field(min_length=1, description="Who decides; kept with the version")
    reason: str = Field("", description="Why; kept with the version")


def ask(question: str, details: Sequence[str], hours: float) -> Approval:
    """Pauses the flow until somebody answers. Nobody within `hours` counts as no."""
    where = page_now(runtime.flow_run.ui_url) if runtime.flow_run.ui_url else "the Prefect UI"
    print(f"waiting for approval: {question}; answer in {where}", file=sys.stderr)
    form = Approval.with_initial_data(description=f"# {question}\n\n" + "\n".join(f"- {line}" for line in details))
    try:
        return pause_flow_run(wait_for_input=form, timeout=int(hours * 3600), poll_interval=POLL_SECONDS)
    except FlowPauseTimeout:
        return Approval(approve=False, by="the clock", reason=f"nobody answered within {hours:g} hours")
