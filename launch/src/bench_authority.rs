//! `sinew bench authority`: a confirmed stop and a take-over.

use std::time::Duration;

use sinew_benches::Spread;
use sinew_benches::authority::{self, AuthorityCase, AuthorityProfile, RigConfig};

use crate::bench_verbs::{print_found, print_machine};
use crate::cli::{Failure, say};

/// Measures at `rate` (Hz) and prints.
///
/// # Errors
/// [`Failure::Result`] when the bench's robot does not run.
pub fn run(
    rate: f64,
    drivers: usize,
    stops: usize,
    takeovers: usize,
    json: bool,
) -> Result<(), Failure> {
    let period = Duration::from_secs_f64(1.0 / rate.clamp(10.0, 1000.0));
    let rig = RigConfig { period, drivers: drivers.max(1), ..RigConfig::default() };
    let case = AuthorityCase { rig, stops: stops.max(1), takeovers: takeovers.max(1) };
    let profile = authority::measure(&case)
        .map_err(|e| Failure::Result(format!("the bench's robot does not run: {e}")))?;
    if json {
        return print_found("authority", &profile);
    }
    print_machine();
    print_authority(&profile);
    Ok(())
}

fn print_authority(p: &AuthorityProfile) {
    say!(
        "{:.2} ms control period, {} drivers, each part in a session of its own on loopback",
        p.period_ms,
        p.drivers
    );
    let row = |name: &str, s: &Spread| {
        say!("  {name:<44} {:>9.3} {:>9.3} {:>9.3} {:>9.3}", s.min, s.p50, s.p99, s.max);
    };
    say!("  {:<44} {:>9} {:>9} {:>9} {:>9}", "", "min", "p50", "p99", "max");
    row("stop confirmed by all (ms)", &p.stop_ms);
    row("  by every driver (ms)", &p.stop_drivers_ms);
    row("round trip to all (ms)", &p.round_trip_ms);
    row("take-over, sample's arrival (control periods)", &p.takeover_periods);
    row("take-over, device to arm (ms)", &p.takeover_end_to_end_ms);
    row("control thread late to wake (ms)", &p.lateness_ms);
    say!(
        "{} stops, {} unconfirmed; p99 {:.3} ms, one control period and the round trip's p99 are {:.3} ms: {}",
        p.stops,
        p.unconfirmed,
        p.stop_ms.p99,
        p.stop_bound_ms,
        if p.stops_in_time() { "within" } else { "beyond" }
    );
    say!("{} take-overs", p.takeovers);
}
