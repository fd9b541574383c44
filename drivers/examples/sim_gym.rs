//! Steps simulated arms for training over stdin and stdout: `sim_gym --envs 32 --size 96`.
//!
//! The protocol is that of `sinew_drivers::sim::gym`.

use std::process::ExitCode;

use sinew_drivers::sim::ArmDescription;
use sinew_drivers::sim::gym::{GymConfig, serve};

fn config() -> Result<GymConfig, String> {
    let mut config = GymConfig { envs: 8, size: 96, arm: ArmDescription::desk_arm() };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("`{name}` needs a value"))?;
        let number = || match value.parse::<usize>() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(format!("`{name} {value}`: a whole number above zero is expected")),
        };
        match name.as_str() {
            "--envs" => config.envs = number()?,
            "--size" => config.size = number()?,
            "--arm" => {
                config.arm =
                    ArmDescription::from_file(value.as_ref()).map_err(|error| error.to_string())?;
            }
            _ => return Err(format!("unknown argument `{name}`; known are --envs, --size, --arm")),
        }
    }
    Ok(config)
}

fn main() -> ExitCode {
    let run = config().and_then(|config| {
        serve(std::io::stdin().lock(), std::io::stdout().lock(), &config).map_err(|e| e.to_string())
    });
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sim_gym: {error}");
            ExitCode::FAILURE
        }
    }
}
