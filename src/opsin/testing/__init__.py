"""A deterministic fake backend and small images, for our tests and for those of people who build on Opsin.

Refuses to know llama.cpp and every room but core.
"""

from opsin.testing.fake_backend import FakeBackend, FakeClock, image

__all__ = ["FakeBackend", "FakeClock", "image"]
