"""Opens local and remote file systems through fsspec, translates their errors, and verifies file transfers.

    fs, base = open_url("s3://bucket/prefix")
    with translate_errors("the store s3://bucket/prefix"):
        upload(fs, path, f"{base}/name")

A remote file system needs the package of its protocol (s3fs, gcsfs, adlfs). Credentials and endpoints are set in the
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

CREDENTIALS = "set credentials in the environment (such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"

PART_BYTES = 16 << 20
"""Bytes per part of a large object; each of the PARALLEL_PARTS transfers keeps one part in memory."""

PARALLEL_PARTS = 4

MAX_PARTS = 10_000
"""Maximum number of parts per object in S3."""

PAUSES = (1.0, 4.0)
"""Seconds before each retry of a transfer, in addition to the retries of the client itself."""

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
    """Returns the file system of a path or URL, and the path in that file system. Sends no request.

    Raises FatalError if the URL contains a password, or its protocol is unknown or needs a package that is missing.
    """
    protocol = url.partition("://")[0] if "://" in url else ""
    if has_password(url):
        raise FatalError(f"the {protocol}:// URL contains a user name and a password; remove them and {CREDENTIALS}")
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(protocol), **dict(options or {}))
    except ImportError as error:
        package = PACKAGES.get(protocol, "")
        advice = f"run `pip install {package}`" if package else "install the package that the error names"
        raise FatalError(f"{url} cannot be opened without the package for {protocol}:// ({error}); {advice}") from error
    except ValueError as error:
        raise FatalError(f"{url} cannot be opened ({error}); correct the URL", url) from error
    return fs, path


def has_password(url: str) -> bool:
    """Returns True if a URL contains a user name and a password, as in `s3://KEY:SECRET@bucket`."""
    return bool(_PASSWORD.match(url))


def files_below(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Returns size and modification time of every file below a folder, in the format of `fs.find(path, detail=True)`.

    `find` itself is slow in two file systems: in s3fs it takes minutes for 20,000 folders (it searches a list of all
    folders for each of them), and in the local file system it calls stat ten times per file.
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
    """Yields path and details of each local file. Skips paths that are deleted meanwhile; raises OSError for others."""

    def raise_unless_deleted(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, _, names in os.walk(path, onerror=raise_unless_deleted):
        for name in names:
            with suppress(FileNotFoundError):
                stat = os.stat(f"{folder}/{name}")
                yield f"{folder}/{name}", {"size": stat.st_size, "mtime": stat.st_mtime}


def on_this_machine(fs: fsspec.AbstractFileSystem) -> bool:
    """Returns True if `fs` is the local file system."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _options(protocol: str) -> dict[str, Any]:
    """Returns client options: listings are not cached, because other processes write too; botocore retries requests."""
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
        # Receipts contain the sha256 of every file, and some servers send the checksum of the full object with a part.
        "config_kwargs": {
            "retries": retries,
            "read_timeout": 60,
            "response_checksum_validation": "when_required",
        },
    }


# ---- errors ------------------------------------------------------------------------------------------------


@contextmanager
def translate_errors(where: str) -> Iterator[None]:
    """Translates the errors of a file system into FatalError and RetryableError. FileNotFoundError passes through.

    `where` is the name of the file system in the message, such as `the store s3://bucket/prefix`.
    """
    try:
        yield
    except client_errors() as error:
        translation = translated(error, where)
        if translation is None:
            raise
        raise translation from error


def client_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Returns the exception types of file systems: OSError, those of imported object-store clients, and `others`."""
    return (
        *others,
        OSError,
        *(getattr(sys.modules[module], name) for module, name in _CLIENT_ERRORS if module in sys.modules),
    )


def translated(error: Exception, where: str) -> DistilError | None:
    """Returns the error as FatalError or RetryableError, or None if it means that a file or folder does not exist."""
    code, kind = _code(error), type(error).__name__
    if code == "NoSuchBucket":
        return FatalError(f"{where}: the bucket does not exist; create it or correct the URL")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        # The server lost the parts that it had received; a new upload sends all of them.
        return RetryableError(f"{where} lost an unfinished upload: {error}") if code == "NoSuchUpload" else None
    if kind in _NO_CREDENTIALS:
        return FatalError(
            f"{where} needs credentials, but none were found ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the variables that its client reads, in the environment"
        )
    if isinstance(error, PermissionError) or code in ("AccessDenied", "403"):
        advice = (
            "check the credentials in the environment and their permissions"
            if code
            else "change the permissions of this path"
        )
        return FatalError(f"{where} denied access ({error}); {advice}")
    if code in _CONFIGURATION_CODES or kind in _CONFIGURATION_ERRORS:
        return FatalError(
            f"{where} rejected the request ({error}); check the URL, and the region and endpoint in the environment"
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return FatalError(f"{where} {DISK_ERRORS[error.errno]} ({error})")
    if is_remote_error(error):
        return RetryableError(f"{where} did not respond: {error or kind}")
    return RetryableError(f"{where} failed: {error}")


def is_remote_error(error: Exception) -> bool:
    """Returns True if the cause is the server or the network, not a local file or its content."""
    return _code(error) != "" or not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError)


def _code(error: BaseException | None) -> str:
    """Returns the S3 error code of the first error in the chain that has one, else ""."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


# ---- transfers ---------------------------------------------------------------------------------------------


def with_retries(transfer: Callable[[], T]) -> T:
    """Calls `transfer`, and retries it after each of PAUSES as long as it raises RetryableError."""
    for pause in PAUSES:
        try:
            return transfer()
        except RetryableError:
            time.sleep(pause)
    return transfer()


def upload(fs: fsspec.AbstractFileSystem, path: Path, target: str) -> None:
    """Uploads a local file in parts, then checks the size of the object. Raises RetryableError if it differs."""
    size = path.stat().st_size
    parts = {"chunksize": max(PART_BYTES, -(-size // MAX_PARTS))} if "s3" in fs.protocol else {}
    fs.put_file(os.fspath(path), target, **parts)
    _check_size(fs, target, size)


def write_object(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a small object, then checks its size. If the size differs, deletes the object and raises RetryableError.

    The object is deleted because a listing would count a truncated receipt as a receipt.
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
        raise RetryableError(f"{path} does not exist after the upload of {size:,} bytes; try again", path) from error
    if found != size:
        raise RetryableError(f"{path} has {found:,} bytes after the upload of {size:,} bytes; try again", path)


def download_file(fs: fsspec.AbstractFileSystem, path: str, target: Path) -> None:
    """Downloads an object to a local file.

    Raises RetryableError if bytes are missing, and FileNotFoundError if the object does not exist.
    """
    fs.get_file(path, os.fspath(target))
    size, received = int(fs.info(path)["size"]), target.stat().st_size
    if received != size:
        raise RetryableError(f"only {received:,} of {size:,} bytes of {path} were received; try again", path)
