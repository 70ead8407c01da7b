//! Framing: a little-endian `u32` length, then a protobuf message of that length.
//!
//! A [`FrameBuffer`] collects what a stream delivers and yields whole messages. It
//! never holds more than one frame of the largest size plus one read, whatever the
//! other side sends.

use prost::Message;
use thiserror::Error;

/// The most bytes that a message may have: 1 MiB.
pub const MAX_MESSAGE: usize = 1 << 20;

/// The bytes of a frame's length.
const HEADER: usize = 4;

/// What is wrong with a frame.
#[derive(Clone, Debug, Error)]
pub enum FrameError {
    /// A frame says that it is longer than [`MAX_MESSAGE`].
    #[error("a frame of {length} bytes is over the limit of {MAX_MESSAGE}")]
    TooLarge {
        /// What the frame said.
        length: u32,
    },
    /// A frame holds no message of the expected type.
    #[error("a frame of {length} bytes is not a message")]
    Malformed {
        /// The frame's length in bytes, its header excluded.
        length: usize,
        /// What protobuf said.
        source: prost::DecodeError,
    },
}

/// Appends `message` to `out` as one frame.
///
/// # Errors
/// [`FrameError::TooLarge`] if the message is longer than [`MAX_MESSAGE`]; `out` is as it was.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = message.encoded_len();
    let header = u32::try_from(length).unwrap_or(u32::MAX);
    if length > MAX_MESSAGE {
        return Err(FrameError::TooLarge { length: header });
    }
    out.reserve(HEADER + length);
    out.extend_from_slice(&header.to_le_bytes());
    message.encode_raw(out);
    Ok(())
}

/// Bytes on their way to become messages.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Where the first frame that was not yielded begins.
    start: usize,
}

impl FrameBuffer {
    /// The place to append what was read from the stream to.
    pub fn input(&mut self) -> &mut Vec<u8> {
        // Frames that were yielded go when the rest is small to move: mostly there is none.
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        &mut self.bytes
    }

    /// The next whole message, or `None` until more bytes have come.
    ///
    /// # Errors
    /// [`FrameError`] if the stream cannot be understood from here on: give it up.
    pub fn next_message<M: Message + Default>(&mut self) -> Result<Option<M>, FrameError> {
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > MAX_MESSAGE {
            return Err(FrameError::TooLarge { length });
        }
        let Some(body) = rest.get(..size) else {
            return Ok(None);
        };
        let message = M::decode(body).map_err(|source| FrameError::Malformed {
            length: size,
            source,
        })?;
        self.start += HEADER + size;
        Ok(Some(message))
    }

    /// Whether a frame has begun and not ended.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.start < self.bytes.len()
    }
}
