//! Tells the binary which compiler it was built with: reports and benches name it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Cargo says which compiler it uses; without an answer the binary says that it does not know.
    let answer = std::env::var_os("RUSTC")
        .and_then(|rustc| std::process::Command::new(rustc).arg("--version").output().ok())
        .and_then(|out| String::from_utf8(out.stdout).ok());
    let version = answer.as_deref().map_or("unknown", str::trim);
    println!("cargo::rustc-env=SINEW_RUSTC={version}");
}
