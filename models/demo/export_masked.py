"""Writes the masked policy's folder in LeRobot's layout, and evaluates a checkpoint in the simulator.

    python export_masked.py export --out work/masked_policy
    python export_masked.py eval --gym ../../target/release/examples/sim_gym
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from export import policy_config, processors, vlm_config
from gym_client import PICK, TOUCH, Gym
from masked import BINS, MaskedConfig, MaskedPolicy, MaskedVla
from rollout import EVAL_SEEDS, Trial, evaluate, every_instruction, summary, table

# Passes per joint; the jaws are thrown open and shut.
SMOOTHING = [3, 3, 3, 3, 3, 0]
EXPERT = ("attention_mode", "num_expert_layers", "self_attn_every", "expert_width", "min_period", "max_period")


def masked_config(c: MaskedConfig) -> dict:
    """``config.json``: SmolVLA's observation, the head's own keys."""
    config = {k: v for k, v in policy_config(c).items() if not k.startswith((*EXPERT, "optimizer", "scheduler"))}
    config["normalization_mapping"] = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"}
    own = {"type": "masked_diffusion", "num_steps": c.rounds, "num_bins": BINS, "n_action_steps": 8}
    return {**config, **own, "mask_schedule": "cosine", "confidence": "max", "temperature": 0.0, "smoothing": SMOOTHING}


def save(folder: Path, saved: dict, tokenizer: Path, meta: dict) -> None:
    """The policy folder of a training checkpoint (averaged weights)."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "vlm").mkdir(parents=True)
    c = saved["config"]
    model = MaskedVla(c)
    model.load_state_dict(saved["ema"])
    save_file(model.exported(), folder / "model.safetensors", metadata={"format": "pt"})
    config = masked_config(c)
    pre, post = processors(c)
    for step in (*pre["steps"], *post["steps"]):
        if "norm_map" in step["config"]:
            step["config"]["norm_map"] = config["normalization_mapping"]
    image = Tokenizer.from_file(str(tokenizer)).token_to_id("<image>")
    info = {
        "action_names": meta["joints"],
        "action_units": ["rad"] * len(meta["joints"]),
        "action_rate_hz": meta["action_rate_hz"],
        "trained_prefix": c.chunk // 2,
    }
    for name, content in (
        ("config.json", config),
        ("policy_preprocessor.json", pre),
        ("policy_postprocessor.json", post),
        ("vlm/config.json", vlm_config(c, image)),
        ("sinew.json", info),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    stats = {k: v for k, v in saved["stats"].items() if not k.startswith("info")}
    for step in (pre["steps"][5], post["steps"][0]):
        save_file(stats, folder / step["state_file"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer.parent / name, folder / "vlm" / name)


def main() -> None:
    """Exports, or evaluates in closed loop."""
    p = argparse.ArgumentParser()
    p.add_argument("mode", choices=["export", "eval", "swap"])
    p.add_argument("--work", type=Path, default=Path("work"))
    p.add_argument("--checkpoint", type=Path, default=Path("work/masked.pt"))
    p.add_argument("--out", type=Path, default=Path("work/masked_policy"))
    p.add_argument("--gym", default="")
    p.add_argument("--envs", type=int, default=16)
    p.add_argument("--episodes", type=int, default=96)
    p.add_argument("--seed", type=int, default=9)
    p.add_argument("--rounds", type=int, default=None)
    a = p.parse_args()
    torch.set_num_threads(1)
    saved = torch.load(a.checkpoint, weights_only=False)
    tokenizer = a.work / "vlm" / "tokenizer.json"
    if a.mode == "export":
        save(a.out, saved, tokenizer, json.loads((a.work / "meta.json").read_text()))
        return
    gym = Gym(a.gym.split(), a.envs)
    policy = MaskedPolicy(saved, tokenizer, a.rounds)
    first = EVAL_SEEDS + a.seed * 1000
    if a.mode == "swap":
        trials = every_instruction(gym, list(range(first, first + a.episodes // 6)))
    else:
        trials = [Trial(first + i, PICK if i % 4 else TOUCH) for i in range(a.episodes)]
    evaluate(gym, policy, trials, delay=1)
    print(a.mode, "rounds", policy.rounds, summary(trials))
    for row in table(trials):
        print(*row)
    for trial in trials:
        if not trial.success:
            print(trial)


if __name__ == "__main__":
    main()
