"""Stores the scores that the gate compares as MLflow tags of a model version, and reads them.

version = record_results(registry, version, results_of_sets(scores), protocol_keys(scores))
newest_results(version)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flows.tracking.model_registry import ModelRegistry, Version
from tasks.release.results import NOT_RUN, SetResult

RESULT_TAG = "distil.standing."
"""Prefix of the tag of a result: RESULT_TAG + data set + "." + first PROTOCOL_DIGITS of the protocol's hash."""

PROTOCOL_TAG = "distil.protocol."
"""Prefix of the tag with the protocol by which a data set was scored last: PROTOCOL_TAG + data set."""

PROTOCOL_DIGITS = 12


def record_results(
    registry: ModelRegistry, version: Version, results: Sequence[SetResult], protocols: Mapping[str, str]
) -> Version:
    """Stores results as tags of a version, each under the protocol of its data set. Returns the updated version.

    `protocols` maps each data set to a hash. Older results are kept, except those of a data set that was not run and is
    no longer among the results: it must not block the gate.
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
    """Returns the protocol by which each data set of a version was scored last."""
    return {
        tag.removeprefix(PROTOCOL_TAG): value for tag, value in version.tags.items() if tag.startswith(PROTOCOL_TAG)
    }


def result_on(version: Version, set_name: str, protocol: str) -> SetResult | None:
    """Returns a version's result on a data set by one protocol, or None if the version has no such result."""
    text = version.tags.get(f"{RESULT_TAG}{set_name}.{protocol[:PROTOCOL_DIGITS]}")
    return SetResult.from_json(json.loads(text)) if text else None


def newest_results(version: Version) -> list[SetResult]:
    """Returns a version's newest result on each data set."""
    found = (result_on(version, name, protocol) for name, protocol in protocols_by_set(version).items())
    return [result for result in found if result]
