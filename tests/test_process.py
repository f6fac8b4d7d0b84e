"""What a tool does to its process ends with it."""
import os
import signal
import sys

import pytest
from conftest import SQLITE

from orchestrator import run_pipeline

NO_DATABASE = "def get_connection(): return None\n\n"
CHANGES = {
    "folder": ("os.chdir('/')", "os.getcwd() == HERE"),
    "a folder that is gone": ("os.mkdir('sub'); os.chdir('sub'); os.rmdir('../sub')",
                              "os.getcwd() == HERE"),
    "stdout": ("sys.stdout = open(os.devnull, 'w')", "sys.stdout.name == '<stdout>' or "
               "isinstance(sys.stdout.fileno(), int) and sys.stdout.fileno() == 1"),
    "stderr": ("sys.stderr = io.StringIO()", "not isinstance(sys.stderr, io.StringIO)"),
    "stdin": ("sys.stdin = io.StringIO()", "not isinstance(sys.stdin, io.StringIO)"),
    "a closed stdout": ("sys.stdout.close()", "not sys.stdout.closed"),
    "a detached stdout": ("sys.stdout.detach()", "not sys.stdout.closed"),
    "a stdout that a wrapper closed": ("sys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'ascii')",
                                       "not sys.stdout.closed and sys.stdout.encoding == 'utf-8'"),
    "Python's own stdout": ("sys.__stdout__.close()", "not sys.stdout.closed"),
    "no stdout": ("del sys.stdout", "not sys.stdout.closed"),
    "a closed stderr": ("sys.stderr.close()", "not sys.stderr.closed"),
    "Ctrl-C": ("signal.signal(signal.SIGINT, signal.SIG_IGN)",
               "signal.getsignal(signal.SIGINT) is not signal.SIG_IGN"),
    "SIGTERM": ("signal.signal(signal.SIGTERM, lambda *_: None)",
                "'lambda' not in repr(signal.getsignal(signal.SIGTERM))"),
    "a signal that ends nothing else": ("signal.signal(signal.SIGWINCH, signal.SIG_IGN)",
                                        "signal.getsignal(signal.SIGWINCH) is signal.SIG_DFL"),
    "blocked signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])",
                        "not signal.pthread_sigmask(signal.SIG_BLOCK, [])"),
    "who is woken": ("import socket; a, b = socket.socketpair(); a.setblocking(False); "
                     "signal.set_wakeup_fd(a.detach())", "signal.set_wakeup_fd(-1) == -1"),
    "argv": ("sys.argv[:] = ['--force']; sys.argv = ['x', '--force']",
             "sys.argv == [context.tool]"),
    "umask": ("os.umask(0)", "os.umask(0o22) == 0o22"),
    "depth of calls": ("sys.setrecursionlimit(9999)", "sys.getrecursionlimit() < 9999"),
    "logging": ("logging.disable(logging.CRITICAL)", "logging.root.manager.disable == 0"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="folders in use and signals of POSIX")
@pytest.mark.parametrize("how", ["pass", "raise ValueError('no')", "sys.exit(3)"])
@pytest.mark.parametrize("isolate", [False, True], ids=["here", "worker"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_a_tool_changes_does_not_reach_the_next(quick, what, isolate, how):
    change, is_as_before = CHANGES[what]
    quick.pipeline(NO_DATABASE + "import os\nos.umask(0o22)\nTOOL_MAP = " + repr({
        name: {"module": name, "isolate": isolate, "needs": []} for name in ("a", "b")}))
    quick.tool("a", f"""
        import io, logging, os, signal, sys
        def run():
            {change}
            {how}
    """).tool("b", f"""
        import io, logging, os, signal, sys
        HERE = {str(quick.folder.resolve())!r}
        def run(context):
            assert {is_as_before}
            print("b was here")
    """)
    ended = quick.run()
    assert "b was here" in ended.out, ended
    assert ended.code == (how != "pass"), ended
    if how != "pass":  # what is said of the run does not depend on it either
        assert "orchestrator.py --resume" in ended.err.splitlines()[-1]
        assert quick.run("--resume").code == 1


ALL_OF_IT = """
    os.chdir("/")
    sys.stdin.close()
    signal.alarm(50)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    os.umask(0o77)
    sys.stdout.close()
    sys.stderr.close()
"""
IS_AS_BEFORE = """
    assert os.getcwd() == HERE and os.umask(0o22) == 0o22
    assert sys.stdin.read() == "" and signal.alarm(0) == 0
    assert "lambda" not in repr(signal.getsignal(signal.SIGINT))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    print("as before")
    print("this as well", file=sys.stderr)
"""
STEPS = {
    "import": "change()",
    "items": "def items():\n    yield 'x'\n    change()\n    yield 'y'",
    "items that fail": "def items():\n    change()\n    raise ValueError('no')",
    "check": "def check(): change()",
    "a check that fails": "def check():\n    change()\n    return False",
    "an import that fails": "change()\nraise ValueError('no')",
}


@pytest.mark.skipif(sys.platform == "win32", reason="folders in use and signals of POSIX")
@pytest.mark.parametrize("words", ["", "--no-history", "-j 2"])
@pytest.mark.parametrize("step", STEPS)
def test_what_any_step_of_a_tool_changes_ends_with_it(sandbox, step, words):
    sandbox.pipeline(NO_DATABASE + 'import os\nos.umask(0o22)\nTOOL_MAP = {"a": "a", "b": "b"}')
    item = "item" * step.startswith("items")
    sandbox.tool("a", f"""
import os, signal, sys
def run({item}): pass
def change():
    {ALL_OF_IT.strip()}
""" + STEPS[step])
    head = f"import os, signal, sys\nHERE = {str(sandbox.folder.resolve())!r}\n"
    sandbox.tool("b", head + "def run():" + IS_AS_BEFORE)
    if step == "an import that fails":
        if words == "-j 2":
            return  # they are imported here first
        ended = sandbox.run("--exclude", "b", *words.split())
        assert ended.code == 2 and "\n  ValueError: no" in ended.err, ended
        assert "importing a failed, a.py:" in ended.err  # as seen from the folder of before
        return
    fails = "fail" in step
    ended = sandbox.run(*words.split(), "b" * fails or "a", *["a"] * fails, "b")
    ended = sandbox.run(*words.split(), "--exclude", "a") if fails else ended
    assert ended.code == 0 and "as before" in ended.out, ended
    assert "this as well" in ended.err + ended.out and "success: " in ended.err, ended


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_each_try_of_an_item_finds_the_process_as_it_was(quick):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "a"}').tool("a", """
        import os, signal
        HERE = os.getcwd()
        def items(): return ["x", "y", "z"]
        def run(item):
            assert os.getcwd() == HERE and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
            os.chdir("/")
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    """)
    ended = quick.run()
    assert ended.code == 0 and "3 rows" not in ended.err, ended


TAKERS = {
    "signal": "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "asyncio": """
            import asyncio
            async def take():
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
            asyncio.run(take())""",
    "blocks it": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])",
    "at import": "pass\n        signal.signal(signal.SIGINT, signal.SIG_IGN)",
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("how", TAKERS)
def test_ctrl_c_ends_a_run_after_any_tool_that_took_it(quick, how):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "a", "b": "b"}').tool("a", f"""
        import signal
        def run():
            {TAKERS[how]}
    """).tool("b", """
        import os, signal
        def run():
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass
            raise AssertionError("not reached")
    """)
    ended = quick.run()
    assert ended.code == 130 and "not reached" not in ended.err, ended


# --- threads that a tool leaves behind ---

LEAVES = """
    import threading, time
    stop = threading.Event()
    def run():
        threading.Thread(target=stop.wait, name="slow copy", daemon=%s).start()
"""


@pytest.mark.parametrize("words", ["", "-j 2"])
def test_a_thread_that_a_tool_leaves_behind_is_told_once(quick, words):
    quick.pipeline(NO_DATABASE + """TOOL_MAP = {"a": "a", "b": "b"}""")
    quick.tool("a", LEAVES % True).tool("b", "def run(): print('b was here')")
    ended = quick.run(*words.split())
    told = [line for line in ended.err.splitlines() if "slow copy" in line]
    assert ended.code == 0 and len(told) == 1 and " a " in told[0] and "join()" in told[0], ended


def test_threads_of_pools_and_threads_that_have_ended_are_not_told(quick):
    quick.pipeline(NO_DATABASE + """TOOL_MAP = {"a": "a"}""").tool("a", """
        import asyncio, threading
        from concurrent.futures import ThreadPoolExecutor
        from multiprocessing.pool import ThreadPool
        class Monitor(threading.Thread):
            def run(self): threading.Event().wait()
        def run():
            global kept
            kept = ThreadPoolExecutor(2), ThreadPool(2)
            kept[0].submit(print, "x").result()
            kept[1].map(print, "yz")
            Monitor(name="monitor", daemon=True).start()
            thread = threading.Thread(target=print)
            thread.start()
            thread.join()
            asyncio.run(wait())
        async def wait(): await asyncio.get_running_loop().run_in_executor(None, print)
    """)
    ended = quick.run()
    assert ended.code == 0 and "running:" not in ended.err, ended


# --- processes that a tool forks ---

FORKS = {
    "run": "def run(): fork()",
    "check": "def run(): pass\ndef check(): fork()",
    "items": "def items():\n    fork()\n    return ['x']\ndef run(item): pass",
    "yielded items": "def items():\n    yield 'x'\n    fork()\n    yield 'y'\n"
                     "def run(item): pass",
    "item": "def items(): return ['x']\ndef run(item): fork()",
    "import": "fork()\ndef run(): pass",
}
ENDS = {"raise ValueError('of the child')": 1, "sys.exit(7)": 7, "sys.exit('of the child')": 1,
        "return": 0, "sys.exit()": 0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("words", ["", "-j 2"])
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("where", FORKS)
def test_what_ends_a_forked_child_is_seen_and_it_does_nothing_of_the_run(quick, where, how, words):
    quick.pipeline(SQLITE + 'TOOL_MAP = {"a": {"module": "a"}, "b": "b"}')
    quick.tool("a", f"""
import os, sys
def fork():
    pid = os.fork()
    if not pid:
        {how}
    else:
        _, status = os.waitpid(pid, 0)
        assert os.WEXITSTATUS(status) == {ENDS[how]} and not os.WTERMSIG(status), status
{FORKS[where]}
""").tool("b", "def run(): print('b was here')")
    ended = quick.run(*words.split())
    assert ended.code == 0 and ended.out.count("b was here") == 1, ended
    said = ended.err + ended.out
    assert ("of the child" in said) == ("of the child" in how), ended
    assert ("Traceback" in said) == ("raise" in how) and 'orchestrator.py", line' not in said, ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_an_exception_in_a_process_of_multiprocessings_fork_is_seen(quick):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "a"}').tool("a", """
        import multiprocessing
        def work(): raise ValueError("of the child")
        def run():
            child = multiprocessing.get_context("fork").Process(target=work)
            child.start()
            child.join()
            assert child.exitcode == 1
    """)
    ended = quick.run()
    assert ended.code == 0 and "ValueError: of the child" in ended.err, ended


def test_a_tool_that_takes_ctrl_c_for_itself_leaves_it_to_the_next(quick):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "a", "b": "b"}')
    quick.tool("a", "import signal\ndef run(): signal.signal(signal.SIGINT, signal.SIG_IGN)")
    quick.tool("b", """
        import signal
        def run():
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")
    """)
    ended = quick.run()
    assert ended.code == 130 and "not reached" not in ended.err, ended


@pytest.mark.parametrize("how", ["f = open('kept.txt', 'w')", "f = open('kept.txt', 'w'); keep = f",
                                 "f = None"])
def test_what_the_engine_says_goes_into_no_file_that_a_tool_opened_for_a_stream(sandbox, how):
    sandbox.pipeline('TOOL_MAP = {"a": "a", "b": "b", "bad": "bad"}')
    sandbox.tool("a", f"""
        import os

        keep = None

        def run():
            global keep
            os.close(1)
            os.close(2)
            {how}
            if f:
                f.write("mine")
                f.flush()
        """)
    sandbox.tool("b", """
        def run():
            global kept
            kept = open("next.txt", "w")
            print("seen", flush=True)
        """)
    sandbox.tool("bad", "def run():\n    raise ValueError('no')")

    ended = sandbox.run()

    assert (ended.code, "ValueError: no" in ended.err) == (1, True)
    assert (ended.out, sandbox.read("next.txt")) == ("seen\n", "")
    assert not (sandbox.folder / "kept.txt").exists() or sandbox.read("kept.txt") == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("options", [{}, {"isolate": True}], ids=["here", "isolated"])
def test_a_child_that_a_tool_forks_takes_a_signal_from_its_first_moment_on(modules, options):
    modules(t="""
        import os, signal, time
        def run():
            ends = []
            for _ in range(50):
                pid = os.fork()
                if not pid:
                    time.sleep(0.2)
                    os._exit(7)
                os.kill(pid, signal.SIGTERM)
                ends.append(os.waitpid(pid, 0)[1])
            return ends
    """)

    result = run_pipeline([], {"t": {"module": "t", **options}})

    assert set(result.results["t"]) == {signal.SIGTERM}, result.errors
