"""A sequence's KV cells on their way from one place to another, in the same context or between two of one model.

llama.cpp writes a sequence as bytes and reads them again (`llama_state_seq_get_data`, llama.h). Only the head says how
many memories ("streams") the context has, and how many cells each of them holds of the sequence; for a context with
another number of them the head is written anew, around the same cells:

    magic, id, streams | cells of stream 0, of stream 1, ... with the cells themselves behind the one that has any
    cells: position, ids a cell (and under M-RoPE three words more) | values transposed?, layers | keys | values
    keys: for each layer type, bytes a row (eight of them), one row a cell
    values: the same, or without flash attention type, bytes a value, values a row, and the rows transposed
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from opsin.core.errors import DecodeFailed, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from opsin.native.context import Context

_HEAD = 3  # words of four bytes before the counts
_CELL, _MORE = 3, 3  # words a cell, and more of them under M-RoPE
_LAYER = 12  # bytes before the rows of a layer
_VALUE = {0: np.uint32, 1: np.uint16, 30: np.uint16}  # by ggml's type: f32, f16, bf16


def carry(source: Context, seq_id: int, target: Context, target_id: int) -> None:
    """Write what sequence `seq_id` of `source` holds into sequence `target_id` of `target`, over what that one held.

    Raises DecodeFailed when there is no room, and `target_id` is empty then; EngineError when llama.cpp's state is not
    as described above. It takes a buffer as large as the cells.
    """
    llama = source.llama
    size = llama.llama_state_seq_get_size(source.pointer, seq_id)
    words = np.zeros(size // 4 + target.streams, np.uint32)  # all that is written is made of whole words
    if size % 4 or llama.llama_state_seq_get_data(source.pointer, _bytes(words), size, seq_id) != size:
        raise EngineError(f"llama.cpp did not give the state of sequence {seq_id}: report this with its version.")
    state = _for_streams(words[: size // 4], words, source.streams, target.streams, seq_id)
    if source.flash is not target.flash:
        _turn_values(state[: state.size - (target.streams - 1)], _CELL + (_MORE if source.n_pos > 1 else 0), target)
    if llama.llama_state_seq_set_data(target.pointer, _bytes(state), state.nbytes, target_id) != state.nbytes:
        raise DecodeFailed(f"There is no room for the cells of sequence {seq_id} in the memory where they should go.")


def _for_streams(
    state: NDArray[np.uint32], room: NDArray[np.uint32], streams: int, wanted: int, seq_id: int
) -> NDArray[np.uint32]:
    """The same cells with the head of a context that has `wanted` streams; in place, as it may be a gigabyte."""
    assert state[_HEAD - 1] == streams, "the head names as many streams as the context has"
    if streams == wanted:
        return state
    if wanted == 1:
        # Stream i is sequence i's: behind it come the empty counts of the others.
        alone = state[seq_id : state.size - (streams - 1 - seq_id)]
        alone[:_HEAD] = state[0], seq_id, 1
        return alone
    assert streams == 1, "one of both contexts has one memory for all"
    state[_HEAD - 1] = wanted
    return room[: state.size + wanted - 1]


def _turn_values(state: NDArray[np.uint32], cell: int, target: Context) -> None:
    """Transpose the values of every layer, in place: with flash attention a row is a cell's, without it a feature's.

    `state` has one stream, and `cell` words for each cell of it. Raises EngineError for a state of another make.
    """
    count = int(state[_HEAD])
    if count == 0:
        return
    at = _HEAD + 1 + count * cell
    turned = state[at : at + 1]
    layers, data = int(state[at + 1]), state.view(np.uint8)
    if turned[0] != int(target.flash) or not 0 < layers < 1000:
        raise EngineError("llama.cpp writes the state of a sequence in a way that this version of Opsin cannot read.")
    at = (at + 2) * 4
    for _ in range(layers):
        at += _LAYER + count * int(data[at + 4 : at + _LAYER].view(np.uint64)[0])
    while at < data.size:
        head, kind = data[at + 4 : at + _LAYER], _VALUE[int(data[at : at + 4].view(np.uint32)[0])]
        size = np.dtype(kind).itemsize
        width = int(head.view(np.uint32)[1]) if turned[0] else int(head.view(np.uint64)[0]) // size
        rows = data[at + _LAYER : at + _LAYER + count * width * size].view(kind)
        if turned[0]:
            rows[:] = rows.reshape(width, count).T.ravel()
            head.view(np.uint64)[0] = width * size
        else:
            rows[:] = rows.reshape(count, width).T.ravel()
            head.view(np.uint32)[:] = size, width
        at += _LAYER + rows.nbytes
    turned[0] ^= 1


def _bytes(words: NDArray[np.uint32]) -> object:
    return ctypes.cast(words.ctypes.data, ctypes.POINTER(ctypes.c_uint8))
