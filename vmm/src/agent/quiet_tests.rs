//! A connection that is held still, and gone on with, against an agent that the test plays.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_agent::frame::{self, FrameBuffer};
use guest_agent::proto::{
    BranchWanted, Branched, Done, Error, Exited, FromAgent, Hello, Pong, Stdout, ToAgent,
    exited::Status, from_agent::Kind, to_agent::Kind as Ask,
};
use snapshot_fmt::state::agent::AgentState;

use super::link::OUTPUT_WINDOW;
use super::{Agent, AgentError, ExecRequest, RestoredRequest, Stdin, Stdio};

const PATIENCE: Duration = Duration::from_secs(20);

/// The agent's side, which says what the test wants.
struct Peer {
    socket: UnixStream,
    frames: FrameBuffer,
}

impl Peer {
    fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let frames = FrameBuffer::default();
        Self { socket, frames }
    }

    fn bytes(request_id: u32, kind: Kind) -> Vec<u8> {
        let kind = Some(kind);
        let mut bytes = Vec::new();
        frame::encode(&FromAgent { request_id, kind }, &mut bytes).unwrap();
        bytes
    }

    fn say(&mut self, request_id: u32, kind: Kind) {
        self.socket
            .write_all(&Self::bytes(request_id, kind))
            .unwrap();
    }

    fn hear(&mut self) -> ToAgent {
        loop {
            if let Some(message) = self.frames.next_message().unwrap() {
                return message;
            }
            let mut bytes = [0; 4096];
            let count = self.socket.read(&mut bytes).unwrap();
            assert!(count > 0, "hung up");
            self.frames.input().extend_from_slice(&bytes[..count]);
        }
    }

    /// Whether nothing was said for a while.
    fn hears_nothing(&mut self) -> bool {
        let short = Some(Duration::from_millis(50));
        self.socket.set_read_timeout(short).unwrap();
        let result = self.socket.read(&mut [0]);
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        result.is_err()
    }
}

fn greeted() -> (Agent, Peer) {
    let (near, far) = UnixStream::pair().unwrap();
    let mut peer = Peer::new(far);
    let hello = Hello {
        min_version: 1,
        max_version: 1,
        software: "test-agent 1".into(),
        features: vec![1, 9],
        boot_id: vec![7; 16],
        stdin_window: 100,
        output_window: 0,
    };
    peer.say(0, Kind::Hello(hello));
    let agent = Agent::from_stream(near, Some(Instant::now() + PATIENCE)).unwrap();
    assert!(matches!(peer.hear().kind, Some(Ask::Hello(_))));
    (agent, peer)
}

fn exited() -> Kind {
    Kind::Exited(Exited {
        status: Some(Status::Code(0)),
        ..Exited::default()
    })
}

/// Waits until the connection is at rest, or is not.
fn wait_for_rest(agent: &Agent, rest: bool) -> Option<AgentState> {
    let end = Instant::now() + PATIENCE;
    loop {
        let state = agent.quiesce().state();
        if state.is_some() == rest {
            return state;
        }
        assert!(Instant::now() < end, "it never comes to rest: {rest}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn resumed(state: &AgentState) -> (Agent, Peer) {
    let (near, far) = UnixStream::pair().unwrap();
    let agent = Agent::resume(near, state, Some(Instant::now() + PATIENCE)).unwrap();
    (agent, Peer::new(far))
}

#[test]
fn a_connection_at_rest_goes_on_without_a_greeting() {
    let (agent, mut peer) = greeted();
    std::thread::scope(|scope| {
        let ping = scope.spawn(|| agent.ping());
        let id = peer.hear().request_id;
        peer.say(id, Kind::Pong(Pong {}));
        ping.join().unwrap().unwrap();
    });
    let state = wait_for_rest(&agent, true).unwrap();
    assert_eq!(state.last_request_id, 1);
    assert_eq!(state.output_window, OUTPUT_WINDOW);

    let (copy, mut peer) = resumed(&state);
    assert_eq!(copy.hello(), agent.hello());
    let request = RestoredRequest {
        entropy: vec![3; 32],
        realtime_ns: 5,
        ..RestoredRequest::default()
    };
    std::thread::scope(|scope| {
        let restored = scope.spawn(|| copy.restored(request.clone()));
        let message = peer.hear();
        assert_eq!(message.request_id, 2, "ids go on");
        assert_eq!(message.kind, Some(Ask::Restored(request.clone())));
        peer.say(2, Kind::Done(Done {}));
        restored.join().unwrap().unwrap();

        let refused = scope.spawn(|| copy.restored(request.clone()));
        assert_eq!(peer.hear().request_id, 3);
        peer.say(3, Kind::Error(Error::default()));
        assert!(matches!(
            refused.join().unwrap(),
            Err(AgentError::Refused { .. })
        ));
    });
}

#[test]
fn a_running_request_is_no_rest_and_is_not_disturbed() {
    let (agent, mut peer) = greeted();
    let request = agent.start(ExecRequest::default()).unwrap();
    let id = peer.hear().request_id;
    let quiet = agent.quiesce();
    assert_eq!(quiet.state(), None);
    // It goes on meanwhile.
    let data = b"out".to_vec();
    peer.say(id, Kind::Stdout(Stdout { data }));
    peer.say(id, exited());
    let mut stdout = Vec::new();
    let stdio = Stdio {
        stdin: Stdin::Null,
        stdout: &mut stdout,
        stderr: &mut std::io::sink(),
    };
    request.communicate(stdio).unwrap();
    assert_eq!(stdout, b"out");
    assert!(quiet.state().is_some());
}

#[test]
fn a_request_whose_end_has_come_is_over_whether_it_was_taken_or_not() {
    let (agent, mut peer) = greeted();
    let request = agent.start(ExecRequest::default()).unwrap();
    let id = peer.hear().request_id;
    peer.say(id, exited());
    wait_for_rest(&agent, true);
    drop(request);
    assert!(peer.hears_nothing(), "there is nothing to cancel");
}

#[test]
fn a_request_that_was_given_up_runs_until_its_end() {
    let (agent, mut peer) = greeted();
    let request = agent.start(ExecRequest::default()).unwrap();
    let id = peer.hear().request_id;
    drop(request);
    assert!(matches!(peer.hear().kind, Some(Ask::Cancel(_))));
    assert_eq!(agent.quiesce().state(), None);
    let data = b"late".to_vec();
    peer.say(id, Kind::Stdout(Stdout { data }));
    peer.say(id, exited());
    wait_for_rest(&agent, true);
}

#[test]
fn half_a_message_is_no_rest() {
    let (agent, mut peer) = greeted();
    let bytes = Peer::bytes(9, Kind::Pong(Pong {}));
    peer.socket.write_all(&bytes[..3]).unwrap();
    wait_for_rest(&agent, false);
    peer.socket.write_all(&bytes[3..]).unwrap();
    wait_for_rest(&agent, true);
    drop(peer);
    wait_for_rest(&agent, false);
}

#[test]
fn requests_wait_while_the_connection_is_held() {
    let (agent, mut peer) = greeted();
    std::thread::scope(|scope| {
        let (first, second) = (agent.quiesce(), agent.quiesce());
        let ping = scope.spawn(|| agent.ping());
        assert!(peer.hears_nothing());
        drop(first);
        assert!(peer.hears_nothing());
        assert!(second.state().is_some());
        drop(second);
        let id = peer.hear().request_id;
        peer.say(id, Kind::Pong(Pong {}));
        ping.join().unwrap().unwrap();

        // Not longer than they may, and not for a connection that is no more.
        let quiet = agent.quiesce();
        let ping = scope.spawn(|| agent.ping());
        agent.set_deadline(Some(Instant::now() + Duration::from_millis(20)));
        assert!(matches!(ping.join().unwrap(), Err(AgentError::TimedOut)));
        agent.set_deadline(None);
        let ping = scope.spawn(|| agent.ping());
        drop(peer);
        assert!(matches!(
            ping.join().unwrap(),
            Err(AgentError::Disconnected)
        ));
        assert_eq!(quiet.state(), None);
    });
}

#[test]
fn hostile_states_are_refused_or_made_fit() {
    let (agent, _peer) = greeted();
    let good = wait_for_rest(&agent, true).unwrap();
    for (min_version, max_version) in [(0, 0), (2, 9), (9, 1)] {
        let state = AgentState {
            min_version,
            max_version,
            ..good.clone()
        };
        let (near, _far) = UnixStream::pair().unwrap();
        let error = Agent::resume(near, &state, None).err();
        assert!(matches!(error, Some(AgentError::Version { .. })));
    }
    let state = AgentState {
        software: "\u{1b}[2J".into(),
        last_request_id: u32::MAX,
        ..good
    };
    let (copy, mut peer) = resumed(&state);
    assert!(!copy.hello().software.contains('\u{1b}'));
    let _request = copy.start(ExecRequest::default()).unwrap();
    assert_eq!(peer.hear().request_id, 1, "0 is no id");
}

/// What the agent is told of what it has asked.
fn answer(peer: &mut Peer) -> (u32, Branched) {
    let message = peer.hear();
    match message.kind {
        Some(Ask::Branched(branched)) => (message.request_id, branched),
        other => panic!("not an answer: {other:?}"),
    }
}

#[test]
fn what_a_guest_asks_is_refused_unless_somebody_deals_with_it() {
    let (agent, mut peer) = greeted();
    peer.say(0, Kind::BranchWanted(BranchWanted { ask: 1, count: 2 }));
    let (id, branched) = answer(&mut peer);
    assert_eq!((branched.ask, branched.names.len()), (1, 0));
    assert!(!branched.refused.is_empty());
    // It may have heard half of that.
    assert!(agent.quiesce().state().is_none());
    peer.say(id, Kind::Done(Done {}));
    wait_for_rest(&agent, true).unwrap();
    agent.answer_with(Arc::new(|wanted, _| {
        Ok(vec!["kid".to_owned(); wanted.count as usize])
    }));
    peer.say(0, Kind::BranchWanted(BranchWanted { ask: 2, count: 2 }));
    let (_, branched) = answer(&mut peer);
    assert_eq!((branched.ask, &branched.refused[..]), (2, ""));
    assert_eq!(branched.names, ["kid", "kid"]);
}

#[test]
fn an_agent_that_asks_and_does_not_hear_is_hung_up_on() {
    let (agent, mut peer) = greeted();
    for ask in 1..=5 {
        peer.say(0, Kind::BranchWanted(BranchWanted { ask, count: 1 }));
    }
    let end = Instant::now() + PATIENCE;
    while !matches!(agent.ping(), Err(AgentError::Protocol { .. })) {
        assert!(Instant::now() < end, "it goes on");
    }
}
