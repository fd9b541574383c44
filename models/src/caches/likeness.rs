//! How alike a block's outputs are across the steps of one denoising: what a cache schedule is made of.

/// Running statistics of one block: the mean `K × K` cosine similarity and inner product of its outputs at the `K`
/// evaluations of a denoising, how far samples differ in it, and how much the outputs move.
///
/// Source: block-wise adaptive caching (arXiv 2506.13456); it takes one sample, here they are averaged, since a block
/// whose similarities differ between observations or noise seeds cannot be trusted to a fixed schedule.
#[derive(Debug, Clone, PartialEq)]
pub struct Likeness {
    evaluations: usize,
    samples: u32,
    /// `[K, K]`, row by row.
    mean: Vec<f64>,
    /// Sum of squared differences from the mean (Welford 1962).
    square: Vec<f64>,
    /// Mean inner products, `[K, K]`.
    products: Vec<f64>,
    moved: f64,
}

impl Likeness {
    /// Nothing seen yet of denoisings of so many evaluations.
    pub fn new(evaluations: usize) -> Self {
        let cells = vec![0.0; evaluations * evaluations];
        Self {
            evaluations,
            samples: 0,
            mean: cells.clone(),
            square: cells.clone(),
            products: cells,
            moved: 0.0,
        }
    }

    /// Takes in one denoising: the block's output at each evaluation, all of one length. False, and nothing changed,
    /// when there are not `K` of them, or a value is no number.
    pub fn add(&mut self, outputs: &[Vec<f32>]) -> bool {
        let count = self.evaluations;
        let width = outputs.first().map_or(0, Vec::len);
        let whole = |x: &Vec<f32>| x.len() == width && x.iter().all(|v| v.is_finite());
        if outputs.len() != count || width == 0 || !outputs.iter().all(whole) {
            return false;
        }
        self.samples += 1;
        let squares: Vec<f64> = outputs.iter().map(|x| dot(x, x)).collect();
        let lengths: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
        let mut moved = 0.0;
        for i in 0..count {
            for j in i..count {
                let size = lengths[i] * lengths[j];
                let product = if i == j { squares[i] } else { dot(&outputs[i], &outputs[j]) };
                let alike = match size > 0.0 {
                    _ if i == j => 1.0,
                    true => product / size,
                    // Two outputs of nothing are the same.
                    false => f64::from(u8::from(lengths[i] == lengths[j])),
                };
                if i != j {
                    moved += distance(&outputs[i], &outputs[j]);
                }
                for cell in [i * count + j, j * count + i] {
                    let before = alike - self.mean[cell];
                    self.mean[cell] += before / f64::from(self.samples);
                    self.square[cell] += before * (alike - self.mean[cell]);
                    let products = &mut self.products[cell];
                    *products += (product - *products) / f64::from(self.samples);
                    if i == j {
                        break;
                    }
                }
            }
        }
        self.moved += moved / pairs(count);
        true
    }

    /// Samples taken in.
    pub fn samples(&self) -> u32 {
        self.samples
    }

    /// Evaluations `K`.
    pub fn evaluations(&self) -> usize {
        self.evaluations
    }

    /// Mean similarity of evaluations `i` and `j`.
    pub fn similarity(&self, i: usize, j: usize) -> f64 {
        self.mean[i * self.evaluations + j]
    }

    /// Mean similarity of two evaluations next to each other; 1 of a single one.
    pub fn near(&self) -> f64 {
        let pairs = self.evaluations.saturating_sub(1);
        let sum: f64 = (0..pairs).map(|k| self.similarity(k, k + 1)).sum();
        if pairs > 0 { sum / pairs as f64 } else { 1.0 }
    }

    /// Mean inner product of evaluations `i` and `j`.
    pub fn product(&self, i: usize, j: usize) -> f64 {
        self.products[i * self.evaluations + j]
    }

    /// Standard deviation of the similarity between samples, root mean square over all pairs of evaluations.
    pub fn spread(&self) -> f64 {
        let count = self.evaluations;
        let above = (0..count).flat_map(|i| (i + 1..count).map(move |j| i * count + j));
        let sum: f64 = above.map(|cell| self.square[cell]).sum();
        (sum / f64::from(self.samples.max(1)) / pairs(count)).sqrt()
    }

    /// Mean absolute difference of two evaluations' outputs, over all pairs: how much the block moves.
    pub fn volatility(&self) -> f64 {
        self.moved / f64::from(self.samples.max(1))
    }
}

/// Pairs of different evaluations, at least one.
fn pairs(count: usize) -> f64 {
    (count * count.saturating_sub(1) / 2).max(1) as f64
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    // Eight sums, so that the loop vectorises; in double precision, because differences of products are taken.
    let mut sums = [0f64; 8];
    let (whole_a, whole_b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = whole_a.remainder().iter().zip(whole_b.remainder());
    let rest: f64 = rest.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    for (a, b) in whole_a.zip(whole_b) {
        let pairs = a.iter().zip(b);
        sums.iter_mut().zip(pairs).for_each(|(s, (a, b))| *s += f64::from(*a) * f64::from(*b));
    }
    rest + sums.iter().sum::<f64>()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum();
    sum / a.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn similarity_spread_and_movement_are_those_of_the_samples() {
        let mut seen = Likeness::new(2);
        assert!(seen.add(&[vec![1.0, 0.0], vec![0.0, 2.0]]));
        assert!(seen.add(&[vec![1.0, 0.0], vec![3.0, 0.0]]));
        assert_eq!((seen.samples(), seen.similarity(0, 0)), (2, 1.0));
        assert!((seen.similarity(0, 1) - 0.5).abs() < 1e-12);
        assert_eq!(seen.similarity(0, 1), seen.similarity(1, 0));
        assert_eq!([seen.product(0, 1), seen.product(1, 1)], [1.5, 6.5], "0 and 3; 4 and 9");
        assert!((seen.spread() - 0.5).abs() < 1e-12, "cosines 0 and 1");
        // Means of |1 - 0|, |0 - 2| and of |1 - 3|, |0 - 0|.
        assert!((seen.volatility() - 1.25).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_sample_changes_nothing() {
        let mut seen = Likeness::new(2);
        for wrong in [
            vec![vec![1.0]],
            vec![vec![1.0], vec![1.0, 2.0]],
            vec![vec![1.0], vec![f32::NAN]],
            vec![vec![], vec![]],
        ] {
            assert!(!seen.add(&wrong));
        }
        assert_eq!(seen, Likeness::new(2));
        assert!(seen.add(&[vec![0.0], vec![0.0]]));
        assert_eq!(seen.similarity(0, 1), 1.0);
    }

    #[test]
    fn long_products_are_exact_enough() {
        let a: Vec<f32> = (0..5003).map(|i| (i as f32 * 0.37).sin()).collect();
        let exact: f64 = a.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((dot(&a, &a) - exact).abs() < 1e-12 * exact);
    }
}
