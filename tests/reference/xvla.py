"""Reference of X-VLA by LeRobot 0.6.1 itself: writes ``tests/fixtures/reference/xvla``.

A small model with random weights, with what the recorded LeRobot checkpoint leaves out: hidden grippers (``ee6d``),
projections that exist once per domain, scaled embeddings, padding on the left, images in their own size.

    python tests/reference/xvla.py        # needs lerobot 0.6.1 with transformers
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.policies.xvla.modeling_xvla import XVLAPolicy
from safetensors.torch import save_file

from common import TEXTS, Sizes, train_tokenizer

OUT = Path(__file__).parents[1] / "fixtures" / "reference" / "xvla"
DOMAIN, STATE, ACTION, LENGTH, PAD = 1, 20, 20, 12, 3
CAMERAS = {"front": (36, 40), "wrist": (36, 40)}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def config(vocabulary: int) -> XVLAConfig:
    """Sizes of the model."""
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "dim_embed": [8, 16],
        "num_heads": [2, 2],
        "num_groups": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
        "projection_dim": 16,
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 6},
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 3},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    }
    text = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "scale_embedding": True,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    inputs = {"observation.state": PolicyFeature(type=FeatureType.STATE, shape=(STATE,))}
    for name, (h, w) in CAMERAS.items():
        inputs[f"observation.images.{name}"] = PolicyFeature(type=FeatureType.VISUAL, shape=(3, h, w))
    return XVLAConfig(
        device="cpu",
        input_features=inputs,
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))},
        florence_config={"vision_config": vision, "text_config": text},
        chunk_size=4,
        n_action_steps=4,
        hidden_size=24,
        depth=1,
        num_heads=3,
        mlp_ratio=1.5,
        num_domains=2,
        len_soft_prompts=2,
        dim_time=7,
        max_len_seq=96,
        use_hetero_proj=True,
        action_mode="ee6d",
        num_denoising_steps=3,
        max_state_dim=22,
        tokenizer_name="vlm",
        tokenizer_max_length=LENGTH,
        tokenizer_padding_side="left",
    )


def randomise(policy: XVLAPolicy, generator: torch.Generator) -> None:
    """Weights for which every part of the model matters."""
    for name, value in policy.named_parameters():
        fan = value[0].numel() if value.ndim > 1 else 1
        if name.endswith("fc.weight"):  # one domain's matrix [in, out] in each row
            out = {"action_decoder": ACTION}.get(name.split(".")[-3], 24)
            fan = fan // out
        scale = 1.0 if "embed" in name or "pos_emb" in name or "soft" in name else 1.3 * fan**-0.5
        if value.ndim == 1 or ".bias." in name:
            scale = 0.2
        value.data = torch.randn(value.shape, generator=generator) * scale
        if "norm" in name and name.endswith("weight"):
            value.data = 1.0 + value.data


def steps() -> tuple[list[dict], list[dict]]:
    """The saved pipelines."""
    norm = {"norm_map": {"VISUAL": "IDENTITY", "STATE": "IDENTITY", "ACTION": "IDENTITY"}}
    tokenizer = {"max_length": LENGTH, "padding": "max_length", "padding_side": "left", "truncation": True}
    before = [
        ("to_batch_processor", {}),
        ("tokenizer_processor", tokenizer),
        ("xvla_image_to_float", {"image_keys": None, "validate_range": True}),
        ("xvla_imagenet_normalize", {"image_keys": None}),
        ("xvla_add_domain_id", {"domain_id": DOMAIN}),
        ("normalizer_processor", norm),
    ]
    after = [("unnormalizer_processor", norm)]
    return tuple([{"registry_name": n, "config": c} for n, c in part] for part in (before, after))


def main() -> None:
    """Writes the checkpoint and its case."""
    generator = torch.Generator().manual_seed(77)
    tokenizer = train_tokenizer(Sizes())
    policy = XVLAPolicy(config(tokenizer.get_vocab_size())).eval()
    randomise(policy, generator)
    OUT.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(OUT)
    (OUT / "README.md").unlink(missing_ok=True)
    (OUT / "tokenizer.json").write_text(tokenizer.to_str())
    for name, part in zip(("policy_preprocessor", "policy_postprocessor"), steps(), strict=True):
        (OUT / f"{name}.json").write_text(json.dumps({"name": name, "steps": part}, indent=1) + "\n")

    task = TEXTS[0].strip()
    ids = tokenizer.encode(task).ids[:LENGTH]
    ids = [PAD] * (LENGTH - len(ids)) + ids
    state = torch.randn(STATE, generator=generator)
    kept = {"raw.0.observation.state": state}
    batch = {"observation.language.tokens": torch.tensor([ids]), "observation.state": state[None]}
    batch["domain_id"] = torch.tensor([DOMAIN])
    for name, (h, w) in CAMERAS.items():
        image = torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8)
        kept[f"raw.0.observation.images.{name}"] = image
        pixels = (image.permute(2, 0, 1) / 255.0 - MEAN[:, None, None]) / STD[:, None, None]
        batch[f"observation.images.{name}"] = pixels[None]

    model, transformer = policy.model, policy.model.transformer
    record = {"times": [], "x": [], "pred": []}
    noise = torch.randn(1, 4, ACTION, generator=generator)

    def watch(_, __, kwargs: dict, out: torch.Tensor) -> None:
        record["times"].append(kwargs["t"][0])
        record["x"].append(kwargs["action_with_noise"].clone())
        record["pred"].append(out.clone())
        record["features"], record["aux"] = kwargs["vlm_features"], kwargs["aux_visual_inputs"]

    hook = transformer.register_forward_hook(watch, with_kwargs=True)
    seen = []
    images = model.vlm.get_image_features
    model.vlm.get_image_features = lambda pixels: seen.append(images(pixels)) or seen[-1]
    randn, torch.randn = torch.randn, lambda *_, **__: noise.clone()
    actions = policy.predict_action_chunk(batch)
    torch.randn = randn
    hook.remove()
    kept |= {
        "input.observation.state": state[None],
        "input.observation.language.tokens": torch.tensor([ids]),
        "noise": noise,
        "vision.tokens": seen[0].pooler_output,
        "vlm.features": record["features"],
        "vlm.aux": record["aux"],
        "steps.time": torch.stack(record["times"]),
        "steps.x_in": torch.stack(record["x"]),
        "steps.pred": torch.stack(record["pred"]),
        "actions.final": actions,
    }
    save_file({k: v.detach().clone() for k, v in kept.items()}, OUT / "case_0.safetensors")
    cases = {"cases": [{"name": "ee6d", "file": "case_0.safetensors", "kind": "chunk", "tasks": [task]}]}
    (OUT / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
