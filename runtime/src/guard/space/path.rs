//! A look along a brake path: as few points as it takes to be sure.

use super::barrier::Barrier;
use crate::MAX_JOINTS;

/// Points of a brake path that are looked at, at most.
const SAMPLES: usize = 8;
/// What a ball may come nearer between two of them: some (m), and with the square of how far it goes (1/m).
const SAG: f64 = 3e-4;
const CURVATURE: f64 = 1.25;

/// A point of a brake path: when (periods), where (rad), and the least distance to a limit there (m).
#[derive(Debug, Clone, Copy)]
pub(super) struct PathPoint {
    pub period: f64,
    pub angles: [f64; MAX_JOINTS],
    pub margin: f64,
}

/// Looks at a path of `periods` until it is sure that no point of it breaks a barrier, or finds one.
///
/// `look` gives the path's point at a period, and the barrier nearest there. Between two points no distance
/// can fall farther than the balls can move, `longest` lever times angle: where that suffices, nothing more is looked at.
pub(super) fn watch_path(
    periods: f64,
    longest: &[f64; MAX_JOINTS],
    look: &mut impl FnMut(f64) -> Result<(PathPoint, Barrier), Barrier>,
) -> Result<(), Barrier> {
    let first = look(0.0)?.0;
    if periods < 1.0 {
        return Ok(());
    }
    let mut open = [(first, look(periods)?.0); SAMPLES];
    let (mut count, mut looks) = (1, 2);
    let moved = |(a, b): &(PathPoint, PathPoint)| {
        let joints = a.angles.iter().zip(&b.angles).zip(longest);
        joints.map(|((a, b), lever)| lever * (a - b).abs()).sum::<f64>()
    };
    while count > 0 {
        // The part that is least sure comes first, so that the looks are well spent.
        let doubt = |part: &(PathPoint, PathPoint)| moved(part) - part.0.margin - part.1.margin;
        let doubts = open[..count].iter().map(doubt).enumerate();
        let Some((worst, doubt)) = doubts.max_by(|a, b| a.1.total_cmp(&b.1)) else { break };
        if doubt <= 0.0 {
            break;
        }
        let (a, b) = open[worst];
        let middle = (0.5 * (a.period + b.period)).floor();
        if middle <= a.period {
            // Every period of this part has been looked at.
            count -= 1;
            open[worst] = open[count];
            continue;
        }
        if looks >= SAMPLES {
            // All parts left are about as short: their curvature is what can still come nearer.
            let sag = SAG + CURVATURE * moved(&(a, b)).powi(2);
            if a.margin.min(b.margin) < sag {
                return look(middle).and_then(|(_, nearest)| Err(nearest));
            }
            break;
        }
        let point = look(middle)?.0;
        looks += 1;
        open[worst] = (a, point);
        open[count] = (point, b);
        count += 1;
    }
    Ok(())
}
