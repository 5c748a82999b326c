"""The trainer of tests.noted on a store whose listing lags, without the newest checkpoint, for all ranks but the first.

torchrun --nproc-per-node 2 -m tests.lagging RUN.json
"""

import os

from storage.store import Store
from tasks import checkpoint
from tasks.run import RunSpec
from tasks.train import leave, main
from tests.noted import noting


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
    leave(main)
