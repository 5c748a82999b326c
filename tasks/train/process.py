"""Sets up the trainer process: device, process group of the ranks, stop signal and memory allocation.

    ranks = join_ranks(run)             # Ranks(0, 1) unless torchrun started this process
    device = pick_device(run)

tasks.train.__main__ sets up the process before tasks.train.trainer trains in it.
"""

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from storage.errors import FatalError
from tasks.parent_death import set_parent_death_signal
from tasks.recipe.run_json import RunSpec
from tasks.train.step import Ranks

M_TRIM_THRESHOLD = -1
"""Option of mallopt(3): number of free bytes at the top of the heap above which they are returned to the kernel; -1:
never."""

M_MMAP_MAX = -4
"""Option of mallopt(3): number of allocations that may be mapped outside the heap; 0: none."""


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory in this process, since each step allocates the same tensors again.

    Does not affect child processes. Does nothing if the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


@dataclass
class StopSignal:
    """A stop request, set by SIGTERM; the trainer checks it after each step."""

    requested: bool = False

    def request(self, *_: object) -> None:
        """Handles the signal."""
        self.requested = True


def join_ranks(run: RunSpec) -> Ranks:
    """Joins the process group that torchrun describes in the environment. Without torchrun, this is the only rank.

    FatalError: the number of ranks exceeds the number of blocks per step.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A killed torchrun must not leave its ranks behind. Without torchrun, the parent may be a shell, which ends at
        # logout while the training continues; if our own launcher is the parent, it has requested the signal.
        set_parent_death_signal(signal.SIGTERM)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    if world_size == 1:
        return Ranks()
    if run.train.batch_rows < world_size:
        raise FatalError(
            f"train.batch_rows = {run.train.batch_rows} is smaller than the number of ranks, {world_size}; raise it to "
            f"{world_size} or more"
        )
    on_gpu = pick_device(run).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(dist.get_rank(), world_size, dist.new_group(backend="gloo") if on_gpu else None)


def pick_device(run: RunSpec) -> torch.device:
    """Returns the device of this rank. FatalError: train.device = "cuda" on a machine without a CUDA device."""
    has_cuda = torch.cuda.is_available()
    if run.train.device == "cuda" and not has_cuda:
        raise FatalError(
            'train.device = "cuda", but this machine has no CUDA device; set train.device = "auto" or "cpu"'
        )
    if run.train.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
