"""Makes tests/fixtures/fast: a small FAST action tokenizer, and what it decodes.

Needs numpy, scipy and tokenizers. The tokenizer is trained as FAST's are: coefficients of the orthonormal
DCT-II, times SCALE, rounded, as code points from their minimum on, in byte-level BPE.

    python fast.py ../fixtures/fast
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.fft import dct, idct
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer

HORIZON, DIM, SCALE, TOKENS = 8, 6, 10, 320
random = np.random.default_rng(7)


def chunk():
    """Smooth actions of order one, and a gripper that opens or closes."""
    t = np.linspace(0, 1, HORIZON)[:, None]
    actions = random.normal(size=(1, DIM)) + random.normal(size=(1, DIM)) * t
    actions = actions + 0.3 * np.sin(6 * t + random.normal(size=(1, DIM)))
    actions[:, -1] = np.where(t[:, 0] > random.random(), 1, -1)
    return actions


def coefficients(actions):
    return np.rint(dct(actions, axis=0, norm="ortho") * SCALE).astype(int).flatten()


train = [coefficients(chunk()) for _ in range(400)]
# Below the smallest coefficient, so that most code points take two bytes, as in the published tokenizer.
minimum = min(c.min() for c in train) - 60
largest = max(c.max() for c in train)


def text(values):
    return "".join(chr(v - minimum) for v in values)


bpe = ByteLevelBPETokenizer()
alphabet = [chr(i) for i in range(int(largest - minimum) + 1)]
trainer = BpeTrainer(vocab_size=TOKENS, min_frequency=2, show_progress=False, special_tokens=[],
                     initial_alphabet=alphabet, max_token_length=10_000)
bpe._tokenizer.train_from_iterator((text(c) for c in train), trainer=trainer)

cases = []
for _ in range(4):
    actions = chunk()
    values = coefficients(actions)
    ids = bpe.encode(text(values)).ids
    back = [ord(c) + int(minimum) for c in bpe.decode(ids)]
    if back != values.tolist():
        continue  # a coefficient outside the alphabet
    decoded = idct(np.array(back).reshape(HORIZON, DIM) / SCALE, axis=0, norm="ortho")
    cases.append({"ids": ids, "coefficients": back, "actions": decoded.flatten().tolist()})
assert len(cases) >= 2

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
bpe.save(str(out / "tokenizer.json"))
settings = {"scale": SCALE, "min_token": int(minimum), "vocab_size": bpe.get_vocab_size(),
            "action_dim": None, "time_horizon": None}
(out / "processor_config.json").write_text(json.dumps(settings, indent=1) + "\n")
(out / "cases.json").write_text(
    json.dumps({"horizon": HORIZON, "dim": DIM, "cases": cases}, indent=1) + "\n")
print(len(cases), "cases,", bpe.get_vocab_size(), "tokens,", [len(c["ids"]) for c in cases], "ids", minimum, largest)
