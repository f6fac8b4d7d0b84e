"""The room WORKERS: processes that die, hang, run too long or leave others behind."""
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, SQLITE, TOP, Sandbox, press_ctrl_c_again, summary, wait_until

from orchestrator import (
    History, Interrupts, Results, Session, UserError, load_pipeline, make_plan, run_pipeline,
    run_plan,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux")

DEATHS = """
    import os, signal
    def segfault():
        import ctypes
        import faulthandler
        faulthandler.disable()  # pytest has it on, and it would print
        ctypes.string_at(0)
    def leave():
        os._exit(0)
    def leave_with_7():
        os._exit(7)
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)
    def works():
        return 3
    def copied():
        # A copy of the worker comes back from run() and could say that all went well.
        if os.fork():
            os._exit(1)
"""


def is_alive(pid):
    """Return whether a process runs; a zombie, which nobody has waited for yet, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not sys.platform.startswith("linux")


def read_pids(folder, name="pids"):
    """Return the process ids that tools wrote into a file, one a line."""
    path = folder / name
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("how, says", [
    ("segfault", "its process was killed by signal 11 (SIGSEGV)"),
    ("leave", "its process exited without finishing"),
    ("leave_with_7", "its process exited without finishing (exit code 7)"),
    ("killed", "its process was killed by signal 9 (SIGKILL), perhaps for want of memory"),
    ("copied", "its process exited without finishing (exit code 1)"),
])
def test_a_worker_that_dies_fails_its_own_tool_and_only_that(modules, how, says, jobs):
    """
        dies -> after      other (independent)
    """
    modules(m=DEATHS)
    result = run_pipeline([], {
        "dies": {"module": f"m:{how}", "needs": [], "isolate": True},
        "after": {"module": "m:works", "needs": ["dies"]},
        "other": {"module": "m:works", "needs": []}}, jobs=jobs)
    assert result.errors == {"dies": says}
    assert result.skipped == ["after"] and result.succeeded == ["other"]


def test_a_dead_worker_is_replaced(modules):
    modules(m=DEATHS)
    tools = {f"t{i}": {"module": "m:" + ("killed" if i % 2 else "works"), "needs": []}
             for i in range(10)}
    result = run_pipeline([], tools, jobs=2)
    assert len(result.succeeded) == len(result.failed) == 5


def test_a_worker_that_dies_is_tried_again(modules):
    folder = modules(m="""
        import os, pathlib
        def run(context):
            if context.attempt < 3:
                os._exit(0)
            return context.attempt
    """)
    assert folder.exists()
    result = run_pipeline([], {"t": {"module": "m", "isolate": True, "retries": 2,
                                     "retry_delay": 0}})
    assert result.results == {"t": 3} and result.outcomes["t"].attempts == 3


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("made, shown", [
    ("b'x' * 10_000_000", "len(value)"),
    ("__import__('fractions').Fraction(1, 3)", "str(value)"),
    ("{'rows': 2, 'names': ('a', 'b')}", "value['names']"),
])
def test_results_travel_to_those_who_need_them(modules, made, shown, jobs):
    modules(m=f"""
        def make():
            return {made}
        def use(context):
            value = context.results["make"]
            return {shown}
    """)
    result = run_pipeline([], {"make": {"module": "m:make", "needs": [], "isolate": True},
                               "use": {"module": "m:use", "needs": ["make"]}}, jobs=jobs)
    value = result.results["make"]
    assert result.results["use"] == eval(shown, {"value": value})  # noqa: S307


@pytest.mark.parametrize("made, kind", [("(i for i in 'ab')", "a generator"),
                                        ("lambda: 1", "a function"),
                                        ("__import__('threading').Lock()", "a lock")])
def test_a_result_that_can_not_travel_is_told_with_its_tool_and_type(modules, made, kind):
    modules(m=f"""
        def make():
            return {made}
        def use(context):
            return context.results["make"]
    """)
    result = run_pipeline([], {"make": {"module": "m:make", "needs": []},
                               "use": {"module": "m:use", "needs": ["make"]}}, jobs=2)
    assert result.succeeded == ["make"]
    assert f"the result of 'make' is {kind}, which can not travel" in result.errors["use"]


def test_what_is_sent_to_workers_grows_with_the_tools_and_not_with_their_square(
        modules, monkeypatch):
    from multiprocessing.connection import Connection
    sent, send = [], Connection._send_bytes
    monkeypatch.setattr(Connection, "_send_bytes",
                        lambda self, what: sent.append(len(what)) or send(self, what))
    modules(m="""
        def run(conn=None, **kwargs):
            return "x" * 1000
        def last(context):
            return len(context.results), sum(map(len, context.results.values()))
    """)
    result = run_pipeline([], {**{f"t{i}": "m" for i in range(100)}, "last": "m:last"}, jobs=2)
    assert result.errors == {}
    assert result.results["last"] == (100, 100_000)
    assert 100_000 < sum(sent) < 200_000  # each result was read once, and by one tool alone


def test_in_a_worker_results_are_the_mapping_that_they_are_elsewhere(modules):
    modules(m="""
        from concurrent.futures import ThreadPoolExecutor
        def make():
            return {"rows": 2}
        def no_data():
            return lambda: 1
        def use(context):
            results = context.results
            with ThreadPoolExecutor(8) as pool:
                read = list(pool.map(results.__getitem__, ["make"] * 100))
            try:
                results["other"]
            except KeyError as error:
                missing = str(error)
            return (sorted(results), len(results), "no_data" in results, "other" in results,
                    results.get("other", 7), results.get(("no", object())), missing,
                    read == [{"rows": 2}] * 100)
    """)
    tools = {"make": {"module": "m:make", "needs": []}, "other": {"module": "m:make", "needs": []},
             "no_data": {"module": "m:no_data", "needs": []},
             "use": {"module": "m:use", "needs": ["make", "no_data"]}}
    ours, theirs = run_pipeline([], tools), run_pipeline([], tools, jobs=2)
    assert theirs.errors == {}
    missing = ours.results["use"][6]
    assert "no result of 'other'" in missing
    assert ours.results["use"] == theirs.results["use"] == (
        ["make", "no_data"], 2, True, False, 7, None, missing, True)


def test_results_are_refused_with_a_reason_in_a_process_that_a_tool_forked(modules):
    modules(m="""
        import multiprocessing
        def make():
            return 1
        def use(context):
            def read():
                try:
                    context.results["make"]
                except RuntimeError as error:
                    theirs.send(str(error))
            ours, theirs = multiprocessing.Pipe()
            multiprocessing.get_context("fork").Process(target=read).start()
            return ours.poll(20) and ours.recv(), context.results["make"]
    """)
    result = run_pipeline([], {"make": "m:make", "use": "m:use"}, jobs=2)
    says, value = result.results["use"]
    assert "read it before, in run() itself" in says and value == 1


def test_a_signal_does_not_tear_what_a_tool_asks_of_the_orchestrator():
    asked = []

    def ask():
        signal.raise_signal(signal.SIGTERM)
        asked.append("whole")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.call(interrupts.finish, ask)
    assert asked == ["whole"] and interrupts.signal == signal.SIGTERM


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_result_is_let_go_when_the_last_that_may_read_it_is_done(modules, jobs):
    """
        a -> b -> e      c(*) d(*)      f
    """
    modules(m="def run(context): return sorted(context.results)")
    tools = {"a": [], "b": ["a"], "c": None, "d": None, "e": ["b"], "f": []}
    pipeline = load_pipeline({tool: {"module": "m", **({} if needs is None else {"needs": needs})}
                              for tool, needs in tools.items()})
    returned = {}

    def note(event):
        if event.kind == "tool_ended":
            returned[event.tool] = event.outcome.result

    result = run_plan(Session(pipeline, make_plan(pipeline, jobs=jobs), {}, History(),
                              keep_results=False, on_event=note))
    seen = Results(returned.__getitem__, returned.keys)
    assert (seen["c"], seen["d"], seen["e"]) == (["a", "b"], ["a", "b", "c"], ["b"])
    assert result.results == {}
    assert {outcome.result for outcome in result.outcomes.values()} == {None}


def test_each_worker_opens_its_own_connection_and_nothing_opened_here_crosses(modules):
    folder = modules(m="""
        import os
        def run(conn):
            return os.getpid(), conn
        """, database="""
        import os
        def connect():
            return os.getpid()
        """)
    from database import connect  # noqa: I001
    assert folder.exists()
    result = run_pipeline([], {f"t{i}": {"module": "m", "needs": []} for i in range(6)}, {},
                          connect, jobs=2)
    assert all(pid == conn != os.getpid() for pid, conn in result.results.values())


def test_isolate_gives_a_tool_a_process_group_in_a_sequential_run(modules):
    modules(m="import os\ndef run(): return os.getpid(), os.getpgrp()")
    result = run_pipeline([], {"here": "m", "apart": {"module": "m", "isolate": True}})
    assert result.results["here"][0] == os.getpid()
    pid, group = result.results["apart"]
    assert pid == group != os.getpid()


def test_what_a_worker_did_before_it_died_is_rolled_back(sandbox):
    sandbox.pipeline('TOOL_MAP = {"a": {"module": "t:a", "isolate": True}, '
                     '"b": {"module": "t:b", "isolate": True}}' + SQLITE).tool("t", """
        import os
        def a(conn):
            conn.execute("CREATE TABLE x AS SELECT 1 AS y")
        def b(conn):
            conn.execute("INSERT INTO x VALUES (2)")
            os._exit(0)
    """)
    assert sandbox.run().code == 1
    assert sandbox.query("SELECT y FROM x") == [(1,)]


GRANDCHILD = """
    import os, pathlib, subprocess, time
    def start(python_code="import time; time.sleep(600)"):
        import sys
        child = subprocess.Popen([sys.executable, "-c", python_code])
        with open("pids", "a") as file:
            file.write(f"{child.pid}\\n")
        return child
    def leave_behind():
        start()
        return 1
    def orphan():
        os.system("sleep 600 & echo $! >> pids")
        return 1
    def hang():
        start()
        time.sleep(600)
    def ignore():
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open("pids", "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(600)
    def endless_sql():
        import sqlite3
        sqlite3.connect(":memory:").execute(
            "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c")
    def endless_c():
        import re
        re.match(r"(a+)+$", "a" * 80 + "b")
"""


@pytest.mark.parametrize("how", ["leave_behind", "orphan"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_finished_tool_left_running_is_ended(modules, monkeypatch, how, jobs):
    folder = modules(m=GRANDCHILD)
    monkeypatch.chdir(folder)
    result = run_pipeline([], {"t": {"module": f"m:{how}", "isolate": True},
                               "u": {"module": f"m:{how}", "isolate": True}}, jobs=jobs)
    assert result.succeeded == ["t", "u"]
    pids = read_pids(folder)
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("how", ["hang", "ignore", "endless_sql", "endless_c"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_at_its_timeout_a_tool_is_ended_with_all_that_it_started(modules, monkeypatch, how, jobs):
    folder = modules(m=GRANDCHILD)
    monkeypatch.chdir(folder)
    result = run_pipeline([], {"t": {"module": f"m:{how}", "timeout": 0.3}}, jobs=jobs,
                          grace_s=0.2)
    assert result.errors == {"t": "timed out after 0.30 s"}
    wait_until(lambda: not any(map(is_alive, read_pids(folder))))


def test_a_timed_out_attempt_is_tried_again_like_any_other(modules):
    modules(m="""
        import time
        def run(context):
            if context.attempt == 1:
                time.sleep(600)
            return context.attempt
    """)
    result = run_pipeline([], {"t": {"module": "m", "timeout": 0.3, "retries": 1,
                                     "retry_delay": 0}})
    assert result.results == {"t": 2}


@LINUX
def test_memory_bounds_a_tool_and_not_the_next_one(modules):
    modules(m="def run(): return len(bytearray(300_000_000))")
    result = run_pipeline([], {"small": {"module": "m", "memory": "100MB", "needs": []},
                               "large": {"module": "m", "isolate": True, "needs": []}})
    assert result.errors == {"small": "MemoryError; its memory is bounded to 100.0 MB"}
    assert result.succeeded == ["large"]


@LINUX
def test_a_result_that_is_too_large_for_a_tools_memory_fails_that_tool_alone(modules):
    modules(m="""
        def make():
            return bytes(120_000_000)
        def use(context):
            return len(context.results["make"])
    """)
    result = run_pipeline([], {"make": {"module": "m:make", "isolate": True},
                               "small": {"module": "m:use", "memory": "100MB",
                                         "on_failure": "continue"},
                               "large": {"module": "m:use", "isolate": True}})
    assert result.errors == {"small": "MemoryError; its memory is bounded to 100.0 MB"}
    assert result.results["large"] == 120_000_000


LOUD = """
    import os, sys
    def run(context):
        print("python", context.tool)
        sys.stderr.write("stderr\\n")
        os.system("echo shell")
        os.write(1, b"bytes \\xff\\n")
"""
THREE = 'TOOL_MAP = {n: {"module": "loud", "needs": []} for n in "abc"}\n'
PIECE = "python {0}\nstderr\nshell\nbytes \ufffd\n"


def test_tools_side_by_side_are_shown_one_by_one_in_one_piece(sandbox):
    sandbox.pipeline(THREE).tool("loud", LOUD)
    process = sandbox.start("--jobs", "3", stdout=-1)
    process.stdout.reconfigure(errors="replace")
    out, _ = process.communicate(timeout=60)
    assert sorted(out.split("python ")) == sorted(("", *(PIECE.format(n)[7:] for n in "abc")))


def test_verbose_shows_output_with_the_tools_name_in_front(sandbox):
    sandbox.pipeline(THREE).tool("loud", LOUD)
    process = sandbox.start("--jobs", "3", "--verbose", stdout=-1)
    process.stdout.reconfigure(errors="replace")
    out, _ = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == sorted(
        f"{n} | {line}" for n in "abc" for line in PIECE.format(n).splitlines())


@LINUX
def test_output_larger_than_memory_is_no_problem(sandbox):
    sandbox.pipeline("TOOL_MAP = {}").tool("loud", """
        def run():
            line = "x" * 999
            for _ in range(100_000):
                print(line)
    """).tool("second", """
        from orchestrator import main
        if __name__ == "__main__":
            main({"t": {"module": "loud", "isolate": True}})
            print(next(line for line in open("/proc/self/status") if "VmHWM" in line))
    """)
    out = sandbox.run(file="second.py").out
    assert out.count("\n") > 100_000 and out.count("x") == 99_900_000
    peak_kb = int(out.rsplit("VmHWM:", 1)[1].split()[0])
    assert peak_kb < 60_000


NEEDS_NOTHING = """
    TOOL_MAP = {{name: {{"module": "t:" + name, "needs": []}} for name in {names}}}
    def get_connection():
        import sqlite3
        return sqlite3.connect(":memory:")
"""
LONG = """
    import os, subprocess, sys, time
    def note():
        with open("pids", "a") as file:
            file.write(f"{os.getpid()}\\n")
    def busy():
        note()
        while True:
            pass
    def in_c():
        note()
        import re
        re.match(r"(a+)+$", "a" * 80 + "b")
    def in_sql(conn):
        note()
        conn.execute("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
                     "SELECT max(x) FROM c").fetchall()
    def parent():
        note()
        subprocess.run("echo $$ >> pids; sleep 600", shell=True)
    def stubborn():
        note()
        while True:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                open("heard", "a").close()
"""


def start_long(sandbox, *names, env=None, lines=None):
    """Start tools that never end, side by side, and return the process once all are at it."""
    sandbox.pipeline(NEEDS_NOTHING.format(names=names)).tool("t", LONG)
    process = sandbox.start("--jobs", str(len(names)), env=env)
    wait_until(lambda: len(read_pids(sandbox.folder)) == (lines or len(names)))
    return process


@pytest.mark.parametrize("spawn", ["", "1"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_parallel_run_and_leaves_no_process(sandbox, number, code, spawn):
    process = start_long(sandbox, "busy", "in_sql", "parent", lines=4,
                         env={"ORCHESTRATOR_SPAWN": spawn})
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert not any(map(is_alive, read_pids(sandbox.folder)))
    assert {line.split()[1] for line in summary(err).values()} == {"interrupted"}


def test_a_second_signal_ends_all_at_once(sandbox):
    process = start_long(sandbox, "stubborn", "parent", lines=3)
    process.send_signal(signal.SIGINT)
    wait_until((sandbox.folder / "heard").exists)
    press_ctrl_c_again(process, timeout_s=5)  # the grace would take longer
    process.communicate(timeout=5)
    assert process.returncode == 130
    wait_until(lambda: not any(map(is_alive, read_pids(sandbox.folder))), timeout_s=5)


@LINUX
@pytest.mark.parametrize("spawn", ["", "1"])
def test_after_a_sigkill_of_the_orchestrator_nothing_is_left(sandbox, spawn):
    process = start_long(sandbox, "busy", "in_c", "parent", "stubborn", lines=5,
                         env={"ORCHESTRATOR_SPAWN": spawn})
    pids = read_pids(sandbox.folder)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not any(map(is_alive, pids)), timeout_s=5)


def test_spawned_workers_do_the_same_as_those_of_the_fork_server(sandbox):
    sandbox.pipeline('TOOL_MAP = {n: {"module": "t:" + n, "needs": []} for n in ("a", "b")}\n'
                     'TOOL_MAP["c"] = {"module": "t:c", "needs": ["a", "b"]}' + SQLITE)
    sandbox.tool("t", """
        def a(conn): return 1
        def b(conn): return 2
        def c(conn, context): print(dict(context.results), conn.execute("SELECT 3").fetchone())
    """)
    outputs = [sandbox.run("-j", "2", env={"ORCHESTRATOR_SPAWN": spawn}).out for spawn in ("", "1")]
    assert outputs == ["{'a': 1, 'b': 2} (3,)\n"] * 2


@pytest.mark.parametrize("spawn", ["", "1"])
def test_a_get_connection_that_can_not_be_sent_is_told_before_anything_runs(
        modules, monkeypatch, spawn):
    monkeypatch.setenv("ORCHESTRATOR_SPAWN", spawn)
    modules(m="ran = []\ndef run(conn): ran.append(1)")
    with pytest.raises(UserError, match="get_connection can not be sent to a worker process"):
        run_pipeline([], {"t": {"module": "m", "isolate": True}}, {}, lambda: None)


def test_an_argument_that_can_not_be_sent_is_told_before_anything_runs(modules):
    modules(m="def run(lock): pass")
    with pytest.raises(UserError, match="can not be sent to a worker process.*lock"):
        run_pipeline([], {"t": {"module": "m", "isolate": True}},
                     arguments={"lock": threading.Lock()})


@pytest.mark.parametrize("spawn", ["", "1"])
def test_a_script_without_a_main_guard_is_told_before_anything_runs(sandbox, spawn):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", "def run(): pass")
    sandbox.tool("second", """
        from orchestrator import main
        main({"t": {"module": "t", "isolate": True}})
    """)
    ended = sandbox.run(file="second.py", env={"ORCHESTRATOR_SPAWN": spawn})
    assert 'second.py would run again in every worker process' in ended.err
    assert '__name__ == "__main__"' in ended.err and "t  running" not in ended.err


def test_a_program_with_threads_and_open_connections_starts_workers_that_inherit_none(
        modules, monkeypatch):
    """A SQLite connection that a fork inherits loses what is committed through it."""
    folder = modules(m="""
        import os, threading
        def run(conn):
            conn.execute("INSERT INTO x VALUES (1)")
            return threading.active_count(), [
                name for name in map(os.path.realpath, map("/dev/fd/{}".format, range(50)))
                if name.endswith("other.db")]
        """, database="""
        import sqlite3
        def connect():
            return sqlite3.connect("data.db", timeout=20)
        """)
    monkeypatch.chdir(folder)
    from database import connect
    others = [sqlite3.connect(folder / "other.db", check_same_thread=False) for _ in range(20)]
    others[0].execute("CREATE TABLE y (z)")
    ours = connect()
    ours.execute("CREATE TABLE x (y)")
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        result = run_pipeline([], {name: {"module": "m", "needs": []} for name in "abcdef"}, {},
                              connect, jobs=2)
        others[0].execute("INSERT INTO y VALUES (1)")
        others[0].commit()
        assert others[1].execute("SELECT count(*) FROM y").fetchone() == (1,)
        assert ours.execute("SELECT count(*) FROM x").fetchone() == (6,)
    finally:
        stop.set()
        thread.join()
        for each in (*others, ours):
            each.close()
    assert list(result.results.values()) == [(1, [])] * 6, result.errors


@pytest.mark.parametrize("spawn", ["", "1"])
def test_a_program_with_more_than_1023_open_files_starts_workers(modules, monkeypatch, spawn):
    """select() takes no file descriptor above that."""
    import resource
    monkeypatch.setenv("ORCHESTRATOR_SPAWN", spawn)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 1300:
        pytest.skip("so many files are not allowed")
    modules(m="def run(): return 3")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(1300, limits[0]), limits[1]))
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        result = run_pipeline([], {name: {"module": "m", "needs": []} for name in "abc"}, jobs=2)
    finally:
        for fd in fds:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert result.results == {"a": 3, "b": 3, "c": 3}


def find_starter(session):
    """Return the pids of the fork servers in a session of processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_bytes()
            if fields[3] == str(session) and fields[2] == str(session) \
                    and b"multiprocessing.forkserver" in command:
                found.append(int(stat.parent.name))
    return found


@LINUX
def test_a_worker_that_dies_after_its_tool_is_done_is_no_failure(quick):
    quick.pipeline('TOOL_MAP = {"t": {"module": "t", "isolate": True}}').tool("t", """
        import os, threading
        def run():  # the engine asks for the threads that are left, when the try has been told
            threading.enumerate = lambda: os.kill(os.getpid(), 9)
    """)
    ended = quick.run()
    assert (ended.code, "t  success" in ended.err) == (0, True), ended


@LINUX
@pytest.mark.parametrize("moment", ["while a tool runs", "before there is a worker"])
def test_a_starter_that_is_killed_is_told_and_the_run_goes_on(sandbox, moment):
    sandbox.pipeline('TOOL_MAP = {n: {"module": "t:" + n, "needs": []} for n in "abcd"}')
    sandbox.tool("t", f"""
        import os, pathlib, time
        def wait(name):
            pathlib.Path(name).touch()
            while not os.path.exists("go"):
                time.sleep(0.01)
        def a():
            if not os.path.exists("go"):
                wait("at")
                time.sleep(60)
        def b(): pass
        def c(): wait("other")
        def d(): pass
        if {moment!r} == "before there is a worker":
            wait("at")
    """)
    process = sandbox.start("-j", "2", env={"ORCHESTRATOR_SPAWN": ""})
    wait_until((sandbox.folder / "at").exists)
    wait_until(lambda: find_starter(process.pid))
    for pid in find_starter(process.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, find_starter(process.pid))))
    (sandbox.folder / "go").touch()
    _, err = process.communicate(timeout=30)
    assert "bug in orchestrator.py" not in err and "Traceback" not in err, err
    if moment == "while a tool runs":
        assert process.returncode == 1, err
        assert "a     failed" in err and "the process that starts the workers was killed" in err
        assert "d     success" in err
    else:
        assert process.returncode == 0, err


@LINUX
@pytest.mark.parametrize("spawn", ["", "1"])
def test_a_worker_that_is_killed_while_its_tools_child_lives_on_is_noticed_at_once(
        modules, monkeypatch, spawn):
    """The child has all descriptors of the worker, and so the other end of its pipes."""
    folder = modules(m="""
        import os, signal, subprocess, sys, time
        def dies():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                                     close_fds=False, start_new_session=True)
            with open("pids", "w") as file:
                file.write(str(child.pid))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    monkeypatch.setenv("ORCHESTRATOR_SPAWN", spawn)
    monkeypatch.chdir(folder)
    began_s = time.monotonic()
    result = run_pipeline([], {"t": {"module": "m:dies", "isolate": True}})
    took_s = time.monotonic() - began_s
    pid, = read_pids(folder)
    try:
        assert is_alive(pid)  # it left the group, and only what is in it is ended
        assert "killed by signal 9" in result.errors["t"]
        assert took_s < 20
    finally:
        os.kill(pid, signal.SIGKILL)


@LINUX
@pytest.mark.parametrize("how, where", [
    ("time.sleep(60)", "in hang"), ("lock.acquire()", "in hang"),
    ("re.match(r'(a+)+$', 'a' * 80 + 'b')", "in match"),
    ("sqlite3.connect(':memory:').execute(ENDLESS)", "in hang")])
def test_where_a_tool_hung_at_its_timeout_is_in_its_log_for_all_threads(sandbox, how, where):
    sandbox.pipeline('TOOL_MAP = {"t": {"module": "m", "timeout": 0.5}}').tool("m", f"""
        import re, sqlite3, threading, time
        lock = threading.Lock()
        lock.acquire()
        ENDLESS = ("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
                   "SELECT max(x) FROM c")
        def beside():
            time.sleep(600)
        def hang():
            {how}
        def run():
            threading.Thread(target=beside, daemon=True).start()
            hang()
    """).tool("second", """
        from orchestrator import main
        if __name__ == "__main__":
            main({"t": {"module": "m", "timeout": 0.5}}, home="home")
    """)
    program = sandbox.folder / "orchestrator.py"  # two of these do not hear the signal
    program.write_text(sandbox.read("orchestrator.py").replace("GRACE_S = 10.0", "GRACE_S = 1.0"))
    ended = sandbox.run()
    assert ended.code == 1 and "timed out after 0.50 s" in ended.err
    log = sandbox.run("--logs", "t").out
    assert where in log and "in beside" in log and "in run" in log, log
    assert "orchestrator.py" not in log and "multiprocessing" not in log  # of nobody's concern


def test_an_items_time_counts_from_when_it_is_begun_and_where_it_hung_is_told(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": {"module": "m", "timeout": 1.5}}' + SQLITE).tool("m", """
        import time
        def items():
            return list("abcdef")
        def run(conn, item):
            time.sleep(60 if item == "f" else 0.5)
    """)
    ended = sandbox.run()
    assert ended.code == 1 and "5 of" not in ended.err, ended
    assert dict(sandbox.query("SELECT item, status FROM orchestrator_items")) == {
        **dict.fromkeys("abcde", "success"), "f": "failed"}
    assert dict(sandbox.query("SELECT item, deaths FROM orchestrator_items"))["f"] == 0
    assert "in run" in sandbox.run("--logs", "t").out


@LINUX
@pytest.mark.parametrize("moment", ["while tools run", "while the fork server starts"])
def test_ctrl_c_in_a_terminal_reaches_all_processes_and_the_run_ends_in_order(sandbox, moment):
    """All that are in the foreground get it, so the fork server does, too."""
    if moment == "while tools run":
        process = start_long(sandbox, "busy", "parent", lines=3)
    else:
        sandbox.pipeline(NEEDS_NOTHING.format(names=("busy", "parent"))).tool("t", LONG)
        process = sandbox.start("--jobs", "2", env={"ORCHESTRATOR_SPAWN": ""})
        wait_until(lambda: find_starter(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert not any(map(is_alive, read_pids(sandbox.folder)))
    if moment == "while tools run":
        assert {line.split()[1] for line in summary(err).values()} == {"interrupted"}


def test_workers_ignore_what_nohup_ignores_and_hear_what_ends_them(modules):
    modules(m="""
        import signal
        def run():
            return [signal.getsignal(getattr(signal, name)) == signal.SIG_IGN
                    for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGCHLD")], sorted(
                signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """)
    modules(host="""
        from orchestrator import run_pipeline
        if __name__ == "__main__":
            result = run_pipeline([], {"t": {"module": "m", "isolate": True}})
            print(result.results["t"])
    """)
    for ignored in ("", "HUP", "HUP INT TERM CHLD"):
        told = subprocess.run(
            ["sh", "-c", f"trap '' {ignored or 'USR1'}; exec \"$0\" host.py", sys.executable],
            cwd=modules(), stdout=subprocess.PIPE, text=True, timeout=60,
            env={**ENVIRONMENT, "PYTHONPATH": str(TOP)}).stdout
        assert told == f"([{bool(ignored)}, False, False, False], [])\n"


@pytest.mark.parametrize("how", ["as it is", "from elsewhere", "beside another", "by a link",
                                 "with a dot", "without .py", "as a module",
                                 "from a path of Python"])
@pytest.mark.parametrize("spawn", ["", pytest.param("1", marks=pytest.mark.sweep)])
def test_workers_have_the_same_main_program_however_it_is_started(sandbox, how, spawn):
    """Where another file of its name lies in the working folder, that is not taken for it."""
    here = sandbox.folder / "here"
    here.mkdir()
    ours = Sandbox(here).pipeline("""
        TOOL_MAP = {n: {"module": "t", "needs": []} for n in "ab"}
        def get_connection():
            return "ours"
    """).tool("t", "def run(conn): print(conn)")
    other = sandbox.folder / "other"
    other.mkdir()
    text = ours.read("orchestrator.py")
    (other / "orchestrator.py").write_text(text.replace('return "ours"', 'return "theirs"'))
    (here / "my.pipe.py").write_text(text)
    (here / "pipe").write_text(text)
    (other / "link.py").symlink_to(here / "orchestrator.py")
    words, cwd = {"as it is": (["orchestrator.py"], here),
                  "from elsewhere": ([here / "orchestrator.py"], sandbox.folder),
                  "beside another": ([here / "orchestrator.py"], other),
                  "by a link": ([other / "link.py"], other),
                  "with a dot": (["my.pipe.py"], here),
                  "without .py": (["pipe"], here),
                  "as a module": (["-m", "orchestrator"], here),
                  "from a path of Python": (["-m", "orchestrator"], sandbox.folder)}[how]
    env = {**ENVIRONMENT, "ORCHESTRATOR_SPAWN": spawn}
    if how == "from a path of Python":
        env["PYTHONPATH"] = str(here)
    for _ in range(2):
        ended = subprocess.run([sys.executable, *map(str, words), "-j", "2"], cwd=cwd, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               timeout=60)
        assert (ended.returncode, ended.stdout) == (0, "ours\nours\n"), ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_tool_may_use_processes_of_its_own(modules):
    modules(m="""
        import multiprocessing
        def double(x):
            return 2 * x
        def run():
            with multiprocessing.get_context("fork").Pool(2) as pool:
                return pool.map(double, [1, 2, 3])
    """)
    result = run_pipeline([], {"t": {"module": "m", "isolate": True}})
    assert result.results == {"t": [2, 4, 6]}, result.errors


def test_a_module_that_only_a_worker_can_not_import_fails_its_tool(modules):
    modules(m="import os\nif os.getpgrp() == os.getpid(): raise OSError('no device')\n"
              "def run(): pass")
    if os.getpgrp() == os.getpid():
        pytest.skip("this process leads a group itself")
    result = run_pipeline([], {"t": {"module": "m", "isolate": True}})
    assert "no device" in result.errors["t"]


def test_logs_and_progress_of_workers_reach_the_listener(modules, monkeypatch):
    import logging
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    modules(m="""
        def run(context):
            context.log.warning("from afar")
            list(context.progress("ab"))
    """)
    events = []
    run_pipeline([], {"t": {"module": "m", "isolate": True}}, on_event=events.append)
    assert [(e.tool, e.text) for e in events if e.kind == "log"] == [("t", "from afar")]
    assert [(e.tool, e.done, e.total) for e in events if e.kind == "progress"][0] == ("t", 1, 2)


def test_threads_of_a_tool_that_log_at_once_tear_no_line(sandbox):
    sandbox.pipeline('TOOL_MAP = {"make": "m:make", "t": {"module": "m", "isolate": True}}')
    sandbox.tool("m", """
        from concurrent.futures import ThreadPoolExecutor
        def make():
            return 7
        def run(context):
            def work(letter):
                for _ in range(50):
                    context.log.info(letter * 50_000)
                    assert context.results["make"] == 7
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(work, "abcd"))
    """)
    ended = sandbox.run("-j", "2")
    assert ended.code == 0, ended.err[-2000:]
    lines = [line.split()[-1] for line in ended.err.splitlines() if len(line) > 50_000]
    assert sorted(lines) == [letter * 50_000 for letter in "abcd" for _ in range(50)]


@LINUX
def test_a_tool_that_closes_its_output_takes_it_from_no_other(sandbox):
    sandbox.pipeline("""
        TOOL_MAP = {name: {"module": "t:" + name, "isolate": True} for name in ("close", "say")}
    """).tool("t", """
        import os, sys
        def close():
            sys.stdout.close()
            os.close(1)
        def say():
            print("python")
            sys.stdout.flush()
            os.system("echo shell")
    """)
    ended = sandbox.run()
    assert (ended.code, ended.out) == (0, "python\nshell\n"), ended
