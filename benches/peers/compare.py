#!/usr/bin/env python3
"""Times policies and their products in other engines and in Sinew, in turn, and prints ratios. See README.md.

    compare.py --sinew target/release/sinew [--case act] [--peer onnx] [--rounds 3] [--threads 2] [--json out.json]

Weights are random, sizes those of the published policies; nothing is downloaded. All sides take turns (A B C A B C), a
few chunks each, so that what disturbs the machine disturbs all of them.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

# Products of SmolVLA and the wide head, by the names that `sinew bench kernels` has for them.
PRODUCTS = ["smolvla vision fc1", "smolvla vision out", "smolvla prefix up", "smolvla expert up", "wide head up"]


def timed(run, count):
    """Shortest and median time (ms) of `count` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        with torch.inference_mode():
            run()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times), statistics.median(times)


def peer(name, run):
    """A side of one form, warmed up."""
    timed(run, 1)
    return lambda count: {name: timed(run, count)}


class Sinew:
    def __init__(self, path, threads):
        self.path, self.threads, self.machine = path, threads, None

    def bench(self, *arguments):
        command = [self.path, "bench", *map(str, arguments), "--json", "--threads", str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
        answer = json.loads(done.stdout)
        self.machine = answer["machine"]
        return answer["found"]

    def policy(self, folder, case, compute):
        def side(count):
            found = self.bench("policy", folder, "--iterations", count, "--compute", compute, *case.arguments)
            spread = found["stages_ms"][case.stage] if case.stage else found["chunk_ms"]
            return {f"Sinew {compute}": (spread["min"], spread["p50"])}
        return side

    def products(self, name):
        def side(count):
            forms = {}
            for row in self.bench("kernels", name, "--rounds", count)["rows"]:
                rows, inputs, outputs = row["sizes"]
                operations = 2e-6 * rows * inputs * outputs
                if row["shape"] == name and not row["form"].startswith("gemm crate"):
                    forms[f"Sinew {row['form']}"] = operations / row["best_gops"], operations / row["gops"]
            return forms
        return side


def policy_sides(name, folder, sinew, options):
    import policies

    case = policies.CASES[name](folder, options.sinew)
    sides = []
    if "pytorch" in options.peer:
        sides.append(peer("PyTorch f32", case.run))
    if "onnx" in options.peer and case.graph is not None:
        import onnx_runtime

        path = onnx_runtime.export(case.graph, case.inputs, folder, case.dynamo)
        for form, file in {"f32": path, "int8": onnx_runtime.to_8_bits(path)}.items():
            once = onnx_runtime.session(file, case.inputs, options.threads)
            sides.append(peer(f"ONNX Runtime {form}", lambda once=once: [once() for _ in range(case.runs)]))
    return sides + [sinew.policy(folder, case, compute) for compute in ("exact", "w8a8")]


def product_sides(name, sinew, options):
    ours = sinew.products(name)
    rows, inputs, outputs = next(r["sizes"] for r in sinew.bench("kernels", name, "--rounds", 1)["rows"]
                                 if r["shape"] == name)
    sides = []
    if "pytorch" in options.peer:
        x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        sides.append(peer("PyTorch f32", lambda: torch.nn.functional.linear(x, w)))
    if "ggml" in options.peer:
        import ggml_products

        for kind in ggml_products.fitting(inputs):
            product = ggml_products.Product(kind, rows, inputs, outputs, options.threads)
            sides.append(peer(f"ggml {kind}", product.run))
    return sides + [ours]


def in_turn(title, sides, rounds, count):
    """Shortest time, and the median over the rounds' medians, of every form."""
    found = {}
    for turn in range(rounds):
        print(f"{title}: round {turn + 1} of {rounds}", file=sys.stderr)
        for side in sides:
            for form, times in side(count).items():
                found.setdefault(form, []).append(times)
    return [{"case": title, "form": form, "min_ms": min(low for low, _ in times),
             "median_ms": statistics.median(middle for _, middle in times)} for form, times in found.items()]


def table(rows):
    """Each form, and how many times as fast as every peer it is (by the shortest time / by the median)."""
    peers = [row for row in rows if not row["form"].startswith("Sinew")]
    print(f"\n| {rows[0]['case']} | min ms | median ms |" + "".join(f" beside {row['form']} |" for row in peers))
    print("| --- | --- | --- |" + " --- |" * len(peers))
    for row in rows:
        ratios = [f" {other['min_ms'] / row['min_ms']:.2f} / {other['median_ms'] / row['median_ms']:.2f} |"
                  if row not in peers else " |" for other in peers]
        print(f"| {row['form']} | {row['min_ms']:.2f} | {row['median_ms']:.2f} |" + "".join(ratios))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sinew", default="target/release/sinew")
    parser.add_argument("--case", action="append", choices=["smolvla", "vision", "act", "diffusion", "products"])
    parser.add_argument("--peer", action="append", choices=["pytorch", "onnx", "ggml"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=3, help="chunks of each side in a round; products: ten times that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    options.peer = options.peer or ["pytorch", "onnx", "ggml"]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sinew = Sinew(options.sinew, options.threads)
    rows = []
    for case in options.case or ["smolvla", "vision", "act", "diffusion", "products"]:
        if case == "products":
            for name in PRODUCTS:
                rows.append(in_turn(name, product_sides(name, sinew, options), options.rounds, 10 * options.chunks))
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(pathlib.Path(scratch) / case)
            rows.append(in_turn(case, policy_sides(case, folder, sinew, options), options.rounds, options.chunks))
    for of_case in rows:
        table(of_case)
    if options.json:
        versions = {}
        for package in ("torch", "lerobot", "onnxruntime", "ggml_py"):
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        result = {"bench": "peers", "machine": sinew.machine, "peers": versions, "found": sum(rows, [])}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
