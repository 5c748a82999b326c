"""Values that describe artifacts: references, receipts, failures and faults. The bytes stay in the store.

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
"""Environment variable: receipts and failures name this node instead of the host, where a host runs several nodes."""

_FIELD_TYPES = {
    int: ("schema", "rows", "tokens"),
    str: ("label", "host", "created"),
    list: ("files", "parents"),
    dict: ("settings", "info", "versions", "timings"),
}
"""Types of a receipt's fields in JSON."""


def now() -> str:
    """The time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def host_name() -> str:
    """The node that runs this process, as receipts and failures record it."""
    return os.environ.get(NODE) or socket.gethostname()


def is_key(text: str) -> bool:
    """True if `text` has the form of a key: a hex sha256, for a checkpoint followed by its step."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True)
class Ref:
    """Identifies one artifact by kind and key; the label (`fr_meta_part_3-0002`) is for display.

    ValueError: unknown kind, or a key of another form.
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
    """One file of an artifact: its name inside the artifact, size in bytes, sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """Proves that an artifact is complete and lists its files; it is written last, so no receipt means no artifact.

    `settings` are those in its key, `info` holds results of the computation (counts, digests, the parity probe),
    `timings` are seconds. `seal` is the sha256 of all other fields, so that an edited receipt is detected.
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
        """The reference of this artifact."""
        return Ref(self.kind, self.key, self.label)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> str:
        """Name of its data folder: 16 hex digits of a hash over its files."""
        return digest_of_files(self.files)

    def to_json(self) -> bytes:
        """The sealed receipt as JSON."""
        body = {name: value for name, value in asdict(self).items() if name != "seal"}
        return canonical_json(body | {"seal": sha256_bytes(canonical_json(body))})


@dataclass(frozen=True)
class Failure:
    """Why an artifact could not be made; stored next to the place of its receipt until a later commit succeeds.

    `key` is "" while the content of a source is not known. `error` is the class name; `file` and `line` are those of
    the input that caused it ("" and None if unknown).
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
        """The failure of an artifact on this host, now. Every error except FatalError counts as retryable."""
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
    """A problem that `verify` found in a committed artifact; `withdrawn`: its receipt was removed.

    `what`: "damaged", "stray" (complete, plus a file that the receipt does not name) or "unread" (the store could not
    read it, so its state is unknown).
    """

    ref: Ref
    reason: str
    withdrawn: bool = True
    what: str = "damaged"


def digest_of_files(files: tuple[DataFile, ...]) -> str:
    """16 hex digits of a hash over names, sizes and hashes of the files."""
    return sha256_bytes(canonical_json([asdict(file) for file in files]))[:16]


def receipt_from_json(data: bytes, where: str) -> Receipt:
    """Parses a receipt; `where` names it in errors.

    DamagedError if the bytes differ from those of `to_json`, the seal is wrong, a field is missing or of another type,
    or a file name leads out of the artifact's folder (a valid seal does not rule that out).
    """
    body = _parse(data, where)
    seal = body.pop("seal", None)
    if not _is_sealed(body, seal, data):
        raise DamagedError(f"{where}: the receipt was changed after it was written; run `distil verify`", where)
    try:
        wrong = [name for kind, names in _FIELD_TYPES.items() for name in names if not isinstance(body[name], kind)]
        files = tuple(DataFile(**file) for file in body.pop("files"))
        if wrong or not files:
            raise TypeError(f"{(*wrong, 'files')[0]} is of another type")
        receipt = Receipt(files=files, parents=tuple(body.pop("parents")), seal=seal, **body)
        Ref(receipt.kind, receipt.key, receipt.label)
        for file in files:
            _check_file(file)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{where}: not a receipt of this version ({error}); run `distil verify`", where) from error
    return receipt


def _check_file(file: DataFile) -> None:
    """ValueError unless the name is a printable relative path inside the artifact's folder, with a size and a hash."""
    parts = file.name.split("/") if isinstance(file.name, str) else []
    if not parts or not file.name.isprintable() or "\\" in file.name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the file name {file.name!r} leads out of its folder or has odd characters")
    if type(file.size) is not int or file.size < 0 or not isinstance(file.sha256, str):
        raise ValueError(f"the file {file.name} has no size or no hash")


def failure_from_json(data: bytes, where: str) -> Failure:
    """Parses a failure; `where` names it in errors. FatalError if it is not one."""
    try:
        return Failure(**_parse(data, where))
    except TypeError as error:
        raise FatalError(f"{where}: not a failure note ({error}); delete the file", where) from error


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
