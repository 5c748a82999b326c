"""The scores that decide about a registered model version, stored as its MLflow tags.

version = record_results(registry, version, set_results(scores), protocol_keys(scores))
newest_results(version)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flows.tracking.model_registry import ModelRegistry, Version
from tasks.release.results import NOT_RUN, SetResult

RESULT_TAG = "distil.standing."
"""Tag of a result: RESULT_TAG + set + "." + name of the protocol."""

PROTOCOL_TAG = "distil.protocol."
"""Tag of the protocol by which a set was scored last: PROTOCOL_TAG + set."""

PROTOCOL_DIGITS = 12


def record_results(
    registry: ModelRegistry, version: Version, results: Sequence[SetResult], protocols: Mapping[str, str]
) -> Version:
    """Stores results as tags of a version, each under the protocol of its set (any long hash). Older ones stay.

    Only a set that was once not run, and is not among the results any more, is removed: it must not block the gate.
    """
    given = {result.set_name for result in results}
    lacked = [name for name, protocol in protocols_by_set(version).items() if protocol == NOT_RUN]
    tags = {f"{PROTOCOL_TAG}{name}": "" for name in lacked if name not in given}
    for result in results:
        name, protocol = result.set_name, protocols[result.set_name][:PROTOCOL_DIGITS]
        tags[f"{RESULT_TAG}{name}.{protocol}"] = json.dumps(result.to_json(), ensure_ascii=False)
        tags[f"{PROTOCOL_TAG}{name}"] = protocol
    registry.tag_version(version, tags)
    return replace(version, tags={name: value for name, value in {**version.tags, **tags}.items() if value})


def protocols_by_set(version: Version) -> dict[str, str]:
    """The protocol by which each set of a version was scored last."""
    return {
        tag.removeprefix(PROTOCOL_TAG): value for tag, value in version.tags.items() if tag.startswith(PROTOCOL_TAG)
    }


def result_on(version: Version, set_name: str, protocol: str) -> SetResult | None:
    """A version's result on a set by one protocol, or None if it has none."""
    text = version.tags.get(f"{RESULT_TAG}{set_name}.{protocol[:PROTOCOL_DIGITS]}")
    return SetResult.from_json(json.loads(text)) if text else None


def newest_results(version: Version) -> list[SetResult]:
    """A version's newest result on each set."""
    found = (result_on(version, name, protocol) for name, protocol in protocols_by_set(version).items())
    return [result for result in found if result]
