//! Who a request runs as: names and numbers to ids, and becoming them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use guest_agent::proto::ErrorCode;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::failure::Failure;

/// The user that the image has for code without privileges.
const DEFAULT_NAME: &str = "user";
const DEFAULT_ID: u32 = 1000;
const DEFAULT_HOME: &str = "/home/user";

/// How much of `/etc/passwd` and `/etc/group` is looked at: the guest can write them.
const MAX_FILE: u64 = 1 << 20;

/// A user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// The name, for USER.
    pub name: String,
    /// The home directory.
    pub home: PathBuf,
    /// The shell, for SHELL.
    pub shell: OsString,
}

impl Identity {
    fn known(uid: u32, name: &str, home: &str) -> Self {
        Self {
            uid,
            gid: uid,
            groups: Vec::new(),
            name: name.into(),
            home: home.into(),
            shell: "/bin/sh".into(),
        }
    }

    /// The user that a request names. `None` for whoever runs the agent, if that is not PID 1.
    ///
    /// # Errors
    /// There is no such user.
    pub fn resolve(user: &str, is_init: bool) -> Result<Option<Self>, Failure> {
        // The two that every image has need no files: each read costs a guest some time.
        match user {
            "" if !is_init => Ok(None),
            "" | DEFAULT_NAME if is_init => {
                Ok(Some(Self::known(DEFAULT_ID, DEFAULT_NAME, DEFAULT_HOME)))
            }
            "root" | "0" | "0:0" => Ok(Some(Self::known(0, "root", "/root"))),
            _ => {
                let passwd = lines("/etc/passwd");
                let found = find(user, passwd, || lines("/etc/group"));
                let unknown = || {
                    Failure::new(
                        ErrorCode::NoSuchUser,
                        format!("there is no user {user:?} in /etc/passwd"),
                    )
                };
                found.map(Some).ok_or_else(unknown)
            }
        }
    }

    /// The ids of files that are made for this user by root.
    pub fn ids(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Becomes this user, for good. Allocates nothing, so that it can be called in a child that
    /// shares the agent's memory; `groups` is [`Self::group_ids`].
    ///
    /// # Errors
    /// Those of setgroups(2) and setresuid(2).
    pub fn assume(&self, groups: &[Gid]) -> Result<(), Errno> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(groups)?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)
    }

    /// The supplementary groups.
    pub fn group_ids(&self) -> Vec<Gid> {
        self.groups.iter().map(|&gid| Gid::from_raw(gid)).collect()
    }
}

fn lines(path: &str) -> Vec<Vec<u8>> {
    let file = std::fs::File::open(path).ok();
    let reader = file.map(|file| BufReader::new(file.take(MAX_FILE)));
    let lines = reader.into_iter().flat_map(|reader| reader.split(b'\n'));
    lines.map_while(Result::ok).collect()
}

fn number(text: &[u8]) -> Option<u32> {
    // -1 means "leave it" to the kernel, so it is nobody's id.
    let number = std::str::from_utf8(text).ok()?.parse().ok()?;
    (number != u32::MAX).then_some(number)
}

/// Finds a user by name or "uid[:gid]".
fn find(
    user: &str,
    passwd: impl IntoIterator<Item = Vec<u8>>,
    group: impl FnOnce() -> Vec<Vec<u8>>,
) -> Option<Identity> {
    let (first, gid) = match user.split_once(':') {
        Some((first, gid)) => (first, Some(number(gid.as_bytes())?)),
        None => (user, None),
    };
    let uid = number(first.as_bytes());
    let entry = passwd.into_iter().find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b':').collect();
        let &[name, _, id, group, _, home, shell] = fields.as_slice() else {
            return None;
        };
        let id = number(id)?;
        let wanted = match uid {
            Some(uid) => uid == id,
            None => name == first.as_bytes(),
        };
        wanted.then(|| Identity {
            uid: id,
            gid: number(group).unwrap_or(id),
            groups: Vec::new(),
            name: String::from_utf8_lossy(name).into_owned(),
            home: OsString::from_vec(home.to_vec()).into(),
            shell: match shell {
                b"" => "/bin/sh".into(),
                shell => OsString::from_vec(shell.to_vec()),
            },
        })
    });
    let mut identity = match (entry, uid) {
        (Some(identity), _) => identity,
        (None, Some(uid)) => Identity::known(uid, first, "/"),
        (None, None) => return None,
    };
    match gid {
        Some(gid) => identity.gid = gid,
        None if identity.uid != 0 => {
            identity.groups = groups_of(identity.name.as_bytes(), group());
        }
        None => {}
    }
    Some(identity)
}

/// The groups that have this member.
fn groups_of(name: &[u8], group: Vec<Vec<u8>>) -> Vec<u32> {
    let groups = group.iter().filter_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b':').collect();
        let &[_, _, gid, members] = fields.as_slice() else {
            return None;
        };
        let is_member = members.split(|&byte| byte == b',').any(|m| m == name);
        number(gid).filter(|_| is_member)
    });
    // NGROUPS_MAX
    groups.take(65_536).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(user: &str) -> Option<Identity> {
        let split = |text: &str| -> Vec<Vec<u8>> {
            text.lines().map(|line| line.as_bytes().to_vec()).collect()
        };
        find(
            user,
            split(
                "root:x:0:0::/root:/bin/bash\nbroken:x\nbad:x:-1:7::/:\nann:x:7:8:Ann:/home/ann:\n",
            ),
            || split("wheel:x:10:bob,ann\nother:x:11:anna\nmore:x:12:ann"),
        )
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let ann = find_in("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, &ann.groups[..]), (7, 8, &[10, 12][..]));
        assert_eq!(ann.home, PathBuf::from("/home/ann"));
        assert_eq!(ann.shell, "/bin/sh");
        assert_eq!(find_in("7").unwrap(), ann);
        let other = find_in("7:99").unwrap();
        assert_eq!((other.gid, other.groups.len()), (99, 0));
        let stranger = find_in("4711").unwrap();
        assert_eq!((stranger.uid, stranger.gid), (4711, 4711));
        assert_eq!(stranger.home, PathBuf::from("/"));
    }

    #[test]
    fn nobody_is_made_up() {
        for name in [
            "broken",
            "bad",
            "Ann",
            "4294967295",
            "-1",
            "7:",
            "7:x",
            "ann:",
            ":",
        ] {
            assert_eq!(find_in(name), None, "{name}");
        }
    }
}
