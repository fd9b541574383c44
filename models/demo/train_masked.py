"""Trains the masked-diffusion demo policy from the trained flow policy, on the same data.

The encoder starts from the flow policy's checkpoint and goes on learning; the action tokens start anew.
The auxiliary losses of ``train.py`` keep what the state token knows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from masked import MaskedConfig, MaskedVla, scaled
from smolvla import Prefix
from train import REGRESS, WEIGHTS, Batches, Heads, Pool, losses, make_batch, optimizers

NEW = ("bins", "mask", "places", "out", "out_bias")


def masked_loss(model: MaskedVla, prefix: Prefix, batch: dict[str, Tensor], draws: int) -> dict[str, Tensor]:
    """The cross-entropy of masked action tokens."""
    ce, hit = model.loss(prefix, batch["bins"], draws)
    return {"ce": ce, "near": hit}


def main() -> None:
    """Trains for ``--minutes``."""
    p = argparse.ArgumentParser()
    p.add_argument("--work", type=Path, default=Path("work"))
    p.add_argument("--minutes", type=float, default=40)
    p.add_argument("--batch", type=int, default=40)
    p.add_argument("--draws", type=int, default=2)
    p.add_argument("--lr", type=float, default=4e-4)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--start", type=Path, help="checkpoint of the flow policy or of an earlier run")
    p.add_argument("--name", default="masked")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(1)
    config = MaskedConfig()
    meta = json.loads((a.work / "meta.json").read_text())
    index = {n: i for i, n in enumerate(meta["info"])}
    mix = {"dagger3": 2.5, "dagger4": 6, "dagger5": 6, "bc1": 0.03}
    pool = Pool(a.work / "data", a.work / "vlm" / "tokenizer.json", config, mix, index["success"])
    model, heads = MaskedVla(config), Heads(config, len(REGRESS))
    saved = torch.load(a.start or a.work / "final.pt", weights_only=False)
    stats = saved["stats"]
    model.load_state_dict({k: v for k, v in saved["ema"].items() if k in model.state_dict()}, strict=False)
    rows = config.chunk * config.action_dim  # the regression of a longer chunk is cut
    heads.load_state_dict({k: v[:rows] if k.startswith("plan") else v for k, v in saved["heads"].items()})

    def make(rows: np.ndarray) -> dict[str, Tensor]:
        batch = make_batch(rows, pool.tokenizer, config, stats, index)
        batch["chunk"] = batch["chunk"][:, : config.chunk]
        batch["bins"] = scaled(batch["chunk"] * stats["action.std"] + stats["action.mean"], stats)
        return batch

    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    opts = optimizers(model, heads, a.lr, muon=True)
    fresh = {id(v) for k, v in model.named_parameters() if k in NEW}
    adam = opts[0]
    group = adam.param_groups[0]
    new = [v for v in group["params"] if id(v) in fresh]
    group["params"] = [v for v in group["params"] if id(v) not in fresh]
    adam.add_param_group({"params": new, "lr": 5 * a.lr, "weight_decay": 0.0, "peak": 5 * a.lr})
    batches = Batches(pool.rows, make, a.batch)
    weights = {**WEIGHTS, "ce": 1.0}
    print("parameters", sum(x.numel() for x in model.parameters()), "samples", pool.size(), flush=True)
    average: dict[str, list[float]] = defaultdict(list)
    begin = kept = logged = time.time()
    step = 0
    while True:
        now = time.time()
        progress = (now - begin) / (60 * a.minutes)
        if progress >= 1 or now - kept > 120:
            kept = now
            state = {"config": config, "ema": ema, "heads": heads.state_dict(), "stats": stats, "step": step}
            torch.save({**state, "sizes": asdict(config)}, a.work / f"{a.name}.tmp")
            os.rename(a.work / f"{a.name}.tmp", a.work / f"{a.name}.pt")
        if progress >= 1:
            break
        rate = min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = losses(model, heads, batches.queue.get(), a.draws, masked_loss)
        sum(weights[k] * loss[k] for k in weights if k in loss).backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *heads.parameters()], 1.0)
        for o in opts:
            for g in o.param_groups:
                g["lr"] = g["peak"] * rate
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            current = model.state_dict()
            torch._foreach_lerp_(list(ema.values()), [current[k] for k in ema], 1 - decay)
        for k, v in loss.items():
            if v.ndim == 0:
                average[k].append(v.item())
        if now - logged > 20:
            logged = now
            line = {k: round(float(np.mean(v)), 4) for k, v in average.items()}
            average.clear()
            print(f"{(now - begin) / 60:.1f} min step {step} {line}", flush=True)


if __name__ == "__main__":
    main()
