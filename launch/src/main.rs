//! The `sinew` command. Results go to stdout, the rest to stderr.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = sinew_launch::cli::Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    match cli.run() {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("sinew: {failure}");
            failure.exit_code()
        }
    }
}
