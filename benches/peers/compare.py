#!/usr/bin/env python3
"""Times LeRobot's own policies in PyTorch and ours on the same checkpoints, in turn, and prints ratios.

    compare.py --sinew target/release/sinew [--case act] [--rounds 3] [--threads 2] [--json out.json]

Weights are random, sizes those of the published policies; nothing is downloaded. Both sides take turns (A B A B), a
few chunks each, so that what disturbs the machine disturbs both. Needs lerobot[smolvla,diffusion] 0.6.1 and torch 2.11.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch  # noqa: E402
from lerobot.configs import FeatureType, PolicyFeature  # noqa: E402
from lerobot.policies.factory import make_pre_post_processors  # noqa: E402


def features(state, action, cameras, image):
    inputs = {"observation.state": PolicyFeature(FeatureType.STATE, (state,))}
    for camera in cameras:
        inputs[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, image)
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (action,))}


def statistics_of(inputs, outputs):
    """Plausible statistics, so that nothing is divided by zero."""
    stats = {}
    for name, feature in {**inputs, **outputs}.items():
        shape = (3, 1, 1) if feature.type == FeatureType.VISUAL else feature.shape
        full = lambda value: torch.full(shape, value)  # noqa: E731
        stats[name] = {"mean": full(0.0), "std": full(1.0), "min": full(-1.0), "max": full(1.0)}
    return stats


def save(policy, config, folder):
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02)
    policy.save_pretrained(folder)
    stats = statistics_of(config.input_features, config.output_features)
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    before.save_pretrained(folder)
    after.save_pretrained(folder)


def act(folder, sinew):
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs, outputs = features(6, 6, ["top"], (3, 480, 640))
    config = ACTConfig(device="cpu", input_features=inputs, output_features=outputs,
                       pretrained_backbone_weights=None)
    policy = ACTPolicy(config)
    save(policy, config, folder)
    batch = {"observation.images.top": torch.rand(1, 3, 480, 640), "observation.state": torch.randn(1, 6)}
    return policy, lambda: policy.predict_action_chunk(dict(batch)), ["--cameras", "1", "--image", "640", "480"]


def diffusion(folder, sinew):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    inputs, outputs = features(2, 2, ["image"], (3, 96, 96))
    config = DiffusionConfig(device="cpu", input_features=inputs, output_features=outputs,
                             pretrained_backbone_weights=None, noise_scheduler_type="DDIM",
                             num_inference_steps=10)
    policy = DiffusionPolicy(config)
    save(policy, config, folder)
    count = config.n_obs_steps
    batch = {"observation.images.image": torch.rand(1, count, 3, 96, 96),
             "observation.state": torch.rand(1, count, 2) * 2 - 1}
    return policy, lambda: policy.predict_action_chunk(dict(batch)), ["--cameras", "1", "--image", "96", "96"]


TEXT = dict(model_type="llama", hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
            num_key_value_heads=5, head_dim=64, rms_norm_eps=1e-5, rope_theta=100000, vocab_size=49280,
            max_position_embeddings=8192, pad_token_id=2, hidden_act="silu", attention_bias=False)
VISION = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=512,
              patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh")


@contextlib.contextmanager
def without_hub(module):
    """LeRobot reads the backbone's configuration from the hub; here it stands above."""
    from transformers import SmolVLMConfig

    before = module.AutoConfig, module.AutoProcessor
    tokens = types.SimpleNamespace(fake_image_token_id=49189, global_image_token_id=49152)
    make = lambda *_, **__: SmolVLMConfig(  # noqa: E731
        image_token_id=49190, scale_factor=4, pad_token_id=128002, tie_word_embeddings=False,
        text_config=dict(TEXT), vision_config=dict(VISION))
    module.AutoConfig = types.SimpleNamespace(from_pretrained=make)
    module.AutoProcessor = types.SimpleNamespace(
        from_pretrained=lambda *_, **__: types.SimpleNamespace(tokenizer=tokens))
    try:
        yield
    finally:
        module.AutoConfig, module.AutoProcessor = before


def smolvla(folder, sinew):
    import lerobot.policies.smolvla.smolvlm_with_expert as module
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    inputs, outputs = features(6, 6, ["camera1", "camera2"], (3, 512, 512))
    config = SmolVLAConfig(device="cpu", input_features=inputs, output_features=outputs,
                           pad_language_to="max_length")
    with without_hub(module):
        policy = SmolVLAPolicy(config)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02)
    # Same sizes; the tokenizer, which LeRobot has from the hub, is one of our own.
    subprocess.run([sinew, "model", "random", "smolvla", "--size", "full", "-o", folder], check=True,
                   stdout=subprocess.DEVNULL)
    batch = {"observation.images.camera1": torch.rand(1, 3, 512, 512),
             "observation.images.camera2": torch.rand(1, 3, 512, 512),
             "observation.state": torch.randn(1, 6),
             "observation.language.tokens": torch.randint(0, 49000, (1, 48)),
             "observation.language.attention_mask": torch.ones(1, 48, dtype=torch.bool)}
    return policy, lambda: policy.predict_action_chunk(dict(batch)), []


CASES = {"smolvla": smolvla, "act": act, "diffusion": diffusion}


def in_pytorch(run, chunks):
    times = []
    for _ in range(chunks):
        start = time.perf_counter()
        with torch.inference_mode():
            run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def in_sinew(sinew, folder, arguments, compute, threads, chunks):
    times = []
    command = [sinew, "bench", "policy", folder, "--json", "--iterations", str(chunks), "--compute", compute,
               "--threads", str(threads), *arguments]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["found"]
    spread = found["chunk_ms"]
    times += [spread["min"], spread["p50"]] if chunks > 1 else [spread["p50"]]
    return times, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sinew", default="target/release/sinew")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=3, help="chunks of each side in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(pathlib.Path(scratch) / case)
            policy, run, arguments = CASES[case](folder, options.sinew)
            policy.eval()
            in_pytorch(run, 1)
            theirs, ours, found = [], {"exact": [], "w8a8": []}, {}
            for turn in range(options.rounds):
                print(f"{case}: round {turn + 1} of {options.rounds}", file=sys.stderr)
                theirs += in_pytorch(run, options.chunks)
                for compute, times in ours.items():
                    more, found[compute] = in_sinew(
                        options.sinew, folder, arguments, compute, options.threads, options.chunks)
                    times += more
            row = {"case": case, "form": "PyTorch f32", "min_ms": min(theirs), "median_ms": statistics.median(theirs)}
            rows.append(row)
            for compute, times in ours.items():
                mine = {"case": case, "form": f"Sinew {compute}", "min_ms": min(times),
                        "median_ms": statistics.median(times), "rss_mb": found[compute]["rss_mb"],
                        "isa": found[compute]["isa"]}
                mine["faster_min"] = row["min_ms"] / mine["min_ms"]
                mine["faster_median"] = row["median_ms"] / mine["median_ms"]
                rows.append(mine)
    print("| case | form | min ms | median ms | faster (min) | faster (median) | resident MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        ratio = [f"{row[key]:.2f} x" if key in row else "" for key in ("faster_min", "faster_median")]
        memory = f"{row['rss_mb']:.0f}" if "rss_mb" in row else ""
        print(f"| {row['case']} | {row['form']} | {row['min_ms']:.0f} | {row['median_ms']:.0f} | {ratio[0]} "
              f"| {ratio[1]} | {memory} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
