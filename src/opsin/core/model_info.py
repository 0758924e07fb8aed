"""What is known of a pair of language model and projector: its names, and what its headers say about its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


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
    """One layer: bytes of its weights, those of its matrices by tensor type, and KV values that a token leaves."""

    bytes: int
    matrices: Mapping[str, int] = field(default_factory=dict)
    kv_values: int = 0


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
    image attend to each other in both directions, so that all of them must go in one ubatch.
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


@dataclass(frozen=True, slots=True)
class PairFacts:
    """A language model and its projector, None for text only."""

    model: ModelFacts
    projector: ProjectorFacts | None = None
