"""Draws the training curves from ``work/train.csv`` and ``work/eval.csv`` into ``curves.png``."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CURVES = {
    "flow": "flow matching",
    "plan": "chunk from the state token",
    "values": "positions",
    "offset": "offset tip to cube",
    "pixel": "offset in the image token",
    "cube": "named cube among the tokens",
}


def main() -> None:
    """Reads the logs; stages follow each other on one time axis."""
    minutes, done, last, stages = [], 0.0, 0.0, []
    values: dict[str, list[float]] = defaultdict(list)
    with Path("work/train.csv").open(newline="") as f:
        for at, _, _, text in csv.reader(f):
            if float(at) < last:
                done += last
                stages.append(done)
            last = float(at)
            minutes.append(done + last)
            row = json.loads(text)
            for name in CURVES:
                values[name].append(row.get(name, float("nan")))
    figure, axis = plt.subplots(figsize=(7.5, 4), dpi=100)
    for name, label in CURVES.items():
        axis.plot(minutes, values[name], label=label, linewidth=1.2)
    for at in stages:
        axis.axvline(at, color="0.85", zorder=0)
    axis.set_yscale("log")
    axis.set_xlabel("training time (min); grey: a new stage begins")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig("curves.png")


if __name__ == "__main__":
    main()
