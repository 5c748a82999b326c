"""Loads and checks everything that a training run needs before its first step: vocabulary, student and teacher signal.

    setup = set_up_training(run, store, device)
    setup.student, setup.signal_source

Settings and inputs that do not fit together fail here, before any step.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from storage.artifact import Ref
from storage.errors import FatalError
from storage.store import Store
from tasks.models.forward import longest_input
from tasks.models.model_files import folder_fingerprint, resolve_model
from tasks.models.student import check_pad_id, make_fresh, make_student
from tasks.models.teacher import TeacherModel, load_teacher, load_weights, resolve_dtype
from tasks.recipe.config import TeacherSettings
from tasks.recipe.run_json import RunSpec
from tasks.targets.parity import probe_cache
from tasks.targets.targets_file import open_targets
from tasks.tokens.token_counts import read_counts
from tasks.tokens.vocabulary import Vocabulary, check_vocabulary_fits, vocabulary_for
from tasks.train.teacher_signal import CachedTeacher, NoTeacher, OnlineTeacher, SignalSource


@dataclass(frozen=True)
class TrainingSetup:
    """A student on its device, its vocabulary, the source of the teacher signal, and the token counts [V] of
    smoothed masks."""

    student: PreTrainedModel
    vocabulary: Vocabulary
    signal_source: SignalSource
    token_counts: NDArray[np.int64] | None


def set_up_training(run: RunSpec, store: Store, device: torch.device) -> TrainingSetup:
    """Loads and checks everything. Verifies the hashes of the token counts and of the targets that define the codec.

    FatalError: an input does not fit the run, has changed since the run was planned, or is damaged; the message says
    which.
    """
    vocabulary = vocabulary_for(run.blocks, run.teacher)
    teacher, student = _models(run, vocabulary, device)
    if teacher and run.loss.needs_teacher:
        _check_shapes_match(run, teacher, student, vocabulary)
    nn.Module.to(student, device)
    limit = longest_input(student)
    if run.blocks.length > limit:
        raise FatalError(
            f"blocks.length = {run.blocks.length}, but the student reads at most {limit} tokens; lower blocks.length"
        )
    token_counts = read_counts(store, Ref("counts", run.counts, "counts")) if run.counts else None
    return TrainingSetup(student, vocabulary, _signal_source(run, store, teacher), token_counts)


def _models(run: RunSpec, vocabulary: Vocabulary, device: torch.device) -> tuple[TeacherModel | None, PreTrainedModel]:
    """Loads the teacher once. Returns it in its own dtype on the device, and the student on the CPU.

    A student that copies teacher layers is made before the teacher is cast, so it starts from the saved float32
    weights.
    """
    if not run.teacher.model:
        return None, _student(run, None, vocabulary)
    if run.train.warm_start or run.student.init != "teacher":
        teacher = _load_teacher(run, run.teacher, device.type)
        return teacher, _student(run, teacher, vocabulary)
    teacher = _load_teacher(run, run.teacher.model_copy(update={"dtype": "float32"}), "cpu")
    student = _student(run, teacher, vocabulary)
    return _cast_teacher(teacher, run.teacher, device), student


def _load_teacher(run: RunSpec, settings: TeacherSettings, device: str) -> TeacherModel:
    teacher = load_teacher(settings, device)
    if teacher.fingerprint != run.teacher_fingerprint:
        raise FatalError(
            f"the teacher {run.teacher.model} has changed since this run was planned "
            f"({teacher.fingerprint[:12]} now, {run.teacher_fingerprint[:12]} then); start the run again"
        )
    return teacher


def _cast_teacher(teacher: TeacherModel, settings: TeacherSettings, device: torch.device) -> TeacherModel:
    """Casts and moves a float32 teacher in place. The result equals a teacher that was loaded in that dtype.

    Only tensors of the state dict are cast: transformers computes the other buffers (rotary frequencies) in float32.
    """
    dtype = resolve_dtype(settings.dtype, device)
    for tensor in teacher.model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    teacher.model.config.dtype = dtype
    nn.Module.to(teacher.model, device)
    return replace(teacher, settings=settings, device=device, dtype=dtype)


def _student(run: RunSpec, teacher: TeacherModel | None, vocabulary: Vocabulary) -> PreTrainedModel:
    """Creates the student in float32 on the CPU, from a warm start, a config or the teacher."""
    settings = run.student
    if run.train.warm_start:
        return _warm_start(run, vocabulary)
    if settings.init == "config":
        return make_fresh(settings.config, vocabulary, run.train.seed)
    if teacher is None:
        raise FatalError(
            f'student.init = "{settings.init}" needs a teacher, but teacher.model is empty; set teacher.model'
        )
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
    """Loads the model of train.warm_start in float32. FatalError: it is incomplete, or changed since the run was
    planned."""
    source = TeacherSettings(model=run.train.warm_start)
    folder = resolve_model(source.model)
    found = folder_fingerprint(folder, source)
    if run.start and found != run.start:
        raise FatalError(
            f"the model {source.model} of train.warm_start has changed since this run was planned ({found[:12]} now, "
            f"{run.start[:12]} then); start the run again"
        )
    model = load_weights(source, folder, torch.float32, role="train.warm_start", dropout=run.student.dropout)
    check_vocabulary_fits(vocabulary, int(model.config.vocab_size), source.model)
    check_pad_id(model, vocabulary)
    return model


def _check_shapes_match(run: RunSpec, teacher: TeacherModel, student: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Raises FatalError unless the blocks have token ids of the teacher and the loss compares tensors of equal
    shape."""
    check_vocabulary_fits(vocabulary, teacher.vocab_size, run.teacher.model)
    rows, width = int(student.config.vocab_size), int(student.config.hidden_size)
    if run.loss.distil and rows < teacher.vocab_size:
        raise FatalError(
            f"the student has {rows} vocabulary rows, but the teacher {run.teacher.model} has {teacher.vocab_size}; "
            f"set student.config.vocab_size = {teacher.vocab_size}, or loss.distil = 0"
        )
    if run.loss.cosine and width != teacher.width:
        raise FatalError(
            f"the student's hidden size is {width}, but the teacher's is {teacher.width}, so they have no cosine; make "
            "the sizes equal, or set loss.cosine = 0"
        )


def _signal_source(run: RunSpec, store: Store, teacher: TeacherModel | None) -> SignalSource:
    if teacher is None or not run.loss.needs_teacher:
        return NoTeacher()
    if run.targets.source == "online":
        return OnlineTeacher(teacher, run.loss)
    targets = open_targets(store, run.manifest[0].targets_ref(0))
    probe_cache(store, run, teacher)
    # Training needs only the LM head of the teacher; this frees the memory of its encoder.
    setattr(teacher.model, teacher.model.base_model_prefix, nn.Identity())
    return CachedTeacher(teacher, targets.codec, run.loss)
