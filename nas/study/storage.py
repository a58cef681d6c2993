"""Where a study lives: an SQLite file of the run folder, a database server, or a journal file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from nas.study.own_trials import OwnTrialsStorage
from searchspace.errors import UserError

JOURNAL = "journal:"
HOW_TO = (
    "give sqlite:///FILE, postgresql://USER@HOST/DATABASE or journal:FILE, each with #NAME where "
    "several runs share it, or nothing for the run folder's own file"
)
STUDY_NAME = "search"
OPENING_TRIES = 20
RACES = ("already exists", "locked", "UNIQUE constraint", "duplicate key")
"""What databases answer when several processes make the tables at once; all but one are refused."""

BUSY_S = 60.0


def sqlite_url(folder: Path) -> str:
    """Return the storage URL of a run folder's own study."""
    # Optuna fills in {SCHEMA_VERSION} in its URLs.
    path = str(folder / "study.db").replace("{", "{{").replace("}", "}}")
    return f"sqlite:///{path}"


def split_storage(text: str) -> tuple[str, str]:
    """Return the URL and the study's name of ``URL`` or ``URL#NAME``."""
    url, mark, name = text.rpartition("#")
    # A folder may have a # in its name.
    return (url, name) if mark and name and "/" not in name else (text, STUDY_NAME)


def shared_storage(url: str, folder: Path) -> str:
    """Return a storage that several runs may use, with the run's own name where none is given."""
    name = split_storage(url)[1]
    return url if url.endswith(f"#{name}") else f"{url}#{folder.resolve().name}"


def check_storage(text: str) -> None:
    """Refuse what is no storage at all.

    Raises:
        UserError: saying what is one.
    """
    if text and "://" not in text and not text.startswith(JOURNAL):
        raise UserError(f"search.storage={text!r} is no storage; {HOW_TO}")


def open_storage(url: str) -> BaseStorage:
    """Open an Optuna storage.

    Args:
        url: without a study's name: ``sqlite:///FILE``, any other database URL that SQLAlchemy
            knows, such as ``postgresql://USER@HOST/DATABASE``, or ``journal:FILE`` for an
            append-only file, which also works on network file systems.

    Raises:
        UserError: when it cannot be opened; a password is left out of the sentence.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url.startswith(JOURNAL):
        return _open_journal(url.removeprefix(JOURNAL))
    check_storage(url)
    try:
        return _open_database(url)
    except ImportError as error:
        reason = _first_line(error.__cause__ or error)
        raise UserError(
            f"the storage {without_password(url)} needs a database driver that is not installed "
            f"({reason}); for PostgreSQL: pip install 'psycopg[binary]'"
        ) from error
    except Exception as error:
        if is_of_the_database(error):
            raise cannot_open(url, error) from error
        raise


def cannot_open(url: str, error: Exception) -> UserError:
    """Return the sentence for a storage that does not open; a password is left out."""
    reason = _first_line(error.__cause__ or error).replace(url, without_password(url))
    return UserError(f"cannot open the study at {without_password(url)}: {reason}; {HOW_TO}")


def without_password(url: str) -> str:
    """Return a storage URL that may be shown."""
    if "://" not in url:
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return f"{url.partition('://')[0]}://..."


def _open_journal(path: str) -> BaseStorage:
    file = Path(path)
    if not path or file.is_dir():
        raise UserError(f"search.storage={JOURNAL + path!r} names no file; {HOW_TO}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(path))
    except (OSError, ValueError, KeyError) as error:
        raise cannot_open(JOURNAL + path, error) from error


def _open_database(url: str) -> BaseStorage:
    is_sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_S}} if is_sqlite else {}
    for attempt in range(OPENING_TRIES):
        try:
            backend = RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            is_race = is_of_the_database(error) and any(word in str(error) for word in RACES)
            if not is_race or attempt == OPENING_TRIES - 1:
                raise
            time.sleep(0.1)
    if is_sqlite:
        _make_sqlite_safe_and_fast(backend)
    return OwnTrialsStorage(backend)


def _make_sqlite_safe_and_fast(backend: RDBStorage) -> None:
    """Let a transaction lock from its first statement, and commit without waiting for the disk.

    Python's sqlite3 begins a transaction at the first write, so that two processes that look at
    a trial and then take it could both have it. A killed process still loses nothing.
    """
    from sqlalchemy import event

    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(backend.engine, "connect", on_connect)
    event.listen(backend.engine, "begin", on_begin)
    backend.engine.dispose()


@contextlib.contextmanager
def loss_said(storage: str) -> Iterator[None]:
    """Turn the loss of a storage while the block runs into one sentence.

    Raises:
        UserError: saying which storage, and that the search can go on.
    """
    try:
        yield
    except Exception as error:
        if not is_of_the_database(error, tools=False):
            raise
        url = split_storage(storage)[0]
        reason = _first_line(error.__cause__ or error).replace(url, without_password(url))
        raise UserError(
            f"the study at {without_password(url)} does not answer any more: {reason}; what was "
            "evaluated is kept there, and the same command goes on from it"
        ) from error


def is_of_the_database(error: Exception, tools: bool = True) -> bool:
    """Return whether an error comes from the storage and not from this program.

    Args:
        error: any.
        tools: count every error of Optuna as one of the storage, not only those that it says are.
    """
    modules = ("sqlalchemy", "sqlite3", "psycopg", *(("optuna",) if tools else ()))
    return isinstance(error, StorageInternalError) or type(error).__module__.startswith(modules)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
