"""Simulates an in-memory object store, faulty://NAME, that fails as a script of faults defines, like a bad network.

    with staged() as script:                                         # an empty store, and a script without faults
        script.add("read", "*/blocks.arrow", reset(100), times=2)    # the next two reads of such a file fail
        store = Store(f"faulty://{name}/store")

The operations are read, write, list (one folder), info (one object) and remove. A fault applies to one operation and a
pattern of paths (without the protocol), `times` times; `script.operations` records all operations. Like S3, the store
is a flat list of objects; folders exist only as prefixes of names. fsspec implements listings of more than one folder.
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

import fsspec
from botocore.exceptions import ClientError
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error

ALWAYS = 1 << 30


class StoredObject(NamedTuple):
    """One object: its bytes, and the number of the write that created it."""

    data: bytes
    number: int


Objects = dict[str, StoredObject]
Act = Callable[["Call"], None]


@dataclass
class Call:
    """One operation in progress; a fault changes its result."""

    op: str
    path: str
    objects: Objects
    """A copy of the store's objects, which listings read; a fault may change it."""
    gone: Objects
    """The deleted objects."""
    data: bytes = b""
    """The bytes that are read or written."""
    after: tuple[int, Exception] | None = None
    """Number of bytes after which a read fails, and the error."""
    kept: bool = True
    """False if a write stores nothing."""


@dataclass
class Fault:
    """An action on the next `times` operations `op` on paths that match `pattern`."""

    op: str
    pattern: str
    act: Act
    times: int


class Script:
    """The faults still to be applied, and the operations so far."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.operations: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def add(self, op: str, pattern: str, act: Act, times: int = 1) -> None:
        """Appends a fault to the script."""
        self.faults.append(Fault(op, pattern, act, times))

    def clear(self) -> None:
        """Removes all faults and recorded operations."""
        self.faults, self.operations = [], []

    def count(self, op: str, pattern: str = "*") -> int:
        """Returns the number of these operations so far, on paths that match the pattern."""
        return sum(one == op and fnmatchcase(path, pattern) for one, path in self.operations)

    def record(self, call: Call) -> None:
        """Records the operation and applies the first fault that matches it."""
        with self.lock:
            self.operations.append((call.op, call.path))
            fits = [one for one in self.faults if one.op == call.op and fnmatchcase(call.path, one.pattern)]
            fault = next((one for one in fits if one.times > 0), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None:
            fault.act(call)


# ---- faults ------------------------------------------------------------------------------------------------


def reset(after: int = 0) -> Act:
    """Resets the connection, of a read after `after` bytes, of any other operation at once."""

    def act(call: Call) -> None:
        error = ConnectionResetError(104, "Connection reset by peer")
        if call.op != "read":
            raise error
        call.after = (after, error)

    return act


def short(size: int) -> Act:
    """Ends a read after `size` bytes, as if the object had no more."""

    def act(call: Call) -> None:
        call.data = call.data[:size]

    return act


def wrong(call: Call) -> None:
    """Returns a wrong first byte from a read, with the right number of bytes."""
    call.data = bytes([call.data[0] ^ 1]) + call.data[1:]


def stale(call: Call) -> None:
    """Omits the newest object below the folder from a listing."""
    below = [path for path in call.objects if path.startswith(f"{call.path}/")]
    if below:
        del call.objects[max(below, key=lambda path: call.objects[path].number)]


def deleted_objects_listed(call: Call) -> None:
    """Includes all deleted objects in a listing."""
    call.objects |= {path: stored for path, stored in call.gone.items() if path not in call.objects}


def refuse(error: Callable[[], Exception]) -> Act:
    """Raises an error of the client."""

    def act(call: Call) -> None:
        raise error()

    return act


def s3_error(status: int, code: str, message: str, **headers: str) -> Exception:
    """Returns the exception that s3fs raises for an error response of S3."""
    answer = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers, "RetryAttempts": 4},
    }
    error: Exception = translate_boto_error(ClientError(answer, "GetObject"))
    return error


def slow_down(seconds: int | None = None) -> Act:
    """Responds with 503 SlowDown, with Retry-After unless `seconds` is None."""
    headers = {} if seconds is None else {"retry-after": str(seconds)}
    return refuse(lambda: s3_error(503, "SlowDown", "Please reduce your request rate.", **headers))


forbidden = refuse(lambda: s3_error(403, "AccessDenied", "Access Denied"))
no_bucket = refuse(lambda: s3_error(404, "NoSuchBucket", "The specified bucket does not exist"))


class Clock:
    """A clock that only `sleep` and time-outs advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited: list[float] = []

    def sleep(self, seconds: float) -> None:
        """Replaces time.sleep: advances the clock and records the pause."""
        self.now += seconds
        self.waited.append(seconds)

    def hang(self, client_timeout: float) -> Act:
        """Never responds, so that the client times out after `client_timeout` seconds."""

        def act(call: Call) -> None:
            self.now += client_timeout
            raise TimeoutError(f"Read timeout on endpoint URL after {client_timeout:g} seconds")

        return act


def broken_close(call: Call) -> None:
    """Fails a write when its file is closed, and stores nothing."""
    call.kept = False
    call.after = (0, OSError(5, "the upload could not be completed"))


def short_write(size: int | None) -> Act:
    """Reports success of a write that stores only `size` bytes, or no object if `size` is None."""

    def act(call: Call) -> None:
        call.kept = size is not None
        call.data = call.data[:size]

    return act


def each_once(*acts: Act) -> Act:
    """Applies one of the faults, in turn, to the first operation on each object; later operations succeed."""
    seen: set[tuple[str, str]] = set()

    def act(call: Call) -> None:
        if (call.op, call.path) not in seen:
            seen.add((call.op, call.path))
            acts[len(seen) % len(acts)](call)

    return act


# ---- the file system ---------------------------------------------------------------------------------------


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """The file system of faulty://; all instances share the objects of this process, which have S3's metadata only."""

    protocol = "faulty"
    script = Script()
    objects: ClassVar[Objects] = {}
    gone: ClassVar[Objects] = {}
    guard = threading.RLock()

    # The generic implementations, which call `info` and list one folder at a time.
    find = AbstractFileSystem.find
    exists = AbstractFileSystem.exists
    isdir = AbstractFileSystem.isdir
    isfile = AbstractFileSystem.isfile
    cat_file = AbstractFileSystem.cat_file
    pipe_file = AbstractFileSystem.pipe_file

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("faulty://").strip("/")

    def _call(self, op: str, path: str, data: bytes = b"") -> Call:
        with self.guard:
            call = Call(op, path, dict(self.objects), dict(self.gone), data)
        self.script.record(call)
        return call

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        seen = self._call("list", path).objects
        found = {path: _described(path, seen[path])} if path in seen else {}
        for name in seen:
            if name.startswith(f"{path}/"):
                child = f"{path}/{name[len(path) + 1 :].split('/')[0]}"
                found[child] = _described(name, seen[name]) if child == name else _folder(child)
        if not found:
            raise FileNotFoundError(path)
        return [found[name] for name in sorted(found)] if detail else sorted(found)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        there = self._call("info", path).objects
        if path in there:
            return _described(path, there[path])
        if any(name.startswith(f"{path}/") for name in there):
            return _folder(path)
        raise FileNotFoundError(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: an object store has no folders."""

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self._call("remove", path)
        with self.guard:
            if path not in self.objects:
                raise FileNotFoundError(path)
            self.gone[path] = self.objects.pop(path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        path = self._strip_protocol(path)
        if mode == "wb":
            return _Writer(self, path)
        there = self.objects.get(path)
        call = self._call("read", path, there.data if there else b"")
        if there is None:
            raise FileNotFoundError(path)
        return _Reader(call.data, call.after)

    def keep(self, path: str, data: bytes) -> None:
        """Completes a write."""
        call = self._call("write", path, data)
        if call.kept:
            with self.guard:
                self.objects[path] = StoredObject(call.data, _next_number(self))
        if call.after:
            raise call.after[1]


def _next_number(fs: FaultyFileSystem) -> int:
    return 1 + max((stored.number for stored in (*fs.objects.values(), *fs.gone.values())), default=0)


def _described(path: str, stored: StoredObject) -> dict[str, Any]:
    written = datetime.fromtimestamp(stored.number, UTC)
    return {"name": path, "size": len(stored.data), "type": "file", "LastModified": written, "ETag": str(stored.number)}


def _folder(path: str) -> dict[str, Any]:
    return {"name": path, "size": 0, "type": "directory"}


class _Reader(io.BytesIO):
    """Returns the bytes before `after`, then raises its error."""

    def __init__(self, data: bytes, after: tuple[int, Exception] | None) -> None:
        super().__init__(data if after is None else data[: after[0]])
        self.size = len(data)
        self.error = after[1] if after else None

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.error is not None and (not data or size is None or size < 0):
            raise self.error
        return data


class _Writer(io.BytesIO):
    """Creates its object only when the file is closed."""

    def __init__(self, fs: FaultyFileSystem, path: str) -> None:
        super().__init__()
        self.fs, self.path = fs, path

    def __exit__(self, kind: Any, *rest: Any) -> None:
        data = self.getvalue()
        super().__exit__(kind, *rest)
        if kind is None:
            self.fs.keep(self.path, data)


@contextmanager
def staged() -> Iterator[Script]:
    """Registers faulty:// for the block, with no objects and an empty script."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.script = Script()
    FaultyFileSystem.objects, FaultyFileSystem.gone = {}, {}
    FaultyFileSystem.clear_instance_cache()
    yield FaultyFileSystem.script
    FaultyFileSystem.script, FaultyFileSystem.objects, FaultyFileSystem.gone = Script(), {}, {}
