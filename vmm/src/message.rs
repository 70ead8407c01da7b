//! A description and open files, over a Unix socket, between processes of one user that run the same program.
//!
//! On the socket: the description's length and the number of files as four bytes each, least significant first, and the description as JSON. The files come with the first byte, as
//! descriptors.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most files: as many as a message can have (Linux, unix(7), `SCM_MAX_FD`).
pub const FILES_MAX: usize = 253;
/// Longest description, in bytes.
const DESCRIPTION_MAX: usize = 1 << 20;

/// Sends `what`, with its files.
pub fn send<T: Serialize>(mut socket: &UnixStream, what: &T, files: &[&File]) -> io::Result<()> {
    let json = serde_json::to_vec(what)?;
    let number = |count: usize| u32::try_from(count).map_err(io::Error::other);
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if fds.len() > FILES_MAX || !rights.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other(format!(
            "{} files are too many",
            fds.len()
        )));
    }
    let (length, count) = (number(json.len())?, number(fds.len())?);
    let mut message = [length.to_le_bytes(), count.to_le_bytes()].concat();
    message.extend(json);
    let flags = SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[IoSlice::new(&message)], &mut rights, flags)?;
    socket.write_all(message.get(sent..).unwrap_or_default())
}

/// Receives what was sent, with its files. `None` where whoever would send it has gone.
pub fn receive<T: DeserializeOwned>(mut socket: &UnixStream) -> io::Result<Option<(T, Vec<File>)>> {
    let mut head = [0; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut head)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let files: Vec<File> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .map(File::from)
        .collect();
    socket.read_exact(head.get_mut(received.bytes..).unwrap_or_default())?;
    let [length, count] = [0, 4].map(|at| {
        let number = head[at..].first_chunk().copied();
        number.map_or(0, u32::from_le_bytes) as usize
    });
    if length > DESCRIPTION_MAX {
        return Err(io::Error::other(format!(
            "a description of {length} bytes is too long"
        )));
    }
    let mut json = vec![0; length];
    socket.read_exact(&mut json)?;
    if files.len() != count {
        // The last are missing where there is no room for more: memory without its newest layer would be another's.
        return Err(io::Error::other(format!(
            "{} of {count} files arrived; is the limit on open files (ulimit -n) too low?",
            files.len(),
        )));
    }
    Ok(Some((serde_json::from_slice(&json)?, files)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn files_arrive_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..FILES_MAX)
            .map(|number| {
                let file = tempfile::tempfile().unwrap();
                file.write_all_at(&[u8::try_from(number).unwrap()], 0)
                    .unwrap();
                file
            })
            .collect();
        send(&ours, &"what", &files.iter().collect::<Vec<_>>()).unwrap();
        send(&ours, &"more", &[]).unwrap();
        let (received, files): (String, _) = receive(&theirs).unwrap().unwrap();
        assert_eq!(received, "what");
        for (number, file) in files.iter().enumerate() {
            let mut byte = [0];
            file.read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(usize::from(byte[0]), number);
        }
        assert_eq!(files.len(), FILES_MAX);
        let (received, none): (String, _) = receive(&theirs).unwrap().unwrap();
        assert_eq!((received.as_str(), none.len()), ("more", 0));
        let too_many: Vec<_> = files.iter().chain(&files[..1]).collect();
        assert!(send(&ours, &"what", &too_many).is_err());
    }

    #[test]
    fn files_that_are_lost_are_missed() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"\x04\0\0\0\x02\0\0\0null").unwrap();
        let error = receive::<()>(&theirs).unwrap_err().to_string();
        assert!(error.contains("0 of 2 files"), "{error}");
    }

    #[test]
    fn nobody_there_is_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(receive::<String>(&theirs).unwrap().is_none());
    }

    #[test]
    fn half_a_description_and_nonsense_are_errors() {
        for bytes in [
            &b"\x04"[..],
            b"\x04\0\0\0\0\0\0\0nul",
            b"\x04\0\0\0\0\0\0\0null",
            b"\xff\xff\xff\xff\0\0\0\0",
        ] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            drop(ours);
            assert!(receive::<String>(&theirs).is_err(), "{bytes:?}");
        }
    }
}
