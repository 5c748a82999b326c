"""What MLflow raises, as our two error types.

with answering():                           # or @answering() around a function
    client.create_experiment("distil")
"""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from storage.errors import FatalError, RetryableError
from storage.filesystem import client_errors, is_remote_error, translated

REFUSED = (400, 401, 403, 404)
"""Statuses of what MLflow does not take however often it is asked."""


@contextmanager
def translate_errors() -> Iterator[None]:
    """What MLflow raises becomes one of our two errors: FatalError for what it refuses, else its server or database may
    be back in a moment."""
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        said = _sentence(error)
        if _database_is_full(error):
            raise FatalError(f"MLflow's database cannot be written; make space there: {said}") from error
        refused = isinstance(error, MlflowException) and error.get_http_status_code() in REFUSED  # type: ignore[no-untyped-call]
        if refused:
            raise FatalError(f"MLflow refused: {said}") from error
        raise RetryableError(f"MLflow did not answer: {said}") from error
    except client_errors() as error:
        ours = translated(error, "MLflow's artifacts") if is_remote_error(error) else None
        if ours is None:
            raise
        raise ours from error


def _sentence(error: BaseException) -> str:
    """What is said in one line; SQLAlchemy says first, in brackets, how it came to ask, and last the statement."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = (line for line in lines if not line.startswith("(raised as a result"))
    return next(told, type(error).__name__)


def _database_is_full(error: BaseException) -> bool:
    """True if SQLite says that its disk is full or read-only, which no second try changes."""
    cause: BaseException | None = error
    while cause is not None:
        name = getattr(getattr(cause, "orig", cause), "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_READONLY")):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
