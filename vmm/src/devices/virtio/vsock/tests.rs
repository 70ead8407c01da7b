//! The socket device between a guest and clients that behave.

use std::io::{Read, Write};
use std::net::Shutdown;

use super::muxer::{BUFFER_SIZE, FIRST_HOST_PORT};
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::testing::{CID, Guest, PACKET, ROOM, config, read_some};
use super::{Vsock, VsockError};
use crate::devices::virtio::testing::{BUFFERS, FakeDriver, HIGH, r, w};

#[test]
fn says_its_context_id() {
    let mut guest = Guest::new();
    assert_eq!(u64::from_le_bytes(guest.driver.config(0)), u64::from(CID));
}

#[test]
fn a_host_client_reaches_the_guest() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1024);
    assert_eq!(ports.0, FIRST_HOST_PORT);
    client.write_all(b"hello").unwrap();
    let packet = guest.receive_one();
    assert_eq!(
        (packet.header.op, &packet.data[..]),
        (op::RW, &b"hello"[..])
    );
    guest.send(op::RW, ports, b"world");
    assert_eq!(read_some(&mut client), b"world");
    assert!(guest.receive().is_empty());
}

#[test]
fn the_guest_reaches_a_host_server() {
    let mut guest = Guest::new();
    let mut server = guest.connected_from_guest((9000, 77));
    guest.send(op::RW, (9000, 77), b"hello");
    assert_eq!(read_some(&mut server), b"hello");
    server.write_all(b"world").unwrap();
    assert_eq!(guest.receive_one().data, b"world");
}

#[test]
fn bytes_right_after_the_line_belong_to_the_connection() {
    let mut guest = Guest::new();
    let mut client = guest.client(7);
    client.write_all(b"early\n").unwrap();
    let request = guest.receive_one().header;
    guest.send(op::RESPONSE, (request.src_port, 7), &[]);
    assert_eq!(guest.receive_one().data, b"early\n");
}

#[test]
fn a_refusal_closes_the_connection() {
    let mut guest = Guest::new();
    let mut client = guest.client(7);
    let request = guest.receive_one().header;
    guest.send(op::RST, (request.src_port, 7), &[]);
    assert_eq!(read_some(&mut client), b"");
    assert_eq!(guest.counts(), (0, 0, 0));
    // And the guest's, if nobody listens.
    guest.send(op::REQUEST, (9000, 1), &[]);
    let reset = guest.receive_one().header;
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (op::RST, 9000, 1)
    );
}

#[test]
fn clients_wait_for_a_driver() {
    let dir = tempfile::tempdir().unwrap();
    let driver = FakeDriver::new(Vsock::new(config(&dir)).unwrap());
    let mut guest = Guest {
        driver,
        dir,
        buf_alloc: 4096,
        fwd_cnt: 0,
    };
    let _client = guest.client(5);
    guest.driver.run();
    guest.driver.start();
    guest.post_all();
    assert_eq!(guest.receive_one().header.op, op::REQUEST);
}

#[test]
fn a_batch_to_the_guest_is_one_interrupt() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.connected_from_host(1);
    let before = guest.driver.irq.count();
    client.write_all(&[7; 10 * ROOM]).unwrap();
    let packets = guest.receive();
    assert_eq!(packets.len(), 10);
    assert_eq!(guest.driver.irq.count(), before + 1);
}

#[test]
fn much_data_arrives_whole_in_both_directions() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    let data: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    let sent = data.clone();
    let mut peer = client.try_clone().unwrap();
    let writer = std::thread::spawn(move || peer.write_all(&sent).unwrap());
    let mut got = Vec::new();
    while got.len() < data.len() {
        guest.driver.run_for(10);
        for packet in guest.receive() {
            guest.fwd_cnt += packet.header.len;
            got.extend(packet.data);
        }
        guest.send(op::CREDIT_UPDATE, ports, &[]);
    }
    writer.join().unwrap();
    assert!(got == data);

    let want = data.len();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; want];
        client.read_exact(&mut got).unwrap();
        (got, client)
    });
    let (mut sent, mut known) = (0u32, 0);
    for chunk in data.chunks(60_000) {
        let len = u32::try_from(chunk.len()).unwrap();
        while BUFFER_SIZE - (sent - known) < len {
            guest.driver.run_for(10);
            for packet in guest.receive() {
                known = packet.header.fwd_cnt;
            }
        }
        guest.send(op::RW, ports, chunk);
        sent += len;
    }
    while known < sent - BUFFER_SIZE / 2 {
        guest.driver.run_for(10);
        known = guest.receive().last().map_or(known, |p| p.header.fwd_cnt);
    }
    assert!(reader.join().unwrap().0 == data);
}

#[test]
fn packets_wait_for_buffers() {
    let mut guest = Guest::without_buffers();
    let _client = guest.client(1);
    guest.driver.run();
    guest.post(3);
    guest.driver.kick(0);
    assert_eq!(guest.driver.used(0), [(3, 44)]);
}

#[test]
fn nothing_is_read_without_credit() {
    let mut guest = Guest::new();
    guest.buf_alloc = 10;
    let (ports, mut client) = guest.connected_from_host(1);
    client.write_all(b"0123456789abcdef").unwrap();
    let packets = guest.receive();
    assert_eq!(packets[0].data, b"0123456789");
    // One request for more, and then silence.
    assert_eq!(packets[1].header.op, op::CREDIT_REQUEST);
    assert_eq!(packets.len(), 2);
    guest.send(op::CREDIT_UPDATE, ports, &[]);
    assert!(guest.receive().is_empty());
    guest.fwd_cnt = 4;
    guest.send(op::CREDIT_UPDATE, ports, &[]);
    assert_eq!(guest.receive()[0].data, b"abcd");
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    guest.send(op::RW, ports, b"abc");
    assert_eq!(read_some(&mut client), b"abc");
    guest.send(op::CREDIT_REQUEST, ports, &[]);
    let update = guest.receive_one().header;
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, 3));
    assert_eq!(update.buf_alloc, BUFFER_SIZE);
}

#[test]
fn the_guest_may_close_one_direction() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    guest.send(op::RW, ports, b"last");
    guest.shut_down(ports, SHUTDOWN_SEND);
    assert_eq!(read_some(&mut client), b"last");
    assert_eq!(read_some(&mut client), b"");
    client.write_all(b"still").unwrap();
    assert_eq!(guest.receive_one().data, b"still");
    guest.shut_down(ports, SHUTDOWN_RECEIVE);
    assert_eq!(guest.receive_one().header.op, op::RST);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn the_host_may_close_one_direction() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive();
    assert_eq!(packets[0].data, b"last");
    let shutdown = packets[1].header;
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    guest.send(op::RW, ports, b"still");
    assert_eq!(read_some(&mut client), b"still");
    drop(client);
    let shutdown = guest.receive_one().header;
    assert_eq!((shutdown.op, shutdown.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    guest.send(op::RST, ports, &[]);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_client_that_goes_is_told_once_and_its_bytes_arrive() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.connected_from_host(1);
    client.write_all(b"bye").unwrap();
    drop(client);
    let packets = guest.receive();
    assert_eq!(packets.len(), 2, "{packets:?}");
    assert_eq!(packets[0].data, b"bye");
    assert_eq!(packets[1].header.op, op::SHUTDOWN);
    assert_eq!(packets[1].header.flags, SHUTDOWN_BOTH);
    // A guest that never answers is reset in the end.
    guest.expire();
    assert_eq!(guest.receive_one().header.op, op::RST);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_client_that_goes_before_the_answer_is_forgotten() {
    let mut guest = Guest::new();
    let client = guest.client(1);
    let request = guest.receive_one().header;
    drop(client);
    assert_eq!(guest.receive_one().header.op, op::RST);
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.send(op::RESPONSE, (request.src_port, 1), &[]);
    assert_eq!(guest.receive_one().header.op, op::RST);
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    // More than the socket takes, as nobody reads.
    let mut sent = 0;
    let chunk = vec![1; 60_000];
    for _ in 0..4 {
        guest.send(op::RW, ports, &chunk);
        sent += chunk.len();
    }
    for _ in 0..2 {
        guest.send(op::CREDIT_REQUEST, ports, &[]);
        let update = guest.receive().pop().unwrap().header;
        let room = BUFFER_SIZE - (u32::try_from(sent).unwrap() - update.fwd_cnt);
        let len = chunk.len().min(room as usize);
        guest.send(op::RW, ports, &chunk[..len]);
        sent += len;
    }
    guest.shut_down(ports, SHUTDOWN_BOTH);
    assert_eq!(guest.receive().pop().unwrap().header.op, op::RST);
    assert_eq!(guest.counts(), (0, 0, 1));
    let mut got = 0;
    loop {
        guest.driver.run();
        match read_some(&mut client).len() {
            0 => break,
            len => got += len,
        }
    }
    assert_eq!(got, sent);
    assert_eq!(guest.counts(), (0, 0, 0));
}

#[test]
fn a_host_that_stops_reading_is_told_to_the_guest() {
    let mut guest = Guest::new();
    let (ports, client) = guest.connected_from_host(1);
    client.shutdown(Shutdown::Read).unwrap();
    guest.send(op::RW, ports, b"nobody");
    let shutdown = guest.receive_one().header;
    assert_eq!(shutdown.flags, SHUTDOWN_RECEIVE);
    assert_eq!(shutdown.fwd_cnt, 6);
}

#[test]
fn packets_of_any_framing_are_taken() {
    let mut guest = Guest::new();
    let (ports, mut client) = guest.connected_from_host(1);
    let header = guest.header(op::RW, ports.0, ports.1, 6);
    guest.driver.write(PACKET, &header.to_bytes());
    guest.driver.write(PACKET + 44, b"abc");
    guest.driver.write(HIGH + 0xf_0000, b"def");
    let chains: [&[_]; 2] = [
        // The header in two, the data in two and one of them with the header.
        &[r(PACKET, 20), r(PACKET + 20, 27), r(HIGH + 0xf_0000, 3)],
        // A buffer that is longer than the packet, and an empty one.
        &[r(PACKET, 47), r(PACKET, 0), r(HIGH + 0xf_0000, 4000)],
    ];
    for chain in chains {
        guest.driver.add(1, chain);
        guest.driver.kick(1);
        assert_eq!(read_some(&mut client), b"abcdef");
    }
}

#[test]
fn a_receive_buffer_may_have_a_descriptor_for_its_header() {
    let mut guest = Guest::without_buffers();
    guest.driver.add(0, &[w(BUFFERS, 44), w(BUFFERS + 64, 64)]);
    let _client = guest.client(3);
    guest.driver.run();
    assert_eq!(guest.driver.used(0), [(0, 44)]);
}

#[test]
fn the_socket_comes_and_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    // One that a killed process left is taken over.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let vsock = Vsock::new(config(&dir)).unwrap();
    assert!(path.exists());
    let error = Vsock::new(config(&dir)).err().unwrap();
    assert!(matches!(error, VsockError::Listen { .. }), "in use");
    drop(vsock);
    assert!(!path.exists());
    std::fs::write(&path, "a file").unwrap();
    assert!(Vsock::new(config(&dir)).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}

#[test]
fn a_reset_ends_all_connections() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.connected_from_host(1);
    let _early = guest.client(2);
    guest.receive();
    guest.driver.restart();
    assert_eq!(read_some(&mut client), b"");
    assert_eq!(guest.counts(), (0, 0, 0));
    guest.post_all();
    guest.connected_from_host(1);
}
