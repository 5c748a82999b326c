"""A program for tests: the recording trainer on a store whose listing lags.

    torchrun --nproc-per-node 2 -m tests.tasks.train.programs.lagging_trainer RUN.json

Started by test_trainer.py. All ranks but the first do not see the newest checkpoint.
"""

import os

from storage.store import Store
from tasks.recipe.run_json import RunSpec
from tasks.train import checkpoint
from tasks.train.__main__ import exit_with_status, main
from tests.tasks.train.programs.recording_trainer import record_rows


def hide_newest_checkpoint() -> None:
    """Makes listings of checkpoints in this process leave out the newest one."""
    steps_kept = checkpoint.steps_kept

    def all_but_the_newest(store: Store, run: RunSpec) -> list[int]:
        return steps_kept(store, run)[:-1]

    checkpoint.steps_kept = all_but_the_newest


if __name__ == "__main__":
    record_rows()
    if os.environ["RANK"] != "0":
        hide_newest_checkpoint()
    exit_with_status(main)
