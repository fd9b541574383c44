//! Figures of one choice of caches.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use sinew_runtime::{ActionChunk, CacheUse, Opening};

use super::Choice;
use crate::Spread;
use crate::plot::{Plot, Point};

/// What one choice of caches saves and costs. Errors are those of all actions of all chunks, against the policy that
/// approximates nothing, with the same noise; shares are of the range that a dimension goes through in its chunks.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct CacheRow {
    /// Its name.
    pub name: String,
    /// Choices of one series differ in one setting.
    pub series: String,
    /// Chunks compared.
    pub chunks: usize,
    /// Time of all chunks against that of the exact policy's.
    pub time: f64,
    /// Median of what each chunk took against the exact policy's.
    pub time_p50: f64,
    /// One chunk (ms).
    pub chunk_ms: Option<Spread>,
    /// Time of all chunks against that of the exact policy's, stage by stage.
    pub stages: BTreeMap<String, f64>,
    /// Share of the blocks that were reused, by cache.
    pub reused: BTreeMap<String, f64>,
    /// Chunks for which a cache was not wholly open.
    pub not_open: usize,
    /// Mean error of the actions (their own units).
    pub mean: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// Mean error as a share of the range.
    pub mean_relative: f64,
    /// 99th percentile as a share of the range.
    pub p99_relative: f64,
    /// What the error would be said to be below in 99 of 100 values, as a share of the range, by the chunks compared: the
    /// largest 99th percentile of those. None before five were compared.
    pub bound: Option<f64>,
    /// Share of the other chunks' values that were above the bound as it was when they were made.
    pub above_bound: Option<f64>,
    /// Episodes done as told, of those played.
    pub successes: u64,
    /// Episodes played.
    pub episodes: u64,
}

/// What one choice's chunks were.
#[derive(Default)]
pub(super) struct Sum {
    chunks: Vec<Vec<f64>>,
    times: Vec<Duration>,
    stages: BTreeMap<&'static str, Duration>,
    caches: BTreeMap<&'static str, (u64, u64)>,
    not_open: usize,
}

impl Sum {
    pub fn add(&mut self, chunk: ActionChunk) {
        self.chunks.push(chunk.values().to_vec());
        let mut time = Duration::ZERO;
        for stage in chunk.report.stages {
            *self.stages.entry(stage.stage).or_default() += stage.time;
            time += stage.time;
        }
        self.times.push(time);
        let open = |used: &CacheUse| used.opening == Opening::Open;
        self.not_open += usize::from(!chunk.report.caches.iter().all(|(_, used)| open(used)));
        for (name, CacheUse { lookups, hits, .. }) in chunk.report.caches {
            let sum = self.caches.entry(name).or_default();
            *sum = (sum.0 + u64::from(lookups), sum.1 + u64::from(hits));
        }
    }

    pub fn beside<E>(
        &self,
        exact: &Self,
        choice: &Choice<'_, E>,
        dim: usize,
        compared: usize,
    ) -> CacheRow {
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64().max(1e-12);
        let ranges = exact.ranges(dim);
        let errors: Vec<Vec<f64>> = self
            .chunks
            .iter()
            .zip(&exact.chunks)
            .map(|(a, b)| a.iter().zip(b).map(|(a, b)| (a - b).abs()).collect())
            .collect();
        // A dimension that never moves has no range to be a share of.
        let share = |(k, error): (usize, &f64)| {
            let range = ranges[k % ranges.len()];
            if range > 0.0 { error / range } else { 0.0 }
        };
        let shares: Vec<Vec<f64>> =
            errors.iter().map(|chunk| chunk.iter().enumerate().map(share).collect()).collect();
        let (bound, above_bound) = bounded(&shares, compared);
        let mean = |all: &[Vec<f64>]| {
            let count = all.iter().map(Vec::len).sum::<usize>().max(1);
            all.iter().flatten().sum::<f64>() / count as f64
        };
        let each = self.times.iter().zip(&exact.times).map(|(a, b)| ratio(*a, *b)).collect();
        let stages = self.stages.iter().map(|(stage, time)| {
            let other = exact.stages.get(stage).copied().unwrap_or_default();
            ((*stage).to_owned(), ratio(*time, other))
        });
        let reused = self.caches.iter().filter(|(_, (lookups, _))| *lookups > 0);
        let reused = reused
            .map(|(name, (lookups, hits))| ((*name).to_owned(), *hits as f64 / *lookups as f64));
        CacheRow {
            name: choice.name.clone(),
            series: choice.series.clone(),
            chunks: self.chunks.len(),
            time: ratio(self.times.iter().sum(), exact.times.iter().sum()),
            time_p50: Spread::of(each).map_or(1.0, |spread| spread.p50),
            chunk_ms: Spread::of(self.times.iter().map(|t| 1e3 * t.as_secs_f64()).collect()),
            stages: stages.collect(),
            reused: reused.collect(),
            not_open: self.not_open,
            mean: mean(&errors),
            p99: quantile(errors.iter().flatten().copied().collect(), 0.99),
            max: errors.iter().flatten().copied().fold(0.0, f64::max),
            mean_relative: mean(&shares),
            p99_relative: quantile(shares.iter().flatten().copied().collect(), 0.99),
            bound,
            above_bound,
            successes: 0,
            episodes: 0,
        }
    }

    /// How far each dimension goes.
    fn ranges(&self, dim: usize) -> Vec<f64> {
        let column = |d: usize| self.chunks.iter().flat_map(move |c| c.iter().skip(d).step_by(dim));
        let range = |d: usize| {
            let most = column(d).copied().fold(f64::NEG_INFINITY, f64::max);
            most - column(d).copied().fold(f64::INFINITY, f64::min)
        };
        (0..dim.max(1)).map(range).collect()
    }
}

/// Comparisons before a bound is stated.
const KNOWN: usize = 5;

/// The bound that chunk after chunk of `shares` gives when one in `compared` is compared, and the share of the values of
/// the others that were above what it was then.
fn bounded(shares: &[Vec<f64>], compared: usize) -> (Option<f64>, Option<f64>) {
    let (mut bound, mut known, mut above, mut others) = (0.0f64, 0, 0usize, 0usize);
    for (k, chunk) in shares.iter().enumerate() {
        if k.is_multiple_of(compared.max(1)) {
            bound = bound.max(quantile(chunk.clone(), 0.99));
            known += 1;
        } else if known >= KNOWN {
            others += chunk.len();
            above += chunk.iter().filter(|share| **share > bound).count();
        }
    }
    let stated = (known >= KNOWN).then_some(bound);
    (stated, (others > 0).then(|| above as f64 / others as f64))
}

/// The value that the share `q` of `values` is not above; 0 of none.
fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (q * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The rows as comma-separated values with a head line.
pub fn csv(rows: &[CacheRow]) -> String {
    let mut out = "caches,chunks,time,time_p50,ms_min,ms_p50,ms_p90,ms_p99,ms_max,vision,prefix,denoise,not_open,\
                   mean,p99,max,mean_relative,p99_relative,bound,above_bound,successes,episodes\n"
        .to_owned();
    let maybe = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
    for row in rows {
        let stage = |name: &str| maybe(row.stages.get(name).copied());
        let at = |get: fn(&Spread) -> f64| maybe(row.chunk_ms.as_ref().map(get));
        let cells = [
            format!("\"{}\"", row.name.replace('"', "\"\"")),
            row.chunks.to_string(),
            row.time.to_string(),
            row.time_p50.to_string(),
            at(|s| s.min),
            at(|s| s.p50),
            at(|s| s.p90),
            at(|s| s.p99),
            at(|s| s.max),
            stage("vision"),
            stage("prefix"),
            stage("denoise"),
            row.not_open.to_string(),
            row.mean.to_string(),
            row.p99.to_string(),
            row.max.to_string(),
            row.mean_relative.to_string(),
            row.p99_relative.to_string(),
            maybe(row.bound),
            maybe(row.above_bound),
            row.successes.to_string(),
            row.episodes.to_string(),
        ];
        let _ = writeln!(out, "{}", cells.join(","));
    }
    out
}

/// Speed against error.
pub fn plot(rows: &[CacheRow], title: &str) -> Plot {
    let mut series: Vec<(&str, Vec<Point>)> = Vec::new();
    for row in rows {
        let point = Point {
            name: row.name.clone(),
            at: [100.0 * row.mean_relative, 1.0 / row.time.max(1e-9)],
            up_to: 100.0 * row.p99_relative,
        };
        match series.iter_mut().find(|s| s.0 == row.series) {
            Some((_, points)) => points.push(point),
            None => series.push((&row.series, vec![point])),
        }
    }
    let axes = [
        "mean error of the actions (% of their range); whiskers to the 99th percentile".to_owned(),
        "times as fast as without caches".to_owned(),
    ];
    let series = series.into_iter().map(|s| s.1).collect();
    Plot { title: title.to_owned(), axes, series }
}

#[cfg(test)]
mod tests {
    use sinew_runtime::{StageTime, Stamp};

    use super::*;

    fn sum(chunks: &[[f64; 4]], ms: u64) -> Sum {
        let mut sum = Sum::default();
        for values in chunks {
            let dt = Duration::from_millis(100);
            let chunk = ActionChunk::new(0, Stamp(0), dt, 2, values.to_vec());
            let mut chunk = chunk.expect("two actions of two values");
            let time = Duration::from_millis(ms);
            chunk.report.stages = vec![StageTime { stage: "vision", time }];
            let used = CacheUse { lookups: 4, hits: 3, ..CacheUse::default() };
            chunk.report.caches = vec![("vision", used)];
            sum.add(chunk);
        }
        sum
    }

    #[test]
    fn figures_are_those_of_the_chunks() {
        let exact = sum(&[[0.0, 1.0, 10.0, 1.0]; 4], 40);
        let ours = sum(
            &[
                [0.5, 1.0, 10.0, 1.0],
                [0.1, 1.0, 10.0, 1.0],
                [0.9, 1.0, 10.0, 3.0],
                [0.2, 1.0, 10.0, 1.0],
            ],
            10,
        );
        let load: Box<super::super::Load<'_, ()>> = Box::new(|| Err(()));
        let choice = Choice { name: "a \"b\"".to_owned(), series: String::new(), load };
        let row = ours.beside(&exact, &choice, 2, 1);
        assert_eq!((row.chunks, row.time, row.time_p50), (4, 0.25, 0.25));
        assert_eq!((row.stages["vision"], row.reused["vision"]), (0.25, 0.75));
        // The first dimension has a range of 10, the second none.
        assert!((row.mean_relative - 0.17 / 16.0).abs() < 1e-12, "{}", row.mean_relative);
        assert!((row.mean - 3.7 / 16.0).abs() < 1e-12 && row.max == 2.0);
        assert_eq!((row.bound, row.above_bound), (None, None), "four comparisons are too few");
        let text = csv(&[row]);
        let mut lines = text.lines().map(|line| line.split(',').count());
        assert_eq!((lines.next(), lines.next(), lines.next()), (Some(22), Some(22), None));
        assert!(text.contains("\n\"a \"\"b\"\"\",4,0.25"), "{text}");
    }

    #[test]
    fn values_above_the_bound_are_counted() {
        let below = || vec![0.1, 0.2];
        let mut shares: Vec<_> = (0..5).flat_map(|_| [below(), vec![9.0, 9.0]]).collect();
        assert_eq!(bounded(&shares[..8], 2), (None, None), "too little is known");
        // The tenth is the first that a bound is there for.
        assert_eq!(bounded(&shares, 2), (Some(0.2), Some(1.0)));
        shares.extend([vec![0.4, 0.0], vec![0.3, 0.5], below(), below()]);
        assert_eq!(bounded(&shares, 2), (Some(0.4), Some(0.5)));
        assert_eq!(bounded(&[], 2), (None, None));
    }
}
