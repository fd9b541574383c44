"""Runs expert and policy on simulated desks: demonstrations, DAgger corrections, evaluation."""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gym_client import PICK, TOUCH, Gym
from smolvla import Config, SmolVla

SHARD = 512
COLOURS = ["red", "green", "blue", "yellow"]
CHUNK, PATCH, CLASSES, REPLAN = 16, 8, 8, 8
EVAL_SEEDS = 1_000_000


def sample_dtype(meta: dict) -> np.dtype:
    """One training sample."""
    cameras, h, w = len(meta["cameras"]), meta["height"], meta["width"]
    return np.dtype(
        [
            ("images", "u1", (cameras, h, w, 3)),
            ("state", "<f4", 6),
            ("text", "S96"),
            ("chunk", "<f4", (CHUNK, 6)),
            ("patches", "u1", (cameras, h // PATCH, w // PATCH, CLASSES)),
            ("info", "<f4", len(meta["info"])),
        ]
    )


def count_classes(labels: np.ndarray) -> np.ndarray:
    """Pixels of each class in each patch: [C, H, W] to [C, H/8, W/8, classes]."""
    c, h, w = labels.shape
    tiles = labels.reshape(c, h // PATCH, PATCH, w // PATCH, PATCH)
    return np.stack([(tiles == k).sum((2, 4)) for k in range(CLASSES)], -1).astype(np.uint8)


def wrong(info: np.ndarray, column: dict[str, int]) -> bool:
    """Whether another cube was handled, or the named one came into the wrong bin."""
    return bool(info[column["wrong_object"]] > 0 or info[column["wrong_bin"]] > 0)


class Policy:
    """A model with its tokenizer and statistics: observations in, joint targets out."""

    def __init__(self, config: Config, weights: dict, stats: dict, tokenizer: Path, seed: int = 0) -> None:
        self.model = SmolVla(config).eval()
        self.model.load_state_dict(weights)
        self.stats = stats
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = 1.0  # scale of the starting sample

    @classmethod
    def load(cls, path: Path, tokenizer: Path, seed: int = 0) -> Policy:
        """Reads a training checkpoint (averaged weights)."""
        saved = torch.load(path, weights_only=False)
        return cls(saved["config"], saved["ema"], saved["stats"], tokenizer, seed)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, state: np.ndarray, texts: list[str]) -> np.ndarray:
        """Action chunks [n, 16, 6] in radians."""
        c, s = self.model.config, self.stats
        tokens, mask = encode_texts(self.tokenizer, texts, c.max_tokens)
        pixels = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0
        body = torch.from_numpy(np.ascontiguousarray(state))
        body = (body - s["observation.state.mean"]) / (s["observation.state.std"] + 1e-8)
        prefix = self.model.encode(pixels.contiguous(), tokens, mask, body)
        noise = torch.randn(len(texts), c.chunk, c.max_action_dim, generator=self.generator)
        chunk = self.model.sample(prefix, self.noise * noise)[..., : c.action_dim]
        return (chunk * s["action.std"] + s["action.mean"]).numpy()


def encode_texts(tok: Tokenizer, texts: list[str], limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded on the right to the longest text."""
    ids = [tok.encode(t.rstrip("\n") + "\n").ids[:limit] for t in texts]
    longest = max(map(len, ids))
    tokens = torch.full((len(ids), longest), 2)
    mask = torch.zeros(len(ids), longest, dtype=torch.bool)
    for i, t in enumerate(ids):
        tokens[i, : len(t)] = torch.tensor(t)
        mask[i, : len(t)] = True
    return tokens, mask


class Episode:
    """What is remembered of a running episode until its samples can be cut out."""

    def __init__(self, text: str, rng: np.random.Generator) -> None:
        self.text = text
        self.advice: list[np.ndarray] = []
        self.clean: list[bool] = []
        self.frames: dict[int, np.ndarray] = {}
        self.driver, self.left = "expert", int(rng.integers(1, 25))
        self.sigma = float(rng.choice([0.0, 0.004, 0.01, 0.02]))
        self.noise = np.zeros(6, np.float32)
        self.offset = np.zeros(6, np.float32)
        self.plan: np.ndarray | None = None
        self.cursor = 0
        self.since = 99
        self.after = 0


class Collector:
    """Records demonstrations with noise, or the expert's corrections of a policy."""

    def __init__(self, gym: Gym, out: Path, name: str, seed: int, touch: float = 0.18, limit: int = 260) -> None:
        self.gym, self.out, self.name, self.touch, self.limit = gym, out, name, touch, limit
        self.rng = np.random.default_rng(seed)
        self.dtype = sample_dtype(gym.meta)
        self.ready: list[np.ndarray] = []
        self.seed = seed * 100_000 % EVAL_SEEDS
        self.count = {"episodes": 0, "success": 0, "wrong": 0, "steps": 0, "samples": 0}
        self.episodes = [self.start(e) for e in range(gym.envs)]
        self.tick = 0
        self.shards = 0

    def start(self, env: int) -> Episode:
        """Begins a new episode on one desk."""
        self.seed += 1
        kind = TOUCH if self.rng.random() < self.touch else PICK
        return Episode(self.gym.reset(env, self.seed, kind), self.rng)

    def choose(self, e: Episode, policy: Policy | None) -> None:
        """Decides who drives next."""
        if e.left > 0:
            return
        rng = self.rng
        if e.driver == "expert":
            if policy is not None:
                if self.tick % REPLAN:
                    return
                e.driver, e.left, e.plan = "policy", REPLAN * int(rng.integers(1, 6)), None
            else:
                e.driver, e.left = "burst", int(rng.integers(2, 6))
                e.offset = rng.normal(0, rng.choice([0.015, 0.04]), 6).astype(np.float32)
        else:
            e.driver = "expert"
            e.left = CHUNK + int(rng.integers(2, 10)) if policy is not None else int(rng.integers(20, 60))
            e.since = 0

    def step(self, policy: Policy | None) -> None:
        """One control step of all desks."""
        gym, rng = self.gym, self.rng
        obs, labels = gym.observe(), None
        col = gym.column
        for e in self.episodes:
            self.choose(e, policy)
        if policy is not None and self.tick % REPLAN == 0:
            due = [i for i, e in enumerate(self.episodes) if e.driver == "policy"]
            if due:
                chunks = policy(obs["images"][due], obs["state"][due], [self.episodes[i].text for i in due])
                for i, chunk in zip(due, chunks, strict=True):
                    e = self.episodes[i]
                    late = int(rng.integers(0, 3)) if e.plan is not None else 0
                    old = chunk[:late] if e.plan is None else e.plan[e.cursor : e.cursor + late]
                    e.plan, e.cursor = np.concatenate([old, chunk[late:]]), 0
        targets = np.empty((gym.envs, 6), np.float32)
        for i, e in enumerate(self.episodes):
            advice = obs["advice"][i].copy()
            t = len(e.advice)
            expert = e.driver == "expert"
            e.advice.append(advice)
            e.clean.append(expert)
            e.since += 1
            if policy is not None:
                wanted = expert and e.since <= 10 and e.since % 2 == 1
            else:
                wanted = expert and (e.since == 1 or rng.random() < 0.3)
            if wanted:
                if labels is None:
                    labels = gym.labels()
                rec = np.zeros((), self.dtype)
                rec["images"], rec["state"], rec["info"] = obs["images"][i], obs["state"][i], obs["info"][i]
                rec["text"] = e.text.encode()
                rec["patches"] = count_classes(labels[i])
                e.frames[t] = rec
            e.noise = 0.8 * e.noise + rng.normal(0, 0.6 * e.sigma, 6).astype(np.float32)
            if expert:
                targets[i] = advice + e.noise
            elif e.driver == "burst":
                targets[i] = advice + e.offset
            else:
                assert e.plan is not None
                targets[i] = e.plan[min(e.cursor, len(e.plan) - 1)]
                e.cursor += 1
            e.left -= 1
        gym.step(targets)
        self.tick += 1
        for i, e in enumerate(self.episodes):
            info = obs["info"][i]
            self.count["steps"] += 1
            over = info[col["done"]] > 0
            e.after += int(over)
            if e.after > 14 or len(e.advice) >= self.limit:
                self.finish(e, info[col["success"]] > 0, wrong(info, col))
                self.episodes[i] = self.start(i)

    def finish(self, e: Episode, success: bool, wrong: bool) -> None:
        """Cuts the samples out of an ended episode."""
        self.count["episodes"] += 1
        self.count["success"] += int(success)
        self.count["wrong"] += int(wrong)
        advice, last = np.stack(e.advice), len(e.advice)
        for t, rec in e.frames.items():
            if not all(e.clean[t : t + CHUNK]) or (t + CHUNK > last and not success):
                continue
            rec["chunk"] = advice[np.minimum(np.arange(t, t + CHUNK), last - 1)]
            self.ready.append(rec)
        self.count["samples"] = self.shards * SHARD + len(self.ready)
        while len(self.ready) >= SHARD:
            path = self.out / f"{self.name}_{self.shards:04d}.npy"
            np.save(path.with_suffix(".tmp.npy"), np.stack(self.ready[:SHARD]))
            os.rename(path.with_suffix(".tmp.npy"), path)
            self.ready = self.ready[SHARD:]
            self.shards += 1


@dataclass
class Trial:
    """One closed-loop episode; -1 leaves the colour or the bin to the seed."""

    seed: int
    kind: int = PICK
    colour: int = -1
    bin: int = -1
    text: str = ""
    steps: int = 0
    success: bool = False
    wrong: bool = False


def evaluate(gym: Gym, policy: Policy | None, trials: list[Trial], limit: int = 200, delay: int = 0) -> list[Trial]:
    """Runs the trials closed-loop and fills in their results; no policy: the expert drives."""
    queue = list(trials)
    running: dict[int, Trial] = {}
    plans: dict[int, np.ndarray] = {}
    col = gym.column
    targets = np.zeros((gym.envs, 6), np.float32)
    tick = 0
    while queue or running:
        if tick % REPLAN == 0:
            for env in range(gym.envs):
                if env not in running and queue:
                    t = running[env] = queue.pop(0)
                    t.text = gym.reset(env, t.seed, t.kind, t.colour, t.bin)
                    plans.pop(env, None)
        obs = gym.observe()
        if policy is not None and tick % REPLAN == 0:
            due = list(running)
            chunks = policy(obs["images"][due], obs["state"][due], [running[i].text for i in due])
            for i, chunk in zip(due, chunks, strict=True):
                if i in plans:  # the old chunk goes on until the new one is computed
                    chunk = np.concatenate([plans[i][REPLAN : REPLAN + delay], chunk[delay:]])
                plans[i] = chunk
        active = np.zeros(gym.envs, np.uint8)
        for i, t in list(running.items()):
            info = obs["info"][i]
            if info[col["done"]] > 0 or t.steps >= limit:
                t.success, t.wrong = bool(info[col["success"]] > 0), wrong(info, col)
                del running[i]
                continue
            targets[i] = obs["advice"][i] if policy is None else plans[i][tick % REPLAN]
            active[i] = 1
            t.steps += 1
        gym.step(targets, active)
        tick += 1
    return trials


def present(gym: Gym, seeds: list[int]) -> list[list[int]]:
    """Colours of the cubes that lie in the scenes of ``seeds``."""
    out = []
    for start in range(0, len(seeds), gym.envs):
        part = seeds[start : start + gym.envs]
        for env, seed in enumerate(part):
            gym.reset(env, seed)
        info = gym.observe()["info"]
        for env in range(len(part)):
            out.append([c for c, n in enumerate(COLOURS) if info[env][gym.column[f"front_{n}_half"]] > 0])
    return out


def every_instruction(gym: Gym, seeds: list[int]) -> list[Trial]:
    """Each scene with all six pick-and-place instructions that it allows."""
    colours = present(gym, seeds)
    return [Trial(s, PICK, c, b) for s, cs in zip(seeds, colours, strict=True) for c in cs for b in range(2)]


def table(trials: list[Trial]) -> list[list]:
    """Rows of task, episodes, successes, wrong ones."""
    groups: dict[str, list[Trial]] = {}
    for t in trials:
        words = t.text.lower().split()
        colour = next(c for c in COLOURS if c in words)
        side = next((s for s in ("left", "right") if s in words), "")
        groups.setdefault(f"{colour} {side}" if side else f"touch {colour}", []).append(t)
    return [[k, len(v), sum(t.success for t in v), sum(t.wrong for t in v)] for k, v in sorted(groups.items())]


def summary(trials: list[Trial]) -> str:
    """One line over both kinds of task."""
    parts = []
    for kind, name in ((PICK, "pick"), (TOUCH, "touch")):
        r = [t for t in trials if t.kind == kind]
        if r:
            ok, bad = 100 * np.mean([t.success for t in r]), 100 * np.mean([t.wrong for t in r])
            steps = np.mean([t.steps for t in r if t.success] or [0])
            parts.append(f"{name} {ok:.1f}% wrong {bad:.1f}% of {len(r)}, {steps:.0f} steps")
    return "; ".join(parts)


def main() -> None:
    """Collects (``bc``), collects corrections (``dagger``) or evaluates (``eval``)."""
    p = argparse.ArgumentParser()
    p.add_argument("mode", choices=["bc", "dagger", "eval", "expert", "swap"])
    p.add_argument("--gym", required=True, help="command of the sim_gym server")
    p.add_argument("--envs", type=int, default=16)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--samples", type=int, default=10**9)
    p.add_argument("--seconds", type=float, default=1e9)
    p.add_argument("--work", type=Path, default=Path("work"))
    p.add_argument("--episodes", type=int, default=60)
    p.add_argument("--delay", type=int, default=1)
    p.add_argument("--eval-every", type=float, default=300.0)
    p.add_argument("--name", default=None)
    p.add_argument("--checkpoint", type=Path)
    p.add_argument("--touch", type=float, default=0.18, help="share of touch episodes in what is collected")
    p.add_argument("--noise", type=float, default=1.0)
    a = p.parse_args()
    torch.set_num_threads(1)
    data = a.work / "data"
    data.mkdir(parents=True, exist_ok=True)
    gym = Gym(a.gym.split(), a.envs)
    (a.work / "meta.json").write_text(json.dumps(gym.meta))
    tokenizer, saved = a.work / "vlm" / "tokenizer.json", a.work / "ema.pt"
    kinds = [PICK if i % 4 else TOUCH for i in range(a.episodes)]

    def trials(first: int) -> list[Trial]:
        return [Trial(first + i, k) for i, k in enumerate(kinds)]

    if a.mode in ("eval", "expert", "swap"):
        policy = None if a.mode == "expert" else Policy.load(a.checkpoint or saved, tokenizer)
        if policy is not None:
            policy.noise = a.noise
        first = EVAL_SEEDS + a.seed * 1000
        todo = (
            every_instruction(gym, list(range(first, first + a.episodes // 6))) if a.mode == "swap" else trials(first)
        )
        evaluate(gym, policy, todo, delay=a.delay)
        print(a.mode, summary(todo))
        for row in table(todo):
            print(*row)
        for t in todo:
            if not t.success:
                print(t)
        return
    begin = time.time()
    evaluated = begin
    collector = Collector(gym, data, a.name or f"{a.mode}{a.seed}", a.seed, a.touch)
    policy, loaded = None, 0.0
    log = a.work / f"{a.mode}{a.seed}.log"
    while collector.count["samples"] < a.samples and time.time() - begin < a.seconds:
        if a.mode == "dagger" and saved.exists() and saved.stat().st_mtime != loaded and collector.tick % 64 == 0:
            loaded = saved.stat().st_mtime
            policy = Policy.load(saved, tokenizer, int(loaded))
        if a.mode == "dagger" and policy is None:
            time.sleep(1)
            continue
        collector.step(policy)
        if collector.tick % 50 == 0:
            with log.open("a") as f:
                f.write(f"{time.time() - begin:.0f} s {collector.count}\n")
        if a.mode == "dagger" and time.time() - evaluated > a.eval_every:
            results = evaluate(gym, policy, trials(EVAL_SEEDS + int(evaluated) % 500 * 1000), delay=1)
            evaluated = time.time()
            with (a.work / "eval.csv").open("a", newline="") as f:
                csv.writer(f).writerow([time.strftime("%H:%M:%S"), summary(results)])
            for i in range(gym.envs):
                collector.episodes[i] = collector.start(i)


if __name__ == "__main__":
    main()
