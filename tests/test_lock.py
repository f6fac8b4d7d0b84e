"""Two runs of one pipeline never overlap, and a lock that is left behind needs no hand."""
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from conftest import ENVIRONMENT, TOP, wait_until

from test_workers import is_alive

import orchestrator
from orchestrator import Clock, Lock, Locked, hold_history, is_held, run_pipeline

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="fork, SIGKILL")

# Writes down that it began, and ends when it may.
TOOL = """
    import os, pathlib, time
    def run(context):
        with open("began", "a") as file:
            file.write(context.run_id + "\\n")
        end_s = time.monotonic() + 30
        while not os.path.exists("go") and time.monotonic() < end_s:
            time.sleep(0.005)
        with open("began", "a") as file:
            file.write("end of " + context.run_id + "\\n")
"""


def start_waiting(sandbox, *words):
    """Start a run whose only tool waits for the file `go`; return it when the tool has begun."""
    sandbox.pipeline('TOOL_MAP = {"slow": "slow"}').tool("slow", TOOL)
    process = sandbox.start(*words)
    wait_until((sandbox.folder / "began").exists)
    return process


def end(sandbox, process):
    """Let a run end and return what it said."""
    (sandbox.folder / "go").touch()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return err


# --- eight at once ---

# Lets eight forks start the same pipeline at the same moment, and the winner end when the seven
# others have; prints for each round the exit codes, and how often each tool ran.
RACE = '''
import json, os, sqlite3, sys, time
from pathlib import Path
import orchestrator
from orchestrator import main

HERE = Path(__file__).parent
TOOLS = {"first": {"module": "tools:first"}, "last": {"module": "tools:last"}}
fast = orchestrator.Clock(monotonic=lambda: 10 * time.monotonic(),
                          sleep=lambda seconds: time.sleep(seconds / 10))
orchestrator.hold_history.__wrapped__.__defaults__ = (0.0, fast)  # who is refused waits a little
MUTANT


def start(folder, gate):
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        said = os.open(folder / f"said{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ["FOLDER"] = str(folder)
        os.read(gate, 1)  # all wait here
        code = main(TOOLS, {}, None, argv=[], name="race", home=str(folder / "home"))
    finally:
        os._exit(code)


rounds = []
for number in range(ROUNDS):
    folder = HERE / str(number)
    folder.mkdir()
    gate, opener = os.pipe()
    pids = [start(folder, gate) for _ in range(8)]
    os.write(opener, b"x" * 8)
    codes = []
    for count in range(8):
        pid, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        if count == 6:
            (folder / "go").touch()
        if codes[-1] not in (0, 4):
            print((folder / f"said{pid}").read_text(), file=sys.stderr)
    os.close(gate), os.close(opener)
    ran = (folder / "ran").read_text().split() if (folder / "ran").exists() else []
    rounds.append([sorted(codes), ran])
print(json.dumps(rounds))
'''

RACE_TOOLS = """
    import os, time
    def ran(name):
        with open(os.path.join(os.environ["FOLDER"], "ran"), "a") as file:
            file.write(name + "\\n")
    def first(conn=None):
        end_s = time.monotonic() + float(os.environ.get("PATIENCE_S", 10))
        while not os.path.exists(os.path.join(os.environ["FOLDER"], "go")):
            if time.monotonic() > end_s:
                raise TimeoutError("the seven others were not refused")
            time.sleep(0.005)
        ran("first")
    def last(conn=None):
        ran("last")
"""


ALONE = [[0] + 7 * [4], ["first", "last"]]  # what is right of a round


def race(sandbox, rounds, mutant=""):
    """Return [exit codes, tools that ran] of each round of eight starters at once."""
    sandbox.tool("tools", RACE_TOOLS)
    (sandbox.folder / "race.py").write_text(
        RACE.replace("ROUNDS", str(rounds)).replace("\nMUTANT", "\n" + mutant))
    ended = subprocess.run(
        [sys.executable, "race.py"], cwd=sandbox.folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, timeout=120,
        env={**ENVIRONMENT, "PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1"})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@POSIX
@pytest.mark.parametrize("times", [5, pytest.param(60, marks=pytest.mark.sweep)])
def test_of_eight_starters_at_once_one_runs_each_tool_once_and_seven_are_refused(sandbox, times):
    rounds, err = race(sandbox, times)
    assert err == ""
    assert rounds == [ALONE] * times


@POSIX
def test_a_lock_that_keeps_nobody_out_is_caught(sandbox):
    mutant = """
os.environ["PATIENCE_S"] = "0.3"
orchestrator.Lock.take = lambda self: ""
"""
    rounds, _ = race(sandbox, 1, mutant)
    assert rounds != [ALONE]


def test_of_eight_threads_at_once_one_gets_the_lock(tmp_path):
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        gate, locks = threading.Barrier(8), [Lock(str(folder)) for _ in range(8)]
        holders = {}

        def take(lock, gate=gate, holders=holders):
            gate.wait()
            holders[lock] = lock.take()

        threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(holders.values()) == ["", *["run"] * 7]
        assert number or ask_from_outside(folder) == "run"
        for lock in locks:
            lock.release()


def ask_from_outside(folder):
    """Return who holds a lock, as another process sees it; "" for nobody."""
    return subprocess.run(
        [sys.executable, "-c", f"import orchestrator as o; print(o.Lock({str(folder)!r}).take())"],
        cwd=TOP, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@POSIX
def test_of_eight_that_open_a_new_history_at_once_none_fails(tmp_path):
    """Who only looks does so without the lock, also at the moment when the first run begins."""
    for number in range(15):
        folder = tmp_path / str(number)
        folder.mkdir()
        gate, opener = os.pipe()
        pids = []
        for _ in range(8):
            pids.append(os.fork())
            if not pids[-1]:
                code = 1
                try:
                    os.read(gate, 1)
                    db = orchestrator.open_database(str(folder / "history.db"))
                    code = len(db.execute("SELECT * FROM runs").fetchall())
                finally:
                    os._exit(code)
        os.write(opener, b"x" * 8)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
        os.close(gate), os.close(opener)


# --- what is refused, and what waits ---

def test_the_refusal_names_the_run_its_process_since_when_and_the_tool(sandbox):
    process = start_waiting(sandbox)
    refused = sandbox.run()
    assert refused.code == 4 and refused.out == ""
    first, fix = refused.err.splitlines()
    since = time.strftime("%Y-%m-%d %H:")
    assert first.startswith(f"Run 1 of this pipeline is not over: process {process.pid}, "
                            f"since {since}") or since != time.strftime("%Y-%m-%d %H:")
    assert first.endswith(", now at slow.")
    assert fix == "  Wait for its end with --wait; --status shows what it does."
    end(sandbox, process)
    assert sandbox.read("began") == "1\nend of 1\n"


@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_the_refusal_names_the_process_of_a_run_that_is_just_beginning(sandbox, words):
    """Also while the history tells of a run that was killed."""
    sandbox.pipeline('TOOL_MAP = {"slow": "slow"}').tool("slow", """
        import os, pathlib, time
        def run(): pass
        pathlib.Path("began").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
    """)
    for _ in range(2):
        process = sandbox.start(*words)
        wait_until((sandbox.folder / "began").exists)
        refused = sandbox.run()
        assert (refused.code, refused.err) == (
            4, "Another run of this pipeline is just beginning or ending: process "
            f"{process.pid}.\n  Wait for its end with --wait; --status shows what it does.\n")
        (sandbox.folder / "go").touch()
        assert process.wait(timeout=20) == 0
        process.communicate()
        (sandbox.folder / "go").unlink(), (sandbox.folder / "began").unlink()
        path = next(sandbox.folder.glob(".orchestrator/*/history.db"))
        with contextlib.closing(sqlite3.connect(path)) as conn, conn:
            conn.execute("UPDATE runs SET status = 'running'")  # as if it had been killed


@pytest.mark.parametrize("words", [("--mark-done", "slow"), ("--prune", "1d"), ("--resume",)])
def test_whatever_writes_to_the_history_is_refused_during_a_run(sandbox, words):
    process = start_waiting(sandbox)
    assert sandbox.run(*words).code == 4
    end(sandbox, process)


def test_wait_waits_for_the_end_of_the_other_run(sandbox):
    process = start_waiting(sandbox)
    waiting = sandbox.start("--wait")
    end(sandbox, process)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, err
    assert sandbox.read("began") == "1\nend of 1\n2\nend of 2\n"


def test_wait_gives_up_after_its_duration(sandbox):
    process = start_waiting(sandbox)
    refused = sandbox.run("--wait", "0.2s")
    assert refused.code == 4 and "is not over" in refused.err
    end(sandbox, process)


def test_wait_sleeps_until_the_lock_is_free_and_not_longer(tmp_path):
    folder, now = tmp_path / "home" / "p", [1000.0]
    other = subprocess.Popen([sys.executable, "-c", f"""
import orchestrator, sys
orchestrator.make_folder({str(folder)!r})
lock = orchestrator.Lock({str(folder)!r})
print(repr(lock.take()), flush=True)
sys.stdin.read()
"""], cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "''\n"

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 1600:
            other.communicate()

    clock = Clock(wall=lambda: now[0], monotonic=lambda: now[0], sleep=sleep)
    with pytest.raises(Locked):
        with hold_history(str(folder), str(tmp_path), 500, clock):
            pass
    assert 1500 <= now[0] < 1501  # it gave up when it should
    with hold_history(str(folder), str(tmp_path), 500, clock):
        assert 1600 < now[0] < 1602
    assert not is_held(str(folder))


def test_status_during_a_run_does_not_disturb_it(sandbox):
    process = start_waiting(sandbox)
    for words in (["--status"], ["--history"], ["--logs"], ["--plan"], ["--list"]):
        assert sandbox.run(*words).code == 0
    assert f"Run 1 goes on, process {process.pid}" in sandbox.run("--status").out
    assert sandbox.run().code == 4  # still, although others have opened the file and closed it
    end(sandbox, process)


# --- within one process ---

def test_two_runs_in_two_threads_of_one_process_do_not_overlap(modules, monkeypatch):
    folder = modules(slow=TOOL)
    monkeypatch.chdir(folder)
    home, results = str(folder / "home"), []
    thread = threading.Thread(target=lambda: results.append(
        run_pipeline([], {"slow": "slow"}, name="p", home=home)))
    thread.start()
    wait_until((folder / "began").exists)
    try:
        with pytest.raises(Locked, match=f"process {os.getpid()}, since .*, now at slow"):
            run_pipeline([], {"slow": "slow"}, name="p", home=home)
        # To look from the same process opens the file and closes it, which frees a POSIX lock.
        assert is_held(os.path.join(home, "p"))
        assert ask_from_outside(folder / "home" / "p") == "run"
        (folder / "same").symlink_to(home)
        with pytest.raises(Locked):
            run_pipeline([], {"slow": "slow"}, name="p", home=str(folder / "same"))
        assert ask_from_outside(folder / "home" / "p") == "run"
    finally:
        (folder / "go").touch()
        thread.join()
    assert results[0].status == "success"
    assert run_pipeline([], {"slow": "slow"}, name="p", home=home).run_id == "2"


def test_pipelines_of_other_names_run_beside_each_other_in_one_home(modules, monkeypatch):
    folder = modules(slow=TOOL, quick="def run(): return 1")
    monkeypatch.chdir(folder)
    home = str(folder / "home")
    thread = threading.Thread(target=run_pipeline, args=([], {"slow": "slow"}),
                              kwargs={"name": "one", "home": home})
    thread.start()
    wait_until((folder / "began").exists)
    try:
        assert run_pipeline([], {"q": "quick"}, name="two", home=home).status == "success"
    finally:
        (folder / "go").touch()
        thread.join()


# --- what killed runs leave behind ---

@POSIX
def test_the_lock_file_of_a_killed_run_needs_nothing(sandbox):
    process = start_waiting(sandbox)
    process.kill()
    process.communicate()
    (sandbox.folder / "go").touch()
    ended = sandbox.run()
    assert ended.code == 0
    assert ended.err.startswith("Run 1 was cut off ")
    lock = next((sandbox.folder / ".orchestrator").glob("*/lock"))
    lock.write_text("4711\n")  # a marker file of somebody
    assert sandbox.run().code == 0


def hold_byte(folder):
    """Start a process that lives on as a worker of a killed run may; return it."""
    process = subprocess.Popen([sys.executable, "-c", f"""
import orchestrator, sys
orchestrator.hold_worker_byte({str(folder)!r})
print("held", flush=True)
sys.stdin.read()
"""], cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@POSIX
def test_while_a_worker_of_a_killed_run_lives_nothing_starts_and_then_all_does(sandbox, tmp_path):
    process = start_waiting(sandbox)
    process.kill()
    process.communicate()
    folder = next((tmp_path / ".orchestrator").glob("*/lock")).parent
    (sandbox.folder / "go").touch()
    worker, now = hold_byte(folder), [0.0]
    clock = Clock(monotonic=lambda: now[0],
                  sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pytest.raises(Locked) as refused:
        with hold_history(str(folder), str(tmp_path), clock=clock):
            pass
    assert refused.value.problem \
        == "Run 1 was killed, and a worker of it has not ended: slow."
    assert now[0] >= orchestrator.WORKERS_END_S  # the kernel ends them by then
    waiting = sandbox.start()  # waits those seconds
    worker.communicate()
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and "Run 1 was cut off" in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize("words, env", [(("--jobs", "2"), {}),
                                        (("--jobs", "2"), {"ORCHESTRATOR_SPAWN": "1"})])
def test_the_next_start_waits_for_the_workers_of_a_killed_run(sandbox, words, env):
    """A worker that ignores SIGTERM and would write again is gone before anything starts."""
    sandbox.pipeline('TOOL_MAP = {"slow": {"module": "slow", "needs": []}}').tool("slow", """
        import os, signal, time
        def run(context):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with open("began", "a") as file:
                file.write(f"{os.getpid()}\\n")
            if context.run_id != "1":
                return
            while True:
                time.sleep(0.001)
    """)
    process = sandbox.start(*words, env=env)
    wait_until(lambda: (sandbox.folder / "began").exists() and sandbox.read("began").strip())
    worker = int(sandbox.read("began"))
    os.kill(process.pid, signal.SIGKILL)
    ended = sandbox.run(*words, env=env)
    assert ended.code == 0 and not is_alive(worker)
    process.communicate()


# --- the locks of the history's own file ---

TRY = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:  # the bytes of SQLite that a connection shares: https://sqlite.org/fileformat2.html
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except OSError:
        print("held")
"""


@POSIX
@pytest.mark.parametrize("is_careless", [False, True])
def test_a_second_look_at_a_history_frees_no_lock_of_the_first(tmp_path, is_careless):
    """Else a third process that looks would take itself for the last, and remove the -wal file."""
    folder = tmp_path / "p"
    (folder / "logs").mkdir(parents=True)
    first, second = (orchestrator.History(str(folder), "") for _ in range(2))
    assert first.find_running() is second.find_running() is None
    second.close()
    if is_careless:
        open(first.path, "rb").close()
    tried = subprocess.run([sys.executable, "-c", TRY, first.path], capture_output=True, text=True)
    first.close()
    assert (tried.stdout, tried.stderr) == ("" if is_careless else "held\n", "")


def test_a_tool_that_runs_its_own_pipeline_is_refused_and_does_not_free_the_lock(sandbox):
    """Its engine is another copy of the module, __main__ and orchestrator, in one process."""
    sandbox.pipeline('NAME = "one"\nTOOL_MAP = {"outer": "t:outer", "inner": "t:inner"}').tool(
        "t", """
        def inner():
            print("inner")
        def outer():
            import orchestrator
            try:
                orchestrator.run_pipeline(["inner"], orchestrator.TOOL_MAP, name="one",
                                          home=".orchestrator")
            except orchestrator.Locked as error:
                print(error)
            import subprocess, sys
            sys.exit(subprocess.call([sys.executable, "orchestrator.py", "inner"]) != 4)
    """)
    ended = sandbox.run("outer")
    assert ended.code == 0 and "inner" not in ended.out.split(), ended
    assert ended.out.startswith("Run 1 of this pipeline is not over")
