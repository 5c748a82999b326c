"""The scores that decide about a registered version, written to and read from its MLflow tags."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flows.tracking.registry import ModelRegistry, Version
from tasks.release.results import NOT_RUN, SetResult

RESULT_TAG = "distil.standing."
"""Tag of a result: RESULT_TAG + set + "." + name of the protocol."""

PROTOCOL_TAG = "distil.protocol."
"""Tag that says by which protocol a set was scored last: PROTOCOL_TAG + set."""

PROTOCOL_DIGITS = 12


def record_results(
    registry: ModelRegistry, version: Version, results: Sequence[SetResult], protocols: Mapping[str, str]
) -> Version:
    """Keeps results as tags of a version, each under the protocol of its set (any long hash); older ones stay.

    Only what was once not run and is no longer asked for is forgotten: it must not block.
    """
    asked = {result.set_name for result in results}
    lacked = [name for name, protocol in protocols_by_set(version).items() if protocol == NOT_RUN]
    tags = {f"{PROTOCOL_TAG}{name}": "" for name in lacked if name not in asked}
    for result in results:
        name, protocol = result.set_name, protocols[result.set_name][:PROTOCOL_DIGITS]
        tags[f"{RESULT_TAG}{name}.{protocol}"] = json.dumps(result.to_json(), ensure_ascii=False)
        tags[f"{PROTOCOL_TAG}{name}"] = protocol
    registry.tag_version(version, tags)
    return replace(version, tags={name: value for name, value in {**version.tags, **tags}.items() if value})


def protocols_by_set(version: Version) -> dict[str, str]:
    """For each set of a version the protocol by which it was scored last."""
    return {
        tag.removeprefix(PROTOCOL_TAG): value for tag, value in version.tags.items() if tag.startswith(PROTOCOL_TAG)
    }


def result_on(version: Version, set_name: str, protocol: str) -> SetResult | None:
    """A version's result on a set by one protocol, or None where it was not scored so."""
    text = version.tags.get(f"{RESULT_TAG}{set_name}.{protocol[:PROTOCOL_DIGITS]}")
    return SetResult.from_json(json.loads(text)) if text else None


def newest_results(version: Version) -> list[SetResult]:
    """A version's newest result on each set."""
    found = (result_on(version, name, protocol) for name, protocol in protocols_by_set(version).items())
    return [result for result in found if result]
