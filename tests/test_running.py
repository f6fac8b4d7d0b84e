"""The room RUNNING: order, failures, interrupts, the one connection, run_pipeline()."""
import signal
import threading

import pytest
from conftest import SQLITE, press_ctrl_c_again, summary, wait_until

from orchestrator import UserError, run_pipeline

FAILS = "def run(**kwargs): raise ValueError('no way')"
WORKS = "def run(**kwargs): return 3"
TOOLS = {"a": "works", "b": "fails", "c": "works", "d": "works"}

POSIX = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")


class Connection:
    """A connection that counts how often it is closed."""
    closed_times = 0

    def close(self):
        self.closed_times += 1


def test_tools_run_in_the_order_of_the_plan(modules):
    modules(order="def run(context): order = context.results; return list(order)")
    result = run_pipeline(["c", "a"], dict.fromkeys("abc", "order"))
    assert result.succeeded == ["c", "a"]
    assert result.results == {"c": [], "a": ["c"]}


@pytest.mark.parametrize("targets, more, ran", [
    (None, {}, "abcd"), ("a", {}, "a"), (iter("ca"), {}, "ca"), (dict.fromkeys("ca"), {}, "ca"),
    ([], {"exclude": "b"}, "acd"), ([], {"exclude": None}, "abcd"),
    (None, {"start_from": "c"}, "cd"),
])
def test_run_pipeline_takes_what_is_obvious(modules, targets, more, ran):
    modules(works=WORKS)
    assert run_pipeline(targets, dict.fromkeys("abcd", "works"), **more).succeeded == [*ran]


@pytest.mark.parametrize("targets, more, says", [
    ([1], {}, r"targets is \[1\], not a list of names."),
    (5, {}, "targets is 5, not a list of names."),
    ([["a"]], {}, "not a list of names."),
    (["a"], {"exclude": [None]}, r"exclude is \[None\], not a list of names."),
    (["a"], {"start_from": ["a"]}, r"start_from is \['a'\], not a name."),
    (["a"], {"arguments": ["a"]}, "arguments is a list, not a dict."),
    (["a"], {"arguments": {1: 2}}, "arguments: the name 1 is an int, not text."),
])
def test_run_pipeline_refuses_what_it_can_not_read_with_a_sentence(modules, targets, more, says):
    modules(works="raise SystemExit('imported')")
    with pytest.raises(UserError, match=says):
        run_pipeline(targets, {"a": "works"}, **more)


def test_after_a_failure_the_rest_is_skipped_with_its_cause(modules):
    modules(works=WORKS, fails=FAILS)
    result = run_pipeline([], TOOLS)
    assert (result.status, result.succeeded, result.failed, result.skipped) == (
        "failed", ["a"], ["b"], ["c", "d"])
    assert result.errors == {"b": "ValueError: no way"}
    assert [result.outcomes[t].reason for t in "cd"] == ["needs b, which failed"] * 2


def test_fail_fast_starts_nothing_more(modules):
    modules(works=WORKS, fails=FAILS)
    result = run_pipeline([], TOOLS, fail_fast=True)
    assert result.skipped == ["c", "d"]


def test_the_connection_is_opened_once_shared_and_closed_once(modules):
    modules(a="seen = []\ndef run(conn): seen.append(conn)",
            b="import a\ndef run(conn): a.seen.append(conn)")
    opened = []

    def get_connection():
        opened.append(Connection())
        return opened[-1]

    run_pipeline([], {"a": "a", "b": "b"}, {}, get_connection)
    import a
    assert a.seen == [opened[0], opened[0]]
    assert [conn.closed_times for conn in opened] == [1]


def test_a_get_connection_that_raises_fails_the_tool_with_its_own_line(modules):
    modules(a="def run(conn): pass")

    def get_connection():
        raise OSError("the database is away")

    result = run_pipeline([], {"a": "a", "b": "a"}, {}, get_connection)
    assert result.errors == {"a": "in get_connection(): OSError: the database is away"}
    assert "test_running.py" in result.outcomes["a"].traceback
    assert result.skipped == ["b"]


def test_a_listener_that_raises_leaves_no_connection_open(modules):
    modules(a="def run(conn): pass")
    conn = Connection()

    def on_event(event):
        if event.kind == "tool_ended":
            raise RuntimeError("listener")

    with pytest.raises(RuntimeError, match="listener"):
        run_pipeline([], {"a": "a"}, {}, lambda: conn, on_event=on_event)
    assert conn.closed_times == 1


def test_run_pipeline_prints_nothing(modules, capfd):
    modules(works=WORKS, fails=FAILS)
    run_pipeline([], TOOLS)
    assert capfd.readouterr() == ("", "")


def test_arguments_of_the_engine_are_refused(modules):
    modules(works=WORKS)
    with pytest.raises(UserError, match="'item' is the engine's own"):
        run_pipeline([], {"a": "works"}, arguments={"item": 1})


def test_a_single_target_may_be_given_as_text(modules):
    modules(works=WORKS)
    assert run_pipeline("b", {"a": "works", "b": "works"}).succeeded == ["b"]


def test_signals_are_left_alone_off_the_main_thread(modules):
    modules(m="import signal\ndef run(): return signal.getsignal(signal.SIGINT)")
    before = signal.getsignal(signal.SIGINT)
    results = []
    thread = threading.Thread(target=lambda: results.append(run_pipeline([], {"t": "m"})))
    thread.start()
    thread.join()
    assert results[0].results == {"t": before}


def test_signal_handlers_are_put_back(modules):
    modules(m="import signal\ndef run(): return signal.getsignal(signal.SIGINT)")
    before = signal.getsignal(signal.SIGINT)
    assert run_pipeline([], {"t": "m"}).results["t"] is not before
    assert signal.getsignal(signal.SIGINT) is before


@POSIX
def test_ctrl_c_in_run_pipeline_ends_the_run_and_then_raises(modules):
    modules(a="import os, signal\ndef run(conn): os.kill(os.getpid(), signal.SIGINT)",
            b="ran = []\ndef run(conn): ran.append(1)")
    conn, events = Connection(), []
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {"a": "a", "b": "b"}, {}, lambda: conn, on_event=events.append)
    result = events[-1].result
    assert result.status == "interrupted"
    assert [o.status for o in result.outcomes.values()] == ["interrupted", "pending"]
    assert conn.closed_times == 1


@POSIX
def test_a_tool_that_swallows_the_interrupt_is_kept_and_the_run_ends(modules):
    modules(a="""
        import os, signal
        def run(conn):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                return 7
    """)
    events = []
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {"a": "a", "b": "a"}, on_event=events.append)
    result = events[-1].result
    assert (result.status, result.results) == ("interrupted", {"a": 7})


CLOSES_ONCE = '''
TOOL_MAP = {"first": "t.first", "slow": "t.slow", "last": "t.first"}
class Connection:
    def close(self):
        with open(Path(__file__).with_name("closed"), "a") as file:
            file.write("closed\\n")
def get_connection():
    return Connection()
'''

SLOW = """
    import pathlib, time
    def run(conn, **kwargs):
        pathlib.Path("started").touch()
        time.sleep(60)
"""


@POSIX
@pytest.mark.parametrize("number, code, says", [
    (signal.SIGINT, 130, "interrupted by Ctrl-C"),
    (signal.SIGTERM, 143, "interrupted by SIGTERM"),
    (1, 129, "interrupted by SIGHUP"),
])
def test_a_signal_ends_the_run_with_its_code_and_closes_once(sandbox, number, code, says):
    sandbox.pipeline(CLOSES_ONCE).tool("t.first", WORKS).tool("t.slow", SLOW)
    process = sandbox.start(preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    wait_until((sandbox.folder / "started").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    rows = summary(err)
    assert says in rows["slow"] and "pending" in rows["last"] and "success" in rows["first"]
    assert sandbox.read("closed") == "closed\n"
    assert "--resume" in err and "Traceback" not in err


RENTED = """
NAME = "rented"
TOOL_MAP = {
    "rent":    {"module": "m", "needs": []},
    "work":    {"module": "m", "needs": ["rent"]},
    "report":  {"module": "m", "needs": ["work"]},
    "release": {"module": "m", "needs": ["report"], "when": "always"%s},
    "notify":  {"module": "m", "when": "always"},
    "other":   {"module": "m", "needs": ["notify"]},
    "unused":  {"module": "m", "needs": ["idle"], "when": "always"},
    "idle":    {"module": "m", "needs": ["other"]},
}
STAGES = {"full": list(TOOL_MAP), "idling": ["idle", "unused"]}
"""
SLEEPS = """
    import pathlib, time
    def run(conn, context):
        path = pathlib.Path(context.tool)
        with open("ran", "a") as file:
            file.write(context.tool + "\\n")
        while pathlib.Path("sleeps").exists() and path.name in pathlib.Path("sleeps").read_text():
            path.touch()
            time.sleep(0.02)
        conn.execute("CREATE TABLE IF NOT EXISTS done (tool TEXT)")
        conn.execute("INSERT INTO done VALUES (?)", (context.tool,))
        return 1
"""


def start_rented(sandbox, *words, sleeps="work", more="", **start):
    """Start a pipeline that is to be cleaned up after, and return the process once it sleeps."""
    sandbox.pipeline(SQLITE + RENTED % more).tool("m", SLEEPS)
    (sandbox.folder / "sleeps").write_text(sleeps)
    process = sandbox.start(*words, **start)
    wait_until((sandbox.folder / sleeps.split()[-1]).exists)
    return process


@POSIX
@pytest.mark.parametrize("number, code, more, words", [
    (2, 130, "", ()), (2, 130, "", ("--jobs", "2")), (2, 130, ", 'isolate': True", ()),
    (15, 143, "", ("--fail-fast",)), (15, 143, ", 'timeout': '1m'", ("--jobs", "2")),
    (1, 129, "", ()),
])
def test_what_cleans_up_runs_after_a_signal_too(sandbox, number, code, more, words):
    process = start_rented(sandbox, *words, more=more,
                           preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    process.send_signal(number)
    _, err = process.communicate(timeout=30)

    assert process.returncode == code, err
    assert {tool: line.split()[1] for tool, line in summary(err).items()} == {
        "rent": "success", "work": "interrupted", "report": "pending", "release": "success",
        "notify": "success", "other": "pending", "idle": "pending", "unused": "success"}
    assert sandbox.read("ran").split() == ["rent", "work", "release", "notify", "unused"]
    assert sandbox.query("SELECT tool FROM done") == [
        ("rent",), ("release",), ("notify",), ("unused",)]
    assert "interrupted" in sandbox.run("--history").out

    (sandbox.folder / "sleeps").unlink()
    assert sandbox.run("--resume").code == 0
    assert sandbox.read("ran").split()[5:] == [
        "work", "report", "release", "notify", "other", "idle", "unused"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cleans_up_after_nothing_that_had_begun_stays_as_it_is(modules, jobs):
    modules(a="def run(): raise KeyboardInterrupt", b="def run(): return 3")
    events = []
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {
            "a": {"module": "a", "needs": []}, "b": {"module": "b", "needs": ["a"]},
            "c": {"module": "b", "needs": ["b"]},
            "of_c": {"module": "b", "needs": ["c"], "when": "always"},
            "of_none": {"module": "b", "needs": ["d"], "when": "always"},
            "d": {"module": "b", "needs": []},
        }, jobs=jobs, on_event=events.append)

    result = events[-1].result
    ran = {tool for tool, o in result.outcomes.items() if o.status == "success"}
    has_begun = result.outcomes["d"].status != "pending"  # side by side it may have
    assert ran - {"d"} == {"of_c"} | ({"of_none"} if has_begun else set())
    assert jobs == 2 or not has_begun
    assert result.outcomes["a"].status == "interrupted"
    assert result.status == "interrupted"


@POSIX
@pytest.mark.parametrize("jobs", [1, 2])
def test_what_would_not_end_cleaning_up_is_ended_after_the_grace_and_the_next_comes(modules, jobs):
    modules(a="def run(): raise KeyboardInterrupt", b="def run(): return 3", hangs="""
        import time
        def run():
            time.sleep(60)
    """)
    events = []
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {
            "a": {"module": "a", "needs": []},
            "b": {"module": "hangs", "needs": ["a"], "when": "always", "retries": 3},
            "c": {"module": "b", "needs": ["b"], "when": "always"},
        }, jobs=jobs, grace_s=0.3, on_event=events.append)

    outcomes = events[-1].result.outcomes
    assert [o.status for o in outcomes.values()] == ["interrupted", "interrupted", "success"]
    assert outcomes["b"].reason == "not over 0.30 s after it began"


@POSIX
@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_a_second_ctrl_c_ends_what_cleans_up(sandbox, words):
    process = start_rented(sandbox, *words, sleeps="release work")
    process.send_signal(signal.SIGINT)
    wait_until((sandbox.folder / "release").exists)
    press_ctrl_c_again(process, timeout_s=5)  # the grace would take longer
    assert process.communicate(timeout=5) and process.returncode == 130
    assert sandbox.read("ran").split() == ["rent", "work", "release"]


@POSIX
def test_what_cleans_up_and_waits_for_another_try_is_tried_at_once_after_ctrl_c(sandbox):
    sandbox.pipeline("""
TOOL_MAP = {"a": {"module": "a", "needs": []}, "b": {"module": "b", "needs": ["a"]},
            "clean": {"module": "b", "needs": ["a"], "when": "always", "retries": 1}}
""")
    sandbox.tool("a", "def run(): return 1").tool("b", """
        import pathlib, time
        def run(context):
            if context.attempt == 1:
                pathlib.Path(context.tool).touch()
                if context.tool == "clean":
                    raise ValueError("not yet")
                time.sleep(60)
            return 5
    """)
    process = sandbox.start("--jobs", "2")
    wait_until(lambda: "not yet" in sandbox.run("--status").out)
    wait_until((sandbox.folder / "b").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)

    assert process.returncode == 130
    assert "5 rows" in err and summary(err)["clean"].split()[1:3] == ["success", "5"]


@POSIX
@pytest.mark.parametrize("number, code, says", [
    (signal.SIGINT, 130, "interrupted by Ctrl-C, before anything had run\n"),
    (signal.SIGTERM, 143, "interrupted by SIGTERM, before anything had run\n"),
])
def test_a_signal_while_modules_are_imported_says_that_nothing_had_run(
        sandbox, number, code, says):
    sandbox.pipeline(CLOSES_ONCE).tool("t.first", WORKS).tool("t.slow", """
        import pathlib, time
        pathlib.Path("started").touch()
        time.sleep(60)
        def run():
            pass
    """)
    process = sandbox.start()
    wait_until((sandbox.folder / "started").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (code, says)
    assert not (sandbox.folder / "closed").exists()


@POSIX
def test_a_terminal_that_says_more_than_once_that_it_closes_does_not_tear_the_end_of_a_run(sandbox):
    sandbox.pipeline(CLOSES_ONCE.replace("t.slow", "t.tidy")).tool("t.first", WORKS)
    sandbox.tool("t.tidy", """
        import os, pathlib, signal
        def run():
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                signal.raise_signal(signal.SIGHUP)
                pathlib.Path("tidied").touch()
    """)
    ended = sandbox.run(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    assert ended.code == 129 and sandbox.read("tidied") == ""
    assert sandbox.read("closed") == "closed\n" and "Next:" in ended.err


@POSIX
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_under_nohup_goes_on_when_the_terminal_closes(sandbox, jobs):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        import os, signal
        def run():
            os.kill(os.getpid(), signal.SIGHUP)
            return 7
    """)
    ended = sandbox.run("--jobs", jobs,
                        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert ended.code == 0 and "7 rows" in ended.err


@POSIX
def test_a_second_ctrl_c_ends_a_tool_that_ignores_the_first(sandbox):
    sandbox.pipeline('TOOL_MAP = {"stubborn": "t"}').tool("t", """
        import pathlib, time
        def run():
            while True:
                try:
                    pathlib.Path("started").touch()
                    time.sleep(60)
                except KeyboardInterrupt:
                    pathlib.Path("heard").touch()
    """)
    process = sandbox.start()
    wait_until((sandbox.folder / "started").exists)
    process.send_signal(signal.SIGINT)
    wait_until((sandbox.folder / "heard").exists)
    press_ctrl_c_again(process)
    assert process.wait(timeout=20) == 130
    process.communicate()


@POSIX
def test_a_signal_that_comes_twice_at_once_is_one(sandbox):
    """As timeout(1) sends it: to its child, and then to the group."""
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        import pathlib, time
        def run():
            pathlib.Path("started").touch()
            time.sleep(60)
    """)
    process = sandbox.start()
    wait_until((sandbox.folder / "started").exists)
    for number in (signal.SIGTERM, signal.SIGINT):  # two of one number would be one to the kernel
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (130, 143)
    assert summary(err)["t"].split()[1] == "interrupted"


@POSIX
def test_a_process_that_a_tool_forks_takes_signals_as_if_there_were_no_engine(sandbox):
    sandbox.pipeline('TOOL_MAP = {"forks": "t"}').tool("t", """
        import os, signal, time
        def run():
            ready, tell = os.pipe()
            pid = os.fork()
            if not pid:
                os.write(tell, b"x")  # a signal in the instant of the fork itself would be lost
                time.sleep(60)
            os.read(ready, 1)
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            return os.WTERMSIG(status)
    """)
    ended = sandbox.run()
    assert ended.code == 0 and "15 rows" in ended.err


def test_a_failing_tool_is_told_with_its_cause_and_the_next_command(sandbox):
    sandbox.pipeline('''
        TOOL_MAP = {"a": "works", "b": "fails", "c": "works"}
        def add_arguments(parser):
            parser.add_argument("--since")
    ''').tool("works", WORKS).tool("fails", FAILS)
    ended = sandbox.run("--since", "2013-01-03 00:00", "--from", "b")
    assert ended.code == 1
    assert 'fails.py", line 1, in run' in ended.err and "in run_attempt" not in ended.err
    rows = summary(ended.err)
    assert "ValueError: no way" in rows["b"] and "needs b, which failed" in rows["c"]
    assert ended.err.rstrip().endswith("orchestrator.py --resume")
    ended = sandbox.run("--since", "2013-01-03 00:00", "--from", "b", "--no-history")
    assert ended.err.rstrip().endswith(
        "orchestrator.py --since '2013-01-03 00:00' --no-history --from b")


def test_what_ran_before_a_failure_is_kept(sandbox):
    sandbox.pipeline('TOOL_MAP = {"a": "a", "b": "b"}' + SQLITE).tool("a", """
        def run(conn):
            conn.execute("CREATE TABLE t AS SELECT 1 AS x")
    """).tool("b", """
        def run(conn):
            conn.execute("INSERT INTO t VALUES (2)")
            raise ValueError
    """)
    assert sandbox.run().code == 1
    assert sandbox.query("SELECT x FROM t") == [(1,)]


def test_pdb_works_in_a_tool(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        def run():
            secret = 41
            import pdb; pdb.set_trace()
            return secret
    """)
    import subprocess
    import sys
    ended = subprocess.run([sys.executable, "orchestrator.py"], cwd=sandbox.folder, text=True,
                           input="p secret + 1\ncontinue\n", capture_output=True, timeout=60)
    assert ended.returncode == 0 and "42" in ended.stdout and "41 rows" in ended.stderr
