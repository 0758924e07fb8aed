"""A deterministic fake backend and small pictures, for our tests and for those of people who build on Opsin.

Refuses to know llama.cpp and every room but core.
"""

from opsin.testing.fake_backend import FakeBackend, FakeClock
from opsin.testing.pictures import picture

__all__ = ["FakeBackend", "FakeClock", "picture"]
