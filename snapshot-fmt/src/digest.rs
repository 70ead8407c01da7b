//! Digests: BLAKE3, whole for files and snapshots, the first half for pages.
//!
//! A page's hash has 16 bytes: 2^128 tries to forge the content of a page, 2^64 to make two pages that pass for each
//! other, which serves nobody: who can choose both may as well write either.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::Page;

/// Bytes of a [`Digest`].
pub const DIGEST_LEN: usize = 32;
/// Bytes of a [`PageHash`].
pub const PAGE_HASH_LEN: usize = 16;

/// A BLAKE3 digest. As text: 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; DIGEST_LEN]);

/// A text is no digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a digest has 64 lower-case hexadecimal digits")]
pub struct DigestError;

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // One text per digest: the ids of snapshots are names of directories.
        if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(DigestError);
        }
        let hash = blake3::Hash::from_hex(text).map_err(|_| DigestError)?;
        Ok(Self(hash.into()))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A page's hash: the first half of its BLAKE3 digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub [u8; PAGE_HASH_LEN]);

impl PageHash {
    /// The hash of `page`.
    pub fn of(page: &Page) -> Self {
        Self::of_bytes(page)
    }

    /// The first half of the digest of `bytes`: blocks of page hashes are themselves hashed so.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        let mut half = [0; PAGE_HASH_LEN];
        half.copy_from_slice(&blake3::hash(bytes).as_bytes()[..PAGE_HASH_LEN]);
        Self(half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first test vector of BLAKE3: the digest of nothing.
    const NOTHING: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";

    #[test]
    fn it_is_blake3() {
        assert_eq!(Digest::of(b"").to_string(), NOTHING);
        assert_eq!(PageHash::of_bytes(b"").0, Digest::of(b"").0[..16]);
    }

    #[test]
    fn a_digest_has_one_text() {
        assert_eq!(NOTHING.parse(), Ok(Digest::of(b"")));
        for text in [
            "",
            &NOTHING[1..],
            &NOTHING.to_uppercase(),
            &NOTHING.replace('a', "g"),
        ] {
            assert_eq!(text.parse::<Digest>(), Err(DigestError), "{text}");
        }
    }
}
