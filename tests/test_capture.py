"""What tools print: it reaches the screen as it was, and the log of its attempt."""
import os
import signal
import subprocess
import sys

import pytest
from conftest import wait_until

import orchestrator
from orchestrator import clean, read_tail, trim_log

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")
LOUD = """
    import os, subprocess, sys
    def run(context):
        print("python says")
        sys.stdout.flush()
        os.write(1, b"c says\\n")
        subprocess.run([sys.executable, "-c", "print('child says')"], check=True)
        os.write(2, b"c complains\\n")
        print("python complains", file=sys.stderr)
        context.log.info("logged")
"""
SILENT = "def run():\n    pass\n"


def logs(sandbox, run=1):
    """Return the logs of a run: {file's name: its bytes}."""
    folder, = sandbox.folder.glob(f".orchestrator/*/logs/{run}")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options, words", [
    ("", ()), ("", ("--jobs", "2")), ('"isolate": True', ())])
def test_what_python_c_and_children_print_is_in_the_log(sandbox, options, words):
    sandbox.pipeline(f'TOOL_MAP = {{"loud": {{"module": "loud", {options}}}}}')
    sandbox.tool("loud", LOUD)
    ended = sandbox.run(*words)
    assert ended.code == 0
    log = logs(sandbox)["loud.1.log"].decode()
    for line in ("python says", "c says", "child says", "c complains", "python complains",
                 "logged"):
        assert log.count(line + "\n") == 1, line
    assert log.index("python says") < log.index("c says") < log.index("child says")
    assert "  running" not in log and "success" not in log


def test_stdout_and_stderr_stay_apart_and_in_order(sandbox):
    sandbox.pipeline('TOOL_MAP = {"loud": "loud"}').tool("loud", LOUD)
    ended = sandbox.run()
    assert ended.out == "python says\nc says\nchild says\n"
    lines = [line for line in ended.err.splitlines() if "complains" in line or "loud" in line]
    assert [line[10:] if line[2] == ":" else line for line in lines[:5]] == [
        "loud  running", "c complains", "python complains", "loud  logged",
        lines[4][10:]] and "success" in lines[4]


def test_a_tool_that_prints_nothing_has_no_log(sandbox):
    sandbox.pipeline('TOOL_MAP = {"a": "silent", "b": {"module": "silent", "isolate": True}}')
    sandbox.tool("silent", SILENT)
    assert sandbox.run().code == 0
    assert logs(sandbox) == {}


def test_output_is_shown_while_the_tool_runs(sandbox):
    sandbox.pipeline('TOOL_MAP = {"slow": "slow"}').tool("slow", """
        import os, time
        def run():
            print("at work")
            while not os.path.exists("go"):
                time.sleep(0.01)
    """)
    with open(sandbox.folder / "out", "w+") as out:
        process = sandbox.start(stdout=out)
        wait_until(lambda: "at work" in sandbox.read("out"))
        assert process.poll() is None
        (sandbox.folder / "go").write_text("")
        process.communicate(timeout=20)
    assert process.returncode == 0 and sandbox.read("out") == "at work\n"


@POSIX
def test_what_a_killed_tool_had_printed_is_in_its_log_after_the_next_start(sandbox):
    sandbox.pipeline('TOOL_MAP = {"dies": "dies"}').tool("dies", """
        import os, signal
        def run():
            if not os.path.exists("again"):
                open("again", "w").close()
                os.write(1, b"last words\\n")
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert sandbox.run().code == -signal.SIGKILL
    ended = sandbox.run("--resume")
    assert ended.code == 0 and ended.err.startswith("Run 1 was cut off at dies;")
    assert logs(sandbox)["dies.1.log"] == b"last words\n"
    assert sandbox.run("--logs", "dies", "--run", "1").out == "last words\n"


@POSIX
def test_on_a_terminal_tools_keep_it_and_what_python_writes_is_logged(sandbox):
    import pty
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        import os, sys
        def run():
            print("on a terminal:", sys.stdout.isatty(), os.isatty(1), sys.stdout.fileno())
    """)
    ours, theirs = pty.openpty()
    process = sandbox.start(stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(20) == 0
    assert b"on a terminal: True True 1" in shown
    assert logs(sandbox) == {"t.1.log": b"on a terminal: True True 1\n"}


def test_bytes_that_are_no_text_do_no_harm(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", r"""
        import os
        def run():
            os.write(1, b"\xff\xfe \x00 \x1b[31mred\x1b[0m \x1b]0;title\x07 end\n")
    """)
    with open(sandbox.folder / "out", "wb") as out:  # as it is, to stdout
        process = sandbox.start(stdout=out)
        assert process.wait(20) == 0
    assert (sandbox.folder / "out").read_bytes().startswith(b"\xff\xfe \x00 \x1b[31mred")
    shown = sandbox.run("--logs", "t").out
    assert "red" in shown and shown.endswith(" end\n")
    assert not [letter for letter in shown if ord(letter) < 32 and letter != "\n"]


@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_the_last_lines_of_a_failed_tool_are_shown_at_the_end(sandbox, words):
    sandbox.pipeline('TOOL_MAP = {"t": {"module": "t", "needs": []}, '
                     '"u": {"module": "silent", "needs": []}}')
    sandbox.tool("silent", SILENT).tool("t", """
        def run():
            for i in range(30):
                print("line", i)
            raise ValueError("no")
    """)
    ended = sandbox.run(*words)
    assert ended.code == 1
    tail = ended.err[ended.err.index("Last lines of t"):ended.err.index("\ntool ")]
    assert [line.strip() for line in tail.splitlines()[1:] if line.strip()] \
        == [f"line {i}" for i in range(20, 30)]


@pytest.mark.parametrize("how", ["sys.stdout.close()", "sys.stdout = open('mine', 'w')",
                                 "os.close(1)", "os.dup2(2, 1)",
                                 "import shutil; shutil.rmtree('.orchestrator')"])
def test_a_tool_that_meddles_with_its_output_fails_nothing_else(sandbox, how):
    sandbox.pipeline('TOOL_MAP = {"t": "t", "u": "loud"}').tool("loud", LOUD).tool("t", f"""
        import os, sys
        def run():
            print("before")
            {how}
    """)
    ended = sandbox.run("t")
    assert ended.code in (0, 2) and "bug" not in ended.err, ended
    assert "Traceback" not in ended.err


def test_a_reader_that_leaves_ends_no_tool(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        def run():
            for i in range(20_000):
                print("line", i)
            open("done", "w").close()
    """)
    process = sandbox.start()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0 and (sandbox.folder / "done").exists()
    process.stderr.close()


def test_a_log_that_is_too_long_keeps_its_beginning_and_its_end(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"a" * 500 + b"b" * 10_000 + b"c" * 500)
    trim_log(str(log), cap_bytes=1000)
    content = log.read_bytes()
    assert content == (b"a" * 500 + b"\n[... 10000 bytes were left out here ...]\n" + b"c" * 500)
    trim_log(str(log), cap_bytes=2000)
    assert log.read_bytes() == content


def test_the_tail_of_a_log_is_there_even_if_its_lines_are_very_long(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"first\n" + b"x" * 3_000_000 + b"!\nlast\n")
    *_, long, last = read_tail(str(log), 10)
    assert last == "last" and long.endswith("xx!") and len(long) < 2000
    assert read_tail(str(log), 1) == ["last"]
    assert read_tail(str(log), 0) == [] == read_tail(str(tmp_path / "none"), 5)


def test_cleaning_leaves_text_tabs_and_lines():
    assert clean("tab\tand\nline\r\n\x1b[2Jgone\x9b1m\x07") == "tab\tand\nline\ngone1m"


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
