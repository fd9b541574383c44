"""The demo policy with a masked-diffusion head: binned action tokens, decoded by the language layers themselves.

Vision tower, connector, text layers and state projection are those of ``smolvla.py`` under the same
names. Action tokens follow the observation in the text layers: they see it and each other, it does not see
them, so its keys and values are computed once per chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from rollout import encode_texts
from smolvla import Config, Prefix, SmolVla, rope

BINS = 256
WAVES = 64


@dataclass
class MaskedConfig(Config):
    """Sizes of the masked policy; the action expert of the base class is not used."""

    chunk: int = 12
    rounds: int = 6


def positions(x: Tensor) -> Tensor:
    """Where normalised actions lie on the axis of bins, as a real number: 0 is the first bin's centre."""
    return (x.clamp(-1, 1) + 1) * (0.5 * (BINS - 1)) - 0.5


def encode_bins(x: Tensor) -> Tensor:
    """Bins of normalised actions: 256 edges over [-1, 1] leave 255 bins."""
    return ((x.clamp(-1, 1) + 1) * (0.5 * (BINS - 1))).floor().clamp(0, BINS - 2).long()


def decode_bins(k: Tensor) -> Tensor:
    """Centres of bins; the last class shares the last bin."""
    return (k.clamp(max=BINS - 2).float() + 0.5) * (2 / (BINS - 1)) - 1


def waves() -> Tensor:
    """Cosines over the axis of bins, slow ones larger, so that neighbouring bins are learned together."""
    k = torch.arange(WAVES)
    x = (torch.arange(BINS) + 0.5) / BINS
    return torch.cos(math.pi * k * x[:, None]) / (1 + k / 8).sqrt()


class MaskedVla(SmolVla):
    """Observation encoder of SmolVLA plus the action tokens."""

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        c, d = config, config.hidden
        for name in ("action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out"):
            delattr(self.model, name)
        del self.model.vlm_with_expert.lm_expert
        del self.model.vlm_with_expert.vlm.lm_head
        self.expert = ()
        self.register_buffer("waves", waves(), persistent=False)
        self.bins = nn.Parameter(torch.randn(WAVES, d) * 0.2)
        self.mask = nn.Parameter(torch.randn(d) * 0.5)
        step, dim = torch.randn(c.chunk, 1, d), torch.randn(1, c.action_dim, d)
        self.places = nn.Parameter(0.5 * (step + dim).flatten(0, 1))
        self.out = nn.Parameter(torch.zeros(WAVES, d))
        self.out_bias = nn.Parameter(torch.zeros(WAVES))

    @property
    def length(self) -> int:
        """Action tokens of a chunk."""
        return self.config.chunk * self.config.action_dim

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of action tokens [.., L]; id 256 is the mask."""
        table = torch.cat([self.waves @ self.bins, self.mask[None]])
        return F.embedding(tokens, table) + self.places

    def logits(self, prefix: Prefix, tokens: Tensor) -> Tensor:
        """Logits [B, R, L, 256] of action tokens [B, R, L]: R draws a sample share its prefix."""
        c = self.config
        b, r, n = tokens.shape
        h = self.embed(tokens).flatten(0, 1)
        p = prefix.mask.shape[1]
        where = prefix.mask.sum(1).repeat_interleave(r)[:, None] + torch.arange(n)
        seen = torch.zeros(b, 1, 1, p + n)
        seen[..., :p].masked_fill_(~prefix.mask[:, None, None], -1e9)
        seen = seen.repeat_interleave(r, 0)
        for i, layer in enumerate(self.vlm[0].text_model.layers):
            a = layer.self_attn
            x = layer.input_layernorm(h)
            own_k, own_v = layer.keys_values(x, where)
            k = torch.cat([prefix.keys[i].repeat_interleave(r, 0), own_k], 2)
            v = torch.cat([prefix.values[i].repeat_interleave(r, 0), own_v], 2)
            q = rope(a.split(a.q_proj(x), a.heads), where)
            h = layer.finish(h, a.mix(q, k, v, seen.expand(-1, -1, n, -1)))
        h = self.vlm[0].text_model.norm(h)
        coarse = F.linear(h, self.out, self.out_bias)
        return F.linear(coarse, self.waves).view(b, r, n, BINS)

    def loss(self, prefix: Prefix, actions: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Cross-entropy of masked tokens against bins around the true action, and the share of exact bins.

        Half of the draws have some first actions given, as a running plan gives them.
        """
        c = self.config
        b, n = actions.shape[0], self.length
        x = actions.flatten(1)
        truth = encode_bins(x)[:, None].expand(-1, draws, -1)
        ratio = torch.cos(0.5 * math.pi * torch.rand(b, draws, 1))
        hidden = torch.rand(b, draws, n) < ratio
        hidden[:, 0] |= torch.rand(b, 1) < 0.25  # nothing known yet
        given = torch.randint(1, c.chunk // 2 + 1, (b, draws, 1)) * (torch.rand(b, draws, 1) < 0.3)
        hidden &= (torch.arange(n) // c.action_dim) >= given
        tokens = torch.where(hidden, BINS, truth)
        logp = self.logits(prefix, tokens).log_softmax(-1)
        away = torch.arange(BINS) - positions(x)[:, None, :, None]
        target = (-0.5 * (away / 0.7).square()).softmax(-1)
        ce = -(target * logp).sum(-1)
        weight = hidden.float()
        hit = (logp.argmax(-1) - truth).abs() <= 2
        count = weight.sum().clamp(min=1)
        return (ce * weight).sum() / count, (hit * weight).sum() / count

    @torch.no_grad()
    def decode(self, prefix: Prefix, rounds: int, given: Tensor | None = None) -> Tensor:
        """Bins [B, L], most confident first; ``given`` [B, L] has -1 where nothing is decided."""
        n = self.length
        b = prefix.mask.shape[0]
        tokens = torch.full((b, n), BINS) if given is None else torch.where(given < 0, BINS, given)
        free = (tokens == BINS).sum(1)
        for k in range(rounds):
            p, y = self.logits(prefix, tokens[:, None])[:, 0].softmax(-1).max(-1)
            open_ = tokens == BINS
            left = 0 if k + 1 == rounds else math.cos(0.5 * math.pi * (k + 1) / rounds)
            keep = free - (free * left).floor().long()
            score = torch.where(open_, p, 2.0)
            rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            tokens = torch.where(open_ & (rank < keep[:, None] + (n - free)[:, None]), y, tokens)
        return tokens

    def exported(self) -> dict[str, Tensor]:
        """The checkpoint's tensors: the tables are written out."""
        own = {"bins", "mask", "places", "out", "out_bias"}
        kept = {k: v.detach() for k, v in self.state_dict().items() if k not in own}
        with torch.no_grad():
            kept["model.action_tokens.embed.weight"] = torch.cat([self.waves @ self.bins, self.mask[None]])
            kept["model.action_tokens.place.weight"] = self.places.detach()
            kept["model.action_tokens.out.weight"] = self.waves @ self.out
            kept["model.action_tokens.out.bias"] = self.waves @ self.out_bias
        return {k: v.clone().contiguous().float() for k, v in kept.items()}


def scaled(x: Tensor, stats: dict[str, Tensor]) -> Tensor:
    """Actions in [-1, 1] between their least and largest values."""
    low, high = stats["action.min"], stats["action.max"]
    return 2 * (x - low) / (high - low) - 1


class MaskedPolicy:
    """A trained model with tokenizer and statistics: observations in, joint targets out."""

    def __init__(self, saved: dict, tokenizer: Path, rounds: int | None = None) -> None:
        self.model = MaskedVla(saved["config"]).eval()
        self.model.load_state_dict(saved["ema"])
        self.stats = saved["stats"]
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.rounds = rounds or saved["config"].rounds

    @torch.no_grad()
    def __call__(self, images: np.ndarray, state: np.ndarray, texts: list[str]) -> np.ndarray:
        """Action chunks [n, chunk, 6] in radians."""
        c, s = self.model.config, self.stats
        tokens, mask = encode_texts(self.tokenizer, texts, c.max_tokens)
        pixels = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        body = torch.from_numpy(np.ascontiguousarray(state))
        body = (body - s["observation.state.mean"]) / (s["observation.state.std"] + 1e-8)
        prefix = self.model.encode(pixels.contiguous(), tokens, mask, body)
        x = decode_bins(self.model.decode(prefix, self.rounds)).view(len(texts), c.chunk, c.action_dim)
        return ((x + 1) / 2 * (s["action.max"] - s["action.min"]) + s["action.min"]).numpy()
