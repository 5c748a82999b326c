"""The names of targets and of the calibration behind them; their keys hold what decides their bytes and nothing else.

    ref = targets_ref(blocks, fingerprint, recipe.teacher, recipe.mask, recipe.targets, calibration.key, counts.key, 0)

Called by tasks.lineage, which only asks for names, and by tasks.teach, which makes them.
"""

from collections.abc import Sequence
from typing import Any

from storage.artifact import Ref
from storage.fingerprint import key_of
from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings

SCHEMA = 1


def needs_calibration(targets: TargetSettings) -> bool:
    """True for the encodings that store channels relative to their mean and deviation."""
    return targets.encoding in ("int8", "int4")


def calibration_ref(
    sample: Sequence[Ref],
    fingerprint: str,
    teacher: TeacherSettings,
    mask: MaskSettings,
    targets: TargetSettings,
    counts_key: str = "",
) -> Ref:
    """Names the calibration from a sample of blocks; the same for all encodings that need one."""
    settings = calibration_settings(fingerprint, teacher, mask, targets)
    parents = [ref.key for ref in sample] + ([counts_key] if counts_key else [])
    return Ref("calibration", key_of("calibration", SCHEMA, settings, parents), f"{sample[0].label}x{len(sample)}")


def calibration_settings(
    fingerprint: str, teacher: TeacherSettings, mask: MaskSettings, targets: TargetSettings
) -> dict[str, Any]:
    """What of the recipe decides a calibration, for its key and its receipt."""
    return {
        **_teaching_settings(fingerprint, teacher, mask),
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
    """Names one shard's targets under one mask variant.

    teacher.dtype is in the key as the recipe says it: with "auto" any machine names, and may make, the same targets.
    The other variants are not in it, so a recipe with more of them keeps those that it has.
    """
    settings = targets_settings(fingerprint, teacher, mask, targets, variant)
    parents = parents_of(blocks, calibration_key, counts_key)
    label = f"{blocks.label}.v{variant}" if mask.variants > 1 else blocks.label
    return Ref("targets", key_of("targets", SCHEMA, settings, parents), label)


def targets_settings(
    fingerprint: str, teacher: TeacherSettings, mask: MaskSettings, targets: TargetSettings, variant: int
) -> dict[str, Any]:
    """What of the recipe decides the targets of one mask variant, for their key and their receipt."""
    encoding = {"encoding": targets.encoding} | ({"top_k": targets.top_k} if targets.encoding == "topk" else {})
    return {
        **_teaching_settings(fingerprint, teacher, mask),
        **encoding,
        "positions": targets.positions,
        "variant": variant,
    }


def parents_of(blocks: Ref, calibration_key: str, counts_key: str) -> list[str]:
    """Keys of what a shard's targets are made from; an estimate that they do without has the key ""."""
    return [key for key in (blocks.key, calibration_key, counts_key) if key]


def _teaching_settings(fingerprint: str, teacher: TeacherSettings, mask: MaskSettings) -> dict[str, Any]:
    return {
        "teacher": fingerprint,
        "dtype": teacher.dtype,
        "attention": teacher.attention,
        "mask": mask.model_dump(mode="json", exclude={"variants"}),
    }
