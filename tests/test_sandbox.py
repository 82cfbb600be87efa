"""Programs that attack what runs them, for real, and what is said of how they ended.

Bombs are small: were a limit not to hold, they would end by themselves before the machine notices.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bubblewrapped import require_bubblewrap

from antipasto.sandbox import (
    Bubblewrap,
    Limits,
    NotASandboxWarning,
    NotIsolatedError,
    Program,
    Remote,
    Result,
    RlimitsOnly,
    Sandbox,
    SandboxError,
    bubblewrap,
    seccomp,
    watching,
)
from antipasto.sandbox.leftovers import read_left
from antipasto.sandbox.protocol import environment

MIB = 2**20
Kind = Callable[[Limits], Sandbox]
SMALL = Limits(
    cpu_seconds=5, wall_seconds=30, memory_bytes=96 * MIB, processes=8, output_bytes=100_000, file_bytes=4 * MIB
)


def limited(**changes: float) -> Limits:
    return Limits(**{**vars(SMALL), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _bubblewrap_is_there() -> None:
    require_bubblewrap()


@pytest.fixture
def box() -> Iterator[Bubblewrap]:
    with Bubblewrap(SMALL) as sandbox:
        yield sandbox


def plain(limits: Limits) -> RlimitsOnly:
    with pytest.warns(NotASandboxWarning, match="not a sandbox"):
        return RlimitsOnly(limits)


KINDS: dict[str, Kind] = {"bubblewrap": Bubblewrap, "rlimits": plain}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def python(code: str, *words: str, **rest: object) -> Program:
    return Program(["python3", "-c", code, *words], **rest)  # type: ignore[arg-type]


def run(kind: Kind, program: Program, **limits: float) -> Result:
    with kind(limited(**limits)) as sandbox:
        return sandbox.run(program)


def said(result: Result) -> str:
    """What a program printed that ended well."""
    assert result.ok, result
    return result.stdout.decode().strip()


def processes(mark: str) -> list[int]:
    """The processes of the machine, in whatever namespace, that have this word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A word for a program's command; soon after the test, no process has it."""
    word = f"mark-{uuid.uuid4().hex}"
    yield word
    try:
        eventually(lambda: processes(word) == [], 10)
    finally:
        for process in processes(word):
            os.kill(process, signal.SIGKILL)


def running(mark: str) -> list[int]:
    """Those of the programs themselves: what starts them has all of their words, too."""
    return [p for p in processes(mark) if Path(f"/proc/{p}/cmdline").read_bytes().startswith(b"python3\0")]


def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


# ── what it does for programs that behave ────────────────────────────────────────────────────────────────────────────


def test_what_a_program_says_and_leaves(kind: Kind) -> None:
    program = Program(
        ["python3", "main.py", "two words", ""],
        files={
            "main.py": "import sys, pathlib, lib.a\n"
            "print(sys.argv[1:], lib.a.x, sys.stdin.read())\n"
            "print(pathlib.Path('data').read_bytes(), file=sys.stderr)\n"
            "pathlib.Path('new').mkdir(); pathlib.Path('new/out').write_bytes(b'\\0\\xff')\n"
            "sys.exit(3)\n",
            "lib/a.py": "x = 'ü'\n",
            "data": b"\x00\xfe",
        },
        stdin="käse",
        keep=["new/out", "data", "nothing", "no/thing"],
    )
    result = run(kind, program)
    assert result.stdout.decode() == "['two words', ''] ü käse\n"
    assert result.stderr == b"b'\\x00\\xfe'\n"
    assert (result.exit_code, result.limit, result.ok, result.signal) == (3, None, False, None)
    assert result.files == {"new/out": b"\0\xff", "data": b"\x00\xfe"}
    assert result.refused == {"nothing": "missing", "no/thing": "missing"}
    assert 0 < result.wall_seconds < SMALL.wall_seconds


def test_a_signal_and_a_command_that_is_not_there(kind: Kind) -> None:
    with kind(SMALL) as sandbox:
        ended = sandbox.run(python("import os; os.kill(os.getpid(), 11)"))
        assert (ended.exit_code, ended.signal, ended.limit, ended.stderr) == (139, signal.SIGSEGV, None, b"")
        missing = sandbox.run(Program(["nonesuch"]))
        assert missing.exit_code == 127
        assert b"nonesuch" in missing.stderr
        assert sandbox.run(Program(["exit", "0"])).exit_code == 127, "a shell's own word was run"
        assert sandbox.run(Program(["/usr"])).exit_code == 126


def test_output_may_be_any_bytes_and_streams_may_be_closed(kind: Kind) -> None:
    with kind(SMALL) as sandbox:
        bytes_of = python(r"import os; os.write(1, b'\xff\0\xc3'); os.write(2, b'\x80')")
        assert sandbox.run(bytes_of).stdout == b"\xff\0\xc3"
        assert sandbox.run(python("import os; os.closerange(0, 3); os._exit(7)")).exit_code == 7
        assert said(sandbox.run(python("import sys; print(repr(sys.stdin.read()))"))) == "''"


def test_the_environment_is_the_same_everywhere(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    monkeypatch.setenv("LC_ALL", "C")
    code = "import os, sys; print(sorted(set(os.environ) - {'PWD'}), os.environ['LC_ALL'], os.umask(0), hash('a'))"
    with kind(SMALL) as sandbox:
        one, other = (said(result) for result in sandbox.run_many([python(code)] * 2))
    assert one == other
    assert one.startswith(f"{sorted(environment('', ''))} C.UTF-8 ")


def test_no_descriptor_but_three_comes_along(kind: Kind) -> None:
    code = "import os; print(sorted(os.listdir('/proc/self/fd')))"
    assert said(run(kind, python(code))) == "['0', '1', '2', '3']"


def test_what_ordinary_programs_need(kind: Kind) -> None:
    code = """
import asyncio, multiprocessing, os, random, sqlite3, subprocess, sys, tempfile
with multiprocessing.Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
assert asyncio.run(asyncio.sleep(0, 3)) == 3
with tempfile.TemporaryDirectory() as folder: sqlite3.connect(f'{folder}/x').execute('create table t (a)')
assert subprocess.run(['sh', '-c', 'cat /dev/stdin > /dev/stdout'], input=b'a', capture_output=True).stdout == b'a'
assert len(os.urandom(9)) == 9 and os.path.expanduser('~') == os.getcwd()
print(open('/dev/stdin').read(), file=open('/dev/null', 'w')); print('well')
"""
    with kind(Limits()) as sandbox:
        assert said(sandbox.run(python(code, stdin="a"))) == "well"


def test_results_are_in_order_and_folders_are_each_programs_own(kind: Kind) -> None:
    code = "import os, sys, time; open('x', 'x').close(); time.sleep(.2 / (1 + int(sys.argv[1]))); print(sys.argv[1])"
    with kind(SMALL) as sandbox:
        results = sandbox.run_many((python(code, str(i)) for i in range(5)), workers=2)
    assert [said(result) for result in results] == ["0", "1", "2", "3", "4"]


def test_two_run_at_once() -> None:
    meeting = threading.Barrier(2, timeout=30)

    def call(program: Program, limits: Limits) -> Result:
        meeting.wait()
        return Result(limits.processes, None, b"", b"", False, False, 0.0)

    with Remote(call, limited(processes=5)) as sandbox:
        assert [result.exit_code for result in sandbox.run_many([python("")] * 4, workers=2)] == [5] * 4


def test_an_error_of_the_service_comes_out() -> None:
    def call(program: Program, limits: Limits) -> Result:
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError, match="no route"):
        Remote(call).run(python(""))
    with pytest.raises(ValueError, match="must return a Result, got NoneType"):
        Remote(lambda program, limits: None).run(python(""))  # type: ignore[arg-type, return-value]


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HOLD = "import time; time.sleep(60)"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(kind: Kind, stream: str, mark: str) -> None:
    result = run(kind, python(f"import sys\nwhile True: sys.{stream}.write('x' * 5000)", mark))
    assert (result.limit, result.exit_code, result.ok) == ("output", 137, False)
    assert getattr(result, stream) == b"x" * SMALL.output_bytes
    assert (result.stdout_truncated, result.stderr_truncated) == (stream == "stdout", stream == "stderr")


def test_output_of_just_the_limit_is_all_there(kind: Kind) -> None:
    with kind(SMALL) as sandbox:
        full = sandbox.run(python(f"print('x' * {SMALL.output_bytes}, end='')"))
        assert (full.ok, len(full.stdout), full.stdout_truncated) == (True, SMALL.output_bytes, False)
        more = sandbox.run(python(f"print('x' * {SMALL.output_bytes})"))
    assert (more.limit, len(more.stdout), more.stdout_truncated) == ("output", SMALL.output_bytes, True)


def test_an_endless_loop_that_ignores_every_signal(kind: Kind, mark: str) -> None:
    code = "import signal\nfor s in {*range(1, 32)} - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
    assert run(kind, python(code + "while True: pass", mark), cpu_seconds=0.3).limit == "cpu"
    result = run(kind, python(code + HOLD, mark), wall_seconds=0.5)
    assert (result.limit, result.exit_code) == ("wall", 137)
    assert 0.5 < result.wall_seconds < 20


def test_the_kernel_ends_a_loop_that_the_watch_overlooks(
    kind: Kind, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    monkeypatch.setattr(watching, "use", lambda *_, **__: watching.Usage())
    monkeypatch.setattr(bubblewrap, "use", lambda *_, **__: watching.Usage())
    result = run(kind, python("while True: pass", mark), cpu_seconds=0.1)
    assert result.exit_code in (128 + signal.SIGXCPU, 137)
    assert result.wall_seconds < 25


# code, the limits that it has instead of the small ones, and the one that it goes over
OVER: dict[str, tuple[str, dict[str, float], str]] = {
    "time of children, each of which is short": (
        "import os, time\nwhile True:\n if not os.fork():\n  while time.process_time() < .1: pass\n  os._exit(0)\n os.wait()",
        {"cpu_seconds": 0.5},
        "cpu",
    ),
    "a memory bomb": (
        "import time\nheld = []\nwhile len(held) < 60: held.append(bytearray(b'x') * 2**22); time.sleep(.02)",
        {},
        "memory",
    ),
    "memory of all processes": (
        f"import os, time\nfor _ in range(4): os.fork()\nx = bytearray(b'x') * {12 * MIB}\n{HOLD}",
        {"processes": 20},
        "memory",
    ),
    "a fork bomb of 64 processes": (f"import os\nfor _ in range(6): os.fork()\n{HOLD}", {}, "processes"),
    "threads": (
        "import threading, time\nfor _ in range(12): threading.Thread(target=time.sleep, args=(60,)).start()",
        {"memory_bytes": 512 * MIB},
        "processes",
    ),
}


@pytest.mark.parametrize("what", OVER)
def test_a_limit_is_for_all_processes_together(kind: Kind, what: str, mark: str) -> None:
    code, limits, limit = OVER[what]
    result = run(kind, python(code, mark), **limits)
    assert (result.limit, result.exit_code) == (limit, 137)


def test_address_space_is_refused_by_the_kernel(kind: Kind) -> None:
    result = run(kind, python(f"bytearray({3 * SMALL.memory_bytes})"))
    assert (result.exit_code, result.limit) == (1, None)
    assert b"MemoryError" in result.stderr


HIDDEN = """
import ctypes, errno, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in {"shmget": (0, 2**20, 0o1777), "msgget": (0, 0o1777), "semget": (0, 1, 0o1777)}.items():
    print(name, errno.errorcode[ctypes.get_errno()] if getattr(libc, name)(*arguments) < 0 else "made")
try: os.memfd_create("x"); print("memfd_create made")
except OSError as error: print("memfd_create", errno.errorcode[error.errno])
"""


def test_no_memory_is_held_where_it_does_not_count(box: Bubblewrap) -> None:
    names = ("shmget", "msgget", "semget", "memfd_create")
    assert said(box.run(python(HIDDEN))).splitlines() == [f"{name} EPERM" for name in names]


def test_a_fork_bomb_that_the_watch_overlooks(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    monkeypatch.setattr(bubblewrap, "use", lambda *_, **__: watching.Usage())
    code = "import os, time\nmade = 0\ntry:\n for _ in range(64):\n  if not os.fork(): time.sleep(60)\n  made += 1\n"
    code += "except BlockingIOError: print(made)"
    with Bubblewrap(SMALL) as sandbox:
        made = [int(said(result)) for result in sandbox.run_many([python(code, mark)] * 2, workers=2)]
    # without the shell and itself; of each sandbox by itself
    assert made == [SMALL.processes + bubblewrap._ABOVE - 2] * 2


def test_a_huge_file(kind: Kind) -> None:
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nwith open('out', 'wb', 0) as file:\n"
    code += " for _ in range(64): file.write(bytes(2**18))"  # 16 MiB
    result = run(kind, python(code, keep=["out"]))
    assert result.limit == "files"
    assert result.files == {}
    assert result.refused == {"out": "larger than 100000 bytes"}


def test_a_file_as_large_as_may_be_handed_back(kind: Kind) -> None:
    code = "open('a', 'w').write('x' * 100_000); open('b', 'w').write('x' * 100_001); open('c', 'w').truncate(2**21)"
    result = run(kind, python(code, keep=["a", "b", "c"]))
    assert (result.ok, list(result.files)) == (True, ["a"])
    assert result.refused == dict.fromkeys("bc", "larger than 100000 bytes")


@pytest.mark.parametrize("folder", ["/box", "/tmp", "/dev/shm"])
def test_many_files(box: Bubblewrap, folder: str) -> None:
    large = "for i in range(40): open(f'{i}', 'wb').write(bytes(2**18))"
    small = "for i in range(9000): open(f'{i}', 'wb').close()"
    for code in (large, small):
        assert box.run(python(f"import os; os.chdir({folder!r})\n{code}")).limit == "files"


def test_there_is_no_room_for_more_even_if_the_watch_overlooks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap._Inside, "file_bytes", lambda inside: 0)
    code = "import errno\ntry:\n for i in range(60): open(f'{i}', 'wb').write(bytes(2**18))\n"
    code += "except OSError as error: print(i, errno.errorcode[error.errno])"
    with Bubblewrap(SMALL) as sandbox:
        assert said(sandbox.run(python(code))) == "32 ENOSPC"


# ── what is outside ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_of_the_machine_are_not_there(box: Bubblewrap, tmp_path: Path) -> None:
    mine = tmp_path / "secret"
    mine.write_text("secret")
    places = [
        str(mine),
        "/etc/shadow",
        "/etc/passwd",
        "/home",
        "/proc/1/root/etc/passwd",
        str(Path.home() / ".ssh"),
        __file__,
    ]
    places += ["/sys", "/var", "/proc/1/cwd/../etc/passwd", "/.dockerenv", "/boot", "/etc/hostname"]
    code = "import os, sys; print([p for p in sys.argv[1:] if os.path.lexists(p)])"
    assert said(box.run(python(code, *places))) == "[]"


def test_nothing_outside_is_written(box: Bubblewrap, tmp_path: Path) -> None:
    code = """
import os, sys
for folder in sys.argv[1:]:
    try: open(f'{folder}/made', 'x'); print(folder)
    except OSError: pass
for path in ('/proc/sys/kernel/hostname', '/proc/sys/vm/drop_caches', '/run/stdin', '/proc/sysrq-trigger', sys.executable):
    try: open(path, 'r+b'); print(path)
    except OSError: pass
"""
    places = [
        "/",
        "/usr",
        "/usr/bin",
        "/etc",
        "/dev",
        "/run",
        "/proc",
        sys.base_prefix,
        str(tmp_path),
        str(Path.home()),
    ]
    assert said(box.run(python(code, *places))) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_to_be_shown_can_be_read_and_not_written(tmp_path: Path) -> None:
    tmp_path.joinpath("bin").mkdir()
    tmp_path.joinpath("bin", "tool").write_text("#!/bin/sh\necho made by hand\n")
    tmp_path.joinpath("bin", "tool").chmod(0o777)  # so that nothing but the mount is in the way of writing
    tmp_path.chmod(0o755)  # root's programs run as nobody
    with Bubblewrap(SMALL, visible=[tmp_path]) as sandbox:
        assert said(sandbox.run(Program(["tool"]))) == "made by hand"
        assert sandbox.run(Program(["sh", "-c", f"echo x > {tmp_path}/bin/tool"])).exit_code != 0


def test_links_and_other_kinds_are_not_handed_back(kind: Kind, tmp_path: Path) -> None:
    mine = tmp_path / "secret"
    mine.write_text("secret")
    code = """
import os, socket, sys
os.symlink(sys.argv[1], 'link'); os.symlink(os.path.dirname(sys.argv[1]), 'folder'); os.symlink('loop', 'loop')
open('one', 'w').close(); os.link('one', 'two')
os.mkfifo('fifo'); os.mkdir('inner'); socket.socket(socket.AF_UNIX).bind('socket')
os.mkdir('shut'); open('shut/x', 'w').close(); os.chmod('shut', 0)
"""
    keep = ["link", "folder/secret", "loop", "two", "fifo", "inner", "socket", "one/x"]
    result = run(kind, python(code, str(mine), keep=[*keep, "shut/x"]))
    assert result.ok, result
    assert set(result.files) <= {"shut/x"}
    assert {name: why for name, why in result.refused.items() if name != "shut/x"} == {
        "link": "a symlink and no regular file",
        "folder/secret": "folder is a symlink and no folder",
        "loop": "a symlink and no regular file",
        "two": "a file of more than one name",
        "fifo": "a FIFO and no regular file",
        "inner": "a folder and no regular file",
        "socket": "a socket and no regular file",
        "one/x": "one is a file and no folder",
    }


def test_a_device_is_not_opened(tmp_path: Path) -> None:
    with watching.opened("/dev") as devices:
        assert read_left(devices, ["null"], 9) == ({}, {"null": "a device and no regular file"})


def test_no_hard_link_and_no_device_is_made(box: Bubblewrap) -> None:
    code = """
import errno, os, stat
for make in (lambda: os.link('/bin/sh', 'out'), lambda: os.mknod('out', 0o666 | stat.S_IFCHR, os.makedev(1, 1))):
    try: make(); print('made')
    except OSError as error: print(errno.errorcode[error.errno])
"""
    assert said(box.run(python(code))).split() == ["EXDEV", "EPERM"]


def test_no_network(box: Bubblewrap) -> None:
    code = """
import errno, socket, sys
def connect(*address, family=socket.AF_INET):
    try:
        with socket.socket(family, socket.SOCK_STREAM) as s: s.settimeout(5); s.connect(*address); print('connected')
    except OSError as error: print(errno.errorcode[error.errno])
connect(('127.0.0.1', int(sys.argv[1])))
connect(('192.0.2.1', 80))
connect('\\0' + sys.argv[2], family=socket.AF_UNIX)
connect((2, 1024), family=socket.AF_VSOCK)
connect((0, 0), family=socket.AF_NETLINK)
"""
    name = f"antipasto-{uuid.uuid4().hex}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind("\0" + name)
        for listening in (tcp, unix):
            listening.listen()
            listening.setblocking(False)
        heard = said(box.run(python(code, str(tcp.getsockname()[1]), name)))
        for listening in (tcp, unix):
            with pytest.raises(BlockingIOError):
                listening.accept()
    assert heard.split() == ["ECONNREFUSED", "ENETUNREACH", "ECONNREFUSED", "EPERM", "EPERM"]


def test_no_process_outside_is_reached(box: Bubblewrap) -> None:
    code = """
import ctypes, os, sys
libc, mine = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
print(os.getpid() < 10, sorted(p for p in os.listdir('/proc') if p.isdigit()) == ['1', str(os.getpid())])
print(libc.ptrace(16, mine, 0, 0), os.path.exists(f'/proc/{mine}/environ'))
try: os.kill(mine, 9)
except ProcessLookupError: print('nobody')
"""
    assert said(box.run(python(code, str(os.getpid())))).split() == ["True", "True", "-1", "False", "nobody"]


@pytest.mark.parametrize("target", ["os.getppid()", "1", "-1", "-os.getpgrp()", "0"])
def test_killing_the_parent_harms_nobody(box: Bubblewrap, target: str, mark: str) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        result = box.run(python(f"import os, signal; os.kill({target}, {int(number)})", mark))
        assert result.limit is None
        assert result.exit_code in (0, 1, 128 + number), result  # 1: there is nobody to be killed
    assert said(box.run(Program(["echo", "well"]))) == "well"


def test_the_environment_of_who_runs_it_is_not_in_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cr3t")
    code = "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'): print(open(p, 'rb').read())"
    with Bubblewrap(SMALL) as sandbox:
        found = said(sandbox.run(python(code)))
    assert "PYTHONHASHSEED=0" in found
    assert "s3cr3t" not in found


def test_clock_and_name_of_the_machine_stay(box: Bubblewrap) -> None:
    code = """
import socket, time
for change in (lambda: time.clock_settime(time.CLOCK_REALTIME, 0), lambda: socket.sethostname('mine')):
    try: change(); print('changed')
    except PermissionError: print('no')
print(socket.gethostname())
"""
    assert said(box.run(python(code))).split() == ["no", "no", "sandbox"]


def test_no_way_to_more_rights(box: Bubblewrap) -> None:
    """The first process, a shell of ours, is under the same filter and limits: taking it over gains nothing."""
    code = """
import ctypes, os, re
libc = ctypes.CDLL(None, use_errno=True)
print([libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)], libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))
print(libc.setns(os.open('/proc/self/ns/user', 0), 0), os.getuid(), libc.setuid(0), libc.chroot(b'/tmp'))
for process in ('1', 'self'):
    status = open(f'/proc/{process}/status').read()
    print(re.findall(r'(?:CapPrm|CapBnd|NoNewPrivs|Seccomp):\\t(\\w+)', status))
    limits = open(f'/proc/{process}/limits').read()
    print(re.findall(r'Max (?:processes|address space|open files|file size) +(\\d+) +(\\d+)', limits))
"""
    first, second, *found = said(box.run(python(code))).splitlines()
    assert (first, second) == ("[-1, -1, -1] -1", "-1 1000 -1 -1")
    assert found[:2] == found[2:]
    assert found[0] == str(["0" * 16, "0" * 16, "1", "2"])
    most = [8 * MIB, SMALL.processes + bubblewrap._ABOVE, watching.OPEN_FILES, 2 * SMALL.memory_bytes]
    assert found[1] == str([(str(n), str(n)) for n in most])


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_has_every_call_and_every_jump_lands(machine: str) -> None:
    lines = [tuple(memoryview(seccomp.program(machine))[i : i + 8]) for i in range(0, len(seccomp.program(machine)), 8)]
    assert len(lines) == 6 + 2 * len(seccomp.REFUSED) + 3 + 2 * 3 + 1
    assert all(i + 1 + max(line[2], line[3]) < len(lines) for i, line in enumerate(lines) if line[0] in (0x15, 0x35))


def test_another_kind_of_machine_is_refused() -> None:
    with pytest.raises(NotIsolatedError, match="this machine is riscv64"):
        seccomp.program("riscv64")


# ── nothing is left over ─────────────────────────────────────────────────────────────────────────────────────────────

DAEMON = f"import os\nif not os.fork():\n os.setsid()\n if os.fork(): os._exit(0)\n {HOLD}\n"


def test_a_daemon_dies_with_the_program(box: Bubblewrap, mark: str) -> None:
    result = box.run(python(DAEMON + "print('done')", mark))
    assert said(result) == "done"
    assert result.wall_seconds < 25
    eventually(lambda: processes(mark) == [])  # bwrap says how it ended before its namespace is gone


def test_a_background_child_dies_without_a_sandbox_too(mark: str) -> None:
    with plain(SMALL) as sandbox:
        assert said(sandbox.run(python(f"import os\nif not os.fork(): {HOLD}\nprint('done')", mark))) == "done"
    eventually(lambda: processes(mark) == [])


def test_a_child_that_is_stopped(kind: Kind, mark: str) -> None:
    code = "import os, signal\nif not os.fork(): os.kill(os.getpid(), signal.SIGSTOP)\nos.wait()"
    assert run(kind, python(code, mark), wall_seconds=0.5).limit == "wall"
    eventually(lambda: processes(mark) == [])


def traces() -> tuple[int, int, list[str]]:
    """Descriptors and children of this process, and what lies in the folder for temporary files."""
    children = [p.read_text() for p in Path("/proc/self/task").glob("*/children")]
    ours = sorted(path.name for path in Path(tempfile.gettempdir()).glob("antipasto-program-*"))
    return len([*Path("/proc/self/fd").iterdir()]), len(" ".join(children).split()), ours


def many(kind: Kind, number: int) -> None:
    with kind(SMALL) as sandbox:
        sandbox.run(Program(["true"]))
        before = traces()
        programs = [Program(["sh", "-c", f"echo {i} > out; exit {i % 100}"], keep=["out"]) for i in range(number)]
        results = sandbox.run_many(programs, workers=2)
    assert [(r.exit_code, r.files["out"]) for r in results] == [(i % 100, f"{i}\n".encode()) for i in range(number)]
    assert traces() == before


def test_two_hundred_in_a_row(kind: Kind) -> None:
    many(kind, 200)


@pytest.mark.thorough
def test_a_thousand_in_a_row(kind: Kind) -> None:
    many(kind, 1000)


def when_it_runs(mark: str, do: Callable[[], None]) -> threading.Thread:
    """A thread that does something as soon as a program of this mark runs."""

    def wait() -> None:
        eventually(lambda: running(mark))
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_ctrl_c_ends_what_runs_and_what_waits(kind: Kind, mark: str) -> None:
    with kind(limited(wall_seconds=60)) as sandbox:
        before = traces()
        for run in (lambda: sandbox.run(python(HOLD, mark)), lambda: sandbox.run_many([python(HOLD, mark)] * 5, 2)):
            thread = when_it_runs(mark, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                run()
            thread.join()
            eventually(lambda: processes(mark) == [])
        assert traces() == before
        assert sandbox.run(Program(["true"])).ok


def test_closing_ends_what_runs(kind: Kind, mark: str) -> None:
    sandbox = kind(limited(wall_seconds=60))
    thread = when_it_runs(mark, sandbox.close)
    with pytest.raises(SandboxError, match="closed while a program ran"):
        sandbox.run(python(HOLD, mark))
    thread.join()
    with pytest.raises(ValueError, match="closed"):
        sandbox.run(Program(["true"]))


def test_a_machine_that_cannot_start_it(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> object:
        raise OSError(24, "Too many open files")

    with kind(SMALL) as sandbox:
        before = traces()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", none_left)
            with pytest.raises(SandboxError, match=r"could not be run: .*Too many open files"):
                sandbox.run(Program(["true"]))
        assert traces() == before
        assert sandbox.run(Program(["true"])).ok


def test_programs_die_with_who_runs_them(mark: str) -> None:
    code = "import sys; from antipasto.sandbox import *; Bubblewrap().run(Program(['python3', '-c', *sys.argv[1:]]))"
    runner = subprocess.Popen([sys.executable, "-c", code, HOLD, mark])
    eventually(lambda: running(mark), 120)
    runner.kill()
    runner.wait()
    eventually(lambda: processes(mark) == [])


# ── where it cannot be ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotIsolatedError, match=r"there is no bwrap\..*apt-get install bubblewrap"):
        Bubblewrap()


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("--unshare-user", "--disable-userns requires --unshare-user"),
        ("--unshare-pid", "pid"),
        ("--unshare-net", "a program is in no net namespace of its own"),
        ("--unshare-ipc", "a program is in no ipc namespace of its own"),
        ("--unshare-uts", "uts|hostname"),
        ("--seccomp", "a program is not held to a list of system calls"),
    ],
)
def test_a_part_of_it_that_does_not_work(monkeypatch: pytest.MonkeyPatch, word: str, why: str) -> None:
    start = subprocess.Popen

    def without(words: list[str], **rest: object) -> object:
        if word in words:
            at = len(words) - 1 - words[::-1].index(word)
            del words[at : at + (2 if word == "--seccomp" else 1)]
        return start(words, **rest)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", without)
    with pytest.raises(NotIsolatedError, match=why):
        Bubblewrap()


def test_a_file_that_a_program_can_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    view = Bubblewrap._view
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    monkeypatch.setattr(Bubblewrap, "_view", lambda self: [*view(self), "--ro-bind", "/var", "/var"])
    with pytest.raises(NotIsolatedError, match="sees files of the machine"):
        Bubblewrap()


def test_a_kernel_that_counts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_PROBE", bubblewrap._PROBE.replace("--nproc=6", "--nproc=20"))
    with pytest.raises(NotIsolatedError, match=r"the number of processes cannot be limited, which needs Linux 5\.14"):
        Bubblewrap()


# ── what it is told ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a/../b", "../a", "a//b", "./a", "a/", "a\0b", 3])
def test_a_name_that_leads_elsewhere(name: str) -> None:
    for program in (lambda: Program(["x"], files={name: ""}), lambda: Program(["x"], keep=[name])):
        with pytest.raises(ValueError, match="A file's name must"):
            program()


@pytest.mark.parametrize("argv", ["ls -l", [], [""], ["-x"], ["a\0"], [1]])
def test_what_is_no_command(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="argv must be"):
        Program(argv)


def test_what_is_too_long_for_a_command() -> None:
    with pytest.raises(ValueError, match="argv must have no more than 100000 bytes, got 100001: put them in a file"):
        Program(["python3", "-c", "x" * 99_992])


def test_what_is_no_content() -> None:
    with pytest.raises(ValueError, match="'a' as a file, and as the folder of 'a/b'"):
        Program(["x"], files={"a": "", "a/b": ""})
    with pytest.raises(ValueError, match=r"main\.py: the text cannot be written as UTF-8"):
        Program(["x"], files={"main.py": "\ud800"})
    with pytest.raises(ValueError, match="stdin: expected a text or bytes, got int"):
        Program(["x"], stdin=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be a list of names, got the text 'out'"):
        Program(["x"], keep="out")


@pytest.mark.parametrize(
    ("name", "value"), [("cpu_seconds", 0), ("wall_seconds", float("inf")), ("processes", 1.5), ("output_bytes", True)]
)
def test_what_is_no_limit(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a (whole )?number above zero, got"):
        limited(**{name: value})


def test_what_is_too_large_or_not_a_program(kind: Kind) -> None:
    with kind(SMALL) as sandbox:
        with pytest.raises(ValueError, match="of which file_bytes allows 4194304"):
            sandbox.run(Program(["true"], files={"a": bytes(5 * MIB)}))
        with pytest.raises(ValueError, match="of the type Program, got str"):
            sandbox.run("ls")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
            sandbox.run_many([], workers=0)


@pytest.mark.parametrize("folder", ["/", "/box", "/proc/self", "/nothing/there", "/tmp"])
def test_folders_that_cannot_be_shown(folder: str) -> None:
    with pytest.raises(ValueError, match="visible: "):
        Bubblewrap(visible=[folder])


def test_the_library_uses_it_without_torch() -> None:
    """Nothing of antipasto is needed but the names: a grader's process stays small."""
    room = Path(bubblewrap.__file__).parent
    lines = [line for path in room.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    taken = {line.split()[1] for line in lines if line.startswith(("from antipasto", "import antipasto"))}
    assert {name for name in taken if not name.startswith("antipasto.sandbox")} == {"antipasto.names"}
    assert not any("torch" in line for line in lines if line.lstrip().startswith(("import ", "from ")))
