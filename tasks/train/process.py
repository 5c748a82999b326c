"""The trainer as a process: device, ranks, stop signals, memory settings and the death of its parent."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from storage.errors import FatalError
from tasks.recipe.run_spec import RunSpec
from tasks.train.step import Ranks

TRIM_THRESHOLD = -1
"""Parameter of mallopt(3): from so many free bytes on, the top of the heap goes back; -1 is never."""

MMAP_MAX = -4
"""Parameter of mallopt(3): so many blocks may be mapped apart from the heap; 0 is none."""


def keep_freed_memory() -> None:
    """For this process, and not for its children. Does nothing where the C library is not glibc."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


@dataclass
class StopSignal:
    """Set by SIGTERM; looked at after each step."""

    asked: bool = False

    def ask(self, *_: object) -> None:
        """Signal handler."""
        self.asked = True


@contextmanager
def joined_ranks(run: RunSpec) -> Iterator[Ranks]:
    """The process group that torchrun asks for, if it started us; else a world of one."""
    die_with_parent()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    if ranks == 1:
        yield Ranks()
        return
    if run.train.batch_rows < ranks:
        raise FatalError(f"train.batch_rows = {run.train.batch_rows} is below the {ranks} ranks; raise it")
    on_gpu = pick_device(run).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    counting = dist.new_group(backend="gloo") if on_gpu else None
    yield Ranks(dist.get_rank(), ranks, counting)  # `leave` ends it


def pick_device(run: RunSpec) -> torch.device:
    """The device of this rank. FatalError where CUDA is asked for and absent."""
    there = torch.cuda.is_available()
    if run.train.device == "cuda" and not there:
        raise FatalError("train.device = cuda, but this machine has no CUDA device; set it to auto or cpu")
    if run.train.device == "cpu" or not there:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def die_with_parent() -> None:
    """Asks Linux to end this process with SIGTERM when its parent dies: no orphan trainer after a killed worker."""
    if sys.platform == "linux":
        import ctypes

        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(parent_death_signal, signal.SIGTERM)
