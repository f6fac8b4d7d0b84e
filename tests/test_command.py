"""Tools that are commands: their words, their output, how they end and what ends with them."""
import json
import os
import signal
import stat
import sys
import textwrap

import pytest
from conftest import SQLITE, press_ctrl_c_again, wait_until
from test_workers import is_alive, read_pids

import orchestrator
from orchestrator import UserError, load_pipeline, run_pipeline

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs of POSIX")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux")
WAYS = pytest.mark.parametrize("words", ["", "-j 2", "--no-history", "--no-history -j 2"])


def write_tables(box, head="", **tools):
    """Write a pipeline of tools, each a command or a dict of options."""
    table = {name: {"needs": [], **(each if isinstance(each, dict) else {"command": each})}
             for name, each in tools.items()}
    return box.pipeline(f"{textwrap.dedent(head)}\nTOOL_MAP = {table!r}\nSTAGES = {{}}\n")


def sh(script):
    return ["sh", "-c", script]


# --- what runs, and what it gets ---

def test_a_command_is_run_without_a_shell_in_the_folder_of_the_pipeline(sandbox, tmp_path_factory):
    write_tables(sandbox, a=["python", "show.py", "a b", "*", "$HOME"])
    (sandbox.folder / "show.py").write_text(
        "import os, sys\nprint(sys.argv[1:], os.getcwd(), sys.executable, repr(sys.stdin.read()))")
    ended = sandbox.run(cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 0, ended
    assert ended.out == f"{['a b', '*', '$HOME']} {sandbox.folder} {sys.executable} ''\n"


ARGUMENTS = """
def add_arguments(parser):
    parser.add_argument("--year", type=int, default=2013)
    parser.add_argument("--none")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--names", nargs="*", default=["x", None, "y z"])
"""


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_braces_are_arguments_and_what_the_engine_tells(quick, words):
    write_tables(quick, ARGUMENTS, a=["echo", "{year}|{none}|{dry}|{names}", "{tool}.{attempt}",
                                      "run{run_id}", "{print $1}", '{"a": 1}', "{}", "${year}",
                                      "%{http_code}"])
    ended = quick.run(*words.split(), "--dry")
    assert ended.out == ('2013||true|x,,y z a.1 run1 {print $1} {"a": 1} {} ${year} '
                         '%{http_code}\n'), ended


def test_a_flag_that_only_a_command_names_is_taken_and_wins_over_what_the_engine_has(quick):
    write_tables(quick, """
        def add_arguments(parser):
            parser.add_argument("--stem", default="mine")
    """, a="echo {stem}")
    assert quick.run("--stem", "yours").out == "yours\n"


def test_a_period_reaches_a_command_in_a_backfill_alone(quick):
    write_tables(quick, a="echo {period_start} to {period_end}")
    ended = quick.run("--backfill", "2013-01-01..2013-01-02")
    assert ended.out == "2013-01-01 to 2013-01-02\n2013-01-02 to 2013-01-03\n", ended
    ended = quick.run()
    assert ended.code == 2 and "{period_start}, which nothing gives but --backfill" in ended.err


def test_a_text_is_split_once_as_a_shell_does_and_a_list_is_left_as_it_is():
    pipeline = load_pipeline({"a": {"command": "x 'a  b' \"c d\" e\\ f '|' {y}"},
                              "b": {"command": ["x", "a  b", "'"]}})
    assert pipeline.tools["a"].command == ("x", "a  b", "c d", "e f", "|", "{y}")
    assert pipeline.tools["b"].command == ("x", "a  b", "'")


@pytest.mark.parametrize("text, words", [
    (r'a "b c" d', ["a", "b c", "d"]),
    (r'"a\\b" c\d \\x', [r"a\\b", r"c\d", r"\\x"]),
    (r'a\"b "c\"d" "e\\" f', ['a"b', 'c"d', "e\\", "f"]),
    (r"""it's ""  '' """, ["it's", "", "''"]),
    (r'"a ""b c', ['a "b', "c"]),
])
def test_a_text_is_split_on_windows_as_programs_split_their_command_line(monkeypatch, text, words):
    monkeypatch.setattr(orchestrator, "IS_WINDOWS", True)
    assert list(load_pipeline({"a": {"command": text}}).tools["a"].command) == words


# --- what is refused, before anything has run ---

@pytest.mark.parametrize("options, says, way_out", [
    ({"command": ""}, "'command' must be a text that is not empty, or a list of texts, not ''",
     '"command": "python'),
    ({"command": "  "}, "must be a text that is not empty", '"command": "python'),
    ({"command": []}, "must be a text that is not empty", '"command": "python'),
    ({"command": [""]}, "must be a text that is not empty", '"command": "python'),
    ({"command": 3}, "must be a text that is not empty", '"command": "python'),
    ({"command": None}, "must be a text that is not empty", '"command": "python'),
    ({"command": ["a", 1]}, "or a list of texts, not ['a', 1]", '"command": "python'),
    ({"command": "a\0b"}, "must be a text", '"command": "python'),
    ({"command": "grep it's a"}, "a quote without its other half", "write a list"),
    ({"command": 'grep "a'}, "a quote without its other half", "Close it"),
    ({"command": "load {item"}, "a brace without its other half in '{item'", "Close it"),
    ({"command": "load raw/item}.csv"}, "a brace without its other half", "Close it"),
    ({"command": "awk {print $1}"}, "'command' has '$1}'", "in quotes"),
    ({"command": "a", "module": "m"}, "names both a module and a command", "Take 'module' out"),
    ({}, "names no module", '"command": "python load.py"'),
    ({"command": "a", "batch": 2}, "'batch', but a command is run for each item", "'batch' out"),
    ({"command": "a", "commits": True}, "'commits', but a command does not get", "'commits' out"),
    ({"command": "a", "comand": "b"}, "no option 'comand'", "'command'"),
    ({"comand": "b"}, "no option 'comand'", "Did you mean 'command'"),
])
def test_a_command_that_is_none_is_refused_in_one_sentence(options, says, way_out):
    with pytest.raises(UserError) as caught:
        load_pipeline({"t": options})
    assert str(caught.value).startswith("TOOL_MAP['t']")
    assert says in caught.value.problem and way_out in caught.value.fix
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("word", ["|", "||", "&", "&&", ";", ">", ">>", "<", "2>&1"])
@pytest.mark.parametrize("as_list", [False, True])
def test_the_words_of_a_shell_are_refused_with_the_way_to_have_one(word, as_list):
    line = f"a 'b c' {word} d"
    command = ["a", "b c", word, "d"] if as_list else line
    with pytest.raises(UserError) as caught:
        load_pipeline({"t": {"command": command}})
    assert caught.value.problem == (f"TOOL_MAP['t']: 'command' has {word!r}, but it is run "
                                    "without a shell.")
    assert f'Write "command": ["sh", "-c", {line!r}]' in caught.value.fix
    load_pipeline({"t": {"command": ["sh", "-c", line]}, "u": {"command": f"a '{word}'"}})


@pytest.mark.parametrize("text", ["a 2>/dev/null", "a >out.txt", "a <in.txt", "a >> log"])
def test_a_redirection_is_found_without_a_blank_after_it(text):
    with pytest.raises(UserError, match="run without a shell"):
        load_pipeline({"t": {"command": text}})
    load_pipeline({"t": {"command": ["pip", "install", "x", ">=1.0", "<tag>"]}})


@pytest.mark.parametrize("command, says, way_out", [
    ("no_such_program", "there is no program 'no_such_program'", "Install it"),
    ("./no_such_file x", "there is no program './no_such_file'", "Install it"),
    ("./data.txt", "./data.txt is not executable", "chmod +x ./data.txt"),
    ("run_me.sh", "there is no program 'run_me.sh'", 'of the pipeline\'s folder is "./name"'),
    ("jobs.load:main", "there is no program 'jobs.load:main'", 'a function of yours is a "module"'),
    ("python laod.py", "there is no file 'laod.py'", "correct its path (from "),
    ("python load.py:main", "there is no file 'load.py:main'", "correct its path"),
    ("echo {yaer}", "its command names {yaer}, which nothing gives", "Did you mean 'year'?"),
    ("echo {nope}", "its command names {nope}, which nothing gives",
     "Or declare --nope in add_arguments()"),
    ("echo {item}", "its command names {item}, which nothing gives", "Give it items"),
    ("echo {stem}", "its command names {stem}, which nothing gives", "Give it items"),
    ("echo {conn}", "its command names {conn}, which nothing gives", "Known: "),
    ({"command": "echo x", "each": "list"}, "its command is run once per item, but does not name",
     "{item} or {stem}"),
    ({"command": "echo {item}", "each": "list", "cache": True}, "'cache' is not for tools with",
     "Take 'cache' out"),
    ({"module": "list", "each": "other"}, "'each' is 'other', which has no items",
     "Name a tool that has items"),
])
def test_check_plan_and_run_refuse_what_is_not_there_before_anything_runs(quick, command, says,
                                                                          way_out):
    tools = {"first": {"command": "touch ran"}, "list": {"module": "list"}, "other": "echo other",
             "t": command}
    if says.startswith("'each'"):
        tools.pop("list")
    write_tables(quick, ARGUMENTS, **tools)
    quick.tool("list", "def items(): return ['x']\ndef run(item): pass")
    for name in ("data.txt", "run_me.sh", "load.py"):
        (quick.folder / name).write_text("")
    (quick.folder / "run_me.sh").chmod(0o755)
    for words in (["--check"], ["--plan"], []):
        ended = quick.run(*words)
        assert ended.code == 2, ended
        said = ended.out if words == ["--check"] else ended.err
        assert f"TOOL_MAP['t']: {says}" in said and way_out in said, ended
        assert said.count(f"TOOL_MAP['t']: {says}") == 1 and "Traceback" not in said
    assert not (quick.folder / "ran").exists()


def test_a_program_that_goes_before_its_turn_fails_its_tool_alone(quick):
    write_tables(quick, a="rm gone.sh", b={"command": "./gone.sh", "needs": ["a"]}, c="echo c")
    (quick.folder / "gone.sh").write_text("#!/bin/sh\n")
    (quick.folder / "gone.sh").chmod(0o755)
    ended = quick.run()
    assert ended.code == 1 and "./gone.sh could not be started: " in ended.err, ended
    assert "Traceback" not in ended.err and ended.out == "c\n"


# --- how it ends, and what it prints ---

@WAYS
@pytest.mark.parametrize("script, error", [
    ("echo one; echo two >&2; exit 2", "exit code 2: two"),
    ("echo one; echo; printf '  \\n'; exit 255", "exit code 255: one"),
    ("exit 3", "exit code 3"),
    ("printf 'no newline'; exit 1", "exit code 1: no newline"),
    ("printf '\\033[31mred\\033[0m\\n'; exit 1", "exit code 1: red"),
    ("printf '\\377\\n'; exit 1", "exit code 1: "),
    ("echo last; kill -TERM $$", "killed by signal 15 (SIGTERM): last"),
    ("kill -SEGV $$", "killed by signal 11 (SIGSEGV)"),
])
def test_the_exit_code_decides_and_the_last_line_is_the_error(quick, words, script, error):
    write_tables(quick, bad=sh(script), after={"command": "echo no", "needs": ["bad"]})
    ended = quick.run(*words.split())
    assert ended.code == 1, ended
    [line] = [line for line in ended.err.splitlines() if "bad  " in line and "failed  " in line
              and line[2:3] == ":"]
    assert error in line and "Traceback" not in ended.err, ended
    assert "needs bad, which failed" in ended.err and "no\n" not in ended.out.splitlines(True)
    assert line.count(error) == 1


@WAYS
def test_output_is_seen_and_kept_with_or_without_an_end_of_its_line(quick, words):
    write_tables(quick, a=sh("echo out; echo err >&2; printf 'é open'"))
    ended = quick.run(*words.split())
    assert ended.code == 0 and ended.out.rstrip("\n") == "out\nerr\né open", ended
    if "--no-history" not in words:
        logged = quick.run("--logs", "a")
        assert logged.out.rstrip("\n").endswith("out\nerr\né open"), logged


SLOW = """
import os, time
print("begun")
for _ in range(500):
    os.path.exists("go") or time.sleep(0.02)
print("over" if os.path.exists("go") else "too late")
"""


@pytest.mark.parametrize("words", ["", "--no-history"])
@pytest.mark.parametrize("command", [
    sh("echo begun; for i in $(seq 500); do [ -e go ] || sleep 0.02; done; [ -e go ] && echo over"),
    ["python", "-c", SLOW]])
def test_output_is_live_while_tools_run_one_at_a_time(sandbox, command, words):
    write_tables(sandbox, a=command)
    process = sandbox.start(*words.split())
    try:
        assert process.stdout.readline() == "begun\n"
        (sandbox.folder / "go").touch()
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert out == "over\n" and process.returncode == 0


def test_a_run_from_python_shows_the_output_and_tells_the_last_line(tmp_path, capfd, modules):
    modules()
    result = run_pipeline([], {"a": {"command": "echo seen", "needs": []},
                               "b": {"command": sh("echo last; exit 4"), "needs": []}})
    assert capfd.readouterr().out == "seen\nlast\n"
    assert result.succeeded == ["a"] and result.errors == {"b": "exit code 4: last"}
    assert result.outcomes["b"].traceback == "" and result.results["a"] is None


def test_much_output_does_not_stop_a_command(quick):
    write_tables(quick, a=sh("yes 0123456789012345678901234567890123456789 | head -n 200000"))
    ended = quick.run()
    assert ended.code == 0 and len(ended.out) == 41 * 200_000


def test_an_output_that_is_closed_is_no_reason_to_fail(sandbox):
    write_tables(sandbox, a=sh("echo a; sleep 0.1; echo b"), b=sh("echo c; touch done"))
    for words in ([], ["--no-history"]):
        process = sandbox.start(*words)
        process.stdout.close()
        process.wait(20)
        assert (sandbox.folder / "done").exists(), process.stderr.read()
        (sandbox.folder / "done").unlink()


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_command_that_fails_is_tried_again_and_told_which_try_it_is(quick, words):
    write_tables(quick, a={"command": sh("test {attempt} = 3"), "retries": 2, "retry_delay": 0})
    assert quick.run(*words.split()).code == 0


# --- what ends with it ---

LEAVES = "import os, sys, time\n" + textwrap.dedent("""
    def note():
        with open("pids", "a") as file:
            print(os.getpid(), file=file)
    note()
    if not os.fork():
        note()
        time.sleep(600)
    if "stay" in sys.argv:
        time.sleep(600)
    while len(open("pids").read().split()) < 2:
        time.sleep(0.005)
    if "fail" in sys.argv:
        sys.exit("failed")
""")


def write_leaver(box, word="", **options):
    """Write a pipeline with a tool that leaves a child behind, which holds its output."""
    (box.folder / "leave.py").write_text(LEAVES)
    return write_tables(box, a={"command": f"python leave.py {word}", **options},
                        b={"command": "echo b", "needs": ["a"]})


@pytest.mark.parametrize("words", ["", "-j 2", "--no-history"])
@pytest.mark.parametrize("word", ["", "fail"])
def test_what_a_command_leaves_behind_ends_with_it_and_nobody_waits_for_it(quick, word, words):
    write_leaver(quick, word)
    ended = quick.run(*words.split(), timeout=30)
    assert ended.code == (word == "fail"), ended
    pids = read_pids(quick.folder)
    assert len(pids) == 2
    wait_until(lambda: not any(map(is_alive, pids)))


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_process_that_left_the_group_and_holds_the_output_is_not_waited_for(quick, words):
    (quick.folder / "daemon.py").write_text(
        "import os, time\nif not os.fork():\n    os.setsid()\n"
        "    open('pids', 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        "while not os.path.exists('pids'): time.sleep(0.005)\nprint('left')")
    write_tables(quick, a="python daemon.py")
    try:
        ended = quick.run(*words.split(), timeout=30)
        assert ended.code == 0 and ended.out == "left\n", ended
    finally:
        for pid in read_pids(quick.folder):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_signal_ends_a_command_with_all_that_it_started(sandbox, words, number):
    write_leaver(sandbox, "stay")
    process = sandbox.start(*words.split())
    try:
        wait_until(lambda: len(read_pids(sandbox.folder)) == 2)
        process.send_signal(number)
        process.communicate(timeout=8)  # less than the grace: it went when it was asked to
    finally:
        process.kill()
    assert process.returncode == 128 + number
    wait_until(lambda: not any(map(is_alive, read_pids(sandbox.folder))))


def end_at_work(sandbox, number, *words):
    """Send a signal to a run when its command has noted its id; return the run's exit code."""
    process = sandbox.start(*words)
    wait_until(lambda: read_pids(sandbox.folder))
    process.send_signal(number)
    process.communicate(timeout=20)
    return process.returncode


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_command_is_asked_to_end_before_it_is_killed(sandbox, words):
    write_tables(sandbox, a=sh("trap 'sleep 0.2; echo cleaned > cleaned; exit 1' TERM; "
                               "echo $$ > pids; while :; do sleep 0.01; done"))
    assert end_at_work(sandbox, signal.SIGINT, *words.split()) == 130
    assert sandbox.read("cleaned") == "cleaned\n"


def test_what_a_shell_started_has_the_grace_though_the_shell_went_at_once(sandbox):
    (sandbox.folder / "slow.py").write_text(textwrap.dedent("""
        import os, signal, time
        def end(*_):
            time.sleep(0.3)
            open("cleaned", "w").close()
            os._exit(0)
        signal.signal(signal.SIGTERM, end)
        open("pids", "w").write(str(os.getpid()))
        while True: time.sleep(1)
    """))
    write_tables(sandbox, a=sh("python3 slow.py; true"))
    assert end_at_work(sandbox, signal.SIGTERM) == 143
    assert (sandbox.folder / "cleaned").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_command_that_does_not_end_when_asked_is_killed_after_the_grace(tmp_path, modules, jobs):
    modules()
    script = (f"trap '' TERM; echo $$ > {tmp_path}/pids; kill -INT {os.getpid()}; sleep 30; "
              f"touch {tmp_path}/ended")
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {"a": {"command": sh(script), "needs": []}}, jobs=jobs, grace_s=0.3)
    wait_until(lambda: not any(map(is_alive, read_pids(tmp_path))))
    assert not (tmp_path / "ended").exists()


@LINUX
@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_second_ctrl_c_kills_a_command_that_does_not_end_when_asked(sandbox, words):
    write_tables(sandbox, a=sh("trap '' TERM INT; echo $$ > pids; while :; do sleep 0.01; done"))
    process = sandbox.start(*words.split())
    try:
        wait_until(lambda: read_pids(sandbox.folder))
        press_ctrl_c_again(process)
    finally:
        process.kill()
    assert process.returncode == 130
    wait_until(lambda: not any(map(is_alive, read_pids(sandbox.folder))))


@LINUX
@pytest.mark.parametrize("closes", ["", "os.closerange(3, 256)\n"])
@pytest.mark.parametrize("words", ["", "-j 2", "--no-history"])
def test_a_command_ends_when_the_orchestrator_is_killed(sandbox, words, closes):
    write_leaver(sandbox, "stay")
    (sandbox.folder / "leave.py").write_text("import os\n" + closes + LEAVES)
    process = sandbox.start(*words.split())
    try:
        wait_until(lambda: len(read_pids(sandbox.folder)) == 2)
    finally:
        process.kill()
        process.communicate(timeout=20)
    wait_until(lambda: not any(map(is_alive, read_pids(sandbox.folder))), timeout_s=5)


@LINUX
def test_a_command_ends_when_its_worker_is_killed(sandbox):
    write_leaver(sandbox, "stay", isolate=True)
    process = sandbox.start()
    try:
        wait_until(lambda: len(read_pids(sandbox.folder)) == 2)
        with open(f"/proc/{read_pids(sandbox.folder)[0]}/stat") as file:
            worker = int(file.read().rpartition(")")[2].split()[1])
        assert worker != process.pid
        os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 1 and "its process was killed by signal 9" in err
    wait_until(lambda: not any(map(is_alive, read_pids(sandbox.folder))), timeout_s=5)


@pytest.mark.parametrize("script", ["sleep 600 & sleep 600", "trap '' TERM; sleep 600 & wait; "
                                    "while :; do sleep 0.01; done"])
def test_a_timeout_ends_a_command_with_what_it_started(tmp_path, modules, script):
    modules()
    result = run_pipeline([], {"a": {"command": sh(f"echo $$ > {tmp_path}/pids; echo at work; "
                                                   + script), "timeout": 0.3, "needs": []},
                               "b": {"command": "echo b", "needs": []}}, grace_s=0.3)
    assert result.errors == {"a": "timed out after 0.30 s"} and result.succeeded == ["b"]
    wait_until(lambda: not any(map(is_alive, read_pids(tmp_path))))


def test_the_log_of_a_command_that_was_too_slow_has_its_output_alone(quick):
    write_tables(quick, a={"command": sh("echo at work; sleep 600"), "timeout": 2})
    ended = quick.run()
    assert ended.code == 1 and "timed out after 2.00 s" in ended.err, ended
    assert ended.out == "at work\n"


@LINUX
def test_memory_bounds_a_command(quick):
    write_tables(quick, a={"command": ["python", "-c", "x = bytearray(1 << 30)"],
                           "memory": "300MB"})
    ended = quick.run()
    assert ended.code == 1, ended
    assert "exit code 1: MemoryError; its memory is bounded to 300.0 MB" in ended.err


@LINUX
def test_a_worker_does_many_commands(quick):
    write_tables(quick, **{f"t{i}": sh("echo $PPID; sleep 600 &") for i in range(12)})
    ended = quick.run("-j", "2")
    assert ended.code == 0 and len(set(ended.out.split())) <= 2, ended


# --- items ---

LIST = """
def items(): return [("in/a.b.csv", 1), ("in/c.csv", "v2")]
def run(item): pass
"""


@pytest.mark.parametrize("words", ["", "-j 2"])
@pytest.mark.parametrize("database", ["", SQLITE])
def test_a_command_is_run_once_for_each_item(quick, words, database):
    write_tables(quick, database, list={"module": "list"}, use={
        "command": "sh use.sh {item} {stem} {version} {attempt}", "each": "list"})
    quick.tool("list", LIST)
    (quick.folder / "use.sh").write_text('echo "$@" >> used; [ "$2" = a.b ] || exit 3')
    ended = quick.run(*words.split())
    assert ended.code == 1 and "in/c.csv: exit code 3" in ended.err, ended
    assert sorted(quick.read("used").splitlines()) == ["in/a.b.csv a.b 1 1", "in/c.csv c v2 1"]
    (quick.folder / "use.sh").write_text('echo "$@" >> used')
    assert quick.run(*words.split()).code == 0
    assert len(quick.read("used").splitlines()) == 3 and "in/c.csv c v2 1" in quick.read("used")
    ended = quick.run(*words.split())
    assert "none of 2 items is pending" in ended.err and len(quick.read("used").splitlines()) == 3


def test_the_plan_says_that_items_of_a_command_are_done_at_least_once(quick):
    write_tables(quick, SQLITE, list={"module": "list"},
                 use={"command": "echo {item}", "each": "list"})
    quick.tool("list", LIST)
    ended = quick.run("--plan")
    assert "runs echo {item}; each item of list at least once" in ended.out, ended
    assert "each item exactly once" in ended.out


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_command_may_write_the_database_that_the_ledger_is_in(quick, words):
    immediate = SQLITE.replace('"data.db")', '"data.db"), isolation_level="IMMEDIATE"')
    write_tables(quick, immediate, list={"module": "list"}, use={
        "command": "python write.py {item}", "each": "list"})
    quick.tool("list", LIST + "def setup(conn): conn.execute('CREATE TABLE IF NOT EXISTS t (x)')")
    (quick.folder / "write.py").write_text(textwrap.dedent("""
        import sqlite3, sys
        with sqlite3.connect("data.db", timeout=0.5) as conn:
            conn.execute("INSERT INTO t VALUES (?)", sys.argv[1:])
    """))
    ended = quick.run(*words.split())
    assert ended.code == 0, ended
    assert sorted(quick.query("SELECT x FROM t")) == [("in/a.b.csv",), ("in/c.csv",)]
    rows = quick.query("SELECT item, status FROM orchestrator_items WHERE tool = 'use'")
    assert sorted(rows) == [("in/a.b.csv", "success"), ("in/c.csv", "success")]


def test_a_command_is_not_run_again_because_its_row_could_not_be_written_at_once(quick):
    # Another holds the database until after the command; a row that waits for that is written late.
    write_tables(quick, SQLITE.replace('"data.db")', '"data.db"), timeout=0.05'),
                 list={"module": "list"}, use={"command": "python hold.py {item}", "each": "list"})
    quick.tool("list", "def items(): return ['x']\ndef run(item): pass")
    (quick.folder / "hold.py").write_text(textwrap.dedent("""
        import os, sqlite3, time
        open("runs", "a").write("x")
        if not os.fork():
            os.setsid()
            conn = sqlite3.connect("data.db", isolation_level=None)
            conn.execute("BEGIN IMMEDIATE")
            open("held", "w").close()
            time.sleep(0.5)
            conn.execute("ROLLBACK")
            os._exit(0)
        while not os.path.exists("held"): time.sleep(0.005)
    """))
    ended = quick.run()
    assert ended.code == 0 and quick.read("runs") == "x", ended


def test_a_timeout_is_for_each_item_and_the_others_go_on(quick):
    write_tables(quick, list={"module": "list"}, use={
        "command": sh("case {stem} in c) sleep 600;; esac"), "each": "list", "timeout": 0.5})
    quick.tool("list", LIST)
    ended = quick.run()
    assert ended.code == 1 and "in/c.csv: timed out after 0.50 s" in ended.err, ended
    assert "1 of 2 items failed" in ended.err


@LINUX
def test_an_item_whose_run_was_killed_comes_again(sandbox):
    write_tables(sandbox, SQLITE, list={"module": "list"}, use={
        "command": sh("echo {item} >> pids2; echo $$ > pids; [ -e go ] || sleep 600"),
        "each": "list"})
    sandbox.tool("list", "def items(): return ['x']\ndef run(item): pass")
    process = sandbox.start()
    try:
        wait_until(lambda: read_pids(sandbox.folder))
    finally:
        process.kill()
        process.communicate(timeout=20)
    (sandbox.folder / "go").touch()
    ended = sandbox.run()
    assert ended.code == 0 and sandbox.read("pids2") == "x\nx\n", ended


# --- its source ---

def test_a_cached_command_runs_again_when_its_script_or_text_changes(quick):
    def run(command="sh say.sh {year}", *words):
        write_tables(quick, ARGUMENTS, a={"command": command, "cache": True})
        return quick.run(*words)

    (quick.folder / "say.sh").write_text("echo one $1")
    assert run().out == "one 2013\n"
    assert run().out == "" and "cached" in run().err
    os.utime(quick.folder / "say.sh", (1, 1))
    assert run().out == ""  # the bytes count
    (quick.folder / "say.sh").write_text("echo two $1")
    assert "its source changed" in run("sh say.sh {year}", "--plan").out
    assert run().out == "two 2013\n"
    assert "it calls another command, $ sh say.sh {year} x," \
        in run("sh say.sh {year} x", "--plan").out
    assert run("sh say.sh {year} x").out == "two 2013\n"
    assert run("sh say.sh {year} x", "--year", "2014").out == "two 2014\n"


def test_the_program_is_source_if_it_is_a_file_of_the_folder_and_so_is_the_first_such_word(quick):
    def run():
        return quick.run().out

    write_tables(quick, a={"command": "./say -x one.txt two.txt", "cache": True})
    say = quick.folder / "say"
    say.write_text("#!/bin/sh\necho ran")
    say.chmod(say.stat().st_mode | stat.S_IXUSR)
    for name in ("one.txt", "two.txt"):
        (quick.folder / name).write_text("1")
    assert run() == "ran\n" and run() == ""
    (quick.folder / "two.txt").write_text("2")
    assert run() == ""  # which `reads` would name
    (quick.folder / "one.txt").write_text("2")
    assert run() == "ran\n" and run() == ""
    say.write_text("#!/bin/sh\necho ran anew")
    assert run() == "ran anew\n" and run() == ""


def test_an_item_given_up_is_tried_again_when_the_script_changes(quick):
    write_tables(quick, SQLITE, list={"module": "list"}, use={
        "command": "sh use.sh {item}", "each": "list", "retries": 1, "retry_delay": 0})
    quick.tool("list", "def items(): return ['x']\ndef run(item): pass")
    (quick.folder / "use.sh").write_text("echo $1 >> used; exit 1")
    assert quick.run().code == 1 and quick.run().code == 1
    assert quick.read("used") == "x\nx\n"  # given up
    (quick.folder / "use.sh").write_text("echo $1 >> used")
    ended = quick.run()
    assert ended.code == 0 and quick.read("used") == "x\nx\nx\n", ended


# --- what shows ---

def test_what_a_command_is_shows_in_the_list_the_plan_and_the_failure(quick):
    long = "echo " + "x" * 100
    write_tables(quick, ARGUMENTS, a="sh a.sh {year}", long=long)
    (quick.folder / "a.sh").write_text("echo fine")
    listed = quick.run("--list")
    assert "sh a.sh {year}" in listed.out and "x" * 80 not in listed.out and "xxx..." in listed.out
    shown = {tool["name"]: tool for tool in json.loads(quick.run("--list", "--json").out)["tools"]}
    assert shown["a"]["module"] == shown["a"]["summary"] == "sh a.sh {year}"
    assert shown["long"]["module"] == long
    assert "; runs sh a.sh {year}" in quick.run("--plan").out
    assert quick.run("a").code == 0
    (quick.folder / "a.sh").write_text("echo wrong >&2; exit 9")
    ended = quick.run("a")
    block = ended.err[ended.err.index("a failed in run 2"):]
    assert "  error    exit code 9: wrong" in block and "  command  sh a.sh {year}" in block, ended
    assert "  changed  a.sh" in block
    resumed = quick.run("--resume")
    assert "Changed since" not in resumed.err and resumed.code == 1, resumed


def test_a_resume_tells_that_the_script_of_a_command_changed(quick):
    write_tables(quick, a="sh a.sh", b={"command": "false", "needs": ["a"]})
    (quick.folder / "a.sh").write_text("echo one")
    assert quick.run().code == 1
    (quick.folder / "a.sh").write_text("echo two")
    ended = quick.run("--resume")
    assert "Changed since run 1: a.sh. Done before, and not run again: a." in ended.err, ended


LOST = """
import os, sqlite3
class Connection(sqlite3.Connection):
    closed = False
    def execute(self, *statement):
        if os.path.exists(HERE / "lost"):
            os.unlink(HERE / "lost")
            self.closed = True
            raise sqlite3.OperationalError("the server closed the connection")
        return super().execute(*statement)
HERE = Path(__file__).parent
def get_connection():
    return sqlite3.connect(HERE / "data.db", factory=Connection)
"""


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_connection_that_is_lost_while_a_command_works_has_it_not_run_again(sandbox, words):
    write_tables(sandbox, LOST, list={"module": "list"}, use={
        "command": sh("echo {item} >> used; touch lost"), "each": "list"})
    sandbox.tool("list", "def items(): return ['x']\ndef run(item): pass")
    ended = sandbox.run(*words.split())
    assert ended.code == 0 and sandbox.read("used") == "x\n", ended
    assert not (sandbox.folder / "lost").exists()
    assert sandbox.query("SELECT status, deaths FROM orchestrator_items WHERE tool = 'use'") \
        == [("success", 0)]


@pytest.mark.parametrize("command", [
    ["env", "python", "who.py"], ["sh", "-c", "python who.py | cat"], "nice python who.py"])
def test_python_is_the_one_that_runs_this_also_behind_another_program(quick, command):
    write_tables(quick, a=command)
    (quick.folder / "who.py").write_text("import sys\nprint(sys.prefix)")

    ended = quick.run(env={"PATH": "/usr/bin:/bin"})

    assert ended.out == f"{sys.prefix}\n", ended


@pytest.mark.parametrize("text, word", [
    ("python s.py; echo 1", "s.py;"), ("python s.py $OUT/x", "$OUT/x"), ("ls ~/out", "~/out"),
    ("ls ~", "~"), ("echo $(date)", "$(date)"), ("ls ${x}", "${x}")])
def test_what_only_a_shell_does_with_a_text_is_refused_unless_it_is_in_quotes(text, word):
    with pytest.raises(UserError) as error:
        load_pipeline({"a": {"command": text}})
    assert f"'command' has {word!r}, but it is run without a shell" in str(error.value)
    first, _, rest = text.partition(" ")
    quoted = load_pipeline({"a": {"command": f"{first} '{rest}'"}})
    assert quoted.tools["a"].command == (first, rest)


def test_the_error_is_what_one_sees_last_of_a_line_that_is_written_over(quick):
    write_tables(quick, a=sh(r"printf 'at 0%%\rat 50%%\rno room'; exit 3"))

    assert "exit code 3: no room" in quick.run().err
