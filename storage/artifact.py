"""Defines the values that describe artifacts: references, receipts, failures and faults. Data stays in the store.

ref = Ref("blocks", key, "fr_meta_part_3-0002")
receipt = receipt_from_json(path.read_bytes(), str(path))
failure = Failure.from_error(ref.kind, ref.key, ref.label, error)
"""

import json
import os
import re
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from storage.errors import DamagedError, DistilError, FatalError
from storage.fingerprint import canonical_json, sha256_bytes

KINDS = (
    "source",
    "shard",
    "counts",
    "blocks",
    "calibration",
    "targets",
    "checkpoint",
    "model",
    "scores",
)

_KEY = re.compile(r"[0-9a-f]{64}(-[0-9]{9})?")

NODE = "DISTIL_NODE"
"""Environment variable that replaces the host name in receipts and failures, for a host that runs several nodes."""

_FIELD_TYPES = {
    int: ("schema", "rows", "tokens"),
    str: ("label", "host", "created"),
    list: ("files", "parents"),
    dict: ("settings", "info", "versions", "timings"),
}
"""JSON types of the fields of a receipt."""


def now() -> str:
    """Returns the current time in UTC, as ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def host_name() -> str:
    """Returns the name of the node that runs this process, as recorded in receipts and failures."""
    return os.environ.get(NODE) or socket.gethostname()


def is_key(text: str) -> bool:
    """Returns True if `text` has the form of a key: a hex sha256, followed by the step in the key of a checkpoint."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True)
class Ref:
    """Identifies one artifact by kind and key. The label (`fr_meta_part_3-0002`) is for display only.

    Raises ValueError if the kind is unknown or the key does not have the form of a key.
    """

    kind: str
    key: str
    label: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown artifact kind {self.kind!r}")
        if not is_key(self.key):
            raise ValueError(f"{self.key!r} is not a key")


@dataclass(frozen=True)
class DataFile:
    """One file of an artifact, with its path inside the artifact, its size in bytes and its sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """Lists the files of an artifact. It is written last, so it also proves that the artifact is complete.

    `settings` are the settings in the key, `info` contains results of the computation (counts, digests, the parity
    probe), and `timings` are in seconds. `seal` is the sha256 of all other fields: it reveals an edited receipt.
    """

    kind: str
    key: str
    label: str
    schema: int
    files: tuple[DataFile, ...]
    rows: int
    tokens: int
    parents: tuple[str, ...]
    settings: dict[str, Any]
    info: dict[str, Any]
    versions: dict[str, str]
    timings: dict[str, float]
    host: str
    created: str
    seal: str = field(default="", compare=False)

    @property
    def ref(self) -> Ref:
        """Reference to this artifact."""
        return Ref(self.kind, self.key, self.label)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> str:
        """Name of the data folder: 16 hex digits of a hash over the files."""
        return digest_of_files(self.files)

    def to_json(self) -> bytes:
        """Returns the receipt with its seal, as JSON."""
        body = {name: value for name, value in asdict(self).items() if name != "seal"}
        return canonical_json(body | {"seal": sha256_bytes(canonical_json(body))})


@dataclass(frozen=True)
class Failure:
    """Records why an artifact could not be made. It is stored in the folder of receipts until a later commit succeeds.

    `key` is "" while the content of a source is unknown. `error` is the class name of the exception. `file` and `line`
    locate the cause in the input ("" and None if unknown).
    """

    kind: str
    key: str
    label: str
    error: str
    message: str
    retryable: bool
    file: str
    line: int | None
    host: str
    created: str

    @classmethod
    def from_error(cls, kind: str, key: str, label: str, error: Exception) -> Self:
        """Creates the failure of an artifact, with this host and the current time. Only FatalError is not retryable."""
        return cls(
            kind=kind,
            key=key,
            label=label,
            error=type(error).__name__,
            message=str(error),
            retryable=not isinstance(error, FatalError),
            file=error.file if isinstance(error, DistilError) else "",
            line=error.line if isinstance(error, DistilError) else None,
            host=host_name(),
            created=now(),
        )


@dataclass(frozen=True)
class Fault:
    """A problem that `verify` found in a committed artifact; `withdrawn` is True if its receipt was removed.

    `what` is "damaged", "stray" (the artifact is complete, but its folder contains a file that the receipt does not
    list) or "unread" (the artifact could not be read, so its state is unknown).
    """

    ref: Ref
    reason: str
    withdrawn: bool = True
    what: str = "damaged"


def digest_of_files(files: tuple[DataFile, ...]) -> str:
    """Returns 16 hex digits of a hash over the names, sizes and hashes of the files."""
    return sha256_bytes(canonical_json([asdict(file) for file in files]))[:16]


def receipt_from_json(data: bytes, where: str) -> Receipt:
    """Parses a receipt. `where` is its path in error messages.

    Raises DamagedError if the bytes differ from the output of `to_json`, the seal is wrong, a field is missing or of
    the wrong type, or a file name points outside the folder of the artifact (a valid seal does not rule that out).
    """
    body = _parse(data, where)
    seal = body.pop("seal", None)
    if not _is_sealed(body, seal, data):
        raise DamagedError(f"{where}: the receipt was changed after it was written; run `distil verify`", where)
    try:
        wrong = [name for kind, names in _FIELD_TYPES.items() for name in names if not isinstance(body[name], kind)]
        files = tuple(DataFile(**file) for file in body.pop("files"))
        if wrong or not files:
            raise TypeError(f"{(*wrong, 'files')[0]} has the wrong type")
        receipt = Receipt(files=files, parents=tuple(body.pop("parents")), seal=seal, **body)
        Ref(receipt.kind, receipt.key, receipt.label)
        for file in files:
            _check_file(file)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{where}: not a receipt of this version ({error}); run `distil verify`", where) from error
    return receipt


def _check_file(file: DataFile) -> None:
    """Raises ValueError unless the file has a size, a hash, and a printable path inside the artifact's folder."""
    parts = file.name.split("/") if isinstance(file.name, str) else []
    if not parts or not file.name.isprintable() or "\\" in file.name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(
            f"the file name {file.name!r} points outside the folder of the artifact or contains unprintable characters"
        )
    if type(file.size) is not int or file.size < 0 or not isinstance(file.sha256, str):
        raise ValueError(f"the file {file.name} has no valid size or hash")


def failure_from_json(data: bytes, where: str) -> Failure:
    """Parses a failure. `where` is its path in error messages. Raises FatalError if the JSON is not a failure."""
    try:
        return Failure(**_parse(data, where))
    except TypeError as error:
        raise FatalError(f"{where}: not a failure record ({error}); delete the file", where) from error


def _is_sealed(body: dict[str, Any], seal: object, data: bytes) -> bool:
    try:
        sealed = canonical_json(body | {"seal": seal})
        return data == sealed and seal == sha256_bytes(canonical_json(body))
    except ValueError:  # NaN, or a lone surrogate
        return False


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON ({error}); run `distil verify`", where) from error
    if not isinstance(body, dict):
        raise DamagedError(f"{where}: not a JSON object; run `distil verify`", where)
    return body
