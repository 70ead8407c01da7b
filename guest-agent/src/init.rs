//! What PID 1 does to make a bare kernel a usable system.
//!
//! In two steps. [`writable_root`] comes before "ready": a program that started above
//! the read-only root could not be moved. [`the_rest`] comes after it, but before the
//! first request is served, so no client can tell. Nothing here is fatal: a guest
//! that lacks something says so on the console and serves all the same.

use std::ffi::{CStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, mkdir, statvfs, symlink};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with};
use rustix::process::{chdir, pivot_root};
use rustix::system::sethostname;

use crate::files::Layers;

/// The agent's own directory.
const HOME: &str = "/root";

/// Where the writable disk stays mounted, for root's eyes only, so that it can be closed in the end.
const UPPER_DISK: &str = "/run/bough/upper";

const HOSTNAME: &str = "bough";

/// What the kernel's command line may change.
#[derive(Default)]
pub struct InitConfig {
    /// A block device with ext4, to keep what the guest writes; without it, that is kept in memory.
    pub upper: Option<PathBuf>,
    /// The guest's host name; "bough" if there is none.
    pub hostname: Option<OsString>,
}

/// Says on the console that something is amiss.
pub fn warn(message: &str) {
    eprintln!("guest-agent: {message}");
}

fn attempt(what: &str, result: Result<(), Errno>) -> bool {
    match result {
        Ok(()) | Err(Errno::EXIST) => true,
        Err(errno) => {
            warn(&format!("{what}: {errno}"));
            false
        }
    }
}

fn mount_fs(kind: &str, target: &str, flags: MountFlags, data: Option<&CStr>) -> bool {
    attempt(target, mount(kind, target, kind, flags, data))
}

/// What has become of the root.
#[derive(Default)]
pub struct Root {
    /// The layer is a disk, which stays mounted below /run.
    pub has_run: bool,
    /// What the root consists of.
    pub layers: Option<Layers>,
}

/// Puts a writable layer above the read-only root, and makes that the root. A root that is writable
/// already is left alone.
pub fn writable_root(config: &InitConfig) -> Root {
    if statvfs("/").is_ok_and(|root| !root.f_flag.contains(StatVfsMountFlags::RDONLY)) {
        return Root::default();
    }
    // The layer's file system is mounted over /run, the one directory that every image has and
    // that is of no use below the layer.
    let disk = config.upper.as_ref().is_some_and(|device| {
        // The device's node is in a file system that only a disk is worth mounting here for.
        mount_fs("devtmpfs", "/dev", MountFlags::NOSUID, None);
        let result = mount(device, "/run", "ext4", MountFlags::NOATIME, None);
        attempt(
            &format!("{} as the writable layer", device.display()),
            result,
        )
    });
    if !disk && !mount_fs("tmpfs", "/run", MountFlags::empty(), Some(c"mode=700")) {
        return Root::default();
    }
    let private = Mode::RWXU;
    let public = private | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
    let made = attempt("mkdir upper", mkdir("/run/upper", public))
        && attempt("mkdir work", mkdir("/run/work", private))
        && attempt("mkdir root", mkdir("/run/root", private));
    let layers = c"lowerdir=/,upperdir=/run/upper,workdir=/run/work";
    if !made || !mount_fs("overlay", "/run/root", MountFlags::empty(), Some(layers)) {
        return Root::default();
    }
    let open = |path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let switch = || -> Result<Layers, Errno> {
        // No name leads there afterwards.
        let layers = Layers {
            upper: open("/run/upper")?,
            image: open("/")?,
        };
        chdir("/run/root")?;
        if disk {
            keep_disk()?;
        }
        // The old root ends up on top of the new one, from where it is taken off.
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")?;
        Ok(layers)
    };
    match switch() {
        Ok(layers) => Root {
            has_run: disk,
            layers: Some(layers),
        },
        Err(errno) => {
            warn(&format!("switch to the writable root: {errno}"));
            Root::default()
        }
    }
}

/// Gives the disk a second mount in the new root, where we are: the first goes with the old root.
fn keep_disk() -> Result<(), Errno> {
    let private = Mode::RWXU;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", "run", "tmpfs", flags, Some(c"mode=755"))?;
    mkdir("run/bough", private)?;
    let target = UPPER_DISK.trim_start_matches('/');
    mkdir(target, private)?;
    mount_bind("/run", target)
}

/// Mounts the devices' nodes; says whether they are there.
pub fn devices() -> bool {
    // The kernel may have mounted devtmpfs below the layer; it is one file system, wherever it shows.
    mount_fs("devtmpfs", "/dev", MountFlags::NOSUID, None)
}

/// Mounts what programs expect, and brings up the host name and the loopback interface.
/// `has_run` says that /run is mounted already, `has_dev` that devices' nodes are.
pub fn the_rest(config: &InitConfig, has_run: bool, has_dev: bool) {
    let common = MountFlags::NOSUID | MountFlags::NOEXEC;
    let safe = common | MountFlags::NODEV;
    let public = Mode::from_raw_mode(0o755);

    if has_dev {
        attempt("mkdir /dev/pts", mkdir("/dev/pts", public));
        attempt("mkdir /dev/shm", mkdir("/dev/shm", public));
        mount_fs(
            "devpts",
            "/dev/pts",
            common,
            Some(c"mode=620,gid=5,ptmxmode=666"),
        );
        mount_fs(
            "tmpfs",
            "/dev/shm",
            MountFlags::NOSUID | MountFlags::NODEV,
            None,
        );
        for (link, target) in [
            ("/dev/fd", "/proc/self/fd"),
            ("/dev/stdin", "fd/0"),
            ("/dev/stdout", "fd/1"),
            ("/dev/stderr", "fd/2"),
        ] {
            attempt(link, symlink(target, link));
        }
    }
    mount_fs("proc", "/proc", safe, None);
    if mount_fs("sysfs", "/sys", safe, None) {
        let data = Some(c"nsdelegate");
        attempt(
            "cgroup2",
            mount("cgroup2", "/sys/fs/cgroup", "cgroup2", safe, data),
        );
    }
    let volatile = MountFlags::NOSUID | MountFlags::NODEV;
    if !has_run {
        mount_fs("tmpfs", "/run", volatile, Some(c"mode=755"));
        attempt("mkdir /run/bough", mkdir("/run/bough", Mode::RWXU));
    }
    mount_fs("tmpfs", "/tmp", volatile, Some(c"mode=1777"));

    let hostname = config
        .hostname
        .as_ref()
        .map_or(HOSTNAME.as_bytes(), |name| name.as_bytes());
    attempt("set the host name", sethostname(hostname));
    attempt("bring lo up", loopback_up());
    if chdir(HOME).is_err() {
        attempt("chdir /", chdir("/"));
    }
}

/// Asks the kernel by rtnetlink(7) to set IFF_UP on interface 1, which is always `lo`.
fn loopback_up() -> Result<(), Errno> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    const LENGTH: u32 = 32;

    let mut message = Vec::with_capacity(32);
    // struct nlmsghdr: length, type, flags, sequence number, port.
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family, padding and type; index; flags; which of them to change.
    message.extend([0; 4]);
    message.extend(1_i32.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());

    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None, // NETLINK_ROUTE is number 0
    )?;
    send(&socket, &message, SendFlags::empty()).map(drop)
}

/// Lets go of the disks, so that their file systems are clean when the guest ends: what programs have mounted is
/// unmounted, the last first; the root and the writable disk under it become read-only.
pub fn close_disks() {
    let mounts = std::fs::read("/proc/self/mounts").unwrap_or_default();
    for target in disk_mounts(&mounts).into_iter().rev() {
        if unmount(&target, UnmountFlags::NOFOLLOW).is_err() {
            // In use, as the disk under the root is.
            let _ = mount_remount(&target, MountFlags::RDONLY, "");
        }
    }
    if mount_remount("/", MountFlags::RDONLY, "").is_ok() {
        // Absent without a writable disk.
        let _ = mount_remount(UPPER_DISK, MountFlags::RDONLY, "");
    }
}

/// Where devices are mounted, but for the root, in the order of the mounts. `mounts` is as in proc_pid_mounts(5).
fn disk_mounts(mounts: &[u8]) -> Vec<PathBuf> {
    let target = |line: &[u8]| {
        let mut words = line.split(|&byte| byte == b' ');
        let (source, target) = (words.next()?, words.next()?);
        (source.starts_with(b"/dev/") && target != b"/").then(|| unescape(target))
    };
    mounts
        .split(|&byte| byte == b'\n')
        .filter_map(target)
        .collect()
}

/// Undoes the kernel's escapes for blanks and backslashes: a backslash and three octal digits.
fn unescape(mut word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    while let Some((&first, rest)) = word.split_first() {
        let escaped = match rest {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(first));
        word = if escaped.is_some() { &rest[3..] } else { rest };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_found_wherever_they_are_mounted() {
        let mounts = b"/dev/root / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/vda /srv/my\\040data\\134 ext4 rw 0 0\n\
            devtmpfs /dev devtmpfs rw 0 0\n/dev/loop0 /srv/my\\040data\\134/in\xffner ext2 rw 0 0\nnonsense\n";
        let outer = PathBuf::from("/srv/my data\\");
        let inner = outer.join(OsString::from_vec(b"in\xffner".to_vec()));
        assert_eq!(disk_mounts(mounts), [outer, inner]);
        assert!(disk_mounts(b"").is_empty());
    }
}
