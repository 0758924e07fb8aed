"""What every handler is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from opsin.core.server_settings import ServerSettings
from opsin.server.fair_queue import FairQueue
from opsin.server.images import ImageLoader
from opsin.server.model import ModelManager
from opsin.server.request_stats import RequestStats, Watcher


@dataclass(slots=True)
class Context:
    """The settings, the model, the image loader, the queue, and those who are told about each request."""

    settings: ServerSettings
    model: ModelManager
    images: ImageLoader
    watchers: tuple[Watcher, ...] = ()
    queue: FairQueue = field(init=False)

    def __post_init__(self) -> None:
        self.queue = FairQueue(self.settings.parallel, self.settings.max_queue)

    def finished(self, stats: RequestStats) -> None:
        """Tell everybody that a request ended; called once per request, after its last byte."""
        for watcher in self.watchers:
            watcher.finished(stats)
