"""The kinds of sources that the operator left out: each answers with the setting that says so."""

from typing import NoReturn

from modelhostd.adapters.cancel import Canceller
from modelhostd.adapters.connections import Connections
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.resources import Source
from modelhostd.core.sources import scheme_of
from modelhostd.core.transfer import RetryPolicy
from modelhostd.ports import RemoteFile


class NotAllowed:
    """Satisfies ``source.SourceAdapter``; asks nobody."""

    retry = RetryPolicy(tries=1)
    files_at_once = 1

    def __init__(self, setting: str) -> None:
        self._setting = setting

    def connections(self, canceller: Canceller, source: Source) -> Connections:
        """Raise SOURCE_NOT_ALLOWED."""
        self._refuse(source)

    def plan(
        self, connections: Connections, source: Source, *, allow_unsafe: bool = False
    ) -> NoReturn:
        """Raise SOURCE_NOT_ALLOWED."""
        self._refuse(source)

    def reader(
        self, connections: Connections, source: Source, revision: str, file: RemoteFile
    ) -> NoReturn:
        """Raise SOURCE_NOT_ALLOWED."""
        self._refuse(source)

    def _refuse(self, source: Source) -> NoReturn:
        raise ModelhostError(
            Reason.SOURCE_NOT_ALLOWED,
            f"{source.uri}: the operator allows no {scheme_of(source)}:// sources ({self._setting})",
            {"source": source.uri, "setting": self._setting},
        )
