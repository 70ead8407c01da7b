//! virtio-vsock: stream sockets between guest and host (Virtio 1.2, section 5.10).
//!
//! On the host's side they are Unix sockets. A client connects to the sandbox's socket, sends
//! `CONNECT <port>\n`, and reads `OK <host port>\n` once the guest has accepted; a refusal closes the
//! connection. A guest that connects to port P of the host (context id 2) reaches whoever listens on
//! `<socket>_<P>`.
//!
//! Bytes are never dropped and never pile up: the guest may send what fits into a connection's buffer
//! (its credit), and the host's bytes stay in its socket until the guest has both credit and a buffer
//! for them. Numbers of connections, handshakes and unsent replies are bounded.
//!
//! From the device down: [`device`] knows queues and the event loop, `queue` turns chains into packets,
//! `muxer` finds a packet's connection, `connection` is one connection and knows no other.

mod connection;
mod device;
mod handshake;
mod held;
mod listener;
mod muxer;
mod packet;
mod queue;
mod state;

pub use device::{Vsock, VsockConfig, VsockError};
pub use listener::connect_to_host;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod restore_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
