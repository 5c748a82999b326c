"""Translates the exceptions of MLflow, its database and its artifact store into FatalError and RetryableError.

with translate_errors():                    # or @translate_errors() on a function
    client.create_experiment("distil")
"""

from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException
from sqlalchemy.exc import SQLAlchemyError

from storage.errors import FatalError, RetryableError
from storage.files.filesystem import client_errors, is_remote_error, translated

REFUSED = (400, 401, 403, 404)
"""HTTP statuses that a retry would not change."""


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translates errors of the `with` block.

    Raises FatalError if MLflow rejects a request or its database is full, and RetryableError if the server, the
    database or the artifact store does not respond.
    """
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        sentence = _sentence(error)
        if _database_is_full(error):
            raise FatalError(
                f"MLflow's database cannot be written ({sentence}); free space on its disk, or make it writable"
            ) from error
        refused = isinstance(error, MlflowException) and error.get_http_status_code() in REFUSED  # type: ignore[no-untyped-call]
        if refused:
            raise FatalError(f"MLflow rejected a request: {sentence}") from error
        raise RetryableError(f"MLflow did not respond: {sentence}") from error
    except client_errors() as error:
        translation = translated(error, "MLflow's artifacts") if is_remote_error(error) else None
        if translation is None:
            raise
        raise translation from error


def _sentence(error: BaseException) -> str:
    """Returns the line of the message that describes the fault. SQLAlchemy's messages start with other lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    faults = (line for line in lines if not line.startswith("(raised as a result"))
    return next(faults, type(error).__name__)


def _database_is_full(error: BaseException) -> bool:
    """Returns True if SQLite reports a full disk or a read-only database, which a retry would not change."""
    cause: BaseException | None = error
    while cause is not None:
        name = getattr(getattr(cause, "orig", cause), "sqlite_errorname", "")
        if name.startswith(("SQLITE_FULL", "SQLITE_READONLY")):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
