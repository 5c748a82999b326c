"""Keys of targets and calibrations change with everything that decides their bytes, and with nothing else."""

from storage.artifact import Ref
from tasks.recipe.config import MaskSettings, TargetSettings, TeacherSettings
from tasks.targets.keys import calibration_ref, targets_ref


def test_a_targets_key_changes_exactly_with_the_settings_that_change_its_bytes():
    blocks = Ref("blocks", "a" * 64, "part-0000")
    usual = {
        "blocks": blocks,
        "fingerprint": "f",
        "teacher": TeacherSettings(model="x"),
        "mask": MaskSettings(),
        "targets": TargetSettings(),
        "calibration_key": "c",
        "counts_key": "",
        "variant": 0,
    }
    key = targets_ref(**usual).key
    others = [
        {"blocks": Ref("blocks", "b" * 64, "part-0000")},
        {"fingerprint": "g"},
        {"teacher": TeacherSettings(model="x", dtype="bfloat16")},
        {"teacher": TeacherSettings(model="x", attention="eager")},
        {"mask": MaskSettings(seed=1)},
        {"mask": MaskSettings(rate=0.2)},
        {"mask": MaskSettings(kind="smoothed")},
        {"targets": TargetSettings(encoding="bf16")},
        {"targets": TargetSettings(encoding="topk")},
        {"targets": TargetSettings(encoding="topk", top_k=8)},
        {"targets": TargetSettings(positions="all")},
        {"calibration_key": "d"},
        {"counts_key": "e"},
        {"variant": 1},
    ]
    keys = {targets_ref(**(usual | other)).key for other in others}
    assert len(keys | {key}) == len(others) + 1
    for same in (
        {"teacher": TeacherSettings(model="elsewhere/x", batch_rows=9)},
        {"mask": MaskSettings(variants=4)},
        {"targets": TargetSettings(top_k=8, calibration_rows=9, on_missing="raise")},
    ):
        assert targets_ref(**(usual | same)).key == key


def test_encodings_share_a_calibration_and_its_key_follows_the_sample():
    sample = [Ref("blocks", letter * 64, f"part-{letter}") for letter in "ab"]
    arguments = ("f", TeacherSettings(model="x"), MaskSettings())
    key = calibration_ref(sample, *arguments, TargetSettings()).key
    assert calibration_ref(sample, *arguments, TargetSettings(encoding="int4")).key == key
    others = [
        calibration_ref(sample[:1], *arguments, TargetSettings()),
        calibration_ref(sample, *arguments, TargetSettings(calibration_rows=9)),
        calibration_ref(sample, *arguments, TargetSettings(positions="all")),
        calibration_ref(sample, *arguments, TargetSettings(), "counts"),
    ]
    assert len({ref.key for ref in others} | {key}) == 5
