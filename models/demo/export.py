"""Writes a LeRobot policy folder, and trains the small tokenizer that goes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from smolvla import Config, SmolVla

COLOURS, SIDES = ["red", "green", "blue", "yellow"], ["left", "right"]
PICK_PLACE = [
    "put the {c} cube in the {b} bin",
    "place the {c} cube into the {b} bin",
    "pick up the {c} cube and drop it in the {b} bin",
    "move the {c} block to the {b} bin",
    "take the {c} cube and put it in the bin on the {b}",
    "the {c} cube goes in the {b} box",
    "grab the {c} block and place it in the {b} container",
    "please put the {c} one into the {b} bin",
]
TOUCH = [
    "touch the {c} cube",
    "tap the {c} cube",
    "reach for the {c} cube and touch it",
    "touch the {c} block",
    "point at the {c} cube and touch it",
    "tap the top of the {c} block",
    "please touch the {c} one",
    "bring the fingers onto the {c} cube and touch it",
]
FIRST = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LAST = ["<fake_token_around_image>", "<image>", "<global-img>"]
PAD = 2


def train_tokenizer(texts: list[str], path: Path, vocab: int = 512) -> None:
    """Byte-level BPE over the instructions; every text can be tokenized."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(LAST),
        special_tokens=FIRST,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator((t + "\n" for t in texts), trainer)
    tok.add_special_tokens([AddedToken(t, special=True) for t in LAST])
    path.parent.mkdir(parents=True, exist_ok=True)
    tok.save(str(path))
    (path.parent / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "backend": "tokenizers",
                "bos_token": FIRST[0],
                "clean_up_tokenization_spaces": False,
                "eos_token": FIRST[2],
                "extra_special_tokens": LAST,
                "model_max_length": 1000000000000000019884624838656,
                "pad_token": FIRST[2],
                "padding_side": "right",
                "tokenizer_class": "TokenizersBackend",
            },
            indent=2,
        )
        + "\n"
    )


def instructions() -> list[str]:
    """Every instruction of the simulator, touches twice so that both tasks weigh alike."""
    pick = [p.format(c=c, b=b) for p in PICK_PLACE for c in COLOURS for b in SIDES]
    return pick + [p.format(c=c) for p in TOUCH for c in COLOURS for _ in SIDES]


def statistics(values: np.ndarray) -> dict[str, torch.Tensor]:
    """The statistics LeRobot keeps of a feature [N, D]."""
    v = values.astype(np.float64)
    out = {"min": v.min(0), "max": v.max(0), "mean": v.mean(0), "std": v.std(0)}
    for name, q in (("q01", 0.01), ("q10", 0.1), ("q90", 0.9), ("q99", 0.99)):
        out[name] = np.quantile(v, q, axis=0)
    return {k: torch.tensor(x, dtype=torch.float32) for k, x in out.items()}


def vlm_config(c: Config, image_token: int) -> dict:
    """The configuration of the vision-language model."""
    return {
        "image_token_id": image_token,
        "model_type": "smolvlm",
        "pad_token_id": PAD,
        "scale_factor": c.scale_factor,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "hidden_size": c.hidden,
            "initializer_range": 0.02,
            "intermediate_size": c.mlp,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": c.heads,
            "num_hidden_layers": c.layers,
            "num_key_value_heads": c.kv_heads,
            "pad_token_id": PAD,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": 100000, "rope_type": "default"},
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": c.vocab,
        },
        "tie_word_embeddings": False,
        "transformers_version": "5.5.4",
        "use_cache": True,
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": c.vision_width,
            "image_size": c.image_size,
            "initializer_range": 0.02,
            "intermediate_size": c.vision_mlp,
            "layer_norm_eps": 1e-06,
            "model_type": "smolvlm_vision",
            "num_attention_heads": c.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": c.vision_layers,
            "patch_size": c.patch_size,
        },
    }


def policy_config(c: Config) -> dict:
    """``config.json`` as LeRobot writes it."""
    size = [3, c.image_size, c.image_size]
    inputs = {"observation.state": {"type": "STATE", "shape": [c.state_dim]}}
    inputs |= {f"observation.images.{n}": {"type": "VISUAL", "shape": size} for n in c.cameras}
    return {
        "type": "smolvla",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [c.action_dim]}},
        "device": "cpu",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": False,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "pretrained_revision": None,
        "chunk_size": c.chunk,
        "n_action_steps": c.chunk // 2,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "max_state_dim": c.max_state_dim,
        "max_action_dim": c.max_action_dim,
        "resize_imgs_with_padding": [c.image_size, c.image_size],
        "empty_cameras": 0,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": c.max_tokens,
        "num_steps": c.num_steps,
        "use_cache": True,
        "freeze_vision_encoder": False,
        "train_expert_only": False,
        "train_state_proj": True,
        "optimizer_lr": 0.001,
        "optimizer_betas": [0.9, 0.95],
        "optimizer_eps": 1e-08,
        "optimizer_weight_decay": 0.01,
        "optimizer_grad_clip_norm": 1,
        "scheduler_warmup_steps": 200,
        "scheduler_decay_steps": 4000,
        "scheduler_decay_lr": 0.0,
        "vlm_model_name": "vlm",
        "load_vlm_weights": False,
        "add_image_special_tokens": False,
        "attention_mode": "cross_attn",
        "prefix_length": 0,
        "pad_language_to": "longest",
        "num_expert_layers": 0,
        "num_vlm_layers": c.layers,
        "self_attn_every_n_layers": c.self_attn_every,
        "expert_width_multiplier": c.expert_multiplier,
        "min_period": c.min_period,
        "max_period": c.max_period,
        "rtc_config": None,
        "compile_model": False,
        "compile_mode": "max-autotune",
    }


def processors(c: Config) -> tuple[dict, dict]:
    """The saved pre- and post-processing pipelines."""
    policy = policy_config(c)
    norm_map = policy["normalization_mapping"]
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    pre = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "smolvla_new_line_processor", "config": {}},
        {
            "registry_name": "tokenizer_processor",
            "config": {
                "max_length": c.max_tokens,
                "task_key": "task",
                "padding_side": "right",
                "padding": "longest",
                "truncation": True,
                "tokenizer_name": "vlm",
            },
        },
        device,
        {
            "registry_name": "normalizer_processor",
            "config": {
                "eps": 1e-08,
                "features": {**policy["input_features"], **policy["output_features"]},
                "norm_map": norm_map,
            },
            "state_file": "policy_preprocessor_step_5_normalizer_processor.safetensors",
        },
    ]
    post = [
        {
            "registry_name": "unnormalizer_processor",
            "config": {"eps": 1e-08, "features": policy["output_features"], "norm_map": norm_map},
            "state_file": "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
        },
        device,
    ]
    return {"name": "policy_preprocessor", "steps": pre}, {"name": "policy_postprocessor", "steps": post}


def save_policy(
    folder: Path,
    config: Config,
    weights: dict[str, torch.Tensor],
    stats: dict[str, torch.Tensor],
    tokenizer: Path,
    joints: list[str],
    rate_hz: int,
) -> None:
    """Writes the folder beside its place and renames it, so that readers never see half of it."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "vlm").mkdir(parents=True)
    names = set(SmolVla(config).state_dict())
    weights = {k: v.detach().clone().contiguous().float() for k, v in weights.items() if k in names}
    assert set(weights) == names
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    image_token = Tokenizer.from_file(str(tokenizer)).token_to_id("<image>")
    pre, post = processors(config)
    for name, content in (
        ("config.json", policy_config(config)),
        ("policy_preprocessor.json", pre),
        ("policy_postprocessor.json", post),
        ("vlm/config.json", vlm_config(config, image_token)),
        (
            "sinew.json",
            {
                "action_names": joints,
                "action_units": ["rad"] * len(joints),
                "action_rate_hz": rate_hz,
                "noise_scale": 0.5,
            },
        ),
    ):
        (new / name).write_text(json.dumps(content, indent=2) + "\n")
    for step in (pre["steps"][5], post["steps"][0]):
        save_file(stats, new / step["state_file"])
    shutil.copy(tokenizer, new / "vlm" / "tokenizer.json")
    shutil.copy(tokenizer.parent / "tokenizer_config.json", new / "vlm" / "tokenizer_config.json")
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)


if __name__ == "__main__":
    train_tokenizer(instructions(), Path("work/vlm/tokenizer.json"))
