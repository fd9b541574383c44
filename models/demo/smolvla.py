"""The SmolVLA architecture in plain PyTorch, written for training small models on a CPU.

Parameter names are LeRobot's, so ``state_dict()`` is the content of ``model.safetensors``.
What a training step saves compared with the original code: one vision pass for all cameras,
the prefix is encoded once per sample, any number of flow-matching draws share it, and the last
text layer computes only the keys and values that the action expert reads.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass
class Config:
    """Sizes of the model; the defaults are those of the demo policy."""

    cameras: tuple[str, ...] = ("front", "wrist")
    image_size: int = 96
    patch_size: int = 8
    vision_width: int = 96
    vision_layers: int = 2
    vision_heads: int = 3
    vision_mlp: int = 256
    scale_factor: int = 2
    hidden: int = 128
    mlp: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 384
    expert_multiplier: float = 0.75
    self_attn_every: int = 2
    chunk: int = 16
    state_dim: int = 6
    action_dim: int = 6
    max_state_dim: int = 8
    max_action_dim: int = 8
    max_tokens: int = 32
    num_steps: int = 10
    min_period: float = 0.004
    max_period: float = 4.0

    @property
    def expert_width(self) -> int:
        """Width of the action expert."""
        return int(self.hidden * self.expert_multiplier)

    @property
    def expert_mlp(self) -> int:
        """Width of the expert's MLP, by LeRobot's rule."""
        return 256 * math.ceil(int(4 * int(2 * self.expert_width / 3)) / 256)

    @property
    def patches(self) -> int:
        """Patches of one camera image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        """Prefix tokens of one camera image."""
        return self.patches // self.scale_factor**2

    @classmethod
    def from_folder(cls, folder: Path) -> Config:
        """Reads the sizes from a LeRobot policy folder with a local VLM configuration."""
        policy = json.loads((folder / "config.json").read_text())
        vlm = json.loads((folder / policy["vlm_model_name"] / "config.json").read_text())
        text, vision = vlm["text_config"], vlm["vision_config"]
        prefix = "observation.images."
        return cls(
            cameras=tuple(k[len(prefix) :] for k in policy["input_features"] if k.startswith(prefix)),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_mlp=vision["intermediate_size"],
            scale_factor=vlm["scale_factor"],
            hidden=text["hidden_size"],
            mlp=text["intermediate_size"],
            layers=policy["num_vlm_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            vocab=text["vocab_size"],
            expert_multiplier=policy["expert_width_multiplier"],
            self_attn_every=policy["self_attn_every_n_layers"],
            chunk=policy["chunk_size"],
            state_dim=policy["input_features"]["observation.state"]["shape"][0],
            action_dim=policy["output_features"]["action"]["shape"][0],
            max_state_dim=policy["max_state_dim"],
            max_action_dim=policy["max_action_dim"],
            max_tokens=policy["tokenizer_max_length"],
            num_steps=policy["num_steps"],
            min_period=policy["min_period"],
            max_period=policy["max_period"],
        )


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotates heads ``x`` [B, H, L, hd] by ``positions`` [B or 1, L]; base 10 000, halves layout."""
    half = x.shape[-1] // 2
    freq = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) * (2.0 / x.shape[-1]))
    angle = positions[:, None, :, None].float() * freq
    sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def time_embedding(t: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine and cosine features of the flow time ``t``, in double precision until the end."""
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = min_period * (max_period / min_period) ** fraction
    angle = t.double()[..., None] * (2.0 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


class RmsNorm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class VisionAttention(nn.Module):
    """Bidirectional self-attention of the vision tower."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Mixes the patches of each image."""
        b, n, d = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class VisionMlp(nn.Module):
    """Two linears with tanh GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer of the vision tower."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.self_attn = VisionAttention(c.vision_width, c.vision_heads)
        self.layer_norm2 = nn.LayerNorm(c.vision_width, eps=1e-6)
        self.mlp = VisionMlp(c.vision_width, c.vision_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """Patch projection plus a learned position table."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.patch = c.patch_size
        self.patch_embedding = nn.Conv2d(3, c.vision_width, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(c.patches, c.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [B, 3, H, W] to patch tokens; the convolution is done as one product."""
        b, ch, h, w = x.shape
        p = self.patch
        x = x.view(b, ch, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, ch * p * p)
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(x, weight, self.patch_embedding.bias) + self.position_embedding.weight


class VisionModel(nn.Module):
    """SigLIP-kind vision tower."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.vision_layers))
        self.post_layernorm = nn.LayerNorm(c.vision_width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes images in [-1, 1] to patch features."""
        x = self.embeddings(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Attention(nn.Module):
    """Projections of a grouped-query attention; the callers do the mixing."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, kv_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(kv_width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(kv_width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """[B, L, H * hd] to [B, H, L, hd]."""
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention of heads ``q`` over ``k`` and ``v`` under an additive mask."""
        group = self.heads // self.kv_heads
        k, v = (
            t[:, :, None].expand(-1, -1, group, -1, -1).reshape(t.shape[0], -1, t.shape[2], t.shape[3]) for t in (k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.o_proj(out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1))


class GatedMlp(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the MLP."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    """Llama-kind layer, used by the text model and by the action expert."""

    def __init__(self, c: Config, width: int, inner: int, kv_width: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(width)
        self.self_attn = Attention(width, c.heads, c.kv_heads, c.head_dim, kv_width)
        self.post_attention_layernorm = RmsNorm(width)
        self.mlp = GatedMlp(width, inner)

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of a normed stream."""
        a = self.self_attn
        k = rope(a.split(a.k_proj(x), a.kv_heads), positions)
        return k, a.split(a.v_proj(x), a.kv_heads)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual and MLP."""
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class Prefix:
    """What the expert and the auxiliary losses need of an encoded observation."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor  # [B, P], true on real tokens
    patches: Tensor  # [B, cameras, patches, vision width]
    hidden: Tensor  # [B, P, D]: the input of the last text layer


class SmolVla(nn.Module):
    """The flow-matching policy. ``model`` holds the parameters under LeRobot's names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        w = c.expert_width
        self.model = m = nn.Module()
        m.state_proj = nn.Linear(c.max_state_dim, c.hidden)
        m.action_in_proj = nn.Linear(c.max_action_dim, w)
        m.action_out_proj = nn.Linear(w, c.max_action_dim)
        m.action_time_mlp_in = nn.Linear(2 * w, w)
        m.action_time_mlp_out = nn.Linear(w, w)
        m.vlm_with_expert = ve = nn.Module()
        ve.vlm = nn.Module()
        ve.vlm.model = vlm = nn.Module()
        ve.vlm.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        vlm.vision_model = VisionModel(c)
        vlm.connector = nn.Module()
        vlm.connector.modality_projection = nn.Module()
        vlm.connector.modality_projection.proj = nn.Linear(c.vision_width * c.scale_factor**2, c.hidden, bias=False)
        vlm.text_model = nn.Module()
        vlm.text_model.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        vlm.text_model.layers = nn.ModuleList(TextLayer(c, c.hidden, c.mlp, c.hidden) for _ in range(c.layers))
        vlm.text_model.norm = RmsNorm(c.hidden)
        ve.lm_expert = nn.Module()
        ve.lm_expert.layers = nn.ModuleList(
            TextLayer(c, w, c.expert_mlp, w if i % c.self_attn_every == 0 else c.kv_heads * c.head_dim)
            for i in range(c.layers)
        )
        ve.lm_expert.norm = RmsNorm(w)
        self.vlm = (vlm,)  # short cuts, in tuples so that they are not registered twice
        self.expert = (ve.lm_expert,)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights for training from scratch."""
        c = self.config
        for name, p in self.named_parameters():
            if "layernorm" in name or "layer_norm" in name or name.endswith("norm.weight"):
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                std = p[0].numel() ** -0.5
                if "embed_tokens" in name:
                    std = c.hidden**-0.5
                elif "connector" in name:
                    std /= c.hidden**0.5
                elif any(s in name for s in ("o_proj", "out_proj.weight", "down_proj", "fc2")):
                    std /= (2 * c.layers) ** 0.5
                nn.init.normal_(p, std=std)
        vlm = self.vlm[0]
        nn.init.zeros_(self.model.action_out_proj.weight)
        nn.init.zeros_(self.model.vlm_with_expert.vlm.lm_head.weight)
        table = vlm.vision_model.embeddings.position_embedding.weight
        side = c.image_size // c.patch_size
        quarter = c.vision_width // 4
        freq = 0.25 * math.pi * torch.logspace(0, -1.2, quarter)
        angle = torch.arange(side)[:, None] * freq
        wave = torch.cat([angle.sin(), angle.cos()], -1)
        grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1)
        with torch.no_grad():
            table.zero_()
            table[:, : 4 * quarter] = 0.5 * grid.flatten(0, 1)

    def encode(self, images: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Prefix:
        """Encodes an observation.

        ``images`` [B, cameras, 3, H, W] in [-1, 1]; ``tokens`` and ``token_mask`` [B, T];
        ``state`` [B, state_dim], normalised.
        """
        c = self.config
        vlm = self.vlm[0]
        b, n = images.shape[:2]
        patches = vlm.vision_model(images.flatten(0, 1))
        side, s = c.image_size // c.patch_size, c.scale_factor
        x = patches.view(b * n, side // s, s, side // s, s, -1).transpose(2, 3)
        x = vlm.connector.modality_projection.proj(x.reshape(b, n * c.image_tokens, -1)) * c.hidden**0.5
        words = vlm.text_model.embed_tokens(tokens) * c.hidden**0.5
        body = self.model.state_proj(F.pad(state, (0, c.max_state_dim - state.shape[-1])))
        x = torch.cat([x, words.to(x.dtype), body[:, None].to(x.dtype)], 1)
        length = x.shape[1]
        ones = torch.ones(b, 1, dtype=torch.bool)
        mask = torch.cat([ones.expand(b, n * c.image_tokens), token_mask.bool(), ones], 1)
        positions = mask.long().cumsum(1) - 1
        bias = torch.zeros(b, 1, length, length)
        bias.masked_fill_(~mask[:, None, None, :], -1e9)
        bias[:, :, :-1, -1] = -1e9  # only the state token sees the state
        keys, values = [], []
        hidden = x
        for i, layer in enumerate(vlm.text_model.layers):
            h = layer.input_layernorm(x)
            k, v = layer.keys_values(h, positions)
            keys.append(k)
            values.append(v)
            if i == c.layers - 1:
                hidden = x
                break
            a = layer.self_attn
            q = rope(a.split(a.q_proj(h), a.heads), positions)
            x = layer.finish(x, a.mix(q, k, v, bias))
        return Prefix(keys, values, mask, patches.view(b, n, c.patches, -1), hidden)

    def cross(self, prefix: Prefix) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every expert layer that come from the prefix."""
        c = self.config
        out = []
        for i, layer in enumerate(self.expert[0].layers):
            k, v = prefix.keys[i], prefix.values[i]
            if i % c.self_attn_every != 0:
                a = layer.self_attn
                k = a.split(a.k_proj(k.transpose(1, 2).flatten(2)), a.kv_heads)
                v = a.split(a.v_proj(v.transpose(1, 2).flatten(2)), a.kv_heads)
            out.append((k, v))
        return out

    def velocity(self, prefix: Prefix, kv: list[tuple[Tensor, Tensor]], x: Tensor, t: Tensor) -> Tensor:
        """Velocities at noisy chunks ``x`` [B, R, chunk, A] and times ``t`` [B, R]: R draws a sample."""
        c, m = self.config, self.model
        b, r = x.shape[:2]
        time = time_embedding(t, c.expert_width, c.min_period, c.max_period)
        h = m.action_in_proj(x)
        h = torch.cat([h, time[:, :, None].expand(-1, -1, c.chunk, -1).to(h.dtype)], -1)
        h = m.action_time_mlp_out(F.silu(m.action_time_mlp_in(h))).flatten(1, 2)
        local = torch.arange(c.chunk).repeat(r)[None]
        later = local + prefix.mask.sum(1, keepdim=True)
        seen = torch.zeros(b, 1, 1, prefix.mask.shape[1]).masked_fill_(~prefix.mask[:, None, None], -1e9)
        seen = seen.expand(-1, -1, r * c.chunk, -1)
        own = torch.full((c.chunk, c.chunk), -1e9).triu(1)
        block = torch.full((r, c.chunk, r, c.chunk), -1e9)
        block[torch.arange(r), :, torch.arange(r)] = own
        block = block.view(1, 1, r * c.chunk, r * c.chunk).expand(b, -1, -1, -1)
        both = torch.cat([seen, block], -1)
        for i, layer in enumerate(self.expert[0].layers):
            a = layer.self_attn
            n = layer.input_layernorm(h)
            q = a.split(a.q_proj(n), a.heads)
            k, v = kv[i]
            if i % c.self_attn_every == 0:
                own_k, own_v = layer.keys_values(n, later)
                k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
                h = layer.finish(h, a.mix(rope(q, later), k, v, both))
            else:
                h = layer.finish(h, a.mix(rope(q, local), k, v, seen))
        h = self.expert[0].norm(h)
        return m.action_out_proj(h.float()).view(b, r, c.chunk, -1)

    @torch.no_grad()
    def sample(self, prefix: Prefix, noise: Tensor, steps: int | None = None) -> Tensor:
        """Integrates from ``noise`` [B, chunk, A] to an action chunk (normalised)."""
        steps = steps or self.config.num_steps
        kv = self.cross(prefix)
        x = noise[:, None]
        for k in range(steps):
            t = torch.full((x.shape[0], 1), 1.0 - k / steps)
            x = x - self.velocity(prefix, kv, x, t) / steps
        return x[:, 0]

    def load_folder(self, folder: Path) -> None:
        """Loads ``model.safetensors`` of a policy folder."""
        self.load_state_dict(load_file(folder / "model.safetensors"))


def check_fixture(folder: Path, case: str = "case_basic") -> float:
    """Compares velocities and the chunk with a reference case; returns the largest difference."""
    model = SmolVla(Config.from_folder(folder))
    model.load_folder(folder)
    t = load_file(folder / f"{case}.safetensors")
    images = torch.stack([t[f"vision.{i}.pixels"] for i in range(len(model.config.cameras))], 1)
    with torch.no_grad():
        prefix = model.encode(
            images,
            t["input.observation.language.tokens"],
            t["input.observation.language.attention_mask"],
            t["input.observation.state"],
        )
        kv = model.cross(prefix)
        worst = 0.0
        for k in range(model.config.num_steps):
            x = t["steps.x_in"][k][:, None]
            v = model.velocity(prefix, kv, x, t["steps.time"][k].expand(x.shape[0], 1))
            worst = max(worst, (v[:, 0] - t["steps.v"][k]).abs().max().item())
        two = torch.stack([t["steps.x_in"][0], t["steps.x_in"][5]], 1)
        v = model.velocity(prefix, kv, two, t["steps.time"][[0, 5]].expand(two.shape[0], 2))
        worst = max(worst, (v[:, 1] - t["steps.v"][5]).abs().max().item())
        chunk = model.sample(prefix, t["noise"])
        return max(worst, (chunk - t["actions.padded"]).abs().max().item())


if __name__ == "__main__":
    import sys

    for name in ("case_basic", "case_batch3"):
        print(name, check_fixture(Path(sys.argv[1]), name))
