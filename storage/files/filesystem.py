"""Local and remote file systems through fsspec: opening, error translation, and verified transfers of files.

    fs, base = open_url("s3://bucket/prefix")
    with translate_errors("the store s3://bucket/prefix"):
        upload(fs, path, f"{base}/name")

A remote file system needs the package of its protocol (s3fs, gcsfs, adlfs). Credentials and endpoints come from the
environment variables that those packages read (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION,
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

from storage.errors import DistilError, FatalError, RetryableError
from storage.files.disk import DISK_ERRORS

T = TypeVar("T")

CREDENTIALS = "credentials come from the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"

PART_BYTES = 16 << 20
"""Bytes of one part of a large object; each of PARALLEL_PARTS transfers holds one part in memory."""

PARALLEL_PARTS = 4

MAX_PARTS = 10_000
"""Limit of S3 per object."""

PAUSES = (1.0, 4.0)
"""Seconds before each retry of a transfer, on top of the retries of the client itself."""

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

_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("boto3.exceptions", "Boto3Error"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}

_CONFIGURATION_ERRORS = {
    "ParamValidationError",
    "InvalidRegionError",
    "NoRegionError",
    "InvalidEndpointConfigurationError",
}

_CONFIGURATION_CODES = {
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
"""Error codes of S3 for a wrong endpoint or region, and for requests that it does not support."""


def open_url(url: str, options: Mapping[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it. Sends no request.

    FatalError: the URL holds a password, or its protocol is unknown or its package not installed.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    if has_password(url):
        raise FatalError(f"a {protocol}:// URL holds a name and a password; take them out: {CREDENTIALS}")
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(protocol), **dict(options or {}))
    except ImportError as error:
        package = PACKAGES.get(protocol, "")
        advice = f"pip install {package}" if package else "install the package that it names"
        raise FatalError(f"{url} cannot be opened, {protocol}:// needs another package ({error}): {advice}") from error
    except ValueError as error:
        raise FatalError(f"{url} cannot be opened: {error}", url) from error
    return fs, path


def has_password(url: str) -> bool:
    """True if a URL holds a user name and a password, as in `s3://KEY:SECRET@bucket`."""
    return bool(_PASSWORD.match(url))


def files_below(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Every file below a folder with its size and modification time, in the format of `fs.find(path, detail=True)`.

    Avoids `find` where it is slow: that of s3fs takes minutes for 20,000 folders (it searches a list of all folders for
    each), and the local one calls stat ten times per file.
    """
    if on_this_machine(fs):
        return dict(_local_files(path))
    if not hasattr(fs, "call_s3"):
        return cast(dict[str, dict[str, Any]], fs.find(path, detail=True))
    bucket, prefix, _ = fs.split_path(path)
    found: dict[str, dict[str, Any]] = {}
    request = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/"}
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            found[f"{bucket}/{entry['Key']}"] = {"size": entry["Size"], "LastModified": entry["LastModified"]}
        if not page.get("IsTruncated"):
            return found
        request["ContinuationToken"] = page["NextContinuationToken"]


def _local_files(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Leaves out files and folders that do not exist or are deleted meanwhile; raises for unreadable ones."""

    def raise_unless_deleted(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(path, onerror=raise_unless_deleted):
        for name in names:
            with suppress(FileNotFoundError):
                stat = os.stat(f"{folder}/{name}")
                yield f"{folder}/{name}", {"size": stat.st_size, "mtime": stat.st_mtime}


def on_this_machine(fs: fsspec.AbstractFileSystem) -> bool:
    """True for the local file system."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _options(protocol: str) -> dict[str, Any]:
    """Client options. Listings are not cached, because other processes write too; botocore retries S3 requests."""
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
        # Receipts hold the sha256 of every file, and some servers send the checksum of the entire object with a part.
        "config_kwargs": {
            "retries": retries,
            "read_timeout": 60,
            "response_checksum_validation": "when_required",
        },
    }


# ---- errors ------------------------------------------------------------------------------------------------


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Raises a file system's errors as FatalError or RetryableError; FileNotFoundError passes through.

    `where` names the file system in the message: `the store s3://bucket/prefix`.
    """
    try:
        yield
    except client_errors() as error:
        translation = translated(error, where)
        if translation is None:
            raise
        raise translation from error


def client_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Types of error that file systems raise: OSError, those of imported object-store clients, and `others`."""
    return (
        *others,
        OSError,
        *(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules),
    )


def translated(error: Exception, where: str) -> DistilError | None:
    """The error as FatalError or RetryableError, or None if a file or folder does not exist."""
    code, kind = _code(error), type(error).__name__
    if code == "NoSuchBucket":
        return FatalError(f"{where}: there is no such bucket; create it, or correct the URL")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        # The server lost the parts that it had received; another upload sends all of them.
        return RetryableError(f"{where} lost an upload half-way: {error}") if code == "NoSuchUpload" else None
    if kind in _NO_CREDENTIALS:
        return FatalError(
            f"{where} needs credentials and found none ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or the variables that its client reads, in the environment"
        )
    if isinstance(error, PermissionError) or code in ("AccessDenied", "403"):
        advice = "; check the credentials in the environment and what they allow" if code else ""
        return FatalError(f"{where} may not be written or read: {error}{advice}")
    if code in _CONFIGURATION_CODES or kind in _CONFIGURATION_ERRORS:
        return FatalError(f"{where} refused: {error}; check the URL, the region and the endpoint in the environment")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return FatalError(f"{where} {DISK_ERRORS[error.errno]} ({error})")
    if is_remote_error(error):
        return RetryableError(f"{where} did not answer: {error or kind}")
    return RetryableError(f"{where} failed: {error}")


def is_remote_error(error: Exception) -> bool:
    """True if the server or the network is the cause, and not a local file or its content."""
    return _code(error) != "" or not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def _code(error: BaseException | None) -> str:
    """S3's error code, from the first error in the chain that has one; "" if none has."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


# ---- transfers ---------------------------------------------------------------------------------------------


def with_retries(transfer: Callable[[], T]) -> T:
    """Calls `transfer`, and again after each of PAUSES while it raises RetryableError."""
    for pause in PAUSES:
        try:
            return transfer()
        except RetryableError:
            time.sleep(pause)
    return transfer()


def upload(fs: fsspec.AbstractFileSystem, path: Path, target: str) -> None:
    """Uploads a local file in parts, then requests the size of the object. RetryableError if it differs."""
    size = path.stat().st_size
    parts = {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS))} if "s3" in fs.protocol else {}
    fs.put_file(os.fspath(path), target, **parts)
    _check_size(fs, target, size)


def write_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a small object, then requests its size. RetryableError if it differs; the object is then deleted, because
    a truncated receipt would count as one in a listing.
    """
    fs.pipe_file(path, data)
    try:
        _check_size(fs, path, len(data))
    except RetryableError:
        with suppress(FileNotFoundError):
            fs.rm_file(path)
        raise


def _check_size(fs: fsspec.AbstractFileSystem, path: str, size: int) -> None:
    try:
        found = int(fs.info(path)["size"])
    except FileNotFoundError as error:
        raise RetryableError(f"{path} does not exist after an upload of {size:,} bytes", path) from error
    if found != size:
        raise RetryableError(f"{path} has {found:,} bytes after an upload of {size:,}", path)


def download_file(fs: fsspec.AbstractFileSystem, path: str, target: Path) -> None:
    """Downloads an object to a local file. RetryableError: bytes are missing. FileNotFoundError: no such object."""
    fs.get_file(path, os.fspath(target))
    size, received = int(fs.info(path)["size"]), target.stat().st_size
    if received != size:
        raise RetryableError(f"{path} arrived with {received:,} of its {size:,} bytes", path)
