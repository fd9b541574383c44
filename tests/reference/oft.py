"""Reference of parallel decoding with L1 regression: writes ``tests/fixtures/reference/oft`` and ``oft_film``.

    python tests/reference/oft.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common import TEXTS, Sizes, Weights, embed, observation, observe, statistics, text, train_tokenizer, unnormalize, write_folder

HEAD, BLOCKS = 48, 2
OUT = Path(__file__).parents[1] / "fixtures" / "reference"


def head(w: Weights, s: Sizes, z: torch.Tensor) -> torch.Tensor:
    """MLP with residual blocks, from the states of one action's tokens side by side."""
    name = "model.action_head"
    u = F.relu(w.linear(w.layer_norm(z, f"{name}.norm_in", 1e-5), f"{name}.fc_in", HEAD))
    for i in range(BLOCKS):
        u = u + F.relu(w.linear(w.layer_norm(u, f"{name}.blocks.{i}.norm", 1e-5), f"{name}.blocks.{i}.fc", HEAD))
    return w.linear(w.layer_norm(u, f"{name}.norm_out", 1e-5), f"{name}.fc_out", s.action)


def write(folder: Path, film: bool, seed: int) -> None:
    """One checkpoint with its cases."""
    s, w = Sizes(), Weights(seed)
    tok, stats = train_tokenizer(s), statistics(s, seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, task in enumerate(t.strip() for t in TEXTS[:2]):
        raw = observation(s, seed + 10 + number)
        ids = tok.encode(task + "\n").ids
        words = embed(w, s, ids).mean(0, keepdim=True) if film else None
        record, tokens, state = observe(w, s, raw, stats, ids, words)
        body = w.linear(F.gelu(w.linear(state[None], "model.proprio.fc1", s.width)), "model.proprio.fc2", s.width)
        prefix = torch.cat([tokens, body])
        length = s.chunk * s.action
        x = torch.cat([prefix, torch.zeros(length, s.width)])
        h, _ = text(w, s, x, torch.ones(len(x), len(x), dtype=torch.bool), None, 0)
        states = h[-length:]
        actions = head(w, s, states.reshape(s.chunk, s.action * s.width))
        kept = {f"raw.0.{k}": v for k, v in raw.items()}
        kept |= {
            "ids": torch.tensor(ids),
            "prefix.embeddings": prefix,
            "states": states,
            "actions.normalised": actions,
            "actions.final": unnormalize(actions, stats),
        }
        kept |= record if number == 0 else {}
        save_file({k: v.contiguous() for k, v in kept.items()}, folder / f"case_{number}.safetensors")
        listed.append({"name": f"case_{number}", "task": task})
        print(folder.name, task, actions.flatten()[:4].tolist())
    extra = {"use_film": film, "head_width": HEAD, "head_blocks": BLOCKS}
    write_folder(folder, s, w, stats, tok, "oft", extra)
    (folder / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    write(OUT / "oft", film=False, seed=21)
    write(OUT / "oft_film", film=True, seed=31)
