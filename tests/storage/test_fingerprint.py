"""Keys depend on content only."""

import pytest

from storage.fingerprint import canonical_json, key_of


def test_key_does_not_depend_on_the_order_of_settings() -> None:
    assert key_of("blocks", 1, {"a": 1, "b": "é"}, ["x"]) == key_of("blocks", 1, {"b": "é", "a": 1}, ["x"])


@pytest.mark.parametrize(
    ("stage", "schema", "settings", "parents"),
    [("other", 1, {"a": 1}, ["x", "y"]), ("blocks", 2, {"a": 1}, ["x", "y"]), ("blocks", 1, {"a": 2}, ["x", "y"]),
     ("blocks", 1, {"a": 1}, ["y", "x"]), ("blocks", 1, {"a": 1}, ["xy"])],
)  # fmt: skip
def test_key_changes_with_each_ingredient(
    stage: str, schema: int, settings: dict[str, int], parents: list[str]
) -> None:
    assert key_of(stage, schema, settings, parents) != key_of("blocks", 1, {"a": 1}, ["x", "y"])


def test_keys_never_change_silently() -> None:
    """A changed key makes every existing store recompute its artifacts; update this value only on purpose."""
    assert key_of("blocks", 1, {"length": 512}, ["0"]) == (
        "c2e173443f2e19aef393610ce169da78870580b0fe8d5ecf0e871c6d5245e6bd"
    )


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": float("nan")})
