//! A client in another language, written from the contract: `tests/python-client`.

use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;

use crate::guest::{expect, socket};

pub fn client() -> Result<(), Failed> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let made = tempfile::tempdir()?;
    let protoc = Command::new("protoc")
        .arg("--proto_path")
        .arg(repository.join("guest-agent/proto"))
        .arg("--python_out")
        .arg(made.path())
        .arg("agent.proto")
        .output()
        .map_err(|error| format!("protoc: {error}; install protobuf-compiler"))?;
    expect(protoc.status.success(), &protoc)?;
    // Debian's own, which has Debian's packages.
    let output = Command::new("/usr/bin/python3")
        .arg(repository.join("tests/python-client/test_client.py"))
        .arg(socket()?)
        .env("PYTHONPATH", made.path())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()?;
    expect(
        output.stdout == b"all well\n",
        String::from_utf8_lossy(&output.stderr),
    )
}
