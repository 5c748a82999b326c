"""Frozen values that pass along: references, receipts, failures. The bytes themselves stay in the store."""

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from storage.errors import DamagedError, FatalError
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

_TYPES = {
    int: ("schema", "rows", "tokens"),
    str: ("label", "host", "created"),
    list: ("files", "parents"),
    dict: ("settings", "info", "versions", "timings"),
}
"""What JSON has in the fields of a receipt."""


def is_key(text: str) -> bool:
    """True for what can be the key of an artifact."""
    return _KEY.fullmatch(text) is not None


@dataclass(frozen=True)
class Ref:
    """Names one artifact: its kind, its key, and a label for people (`fr_meta_part_3-0002`)."""

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
    """Says that an artifact exists, and of which bytes; written last, so no receipt means no artifact.

    `settings` are those in its key, `info` is what was found on the way (counts, digests, the parity probe),
    `timings` are seconds. `seal` is the sha256 of everything else, so that an edited receipt is noticed.
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
        """The reference that this receipt answers."""
        return Ref(self.kind, self.key, self.label)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> str:
        """Names the folder of its data: 16 hex digits of the hash over its files."""
        return digest_of_files(self.files)

    def to_json(self) -> bytes:
        """The sealed receipt as JSON."""
        body = {name: value for name, value in asdict(self).items() if name != "seal"}
        return canonical_json(body | {"seal": sha256_bytes(canonical_json(body))})


@dataclass(frozen=True)
class Failure:
    """Why an artifact could not be made; lies beside where its receipt would be, until it succeeds."""

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


@dataclass(frozen=True)
class Fault:
    """Something that `verify` found wrong with a finished artifact; `withdrawn`: it does not exist any more.

    `what`: "damaged", "stray" (whole, with a file too many) or "unread" (it could not be looked at, so nobody knows).
    """

    ref: Ref
    reason: str
    withdrawn: bool = True
    what: str = "damaged"


def digest_of_files(files: tuple[DataFile, ...]) -> str:
    """16 hex digits that name these very bytes."""
    return sha256_bytes(canonical_json([asdict(file) for file in files]))[:16]


def receipt_from_json(data: bytes, where: str) -> Receipt:
    """Parses a receipt strictly. DamagedError if it is not JSON, not the very bytes that `to_json` gives, its seal does
    not fit, fields are missing or of another type, or a file would lie outside the artifact: a seal only says that a
    receipt is as it was written.
    """
    body = _parse(data, where)
    seal = body.pop("seal", None)
    if not _is_sealed(body, seal, data):
        raise DamagedError(f"{where}: the receipt was changed after it was written; run `distil verify`", where)
    try:
        wrong = [name for kind, names in _TYPES.items() for name in names if not isinstance(body[name], kind)]
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
    """ValueError unless the name is a plain path below the artifact's folder, with a size and a hash."""
    parts = file.name.split("/") if isinstance(file.name, str) else []
    if not parts or not file.name.isprintable() or "\\" in file.name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the file name {file.name!r} leads out of its folder or has odd characters")
    if type(file.size) is not int or file.size < 0 or not isinstance(file.sha256, str):
        raise ValueError(f"the file {file.name} has no size or no hash")


def failure_from_json(data: bytes, where: str) -> Failure:
    """Parses a failure note. FatalError if it is not one."""
    try:
        return Failure(**_parse(data, where))
    except TypeError as error:
        raise FatalError(f"{where}: not a failure note ({error}); delete the file", where) from error


def _is_sealed(body: dict[str, Any], seal: object, data: bytes) -> bool:
    try:
        whole = canonical_json(body | {"seal": seal})
        return data == whole and seal == sha256_bytes(canonical_json(body))
    except ValueError:  # NaN, or half a character
        return False


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where}: not JSON ({error}); run `distil verify`", where) from error
    if not isinstance(body, dict):
        raise DamagedError(f"{where}: not a JSON object; run `distil verify`", where)
    return body
