"""What is known of a pair of language model and projector: its names, its size by its headers, and where it ran."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from opsin.core.image_options import ImageSizes
from opsin.core.settings import EngineSettings

HOST = "CPU"
"""The backend that computes on the host, and the name under which its memory is counted."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The names of a pair as `--json` prints them."""

    name: str
    architecture: str
    projector: str | None
    llm_file: str
    mmproj_file: str | None
    quantisation: str

    def as_dict(self) -> dict[str, str | None]:
        """The fields as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: bytes of its weights, those of its matrices by tensor type, and KV values that a token leaves.

    `window` is how many tokens it attends to, where that is known to be fewer than all (0).
    """

    bytes: int
    matrices: Mapping[str, int] = field(default_factory=dict)
    kv_values: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A language model. `name` is its file's.

    `input_bytes` are weights that are looked up and never multiplied with (token embeddings): they stay on the host.
    `output` is the output layer; `tied`: it is the token embeddings again. `context` is the trained length in tokens,
    0 where the file does not tell, and `slides` says that some layers attend to a sliding window only.
    """

    name: str
    layers: tuple[LayerFacts, ...]
    input_bytes: int
    output: LayerFacts
    tied: bool
    width: int
    heads: int
    feed_forward: int
    vocabulary: int
    context: int
    slides: bool = False


@dataclass(frozen=True, slots=True)
class ProjectorFacts:
    """A projector with its vision encoder.

    `patches` and `tokens` are those of the largest image that is encoded at once (`tokens` is None where the file
    does not tell), `patch_values` are the numbers that one patch comes as. `causal` is False where the tokens of an
    image attend to each other in both directions, so that all of them must go in one ubatch. `cell` and `least` are
    those of ImageSizes; `limited`: llama.cpp keeps a limit on tokens that it was opened with, although `cell` is 0.
    """

    name: str
    bytes: int
    patches: int
    patch_values: int
    tokens: int | None
    width: int
    heads: int
    feed_forward: int
    causal: bool = True
    cell: int = 0
    least: int = 0
    limited: bool = False

    def image_sizes(self, settings: EngineSettings) -> ImageSizes:
        """What it makes of the sizes of images, opened with these settings."""
        usual, least = settings.image_max_tokens, settings.image_min_tokens or self.least
        if not self.cell or self.tokens is None:
            return ImageSizes(usual=None if self.limited else usual)
        return ImageSizes(cell=self.cell, least=least, most=min(usual or self.tokens, self.tokens), usual=usual)


@dataclass(frozen=True, slots=True)
class PairFacts:
    """A language model and its projector, None for text only."""

    model: ModelFacts
    projector: ProjectorFacts | None = None


@dataclass(frozen=True, slots=True)
class BackendShare:
    """What one backend computed. Nodes that compute nothing (views, reshapes) are not counted.

    `ops` counts nodes by operation; `share_of_ops` is by floating-point operations, `share_of_time` by measured time
    (None: not measured). `splits` counts its pieces of the graph; between two, values are copied (0: not counted).
    """

    nodes: int
    share_of_ops: float
    share_of_time: float | None = None
    ops: dict[str, int] = field(default_factory=dict)
    splits: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where encoder and language model ran, by backend name, and what could not be told; known once it is `proven`."""

    encoder: dict[str, BackendShare]
    language_model: dict[str, BackendShare]
    layers_offloaded: int
    layers: int
    notes: tuple[str, ...] = ()
    proven: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The shape of `--json`: time, operations, splits and notes only where there are any."""
        if not self.proven:
            return {"proven": False}
        plain: dict[str, Any] = TypeAdapter(Placement).dump_python(self, mode="json", exclude_defaults=True)
        return {"proven": True, **plain}


UNPROVEN = Placement({}, {}, 0, 0, proven=False)
