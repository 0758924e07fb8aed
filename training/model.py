"""The demo model in PyTorch: a small LLaVA laid out exactly as llama.cpp computes it.

Vision tower: CLIP-style pre-norm ViT (learned positions, pre and post layer norm, tanh GELU).
Projector: two linear layers with a tanh GELU between. Text model: `llama` (RMSNorm, rotary
positions over adjacent pairs, SwiGLU). Training and the parity reference both run this file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import N_CHARS, N_SHAPE_CLASSES
from training.scenes import COLOURS, IMAGE_SIZE, SIZES

IMAGE_MEAN = 0.85
IMAGE_STD = 0.3


@dataclass(frozen=True)
class Config:
    """Sizes of all three parts."""

    vocab: int
    image: int = IMAGE_SIZE
    patch: int = 20
    v_width: int = 256
    v_layers: int = 4
    v_heads: int = 8
    v_ff: int = 768
    t_width: int = 192
    t_layers: int = 4
    t_heads: int = 6
    t_ff: int = 512
    context: int = 1024
    eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image // self.patch

    @property
    def image_tokens(self) -> int:
        """Tokens one picture takes."""
        return self.grid**2

    def to_dict(self) -> dict[str, float]:
        """The sizes by name."""
        return asdict(self)


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward, as in CLIP."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        w = c.v_width
        self.heads = c.v_heads
        self.ln1 = nn.LayerNorm(w, eps=c.eps)
        self.qkv = nn.Linear(w, 3 * w)
        self.out = nn.Linear(w, w)
        self.ln2 = nn.LayerNorm(w, eps=c.eps)
        self.up = nn.Linear(w, c.v_ff)
        self.down = nn.Linear(c.v_ff, w)

    def forward(self, x: Tensor) -> Tensor:
        """One block over [B, patches, width]."""
        b, n, w = x.shape
        qkv = self.qkv(self.ln1(x)).view(b, n, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class Vision(nn.Module):
    """uint8 pictures [B, 120, 120, 3] -> patch features [B, 36, v_width]."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.patch = nn.Linear(3 * c.patch**2, c.v_width)  # columns run channel, y, x
        self.position = nn.Parameter(torch.randn(c.image_tokens, c.v_width) * 0.3)
        self.pre_ln = nn.LayerNorm(c.v_width, eps=c.eps)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.v_layers))
        self.post_ln = nn.LayerNorm(c.v_width, eps=c.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of every patch after the last norm."""
        g, p = self.c.grid, self.c.patch
        x = (pixels.float() / 255 - IMAGE_MEAN) / IMAGE_STD
        x = x.view(-1, g, p, g, p, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, g * g, 3 * p * p)
        x = self.pre_ln(self.patch(x) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.post_ln(x)


class VisionHeads(nn.Module):
    """Training only: what each patch says about its own grid cell, and about the text row.

    Every one of a cell's four patches must name the cell's shape, colour and size by itself; on a
    text row, the patches of column i must name character i. Every patch also names its own row and
    column: the text model has to say where things are. So the features stay easy to read.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.parts = (N_SHAPE_CLASSES, len(COLOURS), len(SIZES), N_CHARS, c.grid, c.grid)
        self.linear = nn.Linear(c.v_width, sum(self.parts))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits of every label group, patch by patch."""
        return self.linear(features).split(self.parts, dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions over adjacent pairs; x [N, T, heads, d], cos and sin [N, T, 1, d/2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


Cache = tuple[Tensor, Tensor]


class TextBlock(nn.Module):
    """One `llama` block."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        w = c.t_width
        self.heads, self.dim = c.t_heads, w // c.t_heads
        self.norm1 = RMSNorm(w, c.eps)
        self.qkv = nn.Linear(w, 3 * w, bias=False)
        self.out = nn.Linear(w, w, bias=False)
        self.norm2 = RMSNorm(w, c.eps)
        self.gate_up = nn.Linear(w, 2 * c.t_ff, bias=False)
        self.down = nn.Linear(c.t_ff, w, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, turned by position."""
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, self.dim).unbind(2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows the attention: output projection and feed-forward."""
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def causal(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Cache]:
        """A plain causal pass over the shared prefix; also gives its keys and values."""
        q, k, v = self.project(x, cos, sin)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True)), (k, v)

    def extend(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
        """Rows that see the keys in `past` and their own, as far as `mask` lets them."""
        q, k, v = self.project(x, cos, sin)
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        return self.finish(x, F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), (k, v)


class Text(nn.Module):
    """The `llama` text model."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab, c.t_width)
        self.blocks = nn.ModuleList(TextBlock(c) for _ in range(c.t_layers))
        self.norm = RMSNorm(c.t_width, c.eps)
        self.head = nn.Linear(c.t_width, c.vocab, bias=False)
        d = c.t_width // c.t_heads
        freq = c.rope_base ** (-torch.arange(0, d, 2).float() / d)
        angles = torch.arange(c.context).float()[:, None] * freq
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these positions."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)

    def prefix(self, x: Tensor) -> tuple[Tensor, list[Cache]]:
        """Embeddings from position 0 on -> hidden states and every layer's keys and values."""
        cos, sin = self.turn(torch.arange(x.shape[1])[None])
        caches = []
        for block in self.blocks:
            x, cache = block.causal(x, cos, sin)
            caches.append(cache)
        return x, caches

    def rows(self, tokens: Tensor, positions: Tensor, mask: Tensor, caches: list[Cache]) -> tuple[Tensor, list[Cache]]:
        """Hidden states of tokens that follow what `caches` hold, and the caches after them."""
        x = self.embed(tokens)
        cos, sin = self.turn(positions)
        after = []
        for block, past in zip(self.blocks, caches, strict=True):
            x, cache = block.extend(x, cos, sin, mask, past)
            after.append(cache)
        return x, after

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary."""
        return self.head(self.norm(hidden))


class Llava(nn.Module):
    """Tower, projector and text model in one."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.vision = Vision(c)
        self.heads = VisionHeads(c)
        self.mm0 = nn.Linear(c.v_width, c.t_width)
        self.mm2 = nn.Linear(c.t_width, c.t_width)
        self.text = Text(c)
        self._init()

    def _init(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.text.embed.weight, std=0.3)
        nn.init.normal_(self.text.head.weight, std=0.02)
        for block in (*self.vision.blocks, *self.text.blocks):
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def project(self, features: Tensor) -> Tensor:
        """Patch features -> image tokens."""
        return self.mm2(F.gelu(self.mm0(features), approximate="tanh"))

    def see(self, features: Tensor | None, head: Tensor) -> list[Cache]:
        """Keys and values of the prompt's start: the tokens `head`, then the image if any."""
        if features is None:
            return self.text.prefix(self.text.embed(head)[None])[1]
        start = self.text.embed(head)[None].expand(len(features), -1, -1)
        return self.text.prefix(torch.cat((start, self.project(features)), 1))[1]

    def answer_hidden(
        self, features: Tensor | None, head: Tensor, tokens: Tensor, positions: Tensor,
        segments: Tensor,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B * K, L, t_width] of rows [B, K, L] behind B pictures.

        A token sees its picture's prefix and the earlier tokens of its own segment. Without
        features (B is then 1) the rows follow `head` alone.
        """
        b, k, length = tokens.shape
        caches = [(repeat_rows(key, k), repeat_rows(value, k)) for key, value in self.see(features, head)]
        flat = segments.view(b * k, length)
        own = (flat[:, :, None] == flat[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        shared = torch.ones(b * k, length, caches[0][0].shape[2], dtype=torch.bool)
        mask = torch.cat((shared, own), 2)[:, None]
        rows = tokens.view(b * k, length), positions.view(b * k, length)
        return self.text.rows(*rows, mask, caches)[0]

    @torch.no_grad()
    def generate(
        self, features: Tensor, head: Tensor, prompts: list[list[int]], eos: int, limit: int = 96
    ) -> list[list[int]]:
        """Greedy answers, one prompt a picture; prompts are padded on the left."""
        caches = self.see(features, head)
        start, n = caches[0][0].shape[2], len(prompts)
        longest = max(map(len, prompts))
        tokens = torch.zeros(n, longest, dtype=torch.long)
        real = torch.zeros(n, longest, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            tokens[i, longest - len(prompt) :] = torch.tensor(prompt)
            real[i, longest - len(prompt) :] = True
        positions = (start + real.long().cumsum(1) - 1).clamp(min=0)
        seen = torch.cat((torch.ones(n, start, dtype=torch.bool), real), 1)
        own = torch.ones(longest, longest, dtype=torch.bool).tril()
        shared = torch.ones(longest, start, dtype=torch.bool)
        mask = (torch.cat((shared, own), 1)[None] & seen[:, None])[:, None]
        answers: list[list[int]] = [[] for _ in range(n)]
        open_ = torch.ones(n, dtype=torch.bool)
        for _ in range(limit):
            hidden, caches = self.text.rows(tokens, positions, mask, caches)
            best = self.text.logits(hidden[:, -1]).argmax(-1)
            open_ &= best != eos
            if not open_.any():
                break
            for i in open_.nonzero().flatten().tolist():
                answers[i].append(int(best[i]))
            tokens, positions = best[:, None], positions[:, -1:] + 1
            seen = torch.cat((seen, torch.ones(n, 1, dtype=torch.bool)), 1)
            mask = seen[:, None, None]
        return answers


def repeat_rows(x: Tensor, k: int) -> Tensor:
    """Every row `k` times over: [B, ...] -> [B * k, ...]."""
    return x[:, None].expand(-1, k, -1, -1, -1).flatten(0, 1)
