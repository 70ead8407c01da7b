//! Links the unwinder into the monitor, where the C compiler has it to link: as a shared library it costs each process 0.15 ms and two pages of its own.

use std::env::{self, var_os};
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC_LINKER");
    // For another target, `cc` need not be what links.
    let is_ours = var_os("HOST") == var_os("TARGET");
    if !is_ours || env::var("CARGO_CFG_TARGET_ENV").as_deref() != Ok("gnu") {
        return;
    }
    let linker = var_os("RUSTC_LINKER").unwrap_or_else(|| "cc".into());
    let asked = Command::new(linker)
        .arg("-print-file-name=libgcc_eh.a")
        .output();
    let said = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let path = said.unwrap_or_default();
    let library = Path::new(path.trim());
    // One that does not have it says its name alone.
    if let Some(dir) = library
        .parent()
        .filter(|_| library.is_absolute() && library.is_file())
    {
        println!("cargo::rustc-link-search=native={}", dir.display());
        println!("cargo::rustc-link-lib=static:-bundle=gcc_eh");
    }
}
