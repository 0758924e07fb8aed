"""What every handler is given."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.core.server_settings import ServerSettings
from opsin.server.model import ModelManager
from opsin.server.pictures import PictureGate
from opsin.server.record import Record, Watcher


@dataclass(frozen=True, slots=True)
class Context:
    """The settings, the model, the door that pictures come in by, and those who are told of each request."""

    settings: ServerSettings
    model: ModelManager
    pictures: PictureGate
    watchers: tuple[Watcher, ...] = ()

    def finished(self, record: Record) -> None:
        """Tell everybody that a request ended; called once a request, after its last byte."""
        for watcher in self.watchers:
            watcher.finished(record)
