"""The placement probe: every computing node, on the backend that computed it, with known amounts of work."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from native_help import draw
from token_rows import TokenRow, batch

from opsin.core.errors import ModelUnreadable
from opsin.core.request import ImagePart
from opsin.native.devices import Device
from opsin.native.ggml import InitParams, Tensor, op_names
from opsin.native.library import library
from opsin.native.probe import NodeCounter, flops
from opsin.native.vision import _HEAVY


def test_a_cpu_build_computes_both_on_the_cpu(backend: Any) -> None:
    found = backend.placement()
    for share in (found.encoder, found.language_model):
        assert list(share) == ["CPU"]
        assert share["CPU"].nodes > 20
        assert share["CPU"].share_of_ops == pytest.approx(1.0)
        assert share["CPU"].share_of_time == pytest.approx(1.0)
        assert share["CPU"].ops["MUL_MAT"] > 4
        assert not {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"} & set(share["CPU"].ops)
        assert sum(share["CPU"].ops.values()) == share["CPU"].nodes
        assert share["CPU"].splits == 1
    assert (found.layers_offloaded, found.layers) == (0, 2)


def test_the_probe_leaves_memory_and_embeddings_alone(backend: Any) -> None:

    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    before = backend.encode(tokenized.chunks[-1])
    assert backend.decode(batch([TokenRow(5, 0, 0, True)]))
    scores = backend.logits(-1).copy()
    backend.placement()
    assert backend.kv_last(0) == 0
    assert (backend.logits(-1) == scores).all()
    assert (backend.encode(tokenized.chunks[-1]) == before).all()
    tokenized.close()


def test_an_encoder_that_nobody_watches_has_a_twin_for_the_proof(open_pair: Callable[..., Any]) -> None:
    """As on a GPU: its own callback is never called, and the proof is that of an encoder of the same settings."""
    backend = open_pair()
    wanted, encoder = backend.placement().encoder, backend._encoder
    children = encoder.children
    encoder.watched = False
    calls = []
    with closing(backend.tokenize([ImagePart(draw())], add_bos=False)) as tokenized:
        backend.encode(tokenized.chunks[-1], lambda: calls.append(1))
        assert not calls
        proven = backend.placement()
        assert {name: share.ops for name, share in proven.encoder.items()} == {
            name: share.ops for name, share in wanted.items()
        }
        assert encoder.children == children
        assert backend.encode(tokenized.chunks[-1]).any()
    backend.close()


def test_where_there_is_no_room_for_a_twin_the_proof_says_so(
    open_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_pair()
    backend._encoder.watched = False

    def full(*_: object, **__: object) -> None:
        raise ModelUnreadable("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("opsin.native.probe.Encoder", full)
        found = backend.placement()
    assert found.encoder == {}
    assert found.language_model
    assert "could not be watched: no memory" in found.notes[-1]
    # llama.cpp would abort where it gets no memory, so it is not asked.
    card = Device("CUDA0", "a card", "gpu", 2**28, 2**33, 1)
    monkeypatch.setattr("opsin.native.probe.pick", lambda *_: [card])
    found = backend.placement()
    assert found.encoder == {}
    assert "CUDA0 has no room" in found.notes[-1]
    backend.close()


def test_text_only_models_have_no_encoder_to_place(open_pair: Callable[..., Any]) -> None:
    backend = open_pair(mmproj=None, ctx=256)
    found = backend.placement()
    assert found.encoder == {}
    assert found.language_model["CPU"].nodes > 20
    backend.close()


def test_every_node_of_a_graph_is_either_counted_or_computes_nothing(backend: Any) -> None:
    counted, ignored = [], []

    class Both(NodeCounter):
        def wants(self, node: Any) -> bool:
            wanted = super().wants(node)
            (counted if wanted else ignored).append(op_names(library())[node.op])
            return wanted

    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    counter = Both(library())
    backend._encoder.observed(tokenized.chunks[-1], counter)
    tokenized.close()
    assert set(ignored) <= {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE", "NONE"}
    assert sum(share.nodes for share in counter.shares().values()) == len(counted)


def test_products_are_counted_exactly(backend: Any) -> None:
    """The patch embedding and the two projector matrices of the tiny pair, by hand."""
    seen: list[tuple[tuple[int, ...], float]] = []

    class Products(NodeCounter):
        def seen(self, node: Any) -> None:
            if op_names(library())[node.op] == "MUL_MAT":
                seen.append((tuple(node.ne), flops("MUL_MAT", node)))

    tokenized = backend.tokenize([ImagePart(draw())], add_bos=False)
    backend._encoder.observed(tokenized.chunks[-1], Products(library()))
    tokenized.close()
    patches, width = 16, 64
    assert seen[0][1] == 2 * (14 * 14 * 3) * width * patches
    assert seen[-1][1] == 2 * width * width * patches


def tensors(*shapes: tuple[int, int, int, int]) -> tuple[list[Tensor], Callable[[], None]]:
    ggml = library().ggml
    context = ggml.ggml_init(InitParams(32 * ggml.ggml_tensor_overhead(), None, True))
    made = [Tensor.from_address(ggml.ggml_new_tensor_4d(context, 0, *shape)) for shape in shapes]
    return made, lambda: ggml.ggml_free(context)


def node_of(ne: tuple[int, int, int, int], *sources: Tensor) -> Tensor:
    import ctypes

    node = Tensor()
    for index, size in enumerate(ne):
        node.ne[index] = size
    for index, source in enumerate(sources):
        node.src[index] = ctypes.addressof(source)
    return node


def test_work_of_attention_and_convolutions() -> None:
    (q, k, v, kernel, image), free = tensors(
        (64, 100, 8, 1), (64, 300, 2, 1), (48, 300, 2, 1), (3, 3, 16, 32), (20, 20, 16, 1)
    )
    assert flops("FLASH_ATTN_EXT", node_of((48, 8, 100, 1), q, k, v)) == 2 * 100 * 8 * 300 * (64 + 48)
    assert flops("CONV_2D", node_of((18, 18, 32, 1), kernel, image)) == 2 * (3 * 3 * 16) * (18 * 18 * 32)
    assert flops("ADD", node_of((18, 18, 32, 1), kernel, image)) == 18 * 18 * 32
    assert flops("UNARY", node_of((7, 3, 1, 1), q)) == 21
    free()


def test_the_names_of_operations_are_those_of_the_library() -> None:
    names = op_names(library())
    assert names[0] == "NONE"
    assert {"MUL_MAT", "FLASH_ATTN_EXT", "VIEW", "GLU"} <= set(names)
    assert set(names) >= _HEAVY
    assert len(set(names)) == len(names)


def test_host_memory_of_a_gpu_backend_counts_as_the_cpu() -> None:
    """`CUDA_Host` is page-locked memory of the host: the CPU computed what lies there."""

    class Ggml:
        host, device = True, 1

        def ggml_op_name(self, number: int) -> bytes:
            return [b"NONE", b"MUL_MAT", b"GLU"][number]

        def ggml_backend_buffer_get_type(self, buffer: int) -> int:
            return buffer

        def ggml_backend_buft_is_host(self, kind: int) -> bool:
            return kind == 1

        def ggml_backend_buft_get_device(self, kind: int) -> int | None:
            return 1 if kind != 3 else None

        def ggml_backend_dev_name(self, device: int) -> bytes:
            return b"CUDA0"

        def ggml_backend_buffer_name(self, buffer: int) -> bytes:
            return b"odd buffer"

    class Lib:
        ggml = Ggml()

    counter = NodeCounter(Lib())  # type: ignore[arg-type]
    for buffer in (1, 2, 2, 3, None):
        node = Tensor()
        node.op, node.buffer = 1, buffer
        for index in range(4):
            node.ne[index] = 2
        counter.wants(node)
        counter.seen(node)
    shares = counter.shares()
    assert {name: share.nodes for name, share in shares.items()} == {
        "CUDA0": 2,
        "CPU": 1,
        "odd buffer": 1,
        "unknown": 1,
    }
    assert np.isclose(sum(share.share_of_ops for share in shares.values()), 1.0)
    assert {name: share.splits for name, share in shares.items()} == {
        "CUDA0": 1,
        "CPU": 1,
        "odd buffer": 1,
        "unknown": 1,
    }


def test_stretches_are_counted_by_borders_between_backends() -> None:
    names = iter(["CPU", "CUDA0", "CUDA0", "CPU", "CUDA0"])

    class Fake(NodeCounter):
        def _backend(self, node: Any) -> str:
            return next(names)

    counter = Fake(library())
    for _ in range(5):
        counter.seen(Tensor())
    assert {name: (share.nodes, share.splits) for name, share in counter.shares().items()} == {
        "CPU": (2, 2),
        "CUDA0": (3, 2),
    }


def test_a_real_pairs_proof_makes_checks(backend: Any, pair: Any) -> None:
    from opsin.core.settings import EngineSettings
    from opsin.doctor.placement import placement_checks

    settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj)
    found = {check.name: check for check in placement_checks(backend.placement(), (), settings)}
    names = ("encoder", "language_model", "layers", "fallback", "splits")
    assert {name: check.status for name, check in found.items()} == {f"placement.{name}": "ok" for name in names}
    assert found["placement.encoder"].evidence["backends"]["CPU"]["nodes"] > 20
    assert found["placement.splits"].evidence["splits"] == {"encoder": 1, "language_model": 1}
