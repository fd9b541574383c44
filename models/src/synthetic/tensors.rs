//! The tensors of checkpoints under LeRobot's names, and what fills them.

use std::ops::Range;

use crate::backbones::gemma::GemmaConfig;
use crate::backbones::siglip::SiglipConfig;
use crate::families::Family;
use crate::pi::{PiConfig, PiSizes};
use crate::random::SplitMix64;
use crate::smolvla::{SmolVlaConfig, VlmConfig};

/// Where a tensor's values come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Fill {
    /// Normal, of this mean and deviation.
    Normal(f32, f32),
    /// Given.
    Values(Vec<f32>),
}

impl Fill {
    /// Appends the values of `range` to `out`.
    pub fn draw(&self, range: Range<usize>, random: &mut SplitMix64, out: &mut Vec<f32>) {
        match self {
            Self::Normal(mean, deviation) => {
                out.extend(range.map(|_| mean + deviation * random.bell()));
            }
            Self::Values(values) => out.extend_from_slice(&values[range]),
        }
    }
}

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub fill: Fill,
}

impl Tensor {
    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

struct List {
    family: &'static Family,
    all: Vec<Tensor>,
}

impl List {
    fn new(family: &'static Family) -> Self {
        Self { family, all: Vec::new() }
    }

    fn sorted(mut self) -> Vec<Tensor> {
        self.all.sort_by(|a, b| a.name.cmp(&b.name));
        self.all
    }

    fn add(&mut self, name: &str, shape: &[usize], fill: Fill) {
        let name = self.family.long_name(name);
        self.all.push(Tensor { name, shape: shape.to_vec(), fill });
    }

    /// A weight that keeps the size of what it multiplies.
    fn weight(&mut self, name: &str, shape: &[usize]) {
        let inputs: usize = shape[1..].iter().product();
        self.add(&format!("{name}.weight"), shape, Fill::Normal(0.0, (inputs as f32).powf(-0.5)));
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.weight(name, &[outputs, inputs]);
        self.add(&format!("{name}.bias"), &[outputs], Fill::Normal(0.0, 0.05));
    }

    fn gain(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width], Fill::Normal(1.0, 0.1));
    }

    fn layer_norm(&mut self, name: &str, width: usize) {
        self.gain(name, width);
        self.add(&format!("{name}.bias"), &[width], Fill::Normal(0.0, 0.05));
    }

    /// A Llama block of width `w`.
    fn block(&mut self, name: &str, w: usize, mlp: usize, q: usize, kv: usize, kv_inputs: usize) {
        self.gain(&format!("{name}.input_layernorm"), w);
        self.gain(&format!("{name}.post_attention_layernorm"), w);
        self.projections(name, w, mlp, (q, kv), kv_inputs);
    }

    fn projections(
        &mut self,
        name: &str,
        w: usize,
        mlp: usize,
        (q, kv): (usize, usize),
        kv_inputs: usize,
    ) {
        self.weight(&format!("{name}.self_attn.q_proj"), &[q, w]);
        self.weight(&format!("{name}.self_attn.k_proj"), &[kv, kv_inputs]);
        self.weight(&format!("{name}.self_attn.v_proj"), &[kv, kv_inputs]);
        self.weight(&format!("{name}.self_attn.o_proj"), &[w, q]);
        self.weight(&format!("{name}.mlp.gate_proj"), &[mlp, w]);
        self.weight(&format!("{name}.mlp.up_proj"), &[mlp, w]);
        self.weight(&format!("{name}.mlp.down_proj"), &[w, mlp]);
    }

    /// A Gemma model. Gains are stored as their difference from 1; adaptive norms are linear in the flow time.
    fn gemma(&mut self, name: &str, config: &GemmaConfig, adaptive: bool) {
        let w = config.width;
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let mut norms = vec![format!("{name}.norm")];
        for i in 0..config.depth {
            let layer = format!("{name}.layers.{i}");
            self.projections(&layer, w, config.mlp_dim, (q, kv), w);
            norms.push(format!("{layer}.input_layernorm"));
            norms.push(format!("{layer}.post_attention_layernorm"));
        }
        for norm in norms {
            if adaptive {
                self.linear(&format!("{norm}.dense"), w, 3 * w);
            } else {
                self.add(&format!("{norm}.weight"), &[w], Fill::Normal(0.0, 0.1));
            }
        }
    }

    /// A SigLIP tower.
    fn siglip(&mut self, v: &SiglipConfig) {
        let (h, side) = (v.hidden_size, v.image_size / v.patch_size);
        self.weight("vision.embeddings.patch_embedding", &[h, 3, v.patch_size, v.patch_size]);
        self.add("vision.embeddings.patch_embedding.bias", &[h], Fill::Normal(0.0, 0.05));
        let positions = Fill::Normal(0.0, 0.3);
        self.add("vision.embeddings.position_embedding.weight", &[side * side, h], positions);
        for i in 0..v.num_hidden_layers {
            let name = |part: &str| format!("vision.layers.{i}.{part}");
            self.layer_norm(&name("layer_norm1"), h);
            self.layer_norm(&name("layer_norm2"), h);
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.linear(&name(&format!("self_attn.{part}")), h, h);
            }
            self.linear(&name("mlp.fc1"), h, v.intermediate_size);
            self.linear(&name("mlp.fc2"), v.intermediate_size, h);
        }
        self.layer_norm("vision.post_layernorm", h);
    }
}

/// All tensors of a policy with cross-attention, in the order of their names.
pub fn smolvla(config: &SmolVlaConfig, vlm: &VlmConfig) -> Vec<Tensor> {
    let (t, v) = (&vlm.text_config, &vlm.vision_config);
    let (d, q, kv) =
        (t.hidden_size, t.num_attention_heads * t.head(), t.num_key_value_heads * t.head());
    let w = (d as f64 * config.expert_width_multiplier) as usize;
    let mlp = (4 * (2 * w / 3)).next_multiple_of(256);
    let layers = usize::try_from(config.num_vlm_layers).unwrap_or(t.num_hidden_layers);
    let every = usize::try_from(config.self_attn_every_n_layers).unwrap_or(0).max(1);
    let mut list = List::new(&crate::smolvla::FAMILY);
    list.linear("state_proj", config.max_state_dim, d);
    list.linear("action_in_proj", config.max_action_dim, w);
    list.linear("action_out_proj", w, config.max_action_dim);
    list.linear("action_time_mlp_in", 2 * w, w);
    list.linear("action_time_mlp_out", w, w);
    for i in 0..layers {
        let inputs = if i % every == 0 { w } else { kv };
        list.block(&format!("expert.layers.{i}"), w, mlp, q, kv, inputs);
        list.block(&format!("text.layers.{i}"), d, t.intermediate_size, q, kv, d);
    }
    list.gain("expert.norm", w);
    list.gain("text.norm", d);
    let table = Fill::Normal(0.0, (d as f32).powf(-0.5));
    list.add("text.embed_tokens.weight", &[t.vocab_size, d], table.clone());
    list.add("vlm_with_expert.vlm.lm_head.weight", &[t.vocab_size, d], table);
    list.weight("connector", &[d, v.hidden_size * vlm.scale_factor * vlm.scale_factor]);
    list.siglip(v);
    list.sorted()
}

/// All tensors of a π policy of `family` with `vocabulary` tokens, in the order of their names.
pub fn pi(
    family: &'static Family,
    config: &PiConfig,
    sizes: &PiSizes,
    vocabulary: usize,
) -> Vec<Tensor> {
    let mut list = List::new(family);
    list.gemma("text", &sizes.text, false);
    if let Some(expert) = &sizes.expert {
        let adaptive = family.name == crate::pi::PI05.name;
        list.gemma("expert", expert, adaptive);
        let head = Fill::Normal(0.0, (expert.width as f32).powf(-0.5));
        list.add("expert_lm_head.weight", &[vocabulary, expert.width], head);
        let (w, m) = (expert.width, config.max_action_dim);
        list.linear("action_in_proj", m, w);
        list.linear("action_out_proj", w, m);
        let (mlp, inputs) = if adaptive { ("time_mlp", w) } else { ("action_time_mlp", 2 * w) };
        list.linear(&format!("{mlp}_in"), inputs, w);
        list.linear(&format!("{mlp}_out"), w, w);
        if adaptive {
            // Scales and shifts of about 0.3.
            let dense = list.all.iter_mut().filter(|t| t.name.ends_with("norm.dense.weight"));
            dense.for_each(|t| t.fill = Fill::Normal(0.0, 0.3 * (w as f32).powf(-0.5)));
        } else {
            list.linear("state_proj", config.max_state_dim, w);
        }
    }
    let d = sizes.text.width;
    let table = Fill::Normal(0.0, (d as f32).powf(-0.5));
    list.add("text.embed_tokens.weight", &[vocabulary, d], table.clone());
    list.add("lm_head.weight", &[vocabulary, d], table);
    list.linear("connector", sizes.vision.hidden_size, d);
    list.siglip(&sizes.vision);
    list.sorted()
}
