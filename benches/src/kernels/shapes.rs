//! The products of the networks at their published sizes.
//!
//! Images and tokens: SmolVLA, OFT and masked diffusion two cameras, 48 words, one state (177), 50 actions of 6 joints; π
//! two cameras and 48 words (560; π0.5 keeps the state in 200 words: 712); ACT one camera of 480 x 640, 100 actions;
//! Diffusion Policy two images of 84 x 84 and 16 actions; X-VLA one view of 224 x 224 at a time, 180 tokens in its head. A
//! convolution counts as the product that it is: outputs' places by kernel by channels.

/// Where it comes from, rows, inputs, outputs.
pub type Shape = (&'static str, usize, usize, usize);

/// Every kind of product of every family; those that differ from one listed by less than a fifth are left out, and so
/// are products of under a million multiplications.
pub const SHAPES: &[Shape] = &[
    // SmolVLM2-500M with SmolVLA's expert.
    ("smolvla vision patches", 1024, 768, 768),
    ("smolvla vision qkv", 1024, 768, 2304),
    ("smolvla vision out", 1024, 768, 768),
    ("smolvla vision fc1", 1024, 768, 3072),
    ("smolvla vision fc2", 1024, 3072, 768),
    ("smolvla connector", 64, 12_288, 960),
    ("smolvla prefix q", 177, 960, 960),
    ("smolvla prefix k", 177, 960, 320),
    ("smolvla prefix up", 177, 960, 2560),
    ("smolvla prefix down", 177, 2560, 960),
    ("smolvla expert q", 50, 720, 960),
    ("smolvla expert k", 50, 720, 320),
    ("smolvla expert cross k", 177, 320, 320),
    ("smolvla expert out", 50, 960, 720),
    ("smolvla expert up", 50, 720, 2048),
    ("smolvla expert down", 50, 2048, 720),
    ("smolvla time mlp", 50, 1440, 720),
    ("smolvla actions out", 50, 720, 32),
    ("wide head up", 50, 960, 2560),
    // SigLIP-So400m, Gemma 2B and its 300M expert.
    ("pi0 vision patches", 256, 588, 1152),
    ("pi0 vision qkv", 256, 1152, 3456),
    ("pi0 vision fc1", 256, 1152, 4304),
    ("pi0 vision fc2", 256, 4304, 1152),
    ("pi0 connector", 256, 1152, 2048),
    ("pi0 prefix q", 560, 2048, 2048),
    ("pi0 prefix k", 560, 2048, 256),
    ("pi0 prefix up", 560, 2048, 16_384),
    ("pi0 prefix down", 560, 16_384, 2048),
    ("pi0 expert q", 51, 1024, 2048),
    ("pi0 expert k", 51, 1024, 256),
    ("pi0 expert out", 51, 2048, 1024),
    ("pi0 expert up", 51, 1024, 4096),
    ("pi0 expert down", 51, 4096, 1024),
    ("pi0.5 prefix up", 712, 2048, 16_384),
    ("pi0.5 adaptive norm", 1, 1024, 3072),
    ("pi0_fast token q", 1, 2048, 2048),
    ("pi0_fast token up", 1, 2048, 16_384),
    ("pi0_fast token down", 1, 16_384, 2048),
    // ResNet-18 and LeRobot's transformer.
    ("act vision stem", 76_800, 147, 64),
    ("act vision layer1", 19_200, 576, 64),
    ("act vision layer2", 4800, 1152, 128),
    ("act vision layer3", 1200, 2304, 256),
    ("act vision layer4", 300, 4608, 512),
    ("act encoder qkv", 302, 512, 1536),
    ("act encoder up", 302, 512, 3200),
    ("act encoder down", 302, 3200, 512),
    ("act decoder q", 100, 512, 512),
    ("act decoder up", 100, 512, 3200),
    ("act decoder down", 100, 3200, 512),
    // LeRobot's U-Net, and the transformer of the original code.
    ("diffusion vision layer1", 882, 576, 64),
    ("diffusion unet 512", 16, 2560, 512),
    ("diffusion unet 1024", 8, 5120, 1024),
    ("diffusion unet 2048", 4, 10_240, 2048),
    ("diffusion unet up", 8, 20_480, 1024),
    ("diffusion transformer qkv", 16, 256, 768),
    ("diffusion transformer ff", 16, 256, 1024),
    // Florence-2-large and the 24 layers of X-VLA's head.
    ("xvla vision stage1 fc1", 3136, 256, 1024),
    ("xvla vision stage2 fc1", 784, 512, 2048),
    ("xvla vision stage3 fc1", 196, 1024, 4096),
    ("xvla vision stage4 fc1", 49, 2048, 8192),
    ("xvla encoder fc1", 100, 1024, 4096),
    ("xvla head qkv", 180, 1024, 3072),
    ("xvla head fc1", 180, 1024, 4096),
    ("xvla head fc2", 180, 4096, 1024),
    // The SmolVLM2 policies with other heads.
    ("oft text up", 477, 960, 2560),
    ("oft head in", 50, 5760, 4096),
    ("oft head block", 50, 4096, 4096),
    ("masked actions up", 300, 960, 2560),
    ("masked actions bins", 300, 960, 256),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_there_and_no_name_is_there_twice() {
        let family = |name: &str| SHAPES.iter().any(|s| s.0.starts_with(name));
        for name in
            ["smolvla", "pi0 ", "pi0.5", "pi0_fast", "act", "diffusion", "xvla", "oft", "masked"]
        {
            assert!(family(name), "{name}");
        }
        let names: std::collections::BTreeSet<_> = SHAPES.iter().map(|s| s.0).collect();
        assert_eq!(names.len(), SHAPES.len());
        assert!(SHAPES.iter().all(|(_, m, k, n)| m * k * n > 1_000_000));
    }
}
