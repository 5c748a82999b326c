"""The whole chain against a real S3 endpoint: corpus, store and MLflow's artifacts; and an endpoint that dies in it."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest

from storage.artifact import DataFile
from storage.store import Store
from storage.verify import verify
from tests.end_to_end.kills.test_kill import has_trained, kill_group, weights
from tests.end_to_end.test_chain import SENTENCE, check_answers, check_fill_mask
from tests.end_to_end.test_real_text import settings_of
from tests.harness.output import refusal
from tests.harness.processes import started_for, wait_for
from tests.harness.programs.slow_trainer import slow_trainer
from tests.harness.project import History, Project, ended, make_project, new_artifacts
from tests.harness.servers.s3 import Endpoint

pytestmark = pytest.mark.slow

BY_BYTES = ("source", "shard", "blocks", "calibration", "targets", "model")
QUICK = ("run.retries=1", "run.retry_seconds=1")


@dataclass(frozen=True)
class Remote(Project):
    """A project whose corpus, store and MLflow artifacts are in a bucket; only its home is here."""

    bucket: str

    @property
    def store(self) -> Store:
        return Store(f"s3://{self.bucket}/store", cache=self.folder / "look" / "cache")

    @property
    def settings(self) -> tuple[str, ...]:
        """The lines of the recipe that differ from a laptop's."""
        return (
            f"store=s3://{self.bucket}/store",
            f"corpus.url=s3://{self.bucket}/corpus",
            f"register.artifacts=s3://{self.bucket}/mlflow",
        )


def make_remote(s3: Endpoint, folder: Path, corpus: Path, teacher: Path) -> Remote:
    """A project in the endpoint's bucket, with the corpus put there through S3."""
    make_project(folder, corpus, teacher)
    project = Remote(folder, s3.bucket)
    project.store.fs.put(f"{corpus}/", f"{s3.bucket}/corpus/", recursive=True)
    return project


def files_of(project: Project, *kinds: str) -> dict[tuple[str, str], tuple[DataFile, ...]]:
    return {(one.kind, one.key): one.files for one in project.receipts(*kinds)}


def check_store(project: Project) -> None:
    """Everything that a receipt names is there, whole, and of its bytes."""
    assert verify(project.store) == []
    said = project.distil("verify", *(project.settings if isinstance(project, Remote) else ()))
    assert said.status == 0, said.err


@pytest.fixture(scope="module")
def local(history: History, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same run on this machine. Not the history's: that pinned its calibration while a source was broken."""
    project = make_project(tmp_path_factory.mktemp("local"), history.project.folder / "corpus", teacher)
    result = project.distil("run")
    assert result.status == 0, result.err
    return project


@pytest.fixture
def remote(s3: Endpoint, history: History, teacher: Path, tmp_path: Path) -> Remote:
    return make_remote(s3, tmp_path / "project", history.project.folder / "corpus", teacher)


@pytest.mark.guard
def test_the_chain_in_a_bucket_gives_the_artifacts_of_a_local_run(
    remote: Remote, s3: Endpoint, local: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = remote.distil("run", *remote.settings, "run.cache_bytes=100_000")
    assert result.status == 0, result.err
    ours, theirs = files_of(remote, *BY_BYTES), files_of(local, *BY_BYTES)
    assert {kind for kind, _ in ours} == set(BY_BYTES)
    assert ours == {name: theirs[name] for name in ours}
    assert not (remote.home / "store").exists()
    check_store(remote)

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow.set_tracking_uri(remote.mlflow)
    assert list(s3.path("mlflow").rglob("model.safetensors"))
    assert not (remote.home / "mlflow" / "artifacts").exists()
    check_answers(mlflow.transformers.load_model("models:/distilled@challenger")(SENTENCE))
    check_fill_mask(remote.home / "models" / "tiny")

    for name in ("cache", "scratch", "run"):
        shutil.rmtree(remote.home / name, ignore_errors=True)
    again = remote.distil("run", *remote.settings)
    assert again.status == 0, again.err
    assert "nothing to do" in again.out


def test_training_goes_on_from_the_bucket_after_everything_local_is_gone(remote: Remote, local: Project) -> None:
    settings = ("train.max_steps=60", "train.checkpoint_steps=10")
    slow = slow_trainer(25, remote.folder / "never")
    process = remote.start("run", *remote.settings, *settings, slow, start_new_session=True)
    wait_for(lambda: has_trained(remote, 25), process=process)
    kill_group(process)
    process.communicate()
    wait_for(lambda: not started_for(remote.folder))
    before = remote.creation_times()
    for name in ("cache", "scratch", "run"):
        shutil.rmtree(remote.home / name)
    result = remote.distil("run", *remote.settings, *settings)
    assert result.status == 0, result.err
    fresh = new_artifacts(before, remote.creation_times())
    assert {kind for kind, _ in fresh} == {"checkpoint", "model", "scores"}
    assert ("checkpoint", "tiny step 10") not in fresh
    copy = local.copy(remote.folder / "local", without=("model", "checkpoint", "scores"))
    assert copy.distil("run", *settings).status == 0
    assert weights(remote) == weights(copy)


def test_an_endpoint_that_dies_is_named_and_what_was_committed_is_not_made_again(
    remote: Remote, s3: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    process = remote.start("run", *remote.settings, *QUICK)
    wait_for(lambda: bool(list(s3.path("store/receipts/blocks").glob("*.receipt.json"))), process=process)
    s3.kill()
    sentence = refusal(ended(process))
    assert "did not respond" in sentence
    assert f"s3://{s3.bucket}" in sentence
    s3.start()
    before = remote.creation_times()
    assert {"source", "shard", "blocks"} <= {kind for kind, _, _ in before}
    result = remote.distil("run", *remote.settings)
    assert result.status == 0, result.err
    after = remote.creation_times()
    assert {name: after[name] for name in before} == before
    check_store(remote)


def test_a_server_killed_twice_in_uploads_leaves_no_receipt_of_a_short_object(
    remote: Remote, s3: Endpoint, local: Project
) -> None:
    process = remote.start("run", *remote.settings)
    for sign in ("data/blocks", "data/checkpoint"):
        killed_in_upload(s3, sign, process.poll)
        s3.start()
    first = ended(process)
    if first.status != 0:  # the server was away for longer than the retries last: the same command resumes
        assert "Traceback" not in first.err
        result = remote.distil("run", *remote.settings)
        assert result.status == 0, result.err
    check_store(remote)
    ours, theirs = files_of(remote, *BY_BYTES), files_of(local, *BY_BYTES)
    assert ours == {name: theirs[name] for name in ours}


def killed_in_upload(s3: Endpoint, folder: str, ended_with: Callable[[], int | None]) -> None:
    """Kills the server once it has begun to receive something below a folder of the store."""
    wait_for(lambda: ended_with() is not None or any(s3.path(f"store/{folder}").rglob("*")))
    assert ended_with() is None, "it ended before the server was killed"
    assert s3.process
    s3.process.send_signal(signal.SIGKILL)
    s3.process.wait()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("store=s3://no-such-bucket/store",), "the bucket does not exist"),
        (("corpus.url=s3://no-such-bucket/corpus",), "corpus.url s3://no-such-bucket/corpus does not exist"),
        (("store=s3://KEY:SECRET@bucket/store",), "set credentials in the environment"),
    ],
)
def test_a_wrong_address_ends_in_one_sentence(remote: Remote, settings: tuple[str, ...], words: str) -> None:
    said = refusal(remote.distil("run", *remote.settings, *settings))
    assert words in said
    assert "SECRET@" not in said


def test_wrong_credentials_end_in_one_sentence(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    said = refusal(remote.distil("run", *remote.settings))
    assert "check the credentials in the environment" in said


def test_real_text_in_a_bucket(s3: Endpoint, shared_data: Path, tmp_path: Path) -> None:
    corpus = shared_data / "corpus" / "tiny"
    here = make_project(tmp_path / "here", corpus, Path("unused"))
    there = make_remote(s3, tmp_path / "there", corpus, Path("unused"))
    for project, settings in ((here, ()), (there, there.settings)):
        result = project.distil("prepare", *settings_of(shared_data), *settings)
        assert result.status == 0, result.err
    kinds = ("source", "shard", "blocks")
    assert files_of(there, *kinds) == files_of(here, *kinds)
    assert len(files_of(there, "source")) == 3
    assert verify(there.store) == []
