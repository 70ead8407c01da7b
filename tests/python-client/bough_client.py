"""A client of Bough's guest agent, written from docs/agent-protocol.md and the .proto alone.

Needs the messages that protoc makes of guest-agent/proto/agent.proto (agent_pb2) and the
protobuf package. One thread, one request at a time: enough to show the contract, and a start for
a client that does more.
"""

import socket
import struct

import agent_pb2 as pb

PORT = 1024
MAX_MESSAGE = 1 << 20
OUTPUT_WINDOW = 256 * 1024
MAX_DATA = 64 * 1024


class AgentError(Exception):
    """The agent refused a request, or ended the connection, for this reason."""

    def __init__(self, error):
        super().__init__(error.message)
        self.code = error.code


class Client:
    """A connection to the agent, by way of a sandbox's vsock.sock."""

    def __init__(self, path, timeout=60):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(path)
        self.socket.sendall(b"CONNECT %d\n" % PORT)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = self.socket.recv(1)
            if not byte:
                raise ConnectionError("the guest does not accept the connection")
            answer += byte
        if not answer.startswith(b"OK "):
            raise ConnectionError(answer.decode(errors="replace"))
        message = self.receive()
        self.hello = message.hello
        if not self.hello.min_version <= 1 <= self.hello.max_version:
            raise ConnectionError("no version in common")
        hello = pb.Hello(min_version=1, max_version=1, software="python-client 1")
        hello.output_window = OUTPUT_WINDOW
        self.send(0, hello=hello)
        self.last_id = 0

    def close(self):
        self.socket.close()

    def send(self, request_id, **kind):
        """Sends one message, such as send(7, ping=pb.Ping())."""
        body = pb.ToAgent(request_id=request_id, **kind).SerializeToString()
        self.socket.sendall(struct.pack("<I", len(body)) + body)

    def exactly(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the agent closed the connection")
            data += more
        return data

    def receive(self):
        """The next message, of whatever request."""
        (length,) = struct.unpack("<I", self.exactly(4))
        if length > MAX_MESSAGE:
            raise ConnectionError("a frame of %d bytes" % length)
        return pb.FromAgent.FromString(self.exactly(length))

    def request(self, stdin=None, **kind):
        """Makes a request; yields what the agent says of it. Output gives its credit back.

        stdin is an iterable of bytes, or None. The generator ends after the last message."""
        self.last_id += 1
        request_id = self.last_id
        self.send(request_id, **kind)
        credit = self.hello.stdin_window
        pieces = iter(stdin) if stdin is not None else None
        waiting = b""
        while True:
            while pieces is not None:
                if not waiting:
                    try:
                        waiting = next(pieces)
                        continue
                    except StopIteration:
                        self.send(request_id, stdin_close=pb.StdinClose())
                        pieces = None
                        break
                now = waiting[: min(credit, MAX_DATA)]
                if not now:
                    break
                self.send(request_id, stdin_data=pb.StdinData(data=now))
                credit -= len(now)
                waiting = waiting[len(now) :]
            message = self.receive()
            kind = message.WhichOneof("kind")
            if kind == "error" and message.request_id in (0, request_id):
                raise AgentError(message.error)
            if message.request_id != request_id:
                continue
            if kind == "credit":
                credit += message.credit.bytes
            elif kind in ("stdout", "stderr"):
                data = getattr(message, kind).data
                yield kind, data
                stream = pb.STREAM_STDOUT if kind == "stdout" else pb.STREAM_STDERR
                back = pb.Credit(stream=stream, bytes=len(data))
                self.send(request_id, credit=back)
            else:
                yield kind, getattr(message, kind)
                if kind != "started":
                    return

    def ping(self):
        return [kind for kind, _ in self.request(ping=pb.Ping())] == ["pong"]

    def run(self, *argv, stdin=None, **fields):
        """Runs a program; gives its Exited, its output and its errors."""
        argv = [word.encode() if isinstance(word, str) else word for word in argv]
        execute = pb.Exec(argv=argv, stdin=stdin is not None, **fields)
        return self.collect(self.request(stdin, exec=execute))

    def run_python(self, source, **fields):
        """Runs Python source."""
        code = pb.RunCode(language=pb.LANGUAGE_PYTHON, source=source.encode(), **fields)
        return self.collect(self.request(run_code=code))

    @staticmethod
    def collect(events):
        out = {"stdout": b"", "stderr": b"", "exited": None}
        for kind, what in events:
            if kind in ("stdout", "stderr"):
                out[kind] += what
            elif kind == "exited":
                out[kind] = what
        return out["exited"], out["stdout"], out["stderr"]

    def read_file(self, path, **fields):
        events = self.request(read_file=pb.ReadFile(path=path.encode(), **fields))
        return b"".join(what for kind, what in events if kind == "stdout")

    def write_file(self, path, pieces, **fields):
        write = pb.WriteFile(path=path.encode(), **fields)
        assert [kind for kind, _ in self.request(pieces, write_file=write)] == ["done"]

    def records(self, message, **kind):
        """The messages that a request's output is made of: frames, cut anywhere."""
        data = b""
        for event, what in self.request(**kind):
            if event != "stdout":
                continue
            data += what
            while len(data) >= 4:
                (length,) = struct.unpack_from("<I", data)
                if len(data) < 4 + length:
                    break
                yield message.FromString(data[4 : 4 + length])
                data = data[4 + length :]
        assert not data, "a list that is cut off"

    def list(self, path, **fields):
        return list(self.records(pb.FileInfo, list=pb.List(path=path.encode(), **fields)))
