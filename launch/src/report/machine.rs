//! The computer that a figure was measured on.

use serde::Serialize;
use sinew_models::kernels::Isa;

/// The computer that a run was made on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processor.
    pub cpu: String,
    /// Its cores, as many as this process may use.
    pub cores: usize,
    /// Instruction set that the kernels use.
    pub isa: &'static str,
    /// Memory (GB).
    pub memory_gb: f64,
    /// Threads that wanted a core, on average over the last minute, those of the run included.
    pub load: f64,
    /// Operating system's kernel.
    pub kernel: String,
    /// Where the operating system reads the time.
    pub clock_source: String,
    /// Compiler of this binary.
    pub compiler: &'static str,
}

impl Machine {
    /// This computer. What the system does not tell is `unknown`, or zero.
    pub fn this() -> Self {
        let read = |path: &str| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            if text.trim().is_empty() { "unknown".to_owned() } else { text.trim().to_owned() }
        };
        let cpu = value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".into());
        let memory = value(&read("/proc/meminfo"), "MemTotal");
        // "16384 kB"
        let kibibytes = memory.and_then(|m| first(&m));
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, Into::into),
            isa: Isa::current().name(),
            memory_gb: (kibibytes.unwrap_or(0.0) * 1024e-9 * 10.0).round() / 10.0,
            load: first(&read("/proc/loadavg")).unwrap_or(0.0),
            kernel: read("/proc/sys/kernel/osrelease"),
            clock_source: read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            compiler: env!("SINEW_RUSTC"),
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, cores, isa, memory_gb, load, kernel, clock_source, compiler } = self;
        write!(
            f,
            "{cpu}, {cores} cores, {isa}, {memory_gb} GB, load {load}, Linux {kernel}, clock {clock_source}, {compiler}"
        )
    }
}

/// What stands after the colon in the line that begins with `key`.
fn value(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The number that `text` begins with.
fn first(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_by_its_key() {
        let text = "MemTotal:       16384 kB\nMemFree: 1 kB\nmodel name\t: A: B\n";
        assert_eq!(value(text, "MemTotal").as_deref(), Some("16384 kB"));
        assert_eq!(value(text, "model name").as_deref(), Some("A: B"));
        assert_eq!(value(text, "Swap"), None);
        assert_eq!(
            (first("16384 kB"), first("0.5 1 2"), first("unknown")),
            (Some(16384.0), Some(0.5), None)
        );
    }

    #[test]
    fn this_machine_names_its_compiler_and_instruction_set() {
        let machine = Machine::this();
        assert!(machine.compiler.starts_with("rustc "), "{}", machine.compiler);
        assert!(machine.cores >= 1 && Isa::from_name(machine.isa).is_some());
        assert!(machine.to_string().contains(machine.compiler));
    }
}
