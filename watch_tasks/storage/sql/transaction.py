"""The transaction of one handler: what it writes is committed together with what becomes of its message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from ...errors import HandlerExitError, HandlerTimeoutError, HandlerTransactionError
from ..base import Transaction
from ..protocol import Commit, Settled
from .backend import ANSWER, Backend

__all__ = ["SqlTransaction", "watch_handlers"]

logger = logging.getLogger(__name__)

#: Execution option of a connection that was lent to a handler: whether it still is. It stays where the handler closes
#: the connection, or gets another one of the driver's after a loss.
_LENT: Final = "watch_lent"
#: Set on errors of such a connection, to tell them from those of a handler's other databases.
_OURS: Final = "_watch_ours"
#: Execution option of such a connection: what cut a statement off. The handler may have caught it.
_CUT: Final = "watch_cut"

#: SQLSTATEs of what passes for the storage, and is a handler's own doing: its statement was cancelled, or ran past a
#: limit; a lock that it would not wait for.
_OWN: Final = frozenset({"57014", "55P03"})


def watch_handlers(engine: Engine) -> None:
    """Keep handlers from ending their transactions, and mark the errors of these."""

    @event.listens_for(engine, "commit")
    def refuse(connection: Connection) -> None:
        if connection.get_execution_options().get(_LENT):
            raise HandlerTransactionError(
                "a handler must not commit `message.connection`: what it wrote is committed with the record that its "
                "message was handled, when it returns; for a savepoint use `with message.connection.begin_nested():`"
            )

    @event.listens_for(engine, "set_connection_execution_options")
    def keep(connection: Connection, options: dict[str, Any]) -> None:
        # AUTOCOMMIT would store what a handler writes before its message is recorded.
        if "isolation_level" in options and connection.get_execution_options().get(_LENT):
            raise HandlerTransactionError("a handler must not change the isolation level of `message.connection`")

    @event.listens_for(engine, "handle_error")
    def mark(context: ExceptionContext) -> None:
        connection, error = context.connection, context.sqlalchemy_exception
        if connection is None or _LENT not in connection.get_execution_options():
            return
        if error is not None:
            setattr(error, _OURS, True)
        if (cut := _cut_of(context.original_exception)) is not None:
            connection.execution_options(**{_CUT: cut})

    @event.listens_for(engine, "checkin")
    def bind(driver: Any, record: object) -> None:
        # Also where the handler closed the connection: the next one who gets it waits no longer than usual.
        if hasattr(driver, "bound"):
            driver.bound = ANSWER


class SqlTransaction(Transaction):
    """Lends a connection to a handler.

    Args:
        connection: nobody else's.
        backend: its database.
        settle: takes a commit's step of the protocol on the connection.
    """

    def __init__(
        self, connection: Connection, backend: Backend, settle: Callable[[Connection, Commit], Settled]
    ) -> None:
        self._connection, self._backend, self._settle = connection, backend, settle
        self._is_lost = self._is_settling = False
        self._cut: BaseException | None = None
        backend.bound(connection, None)
        connection.execution_options(**{_LENT: True})

    @property
    def connection(self) -> Connection:
        return self._connection

    def commit(self, commit: Commit) -> Settled:
        """See `Transaction.commit`."""
        connection = self._connection
        self._is_settling = True
        try:
            self._check_open()
            self._backend.bound(connection)
            settled = self._settle(connection, commit)
        except (DBAPIError, InvalidRequestError) as exc:
            if isinstance(exc, DBAPIError) and not self._backend.is_aborted(exc):
                raise
            raise HandlerTransactionError(
                "`message.connection` was closed, or a statement on it failed and the handler went on, which undoes "
                "everything it wrote: let the error pass, or try such a statement "
                "`with message.connection.begin_nested():`"
            ) from exc
        if settled is Settled.ACCEPTED:
            connection.execution_options(**{_LENT: False})
            connection.commit()
        else:
            connection.rollback()
        return settled

    def _check_open(self) -> None:
        """See that the transaction did not end behind SQLAlchemy's back: what follows would be stored at once."""
        driver: Any = self._connection.connection.driver_connection
        if self._connection.in_transaction() and getattr(driver, "in_transaction", True) is False:
            raise HandlerTransactionError(
                "the transaction of `message.connection` ended within the handler: it sent COMMIT or ROLLBACK itself, "
                "or went on after an error by which SQLite had undone everything it wrote"
            )

    def end(self, error: BaseException | None) -> None:
        """Undo what was not committed, and let the connection go; one in an unknown state is thrown away.

        Raises:
            HandlerTimeoutError: in place of the database's complaint that the handler was cut off by it.
        """
        connection = self._connection
        self._is_lost = connection.invalidated
        self._cut = _cut_of(error) or connection.get_execution_options().get(_CUT)
        try:
            if connection.closed or connection.invalidated:
                pass
            elif self._cut or isinstance(error, TimeoutError) or not isinstance(error, Exception | None):
                connection.invalidate()
            else:
                # By the driver: after a commit that was refused, SQLAlchemy takes the transaction for ended, and would
                # leave what was written to whoever commits next.
                driver: Any = connection.connection.driver_connection
                driver.rollback()
        except Exception as exc:  # noqa: BLE001 - the driver's own: the server is gone, or the handler left it no rest
            logger.warning("a handler's connection could not be rolled back and is closed: %s", exc)
            connection.invalidate()
        finally:
            connection.close()
        if isinstance(self._cut, HandlerTimeoutError) and isinstance(error, DBAPIError):
            raise HandlerTimeoutError(*self._cut.args) from error

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error, once this has ended, says no more than that: it will work another time."""
        if not isinstance(error, Exception) or self._cut:
            return False
        if self._is_lost:
            return True
        if not isinstance(error, DBAPIError) or not getattr(error, _OURS, False):
            return False
        is_own = not self._is_settling and getattr(error.orig, "sqlstate", None) in _OWN
        return self._backend.is_away(error) and not is_own


def _cut_of(error: BaseException | None) -> BaseException | None:
    """Return what cut a handler off, where its error came of that, as in the middle of a statement."""
    met: list[BaseException] = []
    while error is not None and error not in met:
        if isinstance(error, HandlerTimeoutError | HandlerExitError | SystemExit | KeyboardInterrupt):
            return error
        met.append(error)
        error = error.__cause__ or error.__context__
    return None
