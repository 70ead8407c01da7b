# A Python interpreter that stands ready: it imports what it is told to, and from then on makes copies of itself, each of
# which runs one program as a fresh interpreter would. The agent's side is in mod.rs and standby.rs.
#
# It begins as the program's user, with one socket as its standard input, output and error. On that come this text and the
# names of modules, and then one packet per copy that is wanted, with the copy's own socket and its standard streams.
# The original runs no program. What it keeps of itself is out of sys.modules before the first module is imported.
import sys
was_there = set(sys.modules)
import _ctypes, _signal, _socket, _weakref, atexit, fcntl, gc, os

gc.disable()
control = _socket.socket(fileno=os.dup(0))
null = os.open("/dev/null", os.O_RDWR)
for fd in 0, 1, 2:
    os.dup2(null, fd)
os.close(null)

libc = _ctypes.dlopen(None, 0)
c_prctl, c_fflush, c_getrusage = (_ctypes.dlsym(libc, name) for name in ("prctl", "fflush", "getrusage"))

# More than there can be of open files.
FDS_MAX = 1 << 30

# What a copy runs before it is ready, for the sake of the memory that it touches.
TRIAL = b"""import os, sys
class Class:
    def method(self, *args, **kwargs):
        return [f"{arg!r}" for arg in args]
def function(n):
    try:
        return Class().method(n)[1]
    except IndexError:
        return sorted({n: os.getcwd()}.items())
for n in range(9):
    print(n, function(n), len(sys.argv), sep=", ", flush=True)
raise ValueError
"""


def let_others_look(yes):
    """Programs of the same user may trace this process (PR_SET_DUMPABLE), or not."""
    if _ctypes.call_function(c_prctl, (4, yes, 0, 0, 0)):
        raise OSError("prctl failed")


def path_entries(value):
    """What site makes of PYTHONPATH."""
    return [os.path.abspath(os.fsdecode(entry)) for entry in value.split(b":")] if value else []


def seed(modules):
    """Makes the state of random generators anew: a snapshot may bring this process back many times."""
    if "random" in modules:
        modules["random"].seed(int.from_bytes(os.urandom(32), "little"))
    if "numpy.random" in modules:
        modules["numpy.random"].seed(list(os.urandom(32)))
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(32), 32)
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None
    if "uuid" in modules:
        modules["uuid"]._node = None


def flush(streams):
    """Flushes as the interpreter does at its end: 120 if that fails, for standard output with a word about it."""
    status = 0
    for stream in streams:
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as error:
            status = 120
            if stream is not sys.stderr and sys.stderr is not None:
                print(f"Exception ignored in: {stream!r}", file=sys.stderr)
                show(error)
    return status


def exit_status(error):
    """What SystemExit asks for."""
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 255 if -(1 << 63) <= code < 1 << 63 else 255
    if sys.stderr is not None:
        print(code, file=sys.stderr)
    return 1


def show(error):
    """Prints an exception that came out of a function that we called."""
    error.__traceback__ = error.__traceback__.tb_next
    sys.__excepthook__(type(error), error, error.__traceback__)


def report(error, traceback):
    """Prints an exception that nobody caught; says with which status the program ends for it."""
    if isinstance(error, SystemExit):
        return exit_status(error)
    kind = type(error)
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, traceback
    try:
        hook = sys.excepthook
    except AttributeError:
        print("sys.excepthook is missing", file=sys.stderr)
        hook = sys.__excepthook__
    try:
        hook(kind, error, traceback)
    except SystemExit as second:
        return exit_status(second)
    except BaseException as second:
        print("Error in sys.excepthook:", file=sys.stderr)
        show(second)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(kind, error, traceback)
    return 1


def finish(status, trial):
    """The end of the interpreter, as far as a program can see it: threads, exit functions, and its objects."""
    try:
        if not trial and "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
    except BaseException as error:
        print(f"Exception ignored in: {sys.modules['threading']!r}", file=sys.stderr)
        show(error)
    if not trial:
        atexit._run_exitfuncs()
    status = flush((sys.stdout, sys.stderr)) or status
    # Threads that are left get no more turns, unless we wait.
    sys.setswitchinterval(100_000)
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    sys.last_type = sys.last_value = sys.last_traceback = None
    names = [name for name in sys.modules if name not in warm_modules]
    alive = []
    for name in names:
        try:
            alive.append(_weakref.ref(sys.modules[name]))
        except TypeError:
            pass
        del sys.modules[name]
    gc.collect()
    for module in reversed(alive):
        module = module()
        # First what is private, then the rest.
        for private in (True, False) if isinstance(module, type(sys)) else ():
            for name in list(module.__dict__):
                if name != "__builtins__" and private == (name[:1] == "_" and name[1:2] != "_"):
                    module.__dict__[name] = None
    module = None
    gc.collect()
    status = flush((sys.stdout, sys.stderr)) or status
    _ctypes.call_function(c_fflush, (None,))
    return status


def last_word(status, trial):
    """Says that the program is over, and what it used. The rest of a process's end is for the kernel, which takes its time to clear the memory."""
    # Not of one kind with literals, which are shared: these are written to.
    usage, children = bytes(144), bytes(144)
    _ctypes.call_function(c_getrusage, (0, usage))
    _ctypes.call_function(c_getrusage, (-1, children))
    word = b"end" + bytes([status]) + usage + children
    # Files and sockets are closed before the word, for they may be waited for.
    first = FDS_MAX - 1 if trial else 3
    os.closerange(first, own.fileno())
    os.closerange(max(first, own.fileno() + 1), FDS_MAX)
    try:
        trial or own.send(word)
    except OSError:
        pass


let_others_look(0)
names = control.recv(1 << 16).decode()
for name in set(sys.modules) - was_there:
    del sys.modules[name]
if not sys.flags.safe_path:
    del sys.path[0]
started_path = os.environb.get(b"PYTHONPATH")
started_entries = path_entries(started_path)
for name in filter(None, names.split(",")):
    try:
        __import__(name)
    except BaseException as error:
        control.send(f"{name}: {type(error).__name__}: {error}".encode(errors="replace")[:4096])
        os._exit(1)
flush((sys.stdout, sys.stderr))
warm_modules = set(sys.modules) - {"__main__"}
# What is made once, at its first use, every copy then has.
try:
    exec(compile(TRIAL, "/main.py", "exec", dont_inherit=True), {})
except ValueError:
    pass
gc.collect()
gc.freeze()
control.send(b"ready")

while True:
    data, rights, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(16), _socket.MSG_CMSG_CLOEXEC)
    if not data:
        os._exit(0)
    fds = [int.from_bytes(rights[0][2][at : at + 4], sys.byteorder) for at in range(0, 16, 4)]
    try:
        child = os.fork()
        if child == 0:
            # The copy is nobody's child but the agent's, to which it falls as an orphan.
            if os.fork() == 0:
                break
            os._exit(0)
        os.waitpid(child, 0)
    except OSError:
        # The agent finds the copy's socket closed.
        pass
    for fd in fds:
        os.close(fd)

# From here on it is a copy.
control.close()
# Its socket is out of the way of what a program opens.
own = _socket.socket(fileno=fcntl.fcntl(fds[0], fcntl.F_DUPFD_CLOEXEC, 20))
os.close(fds[0])
os.setpgid(0, 0)
gc.enable()

# Twice: first with a trial, for what it touches need not be copied from the original's memory when a program waits.
started_sys_path = sys.path[:]
for trial in True, False:
    if trial:
        counts = b"1 %d 1" % len(os.environb)
        fields = b"/main.py", b"", counts, b"", *(b"=".join(variable) for variable in os.environb.items()), TRIAL
        data = b"\0".join(fields)
    else:
        for fd in 0, 1, 2:
            os.dup2(fds[fd + 1], fd)
            os.close(fds[fd + 1])
        # The C library gives back to the kernel what is free at the end of its heap, as after something large: now rather than then.
        with open("/dev/null", "rb", buffering=0) as null:
            null.read(1 << 16)
        # An interrupt ends it until it is the program, as it would a fresh interpreter.
        interrupt = _signal.getsignal(_signal.SIGINT)
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        try:
            own.send(b"ready")
            data = own.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            os._exit(1)
    path, cwd, counts, rest = data.split(b"\0", 3)
    arguments, variables, is_inline = map(int, counts.split())
    *rest, source = rest.split(b"\0", arguments + variables)
    try:
        if cwd:
            os.chdir(cwd)
        cwd = b""
        if not is_inline:
            with open(path, "rb") as file:
                source = file.read()
    except OSError as error:
        own.send(b"no" + (b"d" if cwd else b"f") + error.errno.to_bytes(4, sys.byteorder))
        os._exit(1)
    variables = dict(variable.split(b"=", 1) for variable in rest[arguments:])
    if list(variables.items()) != list(os.environb.items()):
        os.environb.clear()
        os.environb.update(variables)
    path = os.fsdecode(path)
    sys.argv = [path, *map(os.fsdecode, rest[:arguments])]
    sys.orig_argv = [sys.orig_argv[0], *sys.argv]
    sys.path[:] = started_sys_path
    if variables.get(b"PYTHONPATH") != started_path:
        entries = path_entries(variables.get(b"PYTHONPATH"))
        old = [entry for entry in sys.path if entry not in started_entries]
        sys.path[:] = dict.fromkeys(entries + old)
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(path))
    seed(sys.modules)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except BaseException:
        # A fresh interpreter says best what is wrong with it.
        code = None
    let_others_look(0 if trial else 1)
    if code is None:
        os.execv(sys.executable, sys.orig_argv)
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__loader__ = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", path)
    main.__annotations__ = {}
    main.__builtins__ = sys.modules["builtins"]
    main.__file__ = path
    main.__cached__ = None
    del main, source, data, rest, variables
    error = None
    try:
        if not trial and interrupt is not None:
            _signal.signal(_signal.SIGINT, interrupt)
        exec(code, sys.modules["__main__"].__dict__)
    except BaseException as raised:
        error = raised
    flush((sys.stderr, sys.stdout))
    status = 0
    interrupted = isinstance(error, KeyboardInterrupt)
    if error is not None:
        error.__traceback__ = error.__traceback__.tb_next
        status = report(error, error.__traceback__)
        error = None
    status = finish(status, trial)
    if trial:
        last_word(status, True)
        del sys.last_type, sys.last_value, sys.last_traceback
        sys.setswitchinterval(0.005)

if interrupted:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    os.kill(os.getpid(), _signal.SIGINT)
last_word(status, False)
os._exit(status)
