"""What tools print: shown as it comes, and kept in a log for each attempt."""
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, Ended, wait_until

import orchestrator
from orchestrator import clean, read_tail, run_pipeline, tidy_log

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="file descriptors of POSIX")
NO_DATABASE = """
def get_connection():
    return None

"""


def logs(sandbox):
    """Return {"RUN/TOOL.ATTEMPT": what is in that log}."""
    folder = next((sandbox.folder / ".orchestrator").glob("*/logs"))
    return {f"{path.parent.name}/{path.name[:-len('.log')]}": path.read_bytes()
            for path in folder.glob("*/*.log")}


def left_behind(sandbox):
    """Return what else is in the folders of logs."""
    folder = next((sandbox.folder / ".orchestrator").glob("*/logs"))
    return [path.name for path in folder.glob("*/*") if path.suffix != ".log"]


@pytest.fixture
def pipe(quick):
    """Write a pipeline of one tool, or of several: pipe(body), pipe({"a": body})."""
    def write(bodies, **options):
        bodies = bodies if isinstance(bodies, dict) else {"t": bodies}
        tools = {name: {"module": "m" + name, **options} for name in bodies}
        quick.pipeline(f"{NO_DATABASE}TOOL_MAP = {tools!r}")
        for name, body in bodies.items():
            quick.tool("m" + name, body)
        return quick

    return write


LOUD = """
    import ctypes, os, subprocess, sys
    def run():
        libc = ctypes.CDLL(None)
        print("from print")
        os.write(1, b"from the descriptor\\n")
        sys.stdout.flush()
        subprocess.run(["echo", "from a child"])
        libc.puts(b"from C")
        libc.fflush(None)
        print("to stderr", file=sys.stderr)
        os.write(2, b"to its descriptor\\n")
        subprocess.run("echo from a child >&2", shell=True)
        libc.perror(b"C complains")
"""
OUT = "from print\nfrom the descriptor\nfrom a child\nfrom C\n"
ERR = ["to stderr", "to its descriptor", "from a child", "C complains: "]


@POSIX
@pytest.mark.parametrize("words, options", [((), {}), ((), {"isolate": True}), (("-j", "2"), {})],
                         ids=["here", "isolated", "worker"])
def test_what_python_c_code_and_children_print_is_shown_and_is_in_the_log(pipe, words, options):
    """What C code and children print in this process is shown, each stream in its order, but not
    kept; it is where the tool has a process of its own.
    """
    sandbox = pipe(LOUD, **options)
    ended = sandbox.run(*words)
    assert ended.code == 0, ended
    in_log = [line for line in logs(sandbox)["1/t.1"].decode().splitlines()]
    if not (words or options):
        assert in_log == ["from print", "to stderr"]
        assert ended.out == OUT
        said = [line for line in ended.err.splitlines() if line.startswith(tuple(ERR))]
        assert [line[:11] for line in said] == [line[:11] for line in ERR]
        return
    assert [line for line in in_log if line in OUT.splitlines()[:2] + ["from C"]] \
        == ["from print", "from the descriptor", "from C"]
    assert in_log.count("from a child") == 2
    assert [line for line in in_log if line.startswith(tuple(ERR[:2] + ERR[3:]))][:2] == ERR[:2]
    assert sorted(ended.out.splitlines()) == sorted(in_log)
    assert left_behind(sandbox) == []


@POSIX
@pytest.mark.parametrize("words, order", [
    ((), "running, I am, so says, and was, success"),
    (("-j", "2"), "running, so says, I am, and was, success"),  # in one piece at its end
])
def test_lines_of_the_tools_stand_between_those_of_the_engine(sandbox, words, order):
    """Where both go to one place, such as the mail of cron."""
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "t", "b": "t"}').tool("t", """
        def run(context):
            print("I am", context.tool)
            context.log.info("so says %s", context.tool)
            print("and was", context.tool)
    """)
    out, _ = sandbox.start(*words, stderr=subprocess.STDOUT).communicate(timeout=30)
    shown = [next(word for word in order.split(", ") if word in line)
             for line in out.splitlines()[:10]]
    assert shown == 2 * order.split(", ")


@POSIX
def test_output_is_shown_while_the_tool_runs_and_not_only_at_its_end(sandbox):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "t"}').tool("t", """
        import os, time
        def run():
            print("I begin")
            os.write(2, b"I complain\\n")
            end_s = time.monotonic() + 30
            while not os.path.exists("go") and time.monotonic() < end_s:
                time.sleep(0.005)
            print("I end")
    """)
    with open(sandbox.folder / "out", "wb") as out, open(sandbox.folder / "err", "wb") as err:
        process = sandbox.start(stdout=out, stderr=err)
        wait_until(lambda: "I begin" in sandbox.read("out") and "I complain" in sandbox.read("err"))
        assert b"I begin\n" in logs(sandbox)["1/t.1"]
        follower = sandbox.start("--logs", "t", "--follow")
        assert follower.stdout.readline() == "I begin\n"
        (sandbox.folder / "go").touch()
        assert process.wait(30) == 0
    rest, _ = follower.communicate(timeout=30)
    assert "I end\n" in rest and follower.returncode == 0
    assert sandbox.read("out") == "I begin\nI end\n"


@POSIX
def test_on_a_terminal_tools_keep_it_and_what_python_writes_is_logged(sandbox):
    import pty
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "t"}').tool("t", """
        import os, sys
        def run():
            print("am I on a terminal?", sys.stdout.isatty(), os.isatty(1), sys.stderr.isatty())
            sys.stdout.writelines(["one ", "two\\n"])
            os.write(1, b"past Python\\n")
    """)
    ours, theirs = pty.openpty()
    process = sandbox.start(stdout=theirs, stderr=theirs, env={"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is the end of a terminal
        while True:
            piece = os.read(ours, 4096)
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.wait(30) == 0
    process.stdin and process.stdin.close()
    assert b"am I on a terminal? True True True\r\none two\r\npast Python\r\n" in shown
    assert logs(sandbox) == {"1/t.1": b"am I on a terminal? True True True\none two\n"}


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_what_a_tool_logs_is_in_its_log_too(pipe, words):
    sandbox = pipe("""
        def run(context):
            print("first")
            context.log.warning("second")
    """)
    sandbox.run(*words)
    assert sorted(logs(sandbox)["1/t.1"].splitlines()) == [b"first", b"second"]
    assert "warning: second" in sandbox.run(*words).err


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_log_is_made_at_its_first_byte_and_belongs_to_one_attempt(pipe, words):
    sandbox = pipe({"silent": "def run(): pass", "loud": """
        def run(context):
            print("try", context.attempt)
            if context.attempt < 3:
                raise ValueError("not yet")
    """}, retries=2, retry_delay=0)
    assert sandbox.run(*words).code == 0
    assert logs(sandbox) == {f"1/loud.{n}": b"try %d\n" % n for n in (1, 2, 3)}
    assert sandbox.run("--logs", "silent").err == "Nothing was printed.\n"
    folder = next((sandbox.folder / ".orchestrator").glob("*/logs/1"))
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert {os.stat(path).st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@POSIX
def test_many_short_tools_in_a_row_each_have_what_they_printed(pipe):
    names = [f"t{i}" for i in range(150)]
    sandbox = pipe({}).pipeline(
        f"{NO_DATABASE}TOOL_MAP = {{name: 'm' for name in {names!r}}}").tool("m", """
        def run(context):
            print(context.tool)
    """)
    for run in ("1", "2"):
        assert sandbox.run("-q").out.split() == names
        assert {key: text for key, text in logs(sandbox).items() if key[:2] == run + "/"} \
            == {f"{run}/{name}.1": name.encode() + b"\n" for name in names}


# --- bytes of every kind ---

@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_logs_shows_nothing_that_takes_hold_of_a_terminal(pipe, words):
    sandbox = pipe("""
        import os
        def run():
            os.write(1, b"bad \\xff\\xfe utf-8\\n" b"a NUL \\0 in it\\n" b"\\x1b[31mred\\x1b[0m\\n"
                        b"\\x1b]0;title\\x07bell\\x07\\n" b"\\x1b[2Jcleared\\r\\n"
                        b"\\xc2\\x9b31m C1\\n" b"tab\\there\\n" b"no end")
    """, isolate=True)
    assert sandbox.run(*words).code == 0
    assert b"\xff\xfe" in logs(sandbox)["1/t.1"]  # as it was printed
    for more in ((), ("--tail", "99")):
        shown = sandbox.run("--logs", "t", *more).out
        assert shown == ("bad \ufffd\ufffd utf-8\na NUL  in it\nred\nbell\ncleared\n31m C1\n"
                         "tab\there\nno end\n")


def test_clean_leaves_letters_and_takes_all_else():
    chance = random.Random(5)  # noqa: S311
    for _ in range(300):
        text = "".join(chance.choice("a\n\t\r\x1b[]0;31mK\x07\x00\x9b\\é漢P?") for _ in range(40))
        left = clean(text)
        assert not set(left) - set("a\n\t[]0;31mKé漢P?\\")
    assert clean("plain é 漢\ttext\n") == "plain é 漢\ttext\n"


# --- long logs ---

def test_a_log_above_the_cap_keeps_its_beginning_and_its_end(tmp_path):
    path = tmp_path / "log"
    lines = [b"line %d\n" % i for i in range(10_000)]
    path.write_bytes(b"".join(lines))
    size = path.stat().st_size
    tidy_log(str(path), 1000)
    text = path.read_bytes()
    assert text.startswith(b"".join(lines)[:500]) and text.endswith(b"".join(lines)[-500:])
    assert b"\n[... %d bytes were left out here ...]\n" % (size - 1000) in text
    assert len(text) < 1100
    tidy_log(str(path), 2000)
    assert path.read_bytes() == text


@POSIX
@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_tool_that_prints_more_than_the_cap_is_cut_and_shown_whole(pipe, words):
    sandbox = pipe("""
        def run():
            print("the beginning")
            for i in range(3000):
                print("x" * 4000)
            print("the end")
    """)
    ended = sandbox.run(*words)
    assert ended.code == 0 and len(ended.out) > 12_000_000
    text = logs(sandbox)["1/t.1"]
    assert text.startswith(b"the beginning\n") and text.endswith(b"the end\n")
    assert len(text) < orchestrator.LOG_CAP_BYTES + 100
    assert b" bytes were left out here ...]" in text
    assert left_behind(sandbox) == []


def test_a_tail_reads_the_end_of_a_log_and_not_all_of_it(tmp_path):
    path = tmp_path / "log"
    with open(path, "wb") as file:
        file.truncate(2**33)  # 8 GB, of which nothing is on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    assert read_tail(str(path), 2) == ["last but one", "last"]
    assert read_tail(str(tmp_path / "none"), 5) == []
    path.write_text("one\n\ntwo")
    assert read_tail(str(path), 2) == ["", "two"] and read_tail(str(path), 9) == ["one", "", "two"]
    assert read_tail(str(path), 0) == []


def test_the_tail_of_a_log_is_there_even_if_its_lines_are_very_long(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"x" * 3_000_000 + b"!\nlast\n")
    *_, long, last = read_tail(str(log), 10)
    assert last == "last" and long.endswith("xx!") and len(long) < 2000
    assert read_tail(str(log), 1) == ["last"]
    assert read_tail(str(log), 0) == [] == read_tail(str(tmp_path / "none"), 5)


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_the_last_lines_of_a_failing_tool_stand_at_the_end(pipe, words):
    sandbox = pipe({"a": """
        def run():
            for i in range(30):
                print("line", i)
            raise ValueError("too much")
    """, "b": "def run(): print('fine')"}, needs=[])
    err = sandbox.run(*words).err
    tail = err[err.index("Last lines of a"):]
    assert tail.splitlines()[1:11] == [f"  line {i}" for i in range(20, 30)]
    assert "Last lines of b" not in err and "\ntool " in tail


# --- kills, and who does not read ---

@POSIX
def test_a_killed_tool_has_in_its_log_what_it_printed_and_once(sandbox):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "t", "b": "t"}').tool("t", """
        import os, signal, sys
        def run(context):
            print("out of", context.tool)
            print("err of", context.tool, file=sys.stderr)
            if context.tool == "b" and context.run_id == "1":
                print("last words")
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert sandbox.run().code == -signal.SIGKILL
    assert sandbox.run("--resume").code == 0
    found = logs(sandbox)
    assert sorted(found["1/b.1"].splitlines()) == [b"err of b", b"last words", b"out of b"]
    assert sorted(found["1/a.1"].splitlines()) == [b"err of a", b"out of a"]
    assert left_behind(sandbox) == []
    assert "last words" in sandbox.run("--logs", "b", "--run", "1").out


@POSIX
@pytest.mark.parametrize("words", [("-j", "2"), ()])
def test_a_worker_that_is_killed_has_in_its_log_what_it_printed(sandbox, words):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": {"module": "t", "isolate": True}}').tool(
        "t", """
        import os, signal
        def run(context):
            print("last words")
            if context.run_id == "1":
                os.kill(int(open("pid").read()), signal.SIGKILL)
                while True:
                    pass
    """)
    (sandbox.folder / "pid").write_text("0")
    process = sandbox.start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (sandbox.folder / "pid").write_text(str(process.pid))
    assert process.wait(30) == -signal.SIGKILL
    assert sandbox.run("--resume", *words).code == 0
    assert logs(sandbox)["1/a.1"] == b"last words\n"
    assert left_behind(sandbox) == []


@POSIX
def test_a_reader_that_goes_away_and_a_closed_stdout_do_no_harm(sandbox):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "t"}').tool("t", """
        def run():
            for i in range(20_000):
                print("line", i)
    """)
    program = f"{sys.executable} orchestrator.py"
    for shell in (f"{program} | head -n 1", f"{program} 2>/dev/null | head -n 1"):
        process = sandbox_shell(sandbox, shell)
        assert process.code == 0 and process.out == "line 0\n"
        assert "Traceback" not in process.err and "Broken" not in process.err
    assert sandbox_shell(sandbox, f"{program} >&-").code == 0
    assert sandbox_shell(sandbox, f"{program} >&- 2>&-").code == 0
    assert sandbox_shell(sandbox, f"{program} -q 2>&-").code == 0
    assert [text.count(b"\n") for text in logs(sandbox).values()][:2] == [20_000] * 2


def sandbox_shell(sandbox, command):
    """Return how a command of the shell ends."""
    ended = subprocess.run(command, shell=True, cwd=sandbox.folder, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60,
                           stdin=subprocess.DEVNULL)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_stdout_that_takes_nothing_is_told_and_the_log_has_all(sandbox, words):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full")
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "t"}').tool("t", "def run(): print('hello')")
    ended = sandbox_shell(sandbox, f"{sys.executable} orchestrator.py {words} >/dev/full")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert "could not be written: No space left on device; --logs shows all" in ended.err
    assert logs(sandbox)["1/t.1"] == b"hello\n"


@POSIX
@pytest.mark.parametrize("what", [
    "sys.stdout = open('elsewhere', 'w')", "sys.stdout.close()", "sys.stdout = None",
    "os.close(1)", "os.dup2(os.open('elsewhere', os.O_CREAT | os.O_WRONLY), 1)",
    "sys.stdout.reconfigure(line_buffering=False, write_through=False)",
    "sys.stdout = sys.stderr", "sys.stdout.detach()",
    "contextlib.redirect_stdout(io.StringIO()).__enter__()",
])
@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_tool_that_replaces_or_closes_its_stdout_breaks_nothing(pipe, what, words):
    sandbox = pipe({"a": f"""
        import contextlib, io, os, sys
        def run():
            print("before", flush=True)
            {what}
    """, "b": "import os\ndef run(): os.write(2, b'after\\n')"})
    ended = sandbox.run(*words)
    assert ended.code == 0 and "success: 2 of 2 tools done" in ended.err, ended
    assert "Traceback" not in ended.err
    assert logs(sandbox)["1/a.1"] == b"before\n"
    assert b"after\n" in (logs(sandbox)["1/b.1"] if words else ended.err.encode())


def test_what_an_import_prints_and_what_follows_the_run_reach_the_screen(pipe):
    sandbox = pipe("""
        import atexit
        print("imported")
        def run():
            print("run")
    """)
    ended = sandbox.run()
    assert ended.out == "imported\nrun\n" and logs(sandbox) == {"1/t.1": b"run\n"}


def test_a_notebook_whose_streams_are_no_files_keeps_them(modules, monkeypatch):
    folder = modules(t="def run(): print('hello')")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    stream = sys.stdout
    result = run_pipeline([], {"t": "t"}, home=str(folder / "home"), name="p")
    assert sys.stdout is stream and stream.getvalue() == "hello\n"
    log = folder / "home" / "p" / "logs" / "1" / "t.1.log"
    assert result.outcomes["t"].log == str(log) and log.read_text() == "hello\n"


def test_python_streams_are_as_before_after_a_run_with_a_history(modules, tmp_path):
    modules(t="def run(): print('said')")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2]); "
            "import orchestrator; before = sys.stdout, sys.stdout.errors; "
            "orchestrator.run_pipeline(['t'], {'t': 't'}, home=sys.argv[1] + '/home'); "
            "assert before == (sys.stdout, sys.stdout.errors); print('and on')")
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path),
                            os.path.dirname(orchestrator.__file__)],
                           capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "said\nand on\n", "")


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_run_that_printed_nothing_leaves_no_folder_behind(pipe, words):
    sandbox = pipe("def run(): pass")
    assert sandbox.run(*words).code == 0
    folder, = (sandbox.folder / ".orchestrator").glob("*/logs")
    assert list(folder.iterdir()) == []


@POSIX
def test_a_log_that_is_followed_as_json_is_told_once_with_each_of_its_lines(pipe):
    sandbox = pipe("""
        import os, time
        def run():
            print("one", flush=True)
            end_s = time.monotonic() + 30
            while not os.path.exists("go") and time.monotonic() < end_s:
                time.sleep(0.005)
            print("two")
    """)
    process = sandbox.start()
    wait_until(lambda: list(sandbox.folder.glob(".orchestrator/*/logs/1/*.log")))
    follower = sandbox.start("--logs", "--follow", "--json")
    (sandbox.folder / "go").touch()
    assert process.wait(30) == 0
    out, _ = follower.communicate(timeout=30)
    log, = json.loads(out)["logs"]
    assert (log["tool"], log["lines"]) == ("t", ["one", "two"])


NOT_KEPT = "What C code and child processes of a tool print is kept only if it is isolated or runs"


@pytest.mark.parametrize("words, options, is_told", [
    ((), {}, True), (("-j", "2"), {}, False), ((), {"isolate": True}, False),
])
def test_who_reads_a_log_of_a_tool_in_this_process_is_told_what_is_not_in_it(
        pipe, words, options, is_told):
    sandbox = pipe("def run(context): print('try', context.attempt)", **options)
    sandbox.run(*words)
    ended = sandbox.run("--logs", "t")
    assert ended.out == "try 1\n"
    assert ended.err == f"{NOT_KEPT} with --jobs.\n" * is_told
    assert sandbox.run("--logs", "t", "--json").err == ""
