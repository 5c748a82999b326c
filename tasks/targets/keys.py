"""Computes the keys of targets and calibrations: hashes of exactly the settings and inputs that decide their bytes.

    ref = targets_ref(blocks, fingerprint, recipe.teacher, recipe.mask, recipe.targets, calibration.key, counts.key, 0)

This module does not import torch: tasks.lineage computes every key of a recipe without loading a model.
"""

from collections.abc import Sequence
from typing import Any

from storage.artifact import Ref
from storage.fingerprint import key_of
from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings

SCHEMA = 1


def needs_calibration(targets: TargetSettings) -> bool:
    """Returns True for the encodings that standardize channels by mean and standard deviation, else False."""
    return targets.encoding in ("int8", "int4")


def calibration_ref(
    sample: Sequence[Ref],
    fingerprint: str,
    teacher: TeacherSettings,
    mask: MaskSettings,
    targets: TargetSettings,
    counts_key: str = "",
) -> Ref:
    """Returns the reference of the calibration on a sample of blocks; all encodings that need a calibration share
    it."""
    settings = calibration_settings(fingerprint, teacher, mask, targets)
    parents = [ref.key for ref in sample] + ([counts_key] if counts_key else [])
    return Ref("calibration", key_of("calibration", SCHEMA, settings, parents), f"{sample[0].label}x{len(sample)}")


def calibration_settings(
    fingerprint: str, teacher: TeacherSettings, mask: MaskSettings, targets: TargetSettings
) -> dict[str, Any]:
    """Returns the settings that decide a calibration, for its key and receipt."""
    return {
        **_capture_settings(fingerprint, teacher, mask),
        "positions": targets.positions,
        "rows": targets.calibration_rows,
    }


def targets_ref(
    blocks: Ref,
    fingerprint: str,
    teacher: TeacherSettings,
    mask: MaskSettings,
    targets: TargetSettings,
    calibration_key: str,
    counts_key: str,
    variant: int,
) -> Ref:
    """Returns the reference of the targets of one shard under one mask variant.

    The key contains teacher.dtype as written in the recipe: with "auto", the targets of a CPU and of a GPU have the
    same key. It does not contain the number of variants, so a recipe that adds variants keeps its existing targets.
    """
    settings = targets_settings(fingerprint, teacher, mask, targets, variant)
    parents = parents_of(blocks, calibration_key, counts_key)
    label = f"{blocks.label}.v{variant}" if mask.variants > 1 else blocks.label
    return Ref("targets", key_of("targets", SCHEMA, settings, parents), label)


def targets_settings(
    fingerprint: str, teacher: TeacherSettings, mask: MaskSettings, targets: TargetSettings, variant: int
) -> dict[str, Any]:
    """Returns the settings that decide the targets of one mask variant, for their key and receipt."""
    encoding = {"encoding": targets.encoding} | ({"top_k": targets.top_k} if targets.encoding == "topk" else {})
    return {
        **_capture_settings(fingerprint, teacher, mask),
        **encoding,
        "positions": targets.positions,
        "variant": variant,
    }


def parents_of(blocks: Ref, calibration_key: str, counts_key: str) -> list[str]:
    """Returns the keys of the inputs of a shard's targets.

    `calibration_key` and `counts_key` are empty, and left out, if the targets do not use a calibration or token counts.
    """
    return [key for key in (blocks.key, calibration_key, counts_key) if key]


def _capture_settings(fingerprint: str, teacher: TeacherSettings, mask: MaskSettings) -> dict[str, Any]:
    return {
        "teacher": fingerprint,
        "dtype": teacher.dtype,
        "attention": teacher.attention,
        "mask": mask.model_dump(mode="json", exclude={"variants"}),
    }
