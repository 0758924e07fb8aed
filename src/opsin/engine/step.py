"""What a step computes: an image chunk, rows of an image, or tokens."""

from dataclasses import dataclass, replace

from opsin.core.request import ImageChunk, TextChunk
from opsin.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Encode:
    """Run the vision encoder on the image chunk at the sequence's cursor, unless its embedding is known.

    `beside` are chunks that the encoder can take in the same call, with the sequences that have them.
    """

    sequence: Sequence
    chunk: ImageChunk
    beside: tuple[tuple[Sequence, ImageChunk], ...] = ()


@dataclass(frozen=True, slots=True)
class PrefillImage:
    """Decode embedding rows [start, stop) of the image chunk at the cursor; `last` asks for logits.

    `decode` get their next token in the same ubatch. `text` is the chunk behind the image, and goes with its last rows.
    """

    sequence: Sequence
    chunk: ImageChunk
    start: int
    stop: int
    last: bool
    decode: tuple[Sequence, ...] = ()
    text: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Of its sequence."""
        return self.stop - self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Slice:
    """Some tokens of one sequence, at its next positions; `last` asks for the last one's logits."""

    sequence: Sequence
    tokens: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens of a label behind the whole prompt of a sequence, in cells that are theirs for this step; all have logits.

    `seq_id` shares the prompt's cells.
    """

    sequence: Sequence
    tokens: tuple[int, ...]
    seq_id: int = -1


@dataclass(frozen=True, slots=True)
class Tokens:
    """One new token for each sequence that answers, slices of prompts, and labels to be scored, all in one ubatch.

    `drafts` has, for each that answers, the tokens that may come behind its new one; empty where nobody has any.
    """

    decode: tuple[Sequence, ...]
    prefill: tuple[Slice, ...] = ()
    branches: tuple[Branch, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()

    @property
    def drafted(self) -> int:
        """Tokens of all drafts."""
        return sum(map(len, self.drafts))


Step = Encode | PrefillImage | Tokens


def branch_rows(step: Tokens) -> dict[tuple[int, tuple[int, ...]], list[Branch]]:
    """The rows of labels, in order: a sequence's id and a path behind its prompt, and the labels that share the row."""
    rows: dict[tuple[int, tuple[int, ...]], list[Branch]] = {}
    for branch in step.branches:
        for end in range(1, len(branch.tokens) + 1):
            rows.setdefault((branch.sequence.seq_id, branch.tokens[:end]), []).append(branch)
    return rows


def cells_needed(step: Step) -> int:
    """KV cells that a step takes."""
    if isinstance(step, Tokens):
        filled = sum(len(part.tokens) for part in step.prefill)
        return len(step.decode) + filled + step.drafted + len(branch_rows(step))
    return len(step.decode) + step.rows if isinstance(step, PrefillImage) else 0


def low_rows(step: Step) -> int:
    """Rows of a step that are of low priority."""
    decode = () if isinstance(step, Encode) else step.decode
    filled = members_of(step)[len(decode) :]
    low = sum(s.request.priority < 0 for s in decode)
    return low + (cells_needed(step) - len(decode) if filled and filled[0].request.priority < 0 else 0)


def members_of(step: Step) -> tuple[Sequence, ...]:
    """All sequences that a step computes for."""
    if isinstance(step, Tokens):
        return (*step.decode, *(part.sequence for part in step.prefill), *(one.sequence for one in step.branches))
    return (*step.decode, step.sequence) if isinstance(step, PrefillImage) else (step.sequence,)


def priority_of(step: Step) -> int:
    """That of what is filled; where nothing is, the highest of those that decode."""
    decode = () if isinstance(step, Encode) else step.decode
    filled = members_of(step)[len(decode) :]
    if filled:
        return min(s.request.priority for s in filled)
    return max(s.request.priority for s in decode)


def without(step: Step, sequence: Sequence) -> Step | None:
    """What is left of a step when one sequence is not part of it any more."""
    if isinstance(step, Encode):
        return None if step.sequence is sequence else step
    decode = tuple(s for s in step.decode if s is not sequence)
    if isinstance(step, PrefillImage) and step.sequence is not sequence:
        return replace(step, decode=decode)
    if isinstance(step, PrefillImage):
        return Tokens(decode) if decode else None
    prefill = tuple(part for part in step.prefill if part.sequence is not sequence)
    branches = tuple(part for part in step.branches if part.sequence is not sequence)
    return Tokens(decode, prefill, branches) if decode or prefill or branches else None


def slices(sequences: list[Sequence], budget: int) -> tuple[Slice, ...]:
    """Tokens of the text chunks at their cursors, as many as the budget: the first gets most, others half of it."""
    shares = zip(sequences, _shares(sequences, budget), strict=True)
    return tuple([_slice(one, share) for one, share in shares if share])


def _slice(sequence: Sequence, budget: int) -> Slice:
    chunk = sequence.chunk
    assert isinstance(chunk, TextChunk)
    start = sequence.chunk_offset
    tokens = chunk.tokens[start : start + budget]
    last = start + len(tokens) == chunk.n_tokens and sequence.chunk_index == len(sequence.chunks) - 1
    return Slice(sequence, tokens, last)


def _shares(sequences: list[Sequence], budget: int) -> list[int]:
    """How many tokens each gets of a step: the first most, but half is for the others, so that none waits for it."""
    wanted = [s.chunk.n_tokens - s.chunk_offset for s in sequences if s.chunk is not None]
    least = max(1, budget // (2 * len(wanted) - 2)) if len(wanted) > 1 else 0
    shares, left = [1], budget - 1
    for want in wanted[1:]:
        shares.append(min(want, least, left))
        left -= shares[-1]
    for place, want in enumerate(wanted):
        more = min(want - shares[place], left)
        shares[place] += more
        left -= more
    return shares
