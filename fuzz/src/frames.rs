//! Frames of the agent's protocol, as the host reads the guest's and the agent the host's.

use arbitrary::Arbitrary;
use guest_agent::frame::{self, FrameBuffer, FrameError, MAX_MESSAGE};
use guest_agent::proto::{FromAgent, ToAgent};
use prost::Message;

/// A stream in the pieces that its reader sees.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    pieces: Vec<Piece>,
}

/// A piece.
#[derive(Arbitrary, Clone, Debug)]
pub enum Piece {
    /// Bytes as they are.
    Raw(Vec<u8>),
    /// A frame that is whole.
    Frame(Vec<u8>),
    /// The beginning of a frame that says it has so many bytes.
    Head(u32),
    /// So many bytes that are no empty frames, in units of 4 KiB.
    Padding(u8),
}

impl Piece {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Raw(bytes) => bytes.clone(),
            Self::Frame(body) => {
                let mut bytes = u32::try_from(body.len())
                    .unwrap_or(u32::MAX)
                    .to_le_bytes()
                    .to_vec();
                bytes.extend(body);
                bytes
            }
            Self::Head(len) => len.to_le_bytes().to_vec(),
            Self::Padding(pages) => vec![1; usize::from(*pages) << 12],
        }
    }
}

/// Reads the stream as either side.
pub fn run(input: &Input) {
    read::<FromAgent>(input);
    read::<ToAgent>(input);
}

fn read<M: Message + Default + PartialEq + std::fmt::Debug>(input: &Input) {
    let mut frames = FrameBuffer::default();
    for piece in input.pieces.iter().take(64) {
        let bytes = piece.bytes();
        frames.input().extend_from_slice(&bytes);
        loop {
            match frames.next_message::<M>() {
                Ok(Some(message)) => again(&message),
                Ok(None) => break,
                // The stream is over.
                Err(FrameError::TooLarge { length }) => {
                    assert!(length as usize > MAX_MESSAGE);
                    return;
                }
                Err(FrameError::Malformed { length, .. }) => {
                    assert!(length <= MAX_MESSAGE);
                    return;
                }
            }
        }
        // A frame that is not whole, and as much again of what was yielded before it.
        let held = frames.input().len();
        assert!(
            held <= 2 * (MAX_MESSAGE + 4) + bytes.len(),
            "{held} bytes are held"
        );
    }
}

/// What was understood is said again in the same way.
fn again<M: Message + Default + PartialEq + std::fmt::Debug>(message: &M) {
    let mut bytes = Vec::new();
    match frame::encode(message, &mut bytes) {
        Ok(()) => {}
        // Fields that were not in canonical form may take more room in it.
        Err(FrameError::TooLarge { .. }) => return,
        Err(error) => panic!("{error}"),
    }
    let mut frames = FrameBuffer::default();
    frames.input().extend_from_slice(&bytes);
    let same: Option<M> = frames.next_message().expect("a frame");
    assert!(
        same.as_ref() == Some(message),
        "{same:?} is not {message:?}"
    );
    assert!(!frames.is_partial());
}
