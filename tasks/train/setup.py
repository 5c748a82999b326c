"""Builds what tasks.train needs before its first step: vocabulary, student, the teacher's word."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.models.files import folder_fingerprint, resolve_model
from tasks.models.forward import longest_input
from tasks.models.student import check_pad, make_fresh, make_student
from tasks.models.teacher import TeacherModel, load_teacher, load_weights
from tasks.recipe.config import TeacherSettings
from tasks.recipe.run_spec import RunSpec
from tasks.targets.file import open_targets
from tasks.targets.parity import probe_cache
from tasks.tokens.blocks import read_counts
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits, vocabulary_for
from tasks.train.teacher_signal import CachedTeacher, NoTeacher, OnlineTeacher, SignalSource


@dataclass(frozen=True)
class TrainingSetup:
    """A student on its device and what it learns from."""

    student: PreTrainedModel
    vocabulary: Vocabulary
    supervision: SignalSource
    counts: NDArray[np.int64] | None


def set_up_training(run: RunSpec, store: Store, device: torch.device) -> TrainingSetup:
    """Loads and checks everything; counts and the targets that the codec comes from are hashed.

    FatalError names what does not fit the run or is damaged.
    """
    vocabulary = vocabulary_for(run.blocks, run.teacher)
    teacher = _teacher(run, device) if run.teacher.model else None
    student = _student(run, teacher, vocabulary)
    if teacher and run.loss.needs_teacher:
        _check_shapes_match(run, teacher, student, vocabulary)
    nn.Module.to(student, device)
    limit = longest_input(student)
    if run.blocks.length > limit:
        raise FatalError(f"blocks.length = {run.blocks.length}, but the student reads at most {limit} tokens; lower it")
    counts = read_counts(store, Ref("counts", run.counts, "counts")) if run.counts else None
    return TrainingSetup(student, vocabulary, _signal_source(run, store, teacher), counts)


def _teacher(run: RunSpec, device: torch.device) -> TeacherModel:
    teacher = load_teacher(run.teacher, device.type)
    if teacher.fingerprint != run.teacher_fingerprint:
        raise FatalError(
            f"the teacher {run.teacher.model} changed since this run was planned "
            f"({teacher.fingerprint[:12]} now, {run.teacher_fingerprint[:12]} then); start the run again"
        )
    return teacher


def _check_shapes_match(run: RunSpec, teacher: TeacherModel, student: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """FatalError unless the blocks' ids are the teacher's, and what the loss compares has the same shape."""
    check_vocabulary_fits(vocabulary, teacher.vocab_size, run.teacher.model)
    rows, width = int(student.config.vocab_size), int(student.config.hidden_size)
    if run.loss.distil and rows < teacher.vocab_size:
        raise FatalError(
            f"the student has {rows} vocabulary rows but the teacher {run.teacher.model} {teacher.vocab_size}; set "
            f"student.config.vocab_size = {teacher.vocab_size}, or loss.distil = 0"
        )
    if run.loss.cosine and width != teacher.width:
        raise FatalError(
            f"the student's hidden size is {width} but the teacher's {teacher.width}, so there is no cosine between "
            "them; make the sizes equal, or set loss.cosine = 0"
        )


def _student(run: RunSpec, teacher: TeacherModel | None, vocabulary: Vocabulary) -> PreTrainedModel:
    settings = run.student
    if run.train.warm_start:
        return _warm_start(run, vocabulary)
    if settings.init == "config":
        return make_fresh(settings.config, vocabulary, run.train.seed)
    if teacher is None:
        raise FatalError("student.init copies from a teacher, but teacher.model is empty")
    if teacher.dtype != torch.float32:
        # The copy starts from the weights as they were saved, not from what bf16 leaves of them on this device.
        teacher = load_teacher(run.teacher.model_copy(update={"dtype": "float32"}), "cpu")
    return make_student(
        teacher.model,
        vocabulary,
        layers=settings.layers,
        choice=settings.choice,
        dropout=settings.dropout,
        init=settings.init,
        seed=run.train.seed,
    )


def _warm_start(run: RunSpec, vocabulary: Vocabulary) -> PreTrainedModel:
    """The model of train.warm_start in float32, whole and unchanged since the run was planned."""
    source = TeacherSettings(model=run.train.warm_start)
    folder = resolve_model(source.model)
    found = folder_fingerprint(folder, source)
    if run.start and found != run.start:
        raise FatalError(
            f"the model {source.model} of train.warm_start changed since this run was planned ({found[:12]} now, "
            f"{run.start[:12]} then); start the run again"
        )
    model = load_weights(source, folder, torch.float32, role="train.warm_start", dropout=run.student.dropout)
    check_vocabulary_fits(vocabulary, int(model.config.vocab_size), source.model)
    check_pad(model, vocabulary)
    return model


def _signal_source(run: RunSpec, store: Store, teacher: TeacherModel | None) -> SignalSource:
    if teacher is None or not run.loss.needs_teacher:
        return NoTeacher()
    if run.targets.source == "online":
        return OnlineTeacher(teacher, run.loss)
    targets = open_targets(store, run.manifest[0].targets_ref(0))
    probe_cache(store, run, teacher)
    # Only the LM head is needed from here on; the encoder's memory goes to the student.
    setattr(teacher.model, teacher.model.base_model_prefix, nn.Identity())
    return CachedTeacher(teacher, targets.codec, run.loss)
