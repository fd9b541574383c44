"""Small seeded vision-language checkpoints and what their observer computes, in plain PyTorch.

Written from the papers and from ``models/src`` documentation only; shares no code with the runtime or with the demo's
training. Weights are rounded to bfloat16 and stored so; everything is computed in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["put the red cube in the left bin\n", "touch the blue cube\n", "open the drawer, slowly\n"]


@dataclass
class Sizes:
    """Sizes of the small model."""

    image: int = 32
    patch: int = 8
    merge: int = 2
    vision: int = 32
    vision_heads: int = 2
    vision_mlp: int = 48
    vision_layers: int = 2
    width: int = 32
    heads: int = 2
    kv_heads: int = 1
    head: int = 16
    mlp: int = 64
    layers: int = 2
    vocab: int = 272
    state: int = 5
    state_padded: int = 8
    action: int = 3
    chunk: int = 4
    cameras: dict[str, tuple[int, int]] = field(default_factory=lambda: {"front": (48, 36), "wrist": (32, 32)})


class Weights:
    """Named random tensors; asking for a name a second time gives the same one."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int, std: float | None = None, mean: float = 0.0) -> torch.Tensor:
        if name not in self.tensors:
            fan = 1
            for n in shape[1:]:
                fan *= n
            scale = std if std is not None else 1.3 * fan**-0.5
            value = torch.randn(*shape, generator=self.generator) * scale + mean
            self.tensors[name] = value.bfloat16()
        return self.tensors[name].float()

    def linear(self, x: torch.Tensor, name: str, out: int, bias: bool = True) -> torch.Tensor:
        """A linear layer, by name."""
        b = self(f"{name}.bias", out, std=0.2) if bias else None
        return F.linear(x, self(f"{name}.weight", out, x.shape[-1]), b)

    def layer_norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        """A layer norm, by name."""
        n = x.shape[-1]
        return F.layer_norm(x, (n,), self(f"{name}.weight", n, std=0.1, mean=1.0), self(f"{name}.bias", n, std=0.1), eps)

    def rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """An RMS norm, by name."""
        gain = self(f"{name}.weight", x.shape[-1], std=0.1, mean=1.0)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


VLM = "model.vlm_with_expert.vlm.model"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of heads [H, L, d] over [K, C, d], query head h using key head h // (H / K)."""
    group = q.shape[0] // k.shape[0]
    out = []
    for h in range(q.shape[0]):
        scores = q[h] @ k[h // group].T / q.shape[-1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        out.append(scores.softmax(-1) @ v[h // group])
    return torch.cat(out, -1)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[L, H * d] to [H, L, d]."""
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def rotate(x: torch.Tensor, start: int) -> torch.Tensor:
    """Rotary positions from ``start`` on, base 10 000, halves layout."""
    half = x.shape[-1] // 2
    place = torch.arange(start, start + x.shape[1], dtype=torch.float32)
    angle = place[:, None] / 10_000.0 ** (torch.arange(half) * 2 / x.shape[-1])
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def pixels(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [H, W, 3] to [3, size, size] in [-1, 1]: aspect kept, padded left and top with zero before the mapping."""
    x = image.permute(2, 0, 1).float()[None] / 255
    height, width = x.shape[2:]
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    if (height, width) != (size, size):
        x = F.interpolate(x, new, mode="bilinear", align_corners=False)
        x = F.pad(x, (size - new[1], 0, size - new[0], 0))
    return x[0] * 2 - 1


def vision(w: Weights, s: Sizes, image: torch.Tensor, words: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the patches, and tokens for the text model. ``words``: mean embedding, scales and shifts layers."""
    name = f"{VLM}.vision_model"
    kernel = w(f"{name}.embeddings.patch_embedding.weight", s.vision, 3, s.patch, s.patch)
    x = F.conv2d(image[None], kernel, w(f"{name}.embeddings.patch_embedding.bias", s.vision, std=0.2), s.patch)
    side = s.image // s.patch
    x = x[0].flatten(1).T
    x = x + w(f"{name}.embeddings.position_embedding.weight", side * side, s.vision, std=0.5)
    for i in range(s.vision_layers):
        layer = f"{name}.encoder.layers.{i}"
        n = w.layer_norm(x, f"{layer}.layer_norm1", 1e-6)
        q, k, v = (heads(w.linear(n, f"{layer}.self_attn.{p}_proj", s.vision), s.vision_heads) for p in "qkv")
        x = x + w.linear(attention(q, k, v), f"{layer}.self_attn.out_proj", s.vision)
        if words is not None:
            gamma = w.linear(words, f"{layer}.film.scale", s.vision)
            beta = w.linear(words, f"{layer}.film.shift", s.vision)
            x = x * (1 + gamma) + beta
        n = w.layer_norm(x, f"{layer}.layer_norm2", 1e-6)
        n = F.gelu(w.linear(n, f"{layer}.mlp.fc1", s.vision_mlp), approximate="tanh")
        x = x + w.linear(n, f"{layer}.mlp.fc2", s.vision)
    x = w.layer_norm(x, f"{name}.post_layernorm", 1e-6)
    grid = x.view(side, side, -1)
    rows = []
    for r in range(side // s.merge):
        for c in range(side // s.merge):
            square = [grid[r * s.merge + i, c * s.merge + j] for i in range(s.merge) for j in range(s.merge)]
            rows.append(torch.cat(square))
    return x, w.linear(torch.stack(rows), f"{VLM}.connector.modality_projection.proj", s.width, bias=False)


def text(
    w: Weights, s: Sizes, x: torch.Tensor, allowed: torch.Tensor, past: list | None, start: int
) -> tuple[torch.Tensor, list]:
    """All text layers and the last norm; ``past``: keys and values before ``x``. Gives the new keys and values too."""
    kept = []
    for i in range(s.layers):
        layer = f"{VLM}.text_model.layers.{i}"
        n = w.rms_norm(x, f"{layer}.input_layernorm")
        q = rotate(heads(w.linear(n, f"{layer}.self_attn.q_proj", s.heads * s.head, False), s.heads), start)
        k = rotate(heads(w.linear(n, f"{layer}.self_attn.k_proj", s.kv_heads * s.head, False), s.kv_heads), start)
        v = heads(w.linear(n, f"{layer}.self_attn.v_proj", s.kv_heads * s.head, False), s.kv_heads)
        kept.append((k, v))
        if past is not None:
            k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
        x = x + w.linear(attention(q, k, v, allowed), f"{layer}.self_attn.o_proj", s.width, False)
        n = w.rms_norm(x, f"{layer}.post_attention_layernorm")
        gate = F.silu(w.linear(n, f"{layer}.mlp.gate_proj", s.mlp, False))
        n = gate * w.linear(n, f"{layer}.mlp.up_proj", s.mlp, False)
        x = x + w.linear(n, f"{layer}.mlp.down_proj", s.width, False)
    return w.rms_norm(x, f"{VLM}.text_model.norm"), kept


def embed(w: Weights, s: Sizes, ids: list[int]) -> torch.Tensor:
    """Rows of the token table."""
    return w(f"{VLM}.text_model.embed_tokens.weight", s.vocab, s.width, std=s.width**-0.5)[ids]


def train_tokenizer(s: Sizes) -> Tokenizer:
    """A byte-level tokenizer with a few merges."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=s.vocab, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(TEXTS, trainer)
    return tok


def statistics(s: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Statistics of state and action."""
    g = torch.Generator().manual_seed(seed)
    low, span = torch.rand(s.action, generator=g) - 1.5, torch.rand(s.action, generator=g) + 1
    return {
        "observation.state.mean": torch.randn(s.state, generator=g),
        "observation.state.std": torch.rand(s.state, generator=g) + 0.5,
        "action.q01": low,
        "action.q99": low + span,
    }


def observation(s: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Raw images and state."""
    g = torch.Generator().manual_seed(seed)
    out = {"observation.state": torch.randn(s.state, generator=g)}
    for name, (width, height) in s.cameras.items():
        coarse = torch.rand(1, 3, 5, 6, generator=g) * 255
        image = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        out[f"observation.images.{name}"] = image[0].permute(1, 2, 0).round().byte().contiguous()
    return out


def write_folder(folder: Path, s: Sizes, w: Weights, stats: dict, tok: Tokenizer, kind: str, extra: dict) -> None:
    """A checkpoint in LeRobot's layout."""
    (folder / "vlm").mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in w.tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    inputs = {"observation.state": {"type": "STATE", "shape": [s.state]}}
    inputs |= {
        f"observation.images.{n}": {"type": "VISUAL", "shape": [3, h, wd]} for n, (wd, h) in s.cameras.items()
    }
    outputs = {"action": {"type": "ACTION", "shape": [s.action]}}
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"}
    config = {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "chunk_size": s.chunk,
        "n_action_steps": s.chunk,
        "normalization_mapping": modes,
        "max_state_dim": s.state_padded,
        "resize_imgs_with_padding": [s.image, s.image],
        "empty_cameras": 0,
        "tokenizer_max_length": 24,
        "vlm_model_name": "vlm",
        "num_vlm_layers": s.layers,
        **extra,
    }
    vlm = {
        "model_type": "smolvlm",
        "scale_factor": s.merge,
        "text_config": {
            "hidden_size": s.width,
            "intermediate_size": s.mlp,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head,
            "rms_norm_eps": 1e-5,
            "vocab_size": s.vocab,
        },
        "vision_config": {
            "hidden_size": s.vision,
            "intermediate_size": s.vision_mlp,
            "num_hidden_layers": s.vision_layers,
            "num_attention_heads": s.vision_heads,
            "image_size": s.image,
            "patch_size": s.patch,
            "layer_norm_eps": 1e-6,
        },
    }
    norm = {"eps": 1e-8, "norm_map": modes}
    pre_file, post_file = "policy_preprocessor_step_3_normalizer_processor.safetensors", (
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    )
    pre = [
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"max_length": 24, "padding_side": "right"}},
        {
            "registry_name": "normalizer_processor",
            "config": {**norm, "features": {**inputs, **outputs}},
            "state_file": pre_file,
        },
    ]
    post = [
        {"registry_name": "unnormalizer_processor", "config": {**norm, "features": outputs}, "state_file": post_file}
    ]
    for name, content in (
        ("config.json", config),
        ("vlm/config.json", vlm),
        ("policy_preprocessor.json", {"name": "policy_preprocessor", "steps": pre}),
        ("policy_postprocessor.json", {"name": "policy_postprocessor", "steps": post}),
        ("sinew.json", {"action_names": ["a", "b", "c"], "action_rate_hz": 10, "trained_prefix": s.chunk - 1}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    for name in (pre_file, post_file):
        save_file(stats, folder / name)
    tok.save(str(folder / "vlm" / "tokenizer.json"), pretty=False)


def unnormalize(x: torch.Tensor, stats: dict[str, torch.Tensor]) -> torch.Tensor:
    """Actions in [-1, 1] to physical units."""
    low, high = stats["action.q01"], stats["action.q99"]
    return (x + 1) / 2 * (high - low) + low


def observe(w: Weights, s: Sizes, raw: dict, stats: dict, ids: list[int], words: torch.Tensor | None = None) -> tuple:
    """Everything up to the prefix without its state token, and the normalised state. Names are the cases'."""
    record, tokens = {}, []
    for i, name in enumerate(s.cameras):
        record[f"vision.{i}.pixels"] = pixels(raw[f"observation.images.{name}"], s.image)
        record[f"vision.{i}.last_hidden"], image = vision(w, s, record[f"vision.{i}.pixels"], words)
        record[f"vision.{i}.tokens"] = image
        tokens.append(image * s.width**0.5)
    tokens.append(embed(w, s, ids) * s.width**0.5)
    state = (raw["observation.state"] - stats["observation.state.mean"]) / (stats["observation.state.std"] + 1e-8)
    return record, torch.cat(tokens), state
