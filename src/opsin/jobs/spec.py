"""What a job asks, as plain values: two runs with equal ones belong to one job."""

import hashlib
from pathlib import Path
from typing import Any

from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.jobs.asker import Question
from opsin.models import Pair

# Fields that jobs of earlier versions do not know, and that change nothing where nobody sets them.
_ADDED = ("boxes", "choices", "scale", "boolean", "reasons", "confidence")
_HEAD = 2**20  # bytes of a model file's ends that are looked at


def job_spec(pair: Pair, settings: EngineSettings, asked: Question) -> dict[str, Any]:
    """Model, projector, prompt, schema, sampling, image settings and pages. Raises OSError."""
    params, plain = asked.params, SamplingParams()
    unset = {name for name in _ADDED if getattr(params, name) == getattr(plain, name)}
    return {
        "model": _file(pair.llm),
        "projector": None if pair.mmproj is None else _file(pair.mmproj),
        "prompt": asked.template.text,
        "system": asked.system,
        **params.model_dump(mode="json", exclude=unset),
        "image_max_tokens": settings.image_max_tokens,
        "image_min_tokens": settings.image_min_tokens,
        **asked.images.fields(),
        **asked.limits.chosen(),
    }


def _file(path: Path) -> str:
    """A file's name and content, as far as its ends and its size tell."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(_HEAD)
        file.seek(max(0, size - _HEAD))
        ends += file.read(_HEAD)
    return f"{path.name} ({size:,} bytes, {hashlib.sha256(ends).hexdigest()[:12]})"
