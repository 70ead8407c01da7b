//! A guest's second disk, with words at its pages and no file system: what is where is known on both sides.

use std::fs;
use std::path::Path;

use libtest_mimic::Failed;
use tests::sandboxes::Host;

/// Runs `dd` as root: a program that starts no other, for where each takes long.
fn dd(host: &Host, name: &str, words: &[&str], input: &str) -> Result<String, Failed> {
    let exec = [
        "exec",
        name,
        "--user",
        "root",
        "--",
        "dd",
        "bs=4096",
        "status=none",
    ];
    let output = host.vmm(&[&exec[..], words].concat()).stdin(input).run()?;
    output.expect_status(0)?;
    Ok(output.stdout)
}

/// Writes a word at a page of the disk.
pub fn write(host: &Host, name: &str, page: u32, word: &str) -> Result<(), Failed> {
    let seek = format!("seek={page}");
    let words = ["of=/dev/vda", &seek, "conv=fsync,notrunc"];
    dd(host, name, &words, word).map(drop)
}

/// Fails unless the disk's first pages have these words, as the device has them.
pub fn expect(host: &Host, name: &str, words: &[&str]) -> Result<(), Failed> {
    let count = format!("count={}", words.len());
    let read = ["if=/dev/vda", "iflag=direct", &count];
    let found = dd(host, name, &read, "")?.replace('\0', "");
    if found == words.concat() {
        return Ok(());
    }
    Err(format!("{name} has {found:?} on its disk, not {words:?}").into())
}

/// Fails unless the file has these words, between zeroes.
pub fn expect_file(disk: &Path, words: &[&str]) -> Result<(), Failed> {
    let mut bytes = fs::read(disk)?;
    bytes.retain(|byte| *byte != 0);
    if bytes == words.concat().as_bytes() {
        return Ok(());
    }
    let found = String::from_utf8_lossy(&bytes);
    Err(format!("the file has {found:?}, not {words:?}").into())
}
