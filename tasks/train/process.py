"""The trainer as a process: device, process group of the ranks, stop signal and memory settings.

ranks = join_ranks(run)             # Ranks(0, 1) unless torchrun started this process
device = pick_device(run)
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
"""Option of mallopt(3): free bytes at the top of the heap that are returned to the kernel; -1 returns none."""

M_MMAP_MAX = -4
"""Option of mallopt(3): allocations that may be mapped outside the heap; 0 allows none."""


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory in this process: each step allocates the same tensors again.

    Does not affect child processes. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


@dataclass
class StopSignal:
    """Set by SIGTERM; the trainer checks it after each step."""

    requested: bool = False

    def request(self, *_: object) -> None:
        """Signal handler."""
        self.requested = True


def join_ranks(run: RunSpec) -> Ranks:
    """Joins the process group that torchrun describes in the environment; without one this is the only rank.

    FatalError: more ranks than blocks per step.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A killed torchrun must not leave its ranks behind. Without torchrun the parent may be a shell, which ends at
        # logout while the training continues; where our own launcher is the parent, it has requested the signal.
        set_parent_death_signal(signal.SIGTERM)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    if world_size == 1:
        return Ranks()
    if run.train.batch_rows < world_size:
        raise FatalError(f"train.batch_rows = {run.train.batch_rows} is below the {world_size} ranks; raise it")
    on_gpu = pick_device(run).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(dist.get_rank(), world_size, dist.new_group(backend="gloo") if on_gpu else None)


def pick_device(run: RunSpec) -> torch.device:
    """The device of this rank. FatalError: train.device = cuda on a machine without CUDA."""
    has_cuda = torch.cuda.is_available()
    if run.train.device == "cuda" and not has_cuda:
        raise FatalError("train.device = cuda, but this machine has no CUDA device; set it to auto or cpu")
    if run.train.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
