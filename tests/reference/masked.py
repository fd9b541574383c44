"""Reference of masked diffusion over action tokens: writes ``tests/fixtures/reference/masked``.

    python tests/reference/masked.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from common import TEXTS, Sizes, Weights, observation, observe, statistics, text, train_tokenizer, unnormalize, write_folder

BINS = 256
OUT = Path(__file__).parents[1] / "fixtures" / "reference" / "masked"
CASES = [
    {"name": "cosine", "rounds": 5},
    {"name": "linear", "rounds": 4, "schedule": "linear"},
    {"name": "gap", "rounds": 5, "confidence": "gap"},
    {"name": "sure", "rounds": 6, "commit_threshold": 0.15},
    {"name": "remask", "rounds": 7, "remask_threshold": 0.9, "remask_drop": 0.1},
    {"name": "one_round", "rounds": 1},
    {"name": "frozen", "rounds": 4, "frozen": [[-0.9, -0.1, 0.3], [-0.7, 0.4, 0.2]]},
    {"name": "limits", "rounds": 4, "lower": [-1.1, -0.5, -0.2], "upper": [-0.6, 0.5, 0.1]},
    {"name": "temperature", "rounds": 5, "temperature": 0.8, "seed": 5},
]


class SplitMix64:
    """The generator of the runtime's noise (Steele, Lea, Flood 2014)."""

    def __init__(self, seed: int):
        self.state = seed

    def gumbel(self) -> float:
        """-ln(-ln(u)) of a uniform u."""
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        z = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        u = (((z ^ (z >> 31)) >> 11) + 0.5) / (1 << 53)
        return -math.log(-math.log(u))


def encode(x: float) -> int:
    """Bin of a normalised value: the number of edges of ``linspace(-1, 1, 256)`` at or below it, less one."""
    edges = torch.linspace(-1, 1, BINS, dtype=torch.float64)
    return min(max(int((edges <= min(max(x, -1.0), 1.0)).sum()) - 1, 0), BINS - 2)


def centre(k: int) -> float:
    """Middle of a bin; the last class has the last bin's."""
    edges = torch.linspace(-1, 1, BINS, dtype=torch.float64)
    k = min(k, BINS - 2)
    return float(edges[k] + edges[k + 1]) / 2


def logits(w: Weights, s: Sizes, tokens: list[int], past: list, start: int) -> torch.Tensor:
    """Logits of every action token; all see the prefix and each other."""
    table = w("model.action_tokens.embed.weight", BINS + 1, s.width, std=1.0)
    x = table[tokens] + w("model.action_tokens.place.weight", len(tokens), s.width, std=1.0)
    allowed = torch.ones(len(tokens), start + len(tokens), dtype=torch.bool)
    h, _ = text(w, s, x, allowed, past, start)
    out = w("model.action_tokens.out.weight", BINS, s.width, std=0.5)  # some tokens are surer than others
    return h @ out.T + w("model.action_tokens.out.bias", BINS, std=0.2)


def decode(case: dict, length: int, frozen: dict[int, int], allowed: list[list[bool]], model) -> tuple[list, list, list]:
    """The published loop, token by token. Gives tokens and logits of every round, and the result.

    A temperature above 0 adds Gumbel noise, which falls to 0 in the last round: to the logits of every unknown token,
    bin by bin, then to the logarithm of its confidence, which the order goes by.
    """
    random = SplitMix64(case.get("seed", 1))
    rounds = case["rounds"]
    tokens = [frozen.get(i, BINS) for i in range(length)]
    free = length - len(frozen)
    decided: dict[int, tuple[int, float]] = {}
    seen, outputs = [], []
    for k in range(rounds):
        if BINS not in tokens:
            break
        out = model(tokens)
        seen.append(list(tokens))
        outputs.append(out)
        r = (k + 1) / rounds
        noise = 0 if k + 1 == rounds else case.get("temperature", 0) * (1 - r)
        choice = {}
        for i in range(length):
            p = out[i].double().masked_fill(~torch.tensor(allowed[i]), float("-inf")).softmax(-1)
            order = p.sort(descending=True)
            best, second = float(order.values[0]), float(order.values[1])
            assert tokens[i] != BINS or best - second > 1e-4 * best, "a tie: change the seed"
            chosen, jitter = int(order.indices[0]), 0
            if tokens[i] == BINS and noise > 0:
                noisy = [float(out[i][b]) + noise * random.gumbel() if allowed[i][b] else -math.inf for b in range(BINS)]
                jitter = noise * random.gumbel()
                chosen = max(range(BINS), key=noisy.__getitem__)
                assert all(noisy[chosen] - v > 1e-4 for b, v in enumerate(noisy) if b != chosen), "a tie: change the seed"
            probability = float(p[chosen])
            score = best - second if case.get("confidence") == "gap" else probability
            choice[i] = (chosen, probability, score, p, math.log(score) + jitter, best)
        share = 1 - r if case.get("schedule") == "linear" else math.cos(math.pi / 2 * r)
        stay = 0 if k + 1 == rounds else min(max(math.floor(free * share), 1), max(free - 1, 1))
        unknown = sorted((i for i in range(length) if tokens[i] == BINS), key=lambda i: -choice[i][4])
        scores = [choice[i][4] for i in unknown]
        assert all(a - b > 1e-4 for a, b in zip(scores, scores[1:])), "equally sure: change the seed"
        for rank, i in enumerate(unknown):
            if rank < len(unknown) - stay or choice[i][2] >= case.get("commit_threshold", 2):
                tokens[i] = choice[i][0]
                decided[i] = (k, choice[i][1])
        if k + 1 < rounds:
            for i, (when, before) in list(decided.items()):
                largest, now = choice[i][5], float(choice[i][3][tokens[i]])
                low = largest < case.get("remask_threshold", 0) * k / rounds
                fell = "remask_drop" in case and before - now > case["remask_drop"]
                if when < k and (low or fell):
                    tokens[i] = BINS
                    del decided[i]
    return seen, outputs, tokens


def main() -> None:
    """Writes the checkpoint and its cases."""
    s, w = Sizes(), Weights(11)
    tok, stats = train_tokenizer(s), statistics(s, 12)
    listed, remasked = [], 0
    for number, case in enumerate(CASES):
        task = TEXTS[number % len(TEXTS)].strip()
        raw = observation(s, 100 + number)
        ids = tok.encode(task + "\n").ids
        record, tokens, state = observe(w, s, raw, stats, ids)
        padded = torch.zeros(1, s.state_padded)
        padded[0, : s.state] = state
        prefix = torch.cat([tokens, w.linear(padded, "model.state_proj", s.width)])
        count = len(prefix)
        sees = torch.ones(count, count, dtype=torch.bool)
        sees[:-1, -1] = False  # only the state token sees the state
        _, past = text(w, s, prefix, sees, None, 0)
        length = s.chunk * s.action
        frozen, allowed = {}, [[True] * BINS] * length
        planned = torch.tensor(case.get("frozen", []), dtype=torch.float32).view(-1, s.action)
        low, high = stats["action.q01"], stats["action.q99"]
        normalised = 2 * (planned - low) / (high - low) - 1
        for i, value in enumerate(normalised.flatten().tolist()):
            frozen[i] = encode(value)
        if "lower" in case:
            values = [[float(unnormalize(torch.tensor(centre(k)), stats)[d]) for k in range(BINS)] for d in range(s.action)]
            inside = [[case["lower"][d] <= v <= case["upper"][d] for v in values[d]] for d in range(s.action)]
            allowed = [inside[i % s.action] for i in range(length)]
        seen, outputs, result = decode(case, length, frozen, allowed, lambda t: logits(w, s, t, past, count))
        early = "commit_threshold" in case
        assert (len(seen) < case["rounds"]) == early, "only sure tokens end it early"
        remasked += sum(a != BINS and b == BINS for x, y in zip(seen, seen[1:]) for a, b in zip(x, y))
        actions = unnormalize(torch.tensor([centre(k) for k in result], dtype=torch.float64).view(s.chunk, s.action), stats)
        actions[: len(planned)] = planned.double()
        kept = {f"raw.0.{k}": v for k, v in raw.items()}
        kept |= {
            "ids": torch.tensor(ids),
            "rounds.tokens": torch.tensor(seen),
            "tokens": torch.tensor(result),
            "actions.final": actions.float(),
        }
        if case["name"] in ("cosine", "remask", "frozen"):
            kept["rounds.logits"] = torch.stack(outputs)
        if number == 0:
            kept |= record | {"prefix.embeddings": prefix}
            kept |= {"prefix.keys": torch.stack([k for k, _ in past]), "prefix.values": torch.stack([v for _, v in past])}
        kept = {k: v.contiguous() for k, v in kept.items()}
        OUT.mkdir(parents=True, exist_ok=True)
        save_file(kept, OUT / f"{case['name']}.safetensors")
        listed.append({**case, "task": task})
        sure = [round(float(o.softmax(-1).max()), 2) for o in outputs]
        print(case["name"], sure, len(seen), "rounds", result)
    assert remasked > 0, "no case takes a token back"
    head = {"num_bins": BINS, "num_steps": 5, "mask_schedule": "cosine", "confidence": "max", "temperature": 0.0}
    write_folder(OUT, s, w, stats, tok, "masked_diffusion", head)
    (OUT / "cases.json").write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
