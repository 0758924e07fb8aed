"""The guard: notices, while an answer streams, that it will not end by itself. It knows no engine and no model."""

from opsin.engine.guard.guard import Guard

__all__ = ["Guard"]
