//! The nearest point to zero change that satisfies a few linear constraints: a small quadratic programme.

use crate::MAX_JOINTS;

/// Constraints at once, at most: the nearest ones.
pub(super) const MAX_ROWS: usize = 12;
/// Rounds of the dual ascent before it counts as infeasible.
const SWEEPS: usize = 40;
/// The ascent ends when nothing moves more than this (of the unit).
const STEP: f64 = 1e-4;
/// How nearly a row must be satisfied then (of the unit). Nearly parallel rows take many rounds to be satisfied
/// better, and the guard looks at the brake path of what comes out all the same.
const ACCURACY: f64 = 1e-3;
/// Over-relaxation of the ascent: nearly parallel rows need fewer rounds.
const RELAXATION: f64 = 1.5;
/// A row that moves less than this cannot be helped by the joints.
const SINGULAR: f64 = 1e-9;

/// `row · x >= bound`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub row: [f64; MAX_JOINTS],
    pub bound: f64,
}

impl Row {
    fn dot(&self, x: &[f64]) -> f64 {
        self.row.iter().zip(x).map(|(a, b)| a * b).sum()
    }
}

/// The point nearest to `x` that satisfies `rows` and `|x_j| <= 1`, in its first `joints` values; `None` when there is none.
///
/// One violated row is answered in closed form. Several: Hildreth's dual coordinate ascent, no matrix to factor.
/// Never an iterate that does not satisfy them. Real time: no allocation.
pub(super) fn project(
    x: &[f64; MAX_JOINTS],
    rows: &[Row],
    joints: usize,
) -> Option<[f64; MAX_JOINTS]> {
    let rows = &rows[..rows.len().min(MAX_ROWS)];
    let joints = joints.min(MAX_JOINTS);
    let mut squares = [0.0; MAX_ROWS];
    for (square, row) in squares.iter_mut().zip(rows) {
        *square = row.dot(&row.row[..joints]);
        if *square < SINGULAR * SINGULAR && row.bound > SINGULAR {
            return None;
        }
    }
    let slack = |row: &Row, x: &[f64]| row.dot(x) - row.bound;
    let satisfied = |x: &[f64], accuracy: f64| {
        x.iter().all(|v| v.abs() <= 1.0 + accuracy) && rows.iter().all(|r| slack(r, x) >= -accuracy)
    };
    let mut found = *x;
    let out = &mut found[..joints];
    let mut violated = rows.iter().zip(&squares).filter(|(r, _)| slack(r, out) < 0.0);
    match (violated.next(), violated.next()) {
        (None, _) if out.iter().all(|v| v.abs() <= 1.0) => return Some(found),
        (Some((row, square)), None) if *square > SINGULAR * SINGULAR => {
            let step = -slack(row, out) / square;
            for (value, a) in out.iter_mut().zip(&row.row) {
                *value += step * a;
            }
            if satisfied(out, 1e-9) {
                return Some(found);
            }
            out.copy_from_slice(&x[..joints]);
        }
        _ => {}
    }
    let mut weights = [0.0; MAX_ROWS];
    // A joint's two speed bounds are rows as well; only one of them can weigh.
    let mut box_weights = [0.0f64; MAX_JOINTS];
    for _ in 0..SWEEPS {
        let mut largest = 0.0f64;
        for ((row, square), weight) in rows.iter().zip(&squares).zip(&mut weights) {
            if *square < SINGULAR * SINGULAR {
                continue;
            }
            let step = (-RELAXATION * slack(row, out) / square).max(-*weight);
            if step != 0.0 {
                *weight += step;
                for (value, a) in out.iter_mut().zip(&row.row) {
                    *value += step * a;
                }
                largest = largest.max(step * step * square);
            }
        }
        for (value, weight) in out.iter_mut().zip(&mut box_weights) {
            let free = *value - *weight;
            let bounded = free.clamp(-1.0, 1.0);
            largest = largest.max((bounded - *value).powi(2));
            (*weight, *value) = (bounded - free, bounded);
        }
        if largest < STEP * STEP {
            break;
        }
    }
    satisfied(out, ACCURACY).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(values: [f64; 3], bound: f64) -> Row {
        let mut row = [0.0; MAX_JOINTS];
        row[..3].copy_from_slice(&values);
        Row { row, bound }
    }

    #[test]
    fn nothing_changes_when_all_is_satisfied_and_contradictions_are_refused() {
        let x = [0.3; MAX_JOINTS];
        assert_eq!(project(&x, &[row([1.0, 0.0, 0.0], 0.2)], 3), Some(x));
        assert_eq!(project(&x, &[row([1.0, 0.0, 0.0], 0.5), row([-1.0, 0.0, 0.0], -0.4)], 3), None);
        assert_eq!(project(&x, &[row([0.0, 0.0, 0.0], 0.1)], 3), None);
        assert_eq!(project(&x, &[row([1.0, 0.0, 0.0], 1.5)], 3), None, "faster than any joint");
    }

    proptest! {
        #[test]
        fn the_answer_is_feasible_and_no_feasible_point_is_nearer(
            x in prop::array::uniform3(-1.0..1.0f64),
            rows in prop::collection::vec((prop::array::uniform3(-1.0..1.0f64), 0.01..0.4f64), 1..5),
            inside in prop::array::uniform3(-0.5..0.5f64),
            others in prop::collection::vec(prop::array::uniform3(-1.0..1.0f64), 40),
        ) {
            // Every row holds at `inside`, with room, so the programme is feasible.
            let dot = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let rows: Vec<Row> = rows.iter().map(|(r, room)| row(*r, dot(r, &inside) - room)).collect();
            let mut from = [0.0; MAX_JOINTS];
            from[..3].copy_from_slice(&x);
            let Some(found) = project(&from, &rows, 3) else { return Err(TestCaseError::reject("slow")) };
            let away = |p: &[f64; MAX_JOINTS]| (0..3).map(|j| (p[j] - x[j]).powi(2)).sum::<f64>();
            for r in &rows {
                prop_assert!(r.dot(&found) >= r.bound - 2e-3);
            }
            for other in &others {
                // Between `inside` and anywhere: the last feasible point on the way.
                let mut share = 1.0f64;
                for r in &rows {
                    let (at, to) = (dot(&[r.row[0], r.row[1], r.row[2]], &inside), dot(&[r.row[0], r.row[1], r.row[2]], other));
                    if to < r.bound { share = share.min((at - r.bound) / (at - to)); }
                }
                let mut p = [0.0; MAX_JOINTS];
                for j in 0..3 { p[j] = inside[j] + share * (other[j] - inside[j]); }
                prop_assert!(away(&p) >= away(&found) - 1e-2, "{p:?} {found:?}");
            }
        }
    }
}
