"""The room WORKERS: processes that die, hang, run too long or leave others behind."""
import os
import signal
import sys
import threading

import pytest
from conftest import SQLITE, press_ctrl_c_again, summary, wait_until

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


def test_spawned_workers_do_the_same_as_forked_ones(sandbox):
    sandbox.pipeline('TOOL_MAP = {n: {"module": "t:" + n, "needs": []} for n in ("a", "b")}\n'
                     'TOOL_MAP["c"] = {"module": "t:c", "needs": ["a", "b"]}' + SQLITE)
    sandbox.tool("t", """
        def a(conn): return 1
        def b(conn): return 2
        def c(conn, context): print(dict(context.results), conn.execute("SELECT 3").fetchone())
    """)
    outputs = [sandbox.run("-j", "2", env={"ORCHESTRATOR_SPAWN": spawn}).out for spawn in ("", "1")]
    assert outputs == ["{'a': 1, 'b': 2} (3,)\n"] * 2


def test_a_get_connection_that_can_not_be_sent_is_told_before_anything_runs(modules, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_SPAWN", "1")
    modules(m="ran = []\ndef run(conn): ran.append(1)")
    with pytest.raises(UserError, match="get_connection can not be sent to a worker process"):
        run_pipeline([], {"t": {"module": "m", "isolate": True}}, {}, lambda: None)


def test_a_script_without_a_main_guard_is_told_before_anything_runs(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", "def run(): pass")
    sandbox.tool("second", """
        from orchestrator import main
        main({"t": {"module": "t", "isolate": True}})
    """)
    ended = sandbox.run(file="second.py", env={"ORCHESTRATOR_SPAWN": "1"})
    assert 'second.py would run again in every worker process' in ended.err
    assert '__name__ == "__main__"' in ended.err and "t  running" not in ended.err


@LINUX
def test_a_process_with_threads_does_not_fork(modules):
    modules(m="import sys\ndef run(conn): return 'multiprocessing.spawn' in sys.modules",
            database="def connect(): return None")
    from database import connect
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        result = run_pipeline([], {"t": {"module": "m", "isolate": True}}, {}, connect)
    finally:
        stop.set()
        thread.join()
    assert result.results == {"t": True}


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
