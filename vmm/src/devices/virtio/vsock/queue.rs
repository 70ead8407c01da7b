//! Chains to packets and back (Virtio 1.2, section 5.10.6).

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

use super::muxer::Muxer;
use super::packet::{Header, MAX_PAYLOAD};
use crate::devices::virtio::GuestMemory;
use crate::devices::virtio::queue::{
    Buffers, Chain, Outcome, QueueError, Served, copy_from, copy_to, serve_quietly, split_front,
    total_len,
};
use crate::devices::virtio::signal::Signal;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

fn wrong(head: u16, reason: impl ToString) -> QueueError {
    QueueError::Request {
        head,
        reason: reason.to_string(),
    }
}

/// Takes the guest's packets for as long as the muxer has room for what they may cause.
pub(super) fn transmit(
    queue: &mut Queue,
    memory: &GuestMemory,
    signal: &Signal,
    interrupt: &mut bool,
    muxer: &mut Muxer,
) -> Result<Served, QueueError> {
    serve_quietly(queue, memory, interrupt, |chain| {
        if !muxer.can_take() {
            return Ok(Outcome::Later);
        }
        let head = chain.head_index();
        let mut buffers = Buffers::collect(memory, chain)?.readable;
        let mut bytes = [0; PKT_HEADER_SIZE];
        let front = split_front(&mut buffers, PKT_HEADER_SIZE);
        if copy_from(&front, &mut bytes) != PKT_HEADER_SIZE {
            return Err(wrong(head, "a packet without a whole header"));
        }
        let header = Header::parse(&bytes);
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        if len > MAX_PAYLOAD {
            return Err(wrong(head, format_args!("a packet of {len} bytes")));
        }
        if total_len(&buffers) < u64::from(header.len) {
            return Err(wrong(head, "a packet that is shorter than it says"));
        }
        let payload = split_front(&mut buffers, len);
        muxer.take(&header, &payload, signal);
        Ok(Outcome::Used(0))
    })
}

/// Gives the guest its packets for as long as it has buffers for them.
pub(super) fn receive(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &mut bool,
    muxer: &mut Muxer,
) -> Result<Served, QueueError> {
    serve_quietly(queue, memory, interrupt, |mut chain| {
        if !muxer.has_packet() {
            return Ok(Outcome::Later);
        }
        let head = chain.head_index();
        // The driver's buffer may be of any length; how much of it is used is the muxer's decision.
        let mut packet = VsockPacket::from_rx_virtq_chain(memory, &mut chain, u32::MAX)
            .map_err(|error| wrong(head, format_args!("a bad buffer for packets: {error}")))?;
        let Some(space) = packet.data_slice() else {
            return Err(wrong(head, "a buffer for packets without room for data"));
        };
        let Some(header) = muxer.next_packet(space) else {
            return Ok(Outcome::Later);
        };
        packet
            .set_header_from_raw(&header.to_bytes())
            .map_err(|error| wrong(head, error))?;
        let header_len = u32::try_from(PKT_HEADER_SIZE).unwrap_or(u32::MAX);
        Ok(Outcome::Used(header_len + header.len))
    })
}

/// Where the guest is with the news that its connections are gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Reset {
    /// There is none, or the guest has dealt with it.
    #[default]
    Over,
    /// It is to be told.
    Due,
    /// It was told when its event buffers were available up to this index. A connection made now might
    /// be dropped with the old ones.
    Told(u16),
}

/// Tells the guest of a reset that is due. The guest has dealt with it once it posts the event's
/// buffer again.
pub(super) fn announce_reset(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &mut bool,
    reset: &mut Reset,
) -> Result<(), QueueError> {
    if *reset != Reset::Over && !queue.ready() {
        // A driver without an event queue cannot be told.
        *reset = Reset::Over;
    }
    match *reset {
        Reset::Over => return Ok(()),
        Reset::Told(index) => {
            if queue.avail_idx(memory, Ordering::Acquire)?.0 != index {
                *reset = Reset::Over;
            }
            return Ok(());
        }
        Reset::Due => {}
    }
    serve_quietly(queue, memory, interrupt, |chain: Chain| {
        if *reset != Reset::Due {
            return Ok(Outcome::Later);
        }
        let head = chain.head_index();
        let event = EVENT_TRANSPORT_RESET.to_le_bytes();
        let buffers = Buffers::collect(memory, chain)?.writable;
        if copy_to(&buffers, &event) != event.len() {
            return Err(wrong(head, "a buffer too small for an event"));
        }
        *reset = Reset::Told(0);
        Ok(Outcome::Used(4))
    })?;
    if matches!(reset, Reset::Told(_)) {
        // The other buffers stay as they are: ask to be notified of the one after them.
        let taken = queue.next_avail();
        let posted = queue.avail_idx(memory, Ordering::Acquire)?.0;
        queue.set_next_avail(posted);
        queue.enable_notification(memory)?;
        queue.set_next_avail(taken);
        *reset = Reset::Told(posted);
    }
    Ok(())
}
