//! Errors surge where a feed-forward block updates on stale input; the bubbling union is there to stop that
//! (arXiv 2506.13456, section on the error surge).

use candle_core::{Device, Result, Tensor};

use super::plan::{Updates, bubble, schedule};
use super::{
    Block, BlockKind, BlockPlan, Branches, Form, MonitorConfig, Schedule, TunedMode, Tuning,
};
use crate::kernels::Matrix;
use crate::random::SplitMix64;

const LAYERS: usize = 4;
const TOKENS: usize = 4;
const WIDTH: usize = 16;
const STEPS: usize = 20;
const UPDATES: usize = 5;

fn uniform(random: &mut SplitMix64, rows: usize, columns: usize, size: f64) -> Tensor {
    let values: Vec<f32> =
        (0..rows * columns).map(|_| (size * (2.0 * random.open_unit() - 1.0)) as f32).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu).expect("as many as it takes")
}

/// A pre-norm network: in every layer tokens are mixed, then each goes through two matrices.
struct Network {
    layers: Vec<[Tensor; 4]>,
    start: Tensor,
    end: Tensor,
}

impl Network {
    fn random(seed: u64) -> Self {
        let random = &mut SplitMix64::new(seed);
        let layer = |random: &mut SplitMix64| {
            let mix = uniform(random, TOKENS, TOKENS, 0.8);
            let project = uniform(random, WIDTH, WIDTH, 0.4);
            let [up, down] = [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
                .map(|(from, to)| uniform(random, from, to, 0.4));
            [mix, project, up, down]
        };
        let layers = (0..LAYERS).map(|_| layer(random)).collect();
        let [start, end] = [0, 1].map(|_| uniform(random, TOKENS, WIDTH, 1.0));
        Self { layers, start, end }
    }

    /// One denoising; the feed-forward blocks' outputs where they were computed, by block and step.
    fn run(&self, branches: &mut Branches) -> Result<Vec<(usize, usize, Tensor)>> {
        let mut computed = Vec::new();
        branches.begin(0, false);
        for step in 0..STEPS {
            // Slow at first, and fast at the end.
            let part = (step as f64 / STEPS as f64).powi(2);
            let x = ((&self.start * (1.0 - part))? + (&self.end * part)?)?;
            branches.evaluate(step as f64 / STEPS as f64, step + 1 == STEPS, |branches| {
                let mut h = Matrix::of_tensor(&x)?;
                for (i, [mix, project, up, down]) in self.layers.iter().enumerate() {
                    h = branches.add(2 * i, h, |h| {
                        let mixed = mix.matmul(&norm(&h.to_tensor()?)?)?;
                        Matrix::of_tensor(&mixed.matmul(project)?)
                    })?;
                    h = branches.add(2 * i + 1, h, |h| {
                        let output = norm(&h.to_tensor()?)?.matmul(up)?.gelu()?.matmul(down)?;
                        computed.push((i, step, output.clone()));
                        Matrix::of_tensor(&output)
                    })?;
                }
                Ok(h)
            })?;
        }
        branches.end();
        Ok(computed)
    }
}

fn norm(x: &Tensor) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
    let size = (centred.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
    centred.broadcast_div(&size)
}

fn blocks() -> Vec<Block> {
    let kinds = [BlockKind::Attention, BlockKind::FeedForward];
    (0..LAYERS).flat_map(|layer| kinds.map(|kind| Block::new(kind, layer))).collect()
}

/// Mean squared error of the feed-forward blocks' outputs where they update, but for the first and the last step.
fn surge(network: &Network, exact: &[(usize, usize, Tensor)], plans: &[Option<Updates>]) -> f64 {
    let plan = |(block, updates): (Block, &Option<Updates>)| BlockPlan {
        name: block.name,
        updates: updates.clone(),
        slopes: Vec::new(),
        similarity: 1.0,
        spread: 0.0,
        volatility: 0.0,
    };
    let plans = blocks().into_iter().zip(plans).map(plan).collect();
    let positions = (0..STEPS).map(|k| k as f64 / STEPS as f64).collect();
    let schedule = Schedule::new(String::new(), positions, (Form::Held, UPDATES), None, plans);
    let config = MonitorConfig { share: 0.0, ..MonitorConfig::default() };
    let found = network.run(&mut Branches::scheduled(schedule, config)).expect("shapes fit");
    let (mut sum, mut count) = (0.0, 0);
    for (layer, step, output) in found.iter().filter(|f| f.1 > 0 && f.1 + 1 < STEPS) {
        let (.., whole) = &exact[step * LAYERS + layer];
        let off = (output - whole).and_then(|d| d.sqr()?.mean_all()?.to_scalar::<f32>());
        sum += f64::from(off.expect("one value"));
        count += 1;
    }
    sum / f64::from(count.max(1))
}

#[test]
fn the_union_takes_the_surge_away_where_feed_forward_blocks_update() {
    let (mut alone, mut some) = (0.0, 0.0);
    for seed in 0..8 {
        let network = Network::random(seed);
        let tuning = Tuning::default();
        let mut branches = Branches::tuned(tuning.clone(), 2 * LAYERS);
        tuning.lock().mode = TunedMode::Record;
        let exact = network.run(&mut branches).expect("shapes fit");
        assert_eq!(exact.len(), LAYERS * STEPS);
        let seen = tuning.lock().likeness.clone();
        let plans: Vec<Option<Updates>> = seen
            .iter()
            .map(|s| Some(schedule(|i, j| s.similarity(i, j), STEPS, UPDATES).0))
            .collect();
        let volatility: Vec<f64> = seen.iter().map(|s| s.volatility()).collect();
        let united = |chosen| {
            let mut plans = plans.clone();
            bubble(&blocks(), &volatility, &mut plans, chosen);
            surge(&network, &exact, &plans)
        };
        alone += united(0);
        some += united(5);
        // With all blocks in it nothing that comes before an update is stale.
        let all = united(2 * LAYERS);
        assert!(all < 1e-9, "{all}");
    }
    assert!(some > 0.0 && some < alone, "{some} with five blocks, {alone} without");
}
