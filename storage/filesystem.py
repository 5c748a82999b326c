"""File systems behind fsspec: opened in one way, their errors as our two, whole files copied with patience.

    fs, base = open_url("s3://bucket/prefix")
    with answering("the store s3://bucket/prefix"):
        upload(fs, path, f"{base}/name")

What is not on this machine needs the package of its protocol (s3fs, gcsfs, adlfs). Credentials and addresses come from
the environment, under the names that those packages know (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION,
AWS_ENDPOINT_URL_S3; GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_ACCOUNT_NAME, …), never from a URL.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec

from storage.disk import FULL
from storage.errors import DistilError, FatalError, RetryableError

T = TypeVar("T")

CREDENTIALS = "credentials come from the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"

PART_BYTES = 16 << 20
"""Bytes of one part of a large object; so many are in memory for each of the AT_ONCE parts on their way."""

PARALLEL_PARTS = 4

MOST_PARTS = 10_000
"""S3 takes no more of one object."""

PAUSES = (1.0, 4.0)
"""Seconds before a whole file is tried again, beyond what the client itself tries."""

PACKAGES = {
    "s3": "s3fs boto3",
    "s3a": "s3fs boto3",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}

_PASSWORD = re.compile(r"[\w+.-]+://[^/@]*:(?!\d+/)[^@]*@")

_CLIENTS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("boto3.exceptions", "Boto3Error"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}

_WRONG_ADDRESS = {"ParamValidationError", "InvalidRegionError", "NoRegionError", "InvalidEndpointConfigurationError"}

_WRONG_CODES = {
    "AuthorizationHeaderMalformed",
    "EntityTooLarge",
    "InvalidBucketName",
    "IllegalLocationConstraintException",
    "KeyTooLongError",
    "MethodNotAllowed",
    "NotImplemented",
    "PermanentRedirect",
    "301",
}
"""What S3 says of a wrong address or region, or of what it cannot do at all."""


def open_url(url: str, options: Mapping[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path that it knows for it. Nothing is asked of it yet.

    FatalError: a URL with a password, a protocol that nobody knows or whose package is not installed.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    if has_password(url):
        raise FatalError(f"a {protocol}:// URL holds a name and a password; take them out: {CREDENTIALS}")
    try:
        fs, path = fsspec.core.url_to_fs(url, **_settings(protocol), **dict(options or {}))
    except ImportError as error:
        package = PACKAGES.get(protocol, "")
        advice = f"pip install {package}" if package else "install the package that it names"
        raise FatalError(f"{url} cannot be opened, {protocol}:// needs another package ({error}): {advice}") from error
    except ValueError as error:
        raise FatalError(f"{url} cannot be opened: {error}", url) from error
    return fs, path


def has_password(url: str) -> bool:
    """True if a URL names a user with a password, as in `s3://KEY:SECRET@bucket`."""
    return bool(_PASSWORD.match(url))


def files_below(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder, as `fs.find(path, detail=True)` says it: its size, and when it was written.

    Not by `find` where that is slow: of s3fs it looks every folder up in a list of all that it has met, minutes for
    20,000; on this machine it asks about each file ten times.
    """
    if on_this_machine(fs):
        return dict(_files_here(path))
    if not hasattr(fs, "call_s3"):
        return cast(dict[str, dict[str, Any]], fs.find(path, detail=True))
    bucket, prefix, _ = fs.split_path(path)
    found: dict[str, dict[str, Any]] = {}
    asked = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/"}
    while True:
        page = fs.call_s3("list_objects_v2", **asked)
        for each in page.get("Contents", ()):
            found[f"{bucket}/{each['Key']}"] = {"size": each["Size"], "LastModified": each["LastModified"]}
        if not page.get("IsTruncated"):
            return found
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _files_here(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file or folder that is not there, or goes away meanwhile, is left out; one that may not be read is an error."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(path, onerror=refuse):
        for name in names:
            with suppress(FileNotFoundError):
                stat = os.stat(f"{folder}/{name}")
                yield f"{folder}/{name}", {"size": stat.st_size, "mtime": stat.st_mtime}


def on_this_machine(fs: fsspec.AbstractFileSystem) -> bool:
    """True if its paths are paths on this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _settings(protocol: str) -> dict[str, Any]:
    """Listings are never remembered, since others write too; S3 is asked again after 5xx, resets and slow-downs."""
    if protocol not in PACKAGES:
        return {}
    if PACKAGES[protocol] != PACKAGES["s3"]:
        return {"use_listings_cache": False}
    retries = {
        "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "5")),
    }
    return {
        "use_listings_cache": False,
        "max_concurrency": PARALLEL_PARTS,
        "default_block_size": PART_BYTES,
        # Receipts hold the sha256 of every file, and some servers send the checksum of the whole object with a part.
        "config_kwargs": {
            "retries": retries,
            "read_timeout": 60,
            "response_checksum_validation": "when_required",
        },
    }


# ---- errors ------------------------------------------------------------------------------------------------


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Turns what a file system raises into the two error types; that a file or folder is not there passes as it is.

    `where` names the file system in the sentence: `the store s3://bucket/prefix`.
    """
    try:
        yield
    except client_errors() as error:
        ours = translated(error, where)
        if ours is None:
            raise
        raise ours from error


def client_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What file systems raise: OSError, and what clients of object stores have besides, as far as they are loaded."""
    return *others, OSError, *(getattr(sys.modules[module], name) for module, name in _CLIENTS if module in sys.modules)


def translated(error: Exception, where: str) -> DistilError | None:
    """The error in one sentence of ours, or None where a file or folder is not there."""
    code, kind = _code(error), type(error).__name__
    if code == "NoSuchBucket":
        return FatalError(f"{where}: there is no such bucket; create it, or correct the URL")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        # The server forgot the parts that it had; sent again they make a whole object.
        return RetryableError(f"{where} lost an upload half-way: {error}") if code == "NoSuchUpload" else None
    if kind in _NO_CREDENTIALS:
        return FatalError(
            f"{where} needs credentials and there are none ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or what its client reads, in the environment"
        )
    if isinstance(error, PermissionError) or code in ("AccessDenied", "403"):
        advice = "; check the credentials in the environment and what they allow" if code else ""
        return FatalError(f"{where} may not be written or read: {error}{advice}")
    if code in _WRONG_CODES or kind in _WRONG_ADDRESS:
        return FatalError(f"{where} refused: {error}; check the URL, the region and the endpoint in the environment")
    if isinstance(error, OSError) and error.errno in FULL:
        return FatalError(f"{where} {FULL[error.errno]} ({error})")
    if is_remote_error(error):
        return RetryableError(f"{where} did not answer: {error or kind}")
    return RetryableError(f"{where} failed: {error}")


def is_remote_error(error: Exception) -> bool:
    """True if the other side or the way to it is the cause, and not a file on this machine or what is in it."""
    return _code(error) != "" or not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def _code(error: BaseException | None) -> str:
    """S3's own word for what is wrong, from the first error in the chain that has one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


# ---- whole files -------------------------------------------------------------------------------------------


def with_retries(transfer: Callable[[], T]) -> T:
    """Calls `transfer`, and again after each of PAUSES while it raises RetryableError."""
    for pause in PAUSES:
        try:
            return transfer()
        except RetryableError:
            time.sleep(pause)
    return transfer()


def upload(fs: fsspec.AbstractFileSystem, path: Path, target: str) -> None:
    """Copies a local file in parts, and asks for the size that arrived. RetryableError if it is another one."""
    size = path.stat().st_size
    parts = {"chunksize": max(PART_BYTES, -(-size // MOST_PARTS))} if "s3" in fs.protocol else {}
    fs.put_file(os.fspath(path), target, **parts)
    _refuse_other_size(fs, target, size)


def write_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a small object and asks for the size that arrived. RetryableError if it is another one, and the object
    is deleted again: half a receipt would count as one in a listing.
    """
    fs.pipe_file(path, data)
    try:
        _refuse_other_size(fs, path, len(data))
    except RetryableError:
        with suppress(FileNotFoundError):
            fs.rm_file(path)
        raise


def _refuse_other_size(fs: fsspec.AbstractFileSystem, path: str, size: int) -> None:
    try:
        found = int(fs.info(path)["size"])
    except FileNotFoundError as error:
        raise RetryableError(f"{path} is not there after an upload of {size:,} bytes", path) from error
    if found != size:
        raise RetryableError(f"{path} has {found:,} bytes after an upload of {size:,}", path)


def download_file(fs: fsspec.AbstractFileSystem, path: str, target: Path) -> None:
    """Copies an object to a local file. RetryableError if fewer bytes came than there are; FileNotFoundError."""
    fs.get_file(path, os.fspath(target))
    size, came = int(fs.info(path)["size"]), target.stat().st_size
    if came != size:
        raise RetryableError(f"{path} came with {came:,} of its {size:,} bytes", path)
