"""The recording trainer on a store whose listing lags: all ranks but the first do not see the newest checkpoint.

torchrun --nproc-per-node 2 -m tests.tasks.train.lagging_trainer RUN.json
"""

import os

from storage.store import Store
from tasks.recipe.run_spec import RunSpec
from tasks.train import checkpoint
from tasks.train.__main__ import exit_with_status, main
from tests.tasks.train.recording_trainer import noting


def lagging() -> None:
    """From now on this process does not see the newest checkpoint."""
    steps_kept = checkpoint.steps_kept

    def all_but_the_newest(store: Store, run: RunSpec) -> list[int]:
        return steps_kept(store, run)[:-1]

    checkpoint.steps_kept = all_but_the_newest


if __name__ == "__main__":
    noting()
    if os.environ["RANK"] != "0":
        lagging()
    exit_with_status(main)
