"""The encoder: owned results, turns for the others, and errors that cannot be cached."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from native_help import draw, generate, prefill
from token_rows import TokenRow, batch

from opsin.core.backend import Stopped
from opsin.core.errors import BadParameter, Cancelled, EncodeFailed, ModelUnreadable, PairMismatch
from opsin.core.request import ImagePart, SamplingParams, TextPart


@pytest.fixture
def run(backend: Any) -> Any:
    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    yield tokenized.chunks[-1]
    tokenized.close()


def test_an_embedding_is_owned_by_the_caller(backend: Any, run: Any) -> None:
    first = backend.encode(run)
    kept = first.copy()
    other = backend.tokenize([ImagePart(draw(9))], add_bos=False)
    assert not (backend.encode(other.chunks[-1]) == first).all()
    other.close()
    assert (first == kept).all()
    assert first.flags.owndata
    assert (first.shape, first.dtype) == ((16, backend.limits.n_embd), np.float32)


def test_others_get_turns_and_nothing_is_lost(backend: Any, run: Any) -> None:
    """Decode steps inside the encoder's graph give the tokens and the embedding that they give apart."""
    quiet = backend.encode(run)
    cold = SamplingParams(temperature=0.0, ignore_eos=True)

    def begin(seq_id: int) -> tuple[Any, int]:
        pos = prefill(backend, backend.tokenize([TextPart("USER: hello")], add_bos=True), seq_id)
        return backend.sampler(cold, 1), pos

    sampler, pos = begin(0)
    expected = generate(backend, sampler, pos, 40)
    sampler.close()

    sampler, pos = begin(1)
    drawn: list[int] = []

    def step() -> None:
        drawn.append(sampler.sample(-1))
        assert backend.decode(batch([TokenRow(drawn[-1], pos + len(drawn) - 1, 1, True)]))

    noisy = backend.encode(run, between=step)
    sampler.close()
    assert len(drawn) >= 2
    assert drawn == expected[: len(drawn)]
    assert np.abs(noisy - quiet).max() < 1e-5


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), Cancelled("gone"), Stopped()])
def test_what_a_turn_raises_is_raised_after_the_encode(backend: Any, run: Any, error: BaseException) -> None:
    before = backend.encode(run)

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        backend.encode(run, between=fail)
    assert raised.value is error
    assert (backend.encode(run) == before).all()


def test_a_turn_is_not_called_again_after_it_failed(backend: Any, run: Any) -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        backend.encode(run, between=fail)
    assert calls == [1]


def test_a_stopped_graph_still_returns_zero_with_wrong_numbers(backend: Any, run: Any) -> None:
    """Why nothing but a whole encode may leave this room: the library does not tell."""
    whole = backend.encode(run)
    encoder = backend._encoder

    class Stop:
        def wants(self, node: Any) -> bool:
            return True

        def seen(self, node: Any) -> None:
            raise Cancelled("stop here")

    with pytest.raises(Cancelled), encoder._hook.observing(Stop()):
        assert encoder.lib.mtmd.mtmd_encode_chunk(encoder.pointer, run.handle.pointer) == 0
    left = encoder._copy(encoder.lib.mtmd.mtmd_get_output_embd(encoder.pointer), run)
    assert not np.allclose(left, whole)


def test_several_chunks_come_back_in_order(backend: Any) -> None:
    tokenized = backend.tokenize([ImagePart(draw(seed)) for seed in range(3)], add_bos=False)
    runs = [run for run in tokenized.chunks if hasattr(run, "identity")]
    together = backend.encode_many(runs)
    for run, rows in zip(runs, together, strict=True):
        assert (backend.encode(run) == rows).all()
    tokenized.close()


def test_values_that_are_no_numbers_are_refused(open_pair: Callable[..., Any], pair: Any, tmp_path: Any) -> None:
    """A damaged projector: every f16 weight of its data is not a number."""
    from opsin.models.gguf import read_header

    data = bytearray(pair.mmproj.read_bytes())
    start = read_header(pair.mmproj).data
    data[start:] = b"\xff" * (len(data) - start)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(bytes(data))
    backend = open_pair(mmproj=damaged, ctx=256)
    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    try:
        with pytest.raises(EncodeFailed, match="not numbers"):
            backend.encode(tokenized.chunks[-1])
    finally:
        tokenized.close()
        backend.close()


def refused(open_pair: Callable[..., Any], **settings: Any) -> str:
    with pytest.raises((ModelUnreadable, PairMismatch, BadParameter)) as error:
        open_pair(**settings)
    gc.collect()
    return f"{type(error.value).__name__}: {error.value}"


def test_wrong_files_are_refused_with_the_mend(open_pair: Callable[..., Any], pair: Any, tmp_path: Any) -> None:
    missing = tmp_path / "missing.gguf"
    text = tmp_path / "text.gguf"
    text.write_text("no model at all, but long enough to hold a header of any kind")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(pair.mmproj.read_bytes()[:700])
    for path in (missing, text, cut):
        assert f"{path.name} is missing or not a whole GGUF file" in refused(open_pair, mmproj=path)
        assert f"llama.cpp cannot load {path.name}" in refused(open_pair, model=path)
    assert "llama.cpp cannot load the projector" in refused(open_pair, mmproj=pair.llm)
    assert "CLIP cannot be used" in refused(open_pair, model=pair.mmproj)


def test_a_projector_of_another_width_is_refused(open_pair: Callable[..., Any], tmp_path: Any) -> None:
    import dataclasses

    import synth

    tiny = synth.SHAPES["tiny"]
    wide = dataclasses.replace(tiny, name="wide", text=dataclasses.replace(tiny.text, width=128))
    other = synth.write_shape(wide, tmp_path)
    message = refused(open_pair, mmproj=other.mmproj)
    assert message.startswith("PairMismatch: ")
    assert "n_embd = 64" in message
    assert "n_embd = 128" in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "CUDA7"}, "There is no device 'CUDA7' for --device"),
        ({"mmproj_device": "CUDA7"}, "There is no device 'CUDA7' for --mmproj-device"),
        ({"image_min_tokens": 9, "image_max_tokens": 4}, "larger than"),
        ({"mmproj": None, "image_max_tokens": 4}, "need a vision encoder"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(open_pair: Callable[..., Any], settings: Any, says: str) -> None:
    assert says in refused(open_pair, **settings)


def test_the_cpu_can_be_asked_for(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(device="none", mmproj_device="CPU", gpu_layers=99, ctx=256)
    assert backend.placement().layers_offloaded == 0
    backend.close()
