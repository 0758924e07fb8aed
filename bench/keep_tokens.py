#!/usr/bin/env python3
"""What an image may lose: the demo model's exam with a half, a quarter and a ninth of each image's tokens.

    python bench/keep_tokens.py --scenes 1000 --json-out docs/results/keep_tokens.json

The encoder's output is cut down before the language model reads it: by max-min diversity (Alvar et al., "DivPrune:
Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025), at random, by leaving out rows and
columns of the image's grid, by averaging neighbours, or by giving the encoder a smaller image. Every way answers the
same questions, greedily. What is kept stays in order and takes consecutive positions, or, in rows called "gaps", the
ones that it had.

Intervals are of 95 %, by resampling scenes. Needs Pillow and the fonts that `training` draws with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from opsin.compose import open_backend, template_source
from opsin.core.errors import OpsinError
from opsin.core.request import (
    EmbeddingRows,
    Image,
    ImageChunk,
    SamplingParams,
    TextChunk,
    TokenBatch,
    TokenizedPrompt,
)
from opsin.core.settings import EngineSettings
from opsin.models import resolve
from opsin.native import NativeBackend
from opsin.prompt import Message, PromptBuilder

if TYPE_CHECKING:  # the fonts that scenes are drawn with come with packages that only training needs
    from training.questions import Question
    from training.scenes import Scene

Rows = NDArray[np.float32]
Places = NDArray[np.intp]

SHARES = (0.5, 0.25, 0.125)
FULL = ("full", 1.0)
PROJECTED = 64  # dimensions that distances are taken in
MAX_TOKENS = 120
RESAMPLES = 2000
DRAWN = 448  # pixels an edge, as in training.evaluate
POOLED = {0.5: (1, 2), 0.25: (2, 2), 0.125: (3, 3)}  # rows and columns of the grid that become one
SMALLER = {0.5: (2, 1), 0.25: (2, 2), 0.125: (3, 3)}  # what height and width of the image are divided by
WORDS, SPOTS = ("number", "word", "sign"), ("place", "where", "relation")


def project(rows: Rows, seed: int = 0) -> Rows:
    """float32 [n, 64] of rows, [n, n_embd]: sums of neighbours under fixed random signs, which nearly keep angles."""
    n_embd = rows.shape[1]
    signs = np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), n_embd)
    width = -(-n_embd // PROJECTED)
    padding = (0, width * PROJECTED - n_embd)
    padded = np.pad(rows, ((0, 0), padding)) if padding[1] else rows
    blocks = padded.reshape(len(rows), PROJECTED, width)
    return np.einsum("nij,ij->ni", blocks, np.pad(signs, padding).reshape(PROJECTED, width))


def most_diverse(rows: Rows, keep: int) -> Places:
    """Which `keep` of the rows lie far apart, in order: each one is the farthest from all that were taken before it.

    Distances are one minus the cosine. The first is the one that is farthest from its nearest neighbour.
    """
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    apart = 1 - unit @ unit.T
    np.fill_diagonal(apart, np.inf)
    taken = [int(apart.min(axis=1).argmax())]
    np.fill_diagonal(apart, -np.inf)
    nearest = apart[taken[0]].copy()
    while len(taken) < keep:
        taken.append(int(nearest.argmax()))
        np.minimum(nearest, apart[taken[-1]], out=nearest)
    return np.sort(np.array(taken, np.intp))


def selection_ms(count: int, n_embd: int) -> dict[str, dict[str, float]]:
    """Milliseconds for choosing among `count` rows of width `n_embd`, the projection included: median and worst."""
    rows = np.random.default_rng(1).standard_normal((count, n_embd), np.float32)
    found = {}
    for share in SHARES:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            most_diverse(project(rows), int(count * share))
            times.append((time.perf_counter() - began) * 1e3)
        found[f"{share:.1%}"] = {"median": round(median(times), 2), "worst": round(max(times), 2)}
    return found


@dataclass(frozen=True, slots=True)
class Cut:
    """What is left of an image: `rows`, and the places of these in its grid where they had some (None: averages)."""

    rows: Rows
    places: Places | None = None


def cuts(rows: Rows, small: dict[float, Rows], seed: int) -> dict[tuple[str, float], Cut]:
    """Every way to cut an image down, by name and share; `rows` come from a square grid, row by row."""
    count, edge = len(rows), round(len(rows) ** 0.5)
    grid, number = np.arange(count).reshape(edge, edge), np.random.default_rng(seed)
    found = {FULL: Cut(rows, grid.ravel())}

    def add(name: str, share: float, places: Places) -> None:
        found[name, share] = Cut(np.ascontiguousarray(rows[places]), places)

    for share in SHARES:
        keep = int(count * share)
        add("diverse", share, most_diverse(project(rows), keep))
        add("diverse, not projected", share, most_diverse(rows, keep))
        add("random", share, np.sort(number.permutation(count)[:keep]))
        found["smaller image", share] = Cut(small[share])
    add("every other column", 0.5, grid[:, ::2].ravel())
    add("every other row", 0.5, grid[::2].ravel())
    add("every other square, as on a chessboard", 0.5, np.flatnonzero(np.indices(grid.shape).sum(axis=0) % 2 == 0))
    add("every other row and column", 0.25, grid[::2, ::2].ravel())
    add("every third row and column", 0.125, grid[1::3, 1::3].ravel())
    for share, (down, across) in POOLED.items():
        tiles = rows.reshape(edge // down, down, edge // across, across, -1)
        found["pooled", share] = Cut(np.ascontiguousarray(tiles.mean(axis=(1, 3)).reshape(-1, rows.shape[1])))
    return found


class Examinee:
    """The demo model behind one KV cache: an image's cuts are prefilled once, and each question forks all of them."""

    def __init__(self) -> None:
        pair = resolve("demo")
        self.model = pair.llm.name
        settings = EngineSettings(model=pair.llm, mmproj=pair.mmproj, parallel=128, ctx=16384, ubatch=2048)
        self.backend: NativeBackend = open_backend(settings)
        self._prompts = PromptBuilder(template_source(self.backend, pair))
        self._greedy = self.backend.sampler(SamplingParams(temperature=0.0), 0)

    def close(self) -> None:
        """Free everything."""
        self._greedy.close()
        self.backend.close()

    def tokenized(self, image: Image, text: str, *, pixels: bool) -> TokenizedPrompt:
        """The chunks of a question about an image."""
        prompt = self._prompts.build([Message("user", [image, text])])
        return self.backend.tokenize(prompt.parts, add_bos=prompt.add_bos, known=None if pixels else lambda _: True)

    def encoded(self, picture: Pillow.Image) -> Rows:
        """float32 [n_tokens, n_embd] of an image."""
        with closing(self.tokenized(_image(picture), "what is this?", pixels=True)) as tokenized:
            (chunk,) = (chunk for chunk in tokenized.chunks if isinstance(chunk, ImageChunk))
            return self.backend.encode(chunk)

    def prefill(self, seq_id: int, head: Sequence[int], cut: Cut, n_pos: int, *, gaps: bool) -> None:
        """Let a sequence begin with the tokens `head` and an image; with `gaps` it takes `n_pos` positions."""
        self.backend.kv_remove(seq_id, 0, -1)
        batch = TokenBatch()
        batch.append(head, 0, seq_id, logits=False)
        self._decode(batch)
        places = cut.places if gaps and cut.places is not None else np.arange(len(cut.rows))
        for _, group in groupby(range(len(places)), lambda at: places[at] - at):  # runs without a gap
            run = list(group)
            positions = (len(head) + places[run]).astype(np.int32)
            self._jump(seq_id, int(positions[0]))
            self._decode(EmbeddingRows(cut.rows[run[0] : run[-1] + 1], positions[np.newaxis], seq_id))
        if gaps:
            self._jump(seq_id, len(head) + n_pos)

    def _jump(self, seq_id: int, position: int) -> None:
        """Let the next row take `position`, which llama.cpp refuses behind a gap: the last cell is renamed.

        Keys are rotated when they are stored, so a cell with another position in its name attends as before.
        """
        last = self.backend.kv_last(seq_id)
        if last == position - 1:
            return
        state = self.backend.kv_save(seq_id)
        # A mark, the sequence, the numbers of streams and of cells; then of each cell its position and its sequences.
        head = state[:16].view(np.int32)
        cells = state[16 : 16 + 12 * head[3]].view(np.int32).reshape(-1, 3)
        if head[2] != 1 or cells[:, 0].max() != last or (cells[:, 1:] != (1, seq_id)).any():
            raise RuntimeError("llama.cpp saves sequences in a format that this script does not know")
        cells[cells[:, 0] == last, 0] = position - 1
        self.backend.kv_remove(seq_id, 0, -1)
        self.backend.kv_load(seq_id, state)

    def _decode(self, rows: TokenBatch | EmbeddingRows) -> None:
        if not self.backend.decode(rows):
            raise RuntimeError("the KV cache is full")

    def answers(self, bases: int, question: Sequence[int]) -> list[str]:
        """Greedy answers to one question by the first `bases` sequences, which stay as they are."""
        seq_ids = [bases + base for base in range(bases)]
        ends, texts, batch = [0] * bases, [b""] * bases, TokenBatch()
        for base, seq_id in enumerate(seq_ids):
            self.backend.kv_remove(seq_id, 0, -1)
            start = self.backend.kv_last(base) + 1
            self.backend.kv_copy(base, seq_id, 0, start)
            batch.append(question, start, seq_id, logits=True)
            ends[base] = start + len(question)
        running = list(range(bases))
        for _ in range(MAX_TOKENS):
            self._decode(batch)
            sampled = self.backend.sample([(self._greedy, row, None) for row in batch.outputs])
            batch, going = TokenBatch(), []
            for base, result in zip(running, sampled, strict=True):
                if isinstance(result, OpsinError):
                    raise result
                if result[0] not in self.backend.eog_tokens:
                    texts[base] += self.backend.piece(result[0])
                    batch.append([result[0]], ends[base], seq_ids[base], logits=True)
                    ends[base] += 1
                    going.append(base)
            running = going
            if not running:
                break
        return [text.decode("utf-8", "replace").strip() for text in texts]


def _image(picture: Pillow.Image) -> Image:
    rgb = picture.convert("RGB").tobytes()
    return Image(rgb, *picture.size, hashlib.sha256(rgb).hexdigest(), "PNG")


def _small(examinee: Examinee, picture: Pillow.Image) -> dict[float, Rows]:
    """The image as the encoder sees it, made smaller in a corner of its square: the tokens of that corner, by share."""
    from training.scenes import IMAGE_SIZE, PAD_COLOUR, fit

    whole, found = Pillow.fromarray(fit(picture)), {}
    for share, (down, across) in SMALLER.items():
        canvas = Pillow.new("RGB", whole.size, PAD_COLOUR)
        canvas.paste(whole.resize((IMAGE_SIZE // across, IMAGE_SIZE // down), Pillow.Resampling.BICUBIC))
        rows = examinee.encoded(canvas)
        edge = round(len(rows) ** 0.5)
        corner = rows.reshape(edge, edge, -1)[: edge // down, : edge // across]
        found[share] = np.ascontiguousarray(corner.reshape(-1, rows.shape[1]))
    return found


def headings(question: Question, scene: Scene) -> tuple[str, ...]:
    """What a question counts under: words that are read (OCR) stand apart."""
    # What stands at a place is a text where a sign does.
    read = isinstance(question.truth, str) and question.kind in (*WORDS, "place")
    if question.kind == "describe":
        return ("descriptions with a sign" if scene.sign else "descriptions without a sign",)
    if read:
        return "closed questions", "words"
    return "closed questions", "places" if question.kind in SPOTS else "other closed questions"


class Marks:
    """Right and asked answers of each way, by heading and scene."""

    def __init__(self) -> None:
        self._right: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
        self._asked: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, scene: int, where: Sequence[str], results: dict[str, bool]) -> None:
        """One question, answered in every way."""
        for heading in where:
            self._asked[heading][scene] += 1
            for way, good in results.items():
                self._right[heading][way][scene] += good

    def shares(self, others: Callable[[str], str | None]) -> dict[str, Any]:
        """Of each way and heading: the share that is right, and by how much the way `others` names is better."""
        found: dict[str, Any] = defaultdict(dict)
        draw = np.random.default_rng(0)
        for heading, asked in sorted(self._asked.items()):
            scenes, counts = list(asked), np.array(list(asked.values()))
            weights = draw.multinomial(len(scenes), [1 / len(scenes)] * len(scenes), RESAMPLES)
            right = {
                way: np.array([by_scene[scene] for scene in scenes]) for way, by_scene in self._right[heading].items()
            }
            for way, good in right.items():
                low, high = np.percentile(weights @ good / (weights @ counts), (2.5, 97.5))
                entry = {"asked": int(counts.sum()), "right": int(good.sum())}
                entry |= {"share": round(good.sum() / counts.sum(), 4), "from": round(low, 4), "to": round(high, 4)}
                other = others(way)
                if other is not None:
                    more = right[other] - good
                    low, high = np.percentile(weights @ more / (weights @ counts), (2.5, 97.5))
                    entry["diverse_better_by"] = [round(x, 4) for x in (more.sum() / counts.sum(), low, high)]
                found[way][heading] = entry
        return dict(found)


def examine(examinee: Examinee, scenes: int) -> tuple[Marks, dict[str, int]]:
    """Ask every question of the exam in every way; also how many tokens each way keeps."""
    from training.exam import paper
    from training.questions import judge
    from training.scenes import render

    marks, kept = Marks(), {}
    questions = groupby(paper("heldout", scenes, closed=4), lambda entry: entry[0])
    for number, entries in questions:
        exam = [(scene, question) for _, scene, question in entries]
        picture = render(exam[0][0], DRAWN)
        rows, image = examinee.encoded(picture), _image(picture)
        prepared = cuts(rows, _small(examinee, picture), number)
        ways: list[str] = []
        for (name, share), cut in prepared.items():
            for gaps in (False, True):
                if gaps and (cut.places is None or name in ("full", "diverse, not projected")):
                    continue
                way = name if share == 1 else f"{share:.1%} {name}{', gaps' if gaps else ''}"
                head, _ = _tokens(examinee, image, exam[0][1].text)
                examinee.prefill(len(ways), head, cut, len(rows), gaps=gaps)
                kept[way] = len(cut.rows)
                ways.append(way)
        for scene, question in exam:
            _, text = _tokens(examinee, image, question.text)
            answers = examinee.answers(len(ways), text)
            results = {way: judge(question, answer) for way, answer in zip(ways, answers, strict=True)}
            marks.add(number, headings(question, scene), results)
        if number % 100 == 99:
            print(f"{number + 1} scenes", file=sys.stderr, flush=True)
    return marks, kept


def _tokens(examinee: Examinee, image: Image, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    with closing(examinee.tokenized(image, text, pixels=False)) as tokenized:
        head, _, tail = tokenized.chunks
        if not (isinstance(head, TextChunk) and isinstance(tail, TextChunk)):
            raise TypeError("the demo model's prompts are text, an image, text")
        return head.tokens, tail.tokens


def _diverse(way: str) -> str | None:
    """The row that a way is compared with: the diverse one of the same share and positions."""
    share, _, name = way.partition(" ")
    if way == "full" or name.removesuffix(", gaps") == "diverse":
        return None
    return f"{share} diverse{', gaps' if name.endswith(', gaps') else ''}"


def main() -> None:
    """Measure, print a table, and write a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=1000, help="held-out scenes, five questions each (1000)")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args()
    with closing(Examinee()) as examinee:
        marks, kept = examine(examinee, given.scenes)
        model = examinee.model
    ways = marks.shares(_diverse)
    document = {
        "kind": "keep_tokens",
        "model": model,
        "scenes": given.scenes,
        "selection_ms_576_of_4096": selection_ms(576, 4096),
        "ways": {way: {"tokens": kept[way], "headings": ways[way]} for way in sorted(ways)},
    }
    for heading in next(iter(ways.values())):
        print(f"\n{heading} ({ways['full'][heading]['asked']})")
        for way in sorted(ways):
            entry = ways[way][heading]
            better = entry.get("diverse_better_by")
            versus = f"  diverse better by {better[0]:+.1%} ({better[1]:+.1%} to {better[2]:+.1%})" if better else ""
            print(f"  {kept[way]:3} {way:42} {entry['share']:6.1%} ({entry['from']:.1%} to {entry['to']:.1%}){versus}")
    print(f"\nselection among 576 rows of 4,096: {document['selection_ms_576_of_4096']} ms")
    if given.json_out is not None:
        given.json_out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
