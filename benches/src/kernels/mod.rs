//! How fast the products of the networks run, beside the machine's peak and the product of the gemm crate (in 32-bit
//! floats, as candle calls it).
//!
//! All forms of one shape are timed in turn, round after round, so that what disturbs the machine disturbs all of them.

mod shapes;

use std::time::Instant;

use candle_core::{Device, Tensor};
use sinew_models::checkpoint::StoredType;
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
        let blocks = |dtype, compute| Packed::in_blocks(&w, k, dtype, compute);
        let forms = [
            ("f32", Packed::from_values(&w, k, Compute::Exact)),
            ("w8a8", blocks(StoredType::Q8_0, Compute::Int8)),
            ("w8a8, q4_0", blocks(StoredType::Q4_0, Compute::Int8)),
            ("w8a8, q4_k", blocks(StoredType::Q4K, Compute::Int8)),
            ("q8_0 widened", blocks(StoredType::Q8_0, Compute::Exact)),
            ("q4_0 widened", blocks(StoredType::Q4_0, Compute::Exact)),
            ("q4_k widened", blocks(StoredType::Q4K, Compute::Exact)),
        ];
        let theirs = Tensor::from_slice(&w, (n, k), &Device::Cpu)?.t()?;
        let input = Tensor::from_slice(&x, (m, k), &Device::Cpu)?;
        let mut out = vec![0.0; m * n];
        let names = forms.iter().map(|(name, _)| *name).chain(["gemm crate f32"]);
        let mut times: Vec<(&str, Vec<f64>)> = names.map(|name| (name, Vec::new())).collect();
        for round in 0..rounds + 1 {
            for (form, (_, times)) in times.iter_mut().enumerate() {
                let start = Instant::now();
                match forms.get(form) {
                    Some((_, weights)) => {
                        let rows = Dense { values: &x, width: k };
                        multiply(&rows, weights, &Epilogue::default(), &mut out);
                    }
                    None => drop(input.matmul(&theirs)?),
                }
                // The first round warms up.
                if round > 0 {
                    times.push(start.elapsed().as_secs_f64());
                }
            }
        }
        peak_products = peak_products.max(peak::floats(20));
        times.iter_mut().for_each(|(_, t)| t.sort_by(f64::total_cmp));
        let operations = (2 * m * k * n) as f64;
        let of_f32 = times[0].1[times[0].1.len() / 2];
        for (form, times_of) in &times {
            let middle = times_of[times_of.len() / 2];
            rows.push(KernelRow {
                shape,
                sizes: [m, k, n],
                form,
                gops: operations / middle / 1e9,
                best_gops: operations / times_of[0] / 1e9,
                against_f32: of_f32 / middle,
                of_peak: 0.0,
            });
        }
    }
    let peak_gflops = 2.0 * peak_products / 1e9;
    rows.iter_mut().for_each(|row| row.of_peak = row.gops / peak_gflops);
    Ok(KernelProfile { isa: Isa::current().name(), threads: pool().threads(), peak_gflops, rows })
}
