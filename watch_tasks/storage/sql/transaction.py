"""The transaction of one handler: what it writes is committed together with what becomes of its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from ...errors import HandlerTransactionError
from ..base import Transaction
from ..protocol import Commit, Settled
from .backend import Backend

__all__ = ["SqlTransaction", "watch_handlers"]

#: In the `info` of a connection that was lent to a handler: whether it still is.
_LENT: Final = "watch_lent"
#: Set on errors of such a connection, to tell them from those of a handler's other databases.
_OURS: Final = "_watch_ours"


def watch_handlers(engine: Engine) -> None:
    """Keep handlers from ending their transactions, and mark the errors of these."""

    @event.listens_for(engine, "commit")
    def refuse(connection: Connection) -> None:
        if connection.info.get(_LENT):
            raise HandlerTransactionError(
                "a handler must not commit `message.connection`: what it wrote is committed with the record that its "
                "message was handled, when it returns; for a savepoint use `with message.connection.begin_nested():`"
            )

    @event.listens_for(engine, "handle_error")
    def mark(context: ExceptionContext) -> None:
        connection, error = context.connection, context.sqlalchemy_exception
        if error is not None and connection is not None and not connection.closed and not connection.invalidated:
            setattr(error, _OURS, _LENT in connection.info)


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
        backend.bound(connection, None)
        connection.info[_LENT] = True

    @property
    def connection(self) -> Connection:
        return self._connection

    def commit(self, commit: Commit) -> Settled:
        """See `Transaction.commit`."""
        connection = self._connection
        try:
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
            connection.info[_LENT] = False
            connection.commit()
        else:
            connection.rollback()
        return settled

    def end(self, error: BaseException | None) -> None:
        """Undo what was not committed, and let the connection go; one in an unknown state is thrown away."""
        connection = self._connection
        self._is_lost = connection.invalidated
        is_cut = error is not None and (isinstance(error, TimeoutError) or not isinstance(error, Exception))
        if connection.closed or connection.invalidated:
            pass
        elif is_cut:
            connection.invalidate()
        else:
            # By the driver: after a commit that was refused, SQLAlchemy takes the transaction for ended, and would
            # leave what was written to whoever commits next.
            driver: Any = connection.connection.driver_connection
            driver.rollback()
            self._take_back()
        connection.close()

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error, once this has ended, says no more than that: it will work another time."""
        if not isinstance(error, Exception):
            return False
        return self._is_lost or (
            isinstance(error, DBAPIError) and getattr(error, _OURS, False) and self._backend.is_away(error)
        )

    def _take_back(self) -> None:
        self._connection.info.pop(_LENT, None)
        self._backend.bound(self._connection)
