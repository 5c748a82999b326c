"""Services under a keeper: when they or this process end, none of their descendants is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.services.process import free_port, start, stop, wait_until_up
from storage.errors import FatalError
from tests.harness.processes import MARK, started_for, wait_for

FAMILY = """
import subprocess, sys, time
inner = "import os, signal, time; signal.signal(signal.SIGTERM, {answer}); open('ready', 'w').close(); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", inner], start_new_session=True)
{end}
"""
DEAF = "signal.SIG_IGN"
SAVES = "lambda *_: (open('saved', 'w').close(), os._exit(0))"
STAYS = "time.sleep(600)"
LEAVES = "import pathlib\nwhile not pathlib.Path('ready').exists(): time.sleep(0.05)"


@pytest.fixture
def marked(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment that marks every process of this test; those that a failed test leaves are killed."""
    yield dict(os.environ) | {MARK: str(tmp_path)}
    for process in started_for(tmp_path):
        process.kill()


def family(answer: str, end: str) -> list[str]:
    return [sys.executable, "-c", FAMILY.format(answer=answer, end=end)]


def test_stop_ends_children_in_other_sessions_even_if_they_ignore_sigterm(
    tmp_path: Path, marked: dict[str, str]
) -> None:
    service = start("family", family(DEAF, STAYS), tmp_path, marked, grace=0.5)
    wait_for((tmp_path / "ready").exists)
    assert len(started_for(tmp_path)) == 3  # keeper, parent, child
    stop(service)
    assert started_for(tmp_path) == []


def test_children_of_a_dead_command_get_time_to_save(tmp_path: Path, marked: dict[str, str]) -> None:
    service = start("family", family(SAVES, LEAVES), tmp_path, marked, grace=30)
    assert service.process.wait(60) == 0
    assert (tmp_path / "saved").exists()
    assert started_for(tmp_path) == []


def test_the_status_of_a_killed_command_is_passed_on(tmp_path: Path, marked: dict[str, str]) -> None:
    service = start("family", family(SAVES, STAYS), tmp_path, marked, grace=30)
    wait_for((tmp_path / "ready").exists)
    (command,) = psutil.Process(service.process.pid).children()
    command.kill()
    assert service.process.wait(60) == 128 + signal.SIGKILL
    assert (tmp_path / "saved").exists()
    assert started_for(tmp_path) == []


def test_no_process_is_left_when_the_parent_is_killed(tmp_path: Path, marked: dict[str, str]) -> None:
    code = (
        "import os, pathlib, sys, time; from flows.services.process import start\n"
        f"start('family', {family(DEAF, STAYS)!r}, pathlib.Path({str(tmp_path)!r}), os.environ, grace=0.5)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=marked)
    wait_for((tmp_path / "ready").exists)
    parent.kill()
    parent.wait()
    wait_for(lambda: not started_for(tmp_path))


def test_a_server_that_ends_at_once_is_an_error_with_its_log(tmp_path: Path, marked: dict[str, str]) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such database')"]
    service = start("thing", command, tmp_path, marked, health="http://127.0.0.1:9/health")
    with pytest.raises(FatalError, match=r"thing did not start; see .*thing\.log"):
        wait_until_up(service)
    assert "no such database" in service.log.read_text(encoding="utf-8")


def test_a_given_port_is_taken_or_not() -> None:
    import socket

    free = free_port("thing", None)
    assert free_port("thing", free) == free
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(FatalError, match=f"thing cannot use port {taken} because it is taken"):
            free_port("thing", taken)
        assert free_port("thing", None, taken) != taken
