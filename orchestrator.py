"""orchestrator.py - run a data pipeline of many tools from one file.

Copy this file into your repository, name your own modules in the tables below, and run:

    python orchestrator.py                  the stage "full"; without one, every tool in order
    python orchestrator.py ingest           a stage
    python orchestrator.py fetch render     tools, in this order
    python orchestrator.py --list           what there is
    python orchestrator.py --plan           what a run would do, and why

A tool is an ordinary module with a function `run(conn, **kwargs)`: `conn` is what
get_connection() below returned, kwargs are the command-line arguments of add_arguments().
Whatever run() wrote through `conn` is committed when it succeeds and rolled back when it raises.

Everything that you edit stands above the ENGINE mark. Nothing below it needs to be read.
"""
from pathlib import Path

# === YOUR PIPELINE === edit from here ============================================================

TOOL_MAP = {  # a tool's name: its module
    "fetch":     "example.fetch",
    "parse":     "example.parse",
    "enrich":    "example.enrich",
    "summarize": "example.summarize",
    "render":    "example.render",
}

STAGES = {  # a stage's name: its tools, and other stages
    "ingest":  ["fetch", "parse"],
    "analyze": ["enrich", "summarize"],
    "render":  ["render"],
    "full":    ["ingest", "analyze", "render"],
}


def get_connection():
    """Return the connection that every tool gets as `conn`; None if there is no database."""
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"))


def add_arguments(parser):
    """Declare the command-line flags that reach every tool as keyword arguments."""
    def date(text):
        import datetime
        return str(datetime.date.fromisoformat(text))
    parser.add_argument("--since", type=date, help="only flights since this day: 2013-01-03")
    parser.add_argument("--source", metavar="PLACE", help="folder or http(s) URL of the raw files")


# === ENGINE 1.0.0 === everything from this line on is replaced when you upgrade ==================
#
# MIT License, see LICENSE. To upgrade, put a newer file's engine under your own tables.
#
# The rooms of the engine. Each uses only the rooms above it.
#
#   1 WORDS        statuses, exit codes, records, errors, durations
#   2 SETUP        the tables above, checked -> Pipeline
#   3 PLANNING     targets -> Plan
#   4 CONNECTION   how database drivers differ
#   5 CALLING      find, import and call a tool, one attempt in one transaction
#   6 RUNNING      one loop that carries out a Plan -> RunResult
#   7 VIEWS        text and JSON for people and programs
#   8 DOOR         the command line

# ruff: noqa: E402
_YOURS = dict(globals())  # your names, before the engine adds its own: see the last lines

import argparse
import gc
import operator
import os
import re
import sys
import time
from types import MappingProxyType
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence,
    Tuple, Union,
)

VERSION = "1.0.0"
_ENGINE_FILE = _YOURS["__file__"]
_ENGINE_LINE = sys._getframe().f_lineno  # frames of this file below it are the engine's own


# === 1 WORDS ====================================================================================
# The vocabulary that all rooms share: the statuses and their legal moves, the exit codes, the
# records that travel from room to room (all immutable), and the error that a user can mend.
# No input or output.

EXIT_SUCCESS, EXIT_FAILED, EXIT_USAGE, EXIT_BUG = 0, 1, 2, 3
EXIT_SIGNAL = 128  # + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, as shells count
SIGINT = 2  # on every system

MOVES = {  # status of a tool in a run -> the statuses that may follow
    "pending": ("running", "skipped"),
    "running": ("success", "failed", "interrupted"),
    "success": (),
    "failed": (),
    "skipped": (),
    "interrupted": (),
}

RESERVED_ARGUMENTS = ("conn", "context", "item")  # what run() gets from the engine
ALL_BEFORE = "*"  # Step.needs of a tool that declares nothing: everything before it in the plan


class UserError(Exception):
    """A mistake that the user can mend: `problem` says where and what, `fix` what to do."""

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return self.problem + "".join("\n  " + line for line in self.fix.splitlines())


class Tool(NamedTuple):
    """A row of TOOL_MAP, checked. `commits`: the tool looks after its transactions itself."""
    name: str
    module: str
    function: str = "run"
    commits: bool = False


class Stage(NamedTuple):
    """A row of STAGES, checked: its members as written, and the tools they come to."""
    name: str
    members: Tuple[str, ...]
    tools: Tuple[str, ...]


class Pipeline(NamedTuple):
    """The user's tables, checked. `tools` and `stages` keep the order of the tables."""
    name: str
    tools: Dict[str, Tool]
    stages: Dict[str, Stage]
    get_connection: Callable[[], Any]


class Step(NamedTuple):
    """One tool's place in a plan. `expected_s` is None where nothing is known of it."""
    tool: str
    wave: int
    action: str
    reason: str
    needs: Union[str, Tuple[str, ...]]
    expected_s: Optional[float] = None


class Plan(NamedTuple):
    """What a run will do, in order. `critical_path` is the chain of tools that takes longest."""
    steps: Tuple[Step, ...]
    critical_path: Tuple[str, ...]
    expected_s: Optional[float] = None


class Outcome(NamedTuple):
    """How a tool ended. `error` is one line, `traceback` the tool's own part of it, as text."""
    status: str
    reason: str = ""
    result: Any = None
    rows: Optional[int] = None
    error: str = ""
    traceback: str = ""
    attempts: int = 0
    duration_s: float = 0.0


class Event(NamedTuple):
    """What a listener hears. `kind` is one of run_started (with `plan`), tool_started, progress
    (with `done`, and `total` or None), log (with `text` and `level`, as in logging), tool_ended
    (with `outcome`) and run_ended (with `result`). `at` is in seconds since the epoch.
    """
    kind: str
    at: float
    run_id: str
    tool: str = ""
    plan: Optional[Plan] = None
    outcome: Optional[Outcome] = None
    done: int = 0
    total: Optional[int] = None
    text: str = ""
    level: int = 0
    result: Optional["RunResult"] = None


class RunResult(NamedTuple):
    """How a run ended: `status` is success, failed or interrupted; the lists name tools.

    `errors` gives the one-line error of each failed tool, `results` what each successful tool
    returned, `outcomes` all of it by tool, in the plan's order. `signal` is the number of the
    signal that interrupted the run, or None.
    """
    run_id: str
    status: str
    succeeded: List[str]
    cached: List[str]
    partial: List[str]
    failed: List[str]
    skipped: List[str]
    errors: Dict[str, str]
    results: Dict[str, Any]
    duration_s: float
    outcomes: Dict[str, Outcome]
    signal: Optional[int] = None


def check_move(old: str, new: str) -> str:
    """Return `new` if a tool's status may go from `old` to it; a bug of the engine if not."""
    assert new in MOVES[old], f"illegal move of a tool's status: {old} -> {new}"
    return new


def format_nearest(word: str, known: Iterable[str]) -> str:
    """Return the way out of a mistyped word: the nearest known words, or else all of them."""
    from difflib import get_close_matches
    known = list(known)
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(map(repr, near)) + "?"
    return "Known: " + (", ".join(known[:20]) + (", ..." if len(known) > 20 else "") or "none")


def format_duration(seconds: Optional[float]) -> str:
    """Return seconds as people say them: `0.12 s`, `42.0 s`, `1m 05s`, `2h 03m`.

    >>> format_duration(0.123), format_duration(65), format_duration(7380)
    ('0.12 s', '1m 05s', '2h 03m')
    """
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_m = divmod(minutes, 60)
    return f"{hours}h {rest_m:02d}m" if hours else f"{minutes}m {rest_s:02d}s"


def merge_errors(errors: Sequence[UserError]) -> UserError:
    """Return one error that says all of them, so that nobody mends a table line by line."""
    return errors[0] if len(errors) == 1 else UserError("\n".join(map(str, errors)))


# === 2 SETUP ====================================================================================
# The user's tables become a Pipeline, or one sentence for each mistake in them. Every rule about
# the tables stands here. No input or output: whether a module exists is asked in CALLING.

def load_pipeline(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
                  get_connection: Optional[Callable[[], Any]] = None, *,
                  name: Optional[str] = None) -> Pipeline:
    """Return the checked tables. Raise UserError with every mistake that they hold."""
    check_table("TOOL_MAP", tool_map)
    check_table("STAGES", {} if stages is None else stages)
    if not tool_map:
        raise UserError("TOOL_MAP is empty.", 'Add a tool to it: "fetch": "my_folder.fetch".')
    if get_connection is not None and not callable(get_connection):
        raise UserError(f"get_connection is {get_connection!r}, not a function.",
                        "Write `def get_connection():` and return a connection or None.")
    errors: List[UserError] = []
    tools = make_all(errors, make_tool, tool_map)
    members = make_all(errors, make_members, stages or {})
    errors += find_unknown_members(tool_map, {**dict.fromkeys(stages or {}, ()), **members})
    if errors:
        raise merge_errors(errors)
    return Pipeline(name or "pipeline", tools, expand_stages(tools, members),
                    get_connection or (lambda: None))


def check_table(where: str, table: Any) -> None:
    """Raise UserError if a table is no table."""
    if table is None:
        raise UserError(f"There is no {where}.", f"Write {where} = {{...}} above the ENGINE mark.")
    if not isinstance(table, Mapping):
        raise UserError(f"{where} is {format_type(table)}, not a dict.",
                        f"Write {where} = {{...}}, names on the left.")


def make_all(errors: List[UserError], make: Callable[[str, Any], Any],
             table: Mapping[str, Any]) -> Dict[str, Any]:
    """Return `make(name, value)` for each row, and add what is wrong with the others to errors."""
    made = {}
    for name, value in table.items():
        try:
            made[name] = make(name, value)
        except UserError as error:
            errors.append(error)
    return made


def check_name(where: str, name: Any) -> None:
    """Raise UserError if a name could not be typed as a target."""
    if not isinstance(name, str):
        raise UserError(f"{where}: the name {name!r} is {format_type(name)}, not text.",
                        "Put it in quotes.")
    if not name or name[0] in "-+" or name[-1] == "+" or name != name.strip() \
            or not name.isprintable():
        raise UserError(f"{where}: {name!r} can not be told from a flag on the command line.",
                        "Choose a name that does not begin with - or +, does not end with +, "
                        "and has no blanks around it.")


def make_tool(name: str, value: Any) -> Tool:
    """Return a row of TOOL_MAP as a Tool. Raise UserError if it is none."""
    check_name("TOOL_MAP", name)
    where = f"TOOL_MAP[{name!r}]"
    options = {"module": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise UserError(f"{where} is {format_type(value)}, not a module path or a dict of options.",
                        f'Write "{name}": "folder.module".')
    for key, given in options.items():
        if key not in OPTIONS:
            raise UserError(f"{where}: there is no option {key!r}.",
                            format_nearest(str(key), OPTIONS))
        holds, wanted, example = OPTIONS[key]
        if not holds(given):
            raise UserError(f"{where}: {key!r} must be {wanted}, not {given!r}.",
                            f'Write "{key}": {example}.')
    if "module" not in options:
        raise UserError(f"{where} names no module.", 'Add "module": "folder.module".')
    module, _, function = options["module"].partition(":")
    return Tool(**{**options, "name": name, "module": module, "function": function or "run"})


def is_module_path(value: Any) -> bool:
    """Return whether a value reads `package.module` or `package.module:function`."""
    if not isinstance(value, str):
        return False
    module, colon, function = value.partition(":")
    return all(part.isidentifier() for part in module.split(".")) \
        and (function.isidentifier() or not colon)


# option of a tool -> (test of its value, the test in words, an example)
OPTIONS: Dict[str, Tuple[Callable[[Any], bool], str, str]] = {
    "module":  (is_module_path, "a module path with dots", '"folder.module"'),
    "commits": (lambda value: isinstance(value, bool), "True or False", "True"),
}


def make_members(name: str, value: Any) -> Tuple[str, ...]:
    """Return the members of a row of STAGES. Raise UserError if it has none."""
    check_name("STAGES", name)
    where = f"STAGES[{name!r}]"
    if isinstance(value, Mapping):
        for key in value:
            if key != "tools":
                raise UserError(f"{where}: there is no option {key!r}.",
                                format_nearest(str(key), ["tools"]))
        value = value.get("tools", ())
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{where} is {value!r}, not a list of names.",
                        f'Write "{name}": ["first_tool", "second_tool"].')
    return tuple(value)


def find_unknown_members(tools: Iterable[Any],
                         members: Mapping[str, Tuple[str, ...]]) -> List[UserError]:
    """Return an error for each name in a stage that is neither a tool nor a stage."""
    return [UserError(f"STAGES[{stage!r}]: no tool or stage {name!r}.",
                      format_nearest(name, map(str, [*tools, *members])))
            for stage, names in members.items() for name in names
            if name not in tools and name not in members]


def expand_stages(tools: Mapping[str, Tool],
                  members: Mapping[str, Tuple[str, ...]]) -> Dict[str, Stage]:
    """Return every stage with the tools it comes to. Raise UserError for a stage in itself.

    A name that is both is the stage, but the tool inside the stage of that name.
    """
    from graphlib import CycleError, TopologicalSorter

    def is_stage(name: str, inside: str) -> bool:
        return name in members and not (name == inside and name in tools)

    inner = {stage: [n for n in names if is_stage(n, stage)] for stage, names in members.items()}
    try:
        innermost_first = list(TopologicalSorter(inner).static_order())
    except CycleError as error:
        path = " -> ".join(reversed(error.args[1]))
        raise UserError(f"STAGES: a stage contains itself: {path}.",
                        "Take one of them out of the other.") from None
    tools_of: Dict[str, Tuple[str, ...]] = {}
    for stage in innermost_first:
        tools_of[stage] = tuple(dict.fromkeys(
            tool for name in members[stage]
            for tool in (tools_of[name] if is_stage(name, stage) else (name,))))
    return {stage: Stage(stage, names, tools_of[stage]) for stage, names in members.items()}


def format_type(value: Any) -> str:
    """Return the type of a value for a sentence: `a list`, `an int`."""
    kind = type(value).__name__
    return ("an " if kind[0].lower() in "aeiou" else "a ") + kind


# === 3 PLANNING =================================================================================
# Targets become a Plan, which is data: what runs, in which order, and why. Planning decides, the
# run does; what --plan shows is the very Plan that a run carries out. No input or output.

DEFAULT_STAGE = "full"


def make_plan(pipeline: Pipeline, targets: Sequence[str] = (), *, exclude: Sequence[str] = (),
              start_from: Optional[str] = None) -> Plan:
    """Return the plan for some targets; without any, of the stage `full` or else of all tools.

    Raise UserError for a word that is neither a stage nor a tool, and if nothing is left to run.
    """
    if not targets and DEFAULT_STAGE in pipeline.stages:
        targets = (DEFAULT_STAGE,)
    reasons: Dict[str, str] = {}
    for target in targets:
        reason = f"in stage {target}" if target in pipeline.stages else "named"
        for tool in expand_target(pipeline, target):
            reasons.setdefault(tool, reason)
    if not targets:
        reasons = dict.fromkeys(pipeline.tools, "in TOOL_MAP")
    order = leave_out(pipeline, list(reasons), exclude, start_from)
    if not order:
        raise UserError("Nothing is left to run.", "Name a target that holds a tool, or take "
                        "something out of --exclude; --list shows them all.")
    steps = tuple(Step(tool, wave, "run", reasons[tool], ALL_BEFORE)
                  for wave, tool in enumerate(order, 1))
    return Plan(steps, tuple(order))


def leave_out(pipeline: Pipeline, order: List[str], exclude: Sequence[str],
              start_from: Optional[str]) -> List[str]:
    """Return the tools that --exclude and --from leave, in order."""
    excluded = {tool for name in exclude for tool in expand_target(pipeline, name)}
    if start_from is not None:
        first = set(expand_target(pipeline, start_from))
        start = next((i for i, tool in enumerate(order) if tool in first), None)
        if start is None:
            raise UserError(f"--from: {start_from!r} is not in this plan.",
                            format_nearest(start_from, order))
        order = order[start:]
    return [tool for tool in order if tool not in excluded]


def expand_target(pipeline: Pipeline, name: str) -> Tuple[str, ...]:
    """Return the tools that a word means. Raise UserError if it means none."""
    if name in pipeline.stages:
        return pipeline.stages[name].tools
    if name in pipeline.tools:
        return (name,)
    raise UserError(f"There is no tool or stage {name!r}.",
                    format_nearest(name, [*pipeline.tools, *pipeline.stages]))


# === 4 CONNECTION ===============================================================================
# The one place that knows how database drivers differ: open, begin, commit, roll back, close,
# replace. `conn` may be any DB-API connection, any object with or without close(), commit() and
# rollback(), or None. It does not decide when to do any of these.

# SQLite calls back after this many steps of a statement, about a millisecond, so that a signal
# is heard in the middle of a long one.
_SQLITE_STEPS = 100_000
_POSTGRES_INERROR = 3  # PQTRANS_INERROR of libpq: a COMMIT would silently roll back


class Database:
    """The connection of a run, opened at its first use and closed exactly once.

    State: `conn`, what get_connection() returned; `is_open`, whether it was asked; `autocommit`,
    the mode in which the connection came, to which it is put back after each attempt.
    """

    def __init__(self, get_connection: Callable[[], Any],
                 is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self.get_connection, self.is_cancelled = get_connection, is_cancelled
        self.conn: Any = None
        self.is_open = False
        self.autocommit: Any = None

    def open(self) -> Any:
        """Return the connection, opened if it is not. Whatever get_connection() raises, raises."""
        if not self.is_open:
            self.conn, self.is_open = self.get_connection(), True
            self.autocommit = getattr(self.conn, "autocommit", None)
            if is_sqlite(self.conn) and hasattr(self.conn, "set_progress_handler"):
                self.conn.set_progress_handler(self.is_cancelled, _SQLITE_STEPS)
        return self.conn

    def begin(self) -> None:
        """Begin a transaction, where the driver would not do so by itself, or not early enough.

        Python's sqlite3 begins by itself only before INSERT and the like, so that a CREATE TABLE
        would survive a rollback.
        """
        conn = self.open()
        if is_sqlite(conn):
            if not conn.in_transaction:
                conn.execute("BEGIN")
        elif self.autocommit is True:
            conn.autocommit = False
        elif callable(getattr(conn, "begin", None)) and not hasattr(conn, "in_transaction"):
            conn.begin()  # DuckDB and MySQL drivers; SQLAlchemy, which has both, begins by itself

    def commit(self) -> None:
        """Commit what is open. Raise what the driver raises, or if it would have been lost."""
        if is_aborted(self.conn):
            raise RuntimeError("the transaction had failed and could not be committed: "
                               "an error of the database was caught and ignored")
        if self.is_cancelled() and is_sqlite(self.conn):
            raise RuntimeError("SQLite undid the transaction when a statement was interrupted")
        self._end("commit")

    def rollback(self) -> None:
        """Undo what is not committed. A connection that can not do that is let go as broken."""
        try:
            self._end("rollback")
        except Exception:
            self.close()
        else:
            if getattr(self.conn, "closed", False) or getattr(self.conn, "open", True) is False:
                self.close()

    def close(self) -> None:
        """Close the connection if it is open; the next use opens another. Never raises."""
        conn, self.conn, self.is_open = self.conn, None, False
        try:
            call_if_there(conn, "close")
        except Exception:
            pass  # what was committed is safe; what was not is gone with the connection

    def _end(self, how: str) -> None:
        conn = self.conn
        if is_sqlite(conn) and (getattr(conn, "autocommit", None) is True
                                or not hasattr(conn, how)):
            if conn.in_transaction:  # commit() and rollback() do nothing here, or are not there
                conn.execute(how.upper())
        else:
            try:
                call_if_there(conn, how)
            except Exception as error:
                # The tool ended its transaction itself; DuckDB, for one, complains.
                if "no transaction" not in str(error).lower():
                    raise
        if isinstance(self.autocommit, bool) and conn.autocommit is not self.autocommit:
            conn.autocommit = self.autocommit


def is_sqlite(conn: Any) -> bool:
    """Return whether a connection is Python's sqlite3, or a driver made in its image."""
    return isinstance(getattr(conn, "in_transaction", None), bool) and hasattr(conn, "execute")


def is_aborted(conn: Any) -> bool:
    """Return whether an error has aborted the transaction, so that a COMMIT would roll it back.

    PostgreSQL and DuckDB then do so without a word. The drivers of the one tell; another is asked
    for something harmless. SQLAlchemy keeps the driver's connection inside its own.
    """
    if conn is None or is_sqlite(conn) or not hasattr(conn, "commit"):
        return False
    conn = getattr(conn, "connection", conn)
    conn = getattr(conn, "dbapi_connection", conn)
    status = getattr(getattr(conn, "info", None), "transaction_status", None)
    if status is not None:
        return status == _POSTGRES_INERROR
    try:
        asked = conn if hasattr(conn, "execute") else conn.cursor()
        asked.execute("SELECT 1")
        call_if_there(asked, "fetchall")
    except Exception as error:
        return "abort" in str(error).lower()
    return False


def call_if_there(thing: Any, method: str) -> None:
    """Call a method without arguments, if the thing has it."""
    function = getattr(thing, method, None)
    if callable(function):
        function()


# === 5 CALLING ==================================================================================
# From a Tool to an Outcome: find the module, read or import it, see that run() can take what it
# will be given, call it, all of one attempt inside one transaction. It does not decide what an
# outcome means for the run.

class Parameters(NamedTuple):
    """What a function takes. `takes_all`: it has a **kwargs."""
    names: Tuple[str, ...] = ()
    required: Tuple[str, ...] = ()
    positional_only: Tuple[str, ...] = ()
    takes_all: bool = False


class Callee(NamedTuple):
    """A tool that is imported and can be called."""
    tool: Tool
    run: Callable[..., Any]
    run_takes: Parameters
    check: Optional[Callable[..., Any]]
    check_takes: Parameters


class Context:
    """What a tool may know of its run: `context` among its arguments.

    run_id: text. tool: its name. attempt: 1, 2, ... results: what the tools before it returned,
    by name, to read only.
    """

    def __init__(self, run_id: str, tool: str, attempt: int, results: Mapping[str, Any],
                 tell: Callable[..., None]) -> None:
        self.run_id, self.tool, self.attempt, self.results = run_id, tool, attempt, results
        self._tell = tell  # tell(kind, tool, ...) reaches the listener of the run
        self._log: Any = None

    @property
    def log(self) -> Any:
        """The `logging.Logger` of this tool, named `orchestrator.TOOL`.

        Its lines go to the handlers that you set up for logging, else to the run's own screen.
        """
        if self._log is None:
            self._log = make_log(self.tool, self._tell)
        return self._log

    def progress(self, iterable: Iterable[Any], total: Optional[int] = None) -> Iterator[Any]:
        """Yield what an iterable yields, and tell who watches how far it is.

        `total` is how many there will be; by default len(iterable), where it has one.
        """
        if total is None:
            total = operator.length_hint(iterable) or None
        for done, each in enumerate(iterable, 1):
            yield each
            self._tell("progress", self.tool, done=done, total=total)


def make_log(tool: str, tell: Callable[..., None]) -> Any:
    """Return a logger whose lines are events, unless somebody set up handlers of their own.

    It is not registered with `logging`, so nothing of a run stays behind in the process.
    """
    import logging

    class Teller(logging.Handler):
        def emit(self, record: Any) -> None:
            tell("log", tool, text=self.format(record), level=record.levelno)

    logger = logging.Logger("orchestrator." + tool)
    logger.parent = logging.getLogger("orchestrator")
    if not logger.parent.hasHandlers():
        logger.setLevel(logging.DEBUG)
        logger.addHandler(Teller())
    return logger


class Interrupts:
    """Ctrl-C and SIGTERM, while a run lasts and only on the main thread.

    The first one ends what the tool is doing, by KeyboardInterrupt, and is noted in `signal`;
    the engine's own steps are never torn, they look at `signal` between tools. The second one
    ends the process at once. A signal that was ignored before stays ignored.
    """

    def __init__(self) -> None:
        self.signal: Optional[int] = None
        self.in_tool = False  # whether foreign code is being called
        self.before: Dict[int, Any] = {}
        self.pid = os.getpid()

    def __enter__(self) -> "Interrupts":
        import signal
        import threading
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        import signal
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_signal(self, number: int, _frame: Any) -> None:
        """Take a signal. Runs in the main thread, between any two instructions."""
        import signal
        if os.getpid() != self.pid:  # a process that a tool forked: not our affair
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
        elif self.signal is not None:
            os._exit(EXIT_SIGNAL + number)
        else:
            self.signal = number
            if self.in_tool:
                raise KeyboardInterrupt

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what foreign code returns, which the first signal may interrupt."""
        self.in_tool = True
        try:
            if self.signal is not None:  # it came in the instant before
                raise KeyboardInterrupt
            return function(*args, **kwargs)
        finally:
            self.in_tool = False


def find_module(name: str) -> Optional[Any]:
    """Return the spec of a module, found without importing it or its packages; else None."""
    import importlib.util
    from importlib.machinery import PathFinder
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None) or sys.modules[name]
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec


def check_modules_exist(tools: Iterable[Tool]) -> None:
    """Raise UserError for the tools whose module is not there. Imports nothing."""
    errors = [missing_module(tool) for tool in tools if find_module(tool.module) is None]
    if errors:
        raise merge_errors(errors)


def missing_module(tool: Tool) -> UserError:
    """Return the sentence for a module that is not there, with the nearest one that is."""
    import pkgutil
    package, _, _ = tool.module.rpartition(".")
    spec = find_module(package) if package else None
    places = getattr(spec, "submodule_search_locations", None) or (
        () if package else sys.path[:1])
    prefix = package + "." if package else ""
    there = [prefix + each.name for each in pkgutil.iter_modules(list(places))]
    fix = format_nearest(tool.module, there) if there else ""
    return UserError(f"TOOL_MAP[{tool.name!r}]: there is no module {tool.module!r}.",
                     (fix if fix.startswith("Did") else "Write it, or correct its path")
                     + f" (dots between folders, starting from {sys.path[0] or 'this folder'}).")


def read_module(tool: Tool) -> Tuple[str, Any]:
    """Return the path and the syntax tree of a tool's module, without importing it.

    The tree is None for a module without source, such as one in C. Raise UserError if the module
    is not there or is not Python.
    """
    import ast
    spec = find_module(tool.module)
    if spec is None:
        raise missing_module(tool)
    path = getattr(spec, "origin", None) or ""
    if not path.endswith(".py"):
        return path, None
    try:
        with open(path, "rb") as file:
            return path, ast.parse(file.read(), path)
    except (SyntaxError, ValueError, OSError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{format_path(path)}:{line}: {format_one_line(error)}",
                        "Mend that line.") from error


def find_summary(tool: Tool) -> str:
    """Return the first line of a tool's docstring, read without importing it."""
    if find_module(tool.module) is None:
        return f"(no module {tool.module})"
    try:
        _, tree = read_module(tool)
    except UserError as error:
        return f"({error.problem})"
    if tree is None:
        return ""
    of_module = read_summary(tree)
    if of_module and tool.function == "run":
        return of_module
    return read_summary(find_definition(tree, tool.function)) or of_module


def read_summary(node: Any) -> str:
    """Return the first line of the docstring of a module or function, or "".

    What ast.get_docstring does takes `inspect`, whose import alone costs 4 ms.
    """
    import ast
    body = getattr(node, "body", None)
    if not body or not isinstance(body, list) or not isinstance(body[0], ast.Expr):
        return ""
    text = getattr(body[0].value, "value", None)
    return text.strip().partition("\n")[0].strip() if isinstance(text, str) else ""


def find_mistakes(tools: Iterable[Tool], available: Iterable[str]) -> List[UserError]:
    """Return all mistakes in the tools' modules, with file and line, importing none."""
    mistakes: Dict[str, UserError] = {}  # by their text: tools may share a module
    for tool in tools:
        for mistake in find_mistakes_of(tool, available):
            mistakes.setdefault(str(mistake), mistake)
    return list(mistakes.values())


def find_mistakes_of(tool: Tool, available: Iterable[str]) -> Iterator[UserError]:
    """Yield the mistakes in one tool's module."""
    import ast
    import tokenize
    try:
        path, tree = read_module(tool)
    except UserError as error:
        yield error
        return
    if tree is None:
        spec = find_module(tool.module)
        if getattr(spec, "origin", None) is None and hasattr(spec, "submodule_search_locations"):
            yield missing_run(tool, tool.module.replace(".", os.sep), ())
        return
    with tokenize.open(path) as file:
        lines = file.read().splitlines()
    path = format_path(path)
    if find_definition(tree, tool.function) is None:
        error = missing_run(tool, path, [n.name for n in tree.body if hasattr(n, "name")])
        yield UserError(f"{path}:1: {error.problem}", error.fix)
    for name in (tool.function, "check"):
        node = find_definition(tree, name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.decorator_list:
            try:
                check_parameters(tool, name, read_parameters(node), available)
            except UserError as error:
                yield UserError(f"{path}:{node.lineno}: {error.problem}", error.fix)
    for line in find_built_sql(tree, lines):
        yield UserError(f"{path}:{line}: a value is written into SQL, not bound to it.",
                        'Write execute("... WHERE day >= ?", (since,)); if the text is safe, '
                        "say so with `# noqa: S608`.")


def find_definition(tree: Any, name: str) -> Optional[Any]:
    """Return the node that gives a module's global name its value, or None.

    Looks into `if`, `try` and `with`; a star import may define anything.
    """
    import ast
    found = None
    for node in walk_scope(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(each.asname or each.name).split(".")[0] for each in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        else:
            continue
        if name in names or "*" in names and found is None:
            found = node
    return found


def walk_scope(scope: Any) -> Iterator[Any]:
    """Yield the nodes of a module or function in order, but not those inside its functions."""
    import ast
    left = [*ast.iter_child_nodes(scope)][::-1]
    while left:
        node = left.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            left += [*ast.iter_child_nodes(node)][::-1]


def read_parameters(node: Any) -> Parameters:
    """Return what a function takes, from its syntax tree."""
    by_position = [arg.arg for arg in node.args.posonlyargs + node.args.args]
    by_name = [arg.arg for arg in node.args.kwonlyargs]
    required = by_position[:len(by_position) - len(node.args.defaults)]
    required += [name for name, default in zip(by_name, node.args.kw_defaults) if default is None]
    return Parameters(tuple(by_position + by_name), tuple(required),
                      tuple(arg.arg for arg in node.args.posonlyargs), node.args.kwarg is not None)


def find_built_sql(tree: Any, lines: Sequence[str]) -> List[int]:
    """Return the lines where execute() and its like get SQL with values written into it.

    Values from constants are safe: literals, NAMES_LIKE_THIS, numbers, and lists of `?`.
    """
    import ast
    found = set()
    scopes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for scope in [tree, *scopes]:
        safe, built = set(), set()  # names that hold constant text, and text with values in it
        for node in walk_scope(scope):
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", 0)
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) \
                    and isinstance(target, ast.Name) and node.value is not None:
                name = target.id
                (safe.add if is_constant(node.value, safe) else safe.discard)(name)
                (built.add if is_built(node.value, safe, built) else built.discard)(name)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                if not is_constant(node.value, safe):
                    safe.discard(node.target.id)
                    built.add(node.target.id)
            elif isinstance(node, ast.For) and is_constant(node.iter, safe):
                safe |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Call) and node.args \
                    and getattr(node.func, "attr", "") in _EXECUTES \
                    and is_built(node.args[0], safe, built) \
                    and not any(map(_NOQA.search, lines[node.lineno - 1:node.end_lineno])):
                found.add(node.lineno)
    return sorted(found)


_EXECUTES = ("execute", "executemany", "executescript")
_NOQA = re.compile(r"# noqa(?!:)|# noqa:.*\bS608\b")


def is_built(node: Any, safe: Iterable[str], built: Iterable[str]) -> bool:
    """Return whether an expression makes text out of more than constants."""
    import ast
    if isinstance(node, ast.Name):
        return node.id in built
    is_making = isinstance(node, ast.JoinedStr) \
        or isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)) \
        or isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format" \
        and is_constant(node.func.value, safe)
    return is_making and not is_constant(node, safe)


def is_constant(node: Any, safe: Iterable[str]) -> bool:
    """Return whether the text of an expression can not come from outside."""
    import ast
    if isinstance(node, ast.Name):
        return node.id in safe or node.id.isupper()
    if isinstance(node, ast.Attribute):
        return node.attr.isupper()
    if isinstance(node, ast.Call):  # "?, ?".join(...) of constants, and numbers
        if isinstance(node.func, ast.Name):
            return node.func.id in ("int", "float", "len", "range")
        parts = [getattr(node.func, "value", None), *node.args, *(k.value for k in node.keywords)]
        return getattr(node.func, "attr", "") in ("join", "format") and all(
            is_constant(part, safe) for part in parts)
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return is_constant(node.elt, safe)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # "?" * n
        return is_constant(node.left, safe) or is_constant(node.right, safe)
    parts = (ast.BinOp, ast.JoinedStr, ast.FormattedValue, ast.Tuple, ast.List, ast.IfExp)
    if isinstance(node, parts):
        return all(is_constant(part, safe) for part in ast.iter_child_nodes(node)
                   if isinstance(part, ast.expr) and part is not getattr(node, "test", None))
    return isinstance(node, ast.Constant)


def load_callees(tools: Sequence[Tool], available: Iterable[str]) -> Dict[str, Callee]:
    """Return the tools imported and ready to be called, by name.

    `available` are the names of the arguments that there will be. Raise UserError with all that
    is wrong: a module that is missing or can not be imported, no run(), a run() that asks for
    more than there is.
    """
    check_modules_exist(tools)
    errors: List[UserError] = []
    known = {*available, "conn", "context"}
    callees = make_all(errors, lambda _, tool: load_callee(tool, known),
                       {tool.name: tool for tool in tools})
    if errors:
        raise merge_errors(errors)
    return callees


def load_callee(tool: Tool, available: Iterable[str]) -> Callee:
    """Return one tool, imported. Raise UserError if that can not be done."""
    import importlib
    where = f"TOOL_MAP[{tool.name!r}]"
    try:
        module = importlib.import_module(tool.module)
    except SystemExit as error:
        raise UserError(f"{where}: importing {tool.module} called sys.exit({error.code!r}), "
                        f"{format_place(error, tool)}.",
                        'Put that under `if __name__ == "__main__":`.') from error
    except Exception as error:
        raise UserError(f"{where}: importing {tool.module} failed, {format_place(error, tool)}:\n"
                        f"  {format_one_line(error)}",
                        "Mend that line, or install what it needs. -v shows the whole traceback."
                        ) from error
    run = getattr(module, tool.function, None)
    if not callable(run):
        raise missing_run(tool, getattr(module, "__file__", None),
                          (name for name in vars(module) if not name.startswith("_")))
    check = getattr(module, "check", None)
    check = check if callable(check) and check is not run else None
    callee = Callee(tool, run, find_parameters(run),
                    check, find_parameters(check) if check else Parameters())
    check_parameters(tool, tool.function, callee.run_takes, available)
    check_parameters(tool, "check", callee.check_takes, available)
    return callee


def missing_run(tool: Tool, file: Optional[str], names: Iterable[str]) -> UserError:
    """Return the sentence for a module without the function that its tool needs."""
    near = format_nearest(tool.function, names)
    return UserError(f"TOOL_MAP[{tool.name!r}]: {format_path(file or tool.module)} has no function "
                     f"{tool.function}().",
                     (near + " " if near.startswith("Did") else "")
                     + f"Write `def {tool.function}(conn, **kwargs):` in it.")


def find_parameters(function: Callable[..., Any]) -> Parameters:
    """Return what a function takes, as inspect.signature tells, which is slow to import."""
    code = getattr(function, "__code__", None)
    if code is None or hasattr(function, "__wrapped__") or hasattr(function, "__self__") \
            or hasattr(function, "__signature__"):
        return find_parameters_by_signature(function)
    by_position, by_name = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames[:by_position + by_name]
    with_default = {*names[by_position - len(function.__defaults__ or ()):by_position],
                    *(function.__kwdefaults__ or ())}
    return Parameters(names, tuple(name for name in names if name not in with_default),
                      names[:code.co_posonlyargcount], bool(code.co_flags & 0x08))


def find_parameters_by_signature(function: Callable[..., Any]) -> Parameters:
    """Return what any callable takes; of one that does not tell, that it takes all."""
    import inspect
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return Parameters(takes_all=True)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Parameters(tuple(p.name for p in named),
                      tuple(p.name for p in named if p.default is p.empty),
                      tuple(p.name for p in named if p.kind is p.POSITIONAL_ONLY),
                      any(p.kind is p.VAR_KEYWORD for p in parameters))


def check_parameters(tool: Tool, function: str, takes: Parameters,
                     available: Iterable[str]) -> None:
    """Raise UserError if a function can not be called with the arguments that there will be."""
    where = f"TOOL_MAP[{tool.name!r}]: {function}() of {tool.module}"
    if takes.positional_only:
        raise UserError(f"{where} takes {takes.positional_only[0]!r} by position only.",
                        "Take the `/` out of its parameters: arguments are passed by name.")
    missing = [name for name in takes.required if name not in available]
    if missing:
        raise UserError(f"{where} asks for {', '.join(map(repr, missing))}, which nothing gives.",
                        f"Give it a default ({missing[0]}=None), or declare "
                        f"--{missing[0].replace('_', '-')} in add_arguments().")


def choose_arguments(takes: Parameters, available: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the arguments that a function names, or all of them for its **kwargs.

    A `conn` that is None goes only to a function that names it.
    """
    if not takes.takes_all:
        return {name: available[name] for name in takes.names if name in available}
    if available.get("conn") is None and "conn" not in takes.names:
        return {name: value for name, value in available.items() if name != "conn"}
    return dict(available)


def call_function(function: Callable[..., Any], takes: Parameters,
                  available: Mapping[str, Any]) -> Any:
    """Return what a function returns, or what the coroutine that it returns comes to."""
    result = function(**choose_arguments(takes, available))
    return wait_for(result) if hasattr(result, "__await__") else result


def wait_for(awaitable: Any) -> Any:
    """Return what an awaitable comes to, also where a loop is running already, as in Jupyter."""
    import asyncio

    async def wait() -> Any:
        return await awaitable

    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return asyncio.run(wait())
    finally:
        asyncio._set_running_loop(outer)


def run_attempt(callee: Callee, database: Database, arguments: Mapping[str, Any],
                context: Context, interrupts: Interrupts, verbose: bool = False) -> Outcome:
    """Return how one attempt ended: begun, called, checked and committed, or rolled back."""
    started_s = time.perf_counter()
    try:
        result = interrupts.call(call_in_transaction, callee, database, arguments, context)
        database.commit()
        outcome = Outcome("success", result=result, rows=count_rows(result))
    except BaseException as error:
        if database.is_open:
            database.rollback()
        if interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
            outcome = Outcome("interrupted", reason=format_signal(interrupts.signal))
        else:
            outcome = Outcome("failed", error=format_one_line(error),
                              traceback=format_traceback(error, verbose))
    return outcome._replace(attempts=context.attempt,
                            duration_s=time.perf_counter() - started_s)


def call_in_transaction(callee: Callee, database: Database, arguments: Mapping[str, Any],
                        context: Context) -> Any:
    """Return what run() returns, in a transaction that is left open, and passed by check()."""
    if callee.tool.commits:
        database.open()
    else:
        database.begin()
    available = {**arguments, "conn": database.conn, "context": context}
    try:
        result = call_function(callee.run, callee.run_takes, available)
    except SystemExit as error:  # ends the tool, not the run; None and 0 mean success
        if error.code not in (None, 0):
            raise
        result = None
    if callee.check:
        call_function(callee.check, callee.check_takes, available)
    return result


def count_rows(result: Any) -> Optional[int]:
    """Return the rows that a result speaks of: an int, or the "rows" of a dict; else None."""
    rows = result.get("rows") if isinstance(result, dict) else result
    if isinstance(rows, bool):
        return None
    try:
        return operator.index(rows)
    except TypeError:
        return None


def format_signal(number: Optional[int]) -> str:
    """Return what ended a run, in words."""
    import signal
    if number in (None, SIGINT):
        return "interrupted by Ctrl-C"
    return f"interrupted by {signal.Signals(number).name}"


def format_one_line(error: BaseException) -> str:
    """Return an exception in one line."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def format_path(path: str) -> str:
    """Return a path as seen from the working folder, where that is shorter."""
    try:
        return min(os.path.relpath(path), path, key=len)
    except ValueError:  # another drive
        return path


def is_engine_frame(file: str, line: Optional[int]) -> bool:
    """Return whether a frame of a traceback is the engine's or the interpreter's own."""
    return file.startswith("<frozen importlib") or (file == _ENGINE_FILE
                                                    and (line or 0) > _ENGINE_LINE)


def format_traceback(error: BaseException, verbose: bool = False) -> str:
    """Return an exception's traceback without the engine's frames; with them if verbose."""
    import traceback
    whole = traceback.TracebackException.from_exception(error)
    left = [] if verbose else [whole]
    while left:
        part = left.pop()
        part.stack[:] = [f for f in part.stack if not is_engine_frame(f.filename, f.lineno)]
        left += [p for p in (part.__cause__, part.__context__,
                             *(getattr(part, "exceptions", None) or ())) if p]
    return "".join(whole.format())


def format_place(error: BaseException, tool: Tool) -> str:
    """Return the file and line of an import's failure: the tool's own line, where it has one."""
    import traceback
    if isinstance(error, SyntaxError) and error.filename:
        return f"{format_path(error.filename)}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if not is_engine_frame(f.filename, f.lineno)]
    file = getattr(find_module(tool.module), "origin", None)
    own = [f for f in frames if f.filename == file] or frames
    return f"{format_path(own[-1].filename)}:{own[-1].lineno}" if own else "in no line of its own"


# === 6 RUNNING ==================================================================================
# One loop on one thread carries out a Plan and owns all state of the run: which tool is next,
# how each one ended, and what that means for the others. It prints nothing.

def run_plan(pipeline: Pipeline, plan: Plan, arguments: Mapping[str, Any], *,
             fail_fast: bool = False, verbose: bool = False,
             on_event: Callable[[Event], None] = lambda event: None,
             clock: Callable[[], float] = time.time) -> RunResult:
    """Carry out a plan and return how it ended.

    Raise UserError, before anything has run, if a module can not be imported or called.
    """
    tools = [pipeline.tools[step.tool] for step in plan.steps]
    with Interrupts() as interrupts:
        callees = interrupts.call(load_callees, tools, arguments)
        database = Database(pipeline.get_connection, lambda: interrupts.signal is not None)
        run = Run(plan, callees, arguments, database, interrupts, on_event, clock,
                  fail_fast, verbose)
        try:
            run.loop()
        finally:
            database.close()
        return run.end()


class Run:
    """One execution of a plan.

    Constant: the plan, the callees, the arguments and the switches. Changing, and only by this
    class: `statuses` and `outcomes` of the tools, `results` of those that succeeded, `cause`, the
    tool that failed, so that nothing that waits for it starts, and `is_interrupted`.
    """

    def __init__(self, plan: Plan, callees: Mapping[str, Callee], arguments: Mapping[str, Any],
                 database: Database, interrupts: Interrupts, on_event: Callable[[Event], None],
                 clock: Callable[[], float], fail_fast: bool, verbose: bool) -> None:
        self.plan, self.callees, self.arguments = plan, callees, dict(arguments)
        self.database, self.interrupts, self.on_event = database, interrupts, on_event
        self.clock, self.fail_fast, self.verbose = clock, fail_fast, verbose
        self.run_id = make_run_id(clock())
        self.started_s = time.perf_counter()
        self.statuses = {step.tool: "pending" for step in plan.steps}
        self.outcomes: Dict[str, Outcome] = {}
        self.results: Dict[str, Any] = {}
        self.cause: Optional[str] = None
        self.is_interrupted = False

    def loop(self) -> None:
        """Settle tool after tool, until all are settled or a signal came."""
        self.tell("run_started", plan=self.plan)
        for step in self.plan.steps:
            if self.is_interrupted or self.interrupts.signal is not None:
                self.is_interrupted = True
                break
            if self.cause is None:
                outcome = self.start(step.tool)
            elif self.fail_fast:
                outcome = Outcome("skipped", f"not started: --fail-fast, and {self.cause} failed")
            else:
                outcome = Outcome("skipped", f"needs {self.cause}, which failed")
            self.settle(step.tool, outcome)

    def start(self, tool: str) -> Outcome:
        """Run a tool and return how it ended."""
        self.statuses[tool] = check_move(self.statuses[tool], "running")
        self.tell("tool_started", tool)
        context = Context(self.run_id, tool, 1, MappingProxyType(self.results), self.tell)
        return run_attempt(self.callees[tool], self.database, self.arguments, context,
                           self.interrupts, self.verbose)

    def settle(self, tool: str, outcome: Outcome) -> None:
        """Note how a tool ended."""
        self.statuses[tool] = check_move(self.statuses[tool], outcome.status)
        self.outcomes[tool] = outcome
        if outcome.status == "success":
            self.results[tool] = outcome.result
        elif outcome.status == "failed":
            self.cause = tool
        elif outcome.status == "interrupted":
            self.is_interrupted = True
        self.tell("tool_ended", tool, outcome=outcome)

    def tell(self, kind: str, tool: str = "", **what: Any) -> None:
        """Tell the listener."""
        self.on_event(Event(kind, self.clock(), self.run_id, tool, **what))

    def end(self) -> RunResult:
        """Return how the run ended, and tell the listener."""
        def having(status: str) -> List[str]:
            return [tool for tool, each in self.statuses.items() if each == status]

        failed = having("failed")
        status = "interrupted" if self.is_interrupted else "failed" if failed else "success"
        outcomes = {tool: self.outcomes.get(tool) or Outcome("pending", "not started")
                    for tool in self.statuses}
        result = RunResult(self.run_id, status, having("success"), [], [], failed,
                           having("skipped"), {tool: outcomes[tool].error for tool in failed},
                           self.results, time.perf_counter() - self.started_s, outcomes,
                           self.interrupts.signal)
        self.tell("run_ended", result=result)
        return result


def make_run_id(now_s: float) -> str:
    """Return an id for a run that sorts by its start: `20130101T060000Z-1a2b`."""
    return time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(now_s)) + os.urandom(2).hex()


def run_pipeline(targets: Union[str, Sequence[str]], tool_map: Mapping[str, Any],
                 stages: Optional[Mapping[str, Any]] = None,
                 get_connection: Optional[Callable[[], Any]] = None, *,
                 arguments: Optional[Mapping[str, Any]] = None, exclude: Sequence[str] = (),
                 start_from: Optional[str] = None, fail_fast: bool = False,
                 verbose: bool = False, name: Optional[str] = None,
                 on_event: Optional[Callable[[Event], None]] = None) -> RunResult:
    """Run targets from Python, as the command line would, and return how that ended.

    targets: names of stages and tools; none means the stage `full`, or else every tool.
    arguments: what tools get by name. on_event: called with each Event; nothing is printed.
    The other keywords say what the flags of the same names say.

    A tool that fails is told in the result; raise UserError for bad input, before anything has
    run. On the main thread, Ctrl-C and SIGTERM first end the run in order and then do what they
    would have done without it.
    """
    pipeline = load_pipeline(tool_map, stages, get_connection, name=name)
    plan = make_plan(pipeline, [targets] if isinstance(targets, str) else targets,
                     exclude=exclude, start_from=start_from)
    arguments = {} if arguments is None else arguments
    for reserved in RESERVED_ARGUMENTS:
        if reserved in arguments:
            raise UserError(f"arguments: {reserved!r} is the engine's own.", "Choose another name.")
    result = run_plan(pipeline, plan, arguments, fail_fast=fail_fast, verbose=verbose,
                      on_event=on_event or (lambda event: None))
    if result.signal is not None:
        import signal
        signal.raise_signal(result.signal)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return result


# === 7 VIEWS ====================================================================================
# Text and JSON from plans, events and results. Nothing is decided, asked or printed here.

_COLOURS = {"success": 32, "failed": 31, "skipped": 33, "interrupted": 33, "run": 36}


class Style(NamedTuple):
    """How text is to look: with colours or without."""
    colour: bool = False

    def paint(self, text: str, status: str) -> str:
        """Return text in the colour of a status."""
        code = _COLOURS.get(status)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def bold(self, text: str) -> str:
        """Return text that stands out."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text


def format_table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), status: int = -1,
                 style: Style = Style()) -> List[str]:
    """Return rows as aligned lines; columns in `right` to the right, column `status` coloured."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if i in right else cell.ljust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        if status >= 0:
            cells[status] = style.paint(cells[status], row[status])
        lines.append("  ".join(cells).rstrip())
    return lines


def make_list(pipeline: Pipeline, tools: Sequence[str],
              find_summary: Callable[[Tool], str]) -> Dict[str, Any]:
    """Return what --list shows, as data, for some of the tools and the stages made of them."""
    stages = [s for s in pipeline.stages.values() if set(s.tools) <= set(tools)]
    return {
        "tools": [{"name": name, "module": pipeline.tools[name].module,
                   "summary": find_summary(pipeline.tools[name]), "needs": ALL_BEFORE,
                   "stages": [s.name for s in pipeline.stages.values() if name in s.tools],
                   "last": None} for name in tools],
        "stages": [{"name": s.name, "tools": list(s.tools)} for s in stages],
    }


def format_list(shown: Mapping[str, Any], style: Style) -> str:
    """Return --list as text."""
    lines = [style.bold("Tools")]
    lines += format_table([("  " + t["name"], t["summary"]) for t in shown["tools"]])
    if shown["stages"]:
        lines += ["", style.bold("Stages")]
        lines += format_table([("  " + s["name"], " ".join(s["tools"])) for s in shown["stages"]])
    return "\n".join(lines)


def make_plan_view(plan: Plan) -> Dict[str, Any]:
    """Return what --plan shows, as data."""
    return {"steps": [{**step._asdict(), "needs": step.needs if step.needs == ALL_BEFORE
                       else list(step.needs)} for step in plan.steps],
            "critical_path": list(plan.critical_path), "expected_s": plan.expected_s}


def format_plan(plan: Plan, style: Style) -> str:
    """Return --plan as text."""
    rows = [("wave", "tool", "action", "reason")]
    rows += [(str(s.wave), s.tool, s.action, s.reason + format_needs(s)) for s in plan.steps]
    head, *lines = format_table(rows, right=(0,))
    return "\n".join([style.bold(head), *lines])


def format_needs(step: Step) -> str:
    """Return what a step waits for, as a clause; nothing for the first."""
    if step.needs == ALL_BEFORE:
        return "; after all before it" if step.wave > 1 else ""
    return "; needs " + ", ".join(step.needs) if step.needs else ""


def format_event(event: Event, width: int, style: Style) -> str:
    """Return the line of an event of a tool; `width` is that of the longest name."""
    line = format_start(event, width)
    if event.outcome is None:
        return line + "warning: " * (event.level >= 30) + (event.text or "running")
    status = style.paint(event.outcome.status.ljust(11), event.outcome.status)
    return (line + status + "  " + format_details(event.outcome)).rstrip()


def format_start(event: Event, width: int) -> str:
    """Return how the line of an event begins: local time and tool."""
    return time.strftime("%H:%M:%S  ", time.localtime(event.at)) + event.tool.ljust(width) + "  "


def format_details(outcome: Outcome) -> str:
    """Return what there is to say of a tool beside its status, in one line."""
    rows = "" if outcome.rows is None else f"{outcome.rows:,} rows"
    took = format_duration(outcome.duration_s) if outcome.attempts else ""
    return ", ".join(filter(None, [rows, took, outcome.error or outcome.reason]))


def format_progress(event: Event, width: int, elapsed_s: float) -> str:
    """Return the live line of a tool: count, rate and time left."""
    rate = event.done / elapsed_s if elapsed_s > 0 else 0.0
    parts = [f"{event.done:,}" + (f" of {event.total:,}" if event.total else "")]
    if rate:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
        if event.total and event.total > event.done:
            parts.append(format_duration((event.total - event.done) / rate) + " left")
    return format_start(event, width) + ", ".join(parts)


def format_summary(result: RunResult, next_command: str, style: Style) -> str:
    """Return the closing table of a run: every tool, then the verdict and what to type next."""
    rows = [("tool", "status", "rows", "duration", "")]
    rows += [(tool, o.status, "" if o.rows is None else f"{o.rows:,}",
              format_duration(o.duration_s) if o.attempts else "", o.error or o.reason)
             for tool, o in result.outcomes.items()]
    head, *lines = format_table(rows, right=(2, 3), status=1, style=style)
    count = len(result.outcomes)
    done = f"{len(result.succeeded)} of {count} tool{'s' * (count > 1)} done"
    verdict = (style.paint(result.status, result.status)
               + f": {done} in {format_duration(result.duration_s)} (run {result.run_id})")
    lines = ["", style.bold(head), *lines, "", verdict]
    if next_command:
        lines.append("Next: " + style.bold(next_command))
    return "\n".join(lines)


# === 8 DOOR =====================================================================================
# The command line: the parser, one command_ function per command, the one listener that prints,
# and the one place where an error becomes a sentence and an exit code. No other logic.

def main(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
         get_connection: Optional[Callable[[], Any]] = None, *,
         argv: Optional[Sequence[str]] = None, name: Optional[str] = None,
         add_arguments: Optional[Callable[[Any], None]] = None,
         replaced: Sequence[str] = ()) -> int:
    """Do what the command line says and return the exit code.

    argv: the words after the program's name, by default sys.argv's. replaced: names of the
    user's part that the engine has overwritten.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verbose = False
    try:
        check_not_replaced(replaced)
        parser, own = make_parser(add_arguments)
        options, arguments = parse_arguments(parser, own, argv)
        verbose = options.verbose
        pipeline = load_pipeline(tool_map, stages, get_connection, name=name)
        return options.command(pipeline, options, arguments, argv)
    except UserError as error:
        if verbose and error.__cause__:
            say(format_traceback(error.__cause__, verbose))
        say(str(error))
        return EXIT_USAGE
    except SystemExit as done:  # argparse, after --help and --version
        return done.code if isinstance(done.code, int) else EXIT_SUCCESS
    except KeyboardInterrupt:
        return EXIT_SIGNAL + SIGINT
    except BrokenPipeError:  # the reader of our output left: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        say(format_traceback(error, verbose=True) + format_bug(argv))
        return EXIT_BUG


def check_not_replaced(names: Sequence[str]) -> None:
    """Raise UserError if the engine has overwritten names of the user's part."""
    if names:
        raise UserError("Above the ENGINE mark, the engine's own names hide yours: "
                        + ", ".join(names) + ".",
                        "Rename yours, or put them into a module of your own.")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors."""

    def error(self, message: str) -> Any:
        """Raise UserError with argparse's sentence."""
        raise UserError(message[:1].upper() + message[1:] + ".", f"See {self.prog} --help.")


def make_parser(add_arguments: Optional[Callable[[Any], None]]) -> Tuple[Parser, List[Any]]:
    """Return the parser, and the flags in it that add_arguments() declared."""
    parser = Parser(description="Run the tools and stages of this pipeline.", allow_abbrev=False,
                    add_help=False, usage="%(prog)s [TARGET ...] [flags]")
    run = parser.add_argument_group("what to run")
    run.add_argument("targets", nargs="*", metavar="TARGET",
                     help='stages and tools; none means the stage "full", or else every tool')
    run.add_argument("--exclude", action="append", default=[], metavar="NAME",
                     help="leave out this tool or stage (may be repeated)")
    run.add_argument("--from", dest="start_from", metavar="TOOL",
                     help="begin at this tool, leaving out those before it")
    run.add_argument("-x", "--fail-fast", action="store_true",
                     help="start nothing more after the first failure")
    look = parser.add_argument_group("looking, without running anything")
    commands = look.add_mutually_exclusive_group()
    for flags, command, text in [
        (("--list",), command_list, "show the tools and stages"),
        (("--plan", "-n", "--dry-run"), command_plan, "show what a run would do, and why"),
        (("--check",), command_check, "read every module, import none, and report all mistakes"),
    ]:
        commands.add_argument(*flags, dest="command", action="store_const", const=command,
                              default=command_run, help=text)
    look.add_argument("--json", action="store_true", help="print JSON, with --list and --plan")
    other = parser.add_argument_group("other")
    other.add_argument("-v", "--verbose", action="store_true",
                       help="show the engine's part of tracebacks, and debug logs")
    other.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    other.add_argument("--version", action="version", help="show the versions and exit",
                       version=f"orchestrator.py {VERSION}, Python {sys.version.split()[0]}")
    other.add_argument("-h", "--help", action="help", help="show this help and exit")
    group = parser.add_argument_group("arguments of the tools")
    if add_arguments is not None:
        declare_arguments(parser, group, add_arguments)
    return parser, list(group._group_actions)


def declare_arguments(parser: Parser, group: Any, add_arguments: Callable[[Any], None]) -> None:
    """Let the user's hook add its flags. Raise UserError for one that can not be."""
    where = "add_arguments()"
    engines = {action.dest for action in parser._actions}
    try:
        add_arguments(group)
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {error.message}.",
                        "Choose another flag: that one is the engine's, or declared twice."
                        ) from error
    except Exception as error:
        raise UserError(f"{where} failed: {format_one_line(error)}",
                        "Mend it; -v shows where.") from error
    for action in group._group_actions:
        flag = (action.option_strings or [action.dest])[0]
        if not action.option_strings:
            raise UserError(f"{where}: {flag!r} is not a flag, and words on the command line are "
                            "stages and tools.", f"Declare it as '--{flag}'.")
        if action.dest in RESERVED_ARGUMENTS or action.dest in engines:
            raise UserError(f"{where}: {flag} would reach tools as {action.dest!r}, which is the "
                            "engine's own name.", "Choose another flag, or another dest=.")


def parse_arguments(parser: Parser, own: Sequence[Any],
                    argv: Sequence[str]) -> Tuple[Any, Dict[str, Any]]:
    """Return the engine's options, and apart from them the arguments that tools get.

    A flag of the user's that is required is so for a run, not for looking.
    """
    required = [action for action in own if action.required]
    for action in required:
        action.required = False
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"There is no flag {unknown[0]!r}.",
                        format_nearest(unknown[0].partition("=")[0], flags))
    if options.json and options.command not in (command_list, command_plan):
        raise UserError("--json goes with --list or --plan.", "Add one of them.")
    arguments = {action.dest: getattr(options, action.dest) for action in own
                 if hasattr(options, action.dest)}
    if options.command is command_run:
        for action in required:
            if arguments.get(action.dest) is None:
                raise UserError(f"{action.option_strings[0]} is required.",
                                action.help or f"See {parser.prog} --help.")
    return options, arguments


def command_list(pipeline: Pipeline, options: Any, arguments: Mapping[str, Any],
                 argv: Sequence[str]) -> int:
    """Show the tools and stages; with targets, those that belong to them."""
    tools = list(pipeline.tools)
    if options.targets:
        tools = [step.tool for step in make_plan(pipeline, options.targets).steps]
    shown = make_list(pipeline, tools, find_summary)
    show(to_json(shown) if options.json else format_list(shown, make_style(sys.stdout)))
    return EXIT_SUCCESS


def command_plan(pipeline: Pipeline, options: Any, arguments: Mapping[str, Any],
                 argv: Sequence[str]) -> int:
    """Show the plan."""
    plan = make_plan(pipeline, options.targets, exclude=options.exclude,
                     start_from=options.start_from)
    show(to_json(make_plan_view(plan)) if options.json
         else format_plan(plan, make_style(sys.stdout)))
    return EXIT_SUCCESS


def command_check(pipeline: Pipeline, options: Any, arguments: Mapping[str, Any],
                  argv: Sequence[str]) -> int:
    """Read every module, and report all mistakes."""
    for target in options.targets:
        expand_target(pipeline, target)
    mistakes = find_mistakes(pipeline.tools.values(), {*arguments, "conn", "context"})
    for mistake in mistakes:
        show(str(mistake))
    count = len(pipeline.tools)
    show(f"{count} tool{'s' * (count > 1)} read, {len(mistakes) or 'no'} "
          f"mistake{'s' * (len(mistakes) != 1)} found")
    return EXIT_USAGE if mistakes else EXIT_SUCCESS


def command_run(pipeline: Pipeline, options: Any, arguments: Mapping[str, Any],
                argv: Sequence[str]) -> int:
    """Run the plan, and tell on stderr how it goes."""
    plan = make_plan(pipeline, options.targets, exclude=options.exclude,
                     start_from=options.start_from)
    screen = Screen(sys.stderr, options.quiet, options.verbose)
    result = run_plan(pipeline, plan, arguments, fail_fast=options.fail_fast,
                      verbose=options.verbose, on_event=screen.on_event)
    if not options.quiet or result.status != "success":
        say(format_summary(result, make_next_command(result, argv), screen.style))
    if result.status == "interrupted":
        return EXIT_SIGNAL + (result.signal or SIGINT)
    return EXIT_FAILED if result.failed else EXIT_SUCCESS


class Screen:
    """The listener of a run on the command line: one line per event, one live line."""

    def __init__(self, stream: Any, quiet: bool, verbose: bool) -> None:
        self.stream, self.quiet, self.style = stream, quiet, make_style(stream)
        self.is_terminal = stream is not None and stream.isatty()
        self.width = 0
        self.started_s = self.shown_s = 0.0
        self.is_live = False  # whether the last line is a live one, to be written over
        self.log_level = 10 if verbose else 30 if quiet else 20  # DEBUG, WARNING, INFO

    def on_event(self, event: Event) -> None:
        """Show an event."""
        if event.kind == "run_started":
            self.width = max(len(step.tool) for step in event.plan.steps)
        elif event.kind == "progress":
            self.show_live(event)
        elif event.kind == "log" and event.level >= self.log_level:
            self.show(event)
        elif event.kind == "tool_started":
            self.started_s, self.shown_s = event.at, event.at
            self.show(event)
        elif event.kind == "tool_ended":
            if event.outcome.traceback:
                self.write(event.outcome.traceback.rstrip())
            self.show(event)

    def show(self, event: Event) -> None:
        """Write the line of an event, unless only failures are wanted."""
        if not self.quiet or event.kind == "log" or event.outcome and event.outcome.error:
            self.write(format_event(event, self.width, self.style))

    def show_live(self, event: Event) -> None:
        """Write the live line, on a terminal and at most ten times a second."""
        if self.is_terminal and not self.quiet and event.at - self.shown_s >= 0.1:
            self.shown_s, self.is_live = event.at, True
            line = format_progress(event, self.width, event.at - self.started_s)
            self.stream.write("\r" + line[:os.get_terminal_size(self.stream.fileno()).columns - 1]
                              + "\x1b[K")
            self.stream.flush()

    def write(self, text: str) -> None:
        """Write a line, over the live one."""
        if self.is_live:
            self.is_live = False
            text = "\r\x1b[K" + text
        sys.stdout.flush()  # what the tool printed belongs before what we say of it
        say(text, self.stream)


def show(text: str) -> None:
    """Write a line to stdout: what a command was asked for."""
    print(fit(text, sys.stdout))


def fit(text: str, stream: Any) -> str:
    """Return a text in which letters that a stream can not show are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream: Any = None) -> None:
    """Write a line to stderr: what there is to say beside that."""
    stream = sys.stderr if stream is None else stream
    try:
        stream.write(fit(text, stream) + "\n")
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody reads it, or there is none (pythonw): no reason for a run to end


def make_style(stream: Any) -> Style:
    """Return the style for a stream: colours on a terminal, unless NO_COLOR is set."""
    has_colours = os.environ.get("TERM", "dumb") != "dumb" or "WT_SESSION" in os.environ
    return Style(has_colours and not os.environ.get("NO_COLOR")
                 and stream is not None and stream.isatty())


def to_json(data: Any) -> str:
    """Return data as JSON for programs."""
    import json
    return json.dumps(data, indent=2, ensure_ascii=False)


def make_next_command(result: RunResult, argv: Sequence[str]) -> str:
    """Return the command that goes on where a run stopped; nothing after a success."""
    left = [tool for tool, o in result.outcomes.items() if o.status != "success"]
    if not left:
        return ""
    words = [word for i, word in enumerate(argv) if not word.startswith("--from=")
             and word != "--from" and (i == 0 or argv[i - 1] != "--from")]
    return format_command([*program_words(), *words, "--from", left[0]])


def program_words() -> List[str]:
    """Return how this program was started: `python orchestrator.py`, or `python -m package`."""
    python = os.path.basename(sys.executable or "python")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [python, "-m", spec.name] if spec else [python, sys.argv[0]]


def format_command(words: Sequence[str]) -> str:
    """Return words as one would type them into the system's shell."""
    if os.name == "nt":
        from subprocess import list2cmdline
        return list2cmdline(words)
    import shlex
    return " ".join(map(shlex.quote, words))


def format_bug(argv: Sequence[str]) -> str:
    """Return what a report of a bug in the engine should hold beside the traceback."""
    import platform
    return (f"\nThis is a bug in orchestrator.py itself, not in your tools.\n"
            f"  Please report the traceback above, with: orchestrator.py {VERSION}, "
            f"Python {sys.version.split()[0]}, {platform.platform()}, arguments {list(argv)}")


_HIDDEN = [name for name, value in _YOURS.items()
           if not name.startswith("__") and globals()[name] is not value]

if __name__ == "__main__":
    _EXIT_CODE = main(
        _YOURS.get("TOOL_MAP"), _YOURS.get("STAGES"), _YOURS.get("get_connection"),
        name=_YOURS.get("NAME") or os.path.basename(os.path.dirname(os.path.abspath(__file__))),
        add_arguments=_YOURS.get("add_arguments"), replaced=_HIDDEN)
    gc.freeze()  # the interpreter's last collections would take 10 ms to walk all of this
    sys.exit(_EXIT_CODE)
