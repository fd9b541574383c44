"""Reference results that LeRobot does not give: Diffusion Policy's transformer, and every sampler setting.

The transformer is built here from PyTorch's own layers, after the published description (Chi et al. 2023,
arXiv 2303.04137, and real-stanford/diffusion_policy); the samplers are those of diffusers. Weights are random, seeded, and
rounded to half precision, in which they are stored. Written once; the results are committed.

    pip install torch torchvision diffusers safetensors
    python tests/reference/diffusion.py tests/fixtures/diffusion_transformer
"""

from __future__ import annotations

import json
import math
import sys
from itertools import product
from pathlib import Path

import torch
import torchvision
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

SEED = 20
STATE, ACTION, CAMERAS = 4, 3, 2
IMAGE, RESIZE, CROP = (48, 64), (40, 44), (36, 39)
OBSERVATIONS, HORIZON, EXECUTED, KEYPOINTS = 3, 10, 6, 4
WIDTH, HEADS, LAYERS, CONDITION_LAYERS = 32, 4, 2, 1
TRAINING_STEPS, STEPS = 50, 8


class Narrow(ResNet):
    """ResNet-18 with its channel counts divided by 32, up to the last feature map."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.inplanes = 2
        self.conv1 = nn.Conv2d(3, 2, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.layer1 = self._make_layer(BasicBlock, 2, 2)
        self.layer2 = self._make_layer(BasicBlock, 4, 2, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 8, 2, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 16, 2, stride=2)


class RgbEncoder(nn.Module):
    """Resize with antialiasing, middle cut out, ResNet, spatial softmax, one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(Narrow().children())[:-2])
        self.pool = nn.Module()
        self.pool.nets = nn.Conv2d(16, KEYPOINTS, 1)
        self.out = nn.Linear(2 * KEYPOINTS, 2 * KEYPOINTS)

    def forward(self, image: Tensor) -> Tensor:
        image = torchvision.transforms.functional.resize(image, RESIZE, antialias=True)
        image = torchvision.transforms.functional.center_crop(image, CROP)
        heat = self.pool.nets(self.backbone(image))
        rows, columns = heat.shape[-2:]
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        weight = heat.flatten(2).softmax(-1)
        points = torch.stack([(weight * x.flatten()).sum(-1), (weight * y.flatten()).sum(-1)], -1)
        return self.out(points.flatten(1)).relu()


class Denoiser(nn.Module):
    """Cross-attention from the actions to the training step and the observations."""

    def __init__(self, causal: bool, condition_layers: int) -> None:
        super().__init__()
        tokens = 1 + OBSERVATIONS
        common = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.input_emb = nn.Linear(ACTION, WIDTH)
        self.pos_emb = nn.Parameter(torch.zeros(1, HORIZON, WIDTH))
        self.cond_obs_emb = nn.Linear(STATE + 2 * KEYPOINTS * CAMERAS, WIDTH)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, tokens, WIDTH))
        if condition_layers:
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, norm_first=True, **common)
            self.encoder = nn.TransformerEncoder(layer, condition_layers, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Mish(), nn.Linear(4 * WIDTH, WIDTH))
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, norm_first=True, **common)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        self.ln_f = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, ACTION)
        self.causal = causal

    def forward(self, x: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        half = WIDTH // 2
        rate = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        angle = t[:, None] * rate
        step = torch.cat([angle.sin(), angle.cos()], -1)[:, None]
        memory = self.encoder(torch.cat([step, self.cond_obs_emb(observations)], 1) + self.cond_pos_emb)
        own = memory_mask = None
        if self.causal:
            rows = torch.arange(HORIZON)[:, None]
            hidden = float("-inf")
            own = torch.zeros(HORIZON, HORIZON).masked_fill(torch.arange(HORIZON) > rows, hidden)
            # The step is the first token: action k sees observations up to k.
            seen = torch.arange(1 + OBSERVATIONS) - 1 <= rows
            memory_mask = torch.zeros(seen.shape).masked_fill(~seen, hidden)
        y = self.decoder(self.input_emb(x) + self.pos_emb, memory, tgt_mask=own, memory_mask=memory_mask)
        return self.head(self.ln_f(y))


def draw(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of which every one matters, representable in half precision."""
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                drawn = 1 + 0.3 * noise.abs()
            elif value.ndim == 1 and name.endswith("weight"):
                drawn = 1 + 0.2 * noise
            elif value.ndim == 1:
                drawn = 0.2 * noise
            elif "pos_emb" in name:
                drawn = 0.5 * noise
            else:
                drawn = noise * (1.5 / value[0].numel()) ** 0.5
            value.copy_(drawn.half().float())


def configuration(causal: bool, condition_layers: int) -> dict:
    image = {"type": "VISUAL", "shape": [3, *IMAGE]}
    return {
        "type": "diffusion",
        "denoiser": "transformer",
        "n_obs_steps": OBSERVATIONS,
        "horizon": HORIZON,
        "n_action_steps": EXECUTED,
        "input_features": {
            "observation.state": {"type": "STATE", "shape": [STATE]},
            **{f"observation.images.cam{i}": image for i in range(CAMERAS)},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION]}},
        "resize_shape": RESIZE,
        "crop_ratio": 0.9,
        "use_separate_rgb_encoder_per_camera": False,
        "spatial_softmax_num_keypoints": KEYPOINTS,
        "n_layer": LAYERS,
        "n_cond_layers": condition_layers,
        "n_head": HEADS,
        "n_emb": WIDTH,
        "causal_attn": causal,
        "noise_scheduler_type": "DDPM",
        "num_train_timesteps": TRAINING_STEPS,
        "num_inference_steps": STEPS,
        "prediction_type": "sample",
        "clip_sample": True,
        "clip_sample_range": 1.5,
    }


def model_case(out: Path, causal: bool, condition_layers: int) -> None:
    """One checkpoint folder with one case: inputs, condition, the samples of each step, the actions."""
    generator = torch.Generator().manual_seed(SEED + condition_layers)
    model = nn.ModuleDict({"rgb_encoder": RgbEncoder(), "transformer": Denoiser(causal, condition_layers)})
    model.eval()
    draw(model, generator)
    images = torch.randint(0, 256, (OBSERVATIONS, CAMERAS, *IMAGE, 3), generator=generator, dtype=torch.uint8)
    states = torch.randn(OBSERVATIONS, STATE, generator=generator)
    noise = torch.randn(HORIZON, ACTION, generator=generator)
    added, samples, outputs = [], [], []
    scheduler = DDPMScheduler(
        TRAINING_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=True, clip_sample_range=1.5
    )
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        pixels = images.permute(0, 1, 4, 2, 3).float() / 255
        features = model["rgb_encoder"](pixels.flatten(0, 1)).view(OBSERVATIONS, -1)
        condition = torch.cat([states, features], -1)
        x = noise[None]
        for t in scheduler.timesteps:
            samples.append(x[0])
            outputs.append(model["transformer"](x, t[None], condition[None])[0])
            state = generator.get_state()
            x = scheduler.step(outputs[-1][None], t, x, generator=generator).prev_sample
            if t > 0:
                generator.set_state(state)
                added.append(torch.randn((1, HORIZON, ACTION), generator=generator)[0])
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"diffusion.{k}": v.half() for k, v in model.state_dict().items() if v.is_floating_point()}
    save_file(weights, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(configuration(causal, condition_layers), indent=1))
    for name in ["policy_preprocessor", "policy_postprocessor"]:
        (out / f"{name}.json").write_text(json.dumps({"name": name, "steps": []}))
    start = OBSERVATIONS - 1
    case = {
        "condition": condition,
        "noise": noise,
        "steps.timestep": scheduler.timesteps,
        "steps.x_in": torch.stack(samples),
        "steps.model_output": torch.stack(outputs),
        "steps.scheduler_noise": torch.stack(added),
        "horizon": x[0],
        "actions": x[0, start : start + EXECUTED].clone(),
    }
    for step, camera in product(range(OBSERVATIONS), range(CAMERAS)):
        case[f"raw.{step}.observation.images.cam{camera}"] = images[step, camera].contiguous()
        case[f"raw.{step}.observation.state"] = states[step]
    save_file(case, out / "case.safetensors")
    print(f"{out}: actions from {x.min():.2f} to {x.max():.2f}, condition up to {condition.abs().max():.2f}")


def sampler_cases(path: Path) -> None:
    """Every sampler, prediction and clipping, on outputs that are drawn and not computed."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    shape = (1, 4, 2)
    for kind, prediction, clip, n in product(["DDPM", "DDIM"], ["epsilon", "sample", "v_prediction"], [0, 1], [7, 20]):
        scheduler = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler}[kind](
            20, beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample=bool(clip), clip_sample_range=0.8
        )
        scheduler.set_timesteps(n)
        x = torch.randn(shape, generator=generator)
        samples, outputs, added = [x], [], []
        for t in scheduler.timesteps:
            outputs.append(torch.randn(shape, generator=generator))
            state = generator.get_state()
            options = {"generator": generator} if kind == "DDPM" else {}
            x = scheduler.step(outputs[-1], t, x, **options).prev_sample
            generator.set_state(state)
            added.append(torch.randn(shape, generator=generator))
            samples.append(x)
        name = f"{kind}.{prediction}.{clip}.{n}"
        for part, values in [("x", samples), ("output", outputs), ("noise", added)]:
            tensors[f"{name}.{part}"] = torch.cat(values)
    for n in [1, 3, 7, 20, 100]:
        scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
        scheduler.set_timesteps(n)
        tensors[f"trailing.{n}"] = scheduler.timesteps.contiguous()
    save_file(tensors, path)


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    model_case(root / "causal", causal=True, condition_layers=0)
    model_case(root / "encoded", causal=False, condition_layers=CONDITION_LAYERS)
    sampler_cases(root / "samplers.safetensors")
