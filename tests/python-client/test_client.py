"""Drives a real agent: test_client.py SOCKET. Says "all well" in the end."""

import sys

import agent_pb2 as pb
from bough_client import AgentError, Client


def refusal(code, call, *arguments, **fields):
    try:
        result = call(*arguments, **fields)
    except AgentError as error:
        assert error.code == code, (error.code, str(error))
        assert str(error), "no words"
        return
    raise AssertionError("not refused: %r" % (result,))


def main(path):
    client = Client(path)
    assert client.hello.software.startswith("bough-agent")
    assert len(client.hello.boot_id) == 16
    assert pb.FEATURE_FILES in client.hello.features
    assert client.ping()

    exited, out, err = client.run("sh", "-c", "id -un; pwd; echo oops >&2; exit 3")
    assert (out, err) == (b"user\n/home/user\n", b"oops\n"), (out, err)
    assert exited.code == 3 and exited.peak_memory_bytes > 0
    exited, out, _ = client.run("id", "-u", user="root")
    assert out == b"0\n"
    exited, out, _ = client.run("cat", stdin=[b"x" * 300_000, b"", b"end"])
    assert out == b"x" * 300_000 + b"end"
    _, out, _ = client.run("printenv", "A", env=[pb.EnvVar(name="A", value=b"b c")])
    assert out == b"b c\n"
    exited, _, _ = client.run("sleep", "1000", timeout_ms=300)
    assert exited.timed_out and exited.signal == 9
    exited, out, _ = client.run("seq", "100000")
    assert out.endswith(b"\n100000\n") and len(out) == 588895
    exited, out, _ = client.run("sh", "-c", "stty size", pty=pb.Pty(rows=11, columns=22))
    assert out == b"11 22\r\n", out
    exited, out, _ = client.run_python("import sys; print(sys.argv[1:])", args=[b"one"])
    assert out == b"['one']\n" and exited.code == 0
    refusal(pb.ERROR_CODE_NOT_FOUND, client.run, "no-such-program")
    refusal(pb.ERROR_CODE_NO_SUCH_USER, client.run, "true", user="nobody-knows")

    content = bytes(range(256)) * 4096
    client.write_file("py/file", [content[:1000], content[1000:]], parents=True, mode=0o600)
    assert client.read_file("py/file") == content
    assert client.read_file("py/file", offset=255, length=3) == b"\xff\x00\x01"
    (entry,) = client.list("py")
    assert (entry.name, entry.kind, entry.size) == (b"file", pb.FILE_KIND_FILE, len(content))
    assert (entry.mode, entry.uid) == (0o600, 1000)
    remove = pb.Remove(path=b"py", recursive=True)
    assert [kind for kind, _ in client.request(remove=remove)] == ["done"]
    refusal(pb.ERROR_CODE_NOT_FOUND, client.read_file, "py/file")
    client.close()
    print("all well")


main(sys.argv[1])
