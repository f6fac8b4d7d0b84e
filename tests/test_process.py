"""What a tool does to its process ends with it."""
import sys

import pytest

NO_DATABASE = "def get_connection(): return None\n\n"
CHANGES = {
    "folder": ("os.chdir('/')", "os.getcwd() == HERE"),
    "a folder that is gone": ("os.mkdir('sub'); os.chdir('sub'); os.rmdir('../sub')",
                              "os.getcwd() == HERE"),
    "stdout": ("sys.stdout = open(os.devnull, 'w')", "sys.stdout.name == '<stdout>' or "
               "isinstance(sys.stdout.fileno(), int) and sys.stdout.fileno() == 1"),
    "stderr": ("sys.stderr = io.StringIO()", "not isinstance(sys.stderr, io.StringIO)"),
    "stdin": ("sys.stdin = io.StringIO()", "not isinstance(sys.stdin, io.StringIO)"),
    "Ctrl-C": ("signal.signal(signal.SIGINT, signal.SIG_IGN)",
               "signal.getsignal(signal.SIGINT) is not signal.SIG_IGN"),
    "SIGTERM": ("signal.signal(signal.SIGTERM, lambda *_: None)",
                "'lambda' not in repr(signal.getsignal(signal.SIGTERM))"),
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
