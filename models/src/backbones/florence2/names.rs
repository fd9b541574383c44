//! Names of the weights, in two layouts.
//!
//! The first checkpoints were saved with the remote code of the Florence-2 repository, whose modules wrap norms
//! and layers differently. Source: LeRobot 0.6.1 `src/lerobot/policies/xvla/modeling_xvla.py`, which translates
//! the same names on loading.

/// Parts of a block's name in the older layout, and in transformers'.
const PARTS: [(&str, &str); 8] = [
    (".conv1.fn.dw.", ".conv1."),
    (".conv2.fn.dw.", ".conv2."),
    (".window_attn.norm.", ".norm1."),
    (".channel_attn.norm.", ".norm1."),
    (".window_attn.fn.", ".window_attn."),
    (".channel_attn.fn.", ".channel_attn."),
    (".ffn.norm.", ".norm2."),
    (".ffn.fn.net.", ".ffn."),
];

/// The runtime's name of the older layout's projection, which is stored `[C, D]`.
pub const OLD_PROJECTION: &str = "projector.old_projection";

/// Prefixes of the model (behind `model.vlm.`) and the runtime's; of two that are the same here, the newer
/// layout's is the last.
pub const NAMES: [(&str, &str); 10] = [
    ("model.vlm.image_projection", OLD_PROJECTION),
    ("model.vlm.image_proj_norm.", "projector.image_proj_norm."),
    ("model.vlm.image_pos_embed.", "projector.image_position_embed."),
    ("model.vlm.visual_temporal_embed.", "projector.visual_temporal_embed."),
    ("model.vlm.multi_modal_projector.", "projector."),
    ("model.vlm.vision_tower.", "davit."),
    ("model.vlm.language_model.model.shared.", "bart.embed_tokens."),
    ("model.vlm.language_model.shared.", "bart.embed_tokens."),
    ("model.vlm.language_model.model.encoder.", "bart."),
    ("model.vlm.language_model.encoder.", "bart."),
];

/// The runtime's name of the tensor that is `name` in either layout.
pub fn modern_name(name: &str) -> String {
    // In a block `proj` is the attention's own, in both layouts.
    if name.starts_with("davit.convs.") {
        return name.replacen(".proj.", ".conv.", 1);
    }
    let part = PARTS.iter().find(|(old, _)| name.starts_with("davit.") && name.contains(old));
    part.map_or_else(|| name.to_owned(), |(old, new)| name.replacen(old, new, 1))
}

#[cfg(test)]
mod tests {
    use super::modern_name;

    #[test]
    fn the_older_layout_is_translated() {
        let block = |name: &str| format!("davit.blocks.2.1.{name}");
        for (old, new) in [
            ("spatial_block.conv1.fn.dw.weight", "spatial_block.conv1.weight"),
            ("spatial_block.window_attn.norm.bias", "spatial_block.norm1.bias"),
            ("spatial_block.window_attn.fn.qkv.weight", "spatial_block.window_attn.qkv.weight"),
            ("channel_block.channel_attn.fn.proj.bias", "channel_block.channel_attn.proj.bias"),
            ("channel_block.ffn.norm.weight", "channel_block.norm2.weight"),
            ("channel_block.ffn.fn.net.fc1.weight", "channel_block.ffn.fc1.weight"),
        ] {
            assert_eq!(modern_name(&block(old)), block(new));
            assert_eq!(modern_name(&block(new)), block(new), "the newer layout stays");
        }
        assert_eq!(modern_name("davit.convs.0.proj.bias"), "davit.convs.0.conv.bias");
        assert_eq!(modern_name("bart.layers.0.fc1.bias"), "bart.layers.0.fc1.bias");
    }
}
