"""A sandbox that copies the one file into an empty folder and runs it as a person would."""
import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import py_compile
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import types
from multiprocessing import forkserver
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
ENGINE_MARK = "# === ENGINE"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ORCHESTRATOR_HOME"}
sys.path.insert(0, str(TOP))
import orchestrator  # noqa: E402

SQLITE = '''
def get_connection():
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"))
'''


class Sandbox:
    """A folder with orchestrator.py, a pipeline of its own above the mark, and its tools."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []

    def pipeline(self, text, file="orchestrator.py"):
        """Write the file: `text` above the engine of this checkout."""
        source = (TOP / "orchestrator.py").read_text(encoding="utf-8")
        engine = source[source.index(ENGINE_MARK):]
        head = '"""A pipeline under test."""\nfrom pathlib import Path\n\n'
        (self.folder / file).write_text(head + textwrap.dedent(text) + "\n\n" + engine,
                                        encoding="utf-8")
        return self

    def tool(self, name, body):
        """Write a tool's module, `name` with dots."""
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(body), encoding="utf-8")
        return self

    def start(self, *words, file="orchestrator.py", cwd=None, env=None, **popen):
        """Start the pipeline in a process group of its own and return the process."""
        popen.setdefault("stdout", subprocess.PIPE)
        popen.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(
            [sys.executable, str(self.folder / file), *words], cwd=cwd or self.folder, text=True,
            encoding="utf-8", stdin=subprocess.DEVNULL, start_new_session=True,
            env={**ENVIRONMENT, "PYTHONIOENCODING": "utf-8", **(env or {})}, **popen)
        self.started.append(process)
        return process

    def end(self):
        """Kill what a failed test has left running, which would slow down all others."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def run(self, *words, timeout=60, **start):
        """Run the pipeline to its end; the result has .code, .out and .err."""
        process = self.start(*words, **start)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return Ended(process.returncode, out, err)

    def read(self, name):
        """Return the text of a file in the sandbox."""
        return (self.folder / name).read_text(encoding="utf-8")

    def query(self, sql, *values):
        """Return the rows of a query on the pipeline's data.db."""
        conn = sqlite3.connect(self.folder / "data.db")
        try:
            return conn.execute(sql, values).fetchall()
        finally:
            conn.close()


class QuickSandbox(Sandbox):
    """A sandbox that runs the pipeline in a fork of this process, which has imported the engine.

    The same for the pipeline, and many times quicker; not for what a fresh interpreter does.
    """

    def run(self, *words, timeout=60, env=None, **start):
        """Run the pipeline to its end; the result has .code, .out and .err."""
        if start or not hasattr(os, "fork"):
            return super().run(*words, timeout=timeout, env=env, **start)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if not pid:
                self._be_pipeline(words, timeout, env or {}, out, err)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "surrogateescape"))
        return Ended(code, *texts)

    def _be_pipeline(self, words, timeout, env, out, err):
        code = 97
        try:
            os.setsid()
            signal.alarm(timeout)
            with open(os.devnull) as null:
                for fd, file in enumerate((null, out, err)):
                    os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = (
                open(fd, "w", encoding="utf-8", errors=errors, closefd=False)
                for fd, errors in ((1, "strict"), (2, "backslashreplace")))
            os.environ.clear()
            os.environ.update({**ENVIRONMENT, **env})
            time.tzset()
            os.chdir(self.folder)
            logging.getLogger().handlers.clear()  # pytest's own
            sys.dont_write_bytecode = True  # a module may be written twice in a second
            file = str(self.folder / "orchestrator.py")
            sys.path[0], sys.argv = str(self.folder), [file]
            # Workers are forked from the fork server of pytest, which is no child of this process.
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            program = orchestrator.find_program()  # as if it had no __spec__
            orchestrator.find_program = lambda: program
            main.__spec__ = importlib.util.find_spec("quick_main")  # what workers import
            exec(main.__spec__.loader.get_code("quick_main"), vars(main))
            has = vars(main).get
            code = orchestrator.main(
                has("TOOL_MAP"), has("STAGES"), has("get_connection"), argv=list(words),
                name=has("NAME") or self.folder.name, add_arguments=has("add_arguments"),
                limits=has("LIMITS"), home=env.get("ORCHESTRATOR_HOME")
                or str(self.folder / ".orchestrator"))
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)


class Ended:
    """How a process ended."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


@functools.lru_cache(maxsize=None)
def compile_engine():
    """Return the file of the engine of this checkout as Python caches it, whatever its folder."""
    file = os.path.join(tempfile.mkdtemp(prefix="engine-"), "orchestrator.pyc")
    atexit.register(shutil.rmtree, os.path.dirname(file))
    return py_compile.compile(str(TOP / "orchestrator.py"), file, doraise=True,
                              invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


MODES = {"one after another": (), "side by side": ("--jobs", "4")}


class Example:
    """A copy of the engine and of a pipeline in example/, without what runs have left there."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.home = folder / "example" / name
        shutil.copy(TOP / "orchestrator.py", folder)
        cache = Path(importlib.util.cache_from_source(str(folder / "orchestrator.py")))
        cache.parent.mkdir()
        shutil.copy(compile_engine(), cache)  # each run imports it
        shutil.copytree(TOP / "example" / name, self.home,
                        ignore=shutil.ignore_patterns("*.db*", "__pycache__", "work"))

    def run(self, *words, program=None, cwd=None):
        """Run the pipeline as its docstring says, or by another way to start it."""
        ended = subprocess.run(
            [sys.executable, *(program or ["-m", f"example.{self.name}.pipeline"]), *words],
            cwd=cwd or self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            encoding="utf-8", timeout=60)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def connect(self):
        """Return a connection to the pipeline's database, which closes itself after a `with`."""
        return contextlib.closing(sqlite3.connect(self.home / f"{self.name}.db"))

    def query(self, sql):
        """Return the rows of a query on the pipeline's database."""
        with self.connect() as conn:
            return conn.execute(sql).fetchall()

    def dump(self):
        """Return all that is in the database, whatever the order in which it came there."""
        with self.connect() as conn:
            return sorted(conn.iterdump())


def count_steps(call):
    """Return how many lines of Python and calls of C a call takes: its work, whatever the clock."""
    steps = 0

    def count(frame, event, arg):
        nonlocal steps
        steps += 1
        return count

    sys.settrace(count)
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
        sys.settrace(None)
    return steps


@pytest.fixture(autouse=True, scope="session")
def fork_server():
    """Start what all workers of this process and its forks are forked from, once."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a module may be written twice in a second
    folder = os.getcwd()
    os.chdir(TOP)
    orchestrator.make_context()
    os.chdir(folder)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Let main(), called in this process, keep its history away from this checkout."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))


@pytest.fixture
def sandbox(tmp_path):
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.end()


@pytest.fixture
def quick(tmp_path):
    quick = QuickSandbox(tmp_path)
    yield quick
    quick.end()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write modules that run_pipeline() in this process can import: modules(name="source")."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        orchestrator.forget_modules()  # as each command and run_pipeline() does
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def wait_until(is_true, timeout_s=20.0):
    """Return once a condition holds; fail if it never does. No test sleeps a fixed time."""
    end_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end_s, "the awaited condition never came true"
        time.sleep(0.005)


def press_ctrl_c_again(process, timeout_s=20.0):
    """Press Ctrl-C until the process ends: what comes at once after the first is taken for it."""
    def press():
        process.send_signal(signal.SIGINT)
        return process.poll() is not None
    wait_until(press, timeout_s)


def summary(err):
    """Return the closing table of a run as {tool: its line}."""
    lines = err[err.rindex("\ntool "):].splitlines()[2:]
    rows = lines[:lines.index("")]
    return {row.split()[0]: row for row in rows}
