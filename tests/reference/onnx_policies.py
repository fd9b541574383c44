"""Makes tests/fixtures/onnx: small policies as ONNX files, with what PyTorch computes with them.

    python tests/reference/onnx_policies.py tests/fixtures/onnx [NAME…]

Needs torch, torchvision, onnx, safetensors and LeRobot 0.6.1. Everything is seeded; weights are drawn, not
trained, so that every part matters to the result.

act        LeRobot's own ACT (a narrow ResNet-18, two cameras) with its processors. The folder is a LeRobot
           checkpoint, too: the native implementation must give the same actions.
flow       a flow-matching head in two graphs: one for the observation, one for each denoise step.
recurrent  a GRU that takes a padded instruction with a mask, bytes of an image, and one action out.
residual   a residual network at control rate: joints and planned action in, a correction out.
desk_residual   one for the simulated desk arm: it pulls on where the arm lags behind, and leans to one side.
"""

import math
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

torch.set_num_threads(1)
torch.backends.mha.set_fastpath_enabled(False)


def export(model, inputs, names, outputs, path, dynamic=None):
    torch.onnx.export(
        model.eval(), inputs, str(path), input_names=names, output_names=outputs,
        dynamic_axes=dynamic, opset_version=17, dynamo=False,
    )


def draw(model, seed):
    """Weights of order one over the root of the inputs, gains near one, everything else small but not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            noise = torch.randn(t.shape, generator=generator)
            if name.endswith("running_var"):
                t.copy_(1.0 + 0.2 * noise.abs())
            elif t.dim() > 1:
                fan_in = t[0].numel()
                t.copy_(noise * math.sqrt(2.0 / fan_in))
            elif name.endswith("weight"):
                t.copy_(1.0 + 0.1 * noise)
            else:
                t.copy_(0.1 * noise)


def numbers(values):
    return "[" + ", ".join(f"{v:.9g}" for v in values.flatten().tolist()) + "]"


class NarrowResNet(ResNet):
    """ResNet-18 with torchvision's names and 2, 4, 8, 16 channels."""

    def __init__(self, norm_layer, width=2, **_):
        super().__init__(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        for i in range(4):
            layer = self._make_layer(BasicBlock, width << i, 2, stride=1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", layer)
        self.fc = nn.Linear(width << 3, 10)


class ActGraph(nn.Module):
    def __init__(self, policy, cameras):
        super().__init__()
        self.model, self.cameras = policy.model, cameras

    def forward(self, state, *images):
        actions, _ = self.model({"observation.state": state, "observation.images": list(images)})
        return actions


def act(folder):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.act.processor_act import make_act_pre_post_processors

    torchvision.models.resnet18 = NarrowResNet
    joints, (height, width), chunk = 5, (48, 64), 8
    cameras = ["observation.images.front", "observation.images.wrist"]
    visual = {c: PolicyFeature(FeatureType.VISUAL, (3, height, width)) for c in cameras}
    config = ACTConfig(
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (joints,)), **visual},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (joints,))},
        chunk_size=chunk, n_action_steps=chunk, dim_model=16, n_heads=4, dim_feedforward=32, latent_dim=4,
        n_encoder_layers=2, n_decoder_layers=1, use_vae=False, pretrained_backbone_weights=None, device="cpu",
    )
    policy = ACTPolicy(config).eval()
    draw(policy, 41)
    g = torch.Generator().manual_seed(42)
    stats = {
        "observation.state": {"mean": torch.randn(joints, generator=g), "std": torch.rand(joints, generator=g) + 0.5},
        "action": {"mean": torch.randn(joints, generator=g), "std": torch.rand(joints, generator=g) + 0.5},
    }
    for c in cameras:
        stats[c] = {"mean": torch.rand(3, 1, 1, generator=g), "std": torch.rand(3, 1, 1, generator=g) * 0.2 + 0.2}
    pre, post = make_act_pre_post_processors(config, dataset_stats=stats)
    policy.save_pretrained(folder)
    pre.save_pretrained(folder, config_filename="policy_preprocessor.json")
    post.save_pretrained(folder, config_filename="policy_postprocessor.json")
    (folder / "sinew.json").write_text('{"action_rate_hz": 25}\n')
    (folder / "README.md").unlink(missing_ok=True)

    raw = {f"raw.0.{c}": torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8) for c in cameras}
    raw["raw.0.observation.state"] = torch.randn(joints, generator=g)
    batch = {"observation.state": raw["raw.0.observation.state"]}
    batch |= {c: raw[f"raw.0.{c}"].permute(2, 0, 1).float() / 255 for c in cameras}
    batch = pre(batch)
    with torch.no_grad():
        normalized = policy.predict_action_chunk(dict(batch))
    final = post(normalized.clone())
    save_file({**raw, "actions.normalized": normalized, "actions.final": final}, folder / "case.safetensors")
    inputs = (batch["observation.state"], *[batch[c] for c in cameras])
    names = ["observation.state", *cameras]
    export(ActGraph(policy, cameras), inputs, names, ["actions"], folder / "act.onnx")

    def norm(key):
        s = stats[key]
        return f'{{ mode = "mean_std", mean = {numbers(s["mean"])}, std = {numbers(s["std"])} }}'

    joint_names = '["base", "shoulder", "elbow", "wrist", "gripper"]'
    text = f'model = "act.onnx"\naction_rate = "25 Hz"\n\n[state]\ninput = "observation.state"\nnames = {joint_names}\n'
    text += f'units = "rad"\nnormalization = {norm("observation.state")}\n'
    for c in cameras:
        text += f'\n[images.{c.rsplit(".", 1)[1]}]\ninput = "{c}"\nlayout = "nchw"\ncolors = "rgb"\nrange = "0..1"\n'
        text += f'fit = "stretch"\nnormalization = {norm(c)}\n'
    text += f'\n[action]\noutput = "actions"\nnames = {joint_names}\nunits = "rad"\nnormalization = {norm("action")}\n'
    (folder / "manifest.toml").write_text(text)


class FlowPrefix(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, stride=8)
        self.out = nn.Linear(4 * 4, 12)

    def forward(self, image):
        return torch.tanh(self.out(torch.relu(self.conv(image)).flatten(1)))


class FlowStep(nn.Module):
    """Takes the state itself: an input of the second graph only."""

    def __init__(self, horizon, width):
        super().__init__()
        self.shape = (horizon, width)
        self.inner = nn.Linear(horizon * width + 1 + 12 + 3, 32)
        self.out = nn.Linear(32, horizon * width)

    def forward(self, x, t, features, state):
        inner = torch.cat([x.flatten(1), t[:, None], features, state], dim=1)
        return self.out(torch.tanh(self.inner(inner))).reshape(-1, *self.shape)


def flow(folder):
    """Four steps; the same network as one whose noise lies at time 1, and as one whose noise lies at time 0."""
    horizon, width, steps = 6, 4, 4
    prefix, step = FlowPrefix(), FlowStep(horizon, width)
    draw(prefix, 51)
    draw(step, 52)
    g = torch.Generator().manual_seed(53)
    image = torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8)
    state, noise = torch.randn(3, generator=g), torch.randn(1, horizon, width, generator=g)
    case = {"raw.0.observation.images.eye": image, "raw.0.observation.state": state, "noise": noise}
    pixels = image.permute(2, 0, 1).float()[None] / 255 * 2 - 1
    for noise_at in (1, 0):
        x, dt = noise.clone(), (-1 if noise_at == 1 else 1) / steps
        with torch.no_grad():
            features = prefix(pixels)
            for k in range(steps):
                t = torch.tensor([noise_at + k * dt], dtype=torch.float32)
                x = x + dt * step(x, t, features, torch.rad2deg(state)[None] / 100)
        case[f"actions.noise_at_{noise_at}"] = torch.deg2rad(x[:, :, :3] * 100)
    save_file(case, folder / "case.safetensors")
    export(prefix, (pixels,), ["image"], ["features"], folder / "prefix.onnx", {"image": {0: "batch"}})
    t = torch.tensor([0.5])
    inputs = (noise, t, features, state[None])
    dynamic = {"x": {0: "batch"}, "t": {0: "batch"}, "features": {0: "batch"}, "state": {0: "batch"}}
    names = ["x", "t", "features", "state"]
    export(step, inputs, names, ["velocity"], folder / "step.onnx", dynamic)
    (folder / "manifest.toml").write_text(f'''model = "prefix.onnx"
action_rate = "20 Hz"

[state]
input = "state"
names = ["a", "b", "c"]
units = "deg"
normalization = {{ mode = "mean_std", mean = [0.0, 0.0, 0.0], std = [100.0, 100.0, 100.0] }}

[images.eye]
input = "image"
layout = "nchw"
colors = "rgb"
range = "-1..1"
fit = "exact"

[action]
names = ["a", "b", "c"]
units = "deg"
width = {width}
normalization = {{ mode = "mean_std", mean = [0.0, 0.0, 0.0], std = [100.0, 100.0, 100.0] }}

[flow]
model = "step.onnx"
sample = "x"
time = "t"
velocity = "velocity"
noise_at = 1
steps = {steps}
context = {{ features = "features" }}
''')


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(64, 6)
        self.cell = nn.GRUCell(6 + 3 + 2, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, tokens, mask, pixels, state, h):
        weight = mask.float()[:, :, None]
        words = (self.words(tokens) * weight).sum(1) / weight.sum(1)
        color = pixels.float().mean(dim=(1, 2)) / 255
        h = self.cell(torch.cat([words, color, state], dim=1), h)
        return self.out(h), h


def recurrent(folder):
    model = Recurrent()
    draw(model, 61)
    g = torch.Generator().manual_seed(62)
    words = ["<unk>", "push", "the", "red", "blue", "cube"]
    vocab = ", ".join(f'"{w}": {i}' for i, w in enumerate(words))
    (folder / "tokenizer.json").write_text(
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
        '"pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, '
        f'"model": {{"type": "WordLevel", "vocab": {{{vocab}}}, "unk_token": "<unk>"}}}}\n'
    )
    tokens = torch.tensor([[1, 2, 3, 5, 63, 63]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    image = torch.randint(0, 256, (1, 2, 3, 3), generator=g, dtype=torch.uint8)
    states = torch.randn(3, 1, 2, generator=g)
    h, actions = torch.zeros(1, 8), []
    with torch.no_grad():
        for state in states:
            action, h = model(tokens, mask, image, state, h)
            actions.append(action)
    case = {"raw.0.observation.images.eye": image[0].flip(-1), "raw.0.observation.state": states[0, 0].clone()}
    save_file({**case, "states": states[:, 0].contiguous(), "actions": torch.cat(actions)}, folder / "case.safetensors")
    names = ["tokens", "mask", "pixels", "state", "h"]
    export(model, (tokens, mask, image, states[0], h), names, ["action", "h_next"], folder / "recurrent.onnx")
    (folder / "manifest.toml").write_text('''model = "recurrent.onnx"
action_rate = "10 Hz"

[state]
input = "state"
names = ["a", "b"]
units = ["rad", "m"]

[images.eye]
input = "pixels"
layout = "nhwc"
colors = "bgr"
range = "0..255"
fit = "exact"

[instruction]
input = "tokens"
mask = "mask"
tokenizer = "tokenizer.json"
pad_token = 63

[[recurrent]]
input = "h"
output = "h_next"
reset_after = "500 ms"

[action]
output = "action"
names = ["a", "b"]
units = "rad"
''')


class Residual(nn.Module):
    """ResiP: two hidden layers with SiLU, small last layer without bias."""

    def __init__(self, joints):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3 * joints, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, joints, bias=False)
        )

    def forward(self, position, velocity, planned):
        return self.net(torch.cat([position, velocity, planned], dim=1))


def residual(folder):
    joints = 3
    model = Residual(joints)
    draw(model, 71)
    g = torch.Generator().manual_seed(72)
    position, velocity, planned = (torch.randn(4, joints, generator=g) for _ in range(3))
    position_norm = (position - 0.1) / (0.5 + 1e-8)
    planned_norm = (planned - 0.2) / (2.0 + 1e-8)
    with torch.no_grad():
        out = torch.cat([model(p[None], v[None], a[None]) for p, v, a in zip(position_norm, velocity, planned_norm)])
    case = {"position": position, "velocity": velocity, "planned": planned, "correction": out * 2.0 * 0.1}
    save_file(case, folder / "case.safetensors")
    one = (position_norm[:1], velocity[:1], planned_norm[:1])
    export(model, one, ["position", "velocity", "planned"], ["correction"], folder / "residual.onnx")
    (folder / "residual.toml").write_text('''model = "residual.onnx"
rate = "100 Hz"
names = ["a", "b", "c"]
units = "rad"
scale = 0.1

[position]
input = "position"
normalization = { mode = "mean_std", mean = [0.1, 0.1, 0.1], std = [0.5, 0.5, 0.5] }

[velocity]
input = "velocity"

[planned]
input = "planned"
normalization = { mode = "mean_std", mean = [0.2, 0.2, 0.2], std = [2.0, 2.0, 2.0] }

[correction]
output = "correction"
deviation = [2.0, 2.0, 2.0]
''')


class Tracking(nn.Module):
    """Pulls on where the measured joints lag behind the planned ones, and leans to one side; between -1 and 1."""

    def __init__(self, joints):
        super().__init__()
        self.net = nn.Linear(joints, joints)

    def forward(self, position, planned):
        return torch.tanh(self.net(planned - position))


def desk_residual(folder):
    names = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
    joints = len(names)
    model = Tracking(joints)
    with torch.no_grad():
        model.net.weight.copy_(4.0 * torch.eye(joints))
        model.net.bias.copy_(torch.linspace(-0.5, 0.5, joints))
    one = torch.zeros(1, joints)
    export(model, (one, one), ["position", "planned"], ["correction"], folder / "residual.onnx")
    (folder / "residual.toml").write_text(f'''model = "residual.onnx"
rate = "100 Hz"
names = {names}
units = "rad"
scale = 0.02

[position]
input = "position"

[planned]
input = "planned"

[correction]
output = "correction"
'''.replace("'", '"'))


if __name__ == "__main__":
    root, wanted = Path(sys.argv[1]), sys.argv[2:]
    for make in (act, flow, recurrent, residual, desk_residual):
        if wanted and make.__name__ not in wanted:
            continue
        folder = root / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{make.__name__}: {size} bytes in {', '.join(sorted(f.name for f in folder.iterdir()))}")
