//! What the failure tests share: real `sinew` processes on a bus of their own, and signals to them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// A part may take this long to do what it must do; the tests wait for facts, not for times.
pub const PATIENCE: Duration = Duration::from_secs(30);

static MACHINE: Mutex<()> = Mutex::new(());

/// Where each part runs in a test.
#[derive(Clone, Copy)]
pub struct Setup {
    /// Lines that are added to a table: its name and the lines.
    pub add: &'static [(&'static str, &'static str)],
    /// The front camera is a test pattern in a process of its own.
    pub pattern: bool,
}

/// Everything in one process, unless a test says otherwise.
pub const ONE_PROCESS: Setup = Setup { add: &[], pattern: false };
/// The policy is a supervised process.
pub const POLICY: Setup = Setup { add: &[("policy", "run = \"process\"")], pattern: false };
/// The arm, with the simulator, is a supervised process.
pub const ARM: Setup = Setup { add: &[("robot", "run = \"process\"")], pattern: false };
/// The front camera is a supervised process.
pub const CAMERA: Setup = Setup { add: &[("cameras.front", "run = \"process\"")], pattern: true };

/// The runtime is patient: a busy machine that holds a process up for a while is not the failure that is tested.
const LAUNCH: &str = r#"
[robot]
name = "desk"
driver = "sim"
state_rate = "100 Hz"
watchdog = "200 ms"
seed = 1

[cameras.front]
driver = "FRONT"
size = [96, 96]
rate = "20 Hz"

[cameras.wrist]
driver = "sim"
size = [96, 96]
rate = "20 Hz"

[policy]
file = "POLICY"
cameras = { front = "front", wrist = "wrist" }
max_observation_age = "1 s"

[control]
rate = "100 Hz"
realtime = "off"
state_timeout = "1 s"

[transport]
endpoint = "ENDPOINT"
"#;

/// A launch under test: its file, its processes, and the machine to itself.
pub struct Launch {
    folder: tempfile::TempDir,
    pub endpoint: String,
    processes: Vec<(String, Child)>,
    _machine: MutexGuard<'static, ()>,
}

impl Launch {
    /// A launch as `setup` says, on a free port of loopback.
    pub fn new(setup: Setup) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let endpoint = format!("tcp/{}", port.local_addr().expect("it is bound"));
        Self::at(endpoint, setup)
    }

    /// A launch as `setup` says, at `endpoint`.
    pub fn at(endpoint: String, setup: Setup) -> Self {
        // A test that failed says nothing about the next one.
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/demo.q8_0.gguf");
        let text = LAUNCH
            .replace("ENDPOINT", &endpoint)
            .replace("POLICY", &policy.display().to_string())
            .replace("FRONT", if setup.pattern { "pattern" } else { "sim" });
        std::fs::write(folder.path().join("launch.toml"), text).expect("the folder is writable");
        let launch = Self { folder, endpoint, processes: Vec::new(), _machine: machine };
        for (table, lines) in setup.add {
            launch.add(table, lines);
        }
        launch
    }

    /// The file `name` in the launch's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command that launches the file, with `arguments`.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sinew"));
        command.arg("launch").arg(self.path("launch.toml")).arg("--headless").args(arguments);
        command
    }

    /// Starts the parts that `arguments` say, as `name`; their process.
    pub fn start(&mut self, name: &str, arguments: &[&str]) -> u32 {
        let command = self.command(arguments);
        self.spawn(name, command)
    }

    /// A patient driver too, for tests of what must not interrupt a run.
    pub fn relax(&self) {
        let launch = self.path("launch.toml");
        let text = std::fs::read_to_string(&launch).expect("it was written");
        let text = text.replace("\"200 ms\"", "\"600 ms\"");
        std::fs::write(launch, text).expect("the folder is writable");
    }

    /// Adds `line` to `table`.
    pub fn add(&self, table: &str, line: &str) {
        let launch = self.path("launch.toml");
        let text = std::fs::read_to_string(&launch).expect("it was written");
        let header = format!("[{table}]\n");
        assert!(text.contains(&header), "no table {header}");
        let text = text.replace(&header, &format!("{header}{line}\n"));
        std::fs::write(launch, text).expect("the folder is writable");
    }

    /// Replaces the policy's file.
    pub fn replace(&self, file: &str, by: &Path) {
        let launch = self.path("launch.toml");
        let text = std::fs::read_to_string(&launch).expect("it was written");
        let line = text.lines().find(|l| l.contains(file)).expect("it is named");
        let text = text.replace(line, &format!("file = \"{}\"", by.display()));
        std::fs::write(launch, text).expect("the folder is writable");
    }

    /// `name` has ended: it is no process of this launch any more.
    pub fn forget(&mut self, name: &str) {
        let at = self.processes.iter().position(|p| p.0 == name).expect("it was started");
        let (_, mut child) = self.processes.remove(at);
        child.wait().expect("it is a child");
    }

    /// Starts the process that runs the control thread, with a report.
    pub fn start_control(&mut self, arguments: &[&str]) -> u32 {
        let report = self.path("report.json").display().to_string();
        self.start("control", &[&["--json", &report], arguments].concat())
    }

    /// As [`Self::start_control`], by the command that `dress` makes of it.
    pub fn start_control_by(
        &mut self,
        arguments: &[&str],
        dress: impl Fn(&Command) -> Command,
    ) -> u32 {
        let report = self.path("report.json").display().to_string();
        let command = self.command(&[&["--json", &report], arguments].concat());
        self.spawn("control", dress(&command))
    }

    /// Starts `command` as `name`, logging to `name`.log.
    fn spawn(&mut self, name: &str, mut command: Command) -> u32 {
        let log = std::fs::File::create(self.path(&format!("{name}.log"))).expect("a log file");
        command.env("RUST_LOG", "info,zenoh=error").stdout(Stdio::null()).stderr(log);
        let child = command.spawn().expect("the command was built for this test");
        let process = child.id();
        self.processes.push((name.to_owned(), child));
        process
    }

    /// Ends the control process as Ctrl-C does; what it reported.
    pub fn finish(&mut self) -> serde_json::Value {
        let at = self.processes.iter().position(|p| p.0 == "control").expect("it was started");
        let (_, mut control) = self.processes.remove(at);
        signal(control.id(), Signal::INT);
        let end = Instant::now() + PATIENCE;
        while control.try_wait().expect("it is a child").is_none() {
            assert!(Instant::now() < end, "the run does not end\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.report()
    }

    /// What the control process reported, which has ended by itself.
    pub fn report(&self) -> serde_json::Value {
        let text = std::fs::read_to_string(self.path("report.json")).unwrap_or_default();
        let report = serde_json::from_str(&text);
        report.unwrap_or_else(|e| panic!("no report ({e})\n{}", self.logs()))
    }

    /// Waits for the control process to end by itself; its exit code.
    pub fn wait_end(&mut self) -> Option<i32> {
        let at = self.processes.iter().position(|p| p.0 == "control").expect("it was started");
        let mut status = None;
        wait_until("the end of the launch", || {
            status = self.processes[at].1.try_wait().expect("it is a child");
            status.is_some()
        });
        status.and_then(|s| s.code())
    }

    /// What all processes said.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        let files = std::fs::read_dir(self.folder.path()).expect("the folder is there").flatten();
        for file in files.filter(|f| f.path().extension().is_some_and(|e| e == "log")) {
            let text = std::fs::read_to_string(file.path()).unwrap_or_default();
            all += &format!("--- {}\n{text}", file.path().display());
        }
        all
    }

    /// No process may have panicked, whatever came.
    pub fn assert_no_panic(&self) {
        let logs = self.logs();
        assert!(!logs.contains("panicked"), "{logs}");
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        for (_, child) in &mut self.processes {
            signal(child.id(), Signal::CONT);
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// Sends `signal` to `process`.
pub fn signal(process: u32, signal: Signal) {
    let process = Pid::from_raw(process as i32).expect("a process has a number");
    // It may have ended by itself.
    let _ = rustix::process::kill_process(process, signal);
}

/// Whether `process` still runs.
pub fn runs(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // Its state stands behind the name in parentheses; a zombie runs no more.
    status.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Waits until `done`.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
