"""Trains a student on cached targets, with an online teacher, or by plain MLM, and commits the model.

    finished = train(run, ranks, stop)          # called by tasks.train.__main__, in every rank

Reads the run file (run.json) and its store. Writes checkpoints and the model into the store, and metrics.jsonl and
result.json into the run folder. A killed run resumes from its newest checkpoint and ends with the same bits (on a CPU
with one or two ranks; with three or more, DDP adds gradients in a different order in its first step).
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from storage.artifact import Receipt
from storage.errors import FatalError
from storage.files.disk import writing
from storage.lease import Lease
from storage.store import Store
from tasks.loader.batch import Batch, BatchLoader, MaskingRule, step_ranges
from tasks.loader.dataset import BlockDataset
from tasks.loader.order import DataOrder
from tasks.loader.prefetch import ReadAhead
from tasks.models.teacher import resolve_dtype
from tasks.recipe.run_json import RunSpec
from tasks.train.checkpoint import TrainingProgress, load_best_weights, load_checkpoint, load_step, save_checkpoint
from tasks.train.export import save_model
from tasks.train.flops import matrix_rate, training_work
from tasks.train.metrics import MetricsWriter, heldout_loss
from tasks.train.optimizer import lr_factor, make_optimizer, set_lr
from tasks.train.process import StopSignal, pick_device
from tasks.train.setup import TrainingSetup, set_up_training
from tasks.train.step import Ranks, StepCounts, StudentWithLoss, gradient_step, sum_counts
from tasks.train.teacher_signal import CachedTeacher, OnlineTeacher


def train(run: RunSpec, ranks: Ranks, stop: StopSignal) -> bool:
    """Trains until the last step or a stop signal. Returns True if the last step is done, else False.

    When it returns True, the model is in the store.

    FatalError: the run cannot work with its configuration, or its loss is not finite. RetryableError: the store did not
    respond, or a checkpoint was damaged.
    """
    # The cache that the flows use: HOME/cache, next to HOME/run/KEY.
    store = Store(run.store, cache=Path(run.folder).parent.parent / "cache", cache_bytes=run.cache_bytes)
    if store.has(run.model_ref):
        if ranks.rank == 0:  # a kill between the two writes leaves a model without result.json
            write_result(run, store.receipt(run.model_ref))
        return True
    _check_best_is_defined(run)
    torch.manual_seed(run.train.seed)
    device = pick_device(run)
    setup = set_up_training(run, store, device)
    optimizer = make_optimizer(setup.student, run.train)
    lease = Lease.take(store, run.run_key, run.reads()) if ranks.rank == 0 else None
    progress = resume(store, run, setup.student, optimizer, ranks)
    trainer = Trainer(run, store, setup, optimizer, ranks, lease, device)
    progress = trainer.loop(progress, stop)
    finished = progress.step >= run.total_steps
    if ranks.rank == 0 and finished:
        _save_result(run, store, setup, progress, ranks)
        if lease:
            lease.end()
    if ranks.world_size > 1:
        dist.barrier()
    return finished


def _check_best_is_defined(run: RunSpec) -> None:
    """Raises FatalError if train.result = "best", but the run never validates."""
    if run.train.result == "best" and not run.train.validate_steps:
        raise FatalError(
            f'run {run.name}: train.result = "best" needs validation, but train.validate_steps = 0; set it to a number '
            'of steps, or set train.result = "last"'
        )
    if run.train.result == "best" and not run.heldout:
        raise FatalError(
            f'run {run.name}: train.result = "best" needs held-out blocks, but the run has none; raise '
            'corpus.heldout_per_mille, or set train.result = "last"'
        )


def resume(
    store: Store, run: RunSpec, student: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> TrainingProgress:
    """Restores, on every rank, the newest intact checkpoint that rank 0 finds.

    If every rank searched for it, ranks could find different checkpoints, because a listing lags or an older process of
    the run has just written one. FatalError: a rank cannot read the checkpoint that rank 0 found.
    """
    progress = load_checkpoint(store, run, student, optimizer) if ranks.rank == 0 else TrainingProgress()
    if ranks.world_size == 1:
        return progress
    step = torch.tensor(progress.step)
    dist.broadcast(step, 0, group=ranks.cpu_group)
    return progress if ranks.rank == 0 else load_step(store, run, student, optimizer, int(step))


class StepResult(NamedTuple):
    """One optimizer step: [total, distil, cosine, mlm], gradient norm before clipping, learning rate."""

    losses: Tensor
    grad_norm: Tensor
    lr: float


class Trainer:
    """The training loop of one rank. Its attributes are fixed; TrainingProgress contains what changes during a run."""

    def __init__(
        self,
        run: RunSpec,
        store: Store,
        setup: TrainingSetup,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        lease: Lease | None,
        device: torch.device,
    ) -> None:
        self.run, self.store, self.setup, self.optimizer = run, store, setup, optimizer
        self.ranks, self.lease, self.device = ranks, lease, device
        on_gpu = device.type == "cuda"
        dtype = resolve_dtype(run.train.dtype, device)
        self.autocast = dtype if dtype != torch.float32 else None
        student_with_loss = StudentWithLoss(setup.student, run.loss, compile_encoder=on_gpu and run.train.compile)
        self.student_with_loss: nn.Module = student_with_loss
        if ranks.world_size > 1:
            head_unused = run.loss.distil == run.loss.mlm == 0
            self.student_with_loss = DistributedDataParallel(student_with_loss, find_unused_parameters=head_unused)
        self.metrics = make_metrics_writer(run, setup, device, ranks) if ranks.rank == 0 else None

    def loop(self, progress: TrainingProgress, stop: StopSignal) -> TrainingProgress:
        """Trains until the last step or until any rank receives a stop signal; writes a checkpoint in both cases."""
        run, train = self.run, self.run.train
        if self.metrics:
            self.metrics.cut_back(progress.step)
        self.student_with_loss.train()
        dataloader = self._dataloader(progress.step)
        saved_step = progress.step
        for batches in dataloader:
            step_counts = sum_counts(batches, stop.requested, self.ranks)
            result = self._train_step(progress.step, batches, step_counts)
            progress = self._advance(progress, step_counts.tokens)
            is_last = progress.step >= run.total_steps
            save_now = progress.step % train.checkpoint_steps == 0 or is_last or step_counts.stop
            validate_now = self._should_validate(progress.step, is_last)
            # A step that may become a checkpoint also ends a line of metrics, and is checked for NaN first.
            log_now = save_now or validate_now or progress.step % train.log_steps == 0
            if self.ranks.world_size > 1:
                dist.all_reduce(result.losses)
            if self.metrics:
                self.metrics.add(progress, *result, step_counts, dataloader.waited, due=log_now)
            if self.device.type == "cpu" or log_now:
                self._check_finite(progress, result)
            if validate_now:
                progress = self._validate(progress)
            if save_now or (train.result == "best" and progress.best_step == progress.step):
                saved_step = self._checkpoint(progress, saved_step)
            if step_counts.stop:
                break
        return progress

    def _train_step(self, step: int, batches: list[Batch], step_counts: StepCounts) -> StepResult:
        """Runs one optimizer step (0-based). The losses in the result are this rank's share."""
        train = self.run.train
        # The seed depends on the position in the run only, so dropout is the same after every resume.
        torch.manual_seed((train.seed << 32) + step * self.ranks.world_size + self.ranks.rank)
        lr = train.lr * lr_factor(step, self.run.total_steps, train)
        set_lr(self.optimizer, lr)
        losses = gradient_step(
            self.student_with_loss, self.setup.signal_source, batches, step_counts, self.ranks, self.autocast
        )
        grad_norm = nn.utils.clip_grad_norm_(self.setup.student.parameters(), train.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(losses, grad_norm, lr)

    def _dataloader(self, step: int) -> BatchLoader:
        """Returns the loader of the batches of this rank, starting at `step`."""
        run, train = self.run, self.run.train
        source = self.setup.signal_source
        codec = source.codec if isinstance(source, CachedTeacher) else None
        dataset = BlockDataset(self.store, run.manifest, codec is not None, codec)
        order = DataOrder(tuple(part.rows for part in run.manifest), train.window_shards, train.seed)
        ranges = step_ranges(
            step, run.total_steps, train.batch_rows, train.micro_rows, self.ranks.rank, self.ranks.world_size
        )
        masking = MaskingRule(self.setup.vocabulary, run.mask, run.targets.positions == "all", self.setup.token_counts)
        read_ahead = ReadAhead(dataset, order, run.total_steps * train.batch_rows, run.mask.variants)
        pin = self.device.type == "cuda"
        return BatchLoader(dataset, masking, order, ranges, read_ahead, prefetch=train.prefetch, pin=pin)

    def _advance(self, progress: TrainingProgress, tokens: int) -> TrainingProgress:
        step = progress.step + 1
        return replace(progress, step=step, cursor=step * self.run.train.batch_rows, tokens=progress.tokens + tokens)

    def _check_finite(self, progress: TrainingProgress, result: StepResult) -> None:
        """Raises FatalError if a loss or the gradient norm is not finite. Called before every checkpoint."""
        if not (bool(torch.isfinite(result.losses).all()) and bool(torch.isfinite(result.grad_norm))):
            total, distil, cosine, mlm = result.losses.tolist()
            raise FatalError(
                f"run {self.run.name}: the loss is not finite at step {progress.step} (total {total}, distil {distil}, "
                f"cosine {cosine}, mlm {mlm}, gradient norm {float(result.grad_norm)}); lower train.lr or train.clip "
                "(the last checkpoint is kept)"
            )

    def _should_validate(self, step: int, is_last: bool) -> bool:
        every = self.run.train.validate_steps
        return bool(every and self.run.heldout) and (is_last or step % every == 0)

    def _validate(self, progress: TrainingProgress) -> TrainingProgress:
        """Measures the held-out loss on rank 0; only the progress of rank 0 contains the best step."""
        if not self.metrics:
            return progress
        heldout = heldout_loss(self.store, self.run, self.setup, self.device, self.autocast)
        self.metrics.validated(progress.step, heldout)
        is_best = math.isfinite(heldout.loss) and (progress.best is None or heldout.loss < progress.best)
        return replace(progress, best=heldout.loss, best_step=progress.step) if is_best else progress

    def _checkpoint(self, progress: TrainingProgress, saved_step: int) -> int:
        """Saves a checkpoint on rank 0 (all ranks have the same weights) and returns its step.

        FatalError: another process has taken over the run.
        """
        if self.lease and progress.step > saved_step:
            self.lease.renew()
            save_checkpoint(self.store, self.run, self.setup.student, self.optimizer, progress)
        return progress.step


def make_metrics_writer(run: RunSpec, setup: TrainingSetup, device: torch.device, ranks: Ranks) -> MetricsWriter:
    """Creates the metrics writer. On a GPU, it gets the work and the peak rate for MFU.

    The peak rate is that of large matrix products on this device, times the number of ranks.
    """
    if device.type == "cpu":
        return MetricsWriter(run)
    source = setup.signal_source
    teacher = source.teacher.model if isinstance(source, CachedTeacher | OnlineTeacher) else None
    work = training_work(setup.student, run.blocks.length, run.loss, teacher, online=isinstance(source, OnlineTeacher))
    return MetricsWriter(run, work, matrix_rate(device) * ranks.world_size)


def _save_result(run: RunSpec, store: Store, setup: TrainingSetup, progress: TrainingProgress, ranks: Ranks) -> None:
    """Commits the model with the weights that train.result selects, then writes result.json."""
    if run.train.result == "best":
        load_best_weights(store, run, setup.student, progress)
    tokenizer = Path(setup.vocabulary.folder)
    write_result(run, save_model(store, run, setup.student, progress, tokenizer, ranks=ranks.world_size))


def write_result(run: RunSpec, receipt: Receipt) -> None:
    """Writes result.json into the run folder: the model, steps and tokens of the run, and the step of the saved
    weights."""
    result: dict[str, Any] = {
        "model": {"kind": receipt.kind, "key": receipt.key, "label": receipt.label},
        "steps": receipt.settings["steps"],
        "tokens": receipt.tokens,
        "result": receipt.info["result"],
        "step": receipt.info["step"],
    }
    with writing(f"the run folder {run.folder}"):
        (Path(run.folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
