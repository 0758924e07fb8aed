"""A head start for the projector: image tokens begin as sums of the words they stand for.

The tower's own read-out (shape, colour, size, character, row, column) becomes the first hidden
units of the projector, and their second-layer columns the embeddings of the words. Attention can
then match a question's words with the picture from the first steps on.
"""

from __future__ import annotations

import torch

from training.data import ALPHABET
from training.model import Llava
from training.questions import plural
from training.scenes import COLOURS, SHAPES, SIZES
from training.tokenizer import SPACE, Tokenizer

HEAD_SCALE = 0.05  # output rows start as the embeddings, this much smaller
READ_OUT = 0.12  # brings a clear logit to about one
PLACE_NOISE = 0.3  # tells apart the two patch rows, or columns, that share a word


def _words() -> list[list[str]]:
    """For every unit of the read-out, in the heads' order, the pieces it stands for."""
    plain = [["nothing"], *([s, plural(s)] for s in SHAPES), ["text", "sign"]]
    plain += [*([c] for c in COLOURS), *([s] for s in SIZES)]
    pieces = [[SPACE + w for w in group] for group in plain]
    pieces += [[], *([c, SPACE + c] for c in ALPHABET)]
    lines = (["top"], ["top"], ["center", "middle"], ["center", "middle"], ["bottom"], ["bottom"])
    columns = (["left"], ["left"], ["center", "middle"], ["center", "middle"], ["right"], ["right"])
    return pieces + [[SPACE + w for w in group] for group in (*lines, *columns)]


@torch.no_grad()
def align(model: Llava, tokenizer: Tokenizer) -> None:
    """Set the first hidden units of the projector, their columns, and the output rows."""
    weight, bias = model.heads.linear.weight.clone(), model.heads.linear.bias.clone()
    at = 0
    for size in model.heads.parts:  # within a group only differences between logits mean anything
        weight[at : at + size] -= weight[at : at + size].mean(0)
        bias[at : at + size] -= bias[at : at + size].mean()
        at += size
    model.mm0.weight[:at] = weight * READ_OUT
    model.mm0.bias[:at] = bias * READ_OUT
    embed = model.text.embed.weight
    places = at - sum(model.heads.parts[-2:])
    for unit, pieces in enumerate(_words()):
        column = torch.zeros(model.c.t_width)
        for piece in pieces:
            column += embed[tokenizer.ids[piece]] / len(pieces) ** 0.5
        if unit >= places:
            column += PLACE_NOISE * torch.randn_like(column)
        model.mm2.weight[:, unit] = column
    model.text.head.weight.copy_(embed * HEAD_SCALE)
