//! For how long a thread has a processor before others have their turn (sched_setattr(2); Linux 6.12 and later, earlier ones take no notice).
//!
//! What serves a machine does little at a time, and has waited for that until a processor of some machine, which always has something to do, was at the end of its slice.
//! With a short slice of its own a thread runs when it is woken, and gets no more than its share all the same.
//!
//! A processor of a machine has the usual one, and on a software KVM a long one. Where many of them want the host's, there the timer of each guest is due again whenever it has its turn: in a slice that is little longer than
//! serving that takes, it gets to nothing else.

/// The shortest slice that Linux knows, in nanoseconds.
const SHORT_NS: u64 = 100_000;
/// A slice in which a guest on a software KVM gets well beyond its timer. Whoever is to stand still may wait for all others to have had theirs.
const LONG_NS: u64 = 10_000_000;

/// Gives the calling thread, and those that it starts, short slices.
pub fn shorten() {
    set(SHORT_NS);
}

/// Gives the calling thread long slices.
pub fn lengthen() {
    set(LONG_NS);
}

/// Gives the calling thread the slices that the host gives by default.
pub fn reset() {
    set(0);
}

/// How the calling thread is scheduled.
fn attributes() -> Option<libc::sched_attr> {
    // SAFETY: a structure of integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0);
    // SAFETY: the kernel writes no more than `size` bytes, which the structure has.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    (got >= 0).then_some(attributes)
}

/// A host that refuses is one that is slower.
fn set(ns: u64) {
    let usual = libc::SCHED_OTHER.unsigned_abs();
    let Some(mut attributes) = attributes().filter(|now| now.sched_policy == usual) else {
        return;
    };
    // All else stays as it is.
    attributes.sched_flags &= u64::from(libc::SCHED_FLAG_RESET_ON_FORK.unsigned_abs());
    attributes.sched_runtime = ns;
    // SAFETY: the kernel reads the structure, of the size that it says.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn what_a_thread_starts_has_short_slices_until_it_has_others() {
        let ns = || attributes().unwrap().sched_runtime;
        let usual = ns();
        let of_started = thread::spawn(move || {
            shorten();
            let started = thread::spawn(move || {
                let inherited = ns();
                lengthen();
                let long = ns();
                reset();
                (inherited, long, ns())
            });
            (ns(), started.join().unwrap())
        });
        let (own, (inherited, long, reset)) = of_started.join().unwrap();
        // A kernel before 6.12 has none to tell of.
        if usual > 0 {
            assert_eq!((own, inherited, long), (SHORT_NS, SHORT_NS, LONG_NS));
            assert_eq!(reset, usual);
            assert!(usual > SHORT_NS);
        }
    }
}
