//! Sinew's launch: the launch-file language, the assembly of the parts, and the `sinew` command line.

mod bench_authority;
pub mod bench_cache;
pub mod bench_cost;
mod bench_stream;
pub mod bench_tail;
pub mod bench_verbs;
mod calibrate_exit;
pub mod calibrate_verbs;
pub mod cli;
pub mod film;
pub mod launch_file;
pub mod launch_verbs;
pub mod model_verbs;
pub mod operator_verbs;
pub mod prepare;
mod recorded;
pub mod replay;
pub mod report;
pub mod run;
pub mod supervise;
