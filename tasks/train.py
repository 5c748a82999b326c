"""Trains a student against cached targets, a live teacher, or plain MLM, and commits the model.

    python -m tasks.train RUN.json                            one process
    torchrun --nproc-per-node 2 -m tasks.train RUN.json       several

Reads RUN.json (tasks.run) and the store that it names; writes checkpoints and the model into the store, and
metrics.jsonl and result.json into the run's folder. A run that was killed goes on from its newest checkpoint and ends
with the same bits (on a CPU in one or two processes; from three on DDP adds in another order in its first step).
SIGTERM writes a checkpoint and ends with status 143. An error ends it with one sentence and status 1, or 75 if the same
command may succeed later.
"""

import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from storage.artifact import Receipt
from storage.disk import writing
from storage.error import DistilError, FatalError, RetryableError
from storage.lease import Lease
from storage.store import Store
from tasks.ahead import ReadAhead
from tasks.batch import Loader, Masking, stretches
from tasks.build import Built, build
from tasks.checkpoint import Progress, load_checkpoint, load_step, save_checkpoint
from tasks.corpus import Corpus
from tasks.flops import matrix_rate, training_work
from tasks.heap import keep_freed_memory
from tasks.metrics import Meter
from tasks.model import save_model
from tasks.order import Order
from tasks.run import PASSING, RunSpec, read_run
from tasks.schedule import lr_factor, make_optimizer, set_lr
from tasks.step import Distiller, World, gradient_step, sum_counts
from tasks.supervision import Cached, Online
from tasks.teacher import resolve_dtype
from tasks.validate import heldout_loss

STOPPED = 143
"""Exit status after SIGTERM: 128 + 15, as a shell would say it."""


@dataclass
class StopSignal:
    """Set by SIGTERM; looked at after each step."""

    asked: bool = False

    def ask(self, *_: object) -> None:
        """Signal handler."""
        self.asked = True


def main(arguments: list[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m tasks.train RUN.json", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    stop = StopSignal()
    signal.signal(signal.SIGTERM, stop.ask)
    keep_freed_memory()
    try:
        run = read_run(arguments[0])
        with joined_world(run) as world:
            finished = train(run, world, stop)
    except torch.OutOfMemoryError as error:
        rows = run.train.micro_rows or -(-run.train.batch_rows // int(os.environ.get("WORLD_SIZE", "1")))
        print(
            f"run {run.name}: the memory of the GPU is full with {rows} blocks of {run.blocks.length} tokens in one "
            "forward; lower train.micro_rows: a step stays as large, but is made in more, slower parts "
            f"({str(error).splitlines()[0]})",
            file=sys.stderr,
        )
        return 1
    except DistilError as error:
        print(error, file=sys.stderr)
        return PASSING if isinstance(error, RetryableError) else 1
    return 0 if finished else STOPPED


@contextmanager
def joined_world(run: RunSpec) -> Iterator[World]:
    """The process group that torchrun asks for, if it started us; else a world of one."""
    die_with_parent()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if run.train.threads:
        torch.set_num_threads(run.train.threads)
    if ranks == 1:
        yield World()
        return
    if run.train.batch_rows < ranks:
        raise FatalError(f"train.batch_rows = {run.train.batch_rows} is below the {ranks} ranks; raise it")
    on_gpu = pick_device(run).type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    counting = dist.new_group(backend="gloo") if on_gpu else None
    yield World(dist.get_rank(), ranks, counting)  # `leave` ends it


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


def train(run: RunSpec, world: World, stop: StopSignal) -> bool:
    """Trains to the end (True) or to SIGTERM (False); the model is in the store when it returns True."""
    # The cache of the flows: HOME/cache beside HOME/run/KEY.
    store = Store(run.store, cache=Path(run.folder).parent.parent / "cache", cache_bytes=run.cache_bytes)
    if store.has(run.model_ref):
        if world.rank == 0:  # a kill between model and result leaves the one without the other
            write_result(run, store.receipt(run.model_ref))
        return True
    torch.manual_seed(run.train.seed)
    device = pick_device(run)
    built = build(run, store, device)
    optimizer = make_optimizer(built.student, run.train)
    lease = Lease.take(store, run.run_key, run.reads()) if world.rank == 0 else None
    progress = resume(store, run, built.student, optimizer, world)
    trainer = Trainer(run, store, built, optimizer, world, lease, device)
    progress = trainer.loop(progress, stop)
    finished = progress.step >= run.total_steps
    if world.rank == 0 and finished:
        vocabulary = Path(built.vocabulary.folder)
        receipt = save_model(store, run, built.student, progress, vocabulary, ranks=world.ranks)
        write_result(run, receipt)
        if lease:
            lease.end()
    if world.ranks > 1:
        dist.barrier()
    return finished


def resume(store: Store, run: RunSpec, student: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Progress:
    """Restores the newest whole checkpoint that rank 0 finds, on every rank.

    Ranks that each looked for themselves could find different ones, where a listing lags or an older process of the
    run has just written. FatalError where a rank cannot read that of rank 0.
    """
    progress = load_checkpoint(store, run, student, optimizer) if world.rank == 0 else Progress()
    if world.ranks == 1:
        return progress
    step = torch.tensor(progress.step)
    dist.broadcast(step, 0, group=world.counting)
    return progress if world.rank == 0 else load_step(store, run, student, optimizer, int(step))


class Trainer:
    """The loop over steps. Holds what does not change during a run; what does is in Progress."""

    def __init__(
        self,
        run: RunSpec,
        store: Store,
        built: Built,
        optimizer: torch.optim.Optimizer,
        world: World,
        lease: Lease | None,
        device: torch.device,
    ) -> None:
        self.run, self.store, self.built, self.optimizer = run, store, built, optimizer
        self.world, self.lease, self.device = world, lease, device
        on_gpu = device.type == "cuda"
        dtype = resolve_dtype(run.train.dtype, device)
        self.autocast = dtype if dtype != torch.float32 else None
        distiller = Distiller(built.student, run.loss, compile_encoder=on_gpu and run.train.compile)
        self.distiller: nn.Module = distiller
        if world.ranks > 1:
            head_unused = run.loss.distil == run.loss.mlm == 0
            self.distiller = DistributedDataParallel(distiller, find_unused_parameters=head_unused)
        self.meter = make_meter(run, built, device, world) if world.rank == 0 else None

    def loop(self, progress: Progress, stop: StopSignal) -> Progress:
        """Steps until the run is whole or asked to stop; ends on a checkpoint either way."""
        run, train = self.run, self.run.train
        if self.meter:
            self.meter.cut_back(progress.step)
        self.distiller.train()
        loader = self._loader(progress.step)
        saved = progress.step
        for batches in loader:
            sums = sum_counts(batches, stop.asked, self.world)
            # The same numbers on every resume: dropout depends on where we are, not on how we came here.
            torch.manual_seed((train.seed << 32) + progress.step * self.world.ranks + self.world.rank)
            lr = train.lr * lr_factor(progress.step, run.total_steps, train)
            set_lr(self.optimizer, lr)
            parts = gradient_step(self.distiller, self.built.supervision, batches, sums, self.world, self.autocast)
            norm = nn.utils.clip_grad_norm_(self.built.student.parameters(), train.clip or math.inf)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            progress = self._advance(progress, sums.tokens)
            last = progress.step >= run.total_steps
            at_checkpoint = progress.step % train.checkpoint_steps == 0 or last or sums.stop
            at_look = self._looks(progress.step, last)
            # Whatever may become a checkpoint ends a line of metrics and is looked at for NaN first.
            due = at_checkpoint or at_look or progress.step % train.log_steps == 0
            if self.world.ranks > 1:
                dist.all_reduce(parts)
            if self.meter:
                self.meter.add(progress, parts, norm, lr, sums, loader.waited, due=due)
            if self.device.type == "cpu" or due:
                self._refuse_nonfinite(progress, parts, norm)
            if at_look:
                progress = self._validate(progress)
            if at_checkpoint or progress.best_step == progress.step:
                saved = self._checkpoint(progress, saved)
            if sums.stop:
                break
        return progress

    def _loader(self, step: int) -> Loader:
        run, train = self.run, self.run.train
        supervision = self.built.supervision
        codec = supervision.codec if isinstance(supervision, Cached) else None
        corpus = Corpus(self.store, run.manifest, codec is not None, codec)
        order = Order(tuple(part.rows for part in run.manifest), train.window_shards, train.seed)
        plan = stretches(step, run.total_steps, train.batch_rows, train.micro_rows, self.world.rank, self.world.ranks)
        masking = Masking(self.built.vocabulary, run.mask, run.targets.positions == "all", self.built.counts)
        ahead = ReadAhead(corpus, order, run.total_steps * train.batch_rows, run.mask.variants)
        return Loader(corpus, masking, order, plan, ahead, prefetch=train.prefetch, pin=self.device.type == "cuda")

    def _advance(self, progress: Progress, tokens: int) -> Progress:
        step = progress.step + 1
        return replace(progress, step=step, cursor=step * self.run.train.batch_rows, tokens=progress.tokens + tokens)

    def _refuse_nonfinite(self, progress: Progress, parts: torch.Tensor, norm: torch.Tensor) -> None:
        """Stops before anything not finite can reach a checkpoint."""
        if not (bool(torch.isfinite(parts).all()) and bool(torch.isfinite(norm))):
            total, distil, cosine, mlm = parts.tolist()
            raise FatalError(
                f"run {self.run.name}: the loss is not finite at step {progress.step} (total {total}, distil {distil}, "
                f"cosine {cosine}, mlm {mlm}, gradient norm {float(norm)}); the last checkpoint is kept. "
                "Lower train.lr or train.clip"
            )

    def _looks(self, step: int, last: bool) -> bool:
        """Whether held-out blocks are looked at after this step."""
        every = self.run.train.validate_steps
        return bool(every and self.run.heldout) and (last or step % every == 0)

    def _validate(self, progress: Progress) -> Progress:
        """One look, by rank 0; only there the progress knows the best."""
        if not self.meter:
            return progress
        found = heldout_loss(self.store, self.run, self.built, self.device, self.autocast)
        self.meter.validated(progress.step, found)
        is_best = math.isfinite(found.loss) and (progress.best is None or found.loss < progress.best)
        return replace(progress, best=found.loss, best_step=progress.step) if is_best else progress

    def _checkpoint(self, progress: Progress, saved: int) -> int:
        """Rank 0 writes; the others hold the same weights."""
        if self.lease and self.meter and progress.step > saved:
            self.lease.renew()
            save_checkpoint(self.store, self.run, self.built.student, self.optimizer, progress)
        return progress.step


def make_meter(run: RunSpec, built: Built, device: torch.device, world: World) -> Meter:
    """On a GPU with what MFU is measured against: the rate of large products on this one, for each rank."""
    if device.type == "cpu":
        return Meter(run)
    told = built.supervision
    teacher = told.teacher.model if isinstance(told, Cached | Online) else None
    work = training_work(built.student, run.blocks.length, run.loss, teacher, online=isinstance(told, Online))
    return Meter(run, work, matrix_rate(device) * world.ranks)


def write_result(run: RunSpec, receipt: Receipt) -> None:
    """Says in the run's folder what came out."""
    result: dict[str, Any] = {
        "model": {"kind": receipt.kind, "key": receipt.key, "label": receipt.label},
        "steps": receipt.settings["steps"],
        "tokens": receipt.tokens,
    }
    with writing(f"the run's folder {run.folder}"):
        (Path(run.folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")


def leave(run: Callable[[], int]) -> NoReturn:
    """Ends this process with the status that `run` returns, or with a traceback and 1.

    Of several ranks none takes its process group down: gloo's destructor waits, with the interpreter lock held, for a
    thread that may want that lock (seen with torch 2.13), and the training would never end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(run())
    status = 1
    try:
        status = run()
    except Exception:  # noqa: BLE001  what the interpreter does with it, but for the tidying up
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main)
