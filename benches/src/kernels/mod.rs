//! How fast the products of the networks run, beside the machine's peak and the product of the gemm crate (in 32-bit
//! floats, as candle calls it).
//!
//! All forms of one shape are timed in turn, round after round, so that what disturbs the machine disturbs all of them.

mod shapes;

use std::time::Instant;

use candle_core::{Device, Tensor};
use sinew_models::kernels::gemm::{Dense, multiply};
use sinew_models::kernels::pool::pool;
use sinew_models::kernels::{Compute, Epilogue, Isa, Packed, peak};

pub use shapes::{SHAPES, Shape};

/// One shape in one form.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KernelRow {
    /// Where the shape comes from.
    pub shape: &'static str,
    /// Rows, inputs, outputs.
    pub sizes: [usize; 3],
    /// How it is computed.
    pub form: &'static str,
    /// Median (10⁹ operations a second; a multiplication with an addition counts as two).
    pub gops: f64,
    /// The fastest.
    pub best_gops: f64,
    /// Median time of our f32 form over the median time of this one.
    pub against_f32: f64,
    /// Share of the measured f32 peak (the median).
    pub of_peak: f64,
}

/// The machine's part in the figures.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KernelProfile {
    /// Instruction set.
    pub isa: &'static str,
    /// Threads.
    pub threads: usize,
    /// Measured peak in 32-bit floats (10⁹ operations a second, all threads): the best of measurements between the
    /// rows.
    pub peak_gflops: f64,
    /// One row a shape and form.
    pub rows: Vec<KernelRow>,
}

/// Times every shape whose name contains `filter`, `rounds` times each.
///
/// # Errors
/// When candle refuses a product.
pub fn profile(filter: &str, rounds: usize) -> candle_core::Result<KernelProfile> {
    let mut peak_products = peak::floats(50);
    let mut rows = Vec::new();
    for (shape, m, k, n) in SHAPES.iter().filter(|(name, ..)| name.contains(filter)) {
        let (m, k, n) = (*m, *k, *n);
        let values = |count: usize, seed: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * 7919 + seed) % 1009) as f32 / 504.0 - 1.0).collect()
        };
        let (x, w) = (values(m * k, 1), values(n * k, 2));
        let exact = Packed::from_values(&w, k, Compute::Exact);
        let rounded = Packed::from_values(&w, k, Compute::Int8);
        let widened = Packed::from_values(&w, k, Compute::Int8).with_compute(Compute::Exact);
        let theirs = Tensor::from_slice(&w, (n, k), &Device::Cpu)?.t()?;
        let input = Tensor::from_slice(&x, (m, k), &Device::Cpu)?;
        let mut out = vec![0.0; m * n];
        let mut times: [Vec<f64>; 4] = Default::default();
        for round in 0..rounds + 1 {
            for (form, times) in times.iter_mut().enumerate() {
                let start = Instant::now();
                let mut ours = |weights| {
                    multiply(
                        &Dense { values: &x, width: k },
                        weights,
                        &Epilogue::default(),
                        &mut out,
                    );
                };
                match form {
                    0 => ours(&exact),
                    1 => ours(&rounded),
                    2 => ours(&widened),
                    _ => drop(input.matmul(&theirs)?),
                }
                // The first round warms up.
                if round > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        peak_products = peak_products.max(peak::floats(20));
        times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
        let operations = (2 * m * k * n) as f64;
        let forms = ["f32", "w8a8", "q8_0 widened", "gemm crate f32"];
        for (form, times_of) in forms.into_iter().zip(&times) {
            let middle = times_of[times_of.len() / 2];
            rows.push(KernelRow {
                shape,
                sizes: [m, k, n],
                form,
                gops: operations / middle / 1e9,
                best_gops: operations / times_of[0] / 1e9,
                against_f32: times[0][times[0].len() / 2] / middle,
                of_peak: 0.0,
            });
        }
    }
    let peak_gflops = 2.0 * peak_products / 1e9;
    rows.iter_mut().for_each(|row| row.of_peak = row.gops / peak_gflops);
    Ok(KernelProfile { isa: Isa::current().name(), threads: pool().threads(), peak_gflops, rows })
}
