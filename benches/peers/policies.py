"""LeRobot's own policies at their published sizes with random weights: in PyTorch, and as checkpoints for Sinew."""

import contextlib
import os
import subprocess
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


class ActGraph(torch.nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.model = policy.model

    def forward(self, image, state):
        return self.model({"observation.images": [image], "observation.state": state})[0]


def act(folder, sinew):
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs, outputs = features(6, 6, ["top"], (3, 480, 640))
    config = ACTConfig(device="cpu", input_features=inputs, output_features=outputs,
                       pretrained_backbone_weights=None)
    policy = ACTPolicy(config).eval()
    save(policy, config, folder)
    image, state = torch.rand(1, 3, 480, 640), torch.randn(1, 6)
    batch = {"observation.images.top": image, "observation.state": state}
    return types.SimpleNamespace(
        run=lambda: policy.predict_action_chunk(dict(batch)), arguments=["--cameras", "1", "--image", "640", "480"],
        graph=ActGraph(policy), inputs=(image, state), dynamo=False, runs=1, stage=None)


def diffusion(folder, sinew):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    inputs, outputs = features(2, 2, ["image"], (3, 96, 96))
    config = DiffusionConfig(device="cpu", input_features=inputs, output_features=outputs,
                             pretrained_backbone_weights=None, noise_scheduler_type="DDIM",
                             num_inference_steps=10)
    policy = DiffusionPolicy(config).eval()
    save(policy, config, folder)
    count = config.n_obs_steps
    batch = {"observation.images.image": torch.rand(1, count, 3, 96, 96),
             "observation.state": torch.rand(1, count, 2) * 2 - 1}
    return types.SimpleNamespace(
        run=lambda: policy.predict_action_chunk(dict(batch)), arguments=["--cameras", "1", "--image", "96", "96"],
        graph=None, stage=None)


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
        policy = SmolVLAPolicy(config).eval()
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
    return types.SimpleNamespace(
        run=lambda: policy.predict_action_chunk(dict(batch)), arguments=[], graph=None, stage=None,
        vision=policy.model.vlm_with_expert)


class VisionGraph(torch.nn.Module):
    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm

    def forward(self, image):
        return self.vlm.embed_image(image)


def vision(folder, sinew):
    """SmolVLA's vision tower with its connector, one camera after the other, as LeRobot does it."""
    graph = VisionGraph(smolvla(folder, sinew).vision)
    images = [torch.rand(1, 3, 512, 512) * 2 - 1 for _ in range(2)]
    return types.SimpleNamespace(run=lambda: [graph(image) for image in images], arguments=[], graph=graph,
                                 inputs=(images[0],), dynamo=True, runs=len(images), stage="vision")




CASES = {"smolvla": smolvla, "vision": vision, "act": act, "diffusion": diffusion}
