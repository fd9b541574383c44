//! What the tests of the `sinew` command share.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::path::Path;
use std::process::Command;

/// A launch file without mistakes, as long as `policy.gguf` beside it can be loaded.
pub const BASE: &str = r#"
[args]
policy = { type = "path", default = "policy.gguf", help = "the policy" }
seed = { type = "integer", default = 1 }
rate = { type = "frequency", default = "100 Hz" }

[robot]
name = "desk"
driver = "sim"        # arm
state_rate = "100 Hz"
watchdog = "200 ms"
seed = "$seed"

[cameras.front]
driver = "sim"
size = [96, 96]
rate = "20 Hz"

[cameras.wrist]
driver = "sim"
size = [96, 96]
rate = "20 Hz"

[policy]
file = "$policy"
cameras = { front = "front", wrist = "wrist" }
max_observation_age = "250 ms"

[control]
rate = "$rate"
realtime = "off"
state_timeout = "250 ms"

[transport]
endpoint = "tcp/127.0.0.1:7447"
"#;

/// What a run of `sinew` said.
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// A user's mistake is told in one paragraph: no panic, no backtrace, no empty line.
    pub fn assert_one_paragraph(&self) {
        for sign in ["panicked", "backtrace", "\n\n"] {
            assert!(!self.stderr.trim_end().contains(sign), "{}", self.stderr);
        }
    }
}

/// Runs `sinew` with `arguments` to its end.
pub fn sinew(arguments: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_sinew"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .expect("the command was built for this test");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Output {
        code: output.status.code().expect("the command ends by itself"),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

/// The line (from 1) of `text` that holds `part`.
pub fn line_of(text: &str, part: &str) -> usize {
    1 + text.lines().position(|line| line.contains(part)).expect("the part is in the text")
}

/// An endpoint that nobody listens at, and its port.
pub fn free_endpoint() -> (String, u16) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("some port is free");
    let port = listener.local_addr().expect("it is bound").port();
    (format!("tcp/127.0.0.1:{port}"), port)
}

/// A temporary folder with a `policy.gguf` that exists but is no policy.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        let folder = Self(tempfile::tempdir().expect("a temporary folder"));
        folder.write("policy.gguf", b"");
        folder
    }

    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    pub fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.0.path().join(name), content).expect("the folder can be written");
    }

    /// Writes `text` as the launch file; its path.
    pub fn launch_file(&self, text: &str) -> String {
        self.write("launch.toml", text.as_bytes());
        self.path("launch.toml")
    }

    pub fn as_path(&self) -> &Path {
        self.0.path()
    }
}
