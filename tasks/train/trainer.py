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
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from storage.artifact import Receipt
from storage.disk import writing
from storage.errors import FatalError
from storage.lease import Lease
from storage.store import Store
from tasks.loader.batch import BatchLoader, MaskingRule, step_ranges
from tasks.loader.dataset import BlockDataset
from tasks.loader.order import DataOrder
from tasks.loader.prefetch import ReadAhead
from tasks.models.teacher import resolve_dtype
from tasks.recipe.run_spec import RunSpec
from tasks.train.checkpoint import TrainingProgress, load_checkpoint, load_step, save_checkpoint
from tasks.train.export import save_model
from tasks.train.flops import matrix_rate, training_work
from tasks.train.metrics import MetricsWriter, heldout_loss
from tasks.train.optimizer import lr_factor, make_optimizer, set_lr
from tasks.train.process import StopSignal, pick_device
from tasks.train.setup import TrainingSetup, set_up_training
from tasks.train.step import Ranks, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import CachedTeacher, OnlineTeacher


def train(run: RunSpec, world: Ranks, stop: StopSignal) -> bool:
    """Trains to the end (True) or to SIGTERM (False); the model is in the store when it returns True."""
    # The cache of the flows: HOME/cache beside HOME/run/KEY.
    store = Store(run.store, cache=Path(run.folder).parent.parent / "cache", cache_bytes=run.cache_bytes)
    if store.has(run.model_ref):
        if world.rank == 0:  # a kill between model and result leaves the one without the other
            write_result(run, store.receipt(run.model_ref))
        return True
    torch.manual_seed(run.train.seed)
    device = pick_device(run)
    built = set_up_training(run, store, device)
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


def resume(
    store: Store, run: RunSpec, student: nn.Module, optimizer: torch.optim.Optimizer, world: Ranks
) -> TrainingProgress:
    """Restores the newest whole checkpoint that rank 0 finds, on every rank.

    Ranks that each looked for themselves could find different ones, where a listing lags or an older process of the
    run has just written. FatalError where a rank cannot read that of rank 0.
    """
    progress = load_checkpoint(store, run, student, optimizer) if world.rank == 0 else TrainingProgress()
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
        built: TrainingSetup,
        optimizer: torch.optim.Optimizer,
        world: Ranks,
        lease: Lease | None,
        device: torch.device,
    ) -> None:
        self.run, self.store, self.built, self.optimizer = run, store, built, optimizer
        self.world, self.lease, self.device = world, lease, device
        on_gpu = device.type == "cuda"
        dtype = resolve_dtype(run.train.dtype, device)
        self.autocast = dtype if dtype != torch.float32 else None
        distiller = StudentWithLoss(built.student, run.loss, compile_encoder=on_gpu and run.train.compile)
        self.distiller: nn.Module = distiller
        if world.ranks > 1:
            head_unused = run.loss.distil == run.loss.mlm == 0
            self.distiller = DistributedDataParallel(distiller, find_unused_parameters=head_unused)
        self.meter = make_metrics_writer(run, built, device, world) if world.rank == 0 else None

    def loop(self, progress: TrainingProgress, stop: StopSignal) -> TrainingProgress:
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
            at_look = self._should_validate(progress.step, last)
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

    def _loader(self, step: int) -> BatchLoader:
        run, train = self.run, self.run.train
        supervision = self.built.supervision
        codec = supervision.codec if isinstance(supervision, CachedTeacher) else None
        corpus = BlockDataset(self.store, run.manifest, codec is not None, codec)
        order = DataOrder(tuple(part.rows for part in run.manifest), train.window_shards, train.seed)
        plan = step_ranges(step, run.total_steps, train.batch_rows, train.micro_rows, self.world.rank, self.world.ranks)
        masking = MaskingRule(self.built.vocabulary, run.mask, run.targets.positions == "all", self.built.counts)
        ahead = ReadAhead(corpus, order, run.total_steps * train.batch_rows, run.mask.variants)
        return BatchLoader(corpus, masking, order, plan, ahead, prefetch=train.prefetch, pin=self.device.type == "cuda")

    def _advance(self, progress: TrainingProgress, tokens: int) -> TrainingProgress:
        step = progress.step + 1
        return replace(progress, step=step, cursor=step * self.run.train.batch_rows, tokens=progress.tokens + tokens)

    def _refuse_nonfinite(self, progress: TrainingProgress, parts: torch.Tensor, norm: torch.Tensor) -> None:
        """Stops before anything not finite can reach a checkpoint."""
        if not (bool(torch.isfinite(parts).all()) and bool(torch.isfinite(norm))):
            total, distil, cosine, mlm = parts.tolist()
            raise FatalError(
                f"run {self.run.name}: the loss is not finite at step {progress.step} (total {total}, distil {distil}, "
                f"cosine {cosine}, mlm {mlm}, gradient norm {float(norm)}); the last checkpoint is kept. "
                "Lower train.lr or train.clip"
            )

    def _should_validate(self, step: int, last: bool) -> bool:
        """Whether held-out blocks are looked at after this step."""
        every = self.run.train.validate_steps
        return bool(every and self.run.heldout) and (last or step % every == 0)

    def _validate(self, progress: TrainingProgress) -> TrainingProgress:
        """One look, by rank 0; only there the progress knows the best."""
        if not self.meter:
            return progress
        found = heldout_loss(self.store, self.run, self.built, self.device, self.autocast)
        self.meter.validated(progress.step, found)
        is_best = math.isfinite(found.loss) and (progress.best is None or found.loss < progress.best)
        return replace(progress, best=found.loss, best_step=progress.step) if is_best else progress

    def _checkpoint(self, progress: TrainingProgress, saved: int) -> int:
        """Rank 0 writes; the others hold the same weights."""
        if self.lease and self.meter and progress.step > saved:
            self.lease.renew()
            save_checkpoint(self.store, self.run, self.built.student, self.optimizer, progress)
        return progress.step


def make_metrics_writer(run: RunSpec, built: TrainingSetup, device: torch.device, world: Ranks) -> MetricsWriter:
    """On a GPU with what MFU is measured against: the rate of large products on this one, for each rank."""
    if device.type == "cpu":
        return MetricsWriter(run)
    told = built.supervision
    teacher = told.teacher.model if isinstance(told, CachedTeacher | OnlineTeacher) else None
    work = training_work(built.student, run.blocks.length, run.loss, teacher, online=isinstance(told, OnlineTeacher))
    return MetricsWriter(run, work, matrix_rate(device) * world.ranks)


def write_result(run: RunSpec, receipt: Receipt) -> None:
    """Says in the run's folder what came out."""
    result: dict[str, Any] = {
        "model": {"kind": receipt.kind, "key": receipt.key, "label": receipt.label},
        "steps": receipt.settings["steps"],
        "tokens": receipt.tokens,
    }
    with writing(f"the run's folder {run.folder}"):
        (Path(run.folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
