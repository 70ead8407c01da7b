//! Memory of a process, as the host counts it (/proc).

use std::fs::read_to_string;

/// Resident memory of this process, in bytes; 0 where the host does not tell.
pub fn resident_bytes() -> u64 {
    let statm = read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.map_or(0, |pages: u64| {
        pages.saturating_mul(rustix::param::page_size() as u64)
    })
}

/// Memory of the process `pid` that no other has, in bytes; 0 where the host does not tell.
pub fn private_bytes(pid: u32) -> u64 {
    let rollup = read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let private = |line: &str| {
        let (name, amount) = line.split_once(':')?;
        let kib = amount.trim().strip_suffix(" kB")?;
        let kib: Option<u64> = kib.parse().ok();
        kib.filter(|_| name.starts_with("Private_"))
    };
    let kib: u64 = rollup.lines().filter_map(private).sum();
    kib.saturating_mul(1024)
}
