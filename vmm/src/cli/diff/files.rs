//! How the files of two guests differ, by what each has written above its image.
//!
//! What both have from before they parted is the same entry of the same file system, down to its inode and the nanosecond of its last
//! change, and is equal without being read. A clock that ticks rarely gives two changes one time, so around the moment at which they
//! parted that is not believed. The guests are hostile: what they say is compared and shown, nothing more.

use std::ops::RangeInclusive;

use serde::{Serialize, Serializer};

use crate::agent::{InImage, Upper, UpperEntry, UpperKind};

/// How long before and after the moment of a branch an equal time means nothing, in nanoseconds.
const DOUBT_NS: i64 = 2_000_000_000;

/// What every guest has of its own, and is given by the monitor.
const IDENTITY: &[u8] = b"/etc/machine-id";

/// How a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// It is in the second only.
    Added,
    /// It is in both, and another.
    Changed,
    /// It is in the first only.
    Deleted,
    /// It was written to, and is what it was.
    Touched,
}

impl Change {
    /// The letter that stands for it.
    pub fn letter(self) -> char {
        match self {
            Self::Added => 'A',
            Self::Changed => 'C',
            Self::Deleted => 'D',
            Self::Touched => 'T',
        }
    }
}

/// A file that differs.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct FileChange {
    /// How.
    pub change: Change,
    /// Which.
    pub path: GuestPath,
}

/// A path of a guest, which may be any bytes but NUL.
#[derive(Debug, PartialEq, Eq)]
pub struct GuestPath(pub Vec<u8>);

impl GuestPath {
    /// It as a word of the shell's: as it is, or in quotes that hide what a terminal or a shell would take for something else.
    pub fn quoted(&self) -> String {
        let is_plain = |c: char| c.is_alphanumeric() || "/._-+,:=@%".contains(c);
        match std::str::from_utf8(&self.0) {
            Ok(text) if text.chars().all(is_plain) => text.to_owned(),
            _ => format!("$'{}'", self.0.escape_ascii()),
        }
    }
}

/// JSON has no bytes: a path that is no text is given as the shell's word for it.
impl Serialize for GuestPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.serialize_str(&self.quoted()),
        }
    }
}

/// What a guest has under a path.
#[derive(Clone, Copy)]
enum Shown<'a> {
    Nothing,
    /// What its image has, if that has anything.
    Image,
    Own(&'a UpperEntry),
}

fn shown<'a>(upper: &'a Upper, path: &[u8]) -> Shown<'a> {
    if let Some(entry) = upper.entries.get(path) {
        return match entry.kind() {
            UpperKind::Removed => Shown::Nothing,
            _ => Shown::Own(entry),
        };
    }
    // The nearest directory above that is in the layer says whether the image shows through; all above that one are in it, too.
    let mut above = path;
    while let Some(end) = above.iter().rposition(|&byte| byte == b'/') {
        above = above.get(..end).unwrap_or_default();
        if let Some(entry) = upper.entries.get(above) {
            return match entry.kind() == UpperKind::Directory && !entry.opaque {
                true => Shown::Image,
                false => Shown::Nothing,
            };
        }
    }
    Shown::Image
}

/// What a guest has changed of its image.
pub fn since_image(upper: &Upper) -> Vec<FileChange> {
    let entries = upper.entries.values();
    let changes = entries.filter(|entry| entry.path != IDENTITY);
    let changes = changes.filter_map(|entry| {
        let change = match (entry.kind(), entry.in_image()) {
            (_, InImage::Same) => return None,
            (UpperKind::Removed, _) => Change::Deleted,
            (_, InImage::No) => Change::Added,
            (_, InImage::Other) => Change::Changed,
        };
        let path = GuestPath(entry.path.clone());
        Some(FileChange { change, path })
    });
    changes.collect()
}

/// How `b` differs from `a`, which parted at one of `moments` (seconds since 1970) if they did. `is_equal` compares the content of two
/// regular files of one size.
pub fn compare<E>(
    a: &Upper,
    b: &Upper,
    moments: &[u64],
    mut is_equal: impl FnMut(&UpperEntry) -> Result<bool, E>,
) -> Result<Vec<FileChange>, E> {
    let doubts: Vec<_> = moments.iter().map(|&at| around(at)).collect();
    let mut changes = Vec::new();
    let paths = a.entries.keys();
    let others = b
        .entries
        .keys()
        .filter(|&path| !a.entries.contains_key(path));
    let mut paths: Vec<_> = paths
        .chain(others)
        .filter(|&path| path != IDENTITY)
        .collect();
    paths.sort_unstable();
    for path in paths {
        let change = match (shown(a, path), shown(b, path)) {
            (Shown::Own(a), Shown::Own(b)) => between(a, b, &doubts, &mut is_equal)?,
            (Shown::Own(own), Shown::Image) => against_image(own, Change::Deleted),
            (Shown::Image, Shown::Own(own)) => against_image(own, Change::Added),
            (Shown::Own(_) | Shown::Image, Shown::Nothing) => Some(Change::Deleted),
            (Shown::Nothing, Shown::Own(_) | Shown::Image) => Some(Change::Added),
            (Shown::Nothing, Shown::Nothing) | (Shown::Image, Shown::Image) => None,
        };
        changes.extend(change.map(|change| FileChange {
            change,
            path: GuestPath(path.clone()),
        }));
    }
    Ok(changes)
}

fn around(at: u64) -> RangeInclusive<i64> {
    let second = i64::try_from(at).unwrap_or(i64::MAX);
    let at = second.saturating_mul(1_000_000_000);
    at.saturating_sub(DOUBT_NS)..=at.saturating_add(1_000_000_000 + DOUBT_NS)
}

/// What one guest has written where the other shows its image: `new` if the image has nothing there.
fn against_image(own: &UpperEntry, new: Change) -> Option<Change> {
    match own.in_image() {
        InImage::No => Some(new),
        InImage::Other => Some(Change::Changed),
        InImage::Same => None,
    }
}

fn between<E>(
    a: &UpperEntry,
    b: &UpperEntry,
    doubts: &[RangeInclusive<i64>],
    is_equal: &mut impl FnMut(&UpperEntry) -> Result<bool, E>,
) -> Result<Option<Change>, E> {
    let what = |of: &UpperEntry| (of.kind, of.mode, of.uid, of.gid);
    if what(a) != what(b) || a.target != b.target {
        return Ok(Some(Change::Changed));
    }
    let identity = |of: &UpperEntry| (of.inode, of.ctime_ns, of.mtime_ns);
    let is_same = identity(a) == identity(b);
    Ok(match a.kind() {
        // Its times change with what is in it, which is told by itself.
        UpperKind::Directory => (a.opaque != b.opaque).then_some(Change::Changed),
        UpperKind::File if a.size != b.size => Some(Change::Changed),
        UpperKind::File => {
            let is_doubtful = doubts.iter().any(|doubt| doubt.contains(&a.ctime_ns));
            match is_same {
                true if !is_doubtful => None,
                _ if !is_equal(a)? => Some(Change::Changed),
                true => None,
                false => Some(Change::Touched),
            }
        }
        UpperKind::Symlink => (!is_same).then_some(Change::Touched),
        _ => (!is_same).then_some(Change::Changed),
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn entry(path: &str, kind: UpperKind, inode: u64, in_image: InImage) -> UpperEntry {
        UpperEntry {
            path: path.into(),
            kind: kind.into(),
            size: 5,
            inode,
            ctime_ns: 9_000_000_000,
            in_image: in_image.into(),
            ..UpperEntry::default()
        }
    }

    fn upper(entries: &[UpperEntry]) -> Upper {
        Upper {
            entries: entries
                .iter()
                .map(|entry| (entry.path.clone(), entry.clone()))
                .collect(),
            is_cut: false,
        }
    }

    fn told(a: &[UpperEntry], b: &[UpperEntry], moments: &[u64], equal: bool) -> String {
        let same = |_: &UpperEntry| Ok::<_, Infallible>(equal);
        let Ok(changes) = compare(&upper(a), &upper(b), moments, same);
        let line = |of: &FileChange| format!("{} {} ", of.change.letter(), of.path.quoted());
        changes.iter().map(line).collect()
    }

    #[test]
    fn files_of_one_only() {
        use UpperKind::{Directory, File, Removed};
        let etc = entry("/etc", Directory, 1, InImage::Same);
        let a = [
            etc.clone(),
            entry("/etc/a", File, 2, InImage::No),
            entry("/etc/gone", Removed, 0, InImage::Other),
            entry("/opened", File, 4, InImage::Same),
        ];
        let b = [
            etc,
            entry("/etc/b", File, 2, InImage::No),
            entry("/etc/hosts", File, 3, InImage::Other),
        ];
        assert_eq!(
            told(&a, &b, &[], false),
            "D /etc/a A /etc/b A /etc/gone C /etc/hosts "
        );
    }

    #[test]
    fn what_is_hidden_above_counts() {
        use UpperKind::{Directory, File, Removed};
        let mut opaque = entry("/opt", Directory, 1, InImage::Same);
        opaque.opaque = true;
        let a = [entry("/usr", Removed, 0, InImage::Other), opaque];
        let b = [
            entry("/opt", Directory, 1, InImage::Same),
            entry("/opt/old", File, 2, InImage::Other),
            entry("/usr", Directory, 3, InImage::Same),
            entry("/usr/lib", Directory, 4, InImage::Same),
        ];
        assert_eq!(
            told(&a, &b, &[], false),
            "C /opt A /opt/old A /usr A /usr/lib "
        );
    }

    #[test]
    fn files_of_both_are_read_only_where_they_must() {
        let file = |inode| [entry("/tmp/f", UpperKind::File, inode, InImage::No)];
        assert_eq!(told(&file(1), &file(1), &[], false), "");
        assert_eq!(told(&file(1), &file(2), &[], true), "T /tmp/f ");
        assert_eq!(told(&file(1), &file(2), &[], false), "C /tmp/f ");
        // They were written about when the two parted.
        assert_eq!(told(&file(1), &file(1), &[10], false), "C /tmp/f ");
        assert_eq!(told(&file(1), &file(1), &[10], true), "");
        assert_eq!(told(&file(1), &file(1), &[12], false), "");
        let mut longer = file(1);
        longer[0].size = 6;
        assert_eq!(told(&file(1), &longer, &[], true), "C /tmp/f ");
        let own = [entry("/etc/machine-id", UpperKind::File, 1, InImage::No)];
        assert_eq!(told(&own, &[], &[], true), "");
    }

    #[test]
    fn what_an_image_had() {
        let upper = upper(&[
            entry("/a", UpperKind::File, 1, InImage::No),
            entry("/b", UpperKind::Removed, 0, InImage::Other),
            entry("/c", UpperKind::File, 1, InImage::Other),
            entry("/d", UpperKind::Directory, 1, InImage::Same),
        ]);
        let changes = since_image(&upper);
        let letters: String = changes.iter().map(|of| of.change.letter()).collect();
        assert_eq!(letters, "ADC");
    }

    #[test]
    fn odd_names_do_no_harm() {
        let quoted = |bytes: &[u8]| GuestPath(bytes.to_vec()).quoted();
        assert_eq!(quoted(b"/a-b/c.d"), "/a-b/c.d");
        assert_eq!(quoted("/é".as_bytes()), "/é");
        assert_eq!(quoted(b"/a b"), "$'/a b'");
        assert_eq!(quoted(b"/a'\"\n\x1b[m\xff"), "$'/a\\'\\\"\\n\\x1b[m\\xff'");
        let json = serde_json::to_string(&GuestPath(b"/\xff".to_vec())).unwrap();
        assert_eq!(json, "\"$'/\\\\xff'\"");
    }
}
