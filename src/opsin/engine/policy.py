"""The numbers the scheduler decides by, and what suits a device."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers the scheduler decides by; times in seconds, sizes in tokens.

    While an answer streams, a prefill step takes about `slice_seconds`, which bounds the pause of that stream, and has
    `slice` rows until the time of a row is known. While images are worked on, streams wait for their next token so
    long that their steps take `stream_share` of the time, but at least `shortest_wait` and at most `longest_wait`. When
    more than `few` are served, waits and slices grow with the square of that, up to `crowded_wait`: the more streams
    there are, the more a step of theirs costs, and the cheaper it is to decode all of them together afterwards.
    With `decode_in_encode` streams get their tokens between two layers of an encode, too. Where `rows_cost`, a step
    takes longer for each sequence in it.

    Sequences of a priority below 0 are nobody's stream: they fill what is left. Their tokens wait while images are
    worked on. Beside them live streams have `low_stream_share` of the time, as long as they last. For `beside_live`
    seconds after a live request their prefill steps take about `low_slice_seconds`, or `slice_seconds` where nobody
    streams and the backend can stop them, and one slot stays free. Those that are answered leave the KV cache for main
    memory while anybody fills more than `park_beside` cells (None: never): attention would look at theirs, too.

    `wait_for` is how many more tokens a prefix that is being filled must share than one that is ready, for a request
    to wait for it. The prefixes of ended sequences go into main memory as soon as somebody else runs, `swap_cells` of
    them; at most `idle_cells` stay in the KV cache (None: until the room is needed). Answers get drafts while at most
    `draft_beside` of them are being written. `max_queue` requests may wait.
    """

    parallel: int = 1
    slice: int = 64
    slice_seconds: float = 0.27
    shortest_wait: float = 0.03
    longest_wait: float = 0.25
    crowded_wait: float = 0.4
    few: int = 4
    stream_share: float = 0.05
    decode_in_encode: bool = True
    rows_cost: bool = True
    beside_live: float = 10.0
    low_slice_seconds: float = 0.04
    low_stream_share: float = 0.8
    park_beside: int | None = None
    wait_for: int = 32
    idle_cells: int | None = None
    swap_cells: int = 0
    draft_beside: int = 0
    max_queue: int = 256
    keep_prefixes: bool = True

    @classmethod
    def for_device(
        cls, *, gpu: bool, encoder_gpu: bool, parallel: int, max_queue: int, swap_cells: int, unified: bool = True
    ) -> Policy:
        """What suits the devices that language model and encoder are on; main memory has room for `swap_cells`.

        An encoder on a GPU takes 20 to 50 ms, and stopping its graph costs more than that is worth: streams get their
        turn between steps. With the language model there they get half of the time. On a CPU attention looks at idle
        cells, too, which costs more than copying them: 4,000 of them make the prefill of an image half as long again.
        Not so if each slot has a part of the cells (`unified` is False).
        """
        common = cls(parallel, decode_in_encode=not encoder_gpu, max_queue=max_queue)
        if not gpu:
            return replace(common, idle_cells=4096, park_beside=256 if unified else None, swap_cells=swap_cells)
        return replace(common, slice=512, slice_seconds=0.05, stream_share=0.5, rows_cost=False)
