"""orchestrator.py - run a data pipeline of many tools from one file.

Copy this file into your repository, name your own modules in the tables below, and run:

    python orchestrator.py                  the stage "full"; without one, every tool in order
    python orchestrator.py ingest           a stage
    python orchestrator.py fetch render     tools, in this order
    python orchestrator.py --list           what there is
    python orchestrator.py --plan           what a run would do, and why
    python orchestrator.py --resume         go on where the last run failed or was killed

A tool is an ordinary module with a function `run(conn, **kwargs)`: `conn` is what
get_connection() below returned, kwargs are the command-line arguments of add_arguments().
Whatever run() wrote through `conn` is committed when it succeeds and rolled back when it raises.

Everything that you edit stands above the ENGINE mark. Nothing below it needs to be read.
"""

# === YOUR PIPELINE === edit from here ============================================================

TOOL_MAP = {  # a tool's name: its module
    "fetch":     "example.fetch",
    "parse":     {"module": "example.parse", "each": "fetch"},
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
    from pathlib import Path
    return sqlite3.connect(Path(__file__).with_name("data.db"))


def add_arguments(parser):
    """Declare the command-line flags that reach every tool as keyword arguments."""
    def date(text):
        import datetime
        return str(datetime.date.fromisoformat(text))
    parser.add_argument("--since", type=date, help="only flights since this day: 2013-01-03")
    parser.add_argument("--source", metavar="PLACE", help="folder or http(s) URL of the raw files")


# === ENGINE 2.0.0 === everything from this line on is replaced when you upgrade ==================
#
# MIT License, see LICENSE. To upgrade, put a newer file's engine under your own tables.
#
# The rooms of the engine. Each uses only the rooms above it.
#
#   1 WORDS        statuses, exit codes, records, errors, durations
#   2 SETUP        the tables above, checked -> Pipeline
#   3 PLANNING     targets -> Plan
#   4 HISTORY      what was run before, and the lock: all that lives in .orchestrator/
#   5 CONNECTION   how database drivers differ
#   6 LEDGER       items, in the tool's own database and transaction
#   7 MODULES      find the module of a tool, read it without importing it, check it, import it
#   8 CALLING      call a tool: one try in one transaction
#   9 WORKERS      the ways to execute an attempt: in this process, in worker processes
#  10 RUNNING      one loop that carries out a Plan -> RunResult
#  11 VIEWS        text and JSON for people and programs
#  12 REPORT       a run of the past as a page, a story, or data; a leaf
#  13 SCRIPTS      a new project, or the tables for a runner that somebody has; a leaf
#  14 DOOR         the command line

# ruff: noqa: E402
_YOURS = dict(globals())  # your names, before the engine adds its own: see the last lines

import os
import sys

if sys.version_info < (3, 9):  # so all of this file is written in what 3.6 can read
    sys.stderr.write("orchestrator.py needs Python 3.9 or newer; this is %d.%d.%d.\n"
                     % sys.version_info[:3])
    sys.exit(2)

# What the engine imports of the standard library at any time, and what that imports, on any
# Python, but for what each has built in, or loads before it looks at this file's folder.
_NEEDED = """
_ast _asyncio _bisect _blake2 _bootlocale _bz2 _colorize _compat_pickle _compression _contextvars
_datetime _hashlib _heapq _json _lzma _multiprocessing _opcode _opcode_metadata _overlapped
_pickle _posixshmem _posixsubprocess _py_warnings _random _sha2 _sha512 _socket _sqlite3 _ssl
_struct _tokenize _weakrefset _zstd annotationlib argparse array ast asyncio atexit base64
binascii bisect bz2 collections compression concurrent contextlib contextvars copy copyreg
datetime difflib dis enum errno faulthandler fcntl fnmatch functools gettext glob graphlib grp
hashlib heapq importlib inspect ipaddress json keyword linecache locale logging lzma math msvcrt
multiprocessing ntpath numbers opcode operator pathlib pickle pkgutil platform pwd random re
reprlib resource runpy select selectors shlex shutil signal socket sqlite3 sre_compile
sre_constants sre_parse ssl string struct subprocess tempfile textwrap threading token tokenize
traceback types typing unicodedata urllib warnings weakref zipfile zlib
"""
_AT_TOP = """
_heapq argparse collections contextlib copyreg enum errno functools gettext heapq keyword operator
re reprlib sre_compile sre_constants sre_parse types typing warnings
"""  # those of them that are imported before main() can say anything


def find_hiding(names, folders):
    """Return a sentence for each file, or package, that has one of some names of Python's own
    modules, in one of the folders before that of the standard library, as sys.path has them.

    Also where this Python has that built in, or loads it before: the next one may not.
    """
    said, names = [], set(names.split())
    for folder in map(os.path.abspath, folders):
        if folder == os.path.dirname(os.__file__):
            break
        try:
            there = {each.partition(".")[0] for each in os.listdir(folder)}
        except OSError:  # it is an archive, or gone
            continue
        for name in sorted(there & names):
            path = os.path.join(folder, name)
            is_package = os.path.isfile(os.path.join(path, "__init__.py"))
            if is_package or os.path.isfile(path + ".py"):
                said.append("%s hides Python's own %s; rename it."
                            % (path + ".py" * (not is_package), name))
    return said


_RENAME = "If it is a tool, say its new name in TOOL_MAP and where it is imported."
_HIDING = find_hiding(_NEEDED if __name__ == "__main__" else _AT_TOP, sys.path)
if _HIDING:
    sys.stderr.write("\n".join(_HIDING + ["  " + _RENAME, ""]))
    sys.exit(2)

import _signal  # which `signal` makes slower, with names for its numbers
import argparse
import collections
import contextlib
import errno
import functools
import gc
import itertools
import operator
import re
import time
from _thread import get_ident
from heapq import heappop, heappush
from typing import (
    Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Mapping, NamedTuple, Optional,
    Sequence, Tuple, Union,
)

VERSION = "2.0.0"
IS_WINDOWS = os.name == "nt"
_ENGINE_FILE = _YOURS["__file__"]
_ENGINE_LINE = sys._getframe().f_lineno  # frames of this file below it are the engine's own


# === 1 WORDS ====================================================================================
# The vocabulary that all rooms share: the statuses and their legal moves, the exit codes, the
# records that travel from room to room (all immutable), and the error that a user can mend.
# No input or output.

EXIT_SUCCESS, EXIT_FAILED, EXIT_USAGE, EXIT_BUG, EXIT_LOCKED = 0, 1, 2, 3, 4
EXIT_SIGNAL = 128  # + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, as shells count
SIGINT = 2  # on every system

MOVES = {  # status of a tool in a run -> the statuses that may follow
    "pending": ("running", "cached", "skipped"),
    "running": ("success", "partial", "failed", "interrupted"),
    **dict.fromkeys(["success", "partial", "cached", "failed", "skipped", "interrupted"], ()),
}

DONE = ("success", "cached")  # statuses of a tool that need not be done again
ITEM_STATUSES = ("success", "failed", "quarantined", "pending")
DEATHS_ALLOWED = 3  # an item that took its process down so often is quarantined
RESERVED_ARGUMENTS = ("conn", "context", "item")  # what run() gets from the engine
NOT_AGAIN = "not tried again"  # the reason of a failure that another try would only repeat
OF_ITEM = r"\{(item|stem)\}"  # in what a tool writes: the name of an item, or that of its file
ALL_BEFORE = "*"  # Step.needs of a tool that declares nothing: everything before it in the plan


class UserError(Exception):
    """A mistake that the user can mend: `problem` says where and what, `fix` what to do."""
    exit_code = EXIT_USAGE

    def __init__(self, problem, fix=""):
        self.problem, self.fix = problem, fix

    def __str__(self):
        return "\n  ".join([self.problem, *self.fix.splitlines()])


def check_hiding(folders):
    """Raise UserError if a file in a path of folders hides what the engine needs of Python."""
    hiding = find_hiding(_NEEDED, folders)
    if hiding:
        raise UserError("\n".join(hiding), _RENAME)


class Locked(UserError):
    """Another run of the same pipeline is not over."""
    exit_code = EXIT_LOCKED


class Unlisted(UserError):
    """An item is asked for that the tool does not have, so that nothing was done."""


class Settled(UserError):
    """There is nothing to do: no mistake, but something to say."""
    exit_code = EXIT_SUCCESS


Names = Tuple[str, ...]  # of tools, of items, or of what tools read and write


class Tool(NamedTuple):
    """A row of TOOL_MAP, checked; what each option means stands beside OPTIONS."""
    name: str
    module: str
    function: str = "run"
    commits: bool = False
    needs: Optional[Names] = None  # with `each`; None where the row declares nothing
    reads: Names = ()
    writes: Names = ()
    retries: int = 0
    retry_delay_s: float = 30.0
    retry_factor: float = 2.0
    retry_max_delay_s: float = 3600.0
    retry_jitter: float = 0.0
    timeout_s: Optional[float] = None
    memory_bytes: Optional[int] = None
    isolate: bool = False
    on_failure: str = "skip"
    when: str = "ready"
    uses: Tuple[Tuple[str, int], ...] = ()
    estimate_s: Optional[float] = None
    cache_s: Optional[float] = None  # infinite for "cache": True
    fresh_for_s: float = float("inf")
    each: Optional[str] = None
    items: Optional[str] = None
    batch: int = 1
    command: Names = ()  # its words; then there is no module
    arguments: Mapping[str, Any] = {}

    @property
    def given_items(self):
        """What its row says that its items are: a tool or a pattern of files, or None."""
        return self.each or self.items

    @property
    def outputs(self):
        """Those of its writes that are a file of each of its items."""
        return tuple(name for name in self.writes if re.search(OF_ITEM, name))


class Stage(NamedTuple):
    """A row of STAGES, checked: the tools that its members come to. `report` is the file that takes
    the report of each run of it, seen from the pipeline's folder; "" where none is wanted.
    """
    name: str
    tools: Names
    report: str = ""


class Pipeline(NamedTuple):
    """The user's tables, checked. `tools` and `stages` keep the order of the tables.

    `needs` gives the tools that each tool waits for, declared or inferred, or ALL_BEFORE.
    `limits` is how much of each resource there is for those that run together. `mistakes` are
    those of the tables, for --check; there are none where anything else gets a pipeline.
    """
    name: str
    tools: Dict[str, Tool]
    stages: Dict[str, Stage]
    needs: Dict[str, Union[str, Names]]
    limits: Dict[str, int]
    get_connection: Callable[..., Any]
    mistakes: Tuple[UserError, ...] = ()


class Success(NamedTuple):
    """A tool's last success, as history's view `successes` has it, or what passed of its items.

    `success_id` is the id of its attempt; `work` that of the one that did the work, which stays the
    same while the tool is cached, or has items and does nothing new.
    `needed` gives the work that each tool it needs had done by then; `source` what ran, as
    describe_source() says, and `inputs` what its files were like: both are empty where that is
    not recorded. `result` is JSON, or None if that could not say it.
    """
    tool: str
    success_id: int
    work: int
    run_id: str
    started_at: float
    ended_at: float
    rows: Optional[int]
    result: Optional[str]
    kind: str
    arguments: str
    source: Mapping[str, Any]
    inputs: Mapping[str, Any]
    needed: Mapping[str, int]


class Past(NamedTuple):
    """What planning may ask of history, in functions. `now` is in seconds since the epoch.

    `find_whole_success` is of a success that says something of all the data with the arguments of
    this run: see History. `find_needed_works` gives the last work of each tool that one needs.
    `find_change` tells what changed in a tool itself since a success of it, or "". `done` are the
    tools that ended well in the run that is resumed. `is_forced` overrides cache, freshness and
    missing needs. `has_items` tells whether a tool has items. `excluded`: see Plan.
    """
    now: float
    find_success: Callable[[str], Optional[Success]]
    find_whole_success: Callable[[str], Optional[Success]]
    find_expected_s: Callable[[str], Optional[float]]
    find_needed_works: Callable[[str], Dict[str, int]]
    find_change: Callable[[Tool, Success], str]
    done: Mapping[str, Success] = {}
    is_forced: bool = False
    has_items: Callable[[Tool], bool] = lambda tool: False
    excluded: FrozenSet[str] = frozenset()


class Step(NamedTuple):
    """One tool's place in a plan. `action` is run, cached, or skip: done before a resume; or maybe:
    cached, unless what it waits for does something new, which is known when that has ended.

    `needs` is what it waits for as its table says it, but for what is excluded; `edges` are the
    tools of the plan that it waits for directly, which say the same: see make_steps. `success` is
    what a tool that is, maybe, not run again did when it was; `expected_s` is None where nothing is
    known of it; `arguments` are its own.
    """
    tool: str
    wave: int
    action: str
    reason: str
    needs: Union[str, Names]
    edges: Names = ()
    expected_s: Optional[float] = None
    success: Optional[Success] = None
    arguments: Mapping[str, Any] = {}

    def may_run(self):
        """Return whether the tool may have to run."""
        return self.action in ("run", "maybe")


class Plan(NamedTuple):
    """What a run will do, in order, with `jobs` tools at most side by side.

    `critical_path` is the chain of tools that takes longest, `expected_s` what the whole run is
    expected to take; None if that is unknown of any tool. `excluded` are the tools without which
    those that need them go on.
    """
    steps: Tuple[Step, ...]
    critical_path: Names
    expected_s: Optional[float] = None
    jobs: int = 1
    excluded: FrozenSet[str] = frozenset()


class Item(NamedTuple):
    """An item that is to be done. `tries` and `deaths` are those that its row in the ledger tells;
    `is_seen` whether there is such a row, None if that is to be looked up once more. `charge` is
    how a try ended that its process did not survive, and that is to be recorded before another;
    the counts hold it already, and `is_death` tells which: it may have been too slow, instead.
    `slip` is the file that tells of it until then.
    """
    name: str
    version: str = ""
    is_seen: Optional[bool] = None
    tries: int = 0
    deaths: int = 0
    charge: str = ""
    is_death: bool = False
    slip: str = ""


class Try(NamedTuple):
    """How one try ended, of an item or of a tool that has none: success, failed, pending (it
    failed and comes again), quarantined, interrupted; or done, by somebody else. `item` has the
    counts of its row by then; `error` is one line, `reason` what else there is to say.
    """
    item: Optional[Item]
    status: str
    result: Any = None
    rows: Optional[int] = None
    error: str = ""
    traceback: str = ""
    reason: str = ""


class Job(NamedTuple):
    """What a performer is asked to do: to list the items of a tool (is_listing), or to try some;
    a tool without items is one item, None. It carries all that this needs to know of the run.

    `number` is what messages call it by; `log` is the file for what it prints, where that is
    another process's; `run_id` that of the ledger, 7.3f2a for run 7; `source` the fingerprint of
    the tool's module. `only`: no item but this one. `retry`: the items to try again that were
    given up, and `redo` those to do again that are done; all if it is empty, none if it is None.
    """
    number: int
    tool: str
    items: Tuple[Optional[Item], ...] = (None,)
    is_listing: bool = False
    log: str = ""
    run_id: str = ""
    attempt: int = 1
    last_success_at: Optional[float] = None
    source: str = ""
    only: Optional[str] = None
    retry: Optional[Names] = None
    redo: Optional[Names] = None


class Outcome(NamedTuple):
    """How a tool ended. `error` is one line, `traceback` the tool's own part of it, as text;
    `log` the file that holds what it printed, or ""; `kept` what keep_result() made of its
    result, where that is in another process; `items` how many items of a tool that has some
    were `listed`, were `given_up` before or `pending`, and of these `passed`, `failed`, or were
    done `elsewhere`; and of those that failed, how many are `unfit` to be kept.
    """
    status: str
    reason: str = ""
    result: Any = None
    rows: Optional[int] = None
    error: str = ""
    traceback: str = ""
    attempts: int = 0
    duration_s: Optional[float] = 0.0
    log: str = ""
    kept: Optional[Tuple[Optional[str], Optional[str]]] = None
    items: Optional[Mapping[str, int]] = None


class Event(NamedTuple):
    """What a listener hears. `kind` is one of run_started (with `plan`), tool_started, progress
    (with `done`, and `total` or None), log (with `text` and `level`, as in logging), tool_retried
    (with `outcome` of the failed attempt), tool_ended (with `outcome`), tick (time passes), and
    run_ended (with `result`). `at` is in seconds since the epoch. `output` is the file that
    takes what the tool prints, where it does not print to the screen itself.
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
    output: str = ""
    result: Optional["RunResult"] = None


class RunResult(NamedTuple):
    """How a run ended: `status` is success, failed or interrupted; the lists name tools, and
    those of whose items some failed are in `partial`.

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
    results: Mapping[str, Any]
    duration_s: float
    outcomes: Dict[str, Outcome]
    signal: Optional[int] = None


def check_move(old, new):
    """Return `new` if a tool's status may go from `old` to it; a bug of the engine if not."""
    assert new in MOVES[old], f"illegal move of a tool's status: {old} -> {new}"
    return new


def format_nearest(word, known):
    """Return the way out of a mistyped word: the nearest known words, or else all of them."""
    from difflib import get_close_matches
    known = list(map(str, known))
    near = get_close_matches(word, known) or [  # three at most
        each for each in known if each.lower() == word.lower()]
    if near:
        return "Did you mean " + " or ".join(map(repr, near)) + "?"
    return "Known: " + (", ".join(known[:20]) + (", ..." if len(known) > 20 else "") or "none")


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def accept(value, is_right):
    """Return a value that is right. Raise ValueError for another."""
    if not is_right:
        raise ValueError(value)
    return value


def is_number(value, kind=(int, float)):
    """Return whether a value is an int or a float; True and False are neither here."""
    return isinstance(value, kind) and not isinstance(value, bool)


def parse_quantity(value, units):
    """Return a number, or what a text of numbers with units comes to. Raise ValueError if it is
    neither.
    """
    if not isinstance(value, str):
        return accept(value, is_number(value))
    part = rf"(\d+(?:\.\d+)?) ?({'|'.join(units)}) *"
    accept(value, re.fullmatch(f" *({part})+", value))
    return sum(float(number) * units[unit] for number, unit in re.findall(part, value))


def parse_duration_s(value):
    """Return seconds, from a number of them or a text. Raise ValueError if it is neither.

    >>> parse_duration_s("1h30m"), parse_duration_s("7d"), parse_duration_s(0.5)
    (5400.0, 604800.0, 0.5)
    """
    seconds = parse_quantity(value, _SECONDS)
    return float(accept(seconds, 0 <= seconds < 1e12))


def parse_bytes(value):
    """Return bytes, from a whole number of them or a text. Raise ValueError if it is neither.

    >>> parse_bytes("512MB"), parse_bytes("1.5 KB"), parse_bytes(4096)
    (536870912, 1536, 4096)
    """
    size = parse_quantity(value, _BYTES)
    return int(accept(size, 1 <= size < 2**63 and not isinstance(value, float)))


def retry_delay_s(tool, attempt, random=lambda: 0.0):
    """Return the seconds to wait after a failed attempt, counted from 1.

    The delay grows by `retry_factor` each time up to `retry_max_delay`; `retry_jitter` takes a
    random part of it away, so that many do not come again at once. `random` is 0.0 to 1.0.

    >>> [retry_delay_s(Tool("t", "m", retry_delay_s=30), n) for n in (1, 2, 3, 10_000)]
    [30.0, 60.0, 120.0, 3600.0]
    """
    try:
        delay_s = tool.retry_delay_s * float(tool.retry_factor) ** (attempt - 1)
    except OverflowError:
        delay_s = tool.retry_max_delay_s if tool.retry_delay_s else 0.0
    return min(delay_s, tool.retry_max_delay_s) * (1 - tool.retry_jitter * random())


def format_duration(seconds):
    """Return seconds as people say them: `0.12 s`, `42.0 s`, `1m 05s`, `2h 03m`, `3d 04h`.

    >>> format_duration(0.123), format_duration(65), format_duration(7380), format_duration(1e6)
    ('0.12 s', '1m 05s', '2h 03m', '11d 13h')
    """
    if seconds is None:
        return ""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_m = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days > 1:
        return f"{days}d {rest_h:02d}h"
    return f"{hours}h {rest_m:02d}m" if hours else f"{minutes}m {rest_s:02d}s"


def format_moment(at):
    """Return a moment, in seconds since the epoch, as ISO 8601 in UTC; None for None.

    >>> format_moment(1357020000.5)
    '2013-01-01T06:00:00.500Z'
    """
    if at is None:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    return f"{whole}.{int(at * 1000) % 1000:03d}Z"


_USUAL_FROM = 5  # former values that tell what is usual; fewer tell nothing
_USUAL = {  # figure of an attempt -> the share of what is usual, and the least, that it may be off
    "duration_s": (0.5, 1.0), "rows": (0.1, 10)}


def find_middle(values):
    """Return the median of some values, of two in the middle the higher; None of none."""
    return sorted(values)[len(values) // 2] if values else None


def find_unusual(row, former):
    """Return in words what of a success is outside what its last successes make likely.

    That is a duration, or a number of rows, which is farther from their median than five times the
    median of their own distances from it; than half of it (of rows, a tenth); than a second (ten
    rows); and than nine in ten of them. Fewer than five of them make nothing likely.

    >>> find_unusual({"duration_s": 9.0, "rows": 0}, [{"duration_s": 2.5, "rows": 700}] * 5)
    ['9.00 s, usually 2.50 s', '0 rows, usually 700']
    >>> find_unusual({"duration_s": 0.02, "rows": None}, [{"duration_s": 0.01, "rows": 7}] * 20)
    []
    """
    found = []
    for name, (share, least) in _USUAL.items():
        value, values = row[name], [each[name] for each in former if each[name] is not None]
        if value is None or len(values) < _USUAL_FROM:
            continue
        usual = find_middle(values)
        off, spread = abs(value - usual), [abs(each - usual) for each in values]
        if off > max(5 * find_middle(spread), share * usual, least) \
                and sum(each >= off for each in spread) <= len(values) / 10:
            found.append(f"{value:,} rows, usually {usual:,}" if name == "rows" else
                         f"{format_duration(value)}, usually {format_duration(usual)}")
    return found


def check_mistakes(errors):
    """Raise one UserError that says all of some mistakes, so that nobody mends a table line by
    line; none if there are none.
    """
    if errors:
        raise errors[0] if len(errors) == 1 else UserError("\n".join(map(str, errors)))


# === 2 SETUP ====================================================================================
# The user's tables become a Pipeline, or one sentence for each mistake in them. Every rule about
# the tables stands here. No input or output: whether a module exists is asked in CALLING.

def load_pipeline(tool_map, stages=None, get_connection=None, **more):
    """Return the checked tables. Raise UserError with every mistake that they hold."""
    pipeline = read_pipeline(tool_map, stages, get_connection, **more)
    check_mistakes(pipeline.mistakes)
    return pipeline


def read_pipeline(tool_map, stages=None, get_connection=None, *, name=None, limits=None):
    """Return what is right in the tables, with the mistakes in their rows.

    Raise UserError for tables that can not be read at all.
    """
    tool_map = read_table("TOOL_MAP", tool_map)
    stages = read_table("STAGES", stages)
    limits = read_table("LIMITS", limits)
    if not isinstance(name or "", str):
        raise UserError(f"NAME is {name!r}, not text.", 'Write NAME = "sales".')
    if not tool_map:
        raise UserError("TOOL_MAP is empty.", 'Add a tool to it: "fetch": "my_folder.fetch".')
    if get_connection is not None and not callable(get_connection):
        raise UserError(f"get_connection is {get_connection!r}, not a function.",
                        "Write `def get_connection():` and return a connection or None.")
    errors = []
    tools = make_all(errors, make_tool, tool_map)
    errors += find_unknown_needs(tools, tool_map)
    needs = find_needs(errors, tools)
    rows = make_all(errors, make_stage, stages)
    members = {name: stage.tools for name, stage in rows.items()}
    errors += find_unknown_members(members, {**tool_map, **stages})
    expanded = {name: rows[name]._replace(tools=found)
                for name, found in expand_stages(errors, tool_map, members).items()}
    known = make_all(errors, make_limit, limits)
    errors += find_wrong_uses(tools, limits, known)
    return Pipeline(name or "pipeline", tools, expanded, needs, known,
                    get_connection or no_connection, tuple(errors))


def no_connection():
    """Stand for get_connection in a pipeline without a database."""


def read_table(where, table):
    """Return a table, empty where there is none. Raise UserError if it is no table."""
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        raise UserError(f"{where} is {format_type(table)}, not a dict.",
                        f"Write {where} = {{...}}, names on the left.")
    return table


def make_all(errors, make, table):
    """Return `make(name, value)` for each row, and add what is wrong with the others to errors."""
    made = {}
    for name, value in table.items():
        try:
            made[name] = make(name, value)
        except UserError as error:
            errors.append(error)
    return made


def check_name(where, name):
    """Raise UserError if a name could not be typed as a target."""
    if not isinstance(name, str):
        raise UserError(f"{where}: the name {name!r} is {format_type(name)}, not text.",
                        "Put it in quotes.")
    if not name.isprintable():
        raise UserError(f"{where}: {name!r} has letters that can not be shown.", "Take them out.")
    if not re.fullmatch("[^-+ ](.*[^+ ])?", name):
        raise UserError(f"{where}: {name!r} can not be told from a flag on the command line.",
                        "Choose a name that does not begin with - or +, does not end with +, "
                        "and has no blanks around it.")


def make_tool(name, value):
    """Return a row of TOOL_MAP as a Tool. Raise UserError if it is none."""
    check_name("TOOL_MAP", name)
    where = f"TOOL_MAP[{name!r}]"
    options = {"module": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise UserError(f"{where} is {format_type(value)}, not a module path or a dict of options.",
                        f'Write "{name}": "folder.module".')

    def read_option(key, given):
        """Return what an option says. Raise UserError that says where it stands, if it is wrong."""
        if key not in OPTIONS:
            raise UserError(f"{where}: there is no option {key!r}.",
                            format_nearest(str(key), OPTIONS))
        _, read, wanted, example = OPTIONS[key]
        try:
            return read(given)
        except UserError as error:
            raise UserError(f"{where}: {error.problem}", error.fix) from None
        except (TypeError, ValueError):
            raise UserError(f"{where}: {key!r} must be {wanted}, not {given!r}.",
                            f'Write "{key}": {example}.') from None

    errors = []
    given = make_all(errors, read_option, options)
    if "command" in given:
        errors += [UserError(f"{where} {why}.", f"Take {key!r} out.")
                   for key, why in _NOT_OF_COMMANDS.items() if key in options]
    elif "module" not in options and not errors:
        errors.append(UserError(f"{where} names no module.", 'Add "module": "folder.module", or '
                                '"command": "python load.py".'))
    if {"each", "items"} <= given.keys():
        errors.append(UserError(f"{where}: both 'each' and 'items' say which its items are.",
                                "Take out the one or the other."))
    check_mistakes(errors)
    fields = {OPTIONS[key][0]: value for key, value in given.items()}
    fields["module"], _, function = given.get("module", "").partition(":")
    if not given.keys().isdisjoint(("needs", "reads", "writes", "each")):
        fields["needs"] = given.get("needs", ()) + ((given["each"],) if "each" in given else ())
    return Tool(name, function=function or "run", **fields)


_NOT_OF_COMMANDS = {  # option -> why it does not go with "command"
    "module": "names both a module and a command",
    "batch": "says 'batch', but a command is run for each item alone",
    "commits": "says 'commits', but a command does not get the connection",
}


def make_limit(name, value):
    """Return a row of LIMITS. Raise UserError if it is none."""
    check_name("LIMITS", name)
    try:
        return read_positive(value)
    except ValueError:
        raise UserError(f"LIMITS[{name!r}] is {value!r}, not a whole number from 1 on.",
                        f'Write "{name}": 2 to let two units of it be used at a time.') from None


# The readers of options: each returns the value as the engine wants it, and raises ValueError or
# TypeError for one that is wrong.

def read_text(pattern):
    """Return a reader of texts that look like a pattern."""
    return lambda value: accept(value, re.fullmatch(pattern, value, re.DOTALL))


def read_number(least, most=float("inf"), kind=(int, float)):
    """Return a reader of numbers between two bounds, both of which are right."""
    return lambda value: accept(value, is_number(value, kind) and least <= value <= most)


read_name = read_text(".+")
read_positive = read_number(1, kind=int)


def read_flag(value):
    """Read True or False."""
    return accept(value, isinstance(value, bool))


def read_names(value):
    """Read a list of texts; a single text stands for a list of it."""
    names = [value] if isinstance(value, str) else value
    accept(names, isinstance(names, (list, tuple)))
    return tuple(dict.fromkeys(map(read_name, names)))


def read_writes(value):
    """Read a list of names, in which braces stand for an item."""
    names = read_names(value)
    return accept(names, not re.search(rf"\{{{_IDENTIFIER}\}}", re.sub(OF_ITEM, "", str(names))))


def read_uses(value):
    """Read the units of each resource; they are sorted by its name."""
    accept(value, isinstance(value, Mapping))
    return tuple(sorted((read_name(name), read_positive(units)) for name, units in value.items()))


def read_positive_s(value):
    """Read a duration above zero; it comes in seconds."""
    seconds = parse_duration_s(value)
    return accept(seconds, seconds > 0)


def read_plain(value):
    """Read arguments by name, plain data; they come as a copy that nobody changes."""
    for name in value:
        read_text(_IDENTIFIER)(accept(name, name not in RESERVED_ARGUMENTS))
    return accept(copy_data(value), isinstance(value, dict))


def copy_data(value):
    """Return a copy of what JSON can say. Raise ValueError or TypeError if it is anything else."""
    if isinstance(value, dict):
        return {read_text(".*")(name): copy_data(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(map(copy_data, value))
    is_finite = isinstance(value, (int, float)) and abs(value) < float("inf")
    return accept(value, is_finite or value is None or isinstance(value, str))


def read_cache_s(value):
    """Read how long a success is good for, in seconds; None where it is good for nothing."""
    if isinstance(value, bool):
        return float("inf") if value else None
    return read_positive_s(value)


_QUOTED = r"""\\.|"(\\.|[^"\\])*"|'[^']*'"""
_OF_SHELL = r"[|&;]{1,2}|2>&1|(\d?>>?|<)"
_IN_SHELL = rf"({_OF_SHELL}).*|.*;|~(/.*)?|.*\$[\w({{].*"  # in a text, without quotes
_IDENTIFIER = r"[^\W\d]\w*"
# `{identifier}` stands for an argument; `${name}` is a shell's, and `%{name}` curl's.
BRACES = re.compile(r"(?<![$%])\{(" + _IDENTIFIER + r")\}")


def read_command(value):
    """Read the words of a command. A text is split as the system's shell does it, which has no
    other part in it: what one would do more with, unless it is in quotes, is refused.
    """
    is_text = isinstance(value, str)
    try:
        words = split_words(value) if is_text else value
    except ValueError:
        raise UserError(f"'command' has a quote without its other half: {value!r}.",
                        'Close it, or write a list: "command": ["grep", "it\'s", "a.txt"].'
                        ) from None
    accept(words, isinstance(words, (list, tuple)) and words and words[0].strip()
           and not any("\0" in word for word in words))
    pattern, bare = (_IN_SHELL, re.sub(_QUOTED, "''", value).split()) if is_text \
        else (_OF_SHELL, words)
    found = next((word for word in bare if re.fullmatch(pattern, word)), None)
    if found:
        shell = '"cmd", "/c"' if IS_WINDOWS else '"sh", "-c"'
        line = value if is_text else " ".join(
            word if re.fullmatch(pattern, word) else format_words([word]) for word in words)
        raise UserError(f"'command' has {found!r}, but it is run without a shell.",
                        f'Write "command": [{shell}, {line!r}], or, if that is for the program, '
                        "a text with it in quotes.")
    for word in words:
        check_braces(word)
    return tuple(words)


def check_braces(word):
    """Raise UserError if a word of a command has half of the braces around a name."""
    half = rf"\{{{_IDENTIFIER}(?![\w}}])|(?<![\w{{]){_IDENTIFIER}\}}"
    if word.count("{") != word.count("}") and re.search(half, word):
        raise UserError(f"'command' has a brace without its other half in {word!r}.",
                        "Close it, or put what belongs together in quotes.")


def split_words(text):
    """Return the words of a text as a POSIX shell splits it, or on Windows as every program there
    splits its own command line. Raise ValueError for a quote without its other half.
    """
    if IS_WINDOWS:
        return split_words_of_windows(text)
    import shlex
    return shlex.split(text)


def split_words_of_windows(text):
    r"""Return the words of a text as CommandLineToArgvW does: a backslash is only itself, but
    before a quote; two quotes inside of quotes are a letter, and end them.

    >>> split_words_of_windows(r'"C:\my files\\" a\\b \"hi\"')
    ['C:\\my files\\', 'a\\\\b', '"hi"']
    """
    words, word, is_quoted = [], None, False
    for slashes, quotes, other in re.findall(r'(\\*)("{1,2})|(.)', text, re.DOTALL):
        if other.isspace() and not is_quoted:
            words += [word] * (word is not None)
            word = None
            continue
        word = (word or "") + other + "\\" * (len(slashes) // 2)
        if len(slashes) % 2:
            word, quotes = word + '"', quotes[1:]
        if quotes == '""':
            word, is_quoted = word + '"' * is_quoted, False
        elif quotes:
            is_quoted = not is_quoted
    accept(text, not is_quoted)
    return words + [word] * (word is not None)


def format_words(words):
    """Return the words of a command as one would type them, its braces as they are."""
    import shlex
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./{}*?-]+", word) else shlex.quote(word)
                    for word in words)


_NAMES = "a list of names"
_DURATION = 'a number of seconds or a text like "90s", "10m", "1h30m" or "7d"'
_MODULE = r"[^.:/\\\s\0]+"  # which Python finds, though no `import` can spell it: 02_load, my-tools

# option of a tool -> (field of Tool, how its value is read, that in words, an example)
OPTIONS = {
    "module": ("module", read_text(rf"{_MODULE}(\.{_MODULE})*(:{_IDENTIFIER})?"),
               "a module path with dots",
               '"folder.module", or "command": "python load.py"'),
    # or a program and its words, in which {name} is an argument
    "command": ("command", read_command, "a text that is not empty, or a list of texts",
                '"python load.py {year}"'),
    # True: the tool looks after its transactions itself
    "commits": ("commits", read_flag, "True or False", "True"),
    # the tools that must be done first; what reads X needs what writes X
    "needs": ("needs", read_names, _NAMES, '["fetch"]'),
    "reads": ("reads", read_names, _NAMES, '["raw_flights"]'),
    "writes": ("writes", read_writes, _NAMES + ", with no braces but {item} and {stem}",
               '["flights"]'),
    # further attempts after a failed one, and how long to wait before each: see retry_delay_s
    "retries": ("retries", read_number(0, kind=int), "a whole number from 0 on", "3"),
    "retry_delay": ("retry_delay_s", parse_duration_s, _DURATION, '"30s"'),
    "retry_factor": ("retry_factor", read_number(1, 1e6), "a number from 1 on", "2"),
    "retry_max_delay": ("retry_max_delay_s", parse_duration_s, _DURATION, '"1h"'),
    "retry_jitter": ("retry_jitter", read_number(0, 1), "a number from 0 to 1", "0.5"),
    # each of these three gives the tool a process group of its own
    "timeout": ("timeout_s", read_positive_s, _DURATION + ", above 0", '"10m"'),
    "memory": ("memory_bytes", parse_bytes, 'a number of bytes or a text like "512MB" or "2GB"',
               '"2GB"'),
    "isolate": ("isolate", read_flag, "True or False", "True"),
    # what a failure means: skip what needs the tool, stop starting anything, or go on regardless
    "on_failure": ("on_failure", read_text("skip|stop|continue"),
                   '"skip", "stop" or "continue"', '"skip"'),
    # "always": run after what the tool needs, whatever became of it
    "when": ("when", read_text("ready|always"), '"ready" or "always"', '"always"'),
    # units of the resources in LIMITS that it takes while it runs
    "uses": ("uses", read_uses, "a dict of whole numbers from 1 on", '{"db": 1}'),
    # how long it takes, until history knows better
    "estimate": ("estimate_s", parse_duration_s, _DURATION, '"5m"'),
    # not run again while nothing of it changed, for ever or that long
    "cache": ("cache_s", read_cache_s, 'True, False or a duration like "24h"', '"24h"'),
    # its items are those that ever passed this tool, or the files of this pattern; so many of them
    # are committed at a time
    "each": ("each", read_name, "the name of a tool with items", '"validate"'),
    "items": ("items", read_text(r"[^{}\0]+"), "a pattern of files, without braces",
              '"raw/*.csv"'),
    "batch": ("batch", read_positive, "a whole number from 1 on", "500"),
    # what its functions get by name, rather than from a flag of that name
    "arguments": ("arguments", read_plain, "a dict of plain data, as JSON has it, by the names "
                  "of arguments, none of which is conn, context or item", '{"year": 2013}'),
    # how old its last success may be for those that need it and do not run it
    "fresh_for": ("fresh_for_s", read_positive_s, _DURATION + ", above 0", '"24h"'),
}


def make_stage(name, value):
    """Return a row of STAGES, with its members as they stand there. Raise UserError if it has none.
    """
    check_name("STAGES", name)
    where, report = f"STAGES[{name!r}]", ""
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("tools", "report"):
                raise UserError(f"{where}: there is no option {key!r}.",
                                format_nearest(str(key), ["tools", "report"]))
        value, report = value.get("tools", ()), value.get("report", "")
    if not isinstance(report, str) or not report.isprintable():
        raise UserError(f"{where}: 'report' must be the name of a file, not {report!r}.",
                        'Write "report": "output/report.html".')
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{where} is {value!r}, not a list of names.",
                        f'Write "{name}": ["first_tool", "second_tool"].')
    return Stage(name, tuple(value), report)


def find_unknown_members(members, known):
    """Return an error for each name in a stage that is neither a tool nor a stage."""
    return [UserError(f"STAGES[{stage!r}]: no tool or stage {name!r}.",
                      format_nearest(name, known))
            for stage, names in members.items() for name in names if name not in known]


def find_unknown_needs(tools, known):
    """Return an error for each need that is not among the names of all tools."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: no tool {need!r} to "
                      + ("take items of." if need == tool.each else "need."),
                      format_nearest(need, known))
            for tool in tools.values() for need in tool.needs or () if need not in known]


def find_wrong_uses(tools, limits, known):
    """Return an error for each use of a resource that is not there, or not in that number.

    `known` are the rows of LIMITS that are right; of the others nobody knows the number.
    """
    errors = []
    for tool in tools.values():
        for resource, units in tool.uses:
            where = f"TOOL_MAP[{tool.name!r}]: uses {resource!r}"
            if resource not in limits:
                errors.append(UserError(
                    f"{where}, which LIMITS does not have.", format_nearest(resource, limits)
                    if limits else f'Write LIMITS = {{"{resource}": {units}}} above the mark.'))
            elif units > known.get(resource, units):
                errors.append(UserError(
                    f"{where} {units} times, but LIMITS has only {known[resource]}.",
                    "Lower the one or raise the other."))
    return errors


def find_needs(errors, tools):
    """Return what each tool waits for: what it needs, and who writes what it reads.

    What nobody writes is an outside source. Where several write a name, see order_writers(). Add
    to errors writers that are in no order, and the circles in which tools need each other.
    """
    needs = {tool.name: dict.fromkeys(need for need in tool.needs or () if need in tools)
             for tool in tools.values()}
    writers = invert({tool.name: tool.writes for tool in tools.values()})
    shared = {name: found for name, found in writers.items() if len(found) > 1}
    for tool in tools.values():
        needs[tool.name].update((writer, None) for name in tool.reads if name not in shared
                                for writer in writers.get(name, ()) if writer != tool.name)
    if shared and not errors:  # a wrong row may order them
        readers = invert({tool.name: tool.reads for tool in tools.values()})
        errors += order_writers(needs, readers, shared)
    errors += [UserError(f"TOOL_MAP: needs go in a circle: {path}.",
                         "Take one of these needs out, or one of the reads or writes behind it.")
               for path in walk(needs)[1]]
    return {tool.name: ALL_BEFORE if tool.needs is None else tuple(needs[tool.name])
            for tool in tools.values()}


def order_writers(needs, readers, shared):
    """Add the needs of those that use a name which several tools write, and return an error for
    each two writers that would have to be put in order.

    Who updates a name, by reading it too, needs those that only write it. All of its writers must
    be in one line then, and who reads or writes it needs the last of them that is before it, or
    that could be: none that comes after it.
    """
    order, errors = Order(needs), []
    for name, found in shared.items():
        updates = {*found}.intersection(readers.get(name, ()))
        order.add_last(needs, {*found} - updates, updates)
    order = Order(needs)
    for name, found in shared.items():
        errors += [UserError(f"TOOL_MAP: {one!r} and {other!r} write {name!r} in no order.",
                             f'Let one need the other: "needs": ["{one}"] in {other!r}.')
                   for one, other in order.find_gaps(found)[:20]]
    if not errors:
        for name, found in shared.items():
            order.add_last(needs, found, found + readers.get(name, []))
    return errors


def invert(table):
    """Return, for {name: others}, which names have each of the others; all names are in it."""
    found = {name: [] for name in table}
    for name, others in table.items():
        for other in others:
            found.setdefault(other, []).append(name)
    return found


class Order:
    """Which tool comes before which, directly or not.

    A set of tools is an int with a bit for each, higher for one that comes later in an order that
    needs allow; `before` and `after` hold a set for each tool, with itself. So all that 10,000
    tools have before and after them fits in 25 MB, and what is asked of it takes microseconds.
    Tools in a circle or behind one are left out, since nobody can tell before that is mended.
    """

    def __init__(self, needs):
        self.bits, self.before, self.after = {}, {}, {}
        for tool in walk(needs)[0]:
            if all(need in self.bits for need in needs[tool]):
                bit = 1 << len(self.bits)
                self.bits[tool] = self.before[tool] = self.after[tool] = bit
                for need in needs[tool]:
                    self.before[tool] |= self.before[need]
        self.tools = list(self.bits)
        for tool in reversed(self.tools):
            for need in needs[tool]:
                self.after[need] |= self.after[tool]

    def find_gaps(self, tools):
        """Return each two tools of which neither comes before the other, and that nothing but an
        order of these two would bring in line.
        """
        line = sorted(filter(self.bits.get, tools), key=self.bits.get)
        return [(one, other) for one, other in zip(line, line[1:])
                if not self.before[other] & self.bits[one]]

    def find_last(self, tools):
        """Return those of some tools that do not come before another one of them."""
        before = 0
        for tool in tools:
            before |= self.before[tool] & ~self.bits[tool]
        return [tool for tool in tools if not self.bits[tool] & before]

    def add_last(self, needs, tools, users):
        """Let each user need those of the tools that do not come after it, but for those that
        come before another one of these.
        """
        known = sum(self.bits.get(tool, 0) for tool in tools)
        for user in filter(self.bits.get, users):
            left = known & ~self.after[user]
            while left:
                last = self.tools[left.bit_length() - 1]
                needs[user][last] = None
                left &= ~self.before[last]


def walk(needs):
    """Return all names in an order in which each comes after what it needs, with the one that
    asked for it, or None where it had its turn; and the circles, as paths `a -> b -> a`.

    As a search in depth does it, but not recursive. Who is in a circle is left out of the order,
    and who needs such a one is treated as if it did not.
    """
    left = {name: iter(needed) for name, needed in needs.items()}
    order, circles = {}, []
    for first in needs:
        path = {first: None} if first in left else {}  # each is needed by the one before it
        while path:
            name = next(reversed(path))
            need = next((each for each in left[name] if each in left), None)
            if need is None:
                order[name] = path.pop(name)
                del left[name]
            elif need in path:
                names = list(path)
                circle = names[names.index(need):]
                circles.append(" -> ".join([*circle, need]))
                for each in circle:
                    del left[each], path[each]
            else:
                path[need] = name
    return order, circles


def expand_stages(errors, tools, members):
    """Return by stage the tools it comes to, but for those that contain themselves, and add
    to errors what is wrong with them.

    A name that is both is the stage, but the tool inside the stage of that name.
    """
    inner = {stage: [name for name in names
                     if name in members and (name != stage or name not in tools)]
             for stage, names in members.items()}
    order, circles = walk(inner)
    errors += [UserError(f"STAGES: a stage contains itself: {path}.",
                         "Take one of these members out.") for path in circles]
    found = {}
    for stage in order:
        found[stage] = tuple(dict.fromkeys(
            tool for name in members[stage] for tool in found.get(name, (name,))))
        if stage in tools and stage not in found[stage] and tools.keys() >= {*found[stage]}:
            errors.append(UserError(
                f"STAGES[{stage!r}]: a tool has this name too and is not in the stage, so that "
                "nothing could name it.", "Rename the one or the other."))
    return {stage: found[stage] for stage in members if stage in found}


def check_arguments(arguments):
    """Raise UserError if tools could not get this as arguments by name."""
    for name in read_table("arguments", arguments):
        check_name("arguments", name)
        if name in RESERVED_ARGUMENTS:
            raise UserError(f"arguments: {name!r} is the engine's own.", "Choose another name.")


def format_type(value):
    """Return the type of a value for a sentence: `a list`, `an int`."""
    kind = type(value).__name__
    return ("an " if kind[0].lower() in "aeiou" else "a ") + kind


# === 3 PLANNING =================================================================================
# Targets become a Plan, which is data: what runs, in which order, and why. Planning decides, the
# run does; what --plan shows is the very Plan that a run carries out. No input or output.

DEFAULT_STAGE = "full"


def make_plan(pipeline, targets=(), *, exclude=(), start_from=None, jobs=1, past=None,
              describe=None, redo=()):
    """Return the plan for some targets; without any, of the stage `full` or else of all tools.

    Without `past` nothing is known of earlier runs, and everything is to be run. `describe` tells
    how a tool runs, if there is something to tell. `redo` are tools that run, though they are
    cached, or done in the run that is resumed. Raise UserError for a word that is neither a
    stage nor a tool, if nothing is left to run, and if a tool needs one that is not in the plan
    and has no success that is fresh enough.
    """
    if not isinstance(start_from, (str, type(None))):
        raise UserError(f"start_from is {start_from!r}, not a name.",
                        'Give one stage or tool: start_from="fetch".')
    if not targets and DEFAULT_STAGE in pipeline.stages:
        targets = [DEFAULT_STAGE]
    reasons = {} if targets else dict.fromkeys(pipeline.tools, "in TOOL_MAP")
    for target in targets:
        for tool, reason in expand_reasons(pipeline, target).items():
            reasons.setdefault(tool, reason)
    if not reasons:
        raise UserError(f"There is nothing to run: {', '.join(targets)} has no tools.",
                        "Name a target that has some; --list shows them all.")
    order = sort_by_needs(reasons, find_needs_within(pipeline, reasons))
    excluded = frozenset(tool for name in exclude for tool in expand_reasons(pipeline, name))
    order = [tool for tool in begin_at(pipeline, order, start_from) if tool not in excluded]
    if not order:
        raise UserError("Nothing is left to run.", "Name a target that holds a tool, or take "
                        "something out of --exclude; --list shows them all.")
    tell_excluded(pipeline, order, excluded, reasons)
    if past:
        past = past._replace(excluded=excluded)
        check_needs_met(pipeline, order, past)
    needs = find_needs_within(pipeline, dict.fromkeys(order), excluded)
    redo, lost = dict.fromkeys(redo, "again, as --redo says"), True
    while lost:
        steps = make_steps(pipeline, needs, reasons, past, redo, describe)
        lost = find_lost_results(steps)
        redo.update(lost)
    expected_s = {step.tool: step.expected_s for step in steps}
    whole_s = None if None in expected_s.values() \
        else simulate(Schedule(steps, pipeline, jobs), expected_s, jobs)
    return Plan(tuple(steps), find_critical_path(steps), whole_s, jobs, excluded)


def tell_excluded(pipeline, order, excluded, reasons):
    """Add to the reason of each tool what it needs and goes on without."""
    for tool in order:
        needs = pipeline.needs[tool]
        without = [need for need in needs if needs != ALL_BEFORE and need in excluded]
        if without:
            are = "is" if len(without) == 1 else "are"
            reasons[tool] += f"; without {', '.join(without)}, which {are} excluded"


def check_needs_met(pipeline, order, past):
    """Raise UserError for each need outside the plan whose tool has no success fresh enough."""
    if past.is_forced:
        return
    planned, errors = {*order, *past.excluded}, []
    for tool in order:
        needs = pipeline.needs[tool]
        if needs == ALL_BEFORE or tool in past.done or pipeline.tools[tool].when == "always":
            continue
        missing = [f"{need}, which {why}" for need in needs if need not in planned
                   for why in [find_staleness(pipeline.tools[need], past)] if why]
        if missing:
            errors.append(UserError(
                f"{tool} needs what is not in this plan: {'; '.join(missing)}.",
                f"Run that too: +{tool} takes all that {tool} needs; or go on without: --force."))
    check_mistakes(errors)


def find_staleness(tool, past):
    """Return why the last success of a tool is not good enough for those that need it, or ""."""
    limit_s, success = tool.fresh_for_s, past.find_success(tool.name)
    if success is None:
        return "has never succeeded"
    if limit_s == float("inf"):
        return ""
    success = past.find_whole_success(tool.name)
    if success is None:
        return (f"has no success to be fresh for {format_duration(limit_s)}: other arguments, a "
                "backfill, a single item, and some of its items only, do not count")
    if is_young(success, limit_s, past.now):
        return ""
    return (f"succeeded {format_age(success, past.now)}, in run {success.run_id}, and is fresh "
            f"for {format_duration(limit_s)}")


def describe_age(tool, past):
    """Return in words when a tool is cached, and whether its last success is good enough for those
    that need it, and how long.
    """
    cache, fresh = 'never: TOOL_MAP does not say "cache" of it', find_staleness(tool, past)
    if past.has_items(tool):
        cache = "never, since it has items, of which each is done once"
    if tool.cache_s is not None:
        cache = "as long as nothing of it changes"
        if tool.cache_s < float("inf"):
            cache += f", for {format_duration(tool.cache_s)}"
    if not fresh and tool.fresh_for_s < float("inf"):
        left_s = past.find_whole_success(tool.name).ended_at + tool.fresh_for_s - past.now
        fresh = f"for {format_duration(left_s)} more"
    return {"cache": cache, "fresh": fresh}


def is_young(success, limit_s, now):
    """Return whether a success is not older than a limit; one in the future has no known age."""
    return limit_s == float("inf") or 0 <= now - success.ended_at <= limit_s


def format_age(success, now):
    """Return how long ago a success was, in words."""
    if now < success.ended_at:
        return "in the future, if the clock is right"
    return format_duration(now - success.ended_at) + " ago"


def decide(pipeline, tool, edges, redo, past):
    """Return what becomes of a tool, see Step; the success because of which it is, maybe, not run;
    and the reason.

    `edges` are the steps that it waits for; `redo` the tools that must run again, and why.
    """
    done = past.done.get(tool)
    is_cached = pipeline.tools[tool].cache_s and not past.is_forced
    success = done or (past.find_success(tool) if is_cached else None)
    if success is None or tool in redo:
        return "run", None, redo.get(tool, "")
    ran = [step.tool for step in edges if step.may_run()]
    again = [step.tool for step in edges if step.action == "run"
             and not past.has_items(pipeline.tools[step.tool])] if is_cached else ran
    if again:
        return "run", None, f"again, because {again[0]} will run"
    if done and not ran:
        return "skip", done, f"succeeded in run {done.run_id}"
    change = find_reason_to_run(pipeline.tools[tool], success, past)
    if change:
        return "run", None, change
    reason = f"unchanged since run {success.run_id}"
    if ran:
        return "maybe", success, f"{reason}, unless {ran[0]} does something new"
    return "cached", success, reason


def find_reason_to_run(tool, success, past):
    """Return why the success of a tool that is cached is none any more, or ""."""
    since = f"since run {success.run_id}"
    was, needed = (leave_out_works(works, past.excluded)
                   for works in (success.needed, past.find_needed_works(tool.name)))
    if not success.source:
        return f"what it was in run {success.run_id} is not recorded"
    if needed.keys() != was.keys():
        return f"its needs changed {since}"
    if needed != was:
        return f"what it needs has run {since}"
    if not is_young(success, tool.cache_s, past.now):
        return f"succeeded {format_age(success, past.now)}"
    change = past.find_change(tool, success)
    return change and f"{change} {since}"


def leave_out_works(works, excluded):
    """Return the works of needed tools, but for those that were left out on purpose."""
    return {tool: work for tool, work in works.items() if tool not in excluded}


def find_lost_results(steps):
    """Return the tools that must run again for their results, which are not kept, and why."""
    lost = {}
    waiting = {}  # need -> a tool that will run and waits for it
    in_line = ""  # a tool that will run and waits for all before it
    for step in reversed(steps):
        who = waiting.get(step.tool) or in_line
        if step.success and step.success.result is None and who:
            lost[step.tool] = f"{who} needs its result, {step.success.kind}, which is not kept"
        if step.may_run() or step.tool in lost:
            if step.needs == ALL_BEFORE:
                in_line = step.tool
            else:
                waiting.update(dict.fromkeys(step.needs, step.tool))
    return lost


def read_targets(where, value):
    """Return a list of names; a single text stands for a list of it, None for none."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    names = list(value) if is_list else [] if value is None else [value]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} is {value!r}, not a list of names.",
                        f'Give stages and tools: {where}=["fetch"].')
    return names


def make_steps(pipeline, needs_of, reasons, past, redo, describe):
    """Return the steps for tools, with what each needs, in an order that this allows.

    A tool that waits for all before it has edges to the last such tool, which waits for all before
    that, and to what came in between: so there are never many more edges than tools and needs.
    """
    steps = {}
    since = []  # the last tool that waits for all before it, and what came after it
    for tool, needs in needs_of.items():
        options = pipeline.tools[tool]
        edges = since if needs == ALL_BEFORE else [need for need in needs if need in steps]
        action, success, why = ("run", None, redo.get(tool, "")) if past is None else decide(
            pipeline, tool, [steps[each] for each in edges], redo, past)
        expected_s = 0.0 if action in ("cached", "skip") else (
            past and past.find_expected_s(tool)) or options.estimate_s
        reason = why if success else "; ".join(filter(None, [
            reasons[tool], why, describe and describe(options)]))
        wave = 1 + max((steps[each].wave for each in edges), default=0)
        steps[tool] = Step(tool, wave, action, reason, needs, tuple(edges), expected_s, success,
                           options.arguments)
        if needs == ALL_BEFORE:
            since = []
        since.append(tool)
    return list(steps.values())


def expand_reasons(pipeline, target):
    """Return the tools that a target means, with the reason why each is in the plan.

    `+tool` adds what the tool needs, directly or not, `tool+` what needs it; both follow needs
    that are declared or inferred.
    """
    name = target.removeprefix("+").removesuffix("+")
    tools = expand_target(pipeline, name)
    reasons = dict.fromkeys(tools, f"in stage {name}" if name in pipeline.stages else "named")
    if target == name:
        return reasons
    edges = {tool: () if needs == ALL_BEFORE else needs for tool, needs in pipeline.needs.items()}
    added = {}
    if target.startswith("+"):
        added.update(find_beyond(tools, edges, "needed by"))
    if target.endswith("+"):
        added.update(find_beyond(tools, invert(edges), "needs"))
    return {**reasons, **{tool: added[tool] for tool in pipeline.tools
                          if tool in added and tool not in reasons}}


def find_beyond(tools, edges, word):
    """Return all that edges lead to from some tools, each with the last of these as its reason."""
    found = {}
    for tool in reversed(tools):
        left = [tool]
        while left:
            new = [each for each in edges[left.pop()] if each not in found]
            found.update(dict.fromkeys(new, f"{word} {tool}"))
            left += new
    return found


def find_needs_within(pipeline, planned, excluded=frozenset()):
    """Return what each tool of a plan needs, but for what is excluded.

    Who reads or writes a name needs the last of its writers, which needs the one before. Where
    that last one is not in the plan, the one before takes its place, so that no two who use a name
    are ever at it at once.
    """
    tools, found = pipeline.tools, {}
    for tool in planned:
        found[tool] = pipeline.needs[tool]
        used = {*tools[tool].reads, *tools[tool].writes}
        if used:
            needs = list(found[tool])
            for need in needs:  # which grows
                if need not in planned and used.intersection(tools[need].writes):
                    needs += [each for each in pipeline.needs[need] if each not in needs
                              and used.intersection(tools[each].writes)]
            found[tool] = tuple(needs)
        if excluded and found[tool] != ALL_BEFORE:
            found[tool] = tuple(need for need in found[tool] if need not in excluded)
    return found


def sort_by_needs(reasons, needs):
    """Return the tools with each after what it needs, otherwise in the order given.

    A tool that had to move forward gets that added to its reason.
    """
    position = {tool: i for i, tool in enumerate(reasons)}
    order, _ = walk({
        tool: () if needs[tool] == ALL_BEFORE else sorted(
            (need for need in needs[tool] if need in position), key=position.__getitem__)
        for tool in reasons})
    for tool, after in order.items():
        if after is not None and not reasons[tool].startswith("needed by"):
            reasons[tool] += f"; moved before {after}, which needs it"
    return list(order)


def find_critical_path(steps):
    """Return the chain of tools, each waiting for the one before it, that takes longest."""
    ways_s, after = find_ways_s(steps), invert({step.tool: step.edges for step in steps})
    path, following = [], ways_s
    while following:
        path.append(max(following, key=ways_s.__getitem__))
        following = after[path[-1]]
    return tuple(path)


def find_ways_s(steps):
    """Return for each tool the seconds from its start to the end, on the longest way there.

    A tool of which nothing is known is taken to need as long as the others in the mean.
    """
    known = [step.expected_s for step in steps if step.expected_s is not None]
    mean_s = sum(known) / len(known) if known else 1.0
    durations_s = {step.tool: mean_s if step.expected_s is None else step.expected_s
                   for step in steps}
    way_s = dict(durations_s)
    for step in reversed(steps):
        for each in step.edges:
            way_s[each] = max(way_s[each], durations_s[each] + way_s[step.tool])
    return way_s


class Schedule:
    """Which tool of a plan may start next: the longest way to the end first, within the limits;
    with one job, which no order makes faster, the plan's own order.

    As in graphlib: `done(tool)` tells that a tool is settled and returns those that wait for
    nothing any more; `add(tool)` makes one of them ready; `next()` takes the best ready tool
    for which there is room, and `release(tool)` gives that room back.

    State: `waiting`, which knows what is not settled; `ready`, a heap for each set of uses, since
    those with the same uses have room together; `free`, what is left of the limits.
    """

    def __init__(self, steps, pipeline, jobs=2):
        from graphlib import TopologicalSorter
        self.tools = pipeline.tools
        self.position = {step.tool: i for i, step in enumerate(steps)}
        self.ways_s = find_ways_s(steps) if jobs > 1 else {}
        edges = {step.tool: step.edges for step in steps}
        self.after = invert(edges)
        self.waiting = TopologicalSorter(edges)
        self.waiting.prepare()
        self.ready = {}
        self.free = dict(pipeline.limits)

    def begin(self):
        """Return the tools that wait for nothing from the start."""
        return list(self.waiting.get_ready())

    def done(self, tool):
        """Note a tool as settled and return those that wait for nothing any more."""
        self.waiting.done(tool)
        return list(self.waiting.get_ready())

    def add(self, tool):
        """Make a tool ready."""
        heap = self.ready.setdefault(self.tools[tool].uses, [])
        heappush(heap, (-self.ways_s.get(tool, 0.0), self.position[tool], tool))

    def next(self):
        """Take the best ready tool for which there is room, and its room; None if there is none."""
        for heap in sorted(filter(None, self.ready.values())):  # the heap of the best one first
            tool = heap[0][-1]
            if self.take(tool):
                heappop(heap)
                return tool
        return None

    def take(self, tool):
        """Take room for one more worker of a tool that runs; return False if there is none."""
        uses = self.tools[tool].uses
        if any(units > self.free[resource] for resource, units in uses):
            return False
        for resource, units in uses:
            self.free[resource] -= units
        return True

    def release(self, tool):
        """Give back the room that a tool took."""
        for resource, units in self.tools[tool].uses:
            self.free[resource] += units

    def take_all(self):
        """Return the ready tools, in the plan's order, which are then ready no more."""
        tools = [tool for heap in self.ready.values() for *_, tool in heap]
        self.ready.clear()
        return sorted(tools, key=self.position.__getitem__)


def simulate(schedule, durations_s, jobs):
    """Return the seconds that a plan takes if every tool takes what is expected of it."""
    from itertools import islice
    now_s, running = 0.0, []  # type: float, List[Tuple[float, str]]
    freed = schedule.begin()
    while True:
        for tool in freed:
            schedule.add(tool)
        for tool in islice(iter(schedule.next, None), jobs - len(running)):
            heappush(running, (now_s + durations_s[tool], tool))
        if not running:
            return now_s
        now_s, tool = heappop(running)
        schedule.release(tool)
        freed = schedule.done(tool)


class Period(NamedTuple):
    """A period of a backfill: from a day to the day after its last one, both as `2024-01-31`.

    `action` is run, resume or skip; `run_id` that of the last run of it, if there was one.
    """
    start: str
    end: str
    action: str = "run"
    reason: str = "never run"
    run_id: Optional[int] = None

    def arguments(self):
        """Return what tools get of it by name."""
        return dict(zip(PERIOD_ARGUMENTS, (self.start, self.end)))


PERIOD_ARGUMENTS = ("period_start", "period_end")


def has_period(arguments):
    """Return whether a run with these arguments is one of a backfill."""
    return any(arguments.get(name) is not None for name in PERIOD_ARGUMENTS)


def find_day(at):
    """Return the day of a moment, in local time, as `2024-01-31`.

    To ask for the day of a moment, and not for the moment at which a day ends, is right also where
    clocks are changed at midnight, and that day has none, or two.
    """
    return time.strftime("%Y-%m-%d", time.localtime(at))


def make_periods(span, step):
    """Return the periods of a span of days, `2024-01-01..2024-03-31`, both of which belong to it.

    Weeks begin where the span does, months on their first day. Raise UserError if it is no span.
    """
    from datetime import date, timedelta
    try:
        first, last = map(date.fromisoformat, span.partition("..")[::2])
        last + timedelta(31)  # the calendar ends with the year 9999
    except (ValueError, OverflowError) as error:
        raise UserError(f"--backfill: {span!r} is no span of days ({error}).",
                        "Write it like 2024-01-01..2024-03-31.") from None
    if last < first:
        raise UserError(f"--backfill: {span!r} ends before it begins.", f"Write {last}..{first}; "
                        "--reverse begins with the last period.")
    periods, end = [], last + timedelta(1)
    while first < end:
        after = first + timedelta(7 if step == "week" else 1)
        if step == "month":
            after = (first.replace(day=1) + timedelta(31)).replace(day=1)
        periods.append(Period(str(first), str(min(after, end))))
        first = after
    return periods


def check_begun(span, periods, today):
    """Raise UserError if some of the periods of a span have not begun, naming its last good day."""
    from datetime import date, timedelta
    begun = [period for period in periods if period.start <= today]
    if begun == periods:
        return
    last = str(date.fromisoformat(begun[-1].end) - timedelta(1)) if begun else today
    future = periods[len(begun)]
    raise UserError(f"--backfill: {span!r} reaches into the future: the period from {future.start} "
                    f"to {future.end} has not begun.",
                    (f"Write {begun[0].start}..{last}. " if begun else "")
                    + f"The last day that can be given is {last}; days end in local time.")


def decide_period(period, last, reprocess, today):
    """Return a period with what is to be done of it, by the last run of it and --reprocess.

    `last` is the id of that run, its status, and when it began, or the first of those that it goes
    on with. What began before the period was over may have missed the rest: then it is not done,
    and what is done of it is no use to a resume.
    """
    action, reason, run_id = period.action, period.reason, None
    if last is not None:
        run_id, status, began_at = last
        how = {"success": "done", "failed": "failed"}.get(status, "interrupted")
        is_early = find_day(began_at) < period.end
        reason = f"{how} in run {run_id}"
        if reprocess == "all":
            action = "run"
            reason = "again, " * (how == "done") + reason
        elif how == "failed" and not reprocess:
            action = "skip"
            reason += "; see --reprocess"
        elif not is_early:
            action = "skip" if how == "done" else "resume"
        if is_early and action == "run":
            reason += ", which ran before the period was over"
    if action != "skip" and today < period.end:
        reason += "; it is not over yet"
    return period._replace(action=action, reason=reason, run_id=run_id)


def begin_at(pipeline, order, start_from):
    """Return the tools that --from leaves, in order."""
    if start_from is None:
        return order
    first = set(expand_target(pipeline, start_from))
    starts = [i for i, tool in enumerate(order) if tool in first]
    if not starts:
        raise UserError(f"--from: {start_from!r} is not in this plan.",
                        format_nearest(start_from, order))
    return order[starts[0]:]


def expand_target(pipeline, name):
    """Return the tools that a word means. Raise UserError if it means none."""
    if name in pipeline.stages:
        return pipeline.stages[name].tools
    if name in pipeline.tools:
        return (name,)
    raise UserError(f"There is no tool or stage {name!r}.",
                    format_nearest(name, [*pipeline.tools, *pipeline.stages]))


# === 4 HISTORY ==================================================================================
# All that lives in .orchestrator/NAME/: history.db, plain SQLite with the schema below; logs/, a
# file for each attempt that printed something; and lock, which keeps two runs apart. Every change
# of a status is committed before the next thing happens. What is read from there is data: nothing
# of it is unpickled or evaluated. It never touches other people's databases.

SCHEMA_VERSION = 6
APPLICATION_ID = 0x6F726368  # "orch" in the header of the file says whose it is

VIEWS = """
-- How each tool ended last, as --status and --list show it, and when it was called last, with which
-- items; of a cached one, that is its success. A look-up for each tool, however many attempts there
-- are.
CREATE VIEW last_attempts AS
    WITH RECURSIVE names (tool) AS (
        SELECT min(tool) FROM attempts
        UNION ALL
        SELECT (SELECT min(tool) FROM attempts WHERE tool > names.tool) FROM names
        WHERE tool IS NOT NULL)
    SELECT a.*, c.started_at AS called_at, c.items AS called_items
    FROM names
    CROSS JOIN attempts a ON a.attempt_id =
        (SELECT max(attempt_id) FROM attempts WHERE tool = names.tool)
    LEFT JOIN attempts c ON c.attempt_id = CASE
        WHEN a.attempt > 0 THEN a.attempt_id
        WHEN a.status = 'cached' THEN a.work
        ELSE (SELECT max(attempt_id) FROM attempts WHERE tool = names.tool AND attempt > 0) END;
-- The attempts of each run, as --history and --logs show them: in the order in which they began.
CREATE VIEW attempts_of_runs AS
    SELECT r.run_id AS of_run, a.*
    FROM runs r CROSS JOIN attempts a ON a.run_id = r.run_id AND a.attempt_id >= r.first_attempt
        AND a.attempt_id < coalesce((SELECT next.first_attempt FROM runs next
            WHERE next.run_id > r.run_id ORDER BY next.run_id LIMIT 1), 9e18);
-- The attempts that ended well, with the success that stood by then, a cached one's being another
-- attempt's, and the work that this did, or rested on.
CREATE VIEW successes AS
    SELECT a.attempt_id, a.run_id AS of_run, a.status, a.tool, w.attempt_id AS success_id, w.work,
           CAST(w.run_id AS TEXT) AS run_id, w.started_at,
           w.started_at + coalesce(w.duration_s, 0.0) AS ended_at, w.rows, w.result,
           coalesce(w.kind, '') AS kind, r.item, r.arguments, coalesce(w.source, '') AS source,
           coalesce(w.inputs, '') AS inputs, coalesce(w.needed, '{}') AS needed
    FROM attempts a CROSS JOIN attempts w ON w.tool = a.tool AND w.attempt_id =
                        CASE WHEN a.attempt > 0 THEN a.attempt_id ELSE a.work END
                    CROSS JOIN runs r ON r.run_id = w.run_id
    WHERE a.status IN ('success', 'partial', 'cached');
-- The runs that --prune keeps, however old: the newest, and those that hold the last success of a
-- tool, also the last that is of no backfill and of no single item, which is what tools and
-- `fresh_for` look at.
CREATE VIEW kept_runs AS
    SELECT max(run_id) AS run_id FROM runs
    UNION
    SELECT run_id FROM attempts WHERE attempt_id IN (
        SELECT max(work) FROM attempts GROUP BY tool
        UNION
        SELECT max(attempt_id) FROM attempts JOIN runs USING (run_id)
        WHERE attempts.status = 'success' AND item IS NULL
            AND arguments NOT LIKE '%"period_start": "%' GROUP BY tool);
"""
SCHEMA = """
-- A run is one execution of a plan. The attempts of a run have ids without a gap from
-- first_attempt on, because there is one run at a time.
CREATE TABLE runs (
    run_id        INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given again, not even after --prune
    status        TEXT NOT NULL,     -- running, success, failed, interrupted
    resumes       INTEGER,           -- the run that this one goes on with; NULL if it began anew
    targets       TEXT NOT NULL,     -- JSON list of stages and tools; [] means the default
    exclude       TEXT NOT NULL,     -- JSON list
    start_from    TEXT,              -- what --from said; NULL if it was not given
    item          TEXT,              -- what --item said; NULL if it was not given; '' for one of
                                     -- before version 3, of which `words` tell
    arguments     TEXT NOT NULL,     -- JSON object: what tools got by name; {"repr": ...} for
                                     -- what JSON can not say
    words         TEXT,              -- JSON list: the command line; NULL for a run from Python
    planned       INTEGER NOT NULL,  -- how many tools its plan had
    started_at    REAL NOT NULL,     -- seconds since 1970, UTC
    duration_s    REAL,              -- by a clock that is never set; NULL if it was killed
    pid           INTEGER NOT NULL,  -- of the orchestrator
    first_attempt INTEGER NOT NULL,  -- attempt_id of the first attempt, if there is any
    version       TEXT NOT NULL,     -- of orchestrator.py
    git_commit    TEXT,              -- of the repository around it; NULL where there is none
    tables        TEXT NOT NULL,     -- fingerprint of TOOL_MAP, STAGES and LIMITS
    sources       TEXT NOT NULL,     -- JSON object: module -> fingerprint of its file
    edges         TEXT               -- JSON object: tool of the plan, in its order -> list of those
                                     -- before it that it waits for; NULL before version 6
);
-- An attempt is one try of one tool in a run; or, with attempt 0, why there was none.
CREATE TABLE attempts (
    attempt_id    INTEGER PRIMARY KEY,
    run_id        INTEGER NOT NULL REFERENCES runs,
    tool          TEXT NOT NULL,
    attempt       INTEGER NOT NULL,  -- 1, 2, ...; 0 for a tool that was cached or skipped
    status        TEXT NOT NULL,     -- running, success, partial, cached, failed, skipped,
                                     -- interrupted
    reason        TEXT NOT NULL DEFAULT '',
    started_at    REAL NOT NULL,     -- seconds since 1970, UTC
    duration_s    REAL,              -- by a clock that is never set; NULL if it never ended
    pid           INTEGER,           -- of the process that ran it
    work          INTEGER,           -- success, partial: its own attempt_id, or of a tool whose
                                     -- items have not changed, its work before; cached: the
                                     -- attempt_id of the success that still stands; else NULL
    rows          INTEGER,           -- NULL if the tool did not say
    result        TEXT,              -- JSON of what it returned; NULL if JSON can not say that
    kind          TEXT,              -- type of such a result: 'a DataFrame'; else NULL
    error         TEXT,              -- one line; NULL if there was none
    traceback     TEXT,
    log           TEXT,              -- file, seen from this folder; NULL if nothing was printed
    source        TEXT,              -- cached tools: JSON, what ran: see describe_source()
    inputs        TEXT,              -- cached tools: JSON, the files that they read and write
    needed        TEXT,              -- cached tools: JSON object, needed tool -> its work then
    items         TEXT,              -- JSON object, counts of its items: see Outcome; NULL for a
                                     -- tool without items
    given         TEXT,              -- JSON object, the arguments of the tool's own; NULL if it
                                     -- has none
    failures      TEXT               -- JSON object: item -> error, the first that failed; NULL
                                     -- where none did, and before version 6
);
CREATE INDEX attempts_of_tool ON attempts (tool);
CREATE INDEX notable_attempts ON attempts (tool) WHERE duration_s > 1 OR rows > 10;
""" + VIEWS
UPGRADES = {  # schema version -> the statements that lead to the next one
    1: "ALTER TABLE attempts ADD COLUMN items TEXT;",
    2: """
ALTER TABLE runs ADD COLUMN item TEXT;
UPDATE runs SET item = '' WHERE words LIKE '%"-' || '-item"%' OR words LIKE '%"-' || '-item=%';
""",  # two hyphens side by side would begin a comment
    3: "",
    4: "".join(f"DROP VIEW IF EXISTS {name};" for name in re.findall(r"VIEW (\w+) AS", VIEWS))
       + VIEWS,
    5: """
ALTER TABLE attempts ADD COLUMN given TEXT;
ALTER TABLE runs ADD COLUMN edges TEXT;
ALTER TABLE attempts ADD COLUMN failures TEXT;
CREATE INDEX notable_attempts ON attempts (tool) WHERE duration_s > 1 OR rows > 10;
""",
}

_TYPES = {"INTEGER": int, "REAL": float, "TEXT": str}
# What JSON in a column is like: each part of a list like the one part here, each of an object like
# the one of its name, which has to be there, or else like that named "".
_LIKE = {"targets": [""], "exclude": [""], "words": [""], "arguments": {}, "said": {}, "given": {},
         "sources": {}, "called": {"": 0}, "source": {"calls": "", "source": "", "options": {}},
         "inputs": {"reads": {"": []}, "": [""]}, "needed": {"": 0}, "edges": {"": [""]},
         "items": {"": 0}, "failures": {"": ""}}
_FAR_S = 2.5e11  # later moments have no date

RESULT_CAP_BYTES = 2**20  # a longer result is not kept
LOG_CAP_BYTES = 10 * 2**20  # a longer log keeps its beginning and its end
WORKERS_END_S = 5.0  # workers of a killed run are gone by then
LOOK_S = 0.3  # and somebody who only looks whether a run goes on has let go of the lock


class Request(NamedTuple):
    """What was asked for, as a run records it, so that a resume can ask for the same."""
    targets: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    start_from: Optional[str] = None
    words: Optional[Tuple[str, ...]] = None
    resumes: Optional[int] = None
    item: Optional[str] = None


def find_pipeline_folder(home, name):
    """Return the folder of a pipeline in a home folder."""
    return os.path.join(os.path.abspath(home), make_file_name(name))


def make_file_name(name):
    """Return a name that every file system takes, and that no other name comes to.

    >>> make_file_name("daily"), make_file_name("a/b")
    ('daily', 'a_b-07f4401c')
    """
    if name.isidentifier() and name.isascii() and len(name) <= 80:
        return name
    from zlib import crc32
    safe = re.sub(r"[^\w.-]", "_", name)[:80].lstrip(".")
    safe = safe.encode()[:200].decode(errors="ignore")  # most file systems take 255 bytes
    return safe if safe == name else f"{safe}-{crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def make_folder(folder):
    """Create the folder of a pipeline, and its home, for their owner alone, where they are not."""
    home = os.path.dirname(folder)
    try:
        if not os.path.isdir(home):
            append_line(os.path.join(home, ".gitignore"), "*")
        os.makedirs(os.path.join(folder, "logs"), 0o700, exist_ok=True)
        os.chmod(folder, 0o700)
    except OSError as error:
        raise refused(folder, error) from error


def open_private(path, how=os.O_WRONLY | os.O_APPEND):
    """Return a file, opened to append to it, which only its owner can read. It is made, in its
    folder, where they are not.
    """
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return os.open(path, how | os.O_CREAT, 0o600)


def append_line(path, line):
    """Add a line to a file that only its owner can read."""
    with open(open_private(path), "ab") as file:
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")


# How the errors begin that SQLite has for a file that is whole (sqlite3ErrStr() of its source).
_OF_PLACE = ("database (table )?is locked|locking|unable to|attempt to|disk I/O|database or disk|"
             "out of memory|access|authorization|interrupted")


def refused(path, error):
    """Return the sentence for a folder or file of the history that can not be used: for want of
    rights or room, or else because it is damaged.
    """
    text, *_ = (getattr(error, "strerror", None) or str(error)).split(" with text ")
    text = " ".join(text.split())
    if not isinstance(error, OSError) and not re.match(_OF_PLACE, text):
        return UserError(f"{path} is damaged: {text}.",
                         "Nothing was changed in it. Move it away to begin a new history, or run "
                         "without one: --no-history.")
    return UserError(f"The history can not be used, {path}: {text}.",
                     "Mend that, choose another folder in the environment variable "
                     "ORCHESTRATOR_HOME, or run without history: --no-history.")


# Lock files that this very process holds, and by which Lock of it, since the kernel only keeps
# processes apart. A program has this module twice if a tool of it imports it by its name.
_held = vars(sys).setdefault("_orchestrator_held", {})
_PID_BYTES = 20  # of its id, from byte 1 on
_WORKER_BYTES = 2**30  # byte 0 of the lock file is the run's, these many after it the workers'


class Lock:
    """Keeps runs of one pipeline apart, by locks on bytes of a file, which the kernel frees.

    Byte 0 belongs to the run, one byte after it to each worker. So the lock of a run that was
    killed is free when the last of its workers is gone. No other code of this process may open
    the file: to close it would free the locks (fcntl(2)).

    State: `pid`, the id of the process that signed it last, 0 if none did.
    """

    def __init__(self, folder):
        self.path = os.path.realpath(os.path.join(folder, "lock"))
        self.fd, self.pid = None, 0

    def take(self):
        """Take the lock and return ""; or who has it, "run" or "worker"."""
        if _held.setdefault(self.path, self) is not self:  # which no other thread can tear
            self.pid = os.getpid()
            return "run"
        holder = "run"
        try:
            self.fd = open_lock(self.path)
            if lock_bytes(self.fd, 0, 1):
                holder = "worker"
                if lock_bytes(self.fd, 1, _WORKER_BYTES):
                    lock_bytes(self.fd, 1, _WORKER_BYTES, free=True)
                    holder = ""
            os.lseek(self.fd, 1, os.SEEK_SET)  # on Windows nobody else can read byte 0
            self.pid = int(b"0" + os.read(self.fd, _PID_BYTES).strip())
        finally:
            if holder:
                self.release()
        return holder

    def sign(self):
        """Let those who find it taken know by whom."""
        with contextlib.suppress(OSError):  # the disk is full
            os.lseek(self.fd, 0, os.SEEK_SET)
            os.write(self.fd, b" %d" % os.getpid() + b" " * _PID_BYTES)

    def release(self):
        """Give the lock back."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if _held.get(self.path) is self:
            del _held[self.path]


def open_lock(path):
    """Return the lock file, opened."""
    try:
        return open_private(path, os.O_RDWR)
    except OSError as error:
        raise refused(path, error) from error


def lock_bytes(fd, first, count, free=False):
    """Lock bytes of a file, or free them; return False if another process has one of them."""
    try:
        if IS_WINDOWS:
            import msvcrt
            os.lseek(fd, first, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_UNLCK if free else msvcrt.LK_NBLCK, count)
        else:
            import fcntl
            fcntl.lockf(fd, fcntl.LOCK_UN if free else fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except OSError:
        return False
    return True


def hold_worker_byte(folder):
    """Let the run's lock not be free while this process lives. Runs in a worker."""
    lock_bytes(open_lock(os.path.join(folder, "lock")), 1 + os.getpid() % _WORKER_BYTES, 1)


MEMORY = ":memory:"  # the path of a history that is not kept, for SQLite
_SETTINGS = """
    PRAGMA synchronous = NORMAL;
    PRAGMA wal_autocheckpoint = 4000;
    PRAGMA page_size = 1024;  -- of a new file: a commit writes whole pages
"""
_HEAD = f"""
    SELECT user_version AS version, page_count * page_size AS size,
           application_id <> {APPLICATION_ID} AND (application_id OR user_version
               OR (SELECT count(*) FROM sqlite_master)) AS is_foreign
    FROM pragma_user_version, pragma_application_id, pragma_page_count, pragma_page_size
"""  # noqa: S608 - a number of our own


def open_database(path):
    """Return a connection to a history, created or upgraded if need be.

    Raise UserError if the file is somebody else's or of a newer engine, sqlite3.Error or OSError
    if it is damaged or can not be read.
    """
    import sqlite3
    # Once it is there, nobody but SQLite opens it: to close it here would free the locks of
    # another connection of this process (https://sqlite.org/howtocorrupt.html, 2.2).
    if path != MEMORY and not os.path.exists(path):
        os.close(open_private(path))
    db = sqlite3.connect(path, timeout=30.0, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.executescript(_SETTINGS)
    version, size, is_foreign = db.execute(_HEAD).fetchone()
    # SQLite takes the missing end of a file for pages of zeros; with a log of changes beside it
    # (`-wal`) it may well be shorter.
    if size and not has_bytes(path + "-wal") and size > os.path.getsize(path):
        raise sqlite3.DatabaseError("it is malformed, its end is missing")
    if is_foreign:
        raise UserError(f"{path} is a database of something else.",
                        "Move it away, or choose another folder in ORCHESTRATOR_HOME.")
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, and this engine, {VERSION}, knows "
                        f"{SCHEMA_VERSION}.", "Use the newer orchestrator.py that wrote it.")
    if version < SCHEMA_VERSION:
        use_wal(db)
        upgrade(db, 0 if path == MEMORY else find_last_log(os.path.dirname(path)))
    return db


def use_wal(db):
    """Let nobody who reads a history wait for who writes to it."""
    import sqlite3
    for _ in range(50):  # then another has long done so
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = WAL")
            return
        db.execute("BEGIN IMMEDIATE")  # waits for another who is at it, which the above does not
        db.execute("COMMIT")


def upgrade(db, last_id):
    """Bring a history to the schema of this engine, or create it, in one transaction. In a new one
    runs have ids after the last: there are logs of those before, though nothing else.
    """
    db.execute("BEGIN IMMEDIATE")
    version = db.execute("PRAGMA user_version").fetchone()[0]  # another start may have been first
    steps = [UPGRADES[each] for each in range(version, SCHEMA_VERSION)] if version else [SCHEMA]
    if not version:
        steps.append(f"INSERT INTO sqlite_sequence VALUES ('runs', {last_id});")  # noqa: S608
    steps.append(f"PRAGMA user_version = {SCHEMA_VERSION}; "
                 f"PRAGMA application_id = {APPLICATION_ID}")
    for statement in re.sub(r"--.*", "", "".join(steps)).split(";"):
        db.execute(statement)
    db.execute("COMMIT")


_SUCCESSES = """
    SELECT tool, success_id, work, run_id, started_at, ended_at, rows, result, kind, arguments,
           CASE WHEN source LIKE '{%' THEN source ELSE '{}' END AS source,
           coalesce(nullif(inputs, ''), '{}') AS inputs, needed,
           arguments AS said, result AS returned
    FROM successes
"""
_LAST_RESUME = """
    WITH RECURSIVE chain (run_id) AS (  -- a run, and each time the last that goes on with it
        SELECT ? UNION ALL
        SELECT (SELECT max(run_id) FROM runs WHERE resumes = chain.run_id
                AND run_id > chain.run_id) FROM chain
        WHERE run_id IS NOT NULL)
    SELECT max(run_id) FROM chain
"""
_STARTED = """
    WITH RECURSIVE chain (run_id) AS (  -- a run, and those that it goes on with
        SELECT ? UNION
        SELECT r.resumes FROM runs r JOIN chain USING (run_id) WHERE r.resumes IS NOT NULL)
    SELECT coalesce((SELECT started_at FROM attempts WHERE tool = ? AND attempt > 0
                     AND run_id IN chain ORDER BY attempt_id DESC LIMIT 1),
                    (SELECT min(started_at) FROM runs WHERE run_id IN chain)) AS started_at
"""


_UNUSUAL = """
    -- The successes among some attempts that could be unusual, see find_unusual(): with the last of
    -- their tool they differ by over a second or ten rows. It is quick where no attempt of a tool
    -- ever was long or large.
    SELECT tool, attempt_id, duration_s, rows FROM {} a
    WHERE status = 'success' AND attempt > 0 AND EXISTS (
        SELECT 1 FROM attempts f WHERE f.tool = a.tool AND (f.duration_s > 1 OR f.rows > 10))
    AND (SELECT max(max(duration_s), a.duration_s) - min(min(duration_s), a.duration_s) > 1
             OR max(max(rows), a.rows) - min(min(rows), a.rows) > 10
         FROM (SELECT duration_s, rows FROM attempts WHERE tool = a.tool AND status = 'success'
               AND attempt > 0 AND attempt_id < a.attempt_id ORDER BY attempt_id DESC LIMIT 20))
"""


@functools.lru_cache(maxsize=None)
def find_types():
    """Return the types that the values of each column of SCHEMA may have, by its name."""
    types = {}
    for name, kind, never in re.findall(r"^ +(\w+) +(INTEGER|REAL|TEXT)( NOT NULL)?", SCHEMA, re.M):
        types[name] = (_TYPES[kind], *[type(None)] * (not never))
    types["called_at"] = types["duration_s"]
    del types["run_id"]  # which some views have as text
    return types


class Row(dict):
    """A row of the history in the file `path`, by column; of which a damaged schema lacks some."""

    def __missing__(self, name):
        raise refused(self.path, ValueError(f"it has no column {name}"))


def check_row(row, columns):
    """Read the JSON in some columns of a row. Raise ValueError for what is none of the schema: the
    file may be damaged, or somebody else has written to it.
    """
    import json
    types = find_types()
    for name, value in row.items():
        if name in types and (type(value) not in types[name]
                              or type(value) is float and abs(value) > _FAR_S):
            raise ValueError(f"a value of {name} is malformed")
    for name in columns:
        if row[name] is not None:
            row[name] = json.loads(row[name])
            if not is_like(row[name], _LIKE.get(name)):
                raise ValueError(f"a value of {name} is malformed")


def is_like(value, like):
    """Return whether what JSON says is like something, see _LIKE; anything is like None."""
    if like is None or type(value) is not type(like):
        return like is None
    if isinstance(like, dict):
        return all(is_like(value[name], like.get(name, like.get(""))) for name in value) \
            and (not value or like.keys() - {""} <= value.keys())
    return not isinstance(like, list) or all(
        is_like(each, part) for each in value for part in like)


class Store:
    """What a history is kept in: a database in its folder, opened at the first use; or without a
    folder in memory, an empty one in which nothing is recorded.
    """

    def __init__(self, folder):
        self.folder = folder
        self.path = os.path.join(folder, "history.db") if folder else MEMORY
        self.killed = None  # the run that reads as interrupted, until the next start records that
        self._cursor = None  # one for all: to make one each time costs time

    def do(self, sql, values=()):
        """Execute a statement and return its rows. Raise UserError if the file does not take it."""
        import sqlite3
        try:
            if not self._cursor:
                self._cursor = open_database(self.path).cursor()
            return self._cursor.execute(sql, values).fetchall()
        except (sqlite3.Error, OSError, UnicodeDecodeError, OverflowError) as error:
            raise refused(self.path, error) from error

    def load(self, sql, *values, json=""):
        """Return the rows of a query, as dicts by column, those read that hold `json`. Raise
        UserError if what stands there can not have been written by us.
        """
        rows = list(map(Row, self.do(sql, values)))
        for row in rows:
            row.path = self.path
            try:
                check_row(row, json.split())
            except (ValueError, RecursionError) as error:
                raise refused(self.path, error) from error
            if self.killed and row.get("status") == "running":  # there is one run at a time
                row["status"] = "interrupted"
        return rows

    def ask(self, sql, *values):
        """Return the first value of a query; None if there is no row."""
        rows = self.load(sql, *values)
        return next(iter(rows[0].values())) if rows else None

    def change(self, sql, values=()):
        """Execute a statement that commit() makes durable, and return the id of a row that it made.
        In memory nothing is recorded: it would cost time, and nobody can ask for it later.
        """
        if not self.folder:
            return 0
        self.do(sql, values)  # before which sqlite3 itself begins
        return self._cursor.lastrowid

    def commit(self):
        """Make durable what was recorded."""
        if self._cursor and self._cursor.connection.in_transaction:
            self.do("COMMIT")

    def close(self):
        """Let go of the file; the next use opens it again."""
        if self._cursor:
            self._cursor.connection.close()
            self._cursor = None

    # --- what views ask ---

    def hold_still(self):
        """Let all that is read from now on tell of one moment."""
        self.do("BEGIN")

    def load_runs(self, which, *values):
        """Return rows of `runs`, with what is JSON in them read."""
        return self.load(f"SELECT * FROM runs {which}", *values,  # noqa: S608 - text of our own
                         json="targets exclude arguments words sources")

    def load_last_runs(self, count):
        """Return the rows of the last runs, the newest first."""
        return self.load_runs("ORDER BY run_id DESC LIMIT ?", count)

    def find_run(self, run_id):
        """Return a row of `runs`. Raise UserError if there is none with that id."""
        runs = self.load_runs("WHERE run_id = ?", run_id) if str(run_id).isascii() else []
        if not runs:
            newest = self.ask("SELECT max(run_id) FROM runs")
            raise UserError(f"There is no run {run_id!r}.",
                            f"The last run is {newest}; --history shows which there are."
                            if newest else "Nothing has been run yet.")
        return runs[0]

    def find_running(self):
        """Return the row of the run that is not recorded as ended: it goes on, or was killed."""
        # nothing begins before the run before it is closed
        return next(iter(self.load_runs(
            "WHERE status = 'running' AND run_id = (SELECT max(run_id) FROM runs)")), None)

    def find_resumable(self, run_id):
        """Return the run that a resume goes on with: the last of the runs that resumed it.

        Without an id, of the last run that did not succeed. Raise Settled if there is nothing
        to resume.
        """
        if run_id is None:
            run_id = self.ask("SELECT max(run_id) FROM runs WHERE status <> 'success'")
            if run_id is None:
                raise Settled("There is nothing to resume: no run failed or was interrupted.")
        run_id = self.ask(_LAST_RESUME, self.find_run(run_id)["run_id"])
        good = self.ask(
            "SELECT a.run_id FROM runs a, runs b WHERE b.run_id = ? AND a.run_id >= b.run_id "
            "AND a.status = 'success' AND a.targets = b.targets AND a.exclude = b.exclude "
            "AND a.start_from IS b.start_from AND a.item IS b.item "
            "AND a.arguments = b.arguments LIMIT 1", run_id)
        if good:
            raise Settled(f"There is nothing to resume: run {good} did all of "
                          f"{'it' if good == run_id else f'run {run_id}'}.")
        return self.find_run(run_id)

    def load_last_like(self, request):
        """Return, by arguments as they are recorded, the last run with each of the same targets
        and item.
        """
        row = make_columns(request._asdict())
        return {row["arguments"]: row for row in self.load(
            "SELECT max(run_id) AS run_id, status, arguments FROM runs WHERE targets = ? "
            "AND exclude = ? AND start_from IS ? AND item IS ? GROUP BY arguments",
            row["targets"], row["exclude"], row["start_from"], row["item"])}

    def load_attempts(self, run_id, json=""):
        """Return the rows of `attempts` of a run, in the order in which they began, those of their
        columns read that hold `json`.
        """
        return self.load("SELECT * FROM attempts_of_runs WHERE of_run = ? ORDER BY attempt_id",
                         run_id, json=f"given {json}")

    def load_edges(self, run_id):
        """Return by tool, in the order of a run's plan, which of those before it each waited for;
        None where an older engine did not record that.
        """
        row, = self.load("SELECT edges FROM runs WHERE run_id = ?", run_id, json="edges")
        edges = row["edges"]
        if edges:
            place = {tool: i for i, tool in enumerate(edges)}
            edges = {tool: [each for each in before if place.get(each, len(place)) < place[tool]]
                     for tool, before in edges.items()}
        return edges

    def load_former(self, tool, attempt_id):
        """Return figures of the last 20 successes of a tool before an attempt, the newest first."""
        return self.load("SELECT run_id, duration_s, rows FROM attempts WHERE tool = ? "
                         "AND attempt_id < ? AND status = 'success' AND attempt > 0 "
                         "ORDER BY attempt_id DESC LIMIT 20", tool, attempt_id)

    def find_unusual(self, run_id=None):
        """Return in words what is unusual of the tools that succeeded in a run; without one, in
        their last attempt.
        """
        rows = self.load(_UNUSUAL.format("last_attempts")) if run_id is None else self.load(
            _UNUSUAL.format("attempts_of_runs") + "AND of_run = ?", run_id)
        found = {row["tool"]: find_unusual(row, self.load_former(row["tool"], row["attempt_id"]))
                 for row in rows}
        return {tool: words for tool, words in found.items() if words}

    def load_last_attempts(self):
        """Return the rows of the view `last_attempts` by tool; after a period of a backfill that
        ended well, that of one that did not, if that was the last run of it.
        """
        lasts = {row["tool"]: row for row in self.load(
            "SELECT *, called_items AS called FROM last_attempts", json="called")}
        for run_id in {row["run_id"] for row in lasts.values() if row["status"] in DONE}:
            run = self.find_run(run_id)
            for other in self.load_other_periods(run) if has_period(run["arguments"]) else ():
                start = other["arguments"][PERIOD_ARGUMENTS[0]]
                for row in self.load_attempts(other["run_id"]):
                    last = lasts.get(row["tool"], row)
                    if last["run_id"] == run_id and last["status"] in DONE \
                            and row["status"] not in DONE:
                        row["reason"] = f"in the period from {start}" \
                            + f"; {row['reason']}" * bool(row["reason"])
                        lasts[row["tool"]] = {**last, **row}
        return lasts

    def load_other_periods(self, run):
        """Return the last runs of those periods of a run's backfill that did not succeed."""
        def leave_out_period(arguments):
            return {name: value for name, value in arguments.items()
                    if name not in PERIOD_ARGUMENTS}

        mine = leave_out_period(run["arguments"])
        lasts = [self.find_run(last["run_id"])
                 for last in self.load_last_like(make_request(run)).values()
                 if last["status"] not in ("success", "running")]
        return [other for other in lasts if has_period(other["arguments"])
                and leave_out_period(other["arguments"]) == mine]

    def find_called_in(self, tool):
        """Return the run in which a tool was called last; None if it never was."""
        return self.ask("SELECT run_id FROM attempts WHERE tool = ? AND attempt > 0 "
                        "ORDER BY attempt_id DESC LIMIT 1", tool)

    def load_attempts_of(self, tool, count, that_failed=False):
        """Return the last rows of `attempts` of a tool, the newest first: of all, or of those that
        failed, be it in part.
        """
        return self.load("SELECT * FROM attempts WHERE tool = ? AND (status IN ('failed', "
                         "'partial') OR NOT ?) ORDER BY attempt_id DESC LIMIT ?",
                         tool, that_failed, count)

    def find_good_run(self, tool):
        """Return the row of the last run in which a tool was called and succeeded; else None."""
        return next(iter(self.load_runs("WHERE run_id = (SELECT max(run_id) FROM attempts "
                                        "WHERE tool = ? AND status = 'success')", tool)), None)

    def find_started_at(self, tool, run_id):
        """Return when the last attempt of a tool began in a run or in those that it goes on with;
        if there was none, as there is of the tool "", when the first of these runs began.
        """
        return self.ask(_STARTED, run_id, tool)

    def find_expected_s(self, tool):
        """Return the median of the seconds that a tool's last successes took."""
        return self.ask("""
            WITH last AS (SELECT duration_s FROM attempts WHERE tool = ? AND attempt > 0
                          AND status = 'success' AND duration_s IS NOT NULL
                          ORDER BY attempt_id DESC LIMIT 11)
            SELECT duration_s FROM last ORDER BY duration_s
            LIMIT 1 OFFSET (SELECT count(*) / 2 FROM last)
            """, tool)

    def load_successes(self, which, *values):
        """Return rows of the view `successes`. What ran is {} where that is not recorded, or only
        the fingerprint of a syntax tree: of engines that did not say which function they called.
        """
        rows = self.load(_SUCCESSES + which, *values, json="source inputs needed said returned")
        return [Success(*map(row.get, Success._fields)) for row in rows]

    def find_done(self, run_id):
        """Return the tools that ended well in a run or were done before it."""
        return {success.tool: success for success in self.load_successes(
            "WHERE status <> 'partial' AND attempt_id IN (SELECT attempt_id FROM attempts_of_runs "
            "WHERE of_run = ?) ORDER BY attempt_id", run_id)}


class History(Store):
    """The history of a pipeline, in its folder, where only who holds its lock writes to it; or,
    without a folder, one that is empty.

    `base` is the folder from which the pipeline names files. State: `run_id` of the run that is
    recorded; `arguments` of it, as recorded, or None for a backfill, which has no last success;
    `open`, the attempt_id of each attempt that runs; `found`, the successes that were asked for,
    by tool and arguments; `order` of the tools in TOOL_MAP, and `newest`, in that order, the
    newest work of those before each tool, as far as somebody asked.
    """

    def __init__(self, folder="", base=""):
        super().__init__(folder)
        self.base, self.run_id, self.arguments, self.open = base, 0, None, {}
        self.found, self.order, self.newest = {}, [], {}

    def find_success(self, tool, arguments=None):
        """Return the last success of a tool, or of some of its items; or with arguments, as they
        are recorded, the last that says something of all the data with these: not of a period, if
        there is none among them, not of a single item, not of some items only.
        """
        found = self.found.setdefault(tool, {})
        if arguments not in found:
            found[arguments] = next(iter(self.load_successes(
                "WHERE tool = ? AND (? IS NULL OR status = 'success' AND item IS NULL "
                "AND arguments = ?) ORDER BY attempt_id DESC LIMIT 1",
                tool, arguments, arguments)), None)
        return found[arguments]

    def find_needed_works(self, pipeline, tool):
        """Return the last work of each tool that one needs: what it was, or would be, built on.

        For a tool that waits for all before it, the newest work of those before it in TOOL_MAP.
        """
        def find_work(name):
            success = self.find_success(name)
            return success.work if success else 0

        needs = pipeline.needs[tool]
        if needs != ALL_BEFORE:
            return {need: find_work(need) for need in needs}
        self.order = self.order or list(pipeline.tools)
        while tool not in self.newest:
            place = len(self.newest)
            before = self.order[place - 1]
            self.newest[self.order[place]] = place and max(self.newest[before], find_work(before))
        return {ALL_BEFORE: self.newest[tool]}

    def forget(self, tool):
        """Note that a tool has a new success."""
        self.found.pop(tool, None)
        while tool in self.newest and next(reversed(self.newest)) != tool:
            self.newest.popitem()

    def find_last_success_at(self, tool):
        """Return when the last success of a tool with the arguments of this run began."""
        success = self.arguments and self.find_success(tool, self.arguments)
        return success and success.started_at

    def note(self, tool, attempt, status, at, pid=None, reason="", work=None, rows=None):
        """Record an attempt, or with attempt 0 why there was none, and return its id."""
        return self.change(
            "INSERT INTO attempts (run_id, tool, attempt, status, started_at, pid, reason, work, "
            "rows) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.run_id, tool, attempt, status, at, pid, reason, work, rows))

    def update(self, attempt_id, row):
        """Record columns of an attempt; what is empty is so from its beginning."""
        row = {name: value for name, value in row.items() if value not in (None, "")}
        self.change(f"UPDATE attempts SET {' = ?, '.join(row)} = ? "  # noqa: S608 - our columns
                    "WHERE attempt_id = ?", (*row.values(), attempt_id))

    def close_killed(self):
        """Record a run that did not come to its end as interrupted.

        Return its id, or "" if there is none, and the tools that ran.
        """
        killed = self.find_running()
        if killed is None:
            return "", []
        self.run_id = killed["run_id"]
        cut_off = [row for row in self.load_attempts(self.run_id) if row["status"] == "running"]
        for row in cut_off:
            log = find_log(find_logs(self.folder, str(self.run_id)), row["tool"], row["attempt"])
            self.update(row["attempt_id"], {
                "status": "interrupted", "reason": "its run was cut off",
                "log": os.path.relpath(log, self.folder) if has_bytes(log) else None})
        self.end_run("interrupted", None)
        return str(self.run_id), [row["tool"] for row in cut_off]

    def begin_run(self, plan, request, arguments, versions, at):
        """Record a run, with the tools that it need not do, and return its id; where no history is
        kept, one that sorts by its start: `20130101T060000Z-1a2b`.

        `versions` say what runs: see find_versions().
        """
        text = format_arguments(arguments)
        self.arguments = None if has_period(arguments) else text
        if not self.folder:
            return time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(at)) + os.urandom(2).hex()
        row = make_columns({
            **request._asdict(), **versions, "status": "running", "arguments": text,
            "planned": len(plan.steps), "started_at": at, "pid": os.getpid(),
            "edges": {step.tool: step.edges for step in plan.steps},
            "first_attempt": 1 + (self.ask("SELECT max(attempt_id) FROM attempts") or 0),
            "version": VERSION, "git_commit": find_git_commit(self.base)})
        self.run_id = self.change(f"INSERT INTO runs ({', '.join(row)}) "  # noqa: S608 - columns
                                  f"VALUES (:{', :'.join(row)})", row)
        for step in plan.steps:
            if not step.may_run():
                self.note(step.tool, 0, "cached", at, reason=step.reason,
                          work=step.success.success_id, rows=step.success.rows)
        self.commit()
        return str(self.run_id)

    def begin_attempt(self, tool, attempt, at, pid, arguments=None):
        """Record that an attempt begins, with the arguments of the tool's own."""
        self.open[tool] = self.note(tool, attempt, "running", at, pid)
        if arguments:
            self.update(self.open[tool], {"given": format_arguments(arguments)})

    def note_items(self, tool, counts):
        """Record how many items a tool that runs has."""
        import json
        self.update(self.open[tool], {"items": json.dumps(counts)})

    def end_attempt(self, tool, outcome, facts):
        """Record how an attempt ended, and in more columns what a success was built on."""
        if not self.folder:
            return  # the result is not turned into JSON in vain
        if outcome.items is not None:
            self.note_items(tool, outcome.items)
        attempt_id = self.open.pop(tool)
        row = {"traceback": outcome.traceback.encode("utf-8", "backslashreplace").decode(),
               "log": outcome.log and os.path.relpath(outcome.log, self.folder), **facts}
        for name in ("status", "duration_s", "rows", "reason", "error"):
            row[name] = getattr(outcome, name)
        if outcome.status in ("success", "partial"):
            row["work"] = self.find_work(tool, outcome.items, attempt_id)
            row["result"], row["kind"] = outcome.kept or keep_result(outcome.result)
            self.forget(tool)
        self.update(attempt_id, row)

    def find_work(self, tool, items, attempt_id):
        """Return the work of an attempt that ended well: its own, unless it did nothing to items,
        and the one before tells of all that was done to them before. Where more or fewer of those
        listed are done than then, another history has done some; of a tool that lists only what is
        pending, none ever are.
        """
        has_none = items and not items["passed"] + items["elsewhere"]
        former = self.find_success(tool) if has_none else None
        if former:
            [last] = self.load(
                "SELECT attempt_id, items AS called FROM attempts WHERE attempt_id = (SELECT "
                "max(attempt_id) FROM attempts WHERE tool = ? AND attempt > 0 AND attempt_id < ?)",
                tool, attempt_id, json="called")
            if former.success_id == last["attempt_id"] \
                    and count_done(items) in (0, count_done(last["called"] or {})):
                return former.work
        return attempt_id

    def end_run(self, status, duration_s):
        """Record how a run ended."""
        self.change("UPDATE runs SET status = ?, duration_s = ? WHERE run_id = ?",
                    (status, duration_s, self.run_id))
        self.commit()

    def forget_run(self):
        """Forget the run that is recorded, in which nothing was done."""
        from shutil import rmtree
        for table in ("attempts", "runs"):
            self.change(f"DELETE FROM {table} WHERE run_id = ?", (self.run_id,))  # noqa: S608
        self.commit()
        if self.folder:
            rmtree(find_logs(self.folder, str(self.run_id)), ignore_errors=True)

    def prune(self, before):
        """Forget the runs that began before a moment, but those of the view `kept_runs`; return
        the ids of those that are gone.
        """
        from shutil import rmtree
        which = "FROM runs WHERE started_at < ? AND run_id NOT IN (SELECT run_id FROM kept_runs)"
        rows = self.load(f"SELECT run_id {which}", before)
        self.change(f"DELETE {which}", (before,))
        self.change("DELETE FROM attempts WHERE run_id NOT IN (SELECT run_id FROM runs)")
        self.commit()
        self.do("VACUUM")
        gone = [str(row["run_id"]) for row in rows]
        for run_id in gone:
            rmtree(find_logs(self.folder, run_id), ignore_errors=True)
        return gone


def count_done(items):
    """Return how many of the items that were listed are done, by the counts of an Outcome."""
    counts = [items.get(name, 0) for name in
              ("listed", "passed", "elsewhere", "pending", "given_up")]
    return sum(counts[:3]) - sum(counts[3:])


def make_columns(row):
    """Return a row of `runs` as it is recorded: what SQL has no type for, as JSON."""
    import json
    return {name: json.dumps(value) if isinstance(value, (tuple, list, dict)) else value
            for name, value in row.items()}


_NOT_JSON = "repr"  # {"repr": "PosixPath('a')"} stands for what JSON can not say


def format_arguments(arguments):
    """Return the arguments of tools as JSON, in one order; what JSON can not say, by its repr.

    >>> format_arguments({"since": None, "shift": 1j})
    '{"shift": {"repr": "1j"}, "since": null}'
    """
    import json

    def describe(value):
        if isinstance(value, (set, frozenset)):  # their order is another in each process
            return {_NOT_JSON: sorted(map(repr, value))}
        return {_NOT_JSON: re.sub(r" at 0x[0-9A-Fa-f]+", "", repr(value))}

    def dump(value):
        try:
            return json.dumps(value, default=describe, sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            return json.dumps(describe(value))

    return "{" + ", ".join(f"{json.dumps(name)}: {dump(value)}"
                           for name, value in sorted(arguments.items())) + "}"


def keep_result(result):
    """Return a result as JSON and None; or None and its type, if JSON can not say it."""
    if result is None:
        return "null", None
    import json
    try:
        text = json.dumps(result)
        if len(text) <= RESULT_CAP_BYTES and json.loads(text) == result:  # tuples would be lists
            return text, None
    except (TypeError, ValueError, RecursionError):
        pass
    return None, format_type(result)


def find_git_commit(folder):
    """Return the commit that is checked out around a folder, as the files in .git tell; None where
    there is no repository, or one that keeps its files elsewhere, as a worktree of git's does.
    """
    git = os.path.join(folder, ".git")
    if not os.path.exists(git):
        above = os.path.dirname(folder)
        return None if above == folder else find_git_commit(above)

    branch = "".join(read_tail(os.path.join(git, "HEAD"), 1)).partition("ref: ")[2]
    for name in ("HEAD", branch, "packed-refs"):
        text = "\n".join(read_tail(os.path.join(git, name), 1 << 20))
        commit = re.search(rf"^([0-9a-f]{{40,64}})( {re.escape(branch)})?$", text, re.M)
        if commit:
            return commit[1]
    return None


def find_reads(tool, base, known):
    """Return size, time of change and content's fingerprint of the files that a tool reads.

    Names are seen from the folder `base`; those that are no files or folders, such as tables, do
    not count. The fingerprint is taken from `known`, the state at another time, where size and
    time are the same.
    """
    files = {}
    for name in tool.reads:
        top = os.path.join(base, name)
        inside = [os.path.join(folder, each) for folder, _, names in os.walk(top) for each in names]
        for path in filter(os.path.isfile, sorted(inside) or [top]):  # no pipes, no broken links
            shown = os.path.relpath(path, base).replace(os.sep, "/")
            was = known.get(shown, [])
            try:
                stat = os.stat(path)
                now = [stat.st_size, stat.st_mtime_ns]
                files[shown] = was if was[:2] == now else [*now, hash_file(path)]
            except OSError:
                files[shown] = [0, 0, ""]  # its tool will tell, if it matters
    return files


def find_writes(tool, base):
    """Return those of the names that a tool writes that are files or folders."""
    return [name for name in tool.writes if os.path.exists(os.path.join(base, name))]


def hash_file(path):
    """Return a fingerprint of a file's content."""
    from hashlib import sha256
    digest = sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def find_changed_file(tool, base, inputs):
    """Return what changed of a tool's files since `inputs` were recorded, in words, or ""."""
    was = {"reads": {}, "writes": [], **inputs}
    old, new = was["reads"], find_reads(tool, base, was["reads"])
    for name in [*new, *old]:
        if name not in old:
            return f"{name} is new"
        if name not in new:
            return f"{name} is gone"
        if old[name][2:] != new[name][2:]:
            return f"{name} changed"
    writes = find_writes(tool, base)
    return next((f"{name} is gone" for name in was["writes"] if name not in writes), "")


def find_logs(folder, run_id):
    """Return the folder for the logs of a run."""
    return os.path.join(folder, "logs", run_id)


def find_last_log(folder):
    """Return the id of the last run of which there are logs in the folder of a pipeline, or 0."""
    logs = find_logs(folder, "")
    names = os.listdir(logs) if os.path.isdir(logs) else ()
    return max((int(name) for name in names if name.isdecimal()), default=0)


def find_log(logs, tool, attempt):
    """Return the file for what an attempt prints."""
    return f"{logs}{os.sep}{make_file_name(tool)}.{attempt}.log"


def has_bytes(path):
    """Return whether a file is there and not empty."""
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def tidy_log(path, cap_bytes=LOG_CAP_BYTES):
    """Remove a log without a byte; cut one that is too long to its beginning and its end, and say
    there what was left out.
    """
    if not has_bytes(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    size, half = os.path.getsize(path), cap_bytes // 2
    if size <= cap_bytes:
        return
    with open(path, "r+b") as file:
        file.seek(size - half)
        end = file.read()
        file.seek(half)
        file.write(b"\n[... %d bytes were left out here ...]\n" % (size - 2 * half) + end)
        file.truncate()


def read_tail(path, lines, line_bytes=1000):
    """Return the last lines of a text file, cut to their ends where they are very long, in which
    nothing can take hold of a terminal; none if it can not be read.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - lines * line_bytes - (1 << 16)))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line[-line_bytes:] for line in clean(text).splitlines()[-lines:]] if lines else []


# What --json escapes although JSON need not: it is not seen, but moves, turns or hides what is.
HIDDEN = (r"[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
          r"\U000e0000-\U000e007f]")
_ESCAPES = (r"\x1b(\[[0-?]*[ -/]*[@-~]|[\]P^_X][^\x07\x1b\n]*(\x07|\x1b\\)?|[ -/]*[0-~]?)"
            r"|[\x00-\x08\x0b-\x1f]|" + HIDDEN)  # those of terminals: ECMA-48, 5.3 and 5.6


def clean(text):
    """Return a text without what can take hold of a terminal: control characters but tabs and ends
    of lines, and what else is HIDDEN.

    >>> clean("a\\x1b[31mred\\x1b[0m\\r\\n\\x00b")
    'ared\\nb'
    """
    return re.sub(_ESCAPES, "", text.replace("\r\n", "\n"))


class Clock(NamedTuple):
    """The time, as a run sees it; tests hold it still."""
    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@contextlib.contextmanager
def hold_history(folder, base, wait_s=0.0, clock=Clock()):
    """Hold the history of a pipeline, which nobody else writes to meanwhile.

    Raise Locked if another run holds it and is not over within `wait_s` seconds.
    """
    make_folder(folder)
    lock, history = Lock(folder), History(folder, base)
    started_s = clock.monotonic()
    holder = lock.take()
    while holder:
        patience_s = WORKERS_END_S if holder == "worker" else LOOK_S
        if clock.monotonic() - started_s >= max(wait_s, patience_s):
            raise make_locked(history, holder, lock.pid)
        clock.sleep(0.05)
        holder = lock.take()
    lock.sign()
    try:
        yield history
    finally:
        history.close()
        lock.release()


def make_locked(history, holder, pid):
    """Return the sentence for a pipeline of which another run is not over, in a process."""
    fix = "Wait for its end with --wait; --status shows what it does."
    try:
        run, attempts = find_running(history)
    finally:
        history.close()
    if run is None or holder == "run" and pid not in (0, run["pid"]):  # that one was killed
        return Locked("Another run of this pipeline is just beginning or ending"
                      + f": process {pid}" * bool(pid) + ".", fix)
    tools = ", ".join(attempt["tool"] for attempt in attempts) or "nothing yet"
    if holder == "worker":
        return Locked(f"Run {run['run_id']} was killed, and a worker of it has not ended: {tools}.",
                      fix)
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["started_at"]))
    return Locked(f"Run {run['run_id']} of this pipeline is not over: process {run['pid']}, "
                  f"since {since}, now at {tools}.", fix)


def find_running(history):
    """Return the run that is not recorded as ended, and the attempts in it that run."""
    run = history.find_running()
    attempts = history.load_attempts(run["run_id"]) if run else []
    return run, [attempt for attempt in attempts if attempt["status"] == "running"]


def is_held(folder):
    """Return whether a run holds the lock of a pipeline, or a worker of one that was killed."""
    lock = Lock(folder)
    holder = lock.take()
    lock.release()
    return bool(holder)


def make_request(run):
    """Return what a resume of a run asks for."""
    words = run["words"]
    return Request(tuple(run["targets"]), tuple(run["exclude"]), run["start_from"],
                   None if words is None else tuple(words), run["run_id"], run["item"] or None)


def override(request, said):
    """Return what a resume asks for, but for what is said beside it."""
    names = "exclude", "start_from", "item"
    return request._replace(**{name: getattr(said, name) for name in names if getattr(said, name)})


def find_request(history, request, arguments, resume):
    """Return what to run, with which arguments, and what of it is done: for a resume, what the
    resumed run says, where nothing else is said beside it. Raise UserError if a resume is asked for
    together with targets.
    """
    if not resume:
        return request, arguments, {}
    if request.targets:
        raise UserError("resume takes its targets from the run.", "Leave out targets.")
    run = history.find_resumable(None if resume is True else resume)
    return (override(make_request(run), request),
            read_arguments(run) if arguments is None else arguments,
            history.find_done(run["run_id"]))


def read_arguments(run, now=None):
    """Return the arguments of a run that is recorded.

    `now` is what its words on the command line come to today: the same, but for defaults that
    have moved since, such as a date. Raise UserError for those that JSON could not say.
    """
    import json
    arguments = dict(run["arguments"]) if now is None else dict(now)
    today = {} if now is None else json.loads(format_arguments(now))
    lost = []
    for name, was in run["arguments"].items():
        is_taken = name in arguments or name in PERIOD_ARGUMENTS  # these are of a backfill
        if is_taken and today.get(name) != was:
            arguments[name] = was
            lost += [name] * (f'{{"{_NOT_JSON}": ' in json.dumps(was))
    if lost:
        raise UserError(f"The arguments of run {run['run_id']} can not be read back: "
                        f"{', '.join(lost)}.",
                        "JSON could not say them. Give them again: from Python with arguments=, "
                        "else run what is left by name, with its flags.")
    return arguments


# === 5 CONNECTION ===============================================================================
# The one place that knows how database drivers differ: open, begin, commit, roll back, close,
# replace. `conn` may be any DB-API connection, one of SQLAlchemy's, any object that is no database,
# or None. It does not decide when to do any of these.

# SQLite calls back after this many steps of a statement, about a millisecond, so that a signal
# is heard in the middle of a long one.
_SQLITE_STEPS = 100_000
_OURS = " -- by the engine"  # so that sqlite3 does not take its prepared statement for a tool's own
_POSTGRES_INERROR = 3  # PQTRANS_INERROR of libpq: a COMMIT would silently roll back
_CO_COROUTINE = 0x80  # of inspect: what `async def` makes
_HARMLESS = ("SELECT 1", "SELECT 1 FROM DUAL", "SELECT 1 FROM SYSIBM.SYSDUMMY1",
             "SELECT 1 FROM RDB$DATABASE")  # Oracle, Db2 and Firebird want a FROM
_NOT_OVER = ("commit() has left the transaction open, so that its work would be lost: return a "
             "connection from get_connection() whose commit() commits")

_HINTS = (  # what drivers say of mistakes that the way a tool is called leads to: the way out
    (r"inside a transaction block",  # of PostgreSQL, before whose statements psycopg begins one
     'let the tool say conn.autocommit = True first, with "commits": True in TOOL_MAP'),
    (r"(inside|within) a transaction",
     'a transaction is open already: "commits": True in TOOL_MAP leaves transactions to the tool'),
    (r"a closed (database|connection)|connection (is|already) closed",
     "leave the connection open: the engine closes it"),
    (r"database is locked",
     'another writes: isolation_level="IMMEDIATE" and timeout=60 in get_connection() wait for it'),
    (r"too many (clients|connections)|connection slots|max_user_connections",
     'the server gives no more connections: a smaller --jobs takes fewer, and so do "uses" of '
     "tools with LIMITS above the mark"),
    (r"could not set lock on file|used by another process",
     "one process at a time may have it open: run without --jobs, timeout, memory and isolate"),
    (r"permission denied for (schema|database) (\S+)",
     r"GRANT CREATE ON \1 \2 to the role that connects, and USAGE of a schema"),
    (r"permission denied to create temporary tables in (database \S+)",
     r"GRANT TEMPORARY ON \1 to the role that connects"),
    (r"permission denied for (table|relation|sequence) (\S+)",
     r"GRANT SELECT, INSERT, UPDATE, DELETE ON \2 to the role that connects"),
    (r"no schema has been selected",
     "have get_connection() SET search_path to a schema of which the role that connects has USAGE "
     "and CREATE: GRANT gives it"),
    (r"(\w+) command denied to user (\S+) for table \S*?(\w+)\W*$", r"GRANT \1 ON \3 TO \2"),
    (r"\bpg_\w+_index\b|tuple concurrently",
     "two made or changed the same at once: in setup(conn) of a tool that is done again"),
)
_DRIVERS = {"psycopg": "postgresql", "psycopg2": "postgresql", "pg8000": "postgresql",
            "pymysql": "mysql", "MySQLdb": "mysql", "mysql": "mysql", "mariadb": "mysql",
            "_duckdb": "duckdb"}
_SCHEMA_OF = {  # where a ledger is, or would be made, but not in what is temporary
    "postgresql": """
        SELECT s.name FROM unnest(current_schemas(false)) WITH ORDINALITY AS s(name, place)
        LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = s.name
        LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
            AND c.relname = 'orchestrator_items' AND c.relkind IN ('r', 'p', 'v', 'f')
        WHERE left(s.name, 7) <> 'pg_temp' ORDER BY c.oid IS NULL, s.place LIMIT 1""",
    "mysql": "SELECT database()",
    "duckdb": """
        SELECT current_database(), coalesce(
            (SELECT schema_name FROM duckdb_tables() WHERE table_name = 'orchestrator_items'
             AND NOT temporary AND database_name = current_database()
             AND list_contains(current_schemas(false), schema_name)
             ORDER BY list_position(current_schemas(false), schema_name) LIMIT 1),
            current_schema())""",
}


class Database:
    """The connection of a run, opened at its first use and closed exactly once.

    State: `conn`, what get_connection() returned; `raw`, the driver's own in it, if that is of
    SQLAlchemy (`is_alchemy`), else the same; `is_open`, whether it was asked; `is_fit`, whether it
    was looked at for tools that leave transactions to the engine; `is_sqlite`, what it is;
    `autocommit`, the mode in which it came, to which it is put back after each attempt; `is_ours`,
    whether the transaction is the engine's, and `has_begun`, whether begin() had the driver begin
    it; `schema`, where a ledger in it is, and `has_set`, whether get_connection() has left a
    transaction open, so that a rollback may change what is the default; `ahead`, what sees the
    first statement of an item, None where nothing does.
    """

    def __init__(self, get_connection, is_cancelled=lambda: False):
        self.get_connection, self.is_cancelled = get_connection, is_cancelled
        self.conn = self.raw = self.autocommit = self.schema = self.ahead = None
        self.is_open = self.is_fit = self.is_ours = self.has_begun = False
        self.is_alchemy = self.is_sqlite = self.has_set = False

    def open(self, commits=True):
        """Return the connection, opened if it is not. Whatever get_connection() raises, raises.

        Raise TypeError if it is none, or could lose work, or keep that of a failure, of a tool
        that leaves transactions to the engine: that does not say that it `commits`.
        """
        if not self.is_open:
            conn = self.get_connection()
            check_connection(conn, _NEVER)
            raw = find_raw(conn)
            self.conn, self.raw, self.is_open, self.schema = conn, raw, True, None
            self.is_alchemy, self.is_sqlite = is_alchemy(conn), is_sqlite(raw)
            self.ahead = make_ahead(raw)
            self.is_fit = is_sqlite(conn)
            self.autocommit = getattr(raw, "autocommit", None)
            if self.is_sqlite and hasattr(raw, "set_progress_handler"):
                raw.set_progress_handler(self.is_cancelled, _SQLITE_STEPS)
            self.has_set = is_in_transaction(raw)
            with contextlib.suppress(Exception):  # else it is asked for where there is a ledger
                self.schema = find_schema(conn)
        if not (commits or self.is_fit):
            check_connection(self.conn, _UNSAFE)
            self.is_fit = True
        return self.conn

    def begin(self, is_urgent=False, commits=False, has_items=False):
        """Begin a transaction, where the driver would not do so by itself, or not early enough.

        Python's sqlite3 begins by itself only before INSERT and the like, so that a CREATE TABLE
        would survive a rollback. `is_urgent` waits for SQLite's one writer at once. Raise TypeError
        as open() does.
        """
        conn, raw = self.open(commits), self.raw
        self.is_ours = not commits
        if has_items and self.is_alchemy and not conn.in_transaction():
            conn.begin()  # so that a Session on it leaves commits to the engine
        if self.is_sqlite:
            if not raw.in_transaction and not self._begins_later():
                # A deferred transaction that reads first can not wait for a lock; who opens with
                # isolation_level="IMMEDIATE" gets one that does.
                level = "IMMEDIATE" if is_urgent else getattr(raw, "isolation_level", None) or ""
                raw.execute("BEGIN " + level + _OURS)
            self.has_begun = raw.in_transaction
        elif self.autocommit is True:
            raw.autocommit = False
        elif not self.is_alchemy and callable(getattr(raw, "begin", None)):
            raw.begin()  # of DuckDB and MySQL drivers
            self.has_begun = True

    def _begins_later(self):
        """Return whether the user has SQLAlchemy begin a transaction of SQLite's, by an event."""
        if not self.is_alchemy or self.conn.in_transaction():
            return False
        self.conn.begin()
        is_begun = self.raw.in_transaction
        self.conn.rollback()  # a tool may want to begin one itself
        return is_begun

    def commit(self):
        """Commit what is open. Raise what the driver raises, or if it would have been lost."""
        if self.is_sqlite:
            if self.is_cancelled():
                raise RuntimeError("SQLite undid the transaction when a statement was interrupted")
        elif is_aborted(find_raw(self.conn)):
            raise RuntimeError("the transaction had failed and could not be committed: "
                               "an error of the database was caught and ignored")
        self._end("commit")

    def rollback(self):
        """Undo what is not committed. A connection that can not do that is let go as broken.

        Return whether the transaction of begin() had ended before, as far as the driver tells.
        """
        had_ended = False
        if self.ahead:
            self.ahead.end()
        try:
            had_ended = self._end("rollback")
            is_broken = getattr(self.conn, "closed", False) \
                or getattr(self.conn, "open", True) is False
        except Exception:
            is_broken = True
        if is_broken:
            self.close()
        return had_ended

    def close(self):
        """Close the connection if it is open; the next use opens another. Never raises."""
        conn, self.conn, self.raw, self.ahead = self.conn, None, None, None
        self.is_open = self.is_fit = False
        try:
            call_if_there(conn, "close")
        except Exception:
            pass  # what was committed is safe; what was not is gone with the connection

    def _end(self, how):
        """Commit or roll back; return whether the transaction had ended before."""
        conn, raw = self.conn, find_raw(self.conn)
        if raw is not self.raw:
            raise RuntimeError("the connection is closed, or another than at the beginning")
        had_begun, was_ours = self.has_begun, self.is_ours
        self.has_begun = self.is_ours = is_done = False
        if self.is_sqlite:
            had_ended = had_begun and not raw.in_transaction
        else:
            had_ended = was_ours and getattr(raw, "autocommit", None) is True  # the tool's wish
        if self.is_alchemy:
            self.is_fit = False  # a tool may change its mode
            is_done = conn.in_transaction()  # else SQLAlchemy does not tell the driver
            getattr(conn, how)()
        if self.is_sqlite and (self.autocommit is True or not hasattr(raw, how)):
            if raw.in_transaction:  # commit() and rollback() do nothing here, or are not there
                raw.execute(how.upper() + _OURS)
        elif not is_done:
            try:
                call_if_there(raw, how)
            except Exception as error:
                # The tool ended its transaction itself; DuckDB, for one, complains.
                if "no transaction" not in str(error).lower():
                    raise
                had_ended = had_begun
        if is_in_transaction(raw):
            raise RuntimeError(_NOT_OVER)
        if isinstance(self.autocommit, bool) and raw.autocommit is not self.autocommit:
            raw.autocommit = self.autocommit
        return had_ended


class Ahead:
    """Has a function called right before the first statement that a tool sends over a connection of
    psycopg 2 or 3, so that until then no transaction is open on the server, which may end one that
    is idle.

    `is_blind`: it does not see what cursors of another class send, which psycopg2 lets a tool make.
    State: `call`, the function, while it waits; `kinds`, the classes of cursors that tell of their
    first statement, by those that they are made of; `methods`, those of a connection of psycopg 3
    that tell of it, through which all goes, whatever the cursor.
    """

    def __init__(self, raw, is_blind):
        self.raw, self.is_blind, self.call, self.kinds, self.methods = raw, is_blind, None, {}, {}
        if not is_blind:
            import threading
            raw.lock = threading.RLock()  # who calls wait() holds it, and so will the function
            self.methods = {name: self._telling(getattr(raw, name))
                            for name in ("wait", "pipeline") if hasattr(raw, name)}

    def begin(self, call):
        """Have a function called once, before the next statement."""
        raw, self.call = self.raw, call
        for name, method in self.methods.items():
            setattr(raw, name, method)
        if self.is_blind:
            base = self.base = raw.cursor_factory
            if base not in self.kinds:
                self.kinds[base] = self._make_cursor(
                    base or sys.modules["psycopg2.extensions"].cursor)
            raw.cursor_factory = self.kinds[base]

    def end(self):
        """Have it called no more; return whether it was not."""
        call, self.call = self.call, None
        for name in self.methods if call else ():
            delattr(self.raw, name)
        if call and self.is_blind and self.raw.cursor_factory is self.kinds[self.base]:
            self.raw.cursor_factory = self.base
        return call is not None

    def _telling(self, method):
        """Return a method that tells before it sends something."""
        def tell_and_send(*args, **kwargs):
            call = self.call
            if self.end():
                call()
            return method(*args, **kwargs)
        return tell_and_send

    def _make_cursor(self, base):
        """Return a class of cursors of psycopg2's that tell before they send something."""
        return type(base.__name__, (base,), {
            name: self._telling(getattr(base, name)) for name in
            ("execute", "executemany", "callproc", "copy_from", "copy_to", "copy_expert")})


def make_ahead(raw):
    """Return what sees the first statement on a connection of a driver, None if nothing does."""
    is_blind = is_psycopg2(raw)
    if is_blind and not isinstance(raw.cursor_factory, (type, type(None))):
        return None
    can_see = is_blind or is_psycopg3(raw) and hasattr(raw, "wait")
    return Ahead(raw, is_blind) if can_see else None


def is_psycopg2(raw):
    """Return whether a connection is one of psycopg2's."""
    module = sys.modules.get("psycopg2.extensions")
    return module is not None and isinstance(raw, module.connection)


def is_psycopg3(raw):
    """Return whether a connection is one of psycopg's."""
    module = sys.modules.get("psycopg")
    return module is not None and isinstance(raw, module.Connection)


def check_connection(conn, rules):
    """Raise TypeError if a connection is what a rule is about."""
    what = next((what for is_such, what in rules if is_such(conn)), "")
    if what:
        raise TypeError(f"it returned {format_type(conn)}, {what}: {_WAY_OUT}")


_WAY_OUT = ("return the connection of the driver itself or `engine.connect()` of SQLAlchemy 2 (in "
            'run() then Session(conn) works), or say "commits": True in TOOL_MAP and leave '
            "transactions to the tool")


def is_async(conn):
    """Return whether a connection is to be awaited, or its commit() is."""
    code = getattr(getattr(conn, "commit", None), "__code__", None)
    return hasattr(type(conn), "__await__") or getattr(code, "co_flags", 0) & _CO_COROUTINE


def is_pending(conn):
    """Return whether a thing is a generator, or a `with` block that nobody has entered."""
    return hasattr(type(conn), "gi_frame") or isinstance(conn, contextlib._GeneratorContextManager)


def is_holder(conn):
    """Return whether an object without a commit() of its own holds one that has it."""
    held = conn.values() if isinstance(conn, Mapping) else conn \
        if isinstance(conn, (tuple, list)) else getattr(conn, "__dict__", {}).values()
    return not hasattr(conn, "commit") and any(hasattr(each, "commit") for each in held)


def has_no_end(conn):
    """Return whether what is of a database can not commit or roll back: engine, pool, cursor."""
    is_of_database = keeps_ledger(conn) or find_driver(conn)[0] \
        or type(conn).__module__.startswith(("sqlalchemy.", "psycopg_pool"))
    return is_of_database and not (callable(getattr(conn, "commit", None))
                                   and callable(getattr(conn, "rollback", None)))


def is_unknown(conn):
    """Return whether a connection is of no driver that is known, such as a wrapper or a Session,
    so that nothing tells what its commit() does.
    """
    return keeps_ledger(conn) and not find_driver(conn)[0]


def is_autocommit(conn):
    """Return whether the driver of a Connection of SQLAlchemy commits each statement at once;
    but for SQLite, which does not where the engine begins.
    """
    if not is_alchemy(conn):
        return False
    raw = find_raw(conn)
    mode = getattr(raw, "autocommit", None)
    if not isinstance(mode, bool) and callable(getattr(raw, "get_autocommit", None)):
        mode = raw.get_autocommit()  # of MySQL drivers
    if isinstance(mode, bool) or is_sqlite(raw):
        return mode is True
    return conn.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


# What get_connection() may not return, though a tool commits by itself, and what only if it does.
_NEVER = (
    (lambda conn: isinstance(conn, bool),
     "which is no connection, nor the None of a pipeline without a database"),
    (is_async, "which is asynchronous, and nobody would await its commit()"),
    (is_pending, "which is still to be entered: leave out yield and with"),
)
_UNSAFE = (
    (has_no_end, "which has no commit() or no rollback(), so that work could be lost"),
    (is_holder, "that holds a connection, on which nobody would commit or roll back"),
    (is_unknown, "which is of no driver that is known, so that work could be lost"),
    (is_autocommit, "which commits each statement at once; take isolation_level=\"AUTOCOMMIT\" or "
                    "autocommit=True out"),
)
_NO_LEDGER = ((is_unknown, "in which the ledger of items can not be kept"),)


def is_alchemy(conn):
    """Return whether a connection is a Connection of SQLAlchemy."""
    return hasattr(conn, "exec_driver_sql")


def is_sqlite(conn):
    """Return whether a connection is Python's sqlite3, or a driver made in its image."""
    return isinstance(getattr(conn, "in_transaction", None), bool) and hasattr(conn, "execute")


def keeps_ledger(conn):
    """Return whether a connection is one of a database, which can keep a ledger."""
    return hasattr(conn, "cursor") or hasattr(conn, "execute")


def was_closed(conn):
    """Return whether somebody here has closed a connection, and the server has not."""
    try:  # psycopg2, 3
        return getattr(conn, "closed", 0) == 1 and not getattr(conn, "broken", False)
    except Exception:
        return False


def find_raw(conn):
    """Return the connection of the driver, which SQLAlchemy and its pools keep inside their own.

    SQLAlchemy raises if its own is closed, or lost.
    """
    inner = conn.connection if is_alchemy(conn) else conn
    return getattr(inner, "dbapi_connection", None) or inner


def find_driver(conn):
    """Return the kind of database behind a connection, "" if its driver is not known, and how that
    marks parameters (PEP 249: paramstyle).
    """
    raw = find_raw(conn)
    if is_sqlite(raw):
        return "sqlite", "qmark"
    for kind in raw.__class__.__mro__:  # not type(), which knows no proxy
        for name in itertools.accumulate(kind.__module__.split("."), "{}.{}".format):
            style = getattr(sys.modules.get(name), "paramstyle", None)
            if style:
                package = name.partition(".")[0]
                return _DRIVERS.get(package, package), style
    return conn.dialect.name if is_alchemy(conn) else "", "qmark"


def execute(raw, sql, *values):
    """Execute a statement on a connection of a driver, and return the cursor; of psycopg 2 and 3,
    one of their own, whatever the connection makes of cursors and rows.
    """
    if is_psycopg3(raw):
        psycopg = sys.modules["psycopg"]
        cursor = psycopg.Cursor(raw, row_factory=psycopg.rows.tuple_row)
    elif is_psycopg2(raw):
        cursor = raw.cursor(cursor_factory=sys.modules["psycopg2.extensions"].cursor)
    elif hasattr(raw, "execute"):  # a cursor of DuckDB's would have a transaction of its own
        return raw.execute(sql, *values)
    else:
        cursor = raw.cursor()
    cursor.execute(sql, *values)
    return cursor


def is_in_transaction(raw):
    """Return whether a connection of a driver is in a transaction; None if it does not tell."""
    if is_sqlite(raw):  # which is always in one where autocommit is False
        return raw.in_transaction and getattr(raw, "autocommit", None) is not False
    status = getattr(getattr(raw, "info", None), "transaction_status", None)
    if status is None and isinstance(getattr(raw, "server_status", None), int):
        status = raw.server_status & 1  # of PyMySQL
    return None if status is None else status != 0


def is_aborted(raw):
    """Return whether an error has aborted the transaction, so that a COMMIT would roll it back.

    PostgreSQL and DuckDB then do so without a word. The drivers of the one tell; another is asked
    for something harmless. Raise what it raises if that does not tell.
    """
    status = getattr(getattr(raw, "info", None), "transaction_status", None)
    if status is not None:
        return status == _POSTGRES_INERROR
    if not find_driver(raw)[0]:  # then the tool commits by itself
        return False
    problems = []
    for sql in _HARMLESS:
        try:
            call_if_there(execute(raw, sql), "fetchall")
            return False
        except Exception as error:
            if "abort" in str(error).lower():
                return True
            problems.append(error)
    raise problems[0]


def find_schema(conn):
    """Return what stands before the ledger's name, so that it stays the same whatever a tool does
    to the connection; "" where the database is none of those that are known.
    """
    kind, raw = find_driver(conn)[0], find_raw(conn)
    if kind == "sqlite":
        return "main."
    if kind not in _SCHEMA_OF:
        return ""
    was_open = is_in_transaction(raw)
    try:
        row = execute(raw, _SCHEMA_OF[kind]).fetchone() or ()
    finally:
        if was_open is False:  # else this would undo a SET of get_connection()
            raw.rollback()
    mark = "`" if kind == "mysql" else '"'
    names = [name for name in (row.values() if isinstance(row, Mapping) else row) if name]
    return "".join(mark + name.replace(mark, 2 * mark) + mark + "." for name in names)


def is_kind(error, *names):
    """Return whether an error is of a class of that name, whatever the driver (PEP 249)."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def find_hint(error):
    """Return the way out of an error of a database driver, where one is known, else ""."""
    if not is_kind(error, "DatabaseError", "InterfaceError", "ResourceClosedError"):
        return ""  # others have connections, too
    found = ((re.search(text, str(error), re.I), hint) for text, hint in _HINTS)
    return next((match.expand(hint) for match, hint in found if match), "")


def call_if_there(thing, method):
    """Return what a method without arguments returns, None if the thing does not have it."""
    function = getattr(thing, method, None)
    return function() if callable(function) else None


# === 6 LEDGER ===================================================================================
# The state of every item, in the tool's own database: a row of it is committed in the transaction
# of the work that it tells of, so the two can not differ. It lists items, finds those that are
# pending, and records how each ended. It calls no tool and does not decide what is tried again.

LEDGER_SCHEMA = """
-- An item is one unit of a tool's work: a file, a day, a customer. Its row is written in the
-- transaction of its work, and so is there exactly if the work is. Names that are longer than 80
-- letters, of pipelines and tools, end in a fingerprint.
CREATE TABLE orchestrator_items (
    pipeline   VARCHAR(100) NOT NULL,
    tool       VARCHAR(100) NOT NULL,
    item       VARCHAR(500) NOT NULL,
    version    VARCHAR(500) NOT NULL,     -- the one tried last; '' where items() gives none
    passed     VARCHAR(500),              -- the version done last; NULL if none ever was
    status     VARCHAR(20) NOT NULL,      -- of the last try: success, failed, quarantined, or
                                          -- pending, if it failed and comes again
    attempts   INTEGER NOT NULL,          -- tries of this version by this source
    deaths     INTEGER NOT NULL,          -- and those of them that took their process down
    source     VARCHAR(20) NOT NULL,      -- fingerprint of the tool's function and its module
    run_id     VARCHAR(40) NOT NULL,      -- the run of the last try: 7.3f2a for run 7, with a
                                          -- random part, since each history counts its own
    ended_at   DOUBLE PRECISION NOT NULL, -- of the last try, in seconds since 1970, UTC
    duration_s DOUBLE PRECISION,          -- of the last try; NULL if its process was ended
    row_count  BIGINT,                    -- rows of the last try; NULL if the tool did not say
    error      {text},                    -- of the last try, in one line; NULL if it passed
    PRIMARY KEY (pipeline, tool, item)
){more}
"""
LEDGER_COLUMNS = ("item", "version", "passed", "status", "attempts", "deaths", "run_id",
                  "ended_at", "duration_s", "row_count", "error")
_COMMENTS = r"(?:\s|--[^\n]*|/\*[\s\S]*?\*/)*"  # what may stand before a SELECT
_PAGE = 400  # items that are looked up or read at a time; SQLite takes 999 parameters
_GIVEN_UP = ("failed", "quarantined")
NAME_LENGTH = 500  # letters; an index of PostgreSQL takes 2,700 bytes
_LOCKED_STATES = ("40001", "40P01", "55P03")  # SQLSTATE: serialization, deadlock, lock not there
_MADE_STATES = ("42P06", "42P07", "42710", "42723")  # schema, table, type or other, function
_LOCKED_NUMBERS = (1020, 1205, 1213, 1412)  # the same of MySQL and MariaDB, and DDL meanwhile
_PLACE_ERRNOS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE,
                 getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota of that name
# SQLSTATE: no connection; files, disk or connections used up; a server that ends or begins; its
# system, but not a file that an item names; and a server that only reads. Memory that is used up
# is none of it: an item may want too much.
_PLACE_STATES = re.compile("08|53[013]|57P0|58(?!P)|25006")
# of MySQL and MariaDB: disk full, table full, connections used up, server not there, read only
_PLACE_NUMBERS = (1021, 1114, 1040, 1203, 2002, 2003, 1290, 1836)
# Not SQLite's "unable to open database file", which may be one that an item opens: where it is
# the pipeline's own, nothing can be charged in it either.
_PLACE_TEXTS = (r"^database or disk is full|^disk I/O error|^attempt to write a readonly database"
                r"|No space left on device")
_TABLES = {  # the type of a text of any length, and what stands behind the columns
    "sqlite": ("TEXT", " WITHOUT ROWID"),
    # Not utf8mb4_bin, to which 'a' and 'a ' are the same.
    "mysql": ("LONGTEXT", " COLLATE utf8mb4_0900_bin ENGINE=InnoDB"),
    "mariadb": ("LONGTEXT", " COLLATE utf8mb4_nopad_bin ENGINE=InnoDB"),
}


def make_ledger_key(name):
    """Return the name of a pipeline or tool as the ledger knows it."""
    return name if len(name) <= 80 else make_file_name(name)


def is_locked(error):
    """Return whether an error only says that another was at the same rows at that moment."""
    return any(
        state in _LOCKED_STATES or number in _LOCKED_NUMBERS
        or re.search(r"database (table |schema )?is locked", text) or _is_race(state, text)
        for state, number, text in find_database_errors(error))


def _is_race(state, text):
    """Return whether PostgreSQL tells that two made the same table, or changed one, at once."""
    return state == "23505" and re.search(r"\bpg_\w+_index\b", text) \
        or state == "XX000" and "concurrently" in text


def is_made_already(error):
    """Return whether a table was there when it was to be made, which another may have done just
    then: CREATE TABLE IF NOT EXISTS looks, and makes it a little later.
    """
    return any(state in _MADE_STATES for state, *_ in find_database_errors(error))


def is_of_place(error):
    """Return whether an error tells of the place where all items are done, and so of no item: its
    disk is full or broken, or takes no writing; its database lets nobody in.
    """
    return any(
        isinstance(each, OSError) and each.errno in _PLACE_ERRNOS for each in find_chain(error)
    ) or any(
        _PLACE_STATES.match(state) or number in _PLACE_NUMBERS or re.search(_PLACE_TEXTS, text)
        for state, number, text in find_database_errors(error))


def find_database_errors(error):
    """Yield the SQLSTATE, the number and the text of the errors of a database in a chain, with ""
    and None where the driver has none.
    """
    for each in find_chain(error):
        if is_kind(each, "DatabaseError"):
            state = getattr(each, "sqlstate", None) or getattr(each, "pgcode", None) or ""
            yield state, each.args[0] if each.args else None, str(each)


def find_chain(error):
    """Return an error and those behind it, up to the end of a transaction that came too early."""
    seen = []
    # People can make a ring of such a chain.
    while error is not None and error not in seen and not isinstance(error, EndedEarly):
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


class Taken(Exception):
    """Somebody else wrote the row of an item after it was looked at."""


class Unseen(Taken):
    """An item has spoken to the database by a way that nobody saw, so that nothing tells whether it
    ended its transaction.
    """


class EndedEarly(Exception):
    """An item ended its transaction itself, so that it may have been done."""


class Guard:
    """Refuses on SQLite what would end the transaction of an item, while it is up.

    State: `is_up`; `tried`, what the item tried in spite of it.
    """
    TRANSACTION, DENY = 22, 1  # SQLITE_TRANSACTION, SQLITE_DENY

    def __init__(self):
        self.is_up, self.tried = False, ""

    def authorize(self, action, what, *_):
        """Answer SQLite, which asks while it prepares a statement; 0 is yes. What was prepared
        before it could ask is prepared anew.
        """
        if self.is_up and action == self.TRANSACTION:
            self.tried = self.tried or what or "COMMIT"
            return self.DENY
        return 0


class Ledger:
    """The items of one tool, over one connection, within whatever transaction is open on it.

    Without a database behind `conn` it is in that of the history, in a `folder`, or in memory, and
    what it does is durable at once. It speaks to the driver's own connection, `raw`. State:
    `schema`, what stands before its name; `guard`; `has_savepoints`, whether the database knows
    them; `ahead`, what has the savepoint sent with an item's first statement, if anything;
    `transaction`, the number of that of an item, where no savepoint tells whether it ended. What
    find_pending() has found: `listed`, how many items there are, and `names`, those of all;
    `doubles`, the names that came again; `unfit`, those that can not be kept, each with what is
    wrong; `given_back`, those that come again, though they are done or given up, each with its
    version and the run that was at it last.
    """

    def __init__(self, conn, folder, pipeline, tool, run_id, source, schema=None):
        self.is_apart = not keeps_ledger(conn)
        if self.is_apart:
            import sqlite3
            path = os.path.join(folder, "history.db") if folder else ":memory:"
            conn = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        self.conn, self.raw = conn, find_raw(conn)
        self.key = (make_ledger_key(pipeline), make_ledger_key(tool))
        self.run_id, self.source = run_id, source
        self.kind, self.style = find_driver(conn)
        self.guard = Guard()
        if self.kind == "sqlite" and hasattr(self.raw, "set_authorizer"):
            self.raw.set_authorizer(self.guard.authorize)
        self.has_savepoints = self.kind != "duckdb"
        self.transaction = self.ahead = None
        self.move(schema or find_schema(conn))

    def close(self):
        """Close what is open beside the tool's own connection."""
        if self.is_apart:
            self.conn.close()

    def move(self, schema):
        """Keep the ledger in a schema."""
        self.schema, self._sql = schema, {}

    def do(self, sql, values=()):
        """Execute a statement of ours, whose parameters are `?`, and return the cursor."""
        return execute(self.raw, self._bind(sql), values)

    def _bind(self, sql):
        """Return a statement of ours as the driver takes it, with the full name of the table."""
        if sql not in self._sql:
            bound = sql if self.style == "qmark" else sql.replace("?", "%s")
            self._sql[sql] = bound.replace("orchestrator_items", self.schema + "orchestrator_items")
        return self._sql[sql]

    def read(self, sql, values=()):
        """Return the rows of a SELECT of ours, as tuples."""
        return [*self._fetch(self._select(self._bind(sql), values))]

    def _select(self, *statement):
        """Return the cursor of a SELECT."""
        if self.kind != "sqlite" or not hasattr(self.raw, "row_factory"):
            return execute(self.raw, *statement)
        cursor = self.raw.cursor()
        cursor.row_factory = None  # whatever the connection makes of rows
        return cursor.execute(*statement)

    def _fetch(self, cursor):
        """Return the rows of a cursor, as tuples; all at once where a driver may have one open
        result at a time.
        """
        if self.kind == "sqlite":
            return cursor
        return [tuple(row.values() if isinstance(row, Mapping) else row)
                for row in cursor.fetchall()]

    # --- the table ---

    def is_there(self):
        """Return whether the ledger's table exists; where not, the transaction may be over. Raise
        what the driver raises if it may not be read.
        """
        try:
            self.read("SELECT 1 FROM orchestrator_items WHERE 1 = 0")
        except Exception as error:
            state, number, _ = next(find_database_errors(error), ("", None, ""))
            if state == "42501" or number == 1142:  # of PostgreSQL; of MySQL and MariaDB
                raise
            return False
        return True

    def create(self):
        """Create the ledger's table."""
        kind = self.kind
        if kind == "mysql" and "mariadb" in str(self.read("SELECT version()")).lower():
            kind = "mariadb"
        text, more = _TABLES.get(kind, ("TEXT", ""))
        self.do(re.sub(r"--.*", "", LEDGER_SCHEMA.format(text=text, more=more)))

    # --- which items there are ---

    def find_pending(self, found, each=None, comes_again=lambda name, is_done: False,
                     looks_at_done=False):
        """Yield the items that are not done, in order, each with the status of the last try of
        this version, "" if there was none, and the run of that.

        They are those that passed the tool `each`, or that items() `found`: a SELECT or names; the
        first of the same name counts. `comes_again(name, is_done)` is asked of those that were
        given up, and of those that are done if it `looks_at_done`: what is to come again is
        pending once reopen() is called. Raise TypeError or ValueError for what is no item.
        """
        self.listed, self.names, self.doubles, self.given_back = 0, set(), [], {}
        self.unfit = []
        pairs = self._list_pairs(found, each)
        for listed in iter(lambda: [*itertools.islice(pairs, _PAGE)], []):
            self.listed += len(listed)
            page = []
            for pair in listed:
                problem = find_unfit(*pair)
                if problem:
                    self.unfit.append((pair[0], problem))
                else:
                    page.append(pair)
            done = () if looks_at_done else {*self._look_up(page, "item, passed")}
            left = []
            for name, version in page:
                if (name, version) not in done:
                    if name in self.names:
                        self.doubles.append(name)
                    else:
                        left.append((name, version))
                self.names.add(name)
            yield from self._describe(left, comes_again)

    def _list_pairs(self, found, each):
        """Return the names and versions of items, one after the other."""
        if each is not None:
            pairs = self.read("SELECT item, passed FROM orchestrator_items WHERE pipeline = ? AND "
                              "tool = ? AND passed IS NOT NULL ORDER BY ended_at, item",
                              (self.key[0], make_ledger_key(each)))
        elif isinstance(found, str):
            pairs = self._read_theirs(re.sub(r"[\s;]+$", "", found))
        else:
            pairs = map(read_item, itertools.count(1), found)
        # SQLite lets queries go on beside others; elsewhere items() may yield from one, too.
        return iter(pairs if self.kind == "sqlite" else [*pairs])

    def _read_theirs(self, select):
        """Return what a SELECT of the user's gives, as texts; in it, % and ? are letters."""
        cursor = None
        if re.match(_COMMENTS + r"(select|with|values|table)\b", select, re.I):
            cursor = self._select(select)
        if cursor is None or not cursor.description:
            raise TypeError(f"items() returned a text that is no SELECT: {select[:60]!r}; "
                            "for a single item, return a list of it")
        count = len(cursor.description)
        if count > 2:
            raise TypeError(f"the SELECT of items() has {count} columns; it takes one, the name, "
                            "or two, the name and the version")
        rows = self._fetch(cursor)
        if count == 1:
            return ((format_value(name), "") for name, in rows)
        return ((format_value(name), format_value(version)) for name, version in rows)

    def _look_up(self, page, columns):
        """Return some columns of the rows of items, of those that have one."""
        marks = ", ".join("?" * len(page))
        return self.read(f"SELECT {columns} FROM orchestrator_items "  # noqa: S608 - names of ours
                         f"WHERE pipeline = ? AND tool = ? AND item IN ({marks})",
                         (*self.key, *[name for name, _ in page]))

    def _describe(self, page, comes_again):
        """Yield what find_pending() does of items that are not done, or are to be done again."""
        rows = {row[0]: row for row in self._look_up(
            page, "item, version, passed, source, status, attempts, deaths, run_id")} \
            if page else {}
        for name, version in page:
            _, tried, passed, source, status, tries, deaths, run_id = rows.get(name, (None,) * 8)
            is_done = passed == version
            if (is_done or status in _GIVEN_UP) and comes_again(name, is_done):
                self.given_back[name] = version, run_id
                status, tries, deaths = "pending", 0, 0
            elif is_done:
                continue
            if (tried, source) != (version, self.source):  # or there is no row
                status, tries, deaths = "", 0, 0
            yield Item(name, version, name in rows, tries, deaths), status, run_id or ""

    def reopen(self):
        """Make pending what find_pending() has given back, but for what somebody else has been at
        since. To forget that it passed is what lets record() write that it passed once more.
        """
        for name, (version, run_id) in self.given_back.items():
            self.do(_REOPEN, (version, *self.key, name, run_id))

    def find_others(self):
        """Return the pipelines that have items of this tool in the ledger, if this one has none."""
        if self.read("SELECT 1 FROM orchestrator_items WHERE pipeline = ? AND tool = ? LIMIT 1",
                     self.key):
            return []
        return [row[0] for row in self.read(
            "SELECT DISTINCT pipeline FROM orchestrator_items WHERE tool = ?", self.key[1:])]

    def has_passed(self):
        """Return whether any item ever passed."""
        return bool(self.read("SELECT 1 FROM orchestrator_items WHERE pipeline = ? AND tool = ? "
                              "AND passed IS NOT NULL LIMIT 1", self.key))

    # --- how one ended ---

    def look(self, item):
        """Return an item as its row tells, and how it ended, with rows and error: success, failed
        or quarantined in this run; done, well or not, by somebody else; or pending.
        """
        found = self.read("SELECT passed, version, source, run_id, status, attempts, deaths, "
                          "row_count, error FROM orchestrator_items "
                          "WHERE pipeline = ? AND tool = ? AND item = ?", (*self.key, item.name))
        self.transaction = None
        if not found:
            return item._replace(is_seen=False), "pending", None, None
        passed, version, source, run_id, status, attempts, deaths, rows, error = found[0]
        item, is_ours = item._replace(is_seen=True), run_id == self.run_id
        if passed == item.version:
            return item, "success" if is_ours else "done", rows, None
        if (version, source) != (item.version, self.source):
            return item, "pending", None, None
        if attempts + deaths <= count_tries(item):  # as it was when it was listed
            status = "pending"
        return (item._replace(tries=attempts, deaths=deaths),
                status if is_ours or status == "pending" else "done", rows, error)

    def record(self, item, status, at, duration_s, rows=None, error=None):
        """Write how a try of an item ended, which its counts hold. Raise Taken if somebody else
        wrote its row since it was looked at, or did it.

        To delete a row and insert it anew would let two do one item: each would see its own.
        """
        passed = item.version if status == "success" else None
        values = (item.version, passed, status, item.tries, item.deaths, self.source, self.run_id,
                  at, duration_s, rows, error)
        if not item.is_seen:
            try:
                self.do(_INSERT, (*self.key, item.name, *values))
            except Exception as problem:
                if is_kind(problem, "IntegrityError", "ConstraintException"):
                    raise Taken from problem
                raise
            return
        cursor = self.do(_UPDATE, (*values, *self.key, item.name, item.version))
        if count_changed(cursor) != 1:
            raise Taken

    def begin_item(self, ahead=None):
        """Begin the part of a transaction that is an item's; without savepoints, the whole. With
        `ahead` it begins with the first statement of the item.
        """
        if ahead and ahead.is_blind:  # PostgreSQL counts those of a connection one by one
            if self.transaction is None:
                self.transaction = self._find_transaction()
                self.raw.commit()
            if self.transaction is None:
                ahead = None  # what only speaks like it counts none
            else:
                self.transaction += 1
        elif not self.has_savepoints:
            self.transaction = self._find_transaction()
        self.ahead = ahead
        if ahead:
            ahead.begin(self._save)
        elif self.has_savepoints:
            self.transaction = None
            self._save()

    def _save(self):
        self.do("SAVEPOINT orchestrator_item")

    def leave_item(self):
        """End the part of a transaction that is an item's; it fails if that is no more. Raise
        Unseen if that can not be known.
        """
        if self._is_saved():
            self.do("RELEASE SAVEPOINT orchestrator_item")
        else:
            self._check_transaction()

    def undo_item(self):
        """Undo the part of a transaction that is an item's, as leave_item() ends it."""
        if self._is_saved():
            self.do("ROLLBACK TO SAVEPOINT orchestrator_item")
        elif self.has_savepoints or not is_aborted(self.raw):  # only what is open can be aborted
            self._check_transaction()

    def _is_saved(self):
        """Return whether a savepoint was made for the item."""
        ahead, self.ahead = self.ahead, None
        if not ahead or not ahead.end():
            return self.has_savepoints
        if self.raw.closed:
            raise RuntimeError("the connection is closed")
        if is_in_transaction(self.raw):
            raise Unseen
        return False

    def _check_transaction(self):
        if self.transaction is not None and self._find_transaction() != self.transaction:
            raise RuntimeError("the transaction is another")

    def _find_transaction(self):
        return self.read(_TRANSACTION[self.kind])[0][0]

    # --- what views ask ---

    def count(self, since):
        """Return how many items have each status, and of how many the last try ended since a
        moment.
        """
        return {status: (count, int(new)) for status, count, new in self.read(
            "SELECT status, count(*), sum(CASE WHEN ended_at >= ? THEN 1 ELSE 0 END) "
            "FROM orchestrator_items WHERE pipeline = ? AND tool = ? GROUP BY status",
            (since, *self.key))}

    def load_items(self, statuses, after):
        """Return a page of the rows of the items with one of some statuses, by name."""
        marks = ", ".join("?" * len(statuses))
        rows = self.read(f"SELECT {', '.join(LEDGER_COLUMNS)} "  # noqa: S608 - names of our own
                         "FROM orchestrator_items "
                         f"WHERE pipeline = ? AND tool = ? AND item > ? AND status IN ({marks}) "
                         f"ORDER BY item LIMIT {_PAGE}", (*self.key, after, *statuses))
        return [dict(zip(LEDGER_COLUMNS, row)) for row in rows]


_INSERT = """
    INSERT INTO orchestrator_items (pipeline, tool, item, version, passed, status, attempts, deaths,
                                    source, run_id, ended_at, duration_s, row_count, error)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_TRANSACTION = {
    "duckdb": "SELECT txid_current()",
    "postgresql": "SELECT max(split_part(virtualtransaction, '/', 2)::bigint) FROM pg_locks "
                  "WHERE pid = pg_backend_pid()",
}
_REOPEN = """
    UPDATE orchestrator_items
    SET passed = nullif(passed, ?), status = 'pending', attempts = 0, deaths = 0
    WHERE pipeline = ? AND tool = ? AND item = ? AND run_id = ?
"""
_UPDATE = """
    UPDATE orchestrator_items
    SET version = ?, passed = coalesce(?, passed), status = ?, attempts = ?, deaths = ?, source = ?,
        run_id = ?, ended_at = ?, duration_s = ?, row_count = ?, error = ?
    WHERE pipeline = ? AND tool = ? AND item = ? AND (passed IS NULL OR passed <> ?)
"""


def count_changed(cursor):
    """Return how many rows an UPDATE changed, which DuckDB gives as a row."""
    return cursor.fetchone()[0] if cursor.rowcount < 0 else cursor.rowcount


def count_tries(item):
    """Return how often an item was tried, as far as it is recorded."""
    return item.tries + item.deaths


def read_item(number, found):
    """Return what items() gave as the name of an item and its version, "" where it gave none.

    Raise TypeError for what is neither.
    """
    if type(found) is str:
        return found, ""
    is_row = isinstance(found, tuple) or type(found).__name__ == "Row"  # of a cursor
    pair = (*found, "")[:2] if is_row and len(found) in (1, 2) else (found, "")
    name, version = (
        value if isinstance(value, str) else "" if value is None and i else
        os.fsdecode(value) if hasattr(value, "__fspath__") else
        # What is no text fails this item alone; what could be one is to be given as one.
        format_value(value) if isinstance(value, bytes) and not format_value(value).isprintable()
        else str(value) if hasattr(value, "isoformat")
        or is_number(value) and (i or isinstance(value, int)) else None
        for i, value in enumerate(pair))
    if name is None or version is None:
        raise TypeError(f"items() gave {found!r} as item {number}; an item is a name, or a "
                        "tuple of name and version, both texts, whole numbers, dates or paths")
    return name, version


def format_value(value):
    """Return a value of a database as text, "" for NULL."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    is_bytes = isinstance(value, (bytes, memoryview))
    return bytes(value).decode(errors="surrogateescape") if is_bytes else str(value)


def find_unfit(name, version):
    """Return why a database could not keep this name or version of an item, "" if it can."""
    if name and not version and len(name) <= NAME_LENGTH and name.isascii() and name.isprintable():
        return ""  # as most are
    for text, which, least, fix in ((name, "name", 1, "rename the file, or leave it out"),
                                    (version, "version", 0, "give it another one")):
        if not least <= len(text) <= NAME_LENGTH or "\0" in text:
            return (f"its {which} can not be kept: one has {least} to {NAME_LENGTH} letters, none "
                    "of them NUL")
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"its {which} is no text that a database keeps: {fix}"
    return ""


def write_slip(fd, job, item):
    """Note the item that is at work, unsynced: read_slip() tells it if this process dies."""
    item = item or Item("")
    content = "\0".join((job.tool, job.source, item.name, item.version, str(item.tries),
                         str(item.deaths), "")).encode()
    if hasattr(os, "pwrite"):
        os.pwrite(fd, content, 0)
    else:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, content)


def read_slip(path):
    """Return the (tool, source, item) that was at work in a process, with None for no item."""
    try:
        with open(path, "rb") as file:
            tool, source, name, version, tries, deaths = file.read().decode("utf-8").split("\0")[:6]
        return tool, source, Item(name, version, None, int(tries), int(deaths)) if name else None
    except (OSError, ValueError):
        return "", "", None


def find_slip(folder, run_id, pid):
    """Return the file in which a process notes the item that it is at, in a run."""
    return os.path.join(folder, f"{run_id}.{pid}")


def load_slips(folder, prefix=""):
    """Return the (path, source, item) of the items that were at work in processes, by tool and
    item; of runs whose id begins with a prefix.
    """
    found = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        tool, source, item = read_slip(path)
        if item is None or (tool, item.name) in found:  # which a former run could not record
            forget_slip(path, is_told=item is not None)
        elif name.startswith(prefix):
            found[tool, item.name] = path, source, item
    return found


def forget_slip(path, is_told=False):
    """Remove a slip, if it tells of nothing or that is recorded."""
    if path and (is_told or read_slip(path)[2] is None):
        with contextlib.suppress(OSError):
            os.unlink(path)


# === 7 MODULES ==================================================================================
# Find the module of a tool, read it without importing it, check that it can be called with what
# there will be, import it. It calls nothing of a tool. A module is looked up, read and parsed once
# for all the tools that are in it, and kept as little as is asked of it, until forget_modules():
# a syntax tree takes 2 KB for each line.

class Available(NamedTuple):
    """What there is for the functions of tools: `arguments` by name, beside a tool's own and those
    of the engine, and results of `tools`, of which sees(tool, other) tells whether a tool waits
    for another and may see what that returned.
    """
    arguments: Mapping[str, Any]
    tools: Mapping[str, Tool]
    sees: Callable[[str, str], bool]


class Parameters(NamedTuple):
    """What a function takes. `takes_all`: it has a **kwargs. `results` are those of the names that
    stand for what other tools have returned, as far as that is known: see find_results().
    """
    names: Sequence[str] = ()
    required: Sequence[str] = ()
    positional_only: Sequence[str] = ()
    takes_all: bool = False
    results: Sequence[str] = ()

    def takes(self, name):
        """Return whether the function gets an argument."""
        return self.takes_all or name in self.names

    def without(self, arguments):
        """Return what the function takes but for some arguments."""
        return self._replace(names=[name for name in self.names if name not in arguments])


ANYTHING = Parameters(takes_all=True)  # what is taken where that can not be told
_SUMMARY_LENGTH = 72  # of a command's text
_PROGRAM_BYTES = 2**20  # a longer file is data that a command is given, or made by a compiler
# what the braces of a command may name beside arguments, and what a run() would take it from
_BRACES_OF_ENGINE = {"item": "item", "stem": "item", "version": "item", "run_id": "context",
                     "tool": "context", "attempt": "context"}
HOOKS = ("check", "items", "setup")  # what a tool's module may have beside the tool's function


class Definition(NamedTuple):
    """What a global name of a module stands for, as it reads, or as it is once that is imported.
    `takes` is that of a function, and ANYTHING of a class, an import, a function with decorators,
    as they read. `kind` is the type of what can not be called, and "" of all else.
    """
    line: int = 0
    summary: str = ""
    takes: Parameters = ANYTHING
    kind: str = ""


class Module(NamedTuple):
    """A module as it reads, or is: `definitions` by name, None if it can not be read, because it
    is in C, say, or has a `problem`. `summary` is the first line of its docstring; `imports` are
    those of read_imports(), and `doubles` of find_doubles() in the main program.
    """
    path: str
    definitions: Optional[Dict[str, Definition]] = None
    summary: str = ""
    problem: Optional[UserError] = None
    imports: Sequence[Tuple[str, int]] = ()
    doubles: Sequence[UserError] = ()


class Callee(NamedTuple):
    """A tool that is imported and can be called. `run` of a command returns its words."""
    tool: Tool
    run: Callable[..., Any]
    run_takes: Parameters
    check: Optional[Callable[..., Any]]
    check_takes: Parameters
    items: Optional[Callable[..., Any]]
    items_takes: Parameters
    setup: Optional[Callable[..., Any]]
    setup_takes: Parameters
    is_main: bool  # whether what run() returns is an exit code

    @property
    def all_takes(self):
        """What each of its functions takes."""
        return self.run_takes, self.check_takes, self.items_takes, self.setup_takes

    def takes(self, name):
        """Return whether a function of the tool gets an argument."""
        return any(each.takes(name) for each in self.all_takes)

    @property
    def has_items(self):
        """Whether run() is called once per item."""
        return self.items is not None or self.tool.given_items is not None


class SaysFailed(Exception):
    """What a tool returned says that it failed; the text is all that there is to tell."""


@functools.lru_cache(maxsize=None)
def find_module(name):
    """Return the spec of a module, found without importing it or its packages; else None."""
    import importlib.util
    from importlib.machinery import ModuleSpec, PathFinder
    if name in sys.modules:
        module = sys.modules[name]
        return getattr(module, "__spec__", None) or importlib.util.spec_from_file_location(
            name, getattr(module, "__file__", None)) or ModuleSpec(name, None)
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


@functools.lru_cache(maxsize=None)
def read_module(name):
    """Return a Module, read without importing it."""
    spec = find_module(name)
    if spec is None:
        return Module("", problem=UserError(f"no module {name}"))
    path = spec.origin or ""
    if not path and spec.submodule_search_locations:  # it is a mere folder
        return Module(name.replace(".", os.sep), {})
    try:
        tree = parse(path) if path.endswith(".py") and os.path.exists(path) else None
    except UserError as error:
        return Module(path, problem=error)
    if tree is None:
        return Module(path)
    return Module(path, read_definitions(tree), read_summary(tree), None, read_imports(tree),
                  [*find_doubles(path, tree)] if name == "__main__" else ())


def read_tool(tool):
    """Return a Module: that of a tool, or what stands for it where there is a command."""
    if not tool.command:
        return read_module(tool.module)
    text = format_words(tool.command)
    if len(text) > _SUMMARY_LENGTH:
        text = text[:_SUMMARY_LENGTH - 3] + "..."
    return Module("", {"run": Definition(1, text, read_braces(tool.command))}, text)


def parse(path, make=None):
    """Return the syntax tree of a file, down to an ENGINE mark, below which nothing is the user's;
    or what else there is to make of it. Raise UserError if it can not be read, or is not Python.
    """
    import ast
    try:
        with open(path, "rb") as file:
            return (make or ast.parse)(re.split(rb"\n#\s===\sENGINE ", file.read())[0], path)
    except (SyntaxError, ValueError, OSError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{format_path(path)}:{line}: {format_one_line(error)}",
                        "Mend that line.") from error


def find_uncompiled(tools):
    """Yield an error for each module of some tools that has a syntax tree, and makes no code: with
    a `return` outside a function, say.
    """
    modules = map(read_module, dict.fromkeys(tool.module for tool in tools))
    for path in [module.path for module in modules if module.definitions]:
        try:
            parse(path, functools.partial(compile, mode="exec"))
        except UserError as error:
            yield error


def forget_modules():
    """Forget what is known of modules: a command or a run begins, and they may have changed."""
    for function in (find_module, read_module, hash_module, lacks_function, find_executable):
        function.cache_clear()


def read_definitions(tree):
    """Return the Definition of each global name of a module: the last one, in `if`, `try` and
    `with` too, but for data where there is one that can be called: nobody knows then which it will
    be. That of "*" is a star import, which may define anything.
    """
    import ast
    found, left = {}, [(tree, "")]
    while left:
        node, kind = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name] = Definition(node.lineno, read_summary(node), read_parameters(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(((each.asname or each.name).split(".")[0], Definition(node.lineno))
                         for each in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if not kind or node.id not in found:
                found[node.id] = Definition(node.lineno, kind=kind)
        elif not isinstance(node, ast.Lambda):
            is_given = isinstance(node, (ast.Assign, ast.AnnAssign))
            kind = find_kind(node.value) if is_given else ""  # of the names right below
            left += [(each, kind) for each in ast.iter_child_nodes(node)][::-1]
    return found


def read_imports(tree):
    """Return [(package, line)] of what a module imports whenever it is imported itself: not in a
    function, `if` or `try`. None of one that changes sys.path: who knows what is there then.
    """
    import ast
    top = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if any(isinstance(each, ast.Attribute) and each.attr == "path" and ast.dump(each.value)
           == ast.dump(ast.Name("sys", ast.Load())) for node in top for each in ast.walk(node)):
        return []
    return [(name.partition(".")[0], node.lineno) for node in top
            for name in ([each.name for each in node.names] if isinstance(node, ast.Import)
                         else [node.module] if isinstance(node, ast.ImportFrom) and not node.level
                         else ())]


def find_doubles(path, tree):
    """Yield an error for each key that the tables of a module spell out twice, of which Python
    keeps the last.
    """
    import ast
    for node in tree.body:
        table = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        for each in ast.walk(table) if isinstance(table, ast.Dict) else ():
            lines = {}
            for key in each.keys if isinstance(each, ast.Dict) else ():
                if not isinstance(key, ast.Constant):
                    continue
                if key.value in lines:
                    yield UserError(f"{format_path(path)}:{key.lineno}: {key.value!r} is in this "
                                    f"dict since line {lines[key.value]}, and Python keeps the "
                                    "last one alone.", "Rename one of them, or take it out.")
                lines[key.value] = key.lineno


def find_table_doubles():
    """Return the errors of find_doubles() in the main program, if it has the tables."""
    has_tables = hasattr(sys.modules["__main__"], "TOOL_MAP")
    return read_module("__main__").doubles if has_tables else ()


def find_kind(value):
    """Return the type of the data that an expression spells out, for a sentence; else ""."""
    import ast
    try:
        return format_type(ast.literal_eval(value))
    except (ValueError, TypeError, SyntaxError, AttributeError):  # it is made by a call, say
        return ""


def read_parameters(node):
    """Return what a function takes, from its syntax tree; of a class, or one with decorators, that
    it takes all.
    """
    args = getattr(node, "args", None)
    if args is None or node.decorator_list:
        return ANYTHING
    by_position = args.posonlyargs + args.args
    defaults = [None] * (len(by_position) - len(args.defaults)) + args.defaults + args.kw_defaults
    names = [arg.arg for arg in by_position + args.kwonlyargs]
    return Parameters(names, [name for name, default in zip(names, defaults) if default is None],
                      names[:len(args.posonlyargs)], args.kwarg is not None)


def read_summary(node):
    """Return the first line of the docstring of a module, function or class, or ""."""
    import ast
    text = ast.get_docstring(node, clean=False) or ""  # to clean it takes `inspect`: 4 ms
    return text.strip().partition("\n")[0].strip()


def read_functions(tool):
    """Return the Definitions of a tool's functions, by name, as its module reads: its own, and
    those of HOOKS. What a star import may define is one of its own.
    """
    found = read_tool(tool).definitions or {}
    functions = {name: found[name] for name in (tool.function, *HOOKS) if name in found}
    if "*" in found:
        functions.setdefault(tool.function, found["*"])
    return functions


def describe_call(tool):
    """Return the module of a tool, or its command as one would type it."""
    return tool.module or format_words(tool.command)


def find_summary(tool):
    """Return the first line of a tool's docstring, or in brackets why there is none."""
    module = read_tool(tool)
    if module.problem:
        return f"({module.problem.problem})"
    if module.summary and tool.function == "run":
        return module.summary
    function = read_functions(tool).get(tool.function, Definition())
    return function.summary or module.summary


def read_braces(words):
    """Return what a command takes: `required` is what its braces name, `names` also what that is
    made of.
    """
    braces = [name for word in words for name in BRACES.findall(word)]
    sources = [_BRACES_OF_ENGINE[name] for name in braces if name in _BRACES_OF_ENGINE]
    return Parameters([*braces, *sources, *["context"] * bool(sources)], braces)


def make_run(words):
    """Return the run() of a command, which returns its words with what their braces name."""
    def run(context=None, item=None, **given):
        if context:
            stem = os.path.splitext(os.path.basename(item or ""))[0]
            given = {"item": item, "stem": stem, "version": context.version, "tool": context.tool,
                     "run_id": context.run_id, "attempt": context.attempt, **given}
        return [BRACES.sub(lambda brace: format_word(given[brace[1]]), word) for word in words]

    return run


def format_word(value):
    """Return an argument as a word of a command line.

    >>> format_word(None), format_word(True), format_word([2013, "a b"])
    ('', 'true', '2013,a b')
    """
    if isinstance(value, (list, tuple)):
        return ",".join(map(format_word, value))
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    return str(value)


@functools.lru_cache(maxsize=None)
def find_executable(word, base):
    """Return the path of a command's program, seen from the folder `base`; None if there is none.
    `python` is the one that runs this.
    """
    from shutil import which
    if word == "python" and sys.executable:
        return sys.executable
    return which(os.path.join(base, word) if os.path.dirname(word) else word)


def find_missing_file(tool, base):
    """Yield an error if the program of a command is not there, or can not be run, or the script
    that it gives to Python is not there.
    """
    where, (program, *words) = f"TOOL_MAP[{tool.name!r}]", tool.command
    if not (BRACES.search(program) or find_executable(program, base)):
        if os.path.dirname(program) and os.path.isfile(os.path.join(base, program)):
            yield UserError(f"{where}: {program} is not executable.",
                            f"Make it so (chmod +x {program}), or name what runs it: "
                            f'"command": "sh {program}".')
        else:
            yield UserError(f"{where}: there is no program {program!r}.",
                            "Install it, or correct its name or PATH. A file of the pipeline's "
                            'folder is "./name", a function of yours is a "module".')
    script = words[0] if program == "python" and words else ""
    if re.search(r"\.py(:\w+)?$", script) and not BRACES.search(script) \
            and not os.path.exists(os.path.join(base, script)):
        yield UserError(f"{where}: there is no file {script!r}.",
                        f"Write it, or correct its path (from {base} on).")


def read_source(name):
    """Return the bytes of a module's file, which may be in an archive; none if it has no file."""
    try:
        spec = find_module(name)
        return spec.loader.get_data(spec.origin or "")
    except (AttributeError, OSError):
        return b""


@functools.lru_cache(maxsize=None)
def hash_module(name):
    """Return a fingerprint of a module's file, "" if it has none.

    Its bytes count, since a syntax tree is another in each version of Python; only the ends of
    lines do not, which a checkout may change, and which mean the same to Python. Nor does what it
    imports.
    """
    from hashlib import sha256
    content = read_source(name)
    if content and find_module(name).origin.endswith(".py"):
        content = content.replace(b"\r\n", b"\n")
    return sha256(content).hexdigest() if content else ""


def hash_imported(name):
    """Return a fingerprint of what this process has imported of a module, which is what its file
    held then: it stays so with the module's spec, which is another when that is loaded again.

    For one that has just been imported, hash_module() is asked for before that, so that who
    changes it meanwhile has changed it since.
    """
    spec = getattr(sys.modules.get(name), "__spec__", None)
    known = {} if spec is None else vars(spec)
    return known.setdefault("orchestrator_source", hash_module(name))


def find_sources(tool, base):
    """Return short fingerprints of a tool's source, by name: of its module, or of those words of
    its command that are files of the folder `base`: the program and the first other one. One that
    is too long for a program is known by size and time.
    """
    from zlib import crc32
    if not tool.command:
        return {tool.module: f"{crc32(read_source(tool.module)):08x}"}
    sources = {}
    for word in tool.command:
        path = os.path.normpath(os.path.join(base, word))
        if path.startswith(os.path.join(base, "")) and os.path.isfile(path):
            stat = os.stat(path)
            sources[word] = hash_file(path)[:16] if stat.st_size <= _PROGRAM_BYTES \
                else f"{stat.st_size} {stat.st_mtime_ns}"
            if word != tool.command[0]:
                break
    return sources


def hash_source(tool, base, hash_one=hash_module):
    """Return a fingerprint of a tool's source, of a module by hash_module() or hash_imported()."""
    return repr(find_sources(tool, base)) if tool.command else hash_one(tool.module)


def describe_source(tool, source):
    """Return what of a tool itself decides what it does: the function or command, the fingerprint
    of its source, and those options that change more than when, how often and where it runs.

    Needs are not among them: they are recorded with what they had done. An option that says what
    is so without it is left out, so that one which a later engine knows changes nothing.
    """
    options = {"commits": tool.commits, "reads": sorted(tool.reads or ()),
               "writes": sorted(tool.writes or ()), "arguments": tool.arguments}
    calls = "$ " + format_words(tool.command) if tool.command else f"{tool.module}:{tool.function}"
    return {"calls": calls, "source": source,
            "options": {name: given for name, given in options.items() if given}}


def find_changed_source(was, now):
    """Return what changed of a tool itself, as describe_source() says, in words, or ""."""
    if was["calls"] != now["calls"]:
        what = "command" if now["calls"].startswith("$ ") else "function"
        return f"it calls another {what}, {now['calls']},"
    old, new = was["options"], now["options"]
    names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    if names:
        return f"its options changed ({', '.join(names)})"
    return "its source changed" if was["source"] != now["source"] else ""


def hash_item_source(tool, base):
    """Return a short fingerprint of what the tries of an item are of: a change gives them back."""
    from hashlib import sha256
    calls = tool.command or (tool.module, tool.function, tool.commits)
    what = *calls, hash_source(tool, base, hash_imported)
    if tool.arguments:
        what += format_arguments(tool.arguments),
    return sha256(repr(what).encode()).hexdigest()[:16]


def find_versions(pipeline, tools):
    """Return what runs, as columns of `runs`: fingerprints of the tables and of each source file.

    They are short and cheap, and tell who resumes what has changed.
    """
    from zlib import crc32
    base = find_base(pipeline.get_connection)
    tables = repr((pipeline.tools, pipeline.stages, pipeline.limits))
    tools = {(tool.module, tool.command): tool for tool in tools}.values()  # each is read once
    return {"tables": f"{crc32(tables.encode()):08x}",
            "sources": {name: source for tool in tools
                        for name, source in find_sources(tool, base).items()}}


def find_base(get_connection):
    """Return the folder of the file that defines get_connection, else of the main program."""
    code = getattr(get_connection, "__code__", None)
    if get_connection is no_connection:
        code = None
    return os.path.dirname(os.path.realpath(getattr(code, "co_filename", None)
                                            or find_main_file() or "."))


def find_main_file():
    """Return the path of the main program, or None."""
    return getattr(sys.modules["__main__"], "__file__", None)


def take_path():
    """Have modules looked for in the main program's folder, also where Python was told not to, by
    -P, -I or PYTHONSAFEPATH. Raise UserError if a file hides what the engine needs of Python.
    """
    file = find_main_file()
    if file and not getattr(sys.modules["__main__"], "__spec__", None) \
            and getattr(sys.flags, "safe_path", sys.flags.isolated):  # the former is of 3.11
        folder = os.path.dirname(os.path.realpath(file))
        if folder not in sys.path:
            sys.path.insert(0, folder)
    check_hiding(sys.path)


def check_modules(pipeline, tools):
    """Raise UserError for the tools whose module or program is not there, or whose module has not
    their function, or whose items are to be those of one that has none. Imports nothing.
    """
    missing, base = [], find_base(pipeline.get_connection)
    for tool in tools:
        if tool.command:
            missing += find_missing_file(tool, base)
        elif find_module(tool.module) is None:
            missing.append(missing_module(tool))
    scripts = [missing_function(tool, read_module(tool.module).path) for tool in tools
               if not missing and tool.module and lacks_function(tool.module, tool.function)]
    check_mistakes(missing or scripts + find_wrong_each(pipeline, tools))


@functools.lru_cache(maxsize=None)
def lacks_function(name, function):
    """Return whether a module surely has no such function, as it reads. It may be a script, which
    its import would run. One that is imported already is asked itself.
    """
    line = f"\ndef {function}(".encode()
    if name in sys.modules or line in b"\n" + read_source(name):  # to parse it takes longer
        return False
    found = read_module(name).definitions
    return found is not None and found.keys().isdisjoint((function, "*"))


def missing_function(tool, path):
    """Return the sentence for a module that has not the function of its tool."""
    script = tool.module.replace(".", "/") + ".py"
    is_script = tool.function == "run" and path.replace(os.sep, "/").endswith("/" + script)
    fix = f'Write "command": "python {script}", or ' if is_script else "Write "
    return UserError(f"TOOL_MAP[{tool.name!r}]: {format_path(path)} has no function "
                     f"{tool.function}().", f"{fix}`def {tool.function}(conn, **kwargs):` in it.")


def missing_module(tool):
    """Return the sentence for a module that is not there, with the nearest that is beside it."""
    import pkgutil
    first = tool.module.partition(".")[0]
    spec = find_module(first)
    if first != tool.module and spec and spec.has_location and not spec.submodule_search_locations \
            and os.path.isdir(os.path.join(sys.path[0], first)):
        return UserError(f"TOOL_MAP[{tool.name!r}]: there is no module {tool.module!r}: the file "
                         f"{format_path(spec.origin)} hides the folder {first} from Python.",
                         "Rename one of them, or put an empty file __init__.py into the folder.")
    package, dot, _ = tool.module.rpartition(".")
    places = getattr(find_module(package), "submodule_search_locations", None) or () if package \
        else sys.path[:1]
    there = [package + dot + each.name for each in pkgutil.iter_modules(list(places))]
    nearest = format_nearest(tool.module, there)
    fix = nearest if nearest.startswith("Did") else "Write it, or correct its path"
    return UserError(f"TOOL_MAP[{tool.name!r}]: there is no module {tool.module!r}.",
                     f"{fix} (dots between folders, starting from "
                     f"{sys.path[0] or 'this folder'}).")


def find_wrong_each(pipeline, tools):
    """Return an error for each tool whose items are to be those of one that has none."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: 'each' is {tool.each!r}, which has no items.",
                      f"Write `def items(conn):` in {pipeline.tools[tool.each].module}."
                      if pipeline.tools[tool.each].module else "Name a tool that has items.")
            for tool in tools if tool.each in pipeline.tools
            and not has_items(pipeline.tools[tool.each])]


def read_mistakes(tool, available, base):
    """Yield the mistakes in a tool's module, with file and line, without importing it; or in its
    command, which is run in the folder `base`.
    """
    module = read_tool(tool)
    if tool.command:
        yield from find_missing_file(tool, base)
        for _, error in find_mistakes(tool, "", module.definitions, available):
            yield error
    elif module.problem:
        yield module.problem if module.path else missing_module(tool)
    elif module.definitions is not None:
        for line, error in find_mistakes(tool, module.path, read_functions(tool), available):
            yield UserError(f"{format_path(module.path)}:{line}: {error.problem}", error.fix)
        for name, line in module.imports:
            if find_module(name) is None:
                yield UserError(f"{format_path(module.path)}:{line}: there is no module {name!r} "
                                "to import.", "Install what it is in, or correct its name.")


def check_callable(tools, available):
    """Raise UserError with what keeps tools from being called, as load_callees() does, as far as it
    can be read in their modules.
    """
    mistakes = []
    for tool in tools:
        module = read_tool(tool)
        cause = module.problem and module.problem.__cause__
        if cause:
            mistakes.append(make_import_error(tool, cause))
        elif module.definitions is not None:
            mistakes += [error for _, error in find_mistakes(
                tool, module.path, read_functions(tool), available)][:1]
    check_mistakes(mistakes)


def find_mistakes(tool, path, functions, available):
    """Yield what is wrong with the functions of a tool, be its module read or imported: a line and
    a UserError.

    `path` is that of the module, `functions` are Definitions by name.
    """
    where = f"TOOL_MAP[{tool.name!r}]"
    run = functions.get(tool.function)
    if run is None:
        yield 1, missing_function(tool, path or tool.module)
    elif run.kind:
        yield run.line, UserError(f"{where}: {tool.function} of {format_path(path or tool.module)} "
                                  f"is {run.kind}, not a function.",
                                  f"Write `def {tool.function}(conn, **kwargs):` in it.")
    items = functions.get("items")
    has_own_items = tool.function != "items" and items is not None and not items.kind
    for name, found in functions.items():
        if name == "setup" != tool.function and found.kind:
            yield found.line, UserError(f"{where}: setup of {tool.module} is {found.kind}, not a "
                                        "function.", "Write `def setup(conn):`, or rename it.")
        for problem, fix in () if found.kind else find_misfits(
                tool, name, found.takes, has_own_items, available):
            yield found.line, UserError(f"{where}: {problem}", fix)
            break  # what follows may come of it
    takes = [found.takes for found in functions.values() if not found.kind]
    for name in tool.arguments if run else ():
        if not any(each.takes(name) for each in takes):
            yield run.line, UserError(
                f"{where}: 'arguments' has {name!r}, which " + (
                    f"no function of {tool.module} takes." if tool.module
                    else "its command does not name in braces."),
                format_nearest(name, find_names(takes)))


def find_names(takes):
    """Return the arguments that are named by functions, but for the engine's own."""
    return dict.fromkeys(name for each in takes for name in each.names
                         if name not in RESERVED_ARGUMENTS)


def find_misfits(tool, name, takes, has_own_items, available):
    """Yield why a function of a tool can not be called with what there will be, and what to do.
    `has_own_items`: it has an items().
    """
    if name == tool.function:
        yield from find_item_misfits(tool, has_own_items, takes)
    if tool.command:
        yield from find_command_misfits(tool, takes, available)
        return
    where = f"{name}() of {tool.module}"
    if takes.positional_only:
        yield (f"{where} takes {takes.positional_only[0]!r} by position only.",
               "Take the `/` out of its parameters: arguments are passed by name.")
    comes_before = {"items": "what tells which there are", "setup": "called before there is any"}
    before = comes_before.get(name) if name != tool.function else None
    has_items = not before and (has_own_items or tool.given_items is not None)
    known = {*available.arguments, *tool.arguments, "conn", "context", *["item"] * has_items}
    results = find_results(tool, takes, available)
    missing = [each for each in takes.required if each not in known
               and not (each in results and available.sees(tool.name, each))]
    if not missing:
        return
    if "item" in missing and before:
        yield (f"{where} asks for 'item', but it is {before}.",
               "Take that out of its parameters.")
    if "item" in missing:
        yield (f"{where} asks for 'item', which nothing gives.",
               "Write `def items(conn):` beside it, which returns what there is to do.")
    if missing[0] in PERIOD_ARGUMENTS:
        yield (f"{where} asks for {missing[0]!r}, which only --backfill gives.",
               f"Run it so, or give it a default: {missing[0]}=None.")
    if missing[0] in results:
        yield (f"{where} asks for {missing[0]!r}, but there will be no result of that tool for "
               f"{tool.name}.", f'Let it need that, "needs": ["{missing[0]}"], and run it before; '
               f"or give it a default: {missing[0]}=None.")
    yield (f"{where} asks for {', '.join(map(repr, missing))}, which nothing gives.",
           f"There are {', '.join(sorted(known))}. Give it a default ({missing[0]}=None), or "
           f"declare --{missing[0].replace('_', '-')} in add_arguments().")


def find_command_misfits(tool, takes, available):
    """Yield which names in the braces of a command nothing gives, and what to do."""
    known = {*available.arguments, *tool.arguments, *(
        name for name, source in _BRACES_OF_ENGINE.items()
        if source == "context" or has_items(tool))}
    results = find_results(tool, takes, available)
    known.update(name for name in results if available.sees(tool.name, name))
    for name in takes.required:
        problem = f"its command names {{{name}}}, which nothing gives."
        if name in known:
            continue
        if name in _BRACES_OF_ENGINE:
            yield problem, 'Give it items: "each": "load" for those of another tool.'
        elif name in PERIOD_ARGUMENTS:
            yield problem[:-1] + " but --backfill.", "Run it so, or take that out."
        else:
            yield problem, (f"{format_nearest(name, sorted(known))}\nOr declare "
                            f"--{name.replace('_', '-')} in add_arguments(), or, if the program "
                            f"is to get the braces, put a blank into them: {{ {name} }}.")


def find_results(tool, takes, available):
    """Return the parameters of a function that are named like other tools, and like nothing else
    that its own tool gets.
    """
    others = {*available.arguments, *tool.arguments, *RESERVED_ARGUMENTS, *PERIOD_ARGUMENTS,
              tool.name}
    return [name for name in takes.names if name in available.tools and name not in others]


def find_item_misfits(tool, has_own_items, run_takes):
    """Yield why what TOOL_MAP says of a tool does not go with its items, or their lack."""
    given = tool.given_items
    if has_own_items and given is not None:
        yield (f"its items are those of {given!r}, but {tool.module} has a function items() "
               "too.", "Take out the one or the other.")
    if has_own_items or given is not None:
        if tool.cache_s is not None:
            yield ("'cache' is not for tools with items, of which each is done once.",
                   "Take 'cache' out.")
        if not run_takes.takes("item") and tool.command:
            yield ("its command is run once per item, but does not name it.",
                   "Write {item} or {stem} into it.")
        elif not run_takes.takes("item"):
            yield (f"{tool.function}() of {tool.module} is called once per item, but does not "
                   "take it.", f"Write `def {tool.function}(conn, item):`.")
    elif tool.batch != 1 or tool.outputs:
        what = repr("batch") if tool.batch != 1 else f"'writes': {tool.outputs[0]!r}"
        lack = f"and {tool.module} has no function items()" if tool.module else "which it has not"
        yield (f"{what} is for tools with items, {lack}.",
               f'Write one, say "items": "raw/*.csv", or take {what} out.')


def load_callees(tools, available, interrupts):
    """Return the tools imported and ready to be called, by name.

    Raise UserError with all that is wrong: a module that can not be imported, no run(), a run()
    that asks for more than is `available`.
    """
    errors = []
    loaded = {}  # tools may share a function

    def load(_, tool):
        """Return one of the tools, imported; of a function and options that came before, the same.
        """
        # and what it must be like depends on these options
        key = (tool.module, tool.function, tool.command, tool.given_items is None, tool.outputs,
               tool.batch, tool.cache_s, *tool.arguments)
        if key in loaded:
            return loaded[key]._replace(tool=tool)
        callee = load_callee(tool, available, interrupts)
        if not any(each.results for each in callee.all_takes):  # else who waits for whom counts too
            loaded[key] = callee
        return callee

    callees = make_all(errors, load, {tool.name: tool for tool in tools})
    check_mistakes(errors)
    return callees


def load_callee(tool, available, interrupts):
    """Return one tool, imported. Raise UserError if that can not be done."""
    if tool.command:
        module, given = None, {"run": make_run(tool.command)}
        found = read_functions(tool)
    else:
        interrupts.own_argv(tool)
        module = import_module(tool, interrupts)
        given = {name: getattr(module, name) for name in (tool.function, *HOOKS)
                 if hasattr(module, name)}
        found = {name: Definition(takes=find_parameters(value)) if callable(value)
                 else Definition(kind=format_type(value)) for name, value in given.items()}
    for _, error in find_mistakes(tool, getattr(module, "__file__", None), found, available):
        raise error
    functions = {}
    for name, value in given.items():
        takes = found[name].takes
        if callable(value):
            functions[name] = value, takes._replace(results=find_results(tool, takes, available))
    run, takes = functions.pop(tool.function)
    nothing = None, Parameters()
    return Callee(tool, run, takes, *itertools.chain(*(functions.get(name, nothing)
                                                       for name in HOOKS)),
                  "main" in (tool.function, getattr(run, "__name__", "")))


def import_module(tool, interrupts):
    """Return a tool's module, imported. Raise UserError if that fails."""
    import importlib
    where = f"TOOL_MAP[{tool.name!r}]: importing {tool.module}"
    try:
        try:
            return importlib.import_module(tool.module)
        except BaseException as error:
            if interrupts.is_forked:
                interrupts.end_fork(error)
            raise
        finally:
            if interrupts.is_forked:
                interrupts.end_fork()
            interrupts.put_back()
    except SystemExit as error:
        raise UserError(f"{where} called {format_one_line(error)}, {format_place(error, tool)}.",
                        join_reasons('Put that under `if __name__ == "__main__":`',
                                     explain_exit(error)) + ".") from error
    except Exception as error:
        raise make_import_error(tool, error) from error


def make_import_error(tool, error):
    """Return the sentence for a module whose import fails by an error."""
    return UserError(f"TOOL_MAP[{tool.name!r}]: importing {tool.module} failed, "
                     f"{format_place(error, tool)}:\n  {format_one_line(error)}",
                     "Mend that line, or install what it needs. -v shows the whole traceback.")


def has_items(tool):
    """Return whether a tool has items, as its module reads; where a star is imported, it may."""
    found = read_tool(tool).definitions or {}
    items = found.get("items") or found.get("*")
    return tool.given_items is not None or items is not None and not items.kind


def read_takes(tool):
    """Return what the functions of a tool take that it does not have of its own, as its module
    reads; of what can not be read so, that it takes all.
    """
    found = read_tool(tool).definitions
    if found is None or "*" in found:
        return [ANYTHING]
    return [each.takes.without(tool.arguments) for each in read_functions(tool).values()]


def takes_any(tool, names):
    """Return whether a function of a tool takes one of some arguments, or can not be read."""
    return any(each.takes(name) for each in read_takes(tool) for name in names)


def check_are_taken(arguments, callees, pipeline, find_said):
    """Raise UserError for arguments that somebody gave and that no tool would ever get, nor
    get_connection().

    `callees` are those of a plan; the other tools are read, not imported, and only if no callee
    takes an argument: it may be one of theirs. `find_said` gives those that somebody gave, each
    with where that was, and is asked last: it takes time, and there are defaults that none takes.
    """
    takes = [find_asked(pipeline.get_connection)]
    for callee in callees.values():
        own = callee.tool.arguments
        takes += [each.without(own) for each in callee.all_takes] if own else callee.all_takes
    said = find_said() if find_untaken(arguments, takes) else {}
    left = find_untaken(said, takes)
    for tool in pipeline.tools.values():
        if left and tool.name not in callees:
            read = read_takes(tool)
            left = find_untaken(left, read)
            takes += read
    check_mistakes([UserError(f"{said[name]}: no tool takes {name!r}.",
                              format_nearest(name, find_names(takes))) for name in left])


def find_untaken(arguments, takes):
    """Return the arguments that none takes. The two ends of a period are one."""
    names = {name for each in takes for name in each.names}
    if not names.isdisjoint(PERIOD_ARGUMENTS):
        names.update(PERIOD_ARGUMENTS)
    takes_all = any(each.takes_all for each in takes)
    return [] if takes_all else [name for name in arguments if name not in names]


def find_asked(get_connection):
    """Return what get_connection() takes by name; nothing of what is no function: to look into
    another callable takes `inspect`, whose import is slow.
    """
    if getattr(get_connection, "__code__", None) is None:
        return Parameters()
    takes = find_parameters(get_connection)
    return Parameters(takes.names[len(takes.positional_only):], takes.required)


def find_connection_mistakes(get_connection, arguments):
    """Return an error if get_connection() asks for something that no argument of the run is."""
    takes = find_asked(get_connection)
    there = {*takes.names}.intersection(arguments)
    missing = [name for name in takes.required if name not in there]
    if not missing:
        return []
    nearest = format_nearest(missing[0], arguments)
    fix = nearest if nearest.startswith("Did") else (
        f"Give it a default ({missing[0]}=None), or declare --{missing[0].replace('_', '-')} in "
        "add_arguments().")
    return [UserError(f"get_connection() asks for {', '.join(map(repr, missing))}, which nothing "
                      "gives.", fix)]


def bind_connection(get_connection, arguments):
    """Return get_connection() with those arguments of the run that it names."""
    names = {*find_asked(get_connection).names}.intersection(arguments)
    return functools.partial(get_connection, **{name: arguments[name] for name in names})


def describe_tool(tool, has_database):
    """Return what a tool runs that has a command, and how it does its items, if it has some, for
    its reason in a plan.
    """
    runs = f"runs {read_tool(tool).summary}" if tool.command else ""
    if not has_items(tool):
        return runs
    source = f" of {tool.given_items}" if tool.given_items else ""
    is_exact = has_database and not (tool.commits or tool.command)
    return join_reasons(runs, f"each item{source} "
                        + ("exactly once" if is_exact else "at least once"))


def find_parameters(function):
    """Return what a function takes, as inspect.signature tells, which is slow to import."""
    if not isinstance(function, type(find_parameters)) or vars(function):  # a wrapper says so there
        return find_parameters_by_signature(function)
    code = function.__code__
    names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    first = code.co_argcount - len(function.__defaults__ or ())
    optional = {*names[first:code.co_argcount], *(function.__kwdefaults__ or ())}
    return Parameters(names, [name for name in names if name not in optional],
                      names[:code.co_posonlyargcount], bool(code.co_flags & 0x08))


def find_parameters_by_signature(function):
    """Return what any callable takes; of one that does not tell, that it takes all."""
    import inspect
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ANYTHING
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Parameters([p.name for p in named], [p.name for p in named if p.default is p.empty],
                      [p.name for p in named if p.kind is p.POSITIONAL_ONLY],
                      any(p.kind is p.VAR_KEYWORD for p in parameters))


def join_reasons(*reasons, joint="; "):
    """Return in one line those of some reasons that there are, with a full stop at its end alone.

    >>> join_reasons("No room.", "", "wait...", "try 2.")
    'No room; wait...; try 2.'
    """
    *before, last = [*filter(None, reasons)] or [""]
    return joint.join([*(re.sub(r"(?<!\.)\.$", "", each) for each in before), last])


_PARSERS = ("argparse", "optparse", "click", "typer", "fire", "docopt", "absl")


def explain_exit(error):
    """Return why a parser of command lines has ended a tool, if one did; else ""."""
    if not isinstance(error, SystemExit) or not error.__traceback__:
        return ""
    import traceback
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    parser = str(frame.f_globals.get("__name__")).partition(".")[0]
    if parser not in _PARSERS:
        return ""
    return (f"{parser} found nothing in sys.argv, which is the tool's name alone: declare what it "
            "needs in add_arguments(), and let its function take that by name")


_LINE_LENGTH = 300  # of an error; its traceback keeps more


def format_one_line(error):
    """Return an exception in one line, of letters that do nothing to a terminal."""
    try:
        text = str(error)[:10 * _LINE_LENGTH]
    except Exception:
        text = "(its text can not be read)"
    if isinstance(error, SystemExit):
        line = f"sys.exit({error.code!r})"
    else:
        text = clean("".join(c if c.isprintable() or c < "\xa0" else " " for c in text))
        kind = "" if isinstance(error, SaysFailed) else type(error).__name__
        line = ": ".join(filter(None, [kind, " ".join(text.split())]))
    return line if len(line) <= _LINE_LENGTH else line[:_LINE_LENGTH - 3] + "..."


def format_path(path):
    """Return a path as seen from the working folder, where that is shorter."""
    try:
        return min(os.path.relpath(path), path, key=len)
    except (ValueError, OSError):  # on another drive; or a tool removed the working folder
        return path


def is_engine_frame(file, line):
    """Return whether a frame of a traceback is the engine's or the interpreter's own."""
    return file.startswith("<frozen importlib") or (file == _ENGINE_FILE
                                                    and (line or 0) > _ENGINE_LINE)


def format_place(error, tool):
    """Return where an import failed: the tool's own line, and the one that it led to elsewhere."""
    import importlib
    import traceback
    own = getattr(find_module(tool.module), "origin", None)
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)
              if not is_engine_frame(f.filename, f.lineno) and f.filename != importlib.__file__]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    last = dict.fromkeys([place for place in places if place[0] == own][-1:] + places[-1:])
    return " -> ".join(f"{format_path(file)}:{line}" for file, line in last) \
        or "in no line of its own"


# === 8 CALLING ==================================================================================
# From a Job to messages: call a tool, all of one try inside one transaction. It does not decide
# what a message means for the run.


class Packed(NamedTuple):
    """A result as it travels between processes: pickled, or only the name of its type; and `kept`,
    what keep_result() makes of it for the history.
    """
    content: Optional[bytes]
    kind: str
    kept: Any = None


def pack_result(result, is_kept=False):
    """Return a result as it travels. Never raises: who asks for it is told."""
    import pickle
    if isinstance(result, Packed):
        return result
    content = None
    with contextlib.suppress(Exception):
        content = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
    return Packed(content, format_type(result), keep_result(result) if is_kept else None)


class Results(Mapping[str, Any]):
    """What tools returned, by name, to read only; each is fetched when it is asked for.

    Raises TypeError for a result that could not travel, KeyError for a tool without one.
    """

    def __init__(self, find, find_names):
        self._find, self._find_names = find, find_names  # find(tool) raises KeyError

    def __getitem__(self, tool):
        try:
            result = self._find(str.__str__(tool))  # nothing strange may travel
        except (KeyError, TypeError):
            raise KeyError(f"there is no result of {tool!r} here: results are of the tools that "
                           "this one needs") from None
        if not isinstance(result, Packed):
            return result
        if result.content is None:
            raise TypeError(f"the result of {tool!r} is {result.kind}, which can not travel from "
                            "one process or run to another; return data, or the name of a file or "
                            f"table, or run {tool} in this run, too")
        import pickle
        return pickle.loads(result.content)  # noqa: S301 - from our own worker's pipe

    def __contains__(self, tool):
        return tool in self._find_names()

    def __iter__(self):
        return iter(self._find_names())

    def __len__(self):
        return len(self._find_names())

    def __repr__(self):
        def show(tool):
            found = self._find(tool)
            if isinstance(found, Packed) and not (found.content and len(found.content) < 1000):
                return f"<{found.kind}>"
            return repr(self[tool])

        return "{" + ", ".join(f"{tool!r}: {show(tool)}" for tool in self) + "}"


class Context:
    """What a tool may know of its run: `context` among its arguments.

    run_id: text. tool: its name. item, version: of the item that is done, or None. attempt: which
    try of the item, or else of the tool, it is: 1, 2, ... results: what the tools that it waits for
    returned, by name, to read only. outcomes: how the tools that have ended by now did, by name,
    to read only. last_success: the moment in UTC, a `datetime`, at which the last success of this
    tool with the same arguments began, so that what came later has not been seen; None if there was
    none, in a backfill, or if no history is kept. Not counted are successes of a backfill, of a
    single item, and of some items only.
    """

    item = version = None

    def __init__(self, job, ask, tell):
        self.tool, self.attempt = job.tool, job.attempt
        self._job, self._ask = job, ask
        self._tell = tell  # tell({...}), the fields of an Event, reaches the listener of the run

    @property
    def run_id(self) -> str:
        """The id of the run, as `--history` has it."""
        return self._job.run_id.partition(".")[0]

    @functools.cached_property
    def results(self) -> Mapping[str, Any]:
        """What the tools that this one waits for returned, by name."""
        ask = functools.partial(self._ask, self._job)
        return Results(ask, functools.partial(ask, None))

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """How the tools of this run ended that have by now, by name, in the plan's order.

        Each has `status`, `reason`, `rows`, `error`, `traceback`, `attempts`, `duration_s`, `log`
        and `items`, but no `result`. One that is to be tried again has not ended.
        """
        from types import MappingProxyType
        return MappingProxyType(self._ask(self._job, Outcome))

    @property
    def last_success(self) -> Any:
        """When the last success with these arguments began, a `datetime` in UTC, or None."""
        from datetime import datetime, timezone
        at = self._job.last_success_at
        return None if at is None else datetime.fromtimestamp(at, timezone.utc)

    @functools.cached_property
    def log(self) -> Any:
        """The `logging.Logger` of this tool, named `orchestrator.TOOL`.

        Its lines go to the handlers that you set up for logging, else to the run's own screen.
        """
        return make_log(self.tool, self._tell)

    def progress(self, iterable: Iterable[Any], total: Optional[int] = None) -> Iterator[Any]:
        """Yield what an iterable yields, and tell who watches how far it is.

        `total` is how many there will be; by default len(iterable), where it has one.
        """
        if total is None:
            total = operator.length_hint(iterable) or None
        for done, each in enumerate(iterable, 1):
            yield each
            self._tell({"kind": "progress", "done": done, "total": total})


def make_log(tool, tell):
    """Return a logger whose lines are events, unless somebody has set up handlers of their own.

    It is not registered with `logging`, so nothing of a run stays behind in the process.
    """
    import logging

    class Log(logging.Logger):
        """Asks for each line whether there are handlers: they may come at any time."""

        def getEffectiveLevel(self):
            of_others = self.parent.getEffectiveLevel() if self.parent.hasHandlers() else 0
            return self.level or of_others or logging.DEBUG

        def isEnabledFor(self, level):  # the cache of Logger would not notice them
            return self.manager.disable < level >= self.getEffectiveLevel()

        def callHandlers(self, record):
            """Hand a line to the handlers that there are, or else to the run."""
            if self.hasHandlers():
                super().callHandlers(record)
            if self.parent.hasHandlers():
                return
            try:
                text = logging.Formatter().format(record)
            except Exception:
                logging.lastResort.handleError(record)  # wrong arguments of a line fail nothing
            else:
                tell({"kind": "log", "text": text, "level": record.levelno})

    logger = Log("orchestrator." + tool)
    logger.parent = logging.getLogger("orchestrator")
    return logger


_SAME_SIGNAL_S = 0.1  # nobody presses Ctrl-C twice in that


def find_signals(*names):
    """Return the numbers of those of some signals that this system has."""
    return [getattr(_signal, name) for name in names if hasattr(_signal, name)]


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, while a run lasts and only on the main thread.

    The first one ends what the tool is doing, by KeyboardInterrupt, and is noted in `signal`;
    the engine's own steps are never torn, they look at `signal` between tools. The second one
    ends the process at once, but for SIGHUP, of which a terminal that closes sends several, and
    for one that comes with the first, as timeout(1) signals its child and then all its group; also
    where `signal` was taken away meanwhile, so that tools can be called which clean up. A signal
    that was ignored before, as by nohup, stays ignored. A process that a tool forks takes
    signals as if there were no engine.

    What foreign code makes of this process ends with it, too, there where signals come: on the
    main thread, since it is the whole process's. State: `put_back`, see make_put_back(), and of
    what it puts back `folder` and `handler`, of Ctrl-C, which are looked at after each call.
    """
    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # no system has all of them
    lasting = set()  # those of this process; empty in one that was forked from it
    signal = timer = None
    signal_s = 0.0  # when the first came
    in_tool = is_on_main_thread = False  # whether foreign code is being called; where it is
    is_forked = False  # whether this process is one that a tool has forked
    folder = handler = None

    def __init__(self):
        self.before = {}
        self.before_exit = self.put_back = lambda: None

    def __enter__(self):
        import threading
        self.is_on_main_thread = threading.current_thread() is threading.main_thread()
        if self.is_on_main_thread:
            for number in find_signals(*self.NAMES):
                if _signal.getsignal(number) not in (_signal.SIG_IGN, None):
                    self.before[number] = _signal.signal(number, self.on_signal)
        self.lasting.add(self)
        self.look()
        return self

    def look(self, outputs=()):
        """Note what of this process is put back from now on; `outputs` are those of a Capture."""
        if self.is_on_main_thread:
            self.folder, self.handler = find_working_folder(), _signal.getsignal(SIGINT)
            self.put_back = make_put_back(outputs)

    def __exit__(self, *_):
        self.lasting.discard(self)
        if self.timer:
            self.timer.cancel()
        for number, handler in self.before.items():
            _signal.signal(number, handler)

    @staticmethod
    def leave_all():
        """Take signals as before. Runs in a process that was forked."""
        for interrupts in [*Interrupts.lasting]:
            interrupts.is_forked = True
            interrupts.__exit__()

    def on_signal(self, number, _frame):
        """Take a signal. Runs in the main thread, between any two instructions."""
        if not self.signal_s:
            self.signal, self.signal_s = number, time.monotonic()
            if self.in_tool:
                raise KeyboardInterrupt(number)
        elif number not in find_signals("SIGHUP") \
                and time.monotonic() - self.signal_s > _SAME_SIGNAL_S:
            self.before_exit()
            os._exit(EXIT_SIGNAL + number)

    def limit(self, seconds):
        """Interrupt what is called some seconds from now, as a first signal would."""
        import signal
        import threading

        def end():
            self.signal_s = 0.0  # this one is nobody's second
            signal.pthread_kill(threading.main_thread().ident, min(self.before))

        if self.timer:
            self.timer.cancel()
        if self.before and hasattr(signal, "pthread_kill"):  # not on Windows
            self.timer = threading.Timer(seconds, end)
            self.timer.daemon = True
            self.timer.start()

    def call(self, function, *args, is_item=False):
        """Return what foreign code returns, which the first signal may interrupt, and put back what
        it changed of this process; between the items of one job, the folder and Ctrl-C alone.
        """
        argv = sys.argv
        try:
            self.in_tool = True
            try:
                if self.signal is not None:  # it came in the instant before
                    raise KeyboardInterrupt(self.signal)
                return function(*args)
            except BaseException as error:
                if self.is_forked:
                    self.end_fork(error)
                raise
            finally:
                self.in_tool = False
        finally:  # also if the signal came between these two
            if self.is_forked:
                self.end_fork()
            if self.is_on_main_thread:
                sys.argv = argv
                if not (is_item and _signal.getsignal(SIGINT) == self.handler
                        and find_working_folder() == self.folder):
                    self.put_back()

    def end_fork(self, error=None):
        """End this process, which a tool has forked, and of which its part in that has ended, be it
        by an error: as Python does that, but nothing more of the run is done.
        """
        code, text = EXIT_SUCCESS, ""
        if isinstance(error, SystemExit):
            code = error.code or EXIT_SUCCESS
            if not isinstance(code, int):
                code, text = EXIT_FAILED, f"{code}\n"
        elif error is not None:
            code, text = EXIT_FAILED, format_traceback(error)
        try:
            sys.stderr.write(text)
            flush(sys.stdout)
            flush(sys.stderr)
        finally:
            os._exit(code & 0xFF)

    def own_argv(self, tool):
        """Let sys.argv be a tool's name alone, until call() returns: the words of the command line
        are the orchestrator's, and a tool that reads it would take `--force` for its own.
        """
        if self.is_on_main_thread:
            sys.argv = [tool.name]

    def finish(self, step, *args):
        """Return what a step of the engine returns that foreign code asked for, never torn."""
        import threading
        if threading.current_thread() is not threading.main_thread():
            return step(*args)
        in_tool, self.in_tool = self.in_tool, False
        try:
            result = step(*args)
        finally:
            self.in_tool = in_tool
        if in_tool and self.signal is not None:
            raise KeyboardInterrupt(self.signal)
        return result


def hold_signals():
    """Keep signals for the moment of a fork: one that reached the child before it takes signals as
    if there were no engine would be lost, and who sent it, as a Pool does that ends, would wait.
    """
    if Interrupts.lasting:
        _HELD[get_ident()] = _signal.pthread_sigmask(_signal.SIG_BLOCK,
                                                     find_signals(*Interrupts.NAMES))


def let_signals_come():
    """Take the signals that came meanwhile."""
    if get_ident() in _HELD:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _HELD.pop(get_ident()))


_HELD = {}  # by thread, which signals were blocked before it forks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=hold_signals, after_in_parent=let_signals_come,
                        after_in_child=Interrupts.leave_all)
    os.register_at_fork(after_in_child=let_signals_come)


def choose_arguments(takes, available):
    """Return the arguments that a function names, or all of them for its **kwargs.

    A `conn` that is None goes only to a function that names it.
    """
    chosen = {name: value for name, value in available.items()
              if takes.takes_all or name in takes.names}
    if "conn" in chosen and chosen["conn"] is None and "conn" not in takes.names:
        del chosen["conn"]
    return chosen


def call_run(callee, arguments):
    """Return what run() returns; for a main(), which returns an exit code, None.

    Raise SaysFailed if it is False, or an exit code with which a console script would have failed.
    """
    name = "main" if callee.is_main else callee.tool.function
    result = call_function(name, callee.run, arguments)
    if not callee.is_main:
        return result
    if not is_good_exit(result):
        shown = repr(result) if isinstance(result, (int, str)) else format_type(result)
        raise SaysFailed(f"main() returned {shown}: what it returns is an exit code, of which 0 "
                         "and None say success")
    return None


def call_check(callee, arguments):
    """Call check(). Raise SaysFailed if it says no, or what may be yes or no."""
    result = call_function("check", callee.check, arguments)
    if result is not None and result is not True:
        from numbers import Number
        if isinstance(result, Number):  # how SQLite says yes and no, or a count of what is wrong
            raise SaysFailed(f"check() returned {result}, which may mean yes or no: let it return "
                             "True or False, or raise")


def is_false(value):
    """Return whether a value is False, or what numpy and its like have for that."""
    if value is False:
        return True
    try:
        return getattr(value, "shape", None) == () and str(value.dtype).endswith("bool") \
            and not value
    except Exception:
        return False


def is_good_exit(code):
    """Return whether sys.exit() with this code ends a program well: with 0 or None."""
    return code is None or isinstance(code, int) and code == 0


def call_function(name, function, arguments):
    """Return what a function of a tool returns, or what the coroutine that it returns comes to.

    Raise SaysFailed if that is False, of a main() too, though as an exit code False is 0.
    """
    result = function(**arguments)
    if result is None or type(result) is int:
        return result
    code = getattr(result, "gi_code", None) or getattr(result, "ag_code", None)
    if code is not None and code is getattr(function, "__code__", None):
        raise TypeError(f"{function.__name__}() returned a generator, so nothing of it has run: "
                        "take the `yield` out of it")
    if hasattr(result, "__await__"):
        result = wait_for(result)
    if is_false(result):
        raise SaysFailed(f"{name}() returned False")
    return result


def wait_for(awaitable):
    """Return what an awaitable comes to, also where a loop is running already, as in Jupyter."""
    import asyncio

    async def wait():
        return await awaitable

    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        return asyncio.run(wait())
    finally:
        asyncio._set_running_loop(outer)


class Setting(NamedTuple):
    """What all who do jobs of a run share; it travels to each process once.

    `folder` is that of the history, or "" where none is kept; in `slips` each process notes the
    item that it is at, "" if it is not to. Names of files are seen from the folder `base`, in
    which commands are run; these have `grace_s` to end when they are asked to.
    """
    pipeline: Pipeline
    arguments: Mapping[str, Any]
    verbose: bool = False
    folder: str = ""
    slips: str = ""
    base: str = ""
    grace_s: float = 0.0


class Kept:
    """What a process keeps from job to job: its connection, the tools that it has imported, its
    slip, the threads that are known, and how many there were. And where processes differ:
    `interrupts`, how signals reach tools; `ask(job, name)`, which returns the result of a tool that
    a job may see, the names of all for None, or for Outcome how all ended that have; `show`, which
    shows what a command prints, None where that goes into the log by itself; `pack`, what a result
    is made into before the commit. `run_command` is that of WORKERS.
    """
    slip, slip_fd = "", -1

    def __init__(self, setting, interrupts, ask, run_command, show=None,
                 pack=lambda result: result):
        self.setting, self.interrupts, self.ask, self.pack = setting, interrupts, ask, pack
        self.run_command, self.show = run_command, show
        self.database = Database(
            bind_connection(setting.pipeline.get_connection, setting.arguments),
            lambda: interrupts.signal is not None)
        import threading
        self.callees, self.threads = {}, {*threading.enumerate()}
        self.thread_count = threading.active_count()

    def load(self, tool):
        """Return a tool, imported. Raise UserError if that can not be done."""
        if tool.name not in self.callees:
            available = Available(self.setting.arguments, self.setting.pipeline.tools,
                                  lambda *_: True)  # the run has looked at that
            self.callees[tool.name] = self.interrupts.call(
                load_callee, tool, available, self.interrupts)
        return self.callees[tool.name]

    def note(self, job, item):
        """Note in the slip of this process which item it is at; None if it is at none."""
        if self.slip_fd < 0 and item is not None and self.setting.slips:
            os.makedirs(self.setting.slips, 0o700, exist_ok=True)
            self.slip = find_slip(self.setting.slips, job.run_id, os.getpid())
            self.slip_fd = os.open(self.slip, os.O_WRONLY | os.O_CREAT, 0o600)
        if self.slip_fd >= 0:
            write_slip(self.slip_fd, job, item)

    def close(self):
        """Let go of the connection, and of the slip if it tells of nothing."""
        self.database.close()
        if self.slip_fd >= 0:
            with contextlib.suppress(OSError):  # a tool closed it
                os.close(self.slip_fd)
            forget_slip(self.slip)
            self.slip_fd = -1


def perform(job, setting, send, kept):
    """Do a job, and send what comes of it, in messages with its number:

    ("found", number, [Item, ...])     some that are pending
    ("listed", number, {...})          how many there are, and what to say of those left out
    ("tries", number, [Try, ...])      how some tries ended, as soon as that is durable
    ("event", number, {...})           what the tool tells of itself: the fields of an Event
    ("ended", number, problem)         a Try that tells what kept it from the rest, or None;
                                       pending, if it has had no connection for its items

    This is the one way to do work, whatever the process. What `send` raises is no tool's fault.
    """
    import threading
    doer = (Lister if job.is_listing else Trier)(job, setting, send, kept)
    problem = doer.do()
    if doer.has_items:
        kept.interrupts.put_back()
    if threading.active_count() != kept.thread_count:
        tell_threads(doer, kept)
    doer.tell("ended", problem)


def tell_threads(doer, kept):
    """Tell which threads a job has left running, but for those that libraries keep."""
    import threading
    left = {*threading.enumerate()} - kept.threads
    kept.threads |= left
    kept.thread_count = threading.active_count()
    names = ", ".join(sorted(thread.name for thread in left if not is_of_library(thread)))
    if names:
        doer.tell("event", {"kind": "log", "level": 30, "text": (
            f"it has left {names} running: join() a thread before the function that started it "
            "returns")})


def is_of_library(thread):
    """Return whether a thread is kept by a library, to be used again: of one of Python's own pools,
    or a daemon of a class of its own.
    """
    target = getattr(thread, "_target", None)
    module = getattr(target, "__module__", None) or ""
    return module.partition(".")[0] in ("asyncio", "concurrent", "multiprocessing") \
        or thread.daemon and target is None


_IN_LEDGER = "in the ledger: "
_CONNECTING = "in get_connection(): "
_GONE = "the connection is gone: "
LOCKED_S = 60.0  # how long an item comes again because others are at the same rows
_TAKEN_TRIES = 20  # and how often because somebody else wrote its row


class Doer:
    """Does a job: it lists items, or tries some, in one transaction after another, over the
    connection of this process and, of a tool with items, their ledger, which is opened with the
    first and again over each new connection. A tool that `commits` begins and ends its own.

    State: `ledger`; `is_sqlite`, what that is in; `is_watched`, whether an item may not end the
    transaction; `given`, the arguments that there are, and `results`, what other tools returned, as
    far as a function has asked for it; `step`, what the engine itself is doing, ""
    while it is the tool; `at_work`, the item that is being done, or of which it is not recorded yet
    that it lost the connection (is_death); of the transaction that was undone last, `had_ended`,
    whether it had ended before, and `was_closed`, whether the tool had closed the connection;
    `unsent`, why a message was not sent; `has_run`, the item whose command has passed.
    """
    ledger = at_work = unsent = None
    step = has_run = ""
    is_sqlite = is_watched = had_ended = was_closed = False

    def __init__(self, job, setting, send, kept):
        self.job, self.setting, self.send, self.kept = job, setting, send, kept
        self.tool, self.database = setting.pipeline.tools[job.tool], kept.database
        self.interrupts, self.given, self.results = kept.interrupts, {}, {}
        self.has_items = job.is_listing or job.items[:1] != (None,)

    def do(self):
        """Do the job; return what kept it from the rest, as perform() tells it."""
        try:
            self.callee = self.kept.load(self.tool)
            if self.callee.setup is not None and (self.job.is_listing or not self.has_items):
                self.insist(self._set_up)
            self.do_all()
        except BaseException as error:
            if self.unsent is not None:
                raise self.unsent from None
            return self._make_problem(error)
        finally:
            self.given.clear()  # its context holds this Doer, which would wait for the collector
            if self.has_items:
                self._leave()
        return None

    def tell(self, kind, what):
        """Send what came of the job."""
        try:
            self.send((kind, self.job.number, what))
        except Exception as error:
            self.unsent = error
            raise

    def give(self):
        """Make the arguments that there are, over the connection that is open. Those of the tool's
        own are copies: what it does to them is not to be there in its next try.
        """
        own = self.tool.arguments
        if own:
            from copy import deepcopy
            own = deepcopy(own)
        self.given = {**self.setting.arguments, **own, "conn": self.database.conn,
                      "context": Context(self.job, self.kept.ask,
                                         functools.partial(self.tell, "event"))}

    def choose(self, takes):
        """Return the arguments of a function, with the results that it names of tools for which
        this one waits; one that is not there is left to its default. Raise what context.results
        raises if there is none, or if the result could not travel.
        """
        chosen = choose_arguments(takes, self.given)
        for name in takes.results:
            try:
                if name not in self.results:
                    self.results[name] = self.given["context"].results[name]
                chosen[name] = self.results[name]
            except KeyError:
                if name in takes.required:
                    raise
        return chosen

    def _leave(self):
        """Note that nothing is at work any more."""
        if not (self.at_work and self.at_work.is_death):
            with contextlib.suppress(OSError):  # the tool closed the slip
                self.kept.note(self.job, None)
        if self.ledger:
            self.ledger.close()

    def make_failure(self, error):
        """Return how a try of a tool without items failed, or a job of one that has some."""
        had_ended = "its transaction had ended before: what it committed stays" * self.had_ended
        return Try(self.at_work, "failed", error=self.step + format_one_line(error),
                   traceback=format_traceback(error, self.setting.verbose),
                   reason=join_reasons(find_hint(error), explain_exit(error), had_ended))

    def _make_problem(self, error):
        """Return what kept the job from the rest."""
        if self.database.is_open:
            self.database.rollback()
        signal = self.interrupts.signal
        if signal is not None or isinstance(error, KeyboardInterrupt):
            return Try(self.at_work, "interrupted", reason=format_signal(signal))
        if isinstance(error, Unlisted):
            return Try(None, "unlisted", error=error.problem, reason=error.fix)
        if isinstance(error, UserError):
            return Try(None, "failed", error=error.problem, reason=NOT_AGAIN)
        problem = self.make_failure(error)
        has_none = self.step == _CONNECTING and not (self.database.is_open or self.at_work)
        if has_none and self.has_items and not self.job.is_listing:
            return problem._replace(status="pending")
        return problem

    def _set_up(self, number):
        """Call setup(), in a transaction of its own."""
        callee, has_conn = self.callee, self.callee.setup_takes.takes("conn")
        if has_conn:
            self.begin(number > 1)
        self.give()
        self.step = "in setup(): "
        self.interrupts.own_argv(self.tool)
        with until_exit(self.interrupts):
            self.interrupts.call(call_function, "setup", callee.setup,
                                 self.choose(callee.setup_takes))
        if has_conn:
            self.database.commit()
        self.given, self.step = {}, ""

    # --- its transactions ---

    def insist(self, step, *args):
        """Return what a step returns that begins and ends a transaction. Where there are items, and
        in setup(), it is taken again, and told how often it was, while others are in the way.
        """
        began_s, number = time.monotonic(), 0
        comes_again = self.has_items or step == self._set_up
        while True:
            try:
                if self.has_items and self.ledger is None:
                    self._open()
                return step(*args, number)
            except BaseException as error:
                self._undo(error)
                number += 1
                # A connection that waited for a command may be gone; that is not run again.
                is_taken = isinstance(error, Taken) and number < _TAKEN_TRIES \
                    or number == 1 and (is_made_already(error)
                                        or self.has_run and not self.database.is_open)
                if not comes_again or not is_taken and (
                        not is_locked(error) or time.monotonic() - began_s > LOCKED_S):
                    raise
            if not is_taken:
                self._wait(number)

    def _wait(self, number):
        """Wait a little, and not as long as others do."""
        from random import random
        self.interrupts.call(time.sleep, random() * min(0.005 * 2 ** number, 1.0))

    def _undo(self, error):
        """Undo what is not committed. Raise KeyboardInterrupt if a signal is behind an error."""
        database = self.database
        self.was_closed = was_closed(database.conn)
        self.had_ended = database.is_open and database.rollback()
        if isinstance(error, Unseen):
            database.ahead = None  # from now on its savepoint is sent first
        if self.ledger and not database.is_open:
            self.ledger.close()
            self.ledger = None  # the next one is over the next connection
        if self.interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def begin(self, is_urgent=False):
        """Begin a transaction; `is_urgent` waits at once for who else writes."""
        database = self.database
        if not database.is_fit:
            self.step = _CONNECTING
            self.interrupts.call(database.open, self.tool.commits)
        self.step = ""
        if not self.tool.commits:
            database.begin(is_urgent, has_items=self.has_items)

    def _open(self):
        """Open the ledger, and create it if it is not there."""
        self.begin()
        job, conn = self.job, self.database.conn
        check_connection(conn, _NO_LEDGER)
        ledger = Ledger(conn, self.setting.folder, self.setting.pipeline.name, job.tool, job.run_id,
                        job.source, self.database.schema)
        self.step = _IN_LEDGER
        if not ledger.is_there():
            self._create(ledger)
        self.database.commit()
        self.ledger, self.is_sqlite = ledger, ledger.kind == "sqlite"
        self.is_watched = not (ledger.is_apart or self.tool.commits or self.tool.command)

    def _create(self, ledger):
        """Create a ledger that is not there, if no other start does so in this moment.

        After a SET of get_connection() a rollback may make another schema the default: where
        there is a ledger in that, it was made there before it was looked for here.
        """
        schema = ledger.schema
        self._begin_anew()
        if self.database.has_set:
            ledger.move(find_schema(ledger.conn))
            if ledger.is_there():
                return
            self._begin_anew()
            ledger.move(schema)
        try:
            ledger.create()
            self.database.commit()
        except Exception:
            self._begin_anew()
            if not ledger.is_there():
                raise

    def _begin_anew(self):
        self.database.rollback()
        self.begin()


class Trier(Doer):
    """Tries items, each in one transaction with its row in the ledger; with "batch", several in
    one. A tool without items is one item, None, without a row.

    State, beside that of each Doer: `chosen`, the arguments that run() takes; `started_s`, since
    when an item is at work; of a failure that is to be recorded `fault`, see _find_fault(), and
    `took_s`, unless a former process told of it.
    """
    fault, took_s = "", None

    def do_all(self):
        """Try all items, and tell how the tries ended."""
        items, size = self.job.items, self.tool.batch
        left = [items[i:i + size] for i in reversed(range(0, len(items), size))]
        while left:
            tries, singly = self._try_group(left.pop())
            left += [(item,) for item in reversed(singly)]
            if tries:
                self.tell("tries", tries)

    def _try_group(self, group):
        """Return how items ended that were tried in one transaction, and those that are to be
        tried alone, because one of several failed, of which nothing is left then.
        """
        try:
            tries = self.insist(self._try_all, group)
            return tries, group[len(tries):]
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if self.has_items:
                return self._take_failure(group, error)
            return [self.make_failure(error)], ()

    def _try_all(self, group, number):
        """Return how some items ended, tried in one transaction, none of which failed; where they
        could not be undone together, only the first is tried.
        """
        self.at_work = None
        uses_database = self.has_items or self.callee.run_takes.takes("conn") \
            or self.callee.check_takes.takes("conn")
        if uses_database:  # else it may go on beside one that holds the database
            # One that begins with a look at a row could not wait for the lock later.
            self.begin(number > 1 or self.has_items and group[0].is_seen is None)
        if not self.given or self.given["conn"] is not self.database.conn:
            self.give()
            self.chosen = self.choose(self.callee.run_takes)
        if not (self.is_watched and self.ledger.has_savepoints):
            group = group[:1]
        ahead = self.database.ahead if len(group) == 1 else None
        tries = [self._try_item(item, number, ahead) if item else self._try_tool()
                 for item in group]
        if uses_database:
            self.step = "at the commit: "
            self.database.commit()
        return tries

    def _try_tool(self):
        """Return how the try of a tool without items ended, which did not fail."""
        result = self.interrupts.call(self._call)
        return Try(None, "success", self.kept.pack(result), count_rows(result))

    def _try_item(self, item, number, ahead):
        """Return how the try of an item ended, which did not fail, with its row written. With
        `ahead` it is in no transaction until it speaks to the database.
        """
        ledger, self.at_work, self.step = self.ledger, None, ""
        if item.charge:
            return self._record(item)
        if item.is_seen is None or number:
            item, status, rows, error = ledger.look(item)
            if status != "pending":
                return Try(item, status, rows=rows, error=error or "")
            if ahead:
                self.database.commit()
                self.begin()
        self.kept.note(self.job, item)
        if self.is_watched and not self.is_sqlite:
            ledger.begin_item(ahead)  # if that speaks, a connection lost before is no item's fault
        self.at_work, self.started_s = item, time.monotonic()
        context = self.given["context"]
        context.item, context.version, context.attempt = item.name, item.version, item.tries + 1
        self.chosen["item"] = self.given["item"] = item.name
        rows = None
        if not self.tool.command:
            rows = count_rows(self._call_watched())
        elif self.has_run != item.name:
            self.database.commit()  # nothing is open while it works
            self.interrupts.call(self._call, is_item=True)
            self.has_run = item.name
            self.begin(is_urgent=True)
        self.step = _IN_LEDGER
        ledger.record(item._replace(tries=item.tries + 1), "success", time.time(),
                      time.monotonic() - self.started_s, rows)
        return Try(item, "success", None, rows)

    def _call(self):
        """Return what run() returns, and check() passes."""
        callee = self.callee
        self.interrupts.own_argv(self.tool)  # not for get_connection(), a part of the program
        try:
            result = call_run(callee, self.chosen)
            if self.tool.command:
                result = self.interrupts.finish(self.kept.run_command, result, self.kept,
                                                self.job.log)
        except SystemExit as error:  # ends the try, not the run
            if not is_good_exit(error.code) or self.interrupts.is_forked:
                raise
            result = None
        missing = self.tool.writes and self.at_work and find_missing(
            self.tool, self.at_work.name, self.setting.base)
        if missing and not self.interrupts.is_forked:
            raise SaysFailed(f"it has not written {missing}")
        if callee.check is not None and not self.interrupts.is_forked:
            self.interrupts.own_argv(self.tool)
            call_check(callee, self.choose(callee.check_takes))
        return result

    # --- an item may not end the transaction ---

    def _call_watched(self):
        """Return what run() returns for an item. Raise EndedEarly if that ended the transaction,
        and what tells why if nothing could be committed.
        """
        if not self.is_watched:
            return self.interrupts.call(self._call, is_item=True)
        if self.is_sqlite:
            return self.interrupts.call(self._call_guarded, is_item=True)
        ledger = self.ledger
        try:
            result = self.interrupts.call(self._call, is_item=True)
            if ledger.kind not in ("mysql", "mariadb") and is_aborted(ledger.raw):
                raise RuntimeError("an error of the database was caught and ignored, after which "
                                   "nothing can be committed")
        except (Exception, SystemExit) as error:
            self._end_item(ledger.undo_item, error)
            raise
        # before its row, which might be committed at once if nothing is open
        self._end_item(ledger.leave_item)
        return result

    def _call_guarded(self):
        """Return what run() returns, which SQLite lets not end the transaction. Raise
        PermissionError if it tried that, also if it swallowed what it got for it.
        """
        guard = self.ledger.guard
        guard.is_up, guard.tried = True, ""
        try:
            result = self._call()
        finally:
            guard.is_up = False
            if guard.tried:
                raise PermissionError(_REFUSED % guard.tried)
        if not self.ledger.raw.in_transaction:
            raise RuntimeError("SQLite undid its transaction after an error that was ignored")
        return result

    def _end_item(self, end, error=None):
        """End the part of an item, which failed by an error, if any. Raise EndedEarly if it is
        gone.
        """
        try:
            end()
        except Taken:
            raise
        except Exception as problem:
            # A deadlock undoes all of the transaction on MySQL, and its savepoints.
            if not is_locked(error) or self.ledger.kind not in ("mysql", "mariadb"):
                text = join_reasons(error and format_one_line(error), _ENDED_EARLY)
                raise EndedEarly(text) from error or problem

    # --- how one failed ---

    def _find_fault(self, error):
        """Return whose fault it is that a transaction failed, which was undone: "item", its own;
        "early", of which some may have been committed; "lost", that of what took the connection
        down; or "place", no item's.
        """
        is_early = isinstance(error, EndedEarly)
        # SQLite has no server that could go away: what breaks it is its disk.
        if not self.database.is_open and not (is_early and self.was_closed) \
                and not (self.is_sqlite and is_of_place(error)):
            return "lost"
        if is_early:
            return "early"
        is_ours = self.step == _IN_LEDGER
        return "place" if is_ours or is_locked(error) or is_of_place(error) else "item"

    def _take_failure(self, group, error):
        """Return what _try_group() returns of items one of which failed. Raise what is no item's
        fault.
        """
        item, step, fault = self.at_work, self.step, self._find_fault(error)
        where = f"at {format_name(item.name)}: " if item else ""
        if item is None or fault == "place":
            self.step = where + step
            raise error
        again = [each._replace(is_seen=None) for each in group]
        if len(group) > 1 and fault == "item":
            return (), again
        is_lost = fault == "lost"
        if is_lost and isinstance(error, EndedEarly):
            error = error.__cause__  # it did not end it: that was lost with the connection
        text = (_GONE if is_lost else step) + join_reasons(
            format_one_line(error), "" if is_lost else find_hint(error), explain_exit(error))
        item = item._replace(charge=text, tries=item.tries + (not is_lost),
                             deaths=item.deaths + is_lost, is_death=is_lost)
        self.fault, self.took_s = fault, time.monotonic() - self.started_s
        try:
            [ended] = self.insist(self._try_all, (item,))
        except BaseException:
            if is_lost:
                self.at_work, self.step = item, f"{where}{text}; {self.step}"
            raise
        self.fault, self.took_s = "", None
        trace = format_traceback(error, self.setting.verbose)
        return [ended._replace(traceback=trace)], [each for each in again if each.name != item.name]

    def _record(self, item):
        """Record how an item failed, its charge, which its counts hold, if it is not recorded;
        return how it ended.
        """
        ledger, text, item = self.ledger, item.charge, item._replace(charge="")
        self.step = _IN_LEDGER
        # It may have been recorded before: its process ended then, or a former charge did.
        found, status, rows, problem = ledger.look(item._replace(tries=count_tries(item) - 1,
                                                                 deaths=0))
        if status != "pending" or count_tries(found) >= count_tries(item):
            return Try(found, status, None, rows, problem or text)
        if item.deaths >= DEATHS_ALLOWED or self.fault == "early":
            status = "quarantined"  # one that may have been done is not done again unasked
        elif item.tries > self.tool.retries and not item.is_death:
            status = "failed"
        ledger.record(item._replace(is_seen=found.is_seen), status, time.time(), self.took_s,
                      error=text)
        # One in memory is soon forgotten.
        return Try(item._replace(is_seen=None if ledger.is_apart else True), status, error=text)


_ENDED_EARLY = ('it ended its transaction inside the item, so that it may have been done: leave '
                'commit and rollback to the engine (CREATE TABLE commits, too, on MySQL), or say '
                '"commits": True and take at-least-once')
_REFUSED = ("%s was refused inside an item, which the engine commits: take conn.commit(), "
            "conn.rollback(), `with conn:` and executescript() out, or say \"commits\": True in "
            "TOOL_MAP and take at-least-once")


class Lister(Doer):
    """Lists the items of a tool: its items(), another tool or a pattern says which there are, the
    ledger which of them are pending. State, beside that of each Doer: `gone`, by the name of each
    item that is done, which of its output is not there.
    """

    def do_all(self):
        """Tell which items are pending, and how many there are. Those that were given up are left
        alone until they change, or somebody asks for them.
        """
        pending, given_up = self.insist(self._find_items)
        ledger, job = self.ledger, self.job
        others, listed = ledger.find_others(), ledger.listed
        if job.only is not None and job.only not in ledger.names:
            raise Unlisted(f"--item: there is no item {job.only!r} among the {listed} that are "
                           f"listed of {job.tool}.",
                           format_nearest(job.only, sorted(ledger.names)[:10_000]))
        is_hopeless = bool(given_up) and not ledger.has_passed()
        self.database.commit()
        if self.tool.outputs:
            check_outputs(self.tool, ledger.names)
        if self.gone:
            self.tell("event", {"kind": "log", "level": 20, "text": (
                f"{len(self.gone):,} of {count_items(listed)} pending again: their output is gone: "
                + format_names(list(self.gone.values())[:3], len(self.gone)))})
        if others and pending:  # before any of them is done anew
            self.tell("event", {"kind": "log", "level": 30, "text": (
                f"the ledger has items of this tool in pipeline {others[0]!r}, none in "
                f"{self.setting.pipeline.name!r}, so that all are done: NAME says which it is")})
        self.tell("found", [item for item in pending if job.only in (None, item.name)])
        unfit = [Try(Item(name), "failed", error=problem)
                 for name, problem in ledger.unfit if job.only is None]
        if unfit:
            self.tell("tries", unfit)
        self.tell("listed", {
            "counts": {"listed": listed, "pending": len(pending) + len(unfit),
                       "given_up": len(given_up)},
            "reason": self._describe_left_out(given_up),
            "is_hopeless": is_hopeless})

    def _describe_left_out(self, given_up):
        """Return what to say of items that are there and not to be done."""
        doubles, reasons = self.ledger.doubles, []
        if self.tool.items is not None and not self.ledger.listed:
            reasons.append(f"no file is named like {self.tool.items} in {self.setting.base}")
        if given_up:
            reasons.append(f"{count_items(len(given_up))} given up before: "
                           f"{format_names(given_up[:3], len(given_up))}; "
                           f"{format_retry(self.tool.name)}")
        if doubles:
            reasons.append("left out, since the name came before: "
                           + format_names(doubles[:3], len(doubles)))
        return "; ".join(reasons)

    def _find_items(self, number):
        """Return the items that are pending, and the names of those that are given up; those of
        which that was asked have their tries again.
        """
        each = self.tool.each
        self.begin(number > 1)
        if each and self.ledger.is_apart and not self.setting.folder:
            raise UserError(f"nothing tells which items passed {each}: there is neither a database "
                            "nor a history")
        self.give()
        self.gone = {}
        found = self.interrupts.call(self._sort_items)
        job, back, names = self.job, self.ledger.given_back, self.ledger.names
        missing = [name for name in job.redo or () if name not in names]
        if missing:
            raise Unlisted(f"--redo: {format_names(missing, len(missing))} can not be done again: "
                           f"not among the {count_items(len(names))} of {self.tool.name}.",
                           format_nearest(missing[0], sorted(names)[:10_000]))
        missing = [name for name in job.retry or () if name not in back]
        if missing and job.only is None:
            raise Unlisted(f"--retry-items: {format_names(missing, len(missing))} can not be tried "
                           f"again: not given up by {self.tool.name}.",
                           format_nearest(missing[0], sorted([*back, *found[1]])[:10_000]))
        self.ledger.reopen()
        return found

    def _sort_items(self):
        """Have the ledger look up what items() gives; return what _find_items() does."""
        pending, given_up, job = [], [], self.job
        looks_at_done = job.redo is not None or bool(self.tool.outputs)
        for item, status, run_id in self.ledger.find_pending(
                self._call_items(), self.tool.each, self._comes_again, looks_at_done):
            is_of_this_run = run_id == job.run_id
            # Without retries one that failed comes again in the next run.
            is_given_up = status == "quarantined" or status == "failed" and (
                is_of_this_run or 0 < self.tool.retries < item.tries)
            if not is_given_up:
                pending.append(item)
            elif not is_of_this_run or job.attempt == 1:  # else it is counted
                given_up.append(item.name)
        return pending, given_up

    def _comes_again(self, name, is_done):
        """Return whether an item comes again that is done, or else given up: somebody asks for it,
        or its output is gone.
        """
        job = self.job
        retry = None if is_done else job.retry if job.only is None else ()
        if job.only in (None, name) and any(asked is not None and name in (asked or (name,))
                                            for asked in (job.redo, retry)):
            return True
        missing = is_done and find_missing(self.tool, name, self.setting.base)
        if missing:
            self.gone[name] = missing
        return bool(missing)

    def _call_items(self):
        """Return what items() gives: the text of a SELECT, or what yields names."""
        callee, found = self.callee, ()
        if self.tool.items is not None:
            return find_files(self.tool.items, self.setting.base)
        self.interrupts.own_argv(self.tool)
        if callee.items is not None:
            with until_exit(self.interrupts):
                found = callee.items(**self.choose(callee.items_takes))
                found = wait_for(found) if hasattr(found, "__await__") else found
            if isinstance(found, Mapping):
                raise TypeError("items() returned a dict; for names and versions, return its "
                                ".items()")
            if not isinstance(found, Iterable) or isinstance(found, bytes):
                raise TypeError(f"items() returned {format_type(found)}; it returns a list of "
                                "names, or yields them, or returns the text of a SELECT")
        return found if isinstance(found, str) else yield_until_exit(found, self.interrupts)


@contextlib.contextmanager
def until_exit(interrupts):
    """Let sys.exit() end what is inside; it is a failure where it is one of a program."""
    try:
        yield
    except SystemExit as error:
        if not is_good_exit(error.code) or interrupts.is_forked:
            raise
    if interrupts.is_forked:
        interrupts.end_fork()


def yield_until_exit(found, interrupts):
    """Yield what items() yields, unless it exits."""
    with until_exit(interrupts):
        for each in found:
            if interrupts.is_forked:
                interrupts.end_fork()
            yield each


def find_files(pattern, base):
    """Return the names of the files of a pattern, seen from a folder, with `/` on every system, and
    as the version of each its size and its time of change; sorted. `**` stands for any folders.
    """
    from glob import escape, iglob
    from stat import S_ISREG
    found, start = {}, os.path.join(base, "")
    for path in iglob(os.path.join(escape(base), pattern), recursive=True):
        with contextlib.suppress(OSError):  # it has just gone
            stat = os.stat(path)
            if S_ISREG(stat.st_mode):
                name = path[len(start) * path.startswith(start):].replace(os.sep, "/")
                found[name] = f"{stat.st_size}-{stat.st_mtime_ns}"
    return sorted(found.items())


def find_outputs(tool, item):
    """Return the names of the files that a tool writes for an item."""
    parts = {"item": item, "stem": os.path.splitext(os.path.basename(item))[0]}
    return [re.sub(OF_ITEM, lambda brace: parts[brace[1]], name) for name in tool.outputs]


def find_missing(tool, item, base):
    """Return the first file that a tool writes for an item and that is not there; "" if all are."""
    return next((name for name in find_outputs(tool, item)
                 if not os.path.exists(os.path.join(base, name))), "")


def check_outputs(tool, items):
    """Raise UserError if a tool would write one file for two of its items."""
    items_of = {}
    for item in sorted(items):
        for name in find_outputs(tool, item):
            if items_of.setdefault(name, item) != item:
                raise UserError(f"{name} would be written for two items, {items_of[name]} and "
                                f"{item}: put {{item}} in place of {{stem}} into 'writes'")


def format_retry(tool):
    """Return what to type to have the items of a tool tried again that are given up."""
    import shlex
    word = f'"{tool}"' if IS_WINDOWS and " " in tool else shlex.quote(tool)
    return f"--retry-items {word} tries again"


def count_items(count):
    """Return a number of items in words."""
    return f"{count:,} item{'s' * (count != 1)}"


def format_names(names, count):
    """Return the first names of items for a sentence, of which there are `count`."""
    texts = [text if len(text) < 60 else text[:57] + "..." for text in map(format_name, names)]
    return ", ".join(texts) + ", ..." * (count > len(names))


def format_name(name):
    """Return the name of an item for a line: quoted if it has blanks or what is not printable."""
    name = name if len(name) <= NAME_LENGTH else name[:60] + "..."
    is_plain = name and name.isprintable() and not re.search(r"[\s,'\"]", name)
    return name if is_plain else repr(name)


def count_rows(result):
    """Return the rows that a result speaks of: a count, or the "rows" of a dict; else None."""
    rows = result.get("rows") if isinstance(result, dict) else result
    if rows is None or isinstance(rows, bool):
        return None
    try:
        count = operator.index(rows)
    except TypeError:
        return None
    return count if 0 <= count < 2**63 else None  # -1 is what cursors say that do not know


def format_signal(number):
    """Return what ended a run, in words."""
    import signal
    if number in (None, SIGINT):
        return "interrupted by Ctrl-C"
    return f"interrupted by {signal.Signals(number).name}"


def leave_out_engine(frames):
    """Return the frames of a traceback that are not the engine's.

    Nor those of asyncio through which the engine called the tool; what the tool called comes
    after its own.
    """
    left = [f for f in frames if not is_engine_frame(f.filename, f.lineno)]
    if len(left) < len(frames) and "asyncio" in sys.modules:
        folder = os.path.dirname(sys.modules["asyncio"].__file__)
        while len(left) > 1 and os.path.dirname(left[0].filename) == folder:
            del left[0]
    return left


def leave_out_callers(path):
    """Cut from what faulthandler wrote at the end of a log, innermost frames first, the engine's
    frames and those that called it.
    """
    with open(path, "r+b") as log:
        start = max(0, log.seek(0, os.SEEK_END) - TRACEBACK_CAP)
        log.seek(start)
        lines, kept, is_engine = log.readlines(), [], False
        for line in lines:
            frame = re.match(r'  File "(.*)", line (\d+) in ', os.fsdecode(line))
            is_engine = bool(frame) and (is_engine or is_engine_frame(frame[1], int(frame[2])))
            if not is_engine:
                kept.append(line)
        if len(kept) < len(lines):
            log.seek(start)
            log.write(b"".join(kept))
            log.truncate()


TRACEBACK_CAP = 2**16  # letters; a longer one keeps its beginning and its end


def format_traceback(error, verbose=False):
    """Return an exception's traceback without the engine's frames; with them if verbose.

    What a tool says by what it returns has none.
    """
    import traceback
    if isinstance(error, SaysFailed):
        return ""
    whole = traceback.TracebackException.from_exception(error)
    left = [] if verbose else [whole]
    while left:
        part = left.pop()
        part.stack[:] = leave_out_engine(part.stack)
        left += [p for p in (part.__cause__, part.__context__,
                             *(getattr(part, "exceptions", None) or ())) if p]
    text = "".join(whole.format())
    half = TRACEBACK_CAP // 2
    return text if len(text) <= TRACEBACK_CAP else f"{text[:half]}\n[...]\n{text[-half:]}"


OUTPUT_LOST = 50  # the level of the log event that tells so: CRITICAL, as in logging


class Capture:
    """Keeps a copy of what Python code prints in this process in the log of the attempt that
    runs. Streams and descriptors stay what they are: what C code and child processes print is
    seen, and not kept; that of a tool with a process of its own is.

    Constant: `outputs`, of the descriptors 1 and 2 the number, a duplicate, and what file that is;
    `make_room`, called before anything is printed. State: `log`, the file of the attempt that runs,
    set by who begins it and made at the first byte; `log_fd`; `error`, what could not be written,
    if anything.
    """
    log, log_fd, error = "", -1, ""

    def __init__(self, is_kept, make_room):
        self.streams = {"stdout": sys.stdout, "stderr": sys.stderr} if is_kept else {}
        self.make_room = make_room

    def __enter__(self):
        import threading
        self.lock = threading.RLock()  # threads of a tool print, too
        self.outputs = [(fd, os.dup(fd), os.fstat(fd)) for fd in (1, 2) if is_inherited(fd)]
        for name, stream in self.streams.items():
            if stream is not None:
                setattr(sys, name, Copier(stream, self, name))
        return self

    def __exit__(self, *_):
        self.end()
        for _, copy, _ in self.outputs:
            with contextlib.suppress(OSError):  # the tool closed all descriptors
                os.close(copy)
        for name, stream in self.streams.items():
            setattr(sys, name, stream)

    def end(self):
        """Let what is printed from now on go into no log any more; return whether it was made."""
        for stream in self.streams.values():
            flush(stream)
        with self.lock:
            log, fd = self.log, self.log_fd
            self.log, self.log_fd = "", -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # removed, or the tool closed all descriptors
                os.close(fd)
                tidy_log(log)
        return fd >= 0

    def keep(self, text):
        """Write a text to the log of the attempt that runs, if there is one."""
        with self.lock:
            try:
                if self.log:
                    if self.log_fd < 0:
                        self.log_fd = open_private(self.log)
                    write_all(self.log_fd, text.encode("utf-8", "backslashreplace"))
            except OSError as error:  # no reason for a tool to fail, but to say so
                self.error = f"{self.log} could not be written: {error.strerror}"


class Copier:
    """A stream of Python's of which a copy is kept. Nothing that can not be shown is a reason for
    a tool to fail: nobody reads it, the disk is full, the stdout of a cron job lacks a letter.
    `is_open`: whether its last line has no end yet.
    """
    is_open = False

    def __init__(self, stream, capture, name):
        self._stream, self._capture, self._name = stream, capture, name

    def write(self, text):
        """Write a text, and keep it."""
        stream, capture = self._stream, self._capture
        if capture.make_room:
            capture.make_room()
        self.is_open = text[-1:] not in ("", "\n") or not text and self.is_open
        try:
            written = stream.write(text)
            if "\n" in text:
                stream.flush()  # lines of the engine come between, maybe to the same place
        except UnicodeEncodeError:
            written = stream.write(text.encode("ascii", "backslashreplace").decode())
        except OSError as error:
            written = len(text)
            if not isinstance(error, BrokenPipeError):
                capture.error = (f"{self._name} could not be written: {error.strerror}; --logs "
                                 "shows all of it")
            self._let_go()
        capture.keep(text)
        return written

    def writelines(self, lines):
        """Write several texts, and keep them."""
        for line in lines:
            self.write(line)

    def _let_go(self):
        """Let what waits in the stream, and all that is still to come, go nowhere."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


_STREAMS = {"stdin": "rb", "stdout": "wb", "stderr": "wb"}  # and how the file below is opened


def make_put_back(outputs=()):
    """Return a function that puts back what tools change of this process: its working folder, its
    streams, also those that were closed, the `outputs` of a Capture, so that what the engine says
    is not written into a file of a tool's that got their number, the mask of new files, how deep
    calls may go, which logging is off, and all of make_put_back_signals(). On another thread than
    the main one, neither it nor tools can do that.
    """
    def look():
        logging = sys.modules.get("logging")
        return ([getattr(sys, name, None) for name in _STREAMS], find_working_folder(),
                sys.getrecursionlimit(), logging.root.manager.disable if logging else 0)

    before, umask = look(), os.umask(0o077)
    os.umask(umask)
    reopen = [make_reopen(*each) for each in zip(before[0], _STREAMS.values())]
    put_back_signals = make_put_back_signals()

    def put_back():
        """Put it back."""
        os.umask(umask)
        for fd, copy, file in outputs:
            if not is_inherited(fd):
                with contextlib.suppress(OSError):  # the tool closed all descriptors
                    if os.path.samestat(os.fstat(copy), file):
                        os.dup2(copy, fd)
        if look() != before:
            streams, folder, limit, disabled = before
            vars(sys).update(zip(_STREAMS, streams))
            with contextlib.suppress(OSError):  # the tool removed it
                os.chdir(folder)
            sys.setrecursionlimit(limit)
            if "logging" in sys.modules:
                sys.modules["logging"].disable(disabled)
        for each in reopen:
            each()
        if "signal" in sys.modules:  # else nobody has changed anything of it
            put_back_signals()

    return put_back


def make_put_back_signals():
    """Return a function that puts back how signals are taken, which are blocked, whom they wake,
    and that no alarm is on its way.
    """
    numbers = find_signals(*Interrupts.NAMES, "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGTSTP",
                           "SIGUSR1", "SIGUSR2", "SIGWINCH")
    handlers, wakeup_fd = [*map(_signal.getsignal, numbers)], _signal.set_wakeup_fd(-1)
    has_mask = hasattr(_signal, "pthread_sigmask")
    mask = has_mask and _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
    has_no_alarm = hasattr(_signal, "setitimer") and not any(_signal.getitimer(0))  # of real time

    def put_back():
        """Put it back."""
        _signal.set_wakeup_fd(wakeup_fd)
        if has_no_alarm:
            _signal.setitimer(0, 0)
        for number, handler in zip(numbers, handlers):
            if handler is not None and _signal.getsignal(number) != handler:
                _signal.signal(number, handler)
        if has_mask:  # what waited comes now, and is taken as before
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    put_back()
    return put_back


def make_reopen(stream, mode):
    """Return a function that opens a stream of Python's again if it was closed, the same object,
    for others hold it; the descriptor below stays open then. It does nothing for one without.
    """
    stream = getattr(stream, "_stream", stream)  # below a Copier
    try:
        fd, how = stream.fileno(), {name: getattr(stream, name) for name in (
            "encoding", "errors", "line_buffering", "write_through")}
    except (AttributeError, OSError, ValueError):
        return lambda: None

    def reopen():
        """Open it, if it is not."""
        try:
            is_closed = stream.closed
        except ValueError:  # detached from what is below
            is_closed = True
        if is_closed:
            with contextlib.suppress(OSError):  # the tool closed the descriptor, too
                stream.__init__(open(fd, mode, closefd=False), **how)

    return reopen


def is_inherited(fd):
    """Return whether a descriptor is open and not of a file that Python has opened, as which it
    would not be one for child processes. To ask which file it is takes four times as long.
    """
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def find_working_folder():
    """Return the working folder, or "" if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def flush(stream):
    """Let what Python keeps of its output go out; return False if the tool closed the stream."""
    try:
        stream.flush()
        return True
    except (OSError, ValueError, AttributeError):
        return False


def write_all(fd, content):
    """Write all of some bytes."""
    while content:
        content = content[os.write(fd, content):]


# === 9 WORKERS ==================================================================================
# Who does jobs: this process, or worker processes, behind one interface: start(job, limit_s) begins
# one, wait() returns the messages of perform() that came since, and answer() those that ask. A
# worker may also have ("died", number, (item, how, is_late, slip)): the item that it was at, or
# None; what ended it; whether that was its time limit; and the file that tells of it.
# It does not decide what runs, or what a message means.


class Here:
    """Does jobs in this process, one at a time, over one shared connection."""

    def __init__(self, setting, kept, capture, hear):
        self.setting, self.kept, self.capture, self.hear = setting, kept, capture, hear
        self.job = None
        kept.interrupts.look(capture.outputs)

    def reserve(self):
        """Return the id of the process that will do what is started next."""
        return os.getpid()

    def start(self, job, _limit_s):
        """Note what wait() is to do."""
        self.job = job

    def wait(self):
        """Do what was started, however long it takes, with all that it says heard meanwhile;
        return whether it printed anything.
        """
        job, self.job = self.job, None
        self.capture.log = job.log
        perform(job, self.setting, self.hear, self.kept)
        return self.capture.end()


class Worker:
    """A worker process as its orchestrator sees it.

    State: `job`, what it does, if anything; `limit_s`, how long that, or an item of it, may take,
    and `deadline_s`, when the next measure is due: to ask it to end, then to kill it; `verdict`,
    why it is being ended, if it is; `at_work`, the item that it was seen at last.
    """

    def __init__(self, process, channel):
        self.process, self.channel = process, channel
        self.begin(None)

    def begin(self, job, limit_s=None, now_s=0.0):
        """Note a job, or None."""
        self.job, self.limit_s = job, limit_s
        self.deadline_s = float("inf") if limit_s is None else now_s + limit_s
        self.verdict, self.at_work = "", None

    def hang_up(self):
        """Close the channel, if it is open: the worker goes when it waits for its next job."""
        if self.channel:
            self.channel.close()
            self.channel = None


class Workers:
    """Does jobs in worker processes, each with its own connection and process group.

    A worker serves many jobs, but one whose tool started processes goes, and its group with it,
    so that nothing of a tool outlives it. What takes too long writes into its log where it hangs,
    is asked to end, by SIGTERM, and killed after a grace. State: `workers`, until they have ended.
    """

    def __init__(self, setting, clock, grace_s):
        check_hiding([""])  # where a new interpreter looks first, too
        check_can_travel(setting)
        self.setting, self.clock, self.grace_s = setting, clock, grace_s
        self.context = make_context()
        self.life_read, self.life = self.context.Pipe(duplex=False)
        self.workers = []

    def _add(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=Server(self.setting).serve,
                                       args=(theirs, self.life_read, dict(os.environ)))
        try:
            try:
                process.start()
            except (ConnectionError, EOFError):  # the fork server was killed: now comes another
                process.start()
        except (OSError, EOFError, AssertionError) as error:  # the last in a daemon of theirs
            raise UserError(f"No worker process can be started: {format_one_line(error)}.",
                            "Mend that, or run without jobs, timeout, memory and isolate."
                            ) from error
        theirs.close()
        self.workers.append(Worker(process, ours))
        return self.workers[-1]

    def _find_idle(self):
        """Return a worker that waits for a job."""
        idle = (worker for worker in self.workers if worker.channel and not worker.job)
        return next(idle, None) or self._add()

    def reserve(self):
        """Return the id of the process that will do what is started next, as far as can be
        foreseen.
        """
        return self._find_idle().process.pid

    def start(self, job, limit_s):
        """Hand a job to an idle worker, or to a new one."""
        worker = self._find_idle()
        try:
            worker.channel.send(job)
        except OSError:  # it died while idle
            worker.hang_up()
            self.start(job, limit_s)
        else:
            worker.begin(job, limit_s, self.clock.monotonic())

    def answer(self, number, found):
        """Send what a job has asked for."""
        for worker in self.workers:
            if worker.job and worker.job.number == number:
                with contextlib.suppress(OSError):  # it died meanwhile
                    worker.channel.send(found)

    def wait(self, timeout_s):
        """Return the messages that came within some seconds.

        Whether a worker has ended is asked of its process: a child of it may hold all its pipes.
        """
        from multiprocessing.connection import wait
        now_s = self.clock.monotonic()
        for worker in self.workers:
            if worker.deadline_s < float("inf"):
                self._look_at_clock(worker, now_s)
        timeout_s = min([timeout_s, *(worker.deadline_s - now_s for worker in self.workers)])
        channels = [worker.channel for worker in self.workers if worker.channel]
        sentinels = [worker.process.sentinel for worker in self.workers]
        ready, said = wait(channels + sentinels, max(0.0, timeout_s)), []
        for worker in [*self.workers]:
            if worker.channel in ready:
                self._hear(worker, said)
            process = worker.process
            if (process.sentinel in ready or not ready) and process.exitcode is not None:
                self._bury(worker, said)
        return said

    def _hear(self, worker, said):
        try:
            kind, number, what = worker.channel.recv()
        except (EOFError, OSError):
            worker.hang_up()  # its process will tell how it ended
            return
        if kind == "ended":
            what, is_leaving = what
            if worker.verdict and what:
                kind, what = "died", (what.item, worker.verdict, True, "")
            if worker.verdict or is_leaving:  # it would take the signal for one that ends the next
                worker.hang_up()
            worker.begin(None)
        said.append((kind, number, what))

    def _bury(self, worker, said):
        """Take a worker out that has ended, and say what became of its job."""
        while worker.channel and worker.channel.poll():
            self._hear(worker, said)
        worker.hang_up()
        self.workers.remove(worker)
        if worker.job:
            slip = find_slip(self.setting.slips, worker.job.run_id, worker.process.pid)
            how = worker.verdict or format_end(worker.process)
            said.append(("died", worker.job.number,
                         (read_slip(slip)[2], how, bool(worker.verdict), slip)))
        end_process(worker.process)

    def _look_at_clock(self, worker, now_s):
        """End what has run too long, and kill what would not end."""
        if not worker.verdict and worker.job.items:
            slip = find_slip(self.setting.slips, worker.job.run_id, worker.process.pid)
            at_work = read_slip(slip)[2]
            if at_work != worker.at_work:  # the limit is for each item
                worker.at_work, worker.deadline_s = at_work, now_s + worker.limit_s
        if worker.deadline_s > now_s:
            return
        if worker.verdict:
            signal_group(worker.process, "SIGKILL")
            worker.deadline_s = now_s + self.grace_s
        else:
            if not self.setting.pipeline.tools[worker.job.tool].command:
                with contextlib.suppress(AttributeError, OSError):  # not on Windows; it has ended
                    os.kill(worker.process.pid, _signal.SIGURG)
            self._end(worker, f"timed out after {format_duration(worker.limit_s)}")

    def _end(self, worker, verdict):
        """Ask a worker to end; _look_at_clock() kills it after the grace."""
        worker.verdict, worker.deadline_s = verdict, self.clock.monotonic() + self.grace_s
        signal_group(worker.process, "SIGTERM")

    def interrupt(self):
        """Ask all that is being done to end."""
        for worker in self.workers:
            if worker.job and not worker.verdict:
                self._end(worker, "interrupted")

    def close(self, grace_s):
        """End all workers, those that are still at work after a grace, and wait for them: at its
        end, this program would wait for ever.
        """
        try:
            for worker in self.workers:
                worker.hang_up()
            end_s = time.monotonic() + grace_s
            for worker in self.workers:
                worker.process.join(max(0.0, end_s - time.monotonic()))
        finally:
            for worker in self.workers:
                end_process(worker.process)
            self.life.close()
            self.life_read.close()


def make_context():
    """Return multiprocessing's way to start workers, with a fork server that is on its way where
    there can be one: a process without threads, connections and locks, which imports this file.

    The signals that end a run are blocked in it, so that Ctrl-C, which all in the foreground get,
    is for the run to take. A worker takes them itself.
    """
    from multiprocessing import get_context
    name = find_own_name()
    if sys.platform not in ("linux", "darwin") or os.environ.get("ORCHESTRATOR_SPAWN"):
        return get_context("spawn")
    import signal
    from importlib.machinery import PathFinder
    from multiprocessing import forkserver, resource_tracker
    folders = ["", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # It looks for modules there, and not in sys.path.
    if name and is_this_file(PathFinder.find_spec(name, folders)):
        forkserver.set_forkserver_preload([name])
    resource_tracker.ensure_running()  # whose start would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK,
                                    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        forkserver.ensure_running()
    except ChildProcessError:  # this process was itself forked, from one that has started it
        return get_context("spawn")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return get_context("forkserver")


def find_own_name():
    """Return the name by which workers import this file, "" if they run it by its path. Where it
    is the main program, let it be that module, too: so they need not compile it.
    """
    if __name__ != "__main__":
        return __name__
    name = os.path.splitext(os.path.basename(__file__))[0]
    spec = find_module(name)
    if not is_this_file(spec):
        return ""
    main = sys.modules[name] = sys.modules["__main__"]
    main.__spec__ = spec
    return name


def is_this_file(spec):
    """Return whether a module that was looked for is this very file."""
    origin = getattr(spec, "origin", None) or ""
    return os.path.realpath(origin) == os.path.realpath(__file__)


def be_fork_server():
    """If this is the process from which workers are forked, let it be their main program, where
    it is the orchestrator's, and say nothing when that is killed while a worker starts.
    """
    server = sys.modules.get("multiprocessing.forkserver")
    if server and getattr(sys.modules["__main__"], "main", None) is server.main:
        sys.modules["__main__"] = sys.modules[__name__]
        sys.excepthook = lambda kind, *what: kind is EOFError or sys.__excepthook__(kind, *what)


be_fork_server()


def signal_group(process, name):
    """Send SIGTERM or SIGKILL to a worker and all that it started; to it alone where it has no
    group: on Windows, and in the moment in which it starts.
    """
    try:
        os.killpg(process.pid, getattr(_signal, name))
    except (AttributeError, OSError):
        if name == "SIGKILL":
            process.kill()
        else:
            process.terminate()


def end_process(process):
    """Kill a worker, if it is there, with what it left in its group, and let go of it."""
    signal_group(process, "SIGKILL")
    process.join()
    process.close()


def format_end(process):
    """Return how a process ended, in words."""
    status = process.exitcode
    if status == 255:  # or what is said where nobody can tell
        with contextlib.suppress(OSError):
            os.kill(process.pid, 0)
            return "the process that starts the workers was killed"
    if status >= 0:
        return "its process exited without finishing" + (f" (exit code {status})" if status else "")
    return "its process was " + format_killed(-status)


def format_killed(number):
    """Return which signal killed a process, in words."""
    import signal
    name = next((each.name for each in signal.Signals if each == number), "a real-time signal")
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"killed by signal {number} ({name}){hint}"


def check_can_travel(setting):
    """Raise UserError if worker processes could not get, or import, what they need."""
    import pickle
    get_connection = setting.pipeline.get_connection
    main_file = find_main_file()
    try:
        pickle.dumps(get_connection)
        if getattr(get_connection, "__module__", "") == "__main__" and not main_file:
            raise pickle.PicklingError("a worker has no such main program")
    except Exception as error:
        raise UserError("get_connection can not be sent to a worker process: it is a lambda, or "
                        "was defined inside a function or a notebook.",
                        "Write it with `def` at the top of a module, or run without jobs, timeout, "
                        "memory and isolate.") from error
    try:
        pickle.dumps(setting)
    except Exception as error:
        raise UserError("What tools get can not be sent to a worker process: "
                        f"{format_one_line(error)}.", "Let arguments be plain data.") from error
    if __name__ != "__main__" and main_file and re.search(r"(?<!__main__)\.py$", main_file):
        with open(main_file, "rb") as source:
            if not re.search(rb"__name__\W+__main__|__main__\W+__name__", source.read()):
                raise UserError(f"{format_path(main_file)} would run again in every worker "
                                "process.", 'Put what it does under `if __name__ == "__main__":`.')


class Server:
    """What a worker does: it does jobs until its channel closes. Runs in the worker."""

    def __init__(self, setting):
        self.setting = setting

    def serve(self, channel, life, environ):
        """Do jobs one after another, with the environment variables of the orchestrator. Does not
        return.
        """
        import threading
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        die_with_orchestrator(life)
        os.environ.clear()
        os.environ.update(environ)
        self.channel, self.pid, self.told_s = channel, os.getpid(), 0.0
        self.lock = threading.RLock()  # threads of a tool share the channel, one message at a time
        if self.setting.folder:
            hold_worker_byte(self.setting.folder)
        own_streams()
        take_signals()
        with Interrupts() as self.interrupts:
            kept = Kept(self.setting, self.interrupts, self.ask, run_command, pack=self.pack)
            is_leaving = False
            while not is_leaving and self.interrupts.signal is None:
                try:
                    self.job = channel.recv()
                except (EOFError, OSError):
                    break
                children = count_children()
                problem = self.do(kept)
                is_apart = ENDS_GROUPS and self.setting.pipeline.tools[self.job.tool].command
                is_leaving = self.interrupts.signal is not None \
                    or not is_apart and count_children() != children \
                    or problem is not None and problem.status == "pending"  # others can do more
                if is_leaving:
                    kept.close()
                number, self.job = self.job.number, None
                self._say(("ended", number, (problem, is_leaving)))
            kept.close()
        os._exit(EXIT_SUCCESS)

    def do(self, kept):
        """Do a job, its output in a file, its memory bounded; return what kept it from the rest."""
        ended = []

        def send(message):
            (ended.append if message[0] == "ended" else self.send)(message)

        tool = self.setting.pipeline.tools[self.job.tool]
        try:
            with output_to(self.job.log), bounded_memory(tool.memory_bytes):
                perform(self.job, self.setting, send, kept)
            return ended[0][2]
        except Exception as error:  # what the tool did to this process reaches the engine
            return Try(None, "failed", error="in its worker: " + format_one_line(error),
                       traceback=format_traceback(error, verbose=True))

    def send(self, message):
        """Send a message to the run; of events that tell of progress, ten a second."""
        if message[0] != "event":
            self._say(message)  # no tool is being called now
            return
        what = message[2]
        if what["kind"] == "progress":
            now_s = time.monotonic()
            if now_s - self.told_s < 0.1 and what["done"] != what["total"]:
                return
            self.told_s = now_s
        self.interrupts.finish(self._say, message)

    def _say(self, message, is_question=False):
        """Send a message and return the answer, if it is a question."""
        with self.lock, bounded_memory(2**62):  # the tool's own bound would tear it
            self.channel.send(message)
            return self.channel.recv() if is_question else None

    def ask(self, job, name):
        """Return what a job may see of the run: see Returned.look().

        So what nobody reads is not sent, and a worker keeps nothing.
        """
        if os.getpid() != self.pid or job is not self.job:
            raise RuntimeError("what context tells of other tools can not be read in a process "
                               "that the tool started or after the tool has ended: "
                               "read it before, in run() itself")
        found = self.interrupts.finish(self._say, ("asks", job.number, name), True)
        if not found:
            raise KeyError(name)
        return found[0]

    def pack(self, result):
        """Return a result as it travels."""
        with bounded_memory(2**62):
            return pack_result(result, bool(self.setting.folder))


def die_with_orchestrator(life):
    """End this process's group when the orchestrator dies, however that happens.

    `life` is a pipe of which it alone holds the other end, which closes then. On Linux the kernel
    itself kills the group at that moment (fcntl(2): O_ASYNC, F_SETOWN, F_SETSIG), also in the
    middle of C code. Elsewhere a thread waits for it, which code that holds the interpreter's
    lock can delay.
    """
    import threading

    def watch():
        with contextlib.suppress(EOFError, OSError):
            life.recv_bytes()
        if hasattr(os, "killpg"):
            os.killpg(os.getpid(), _signal.SIGKILL)
        os._exit(EXIT_FAILED)

    if not ENDS_GROUPS:
        threading.Thread(target=watch, daemon=True).start()
        return
    # Reopened, because the owner belongs to the open file, which all workers would share.
    fd = os.open(f"/proc/self/fd/{life.fileno()}", os.O_RDONLY | os.O_NONBLOCK)
    kill_at_close(fd, os.getpid())
    if life.poll():  # it died before we listened
        watch()


ENDS_GROUPS = sys.platform.startswith("linux")  # when a process dies: see kill_at_close()


def kill_at_close(fd, group):
    """Have the kernel kill a group of processes when the last writer of a pipe is gone, whose read
    end `fd` is: as long as it is open anywhere. See fcntl(2): O_ASYNC, F_SETOWN, F_SETSIG.
    """
    import fcntl
    fcntl.fcntl(fd, fcntl.F_SETOWN, -group)
    fcntl.fcntl(fd, fcntl.F_SETSIG, _signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)


def run_command(words, kept, log):
    """Run a command to its end. Raise SaysFailed if that is not exit code 0, with the last line
    that it printed. What it prints goes into the log, or is shown where `kept` has a way to.
    """
    with command_output("" if kept.show else log) as (out, printed):
        start, show_more = printed.tell(), make_follower(printed, kept.show)
        try:
            with started(words, kept, out) as process:
                try:
                    kept.interrupts.call(wait_for_end, process, show_more, is_item=True)
                except BaseException:
                    ask_to_end(process, kept.setting.grace_s)
                    raise
        finally:
            show_more(is_whole=True)
        code = process.returncode
        if code:
            how = f"exit code {code}" if code > 0 else format_killed(-code)
            last = read_last_line(printed, start)
            raise SaysFailed(f"{how}: {last}" if last else how)


@contextlib.contextmanager
def command_output(log):
    """Open the file for what a command prints: a descriptor to write to it, and a file to read of
    it what comes. Without a log it is gone afterwards.
    """
    from tempfile import mkstemp
    fd, path = (open_private(log), log) if log else mkstemp()
    try:
        with open(path, "rb") as printed:
            printed.seek(0, os.SEEK_END)
            if not (log or IS_WINDOWS):
                os.unlink(path)  # so that it is gone after a SIGKILL, too
            yield fd, printed
    finally:
        os.close(fd)
        if not log and IS_WINDOWS:
            with contextlib.suppress(OSError):  # what it left behind holds it
                os.unlink(path)


def make_follower(printed, show):
    """Return a function that shows what was written to a file since it was called last, if that
    is to be shown.
    """
    import codecs
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def show_more(is_whole=False):
        for piece in iter(functools.partial(printed.read, 1 << 16), b""):
            show(decoder.decode(piece))
        if is_whole:
            show(decoder.decode(b"", True))

    return show_more if show else lambda is_whole=False: None


_FOLLOWED_S = 0.05  # how late one sees what a command prints


def show_output(text):
    """Show what a command has printed. Nothing that can not be shown is a reason to fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


@contextlib.contextmanager
def started(words, kept, out):
    """Start a command in a session and a process group of its own, which end with the block, or
    with this process: on Linux by the kernel, which misses the millisecond of the start. Elsewhere
    a command stays in the group of a worker, which is ended.
    """
    from subprocess import DEVNULL, STDOUT, Popen
    base = kept.setting.base
    life = os.pipe() if ENDS_GROUPS else ()
    try:
        try:
            process = Popen([find_executable(words[0], base) or words[0], *words[1:]], cwd=base,
                            stdin=DEVNULL, stdout=out, stderr=STDOUT, pass_fds=life[:1],
                            start_new_session=ENDS_GROUPS or bool(kept.show),
                            env=make_environment())
        except (OSError, ValueError) as error:
            raise SaysFailed(f"{words[0]} could not be started: {error}") from error
        try:
            if life:
                kill_at_close(life[0], process.pid)
            yield process
        finally:
            signal_group(process, "SIGKILL")
            process.wait()
    finally:
        for fd in life:
            os.close(fd)


def make_environment():
    """Return the environment of a command: in it, `python` is the one that runs this also where
    another program starts it, and what it prints is seen at once.
    """
    folders = [os.path.dirname(sys.executable or ""), os.environ.get("PATH", os.defpath)]
    return {"PYTHONUNBUFFERED": "1", **os.environ, "PATH": os.pathsep.join(filter(None, folders))}


def wait_for_end(process, show_more):
    """Wait until a process has ended, and show meanwhile what it prints.

    On Linux it keeps its id until it is asked how it ended, so that its group is no other's.
    """
    from subprocess import TimeoutExpired
    with contextlib.ExitStack() as stack:
        poll = None
        with contextlib.suppress(AttributeError, OSError):  # not elsewhere, nor on an old Linux
            import select
            fd = os.pidfd_open(process.pid)
            stack.callback(os.close, fd)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
        while not (poll and poll.poll(1000 * _FOLLOWED_S)):
            if poll is None:
                with contextlib.suppress(TimeoutExpired):
                    process.wait(_FOLLOWED_S)
                    return
            show_more()


def ask_to_end(process, grace_s):
    """Ask the group of a process to end, and wait for that, but not longer than a grace."""
    signal_group(process, "SIGTERM")
    end_s = time.monotonic() + grace_s
    while has_group(process) and time.monotonic() < end_s:
        time.sleep(0.01)


def has_group(process):
    """Return whether a process that leads a group, or anything of that, is there."""
    if process.poll() is None:
        return True
    with contextlib.suppress(AttributeError, OSError):  # not on Windows; all of it has ended
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-process.pid, os.WNOHANG)  # what it left, where this is process 1
        os.killpg(process.pid, 0)
        return True
    return False


def read_last_line(file, start):
    """Return the last line of a file, from a place on, that is not blank; "" if there is none."""
    file.seek(max(start, file.seek(0, os.SEEK_END) - (1 << 16)))
    lines = map(clean, reversed(file.read().decode("utf-8", "replace").splitlines()))
    return next(filter(None, map(str.strip, lines)), "")


def take_signals():
    """Take signals as a program does that has just been started, though the fork server blocks
    some; but SIGURG writes where each thread is, in C code too, to this process's stderr.
    """
    if not IS_WINDOWS:
        import faulthandler
        import signal
        faulthandler.register(signal.SIGURG, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def own_streams():
    """Let Python's output streams be the file descriptors 1 and 2, and input empty."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = map(make_stream, (1, 2))


def make_stream(fd):
    """Return a stream of Python's on a file descriptor, which outlives it."""
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


@contextlib.contextmanager
def output_to(file):
    """Send what this process prints, its C code and its children included, to a file."""
    point_output(open_private(file))
    try:
        yield
    finally:
        closed = [(fd, name) for fd, name in ((1, "stdout"), (2, "stderr"))
                  if not flush(getattr(sys, name, None))]  # by the tool
        point_output(os.open(os.devnull, os.O_WRONLY))
        for fd, name in closed:
            setattr(sys, name, make_stream(fd))


def point_output(into):
    """Let the file descriptors 1 and 2 lead to where another does, which is closed."""
    os.set_inheritable(into, True)
    os.dup2(into, 1)
    os.dup2(into, 2)
    if into > 2:  # else a tool had closed that, and it was the next to be given
        os.close(into)


@contextlib.contextmanager
def bounded_memory(limit_bytes):
    """Bound the memory of this process and its children, where the system can: not on Windows."""
    if limit_bytes is None or IS_WINDOWS:
        yield
        return
    import resource
    # RLIMIT_DATA counts what is really written to, on Linux; RLIMIT_AS whatever is mapped.
    kind = resource.RLIMIT_DATA if sys.platform.startswith("linux") else resource.RLIMIT_AS
    before = resource.getrlimit(kind)
    hard = before[1]
    resource.setrlimit(kind, (limit_bytes if hard < 0 else min(limit_bytes, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def count_children():
    """Return what changes when this process starts another, waited for or not."""
    if IS_WINDOWS:
        return False, 0
    import resource
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        has_any = True
    except ChildProcessError:
        has_any = False
    return has_any, resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


# === 10 RUNNING =================================================================================
# One loop on one thread carries out a Plan and owns all state of the run: what is ready, what
# runs, how each tool ended, what that means for the others, what is tried again. Every rule about
# failure stands here. It prints nothing.

GRACE_S = 10.0  # between asking a process group to end and killing it
_BEAT_S = 0.1  # the longest that the loop waits before it looks at signals and the clock


class Session(NamedTuple):
    """What a run is to do, and how; of it only what is in the Setting reaches who does jobs.

    retry_items: by tool, the items that are to be tried again though they were given up; all of
    them where there are no names, and of all tools if it is None; redo: by tool, those that are
    to be done again. find_said: see check_are_taken(). grace_s: see run_pipeline(). make_room:
    called before a tool prints in this process, since something may stand there on the screen that
    has to go.
    """
    pipeline: Pipeline
    plan: Plan
    arguments: Mapping[str, Any]
    history: History
    request: Request = Request()
    fail_fast: bool = False
    verbose: bool = False
    keep_results: bool = True
    grace_s: float = GRACE_S
    retry_items: Optional[Mapping[str, Tuple[str, ...]]] = {}
    redo: Mapping[str, Tuple[str, ...]] = {}
    on_event: Optional[Callable[[Event], None]] = None
    clock: Clock = Clock()
    find_said: Callable[[], Mapping[str, str]] = dict
    make_room: Optional[Callable[[], None]] = None


def run_plan(session):
    """Carry out the plan of a session and return how it ended.

    Raise UserError, before anything has run, if a module can not be imported or called, or an
    argument reaches no tool; and if the history can not be written.
    """
    pipeline, plan, history = session.pipeline, session.plan, session.history
    tools = [pipeline.tools[step.tool] for step in plan.steps if step.may_run()]
    check_mistakes(find_connection_mistakes(pipeline.get_connection, session.arguments))
    check_modules(pipeline, tools)
    wants_workers, workers = any(needs_worker(tool, plan.jobs) for tool in tools), None
    with contextlib.ExitStack() as stack:
        folder = history.folder
        if wants_workers and not folder:
            import shutil
            import tempfile
            folder = tempfile.mkdtemp(prefix="orchestrator-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        setting = Setting(pipeline, dict(session.arguments), session.verbose, history.folder,
                          folder and os.path.join(folder, "slips"),
                          find_base(pipeline.get_connection), session.grace_s)
        if wants_workers:
            workers = Workers(setting, session.clock, session.grace_s)
            stack.push(lambda kind, *_: workers.close(
                session.grace_s if kind in (None, Unlisted) else 0.0))
        interrupts = stack.enter_context(Interrupts())
        returned = Returned(session)
        callees = load_all(tools, Available(setting.arguments, pipeline.tools, returned.may_see),
                           interrupts)
        check_are_taken(setting.arguments, callees, pipeline, session.find_said)
        run = Run(session, setting, interrupts, callees, workers, returned)
        with Capture(bool(history.folder or session.make_room), session.make_room) as capture:
            kept = Kept(setting, interrupts, returned.find, run_command, show_output)
            kept.callees = callees
            with contextlib.closing(kept):
                run.loop(Here(setting, kept, capture, run.hear))
        if capture.error:
            run.tell("log", text=capture.error, level=OUTPUT_LOST)
        return run.end()


def check_plan(session):
    """Raise UserError for what would keep a plan from being carried out, as far as that is known
    before a module is imported.
    """
    pipeline, plan, arguments = session.pipeline, session.plan, session.arguments
    tools = [pipeline.tools[step.tool] for step in plan.steps if step.may_run()]
    check_mistakes(find_connection_mistakes(pipeline.get_connection, arguments))
    check_modules(pipeline, tools)
    if any(needs_worker(tool, plan.jobs) for tool in tools):
        check_can_travel(Setting(pipeline, dict(arguments)))
    check_callable(tools, Available(arguments, pipeline.tools, Returned(session).may_see))
    check_are_taken(arguments, {}, pipeline, session.find_said)
    find_retries(session, [tool.name for tool in tools if has_items(tool)])


def load_all(tools, available, interrupts):
    """Return the tools, imported, by name. Notes what the modules are of which that is recorded."""
    for tool in tools:
        if tool.cache_s is not None and tool.module:
            hash_module(tool.module)
    callees = interrupts.call(load_callees, tools, available, interrupts)
    for callee in callees.values():
        tool = callee.tool
        if tool.module and (callee.has_items or tool.cache_s is not None):
            hash_imported(tool.module)
    return callees


def find_retries(session, having):
    """Return by tool the items to try again that were given up; `having` are the tools that run and
    have items. Raise UserError if items are asked for of another, also of those to do again.
    """
    steps = session.plan.steps
    if session.request.item is not None and (len(steps) > 1 or not having):
        raise UserError("--item is for a single tool with items; the plan has "
                        f"{', '.join(step.tool for step in steps[:5])}.",
                        "Name one" + (": " + having[0] if having else "") + ".")
    named = [tool for tool, names in session.redo.items() if names]
    for flag, asked, there, thing in [
        ("--retry-items", session.retry_items or (), having, "tool with items"),
        ("--redo", named, having, "tool with items"),
        ("--redo", session.redo, [step.tool for step in steps], "tool"),
    ]:
        for tool in asked:
            if tool not in there:
                raise UserError(f"{flag}: {tool!r} is no {thing} in this plan.",
                                format_nearest(tool, there) if there else
                                "Name such a tool as a target, too.")
    return dict.fromkeys(having, ()) if session.retry_items is None else session.retry_items


def needs_worker(tool, jobs):
    """Return whether a tool is to run in a worker: where others run beside it, or on its own
    wish for a process that can be ended or bounded.
    """
    return jobs > 1 or tool.isolate or tool.timeout_s is not None or tool.memory_bytes is not None


class Returned:
    """What tools returned, for those that wait for them, and how they ended.

    State: `outcomes`: see Run; `results`, by tool; where they are not kept to the end, `users`, how
    many tools still wait for each, of the tools that each of them `sees`. Of those that wait for
    all before them, the last one counts, since it is settled after the others.
    """

    def __init__(self, session):
        from collections import Counter
        self.history, self.keeps_all = session.history, session.keep_results
        self.steps = {step.tool: step for step in session.plan.steps}
        self.position = {tool: i for i, tool in enumerate(self.steps)}
        self.outcomes = dict.fromkeys(self.steps, Outcome("pending", "not started"))
        self.results = {}
        self.sees = {tool: step.edges for tool, step in self.steps.items()}
        for tool in [tool for tool in self.steps if self.steps[tool].needs == ALL_BEFORE][-1:]:
            self.sees[tool] = tuple(self.steps)[:self.position[tool]]
        self.users = Counter(each for seen in self.sees.values() for each in seen)

    def may_see(self, tool, name):
        """Return whether there may be a result for a tool of another: of one that it waits for,
        and that is in the plan or has succeeded before.
        """
        needs = self.steps[tool].needs
        if needs == ALL_BEFORE:
            return self.position.get(name, len(self.steps)) < self.position[tool]
        return name in needs and (name in self.steps or self.history.find_success(name) is not None)

    def look(self, tool, name):
        """Return in a tuple the result of a tool that another may see; of one that is not in the
        plan, the last. It is empty if there is none. For None, return the names of all; for
        Outcome, how all ended that have, without their results.
        """
        if name is Outcome:
            return ({each: outcome._replace(result=None, kept=None)
                     for each, outcome in self.outcomes.items() if not MOVES[outcome.status]},)
        if name is None:
            needs = self.steps[tool].needs
            names = self.results if needs == ALL_BEFORE else needs
            return ([each for each in names if self.look(tool, each)],)
        if not self.may_see(tool, name):
            return ()
        if name in self.steps:
            return (self.results[name],) if name in self.results else ()
        return (load_result(self.history.find_success(name)),)

    def find(self, job, name):
        """Return what look() finds for the tool of a job. Raise KeyError if there is nothing."""
        for result in self.look(job.tool, name):
            return result
        raise KeyError(name)

    def answer(self, tool, name):
        """Return the same for a worker: in a tuple, which is empty if there is none."""
        found = self.look(tool, name)
        return tuple(map(pack_result, found)) if isinstance(name, str) else found

    def take(self, tool, outcome):
        """Take it that a tool has ended; return the outcome, as far as it is kept to the end."""
        if outcome.status in ("success", "partial", "cached"):
            self.results[tool] = outcome.result
        if self.keeps_all:
            return outcome
        for each in self.sees[tool]:
            self.users[each] -= 1
        for each in (tool, *self.sees[tool]):
            if not self.users[each]:
                self.results.pop(each, None)
        return outcome._replace(result=None)


class Policy:
    """What a failure means for tools that have not begun.

    State: `causes`, for each tool that those who need it can not have, the tool that failed first;
    `first_cause`, the position of the first of these and what failed there; `stopped_by`, the tool
    whose failure keeps anything more from starting.
    """

    def __init__(self, session):
        self.tools, self.fail_fast = session.pipeline.tools, session.fail_fast
        self.position = {step.tool: i for i, step in enumerate(session.plan.steps)}
        self.causes, self.first_cause, self.stopped_by = {}, (len(self.position), ""), None

    def note(self, tool, status):
        """Note how a tool ended."""
        if status in ("failed", "partial"):
            policy = "stop" if self.fail_fast else self.tools[tool].on_failure
            if policy != "continue" and status == "failed":
                self.note_cause(tool, tool)
            if policy == "stop" and self.stopped_by is None:
                self.stopped_by = tool

    def note_cause(self, tool, root):
        """Note that those who need a tool can not have it, because `root` failed."""
        self.causes[tool] = root
        self.first_cause = min(self.first_cause, (self.position[tool], root))

    def find_hindrance(self, step):
        """Return why a tool must be skipped, or None. Notes the cause for those that need it."""
        if self.tools[step.tool].when == "always":
            return None
        if step.needs == ALL_BEFORE:
            position, first = self.first_cause
            root = first if position < self.position[step.tool] else None
        else:
            root = next((self.causes[need] for need in step.needs if need in self.causes), None)
        if root is not None:
            self.note_cause(step.tool, root)
            return f"needs {root}, which failed"
        if self.stopped_by is not None:
            return f"not started, because {self.stopped_by} failed" + (
                " and --fail-fast was given" if self.fail_fast else ' and says "stop"')
        return None


def forget_work(folder, run_id):
    """Let no item be charged with the end of this process, which is somebody's wish."""
    for slip, _, _ in load_slips(folder, run_id).values():
        forget_slip(slip, is_told=True)


class Doing(NamedTuple):
    """A job that goes on. `left` are those of its items, by name, that have not ended."""
    work: "Work"
    job: Job
    started_s: float
    left: Dict[Optional[str], Optional[Item]]


_CHUNK_S = 0.5  # what a worker is to do at a time of many items
_CHUNK_ITEMS = 1000  # but not more of them than this
_TOLD_ITEMS = 20  # so many failures of a tool's items are told, the others are in the ledger


class Tally:
    """What came of the items of a tool in this run, in all its attempts: `ended`, how many did; the
    rows of those that passed; the first names that `failed`, with their errors; how many failures
    were `told`; how many were `unfit` to be kept. `retry` are those that were given up and are to
    be tried again, `redo` those to be done again: see Job.
    """

    def __init__(self, retry, redo):
        self.ended = {"passed": 0, "failed": 0, "elsewhere": 0}
        self.rows, self.failed, self.told, self.unfit = None, {}, 0, 0
        self.retry, self.redo = retry, redo

    def count(self):
        """Return how many ended."""
        return sum(self.ended.values())

    def note_failed(self, name, error):
        """Add an item that failed."""
        self.ended["failed"] += 1
        if len(self.failed) < _TOLD_ITEMS:
            self.failed[name] = error

    def count_all(self, listed, ended_before):
        """Return the counts of items that history keeps."""
        counts = listed["counts"]
        return {**counts, "pending": counts["pending"] + ended_before, **self.ended,
                "unfit": self.unfit}

    def sum_up(self, listed):
        """Return how the items ended of which that was said, as one Try of their tool."""
        passed, failed, elsewhere = self.ended.values()
        tried, count, first = passed + failed, listed["counts"]["listed"], [*self.failed][:3]
        error = "".join(f"{format_name(name)}: {self.failed[name]}" for name in first[:1])
        names = ": " + format_names(first, failed) if failed > 1 else ""
        is_idle = not self.count()
        idle = f"none of {count_items(count)} is pending" if count else "no items"
        reason = join_reasons(
            f"{failed:,} of {count_items(tried)} failed{names}" if failed else "",
            f"{count_items(elsewhere)} done by another run meanwhile" if elsewhere else "",
            f"{count_items(passed)} done" if passed and not failed else "",
            idle if is_idle else "", listed["reason"])
        status = "success" if not failed else "partial" if passed else "failed"
        if is_idle and listed["is_hopeless"]:
            status, error = "failed", "all that was tried is given up, and none ever passed"
        result = {"items": passed, "failed": failed, "rows": self.rows or 0}
        return Try(None, status, result, self.rows, error, reason=reason)


class Work:
    """An attempt of a tool, with that `number`: what is left of it, and what came of the rest.

    Constant: `performer`, who does it; `log`, the file for what it prints, which is `output` too if
    another process does; `source` and `last_success_at`: see Job; `facts`, what a success would be
    built on; `ended_before`, how many of the items in `tally` ended in former attempts. State:
    `width`, how many jobs may go on, fewer for each that got no connection; `has_logged`, whether
    it used context.log or printed in this process; `lines`, what it logged so in a worker, to join
    the log when its output was shown; `listed`, what was said of its items; `told`, how many ended,
    as told last; `left`, the next to try; `later`, how many come again; `size`, how many to do at a
    time; `jobs`, how many go on; `problem`, the Try that ended the attempt; `done`, the one that
    did the tool; `cut_off`, what interrupted it; `outcome`, if it is over and the tool comes again.
    """
    cut_off = ""
    tally = listed = told = problem = done = outcome = None
    later = jobs = 0
    left, facts, has_logged = (), (), False
    source, last_success_at = "", None

    def __init__(self, run, callee, former):
        self.run, self.tool = run, callee.tool
        self.number = former.number + 1 if former else 1
        self.performer = run.workers if needs_worker(self.tool, run.plan.jobs) else run.here
        self.started_s = run.clock.monotonic()
        self.log = find_log(run.logs, self.tool.name, self.number) if run.logs else ""
        self.output = "" if self.performer is run.here else self.log
        self.lines = []
        if callee.has_items:
            from collections import deque
            self.tally = former.tally if former else Tally(
                run.retries.get(self.tool.name), run.session.redo.get(self.tool.name))
            self.left, self.size, self.width = deque(), self.tool.batch, run.plan.jobs
            self.source = hash_item_source(self.tool, run.setting.base)
            self.ended_before = self.tally.count()
        if run.history.folder:  # else there is nothing to know, and nobody to keep it
            if callee.takes("context"):
                self.last_success_at = run.history.find_last_success_at(self.tool.name)
            if self.tool.cache_s:
                self.facts = find_facts(run.session, self.tool)

    # --- what is to do ---

    def is_over(self):
        """Return whether nothing is left to do."""
        return not self.jobs and bool(self.problem or self.done or self.listed
                                      and not (self.left or self.later))

    def take(self, jobs):
        """Return the next to try together: not so many that other workers had none."""
        size, batch = self.size, self.tool.batch
        if jobs > 1:
            size = min(size, -(-len(self.left) // (2 * jobs)))
        size = -(-size // batch) * batch
        return tuple(self.left.popleft() for _ in range(min(size, len(self.left))))

    # --- what is heard of a job, by the kind of the message: see perform() ---

    def hear_tries(self, doing, tries):
        """Take how some tries ended; with a list of items, those that can not be kept."""
        if doing.job.is_listing:  # which a further attempt tells again
            self.tally.unfit, tries = len(tries), tries[self.tally.unfit:]
        for ended in tries:
            doing.left.pop(ended.item and ended.item.name, None)
            if ended.item:
                self.take_item(ended)
            elif ended.status == "success":
                self.done = ended
            else:
                self.problem = ended
        if self.run.clock.monotonic() - doing.started_s > _CHUNK_S:
            self.tell_progress()  # they take longer than was thought
            self.run.publish()

    def tell_progress(self):
        """Tell how many items have ended of those that were pending, if that is new."""
        done = self.listed and self.tally.count() - self.ended_before
        if done != self.told:
            self.told, total = done, self.listed["counts"]["pending"]
            self.run.tell("progress", self.tool.name, done=done, total=total)

    def take_item(self, ended):
        """Take how an item ended."""
        tally = self.tally
        forget_slip(ended.item.slip, is_told=True)
        if ended.status == "success":
            tally.ended["passed"] += 1
            if ended.rows is not None:
                tally.rows = (tally.rows or 0) + ended.rows
        elif ended.status == "done":
            tally.ended["elsewhere"] += 1
        else:
            self.take_failed_item(ended)

    def take_failed_item(self, ended):
        """Take how an item ended that did not pass: it comes again, or has failed."""
        item, retries, tries = ended.item, self.tool.retries, count_tries(ended.item)
        error = f"{format_name(item.name)}: {ended.error}"
        count = f"try {tries} of {retries + 1}" if retries and tries else ""
        if item.is_death:
            what = "connection" if ended.error.startswith(_GONE) else "process"
            count = f"it took its {what} down {item.deaths} of {DEATHS_ALLOWED} times"
        if ended.status == "pending":
            then = self.run.come_again(self, item._replace(is_death=False, slip=""),
                                       0 if item.is_death else tries)
        else:
            then = "quarantined" if ended.status == "quarantined" else ""
            self.tally.note_failed(item.name, ended.error)
        self.tell_failed_item(ended, join_reasons(error, count, then))

    def tell_failed_item(self, ended, text):
        """Tell of an item that failed, if not of too many; the log has the traceback of each. The
        last line of that says what stands before it.
        """
        traceback = ended.traceback.rstrip().removesuffix("\n" + ended.error)
        self.tally.told += 1
        told = self.tally.told
        if told > _TOLD_ITEMS:
            return
        if told == _TOLD_ITEMS:
            text = f"more items fail; --items {self.tool.name} --failed will list them"
        elif told == 1 and traceback:
            text += "\n" + traceback
        self.note_log(text)
        self.run.tell("log", self.tool.name, text=text,
                      level=30 if ended.status == "pending" else 40)
        if 1 < told < _TOLD_ITEMS and traceback:
            self.note_log(traceback)

    def note_log(self, text):
        """Add a text to the log, if there is one to keep."""
        if self.run.history.folder:
            self.has_logged = True
            if self.output:
                self.lines.append(text)
            else:
                append_line(self.log, text)

    def hear_found(self, doing, items):
        """Take items that are pending. Those that were at work when a former run was cut off are
        charged with that, unless the tool's source was changed since: that mended it, perhaps.
        """
        self.run.publish()  # what was told of them, before the first is tried
        for item in items:
            slip, source, at_work = self.run.former.pop((self.tool.name, item.name), ("", "", None))
            if source == doing.job.source and at_work.version == item.version \
                    and count_tries(at_work) == count_tries(item):
                self.charge(item, "its process ended while it was at work", True, slip)
            else:
                forget_slip(slip, is_told=True)
                self.left.append(item)

    def charge(self, item, how, is_death, slip):
        """Have it recorded that an item did not survive, or was too slow, before another try."""
        self.left.appendleft(item._replace(
            charge=how, is_death=is_death, slip=slip, is_seen=None,
            tries=item.tries + (not is_death), deaths=item.deaths + is_death))

    def hear_listed(self, doing, listed):
        """Take it that all pending items are known, and what was said of them."""
        former, tool = self.run.former, self.tool.name
        self.listed = listed
        self.tally.retry = self.tally.redo = None  # what was given back is not once more
        self.run.history.note_items(tool, listed["counts"])
        for key in [] if doing.job.only else [key for key in former if key[0] == tool]:
            forget_slip(former.pop(key)[0], is_told=True)  # it is not pending any more

    def hear_event(self, _doing, event):
        """Have told what the tool says of itself."""
        if event["kind"] == "log":
            self.note_log(event["text"])
        self.run.tell(tool=self.tool.name, **event)
        if not self.output:
            self.run.publish()

    def hear_asks(self, doing, name):
        """Answer a worker that asks for a result, or for outcomes."""
        self.performer.answer(doing.job.number, self.run.returned.answer(self.tool.name, name))

    def hear_ended(self, doing, problem):
        """Take it that a job is over, and what kept it from the rest."""
        run, tool, count = self.run, self.tool, len(doing.job.items)
        if problem is None and count and self.tally:  # the next are to take _CHUNK_S together
            took_s = max(run.clock.monotonic() - doing.started_s, 1e-6)
            self.size = max(1, min(int(_CHUNK_S * count / took_s), 10 * self.size,
                                   max(_CHUNK_ITEMS, tool.batch)))
        if problem and problem.status == "pending":
            problem = self.take_no_connection(doing, problem)
        if problem and problem.status == "interrupted":
            run.interrupt()
        elif problem:
            charged = {item.name: item for item in [*self.left, *doing.left.values(), problem.item]
                       if item and item.is_death}
            for name, item in charged.items():  # as long as that could not be recorded
                run.former[tool.name, name] = item.slip, doing.job.source, item._replace(
                    deaths=item.deaths - 1)
        self.problem = self.problem or problem
        self.tell_progress()

    def take_no_connection(self, doing, problem):
        """Take it that a worker got no connection for its items, with which the others go on; if
        there is none left, return that as what ends the attempt.
        """
        self.width -= 1
        if not self.width:
            return problem._replace(status="failed")
        self.left.extend(doing.left.values())
        if self.width == self.run.plan.jobs - 1:
            text = join_reasons("a worker has no connection, so that others do its items: "
                                + problem.error, problem.reason)
            self.note_log(text)
            self.run.tell("log", self.tool.name, text=text, level=30)
        return None

    def hear_died(self, doing, what):
        """Take it that a job is over with its process, or took too long, and what was at work."""
        left, (item, how, is_late, slip) = doing.left, what
        at_work = left.pop(item.name, None) if item else None
        if at_work is None or self.cut_off:  # or it was killed by us
            forget_slip(slip, is_told=True)
        if self.cut_off:
            self.problem = Try(None, "interrupted")
        elif at_work is None and len(left) == len(doing.job.items):
            self.problem = self.problem or Try(None, "failed", error=how)
        elif self.tally:  # else it has told of its one try, and is done
            self.left.extend(each._replace(is_seen=None) for each in left.values())
            if at_work:
                self.charge(at_work._replace(tries=item.tries, deaths=item.deaths), how,
                            not is_late, slip)

    # --- how an attempt ended ---

    def make_outcome(self):
        """Return how the attempt ended."""
        tool = self.tool
        ended = self.problem or self.done or (
            self.tally.sum_up(self.listed) if self.is_over() else
            Try(None, "interrupted"))
        error, reason = ended.error, self.cut_off * (ended.status == "interrupted") or ended.reason
        if ended.status == "failed" and 1 < self.number > tool.retries:
            reason = join_reasons(reason, f"try {self.number} of {tool.retries + 1}")
        if tool.memory_bytes is not None and "MemoryError" in error:
            error += f"; its memory is bounded to {tool.memory_bytes / 2**20:.1f} MB"
        has_log = self.has_logged or self.output and has_bytes(self.output)
        return Outcome(ended.status, reason, ended.result, ended.rows, error, ended.traceback,
                       self.number, self.run.clock.monotonic() - self.started_s,
                       self.log if has_log else "",
                       ended.result.kept if isinstance(ended.result, Packed) else None,
                       self.listed and self.tally.count_all(self.listed, self.ended_before))


_RUNNING = Outcome("running")


class Starter:
    """What of a run starts, and when: tools, and items of those that have begun, where there is
    room; and what comes again. Its state is that of Run.
    """

    def come_again(self, work, item=None, tries=0):
        """Have a tool, or an item of it, tried again after so many tries that failed, or at once
        after none; return in words when that is.
        """
        from random import random
        delay_s = retry_delay_s(work.tool, tries, random) if tries else 0.0
        heappush(self.again, (self.clock.monotonic() + delay_s, next(self.numbers), work, item))
        work.later += item is not None
        return "again" + (f" in {format_duration(delay_s)}" if delay_s else "")

    def bring_again(self):
        """Make ready what is due to come again."""
        while self.again and self.again[0][0] <= self.clock.monotonic():
            _, _, work, item = heappop(self.again)
            if item:
                work.later -= 1
                work.left.append(item)
            elif work.tool.name in self.waiting and not self.is_interrupted:
                self.schedule.add(work.tool.name)

    def start_ready(self):
        """Start what is ready and has room: items of tools that have begun and wait for a worker,
        tools, and then more items, side by side.
        """
        self.start_items(is_first=True)
        while self.has_room():
            tool = self.schedule.next()
            if tool is None:
                break
            self.begin_attempt(tool)
        self.start_items(is_first=False)

    def has_room(self):
        """Return whether one more job may start."""
        return len(self.jobs) < self.plan.jobs

    def start_items(self, is_first):
        """Have more items done where there is room; if `is_first`, of tools of which none are."""
        for tool, work in self.open.items():
            while work.left and not (work.problem or work.cut_off) and self.has_room() \
                    and work.jobs < work.width and not (is_first and work.jobs) \
                    and self.schedule.take(tool):
                self.start_job(work, work.take(self.plan.jobs))

    def begin_attempt(self, tool):
        """Begin an attempt, for which there is room."""
        former = self.waiting.pop(tool, None)
        if former is None:
            self.move(tool, _RUNNING)
        if self.is_interrupted:
            self.interrupts.limit(self.session.grace_s)
        work = self.open[tool] = Work(self, self.callees[tool], former)
        self.history.begin_attempt(tool, work.number, self.clock.wall(), work.performer.reserve(),
                                   work.tool.arguments)
        self.tell("tool_started", tool, output=work.output)
        self.publish()
        self.start_job(work, () if work.tally else (None,))

    def start_job(self, work, items):
        """Have some items tried; without any, have them listed."""
        work.jobs += 1
        job = Job(next(self.numbers), work.tool.name, items, not items, work.log,
                  self.ledger_run_id, work.number, work.last_success_at, work.source,
                  self.session.request.item, work.tally and work.tally.retry,
                  work.tally and work.tally.redo)
        self.jobs[job.number] = Doing(work, job, self.clock.monotonic(),
                                      {item and item.name: item for item in items})
        work.performer.start(job, work.tool.timeout_s)


class Run(Starter):
    """One execution of a plan: what starts, and what the end of a tool means for others.

    Constant: the session and what it holds. Changing: `outcomes` of the tools, with a status before
    they end, too; `open`, the Work of those that are at an attempt, and `waiting`, of those that
    come again; `jobs`, what is being done, by number; `again`, a heap of (moment, number, Work,
    item or None): the only way in which anything comes again, and out of date once the attempt is
    over; `former`, the items that were at work when a run was cut off: see load_slips();
    `is_interrupted`, and `signal`, by which, if it was one; `told`, the events that the listener
    hears at the next publish(); `refused`, what makes that a run that never was.
    """

    def __init__(self, session, setting, interrupts, callees, workers, returned):
        self.session, self.plan, self.history = session, session.plan, session.history
        self.clock, self.pipeline, self.callees = session.clock, session.pipeline, callees
        self.interrupts, self.workers, self.setting = interrupts, workers, setting
        self.retries = find_retries(
            session, [tool for tool, callee in callees.items() if callee.has_items])
        self.returned, self.policy = returned, Policy(session)
        self.steps, self.outcomes = self.returned.steps, self.returned.outcomes
        self.schedule = Schedule(self.plan.steps, session.pipeline, self.plan.jobs)
        self.open, self.waiting, self.jobs, self.again = {}, {}, {}, []
        self.numbers = iter(range(1, sys.maxsize))  # of jobs, and of what comes again
        self.is_interrupted, self.signal, self.told, self.refused = False, None, [], None
        self.started_s = self.clock.monotonic()
        self.run_id = self.history.begin_run(
            self.plan, session.request, setting.arguments,
            find_versions(self.pipeline, [callee.tool for callee in callees.values()]),
            self.clock.wall())
        self.ledger_run_id = f"{self.run_id}.{os.urandom(2).hex()}"
        self.slips, self.former = setting.slips, load_slips(setting.slips)
        self.logs = self.slips and find_logs(os.path.dirname(self.slips), self.run_id)
        interrupts.before_exit = lambda: forget_work(self.slips, self.ledger_run_id)

    def loop(self, here):
        """Start what is ready and settle what has ended, until nothing is left to do. `here` does
        what needs no worker.
        """
        self.here = here
        self.tell("run_started", plan=self.plan)
        self.unblock(self.schedule.begin())
        while True:
            if self.interrupts.signal is not None:
                self.interrupt()
            for work in [*self.open.values()]:
                if work.is_over() or work.cut_off and not work.jobs:
                    self.end_attempt(work)
            if self.refused:
                return
            self.bring_again()
            self.start_ready()
            self.publish()
            if not self.open and not self.waiting:
                return
            self.wait()

    def interrupt(self):
        """Let what runs end within the grace, and nothing more start but what cleans up after it;
        once more, if that is not over within the grace.
        """
        signal, self.interrupts.signal = self.interrupts.signal, None  # so tools can be called
        why = format_signal(signal)
        if not self.is_interrupted:
            self.is_interrupted, self.signal = True, signal
        elif signal is not None:
            why = f"not over {format_duration(self.session.grace_s)} after it began"
        for work in self.open.values():
            work.cut_off = work.cut_off or why
        if self.workers:
            self.workers.interrupt()
        ready = dict.fromkeys([*self.schedule.take_all(), *self.waiting])
        self.unblock(list(ready))

    def cleans_up(self, tool):
        """Return whether a tool is to run in a run that is interrupted: it cleans up, and something
        that it waits for, directly or not, had begun.
        """
        left, seen = [tool], {tool}
        while left and self.pipeline.tools[tool].when == "always":
            step = self.steps[left.pop()]
            if self.outcomes[step.tool].status not in ("pending", "cached", "skipped"):
                return True
            new = [each for each in step.edges if each not in seen]
            left += new
            seen.update(new)
        return False

    def wait(self):
        """Hear what is said, until something is due."""
        if self.here.job:
            work = self.open[self.here.job.tool]
            work.has_logged = self.here.wait() or work.has_logged
            return
        due_s = self.again[0][0] - self.clock.monotonic() if self.again else _BEAT_S
        timeout_s = max(0.0, min(_BEAT_S, due_s))
        if not self.jobs:
            self.clock.sleep(timeout_s)
            return
        said = self.workers.wait(timeout_s)
        for message in said:
            self.hear(message)
        if not said:
            for work in self.open.values():
                work.tell_progress()
            self.tell("tick")

    def hear(self, message):
        """Take a message of perform(), or of the workers."""
        kind, number, what = message
        doing = self.jobs.get(number)
        if doing is None:
            return  # a thread that a tool has left behind tells of itself
        if kind in ("ended", "died"):
            del self.jobs[number]
            self.schedule.release(doing.job.tool)
            doing.work.jobs -= 1
        getattr(doing.work, "hear_" + kind)(doing, what)

    # --- how tools end ---

    def end_attempt(self, work):
        """Take how an attempt ended: settle the tool, or let it come again unless that says
        nothing new.
        """
        tool, outcome = work.tool.name, work.make_outcome()
        del self.open[tool]
        if outcome.status == "unlisted":
            begun = [each for each in self.outcomes.values()
                     if each.status not in ("pending", "cached")]
            if len(begun) == 1:
                self.refused = Unlisted(outcome.error, outcome.reason)
                return
            outcome = outcome._replace(status="failed", reason=NOT_AGAIN)
        comes_again = outcome.status == "failed" and work.problem is not None \
            and outcome.reason != NOT_AGAIN and work.number <= work.tool.retries \
            and self.policy.stopped_by is None and not self.is_interrupted
        if comes_again:
            work.outcome, self.waiting[tool] = outcome, work
            again = self.come_again(work, None, work.number)
            outcome = outcome._replace(reason=join_reasons(
                outcome.reason, f"try {work.number} of {work.tool.retries + 1}", again))
        if outcome.log and work.tool.timeout_s is not None and work.output:
            leave_out_callers(work.output)
        self.history.end_attempt(tool, outcome, format_facts(work, outcome, self.history.base))
        if comes_again:
            self.tell("tool_retried", tool, outcome=outcome, output=work.output)
        else:
            self.settle(tool, outcome, work.output)
        if work.output:
            self.publish()  # who listens shows the file, before it is cut
            if work.lines:
                append_line(work.log, "\n".join(work.lines))
            tidy_log(work.log)
        while self.policy.stopped_by and self.waiting:  # no tool is tried again
            each = next(iter(self.waiting))
            self.settle(each, self.waiting.pop(each).outcome)

    def note_end(self, tool, outcome, output=""):
        """Note how a tool ended, or that it need not or can not begin."""
        self.move(tool, self.returned.take(tool, outcome))
        self.tell("tool_ended", tool, outcome=outcome, output=output)

    def move(self, tool, outcome):
        """Let a tool have another status, and what belongs to that."""
        check_move(self.outcomes[tool].status, outcome.status)
        self.outcomes[tool] = outcome

    def settle(self, tool, outcome, output=""):
        """Note how a tool ended that was tried, and let those go on that waited for it."""
        self.note_end(tool, outcome, output)
        self.policy.note(tool, outcome.status)
        freed = self.schedule.done(tool)
        if self.policy.stopped_by:  # then nothing that was ready starts any more
            freed[:0] = [each for each in self.schedule.take_all() if each not in self.waiting]
        self.unblock(freed)

    def unblock(self, tools):
        """Make tools ready that wait for nothing any more; settle those that are not to run."""
        for tool in tools:  # which grows
            step, work = self.steps[tool], self.waiting.get(tool)
            if self.is_interrupted and not self.cleans_up(tool):
                if work:
                    del self.waiting[tool]
                    self.note_end(tool, Outcome("interrupted", "waited for another try",
                                                attempts=work.number))
                tools += self.schedule.done(tool)  # it stays as it is
                continue
            reason = self.policy.find_hindrance(step) if step.may_run() else None
            success = None if reason else find_standing(self.session, step)
            if success:
                outcome = Outcome("cached", step.reason.partition(", unless ")[0],
                                  load_result(success), success.rows)
            elif reason:
                outcome = Outcome("skipped", reason)
            else:
                self.schedule.add(tool)
                continue
            if step.may_run():  # else it is known since the run began
                self.history.note(tool, 0, outcome.status, self.clock.wall(), None, outcome.reason,
                                  success and success.success_id, outcome.rows)
            self.note_end(tool, outcome)
            tools += self.schedule.done(tool)

    # --- what is told ---

    def tell(self, kind, tool="", **what):
        """Have the listener told at the next publish()."""
        if self.session.on_event:
            self.told.append(Event(kind, self.clock.wall(), self.run_id, tool, **what))

    def publish(self):
        """Make durable what was recorded, and only then tell the listener of it."""
        self.history.commit()
        while self.told:
            self.session.on_event(self.told.pop(0))

    def end(self):
        """Return how the run ended, and tell the listener. Raise Unlisted if it was to do nothing
        that there is.
        """
        if self.refused:
            self.history.forget_run()
            raise self.refused
        result = make_result(self.run_id, self.outcomes, self.is_interrupted, self.returned.results,
                             self.clock.monotonic() - self.started_s,
                             self.signal or self.interrupts.signal)
        load_slips(self.slips)  # which removes those of idle workers that died
        if self.logs:
            with contextlib.suppress(OSError):
                os.rmdir(self.logs)  # if nobody has printed anything
        self.history.end_run(result.status, result.duration_s)
        self.tell("run_ended", result=result)
        self.publish()
        return result


def find_standing(session, step):
    """Return the success because of which a tool is not run, now that what it waits for has ended;
    None if it is to run.
    """
    if step.action == "maybe":
        past = make_past(session.pipeline, session.history, session.arguments,
                         session.clock.wall(), {}, False)._replace(excluded=session.plan.excluded)
        if find_reason_to_run(session.pipeline.tools[step.tool], step.success, past):
            return None
    return step.success


def make_result(run_id, outcomes, is_interrupted, results, duration_s, signal):
    """Return how a run ended, by how its tools did."""
    success, cached, partial, failed, skipped = (
        [tool for tool, outcome in outcomes.items() if outcome.status == status]
        for status in ("success", "cached", "partial", "failed", "skipped"))
    status = "interrupted" if is_interrupted else "failed" if failed or partial else "success"
    return RunResult(run_id, status, success, cached, partial, failed, skipped,
                     {tool: outcomes[tool].error for tool in [*failed, *partial]},
                     Results(results.__getitem__, results.keys), duration_s, outcomes, signal)


def find_facts(session, tool):
    """Return what a success of a tool with `cache` would be built on, before it begins, by the
    columns of `attempts`.
    """
    history = session.history
    return {"source": describe_source(tool, hash_source(tool, history.base, hash_imported)),
            "needed": leave_out_works(history.find_needed_works(session.pipeline, tool.name),
                                      session.plan.excluded),
            "inputs": {"reads": find_reads(tool, history.base, {})}}


def format_facts(work, outcome, base):
    """Return more columns of an attempt, as JSON: the first items that failed; of a success, what
    it was built on, with the files that it wrote.
    """
    facts = {}
    if work.tally and work.tally.failed:
        facts["failures"] = work.tally.failed
    if work.facts and outcome.status == "success":
        work.facts["inputs"]["writes"] = find_writes(work.tool, base)
        facts.update(work.facts)
    return make_columns(facts) if facts else facts


def load_result(success):
    """Return what a tool returned at a success, or what is known of that."""
    import json
    return Packed(None, success.kind) if success.result is None else json.loads(success.result)


def mark_done(pipeline, plan, request, arguments, history, tools, now):
    """Record a run in which nothing was done but these tools, by hand; return what is left.

    Each keeps the start of its attempt that failed: what came in after that, the next run will
    still have to see.

    Raise UserError for a tool that is not in the plan, or that needs one that is not done.
    """
    steps, left = [step.tool for step in plan.steps], []
    for tool in tools:
        if tool not in steps:
            raise UserError(f"{tool!r} is not in run {request.resumes}.",
                            format_nearest(tool, steps))
    for step in plan.steps:
        if step.tool not in tools:
            left += [step.tool] * step.may_run()
            continue
        for each in left:
            if step.needs == ALL_BEFORE or each in step.needs:
                raise UserError(f"{step.tool} needs {each}, which is not done.",
                                f"Mark {each} as done too, if it is.")
    history.begin_run(plan, request, arguments,
                      find_versions(pipeline, [pipeline.tools[tool] for tool in steps]), now)
    for tool in dict.fromkeys(tools):
        started_at = history.find_started_at(tool, request.resumes)
        known_at = history.find_last_success_at(tool) or started_at  # of a run since, by itself
        history.begin_attempt(tool, 1, max(started_at, known_at), os.getpid())
        history.end_attempt(tool, Outcome("success", "marked as done by hand", duration_s=None), {})
    history.end_run("failed" if left else "success", 0.0)
    return left


def make_past(pipeline, history, arguments, now, done, is_forced, wants_durations=True):
    """Return what planning may ask of a history. Durations cost time, and decide nothing where
    tools run one after another and nobody looks at the plan.
    """
    mine = format_arguments(arguments)
    texts = [mine]
    if has_period(arguments):  # then a run of all periods will do, too
        texts.append(format_arguments({name: value for name, value in arguments.items()
                                       if name not in PERIOD_ARGUMENTS}))

    def find_whole_success(tool):
        found = [history.find_success(tool, text) for text in texts]
        return max(filter(None, found), key=lambda success: success.success_id, default=None)

    def find_change(tool, success):
        if success.arguments != mine:
            return "arguments changed"
        if find_day(success.started_at) < str(arguments.get(PERIOD_ARGUMENTS[1]) or ""):
            return "its period has gone on"
        now = describe_source(tool, hash_source(tool, history.base))
        return find_changed_source(success.source, now) \
            or find_changed_file(tool, history.base, success.inputs)

    find_expected_s = history.find_expected_s if wants_durations else lambda tool: None
    return Past(now, history.find_success, find_whole_success, find_expected_s,
                lambda tool: history.find_needed_works(pipeline, tool), find_change, done,
                is_forced, has_items)


def count_jobs(jobs):
    """Return how many tools may run side by side; 0 means the number of cores."""
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 0:
        raise UserError(f"jobs is {jobs!r}, not a whole number from 0 on.",
                        "Give how many tools may run side by side; 0 means one for each core.")
    affinity = getattr(os, "sched_getaffinity", None)
    jobs = jobs or (len(affinity(0)) if affinity else os.cpu_count() or 1)
    return min(jobs, 30) if IS_WINDOWS else jobs  # it waits for 63 handles, two of a worker


def check_keywords(name, item, home, resume, grace_s, wait_s, on_event):
    """Raise UserError for a keyword of run_pipeline() that would fail late, or be passed over."""
    def is_text(value):
        return value is None or isinstance(value, str) and value != ""

    for keyword, value, is_right, wanted in [
        ("name", name, is_text(name), 'a name such as "sales"'),
        ("item", item, is_text(item), 'the name of an item such as "monday.csv"'),
        ("home", home, is_text(home) or hasattr(home, "__fspath__"), "a folder"),
        ("resume", resume, isinstance(resume, int) or is_text(resume), "True or the id of a run"),
        ("grace_s", grace_s, is_number(grace_s) and grace_s >= 0, "a number of seconds"),
        ("wait_s", wait_s, is_number(wait_s) and wait_s >= 0, "a number of seconds"),
        ("on_event", on_event, on_event is None or callable(on_event),
         "a function that takes an event"),
    ]:
        if not is_right:
            raise UserError(f"{keyword} is {value!r}, not {wanted}.",
                            f"Correct it, or leave {keyword} out.")


def make_retries(keyword, given):
    """Return which items are to be tried or done again, by tool; none of a tool means all of it."""
    if not isinstance(given, Mapping):
        given = dict.fromkeys(read_targets(keyword, given), ())
    read_targets(keyword, given)  # the tools
    return {tool: tuple(read_targets(keyword, names)) for tool, names in given.items()}


def run_pipeline(targets: Union[str, Sequence[str]], tool_map: Mapping[str, Any],
                 stages: Optional[Mapping[str, Any]] = None,
                 get_connection: Optional[Callable[..., Any]] = None, *,
                 arguments: Optional[Mapping[str, Any]] = None, exclude: Sequence[str] = (),
                 start_from: Optional[str] = None, jobs: int = 1,
                 limits: Optional[Mapping[str, int]] = None, fail_fast: bool = False,
                 verbose: bool = False, name: Optional[str] = None, grace_s: float = GRACE_S,
                 home: Optional[str] = None, resume: Union[bool, str] = False,
                 force: bool = False, wait_s: float = 0.0, item: Optional[str] = None,
                 retry_items: Union[str, Sequence[str], Mapping[str, Sequence[str]]] = (),
                 redo: Union[str, Sequence[str], Mapping[str, Sequence[str]]] = (),
                 on_event: Optional[Callable[[Event], None]] = None) -> RunResult:
    """Run targets from Python, as the command line would, and return how that ended.

    targets: names of stages and tools; none means the stage `full`, or else every tool.
    arguments: what tools, and get_connection(), get by name. on_event: called with each Event;
    nothing is printed.
    grace_s: seconds between asking a process to end and killing it. home: a folder for the
    history, without which none is kept, and no lock held. resume: True, or the id of a run, whose
    targets are taken, and also its arguments, exclusions, start_from and item unless others are
    given. retry_items, redo: tools, or names of items by tool. The other keywords say what flags
    and tables of the same names say.

    A tool that fails is told in the result; raise UserError for bad input, before anything has
    run: also for an argument that no tool in `tool_map` takes. On the main thread, Ctrl-C, SIGTERM
    and SIGHUP first end the run in order and then do what they would have done without it.
    """
    take_path()
    check_keywords(name, item, home, resume, grace_s, wait_s, on_event)
    forget_modules()
    pipeline = load_pipeline(tool_map, stages, get_connection, name=name, limits=limits)
    request = Request(tuple(read_targets("targets", targets)),
                      tuple(read_targets("exclude", exclude)), start_from, item=item)
    check_arguments(arguments)
    retry_items, redo = make_retries("retry_items", retry_items), make_retries("redo", redo)
    if home is None and resume:
        raise UserError("resume needs a history.", "Say where it is: home=.")
    said, jobs = arguments or {}, count_jobs(jobs)  # those of a resumed run are not said anew
    with contextlib.closing(History()) if home is None else hold_history(
            find_pipeline_folder(home, pipeline.name), find_base(get_connection), wait_s) \
            as history:
        past = None
        if home is not None:
            history.close_killed()
            request, arguments, done = find_request(history, request, arguments, resume)
            past = make_past(pipeline, history, arguments or {}, Clock().wall(), done, force,
                             jobs > 1)
        plan = make_plan(pipeline, request.targets, exclude=request.exclude, past=past,
                         start_from=request.start_from, jobs=jobs, redo=redo)
        result = run_plan(Session(
            pipeline, plan, arguments or {}, history, request, fail_fast, verbose,
            grace_s=grace_s, retry_items=retry_items, redo=redo, on_event=on_event,
            find_said=lambda: dict.fromkeys(said, "arguments")))
    pass_on_signal(result)
    return result


def pass_on_signal(result):
    """Do what the signal that interrupted a run would have done without it."""
    if result.signal is not None:
        import signal
        signal.raise_signal(result.signal)
    if result.status == "interrupted":
        raise KeyboardInterrupt


# === 11 VIEWS ===================================================================================
# Text and JSON from plans, events and results. Nothing is decided, asked or printed here.

_COLOURS = {"success": 32, "cached": 32, "failed": 31, "quarantined": 31, "partial": 33,
            "skipped": 33, "interrupted": 33, "run": 36, "running": 36}


class Style(NamedTuple):
    """How text is to look: with colours or without; and how the code of one begins."""
    colour: bool = False
    ink: str = "\x1b["

    def paint(self, text, status):
        """Return text in the colour of a status."""
        code = _COLOURS.get(status)
        return f"{self.ink}{code}m{text}{self.ink}0m" if self.colour and code else text

    def bold(self, text):
        """Return text that stands out."""
        return f"{self.ink}1m{text}{self.ink}0m" if self.colour else text


def format_table(columns, rows, style=Style(), has_head=True):
    """Return rows, mappings by column, as aligned lines under the names of columns.

    `columns` are their names in one text. That of `>name` is aligned to the right; that of `?name`
    is left out where it is empty; that of `status` is coloured. The last one is not padded: its
    longest cell may be a page.
    """
    shown, columns = [], columns.split()
    for column in columns:
        name = column.lstrip(">?")
        cells = [format_cell(name, row.get(name)) for row in rows]
        if column[0] == "?" and not any(cells):
            continue
        cells.insert(0, format_head(name) if has_head else "")
        width = 0 if column == columns[-1] else max(map(len, cells))
        align = str.rjust if column[0] == ">" else str.ljust
        texts = [align(cell, width) for cell in cells]
        if name == "status":
            texts = [style.paint(text, cell) for text, cell in zip(texts, cells)]
        shown.append(texts)
    head, *lines = ["  ".join(texts).rstrip() for texts in zip(*shown)]
    return [style.bold(head), *lines] if has_head else lines


def format_head(name):
    """Return the name of a column without what it says of a unit."""
    return re.sub("_(s|at|id)$|^note$", "", name)


def format_cell(name, value):
    """Return a value for a table, by what the name of its column says of its unit."""
    if value is None:
        return ""
    if name.endswith("_s"):
        return format_duration(value)
    if name.endswith("_at"):
        return format_local(value)
    if isinstance(value, list):
        return format_some(value, " ")
    return f"{value:,}" if isinstance(value, int) else value


def format_some(names, joint=", "):
    """Return names in one line: all of them, or of many the first, and how many there are."""
    shown = joint.join(names[:30])
    return shown if len(names) <= 30 else f"{shown}{joint}... ({len(names):,} in all)"


def format_plural(count, thing):
    """Return how many things there are, in words: `1 tool`, `3 tools`, `no tools`."""
    return f"{count} {thing}{'s' * (count != 1)}"


def make_row(row, columns):
    """Return some columns of a row, named in one text, for --json: ids and moments are text."""
    shown = {}
    for name in columns.split():
        value = row.get(name)
        if name.endswith("_at"):
            value = format_moment(value)
        elif name == "run_id" and value is not None:
            value = str(value)
        shown[name] = value
    return shown


def make_list(pipeline, tools, find_summary, find_last):
    """Return what --list shows, as data, for some of the tools and the stages made of them."""
    tools_of = {stage.name: {*stage.tools} for stage in pipeline.stages.values()}

    def make_tool(name):
        """Return the row of a tool."""
        tool, last = pipeline.tools[name], find_last(name)
        return {"name": name, "module": describe_call(tool), "summary": find_summary(tool),
                "needs": pipeline.needs[name],
                "stages": [stage for stage, there in tools_of.items() if name in there],
                "last": last and {**make_row(last, "status run_id"),
                                  "at": format_moment(last["started_at"])}}

    return {"tools": [make_tool(name) for name in tools],
            "stages": [{"name": stage, "tools": list(pipeline.stages[stage].tools)}
                       for stage, there in tools_of.items() if there.issubset(tools)]}


def format_list(shown, style):
    """Return --list as text."""
    lines = [style.bold("Tools"), *format_table("name ?status summary", [
        {"name": "  " + tool["name"], "status": (tool["last"] or {}).get("status"),
         "summary": tool["summary"]} for tool in shown["tools"]], style, has_head=False)]
    if shown["stages"]:
        lines += ["", style.bold("Stages"), *format_table("name tools", [
            {"name": "  " + stage["name"], "tools": stage["tools"]}
            for stage in shown["stages"]], has_head=False)]
    return "\n".join(lines)


def make_plan_view(plan):
    """Return what --plan shows, as data."""
    def make_step(step):
        needs = step.needs if step.needs == ALL_BEFORE else list(step.needs)
        return make_row({**step._asdict(), "needs": needs},
                        "tool wave action reason needs expected_s arguments")

    return {"steps": [make_step(step) for step in plan.steps],
            "critical_path": list(plan.critical_path), "expected_s": plan.expected_s}


def format_plan(shown, style, jobs):
    """Return --plan as text: the steps by waves, the critical path, what is expected."""
    steps, expected_s = shown["steps"], shown["expected_s"]
    there = {step["tool"] for step in steps}
    lines = format_table(">wave tool action >expected_s reason", [
        {**step, "expected_s": step["expected_s"] if step["action"] in ("run", "maybe") else None,
         "reason": step["reason"] + format_needs(step, there)}
        for step in sorted(steps, key=lambda step: step["wave"])], style)
    lines += ["", "Critical path: " + format_some(shown["critical_path"], " -> ")]
    if expected_s is not None:
        alone_s = sum(step["expected_s"] or 0.0 for step in steps)
        lines.append(f"Expected: {format_duration(expected_s)} with --jobs {jobs}"
                     + (f", {format_duration(alone_s)} one after another" * (jobs > 1)))
    return "\n".join(lines)


def make_graph(steps, find_last):
    """Return what --graph shows, as data: each tool of a plan with its last status and what it
    waits for, but for what another one of these waits for, too.
    """
    order = Order({step.tool: step.edges for step in steps})
    return {"tools": [{"tool": step.tool, "status": (find_last(step.tool) or {}).get("status"),
                       "needs": order.find_last(step.edges)} for step in steps]}


_LINES = " ╵╷│╴┘┐┤╶└┌├─┴┬┼"  # by the sum of where they lead: 1 up, 2 down, 4 left, 8 right
PLAIN_LINES = str.maketrans("●" + _LINES[1:], "*'.|-'.+-'.+-+++")  # where there are no such letters


def format_graph(shown, style):
    """Return --graph as lines that can be followed from each tool down to those that wait for it.

    A tool has a column as long as somebody below waits for it, as commits have in `git log
    --graph`; of those that it waited for, it takes over the first column that nobody needs more.
    """
    tools, columns, lines, at = shown["tools"], [], [], None
    waiting = collections.Counter(need for tool in tools for need in tool["needs"])
    for tool in tools:
        above, froms = columns, sorted(map(columns.index, tool["needs"]))
        waiting.subtract(tool["needs"])
        columns = [name if waiting[name] else None for name in above]
        free = [each for each in froms if columns[each] is None]
        free += [each for each, name in enumerate(columns) if name is None]
        last, at = at, (free or [len(columns)])[0]
        columns[at:at + 1] = [tool["tool"]]
        if froms != [at] and (froms or last == at):
            lines.append({"graph": format_joint(above, columns, froms, at)})
        lines.append({**tool, "graph": " ".join(
            "●" if each == at else "│" if name else " " for each, name in enumerate(columns))})
        if not waiting[tool["tool"]]:
            columns[at] = None
    return "\n".join(format_table("graph tool status", lines, style, has_head=False))


def format_joint(above, below, froms, at):
    """Return the line of a graph between two tools, of which the lower one, in column `at`, waits
    for those of the columns `froms`. Other columns go on behind it.
    """
    first, last, line = min([at, *froms]), max([at, *froms]), ""
    for each in range(max(len(above), len(below))):
        comes, goes = (each < len(names) and names[each] is not None for names in (above, below))
        if each in froms or each == at:
            leads = (each in froms) + 2 * (goes and froms != []) \
                + 4 * (first < each) + 8 * (each < last)
        else:
            leads = 3 * (comes and goes) or 12 * (first < each < last)
        line += _LINES[leads] + " ─"[first <= each < last]
    return line


_FILLS = {"success": "#d5efd9", "cached": "#d5efd9", "failed": "#f6d0cd", "partial": "#fbe8c0",
          "skipped": "#fbe8c0", "interrupted": "#fbe8c0", "running": "#cfe6f5"}
# How a graph begins, what stands for a tool and for a need, and how it ends; which letters a label
# can not have, and what stands for them.
_DRAWINGS = {
    "mermaid": ("flowchart TD", '  {id}["{label}"]\n  style {id} fill:{fill},color:#111',
                "  {need} --> {id}", "", r"[^\w ./-]", "#%d;"),
    "dot": ('digraph {\n  node [shape=box, style="rounded,filled"];',
            '  {id} [label="{label}", fillcolor="{fill}"];', "  {need} -> {id};", "}",
            r'["\\]', "\\%c"),
}


def format_drawing(shown, kind):
    """Return --graph in the language of a program that draws it."""
    head, node, edge, end, strange, instead = _DRAWINGS[kind]
    ids = {tool["tool"]: f"t{number}" for number, tool in enumerate(shown["tools"])}
    lines = [head]
    for tool in shown["tools"]:
        label = re.sub(strange, lambda found: instead % ord(found[0]), tool["tool"])
        lines.append(node.format(id=ids[tool["tool"]], label=label,
                                 fill=_FILLS.get(tool["status"], "#ffffff")))
        lines += [edge.format(need=ids[need], id=ids[tool["tool"]]) for need in tool["needs"]]
    return "\n".join([*lines, end]).rstrip()


def make_why(tool, summary, needed_by, step, problem, facts, attempts, failure):
    """Return what --why shows, as data. `step` is that of the tool in a plan, or None, and then
    `problem` tells why there is none; `facts` tell of its cache and how long it is fresh.
    """
    columns = "run_id attempt status started_at duration_s rows reason error"
    plan = step and make_plan_view(Plan((step,), (), None))["steps"][0]
    return {"tool": tool.name, "module": describe_call(tool), "summary": summary, "plan": plan,
            "problem": problem, "needed_by": needed_by, **facts,
            "attempts": [make_row(row, columns) for row in attempts],
            "failure": failure and make_row(failure, columns + " traceback")}


def format_why(shown, style):
    """Return --why as text."""
    plan, failure = shown["plan"], shown["failure"]
    needs = plan and plan["needs"]
    facts = {"tool": shown["tool"], "is": shown["module"], "does": shown["summary"],
             "plan": shown["problem"] if plan is None
             else f"{plan['action']}, in wave {plan['wave']}: {plan['reason']}",
             "needs": format_some(needs or []) if needs != ALL_BEFORE
             else "all before it" * (plan["wave"] > 1),
             "needed by": format_some(shown["needed_by"]),
             "expected": format_duration(plan and plan["expected_s"]),
             "cache": shown["cache"], "fresh": shown["fresh"]}
    lines = format_table("name value", [{"name": name, "value": value}
                                        for name, value in facts.items() if value], has_head=False)
    if shown["attempts"]:
        lines += ["", *format_table(">run_id status started_at >duration_s >rows note", [
            {**row, "note": row["error"] or row["reason"]} for row in shown["attempts"]], style)]
    if failure:
        lines += ["", style.bold(f"It failed last in run {failure['run_id']}:"),
                  (failure["traceback"] or failure["error"] or failure["reason"]).rstrip()]
    return "\n".join(lines)


def format_needs(step, there):
    """Return what a step waits for, as a clause; nothing for one that waits for nothing.

    `there` are the tools of its plan.
    """
    if step["action"] != "run" or not step["needs"]:
        return ""
    if step["needs"] == ALL_BEFORE:
        return "; after all before it" if step["wave"] > 1 else ""
    clause = "needs " + format_some([need if need in there else f"{need} (not in this plan)"
                                     for need in step["needs"]])
    return "" if clause in step["reason"].split("; ") else "; " + clause


def format_event(event, width, style):
    """Return the line of an event of a tool; `width` is that of the longest name."""
    line = format_start(event, width)
    if event.outcome is None:
        level = "error: " if event.level >= 40 else "warning: " if event.level >= 30 else ""
        return line + level + (event.text or "running")
    word = "retry" if event.kind == "tool_retried" else event.outcome.status
    status = style.paint(word.ljust(11), event.outcome.status)
    return (line + status + "  " + format_details(event.outcome)).rstrip()


def format_start(event, width):
    """Return how the line of an event begins: local time and tool."""
    return time.strftime("%H:%M:%S  ", time.localtime(event.at)) + event.tool.ljust(width) + "  "


def format_details(outcome):
    """Return what there is to say of a tool beside its status, in one line."""
    rows = "" if outcome.rows is None else f"{outcome.rows:,} row{'s' * (outcome.rows != 1)}"
    took = format_duration(outcome.duration_s) if outcome.attempts else ""
    return ", ".join(filter(None, [rows, took, format_note(outcome)]))


def format_note(outcome):
    """Return why a tool ended as it did, in one line."""
    return join_reasons(outcome.error, outcome.reason, joint=", ")


def format_progress(event, since_s, at):
    """Return how far a tool has told to be, at a moment: count, rate and time left, or "" if it has
    told nothing. `since_s` is when the count began.
    """
    if event.kind != "progress":
        return ""
    took_s, so_far_s = event.at - since_s, at - since_s
    # No item has ended since; so it is not faster than if the next one did so now.
    rate = min(event.done / took_s, (event.done + 1) / so_far_s) if took_s > 0 else 0.0
    parts = [f"{event.done:,}" + (f" of {event.total:,}" if event.total else "")]
    if rate:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        left_s = (event.total or 0) / rate - so_far_s
        if left_s > 0:
            parts.append(format_duration(left_s) + " left")
    return ", ".join(parts)


def format_summary(result, next_command, style, unusual):
    """Return the closing table of a run: every tool, with what is unusual of it, then the verdict
    and what to type next.
    """
    lines = format_table("tool status >rows >duration_s note", [
        {**o._asdict(), "tool": tool, "duration_s": o.duration_s if o.attempts else None,
         "note": ", ".join(filter(None, [format_note(o), format_unusual(unusual.get(tool))]))}
        for tool, o in result.outcomes.items()], style)
    lines += ["", style.paint(result.status, result.status)
              + f": {len(result.succeeded) + len(result.cached)} of "
              + format_plural(len(result.outcomes), "tool")
              + f" done in {format_duration(result.duration_s)} (run {result.run_id})"]
    if next_command:
        lines.append("Next: " + style.bold(next_command))
    return "\n".join(["", *lines])


def format_unusual(words):
    """Return what find_unusual() said, as a warning in one line."""
    return f"warning: unusual, {'; '.join(words)}" if words else ""


def format_failure(facts, changed, commits, style):
    """Return, to be handed on, what is known of a tool that failed; `facts` tell its name, the run,
    the last run in which it succeeded, when that began, the error and the place.
    """
    head = "{tool} failed in run {run_id}, and succeeded last in run {good_id} ({good_at}):"
    rows = [("error", facts["error"]), ("at", facts["place"]), ("command", facts["command"]),
            ("changed", format_some(changed)
             or "none of the tables, the tools' own modules and the arguments"),
            *(("commit", each) for each in commits)]
    return "\n".join(["", style.bold(head.format(**facts)), *format_table("name value", [
        {"name": "  " + name, "value": value} for name, value in rows if value], has_head=False)])


def format_local(moment):
    """Return a moment of format_moment() as people's clocks say it: `2013-01-01 07:00:00`."""
    from datetime import datetime
    return f"{datetime.fromisoformat(moment.replace('Z', '+00:00')).astimezone():%Y-%m-%d %H:%M:%S}"


def make_status(tools, find_last, running, attempts, now, items, unusual):
    """Return what --status shows, as data: the run that goes on, if any, and each tool, with how
    many of its `items` have each status, and what is `unusual` of it.
    """
    def make_tool(tool):
        row = {"status": "pending", **(find_last(tool) or {}), "tool": tool,
               "items": items.get(tool), "unusual": unusual.get(tool, [])}
        if "started_at" in row:
            row["age_s"] = max(0.0, now - row["started_at"])  # clocks are set back
        if row["status"] == "running":
            row["duration_s"] = row["age_s"]
        row.update((name, row.get(name) or "") for name in ("reason", "error"))
        return make_row(row, "tool status run_id started_at rows age_s duration_s reason error "
                             "items unusual")

    return {"running": running and {**make_row(running, "run_id pid started_at"),
                                    "tools": [each["tool"] for each in attempts]},
            "tools": [make_tool(tool) for tool in tools]}


def format_status(shown, style):
    """Return --status as text."""
    lines = format_table(
        "tool status >run_id >age_s >duration_s >rows ?items note",
        [{**tool, "items": format_counts(tool["items"]),
          "note": join_reasons(tool["error"], tool["reason"], format_unusual(tool["unusual"]),
                               joint=", ")}
         for tool in shown["tools"]], style)
    run = shown["running"]
    what = "Nothing runs now." if run is None else (
        f"Run {run['run_id']} goes on, process {run['pid']}, since "
        f"{format_local(run['started_at'])}: "
        f"{format_some(run['tools']) or 'between two tools'}")
    return "\n".join([*lines, "", what])


def count_statuses(listed, counts):
    """Return how many items have each status, from the ledger and from what was listed last:
    `counts` tells how many rows of each status there are, and how many are newer than that, which
    matters while the tool runs, and after a kill.
    """
    shown = {status: counts.get(status, (0, 0))[0] for status in ITEM_STATUSES}
    if not listed:  # items() has not said it
        return shown
    ended = sum(new for status, (_, new) in counts.items() if status != "pending") \
        if "passed" not in listed else sum(
            listed.get(key, 0) for key in ("passed", "failed", "elsewhere"))
    shown["pending"] = max(0, listed.get("pending", 0) - ended)
    return shown


def format_counts(items):
    """Return how many items have each status, in words."""
    if items is None:
        return ""
    return ", ".join(f"{count:,} {'done' if status == 'success' else status}"
                     for status, count in items.items() if count or status == "success")


def make_item_view(row):
    """Return a row of the ledger as --items shows it, as data."""
    row = {**row, "run_id": row["run_id"].partition(".")[0], "rows": row["row_count"]}
    return make_row(row, "item version status attempts deaths duration_s error run_id ended_at "
                         "rows")


def format_items(items, style):
    """Return some of --items as text."""
    return "\n".join(format_table(
        "item ?version status >tries run_id ended_at >rows note",
        [{**row, **{key: format_names([row[key]], 1) for key in ("item", "version")},
          "tries": row["attempts"] + row["deaths"], "note": row["error"]}
         for row in items], style))


def make_backfill_view(periods):
    """Return what --plan shows of a backfill, as data."""
    return {"periods": [make_row({**period.arguments(), **period._asdict()},
                                 "period_start period_end action reason run_id")
                        for period in periods]}


def format_backfill(shown, style):
    """Return --plan of a backfill as text."""
    periods = shown["periods"]
    lines = format_table("period_start period_end action reason", periods, style)
    left = sum(period["action"] != "skip" for period in periods)
    return "\n".join([*lines, "", f"{left} of {format_plural(len(periods), 'period')} to run"])


def format_backfill_end(count, ends, failed, today):
    """Return the closing line of a backfill. `ends` are words on how each of its `count` periods
    ended that was not left alone; `failed` are the starts of those that failed, now or before.
    """
    words = [*ends.values()]
    alone = count - len(words) - (len(failed) - words.count("failed"))
    text = (f"\nBackfill: {format_plural(words.count('done now'), 'period')} done now, "
            f"{alone} left alone, {len(failed)} failed"
            + ": " * bool(failed) + format_some(failed))
    text += "".join(f", {period.start} cut off" for period in ends if ends[period] == "cut off")
    if "not begun" in words:
        text += f", {words.count('not begun')} not begun"
    return text + "".join(
        f"; the period from {period.start} is not over yet, and will be run again when it is"
        for period in ends if ends[period] == "done now" and today < period.end)


def make_run_view(run, attempts, is_detailed=False):
    """Return a run as --history shows it, as data: each tool once, as its last attempt ended."""
    of_tools = "tool status reason attempts started_at duration_s rows error "
    of_run = "run_id status targets arguments started_at ended_at duration_s planned "
    if is_detailed:
        of_tools += "traceback log pid result items arguments"
        of_run += "exclude start_from resumes pid version git_commit"
    tools = {}
    for row in attempts:
        tools.pop(row["tool"], None)
        tools[row["tool"]] = make_row({**row, "attempts": row["attempt"],
                                       "arguments": row["given"] or {}}, of_tools)
    ended_at = None if run["duration_s"] is None else run["started_at"] + run["duration_s"]
    return {**make_row({**run, "ended_at": ended_at}, of_run), "tools": list(tools.values())}


def format_runs(shown, style):
    """Return --history as text: a line for each run, the newest first."""
    rows = []
    for run in shown["runs"]:
        done = sum(tool["status"] in DONE for tool in run["tools"])
        start, end = map(run["arguments"].get, PERIOD_ARGUMENTS)
        period = [f"({start} to {end})"] if start and end else []
        rows.append({**run, "tools": f"{done} of {run['planned']}",
                     "targets": [*run["targets"], *period]})
    return "\n".join(format_table(
        ">run_id status started_at >duration_s >tools targets", rows, style))


def format_run(shown, style):
    """Return --history RUN as text: all that is known of one run."""
    import json
    to_text = functools.partial(json.dumps, ensure_ascii=False)
    run, = shown["runs"]
    resumed = f", which resumed run {run['resumes']}" if run["resumes"] else ""
    commit = f", commit {run['git_commit'][:12]}" if run["git_commit"] else ""
    facts = {**run, "run": run["run_id"] + resumed, "without": run["exclude"],
             "from": run["start_from"], "version": f"{run['version']}{commit}",
             "arguments": to_text(run["arguments"])}
    names = "run status targets without from arguments started_at duration_s version".split()
    cells = [{"name": format_head(name), "value": format_cell(name, facts[name])}
             for name in names]
    lines = format_table("name value", [cell for cell in cells if cell["value"]], has_head=False)
    columns = "tool status >attempts started >duration_s >rows ?arguments note"
    lines += ["", *format_table(columns, [
        {**tool, "attempts": tool["attempts"] or None,
         "arguments": to_text(tool["arguments"]) * bool(tool["arguments"]),
         "started": format_local(tool["started_at"])[11:], "note": tool["error"] or tool["reason"]}
        for tool in run["tools"]], style)]
    for tool in run["tools"]:
        if tool["traceback"]:
            lines += ["", style.bold(tool["tool"]), tool["traceback"].rstrip()]
        if tool["log"]:
            lines += [f"log of {tool['tool']}: {tool['log']}"]
    return "\n".join(lines)


# === 12 REPORT ==================================================================================
# A run of the past as a page of HTML, as a story in Markdown, and as data, made of rows that were
# read from the history. All text from outside goes through fill(), or through quote(), so that it
# can be no markup. No input or output, and no other room but DOOR, for --report, knows of it.

_BROKEN = ("failed", "partial", "interrupted")
_GRAPH_TOOLS = 80  # a graph of more tools is not read
_TIMELINE_TOOLS = 100  # with more, the timeline has a line for each process, not for each tool
_SLACK_S = 0.05  # by which the end of a try, by one clock, may be after the next one's start
_SHOWN_FAILURES = 20  # tools that failed which are told with traceback and log


def make_report(name, run, attempts, edges, formers, tails):
    """Return all that is told of a run, as data.

    `edges` are those of its plan, None where they are not known; `formers` gives the former
    successes of each tool, `tails` the last lines of the logs of those that failed.
    """
    of_tool = {tool: [] for tool in edges or ()}
    for row in attempts:
        of_tool.setdefault(row["tool"], []).append(row)
    tools = [make_tool_report(tool, rows, run["started_at"], formers.get(tool, []))
             for tool, rows in of_tool.items()]
    for tool in tools:
        tool["needs"] = edges and edges.get(tool["tool"], [])
        tool["log"] = tails.get(tool["tool"], [])
    shown, known = make_run_view(run, [], is_detailed=True), {each["tool"]: each for each in tools}
    tried = [tool for tool in tools if tool["tries"]]
    path = find_path(known) if edges else []
    alone_s = sum(each["duration_s"] or 0.0 for tool in tools for each in tool["tries"])
    return {
        "pipeline": name, **shown, "tools": tools, "critical_path": path,
        "path_s": sum(known[each]["tries"][-1]["end_s"] - known[each]["tries"][0]["start_s"]
                      for each in path),
        "alone_s": alone_s, "saved_s": max(0.0, alone_s - (run["duration_s"] or alone_s)),
        "rows": sum(tool["rows"] or 0 for tool in tried),
        "done": sum(tool["status"] in DONE for tool in tools),
        "broken": [tool["tool"] for tool in sorted(tried, key=lambda tool: (
            tool["status"] != "failed", tool["tries"][-1]["end_s"]))
            if tool["status"] in _BROKEN]}


def make_tool_report(tool, rows, began_at, former):
    """Return how a tool fared in a run that began at that moment, as data; `rows` are its attempts.

    What is of a moment in the run is in seconds from its beginning.
    """
    last, tries = rows[-1] if rows else {"status": "pending"}, []
    for row in rows:
        start_s = max(0.0, row["started_at"] - began_at)  # marked by hand; or a clock was set
        if row["attempt"]:
            tries.append({**make_row(row, "attempt status pid duration_s error"),
                          "start_s": start_s, "end_s": start_s + (row["duration_s"] or 0.0)})
    shown = make_row(last, "tool status reason error traceback started_at duration_s rows items "
                           "failures")
    return {**shown, "tool": tool, "tries": tries,
            "unusual": find_unusual(last, former) if tries and last["status"] == "success" else [],
            "expected_s": find_middle([each["duration_s"] for each in former
                                       if each["duration_s"] is not None]),
            "former": [make_row(each, "run_id duration_s rows") for each in reversed(former)]}


def find_path(tools):
    """Return the critical path as it was: back from the tool that ended last, each time the one
    that ended last of those that it waited for.
    """
    def find_last(names):
        return max((name for name in names if tools[name]["tries"]), default=None,
                   key=lambda name: tools[name]["tries"][-1]["end_s"])

    path, name = [], find_last(tools)
    while name:
        path.append(name)
        name = find_last(tools[name]["needs"])
    return path[::-1]


def tell_outcome(shown, mark=str):
    """Return in words how a run ended, and more of it in a sentence; `mark` is done to names."""
    words = {"success": "succeeded", "failed": "failed", "running": "goes on",
             "interrupted": "was interrupted"}.get(shown["status"]) or mark(shown["status"])
    words += "".join(f" at {mark(name)}" for name in shown["broken"][:1])
    more = f"{shown['done']:,} of {shown['planned']:,} tools done"
    if shown["duration_s"] is not None:
        more += f" in {format_duration(shown['duration_s'])}"
    for status in (*_BROKEN, "skipped"):
        there = sum(tool["status"] == status for tool in shown["tools"])
        more += f", {there:,} {status}" * bool(there)
    unusual = format_some([mark(tool["tool"]) for tool in shown["tools"] if tool["unusual"]])
    return words, f"{more}." + f" Unusual: {unusual}." * bool(unusual)


def tell_path(shown, mark=str):
    """Return in sentences what the time of a run was spent on, and what running side by side has
    saved; nothing where that is not known. `mark` is done to names.
    """
    path, whole_s = shown["critical_path"], shown["duration_s"]
    if not path or whole_s is None:
        return []
    text = [f"Each waited for the one before it: {format_some(list(map(mark, path)), ' -> ')}.",
            f"They took {format_duration(shown['path_s'])} of the {format_duration(whole_s)}."]
    if shown["saved_s"] > 0.01 * whole_s:
        text.append(f"All tools took {format_duration(shown['alone_s'])} together: running side by "
                    f"side saved {format_duration(shown['saved_s'])}.")
    return text


def tell_facts(shown):
    """Return what was asked for in a run, and what ran, by name, as text."""
    import json
    facts = {"targets": format_some(shown["targets"]) or "the default",
             "without": format_some(shown["exclude"]), "from": shown["start_from"],
             "resumes run": shown["resumes"],
             "arguments": json.dumps(shown["arguments"], ensure_ascii=False),
             "orchestrator.py": shown["version"], "git commit": shown["git_commit"]}
    return {name: value for name, value in facts.items() if value not in (None, "", "{}")}


def tell_note(tool):
    """Return why a tool ended as it did, in one line."""
    return join_reasons(tool["error"], tool["reason"], joint=", ")


def tell_more_failures(tool):
    """Return how many items of a tool failed beside those that are named; "" if none did."""
    more = (tool["items"] or {}).get("failed", 0) - len(tool["failures"] or ())
    return f"and {more:,} more" if more > 0 else ""


# --- HTML ---

class Html(str):
    """Text that is markup, and is not to be escaped."""


def fill(template, **values):
    """Return markup: a template with values in it, which are escaped but for markup and numbers; of
    a list, all that is in it; of None, nothing.
    """
    def put(value):
        if isinstance(value, list):
            return "".join(map(put, value))
        if isinstance(value, (Html, int, float)):
            return value
        return re.sub("[&<>\"']", lambda found: f"&#{ord(found[0])};", clean(str(value or "")))

    return Html(template.format(**{name: put(value) for name, value in values.items()}))


def make_facts(facts):
    """Return values under their names; what is empty is left out."""
    return [fill(_FACT, name=name, value=value) for name, value in facts.items() if value]


def make_section(title, note, *parts):
    """Return a section of the page; nothing if nothing is in it."""
    return fill(_SECTION, title=title, note=note, body=list(parts)) if any(parts) else ""


def make_table(label, columns, rows):
    """Return rows, mappings by column, as a table; of the columns as in format_table()."""
    names = [(name.lstrip(">"), "number" if name[0] == ">" else "text")
             for name in columns.split()]
    return fill(
        _TABLE, label=label,
        head=[fill(_TH, name=format_head(name).replace("_", " "), kind=kind)
              for name, kind in names],
        rows=[fill(_ROW, cells=[fill(_CELL, kind=kind, value=format_cell(name, row[name]))
                                for name, kind in names]) for row in rows])


def make_mark(status):
    """Return a status with its colour."""
    return fill(_MARK, status=status)


def format_page(shown):
    """Return a run as a page of HTML."""
    words, more = tell_outcome(shown)
    tools = {tool["tool"]: tool for tool in shown["tools"]}
    broken = [make_failure(tools[name]) for name in shown["broken"][:_SHOWN_FAILURES]]
    others = format_some(shown["broken"][_SHOWN_FAILURES:])
    return fill(
        _WHOLE, style=Html(_STYLE), words=words, more=more,
        local=format_local(shown["started_at"]),
        figures=make_facts({
            "duration": format_duration(shown["duration_s"]),
            "tools done": f"{shown['done']:,} of {shown['planned']:,}",
            "rows": f"{shown['rows']:,}",
            "saved by running side by side": format_duration(shown["saved_s"] or None)}),
        facts=make_facts(tell_facts(shown)),
        sections=[
            make_section("What went wrong first", "", *broken[:1]),
            make_section("What else went wrong", others and f"Also in {others}.", *broken[1:]),
            make_graph_section(shown, tools), make_timeline_section(shown),
            make_section("Tools", "The lines are durations and rows of up to 20 successes before, "
                         "and at their end of this run.", make_tools_table(shown)),
            make_items_section(shown),
            make_section("Critical path", "", *(fill(_TEXT, text=text)
                                                for text in tell_path(shown)))],
        **{name: shown[name] for name in ("pipeline", "run_id", "status", "started_at")})


def make_failure(tool):
    """Return what is known of a tool that did not succeed."""
    pieces = [("Traceback", tool["traceback"]), ("Last lines of its log", "\n".join(tool["log"]))]
    return fill(
        _FAILURE, tool=tool["tool"], status=make_mark(tool["status"]), reason=tool["reason"],
        error=tool["error"], more=[
            make_fold(title, " open", fill(_PRE, text=text)) for title, text in pieces if text])


def make_fold(title, is_open, *parts):
    """Return what a reader may fold away, or unfold."""
    return fill(_FOLD, title=title, is_open=is_open, body=list(parts))


def make_tools_table(shown):
    """Return the table of tools."""
    def make_figure(tool, name, format_figure):
        value, former = tool[name], [each[name] for each in tool["former"]]
        values = [each for each in (*former, value) if each is not None]
        has_line = value is not None and len(values) > 2
        return fill(_TREND, value="" if value is None else format_figure(value),
                    line=draw_line(values, format_figure) if has_line else "")

    return make_table("Tools", "tool status >duration >usually_s >rows >attempts note", [
        {"tool": tool["tool"], "status": make_mark(tool["status"]),
         "duration": make_figure(tool, "duration_s", format_duration),
         "usually_s": tool["expected_s"], "rows": make_figure(tool, "rows", "{:,}".format),
         "attempts": len(tool["tries"]) or None, "note": fill(
             _NOTE, note=tell_note(tool), warning=format_unusual(tool["unusual"]))}
        for tool in shown["tools"]])


def draw_line(values, format_figure):
    """Return values as a small line, the last of them as a dot."""
    most, last = max(values) or 1, len(values) - 1
    points = [f"{2 + 76 * i / last:.1f},{17 - 14 * value / most:.1f}"
              for i, value in enumerate(values)]
    x, y = points[-1].split(",")
    return fill(_SPARK, points=" ".join(points), x=x, y=y,
                label="Before and now: " + ", ".join(map(format_figure, values)))


def make_items_section(shown):
    """Return the counts of items, and the first that failed."""
    counts = "listed passed failed elsewhere given_up"
    rows = [{**dict.fromkeys(counts.split()), **tool["items"], "tool": tool["tool"]}
            for tool in shown["tools"] if tool["items"]]
    table = make_table("Items", "tool >" + counts.replace(" ", " >"), rows) if rows else ""
    return make_section("Items", "", table, *(
        make_fold(f"Items of {tool['tool']} that failed", " open", make_table(
            "Items that failed", "item error", [
                {"item": item, "error": error} for item, error in tool["failures"].items()]),
            fill(_TEXT, text=tell_more_failures(tool)))
        for tool in shown["tools"] if tool["failures"]))


# --- the graph ---

def make_graph_section(shown, tools):
    """Return the section with the graph; of very many tools, what of it is worth a look."""
    if None in (tool["needs"] for tool in shown["tools"]):
        return make_section("Graph", "", fill(
            _TEXT, text="The graph of this run is not recorded: an older engine made it."))
    names, note = list(tools), "The strong line is the critical path."
    if len(names) > _GRAPH_TOOLS:
        names = choose_tools(shown, tools)
        note = f"{len(names)} of {len(tools):,} tools: " + (
            "those that did not succeed, and their neighbours. " if shown["broken"] else
            "the critical path. ") + note
    needs = {name: [each for each in tools[name]["needs"] if each in names] for name in names}
    table = make_table("Graph", "tool status needs", [
        {"tool": name, "status": make_mark(tools[name]["status"]), "needs": tools[name]["needs"]}
        for name in names])
    return make_section("Graph", note, draw_graph(tools, needs, shown["critical_path"]),
                        make_fold("The graph as a table", "", table)) if names else ""


def choose_tools(shown, tools):
    """Return the tools of a large graph that are worth a look, in their order."""
    core, near = {*(shown["broken"] or shown["critical_path"])}, set()
    if shown["broken"]:
        near.update(*(tools[name]["needs"] for name in core))
        near.update(name for name in tools if not core.isdisjoint(tools[name]["needs"]))
    chosen = {*sorted(core | near, key=lambda name: name not in core)[:_GRAPH_TOOLS]}
    return [name for name in tools if name in chosen]


def lay_out(needs):
    """Return the layer of each tool, and of each bend of a line that passes a layer, which is named
    by where the line begins and the layer; by node, those that lines come from; and its place in
    its layer, whose middle is 0. What a tool waits for by way of another has no line of its own.
    """
    order, layers, lines, rows, places = Order(needs), {}, {}, {}, {}
    for tool, needed in needs.items():
        near = order.find_last(needed)
        layers[tool], lines[tool] = max((layers[need] + 1 for need in near), default=0), []
        for need in near:
            last = need
            for layer in range(layers[need] + 1, layers[tool]):
                bend = need, layer
                lines.setdefault(bend, [last])
                layers[bend], last = layer, bend
            lines[tool].append(last)
    for node, layer in layers.items():
        rows.setdefault(layer, []).append(node)
    for layer in sorted(rows):
        row = sorted(rows[layer], key=lambda node: sum(
            places[each] for each in lines[node]) / (len(lines[node]) or 1))
        sizes = [1.0 if node in needs else 0.4 for node in row]
        at = -sum(sizes) / 2
        for node, size in zip(row, sizes):
            places[node] = at + size / 2
            at += size
    return layers, lines, places


def draw_graph(tools, needs, path):
    """Return a graph as SVG, its layers from left to right, or from top to bottom if they are many.
    """
    layers, lines, places = lay_out(needs)
    depth, low = max(layers.values()) + 1, min(map(places.get, needs)) - 0.5
    breadth = max(map(places.get, needs)) + 0.5 - low
    is_tall = depth > 5 and depth > breadth
    along, across, size = (66, 172, 44) if is_tall else (212, 54, 150)
    strong = set()
    for one, other in zip(path, path[1:]):
        if one in layers and other in layers:
            nodes = [one, *((one, i) for i in range(layers[one] + 1, layers[other])), other]
            strong.update(zip(nodes, nodes[1:]))

    def point(a, b):
        return f"{b:.0f} {a:.0f}" if is_tall else f"{a:.0f} {b:.0f}"

    def locate(node, side):  # -1: where lines come in, 1: where they go out
        return (layers[node] * along + size * (1 + side) / 2 + 1, (places[node] - low) * across)

    edges, nodes = [], []
    for node, sources in lines.items():
        for source in sources:
            (a, b), (c, d) = locate(source, 1), locate(node, -1)
            middle = (a + c) / 2
            edges.append(fill(
                _EDGE, kind="strong edge" if (source, node) in strong else "edge",
                path=f"M{point(a, b)}C{point(middle, b)} {point(middle, d)} {point(c, d)}"
                     f"L{point(*locate(node, 1))}"))
    for name in needs:
        tool = tools[name]
        took = format_duration(tool["duration_s"]) if tool["tries"] else ""
        nodes.append(fill(_NODE, at=point(*locate(name, 0)), status=tool["status"], tool=name,
                          details=", ".join(filter(None, [tool["status"], took])),
                          note=tell_note(tool)))
    box = point((depth - 1) * along + size + 2, breadth * across)
    width = float(box.split()[0])
    return fill(_GRAPH, box=box, width=width, least=0.75 * width, edges=edges, nodes=nodes)


# --- the timeline ---

def make_timeline_section(shown):
    """Return the section with the timeline: what each process did when."""
    tries = sorted(({**each, "tool": tool["tool"]} for tool in shown["tools"]
                    for each in tool["tries"]), key=lambda each: each["start_s"])
    if not tries:
        return ""
    table = make_table("Timeline", "tool >attempt process >start_s >duration_s status", [
        {**each, "process": str(each["pid"]), "status": make_mark(each["status"])}
        for each in tries])
    return make_section("Timeline", "What each process did, from the beginning of the run. A thin "
                        "line is waiting for another attempt.", draw_timeline(shown, tries),
                        make_fold("The timeline as a table", "", table))


def make_lanes(tries):
    """Return the lanes of a timeline, as lists of tries, by process and name: a lane for each tool
    in a process; or if there are very many, as few as keep its tries apart.
    """
    lanes = {each["pid"]: {} for each in tries}
    by_tool = len({each["tool"] for each in tries}) <= _TIMELINE_TOOLS
    for each in tries:
        own = lanes[each["pid"]]
        name = each["tool"] if by_tool else next(
            (name for name, lane in own.items() if lane[-1]["end_s"] < each["start_s"] + _SLACK_S),
            " " * len(own))
        own.setdefault(name, []).append(each)
    return lanes


def draw_timeline(shown, tries):
    """Return tries as a Gantt chart. What lies along the time is in percent of the width, so that
    a narrow window squeezes bars and no letters.
    """
    whole_s = max([shown["duration_s"] or 0.0, 0.001, *(each["end_s"] for each in tries)])
    step_s = next((step for step in map(float, _STEPS_S.split()) if whole_s < 5.5 * step), whole_s)
    ends = {(each["tool"], each["attempt"]): each["end_s"] for each in tries}
    y, parts = 0, []

    def draw_bar(kind, start_s, end_s, label):
        return fill(_BAR, kind=kind, x=100 * start_s / whole_s, label=label,
                    width=max(0.3, 100 * (end_s - start_s) / whole_s))

    for pid, lanes in make_lanes(tries).items():
        parts.append(fill(_PROCESS, y=y + 16, name=f"process {pid}"))
        y += 22
        for name, lane in lanes.items():
            bars = []
            for each in lane:
                what = f"{each['tool']}, attempt {each['attempt']}"
                end_s = ends.get((each["tool"], each["attempt"] - 1), each["start_s"])
                if end_s < each["start_s"]:
                    bars.append(draw_bar("wait", end_s, each["start_s"], "waiting for " + what))
                bars.append(draw_bar(
                    each["status"], each["start_s"], each["end_s"],
                    f"{what}: {each['status']}, {format_duration(each['duration_s'])}"))
            parts.append(fill(_LANE, y=y, name=name, bars=bars))
            y += 20
    ticks = [fill(_TICK, x=100 * i * step_s / whole_s, y=y, label=format_duration(i * step_s))
             for i in range(int(whole_s / step_s) + 1)]
    return fill(_TIMELINE, height=y + 20, ticks=ticks, lanes=parts)


_STEPS_S = ("0.01 0.02 0.05 0.1 0.2 0.5 1 2 5 10 20 30 60 120 300 600 1200 1800 "
            "3600 7200 14400 28800 86400 172800 604800 2592000")


# --- Markdown ---

def quote(text):
    """Return outside text in one line of Markdown, as code, in which nothing is markup.

    >>> print(quote("a *b*"), quote("`c`"))
    `a *b*` `` `c` ``
    """
    text = " ".join(clean(str(text)).split()) or "-"
    if "`" not in text:
        return f"`{text}`"
    fence = make_fence(text, 1)
    return f"{fence} {text} {fence}"


def quote_lines(text):
    """Return outside text for Markdown as lines of code."""
    text = clean(text).strip("\n")
    fence = make_fence(text, 3)
    return ["", fence, *text.split("\n"), fence]


def make_fence(text, least):
    """Return more backticks than there are side by side in a text."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+|$", text)))


def format_story(shown):
    """Return a run as a story in Markdown."""
    words, more = tell_outcome(shown, quote)
    tools = {tool["tool"]: tool for tool in shown["tools"]}
    lines = [f"# Run {quote(shown['run_id'])} of {quote(shown['pipeline'])} {words}", "", more, ""]
    facts = {"status": shown["status"],
             "started": f"{format_local(shown['started_at'])} ({shown['started_at']})",
             "total duration": format_duration(shown["duration_s"]) or "not known",
             "total rows": f"{shown['rows']:,}", **tell_facts(shown)}
    lines += [f"- {name}: {quote(value)}" for name, value in facts.items()]
    for i, name in enumerate(shown["broken"][:_SHOWN_FAILURES]):
        head = ["", "## What else went wrong" if i else "## What went wrong first"] * (i < 2)
        lines += [*head, "", f"### {quote(name)}", "", quote(tell_note(tools[name]))]
        log = "\n".join(tools[name]["log"])
        for title, text in (("Traceback:", tools[name]["traceback"]), ("Log, its end:", log)):
            lines += ["", title, *quote_lines(text)] if text else []
    tries = [(each["start_s"], tool["tool"], each) for tool in tools.values()
             for each in tool["tries"]]
    lines += ["", "## Execution timeline", ""]
    lines += [f"- +{format_duration(start_s)} {quote(name)}, attempt {each['attempt']}: "
              f"{quote(each['status'])}, {format_duration(each['duration_s'])}"
              for start_s, name, each in sorted(tries, key=lambda each: each[0])]
    lines += ["", "## Step details", ""]
    for name, tool in tools.items():
        details = [quote(tool["status"]), format_duration(tool["duration_s"]),
                   f"usually {format_duration(tool['expected_s'])}" * bool(tool["expected_s"]),
                   "" if tool["rows"] is None else f"{tool['rows']:,} rows",
                   format_plural(len(tool["tries"]), "attempt"),
                   tell_note(tool) and quote(tell_note(tool)), format_unusual(tool["unusual"])]
        lines.append(f"- {quote(name)}: {', '.join(filter(None, details))}")
        lines += [f"    - item {quote(item)}: {quote(error)}"
                  for item, error in (tool["failures"] or {}).items()]
        lines += [f"    - {tell_more_failures(tool)}"] * bool(tell_more_failures(tool))
    return "\n".join([*lines, "", "## Critical path", "",
                      *(f"- {text}" for text in tell_path(shown, quote)), ""])


# --- the templates: {name} is a value, which fill() escapes ---

_WHOLE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{pipeline}: run {run_id} {words}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">{pipeline}, {local} <span class="utc">({started_at})</span></p>
<h1>Run {run_id} <em class="{status}">{words}</em>.</h1>
<p class="answer">{more}</p>
<dl class="figures">{figures}</dl>
<dl class="facts">{facts}</dl>
</header>
{sections}
<footer><p>Written by orchestrator.py from the history of the pipeline.</p></footer>
</main>
</body>
</html>
"""
_SECTION = "<section>\n<h2>{title}</h2>\n<p class=\"note\">{note}</p>\n{body}\n</section>\n"
_TEXT = "<p>{text}</p>"
_PRE = "<pre tabindex=\"0\">{text}</pre>"
_FOLD = "<details{is_open}><summary>{title}</summary>{body}</details>"
_FACT = "<div><dt>{name}</dt><dd>{value}</dd></div>"
_FAILURE = """
<article>
<h3>{tool} {status}</h3>
<p class="error">{error}</p>
<p class="note">{reason}</p>
{more}
</article>
"""
_TABLE = """
<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}</tbody>
</table></div>
"""
_TH = "<th scope=\"col\" class=\"{kind}\">{name}</th>"
_ROW = "<tr>{cells}</tr>\n"
_CELL = "<td class=\"{kind}\">{value}</td>"
_MARK = "<span class=\"mark {status}\">{status}</span>"
_NOTE = "{note} <span class=\"warning\">{warning}</span>"
_TREND = "{line} <span class=\"value\">{value}</span>"
_SPARK = """<svg class="spark" role="img" width="80" height="19"><title>{label}</title>\
<polyline points="{points}"/><circle cx="{x}" cy="{y}" r="2"/></svg>"""
_GRAPH = """
<div class="scroll" tabindex="0" role="region" aria-label="Graph"><svg class="graph" role="img"
 aria-label="Graph of the tools and what they wait for" viewBox="0 0 {box}"
 style="min-width: {least:.0f}px; max-width: {width:.0f}px">
{edges}{nodes}</svg></div>
"""
_EDGE = "<path class=\"{kind}\" d=\"{path}\"/>\n"
_NODE = """<g transform="translate({at})"><svg class="node {status}" x="-75" y="-22" width="150" \
height="44"><title>{tool}: {details}. {note}</title>\
<rect x="1" y="1" width="148" height="42" rx="5"/><rect class="flag" x="1" y="1" width="6" \
height="42"/><text x="15" y="19">{tool}</text><text class="small" x="15" y="35">{details}</text>\
</svg></g>
"""
_TIMELINE = """
<svg class="timeline" role="img" aria-label="Timeline of the run" width="100%" height="{height}">
<svg x="28%" width="69%" overflow="visible">{ticks}</svg>
{lanes}</svg>
"""
_TICK = """<line x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{y}"/>\
<text class="small" x="{x:.2f}%" y="{y}" dy="14" text-anchor="middle">{label}</text>"""
_PROCESS = "<text class=\"small\" x=\"0\" y=\"{y}\">{name}</text>\n"
_LANE = """<svg y="{y}" width="27%" height="20"><title>{name}</title>\
<text x="0" y="14">{name}</text></svg><svg x="28%" y="{y}" width="69%" height="20">{bars}</svg>
"""
_BAR = """<rect class="bar {kind}" x="{x:.2f}%" y="3" width="{width:.2f}%" height="13" rx="2">\
<title>{label}</title></rect>"""
_STYLE = """
:root {
  --paper: #fcfbf8; --ink: #1e2124; --faint: #6b6f73; --rule: #e3e0d8; --track: #f0ede6;
  --good: #14756b; --cached: #a9c5c0; --bad: #b4431f; --warn: #e2a15c; --none: #c9c6be;
  --soft: #f6dfc2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e9e6df; --faint: #969a9d; --rule: #2c3135; --track: #22272b;
    --good: #4fc0b1; --cached: #3f6762; --bad: #ee6b3f; --warn: #c98a4b; --none: #4b5156;
    --soft: #5e4026;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: clamp(28px, 6vw, 72px) clamp(20px, 4vw, 40px); }
h1, h2, .figures dd {
  font-family: Georgia, "Iowan Old Style", "Times New Roman", serif; font-weight: 400;
}
h1 {
  font-size: clamp(2rem, 6vw, 3.6rem); line-height: 1.08; letter-spacing: -.02em; margin: 0;
  text-wrap: balance; overflow-wrap: anywhere;
}
h1 em { font-style: normal; }
h2 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; }
h3 { font-size: 1.05rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.eyebrow { margin: 0 0 1rem; color: var(--faint); overflow-wrap: anywhere; }
.utc { white-space: nowrap; }
.answer { font-size: 1.15rem; max-width: 36em; margin: 1.4rem 0 0; }
.note { margin: 0 0 1.1rem; color: var(--faint); font-size: .92rem; max-width: 46em; }
.note:empty, p:empty { display: none; }
section { margin-top: 3.2rem; }
.figures {
  display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; margin: 2.2rem 0 0; padding: 1.3rem 0;
  border: solid var(--rule); border-width: 1px 0;
}
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dt { color: var(--faint); font-size: .88rem; line-height: 1.35; }
dd { margin: 0; overflow-wrap: anywhere; }
.figures dd { font-size: 1.9rem; line-height: 1.2; font-variant-numeric: lining-nums; }
.facts {
  display: flex; flex-wrap: wrap; gap: .2rem 1.8rem; margin: 1.1rem 0 0; font-size: .88rem;
}
.facts div { display: flex; gap: .5rem; }
article { margin: 1.2rem 0 2rem; padding-left: 1.1rem; border-left: 3px solid var(--bad); }
.error { margin: 0 0 .4rem; font-size: 1.05rem; overflow-wrap: anywhere; }
details { margin: .7rem 0 0; }
summary { cursor: pointer; color: var(--faint); font-size: .92rem; width: fit-content; }
pre {
  margin: .4rem 0 0; padding: .8rem 1rem; background: var(--track); border-radius: 4px;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-x: auto;
  max-height: 30rem;
}
.scroll { overflow-x: auto; }
:focus-visible { outline: 2px solid var(--good); outline-offset: 3px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 400; color: var(--faint); font-size: .85rem; }
th, td { padding: .4rem .9rem .4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th.number, td.number {
  text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
}
td.text { min-width: 6.5em; max-width: 26em; overflow-wrap: anywhere; }
td:first-child { min-width: 9em; } td.text:last-child { min-width: 13em; }
.mark { white-space: nowrap; }
.mark::before {
  content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .45em;
  border-radius: 2px; background: var(--colour);
}
h3 .mark { font-weight: 400; font-size: .92rem; color: var(--faint); margin-left: .5em; }
.mark, .node, .bar { --colour: var(--none); }
.success { --colour: var(--good) !important; } .cached { --colour: var(--cached) !important; }
.failed { --colour: var(--bad) !important; }
.partial, .interrupted, .running { --colour: var(--warn) !important; }
h1 .success { color: var(--good); } h1 .failed, h1 .interrupted { color: var(--bad); }
.warning {
  padding: .1em .35em; border-radius: 3px; background: var(--soft);
  -webkit-box-decoration-break: clone; box-decoration-break: clone;
}
.warning:empty { display: none; }
svg { fill: var(--ink); font-size: 13px; font-variant-numeric: tabular-nums; }
.small { font-size: 11px; fill: var(--faint); }
.spark { vertical-align: -5px; fill: none; overflow: visible; }
.spark polyline { stroke: var(--cached); stroke-width: 1.5; } .spark circle { fill: var(--good); }
.value { display: inline-block; min-width: 4.6em; }
.graph { display: block; width: 100%; height: auto; }
.node rect { fill: var(--paper); stroke: var(--colour); stroke-width: 1.2; }
.node .flag { fill: var(--colour); stroke: none; }
.node.failed rect:first-of-type { stroke-width: 2; }
.edge { fill: none; stroke: var(--none); stroke-width: 1.3; }
.edge.strong { stroke: var(--ink); stroke-width: 1.8; }
.timeline { display: block; }
.timeline line { stroke: var(--rule); }
.bar { fill: var(--colour); }
.bar.wait { fill: var(--none); height: 3px; transform: translateY(5px); }
footer {
  margin-top: 3.5rem; padding-top: 1.2rem; border-top: 1px solid var(--rule); color: var(--faint);
  font-size: .88rem;
}
@media (max-width: 600px) {
  .timeline, .timeline svg { font-size: 11px; } .timeline .small { font-size: 10px; }
}
@media print {
  .graph { min-width: 0 !important; }
  body { font-size: 11px; } main { padding: 0; max-width: none; } section { margin-top: 1.6rem; }
  :root { --paper: #ffffff; }
  article, tr, .graph { break-inside: avoid; } h2, .note { break-after: avoid; }
  pre { max-height: none; white-space: pre-wrap; } .scroll { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


# === 13 SCRIPTS =================================================================================
# What somebody begins with: a new project, or a TOOL_MAP of the commands that a runner of theirs
# starts, be it a shell script, a Makefile or a Python program. That is read and never run; what
# can not be told by reading it is named in a comment and not guessed. A leaf: who deletes this
# room deletes command_init and its flag with it.

_STARTER = {  # a new project, by file; the engine comes below the last
    "load.py": '''"""Load the sales of a day."""


def setup(conn, **kwargs):
    conn.execute("CREATE TABLE IF NOT EXISTS sales (item TEXT PRIMARY KEY, price REAL)")


def run(conn, **kwargs):
    rows = [("apple", 0.5), ("pear", 0.7)]
    conn.executemany("INSERT OR REPLACE INTO sales VALUES (?, ?)", rows)
    return len(rows)
''',
    "report.py": '''"""Print what was sold."""


def run(conn, **kwargs):
    print(conn.execute("SELECT count(*), sum(price) FROM sales").fetchone())
''',
    "orchestrator.py": '''"""A pipeline. What it can do: python orchestrator.py --help"""

# Yours is what stands above the ENGINE mark; nothing below it needs to be read.

TOOL_MAP = {  # a tool's name: its module, in the order in which they run
    "load":   "load",
    "report": "report",
}

STAGES = {  # a stage's name: its tools, and other stages
    "full": ["load", "report"],
}


def get_connection():
    """Return the connection that every tool gets as `conn`; None if there is no database."""
    import sqlite3
    from pathlib import Path
    return sqlite3.connect(Path(__file__).with_name("data.db"))


''',
}


def make_project(folder):
    """Write a pipeline that runs at once into a folder, which may be new. Raise UserError, with
    nothing written, if one of its files is there.
    """
    for name in _STARTER:
        if os.path.lexists(os.path.join(folder, name)):
            raise UserError(f"There is a {name} in {folder}.", "Name a new folder.")
    with open(_ENGINE_FILE, encoding="utf-8") as file:
        engine = re.search("(?ms)^# ={3} ENGINE .*", file.read())[0]
    os.makedirs(folder, exist_ok=True)
    for name, text in _STARTER.items():  # orchestrator.py last: without it, there is no project
        with open(os.path.join(folder, name), "x", encoding="utf-8") as file:
            file.write(text + engine * (name == "orchestrator.py"))


def make_tables(path, folder):
    """Return the tables, as text to paste, of what a runner starts whose commands are to run in a
    folder.
    """
    with open(path, encoding="utf-8-sig", errors="backslashreplace") as file:
        text = file.read()
    draft = Draft(path, folder)
    if path.endswith(".py"):
        read_python(draft, text)
    elif re.search(r"(?i)makefile[^/\\]*$|\.mk$", path):
        read_makefile(draft, text)
    else:
        read_shell(draft, text)
    return draft.format()


_SCRIPT = r"(?<!\S)-m\s+(?:\w+\.)*(\w+)|([\w-]+)\.(?:py|sh|bash|R|jl|js|pl|sql|ipynb)\b"
_NO_CODE = r"'[^']*'|\\.|\"[^\"$`\\]*\""  # what means nothing to a shell
_CODE = r"[|<>&;()*?`$[\n]|(?<!\S)~|^\w+=|\{\S*[,.]\S*\}"  # what it is needed for, in the rest
_PREFACE = """\
# From %s, which was read and not run. Put this in place of what stands above the ENGINE mark.
# Commands run in the folder of that file, whatever a `cd` said, with the environment of the run.
# After one that fails, what needs it is skipped; "on_failure": "continue" goes on. What only a run
# can tell is not read: conditions, functions, most loops, values that are worked out.

TOOL_MAP = {
"""


class Draft:
    """Tables in the making, of a file. State: `rows`, the lines of TOOL_MAP, by name or number;
    `flags`, what add_argument() is to be told of the arguments in commands; `stages`.
    """

    def __init__(self, path, folder):
        self.path, self.folder, self.rows, self.flags, self.stages = path, folder, {}, {}, {}

    def note(self, line, text):
        """Name what was not read."""
        self.rows[len(self.rows)] = f"line {line}: {' '.join(text.split())}"

    def add(self, words, name="", **options):
        """Add a tool for a command; return its name, made from that of its script if not said."""
        limit = re.match(r"timeout (\d+)([smhd]?) [^-]", " ".join(words))
        if limit:
            words, options["timeout"] = words[2:], limit[1] + (limit[2] or "s")
        words[0] = re.sub(r"^python3(\.\d+)?$", "python", words[0])
        text = " ".join(words)
        base = name or make_name(words[-1] if "-c" in words[1:-1] else text)
        name = next(each for each in itertools.chain(
            [base], (f"{base}_{number}" for number in itertools.count(2))) if each not in self.rows)
        is_plain = all(re.fullmatch(r"[\w@%+=:,./{}-]+", word) for word in words)
        self.rows[name] = spell({"command": text if is_plain else words, **options}) + ","
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|sh)", word) \
                    and not os.path.exists(os.path.join(self.folder, word)):
                self.rows[name] += f"  # not in {self.folder}: {word}"
        for flag in BRACES.findall(text):
            self.flags.setdefault(flag, "required=True")
        return name

    def format(self):
        """Return the tables as text."""
        lines = [f"    {spell(name)}: {row}" if isinstance(name, str) else f"    # not read: {row}"
                 for name, row in self.rows.items()] or ["    # nothing that starts a program"]
        lines += ["}", "", "STAGES = {"]
        lines += [f"    {spell(name)}: {spell(tools)}," for name, tools in self.stages.items()]
        lines += ["}", *["\n\ndef add_arguments(parser):"] * bool(self.flags)]
        lines += [f"    parser.add_argument({spell('--' + name)}, {how})"
                  for name, how in self.flags.items()]
        return _PREFACE % self.path + "\n".join(lines)


def make_name(text):
    """Return a name for a command: that of its script or module, else of its program."""
    found = re.search(_SCRIPT, text) or re.search(r"([\w-]+|$)", text)
    return re.sub(r"^[\d_-]+(?=[^\W\d])", "", found[found.lastindex]).replace("-", "_") or "tool"


def spell(value):
    """Return data as a literal of Python, in double quotes where those will do."""
    import json
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else repr(value)


def refuse_braces(text):
    """Raise ValueError if a text has braces of its own that would be taken for an argument."""
    if BRACES.search(text):
        raise ValueError


def split_command(text, shell):
    """Return the words of a command of a shell, in which {name} is an argument; without that shell
    if it would do nothing. Raise ValueError if it could take an argument for code.
    """
    import shlex
    text = re.sub(r"\\\n\s*", " ", text)
    if not re.search(_CODE, re.sub(_NO_CODE, "_", text)):
        return shlex.split(text)
    refuse_braces(text)
    return [*shell, text]


# Of a shell script: a comment; or a command, and whether it runs beside what follows; or a quote
# without an end, and all after it. No two branches begin alike, so that none is tried again.
_COMMAND = r"""(?sx) (?<![^\s;])\#[^\n]* | ((?: '[^']*' | "(?:\\.|[^"\\])*" | \\. | \([^()]*\)
    | \((?![^()]*\)) | \{\s(?:\$\{[^{}]*\}|[^{}])*\} | \{(?!\s(?:\$\{[^{}]*\}|[^{}])*\})
    | [<>|]& | &> | (?<!\s)\# | [^;&\n'"\\#({] )+) (?=[;&\n\#]|\Z) (&(?!&))? | ([^;&\n]*['"].*)"""
_VARIABLE = (r"('[^']*'|\\.|\"[^\"]*'[^\"]*\")"  # in quotes, it is none
             r"|\$(?:\{(\w+)(?::-([\w./:-]*))?\}|([1-9]|[^\W\d]\w*)|[\d@#?!$*{-])")
_DOCUMENT = r"(?s)(?<!<)<<-?\s*(['\"]?)(\w+)\1(?!\w).*?\n\s*\2(?=\n|$)"
_OPENS = r"((then|do|else)\s+)*((if|while|until|for|case|select|function)\b|[\w-]+\s*\(\)|\{\s)"
_CLOSES = r"(fi|done|esac|\})(?![\w.])|(?s:.*[;\n]\s*\}$)"
_SAYS = r"$|set\s|(echo|printf)\b[^|<>]*$"
_NOT_READ = (r"(then|do|else|elif|fi|done|esac|cd|source|\.|trap|exit|return|shift|read|eval|exec"
             r"|unset|local|declare|export|\[+|\})(\s|$)|(?s:.*<<)|['\"]")
_SET = (r"(?m)(?:^|[;&|]|\b(?:then|do|else|export|local))\s*@"  # @ is a variable, or a function
        r"(?:\s*[:?+]?=(?!=)|\.(?:append|extend|insert)\(|\s*\(\))"
        r"|\b(?:for|read|function)\s+(?:-\w+\s+)*@\b")


def count_sets(name, text):
    """Return in how many places a runner gives a variable a value, or defines a function."""
    return len(re.findall(_SET.replace("@", re.escape(name)), text))


def read_shell(draft, text):
    """Add what a shell script starts."""
    known, depth, before, beside, was_read = {}, 0, [], [], True
    shell = ("bash -o pipefail -c" if "pipefail" in text else
             "bash -c" if "bash" in text.partition("\n")[0] else "sh -c").split()

    def find(found):
        """Return what stands for a variable; what is in quotes, as it is. Raise ValueError for one
        of which only a run can tell the value.
        """
        name = found[2] or found[4] or ""
        if found[1] and (found[1][0] != '"' or "$" not in found[1]):
            return found[1]
        if name not in known and (not name or count_sets(name, text)):
            raise ValueError
        if name.isdecimal():
            draft.flags["arg" + name] = f"default={spell(found[3] or '')}"
            return f"{{arg{name}}}"
        return known.get(name, found[0])

    text = re.sub(_DOCUMENT, lambda found: "<<" + "\n" * found[0].count("\n"), text)
    for found in re.finditer(_COMMAND, text):
        command = (found[1] or found[3] or "").strip()
        if re.match(_SAYS, command):
            continue
        depth += bool(re.match(_OPENS, command))
        is_inside, depth = depth, depth - bool(re.match(_CLOSES, command))
        is_after, was_read = not was_read and text.endswith("&&", 0, found.start()), False
        try:
            if is_inside or is_after or re.match(_NOT_READ, command) \
                    or count_sets(command.split()[0], text):
                raise ValueError
            refuse_braces(command)
            filled = re.sub(_VARIABLE, find, command)
            value = re.fullmatch(r"(\w+)=(?=['\"]|\S*$)(['\"]?)([\w@%+=:,./ {}-]*)\2", filled)
            if value and count_sets(value[1], text) == 1:
                known[value[1]] = value[3]
            elif re.match(r"\w+\+?=", filled):
                raise ValueError
            elif re.match(r"wait\b", filled):
                before, beside = beside or before, []
            elif found[2]:
                beside.append(draft.add(split_command(filled, shell), needs=before))
            else:
                before, beside = [draft.add(split_command(filled, shell))], []
            was_read = True
        except ValueError:
            draft.note(text.count("\n", 0, found.start()) + 1, command)


_RULE = r"""(?mx)^(?: \#.* | (?P<name>\w+)[ \t]*[:?]?=[ \t]*(?P<value>[^#\n]*).*
    | (?P<targets>[^\s:=#%][^:=#%\n]*):(?![:=])(?P<needs>[^=;%#\n]*)(?:\#.*)?(?P<recipe>(?:\n\t.*)*)
    | (?P<other>\S.*) )"""


def read_makefile(draft, text):
    """Add the rules of a Makefile, as tools; those without a recipe as stages, and as stage "full"
    what make does where nothing is named.
    """
    known, rules, text = {"$": "$"}, {}, re.sub(r"\s*\\\n\s*", " \v", text)

    def find(found):
        if (found[1] or found[2]) not in known:
            raise ValueError
        return known[found[1] or found[2]]

    def fill(text):
        refuse_braces(text)
        return re.sub(r"\$(?:[({](\w+)[)}]|(.))", find, text)

    def find_needed(names, is_deep):
        for name in names:  # which grows: through a rule without a recipe, or all
            if name in rules and (is_deep or not rules[name][1]):
                names += [each for each in rules[name][0] if each not in names]
        return [name for name in rules if name in names and rules[name][1]]

    for found in re.finditer(_RULE, text):
        try:
            if found["other"]:
                raise ValueError
            if found["name"]:
                known[found["name"]] = fill(found["value"].strip())
            needs = fill(found["needs"] or "").replace("|", " ").split()
            for target in fill(found["targets"] or "").split():
                known.update({"@": target, "<": "".join(needs[:1]), "^": " ".join(needs)})
                rows = re.findall(r"(?m)^\t(?!\s*#)[@+]*(-?)[@+]*(.+)", fill(found["recipe"]))
                recipe = " && ".join(f"({row} || true)" if may_fail else row
                                     for may_fail, row in rows).replace("\v", "")
                rules[target] = (needs + rules.get(target, [[]])[0],
                                 split_command(recipe, ["sh", "-c"]))
        except ValueError:
            draft.note(len(re.findall("[\n\v]", text[:found.start()])) + 1, found[0])
    rules.pop(".PHONY", None)
    for target, (needs, recipe) in rules.items():
        if recipe:
            files = {"reads": [name for name in needs if name not in rules],
                     "writes": re.findall(r".*[./].*", target)}  # others may be no files
            draft.add(recipe, target, needs=find_needed([*needs], False),
                      **{option: names for option, names in files.items() if names})
        else:
            draft.stages[target] = find_needed([target], True)
    draft.stages["full"] = find_needed([*rules][:1], True)
    draft.stages = {name: tools for name, tools in draft.stages.items() if tools}


_STARTS = r"(?:subprocess|sp)\.(?:run|call|check_call|check_output|Popen)|os\.system"
_OWN = r"(?s).*\b(?:cwd|env|input|stdin)="  # what a command of TOOL_MAP has none of


def read_value(node, known, names=r"(?:str\()?args\.(\w+)\)?|str\((\w+)\)"):
    """Return what an expression is, with {name} for an argument. Raise ValueError."""
    import ast
    code, kind = ast.unparse(node), type(node).__name__
    name = re.fullmatch(names, code)
    if code in known:
        return known[code]
    if kind == "Constant":
        refuse_braces(str(node.value))
        return str(node.value)
    if kind in ("List", "Tuple"):
        return [read_value(each, known) for each in node.elts]
    if kind == "JoinedStr":
        return "".join(read_value(each, known) for each in node.values)
    if kind == "FormattedValue" and not node.format_spec:
        return read_value(node.value, known, r"(?:args\.)?(\w+)")
    if not name:
        raise ValueError
    return known.get(name[name.lastindex], f"{{{name[name.lastindex]}}}")


def read_python(draft, text):
    """Add what a Python program starts by subprocess or os.system. Raise SyntaxError if it is none,
    and RecursionError if it nests too deep.
    """
    import ast

    def read(node, known):
        """Add what a statement starts; without `known`, only a run can tell whether it does."""
        kind = type(node).__name__
        if kind == "Call" and re.fullmatch(_STARTS, ast.unparse(node.func)):
            return read_call(node, ast.unparse(node), known)
        if kind == "Call" and re.match(r"\w*", ast.unparse(node.func))[0] in own:
            draft.note(node.lineno, ast.unparse(node))
        if kind == "Assign" and known:
            name = ast.unparse(node.targets[0])
            with contextlib.suppress(ValueError):
                if count_sets(name, text) == 1:
                    known[name] = read_value(node.value, known)
        if kind == "For" and known:
            names = re.findall(r"\w+", ast.unparse(node.target))
            with contextlib.suppress(ValueError):
                for value in read_value(node.iter, known):
                    values = value if len(names) > 1 else [value]
                    for each in node.body:
                        read(each, {**known, **dict(zip(names, values))})
                return None
        is_sure = kind not in ("For", "While", "If", "ExceptHandler") or kind == "If" \
            and "__name__" in ast.unparse(node.test)
        for each in ast.iter_child_nodes(node):
            read(each, known if is_sure else None)

    def read_call(node, code, known):
        """Add what a call starts, or name it where that can not be told."""
        try:
            words = read_value(node.args[0], known) if known else ""
            is_text = code.startswith("os.") or "shell=True" in code
            if not words or isinstance(words, str) != is_text or re.match(_OWN, code):
                raise ValueError
            limit = re.search(r"\btimeout=(\d+)", code)
            draft.add(split_command(words, ["sh", "-c"]) if is_text else words,
                      **{"timeout": int(limit[1])} if limit else {})
        except (ValueError, LookupError):
            draft.note(node.lineno, code)

    tree = ast.parse(text, draft.path)
    nodes = [*ast.walk(tree)]
    # What these do is in other lines, or files, and depends on what they are given.
    own = {each.name for each in nodes if isinstance(each, ast.FunctionDef) and each.args.args}
    own.update(alias.asname or alias.name for each in nodes for alias in getattr(each, "names", ())
               if isinstance(alias, ast.alias)
               and os.path.exists(os.path.join(draft.folder, alias.name + ".py")))
    read(tree, {"sys.executable": "python"})


# === 14 DOOR ====================================================================================
# The command line: the parser, one command_ function per command, the one listener that prints,
# and the one place where an error becomes a sentence and an exit code. No other logic.

def main(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
         get_connection: Optional[Callable[..., Any]] = None, *,
         argv: Optional[Sequence[str]] = None, name: Optional[str] = None,
         add_arguments: Optional[Callable[[Any], None]] = None,
         limits: Optional[Mapping[str, int]] = None, home: Optional[str] = None,
         yours: Mapping[str, Any] = {}) -> int:
    """Do what the command line says and return the exit code.

    argv: the words after the program's name, by default sys.argv's. home: the folder for the
    history, by default `.orchestrator` beside the file that defines get_connection. yours: what
    stands above the ENGINE mark, by name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    code, command = EXIT_SUCCESS, command_run
    try:
        take_path()
        forget_modules()
        check_not_hidden(yours)
        parser = make_parser(add_arguments)
        options, arguments = parser.read(argv)
        command = next((_COMMANDS[name] for name in _COMMANDS if name in parser.given), command)
        parser.check(options, argv)
        if command is command_init:  # before there need be any tables
            return command_init(options) or EXIT_SUCCESS
        load = read_pipeline if command is command_check else load_pipeline
        pipeline = load(tool_map, stages, get_connection, name=name or find_name(), limits=limits)
        base = find_base(get_connection)
        check_edited(pipeline.tools.values(), base)
        home = home or os.environ.get("ORCHESTRATOR_HOME") or os.path.join(base, ".orchestrator")
        code = command(Call(
            pipeline, options, arguments, argv, parser, parser.given, find_program(), base,
            find_pipeline_folder(home, pipeline.name))) or EXIT_SUCCESS
        with contextlib.suppress(OutputClosed):  # which a run can do without
            show("", end="")  # what tools printed last goes out while a failure can be told
        return code
    except UserError as error:
        if error.__cause__ and not {"-v", "--verbose"}.isdisjoint(argv):
            say(format_traceback(error.__cause__, verbose=True))
        say(str(error))
        return error.exit_code
    except SystemExit as done:  # argparse, after --help and --version; or add_arguments()
        if done.code is None or isinstance(done.code, int):
            return done.code or EXIT_SUCCESS
        say(str(done.code))
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        number = next((each for each in error.args if isinstance(each, int)), SIGINT)
        say(format_signal(number) + ", before anything had run" * (command is command_run))
        return EXIT_SIGNAL + number
    except OutputError as error:
        if str(error):
            say(f"stdout could not be written: {error}.")
        return code or EXIT_FAILED
    except Exception as error:
        say(format_traceback(error, verbose=True) + format_bug(argv))
        return EXIT_BUG


def find_name():
    """Return the name of a pipeline that has none: that of its file, or of the folder around an
    orchestrator.py.
    """
    file = find_main_file() or "pipeline"
    file = os.fsencode(os.path.realpath(file)).decode("utf-8", "backslashreplace")
    folder, name = os.path.split(os.path.splitext(file)[0])
    return os.path.basename(folder) or "pipeline" if name == "orchestrator" else name


def check_not_hidden(yours):
    """Raise UserError if the engine's own names hide some that stand above the ENGINE mark."""
    hidden = [name for name, value in yours.items()
              if not name.startswith("__") and globals()[name] is not value]
    if hidden:
        raise UserError("Above the ENGINE mark, the engine's own names hide yours: "
                        + ", ".join(hidden) + ".",
                        "Rename yours, or put them into a module of your own.")


_FIRST_TOOL = """Write a tool, hello.py beside it:

def run(conn, **kwargs):
    print("hello")

and put it in their place, above the ENGINE mark:
"""


def check_edited(tools, base):
    """Raise UserError if the tools are those of the example, which is not there, with tables to
    begin with: of the modules in the folder `base`, or one below, that have a function `run`.
    """
    is_example = tools and all(tool.module.startswith("example.") for tool in tools)
    if not is_example or find_module("example"):
        return
    from glob import escape, glob
    paths = [path for pattern in ("*.py", os.path.join("*", "*.py"))
             for path in sorted(glob(os.path.join(escape(base), pattern)))]
    names = [os.path.relpath(path, base)[:-3].replace(os.sep, ".") for path in paths]
    names = [name for name in names if not re.search(r"(^|\.)test|[^\w.-]", name) and (
        (read_module(name).definitions or {}).get("run", Definition()).takes is not ANYTHING)]
    shown = names or ["hello"]
    last = [name.rpartition(".")[2] for name in shown]
    rows = "".join(f'    "{each if last.count(each) == 1 else name.replace(".", "_")}": "{name}",\n'
                   for each, name in zip(last, shown))
    raise UserError(
        "Above the ENGINE mark are the tables of the example, and example/ is not here. "
        + ("Put these in their place, in the order in which they are to run:\n" if names
           else _FIRST_TOOL) + f"\nTOOL_MAP = {{  # a tool's name: its module\n{rows}}}\n\n"
        "STAGES = {}  # a stage's name: its tools\n")


class Parser(argparse.ArgumentParser):
    """The parser of the command line. Its mistakes are UserErrors, its help is output like any.

    `names` are those of the arguments that tools get; `required` are the flags, and groups of
    them, that add_arguments() requires, which argparse is not told: only a run needs them.
    State: `given`, the actions of the flags that the words read last have given, by name.
    """

    def read(self, words):
        """Return the engine's options, and apart from them the arguments that tools get."""
        self.given = {}
        options, unknown = self.parse_known_intermixed_args(self.mark_names(words))
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(f"There is no flag {unknown[0]!r}.",
                            format_nearest(unknown[0].partition("=")[0], flags))
        return options, {name: value for name, value in vars(options).items()
                         if name in self.names}

    def check(self, options, words):
        """Raise UserError if words that were read say nothing together, or less than a run needs.
        """
        check_companions(options, self.given.keys() - self.names)
        if [word.partition("=")[0] for word in words].count("--item") > 1:
            raise UserError("--item was given twice.", "Leave one out; without it, all are done.")
        if re.search("[\ud800-\udfff]", options.item or ""):  # bytes that are no text
            raise UserError(f"There is no item {options.item!r}: that is no text.",
                            "Rename the file, or leave --item out.")
        if self.required and self.given.keys().isdisjoint((*_COMMANDS, "resume")):
            for each in self.required:  # argparse itself says which of them is missing
                each.required = True
            self.parse_known_intermixed_args(self.mark_names(words))

    def mark_names(self, words):
        """Return words in which one after a `--` begins with what no flag does."""
        return ["\0" * (before == "--") + word for before, word in zip(("", *words), words)
                if word != "--"]

    def _get_values(self, action, words):
        self.given[action.dest] = action
        return super()._get_values(action, [word.lstrip("\0") for word in words])

    def _get_value(self, action, word):
        try:
            return super()._get_value(action, word)
        except argparse.ArgumentError:
            raise
        except Exception as error:  # argparse knows of ValueError and TypeError alone
            raise UserError(f"{action.option_strings[0]} {word}: {format_one_line(error)}",
                            "That comes from its type= in add_arguments(); -v shows where."
                            ) from error

    def _print_message(self, message, file=None):
        show(message, end="")

    def format_help(self):
        """Return the help. Raise UserError for a flag whose help argparse could not show."""
        for action in self._actions:
            text = str(action.help or "").replace("%%", "")
            try:
                re.sub(r"%(?!\()", "%()", text) % {**vars(action), "prog": self.prog}
            except (ValueError, TypeError, KeyError):
                raise UserError(f"add_arguments(): a % in the help of {action.option_strings[0]} "
                                "does not begin a name such as %(default)s.",
                                "Write %% for a percent sign.") from None
        return super().format_help()

    def error(self, message):
        """Raise UserError with argparse's sentence."""
        raise UserError(message[:1].upper() + message[1:] + ".", f"See {self.prog} --help.")


def make_parser(add_arguments):
    """Return the parser, with the flags of add_arguments() and those of the engine."""
    # With a width, since argparse would import what finds that of the terminal, for each flag.
    parser = Parser(description="Run the tools and stages of this pipeline.", add_help=False,
                    usage="%(prog)s [TARGET ...] [flags]", allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    parser._optionals.title = "arguments of the tools"
    try:
        if add_arguments is not None:
            add_arguments(parser)
        own, groups = list(parser._actions), list(parser._action_groups)
        add_flags(parser)
    except argparse.ArgumentError as error:
        raise UserError(f"add_arguments(): {error.message}.",
                        "Choose another flag: that one is the engine's, or declared twice."
                        ) from error
    except Exception as error:
        raise UserError(f"add_arguments() failed: {format_one_line(error)}",
                        "Mend it; -v shows where.") from error
    parser.formatter_class = argparse.HelpFormatter
    parser._action_groups.sort(key=groups.__contains__)  # --help shows the engine's first
    parser.names = find_arguments(own, parser)
    parser.required = [each for each in (*own, *parser._mutually_exclusive_groups) if each.required]
    for each in parser.required:
        each.required = False
    return parser


def find_arguments(own, parser):
    """Return the names of the arguments that tools get; `own` are the actions of add_arguments().

    Raise UserError for one that has no flag, or a name of the engine's.
    """
    flags = {name: f"set_defaults({name}=...)" for name in parser._defaults}
    flags.update((action.dest, "".join(action.option_strings[:1])) for action in own)
    engines = {*RESERVED_ARGUMENTS, *(action.dest for action in parser._actions[len(own):])}
    for name, flag in flags.items():
        if not flag:
            what = "add_subparsers()" if name == argparse.SUPPRESS else repr(name)
            raise UserError(f"add_arguments(): {what} is not a flag, and words on the command "
                            "line are stages and tools.", "Declare flags, as '--name'.")
        if name in engines:
            raise UserError(f"add_arguments(): {flag} would reach tools as {name!r}, which is the "
                            "engine's own name.", "Choose another flag, or another dest=.")
    return flags.keys()


_GOES_WITH = {  # a flag: those it says something of
    "json": "list plan graph why status history logs items", "failed": "items",
    "last": "history", "run": "logs report", "tail": "logs", "follow": "logs",
    "step": "backfill", "reverse": "backfill", "reprocess": "backfill"}


def check_companions(options, given):
    """Raise UserError for a flag that says nothing beside the others that were given."""
    for flag, others in _GOES_WITH.items():
        if flag in given and given.isdisjoint(others.split()):
            raise UserError(f"--{flag} goes with --{others.replace(' ', ', --')}.",
                            "Leave it out, or add that.")
    said = [*options.targets, *["--no-history"] * options.no_history]
    if said and ("resume" in given or "mark_done" in given):
        raise UserError("--resume takes its targets from the run that it goes on with; it does not "
                        f"go with {' '.join(said)}.", "Leave that out, or leave out --resume.")
    looks = given.intersection(("backfill", "status", "history", "logs", "prune", "report"))
    beside = [flag for flag in ("resume", "redo") if flag in given and "backfill" in given]
    beside += ["no-history"] * options.no_history
    if looks and beside:
        raise UserError(f"--{min(looks)} looks into the history for what was done; it does not go "
                        f"with --{beside[0]}.", "Leave that out.")


def read_duration_s(text):
    """Return seconds."""
    try:
        return parse_duration_s(text + "s" * text.isdecimal())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no duration like "90s", "10m" or "7d"') from None


def read_whole(text):
    """Return a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def add_flags(parser):
    """Declare the engine's own flags."""
    run = parser.add_argument_group("what to run").add_argument
    run("targets", nargs="*", default=[], metavar="TARGET",
        help='stages and tools; +TOOL adds all that it needs, TOOL+ all that needs '
             'it; none means the stage "full", or else every tool')
    run("--exclude", action="append", default=[], metavar="NAME",
        help="leave out this tool or stage, without which what needs it goes on (may be repeated)")
    run("--from", dest="start_from", metavar="NAME",
        help="begin at this tool or stage, leaving out what is before it")
    run("-j", "--jobs", type=int, default=1, metavar="N",
        help="run up to N tools side by side; 0 means one for each core")
    run("-x", "--fail-fast", action="store_true",
        help="start nothing more after the first failure")
    run("--resume", nargs="?", const="", metavar="RUN",
        help="go on with the last run that did not succeed, or with that one")
    run("--force", action="store_true",
        help="run cached tools too, and do without needs that never succeeded")
    run("--item", metavar="NAME",
        help="do only this item of a tool that has items; -- before a name says that it is no flag")
    run("--retry-items", nargs="+", action="append", default=[], metavar=("TOOL", "ITEM"),
        help="try items again that were given up: these, or all of the tool")
    run("--redo", nargs="+", action="append", default=[], metavar=("TOOL", "ITEM"),
        help="do again what is done: a tool, all of its items, or these")
    run("--backfill", metavar="A..B", help="run once per period from day A to day B, "
        "which tools get as period_start and period_end (the day after the last)")
    run("--step", choices=("day", "week", "month"), default="day",
        help="with --backfill: how long a period is (day)")
    run("--reverse", action="store_true", help="with --backfill: the last one first")
    run("--reprocess", choices=("failed", "all"),
        help="with --backfill: run periods again that failed, or all")
    run("--wait", nargs="?", type=read_duration_s, const=float("inf"), default=0.0,
        metavar="DURATION", help="wait for another run of this pipeline to end")
    run("--no-history", action="store_true", help="keep no history, and take no lock")
    add_commands(parser.add_argument_group("looking and tidying, without running anything"))
    other = parser.add_argument_group("other").add_argument
    other("-v", "--verbose", action="store_true",
          help="show the engine's part of tracebacks, and debug logs")
    other("-q", "--quiet", action="store_true", help="say only what went wrong")
    other("--version", action="version", help="show the versions and exit",
          version=f"orchestrator.py {VERSION}, Python {sys.version.split()[0]}")
    other("-h", "--help", action="help", help="show this help and exit")


def add_commands(group):
    """Declare the flags that do something else than run, see _COMMANDS, and what goes with them."""
    command = group.add_mutually_exclusive_group().add_argument
    command("--list", action="store_true", help="show the tools and stages")
    command("--plan", "-n", "--dry-run", action="store_true",
            help="show what a run would do, and why")
    command("--check", action="store_true",
            help="read every module, import none, and report all mistakes")
    command("--status", action="store_true",
            help="show how each tool ended last, and what runs now")
    command("--graph", nargs="?", const="text", choices=("text", "mermaid", "dot"),
            help="draw which tool waits for which, with how each ended last")
    command("--why", metavar="TOOL",
            help="show why a tool would run or not, what it waits for, and how it ended before")
    command("--history", nargs="?", const="", metavar="RUN",
            help="show the last runs, or all of one")
    command("--logs", nargs="?", const="", metavar="TOOL",
            help="show what the tools of the last run printed, or one tool")
    command("--items", nargs="+", metavar=("TOOL", "ITEM"),
            help="show how the items of a tool ended, or some of them")
    command("--report", nargs="?", const="", metavar="FILE",
            help="write a report of the last run, as a page; of a .md as a story, a .json as data")
    command("--completion", choices=("bash", "zsh", "fish", "words", "runs"),
            metavar="bash|zsh|fish", help="print what lets a shell complete words of this program")
    command("--mark-done", nargs="+", metavar="TOOL",
            help="accept a tool that you mended by hand, for --resume")
    command("--prune", type=read_duration_s, metavar="DURATION",
            help="forget the runs that are older")
    command("--init", nargs="?", const=".", metavar="DIR",
            help="make a new project in a folder; with --from FILE, show instead the tables for "
            "what a shell script, Makefile or Python program starts, which would run in DIR (.)")
    flag = group.add_argument
    flag("--last", type=read_whole, default=10, metavar="N", help="with --history: so many runs")
    flag("--run", metavar="RUN", help="with --logs and --report: of that run")
    flag("--tail", type=read_whole, metavar="N", help="with --logs: the last N lines")
    flag("--follow", action="store_true", help="with --logs: go on while the run goes on")
    flag("--failed", action="store_true", help="with --items: those that failed, with their errors")
    flag("--json", action="store_true", help="print JSON for programs")


class Call(NamedTuple):
    """A call of the program: `program` are the words that started it, `argv` those after them,
    `given` what its parser found given in them. `folder` is that of its history.
    """
    pipeline: Pipeline
    options: Any
    arguments: Dict[str, Any]
    argv: List[str]
    parser: Parser
    given: Dict[str, Any]
    program: Tuple[str, ...]
    base: str
    folder: str

    def make_request(self):
        """Return what is asked for, where nothing is resumed."""
        options = self.options
        return Request(tuple(options.targets), tuple(options.exclude), options.start_from,
                       tuple(self.argv), item=options.item)

    def at(self, period):
        """Return the call for a period of a backfill."""
        return self._replace(arguments={**self.arguments, **period.arguments()})

    def find_said(self):
        """Return the arguments of tools that are on the command line, each with its flag.

        One whose action is of the user's own is left out: it may do something by itself.
        """
        return {name: action.option_strings[0] for name, action in self.given.items()
                if name in self.arguments and type(action).__module__ == "argparse"}


def open_history(call):
    """Return the history to look at, without its lock; one that knows nothing if there is none."""
    is_there = has_bytes(os.path.join(call.folder, "history.db"))
    return History(call.folder if is_there and not call.options.no_history else "", call.base)


def need_history(call):
    """Return the history to look at. Raise UserError if there is none."""
    history = open_history(call)
    if not history.folder:
        raise UserError(f"There is no history in {format_path(call.folder)}.",
                        "It is lost: only the logs of former runs are there."
                        if find_last_log(call.folder) else find_beside(call)
                        or "Nothing has been run yet, or it was run with --no-history.")
    return history


def find_beside(call):
    """Return a sentence on the histories in the folder for them, "" if there are none: a pipeline
    without a NAME has another one after its folder was renamed.
    """
    home = os.path.dirname(call.folder)
    names = [name for name in sorted(os.listdir(home)) if has_bytes(
        os.path.join(home, name, "history.db"))] if os.path.isdir(home) else ()
    return names and f"There is one of {', '.join(map(repr, names[:3]))}: NAME says which it is."


def look_at(history, call):
    """Return a history as it is at this moment, in which a run that was killed reads so."""
    if history.folder:
        was_held = is_held(call.folder)
        history.hold_still()
        running = history.find_running()
        if running and not was_held and not is_held(call.folder):
            history.killed = running["run_id"]
    return history


def find_tools(call):
    """Return the tools to show: those of the targets, or without any all."""
    if not call.options.targets:
        return list(call.pipeline.tools)
    return [step.tool for step in make_plan(call.pipeline, call.options.targets).steps]


def check_tool(call, name):
    """Raise UserError if there is no tool of that name."""
    if name not in call.pipeline.tools:
        raise UserError(f"There is no tool {name!r}.", format_nearest(name, call.pipeline.tools))


def answer(call, shown, format_text):
    """Show what a command was asked for, as text or as JSON."""
    show(to_json(shown) if call.options.json else format_text(shown, make_style(sys.stdout)))


def load_lasts(call):
    """Return the newest row of each tool; none where the history can not be read, and then say so:
    without it there is still a list.
    """
    try:
        return look_at(open_history(call), call).load_last_attempts()
    except UserError as error:
        say(str(error))
        return {}


def command_list(call):
    """Show the tools and stages; with targets, those that belong to them."""
    shown = make_list(call.pipeline, find_tools(call), find_summary, load_lasts(call).get)
    answer(call, shown, format_list)


def command_graph(call):
    """Draw the plan of the targets; without any, all tools."""
    options = call.options
    steps = make_plan(call.pipeline, options.targets or [*call.pipeline.tools],
                      exclude=options.exclude, start_from=options.start_from).steps
    shown = make_graph(steps, load_lasts(call).get)
    if options.json or options.graph == "text":
        return answer(call, shown, draw_lines)
    show(format_drawing(shown, options.graph))


def draw_lines(shown, style):
    """Return a graph as text, of letters that stdout has."""
    text = format_graph(shown, style)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = text.translate(PLAIN_LINES)
    return text


# What completes words in a shell: it asks the program itself, as it was typed.
_COMPLETIONS = {
    "bash": """\
_orchestrator() {
    local IFS=$'\\n' at=1 what=words word=${COMP_WORDS[COMP_CWORD]}
    case ${COMP_WORDS[0]##*/} in python*) at=2 ;; esac
    [[ $at == 1 || ${COMP_WORDS[1]} != -m ]] || at=3
    [[ $COMP_CWORD -ge $at && ${COMP_WORDS[at-1]} == *NAME* ]] || return
    case ${COMP_WORDS[COMP_CWORD-1]} in --run|--history|--resume|--report) what=runs ;; esac
    COMPREPLY=($(compgen -W "$("${COMP_WORDS[@]:0:at}" --completion $what 2>/dev/null)" -- "$word"))
}
complete -o bashdefault -o default -F _orchestrator python python3 NAME.py ./NAME.py""",
    "zsh": """\
_orchestrator() {
    local at=1 what=words
    [[ ${words[1]:t} == python* ]] && { at=2; [[ $words[2] == -m ]] && at=3 }
    [[ $CURRENT -gt $at && $words[at] == *NAME* ]] || { _default; return }
    [[ $words[CURRENT-1] == (--run|--history|--resume|--report) ]] && what=runs
    compadd -- ${(f)"$($words[1,at] --completion $what 2>/dev/null)"}
}
compdef _orchestrator python python3 NAME.py""",
    "fish": """\
function __orchestrator
    set -l words (commandline -opc)
    set -l at 1
    string match -q '*python*' -- $words[1]; and set at 2; and test "$words[2]" = -m; and set at 3
    string match -q '*NAME*' -- $words[$at]; or return
    set -l what words
    contains -- $words[-1] --run --history --resume --report; and set what runs
    $words[1..$at] --completion $what 2>/dev/null
end
for program in python python3 NAME.py
    complete -c $program -a '(__orchestrator)'
end""",
}


def command_completion(call):
    """Print what lets a shell complete words, or what it then asks for: all words that there are,
    or the runs.
    """
    what, file = call.options.completion, find_main_file() or __file__
    if what == "runs":
        words = [str(run["run_id"]) for run in open_history(call).load_last_runs(100)]
    elif what == "words":
        words = [*call.pipeline.stages, *call.pipeline.tools, *(
            flag for action in call.parser._actions for flag in action.option_strings)]
    else:
        words = [_COMPLETIONS[what].replace("NAME", os.path.splitext(os.path.basename(file))[0])]
    show("\n".join(dict.fromkeys(words)))


def command_why(call):
    """Show why a tool would run or not, what it waits for, and how it ended before."""
    options, name = call.options, call.options.why
    check_tool(call, name)
    options.plan, tool = True, call.pipeline.tools[name]  # which tells how long tools take
    history = look_at(open_history(call), call)
    step, problem = None, ""
    try:
        steps = make_session(call, history).plan.steps
        step = next((each for each in steps if each.tool == name), None)
        problem = "it is not in this plan" * (step is None)
    except UserError as error:
        problem = str(error)
    past = make_past(call.pipeline, history, call.arguments, Clock().wall(), {}, False)
    needed_by = [each for each, needs in call.pipeline.needs.items()
                 if needs != ALL_BEFORE and name in needs]
    failure = next(iter(history.load_attempts_of(name, 1, that_failed=True)), None)
    answer(call, make_why(tool, find_summary(tool), needed_by, step, problem,
                          describe_age(tool, past), history.load_attempts_of(name, 5),
                          failure), format_why)


def command_plan(call):
    """Show the plan; of a backfill, the periods."""
    history = open_history(call)
    if call.options.backfill:
        periods = find_periods(call, history)
        for period in [period for period in periods if period.action != "skip"][:1]:
            check_plan(make_session(call.at(period), history))
        return answer(call, make_backfill_view(periods), format_backfill)
    session = make_session(call, history)
    check_plan(session)
    plan = session.plan
    return answer(call, make_plan_view(plan), functools.partial(format_plan, jobs=plan.jobs))


def command_check(call):
    """Report all mistakes in the tables and in the modules that they name."""
    pipeline, tools = call.pipeline, call.pipeline.tools.values()
    if not pipeline.mistakes:
        for target in call.options.targets:
            expand_target(pipeline, target)

    def may_see(tool, name):
        return pipeline.needs[tool] == ALL_BEFORE or name in pipeline.needs[tool]

    available = Available({*call.arguments, *PERIOD_ARGUMENTS}, pipeline.tools, may_see)
    mistakes = dict.fromkeys(map(str, [  # tools may share a module
        *pipeline.mistakes, *find_table_doubles(), *find_wrong_each(pipeline, tools),
        *find_connection_mistakes(pipeline.get_connection, available.arguments),
        *find_uncompiled(tools),
        *(mistake for tool in tools for mistake in read_mistakes(tool, available, call.base))]))
    for mistake in mistakes:
        show(mistake)
    show(f"{format_plural(len(tools), 'tool')} read, "
         f"{format_plural(len(mistakes) or 'no', 'mistake')} found")
    return EXIT_USAGE if mistakes else None


def command_status(call):
    """Show how each tool ended last, and what runs now."""
    history = look_at(need_history(call), call)
    tools = find_tools(call)
    running, attempts = (None, []) if history.killed else find_running(history)
    lasts = history.load_last_attempts()
    shown = make_status(tools, lasts.get, running, attempts, Clock().wall(),
                        count_items_of(call, [lasts[tool] for tool in tools if tool in lasts]),
                        history.find_unusual())
    answer(call, shown, format_status)


def count_items_of(call, lasts):
    """Return how many items have each status, for the tools that had items when they ran last;
    `lasts` are the newest rows of tools.
    """
    counts = {}
    having = [last for last in lasts if last["called"] or last["status"] not in DONE
              and last["tool"] in call.pipeline.tools
              and has_items(call.pipeline.tools[last["tool"]])]
    if having:
        with open_connection(call) as conn:
            for last in having:
                with open_ledger(call, conn, last["tool"]) as ledger:
                    if ledger:
                        counts[last["tool"]] = count_statuses(
                            last["called"] or {}, ledger.count(last["called_at"] or 0.0))
    return counts


@contextlib.contextmanager
def open_connection(call):
    """Hold the pipeline's connection to look at what is there. Raise UserError if that fails."""
    connect = bind_connection(call.pipeline.get_connection, call.arguments)
    with contextlib.closing(Database(connect)) as database:
        try:
            database.begin(commits=True)
        except Exception as error:
            raise UserError(f"get_connection() failed: {format_one_line(error)}",
                            "The items are in that database; see that it can be reached."
                            ) from error
        yield database.conn
        database.rollback()


@contextlib.contextmanager
def open_ledger(call, conn, tool):
    """Hold the ledger of a tool, to look at; None if there is none yet."""
    if not keeps_ledger(conn) and not open_history(call).folder:
        yield None
        return
    with contextlib.closing(Ledger(conn, call.folder, call.pipeline.name, tool, "", "")) as ledger:
        try:
            is_there = ledger.is_there()
        except Exception as error:
            raise UserError(f"The ledger can not be read: {format_one_line(error)}.",
                            find_hint(error)) from error
        yield ledger if is_there else None


_END = "\n  ]\n}"  # of the JSON of a list of items


def command_items(call):
    """Show the items of a tool that were tried, or those that failed, page by page."""
    options = call.options
    tool, *names = options.items
    check_tool(call, tool)
    if not has_items(call.pipeline.tools[tool]):
        raise UserError(f"{tool} has no items.", "A tool has items if its module has a function "
                        'items(), or if TOOL_MAP says "each" or "items" of it.')
    count = 0
    with open_connection(call) as conn:
        for page in load_item_pages(call, conn, tool, names):
            if options.json:  # without its end: the whole of it may be larger than memory
                text = to_json({"items": page})[:-len(_END)]
                show("," + text.partition("[")[2] if count else text, end="")
            else:
                show(format_items(page, make_style(sys.stdout)))
            count += len(page)
    if options.json:
        show(_END if count else to_json({"items": []}))
    elif not count:
        which = " or ".join(map(format_name, names)) or "item"
        say(f"No {which} of {tool} has {'failed' if options.failed else 'been tried'}.")


def load_item_pages(call, conn, tool, names):
    """Yield lists of items of a tool as --items shows them, of some names or all."""
    wanted = ITEM_STATUSES[1:] if call.options.failed else ITEM_STATUSES
    with open_ledger(call, conn, tool) as ledger:
        rows = ledger.load_items(wanted, "") if ledger else []
        while rows:
            page = [make_item_view(row) for row in rows if not names or row["item"] in names]
            if page:
                yield page
            rows = ledger.load_items(wanted, rows[-1]["item"])


def command_history(call):
    """Show the last runs, or all that is known of one."""
    history, options = look_at(need_history(call), call), call.options
    if options.history:
        run = history.find_run(options.history)
        attempts = history.load_attempts(run["run_id"])
        for row in attempts:
            row["log"] = row["log"] and format_path(os.path.join(call.folder, row["log"]))
        return answer(call, {"runs": [make_run_view(run, attempts, is_detailed=True)]}, format_run)
    views = [make_run_view(run, history.load_attempts(run["run_id"]))
             for run in history.load_last_runs(options.last)]
    answer(call, {"runs": views}, format_runs)


def command_logs(call):
    """Show what tools printed: in the last run or another, all tools or one."""
    history, options = need_history(call), call.options
    if options.logs:
        check_tool(call, options.logs)
    run_id = options.run or options.logs and history.find_called_in(options.logs)
    run = history.find_run(run_id) if run_id else next(iter(history.load_last_runs(1)), None)
    logs = {}  # by file: what --json shows of it, and how much of it was shown
    while run:
        goes_on = options.follow and is_held(call.folder)  # else look once more
        for row in history.load_attempts(run["run_id"]):
            if row["attempt"] and options.logs in ("", row["tool"]):
                show_log(call, row, logs)
        if not goes_on:
            break
        Clock().sleep(0.2)
    shown = [log for log, _ in logs.values()]
    if options.json:
        show(to_json({"logs": shown}))
    elif not shown:
        say("Nothing was printed.")
    elif any(log["pid"] == run["pid"] for log in shown):
        say("What C code and child processes of a tool print is kept only if it is isolated or "
            "runs with --jobs.")


def show_log(call, row, logs):
    """Show what is new in the log of an attempt, and note it in `logs`."""
    options, lines = call.options, []
    path = find_log(find_logs(call.folder, str(row["run_id"])), row["tool"], row["attempt"])
    if not has_bytes(path):
        return
    log, at = logs.get(path, (make_row(row, "run_id tool attempt pid"), 0))
    if path not in logs:
        log.update(path=path, lines=[])
        if not (options.json or options.logs):
            show(make_style(sys.stdout).bold(f"{row['tool']}, attempt {row['attempt']} ({path}):"))
        if options.tail is not None:
            lines, at = read_tail(path, options.tail), os.path.getsize(path)
    for piece, end in read_pieces(path, at, is_whole=row["status"] != "running"):
        at = end
        lines += clean(b"".join(piece).decode("utf-8", "replace")).splitlines()
    logs[path] = {**log, "status": row["status"]}, at
    if options.json:
        log["lines"] += lines
        return
    for line in lines:
        show(line)


def read_pieces(path, at, is_whole):
    """Yield what a log has from a place on, as lists of lines, and where each list ends, since it
    may be larger than memory. A line that has no end yet is left out unless the log `is_whole`.
    """
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            lines = file.readlines(1 << 20)
            if not is_whole and lines and not lines[-1].endswith(b"\n"):
                lines.pop()
            if not lines:
                return
            at += sum(map(len, lines))
            yield lines, at


def command_report(call):
    """Write the report of a run, and show where it is."""
    history, options = look_at(need_history(call), call), call.options
    runs = [history.find_run(options.run)] if options.run else history.load_last_runs(1)
    for run in runs:
        show(format_path(write_report(call, history, run, options.report or os.path.join(
            call.folder, "reports", f"{run['run_id']}.html"))))


def write_report(call, history, run, file):
    """Write the report of a run and return its file. Raise UserError if that fails."""
    attempts = history.load_attempts(run["run_id"], "items failures")
    logs = find_logs(call.folder, str(run["run_id"]))
    shown = make_report(
        call.pipeline.name, run, attempts, history.load_edges(run["run_id"]),
        {row["tool"]: history.load_former(row["tool"], row["attempt_id"])
         for row in reversed(attempts)},  # those before its first attempt
        {row["tool"]: read_tail(find_log(logs, row["tool"], row["attempt"]), 20)
         for row in attempts if row["status"] in ("failed", "partial", "interrupted")})
    kind = os.path.splitext(file)[1].lower()
    text = {".md": format_story, ".json": to_json}.get(kind, format_page)(shown)
    beside = f"{file}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        with open(beside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as out:
            out.write(text)
        os.replace(beside, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise UserError(f"The report can not be written, {file}: {error.strerror}.",
                        "Choose another file.") from error
    return file


def report_stages(call, history, request, run_id):
    """Write the reports that stages of a run ask for, and say where they are."""
    for target in request.targets or (DEFAULT_STAGE,):
        stage = call.pipeline.stages.get(target)
        if stage and stage.report:
            try:
                if not history.folder:
                    raise UserError("There is no report of a run without history.")
                file = os.path.join(call.base, stage.report)
                write_report(call, history, history.find_run(run_id), file)
                if not call.options.quiet:
                    say(f"Report: {format_path(file)}")
            except UserError as error:
                say(f"warning: {error}")


@contextlib.contextmanager
def change_history(call):
    """Hold the history to write to it, in which a run that was killed is closed, and say so."""
    is_lost = find_last_log(call.folder) and not has_bytes(History(call.folder).path)
    if call.options.resume is not None and not is_lost and find_beside(call):
        need_history(call)
    with hold_history(call.folder, call.base, call.options.wait) as history:
        if is_lost:
            say(f"warning: the history is lost, {format_path(history.path)} is empty or gone, and "
                "a new one begins: what former runs have done, of which there are still logs, is "
                "not known.")
        run_id, tools = history.close_killed()
        if run_id:
            where = f"at {', '.join(tools)}" if tools else "between two tools"
            say(f"Run {run_id} was cut off {where}; it is recorded as interrupted.")
        yield history


def command_mark_done(call):
    """Record tools of the run that a resume would go on with as done, by hand."""
    tools, call.options.resume = call.options.mark_done, ""
    for tool in tools:
        check_tool(call, tool)
    with change_history(call) as history:
        plan, request, arguments = find_plan(call, history)
        left = mark_done(call.pipeline, plan, request, arguments, history, tools, Clock().wall())
    say("Marked as done: " + ", ".join(tools) + ".")
    say(f"Left to do: {', '.join(left)}. Next: "
        + format_command(call, "--resume") if left else "Nothing is left to do.")


def command_prune(call):
    """Forget old runs."""
    need_history(call)
    with change_history(call) as history:
        gone = history.prune(Clock().wall() - call.options.prune)
    show(f"{format_plural(len(gone) or 'no', 'run')} forgotten")


def command_init(options):
    """Make a new project, or show the tables for a runner: the only command without a pipeline."""
    folder, file = options.init, options.start_from
    try:
        if file:
            return show(make_tables(file, folder))
        make_project(folder)
    except (OSError, SyntaxError, RecursionError) as error:
        raise UserError(f"{getattr(error, 'filename', file)}: "
                        f"{getattr(error, 'strerror', error)}.", "Name another.") from None
    show(f"A pipeline of two tools is in {folder}. Run it, then put your own in their place:\n\n"
         f"    cd {folder}\n    python orchestrator.py")


def command_run(call):
    """Run the plan, and tell on stderr how it goes."""
    if call.options.no_history:
        return carry_out(call, History("", call.base))
    with change_history(call) as history:
        return (backfill if call.options.backfill else carry_out)(call, history)


_COMMANDS = {  # what main() calls for a flag, and takes the exit code of, if that is no success
    "list": command_list, "plan": command_plan, "check": command_check, "status": command_status,
    "history": command_history, "logs": command_logs, "items": command_items,
    "report": command_report, "graph": command_graph, "why": command_why,
    "completion": command_completion,
    "mark_done": command_mark_done, "prune": command_prune, "init": command_init,
}


def find_periods(call, history):
    """Return the periods of --backfill, in order, with what is to be done of each."""
    options, request = call.options, call.make_request()
    steps = make_plan(call.pipeline, request.targets, exclude=request.exclude,
                      start_from=request.start_from).steps
    if not any(takes_any(call.pipeline.tools[step.tool], PERIOD_ARGUMENTS) for step in steps):
        raise UserError("--backfill: no tool of this plan takes period_start or period_end, so "
                        "each period would be the same.",
                        "Write `def run(conn, period_start=None, period_end=None):`.")
    periods, today = make_periods(options.backfill, options.step), find_day(Clock().wall())
    check_begun(options.backfill, periods, today)
    lasts = history.load_last_like(request)

    def decide(period):
        last = lasts.get(format_arguments({**call.arguments, **period.arguments()}))
        last = last and (last["run_id"], last["status"],
                         history.find_started_at("", last["run_id"]))
        return decide_period(period, last, options.reprocess or "", today)

    return [decide(period) for period in periods][::-1 if options.reverse else 1]


def backfill(call, history):
    """Run the plan once per period that is not done, and tell how each went."""
    periods, today, code = find_periods(call, history), find_day(Clock().wall()), EXIT_SUCCESS
    ends = {period: "not begun" for period in periods if period.action != "skip"}
    for number, period in enumerate(list(ends), 1):
        if not call.options.quiet:
            say(f"\nPeriod {period.start} to {period.end} ({number} of {len(ends)})")
        code = carry_out(call.at(period), history,
                         period.run_id if period.action == "resume" else None)
        ends[period] = "cut off" if code > EXIT_SIGNAL else "failed" if code else "done now"
        if code > EXIT_SIGNAL or code and call.options.fail_fast:
            break
    failed = [period.start for period in periods if ends.get(period) == "failed"
              or period not in ends and "failed" in period.reason]
    say(format_backfill_end(len(periods), ends, failed, today))
    if failed or code > EXIT_SIGNAL:
        again = [] if call.options.reprocess or code > EXIT_SIGNAL else ["--reprocess", "failed"]
        say("Next: " + format_command(call, *call.argv, *again))
    return code if code > EXIT_SIGNAL else EXIT_FAILED if failed else EXIT_SUCCESS


def find_plan(call, history, resumes=None):
    """Return the plan, what was asked for, and the arguments of the tools; with --resume, those
    of the run that is resumed, and what changed since is told. `resumes`: a run to go on with, of
    which all that is the same.
    """
    options, is_resume = call.options, call.options.resume is not None
    if is_resume:
        request, arguments, done, changed = find_resumed(call, history)
    else:
        request, arguments = call.make_request()._replace(resumes=resumes), call.arguments
        done = history.find_done(resumes) if resumes else {}
    jobs, past, describe = count_jobs(options.jobs), None, None
    if options.plan:
        describe = functools.partial(
            describe_tool, has_database=call.pipeline.get_connection is not no_connection)
    if not options.no_history:
        past = make_past(call.pipeline, history, arguments, Clock().wall(), done, options.force,
                         wants_durations=options.plan or jobs > 1)
    plan = make_plan(call.pipeline, request.targets, exclude=request.exclude,
                     start_from=request.start_from, jobs=jobs, past=past, describe=describe,
                     redo=read_retries(options.redo))
    if is_resume:
        tell_changes(call.pipeline, history.find_run(request.resumes), plan, changed)
    return plan, request, arguments


def find_resumed(call, history):
    """Return what a resume asks for, its arguments, what of it is done, and in words what of all
    that the flags beside --resume have changed.
    """
    run = find_run_to_resume(call, history)
    was, now = make_request(run), None
    if was.words is not None:
        said, now = call.parser.read(was.words)
        was = was._replace(item=was.item or said.item)
    recorded, request = read_arguments(run, now), override(was, call.make_request())
    arguments = {**recorded, **{name: value for name, value in call.arguments.items()
                                if name in call.given}}
    changed = format_changed(recorded, arguments) \
        + format_changed(name_flags(was), name_flags(request))
    if changed and was.words is not None:
        request = request._replace(words=(*was.words, *call.argv))
    done = find_valid(call.pipeline, history.find_done(run["run_id"]), arguments)
    return request, arguments, done, changed


def name_flags(request):
    """Return what was asked for beside targets and arguments, by flag."""
    return {"--exclude": " ".join(request.exclude) or None, "--from": request.start_from,
            "--item": request.item}


def find_run_to_resume(call, history):
    """Return the run to go on with. Raise UserError if there is none, with the way to have items
    tried, or tools done, again where that was asked for too.
    """
    try:
        return history.find_resumable(call.options.resume or None)
    except Settled as error:
        asked = {flag: read_retries(given) for flag, given in (
            ("--retry-items", call.options.retry_items), ("--redo", call.options.redo)) if given}
        if not asked:
            raise
        words = [word for flag in asked for word in format_retries(flag, asked[flag])]
        raise UserError(error.problem, "To do that without --resume: " + format_command(
            call, *dict.fromkeys(itertools.chain(*asked.values())), *words)) from None


def find_changed(was, now):
    """Return the names of arguments, both as format_arguments() says them, that are not as they
    were; one that did not exist then has not changed.
    """
    import json
    was, now = json.loads(was), json.loads(now)
    return [name for name in now if now[name] != was.get(name, now[name])]


def format_changed(was, now):
    """Return the arguments that are not as they were, each with both values, in words."""
    return [f"{name} ({now[name]}, was {was[name]})"
            for name in find_changed(format_arguments(was), format_arguments(now))]


def find_valid(pipeline, done, arguments):
    """Return those of the tools that are done which got no other arguments than they would now,
    nor another connection, which may be one to another database.
    """
    now = format_arguments(arguments)
    changed = {was: find_changed(was, now) for was in {each.arguments for each in done.values()}}
    of_connection = find_asked(pipeline.get_connection).names
    return {tool: success for tool, success in done.items() if tool not in pipeline.tools
            or not changed[success.arguments]
            or not (takes_any(pipeline.tools[tool], changed[success.arguments])
                    or {*of_connection}.intersection(changed[success.arguments]))}


def tell_changes(pipeline, run, plan, changed):
    """Say what changed since a run that is resumed, and which of that is not run again."""
    what = find_differences(
        run, find_versions(pipeline, [pipeline.tools[step.tool] for step in plan.steps]))
    base = find_base(pipeline.get_connection)
    kept = [step.tool for step in plan.steps if not step.may_run()
            and not find_sources(pipeline.tools[step.tool], base).keys().isdisjoint(what)]
    if what or changed:
        say(f"Changed since run {run['run_id']}: {', '.join(what + changed)}."
            + (f" Done before, and not run again: {', '.join(kept)}." if kept else ""))


def find_differences(was, now):
    """Return what differs of what ran, in words, by the rows of a run and of a later one."""
    return ["the tables"] * (now["tables"] != was["tables"]) + [
        module for module, source in now["sources"].items()
        if was["sources"].get(module, source) != source]


def make_session(call, history, resumes=None):
    """Return what there is to run, and how; see find_plan()."""
    options = call.options
    plan, request, arguments = find_plan(call, history, resumes)
    return Session(
        call.pipeline, plan, arguments, history, request, options.fail_fast, options.verbose,
        keep_results=False, find_said=call.find_said,
        retry_items=None if options.reprocess else read_retries(options.retry_items),
        redo=read_retries(options.redo))


def carry_out(call, history, resumes=None):
    """Run the plan, and tell on stderr how it goes; see find_plan()."""
    options, session = call.options, make_session(call, history, resumes)
    screen = Screen(sys.stderr, options.quiet, options.verbose,
                    "; --logs shows all of it" * bool(history.folder))
    gc.freeze()  # what is here will stay: no collection during the run need walk it
    try:
        result, unusual = run_plan(session._replace(
            on_event=screen.on_event, make_room=screen.clear if screen.has_area else None)), {}
    finally:
        screen.clear()
    if not options.quiet or result.status != "success":
        tell_tails(result, screen)
        try:
            if not options.quiet and history.folder:
                tell_failure(call, history, result, screen.style)
                unusual = history.find_unusual(result.run_id)
        except UserError as error:  # of what stands of former runs: this one ended as it did
            say(str(error))
        next_command = "" if options.backfill else make_next_command(result, call)
        say(format_summary(result, next_command, screen.style, unusual))
    report_stages(call, history, session.request, result.run_id)
    if history.folder and not has_bytes(history.path):
        say(f"warning: {format_path(history.path)} was removed during the run, which is therefore "
            "not recorded.")
    if result.status == "interrupted":
        return EXIT_SIGNAL + (result.signal or SIGINT)
    return EXIT_FAILED if result.status == "failed" or screen.has_lost else EXIT_SUCCESS


def tell_tails(result, screen):
    """Say what the tools that failed printed last, but for the last one, of which that was just
    shown, and those whose items failed.
    """
    for tool, outcome in result.outcomes.items():
        is_told = outcome.status != "failed" or tool == screen.last \
            or outcome.items and outcome.items["failed"]  # of which each was told
        tail = [] if is_told else read_tail(outcome.log, 10)
        if tail:
            head = screen.style.bold(f"Last lines of {tool} ({format_path(outcome.log)}):")
            say("\n" + "\n  ".join([head, *tail]))


def tell_failure(call, history, result, style):
    """Say what somebody has to know who is asked for help: of the first tool that failed and has
    succeeded before, how and where it failed, and what changed since then.
    """
    found = ((tool, history.find_good_run(tool)) for tool in result.failed + result.partial)
    tool, good = next((each for each in found if each[1]), ("", None))
    if not good:
        return
    outcome, now = result.outcomes[tool], history.find_run(result.run_id)
    own, words = call.pipeline.tools[tool].module, call.pipeline.tools[tool].command
    own = own and getattr(find_module(own), "origin", None)
    frames = re.findall(r'^ +File "(.+)", line (\d+)', outcome.traceback, re.M)
    places = frames[-1:] + [frame for frame in frames if frame[0] == own]
    changed = find_differences(good, now) + format_changed(good["arguments"], now["arguments"])
    facts = {"tool": tool, "run_id": result.run_id, "command": format_words(words),
             "good_id": good["run_id"],
             "good_at": format_local(format_moment(good["started_at"])), "error": outcome.error,
             "place": "".join(f"{format_path(file)}:{line}" for file, line in places[-1:])}
    say(format_failure(facts, changed, load_subjects(
        call.base, good["git_commit"], now["git_commit"]), style))


def load_subjects(folder, since, until):
    """Return the commits between two, up to five, as git tells them; none where it does not."""
    if since == until or not all(re.fullmatch("[0-9a-f]{40,64}", each or "")
                                 for each in (since, until)):
        return []
    from subprocess import DEVNULL, PIPE, SubprocessError, run
    try:
        return run(["git", "-C", folder, "log", "-5", "--format=%h %s", f"{since}..{until}", "--"],
                   stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, timeout=5.0, encoding="utf-8",
                   errors="replace", check=True).stdout.splitlines()
    except (OSError, SubprocessError):
        return []


def read_retries(given):
    """Return what --retry-items or --redo asks for, by tool; all items of a tool where none is
    named.
    """
    retries = {}
    for tool, *items in sorted(given, key=len, reverse=True):  # one without items counts, as last
        retries[tool] = (*retries.get(tool, ()), *items) if items else ()
    return retries


def format_retries(flag, asked):
    """Return the words that ask for items, by tool, as read_retries() reads them."""
    return [word for tool, names in asked.items() for word in (
        flag, tool, *(each for name in names for each in ["--"] * name.startswith("-") + [name]))]


class Screen:
    """The listener of a run on the command line. It writes a line per event, and how far the tools
    are that run: on a terminal in a live area below all lines, elsewhere now and then in a line.

    What a tool prints in this process without Python's streams, its C code and its children, goes
    unseen. So such a tool is in the live area only once it tells of its progress.

    State: `running`, by tool, the event with which it started, the last that told how far it is,
    and since when that counts; `outputs`, by tool that runs, the file that takes what its worker
    prints, and how much of it was shown; `tracebacks` that were told last; `last`, the tool that
    ended last, if what it printed is seen right before; `text`, what is to be written; `area`, by
    tool, the lines that are to stand below it, as of `shown_s`, and `drawn`, those that do stand
    there, the cursor at their end; `is_open`, whether a worker's output has no end of its last
    line; `has_lost`, whether what tools printed did not reach stdout.
    """

    def __init__(self, stream, quiet, verbose, way_out=""):
        self.stream, self.out, self.style = stream, sys.stdout, make_style(stream)
        self.has_area = has_codes(stream) and not quiet  # asked once: a tool may close it
        self.is_one_screen = is_one_file(stream, self.out)
        self.quiet, self.follows = quiet, verbose  # workers' output, which is shown at once
        self.log_level = 10 if verbose else 40 if quiet else 20  # DEBUG, ERROR, INFO
        self.way_out = way_out  # for who misses what did not reach stdout
        self.width = 0  # of the longest name of a tool
        self.running, self.outputs, self.tracebacks, self.last = {}, {}, {}, ""
        self.text, self.area, self.drawn, self.shown_s = "", {}, [], 0.0
        self.is_open = self.has_lost = False

    def on_event(self, event):
        """Show an event."""
        tool = event.tool
        if event.kind == "run_started":
            self.width = max(len(step.tool) for step in event.plan.steps)
        elif event.kind == "progress":
            start, last, since_s = self.running[tool]
            counts_on = 0 < last.done <= event.done  # else it has begun to count now, or anew
            self.running[tool] = start, event, since_s if counts_on else last.at
        elif event.kind == "log" and event.level >= self.log_level:
            self.has_lost |= event.level == OUTPUT_LOST
            self.show(event)
        elif event.kind == "tool_started":
            self.running[tool], self.outputs[tool] = (event, event, 0.0), (event.output, 0)
            if not (self.has_area and event.output):
                self.show(event)
        elif event.kind in ("tool_ended", "tool_retried"):
            self.running.pop(tool, None)
            self.area.pop(tool, None)
            self.show_end(event)
        elif event.kind == "tick" and self.follows:
            for each in list(self.outputs):
                self.show_output(each, is_whole=False)
        self.look_at_running(event.at)
        if self.text or self.shown_s == event.at:
            self.draw(self.area)

    def show_end(self, event):
        """Show how an attempt ended, below what it printed, without what was just told: the same
        traceback, its last line, which says the error, or that of an item.
        """
        outcome = event.outcome
        self.show_output(event.tool, is_whole=True)
        if outcome.attempts and self.is_one_screen:
            self.last = event.tool
        traceback = outcome.traceback.rstrip()
        if traceback and traceback != self.tracebacks.get(event.tool):
            self.text += traceback.removesuffix("\n" + outcome.error) + "\n"
        self.tracebacks[event.tool] = traceback
        if outcome.items and outcome.items["failed"] and not traceback:
            event = event._replace(outcome=outcome._replace(error=""))
        self.show(event)

    def show_output(self, tool, is_whole):
        """Copy to stdout what a tool printed in its worker: whole lines, or all at its end, with
        the tool's name in front of each line where several tools are shown at once.
        """
        file, at = self.outputs.pop(tool, ("", 0))
        name = tool.encode() + b" | " if self.follows else b""
        if has_bytes(file):
            for lines, end in read_pieces(file, at, is_whole):
                at = end
                self.put(b"".join(name + line for line in lines))
        if not is_whole:
            self.outputs[tool] = file, at

    def put(self, content):
        """Write to stdout what tools printed, and say once if that fails."""
        self.clear()
        try:
            write_out(self.out, content)
            self.is_open = not content.endswith(b"\n")
        except OutputClosed:
            pass
        except OutputError as error:
            let_go(self.out)
            if str(error):
                self.has_lost = True
                self.text += f"stdout could not be written: {error}{self.way_out}\n"

    def show(self, event):
        """Have the line of an event written, unless only failures are wanted."""
        if not self.quiet or event.kind == "log" or event.outcome and event.outcome.error:
            self.text += format_event(event, self.width, self.style) + "\n"

    def look_at_running(self, at):
        """Have it shown how far the tools are that run, if it is time to."""
        period_s = 0.1 if self.has_area else 30.0
        if self.quiet or 0 <= at - self.shown_s < period_s:
            return
        self.shown_s, self.area = at, {}
        for tool, (start, last, since_s) in self.running.items():
            progress, ran = format_progress(last, since_s, at), format_duration(at - start.at)
            if at - start.at < 0.9 * period_s:
                continue  # it may be over before that is read
            if not self.has_area:
                text = f"still running, {ran}" + f", {progress}" * bool(progress)
                self.show(start._replace(at=at, text=text))
            elif progress or start.output:
                self.area[tool] = f"{ran:>8}  {tool.ljust(self.width)}  {progress or 'running'}"

    def clear(self):
        """Take the live area off the screen until something is shown again."""
        self.draw({})

    def draw(self, area):
        """Write the text that there is, and below it a live area instead of the one that stands
        there, all at once, but nothing where a tool has left a line without an end.
        """
        text, self.text = self.text, ""
        open_ones = [each for each in (self, sys.stdout, sys.stderr)
                     if getattr(each, "is_open", False)]
        if text:
            flush(sys.stdout)  # what the tool printed belongs before what we say of it
            text = "\n" * bool(open_ones and self.is_one_screen) + text
            for each in open_ones:
                each.is_open = False
        if self.drawn or area and (text or not open_ones):
            text = self.frame(text, list(area.values()))
        if text:
            say(text, self.stream, end="")

    def frame(self, text, lines):
        """Return a text between what erases the live area and what draws these lines as the new
        one, as far as there is room.
        """
        columns, rows = find_size(self.stream)
        # A terminal that has become narrower has broken the lines that were too long for it.
        up = sum(-(-len(line) // columns) for line in self.drawn) - 1
        erase = f"{_INK}{up}A" * (up > 0) + f"{_INK}G{_INK}J" if self.drawn else ""
        if len(lines) >= rows:
            lines[rows - 2:] = [f"{'':10}and {len(lines) - rows + 2} more"]
        self.drawn = [line[:columns - 3] for line in lines]  # room for the ^C of who presses that
        area = "\n".join(self.drawn)
        # Wide letters may be more than fit; so the terminal is not to break lines by itself.
        return f"{erase}{text}{_INK}?7l{area}{_INK}?7h"


def find_size(terminal):
    """Return the columns and rows of a terminal, or what is usual where it does not tell."""
    try:
        columns, rows = os.get_terminal_size(terminal.fileno())
    except (OSError, ValueError):
        return 80, 24
    return columns or 80, rows or 24


def is_one_file(stream, other):
    """Return whether two streams lead to the same place: a terminal, or the log of a cron job."""
    try:
        return os.path.sameopenfile(stream.fileno(), other.fileno())
    except (OSError, ValueError, AttributeError):
        return False


def is_terminal(stream):
    """Return whether a stream is one; there may be none (pythonw)."""
    return stream is not None and stream.isatty()


def make_style(stream):
    """Return the style for a stream: colours on a terminal, unless NO_COLOR is set."""
    return Style(has_codes(stream) and not os.environ.get("NO_COLOR"), _INK)


def has_codes(stream):
    """Return whether a stream is a terminal that knows codes for colours and for the cursor."""
    is_known = os.environ.get("TERM", "dumb") != "dumb" or "WT_SESSION" in os.environ
    return is_known and is_terminal(stream)


# How a code of the engine's own begins until it is written. No tool can know it; so all others in
# what the engine says, of errors, names and log lines, are taken out.
_INK = f"\x1b{os.urandom(8).hex()}["


def write_text(stream, text, end):
    """Write text of the engine's, in which nothing but its own codes takes hold of a terminal, and
    an end. Raise OutputError if that fails.
    """
    write_out(stream, "\x1b[".join(map(clean, text.split(_INK))) + end)


class OutputError(Exception):
    """Output could not be written. Without a text if there is nothing to say: nobody reads it."""


class OutputClosed(OutputError):
    """A stream is closed, or there is none: pythonw has none, and a tool may close it."""


def write_out(stream, content):
    """Write text, or bytes that a process printed, to stdout or stderr: all output goes this way.

    Letters that a stream can not show are escaped; bytes are unchanged where it takes them. Raise
    OutputError if that fails.
    """
    try:
        if isinstance(content, str):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(content.encode(encoding, "backslashreplace").decode(encoding))
        elif hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(content)
        else:
            stream.write(content.decode("utf-8", "replace"))
        stream.flush()
    except BrokenPipeError:  # `| head`
        raise OutputError from None
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from error
    except (ValueError, AttributeError):
        raise OutputClosed("it is closed") from None


def show(text, end="\n"):
    """Write a line to stdout: what a command was asked for. Raise OutputError if that fails."""
    try:
        write_text(sys.stdout, text, end)
    except OutputError:
        let_go(sys.stdout)
        raise


def let_go(stream):
    """Let what waits in a stream, and all that is to come, go nowhere, also when the interpreter
    flushes it at its end.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text, stream=None, end="\n"):
    """Write a line to stderr: what there is to say beside that. No run ends for want of it."""
    with contextlib.suppress(OutputError):
        write_text(sys.stderr if stream is None else stream, text, end)


def to_json(data):
    """Return data as JSON for programs, which people look at, too."""
    import json

    def escape(found):
        return re.sub("(.{4})", r"\\u\1", found[0].encode("utf-16-be").hex())

    return re.sub(HIDDEN, escape, json.dumps(data, indent=2, ensure_ascii=False))


def make_next_command(result, call):
    """Return the command that goes on where a run stopped; nothing after a success."""
    left = {tool: o for tool, o in result.outcomes.items() if o.status not in DONE}
    options, words = call.options, []
    named, redo = read_retries(options.retry_items), read_retries(options.redo)
    for tool, o in left.items():  # of whose items some have no try left
        if o.items and (o.items["failed"] > o.items["unfit"] or o.items["given_up"]):
            names = named.get(tool, ())
            # All of the tool, unless the named are for sure those that have failed.
            are_those = o.items["failed"] == o.items["pending"] == len(names)
            words += format_retries("--retry-items", {tool: names if are_those else ()})
        elif tool in redo and not o.items and o.reason != NOT_AGAIN:
            # Else they are pending, or what was asked for is not there.
            words += format_retries("--redo", {tool: redo[tool]})
    if not left:
        return ""
    if options.no_history:
        return format_command(call, *leave_out_flags(call.argv), *words, "--from",
                              next(iter(left)))
    words += ["--jobs", str(options.jobs)] if options.jobs != 1 else []
    return format_command(call, "--resume", *["--force"] * options.force, *words)


_NOT_REPEATED = {"--from": 2, "--redo": sys.maxsize}  # flag: of so many words, up to another flag


def leave_out_flags(argv):
    """Return the words of a command line without those of a run that do not hold for the next."""
    kept, count = [], 0
    for before, word in zip(["", *argv], argv):
        flag, equals, _ = word.partition("=")
        if word.startswith("-") and "--" not in (before, word):
            count = _NOT_REPEATED.get(flag, 0)
            count = min(count, 1) if equals else count
        kept += [word] * (count <= 0)
        count -= 1
    return kept


def find_program():
    """Return the words that start this program: `python orchestrator.py`, `python -m package`.

    To be asked before a tool is imported, which may change what they are made of.
    """
    python = os.path.basename(sys.executable or "python")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (python, "-m", spec.name) if spec else (python, *sys.argv[:1])


def format_command(call, *words):
    """Return how one would start this program with other words, in the system's shell."""
    words = (*call.program, *words)
    if IS_WINDOWS:
        from subprocess import list2cmdline
        return list2cmdline(words)
    import shlex
    return " ".join(map(shlex.quote, words))


def format_bug(argv):
    """Return what a report of a bug in the engine should hold beside the traceback."""
    import platform
    return (f"\nThis is a bug in orchestrator.py itself, not in your tools.\n"
            f"  Please report the traceback above, with: orchestrator.py {VERSION}, "
            f"Python {sys.version.split()[0]}, {platform.platform()}, arguments {list(argv)}")


if __name__ == "__main__":
    _EXIT_CODE = main(
        _YOURS.get("TOOL_MAP"), _YOURS.get("STAGES"), _YOURS.get("get_connection"),
        name=_YOURS.get("NAME"), add_arguments=_YOURS.get("add_arguments"),
        limits=_YOURS.get("LIMITS"), yours=_YOURS)
    gc.freeze()  # the interpreter's last collections would take 10 ms to walk all of this
    sys.exit(_EXIT_CODE)
