//! The socket device between a guest and clients that break its rules.

use std::io::Write;
use std::os::unix::net::UnixStream;

use virtio_vsock::packet::PKT_HEADER_SIZE;

use super::muxer::{
    BUFFER_SIZE, CROWD, CROWD_BUFFER_SIZE, MAX_CONNECTIONS, MAX_HANDSHAKES, MAX_REPLIES,
};
use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::queue::Reset;
use super::testing::{CID, Guest, PACKET, config, read_some};
use super::{Vsock, VsockConfig, VsockError};
use crate::devices::virtio::testing::{BUFFERS, Desc, HIGH, LOW_END, NEXT, WRITE, r, w};

#[test]
fn context_ids_that_no_guest_has_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let config = VsockConfig {
            cid,
            ..config(&dir)
        };
        let error = Vsock::new(config).err().unwrap();
        assert!(matches!(error, VsockError::Cid(bad) if bad == cid));
    }
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
}

#[test]
fn packets_of_other_parties_are_reset() {
    let cases: [fn(&mut Header); 9] = [
        |h| h.src_cid = 2,
        |h| h.src_cid = 99,
        |h| h.src_cid = u64::MAX,
        |h| h.src_cid |= 1 << 32,
        |h| h.dst_cid = 0,
        |h| h.dst_cid = 52,
        |h| h.dst_cid = u64::MAX,
        |h| h.kind = 2,
        |h| h.kind = u16::MAX,
    ];
    for bend in cases {
        let mut guest = Guest::new();
        let _server = guest.listen(9);
        let mut header = guest.header(op::REQUEST, 9, 1, 0);
        bend(&mut header);
        guest.send_raw(header, &[]);
        assert_eq!(guest.receive_one().header, header.reset());
        assert_eq!(guest.counts(), (0, 0, 0));
    }
}

#[test]
fn a_forged_source_does_not_reach_a_connection() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    let mut header = guest.header(op::RW, ports.0, ports.1, 4);
    header.src_cid = u64::from(CID) + 1;
    guest.send_raw(header, b"evil");
    assert_eq!(guest.receive_one().header.op, op::RST);
    guest.send(op::RW, ports, b"good");
    assert_eq!(read_some(&mut client), b"good");
}

#[test]
fn packets_without_a_connection_are_reset_but_resets_are_not() {
    let mut guest = Guest::new();
    for op in [0, 2, 4, 5, 6, 7, 8, u16::MAX] {
        guest.send(op, (1, 2), &[]);
        assert_eq!(guest.receive_one().header.op, op::RST, "{op}");
    }
    guest.send(op::RST, (1, 2), &[]);
    assert!(guest.receive().is_empty());
}

#[test]
fn operations_out_of_place_end_the_connection() {
    for op in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
        let mut guest = Guest::new();
        let (ports, mut client) = guest.connected_from_host(1);
        guest.send(op, ports, &[]);
        assert_eq!(guest.receive_one().header.op, op::RST, "{op}");
        assert_eq!(read_some(&mut client), b"");
        assert_eq!(guest.counts(), (0, 0, 0));
    }
    // Before it answered, the guest may say nothing but yes or no.
    for op in [0, 1, 4, 5, 6, 7, 8] {
        let mut guest = Guest::new();
        let mut client = guest.client(1);
        let request = guest.receive_one().header;
        guest.send(op, (request.src_port, 1), b"");
        assert_eq!(guest.receive_one().header.op, op::RST, "{op}");
        assert_eq!(read_some(&mut client), b"");
    }
}

#[test]
fn a_flood_without_credit_ends_the_connection() {
    let mut guest = Guest::new();
    let (ports, client) = guest.connected_from_host(1);
    let chunk = vec![7; 60_000];
    let mut sent = 0;
    let reset = loop {
        guest.send(op::RW, ports, &chunk);
        sent += chunk.len();
        let packets = guest.receive();
        if packets.iter().any(|p| p.header.op == op::RST) {
            break sent;
        }
        assert!(sent < 4 << 20, "it takes everything");
    };
    // What the kernel's socket took, and our buffer.
    assert!(reset > BUFFER_SIZE as usize);
    assert_eq!(guest.counts(), (0, 0, 1));
    drop(client);
    guest.driver.run();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn connections_that_are_over_count_for_the_crowd() {
    // A guest fills a connection whose client reads nothing, resets it, and makes the next one.
    let mut guest = Guest::new();
    let mut clients = Vec::new();
    let chunk = vec![7; 60_000];
    for over in 0..=CROWD {
        let mut client = guest.client(1);
        let request = guest.receive_one().header;
        let want = if over < CROWD {
            BUFFER_SIZE
        } else {
            CROWD_BUFFER_SIZE
        };
        assert_eq!(request.buf_alloc, want, "{over}");
        let ports = (request.src_port, 1);
        guest.send(op::RESPONSE, ports, &[]);
        read_some(&mut client);
        for _ in 0..4 {
            guest.send(op::RW, ports, &chunk);
        }
        guest.send(op::RST, ports, &[]);
        guest.receive();
        clients.push(client);
        assert_eq!(guest.counts(), (0, 0, over + 1));
    }
    clients.clear();
    guest.driver.run();
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn requests_for_credit_are_answered_once_each_turn() {
    let mut guest = Guest::new();
    let (ports, _client) = guest.connected_from_host(1);
    guest.driver.used(1);
    // As fast as it can, without waiting for an answer.
    let header = guest.header(op::CREDIT_REQUEST, ports.0, ports.1, 0);
    guest.driver.write(PACKET, &header.to_bytes());
    for _ in 0..32 {
        guest.driver.add(1, &[r(PACKET, 44)]);
    }
    guest.driver.kick(1);
    assert_eq!(guest.driver.used(1).len(), 32);
    let answers = guest.receive();
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].header.op, op::CREDIT_UPDATE);
}

#[test]
fn data_after_the_guest_said_it_was_over_ends_the_connection() {
    let mut guest = Guest::new();
    let (ports, _client) = guest.connected_from_host(1);
    guest.shut_down(ports, SHUTDOWN_SEND);
    guest.send(op::RW, ports, b"more");
    assert_eq!(guest.receive_one().header.op, op::RST);
}

#[test]
fn odd_shutdowns_are_harmless() {
    for flags in [0, 4, 0xffff_fffc] {
        let mut guest = Guest::new();
        let (ports, mut client) = guest.connected_from_host(1);
        guest.shut_down(ports, flags);
        guest.send(op::RW, ports, b"go on");
        assert_eq!(read_some(&mut client), b"go on", "{flags:#x}");
    }
    // A client that hangs up on a guest which does not listen.
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    guest.shut_down(ports, SHUTDOWN_RECEIVE);
    let _ = client.write(b"unheard");
    drop(client);
    assert_eq!(guest.receive_one().header.flags, 3);
    guest.expire();
    assert_eq!(guest.receive_one().header.op, op::RST);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn lies_about_credit_only_hurt_the_guest() {
    for (buf_alloc, fwd_cnt) in [
        (0, 0),
        (0, u32::MAX),
        (100, 1),
        (u32::MAX, u32::MAX),
        (1, 1 << 31),
        (u32::MAX, 1 << 31),
    ] {
        let mut guest = Guest::new();
        (guest.buf_alloc, guest.fwd_cnt) = (buf_alloc, fwd_cnt);
        let (ports, mut client) = guest.connected_from_host(1);
        client.write_all(b"0123456789").unwrap();
        for packet in guest.receive() {
            assert!([op::RW, op::CREDIT_REQUEST].contains(&packet.header.op));
        }
        // The other direction still works.
        guest.send(op::RW, ports, b"data");
        assert_eq!(read_some(&mut client), b"data");
        assert!(!guest.driver.needs_reset());
    }
}

#[test]
fn a_zero_length_packet_is_nothing() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    guest.send(op::RW, ports, b"");
    guest.send(op::RW, ports, b"x");
    assert_eq!(read_some(&mut client), b"x");
    assert!(guest.receive().is_empty());
}

#[test]
fn bad_packets_stop_the_device() {
    let long = u32::try_from(LOW_END - PACKET - 100).unwrap();
    let cases: [(&str, u32, &[Desc]); 11] = [
        ("no header", 0, &[r(PACKET, 0)]),
        ("part of a header", 0, &[r(PACKET, 43)]),
        ("a header for the device to write", 0, &[w(PACKET, 44)]),
        ("no data", 1, &[r(PACKET, 44)]),
        ("too little data", 100, &[r(PACKET, 44), r(PACKET, 99)]),
        ("data to write", 8, &[r(PACKET, 44), w(PACKET, 8)]),
        ("too much data", 65537, &[r(PACKET, 44), r(PACKET, long)]),
        ("4 GiB of data", u32::MAX, &[r(PACKET, 44), r(PACKET, long)]),
        ("data outside", 8, &[r(PACKET, 44), r(0x40_0000, 8)]),
        ("data that wraps", 8, &[r(PACKET, 44), r(u64::MAX - 3, 8)]),
        ("a header across", 0, &[r(LOW_END - 40, 44)]),
    ];
    for (name, len, chain) in cases {
        let mut guest = Guest::new();
        let (ports, mut client) = guest.connected_from_host(1);
        let mut header = guest.header(op::RW, ports.0, ports.1, 0);
        header.len = len;
        guest.driver.write(PACKET, &header.to_bytes());
        guest.driver.add(1, chain);
        guest.driver.kick(1);
        assert!(guest.driver.needs_reset(), "{name}");
        // Its clients are not left waiting.
        assert_eq!(read_some(&mut client), b"", "{name}");
        guest.driver.restart();
        guest.post_all();
        guest.connected_from_host(1);
    }
}

#[test]
fn bad_receive_buffers_stop_the_device() {
    /// Address, length, flags, next.
    type Raw = (u64, u32, u16, u16);
    let cases: [(&str, &[Raw]); 9] = [
        ("readable", &[(BUFFERS, 4096, 0, 0)]),
        ("too short for a header", &[(BUFFERS, 43, WRITE, 0)]),
        ("only a header", &[(BUFFERS, 44, WRITE, 0)]),
        (
            "no room for data",
            &[(BUFFERS, 44, WRITE | NEXT, 1), (BUFFERS, 0, WRITE, 0)],
        ),
        (
            "a header in two",
            &[(BUFFERS, 22, WRITE | NEXT, 1), (BUFFERS, 4096, WRITE, 0)],
        ),
        (
            "readable data",
            &[(BUFFERS, 44, WRITE | NEXT, 1), (BUFFERS, 64, 0, 0)],
        ),
        ("outside", &[(0x40_0000, 4096, WRITE, 0)]),
        ("4 GiB", &[(BUFFERS, u32::MAX, WRITE, 0)]),
        ("wraps", &[(u64::MAX - 50, 4096, WRITE, 0)]),
    ];
    for (name, descs) in cases {
        let mut guest = Guest::without_buffers();
        for (index, &(addr, len, flags, next)) in (0..).zip(descs) {
            guest.driver.raw_desc(0, index, addr, len, flags, next);
        }
        guest.driver.make_available(0, 0);
        guest.driver.kick(0);
        assert!(!guest.driver.needs_reset(), "{name}: not needed yet");
        let mut client = guest.client(1);
        guest.driver.run();
        assert!(guest.driver.needs_reset(), "{name}");
        assert_eq!(read_some(&mut client), b"", "{name}");
    }
}

#[test]
fn a_small_event_buffer_stops_the_device_only_when_it_is_needed() {
    let mut guest = Guest::new();
    guest.driver.add(2, &[w(BUFFERS, 3)]);
    guest.driver.kick(2);
    assert!(!guest.driver.needs_reset());
    guest.driver.device.lock().unwrap().reset = Reset::Due;
    guest.driver.kick(2);
    assert!(guest.driver.needs_reset());
}

#[test]
fn replies_wait_for_buffers_and_packets_for_replies() {
    let mut guest = Guest::without_buffers();
    let header = guest.header(op::RW, 5, 6, 0);
    guest.driver.write(PACKET, &header.to_bytes());
    let mut taken = 0;
    for _ in 0..MAX_REPLIES + 20 {
        guest.driver.add(1, &[r(PACKET, 44)]);
        guest.driver.kick(1);
        taken += guest.driver.used(1).len();
        if taken == MAX_REPLIES {
            break;
        }
    }
    assert_eq!(taken, MAX_REPLIES);
    for _ in 0..20 {
        guest.driver.add(1, &[r(PACKET, 44)]);
    }
    guest.driver.kick(1);
    assert_eq!(guest.driver.used(1), []);
    guest.post_all();
    let replies = guest.receive();
    assert_eq!(replies.len(), MAX_REPLIES + 20);
    assert!(replies.iter().all(|reply| reply.header.op == op::RST));
    assert_eq!(guest.driver.used(1).len(), 20);
}

#[test]
fn connections_from_the_guest_are_bounded() {
    // Descriptors: ours and the servers', in one process.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let mut raised = limit;
    raised.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    if limit.maximum.is_some_and(|maximum| maximum < 4096) {
        println!("skipped: at most {:?} file descriptors", limit.maximum);
        return;
    }
    let mut guest = Guest::new();
    let server = guest.listen(9);
    let mut streams = Vec::new();
    let many = u32::try_from(MAX_CONNECTIONS).unwrap();
    for port in 0..many {
        guest.send(op::REQUEST, (9, port), &[]);
        assert_eq!(guest.receive_one().header.op, op::RESPONSE, "{port}");
        streams.push(server.accept().unwrap().0);
    }
    // One more is refused, by either side, and nothing else suffers.
    guest.send(op::REQUEST, (9, many), &[]);
    assert_eq!(guest.receive_one().header.op, op::RST);
    let _waiting = guest.client(1);
    assert!(guest.receive().is_empty());
    assert_eq!(guest.counts(), (MAX_CONNECTIONS, 0, 0));
    guest.send(op::RW, (9, 7), b"seven");
    assert_eq!(read_some(&mut streams[7]), b"seven");
    // The client that waits gets the first place that is free.
    guest.send(op::RST, (9, 7), &[]);
    assert_eq!(guest.receive_one().header.op, op::REQUEST);
}

#[test]
fn a_listener_that_does_not_accept_does_not_hold_up_the_device() {
    let mut guest = Guest::new();
    let _server = guest.listen(9);
    let mut refused = 0;
    for port in 0..600 {
        guest.send(op::REQUEST, (9, port), &[]);
        refused += usize::from(guest.receive_one().header.op == op::RST);
    }
    let (connections, _, _) = guest.counts();
    assert_eq!(connections + refused, 600);
}

#[test]
fn clients_that_say_nothing_are_bounded_and_time_out() {
    let mut guest = Guest::new();
    let silent: Vec<_> = (0..MAX_HANDSHAKES + 10)
        .map(|_| UnixStream::connect(guest.socket_path()).unwrap())
        .collect();
    guest.driver.run();
    assert_eq!(guest.counts(), (0, MAX_HANDSHAKES, 0));
    let _late = guest.client(4);
    assert!(guest.receive().is_empty());
    guest.expire();
    assert_eq!(guest.receive_one().header.dst_port, 4);
    assert_eq!(guest.counts(), (1, 10, 0));
    drop(silent);
    guest.driver.run();
    assert_eq!(guest.counts(), (1, 0, 0));
}

#[test]
fn clients_that_talk_nonsense_are_dropped() {
    let mut guest = Guest::new();
    for line in [&b"GET / HTTP/1.1\r\n"[..], &[0; 100], b"CONNECT x\n", b"\n"] {
        let mut client = UnixStream::connect(guest.socket_path()).unwrap();
        client.write_all(line).unwrap();
        assert!(guest.receive().is_empty());
        assert_eq!(read_some(&mut client), b"");
    }
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_guest_that_never_answers_loses_the_request() {
    let mut guest = Guest::new();
    let mut client = guest.client(1);
    guest.receive_one();
    guest.expire();
    assert_eq!(guest.receive_one().header.op, op::RST);
    assert_eq!(read_some(&mut client), b"");
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_thousand_clients_that_come_and_go_leave_nothing() {
    let mut guest = Guest::new();
    for _ in 0..1000 {
        let client = guest.client(1);
        let request = guest.receive_one().header;
        drop(client);
        guest.receive();
        guest.send(op::RST, (request.src_port, 1), &[]);
    }
    assert_eq!(guest.counts(), (0, 0, 0));
    let (_, client) = guest.connected_from_host(1);
    drop(client);
}

#[test]
fn every_header_byte_may_be_garbage() {
    let mut guest = Guest::new();
    let (ports, _client) = guest.connected_from_host(1);
    let good = guest.header(op::RW, ports.0, ports.1, 0).to_bytes();
    for at in 0..PKT_HEADER_SIZE {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = good;
            bytes[at] = value;
            let header = Header::parse(&bytes);
            if header.len != 0 {
                continue;
            }
            guest.send_raw(header, &[]);
            guest.receive();
            assert!(!guest.driver.needs_reset());
        }
    }
}

#[test]
fn rings_that_lie_stop_the_device() {
    for queue in 0..3 {
        let mut guest = Guest::without_buffers();
        // The event queue is of interest only then.
        guest.driver.device.lock().unwrap().reset = Reset::Due;
        guest.driver.raw_avail_idx(queue, 0x7000);
        guest.driver.kick(queue);
        assert!(guest.driver.needs_reset(), "{queue}");
    }
    let mut guest = Guest::new();
    guest.driver.raw_desc(1, 0, HIGH, 1, NEXT, 0);
    guest.driver.make_available(1, 0);
    guest.driver.kick(1);
    assert!(guest.driver.needs_reset());
}
