//! What the host's kernel says of a process (proc_pid_stat(5)).

use std::fs;

/// The fields of a process from the third on: the second may have anything in it.
pub struct ProcStat(String);

impl ProcStat {
    /// Of the process `pid`, if it is there.
    pub fn read(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(')')?;
        Some(Self(rest.to_owned()))
    }

    /// A field, counted as in the manual, from 3.
    pub fn field(&self, number: usize) -> Option<&str> {
        self.0.split_whitespace().nth(number.checked_sub(3)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_fields() {
        let process = |name: &str| {
            let pid = std::process::id();
            fs::write("/proc/self/comm", name).unwrap();
            ProcStat::read(pid).unwrap()
        };
        for name in ["a", "a) b (c", ") R 1"] {
            let stat = process(name);
            let parent = stat.field(4).unwrap().parse();
            assert_eq!(parent, Ok(std::os::unix::process::parent_id()), "{name}");
        }
        assert!(process("a").field(2).is_none());
        assert!(ProcStat::read(u32::MAX).is_none());
    }
}
