//! The socket device of a guest that goes on in another process.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use snapshot_fmt::state::virtio::{VsockPorts, VsockState};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::muxer::{BUFFER_SIZE, MAX_ENDED};
use super::packet::op;
use super::testing::{CID, Guest, LINK, Packet, config, read_some};
use super::{Vsock, VsockConfig, VsockError};
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, WRITE};

/// The ends of the agent's connection.
const PORTS: (u32, u32) = (LINK, 77);

/// A device in the reset state that goes on from `state`, and what it has kept.
fn restore(
    config: VsockConfig,
    state: &VsockState,
) -> Result<(Vsock, Option<UnixStream>), VsockError> {
    let mut vsock = Vsock::new(config)?;
    let host = vsock.load(state)?;
    Ok((vsock, host))
}

/// The guest in another process, and the host's end of what was kept.
fn restored(old: &Guest) -> (Guest, Option<UnixStream>) {
    let transport = old.driver.transport.save();
    let state = old.driver.device.lock().unwrap().save();
    let dir = tempfile::tempdir().unwrap();
    let (vsock, host) = restore(config(&dir), &state).unwrap();
    let again = vsock.save();
    match state.kept {
        Some(_) => assert_eq!(again, state),
        // It is still to be told that all of them are gone.
        None => assert!(again.reset && again.ended.is_empty()),
    }
    let driver = FakeDriver::restored(vsock, &old.driver, &transport);
    assert_eq!(driver.transport.save(), transport);
    let (buf_alloc, fwd_cnt) = (old.buf_alloc, old.fwd_cnt);
    let guest = Guest {
        driver,
        dir,
        buf_alloc,
        fwd_cnt,
    };
    if let Some(host) = &host {
        let patience = Some(Duration::from_secs(5));
        host.set_read_timeout(patience).unwrap();
    }
    (guest, host)
}

fn post_event_buffers(guest: &mut Guest) {
    for index in 0..8 {
        let at = BUFFERS + 8 * u64::from(index);
        guest.driver.raw_desc(2, index, at, 4, WRITE, 0);
        guest.driver.make_available(2, index);
    }
    guest.driver.kick(2);
    assert_eq!(guest.driver.used(2), []);
}

/// A guest whose agent has talked with the host, all of which was read; and the host's end.
fn linked() -> (Guest, UnixStream) {
    let mut guest = Guest::new();
    post_event_buffers(&mut guest);
    let mut server = guest.connected_from_guest(PORTS);
    guest.send(op::RW, PORTS, b"hello");
    assert_eq!(read_some(&mut server), b"hello");
    server.write_all(b"request").unwrap();
    assert_eq!(guest.receive_one().data, b"request");
    guest.fwd_cnt += 3;
    guest.send(op::CREDIT_UPDATE, PORTS, &[]);
    guest.driver.set(0x64, 3);
    (guest, server)
}

/// The state as it is saved now has no connection to keep, and the guest hears that all are gone.
fn assert_all_end(mut old: Guest, why: &str) {
    let (guest, host) = (&mut old, None);
    let state = guest.driver.device.lock().unwrap().save();
    assert_eq!(&state.kept, &host, "{why}");
    let (mut guest, host) = restored(guest);
    assert!(host.is_none(), "{why}");
    guest.driver.run();
    assert_eq!(guest.driver.used(2), [(0, 4)], "{why}");
}

#[test]
fn the_agents_connection_goes_on_unnoticed() {
    let (old, mut old_server) = linked();
    let (mut guest, host) = restored(&old);
    let mut host = host.unwrap();
    assert!(guest.receive().is_empty());
    assert_eq!(guest.driver.used(2), []);
    assert_eq!(guest.driver.irq.count(), 0);

    guest.send(op::RW, PORTS, b"world");
    assert_eq!(read_some(&mut host), b"world");
    host.write_all(b"more").unwrap();
    let packet = guest.receive_one();
    assert_eq!(packet.data, b"more");
    // Five bytes before, five after.
    assert_eq!(packet.header.fwd_cnt, 10);
    assert_eq!(packet.header.buf_alloc, BUFFER_SIZE);
    assert_eq!(
        (packet.header.src_port, packet.header.dst_port),
        (PORTS.0, PORTS.1)
    );
    // New connections are possible at once, and the old one still ends as it should.
    let (ports, _client) = guest.connected_from_host(1);
    assert_ne!(ports, PORTS);
    drop(host);
    assert_eq!(guest.receive_one().header.op, op::SHUTDOWN);
    // The connection in the guest that was saved is another.
    old_server.write_all(b"still").unwrap();
    let state = old.driver.device.lock().unwrap().save();
    assert_eq!(state.kept, None);
}

#[test]
fn the_guests_credit_holds_on() {
    let (mut old, _server) = linked();
    // Of seven bytes it has dealt with three: four are on the way, and there is room for two more.
    old.buf_alloc = 6;
    old.send(op::CREDIT_UPDATE, PORTS, &[]);
    let (mut guest, host) = restored(&old);
    let mut host = host.unwrap();
    host.write_all(b"abcdef").unwrap();
    let packets = guest.receive();
    assert_eq!(packets[0].data, b"ab");
    assert_eq!(packets[1].header.op, op::CREDIT_REQUEST);
    guest.fwd_cnt = 9;
    guest.send(op::CREDIT_UPDATE, PORTS, &[]);
    assert_eq!(guest.receive_one().data, b"cdef");
}

#[test]
fn our_credit_holds_on() {
    let (mut guest, mut host) = linked();
    // It is told of in halves, and the first half is partly from before.
    guest.driver.set(0x64, 3);
    let chunk = vec![1; 60_000];
    guest.send(op::RW, PORTS, &chunk);
    let mut got = 0;
    while got < chunk.len() {
        got += read_some(&mut host).len();
    }
    let (mut guest, host) = restored(&guest);
    let mut host = host.unwrap();
    let mut told = None;
    for n in 2..4 {
        guest.send(op::RW, PORTS, &chunk);
        let mut got = 0;
        while got < chunk.len() {
            guest.driver.run();
            got += read_some(&mut host).len();
        }
        if let Some(packet) = guest.receive().first() {
            told.get_or_insert((n, packet.header.op, packet.header.fwd_cnt));
        }
    }
    // The agent's last packet from us told of its first five bytes.
    assert_eq!(told, Some((3, op::CREDIT_UPDATE, 180_005)));
}

/// A linked guest with three more connections: of a client, to a server, and of a client that waits for the guest's answer.
fn busy() -> (Guest, [(u32, u32); 3], Vec<UnixStream>) {
    let (mut old, server) = linked();
    old.fwd_cnt = 0;
    let (first, client) = old.connected_from_host(1);
    let second = (9000, 5);
    let other_server = old.connected_from_guest(second);
    let asking = old.client(3);
    let third = old.receive_one().header;
    let third = (third.src_port, third.dst_port);
    let streams = vec![client, server, other_server, asking];
    (old, [first, second, third], streams)
}

/// The ports of the resets that came, and nothing else did.
fn resets(guest: &mut Guest) -> Vec<(u32, u32)> {
    let packets = guest.receive();
    let are_resets = packets.iter().all(|p| p.header.op == op::RST);
    assert!(are_resets, "{packets:?}");
    let ports = |p: &Packet| (p.header.src_port, p.header.dst_port);
    let mut ends: Vec<_> = packets.iter().map(ports).collect();
    ends.sort_unstable();
    ends
}

fn sorted<const N: usize>(mut ports: [(u32, u32); N]) -> [(u32, u32); N] {
    ports.sort_unstable();
    ports
}

#[test]
fn other_connections_end_one_by_one_once_the_guest_has_spoken() {
    let (mut old, ports, mut streams) = busy();
    let [first, second, third] = ports;
    let (mut guest, host) = restored(&old);
    let mut host = host.unwrap();
    let _client = guest.client(1);
    // What it says of them before it knows is neither heard nor answered; nor is credit what is waited for.
    guest.send(op::RW, first, b"late");
    guest.send(op::CREDIT_REQUEST, second, &[]);
    guest.send(op::RESPONSE, third, &[]);
    guest.send(op::CREDIT_UPDATE, PORTS, &[]);
    guest.send(op::RW, PORTS, &[]);
    assert_eq!(guest.receive().len(), 0);
    assert_eq!(guest.counts(), (1, 0, 0), "no client is taken");

    host.write_all(b"you are restored").unwrap();
    assert_eq!(guest.receive_one().data, b"you are restored");
    guest.send(op::RW, PORTS, b"done");
    let packets = guest.receive();
    let (resets, others): (Vec<_>, Vec<_>) = packets.iter().partition(|p| p.header.op == op::RST);
    let mut ends: Vec<_> = resets
        .iter()
        .map(|p| (p.header.src_port, p.header.dst_port))
        .collect();
    ends.sort_unstable();
    assert_eq!(ends, sorted(ports));
    assert_eq!(read_some(&mut host), b"done");
    // The client's turn has come.
    assert!(matches!(others[..], [p] if p.header.op == op::REQUEST && p.header.dst_port == 1));
    assert_eq!(guest.driver.used(2), []);
    // From now on they are like any connection that is not there.
    guest.send(op::RW, first, b"late");
    assert_eq!(guest.receive_one().header.op, op::RST);
    // The guest that was saved goes on with all of them.
    old.send(op::RW, first, b"still");
    assert_eq!(read_some(&mut streams[0]), b"still");
}

#[test]
fn a_guest_that_is_done_with_a_connection_is_answered_at_once() {
    let (old, ports, _streams) = busy();
    let [first, second, third] = ports;
    let (mut guest, host) = restored(&old);
    let mut host = host.unwrap();
    guest.shut_down(first, super::packet::SHUTDOWN_BOTH);
    assert_eq!(resets(&mut guest), [first]);
    guest.send(op::RST, third, &[]);
    assert_eq!(resets(&mut guest), []);
    // The port is the guest's to use again.
    let mut server = guest.connected_from_guest(second);
    guest.send(op::RW, PORTS, b"done");
    assert_eq!(resets(&mut guest), []);
    assert_eq!(read_some(&mut host), b"done");
    guest.send(op::RW, second, b"new");
    assert_eq!(read_some(&mut server), b"new");
}

#[test]
fn the_end_of_the_kept_connection_lets_go_of_the_others() {
    // By the guest, at once.
    let (old, ports, _streams) = busy();
    let (mut guest, _host) = restored(&old);
    guest.send(op::RST, PORTS, &[]);
    assert_eq!(resets(&mut guest), sorted(ports));
    // By the guest, in order.
    let (old, [a, b, c], _streams) = busy();
    let (mut guest, _host) = restored(&old);
    guest.shut_down(PORTS, super::packet::SHUTDOWN_BOTH);
    assert_eq!(resets(&mut guest), sorted([a, b, c, PORTS]));
    // By the host, whom the guest never answers.
    let (old, [a, b, c], _streams) = busy();
    let (mut guest, host) = restored(&old);
    drop(host);
    assert_eq!(guest.receive_one().header.op, op::SHUTDOWN);
    guest.expire();
    assert_eq!(resets(&mut guest), sorted([a, b, c, PORTS]));
}

#[test]
fn what_is_held_back_is_saved_again() {
    let (old, ports, _streams) = busy();
    let (guest, _host) = restored(&old);
    let (guest, _second_host) = restored(&guest);
    let (mut guest, host) = restored(&guest);
    assert_eq!(resets(&mut guest), []);
    guest.send(op::RW, PORTS, b"done");
    assert_eq!(resets(&mut guest), sorted(ports));
    drop(host);
}

#[test]
fn a_guest_with_too_many_ends_hears_of_all_by_one_event() {
    let (old, _server) = linked();
    let mut state = old.driver.device.lock().unwrap().save();
    let port = |guest| VsockPorts { host: 9, guest };
    state.ended = (0..).map(port).take(MAX_ENDED).collect();
    let dir = tempfile::tempdir().unwrap();
    let (vsock, _host) = restore(config(&dir), &state).unwrap();
    assert_eq!(vsock.save(), state);
    let driver = FakeDriver::restored(vsock, &old.driver, &old.driver.transport.save());
    let mut guest = Guest {
        driver,
        dir,
        ..Guest::without_buffers()
    };
    let _server = guest.connected_from_guest((9000, 5));
    assert_all_end(guest, "one more than can be listed");
}

#[test]
fn a_driver_that_starts_anew_hears_nothing_of_what_was() {
    let (old, ..) = busy();
    let (mut guest, _host) = restored(&old);
    guest.driver.restart();
    guest.post_all();
    assert_eq!(resets(&mut guest), []);
    let _connected = guest.connected_from_host(1);
}

#[test]
fn packets_that_the_guest_had_queued_belong_to_the_kept_connection() {
    let (mut old, mut server) = linked();
    let state = old.driver.device.lock().unwrap().save();
    let transport = old.driver.transport.save();
    // The device has not seen this one when it is saved; its notification is lost with the old machine.
    old.send(op::RW, PORTS, b"queued");
    assert_eq!(read_some(&mut server), b"queued");
    let dir = tempfile::tempdir().unwrap();
    let (vsock, host) = restore(config(&dir), &state).unwrap();
    let mut host = host.unwrap();
    let mut driver = FakeDriver::restored(vsock, &old.driver, &transport);
    driver.run();
    assert_eq!(read_some(&mut host), b"queued");
}

#[test]
fn nothing_is_kept_while_anything_is_on_its_way() {
    let (mut guest, _server) = linked();
    guest.send(op::RW, PORTS, b"unread");
    assert_all_end(guest, "the host has not read");

    let (guest, mut server) = linked();
    server.write_all(b"unread").unwrap();
    assert_all_end(guest, "the guest has not read");

    let (guest, server) = linked();
    drop(server);
    assert_all_end(guest, "the host hangs up");

    let (mut guest, server) = linked();
    server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_one().header.op, op::SHUTDOWN);
    assert_all_end(guest, "the host has ended its direction");

    let (mut guest, _server) = linked();
    guest.shut_down(PORTS, super::packet::SHUTDOWN_SEND);
    assert_all_end(guest, "the guest has ended its direction");

    let mut guest = Guest::without_buffers();
    post_event_buffers(&mut guest);
    let _listener = guest.listen(LINK);
    guest.send(op::REQUEST, PORTS, &[]);
    assert_all_end(guest, "the guest waits for the answer");

    let (mut guest, _server) = linked();
    guest.fwd_cnt = 0;
    std::fs::remove_file(guest.dir.path().join(format!("vsock_{LINK}"))).unwrap();
    let _second = guest.connected_from_guest((LINK, 78));
    assert_all_end(guest, "two connections claim to be the agent's");

    let mut guest = Guest::new();
    post_event_buffers(&mut guest);
    let _client = guest.connected_from_host(1);
    assert_all_end(guest, "there is none");
}

#[test]
fn another_context_id_ends_all() {
    let (old, _server) = linked();
    let state = old.driver.device.lock().unwrap().save();
    assert!(state.kept.is_some());
    let dir = tempfile::tempdir().unwrap();
    let cid = CID + 1;
    let config = VsockConfig {
        cid,
        ..config(&dir)
    };
    let (vsock, host) = restore(config, &state).unwrap();
    assert!(host.is_none());
    let mut driver = FakeDriver::restored(vsock, &old.driver, &old.driver.transport.save());
    driver.run();
    assert_eq!(driver.used(2), [(0, 4)]);
}

#[test]
fn hostile_states_are_refused_or_harmless() {
    fn bend(f: impl FnOnce(&mut VsockState)) -> Result<(), VsockError> {
        let (old, _server) = linked();
        let mut state = old.driver.device.lock().unwrap().save();
        f(&mut state);
        let dir = tempfile::tempdir().unwrap();
        let (vsock, host) = restore(config(&dir), &state)?;
        let mut driver = FakeDriver::restored(vsock, &old.driver, &old.driver.transport.save());
        let mut guest_end = host.unwrap();
        guest_end.write_all(&[1; 100_000]).unwrap();
        driver.run();
        assert!(!driver.needs_reset());
        driver.restart();
        assert_eq!(read_some(&mut guest_end), b"");
        Ok(())
    }
    let ports = VsockPorts { host: 1, guest: 2 };
    bend(|_| {}).unwrap();
    for f in [
        |s: &mut VsockState| s.kept.as_mut().unwrap().ports.host = 1 << 30,
        |s: &mut VsockState| s.kept.as_mut().unwrap().buf_alloc = BUFFER_SIZE + 1,
        |s: &mut VsockState| s.ended.push(s.kept.as_ref().unwrap().ports),
    ] {
        assert!(matches!(bend(f), Err(VsockError::Saved(_))));
    }
    let too_many = vec![ports; MAX_ENDED + 1];
    let error = bend(|s| s.ended = too_many).err();
    assert!(matches!(error, Some(VsockError::Saved(_))));
    // Numbers that only the guest's own connection hangs on.
    for number in [0, 1, 1 << 31, u32::MAX] {
        bend(|s| {
            let kept = s.kept.as_mut().unwrap();
            kept.ports.guest = number;
            kept.buf_alloc = number.min(BUFFER_SIZE);
            (kept.forwarded, kept.forwarded_told) = (number, !number);
            (kept.sent, kept.peer_fwd_cnt) = (!number, number);
            kept.peer_buf_alloc = number;
            s.ended = vec![ports; MAX_ENDED];
            s.next_host_port = number;
        })
        .unwrap();
    }
}

#[test]
fn a_guest_without_a_link_drops_its_connections_before_it_gets_new_ones() {
    let mut old = Guest::new();
    let (ports, _client) = old.connected_from_host(1);
    post_event_buffers(&mut old);
    old.driver.write(BUFFERS, &[0xff; 4]);

    let (mut guest, _) = restored(&old);
    guest.driver.run();
    assert_eq!(guest.driver.used(2), [(0, 4)]);
    assert_eq!(guest.driver.read(BUFFERS, 4), [0; 4]);
    guest.send(op::RW, ports, b"old");
    assert_eq!(guest.receive_one().header.op, op::RST);
    // A connection that came before the guest has dropped the old ones might be dropped with them.
    let _client = guest.client(1);
    assert!(guest.receive().is_empty());
    let avail_event = guest.driver.read(0x3000 + 0xa00 + 4 + 8 * 8, 2);
    assert_eq!(avail_event, [8, 0], "it asks to be notified");
    guest.driver.make_available(2, 0);
    guest.driver.kick(2);
    let request = guest.receive_one().header;
    assert_eq!(request.op, op::REQUEST);
    assert_ne!(request.src_port, ports.0);
}

/// A guest whose agent is on the lane goes on; what is written to when that has said something.
fn restored_beside_a_lane(old: &Guest, state: &VsockState) -> (Guest, EventFd) {
    let transport = old.driver.transport.save();
    let dir = tempfile::tempdir().unwrap();
    let spoken = EventFd::new(EFD_NONBLOCK).unwrap();
    let vsock = Vsock::new(config(&dir)).unwrap();
    let mut vsock = vsock.beside_lane(spoken.try_clone().unwrap());
    let (link, _host) = UnixStream::pair().unwrap();
    vsock.load_beside(state, Some(link)).unwrap();
    let driver = FakeDriver::restored(vsock, &old.driver, &transport);
    let (buf_alloc, fwd_cnt) = (old.buf_alloc, old.fwd_cnt);
    let guest = Guest {
        driver,
        dir,
        buf_alloc,
        fwd_cnt,
    };
    (guest, spoken)
}

#[test]
fn resets_and_new_clients_wait_for_an_agent_on_the_lane() {
    let (old, _server) = linked();
    let mut state = old.driver.device.lock().unwrap().save();
    state.ended.extend(state.kept.take().map(|kept| kept.ports));
    let (mut guest, spoken) = restored_beside_a_lane(&old, &state);
    let client = guest.client(1);
    assert!(guest.receive().is_empty());
    assert_eq!(guest.driver.used(2), []);
    // What it says meanwhile on one that is gone stays without an answer.
    guest.send(op::RW, PORTS, b"late");
    assert!(guest.receive().is_empty());
    spoken.write(1).unwrap();
    guest.driver.run();
    let ops: Vec<_> = guest.receive().iter().map(|p| p.header.op).collect();
    assert_eq!(ops, [op::RST, op::REQUEST]);
    assert_eq!(guest.driver.used(2), []);
    drop(client);
}

#[test]
fn a_guest_that_was_still_to_be_told_is_told_beside_a_lane_too() {
    let (old, _server) = linked();
    let mut state = old.driver.device.lock().unwrap().save();
    state.kept = None;
    state.reset = true;
    let (mut guest, _spoken) = restored_beside_a_lane(&old, &state);
    guest.driver.run();
    assert_eq!(guest.driver.used(2), [(0, 4)]);
}
