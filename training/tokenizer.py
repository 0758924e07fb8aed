"""The demo model's vocabulary: a SentencePiece-style one that llama.cpp's `llama` tokenizer reads.

A word is a chain of prefix pieces ("▁r", "▁re", "▁red"): that tokenizer merges pairs, so every
prefix must be a piece for the whole word to become one token. Nothing else merges, which makes the
ids easy to foretell: after a space the longest chain, then single characters. Capitals inside a
word and digits stay single, so words on signs are spelled letter by letter.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field

from training.questions import vocabulary

SPACE = "\u2581"
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6  # llama.cpp's token types
USER, ASSISTANT = "<|user|>", "<|assistant|>"
# Template text is kept free of white space around the control tokens: the tokenizer itself puts a
# space before each stretch of text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set ns = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = message['content'] + ' ' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>' + ns.system + message['content'] }}"
    "{% set ns.system = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _pieces() -> list[tuple[str, int]]:
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{i:02X}>", BYTE) for i in range(256)]
    pieces += [(USER, CONTROL), (ASSISTANT, CONTROL), (SPACE, NORMAL)]
    singles = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    pieces += [(c, NORMAL) for c in singles]
    chains = {SPACE + c for c in singles}
    for word in vocabulary():
        chains |= {SPACE + word[:n] for n in range(1, len(word) + 1)}
    pieces += [(p, NORMAL) for p in sorted(chains, key=lambda p: (len(p), p))]
    return pieces


@dataclass
class Tokenizer:
    """Text to ids and back, as llama.cpp does it with the same pieces."""

    pieces: list[tuple[str, int]] = field(default_factory=_pieces)

    def __post_init__(self) -> None:
        self.ids = {piece: i for i, (piece, _) in enumerate(self.pieces)}
        self.bos, self.eos = self.ids["<s>"], self.ids["</s>"]
        self.user, self.assistant = self.ids[USER], self.ids[ASSISTANT]
        self._words: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def scores(self) -> list[float]:
        """Merge priorities."""
        return [-float(i) if t == NORMAL else 0.0 for i, (_, t) in enumerate(self.pieces)]

    def _single(self, char: str) -> list[int]:
        if char in self.ids:
            return [self.ids[char]]
        return [self.ids[f"<0x{b:02X}>"] for b in char.encode()]

    def _word(self, word: str) -> list[int]:
        """One stretch that starts with the space mark: its longest chain, then single characters."""
        known = self._words.get(word)
        if known is None:
            end = 1
            while end < len(word) and word[: end + 1] in self.ids:
                end += 1
            known = [self.ids[word[:end]]] + [i for c in word[end:] for i in self._single(c)]
            self._words[word] = known
        return known

    def text(self, text: str) -> list[int]:
        """Ids of one stretch of text, with the space the tokenizer itself puts in front."""
        if not text:
            return []
        marked = SPACE + text.replace(" ", SPACE)
        return [i for word in re.findall(f"{SPACE}[^{SPACE}]*", marked) for i in self._word(word)]

    def prompt(self, question: str) -> list[int]:
        """What follows the picture: the question and the token that asks for the answer."""
        return [*self.text(question), self.assistant]

    def answer(self, text: str) -> list[int]:
        """An answer and the token that ends it."""
        return [*self.text(text), self.eos]

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control tokens vanish."""
        out = bytearray()
        for i in ids:
            piece, kind = self.pieces[i]
            if kind == BYTE:
                out.append(int(piece[3:5], 16))
            elif kind == NORMAL:
                out += piece.replace(SPACE, " ").encode()
        return out.decode("utf-8", "replace").removeprefix(" ")
