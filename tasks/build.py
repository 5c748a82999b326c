"""Builds what tasks.train needs before its first step: vocabulary, student, the teacher's word."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel

from storage.artifact import Ref
from storage.error import FatalError
from storage.store import Store
from tasks.block import read_counts
from tasks.encoder import longest_input
from tasks.probe import probe_cache
from tasks.run import RunSpec
from tasks.student import make_fresh, make_student
from tasks.supervision import Cached, Nothing, Online, Supervision
from tasks.targets import open_targets
from tasks.teacher import TeacherModel, load_teacher, resolve_model
from tasks.vocabulary import Vocabulary, fits, load_vocabulary


@dataclass(frozen=True)
class Built:
    """A student on its device and what it learns from."""

    student: PreTrainedModel
    vocabulary: Vocabulary
    supervision: Supervision
    counts: NDArray[np.int64] | None


def build(run: RunSpec, store: Store, device: torch.device) -> Built:
    """Loads and checks everything. FatalError names what does not fit the run."""
    vocabulary = load_vocabulary(
        run.blocks.tokenizer or run.teacher.model, run.teacher.revision, run.teacher.trust_remote_code
    )
    teacher = _teacher(run, device) if run.teacher.model else None
    student = _student(run, teacher, vocabulary)
    nn.Module.to(student, device)
    limit = longest_input(student)
    if run.blocks.length > limit:
        raise FatalError(f"blocks.length = {run.blocks.length}, but the student reads at most {limit} tokens; lower it")
    counts = read_counts(store, Ref("counts", run.counts, "counts")) if run.counts else None
    return Built(student, vocabulary, _supervision(run, store, teacher), counts)


def _teacher(run: RunSpec, device: torch.device) -> TeacherModel:
    teacher = load_teacher(run.teacher, device.type)
    if teacher.fingerprint != run.teacher_fingerprint:
        raise FatalError(
            f"the teacher {run.teacher.model} changed since this run was planned "
            f"({teacher.fingerprint[:12]} now, {run.teacher_fingerprint[:12]} then); start the run again"
        )
    return teacher


def _student(run: RunSpec, teacher: TeacherModel | None, vocabulary: Vocabulary) -> PreTrainedModel:
    settings = run.student
    if run.train.warm_start:
        folder = resolve_model(run.train.warm_start)
        model: PreTrainedModel = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
        fits(vocabulary, model.config.vocab_size, run.train.warm_start)
        return model
    if settings.init == "config":
        return make_fresh(settings.config, vocabulary, run.train.seed)
    if teacher is None:
        raise FatalError("student.init copies from a teacher, but teacher.model is empty")
    return make_student(
        teacher.model,
        vocabulary,
        layers=settings.layers,
        choice=settings.choice,
        dropout=settings.dropout,
        init=settings.init,
        seed=run.train.seed,
    )


def _supervision(run: RunSpec, store: Store, teacher: TeacherModel | None) -> Supervision:
    if teacher is None or not run.loss.needs_teacher:
        return Nothing()
    if run.targets.source == "online":
        return Online(teacher, run.loss)
    targets = open_targets(store, run.manifest[0].targets_ref(0), check=False)
    probe_cache(store, run, teacher)
    # Only the LM head is needed from here on; the encoder's memory goes to the student.
    setattr(teacher.model, teacher.model.base_model_prefix, nn.Identity())
    return Cached(teacher, targets.codec, run.loss)
