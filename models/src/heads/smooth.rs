//! Smoothing along a chunk.

/// Averages column `column` of `values` (rows of `width`) along the rows with weights ¼, ½, ¼, `passes` times.
///
/// Tokens that are decided in the same round do not know of each other, so values jump between bins and ways of
/// moving. The first `fixed` rows and both ends stay; so does every straight line. Values stay between the
/// least and the largest of the column.
pub fn smooth(values: &mut [f32], width: usize, column: usize, fixed: usize, passes: usize) {
    let rows = values.len() / width.max(1);
    for _ in 0..passes {
        let mut before = values.get(column).copied().unwrap_or_default();
        for row in 1..rows.saturating_sub(1) {
            let (here, after) = (values[row * width + column], values[(row + 1) * width + column]);
            if row >= fixed {
                values[row * width + column] = 0.25 * before + 0.5 * here + 0.25 * after;
            }
            before = here;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_spread_and_lines_stay() {
        let mut values = vec![0.0, 5.0, 0.0, 4.0, 4.0, 3.0, 4.0, 2.0, 4.0, 1.0];
        smooth(&mut values, 2, 0, 0, 1);
        assert_eq!(values, [0.0, 5.0, 1.0, 4.0, 3.0, 3.0, 4.0, 2.0, 4.0, 1.0]);
        smooth(&mut values, 2, 1, 0, 9);
        assert!((0..5).all(|i| (values[2 * i + 1] - (5 - i) as f32).abs() < 1e-6), "{values:?}");
    }

    #[test]
    fn fixed_rows_stay() {
        let mut values = vec![0.0, 9.0, 0.0, 9.0, 0.0];
        smooth(&mut values, 1, 0, 3, 4);
        assert_eq!(values[..3], [0.0, 9.0, 0.0]);
        assert!(values[3] < 9.0);
        smooth(&mut [], 3, 0, 0, 5);
        smooth(&mut [1.0], 1, 0, 0, 5);
    }
}
