"""Keys of targets and calibrations: what decides their bytes is in them, and nothing else."""

from storage.artifact import Ref
from tasks.recipe.config import Mask, Targets, Teacher
from tasks.targets.keys import calibration_ref, targets_ref


def test_a_key_changes_with_all_that_changes_the_bytes_and_with_nothing_else():
    blocks = Ref("blocks", "a" * 64, "part-0000")
    usual = {
        "blocks": blocks,
        "fingerprint": "f",
        "teacher": Teacher(model="x"),
        "mask": Mask(),
        "targets": Targets(),
        "calibration_key": "c",
        "counts_key": "",
        "variant": 0,
    }
    key = targets_ref(**usual).key
    others = [
        {"blocks": Ref("blocks", "b" * 64, "part-0000")},
        {"fingerprint": "g"},
        {"teacher": Teacher(model="x", dtype="bfloat16")},
        {"teacher": Teacher(model="x", attention="eager")},
        {"mask": Mask(seed=1)},
        {"mask": Mask(rate=0.2)},
        {"mask": Mask(kind="smoothed")},
        {"targets": Targets(encoding="bf16")},
        {"targets": Targets(encoding="topk")},
        {"targets": Targets(encoding="topk", top_k=8)},
        {"targets": Targets(positions="all")},
        {"calibration_key": "d"},
        {"counts_key": "e"},
        {"variant": 1},
    ]
    keys = {targets_ref(**(usual | other)).key for other in others}
    assert len(keys | {key}) == len(others) + 1
    for same in (
        {"teacher": Teacher(model="elsewhere/x", batch_rows=9)},
        {"mask": Mask(variants=4)},
        {"targets": Targets(top_k=8, calibration_rows=9, on_missing="raise")},
    ):
        assert targets_ref(**(usual | same)).key == key


def test_calibration_is_shared_by_encodings_and_keyed_by_its_sample():
    sample = [Ref("blocks", letter * 64, f"part-{letter}") for letter in "ab"]
    arguments = ("f", Teacher(model="x"), Mask())
    key = calibration_ref(sample, *arguments, Targets()).key
    assert calibration_ref(sample, *arguments, Targets(encoding="int4")).key == key
    others = [
        calibration_ref(sample[:1], *arguments, Targets()),
        calibration_ref(sample, *arguments, Targets(calibration_rows=9)),
        calibration_ref(sample, *arguments, Targets(positions="all")),
        calibration_ref(sample, *arguments, Targets(), "counts"),
    ]
    assert len({ref.key for ref in others} | {key}) == 5
