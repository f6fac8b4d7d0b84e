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


# === ENGINE 1.0.0 === everything from this line on is replaced when you upgrade ==================
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
#  12 DOOR         the command line

# ruff: noqa: E402
_YOURS = dict(globals())  # your names, before the engine adds its own: see the last lines

import _signal  # which `signal` makes slower, with names for its numbers
import argparse
import contextlib
import errno
import functools
import gc
import operator
import os
import re
import sys
import time
from heapq import heappop, heappush
from typing import (
    Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple,
    Union,
)

if sys.version_info < (3, 9):  # so all of this file is written in what 3.6 can read
    sys.stderr.write("orchestrator.py needs Python 3.9 or newer; this is %d.%d.%d.\n"
                     % sys.version_info[:3])
    sys.exit(2)

VERSION = "1.0.0"
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
    "success": (),
    "partial": (),
    "cached": (),
    "failed": (),
    "skipped": (),
    "interrupted": (),
}

DONE = ("success", "cached")  # statuses of a tool that need not be done again
ITEM_STATUSES = ("success", "failed", "quarantined", "pending")
DEATHS_ALLOWED = 3  # an item that took its process down so often is quarantined
RESERVED_ARGUMENTS = ("conn", "context", "item")  # what run() gets from the engine
NOT_AGAIN = "not tried again"  # the reason of a failure that another try would only repeat
ALL_BEFORE = "*"  # Step.needs of a tool that declares nothing: everything before it in the plan


class UserError(Exception):
    """A mistake that the user can mend: `problem` says where and what, `fix` what to do."""
    exit_code = EXIT_USAGE

    def __init__(self, problem, fix=""):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self):
        return self.problem + "".join("\n  " + line for line in self.fix.splitlines())


class Locked(UserError):
    """Another run of the same pipeline is not over."""
    exit_code = EXIT_LOCKED


class Settled(UserError):
    """There is nothing to do: no mistake, but something to say."""
    exit_code = EXIT_SUCCESS


class Tool(NamedTuple):
    """A row of TOOL_MAP, checked; what each option means stands beside OPTIONS."""
    name: str
    module: str
    function: str = "run"
    commits: bool = False
    needs: Optional[Tuple[str, ...]] = None  # None where the row does not say
    reads: Optional[Tuple[str, ...]] = None
    writes: Optional[Tuple[str, ...]] = None
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
    batch: int = 1


class Stage(NamedTuple):
    """A row of STAGES, checked: its members as written, and the tools they come to."""
    name: str
    members: Tuple[str, ...]
    tools: Tuple[str, ...]


class Pipeline(NamedTuple):
    """The user's tables, checked. `tools` and `stages` keep the order of the tables.

    `needs` gives the tools that each tool waits for, declared or inferred, or ALL_BEFORE.
    `limits` is how much of each resource there is for those that run together. `mistakes` are
    those of the tables, for --check; there are none where anything else gets a pipeline.
    """
    name: str
    tools: Dict[str, Tool]
    stages: Dict[str, Stage]
    needs: Dict[str, Union[str, Tuple[str, ...]]]
    limits: Dict[str, int]
    get_connection: Callable[[], Any]
    mistakes: Tuple[UserError, ...] = ()


class Success(NamedTuple):
    """A tool's last success, as history's view `successes` has it, or what passed of its items.

    `work` is the id of the attempt that did it, which stays the same while the tool is cached.
    `needed` gives the work that each tool it needs had done by then; `source` what ran, as
    describe_source() says, and `inputs` what its files were like: both are empty where that is
    not recorded. `result` is JSON, or None if that could not say it.
    """
    tool: str
    work: int
    run_id: str
    started_at: float
    ended_at: float
    rows: Optional[int]
    result: Optional[str]
    kind: str
    arguments: str
    source: Mapping[str, Any]
    inputs: str
    needed: Mapping[str, int]


class Past(NamedTuple):
    """What planning may ask of history, in functions. `now` is in seconds since the epoch.

    `find_whole_success` is of a success that says something of all the data with the arguments of
    this run: see History. `find_needed_works` gives the last work of each tool that one needs.
    `find_change` tells what changed in a tool itself since a success of it, or "". `done` are the
    tools that ended well in the run that is resumed. `is_forced` overrides cache, freshness and
    missing needs.
    """
    now: float
    find_success: Callable[[str], Optional[Success]]
    find_whole_success: Callable[[str], Optional[Success]]
    find_expected_s: Callable[[str], Optional[float]]
    find_needed_works: Callable[[str], Dict[str, int]]
    find_change: Callable[[Tool, Success], str]
    done: Mapping[str, Success] = {}
    is_forced: bool = False


class Step(NamedTuple):
    """One tool's place in a plan. `action` is run, cached, or skip: done before a resume.

    `needs` is what it waits for as its table says it; `edges` are the tools of the plan that it
    waits for directly, which say the same: see make_steps. `success` is what a tool that is not
    run again did when it was; `expected_s` is None where nothing is known of it.
    """
    tool: str
    wave: int
    action: str
    reason: str
    needs: Union[str, Tuple[str, ...]]
    edges: Tuple[str, ...] = ()
    expected_s: Optional[float] = None
    success: Optional[Success] = None


class Plan(NamedTuple):
    """What a run will do, in order, with `jobs` tools at most side by side.

    `critical_path` is the chain of tools that takes longest, `expected_s` what the whole run is
    expected to take; None if that is unknown of any tool.
    """
    steps: Tuple[Step, ...]
    critical_path: Tuple[str, ...]
    expected_s: Optional[float] = None
    jobs: int = 1


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
    given up; all if it is empty, none if it is None.
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
    retry: Optional[Tuple[str, ...]] = None


class Outcome(NamedTuple):
    """How a tool ended. `error` is one line, `traceback` the tool's own part of it, as text;
    `log` the file that holds what it printed, or ""; `kept` what keep_result() made of its
    result, where that is in another process; `items` how many items of a tool that has some
    were `listed`, were `given_up` before or `pending`, and of these `passed`, `failed`, or were
    done `elsewhere`.
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
    known = list(known)
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(map(repr, near)) + "?"
    return "Known: " + (", ".join(known[:20]) + (", ..." if len(known) > 20 else "") or "none")


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def parse_duration_s(value):
    """Return seconds, from a number of them or a text. Raise ValueError if it is neither.

    >>> parse_duration_s("1h30m"), parse_duration_s("7d"), parse_duration_s(0.5)
    (5400.0, 604800.0, 0.5)
    """
    if isinstance(value, str):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", value)
        if not parts or "".join(map("".join, parts)) != value.replace(" ", ""):
            raise ValueError(value)
        value = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if not is_number(value) or not 0 <= value < 1e12:
        raise ValueError(value)
    return float(value)


def parse_bytes(value):
    """Return bytes, from a number of them or a text. Raise ValueError if it is neither.

    >>> parse_bytes("512MB"), parse_bytes("1.5 KB"), parse_bytes(4096)
    (536870912, 1536, 4096)
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMGT]?B)", value)
        if not match:
            raise ValueError(value)
        value = int(float(match[1]) * _BYTES[match[2]])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ValueError(value)
    return value


def is_number(value):
    """Return whether a value is an int or a float; True and False are neither here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def merge_errors(errors):
    """Return one error that says all of them, so that nobody mends a table line by line."""
    return errors[0] if len(errors) == 1 else UserError("\n".join(map(str, errors)))


# === 2 SETUP ====================================================================================
# The user's tables become a Pipeline, or one sentence for each mistake in them. Every rule about
# the tables stands here. No input or output: whether a module exists is asked in CALLING.

def load_pipeline(tool_map, stages=None, get_connection=None, **more):
    """Return the checked tables. Raise UserError with every mistake that they hold."""
    pipeline = read_pipeline(tool_map, stages, get_connection, **more)
    if pipeline.mistakes:
        raise merge_errors(pipeline.mistakes)
    return pipeline


def read_pipeline(tool_map, stages=None, get_connection=None, *, name=None, limits=None):
    """Return what is right in the tables, with the mistakes in their rows.

    Raise UserError for tables that can not be read at all.
    """
    stages, limits = ({} if table is None else table for table in (stages, limits))
    check_table("TOOL_MAP", tool_map)
    check_table("STAGES", stages)
    check_table("LIMITS", limits)
    if not tool_map:
        raise UserError("TOOL_MAP is empty.", 'Add a tool to it: "fetch": "my_folder.fetch".')
    if get_connection is not None and not callable(get_connection):
        raise UserError(f"get_connection is {get_connection!r}, not a function.",
                        "Write `def get_connection():` and return a connection or None.")
    errors = []
    tools = make_all(errors, make_tool, tool_map)
    errors += find_unknown_needs(tools, tool_map)
    needs = find_needs(errors, tools)
    members = make_all(errors, make_members, stages)
    errors += find_unknown_members(tool_map, {**dict.fromkeys(stages, ()), **members})
    expanded = expand_stages(errors, tool_map, members)
    known = make_all(errors, make_limit, limits)
    errors += find_wrong_uses(tools, {**dict.fromkeys(limits, 0), **known})
    return Pipeline(name or "pipeline", tools, expanded, needs, known,
                    get_connection or no_connection, tuple(errors))


def no_connection():
    """Stand for get_connection in a pipeline without a database."""


def check_table(where, table):
    """Raise UserError if a table is no table."""
    if not isinstance(table, Mapping):
        raise UserError(f"{where} is {format_type(table)}, not a dict.",
                        f"Write {where} = {{...}}, names on the left.")


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
    if not name or name[0] in "-+" or name[-1] == "+" or name != name.strip() \
            or not name.isprintable():
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
    fields = {}
    errors = []
    for key, given in options.items():
        if key not in OPTIONS:
            errors.append(UserError(f"{where}: there is no option {key!r}.",
                                    format_nearest(str(key), OPTIONS)))
            continue
        field, read, wanted, example = OPTIONS[key]
        try:
            fields[field] = read(given)
        except (TypeError, ValueError):
            errors.append(UserError(f"{where}: {key!r} must be {wanted}, not {given!r}.",
                                    f'Write "{key}": {example}.'))
    if "module" not in options and not errors:
        errors.append(UserError(f"{where} names no module.", 'Add "module": "folder.module".'))
    if errors:
        raise merge_errors(errors)
    module, _, function = fields["module"].partition(":")
    return Tool(**{**fields, "name": name, "module": module, "function": function or "run"})


def make_limit(name, value):
    """Return a row of LIMITS. Raise UserError if it is none."""
    check_name("LIMITS", name)
    try:
        return read_positive(value)
    except ValueError:
        raise UserError(f"LIMITS[{name!r}] is {value!r}, not a whole number from 1 on.",
                        f'Write "{name}": 2 to let two units of it be used at a time.') from None


def accept(value, is_right):
    """Return a value that is right. Raise ValueError for another."""
    if not is_right:
        raise ValueError(value)
    return value


def read_module_path(value):
    """Return `package.module` or `package.module:function`. Raise ValueError for others."""
    module, colon, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    return accept(value, all(map(str.isidentifier, module.split(".")))
                  and (not colon or function.isidentifier()))


def read_names(value):
    """Return a list of texts; a single text stands for a list of it."""
    names = (value,) if isinstance(value, str) else value
    return tuple(dict.fromkeys(accept(names, isinstance(names, (list, tuple)) and all(
        name and isinstance(name, str) for name in names))))


def read_count(value, least=0):
    """Return a whole number, not less than `least`."""
    return accept(value, isinstance(value, int) and not isinstance(value, bool)
                  and value >= least)


def read_positive(value):
    """Return a whole number from 1 on."""
    return read_count(value, least=1)


def read_number(least, most):
    """Return a reader of numbers between two bounds."""
    return lambda value: float(accept(value, is_number(value) and least <= value <= most))


def read_choice(*choices):
    """Return a reader of one of some texts, or of True and False."""
    return lambda value: accept(value, isinstance(value, (str, bool)) and value in choices)


def read_uses(value):
    """Return the units of each resource, sorted by its name."""
    accept(value, isinstance(value, Mapping) and all(isinstance(name, str) for name in value))
    return tuple(sorted((name, read_positive(units)) for name, units in value.items()))


def read_positive_s(value):
    """Return a duration above zero, in seconds."""
    seconds = parse_duration_s(value)
    return accept(seconds, seconds > 0)


def read_cache_s(value):
    """Return how long a success is good for, in seconds; None where it is good for nothing."""
    if isinstance(value, bool):
        return float("inf") if value else None
    return read_positive_s(value)


_NAMES = 'a list of names'
_DURATION = 'a number of seconds or a text like "90s", "10m", "1h30m" or "7d"'
_FLAG = read_choice(True, False)

# option of a tool -> (field of Tool, how its value is read, that in words, an example)
OPTIONS: Dict[str, Tuple[str, Callable[[Any], Any], str, str]] = {
    "module": ("module", read_module_path, "a module path with dots", '"folder.module"'),
    # True: the tool looks after its transactions itself
    "commits": ("commits", _FLAG, "True or False", "True"),
    # the tools that must be done first; what reads X needs what writes X
    "needs": ("needs", read_names, _NAMES, '["fetch"]'),
    "reads": ("reads", read_names, _NAMES, '["raw_flights"]'),
    "writes": ("writes", read_names, _NAMES, '["flights"]'),
    # further attempts after a failed one, and how long to wait before each: see retry_delay_s
    "retries": ("retries", read_count, "a whole number from 0 on", "3"),
    "retry_delay": ("retry_delay_s", parse_duration_s, _DURATION, '"30s"'),
    "retry_factor": ("retry_factor", read_number(1, 1e6), "a number from 1 on", "2"),
    "retry_max_delay": ("retry_max_delay_s", parse_duration_s, _DURATION, '"1h"'),
    "retry_jitter": ("retry_jitter", read_number(0, 1), "a number from 0 to 1", "0.5"),
    # each of these three gives the tool a process group of its own
    "timeout": ("timeout_s", read_positive_s, _DURATION + ", above 0", '"10m"'),
    "memory": ("memory_bytes", parse_bytes, 'a number of bytes or a text like "512MB" or "2GB"',
               '"2GB"'),
    "isolate": ("isolate", _FLAG, "True or False", "True"),
    # what a failure means: skip what needs the tool, stop starting anything, or go on regardless
    "on_failure": ("on_failure", read_choice("skip", "stop", "continue"),
                   '"skip", "stop" or "continue"', '"skip"'),
    # "always": run after what the tool needs, whatever became of it
    "when": ("when", read_choice("ready", "always"), '"ready" or "always"', '"always"'),
    # units of the resources in LIMITS that it takes while it runs
    "uses": ("uses", read_uses, "a dict of whole numbers from 1 on", '{"db": 1}'),
    # how long it takes, until history knows better
    "estimate": ("estimate_s", parse_duration_s, _DURATION, '"5m"'),
    # not run again while nothing of it changed, for ever or that long
    "cache": ("cache_s", read_cache_s, 'True, False or a duration like "24h"', '"24h"'),
    # its items are those that ever passed this tool; so many of them are committed at a time
    "each": ("each", lambda value: accept(value, value and isinstance(value, str)),
             "the name of a tool with items", '"validate"'),
    "batch": ("batch", read_positive, "a whole number from 1 on", "500"),
    # how old its last success may be for those that need it and do not run it
    "fresh_for": ("fresh_for_s", read_positive_s, _DURATION + ", above 0", '"24h"'),
}


def make_members(name, value):
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


def find_unknown_members(tools, members):
    """Return an error for each name in a stage that is neither a tool nor a stage."""
    return [UserError(f"STAGES[{stage!r}]: no tool or stage {name!r}.",
                      format_nearest(name, map(str, [*tools, *members])))
            for stage, names in members.items() for name in names
            if name not in tools and name not in members]


def needs_of(tool):
    """Return the tools that a tool names as needed, by `needs` or `each`."""
    return (tool.needs or ()) + ((tool.each,) if tool.each else ())


def find_unknown_needs(tools, names):
    """Return an error for each need that is not among the names of all tools."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: no tool {need!r} to "
                      + ("take items of." if need == tool.each else "need."),
                      format_nearest(need, map(str, names)))
            for tool in tools.values() for need in needs_of(tool) if need not in names]


def find_wrong_uses(tools, limits):
    """Return an error for each use of a resource that is not there, or not in that number.

    A limit of 0 stands for one whose row is wrong.
    """
    errors = []
    for tool in tools.values():
        for resource, units in tool.uses:
            where = f"TOOL_MAP[{tool.name!r}]: uses {resource!r}"
            if resource not in limits:
                errors.append(UserError(
                    f"{where}, which LIMITS does not have.", format_nearest(resource, limits)
                    if limits else f'Write LIMITS = {{"{resource}": {units}}} above the mark.'))
            elif units > limits[resource] > 0:
                errors.append(UserError(f"{where} {units} times, but LIMITS has only "
                                        f"{limits[resource]}.",
                                        "Lower the one or raise the other."))
    return errors


def find_needs(errors, tools):
    """Return what each tool waits for: what it needs, and who writes what it reads.

    What nobody writes is an outside source. Where several write a name, who updates it, by reading
    it too, comes after those that only write it; each two writers must be in some order then; and
    who reads or writes the name needs the last of them that does not come after it. Add to errors
    writers that are in no order, and the circles in which tools need each other.
    """
    needs = {tool.name: dict.fromkeys(need for need in needs_of(tool) if need in tools)
             for tool in tools.values()}
    reads, writes = ({tool.name: getattr(tool, way) or () for tool in tools.values()}
                     for way in ("reads", "writes"))
    writers = invert(writes)
    shared = {name: found for name, found in writers.items() if len(found) > 1}
    for tool, names in reads.items():
        needs[tool].update((writer, None) for name in names if name not in shared
                           for writer in writers.get(name, ()) if writer != tool)
    if shared and not errors:  # a wrong row may order them
        errors += order_writers(needs, reads, shared)
    errors += [UserError(f"TOOL_MAP: tools need each other in a circle: {path}.",
                         "Take one of these needs out, or one of the reads or writes behind it.")
               for path in walk(needs)[1]]
    return {tool.name: ALL_BEFORE if tool.needs is tool.reads is tool.writes is tool.each is None
            else tuple(needs[tool.name]) for tool in tools.values()}


def order_writers(needs, reads, shared):
    """Add the needs of those that read or write what several tools write: see find_needs. Return
    an error for each two writers that could run in either order; then the rest is not added.
    """
    only, updates = ({name: [tool for tool in found if (name in reads[tool]) is does_read]
                      for name, found in shared.items()} for does_read in (False, True))
    add_last(needs, only, updates)
    errors = find_unordered(needs, shared)
    if not errors:
        readers = invert(reads)
        add_last(needs, shared, {name: found + readers.get(name, [])
                                 for name, found in shared.items()})
    return errors


def add_last(needs, writers, users):
    """Let each user of a name need the last of its writers that do not come after that user: the
    others are before it then.
    """
    order = Order(needs)
    for name, found in writers.items():
        mask = order.make_mask(found)
        for tool in users[name]:
            if tool in order.places:
                place = order.places[tool]
                last = order.find_last(mask & ~(order.after[place] | 1 << place))
                needs[tool].update(dict.fromkeys(last))


def invert(table):
    """Return, for {name: others}, which names have each of the others; all names are in it."""
    found = {name: [] for name in table}
    for name, others in table.items():
        for other in others:
            found.setdefault(other, []).append(name)
    return found


def find_unordered(needs, shared):
    """Return an error for each two of the last writers of a name that could run in either order."""
    from itertools import combinations, islice
    order, errors = Order(needs), []
    for name, found in shared.items():
        left = order.make_mask(found)
        while left:
            last = order.find_last(left)
            left &= ~order.make_mask(last)
            errors += [UserError(f"TOOL_MAP: {one!r} and {other!r} write {name!r} in no order.",
                                 f'Let one need the other: "needs": ["{one}"] in {other!r}.')
                       for one, other in islice(combinations(last, 2), 20)]
    return errors


class Order:
    """Which tool comes before which, directly or not.

    A set of tools is a mask, an int with the bit of each by its `places`, which are in an order
    that needs allow: so 10,000 tools with all that is `before` and `after` them fit in 25 MB, and
    what is asked of them takes microseconds. Tools in a circle or behind one have no place, since
    nobody can tell it before that is mended.
    """

    def __init__(self, needs):
        self.places = {}
        for tool in walk(needs)[0]:
            if all(need in self.places for need in needs[tool]):
                self.places[tool] = len(self.places)
        self.tools = list(self.places)
        edges = [(i, self.places[need]) for tool, i in self.places.items() for need in needs[tool]]
        self.before, self.after = [0] * len(self.tools), [0] * len(self.tools)
        for i, need in edges:
            self.before[i] |= self.before[need] | 1 << need
        for i, need in reversed(edges):
            self.after[need] |= self.after[i] | 1 << i

    def make_mask(self, tools):
        """Return the set of some tools."""
        return sum(1 << self.places[tool] for tool in tools if tool in self.places)

    def find_last(self, mask):
        """Return those tools of a set that come before no other of it."""
        last = []
        while mask:
            place = mask.bit_length() - 1
            mask &= ~(self.before[place] | 1 << place)
            last.insert(0, self.tools[place])
        return last


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
    """Return every stage with the tools it comes to; none, and errors, if one contains itself.

    A name that is both is the stage, but the tool inside the stage of that name.
    """
    inner = {stage: dict.fromkeys(name for name in names if name in members
                                  and (name != stage or name not in tools))
             for stage, names in members.items()}
    order, circles = walk(inner)
    if circles:
        errors += [UserError(f"STAGES: a stage contains itself: {path}.",
                             "Take one of them out of the other.") for path in circles]
        return {}
    found = {}
    for stage in order:
        found[stage] = tuple(dict.fromkeys(
            tool for name in members[stage]
            for tool in (found[name] if name in inner[stage] else (name,))))
    errors += [UserError(f"STAGES[{stage!r}]: a tool has this name too and is not in the stage, so "
                         "that nothing could name it.", "Rename the one or the other.")
               for stage in found
               if stage in tools and stage not in found[stage] and {*found[stage]} <= {*tools}]
    return {stage: Stage(stage, names, found[stage]) for stage, names in members.items()}


def check_arguments(arguments):
    """Raise UserError if tools could not get this as arguments by name."""
    check_table("arguments", arguments)
    for name in arguments:
        if not isinstance(name, str):
            raise UserError(f"arguments: the name {name!r} is {format_type(name)}, not text.",
                            "Put it in quotes.")
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
              describe=None):
    """Return the plan for some targets; without any, of the stage `full` or else of all tools.

    Without `past` nothing is known of earlier runs, and everything is to be run. `describe` tells
    how a tool runs, if there is something to tell. Raise UserError for a word that is neither a
    stage nor a tool, if nothing is left to run, and if a tool needs one that is not in the plan
    and has no success that is fresh enough.
    """
    targets = read_targets("targets", targets)
    exclude = read_targets("exclude", exclude)
    if not isinstance(start_from, (str, type(None))):
        raise UserError(f"start_from is {start_from!r}, not a name.",
                        'Give one stage or tool: start_from="fetch".')
    if not targets and DEFAULT_STAGE in pipeline.stages:
        targets = [DEFAULT_STAGE]
    reasons = {}
    for target in targets:
        for tool, reason in expand_reasons(pipeline, target).items():
            reasons.setdefault(tool, reason)
    if not targets:
        reasons = dict.fromkeys(pipeline.tools, "in TOOL_MAP")
    order = sort_by_needs(reasons, find_needs_within(pipeline, reasons))
    order = leave_out(pipeline, order, exclude, start_from)
    if not order:
        raise UserError("Nothing is left to run.", "Name a target that holds a tool, or take "
                        "something out of --exclude; --list shows them all.")
    if past:
        check_needs_met(pipeline, order, past)
    redo = {}
    while True:
        steps = make_steps(pipeline, order, reasons, past, redo, describe)
        lost = find_lost_results(steps)
        if not lost:
            break
        redo.update(lost)
    expected_s = None if any(step.expected_s is None for step in steps) \
        else simulate(Schedule(steps, pipeline, jobs), durations_of(steps), jobs)
    return Plan(tuple(steps), find_critical_path(steps), expected_s, jobs)


def check_needs_met(pipeline, order, past):
    """Raise UserError for each need outside the plan whose tool has no success fresh enough."""
    there = set(order)
    errors = []
    for tool in [] if past.is_forced else order:
        needs = pipeline.needs[tool]
        if needs == ALL_BEFORE or tool in past.done or pipeline.tools[tool].when == "always":
            continue
        missing = [f"{need}, which {why}" for need in needs if need not in there
                   for why in [find_staleness(pipeline.tools[need], past)] if why]
        if missing:
            errors.append(UserError(
                f"{tool} needs what is not in this plan: {'; '.join(missing)}.",
                f"Run that too: +{tool} takes all that {tool} needs; or go on without: --force."))
    if errors:
        raise merge_errors(errors)


def find_staleness(tool, past):
    """Return why the last success of a tool is not good enough for those that need it, or ""."""
    success = past.find_success(tool.name)
    if success is None:
        return "has never succeeded"
    if tool.fresh_for_s == float("inf"):
        return ""
    success = past.find_whole_success(tool.name)
    if success is None:
        return (f"has no success to be fresh for {format_duration(tool.fresh_for_s)}: other "
                "arguments, a backfill, a single item, and some of its items only, do not count")
    if is_young(success, tool.fresh_for_s, past.now):
        return ""
    return (f"succeeded {format_age(success, past.now)}, in run {success.run_id}, and is fresh "
            f"for {format_duration(tool.fresh_for_s)}")


def is_young(success, limit_s, now):
    """Return whether a success is not older than a limit; one in the future has no known age."""
    return limit_s == float("inf") or 0 <= now - success.ended_at <= limit_s


def format_age(success, now):
    """Return how long ago a success was, in words."""
    if now < success.ended_at:
        return "in the future, if the clock is right"
    return format_duration(now - success.ended_at) + " ago"


def decide(pipeline, tool, ran, redo, past):
    """Return the action for a tool, the reason for it, and the success that it rests on, if any.

    `ran` is a tool that it waits for and that will run, if there is one; `redo` are the tools that
    must run again, and why.
    """
    done = past.done.get(tool)
    cache_s = None if past.is_forced else pipeline.tools[tool].cache_s
    success = done or (past.find_success(tool) if cache_s else None)
    if success is None or tool in redo:
        return "run", redo.get(tool, ""), None
    if ran is not None:
        return "run", f"again, because {ran} will run", None
    if done:
        return "skip", f"succeeded in run {done.run_id}", done
    if not success.source:
        return "run", f"what it was in run {success.run_id} is not recorded", None
    needed = past.find_needed_works(tool)
    if {*needed} != {*success.needed}:
        return "run", f"its needs changed since run {success.run_id}", None
    if needed != success.needed:
        return "run", f"what it needs has run since run {success.run_id}", None
    if not is_young(success, cache_s, past.now):
        return "run", f"succeeded {format_age(success, past.now)}", None
    change = past.find_change(pipeline.tools[tool], success)
    if change:
        return "run", f"{change} since run {success.run_id}", None
    return "cached", f"unchanged since run {success.run_id}", success


def find_lost_results(steps):
    """Return the tools that must run again for their results, which are not kept, and why."""
    lost = {}
    waiting = {}  # need -> a tool that will run and waits for it
    in_line = ""  # a tool that will run and waits for all before it
    for step in reversed(steps):
        who = waiting.get(step.tool) or in_line
        if step.success and step.success.result is None and who:
            lost[step.tool] = f"{who} needs its result, {step.success.kind}, which is not kept"
        if step.action == "run" or step.tool in lost:
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


def make_steps(pipeline, order, reasons, past, redo, describe):
    """Return the steps for tools in an order that their needs allow.

    A tool that waits for all before it has edges to the last such tool, which waits for all before
    that, and to what came in between: so there are never many more edges than tools and needs.
    """
    steps = {}
    since = []  # the last tool that waits for all before it, and what came after it
    for tool, needs in find_needs_within(pipeline, dict.fromkeys(order)).items():
        options = pipeline.tools[tool]
        edges = since if needs == ALL_BEFORE else [need for need in needs if need in steps]
        ran = next((each for each in edges if steps[each].action == "run"), None)
        action, why, success = decide(
            pipeline, tool, ran, redo, past) if past else ("run", "", None)
        expected_s = 0.0 if success else (past and past.find_expected_s(tool)) or options.estimate_s
        reason = why if success else "; ".join(filter(None, [
            reasons[tool], why, describe and describe(options)]))
        wave = 1 + max((steps[each].wave for each in edges), default=0)
        steps[tool] = Step(tool, wave, action, reason, needs, tuple(edges), expected_s, success)
        if needs == ALL_BEFORE:
            since = []
        since.append(tool)
    return list(steps.values())


def expand_reasons(pipeline, target):
    """Return the tools that a target means, with the reason why each is in the plan.

    `+tool` adds what the tool needs, directly or not, `tool+` what needs it; both follow needs
    that are declared or inferred.
    """
    name = target[target.startswith("+"):len(target) - target.endswith("+")]
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


def find_needs_within(pipeline, planned):
    """Return what each tool of a plan needs.

    Who reads or writes a name needs the last of its writers, which needs the one before. Where
    that last one is not in the plan, the one before takes its place, so that no two who use a name
    are ever at it at once.
    """
    found = {}
    for tool in planned:
        needs = pipeline.needs[tool]
        left = [] if needs == ALL_BEFORE else [need for need in needs if need not in planned]
        if left:
            used = {*(pipeline.tools[tool].reads or ()), *(pipeline.tools[tool].writes or ())}
            for need in left:  # which grows
                if need not in planned and used.intersection(pipeline.tools[need].writes or ()):
                    left += [each for each in pipeline.needs[need] if each not in left
                             and used.intersection(pipeline.tools[each].writes or ())]
            needs = tuple(dict.fromkeys((*needs, *left)))
        found[tool] = needs
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


def durations_of(steps):
    """Return the seconds to reckon with for each tool; for an unknown one, the mean of the rest."""
    known = [step.expected_s for step in steps if step.expected_s is not None]
    mean_s = sum(known) / len(known) if known else 1.0
    return {step.tool: mean_s if step.expected_s is None else step.expected_s for step in steps}


def find_critical_path(steps):
    """Return the chain of tools, each waiting for the one before it, that takes longest."""
    ways_s, after = find_ways_s(steps), invert({step.tool: step.edges for step in steps})
    path, following = [], ways_s
    while following:
        path.append(max(following, key=ways_s.__getitem__))
        following = after[path[-1]]
    return tuple(path)


def find_ways_s(steps):
    """Return for each tool the seconds from its start to the end, on the longest way there."""
    durations_s = durations_of(steps)
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

    State: `missing`, how many edges of each tool lead to what is not settled; `ready`, a heap for
    each set of uses, since those with the same uses have room together; `free`, what is left of
    the limits.
    """

    def __init__(self, steps, pipeline, jobs=2):
        self.tools = pipeline.tools
        self.position = {step.tool: i for i, step in enumerate(steps)}
        self.rank = self.position
        if jobs > 1:
            ways_s = find_ways_s(steps)
            self.rank = {tool: (-ways_s[tool], i) for tool, i in self.position.items()}
        self.after = invert({step.tool: step.edges for step in steps})
        self.missing = {step.tool: len(step.edges) for step in steps}
        self.ready = {}
        self.free = dict(pipeline.limits)

    def begin(self):
        """Return the tools that wait for nothing from the start."""
        return [tool for tool, count in self.missing.items() if not count]

    def done(self, tool):
        """Note a tool as settled and return those that wait for nothing any more."""
        for each in self.after[tool]:
            self.missing[each] -= 1
        return [each for each in self.after[tool] if not self.missing[each]]

    def add(self, tool):
        """Make a tool ready."""
        heappush(self.ready.setdefault(self.tools[tool].uses, []), (self.rank[tool], tool))

    def next(self):
        """Take the best ready tool for which there is room, and its room; None if there is none."""
        heaps = [heap for uses, heap in self.ready.items() if heap and self._has_room(uses)]
        if not heaps:
            return None
        _, tool = heappop(min(heaps))  # which their best, at the front, decide
        self.take(tool)
        return tool

    def _has_room(self, uses):
        return all(units <= self.free[resource] for resource, units in uses)

    def take(self, tool):
        """Take room for one more worker of a tool that runs; return False if there is none."""
        uses = self.tools[tool].uses
        if not self._has_room(uses):
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
        tools = [tool for heap in self.ready.values() for _, tool in heap]
        self.ready.clear()
        return sorted(tools, key=self.position.__getitem__)


def simulate(schedule, durations_s, jobs):
    """Return the seconds that a plan takes if every tool takes what is expected of it."""
    now_s, running = 0.0, []  # type: float, List[Tuple[float, str]]
    freed = schedule.begin()
    while True:
        for tool in freed:
            schedule.add(tool)
        while len(running) < jobs:
            tool = schedule.next()
            if tool is None:
                break
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


STEPS = ("day", "week", "month")


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
    if len(begun) == len(periods):
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
        is_early = find_day(began_at) < period.end
        is_left = status == "success" and not is_early or status == "failed" \
            and reprocess != "failed"
        action = "run" if reprocess == "all" else "skip" if is_left \
            else "run" if is_early else "resume"
        how = {"success": "done", "failed": "failed"}.get(status, "interrupted")
        reason = ("again, " * (how == "done" and reprocess == "all") + f"{how} in run {run_id}"
                  + "; see --reprocess" * (how == "failed" and action == "skip"))
        if is_early and action == "run":
            reason += ", which ran before the period was over"
    if action != "skip" and today < period.end:
        reason += "; it is not over yet"
    return period._replace(action=action, reason=reason, run_id=run_id)


def leave_out(pipeline, order, exclude, start_from):
    """Return the tools that --exclude and --from leave, in order."""
    excluded = {tool for name in exclude for tool in expand_reasons(pipeline, name)}
    if start_from is not None:
        first = set(expand_target(pipeline, start_from))
        start = next((i for i, tool in enumerate(order) if tool in first), None)
        if start is None:
            raise UserError(f"--from: {start_from!r} is not in this plan.",
                            format_nearest(start_from, order))
        order = order[start:]
    return [tool for tool in order if tool not in excluded]


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

SCHEMA_VERSION = 4
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
-- The attempts that ended well, with the work that each of them did, or rests on: its own, or that
-- of the success that still stood.
CREATE VIEW successes AS
    SELECT a.attempt_id, a.run_id AS of_run, a.status, a.tool, w.attempt_id AS work,
           CAST(w.run_id AS TEXT) AS run_id, w.started_at,
           w.started_at + coalesce(w.duration_s, 0.0) AS ended_at, w.rows, w.result,
           coalesce(w.kind, '') AS kind, r.item, r.arguments, coalesce(w.source, '') AS source,
           coalesce(w.inputs, '') AS inputs, coalesce(w.needed, '{}') AS needed
    FROM attempts a CROSS JOIN attempts w ON w.attempt_id = a.work AND w.tool = a.tool
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
    sources       TEXT NOT NULL      -- JSON object: module -> fingerprint of its file
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
    work          INTEGER,           -- success, partial: its own attempt_id; cached: that of the
                                     -- success that still stands; else NULL
    rows          INTEGER,           -- NULL if the tool did not say
    result        TEXT,              -- JSON of what it returned; NULL if JSON can not say that
    kind          TEXT,              -- type of such a result: 'a DataFrame'; else NULL
    error         TEXT,              -- one line; NULL if there was none
    traceback     TEXT,
    log           TEXT,              -- file, seen from this folder; NULL if nothing was printed
    source        TEXT,              -- cached tools: JSON, what ran: see describe_source()
    inputs        TEXT,              -- cached tools: JSON, the files that they read and write
    needed        TEXT,              -- cached tools: JSON object, needed tool -> its work then
    items         TEXT               -- JSON object, counts of its items: see Outcome; NULL for a
                                     -- tool without items
);
CREATE INDEX attempts_of_tool ON attempts (tool);
""" + VIEWS
UPGRADES = {  # schema version -> the statements that lead to the next one
    1: "ALTER TABLE attempts ADD COLUMN items TEXT;",
    2: """
ALTER TABLE runs ADD COLUMN item TEXT;
UPDATE runs SET item = '' WHERE words LIKE '%"-' || '-item"%' OR words LIKE '%"-' || '-item=%';
""",  # two hyphens side by side would begin a comment
    3: VIEWS,
}

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


class Versions(NamedTuple):
    """What ran: the fingerprint of the tables, and that of each module's file."""
    tables: str
    sources: Dict[str, str]


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
            os.makedirs(home, 0o700, exist_ok=True)  # another start may be as far
            write_private(os.path.join(home, ".gitignore"), "*\n")
        os.makedirs(os.path.join(folder, "logs"), 0o700, exist_ok=True)
        os.chmod(folder, 0o700)
    except OSError as error:
        raise refused(folder, error) from error


def write_private(path, text=""):
    """Create a file that only its owner can read, if it is not there."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        if not file.tell():
            file.write(text.encode())


def refused(path, error):
    """Return the sentence for a folder or file of the history that can not be used."""
    text = getattr(error, "strerror", None) or str(error)
    if "not a database" in text or "malformed" in text:
        return UserError(f"{path} is damaged: {text}.",
                         "Nothing was changed in it. Move it away to begin a new history, or run "
                         "without one: --no-history.")
    return UserError(f"The history can not be used, {path}: {text}.",
                     "Mend that, choose another folder in the environment variable "
                     "ORCHESTRATOR_HOME, or run without history: --no-history.")


# Lock files that this very process holds, and by which Lock of it, since the kernel only keeps
# processes apart. A program has this module twice if a tool of it imports it by its name.
_held = vars(sys).setdefault("_orchestrator_held", {})
_WORKER_BYTES = 2**30  # byte 0 of the lock file is the run's, these many after it the workers'


class Lock:
    """Keeps runs of one pipeline apart, by locks on bytes of a file, which the kernel frees.

    Byte 0 belongs to the run, one byte after it to each worker. So the lock of a run that was
    killed is free when the last of its workers is gone. No other code of this process may open
    the file: to close it would free the locks (fcntl(2)).
    """

    def __init__(self, folder):
        self.path = os.path.realpath(os.path.join(folder, "lock"))
        self.fd = None

    def take(self):
        """Take the lock and return ""; or who has it, "run" or "worker"."""
        if _held.setdefault(self.path, self) is not self:  # which no other thread can tear
            return "run"
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            self.fd = open_lock(self.path)
            if not lock_bytes(self.fd, 0, 1):
                return "run"
            if not lock_bytes(self.fd, 1, _WORKER_BYTES):
                return "worker"
            lock_bytes(self.fd, 1, _WORKER_BYTES, free=True)
            undo.pop_all()
        return ""

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
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise refused(path, error) from error


def lock_bytes(fd, first, count, free=False):
    """Lock bytes of a file, or free them; return False if another process has one of them."""
    try:
        if os.name == "nt":
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
        write_private(path)
    db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA synchronous = NORMAL")
    head = db.execute(_HEAD).fetchone()
    # SQLite takes the missing end of a file for pages of zeros; with a log of changes beside it
    # (`-wal`) it may well be shorter.
    if head["size"] and not has_bytes(path + "-wal") and head["size"] > os.path.getsize(path):
        raise sqlite3.DatabaseError("it is malformed, its end is missing")
    if head["is_foreign"]:
        raise UserError(f"{path} is a database of something else.",
                        "Move it away, or choose another folder in ORCHESTRATOR_HOME.")
    if head["version"] > SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {head['version']}, and this engine, "
                        f"{VERSION}, knows {SCHEMA_VERSION}.",
                        "Use the newer orchestrator.py that wrote it.")
    db.execute("PRAGMA wal_autocheckpoint = 4000")
    if head["version"] < SCHEMA_VERSION:
        db.execute("PRAGMA page_size = 1024")  # a commit writes whole pages
        use_wal(db)
        upgrade(db, head["version"])
    return db


def use_wal(db):
    """Let nobody who reads a history wait for who writes to it."""
    import sqlite3
    for tries_left in range(50, -1, -1):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if not tries_left:
                raise
        db.execute("BEGIN IMMEDIATE")  # waits for another who is at it, which the above does not
        db.execute("COMMIT")


def upgrade(db, version):
    """Bring a history to the schema of this engine, or create it, in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    if db.execute("PRAGMA user_version").fetchone()[0] == version:  # else another start was first
        steps = [UPGRADES[each] for each in range(version, SCHEMA_VERSION)] if version else [SCHEMA]
        for statement in re.sub(r"--.*", "", "".join(steps)).split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def load_source(text):
    """Return what ran at a success; {} where that is not recorded, or only the fingerprint of a
    syntax tree: engines before this one did not say which function they had called, nor how.
    """
    import json
    return json.loads(text) if text.startswith("{") else {}


_STARTED = """
    WITH RECURSIVE chain (run_id) AS (  -- a run, and those that it goes on with
        SELECT ? UNION
        SELECT r.resumes FROM runs r JOIN chain USING (run_id) WHERE r.resumes IS NOT NULL)
    SELECT coalesce((SELECT started_at FROM attempts WHERE tool = ? AND attempt > 0
                     AND run_id IN chain ORDER BY attempt_id DESC LIMIT 1),
                    (SELECT min(started_at) FROM runs WHERE run_id IN chain))
"""


class Store:
    """What a history is kept in: a database in its folder, opened at the first use; or without a
    folder in memory, an empty one in which nothing is recorded.
    """

    def __init__(self, folder):
        self.folder = folder
        self.path = os.path.join(folder, "history.db") if folder else MEMORY
        self.killed = None  # the run that reads as interrupted, until the next start records that
        self.is_changed = False  # whether something is recorded that is not yet durable
        self._cursor = None  # one for all: to make one each time costs time

    def do(self, sql, values=()):
        """Execute a statement. Raise UserError if the file does not take it."""
        import sqlite3
        try:
            if self._cursor is None:
                self._cursor = open_database(self.path).cursor()
            return self._cursor.execute(sql, values)
        except (sqlite3.Error, OSError) as error:
            raise refused(self.path, error) from error

    def load(self, sql, *values):
        """Return the rows of a query, as dicts by column."""
        rows = list(map(dict, self.do(sql, values)))
        for row in rows if self.killed else ():
            if row.get("run_id") == self.killed and row.get("status") == "running":
                row["status"] = "interrupted"
        return rows

    def ask(self, sql, *values):
        """Return the first value of a query; None if there is no row."""
        row = self.do(sql, values).fetchone()
        return row and row[0]

    def change(self, sql, values=()):
        """Execute a statement that commit() makes durable, and return the id of a row that it made.
        In memory nothing is recorded: it would cost time, and nobody can ask for it later.
        """
        if not self.folder:
            return 0
        if not self.is_changed:
            self.do("BEGIN")
            self.is_changed = True
        return self.do(sql, values).lastrowid

    def commit(self):
        """Make durable what was recorded."""
        if self.is_changed:
            self.do("COMMIT")
            self.is_changed = False

    def close(self):
        """Let go of the file; the next use opens it again."""
        if self._cursor is not None:
            self._cursor.connection.close()
            self._cursor = None
            self.is_changed = False


class Archive(Store):
    """What planning and views ask of a history.

    State: `found`, the successes that were asked for, by tool and arguments; `order` of the tools
    in TOOL_MAP, their `places` there, and `newest`, by place, the newest work of those before it,
    as far as somebody asked.
    """

    def __init__(self, folder):
        super().__init__(folder)
        self.found, self.order, self.places, self.newest = {}, [], {}, [0]

    def forget(self, tool):
        """Note that a tool has a new success."""
        self.found.pop(tool, None)
        if tool in self.places:
            del self.newest[self.places[tool] + 1:]

    def load_successes(self, which, *values):
        """Return rows of the view `successes`."""
        import json
        rows = self.load(f"SELECT {', '.join(Success._fields)} "  # noqa: S608 - our columns
                         f"FROM successes {which}", *values)
        return [Success(**{**row, "needed": json.loads(row["needed"]),
                           "source": load_source(row["source"])}) for row in rows]

    def find_success(self, tool, arguments=None):
        """Return the last success of a tool, or of some of its items; or with arguments, as they
        are recorded, the last that says something of all the data with these: not of a period, if
        there is none among them, not of a single item, not of some items only.
        """
        found = self.found.setdefault(tool, {})
        if arguments not in found:
            successes = self.load_successes(
                "WHERE tool = ? AND (? IS NULL OR status = 'success' AND item IS NULL "
                "AND arguments = ?) ORDER BY attempt_id DESC LIMIT 1", tool, arguments, arguments)
            found[arguments] = successes[0] if successes else None
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
        if not self.order:
            self.order = list(pipeline.tools)
            self.places = {name: place for place, name in enumerate(self.order)}
        while len(self.newest) <= self.places[tool]:
            before = self.order[len(self.newest) - 1]
            self.newest.append(max(self.newest[-1], find_work(before)))
        return {ALL_BEFORE: self.newest[self.places[tool]]}

    def find_expected_s(self, tool):
        """Return the median of the seconds that a tool's last successes took."""
        return self.ask("""
            WITH last AS (SELECT duration_s FROM attempts WHERE tool = ? AND attempt > 0
                          AND status = 'success' AND duration_s IS NOT NULL
                          ORDER BY attempt_id DESC LIMIT 11)
            SELECT duration_s FROM last ORDER BY duration_s
            LIMIT 1 OFFSET (SELECT count(*) / 2 FROM last)
            """, tool)

    def find_done(self, run_id):
        """Return the tools that ended well in a run or were done before it."""
        return {success.tool: success for success in self.load_successes(
            "WHERE status <> 'partial' AND attempt_id IN (SELECT attempt_id FROM attempts_of_runs "
            "WHERE of_run = ?) ORDER BY attempt_id", run_id)}

    def find_started_at(self, tool, run_id):
        """Return when the last attempt of a tool began in a run or in those that it goes on with;
        if there was none, as there is of the tool "", when the first of these runs began.
        """
        return self.ask(_STARTED, run_id, tool)

    def find_resumable(self, run_id):
        """Return the run that a resume goes on with: the last of the runs that resumed it.

        Without an id, of the last run that did not succeed. Raise Settled if there is nothing
        to resume.
        """
        if run_id is None:
            run_id = self.ask("SELECT max(run_id) FROM runs WHERE status <> 'success'")
            if run_id is None:
                raise Settled("There is nothing to resume: no run failed or was interrupted.")
        run_id = self.find_run(run_id)["run_id"]
        resumed_in = {row["resumes"]: row["run_id"] for row in self.load(
            "SELECT resumes, run_id FROM runs WHERE resumes IS NOT NULL ORDER BY run_id")}
        while run_id in resumed_in:
            run_id = resumed_in[run_id]
        good = self.ask(
            "SELECT a.run_id FROM runs a, runs b WHERE b.run_id = ? AND a.run_id >= b.run_id "
            "AND a.status = 'success' AND a.targets = b.targets AND a.exclude = b.exclude "
            "AND a.start_from IS b.start_from AND a.item IS b.item "
            "AND a.arguments = b.arguments LIMIT 1", run_id)
        if good:
            raise Settled(f"There is nothing to resume: run {good} did all of "
                          f"{'it' if good == run_id else f'run {run_id}'}.")
        return self.find_run(run_id)

    def hold_still(self):
        """Let all that is read from now on tell of one moment."""
        self.do("BEGIN")

    def load_runs(self, which, *values):
        """Return rows of `runs`, with what is JSON in them read."""
        import json
        runs = self.load(f"SELECT * FROM runs {which}", *values)  # noqa: S608 - text of our own
        for run in runs:
            for name in ("targets", "exclude", "arguments", "words", "sources"):
                run[name] = run[name] and json.loads(run[name])
        return runs

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

    def load_last_like(self, request):
        """Return, by arguments as they are recorded, the last run with each of the same targets
        and item.
        """
        return {row["arguments"]: row for row in map(dict, self.do(
            "SELECT max(run_id) AS run_id, status, arguments FROM runs WHERE targets = :targets "
            "AND exclude = :exclude AND start_from IS :start_from AND item IS :item "
            "GROUP BY arguments", make_columns(request)))}

    def load_attempts(self, run_id):
        """Return the rows of `attempts` of a run, in the order in which they began."""
        return self.load("SELECT * FROM attempts_of_runs WHERE of_run = ? ORDER BY attempt_id",
                         run_id)

    def find_called_in(self, tool):
        """Return the run in which a tool was called last; None if it never was."""
        return self.ask("SELECT run_id FROM attempts WHERE tool = ? AND attempt > 0 "
                        "ORDER BY attempt_id DESC LIMIT 1", tool)

    def load_last_attempts(self):
        """Return the rows of the view `last_attempts` by tool."""
        return {row["tool"]: row for row in self.load("SELECT * FROM last_attempts")}


class History(Archive):
    """The history of a pipeline, in its folder, where only who holds its lock writes to it; or,
    without a folder, one that is empty.

    `base` is the folder from which the pipeline names files. State: `run_id` of the run that is
    recorded; `arguments` of it, as recorded, or None for a backfill, which has no last success;
    `open`, the attempt_id of each attempt that runs.
    """

    def __init__(self, folder="", base=""):
        super().__init__(folder)
        self.base, self.run_id, self.arguments, self.open = base, 0, None, {}

    def find_last_success_at(self, tool):
        """Return when the last success of a tool with the arguments of this run began."""
        success = self.arguments and self.find_success(tool, self.arguments)
        return success and success.started_at

    def insert(self, tool, attempt, status, at, pid=None, reason="", work=None, rows=None):
        """Record a row of `attempts`, and return its id."""
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
        logs, tools = find_logs(self.folder, str(killed["run_id"])), []
        for attempt in self.load_attempts(killed["run_id"]):
            if attempt["status"] == "running":
                log = find_log(logs, attempt["tool"], attempt["attempt"])
                self.update(attempt["attempt_id"], {
                    "status": "interrupted", "reason": "its run was cut off",
                    "log": has_bytes(log) and os.path.relpath(log, self.folder) or None})
                tools.append(attempt["tool"])
        self.run_id = killed["run_id"]
        self.end_run("interrupted", None)
        return str(self.run_id), tools


    def begin_run(self, plan, request, arguments, versions, at):
        """Record a run, with the tools that it need not do, and return its id; where no history is
        kept, one that sorts by its start: `20130101T060000Z-1a2b`.
        """
        text = format_arguments(arguments)
        self.arguments = None if has_period(arguments) else text
        if not self.folder:
            return time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(at)) + os.urandom(2).hex()
        import json
        row = {
            **make_columns(request), "status": "running", "arguments": text,
            "planned": len(plan.steps), "started_at": at, "pid": os.getpid(),
            "first_attempt": 1 + (self.ask("SELECT max(attempt_id) FROM attempts") or 0),
            "version": VERSION, "git_commit": find_git_commit(self.base),
            "tables": versions.tables, "sources": json.dumps(versions.sources)}
        self.run_id = self.change(f"INSERT INTO runs ({', '.join(row)}) "  # noqa: S608 - columns
                                  f"VALUES (:{', :'.join(row)})", row)
        for step in plan.steps:
            if step.success:
                self.insert(step.tool, 0, "cached", at, None, step.reason, step.success.work,
                            step.success.rows)
        self.commit()
        return str(self.run_id)

    def begin_attempt(self, tool, attempt, at, pid):
        """Record that an attempt begins."""
        self.open[tool] = self.insert(tool, attempt, "running", at, pid)

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
        row = {"status": outcome.status, "duration_s": outcome.duration_s, "rows": outcome.rows,
               "reason": outcome.reason, "error": outcome.error,
               "traceback": outcome.traceback.encode("utf-8", "backslashreplace").decode(),
               "log": outcome.log and os.path.relpath(outcome.log, self.folder), **facts}
        if outcome.status in ("success", "partial"):
            row["work"] = attempt_id
            row["result"], row["kind"] = outcome.kept or keep_result(outcome.result)
            self.forget(tool)
        self.update(attempt_id, row)

    def note(self, tool, outcome, at):
        """Record why there was no attempt."""
        self.insert(tool, 0, outcome.status, at, None, outcome.reason)

    def end_run(self, status, duration_s):
        """Record how a run ended."""
        self.change("UPDATE runs SET status = ?, duration_s = ? WHERE run_id = ?",
                    (status, duration_s, self.run_id))
        self.commit()

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


def make_columns(request):
    """Return a request as columns of `runs`."""
    import json
    return {name: json.dumps(value) if isinstance(value, (tuple, list)) else value
            for name, value in request._asdict().items()}


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

    texts = []
    for name, value in sorted(arguments.items()):
        try:
            text = json.dumps(value, default=describe, sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            text = json.dumps(describe(value))
        texts.append(f"{json.dumps(name)}: {text}")
    return "{" + ", ".join(texts) + "}"


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
    with contextlib.suppress(OSError, ValueError):  # a repository of a kind that we do not know
        name = read_file(os.path.join(git, "HEAD")).partition("ref: ")[2]
        for file in ("HEAD", name, "packed-refs"):
            if os.path.isfile(os.path.join(git, file)):
                commit = re.search(rf"^([0-9a-f]{{40,64}})( {re.escape(name)})?$",
                                   read_file(os.path.join(git, file)), re.M)
                if commit:
                    return commit[1]
    return None


def read_file(path):
    """Return a small text file, without blanks around it."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def find_reads(tool, base, known):
    """Return size, time of change and content's fingerprint of the files that a tool reads.

    Names are seen from the folder `base`; those that are no files or folders, such as tables, do
    not count. The fingerprint is taken from `known`, the state at another time, where size and
    time are the same.
    """
    files = {}
    for name in tool.reads or ():
        top = os.path.join(base, name)
        inside = [os.path.join(folder, each) for folder, _, names in os.walk(top) for each in names]
        for path in filter(os.path.isfile, sorted(inside) or [top]):  # no pipes, no broken links
            shown = os.path.relpath(path, base).replace(os.sep, "/")
            try:
                stat = os.stat(path)
                size_time = [stat.st_size, stat.st_mtime_ns]
                same = known.get(shown, [None])[:2] == size_time
                files[shown] = [*size_time, known[shown][2] if same else hash_file(path)]
            except OSError:
                files[shown] = [0, 0, ""]  # its tool will tell, if it matters
    return files


def find_writes(tool, base):
    """Return those of the names that a tool writes that are files or folders."""
    return [name for name in tool.writes or () if os.path.exists(os.path.join(base, name))]


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
    import json
    old = json.loads(inputs or "{}")
    old_reads = old.get("reads", {})
    new_reads = find_reads(tool, base, old_reads)
    for name in [*new_reads, *old_reads]:
        if (name in old_reads) != (name in new_reads):
            return f"{name} is {'new' if name in new_reads else 'gone'}"
        if old_reads[name][2] != new_reads[name][2]:
            return f"{name} changed"
    writes = find_writes(tool, base)
    return next((f"{name} is gone" for name in old.get("writes", ()) if name not in writes), "")


def find_logs(folder, run_id):
    """Return the folder for the logs of a run."""
    return os.path.join(folder, "logs", run_id)


def find_log(logs, tool, attempt):
    """Return the file for what an attempt prints."""
    return f"{logs}{os.sep}{make_file_name(tool)}.{attempt}.log"


def has_bytes(path):
    """Return whether a file is there and not empty."""
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def open_log(path):
    """Return a log, opened to append to it; its folder is made again if somebody removed it."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def append_log(path, line):
    """Add a line to a log."""
    with open(open_log(path), "ab") as file:
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def tidy_log(path):
    """Remove a log without a byte, and trim one that is too long."""
    if has_bytes(path):
        trim_log(path)
    elif os.path.exists(path):
        os.unlink(path)


def trim_log(path, cap_bytes=LOG_CAP_BYTES):
    """Cut a file that is too long to its beginning and its end, and say there what was left out."""
    size = os.path.getsize(path)
    if size <= cap_bytes:
        return
    half = cap_bytes // 2
    with open(path, "r+b") as file:
        file.seek(size - half)
        end = file.read()
        file.seek(half)
        file.write(b"\n[... %d bytes were left out here ...]\n" % (size - 2 * half))
        file.write(end)
        file.truncate()


def read_tail(path, lines, line_bytes=1000):
    """Return the last lines of a log, cut to their ends where they are very long, in which
    nothing can take hold of a terminal.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - lines * line_bytes - (1 << 16)))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line[-line_bytes:] for line in clean(text).splitlines()[-lines:]] if lines else []


_ESCAPES = (r"\x1b(\[[0-?]*[ -/]*[@-~]|[\]P^_X][^\x07\x1b]*(\x07|\x1b\\)?|[ -~]?)"  # of terminals
            r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text):
    """Return a text without control characters but tabs and ends of lines.

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
            raise make_locked(history, holder)
        clock.sleep(0.05)
        holder = lock.take()
    try:
        yield history
    finally:
        history.close()
        lock.release()


def make_locked(history, holder):
    """Return the sentence for a pipeline of which another run is not over."""
    fix = "Wait for its end with --wait; --status shows what it does."
    try:
        run, attempts = find_running(history)
    finally:
        history.close()
    if run is None:
        return Locked("Another run of this pipeline is just beginning or ending.", fix)
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


def find_request(history, request, arguments, resume):
    """Return what to run, with which arguments, and what of it is done: for a resume, what the
    resumed run says. Raise UserError if a resume is asked for together with targets.
    """
    if not resume:
        return request, arguments, {}
    if request != Request():
        raise UserError("resume takes its targets and exclusions from the run.",
                        "Leave out targets, exclude and start_from.")
    run = history.find_resumable(None if resume is True else resume)
    return (make_request(run), read_arguments(run) if arguments is None else arguments,
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
# replace. `conn` may be any DB-API connection, any object with or without close(), commit() and
# rollback(), or None. It does not decide when to do any of these.

# SQLite calls back after this many steps of a statement, about a millisecond, so that a signal
# is heard in the middle of a long one.
_SQLITE_STEPS = 100_000
_OURS = " -- by the engine"  # so that sqlite3 does not take its prepared statement for a tool's own
_POSTGRES_INERROR = 3  # PQTRANS_INERROR of libpq: a COMMIT would silently roll back

_CO_COROUTINE = 0x80  # of inspect: what `async def` makes
_HARMLESS = ("SELECT 1", "SELECT 1 FROM DUAL", "SELECT 1 FROM SYSIBM.SYSDUMMY1",
             "SELECT 1 FROM RDB$DATABASE")  # Oracle, Db2 and Firebird want a FROM
_COMMITS = 'or say "commits": True in TOOL_MAP and leave transactions to the tool'
_AT_ONCE = ("this connection commits each statement at once, so that nothing of a failure could be "
            'undone: take isolation_level="AUTOCOMMIT" or autocommit=True out of get_connection(), '
            + _COMMITS)
_NOT_OVER = ("commit() has left the transaction open, so that its work would be lost: return a "
             "connection from get_connection() whose commit() commits")

_HINTS = (  # what drivers say of mistakes that the way a tool is called leads to: the way out
    (r"(inside|within) a transaction",
     'a transaction is open already: "commits": True in TOOL_MAP leaves transactions to the tool'),
    (r"a closed (database|connection)|connection (is|already) closed",
     "leave the connection open: the engine closes it"),
    (r"database is locked",
     'another writes: isolation_level="IMMEDIATE" and timeout=60 in get_connection() wait for it'),
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
_SCHEMA_OF["mariadb"] = _SCHEMA_OF["mysql"]


class Database:
    """The connection of a run, opened at its first use and closed exactly once.

    State: `conn`, what get_connection() returned; `raw`, the driver's own in it; `is_open`,
    whether it was asked; `autocommit`, the mode in which the connection came, to which it is put
    back after each attempt; `is_ours`, whether the transaction is the engine's, and `has_begun`,
    whether begin() told the driver to begin it; `is_sqlite`, what it is, and `is_simple`, one of
    that in its default mode, of which many commits are asked; `alchemy`, what is SQLAlchemy's;
    `wrapper`, what is of no driver that is known; `is_tried`, whether it was found fit; `schema`,
    where a ledger in it is, and `has_set`, whether get_connection() has left a transaction open,
    so that a rollback may change what is the default.
    """

    def __init__(self, get_connection, is_cancelled=lambda: False):
        self.get_connection, self.is_cancelled = get_connection, is_cancelled
        self.conn = None
        self.raw = None
        self.is_open = self.is_ours = self.has_begun = self.is_tried = False
        self.is_sqlite = self.is_simple = False
        self.autocommit = None
        self.alchemy = None
        self.wrapper = None
        self.schema = None
        self.has_set = False

    def open(self):
        """Return the connection, opened if it is not. Whatever get_connection() raises, raises."""
        if not self.is_open:
            conn = self.get_connection()
            if is_cursor(conn):
                raise TypeError("it returned a cursor, through which nothing can be "
                                "committed: return the connection itself")
            if isinstance(conn, bool):
                raise TypeError(f"it returned {conn}: return a connection, or None for a pipeline "
                                "without a database")
            if is_async(conn):
                raise TypeError(f"it returned {format_type(conn)}, which is asynchronous, and "
                                "nobody would await its commit(): return a synchronous "
                                "connection, or None, and connect in run()")
            if is_pending(conn):
                raise TypeError(f"it returned {format_type(conn)}, which is still to be entered: "
                                "return the connection itself, and leave out yield and with")
            self.conn, self.is_open, self.is_tried, self.schema = conn, True, False, None
            is_alchemy = hasattr(conn, "exec_driver_sql") or is_session(conn)
            self.alchemy = Alchemy(conn) if is_alchemy else None
            self.raw = conn if is_alchemy else find_raw(conn)
            self.autocommit = getattr(self.raw, "autocommit", None)
            self.is_sqlite = is_sqlite(conn)
            self.is_simple = self.is_sqlite and hasattr(conn, "commit") \
                and not isinstance(self.autocommit, bool)
            is_known = is_alchemy or self.is_sqlite or find_driver(conn)[0]
            self.wrapper = Wrapper(conn) if keeps_ledger(conn) and not is_known else None
            if self.is_sqlite and hasattr(self.conn, "set_progress_handler"):
                self.conn.set_progress_handler(self.is_cancelled, _SQLITE_STEPS)
            self.has_set = is_in_transaction(conn) is True if not is_alchemy \
                else bool(call_if_there(conn, "in_transaction"))
            with contextlib.suppress(Exception):  # else it is asked for where there is a ledger
                self.schema = find_schema(conn)
        return self.conn

    def begin(self, is_urgent=False, commits=False):
        """Begin a transaction, where the driver would not do so by itself, or not early enough.

        Python's sqlite3 begins by itself only before INSERT and the like, so that a CREATE TABLE
        would survive a rollback. `is_urgent` waits for SQLite's one writer at once. Raise
        TypeError if commit() or rollback() would not do what they say, unless the tool `commits`.
        """
        conn = self.open()
        self.is_ours = not commits
        if self.is_sqlite:
            if not conn.in_transaction:
                # A deferred transaction that reads first can not wait for a lock; who opens with
                # isolation_level="IMMEDIATE" gets one that does.
                level = "IMMEDIATE" if is_urgent else getattr(conn, "isolation_level", None) or ""
                conn.execute("BEGIN " + level + _OURS)
            self.has_begun = True
            return
        if not (commits or self.is_tried):
            check_ends(conn)
        if self.alchemy:
            self.alchemy.begin(is_urgent, commits)
            self.is_tried = self.is_tried or not commits
            return
        if self.autocommit is True:
            self.raw.autocommit = False
        if self.wrapper and not commits:
            if not self.is_tried:
                self.wrapper.try_out()
            self.wrapper.begin()
        elif self.autocommit is not True and callable(getattr(conn, "begin", None)) \
                and not hasattr(conn, "in_transaction"):
            conn.begin()  # of DuckDB and MySQL drivers
            self.has_begun = True
        self.is_tried = self.is_tried or not commits

    def lend(self):
        """Open the connection for a tool that begins and ends its transactions itself."""
        self.open()
        self.is_ours = False
        if self.alchemy:
            self.alchemy.is_ours = False

    def commit(self):
        """Commit what is open. Raise what the driver raises, or if it would have been lost."""
        if not self.is_sqlite and (self.alchemy or self).is_aborted():
            raise RuntimeError("the transaction had failed and could not be committed: "
                               "an error of the database was caught and ignored")
        if self.is_sqlite and self.is_cancelled():
            raise RuntimeError("SQLite undid the transaction when a statement was interrupted")
        if self.is_simple:
            self.has_begun = False
            self.conn.commit()
            if self.conn.in_transaction:
                raise RuntimeError(_NOT_OVER)
        else:
            self._end("commit")

    def is_aborted(self):
        """Return whether a COMMIT would undo the transaction instead."""
        return is_aborted(self.conn)

    def rollback(self):
        """Undo what is not committed. A connection that can not do that is let go as broken.

        Return whether the transaction of begin() had ended before, as far as the driver tells.
        """
        had_ended = False
        try:
            had_ended = self._end("rollback")
            is_broken = getattr(self.conn, "closed", False) \
                or getattr(self.conn, "open", True) is False \
                or getattr(self.conn, "invalidated", False)  # what SQLAlchemy says of a lost one
        except Exception:
            is_broken = True
        if is_broken:
            self.close()
        return had_ended

    def close(self):
        """Close the connection if it is open; the next use opens another. Never raises."""
        conn, self.conn, self.raw, self.is_open = self.conn, None, None, False
        alchemy, self.alchemy, self.wrapper = self.alchemy, None, None
        if alchemy:
            alchemy.is_ours = False
        try:
            call_if_there(conn, "close")
        except Exception:
            pass  # what was committed is safe; what was not is gone with the connection

    def _end(self, how):
        conn, had_begun, self.has_begun = self.conn, self.has_begun, False
        if self.alchemy:
            return self.alchemy.end(how)
        had_ended = self.is_sqlite and not conn.in_transaction
        at_once = self.is_ours and not self.is_sqlite \
            and getattr(self.raw, "autocommit", None) is True  # the tool's wish
        if self.is_sqlite and (self.autocommit is True or not hasattr(conn, how)):
            if conn.in_transaction:  # commit() and rollback() do nothing here, or are not there
                conn.execute(how.upper() + _OURS)
        else:
            try:
                call_if_there(conn, how)
            except Exception as error:
                # The tool ended its transaction itself; DuckDB, for one, complains.
                if "no transaction" not in str(error).lower():
                    raise
                had_ended = True
        if is_in_transaction(self.raw):
            raise RuntimeError(_NOT_OVER)
        if isinstance(self.autocommit, bool) and self.raw.autocommit is not self.autocommit:
            self.raw.autocommit = self.autocommit
        return had_begun and had_ended or at_once


class Alchemy:
    """A Connection or a Session of SQLAlchemy, and the connections of drivers behind it.

    SQLAlchemy has a transaction from the first statement on, of which a driver may not know; and
    each transaction of a Session is on a connection that it takes from the pool then.
    State: `is_ours`, whether transactions are the engine's, and `is_urgent`, of Database.begin();
    `parts`, the Connections in them; `session`, the Session that is watched; `begins`, whether the
    user has SQLAlchemy begin one of SQLite's, if that is known; `has_begun`, whether the engine
    has begun one; `problem`, why one may not be committed.
    """

    def __init__(self, conn):
        self.conn, self.is_session = conn, is_session(conn)
        self.is_ours = self.is_urgent = self.has_begun = False
        self.parts = []
        self.session = None
        self.begins = None
        self.problem = ""

    def begin(self, is_urgent, commits):
        """Begin a transaction where SQLAlchemy and the driver would not, or see to that."""
        self.is_ours, self.is_urgent = not commits, is_urgent
        self.has_begun, self.problem = False, ""
        if commits:
            return
        if not self.is_session:
            self._join(self.conn)
            return
        session = self._find_session()
        if session is self.session:
            return
        self.session = session
        sys.modules["sqlalchemy"].event.listen(session, "after_begin", self._hear)
        is_new = not session.in_transaction()
        try:  # whether it is fit is told before the tool is called
            part = session.connection()
        except Exception as error:
            if type(error).__name__ != "UnboundExecutionError":  # it has one for each table
                raise
        else:
            if is_new:
                session.commit()  # of nothing; a rollback would undo what get_connection() has SET
            else:
                self._join(part)

    def _find_session(self):
        """Return the Session, which a scoped_session keeps inside."""
        return self.conn.registry() if hasattr(self.conn, "registry") else self.conn

    def _hear(self, session, _transaction, part):
        """Hear that a Session has begun a transaction on a connection."""
        if self.is_ours and session is self.session:
            self._join(part)

    def _join(self, part):
        """Have the driver begin what SQLAlchemy has begun on a Connection, or will begin."""
        self.parts = [each for each in self.parts if not each.closed and each is not part] + [part]
        raw = find_raw(part)
        if is_autocommit(raw, part):
            self.problem = _AT_ONCE
            raise TypeError(_AT_ONCE)
        if not is_sqlite(raw) or raw.in_transaction:
            return
        if not part.in_transaction():  # else what the user has for it has done nothing
            if self.begins is None:
                part.begin()
                self.begins = raw.in_transaction
                part.rollback()
            if self.begins:
                return
        level = "IMMEDIATE" if self.is_urgent else raw.isolation_level or ""
        raw.execute("BEGIN " + level + _OURS)
        self.has_begun = True

    def is_aborted(self):
        """Return whether a COMMIT would undo a transaction instead."""
        if self.problem:
            raise TypeError(self.problem)
        if not self.is_session:
            return is_aborted(self.conn)
        session = self._find_session()
        if not session.in_transaction():
            return False
        if not self.is_ours:
            return is_aborted(session.connection())
        if session is not self.session:
            raise RuntimeError("the Session is another than at its beginning, so that nothing "
                               "tells whether its work is whole: leave remove() to the engine")
        return any(is_aborted(part) for part in self.parts if not part.closed)

    def end(self, how):
        """Commit or roll back; return whether the transaction had ended before."""
        had_begun, self.has_begun = self.has_begun, False
        if self.is_session:
            getattr(self.conn, how)()
            if any(not part.closed and part.in_transaction() for part in self.parts):
                raise RuntimeError(_NOT_OVER)  # it is in a transaction of the Connection's
            return False
        conn = self.conn
        if conn.closed or conn.invalidated:
            getattr(conn, how)()
            return False
        raw = find_raw(conn)
        at_once = self.is_ours and not self.problem and is_autocommit(raw, conn)  # the tool's wish
        had_ended = at_once or had_begun and not raw.in_transaction
        getattr(conn, how)()
        if not conn.closed and not conn.invalidated:
            raw = find_raw(conn)
            if is_in_transaction(raw) is not False:  # begun here, or by a tool that went to it
                getattr(raw, how)()
            if is_in_transaction(raw):
                raise RuntimeError(_NOT_OVER)
            if at_once and getattr(raw, "autocommit", None) is True:
                raw.autocommit = False
        return had_ended


class Wrapper:
    """A connection of no driver that is known, but which takes SQL: it is believed what it shows.

    State: `is_sqlite`, whether that is what is behind it.
    """

    def __init__(self, conn):
        self.conn, self.is_sqlite = conn, False

    def begin(self):
        """Begin a transaction, of SQLite too, which would not do so before all statements."""
        if not hasattr(self.conn, "in_transaction"):
            call_if_there(self.conn, "begin")
        if self.is_sqlite:
            with contextlib.suppress(Exception):  # it has begun
                self._say("BEGIN")

    def try_out(self):
        """Raise TypeError if statements do not stay in one transaction until commit() or
        rollback(), which end it, as far as savepoints show.
        """
        self.is_sqlite = self._does("SELECT sqlite_version()")
        call_if_there(self.conn, "rollback")
        for end in ("", "rollback", "commit"):
            self.begin()
            is_kept = self._does("SAVEPOINT orchestrator_try")
            if end and is_kept:
                call_if_there(self.conn, end)
            is_kept = is_kept and self._does("RELEASE SAVEPOINT orchestrator_try")
            call_if_there(self.conn, "rollback")
            if is_kept == bool(end):
                what = f"{end}() ends no transaction" if end else \
                    "statements stay in no transaction, or nothing tells"
                raise TypeError(
                    f"get_connection() returned {format_type(self.conn)}, whose {what}, so that "
                    "work could be lost, or stay after a failure: return the connection of the "
                    f"driver itself, {_COMMITS}")

    def _does(self, sql):
        try:
            self._say(sql)
        except Exception:
            return False
        return True

    def _say(self, sql):
        asked = self.conn if hasattr(self.conn, "execute") else self.conn.cursor()
        asked.execute(sql)
        call_if_there(asked, "fetchall")


def is_cursor(thing):
    """Return whether a thing is a DB-API cursor; some connections can fetch, but also commit."""
    return hasattr(thing, "fetchone") and hasattr(thing, "description") \
        and not hasattr(thing, "commit")


def is_sqlite(conn):
    """Return whether a connection is Python's sqlite3, or a driver made in its image."""
    return isinstance(getattr(conn, "in_transaction", None), bool) and hasattr(conn, "execute")


def was_closed(conn):
    """Return whether somebody here has closed a connection, and the server has not."""
    try:  # psycopg2, 3
        return getattr(conn, "closed", 0) == 1 and not getattr(conn, "broken", False)
    except Exception:
        return False


def is_session(conn):
    """Return whether a connection is a Session of SQLAlchemy, or a scoped_session."""
    return "sqlalchemy" in sys.modules and hasattr(conn, "get_bind") \
        and callable(getattr(conn, "connection", None))


def is_async(conn):
    """Return whether a connection is to be awaited, or its methods are."""
    if hasattr(type(conn), "__await__"):
        return True
    flags = [getattr(getattr(getattr(conn, name, None), "__code__", None), "co_flags", 0)
             for name in ("commit", "rollback", "execute")]
    is_one = hasattr(type(conn), "__aenter__") and not hasattr(type(conn), "__enter__")
    return any(flag & _CO_COROUTINE for flag in flags) or is_one and hasattr(conn, "commit")


def is_pending(conn):
    """Return whether a thing is a generator, or a `with` block that nobody has entered."""
    return hasattr(type(conn), "gi_frame") or isinstance(conn, contextlib._GeneratorContextManager)


def find_raw(conn):
    """Return the connection of the driver, which SQLAlchemy keeps inside its own."""
    if not hasattr(conn, "dbapi_connection"):
        inner = getattr(conn, "connection", None)
        conn = inner if hasattr(inner, "cursor") else conn  # or it is a method, or anything else
    return getattr(conn, "dbapi_connection", conn)


def check_ends(conn):
    """Raise TypeError if a connection to a database can not commit or roll back."""
    module = type(conn).__module__
    is_source = module.startswith("sqlalchemy.") and not hasattr(conn, "commit") \
        or module.startswith(("psycopg_pool", "psycopg2.pool"))
    if is_source and not hasattr(conn, "execute"):
        raise TypeError(f"get_connection() returned {format_type(conn)}, from which connections "
                        "come that nobody would commit or roll back: return one of them, as in "
                        f"`return engine.connect()`, {_COMMITS}")
    held = conn.values() if isinstance(conn, Mapping) else conn \
        if isinstance(conn, (tuple, list)) else getattr(conn, "__dict__", {}).values()
    if not hasattr(conn, "commit") and any(callable(getattr(each, "commit", None))
                                           for each in held):
        raise TypeError(f"get_connection() returned {format_type(conn)} that holds a connection, "
                        "on which nobody would commit or roll back: return the connection itself, "
                        f"and open others in run(), {_COMMITS}")
    if (keeps_ledger(conn) or find_driver(conn)[0]) and not (
            callable(getattr(conn, "commit", None)) and callable(getattr(conn, "rollback", None))):
        better = "one of create_engine(..., future=True)" if hasattr(conn, "exec_driver_sql") \
            else "the connection of the driver itself"  # the former of SQLAlchemy 1.4
        raise TypeError(f"get_connection() returned {format_type(conn)}, which has no commit() or "
                        "no rollback(), so that work could be lost, or stay after a failure: "
                        f"return {better}, {_COMMITS}")


def is_autocommit(raw, part):
    """Return whether the driver of a Connection of SQLAlchemy commits each statement at once;
    but for SQLite, which does not where the engine begins.
    """
    mode = getattr(raw, "autocommit", None)
    if not isinstance(mode, bool) and callable(getattr(raw, "get_autocommit", None)):
        mode = raw.get_autocommit()  # of MySQL drivers
    if isinstance(mode, bool) or is_sqlite(raw):
        return mode is True
    return part.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def is_in_transaction(conn):
    """Return whether a connection of a driver is in a transaction; None if it does not tell."""
    if is_sqlite(conn):  # which is always in one where autocommit is False
        return conn.in_transaction and getattr(conn, "autocommit", None) is not False
    status = getattr(getattr(conn, "info", None), "transaction_status", None)
    if status is None and isinstance(getattr(conn, "server_status", None), int):
        status = conn.server_status & 1  # of PyMySQL
    return None if status is None else status != 0


def is_aborted(conn):
    """Return whether an error has aborted the transaction, so that a COMMIT would roll it back.

    PostgreSQL and DuckDB then do so without a word. The drivers of the one tell; another is asked
    for something harmless. Raise what it raises if that does not tell.
    """
    if conn is None or is_sqlite(conn) or not hasattr(conn, "commit"):
        return False
    conn = find_raw(conn)
    status = getattr(getattr(conn, "info", None), "transaction_status", None)
    if status is not None:
        return status == _POSTGRES_INERROR
    if is_sqlite(conn) or not keeps_ledger(conn):
        return False
    problem = None
    for sql in _HARMLESS:
        try:
            asked = conn if hasattr(conn, "execute") else conn.cursor()
            asked.execute(sql)
            call_if_there(asked, "fetchall")
            return False
        except Exception as error:
            if "abort" in str(error).lower():
                return True
            problem = problem or error
    raise problem or RuntimeError(sql)


def find_driver(conn):
    """Return the kind of database behind a connection, and how its driver marks parameters
    (PEP 249: paramstyle).
    """
    if hasattr(conn, "exec_driver_sql"):  # of SQLAlchemy
        return conn.dialect.name, conn.dialect.paramstyle
    if is_sqlite(conn):
        return "sqlite", "qmark"
    conn = getattr(conn, "dbapi_connection", conn)  # of a pool of SQLAlchemy
    for kind in (*type(conn).__mro__, *conn.__class__.__mro__):  # these differ in a proxy
        parts = kind.__module__.split(".")
        for end in range(1, len(parts) + 1):
            module = sys.modules.get(".".join(parts[:end]))
            if hasattr(module, "paramstyle"):
                return _DRIVERS.get(parts[0], parts[0]), module.paramstyle
    return "", "qmark"


def keeps_ledger(conn):
    """Return whether a connection is one of a database, which can keep a ledger."""
    return hasattr(conn, "cursor") or hasattr(conn, "execute")


def find_schema(conn):
    """Return what stands before the ledger's name, so that it stays the same whatever a tool does
    to the connection; "" where the database is none of those that are known.
    """
    kind, _ = find_driver(conn)
    if kind == "sqlite":
        return "main."
    if kind not in _SCHEMA_OF:
        return ""
    is_alchemy = hasattr(conn, "exec_driver_sql")
    was_open = conn.in_transaction() if is_alchemy else is_in_transaction(conn)
    try:
        if is_alchemy:
            asked = conn.exec_driver_sql(_SCHEMA_OF[kind])
        else:
            asked = conn if kind == "duckdb" else conn.cursor()
            asked.execute(_SCHEMA_OF[kind])
        row = asked.fetchone() or ()
    finally:
        if was_open is False:  # else this would undo a SET of get_connection()
            conn.rollback()
    mark = "`" if kind in ("mysql", "mariadb") else '"'
    names = [name for name in (row.values() if isinstance(row, Mapping) else row) if name]
    return "".join(mark + name.replace(mark, 2 * mark) + mark + "." for name in names)


def find_hint(error):
    """Return the way out of an error of a database driver, where one is known, else ""."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & {"DatabaseError", "InterfaceError", "ResourceClosedError"}:
        return ""  # others have connections, too
    return next((hint for text, hint in _HINTS if re.search(text, str(error), re.I)), "")


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
_PAGE = 1000  # rows that are read at a time
NAME_LENGTH = 500  # letters; an index of PostgreSQL takes 2,700 bytes
_LOCKED_STATES = ("40001", "40P01", "55P03")  # SQLSTATE: serialization, deadlock, lock not there
_LOCKED_NUMBERS = (1020, 1205, 1213)  # the same of MySQL and MariaDB
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


class Dialect(NamedTuple):
    """How a database says what no standard says the same for all."""
    text: str = "TEXT"  # type of a text of any length
    cast: str = "VARCHAR(1000)"  # what a value is cast to, to be a text
    numbers: str = "row_number() OVER ()"  # of the rows of a SELECT, in their order
    seq: str = "INTEGER PRIMARY KEY"  # the type of what takes these numbers, and further keys
    collate: str = ""  # behind the columns of a table
    more: str = ""  # and behind those of the ledger


# MariaDB joins what has no key by comparing all with all. Not utf8mb4_bin, to which 'a' and 'a '
# are the same.
_MYSQL = Dialect("LONGTEXT", "CHAR", "NULL", "INTEGER PRIMARY KEY AUTO_INCREMENT, KEY (item(100))",
                 " COLLATE utf8mb4_0900_bin", " ENGINE=InnoDB")
_DIALECTS = {
    "sqlite": Dialect(cast="TEXT", numbers="NULL", more=" WITHOUT ROWID"),
    "postgresql": Dialect(cast="TEXT"),
    "mysql": _MYSQL,
    "mariadb": _MYSQL._replace(collate=" COLLATE utf8mb4_nopad_bin"),
}
def bind(sql, style):
    """Return SQL with its `?` as a driver marks parameters.

    >>> bind("a = ? AND b = ?", "format"), bind("a = ? AND b = ?", "named")
    ('a = %s AND b = %s', 'a = :1 AND b = :2')
    """
    if style == "qmark":
        return sql
    if style in ("format", "pyformat"):
        return sql.replace("?", "%s")
    first, *others = sql.split("?")
    return first + "".join(f":{i}{part}" for i, part in enumerate(others, 1))


def make_ledger_key(name):
    """Return the name of a pipeline or tool as the ledger knows it."""
    return name if len(name) <= 80 else make_file_name(name)


def is_locked(error):
    """Return whether an error only says that another was at the same rows at that moment."""
    for each in find_chain(error):
        number = each.args[0] if each.args else None
        kinds = {kind.__name__ for kind in type(each).__mro__}
        if "DatabaseError" in kinds and (
                find_sqlstate(each) in _LOCKED_STATES or number in _LOCKED_NUMBERS
                or re.search(r"database (table |schema )?is locked", str(each))):
            return True
    return False


def find_chain(error):
    """Return an error and those behind it, up to the end of a transaction that came too early."""
    seen = []
    # People can make a ring of such a chain.
    while error is not None and error not in seen and not isinstance(error, EndedEarly):
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def find_sqlstate(error):
    """Return the SQLSTATE of an error of a driver that gives one: psycopg, psycopg2."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def is_of_place(error):
    """Return whether an error tells of the place where all items are done, and so of no item: its
    disk is full or broken, or takes no writing; its database lets nobody in.
    """
    return any(
        isinstance(each, OSError) and each.errno in _PLACE_ERRNOS
        or any(kind.__name__ == "DatabaseError" for kind in type(each).__mro__)
        and (_PLACE_STATES.match(find_sqlstate(each) or "")
             or each.args and each.args[0] in _PLACE_NUMBERS
             or re.search(_PLACE_TEXTS, str(each)))
        for each in find_chain(error))


class Taken(Exception):
    """Somebody else wrote the row of an item after it was looked at."""


class EndedEarly(Exception):
    """An item ended its transaction itself, so that it may have been done."""


class Guard:
    """Refuses on SQLite what would end the transaction of an item, while it is up.

    State: `is_up`; `tried`, what the item tried in spite of it.
    """
    TRANSACTION, DENY = 22, 1  # SQLITE_TRANSACTION, SQLITE_DENY

    def __init__(self):
        self.is_up, self.tried = False, ""

    def install(self, conn):
        """Watch a connection. What it has prepared before is prepared anew, and so seen."""
        if hasattr(conn, "set_authorizer"):
            conn.set_authorizer(self.authorize)

    def authorize(self, action, what, *_):
        """Answer SQLite, which asks while it prepares a statement; 0 is yes."""
        if self.is_up and action == self.TRANSACTION:
            self.tried = self.tried or what or "COMMIT"
            return self.DENY
        return 0


class Ledger:
    """The items of one tool, over one connection, within whatever transaction is open on it.

    Without a database behind `conn` it is in a file of SQLite's, `path`, or in memory, and what
    it does is durable at once. State: `schema`, what stands before its name, and `near`, before
    that of a temporary table; `guard`; `has_savepoints`, whether the database knows them;
    `transaction`, the number of that of an item, on DuckDB, which does not.
    """

    def __init__(self, conn, path, pipeline, tool, run_id, source, schema=None):
        self.is_apart = not keeps_ledger(conn)
        if self.is_apart:
            import sqlite3
            conn = sqlite3.connect(path or ":memory:", timeout=60.0, isolation_level=None)
        self.conn = conn
        self.key = (make_ledger_key(pipeline), make_ledger_key(tool))
        self.run_id, self.source = run_id, source
        self.kind, self.style = find_driver(conn)
        self.guard = Guard()
        self.has_savepoints = self.kind != "duckdb"
        self.transaction = None
        self.doubles = []  # names that find_pending() has found a second time
        self.move(find_schema(conn) if schema is None or self.is_apart else schema)
        self._direct = getattr(conn, "exec_driver_sql", None) or (
            # A cursor of DuckDB's is another connection, with a transaction of its own.
            conn.execute if self.kind in ("sqlite", "duckdb") else None)
        self.raw = find_raw(conn)
        if self.kind == "sqlite":
            self.guard.install(self.raw)

    def close(self):
        """Close what is open beside the tool's own connection."""
        if self.is_apart:
            self.conn.close()

    def move(self, schema):
        """Keep the ledger in a schema."""
        self.schema, self._sql = schema, {}
        self.near = {"sqlite": "temp.", "postgresql": "pg_temp.", "duckdb": "temp.main."}.get(
            self.kind, schema)

    def do(self, sql, values=()):
        """Execute a statement of ours, whose parameters are `?`, and return the cursor."""
        return self._execute(self._sql.get(sql) or self._bind(sql), values)

    def _bind(self, sql):
        """Return a statement of ours as the driver takes it, with the full names of tables."""
        bound = bind(sql, self.style).replace("orchestrator_items", self.schema
                                              + "orchestrator_items")
        for name in ("orchestrator_listed", "orchestrator_pending"):
            bound = bound.replace(name, self.near + name)
        self._sql[sql] = bound
        return bound

    def read(self, sql, values=()):
        """Return the rows of a SELECT of ours, as tuples whatever the connection makes of rows."""
        if self.kind == "sqlite" and hasattr(self.conn, "row_factory"):
            cursor = self.conn.cursor()
            cursor.row_factory = None
            return cursor.execute(self._sql.get(sql) or self._bind(sql), values).fetchall()
        return [tuple(row.values() if isinstance(row, Mapping) else row)
                for row in self.do(sql, values).fetchall()]

    def do_theirs(self, sql):
        """Execute a statement that holds a SELECT of the user's, in which % and ? are letters."""
        if hasattr(self.conn, "exec_driver_sql"):  # it hands on an empty tuple, and % is a mark
            return self.conn.exec_driver_sql(sql, execution_options={"no_parameters": True})
        return self._execute(sql)

    def _execute(self, *statement):
        if self._direct:
            return self._direct(*statement)
        cursor = self.conn.cursor()
        cursor.execute(*statement)
        return cursor

    # --- the table ---

    def is_there(self):
        """Return whether the ledger's table exists; where not, the transaction may be over."""
        try:
            self.read("SELECT 1 FROM orchestrator_items WHERE 1 = 0")
        except Exception:
            return False
        return True

    def create(self):
        """Create the ledger's table."""
        dialect = self._find_dialect()
        schema = LEDGER_SCHEMA.format(text=dialect.text, more=dialect.collate + dialect.more)
        self.do(re.sub(r"--.*", "", schema))

    def _find_dialect(self):
        if self.kind == "mysql" and "mariadb" in str(self.read("SELECT version()")).lower():
            self.kind = "mariadb"
        return _DIALECTS.get(self.kind, Dialect())

    # --- which items there are ---

    def list_items(self, found, each):
        """Bring all items into a temporary table: those that passed the tool `each`, or else
        those that items() found, a SELECT or names.
        """
        dialect = self._find_dialect()
        self._create("listed")
        if each is not None:
            self.do("INSERT INTO orchestrator_listed (seq, item, version) "  # noqa: S608 - ours
                    f"SELECT {dialect.numbers}, item, passed FROM (SELECT item, passed, ended_at "
                    "FROM orchestrator_items WHERE pipeline = ? AND tool = ? AND passed IS NOT "
                    "NULL ORDER BY ended_at, item) q ORDER BY ended_at, item",
                    (self.key[0], make_ledger_key(each)))
        elif isinstance(found, str):
            self._insert_selected(re.sub(r"[\s;]+$", "", found), dialect)
        else:
            self._insert_all(found)

    def _create(self, name, more=""):
        """Create a temporary table of items, or empty it.

        It is not dropped: SQLite refuses that while a query of the tool's is open.
        """
        dialect = self._find_dialect()
        self.do(f"CREATE TEMPORARY TABLE IF NOT EXISTS orchestrator_{name} (seq {dialect.seq}, "
                f"item {dialect.text}, version {dialect.text}{more}){dialect.collate}")
        self.do(f"DELETE FROM orchestrator_{name}")  # noqa: S608 - a name of our own

    def _insert_selected(self, select, dialect):
        if not re.match(_COMMENTS + r"(select|with|values|table)\b", select, re.I):
            raise TypeError(f"items() returned a text that is no SELECT: {select[:60]!r}; "
                            "for a single item, return a list of it")
        # On lines of its own, since it may end in a comment.
        probe = f"SELECT * FROM (\n{select}\n) q LIMIT 0"  # noqa: S608 - it is the user's own
        probed = self.do_theirs(probe)
        columns = probed.keys() if hasattr(probed, "keys") else probed.description  # SQLAlchemy
        if len(columns) > 2:
            raise TypeError(f"the SELECT of items() has {len(columns)} columns; it takes one, the "
                            "name, or two, the name and the version")
        names, version = "item, version", f"CAST(version AS {dialect.cast})"
        if len(columns) == 1:
            names, version = "item", "''"
        if self.kind in ("mysql", "mariadb"):  # in a subquery they would drop its ORDER BY
            self.do_theirs(f"INSERT INTO {self.near}orchestrator_listed ({names}) {select}")
            self.do("UPDATE orchestrator_listed SET version = '' WHERE version IS NULL")
            return
        self.do_theirs(
            f"INSERT INTO {self.near}orchestrator_listed (seq, item, version) "  # noqa: S608
            f"WITH q ({names}) AS (\n{select}\n) SELECT {dialect.numbers}, "
            f"CAST(item AS {dialect.cast}), coalesce({version}, '') FROM q")

    def _insert_all(self, found):
        if self.kind == "duckdb":
            found = list(found)  # it may yield from a query, of which there is one at a time
        rows = ((i, *read_item(i, each)) for i, each in enumerate(found, 1))
        from itertools import islice
        while True:
            some = list(islice(rows, 200))  # since executemany() goes row by row
            if not some:
                return
            marks = ", ".join(["(?, ?, ?)"] * len(some))
            self.do(f"INSERT INTO orchestrator_listed VALUES {marks}",  # noqa: S608 - ?, ?
                    tuple(value for row in some for value in row))

    def give_back(self, names):
        """Let items that are listed and were given up have all their tries again: these, or all
        if there are no names. Return those of the names that are none of them.
        """
        sql = ("UPDATE orchestrator_items SET status = 'pending', attempts = 0, deaths = 0 "
               "WHERE pipeline = ? AND tool = ? AND status IN ('failed', 'quarantined') "
               "AND item IN (SELECT item FROM orchestrator_listed)")
        if not names:
            self.do(sql, self.key)
        return [name for name in names
                if not count_changed(self.do(sql + " AND item = ?", (*self.key, name)))]

    def find_others(self):
        """Return the pipelines that have items of this tool in the ledger, if this one has none."""
        if self.read("SELECT 1 FROM orchestrator_items WHERE pipeline = ? AND tool = ? LIMIT 1",
                     self.key):
            return []
        return [row[0] for row in self.read(
            "SELECT DISTINCT pipeline FROM orchestrator_items WHERE tool = ?", self.key[1:])]

    def find_pending(self):
        """Yield the items that are not done, in order, each with the status of the last try of
        this version, "" if there was none, and the run of that.

        The database finds them.
        """
        self._create("pending", ", status VARCHAR(20), attempts INTEGER, deaths INTEGER, "
                     "run_id VARCHAR(40)")
        sql = ("INSERT INTO orchestrator_pending "
               "SELECT l.seq, l.item, l.version, "
               "CASE WHEN d.version = l.version AND d.source = ? THEN d.status END, "
               "d.attempts, d.deaths, d.run_id "
               "FROM orchestrator_listed l LEFT JOIN orchestrator_items d "
               "ON d.pipeline = ? AND d.tool = ? AND d.item = l.item "
               "WHERE (d.passed IS NULL OR d.passed <> l.version)")
        self.do(sql, (self.source, *self.key))
        double = dict(self.read(
            "SELECT p.seq, p.item FROM orchestrator_listed e "
            "JOIN orchestrator_pending p ON p.item = e.item AND e.seq < p.seq"))
        self.doubles = [*double.values()]
        seq = 0
        while True:
            rows = self.read("SELECT seq, item, version, status, attempts, deaths, run_id "
                             "FROM orchestrator_pending WHERE seq > ? ORDER BY seq LIMIT ?",
                             (seq, _PAGE))
            for seq, name, version, status, attempts, deaths, run_id in rows:
                if seq in double:
                    continue
                check_item(name, version)
                is_seen = attempts is not None
                if status is None:  # there is no row of this version and source
                    attempts = deaths = 0
                yield Item(name, version, is_seen, attempts, deaths), status or "", run_id or ""
            if len(rows) < _PAGE:
                break
        self.do("DELETE FROM orchestrator_pending")

    def count_listed(self, only=None):
        """Return how many items were listed, or how often one of them was."""
        sql = "SELECT count(*) FROM orchestrator_listed"
        rows = self.read(sql) if only is None else self.read(sql + " WHERE item = ?", (only,))
        return rows[0][0]

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
                if {"IntegrityError", "ConstraintException"} & {
                        kind.__name__ for kind in type(problem).__mro__}:
                    raise Taken from problem
                raise
            return
        cursor = self.do(_UPDATE, (*values, *self.key, item.name, item.version))
        if count_changed(cursor) != 1:
            raise Taken

    def begin(self, is_urgent):
        """Begin a transaction of SQLite's inside SQLAlchemy's, which would do so at the first
        statement of an item.
        """
        if self.kind == "sqlite" and hasattr(self.conn, "exec_driver_sql"):
            if not self.conn.in_transaction():
                self.conn.begin()
            if not self.raw.in_transaction:
                self.raw.execute("BEGIN IMMEDIATE" if is_urgent else "BEGIN")

    def begin_item(self):
        """Begin the part of a transaction that is an item's; without savepoints, the whole."""
        if self.has_savepoints:
            self.do("SAVEPOINT orchestrator_item")
        else:
            self.transaction = self._find_transaction()

    def leave_item(self):
        """End the part of a transaction that is an item's; it fails if that is no more."""
        if self.has_savepoints:
            self.do("RELEASE SAVEPOINT orchestrator_item")
        elif self._find_transaction() != self.transaction:
            raise RuntimeError("the transaction is another")

    def undo_item(self):
        """Undo the part of a transaction that is an item's; it fails if that is no more."""
        if self.has_savepoints:
            self.do("ROLLBACK TO SAVEPOINT orchestrator_item")
        elif not is_aborted(self.conn):  # only what is still open can be aborted
            self.leave_item()

    def _find_transaction(self):
        return self.read("SELECT txid_current()")[0]

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
        str(value) if hasattr(value, "isoformat")
        or is_number(value) and (i or isinstance(value, int)) else None
        for i, value in enumerate(pair))
    if name is None or version is None:
        raise TypeError(f"items() gave as its {number}. item {found!r}; an item is a name, or a "
                        "tuple of name and version, both texts, whole numbers, dates or paths")
    return name, version


def check_item(name, version):
    """Raise ValueError if a database could not keep this name or version of an item."""
    if name and name.isascii() and name.isprintable() and len(name) <= NAME_LENGTH and not version:
        return  # as most are
    for text in (name, version):
        if text is None or len(text) > NAME_LENGTH or "\0" in text or text is name and not text:
            which = "the name" if text is name else f"as version of {str(name)[:60]!r}"
            raise ValueError(f"items() gave {which} {str(text)[:60]!r}; a name has 1 to "
                             f"{NAME_LENGTH} letters, a version up to as many, and neither holds "
                             "NUL")
    name.encode(), version.encode()  # raises UnicodeEncodeError, a ValueError


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


def find_ledger_path(folder):
    """Return the file for the ledgers of tools without a database, in a folder for history, or
    "" without that.
    """
    return folder and os.path.join(folder, "history.db")


# === 7 MODULES ==================================================================================
# Find the module of a tool, read it without importing it, check that it can be called with what
# there will be, import it. It calls nothing of a tool. A module is looked up, read and parsed once
# for all the tools that are in it, and kept as little as is asked of it, until forget_modules():
# a syntax tree takes 2 KB for each line.

class Parameters(NamedTuple):
    """What a function takes. `takes_all`: it has a **kwargs."""
    names: Tuple[str, ...] = ()
    required: Tuple[str, ...] = ()
    positional_only: Tuple[str, ...] = ()
    takes_all: bool = False


class Definition(NamedTuple):
    """What gives a global name of a module its value, as it reads. `takes` is None where that is
    not to be told so: of a class, an import, a function with decorators. `kind` is the type of a
    number, a text, a list or the like, and "" of what an expression makes.
    """
    line: int
    summary: str = ""
    takes: Optional[Parameters] = None
    kind: str = ""


class Module(NamedTuple):
    """A module as it reads: `definitions` by name, None if it can not be read, because it is in C,
    say, or has a `problem`. `summary` is the first line of its docstring.
    """
    path: str
    definitions: Optional[Dict[str, Definition]] = None
    summary: str = ""
    problem: Optional[UserError] = None


class Callee(NamedTuple):
    """A tool that is imported and can be called."""
    tool: Tool
    run: Callable[..., Any]
    run_takes: Parameters
    check: Optional[Callable[..., Any]]
    check_takes: Parameters
    items: Optional[Callable[..., Any]] = None
    items_takes: Parameters = Parameters()
    is_main: bool = False  # whether what run() returns is an exit code

    def takes(self, name):
        """Return whether a function of the tool gets an argument."""
        for takes in (self.run_takes, self.check_takes, self.items_takes):
            if takes.takes_all or name in takes.names:
                return True
        return False

    @property
    def has_items(self):
        """Whether run() is called once per item."""
        return self.items is not None or self.tool.each is not None


class SaysFailed(Exception):
    """What a tool returned says that it failed; the text is all that there is to tell."""


@functools.lru_cache(maxsize=None)
def find_module(name):
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


@functools.lru_cache(maxsize=None)
def read_module(name):
    """Return a Module, read without importing it; None if it is not there."""
    spec = find_module(name)
    if spec is None:
        return None
    path = getattr(spec, "origin", None) or ""
    if not path and getattr(spec, "submodule_search_locations", None):  # it is a mere folder
        return Module(name.replace(".", os.sep), {})
    try:
        tree = parse(path) if path.endswith(".py") else None
    except UserError as error:
        return Module(path, problem=error)
    return Module(path, tree and read_definitions(tree), read_summary(tree))


def parse(path):
    """Return the syntax tree of a file. Raise UserError if it can not be read, or is not Python."""
    import ast
    try:
        with open(path, "rb") as file:
            return ast.parse(file.read(), path)
    except (SyntaxError, ValueError, OSError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{format_path(path)}:{line}: {format_one_line(error)}",
                        "Mend that line.") from error


def forget_modules():
    """Forget what is known of modules: a command or a run begins, and they may have changed."""
    for function in (find_module, read_module):
        function.cache_clear()


def read_definitions(tree):
    """Return the Definition of each global name of a module: the last one, in `if`, `try` and
    `with` too. That of "*" is a star import, which may define anything.
    """
    import ast
    found, kinds, left = {}, {}, [tree]
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = Definition(node.lineno, read_summary(node), None
                                          if node.decorator_list else read_parameters(node.args))
        elif isinstance(node, ast.ClassDef):
            found[node.name] = Definition(node.lineno, read_summary(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update(((each.asname or each.name).split(".")[0], Definition(node.lineno))
                         for each in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = Definition(node.lineno, kind=kinds.get(node, ""))
        elif not isinstance(node, ast.Lambda):
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = getattr(node, "targets", None) or [node.target]
                kinds.update(dict.fromkeys(targets, find_kind(node.value)))
            left += [*ast.iter_child_nodes(node)][::-1]
    return found


def find_kind(value):
    """Return the type of the data that an expression spells out, for a sentence; else ""."""
    import ast
    try:
        return format_type(ast.literal_eval(value))
    except (ValueError, TypeError, SyntaxError, AttributeError):  # it is made by a call, say
        return ""


def read_parameters(args):
    """Return what a function takes, from the part of a syntax tree that says so."""
    by_position = [arg.arg for arg in args.posonlyargs + args.args]
    by_name = [arg.arg for arg in args.kwonlyargs]
    required = by_position[:len(by_position) - len(args.defaults)]
    required += [name for name, default in zip(by_name, args.kw_defaults) if default is None]
    return Parameters(tuple(by_position + by_name), tuple(required),
                      tuple(by_position[:len(args.posonlyargs)]), args.kwarg is not None)


def read_summary(node):
    """Return the first line of the docstring of a module, function or class, or "".

    What ast.get_docstring does takes `inspect`, whose import alone costs 4 ms.
    """
    import ast
    first = next(iter(getattr(node, "body", ())), None)
    text = isinstance(first, ast.Expr) and getattr(first.value, "value", None)
    return text.strip().partition("\n")[0].strip() if isinstance(text, str) else ""


def find_definition(tool, name):
    """Return the Definition of a name in a tool's module, or None."""
    module = read_module(tool.module)
    found = module and module.definitions or {}
    return found.get(name) or found.get("*")


def find_summary(tool):
    """Return the first line of a tool's docstring, or in brackets why there is none."""
    module = read_module(tool.module)
    if module is None:
        return f"(no module {tool.module})"
    if module.problem:
        return f"({module.problem.problem})"
    if module.summary and tool.function == "run":
        return module.summary
    function = find_definition(tool, tool.function)
    return function and function.summary or module.summary


class Sources:
    """Fingerprints of the files of tools' modules, each of which is read once.

    Bytes count, since a syntax tree is another in each version of Python; only the ends of lines
    do not, which a checkout may change, and which mean the same to Python. Nor does what a module
    imports. `is_of_run`: they tell what this process runs, which is what a file held when it was
    imported; asked for before that, so that who changes it meanwhile has changed it since.
    """
    imported: Dict[str, Tuple[Any, str]] = {}  # of this process: module -> its spec, fingerprint

    def __init__(self, is_of_run=False):
        self.is_of_run = is_of_run
        self._known = {}

    def find(self, tool):
        """Return the fingerprint of a tool's module; "" of one without a file.

        Raise UserError if the module is not there.
        """
        module = tool.module
        if module not in self._known:
            spec, digest = self.imported.get(module, (None, ""))
            is_same = self.is_of_run and spec and spec is find_imported_spec(module)
            self._known[module] = digest if is_same else hash_module(tool)
        return self._known[module]

    def note_imported(self):
        """Keep what the modules held that this process has imported, however long it lives."""
        for module, digest in self._known.items():
            spec = find_imported_spec(module)
            if spec is not None:
                self.imported[module] = spec, digest


def find_imported_spec(module):
    """Return the spec with which a module was imported, or last reloaded; None if it was not."""
    return getattr(sys.modules.get(module), "__spec__", None)


def hash_module(tool):
    """Return a fingerprint of the bytes of a module's file, "" if it has none.

    Raise UserError if the module is not there.
    """
    from hashlib import sha256
    spec = find_module(tool.module)
    if spec is None:
        raise missing_module(tool)
    path = getattr(spec, "origin", None) or getattr(spec, "__file__", None) or ""
    loader = getattr(spec, "loader", None) or getattr(spec, "__loader__", None)
    try:
        content = loader.get_data(path)  # which reads in archives, too
    except (AttributeError, OSError):
        return ""
    if path.endswith(".py"):
        content = content.replace(b"\r\n", b"\n")
    return sha256(content).hexdigest()


def describe_source(tool, sources):
    """Return what of a tool itself decides what it does: the function, the source of its module,
    and those options that change more than when, how often and where it runs.

    Needs are not among them: they are recorded with what they had done. An option that says what
    is so without it is left out, so that one which a later engine knows changes nothing.
    """
    given = tool._asdict()
    options = {name: given[name] for name in ("commits", "reads", "writes") if given[name]}
    options.update({name: sorted(names) for name, names in options.items() if name != "commits"})
    return {"calls": f"{tool.module}:{tool.function}", "options": options,
            "source": sources.find(tool)}


def find_changed_source(was, now):
    """Return what changed of a tool itself, as describe_source() says, in words, or ""."""
    if was["calls"] != now["calls"]:
        return f"it calls another function, {now['calls']},"
    old, new = was["options"], now["options"]
    names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    if names:
        return f"its options changed ({', '.join(names)})"
    return "its source changed" if was["source"] != now["source"] else ""


def hash_item_source(tool, sources):
    """Return a short fingerprint of what the tries of an item are of: a change gives them back."""
    from hashlib import sha256
    what = tool.module, tool.function, tool.commits, sources.find(tool)
    return sha256(repr(what).encode()).hexdigest()[:16]


def find_versions(pipeline, tools):
    """Return what runs: the fingerprint of the tables, and of the file of each module."""
    from zlib import crc32
    tables = 0
    for row in (*pipeline.tools.values(), *pipeline.stages.values(), *pipeline.limits.items()):
        tables = crc32(repr(tuple(row)).encode(), tables)
    sources = {}
    for module in dict.fromkeys(tool.module for tool in tools):
        path = getattr(find_module(module), "origin", None) or ""
        try:
            with open(path, "rb") as file:
                sources[module] = f"{crc32(file.read()):08x}"
        except OSError:
            pass  # it has no file of its own
    return Versions(f"{tables:08x}", sources)


def find_base(get_connection):
    """Return the folder of the file that defines get_connection, else of the main program."""
    code = getattr(get_connection, "__code__", None)
    file = getattr(code, "co_filename", None) \
        or getattr(sys.modules["__main__"], "__file__", None) or "."
    return os.path.dirname(os.path.abspath(file))


def check_modules_exist(tools):
    """Raise UserError for the tools whose module is not there. Imports nothing."""
    missing = [missing_module(tool) for tool in tools if find_module(tool.module) is None]
    if missing:
        raise merge_errors(missing)


def missing_module(tool):
    """Return the sentence for a module that is not there, with the nearest that is beside it."""
    import pkgutil
    package, dot, _ = tool.module.rpartition(".")
    places = getattr(find_module(package), "submodule_search_locations", None) or () if package \
        else sys.path[:1]
    there = [package + dot + each.name for each in pkgutil.iter_modules(list(places))]
    nearest = format_nearest(tool.module, there)
    fix = nearest if nearest.startswith("Did") else "Write it, or correct its path"
    return UserError(f"TOOL_MAP[{tool.name!r}]: there is no module {tool.module!r}.",
                     f"{fix} (dots between folders, starting from "
                     f"{sys.path[0] or 'this folder'}).")


def missing_run(tool, file):
    """Return the sentence for a module without the function that its tool needs."""
    return UserError(f"TOOL_MAP[{tool.name!r}]: {format_path(file or tool.module)} has no function "
                     f"{tool.function}().", f"Write `def {tool.function}(conn, **kwargs):` in it.")


def wrong_run(tool, file, kind):
    """Return the sentence for a module in which the name of the function is something else."""
    return UserError(f"TOOL_MAP[{tool.name!r}]: {tool.function} of "
                     f"{format_path(file or tool.module)} is {kind}, not a function.",
                     f"Write `def {tool.function}(conn, **kwargs):` in it.")


def find_mistakes(tool, available):
    """Yield the mistakes in a tool's module, with file and line, without importing it."""
    module = read_module(tool.module)
    if module is None or module.problem:
        yield missing_module(tool) if module is None else module.problem
        return
    if module.definitions is None:
        return

    def at(line, error):
        return UserError(f"{format_path(module.path)}:{line}: {error.problem}", error.fix)

    run = find_definition(tool, tool.function)
    if run is None:
        yield at(1, missing_run(tool, module.path))
    elif run.kind:
        yield at(run.line, wrong_run(tool, module.path, run.kind))
    items = module.definitions.get("items")
    for name in (tool.function, "items", "check"):
        found = module.definitions.get(name)
        if found and found.takes:
            try:
                check_function(tool, name, found.takes, bool(items and not items.kind), available)
            except UserError as error:
                yield at(found.line, error)


def check_function(tool, name, takes, has_own_items, available):
    """Raise UserError if a function of a tool can not be called with what there will be, or what
    TOOL_MAP says of the tool does not go with its items. `has_own_items`: it has an items().
    """
    where = f"TOOL_MAP[{tool.name!r}]: {name}() of {tool.module}"
    if name == tool.function:
        check_item_options(tool, has_own_items, takes)
    if takes.positional_only:
        raise UserError(f"{where} takes {takes.positional_only[0]!r} by position only.",
                        "Take the `/` out of its parameters: arguments are passed by name.")
    has_items = name != "items" and (has_own_items or tool.each is not None)
    known = {*available, "item"} if has_items else available
    missing = [each for each in takes.required if each not in known]
    if not missing:
        return
    if "item" in missing:
        if name == "items":
            raise UserError(f"{where} asks for 'item', but it is what tells which there are.",
                            "Take that out of its parameters.")
        raise UserError(f"{where} asks for 'item', which nothing gives.",
                        "Write `def items(conn):` beside it, which returns what there is to do.")
    if missing[0] in PERIOD_ARGUMENTS:
        raise UserError(f"{where} asks for {missing[0]!r}, which only --backfill gives.",
                        f"Run it so, or give it a default: {missing[0]}=None.")
    raise UserError(f"{where} asks for {', '.join(map(repr, missing))}, which nothing gives.",
                    f"There are {', '.join(sorted(known))}. Give it a default "
                    f"({missing[0]}=None), or declare --{missing[0].replace('_', '-')} in "
                    "add_arguments().")


def check_item_options(tool, has_own_items, run_takes):
    """Raise UserError if what TOOL_MAP says of a tool does not go with its items, or their lack."""
    where = f"TOOL_MAP[{tool.name!r}]"
    if has_own_items and tool.each is not None:
        raise UserError(f"{where}: its items are those of {tool.each!r}, but {tool.module} has a "
                        "function items() too.", "Take out the one or the other.")
    if not has_own_items and tool.each is None:
        if tool.batch != 1:
            raise UserError(f"{where}: 'batch' is for tools with items, and {tool.module} has no "
                            "function items().", "Write one, or take 'batch' out.")
        return
    if tool.cache_s is not None:
        raise UserError(f"{where}: 'cache' is not for tools with items, of which each is done "
                        "once.", "Take 'cache' out.")
    if "item" not in run_takes.names and not run_takes.takes_all:
        raise UserError(f"{where}: {tool.function}() of {tool.module} is called once per item, "
                        "but does not take it.", f"Write `def {tool.function}(conn, item):`.")


def load_callees(tools, available, interrupts):
    """Return the tools imported and ready to be called, by name.

    `available` are the names of the arguments that there will be. Raise UserError with all that
    is wrong: a module that can not be imported, no run(), a run() that asks for more than there is.
    """
    errors = []
    known = {*available, "conn", "context"}
    loaded = {}  # tools may share a function

    def load(_, tool):
        # and what it must be like depends on these options
        key = tool.module, tool.function, tool.each is None, tool.batch, tool.cache_s
        if key not in loaded:
            loaded[key] = load_callee(tool, known, interrupts)
        return loaded[key]._replace(tool=tool)

    callees = make_all(errors, load, {tool.name: tool for tool in tools})
    if errors:
        raise merge_errors(errors)
    return callees


def load_callee(tool, available, interrupts):
    """Return one tool, imported. Raise UserError if that can not be done."""
    where = f"TOOL_MAP[{tool.name!r}]"
    interrupts.own_argv(tool)
    module = import_module(tool)
    run, file = getattr(module, tool.function, None), getattr(module, "__file__", None)
    if not hasattr(module, tool.function):
        raise missing_run(tool, file)
    if not callable(run):
        raise wrong_run(tool, file, format_type(run))
    items, check = (each if callable(each) and each is not run else None for each in
                    (getattr(module, name, None) for name in ("items", "check")))
    takes = [find_parameters(each) if each else Parameters() for each in (run, items, check)]
    callee = Callee(tool, run, takes[0], check, takes[2], items, takes[1],
                    "main" in (tool.function, getattr(run, "__name__", "")))
    if not callee.has_items and "item" in callee.run_takes.required and hasattr(module, "items"):
        raise UserError(f"{where}: items of {tool.module} is {format_type(module.items)}, not a "
                        "function.", "Write `def items(conn):` and return it there.")
    for name, each in zip((tool.function, "items", "check"), takes):
        check_function(tool, name, each, items is not None, available)
    return callee


def import_module(tool):
    """Return a tool's module, imported. Raise UserError if that fails."""
    import importlib
    where = f"TOOL_MAP[{tool.name!r}]: importing {tool.module}"
    try:
        return importlib.import_module(tool.module)
    except SystemExit as error:
        raise UserError(f"{where} called {format_one_line(error)}, {format_place(error, tool)}.",
                        join_reasons('Put that under `if __name__ == "__main__":`',
                                     explain_exit(error)) + ".") from error
    except Exception as error:
        raise UserError(f"{where} failed, {format_place(error, tool)}:\n"
                        f"  {format_one_line(error)}",
                        "Mend that line, or install what it needs. -v shows the whole traceback."
                        ) from error


def has_items(tool):
    """Return whether a tool has items, as its module reads."""
    items = find_definition(tool, "items")
    return tool.each is not None or items is not None and not items.kind


def read_takes(tool):
    """Return what the functions of a tool take, as its module reads; of what can not be read so,
    that it takes all.
    """
    module = read_module(tool.module)
    if module is None or module.definitions is None:
        return [Parameters(takes_all=True)]
    found = [find_definition(tool, name) for name in (tool.function, "items", "check")]
    return [each.takes or Parameters(takes_all=True) for each in found if each]


def takes_any(tool, names):
    """Return whether a function of a tool takes one of some arguments, or can not be read."""
    return any(each.takes_all or {*names} & {*each.names} for each in read_takes(tool))


def check_are_taken(arguments, callees, tools, find_said):
    """Raise UserError for arguments that somebody gave and that no tool would ever get.

    `callees` are those of a plan; the other tools are read, not imported, and only if no callee
    takes an argument: it may be one of theirs. `find_said` gives those that somebody gave, each
    with where that was, and is asked last: it takes time, and there are defaults that none takes.
    """
    takes = [each for callee in callees.values()
             for each in (callee.run_takes, callee.check_takes, callee.items_takes)]
    left = find_untaken(arguments, takes)
    said = find_said() if left else {}
    left = [name for name in left if name in said]
    for tool in tools.values():
        if left and tool.name not in callees:
            read = read_takes(tool)
            left = find_untaken(left, read)
            takes += read
    known = dict.fromkeys(name for each in takes for name in each.names
                          if name not in RESERVED_ARGUMENTS)
    if left:
        raise merge_errors([UserError(f"{said[name]}: no tool takes {name!r}.",
                                      format_nearest(name, known)) for name in left])


def find_untaken(arguments, takes):
    """Return the arguments that none takes. The two ends of a period are one."""
    names = {}
    for each in takes:
        if each.takes_all:
            return []
        names.update(dict.fromkeys(each.names))
    if any(name in names for name in PERIOD_ARGUMENTS):
        names.update(dict.fromkeys(PERIOD_ARGUMENTS))
    return [name for name in arguments if name not in names]


def check_get_connection(get_connection):
    """Raise UserError if get_connection() asks for something, which nothing gives it."""
    if getattr(get_connection, "__code__", None) is None:
        return  # to look into other callables takes `inspect`, whose import is slow
    asks = find_parameters(get_connection).required
    if asks:
        raise UserError(f"get_connection() asks for {', '.join(map(repr, asks))}, which nothing "
                        "gives.", "It is called without arguments: give them defaults, or read "
                        "them from the environment.")


def describe_items(tool, has_database):
    """Return how a tool does its items, if it has some, for its reason in a plan."""
    if not has_items(tool):
        return ""
    source = f" of {tool.each}" if tool.each else ""
    is_exact = has_database and not tool.commits
    return f"each item{source} " + ("exactly once" if is_exact else "at least once")


def find_wrong_each(pipeline, tools):
    """Return an error for each tool whose items are to be those of one that has none."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: 'each' is {tool.each!r}, which has no items.",
                      f"Write `def items(conn):` in {pipeline.tools[tool.each].module}.")
            for tool in tools if tool.each in pipeline.tools
            and not has_items(pipeline.tools[tool.each])]


def check_each(pipeline, tools):
    """Raise UserError for tools whose items are to be those of one that has none."""
    errors = find_wrong_each(pipeline, tools)
    if errors:
        raise merge_errors(errors)


def find_parameters(function):
    """Return what a function takes, as inspect.signature tells, which is slow to import."""
    code = getattr(function, "__code__", None)
    if code is None or any(hasattr(function, name)
                           for name in ("__wrapped__", "__self__", "__signature__")):
        return find_parameters_by_signature(function)
    by_position, by_name = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames[:by_position + by_name]
    with_default = {*names[by_position - len(function.__defaults__ or ()):by_position],
                    *(function.__kwdefaults__ or ())}
    return Parameters(names, tuple(name for name in names if name not in with_default),
                      names[:code.co_posonlyargcount], bool(code.co_flags & 0x08))


def find_parameters_by_signature(function):
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


def join_reasons(*reasons):
    """Return in one line those of some reasons that there are."""
    return "; ".join(filter(None, reasons))


_PARSERS = ("argparse", "optparse", "click", "typer", "fire", "docopt", "absl")


def explain_exit(error):
    """Return why a parser of command lines has ended a tool, if one did; else ""."""
    last = error.__traceback__
    if not isinstance(error, SystemExit) or last is None:
        return ""
    while last.tb_next is not None:
        last = last.tb_next
    parser = str(last.tb_frame.f_globals.get("__name__")).partition(".")[0]
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
        text = "".join(c if c.isprintable() else " " for c in clean(text))
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
    kept = keep_result(result) if is_kept else None
    try:
        return Packed(pickle.dumps(result, pickle.HIGHEST_PROTOCOL), format_type(result), kept)
    except Exception:
        return Packed(None, format_type(result), kept)


class Results(Mapping[str, Any]):
    """What tools returned, by name, to read only; each is fetched when it is asked for.

    Raises TypeError for a result that could not travel, KeyError for a tool without one.
    """

    def __init__(self, find, find_names):
        self._find, self._find_names = find, find_names  # find(tool) raises KeyError

    def __getitem__(self, tool):
        try:
            result = self._find(tool)
        except KeyError:
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
    returned, by name, to read only. last_success: the moment in UTC, a `datetime`, at which the
    last success of this tool with the same arguments began, so that what came later has not been
    seen; None if there was none, in a backfill, or if no history is kept. Not counted are successes
    of a backfill, of a single item, and of some items only.
    """

    def __init__(self, job, results, tell):
        self.run_id, self.tool, self.attempt = job.run_id.partition(".")[0], job.tool, job.attempt
        self.results = results
        self.item = None
        self.version = None
        self._last_success_at = job.last_success_at
        self._tell = tell  # tell(kind, ...) reaches the listener of the run
        self._log = None

    @property
    def last_success(self) -> Any:
        """When the last success with these arguments began, a `datetime` in UTC, or None."""
        from datetime import datetime, timezone
        at = self._last_success_at
        return None if at is None else datetime.fromtimestamp(at, timezone.utc)

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
            self._tell("progress", done=done, total=total)


def make_log(tool, tell):
    """Return a logger whose lines are events, unless somebody has set up handlers of their own.

    It is not registered with `logging`, so nothing of a run stays behind in the process.
    """
    import logging

    class Teller(logging.Handler):
        def emit(self, record):
            """Make an event of a line, unless others have set up logging; never raise."""
            if logger.parent.hasHandlers():  # asked for each line: they may come at any time
                return
            try:
                text = self.format(record)
            except Exception:
                self.handleError(record)  # a line with wrong arguments fails nothing
            else:
                tell("log", text=text, level=record.levelno)

    class Log(logging.Logger):
        def getEffectiveLevel(self):
            of_others = self.parent.getEffectiveLevel() if self.parent.hasHandlers() else 0
            return self.level or of_others or logging.DEBUG

        def isEnabledFor(self, level):  # the cache of Logger would not notice them
            return self.manager.disable < level >= self.getEffectiveLevel()

    logger = Log("orchestrator." + tool)
    logger.parent = logging.getLogger("orchestrator")
    logger.addHandler(Teller())
    return logger


_SAME_SIGNAL_S = 0.1  # nobody presses Ctrl-C twice in that


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, while a run lasts and only on the main thread.

    The first one ends what the tool is doing, by KeyboardInterrupt, and is noted in `signal`;
    the engine's own steps are never torn, they look at `signal` between tools. The second one
    ends the process at once, but for SIGHUP, of which a terminal that closes sends several, and
    for one that comes with the first, as timeout(1) signals its child and then all its group. A
    signal that was ignored before, as by nohup, stays ignored. A process that a tool forks takes
    signals as if there were no engine.

    What foreign code makes of sys.argv ends with it, too, there where signals come: on the main
    thread, since sys.argv is the whole process's.
    """
    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # no system has all of them
    lasting: List["Interrupts"] = []  # those of this process; empty in one that was forked from it
    is_hooked = False

    def __init__(self):
        self.signal = None
        self.signal_s = 0.0  # when it came
        self.in_tool = False  # whether foreign code is being called
        self.is_on_main_thread = False
        self.before = {}
        self.before_exit = lambda: None

    def __enter__(self):
        import signal
        import threading
        self.is_on_main_thread = threading.current_thread() is threading.main_thread()
        if self.is_on_main_thread:
            for number in (getattr(signal, n) for n in self.NAMES if hasattr(signal, n)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.on_signal)
        if not Interrupts.is_hooked and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=Interrupts.leave_all)
            Interrupts.is_hooked = True
        Interrupts.lasting.append(self)
        return self

    def __exit__(self, *_):
        import signal
        if self in Interrupts.lasting:
            Interrupts.lasting.remove(self)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def leave_all():
        """Take signals as before. Runs in a process that was forked."""
        for interrupts in [*Interrupts.lasting]:
            interrupts.__exit__()

    def on_signal(self, number, _frame):
        """Take a signal. Runs in the main thread, between any two instructions."""
        import signal
        if self.signal is None:
            self.signal, self.signal_s = number, time.monotonic()
            if self.in_tool:
                raise KeyboardInterrupt(number)
        elif number != getattr(signal, "SIGHUP", None) \
                and time.monotonic() - self.signal_s > _SAME_SIGNAL_S:
            self.before_exit()
            os._exit(EXIT_SIGNAL + number)

    def call(self, function, *args):
        """Return what foreign code returns, which the first signal may interrupt."""
        argv = sys.argv
        try:
            self.in_tool = True
            try:
                if self.signal is not None:  # it came in the instant before
                    raise KeyboardInterrupt(self.signal)
                return function(*args)
            finally:
                self.in_tool = False
        finally:  # also if the signal came between these two
            if self.is_on_main_thread:
                sys.argv = argv

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
        self.in_tool = False
        try:
            result = step(*args)
        finally:
            self.in_tool = True
        if self.signal is not None:
            raise KeyboardInterrupt(self.signal)
        return result


def choose_arguments(takes, available):
    """Return the arguments that a function names, or all of them for its **kwargs.

    A `conn` that is None goes only to a function that names it.
    """
    if not takes.takes_all:
        return {name: available[name] for name in takes.names if name in available}
    if available.get("conn") is None and "conn" not in takes.names:
        return {name: value for name, value in available.items() if name != "conn"}
    return dict(available)


def take_result(callee, result):
    """Return the result of run(); of a main(), which returns an exit code, None.

    Raise SaysFailed if it is False, or an exit code with which a console script would have failed.
    """
    if result is None:
        return None
    name = "main" if callee.is_main else callee.tool.function
    if is_false(result):  # of a main() too, though as an exit code False is 0
        raise SaysFailed(f"{name}() returned False")
    if not callee.is_main:
        return result
    if not is_good_exit(result):
        shown = repr(result) if isinstance(result, (int, str)) else format_type(result)
        raise SaysFailed(f"main() returned {shown}: what it returns is an exit code, of which 0 "
                         "and None say success")
    return None


def call_check(callee, available, interrupts):
    """Call check(), if there is one. Raise SaysFailed if it says no, or what may be yes or no."""
    if callee.check is None:
        return
    interrupts.own_argv(callee.tool)
    result = call_function(callee.check, callee.check_takes, available)
    if result is None or result is True:
        return
    if is_false(result):
        raise SaysFailed("check() returned False")
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


def call_function(function, takes, available):
    """Return what a function returns, or what the coroutine that it returns comes to."""
    return find_value(function, function(**choose_arguments(takes, available)))


def find_value(function, result):
    """Return what a function has returned, or what the coroutine that it returned comes to."""
    if result is None or type(result) is int:
        return result
    code = getattr(result, "gi_code", None) or getattr(result, "ag_code", None)
    if code is not None and code is getattr(function, "__code__", None):
        raise TypeError(f"{function.__name__}() returned a generator, so nothing of it has run: "
                        "take the `yield` out of it")
    return wait_for(result) if hasattr(result, "__await__") else result


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


def end_if_copy(pid):
    """End this process if it is a copy of that one, which a tool forked and which came back."""
    if os.getpid() != pid:
        os._exit(EXIT_FAILED)


class Setting(NamedTuple):
    """What all who do jobs of a run share; it travels to each process once.

    `folder` is that of the history, or "" where none is kept; in `slips` each process notes the
    item that it is at, "" if it is not to.
    """
    pipeline: Pipeline
    arguments: Mapping[str, Any]
    verbose: bool = False
    folder: str = ""
    slips: str = ""


class Kept:
    """What a process keeps from job to job: its connection, the tools that it has imported, its
    slip. And where processes differ: `interrupts`, how signals reach tools; `ask(job, name)`,
    which returns the result of a tool that a job may see, or the names of all for None; `pack`,
    what a result is made into before the commit.
    """

    def __init__(self, setting, interrupts, ask, pack=lambda result: result):
        self.setting, self.interrupts, self.ask, self.pack = setting, interrupts, ask, pack
        self.database = Database(setting.pipeline.get_connection,
                                 lambda: interrupts.signal is not None)
        self.callees = {}
        self.slip, self.slip_fd = "", -1

    def load(self, tool):
        """Return a tool, imported. Raise UserError if that can not be done."""
        if tool.name not in self.callees:
            self.callees[tool.name] = self.interrupts.call(
                load_callee, tool, {*self.setting.arguments, "conn", "context"}, self.interrupts)
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
    ("ended", number, problem)         a Try that tells what kept it from the rest, or None

    This is the one way to do work, whatever the process. What `send` raises is no tool's fault.
    """
    for kind, what in Doer(job, setting, send, kept).do():
        send((kind, job.number, what))


class ToolError(Exception):
    """What fails a tool and is charged to no item: `__cause__`, at the step that is its text."""


_GONE = "the connection is gone: "
LOCKED_S = 60.0  # how long an item comes again because others are at the same rows
_TAKEN_TRIES = 20  # and how often because somebody else wrote its row


class Doer:
    """Does a job over one connection: it lists a tool's items, or tries some, each in one
    transaction with its row in the ledger; with "batch", several in one. A tool without items is
    one item, None, without a row.

    State: `ledger`, while the connection is open, of a tool with items; `given`, the arguments that
    there are, and `chosen`, those of them that run() takes; `step`, what is being done, if it is
    not the tool itself; `is_own_fault`, whether an error then is the item's; `is_sqlite`, what the
    ledger is in, and `is_watched`, whether an item may not commit; `at_work`, the item that is
    being done, since `started_s`; `is_lost`, whether it lost the connection, which is not recorded
    yet; `was_taken`, whether somebody else was first, so that rows are looked at once more; of what
    was undone last, `had_ended`, whether its transaction had ended before, and `was_closed`,
    whether the tool had closed the connection; `unsent`, why an event was not sent.
    """

    def __init__(self, job, setting, send, kept):
        self.job, self.setting, self.send, self.kept = job, setting, send, kept
        self.tool, self.database = setting.pipeline.tools[job.tool], kept.database
        self.interrupts, self.pid = kept.interrupts, os.getpid()
        self.has_items = job.is_listing or job.items[:1] != (None,)
        self.ledger = self.at_work = self.unsent = None
        self.given, self.chosen = {}, {}
        self.step, self.is_own_fault, self.is_sqlite, self.is_watched = "", False, False, False
        self.is_lost = self.was_taken = self.had_ended = self.was_closed = False
        self.started_s = 0.0

    def do(self):
        """Yield what comes of the job, as perform() sends it."""
        problem = None
        try:
            self._prepare()
            if self.job.is_listing:
                yield from self._list_items()
            left = self._make_groups()
            while left:
                if self.interrupts.signal is not None:
                    raise KeyboardInterrupt(self.interrupts.signal)
                tries, singly = self._try_group(left.pop())
                left += [(item,) for item in reversed(singly)]
                if tries:
                    yield "tries", tries
        except GeneratorExit:  # what came of it could not be sent
            raise
        except BaseException as error:
            if self.unsent is not None:
                raise self.unsent from None
            problem = self._make_problem(error)
        finally:
            self._leave()
        yield "ended", problem

    def _prepare(self):
        """Import the tool, and make what it may know of its run."""
        job, ask = self.job, self.kept.ask
        self.callee = self.kept.load(self.tool)
        self.context = Context(job, Results(lambda tool: ask(job, tool), lambda: ask(job, None)),
                               self._tell)

    def _tell(self, kind, **what):
        """Send what the tool tells of itself."""
        try:
            self.send(("event", self.job.number, {"kind": kind, **what}))
        except Exception as error:
            self.unsent = error
            raise

    def _leave(self):
        """Note that nothing is at work any more."""
        if self.has_items and not self.is_lost:
            with contextlib.suppress(OSError):  # the tool closed the slip
                self.kept.note(self.job, None)
        if self.ledger:
            self.ledger.close()

    def _make_groups(self):
        """Return the items to try, in groups that share a transaction, the last group first."""
        items, size = self.job.items, 1
        if not self.has_items:
            return [items]
        if items and self.tool.batch > 1:
            self._insist(self._open)
            # What can not be undone together is committed one by one.
            size = self.tool.batch if self.is_watched and self.ledger.has_savepoints else 1
        charged = [(item,) for item in items if item.charge]
        others = [item for item in items if not item.charge]
        groups = [tuple(others[i:i + size]) for i in range(0, len(others), size)]
        return groups[::-1] + charged

    # --- one try, or those of a batch ---

    def _try_group(self, group):
        """Return how items ended that were tried in one transaction, and those that are to be
        tried alone, because one of several failed, of which nothing is left then.
        """
        first = group[0]
        if first is not None and first.charge:
            return [self._record_failure(first, first.charge)], ()
        try:
            return self._insist(self._try_all, group), ()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if first is None:
                return [self._make_failure(error)], ()
            return self._take_failure(group, error)

    def _take_failure(self, group, error):
        """Return what _try_group() returns of items one of which failed. Raise ToolError for what
        is no item's fault.
        """
        item, is_early = self.at_work, isinstance(error, EndedEarly)
        again = [each._replace(is_seen=None) for each in group]
        is_gone = not self.database.is_open
        if is_early and is_gone and not self.was_closed:
            error, is_early = error.__cause__, False
        # SQLite has no server that could go away: what breaks it is its disk.
        self.is_lost = item is not None and is_gone and not is_early \
            and not (self.is_sqlite and is_of_place(error))
        if not self.is_lost and (not self.is_own_fault or is_locked(error) or is_of_place(error)):
            where = f"at {format_name(item.name)}: " if item else ""
            raise ToolError(where + self.step) from error
        if len(group) > 1 and not self.is_lost and not is_early:
            return (), again
        text = (_GONE if self.is_lost else self.step) + join_reasons(format_one_line(error),
                                                                     explain_exit(error))
        item = item._replace(tries=item.tries + (not self.is_lost),
                             deaths=item.deaths + self.is_lost, is_death=self.is_lost)
        try:
            ended = self._record_failure(item, text, error)
        except Exception as problem:
            if self.is_lost:
                self.at_work = item
                text = f"at {format_name(item.name)}: {text}; {self.step}"
                raise ToolError(text) from problem
            raise
        return [ended], [each for each in again if each.name != item.name]

    def _insist(self, step, *args):
        """Return what a step returns that begins and ends a transaction; of a tool with items,
        take it again while others are in the way.
        """
        began_s, number, self.was_taken = time.monotonic(), 0, False
        while True:
            try:
                return step(*args, is_urgent=number > 1)
            except BaseException as error:
                self._undo(error)
                number += 1
                self.was_taken = isinstance(error, Taken) and number < _TAKEN_TRIES
                if self.was_taken:
                    continue
                if not self.has_items or not is_locked(error) \
                        or time.monotonic() - began_s > LOCKED_S:
                    raise
                self._wait(number)

    def _wait(self, number):
        """Wait a little, and not as long as others do."""
        from random import random
        self.interrupts.call(time.sleep, random() * min(0.005 * 2 ** number, 1.0))

    def _undo(self, error):
        """Undo what is not committed. Raise KeyboardInterrupt if a signal is behind an error."""
        end_if_copy(self.pid)
        if self.ledger:
            self.ledger.guard.is_up = False
        self.was_closed = was_closed(self.database.conn)
        self.had_ended = self.database.is_open and self.database.rollback()
        if not self.database.is_open and self.ledger:
            self.ledger.close()
            self.ledger = None  # the next one is over the next connection
        if self.interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _open(self, is_urgent=False):
        """Open the ledger, and create it if it is not there."""
        database, job = self.database, self.job
        self._connect()
        database.begin(commits=self.tool.commits)
        ledger = Ledger(database.conn, find_ledger_path(self.setting.folder),
                        self.setting.pipeline.name, job.tool, job.run_id, job.source,
                        database.schema)
        if not ledger.is_apart and (not ledger.kind or is_session(database.conn)):
            raise TypeError(f"get_connection() returned {format_type(database.conn)}, in which the "
                            "ledger of items can not be kept: return the connection of the driver "
                            "itself, or engine.connect() (in run() then Session(conn) works)")
        self.step = "in the ledger: "
        if not ledger.is_there():
            self._begin_anew()
            if not (database.has_set and self._is_elsewhere(ledger)):
                self._create(ledger)
        database.commit()
        self.ledger, self.step = ledger, ""
        self.is_sqlite = ledger.kind == "sqlite"
        self.is_watched = not (ledger.is_apart or self.tool.commits)

    def _begin_anew(self):
        self.database.rollback()
        self.database.begin(commits=self.tool.commits)

    def _create(self, ledger):
        """Create a ledger, if no other start does so in this moment."""
        try:
            ledger.create()
            self.database.commit()
        except Exception:
            self._begin_anew()
            if not ledger.is_there():
                raise

    def _is_elsewhere(self, ledger):
        """Return whether there is a ledger in another schema, which became the default with the
        rollback of a SET of get_connection(): so it was made there before it was looked for here.
        """
        schema, other = ledger.schema, find_schema(ledger.conn)
        if other == schema:
            return False
        ledger.move(other)
        if ledger.is_there():
            return True
        self._begin_anew()
        ledger.move(schema)
        return False

    def _connect(self):
        if not self.database.is_open:
            self.step = "in get_connection(): "
            self.interrupts.call(self.database.open)
        self.step = ""

    def _begin(self, is_urgent):
        """Begin a transaction, where the tool does not look after them, over a ledger."""
        if self.has_items and self.ledger is None:
            self._open()
        self._connect()
        if self.tool.commits:
            self.database.lend()
            return
        self.database.begin(is_urgent)
        if self.ledger:
            self.ledger.begin(is_urgent)

    def _try_all(self, group, is_urgent):
        """Return how some items ended, tried in one transaction, none of which failed."""
        self.step, self.is_own_fault, self.at_work = "", False, None
        uses_database = self.has_items or self.callee.takes("conn")
        if uses_database:  # else it may go on beside one that holds the database
            # One that begins with a look at a row could not wait for the lock later.
            self._begin(is_urgent or group[0] is not None and group[0].is_seen is None)
        if not self.given or self.given["conn"] is not self.database.conn:
            self._choose_arguments()
        tries = [self._try_item(item) if item else self._try_tool() for item in group]
        if uses_database:
            self.step, self.is_own_fault = "at the commit: ", True
            self.database.commit()
        return tries

    def _choose_arguments(self):
        self.given = {**self.setting.arguments, "conn": self.database.conn,
                      "context": self.context}
        more = {"item": None} if self.has_items else {}
        self.chosen = choose_arguments(self.callee.run_takes, {**self.given, **more})

    def _try_tool(self):
        """Return how the try of a tool without items ended, which did not fail."""
        result = self.interrupts.call(self._call)
        return Try(None, "success", self.kept.pack(result), count_rows(result))

    def _try_item(self, item):
        """Return how the try of an item ended, which did not fail, with its row written."""
        ledger, context = self.ledger, self.context
        if item.is_seen is None or self.was_taken:
            item, status, rows, error = ledger.look(item)
            if status != "pending":
                return Try(item, status, rows=rows, error=error or "")
        self.at_work = item
        self.kept.note(self.job, item)
        # On SQLite nobody can end the transaction of an item.
        has_savepoint = self.is_watched and ledger.kind != "sqlite"
        if has_savepoint:
            self.at_work = None  # a connection that was lost before is no item's fault
            ledger.begin_item()
            self.at_work = item
        context.item, context.version, context.attempt = item.name, item.version, item.tries + 1
        self.started_s, self.is_own_fault = time.monotonic(), True
        try:
            rows = count_rows(self.interrupts.call(self._call_guarded, item.name))
        except (Exception, SystemExit) as error:
            if has_savepoint:
                self._check_ended_early(error)
            raise
        if has_savepoint:  # before its row, which might be committed at once if nothing is open
            self._release()
        self.step, self.is_own_fault = "in the ledger: ", False
        ledger.record(item._replace(tries=item.tries + 1), "success", time.time(),
                      time.monotonic() - self.started_s, rows)
        self.step = ""
        return Try(item, "success", None, rows)

    def _call(self):
        """Return what run() returns, and check() passes."""
        callee = self.callee
        self.interrupts.own_argv(self.tool)  # not for get_connection(), a part of the program
        try:
            result = take_result(callee, find_value(callee.run, callee.run(**self.chosen)))
        except SystemExit as error:  # ends the try, not the run
            if not is_good_exit(error.code):
                raise
            result = None
        call_check(callee, self.given, self.interrupts)
        end_if_copy(self.pid)
        return result

    def _call_guarded(self, name):
        """Return what run() returns for an item, which may not end its transaction."""
        guard = self.ledger.guard
        self.chosen["item"] = self.given["item"] = name
        guard.is_up, guard.tried = not self.tool.commits, ""
        try:
            result = self._call()
        except (Exception, SystemExit) as error:
            if guard.tried:
                raise PermissionError(_REFUSED % guard.tried) from error
            raise
        finally:
            guard.is_up = False
        if guard.tried:
            raise PermissionError(_REFUSED % guard.tried)
        if self.is_watched:
            self._check_transaction()
        return result

    def _check_transaction(self):
        """Raise RuntimeError if the transaction of an item is over or can not be committed."""
        conn, kind = self.ledger.raw, self.ledger.kind
        if kind == "sqlite":
            if not conn.in_transaction:
                raise RuntimeError("SQLite undid its transaction after an error that was ignored")
        elif kind not in ("mysql", "mariadb") and is_aborted(conn):
            raise RuntimeError("an error of the database was caught and ignored, after which "
                               "nothing can be committed")

    def _release(self):
        """Leave the savepoint of an item. Raise EndedEarly if it is gone."""
        try:
            self.ledger.leave_item()
        except Exception as error:
            raise EndedEarly(_ENDED_EARLY) from error

    def _check_ended_early(self, error):
        """Raise EndedEarly if an item that failed had ended its transaction before."""
        try:
            self.ledger.undo_item()
        except Exception:
            if is_locked(error) and self.ledger.kind in ("mysql", "mariadb"):
                return  # a deadlock undoes all of the transaction there, and its savepoints
            raise EndedEarly(f"{format_one_line(error)}; {_ENDED_EARLY}") from error

    # --- how one failed ---

    def _record_failure(self, item, text, error=None):
        """Record a failed try of an item, which its counts hold, in a transaction, if it is not
        recorded; return how it ended.
        """
        duration_s = None if error is None else time.monotonic() - self.started_s
        # One that ended its transaction may have been done: it is not done again unasked.
        is_left = item.deaths >= DEATHS_ALLOWED or isinstance(error, EndedEarly)
        is_final = item.tries > self.tool.retries and not item.is_death
        status = "quarantined" if is_left else "failed" if is_final else "pending"

        item = item._replace(charge="")
        before = item._replace(tries=item.tries - (not item.is_death),
                               deaths=item.deaths - item.is_death)

        def record(is_urgent):
            """Record it; return how the item had ended, if somebody has recorded that before."""
            self._begin(is_urgent)
            self.step = "in the ledger: "
            # It may have been recorded before: its process ended then, or a former charge did.
            found, known, rows, problem = self.ledger.look(before)
            is_known = known != "pending" or count_tries(found) > count_tries(before)
            if not is_known:
                self.ledger.record(item._replace(is_seen=found.is_seen), status, time.time(),
                                   duration_s, error=text)
            self.database.commit()
            return Try(found, known, None, rows, problem or text) if is_known else None

        self.is_own_fault, self.at_work = False, None
        known = self._insist(record)
        self.step, self.is_lost = "", False
        trace = format_traceback(error, self.setting.verbose) if error else ""
        # One in memory is soon forgotten.
        item = item._replace(is_seen=None if self.ledger.is_apart else True)
        return known or Try(item, status, error=text, traceback=trace)

    def _make_failure(self, error):
        """Return how a try of a tool without items failed, or a job of one that has some."""
        had_ended = "its transaction had ended before: what it committed stays" * self.had_ended
        return Try(self.at_work, "failed", error=self.step + format_one_line(error),
                   traceback=format_traceback(error, self.setting.verbose),
                   reason=join_reasons(find_hint(error), explain_exit(error), had_ended))

    def _make_problem(self, error):
        """Return what kept the job from the rest."""
        end_if_copy(self.pid)
        if self.database.is_open:
            self.database.rollback()
        if self.interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
            return Try(self.at_work, "interrupted", reason=format_signal(self.interrupts.signal))
        if isinstance(error, UserError):
            return Try(None, "failed", error=error.problem, reason=NOT_AGAIN)
        if isinstance(error, ToolError):
            self.step, error = str(error), error.__cause__
        return self._make_failure(error)

    # --- which items there are ---

    def _list_items(self):
        """Yield the items that are pending, page by page, and how many there are."""
        self._insist(self._find_items)
        ledger, job = self.ledger, self.job
        others = ledger.find_others()
        pending, given_up, page = 0, [], []
        for item, status, run_id in ledger.find_pending():
            is_of_this_run = run_id == job.run_id
            if not self._is_given_up(item, status, is_of_this_run):
                pending += 1
                page += [item] * (job.only in (None, item.name))
            elif not is_of_this_run or job.attempt == 1:  # else it is counted
                given_up.append(item.name)
            if len(page) == _PAGE:
                yield "found", page
                page = []
        listed = ledger.count_listed()
        if job.only is not None and not ledger.count_listed(job.only):
            raise UserError(f"there is no item {job.only!r} among the {listed} that are listed")
        is_hopeless = bool(given_up) and not ledger.has_passed()
        self.database.commit()
        self.step = ""
        yield "found", page
        yield "listed", {
            "counts": {"listed": listed, "pending": pending, "given_up": len(given_up)},
            "reason": self._describe_left_out(given_up, others if pending else ()),
            "is_hopeless": is_hopeless}

    def _is_given_up(self, item, status, is_of_this_run):
        """Return whether an item that is not done is left alone: until it changes, or somebody
        asks for it. Without retries one that failed comes again in the next run.
        """
        return status == "quarantined" or status == "failed" and (
            is_of_this_run or 0 < self.tool.retries < item.tries)

    def _describe_left_out(self, given_up, others):
        """Return what to say of items that are there and not to be done."""
        doubles, reasons = self.ledger.doubles, []
        if given_up:
            reasons.append(f"{count_items(len(given_up))} given up before: "
                           f"{format_names(given_up[:3], len(given_up))}; "
                           f"{format_retry(self.tool.name)}")
        if doubles:
            reasons.append("left out, since the name came before: "
                           + format_names(doubles[:3], len(doubles)))
        if others:
            reasons.append(f"the ledger has items of this tool in pipeline {others[0]!r}, not in "
                           f"{self.setting.pipeline.name!r}: its NAME says which it is")
        return "; ".join(reasons)

    def _find_items(self, is_urgent):
        """Bring what items() gives into the database, and let have their tries again those of
        which that was asked.
        """
        if self.ledger is None:
            self._open()
        if self.tool.each and self.ledger.is_apart and not self.setting.folder:
            raise UserError(f"nothing tells which items passed {self.tool.each}: there is neither "
                            "a database nor a history")
        self._connect()
        self.database.begin(is_urgent, self.tool.commits)
        self._choose_arguments()
        self.interrupts.call(self._bring_items)
        wanted = self.job.retry if self.job.only is None else (self.job.only,)
        missing = [] if wanted is None else self.ledger.give_back(wanted)
        if missing and self.job.only is None:
            raise UserError(f"{format_names(missing, len(missing))} can not be tried again: not "
                            "given up")

    def _bring_items(self):
        """Call items(), and hand what it gives to the ledger."""
        found = ()
        self.interrupts.own_argv(self.tool)
        if self.callee.items is not None:
            try:
                found = self.callee.items(**choose_arguments(self.callee.items_takes, self.given))
                found = wait_for(found) if hasattr(found, "__await__") else found
            except SystemExit as error:  # there are none
                if not is_good_exit(error.code):
                    raise
            if isinstance(found, Mapping):
                raise TypeError("items() returned a dict; for names and versions, return its "
                                ".items()")
            if not isinstance(found, Iterable) or isinstance(found, bytes):
                raise TypeError(f"items() returned {format_type(found)}; it returns a list of "
                                "names, or yields them, or returns the text of a SELECT")
        try:
            self.ledger.list_items(found if isinstance(found, str) else until_exit(found),
                                   self.tool.each)
        except UnicodeEncodeError as error:
            raise ValueError(f"items() gave {error.object!r}, which is no text that a database "
                             "keeps: rename the file, or leave it out") from error


def until_exit(found):
    """Yield what items() yields; sys.exit() ends that, and is a failure as it is elsewhere."""
    try:
        yield from found
    except SystemExit as error:
        if not is_good_exit(error.code):
            raise


def format_retry(tool):
    """Return what to type to have the items of a tool tried again that are given up."""
    import shlex
    word = f'"{tool}"' if os.name == "nt" and " " in tool else shlex.quote(tool)
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
    return name if name.isprintable() and not re.search(r"[\s,'\"]", name) else repr(name)


_ENDED_EARLY = ('it ended its transaction inside the item, so that it may have been done: leave '
                'commit and rollback to the engine (CREATE TABLE commits, too, on MySQL), or say '
                '"commits": True and take at-least-once')
_REFUSED = ("%s was refused inside an item, which the engine commits: take conn.commit(), "
            "conn.rollback(), `with conn:` and executescript() out, or say \"commits\": True in "
            "TOOL_MAP and take at-least-once")


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
        self.put_back = make_put_back() if kept.interrupts.is_on_main_thread else lambda: None
        self.job = None

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
        self.capture.begin(job.log)
        try:
            perform(job, self.setting, self.hear, self.kept)
        finally:
            self.put_back()
        return self.capture.end()


OUTPUT_LOST = 50  # the level of the log event that tells so: CRITICAL, as in logging


class Capture:
    """Keeps a copy of what Python code prints in this process in the log of the attempt that
    runs. Streams and descriptors stay what they are: what C code and child processes print is
    seen, and not kept; that of a tool with a process of its own is.

    State: `log`, the file of the attempt that runs, made at the first byte; `log_fd`; `error`,
    what could not be written, if anything.
    """

    def __init__(self, is_kept):
        self.streams = {"stdout": sys.stdout, "stderr": sys.stderr} if is_kept else {}
        self.log, self.log_fd, self.error = "", -1, ""

    def __enter__(self):
        import threading
        self.lock = threading.RLock()  # threads of a tool print, too
        for name, stream in self.streams.items():
            if stream is not None:
                setattr(sys, name, Copier(stream, self, name))
        return self

    def __exit__(self, *_):
        self.end()
        for name, stream in self.streams.items():
            setattr(sys, name, stream)

    def begin(self, log):
        """Let what is printed from now on go into a log as well."""
        self.log = log

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
                trim_log(log)
        return fd >= 0

    def keep(self, text):
        """Write a text to the log of the attempt that runs, if there is one."""
        with self.lock:
            try:
                if self.log and self.log_fd < 0:
                    self.log_fd = open_log(self.log)
                if self.log:
                    write_all(self.log_fd, text.encode("utf-8", "backslashreplace"))
            except OSError as error:  # no reason for a tool to fail, but to say so
                self.error = f"{self.log} could not be written: {error.strerror}"


class Copier:
    """A stream of Python's of which a copy is kept. Nothing that can not be shown is a reason for
    a tool to fail: nobody reads it, the disk is full, the stdout of a cron job lacks a letter.
    """

    def __init__(self, stream, capture, name):
        self._stream, self._capture, self._name = stream, capture, name

    def write(self, text):
        """Write a text, and keep it."""
        stream, capture = self._stream, self._capture
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


_SIGNALS = [getattr(_signal, name) for name in (
    *Interrupts.NAMES, "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGUSR1", "SIGUSR2")
    if hasattr(_signal, name)]


def make_put_back():
    """Return a function that puts back what tools change of this process: its working folder, its
    streams, how signals are taken, the mask of new files, how deep calls may go, and which logging
    is off. On another thread than the main one, neither it nor tools can do that.
    """
    stdin, stdout, stderr = sys.stdin, sys.stdout, sys.stderr
    handlers = [(number, _signal.getsignal(number)) for number in _SIGNALS]
    limit, mask, folder = sys.getrecursionlimit(), os.umask(0o077), find_working_folder()
    os.umask(mask)
    logging = sys.modules.get("logging")
    disabled = logging.root.manager.disable if logging else 0

    def put_back():
        """Put it back."""
        sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
        for number, handler in handlers:
            if handler is not None and _signal.getsignal(number) is not handler:
                _signal.signal(number, handler)
        if sys.getrecursionlimit() != limit:
            sys.setrecursionlimit(limit)
        os.umask(mask)
        if find_working_folder() != folder:
            with contextlib.suppress(OSError):  # the tool removed it
                os.chdir(folder)
        if "logging" in sys.modules:
            sys.modules["logging"].disable(disabled)

    return put_back


def is_own_fd(stream, fd):
    """Return whether a stream of Python is one of the process's own file descriptors."""
    try:
        return stream.fileno() == fd and hasattr(stream, "reconfigure")
    except (AttributeError, OSError, ValueError):
        return False


def write_all(fd, content):
    """Write all of some bytes."""
    while content:
        content = content[os.write(fd, content):]


class Worker:
    """A worker process as its orchestrator sees it; `pid` is 0 until it is known.

    State: `job`, what it does, if anything; `limit_s`, how long that, or an item of it, may take,
    and `deadline_s`, when the next measure is due: to ask it to end, then to kill it; `verdict`,
    why it is being ended, if it is; `at_work`, the item that it was seen at last.
    """

    def __init__(self, channel, pid=0):
        self.channel, self.pid = channel, pid
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
    so that nothing of a tool outlives it. What takes too long is asked to end, by SIGTERM, and
    killed after a grace. State: `workers`; `idle`, those of them that wait for a job.
    """

    def __init__(self, count, setting, clock, grace_s):
        self.setting, self.clock, self.grace_s = setting, clock, grace_s
        server = Server(setting)
        self.starter = Nursery(server) if can_fork() else Spawner(server)
        self.workers = []
        self.idle = [self._add() for _ in range(count)]

    def _add(self):
        worker = self.starter.start()
        self.workers.append(worker)
        return worker

    def reserve(self):
        """Return the id of the process that will do what is started next, as far as can be
        foreseen.
        """
        if not self.idle:
            self.idle.append(self._add())
        if not self.idle[-1].pid:
            self.starter.settle()
        return self.idle[-1].pid

    def start(self, job, limit_s):
        """Hand a job to an idle worker, or to a new one."""
        while True:
            worker = self.idle.pop() if self.idle else self._add()
            try:
                worker.channel.send(job)
                break
            except OSError:
                pass  # it died while idle
        worker.begin(job, limit_s, self.clock.monotonic())

    def answer(self, number, found):
        """Send what a job has asked for."""
        for worker in self.workers:
            if worker.job and worker.job.number == number:
                with contextlib.suppress(OSError):  # it died meanwhile
                    worker.channel.send(found)

    def wait(self, timeout_s):
        """Return the messages that came within some seconds."""
        from multiprocessing.connection import wait
        now_s = self.clock.monotonic()
        for worker in self.workers:
            if worker.deadline_s < float("inf"):
                self._look_at_clock(worker, now_s)
        timeout_s = min([timeout_s, *(worker.deadline_s - now_s for worker in self.workers)])
        channels = {worker.channel: worker for worker in self.workers if worker.channel}
        said = []
        for ready in wait([*channels, *self.starter.waitables()], max(0.0, timeout_s)):
            if ready in channels:
                self._hear(channels[ready], said)
        for pid, status in self.starter.collect():
            worker = next(worker for worker in self.workers if worker.pid == pid)
            while worker.channel and worker.channel.poll():
                self._hear(worker, said)
            self._bury(worker, status, said)
        return said

    def _hear(self, worker, said):
        try:
            kind, number, what = worker.channel.recv()
        except (EOFError, OSError):
            worker.hang_up()  # the starter will tell how it ended
            return
        if kind == "ended":
            what, is_leaving = what
            if worker.verdict and what:
                kind, what = "died", (what.item, worker.verdict, True, "")
            if worker.verdict:  # it would take the signal for one that ends the next
                worker.hang_up()
            elif not is_leaving:
                self.idle.append(worker)
            worker.begin(None)
        said.append((kind, number, what))

    def _bury(self, worker, status, said):
        """Take a worker out that has ended, and say what became of its job."""
        worker.hang_up()
        self.workers.remove(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        if worker.job:
            slip = find_slip(self.setting.slips, worker.job.run_id, worker.pid)
            how = worker.verdict or format_end(status)
            said.append(("died", worker.job.number,
                         (read_slip(slip)[2], how, bool(worker.verdict), slip)))

    def _look_at_clock(self, worker, now_s):
        """End what has run too long, and kill what would not end."""
        if not worker.verdict and worker.job.items:
            slip = find_slip(self.setting.slips, worker.job.run_id, worker.pid)
            at_work = read_slip(slip)[2]
            if at_work != worker.at_work:  # the limit is for each item
                worker.at_work, worker.deadline_s = at_work, now_s + worker.limit_s
        if worker.deadline_s > now_s:
            return
        if worker.verdict:
            signal_group(worker.pid, "SIGKILL")
            worker.deadline_s = now_s + self.grace_s
        else:
            self._end(worker, f"timed out after {format_duration(worker.limit_s)}")

    def _end(self, worker, verdict):
        """Ask a worker to end; _look_at_clock() kills it after the grace."""
        self.starter.settle()  # every pid is known after that
        worker.verdict, worker.deadline_s = verdict, self.clock.monotonic() + self.grace_s
        signal_group(worker.pid, "SIGTERM")

    def interrupt(self):
        """Ask all that is being done to end."""
        for worker in self.workers:
            if worker.job:
                self._end(worker, "interrupted")

    def close(self, grace_s):
        """End all workers: the idle ones at once, others within the grace."""
        for worker in self.workers:
            if not worker.job:
                worker.hang_up()
        self.starter.settle()
        end_s = time.monotonic() + grace_s
        while self.workers:
            left_s = end_s - time.monotonic()
            if left_s < 0:
                for worker in self.workers:
                    signal_group(worker.pid, "SIGKILL")
            self.wait(max(0.1, min(left_s, 1.0)))
        self.starter.close()


def can_fork():
    """Return whether workers may be forked: on Linux, while no other thread holds a lock."""
    if not sys.platform.startswith("linux") or os.environ.get("ORCHESTRATOR_SPAWN"):
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def signal_group(pid, name):
    """Send a signal to a worker and all that it started; where there are no groups, end it."""
    import signal
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(pid, getattr(signal, name))
        else:
            os.kill(pid, signal.SIGTERM)


def format_end(status):
    """Return how a process ended, in words; `status` is negative for a signal."""
    import signal
    if status >= 0:
        return "its process exited without finishing" + (f" (exit code {status})" if status else "")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "a real-time signal"
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"its process was killed by signal {-status} ({name}){hint}"


class Nursery:
    """Forks workers from a process that was itself forked before anything was opened.

    So no connection, thread or lock of ours crosses a fork, and a worker starts in milliseconds.
    We ask over a socket, handing over the worker's end of its channel; the answers are pairs
    (pid, status), with the status NEWBORN for a new worker. `born` holds the workers whose pid
    is not known yet, in order; `dead` the pairs that were read meanwhile.
    """
    NEWBORN = 1 << 20

    def __init__(self, server):
        import socket
        self.socket, theirs = socket.socketpair()
        life, self.life = os.pipe()  # its writing end is ours alone: it closes when we die
        self.born = []
        self.dead = []
        flush(sys.stdout)
        flush(sys.stderr)
        self.pid = os.fork()
        if not self.pid:
            try:
                self.socket.close()
                os.close(self.life)
                tend(theirs, life, server)
            finally:
                os._exit(EXIT_BUG)
        theirs.close()
        os.close(life)

    def start(self):
        """Return a new worker, which is on its way."""
        import socket
        from multiprocessing import Pipe
        ours, theirs = Pipe()
        socket.send_fds(self.socket, [b"w"], [theirs.fileno()])
        theirs.close()
        self.born.append(Worker(ours))
        return self.born[-1]

    def waitables(self):
        """Return what becomes readable when a worker has ended."""
        return [self.socket]

    def collect(self):
        """Return the (pid, exit status) of workers that have ended."""
        import select
        while select.select([self.socket], [], [], 0)[0]:
            self._read()
        dead, self.dead = self.dead, []
        return dead

    def settle(self):
        """Wait until the pid of every worker is known."""
        while self.born:
            self._read()

    def _read(self):
        import struct
        answer = self.socket.recv(struct.calcsize("ii"), 0x100)  # MSG_WAITALL
        if not answer:
            raise RuntimeError("the process that starts the workers was killed")
        pid, status = struct.unpack("ii", answer)
        if status == self.NEWBORN:
            self.born.pop(0).pid = pid
        else:
            self.dead.append((pid, status))

    def close(self):
        """End the nursery, and with it whatever is left of its workers."""
        self.socket.close()
        os.close(self.life)
        os.waitpid(self.pid, 0)


def tend(socket, life, server):
    """Fork workers as asked over a socket, and tell how each ends. Runs in the nursery."""
    import select
    import signal
    from socket import recv_fds
    wake, waker = os.pipe()
    for each in (wake, waker):
        os.set_blocking(each, False)
    ours = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup is for workers too
        ours.append(signal.SIGHUP)
    for number in ours:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker)
    workers = []
    while True:
        ready, _, _ = select.select([socket, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            bury_dead(socket, workers)
        if socket in ready:
            asked, fds, _, _ = recv_fds(socket, 1, 1)
            if not asked:
                break
            pid = os.fork()
            if not pid:
                for each in (wake, waker, socket.detach()):
                    os.close(each)
                signal.set_wakeup_fd(-1)
                for number in ours:
                    signal.signal(number, signal.SIG_DFL)
                server.serve_forked(fds[0], life)
            own_group(pid)
            workers.append(pid)
            send_pair(socket, pid, Nursery.NEWBORN)
            os.close(fds[0])  # or the end of the worker would not be seen
    for pid in workers:
        signal_group(pid, "SIGKILL")
    os._exit(EXIT_SUCCESS)


def bury_dead(socket, workers):
    """Tell of each worker that has ended, and end what it left in its group. In the nursery."""
    while workers:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return
        signal_group(ended.si_pid, "SIGKILL")  # while it is a zombie, its id is nobody else's
        _, status = os.waitpid(ended.si_pid, 0)
        workers.remove(ended.si_pid)
        send_pair(socket, ended.si_pid, -os.WTERMSIG(status) if os.WIFSIGNALED(status)
                  else os.WEXITSTATUS(status))


def send_pair(socket, pid, status):
    """Tell the orchestrator of a worker. In the nursery."""
    import struct
    with contextlib.suppress(OSError):  # it is gone; the end of the socket says so too
        socket.sendall(struct.pack("ii", pid, status))


def own_group(pid):
    """Put a process into a group of its own, if the system has groups."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(pid, pid)


class Spawner:
    """Starts workers as fresh interpreters: where we can not fork, or other threads are about."""

    def __init__(self, server):
        from multiprocessing import get_context
        check_can_spawn(server.setting.pipeline.get_connection)
        self.server, self.context = server, get_context("spawn")
        self.life_read, self.life = self.context.Pipe(duplex=False)
        self.processes = {}

    def start(self):
        """Return a new worker."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=self.server.serve, args=(theirs, self.life_read))
        process.start()
        theirs.close()
        self.processes[process.pid] = process
        return Worker(ours, process.pid)

    def waitables(self):
        """Return what becomes readable when a worker has ended."""
        return [process.sentinel for process in self.processes.values()]

    def collect(self):
        """Return the (pid, exit status) of workers that have ended."""
        dead = []
        for pid, process in list(self.processes.items()):
            if process.exitcode is not None:
                signal_group(pid, "SIGKILL")
                process.join()
                dead.append((pid, process.exitcode))
                del self.processes[pid]
        return dead

    def settle(self):
        """Every pid is known from the start."""

    def close(self):
        """Let go of what the workers watch."""
        self.life.close()
        self.life_read.close()


def check_can_spawn(get_connection):
    """Raise UserError if fresh interpreters could not import what they need."""
    import pickle
    main_file = getattr(sys.modules["__main__"], "__file__", None)
    is_in_notebook = get_connection.__module__ == "__main__" and not main_file
    try:
        pickle.dumps(get_connection)
    except Exception:
        is_in_notebook = True
    if is_in_notebook:
        raise UserError("get_connection can not be sent to a worker process: it is a lambda, or "
                        "was defined inside a function or a notebook.",
                        "Write it with `def` at the top of a module, or run without jobs, timeout, "
                        "memory and isolate.")
    if main_file and main_file.endswith(".py") and not has_main_guard(main_file):
        raise UserError(f"{format_path(main_file)} would run again in every worker process.",
                        'Put what it does under `if __name__ == "__main__":`.')


def has_main_guard(file):
    """Return whether a script does something only if it is the main program, or nothing at all."""
    import ast
    with open(file, "rb") as source:
        tree = ast.parse(source.read())
    calls = [node for node in tree.body if isinstance(node, (ast.Expr, ast.Assign))
             and isinstance(node.value, ast.Call)]
    guards = [node for node in tree.body if isinstance(node, ast.If)
              and "__name__" in {getattr(n, "id", "") for n in ast.walk(node.test)}]
    return bool(guards) or not calls


class Server:
    """What a worker does: it does jobs until its channel closes. Runs in the worker."""

    def __init__(self, setting):
        self.setting = setting

    def serve_forked(self, channel_fd, life_fd):
        """Be a forked worker. Does not return."""
        from multiprocessing.connection import Connection
        try:
            self.serve(Connection(channel_fd), Connection(life_fd))
        finally:
            os._exit(EXIT_BUG)

    def serve(self, channel, life):
        """Do jobs one after another. Does not return."""
        import threading
        own_group(0)
        die_with_orchestrator(life)
        self.channel, self.pid, self.told_s = channel, os.getpid(), 0.0
        self.lock = threading.RLock()  # threads of a tool share the channel, one message at a time
        if self.setting.folder:
            hold_worker_byte(self.setting.folder)
        own_streams()
        with Interrupts() as self.interrupts:
            kept = Kept(self.setting, self.interrupts, self.ask, self.pack)
            self.put_back, is_leaving = make_put_back(), False
            while not is_leaving and self.interrupts.signal is None:
                try:
                    self.job = channel.recv()
                except (EOFError, OSError):
                    break
                children = count_children()
                problem = self.do(kept)
                end_if_copy(self.pid)
                is_leaving = self.interrupts.signal is not None or count_children() != children
                if is_leaving:
                    kept.close()
                number, self.job = self.job.number, None
                with self.lock:
                    channel.send(("ended", number, (problem, is_leaving)))
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
                self.put_back()
            return ended[0][2]
        except Exception as error:  # what the tool did to this process reaches the engine
            return Try(None, "failed", error="in its worker: " + format_one_line(error),
                       traceback=format_traceback(error, verbose=True))

    def send(self, message):
        """Send a message to the run; of events that tell of progress, ten a second."""
        if message[0] != "event":
            self._send(message)  # no tool is being called now
            return
        what = message[2]
        if what["kind"] == "progress":
            now_s = time.monotonic()
            if now_s - self.told_s < 0.1 and what["done"] != what["total"]:
                return
            self.told_s = now_s
        self.interrupts.finish(self._send, message)

    def _send(self, message):
        with self.lock, bounded_memory(2**62):  # the tool's own bound would tear it
            self.channel.send(message)

    def ask(self, job, tool):
        """Return the result of a tool that the one of a job may see, or the names of all for None.

        So what nobody reads is not sent, and a worker keeps nothing.
        """
        if os.getpid() != self.pid or job is not self.job:
            raise RuntimeError("context.results can not be read in a process that the tool started "
                               "or after the tool has ended: read it before, in run() itself")
        name = str.__str__(tool) if isinstance(tool, str) else None  # nothing strange may travel
        if tool is not None and name is None:
            raise KeyError(tool)
        return self.interrupts.finish(self._ask, job.number, name)

    def _ask(self, number, name):
        with self.lock, bounded_memory(2**62):
            self.channel.send(("asks", number, name))
            found = self.channel.recv()
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
    import signal
    import threading
    if sys.platform.startswith("linux"):
        import fcntl
        import select
        # Reopened, because the owner belongs to the open file, which all workers would share.
        fd = os.open(f"/proc/self/fd/{life.fileno()}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([fd], [], [], 0)[0]:  # it died before we listened
            signal_group(os.getpid(), "SIGKILL")
        return

    def watch():
        with contextlib.suppress(EOFError, OSError):
            life.recv_bytes()
        signal_group(os.getpid(), "SIGKILL")

    threading.Thread(target=watch, daemon=True).start()


def find_working_folder():
    """Return the working folder, or "" if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def flush(stream):
    """Let what Python keeps of its output go out, unless the tool closed the stream."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass


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
    point_output(open_log(file))
    try:
        yield
    finally:
        closed = []  # by the tool
        for fd, name in ((1, "stdout"), (2, "stderr")):
            try:
                getattr(sys, name).flush()
            except (AttributeError, OSError, ValueError):
                closed.append((fd, name))
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
    if limit_bytes is None or os.name == "nt":
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
    if os.name == "nt":
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
    them where there are no names, and of all tools if it is None. find_said: see
    check_are_taken(). grace_s: see run_pipeline().
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
    on_event: Optional[Callable[[Event], None]] = None
    clock: Clock = Clock()
    find_said: Callable[[], Mapping[str, str]] = dict


def run_plan(session):
    """Carry out the plan of a session and return how it ended.

    Raise UserError, before anything has run, if a module can not be imported or called, or an
    argument reaches no tool; and if the history can not be written.
    """
    pipeline, plan, history = session.pipeline, session.plan, session.history
    tools = [pipeline.tools[step.tool] for step in plan.steps if not step.success]
    check_get_connection(pipeline.get_connection)
    check_modules_exist(tools)
    check_each(pipeline, tools)
    count, workers = min(plan.jobs, sum(needs_worker(tool, plan.jobs) for tool in tools)), None
    with contextlib.ExitStack() as stack:
        folder = history.folder
        if count and not folder:
            import shutil
            import tempfile
            folder = tempfile.mkdtemp(prefix="orchestrator-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        setting = Setting(pipeline, dict(session.arguments), session.verbose, history.folder,
                          folder and os.path.join(folder, "slips"))
        if count:  # before anything is opened: neither threads nor connections are inherited
            history.close()
            workers = Workers(count, setting, session.clock, session.grace_s)
            stack.push(lambda kind, *_: workers.close(0.0 if kind else session.grace_s))
        interrupts = stack.enter_context(Interrupts())
        callees, sources = load_all(tools, setting.arguments, interrupts)
        check_are_taken(setting.arguments, callees, pipeline.tools, session.find_said)
        run = Run(session, setting, interrupts, callees, sources, workers)
        with Capture(bool(history.folder)) as capture:
            kept = Kept(setting, interrupts, run.returned.find)
            kept.callees = callees
            with contextlib.closing(kept):
                run.loop(Here(setting, kept, capture, run.hear))
        if capture.error:
            run.tell("log", text=capture.error, level=OUTPUT_LOST)
        return run.end()


def load_all(tools, arguments, interrupts):
    """Return the tools, imported, by name, and the Sources of what they were then."""
    sources = Sources(is_of_run=True)
    for tool in tools:
        if tool.cache_s is not None:
            sources.find(tool)
    callees = interrupts.call(load_callees, tools, arguments, interrupts)
    for callee in callees.values():
        if callee.has_items:
            sources.find(callee.tool)
    sources.note_imported()
    return callees, sources


def find_retries(session, callees):
    """Return by tool the items to try again that were given up. Raise UserError if items are
    asked for of a tool that has none or is not in the plan.
    """
    having = [tool for tool, callee in callees.items() if callee.has_items]
    steps = session.plan.steps
    if session.request.item is not None and (len(steps) > 1 or not having):
        raise UserError("--item is for a single tool with items; the plan has "
                        f"{', '.join(step.tool for step in steps[:5])}.",
                        "Name one" + (": " + having[0] if having else "") + ".")
    if session.retry_items is None:
        return dict.fromkeys(having, ())
    for tool in session.retry_items:
        if tool not in having:
            raise UserError(f"--retry-items: {tool!r} is no tool with items in this plan.",
                            format_nearest(tool, having) if having else
                            "Name such a tool as a target, too.")
    return session.retry_items


def needs_worker(tool, jobs):
    """Return whether a tool is to run in a worker: where others run beside it, or on its own
    wish for a process that can be ended or bounded.
    """
    return jobs > 1 or tool.isolate or tool.timeout_s is not None or tool.memory_bytes is not None


class Returned:
    """What tools returned, for those that wait for them.

    State: `results`, by tool; where they are not kept to the end, `users`, how many tools still
    wait for each, of the tools that each of them `sees`. Of those that wait for all before them,
    the last one counts, since it is settled after the others.
    """

    def __init__(self, session):
        from collections import Counter
        self.history, self.keeps_all = session.history, session.keep_results
        self.steps = {step.tool: step for step in session.plan.steps}
        self.position = {tool: i for i, tool in enumerate(self.steps)}
        self.results = {}
        self.sees = {tool: step.edges for tool, step in self.steps.items()}
        for tool in [tool for tool in self.steps if self.steps[tool].needs == ALL_BEFORE][-1:]:
            self.sees[tool] = tuple(self.steps)[:self.position[tool]]
        self.users = Counter(each for seen in self.sees.values() for each in seen)

    def look(self, tool, name):
        """Return in a tuple the result of a tool that another may see: of one that it waits for;
        of one that is not in the plan, the last. It is empty if there is none. For None, return
        the names of all.
        """
        needs = self.steps[tool].needs
        if name is None:
            names = self.results if needs == ALL_BEFORE else needs
            return ([each for each in names if self.look(tool, each)],)
        if name not in needs if needs != ALL_BEFORE \
                else self.position.get(name, len(self.steps)) >= self.position[tool]:
            return ()
        if name in self.results:
            return (self.results[name],)
        success = name not in self.steps and self.history.find_success(name)
        return (load_result(success),) if success else ()

    def find(self, job, name):
        """Return a result for the tool of a job, or for None the names of all. Raise KeyError if
        there is none.
        """
        for result in self.look(job.tool, name):
            return result
        raise KeyError(name)

    def answer(self, tool, name):
        """Return the same for a worker: in a tuple, which is empty if there is none."""
        found = self.look(tool, name)
        return found if name is None else tuple(map(pack_result, found))

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
    rows of those that passed; the first error, and the first names that failed; how many failures
    were `told`. `retry` are those that were given up and are to be tried again: see Job.
    """

    def __init__(self, retry):
        self.ended = {"passed": 0, "failed": 0, "elsewhere": 0}
        self.rows, self.error, self.failed_names, self.told = None, "", [], 0
        self.retry = retry

    def count(self):
        """Return how many ended."""
        return sum(self.ended.values())

    def note_failed(self, name, error):
        """Add an item that failed."""
        self.ended["failed"] += 1
        self.error = self.error or error
        self.failed_names += [name] * (self.ended["failed"] <= 3)

    def sum_up(self, listed):
        """Return how the items ended of which that was said, as one Try of their tool."""
        passed, failed, elsewhere = self.ended.values()
        tried, count, error = passed + failed, listed["counts"]["listed"], self.error
        names = ": " + format_names(self.failed_names, failed) if failed > 1 else ""
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

    Constant: `performer`, who does it; `log`, the file for what it prints, which is `output` too
    if another process does; `source` and `last_success_at`: see Job; `facts`, what a success would
    be built on; `ended_before`, how many items ended in former attempts, which the `tally` of a
    tool with items holds too. State: `has_logged`, whether it used context.log or, in this process,
    has printed; `lines`, what it logged so in a worker, which joins the log when what it printed
    has been shown; `listed`, what was said of its items, once that is known; `left`, the next to
    try; `later`, how many come again at some moment; `size`, how many to do at a time; `jobs`, how
    many go on; `problem`, the Try that ended the attempt; `done`, the one that did the tool;
    `outcome`, if it is over and the tool comes again.
    """
    tally = listed = problem = done = outcome = None
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
            self.tally = former.tally if former else Tally(run.retries.get(self.tool.name))
            self.left, self.size = deque(), self.tool.batch
            self.source = hash_item_source(self.tool, run.sources)
            self.ended_before = self.tally.count()
        if run.history.folder:  # else there is nothing to know, and nobody to keep it
            if callee.takes("context"):
                self.last_success_at = run.history.find_last_success_at(self.tool.name)
            if self.tool.cache_s:
                self.facts = find_facts(run.session, self.tool, run.sources)

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
        """Take how some tries ended."""
        for ended in tries:
            doing.left.pop(ended.item and ended.item.name, None)
            if ended.item:
                self.take_item(ended)
            elif ended.status == "success":
                self.done = ended
            else:
                self.problem = ended

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
        count = f"try {tries} of {retries + 1}" if retries else ""
        if item.is_death:
            what = "connection" if ended.error.startswith(_GONE) else "process"
            count = f"it took its {what} down {item.deaths} of {DEATHS_ALLOWED} times"
        if ended.status == "pending":
            then = self.run.come_again(self, item._replace(is_death=False, slip=""),
                                       0 if item.is_death else tries)
        else:
            then = "quarantined" if ended.status == "quarantined" else ""
            self.tally.note_failed(item.name, error)
        self.tell_failed_item(ended, join_reasons(error, count, then))

    def tell_failed_item(self, ended, text):
        """Tell of an item that failed, if not of too many; the log has the traceback of each."""
        traceback = ended.traceback.rstrip()
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
                append_log(self.log, text)

    def hear_found(self, doing, items):
        """Take items that are pending. Those that were at work when a former run was cut off are
        charged with that, unless the tool's source was changed since: that mended it, perhaps.
        """
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
        self.listed, self.tally.retry = listed, None  # what was given back is not once more
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
        """Answer a worker that asks for a result."""
        self.performer.answer(doing.job.number, self.run.returned.answer(self.tool.name, name))

    def hear_ended(self, doing, problem):
        """Take it that a job is over, and what kept it from the rest."""
        run, tool, count = self.run, self.tool, len(doing.job.items)
        if problem is None:
            if count and self.tally:  # the next are to take about _CHUNK_S together
                took_s = max(run.clock.monotonic() - doing.started_s, 1e-6)
                self.size = max(1, min(int(_CHUNK_S * count / took_s), 10 * self.size,
                                       max(_CHUNK_ITEMS, tool.batch)))
        elif problem.status == "interrupted":
            run.is_interrupted = True
        elif problem.item and problem.item.is_death:  # as long as that could not be recorded
            item = problem.item._replace(deaths=problem.item.deaths - 1)
            run.former[tool.name, item.name] = "", doing.job.source, item
        self.problem = self.problem or problem
        if self.listed:
            run.tell("progress", tool.name, done=self.tally.count(),
                     total=self.ended_before + self.listed["counts"]["pending"])

    def hear_died(self, doing, what):
        """Take it that a job is over with its process, or took too long, and what was at work."""
        run, left, (item, how, is_late, slip) = self.run, doing.left, what
        at_work = left.pop(item.name, None) if item else None
        if at_work is None or run.is_interrupted:  # or it was killed by us
            forget_slip(slip, is_told=True)
        if run.is_interrupted:
            self.problem = Try(None, "interrupted", reason=format_signal(run.interrupts.signal))
        elif at_work is None and len(left) == len(doing.job.items):
            self.problem = self.problem or Try(None, "failed", error=how)
        else:
            self.left.extend(each._replace(is_seen=None) for each in left.values())
            if at_work:
                self.charge(at_work._replace(tries=item.tries, deaths=item.deaths), how,
                            not is_late, slip)

    # --- how an attempt ended ---

    def make_outcome(self):
        """Return how the attempt ended."""
        tool, signal = self.tool, self.run.interrupts.signal
        ended = self.problem or self.done or (
            self.tally.sum_up(self.listed) if self.is_over() else
            Try(None, "interrupted", reason=format_signal(signal)))
        error, reason = ended.error, ended.reason
        if ended.status == "failed" and 1 < self.number > tool.retries:
            reason = join_reasons(reason, f"try {self.number} of {tool.retries + 1}")
        if tool.memory_bytes is not None and error.startswith("MemoryError"):
            error += f"; its memory is bounded to {tool.memory_bytes / 2**20:.1f} MB"
        has_log = self.has_logged or self.output and has_bytes(self.output)
        return Outcome(ended.status, reason, ended.result, ended.rows, error, ended.traceback,
                       self.number, self.run.clock.monotonic() - self.started_s,
                       self.log if has_log else "",
                       ended.result.kept if isinstance(ended.result, Packed) else None,
                       self.count_items())

    def count_items(self):
        """Return the counts of items that history keeps."""
        if not self.listed:
            return None
        counts = self.listed["counts"]
        return {**counts, "pending": counts["pending"] + self.ended_before, **self.tally.ended}


_RUNNING = Outcome("running")


class Run:
    """One execution of a plan: what starts, and what the end of a tool means for others.

    Constant: the session and what it holds. Changing: `outcomes` of the tools, with a status before
    they end, too; `open`, the Work of those that are at an attempt, and `waiting`, of those that
    come again; `jobs`, what is being done, by number; `again`, a heap of (moment, number, Work,
    item or None): the only way in which anything comes again, and out of date once the attempt is
    over; `former`, the items that were at work when a run was cut off: see load_slips();
    `is_interrupted`; `told`, the events that the listener hears at the next publish().
    """

    def __init__(self, session, setting, interrupts, callees, sources, workers):
        self.session, self.plan, self.history = session, session.plan, session.history
        self.clock, self.pipeline, self.callees = session.clock, session.pipeline, callees
        self.interrupts, self.sources, self.workers = interrupts, sources, workers
        self.retries = find_retries(session, callees)
        self.returned, self.policy = Returned(session), Policy(session)
        self.steps = self.returned.steps
        self.schedule = Schedule(self.plan.steps, session.pipeline, self.plan.jobs)
        self.outcomes = dict.fromkeys(self.steps, Outcome("pending", "not started"))
        self.open, self.waiting, self.jobs, self.again = {}, {}, {}, []
        self.numbers = iter(range(1, sys.maxsize))  # of jobs, and of what comes again
        self.is_interrupted, self.told = False, []
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
            if self.interrupts.signal is not None and not self.is_interrupted:
                self.is_interrupted = True  # nothing more starts, what runs ends within the grace
                if self.workers:
                    self.workers.interrupt()
            for work in [*self.open.values()]:
                if work.is_over() or self.is_interrupted and not work.jobs:
                    self.end_attempt(work)
            self.bring_again()
            self.start_ready()
            self.publish()
            if not self.open and (self.is_interrupted or not self.waiting):
                return
            self.wait()

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
            self.tell("tick")

    # --- what starts ---

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
            elif work.tool.name in self.waiting:
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
        return len(self.jobs) < self.plan.jobs and not self.is_interrupted

    def start_items(self, is_first):
        """Have more items done where there is room; if `is_first`, of tools of which none are."""
        for tool, work in self.open.items():
            while work.left and not work.problem and self.has_room() \
                    and not (is_first and work.jobs) and self.schedule.take(tool):
                self.start_job(work, work.take(self.plan.jobs))

    def begin_attempt(self, tool):
        """Begin an attempt, for which there is room."""
        former = self.waiting.pop(tool, None)
        if former is None:
            self.move(tool, _RUNNING)
        work = self.open[tool] = Work(self, self.callees[tool], former)
        self.history.begin_attempt(tool, work.number, self.clock.wall(), work.performer.reserve())
        self.tell("tool_started", tool, output=work.output)
        self.publish()
        self.start_job(work, () if work.tally else (None,))

    def start_job(self, work, items):
        """Have some items tried; without any, have them listed."""
        work.jobs += 1
        job = Job(next(self.numbers), work.tool.name, items, not items, work.log,
                  self.ledger_run_id, work.number, work.last_success_at, work.source,
                  self.session.request.item, work.tally and work.tally.retry)
        self.jobs[job.number] = Doing(work, job, self.clock.monotonic(),
                                      {item and item.name: item for item in items})
        work.performer.start(job, work.tool.timeout_s)

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
        comes_again = outcome.status == "failed" and work.problem is not None \
            and outcome.reason != NOT_AGAIN and work.number <= work.tool.retries \
            and self.policy.stopped_by is None and not self.is_interrupted
        if comes_again:
            work.outcome, self.waiting[tool] = outcome, work
            again = self.come_again(work, None, work.number)
            outcome = outcome._replace(reason=join_reasons(
                outcome.reason, f"try {work.number} of {work.tool.retries + 1}", again))
        self.history.end_attempt(tool, outcome, format_facts(work, outcome, self.history.base))
        if comes_again:
            self.tell("tool_retried", tool, outcome=outcome, output=work.output)
        else:
            self.settle(tool, outcome, work.output)
        if work.output:
            self.publish()  # who listens shows the file, before it is cut
            if work.lines:
                append_log(work.log, "\n".join(work.lines))
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
        if outcome.status != "interrupted":
            freed = self.schedule.done(tool)
            if self.policy.stopped_by:  # then nothing that was ready starts any more
                freed[:0] = [each for each in self.schedule.take_all() if each not in self.waiting]
            self.unblock(freed)

    def unblock(self, tools):
        """Make tools ready that wait for nothing any more; settle those that are not to run."""
        for tool in tools:  # which grows
            step = self.steps[tool]
            reason = None if step.success else self.policy.find_hindrance(step)
            if step.success:
                outcome = Outcome("cached", step.reason, load_result(step.success),
                                  step.success.rows)
            elif reason:
                outcome = Outcome("skipped", reason)
                self.history.note(tool, outcome, self.clock.wall())
            else:
                self.schedule.add(tool)
                continue
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
        """Return how the run ended, and tell the listener."""
        for tool, work in self.waiting.items():
            self.move(tool, Outcome("interrupted", "waited for another try", attempts=work.number))
        result = make_result(self.run_id, self.outcomes, self.is_interrupted, self.returned.results,
                             self.clock.monotonic() - self.started_s, self.interrupts.signal)
        load_slips(self.slips)  # which removes those of idle workers that died
        if self.logs:
            with contextlib.suppress(OSError):
                os.rmdir(self.logs)  # if nobody has printed anything
        self.history.end_run(result.status, result.duration_s)
        self.tell("run_ended", result=result)
        self.publish()
        return result


def make_result(run_id, outcomes, is_interrupted, results, duration_s, signal):
    """Return how a run ended, by how its tools did."""
    success, cached, partial, failed, skipped = (
        [tool for tool, outcome in outcomes.items() if outcome.status == status]
        for status in ("success", "cached", "partial", "failed", "skipped"))
    status = "interrupted" if is_interrupted else "failed" if failed or partial else "success"
    return RunResult(run_id, status, success, cached, partial, failed, skipped,
                     {tool: outcomes[tool].error for tool in [*failed, *partial]},
                     Results(results.__getitem__, results.keys), duration_s, outcomes, signal)


def find_facts(session, tool, sources):
    """Return what a success of a tool with `cache` would be built on, before it begins, by the
    columns of `attempts`.
    """
    history = session.history
    return {"source": describe_source(tool, sources),
            "needed": history.find_needed_works(session.pipeline, tool.name),
            "inputs": {"reads": find_reads(tool, history.base, {})}}


def format_facts(work, outcome, base):
    """Return what a success was built on, as JSON, with the files that it wrote; of what failed,
    nothing.
    """
    if not work.facts or outcome.status != "success":
        return {}
    import json
    work.facts["inputs"]["writes"] = find_writes(work.tool, base)
    return {column: json.dumps(fact) for column, fact in work.facts.items()}


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
            left += [step.tool] * (step.success is None)
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
    mine, sources = format_arguments(arguments), Sources()
    texts = [mine]
    if has_period(arguments):  # then a run of all periods will do, too
        texts.append(format_arguments({name: value for name, value in arguments.items()
                                       if name not in PERIOD_ARGUMENTS}))

    def find_whole_success(tool):
        found = [history.find_success(tool, text) for text in texts]
        return max(filter(None, found), key=lambda success: success.work, default=None)

    def find_change(tool, success):
        if success.arguments != mine:
            return "arguments changed"
        if find_day(success.started_at) < str(arguments.get(PERIOD_ARGUMENTS[1]) or ""):
            return "its period has gone on"
        return find_changed_source(success.source, describe_source(tool, sources)) \
            or find_changed_file(tool, history.base, success.inputs)

    find_expected_s = history.find_expected_s if wants_durations else lambda tool: None
    return Past(now, history.find_success, find_whole_success, find_expected_s,
                lambda tool: history.find_needed_works(pipeline, tool), find_change, done,
                is_forced)


def count_jobs(jobs):
    """Return how many tools may run side by side; 0 means the number of cores."""
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 0:
        raise UserError(f"jobs is {jobs!r}, not a whole number from 0 on.",
                        "Give how many tools may run side by side; 0 means one for each core.")
    affinity = getattr(os, "sched_getaffinity", None)
    return jobs or (len(affinity(0)) if affinity else os.cpu_count() or 1)


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


def make_retries(given):
    """Return which items are to be tried again, by tool; none of a tool means all of it."""
    if not isinstance(given, Mapping):
        given = dict.fromkeys(read_targets("retry_items", given), ())
    read_targets("retry_items", given)  # the tools
    return {tool: tuple(read_targets("retry_items", names)) for tool, names in given.items()}


def run_pipeline(targets: Union[str, Sequence[str]], tool_map: Mapping[str, Any],
                 stages: Optional[Mapping[str, Any]] = None,
                 get_connection: Optional[Callable[[], Any]] = None, *,
                 arguments: Optional[Mapping[str, Any]] = None, exclude: Sequence[str] = (),
                 start_from: Optional[str] = None, jobs: int = 1,
                 limits: Optional[Mapping[str, int]] = None, fail_fast: bool = False,
                 verbose: bool = False, name: Optional[str] = None, grace_s: float = GRACE_S,
                 home: Optional[str] = None, resume: Union[bool, str] = False,
                 force: bool = False, wait_s: float = 0.0, item: Optional[str] = None,
                 retry_items: Union[str, Sequence[str], Mapping[str, Sequence[str]]] = (),
                 on_event: Optional[Callable[[Event], None]] = None) -> RunResult:
    """Run targets from Python, as the command line would, and return how that ended.

    targets: names of stages and tools; none means the stage `full`, or else every tool.
    arguments: what tools get by name. on_event: called with each Event; nothing is printed.
    grace_s: seconds between asking a process to end and killing it. home: a folder for the
    history, without which none is kept, and no lock held. resume: True, or the id of a run, whose
    targets and exclusions are taken, and its arguments unless some are given. retry_items: tools,
    or names of items by tool. The other keywords say what flags and tables of the same names say.

    A tool that fails is told in the result; raise UserError for bad input, before anything has
    run: also for an argument that no tool in `tool_map` takes. On the main thread, Ctrl-C, SIGTERM
    and SIGHUP first end the run in order and then do what they would have done without it.
    """
    check_keywords(name, item, home, resume, grace_s, wait_s, on_event)
    forget_modules()
    pipeline = load_pipeline(tool_map, stages, get_connection, name=name, limits=limits)
    request = Request(tuple(read_targets("targets", targets)),
                      tuple(read_targets("exclude", exclude)), start_from)
    check_arguments({} if arguments is None else arguments)
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
        if item is not None:
            request = request._replace(item=item)
        plan = make_plan(pipeline, request.targets, exclude=request.exclude, past=past,
                         start_from=request.start_from, jobs=jobs)
        result = run_plan(Session(
            pipeline, plan, arguments or {}, history, request, fail_fast, verbose,
            grace_s=grace_s, retry_items=make_retries(retry_items), on_event=on_event,
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
    """How text is to look: with colours or without."""
    colour: bool = False

    def paint(self, text, status):
        """Return text in the colour of a status."""
        code = _COLOURS.get(status)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code else text

    def bold(self, text):
        """Return text that stands out."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text


def format_table(columns, rows, style=Style(), has_head=True):
    """Return rows, mappings by column, as aligned lines under the names of columns.

    The column of `>name` is aligned to the right; that of `?name` is left out where it is empty;
    that of `status` is coloured. The last one is not padded: its longest cell may be a page.
    """
    shown = []
    for column in columns:
        name = column.lstrip(">?")
        cells = [format_cell(name, row.get(name)) for row in rows]
        if column[0] == "?" and not any(cells):
            continue
        cells.insert(0, re.sub("_(s|at|id)$|^note$", "", name) if has_head else "")
        width = 0 if column == columns[-1] else max(map(len, cells))
        align = str.rjust if column[0] == ">" else str.ljust
        texts = [align(cell, width) for cell in cells]
        if name == "status":
            texts = [style.paint(text, cell) for text, cell in zip(texts, cells)]
        shown.append(texts)
    head, *lines = ["  ".join(texts).rstrip() for texts in zip(*shown)]
    return [style.bold(head), *lines] if has_head else lines


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


def make_row(row, *columns):
    """Return some columns of a row for --json, with ids and moments as text."""
    def show(name, value):
        if value is not None and name.endswith("_at"):
            return format_moment(value)
        return str(value) if name == "run_id" and value is not None else value

    return {name: show(name, row.get(name)) for name in columns}


def make_list(pipeline, tools, find_summary, find_last):
    """Return what --list shows, as data, for some of the tools and the stages made of them."""
    def make_last(row):
        return row and {**make_row(row, "status", "run_id"), "at": format_moment(row["started_at"])}

    tools_of = {stage.name: {*stage.tools} for stage in pipeline.stages.values()}
    return {
        "tools": [{"name": name, "module": pipeline.tools[name].module,
                   "summary": find_summary(pipeline.tools[name]),
                   "needs": pipeline.needs[name],
                   "stages": [stage for stage, there in tools_of.items() if name in there],
                   "last": make_last(find_last(name))} for name in tools],
        "stages": [{"name": stage, "tools": list(pipeline.stages[stage].tools)}
                   for stage, there in tools_of.items() if there.issubset(tools)],
    }


def format_list(shown, style):
    """Return --list as text."""
    lines = [style.bold("Tools"), *format_table(("name", "?status", "summary"), [
        {"name": "  " + tool["name"], "status": (tool["last"] or {}).get("status"),
         "summary": tool["summary"]} for tool in shown["tools"]], style, has_head=False)]
    if shown["stages"]:
        lines += ["", style.bold("Stages"), *format_table(("name", "tools"), [
            {"name": "  " + stage["name"], "tools": stage["tools"]}
            for stage in shown["stages"]], has_head=False)]
    return "\n".join(lines)


def make_plan_view(plan):
    """Return what --plan shows, as data."""
    return {"steps": [{"tool": step.tool, "wave": step.wave, "action": step.action,
                       "reason": step.reason, "needs": step.needs if step.needs == ALL_BEFORE
                       else list(step.needs), "expected_s": step.expected_s}
                      for step in plan.steps],
            "critical_path": list(plan.critical_path), "expected_s": plan.expected_s}


def format_plan(shown, style, jobs):
    """Return --plan as text: the steps by waves, the critical path, what is expected."""
    steps, expected_s = shown["steps"], shown["expected_s"]
    there = {step["tool"] for step in steps}
    lines = format_table((">wave", "tool", "action", ">expected_s", "reason"), [
        {**step, "expected_s": step["expected_s"] if step["action"] == "run" else None,
         "reason": step["reason"] + format_needs(step, there)}
        for step in sorted(steps, key=lambda step: step["wave"])], style)
    lines += ["", "Critical path: " + format_some(shown["critical_path"], " -> ")]
    if expected_s is not None:
        alone_s = sum(step["expected_s"] or 0.0 for step in steps)
        lines.append(f"Expected: {format_duration(expected_s)} with --jobs {jobs}"
                     + (f", {format_duration(alone_s)} one after another" * (jobs > 1)))
    return "\n".join(lines)


def format_needs(step, there):
    """Return what a step waits for, as a clause; nothing for one that waits for nothing.

    `there` are the tools of its plan.
    """
    if step["action"] != "run" or not step["needs"]:
        return ""
    if step["needs"] == ALL_BEFORE:
        return "; after all before it" if step["wave"] > 1 else ""
    return "; needs " + format_some([need if need in there else f"{need} (not in this plan)"
                                     for need in step["needs"]])


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
    return ", ".join(filter(None, [rows, took, outcome.error, outcome.reason]))


def format_progress(event, width, elapsed_s):
    """Return the live line of a tool: count, rate and time left."""
    rate = event.done / elapsed_s if elapsed_s > 0 else 0.0
    parts = [f"{event.done:,}" + (f" of {event.total:,}" if event.total else "")]
    if rate:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
        if event.total and event.total > event.done:
            parts.append(format_duration((event.total - event.done) / rate) + " left")
    return format_start(event, width) + ", ".join(parts)


def format_summary(result, next_command, style):
    """Return the closing table of a run: every tool, then the verdict and what to type next."""
    lines = format_table(("tool", "status", ">rows", ">duration_s", "note"), [
        {"tool": tool, "status": o.status, "rows": o.rows,
         "duration_s": o.duration_s if o.attempts else None,
         "note": ", ".join(filter(None, [o.error, o.reason]))}
        for tool, o in result.outcomes.items()], style)
    lines += ["", style.paint(result.status, result.status)
              + f": {len(result.succeeded) + len(result.cached)} of "
              + format_plural(len(result.outcomes), "tool")
              + f" done in {format_duration(result.duration_s)} (run {result.run_id})"]
    if next_command:
        lines.append("Next: " + style.bold(next_command))
    return "\n".join(["", *lines])


def format_local(moment):
    """Return a moment of format_moment() as people's clocks say it: `2013-01-01 07:00:00`."""
    from datetime import datetime
    return f"{datetime.fromisoformat(moment.replace('Z', '+00:00')).astimezone():%Y-%m-%d %H:%M:%S}"


def make_status(tools, find_last, running, attempts, now, items):
    """Return what --status shows, as data: the run that goes on, if any, and each tool, with how
    many of its `items` have each status.
    """
    rows = []
    for tool in tools:
        last = {"status": "pending", **(find_last(tool) or {})}
        age_s = max(0.0, now - last["started_at"]) if len(last) > 1 else None  # clocks are set back
        rows.append({"tool": tool, **make_row(last, "status", "run_id", "started_at", "rows"),
                     "age_s": age_s,
                     "duration_s": age_s if last["status"] == "running" else last.get("duration_s"),
                     "reason": last.get("reason") or "", "error": last.get("error") or "",
                     "items": items.get(tool)})
    return {"running": running and {**make_row(running, "run_id", "pid", "started_at"),
                                    "tools": [each["tool"] for each in attempts]}, "tools": rows}


def format_status(shown, style):
    """Return --status as text."""
    lines = format_table(
        ("tool", "status", ">run_id", ">age_s", ">duration_s", ">rows", "?items", "note"),
        [{**tool, "items": format_counts(tool["items"]), "note": tool["error"] or tool["reason"]}
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
    ended = sum(new for status, (_, new) in counts.items() if status != "pending") \
        if "passed" not in listed else sum(listed[key] for key in ("passed", "failed", "elsewhere"))
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
    return make_row(row, "item", "version", "status", "attempts", "deaths", "duration_s", "error",
                    "run_id", "ended_at", "rows")


def format_items(shown, style):
    """Return --items as text."""
    return "\n".join(format_table(
        ("item", "?version", "status", ">tries", "run_id", "ended_at", ">rows", "note"),
        [{**row, **{key: format_names([row[key]], 1) for key in ("item", "version")},
          "tries": row["attempts"] + row["deaths"], "note": row["error"]}
         for row in shown["items"]], style))


def make_backfill_view(periods):
    """Return what --plan shows of a backfill, as data."""
    return {"periods": [{**p.arguments(), "action": p.action, "reason": p.reason,
                         "run_id": p.run_id and str(p.run_id)} for p in periods]}


def format_backfill(shown, style):
    """Return --plan of a backfill as text."""
    periods = shown["periods"]
    lines = format_table((*PERIOD_ARGUMENTS, "action", "reason"), periods, style)
    left = sum(period["action"] != "skip" for period in periods)
    return "\n".join([*lines, "", f"{left} of {format_plural(len(periods), 'period')} to run"])


def make_run_view(run, attempts, is_detailed=False):
    """Return a run as --history shows it, as data: each tool once, as its last attempt ended."""
    of_tools = ["tool", "status", "reason", "attempts", "started_at", "duration_s", "rows", "error"]
    of_run = ["run_id", "status", "targets", "arguments", "started_at", "ended_at", "duration_s",
              "planned"]
    if is_detailed:
        of_tools += ["traceback", "log", "pid", "result", "items"]
        of_run += ["exclude", "start_from", "resumes", "pid", "version", "git_commit"]
    tools = {}
    for row in attempts:
        tools.pop(row["tool"], None)
        tools[row["tool"]] = make_row({**row, "attempts": row["attempt"]}, *of_tools)
    ended_at = None if run["duration_s"] is None else run["started_at"] + run["duration_s"]
    return {**make_row({**run, "ended_at": ended_at}, *of_run), "tools": list(tools.values())}


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
        (">run_id", "status", "started_at", ">duration_s", ">tools", "targets"), rows, style))


def format_run(shown, style):
    """Return --history RUN as text: all that is known of one run."""
    import json
    run, = shown["runs"]
    facts = {"run": run["run_id"] + (f", which resumed run {run['resumes']}"
                                     if run["resumes"] else ""),
             "status": run["status"], "targets": run["targets"], "without": run["exclude"],
             "from": run["start_from"],
             "arguments": json.dumps(run["arguments"], ensure_ascii=False),
             "started": format_local(run["started_at"]),
             "duration": format_duration(run["duration_s"]),
             "version": run["version"] + (f", commit {run['git_commit'][:12]}"
                                          if run["git_commit"] else "")}
    lines = format_table(("name", "value"), [{"name": name, "value": value}
                                             for name, value in facts.items() if value],
                         has_head=False)
    lines += ["", *format_table(
        ("tool", "status", ">attempts", "started", ">duration_s", ">rows", "note"),
        [{**tool, "attempts": tool["attempts"] or None,
          "started": format_local(tool["started_at"])[11:], "note": tool["error"] or tool["reason"]}
         for tool in run["tools"]], style)]
    for tool in run["tools"]:
        if tool["traceback"]:
            lines += ["", style.bold(tool["tool"]), tool["traceback"].rstrip()]
        if tool["log"]:
            lines += [f"log of {tool['tool']}: {tool['log']}"]
    return "\n".join(lines)


# === 12 DOOR ====================================================================================
# The command line: the parser, one command_ function per command, the one listener that prints,
# and the one place where an error becomes a sentence and an exit code. No other logic.

def main(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
         get_connection: Optional[Callable[[], Any]] = None, *,
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
    verbose, code, call = "-v" in argv or "--verbose" in argv, EXIT_SUCCESS, None
    try:
        forget_modules()
        check_not_hidden(yours)
        options, arguments = parse_arguments(add_arguments, argv)
        verbose = options.verbose
        load = read_pipeline if options.command is command_check else load_pipeline
        pipeline = load(tool_map, stages, get_connection, name=name or find_name(), limits=limits)
        base = find_base(get_connection)
        home = home or os.environ.get("ORCHESTRATOR_HOME") or os.path.join(base, ".orchestrator")
        call = Call(pipeline, options, arguments, argv, find_program(), base,
                    find_pipeline_folder(home, pipeline.name), add_arguments)
        code = options.command(call)
        with contextlib.suppress(ValueError):  # it is closed
            if sys.stdout is not None:
                show("", end="")  # what tools printed last goes out while a failure can be told
        return code
    except UserError as error:
        if verbose and error.__cause__:
            say(format_traceback(error.__cause__, verbose))
        say(str(error))
        return error.exit_code
    except SystemExit as done:  # argparse, after --help and --version; or add_arguments()
        if done.code is None or isinstance(done.code, int):
            return done.code or EXIT_SUCCESS
        say(str(done.code))
        return EXIT_FAILED
    except KeyboardInterrupt as error:
        number = next((each for each in error.args if isinstance(each, int)), SIGINT)
        is_run = call is None or call.options.command is command_run
        say(format_signal(number) + ", before anything had run" * is_run)
        return EXIT_SIGNAL + number
    except OutputError as error:
        if error.args:
            say(str(error))
        return code or EXIT_FAILED
    except Exception as error:
        say(format_traceback(error, verbose=True) + format_bug(argv))
        return EXIT_BUG


def find_name():
    """Return the name of a pipeline that has none: that of its file, or of the folder around an
    orchestrator.py.
    """
    file = getattr(sys.modules["__main__"], "__file__", None) or "pipeline"
    folder, name = os.path.split(os.path.splitext(os.path.abspath(file))[0])
    return os.path.basename(folder) or "pipeline" if name == "orchestrator" else name


def check_not_hidden(yours):
    """Raise UserError if the engine's own names hide some that stand above the ENGINE mark."""
    hidden = [name for name, value in yours.items()
              if not name.startswith("__") and globals()[name] is not value]
    if hidden:
        raise UserError("Above the ENGINE mark, the engine's own names hide yours: "
                        + ", ".join(hidden) + ".",
                        "Rename yours, or put them into a module of your own.")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, and whose help is output like any."""

    def _print_message(self, message, file=None):
        show(message, end="")

    def format_help(self):
        """Return the help. Raise UserError for a flag whose help argparse could not show."""
        for action in self._actions:
            text = str(action.help or "").replace("%%", "")
            try:
                if re.search(r"%(?!\()", text):
                    raise ValueError(text)
                text % {**vars(action), "prog": self.prog}
            except (ValueError, TypeError, KeyError):
                raise UserError(f"add_arguments(): a % in the help of {action.option_strings[0]} "
                                "does not begin a name such as %(default)s.",
                                "Write %% for a percent sign.") from None
        return super().format_help()

    def error(self, message):
        """Raise UserError with argparse's sentence."""
        raise UserError(message[:1].upper() + message[1:] + ".", f"See {self.prog} --help.")


def make_parser(add_arguments):
    """Return the parser, and the names of the arguments that tools get.

    add_arguments() declares them on a parser of its own, where it can do all that argparse can.
    """
    # With a width, since argparse would import what finds that of the terminal, for each flag.
    own = Parser(add_help=False, allow_abbrev=False,
                 formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    try:
        if add_arguments is not None:
            add_arguments(own)
        parser = Parser(description=own.description or "Run the tools and stages of this pipeline.",
                        epilog=own.epilog, usage="%(prog)s [TARGET ...] [flags]", parents=[own],
                        allow_abbrev=False, add_help=False)
        parser._optionals.title = "arguments of the tools"
        groups, count = parser._action_groups, len(parser._action_groups)
        add_flags(parser)
        groups[:] = groups[count:] + groups[:count]  # --help shows the engine's first
    except argparse.ArgumentError as error:
        raise UserError(f"add_arguments(): {error.message}.",
                        "Choose another flag: that one is the engine's, or declared twice."
                        ) from error
    except Exception as error:
        raise UserError(f"add_arguments() failed: {format_one_line(error)}",
                        "Mend it; -v shows where.") from error
    flags = {name: f"set_defaults({name}=...)" for name in own._defaults}
    flags.update({action.dest: "".join(action.option_strings[:1]) for action in own._actions})
    engines = [action.dest for action in parser._actions[len(own._actions):]]
    check_flags(flags, {*engines, *RESERVED_ARGUMENTS})
    return parser, list(flags)


def check_flags(flags, engines):
    """Raise UserError for an argument of the tools that has no flag, or a name of the engine's."""
    for name, flag in flags.items():
        if not flag:
            raise UserError(f"add_arguments(): {name!r} is not a flag, and words on the command "
                            "line are stages and tools.", f"Declare it as '--{name}'.")
        if name in engines:
            raise UserError(f"add_arguments(): {flag} would reach tools as {name!r}, which is the "
                            "engine's own name.", "Choose another flag, or another dest=.")


class Choose(argparse.Action):
    """A flag that says which command to do; what follows it is `options.operand`."""

    def __init__(self, *args, command, **kwargs):
        super().__init__(*args, **kwargs)
        self.command = command

    def __call__(self, parser, namespace, values, option=None):
        namespace.command, namespace.operand = self.command, values or None


def read_wait_s(text):
    """Return how long --wait waits."""
    try:
        return parse_duration_s(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no duration like "10m"; write targets before the flag') from None


def read_whole(text):
    """Return a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


_GOES_WITH = {"json": "list plan status history logs items", "failed": "items", "last": "history",
              "run": "logs", "tail": "logs", "follow": "logs", "step": "backfill",
              "reverse": "backfill", "reprocess": "backfill"}  # flag -> commands


def check_companions(options):
    """Raise UserError for a flag that says nothing beside the others that were given."""
    command = options.command.__name__[len("command_"):]
    given = {command, "backfill"} if options.backfill else {command}
    for flag, commands in _GOES_WITH.items():
        if getattr(options, flag) not in (None, False) and given.isdisjoint(commands.split()):
            raise UserError(f"--{flag} goes with --{commands.replace(' ', ', --')}.",
                            "Leave it out, or add that.")
    if len(set(options.item or ())) > 1:
        raise UserError("--item was given twice.", "Leave one out; without it, all are done.")
    said = [*options.targets, *(f"--exclude {name}" for name in options.exclude),
            *["--from"] * bool(options.start_from), *["--no-history"] * options.no_history]
    if said and (options.resume is not None or command == "mark_done"):
        raise UserError("--resume takes targets and exclusions from the run that it goes on with; "
                        f"it does not go with {' '.join(said)}.",
                        "Leave that out, or leave out --resume.")
    if options.backfill and (options.resume is not None or options.no_history):
        raise UserError("--backfill looks into the history for what is done, and goes on there; it "
                        f"does not go with --{'no-history' if options.no_history else 'resume'}.",
                        "Leave that out.")


def add_flags(parser):
    """Declare the engine's own flags."""
    run = parser.add_argument_group("what to run").add_argument
    run("targets", nargs="*", default=[], metavar="TARGET",
        help='stages and tools; +TOOL adds all that it needs, TOOL+ all that needs '
             'it; none means the stage "full", or else every tool')
    run("--exclude", action="append", default=[], metavar="NAME",
        help="leave out this tool or stage (may be repeated)")
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
    run("--item", metavar="NAME", action="append",
        help="do only this item of a tool that has items")
    run("--retry-items", nargs="+", action="append", default=[],
        metavar=("TOOL", "ITEM"),
        help="try items again that were given up: these, or all of the tool")
    run("--backfill", metavar="A..B", help="run once per period from day A to day B, "
        "which tools get as period_start and period_end (the day after the last)")
    run("--step", choices=STEPS, help="with --backfill: how long a period is (day)")
    run("--reverse", action="store_true", help="with --backfill: the last one first")
    run("--reprocess", choices=("failed", "all"),
        help="with --backfill: run periods again that failed, or all")
    run("--wait", nargs="?", type=read_wait_s, const=float("inf"), default=0.0,
        metavar="DURATION", help="wait for another run of this pipeline to end")
    run("--no-history", action="store_true",
        help="keep no history, and take no lock")
    add_commands(parser.add_argument_group("looking and tidying, without running anything"))
    other = parser.add_argument_group("other").add_argument
    other("-v", "--verbose", action="store_true",
          help="show the engine's part of tracebacks, and debug logs")
    other("-q", "--quiet", action="store_true", help="say only what went wrong")
    other("--version", action="version", help="show the versions and exit",
          version=f"orchestrator.py {VERSION}, Python {sys.version.split()[0]}")
    other("-h", "--help", action="help", help="show this help and exit")


def add_commands(look):
    """Declare the flags that do something else than run, and what goes with them."""
    commands = look.add_mutually_exclusive_group()
    for flags, command, operand, text in [
        (("--list",), command_list, {}, "show the tools and stages"),
        (("--plan", "-n", "--dry-run"), command_plan, {}, "show what a run would do, and why"),
        (("--check",), command_check, {},
         "read every module, import none, and report all mistakes"),
        (("--status",), command_status, {}, "show how each tool ended last, and what runs now"),
        (("--history",), command_history, {"nargs": "?", "metavar": "RUN"},
         "show the last runs, or all of one"),
        (("--logs",), command_logs, {"nargs": "?", "metavar": "TOOL"},
         "show what the tools of the last run printed, or one tool"),
        (("--items",), command_items, {"nargs": "+", "metavar": ("TOOL", "ITEM")},
         "show how the items of a tool ended, or some of them"),
        (("--mark-done",), command_mark_done, {"nargs": "+", "metavar": "TOOL"},
         "accept a tool that you mended by hand, for --resume"),
        (("--prune",), command_prune, {"nargs": 1, "metavar": "DURATION"},
         "forget the runs that are older"),
    ]:
        commands.add_argument(*flags, dest="command", action=Choose, command=command,
                              default=command_run, help=text, **{"nargs": 0, **operand})
    flag = look.add_argument
    flag("--last", type=read_whole, metavar="N", help="with --history: so many runs")
    flag("--run", metavar="RUN", help="with --logs: of that run")
    flag("--tail", type=read_whole, metavar="N", help="with --logs: the last N lines")
    flag("--follow", action="store_true",
         help="with --logs: go on while the run goes on")
    flag("--failed", action="store_true",
         help="with --items: those that failed, with their errors")
    flag("--json", action="store_true", help="print JSON for programs")


def parse_arguments(add_arguments, argv, known=None):
    """Return the engine's options, and apart from them the arguments that tools get.

    `known` are arguments that flags override: of a run that is recorded, or none for its words.
    They are taken as they are, and what add_arguments() requires is there; that is required of no
    command but a run either.
    """
    parser, names = make_parser(add_arguments)
    required = [each for each in (*parser._actions, *parser._mutually_exclusive_groups)
                if each.required]
    for each in required:
        each.required = False
    options, unknown = parser.parse_known_intermixed_args(argv, argparse.Namespace(**known or {}))
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"There is no flag {unknown[0]!r}.",
                        format_nearest(unknown[0].partition("=")[0], flags))
    if known is None:
        check_companions(options)
        if required and options.command is command_run and options.resume is None:
            for each in required:  # argparse itself says which of them is missing
                each.required = True
            parser.parse_known_intermixed_args(argv)
    options.item = options.item and options.item[-1]
    return options, {name: value for name, value in vars(options).items() if name in names}


class Call(NamedTuple):
    """A call of the program: `program` are the words that started it, `argv` those after them.
    `folder` is that of its history.
    """
    pipeline: Pipeline
    options: Any
    arguments: Dict[str, Any]
    argv: List[str]
    program: Tuple[str, ...]
    base: str
    folder: str
    add_arguments: Optional[Callable[[Any], None]]

    def parse(self, words, known):
        """Return what parse_arguments() makes of other words."""
        return parse_arguments(self.add_arguments, words, known)

    def make_request(self):
        """Return what is asked for, where nothing is resumed."""
        options = self.options
        return Request(tuple(options.targets), tuple(options.exclude), options.start_from,
                       tuple(self.argv), item=options.item)

    def find_said(self):
        """Return the arguments of tools that are on the command line, each with its flag.

        One whose action is of the user's own is left out: it may do something by itself.
        """
        parser, names = make_parser(self.add_arguments)
        _, said = self.parse(self.argv, dict.fromkeys(names))
        return {action.dest: action.option_strings[0] for action in parser._actions
                if said.get(action.dest) is not None and type(action).__module__ == "argparse"}


def open_history(call):
    """Return the history to look at, without its lock; one that knows nothing if there is none."""
    is_there = os.path.exists(os.path.join(call.folder, "history.db"))
    return History(call.folder if is_there and not call.options.no_history else "", call.base)


def need_history(call):
    """Return the history to look at. Raise UserError if there is none."""
    history = open_history(call)
    if not history.folder:
        raise UserError(f"There is no history in {format_path(call.folder)}.",
                        "Nothing has been run yet, or it was run with --no-history.")
    return history


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
    return EXIT_SUCCESS


def command_list(call):
    """Show the tools and stages; with targets, those that belong to them."""
    tools = find_tools(call)
    try:
        lasts = look_at(open_history(call), call).load_last_attempts()
    except UserError as error:  # of the history, without which there is still a list
        say(str(error))
        lasts = {}
    shown = make_list(call.pipeline, tools, find_summary, lasts.get)
    return answer(call, shown, format_list)


def command_plan(call):
    """Show the plan; of a backfill, the periods."""
    check_are_taken(call.arguments, {}, call.pipeline.tools, call.find_said)
    if call.options.backfill:
        periods = find_periods(call, open_history(call))
        return answer(call, make_backfill_view(periods), format_backfill)
    plan, _, _ = find_plan(call, open_history(call))
    return answer(call, make_plan_view(plan), functools.partial(format_plan, jobs=plan.jobs))


def command_check(call):
    """Report all mistakes in the tables and in the modules that they name."""
    pipeline, tools = call.pipeline, call.pipeline.tools.values()
    if not pipeline.mistakes:
        for target in call.options.targets:
            expand_target(pipeline, target)
    known = {*call.arguments, *PERIOD_ARGUMENTS, "conn", "context"}
    mistakes = dict.fromkeys(map(str, [  # tools may share a module
        *pipeline.mistakes, *find_wrong_each(pipeline, tools),
        *(mistake for tool in tools for mistake in find_mistakes(tool, known))]))
    for mistake in mistakes:
        show(mistake)
    show(f"{format_plural(len(tools), 'tool')} read, "
         f"{format_plural(len(mistakes) or 'no', 'mistake')} found")
    return EXIT_USAGE if mistakes else EXIT_SUCCESS


def command_status(call):
    """Show how each tool ended last, and what runs now."""
    history = look_at(need_history(call), call)
    tools = find_tools(call)
    running, attempts = (None, []) if history.killed else find_running(history)
    lasts = history.load_last_attempts()
    shown = make_status(tools, lasts.get, running, attempts, Clock().wall(),
                        count_items_of(call, [lasts[tool] for tool in tools if tool in lasts]))
    return answer(call, shown, format_status)


def count_items_of(call, lasts):
    """Return how many items have each status, for the tools that had items when they ran last;
    `lasts` are the newest rows of tools.
    """
    import json
    counts = {}
    having = [last for last in lasts if last["called_items"]]
    if having:
        with open_connection(call) as conn:
            for last in having:
                with open_ledger(call, conn, last["tool"]) as ledger:
                    if ledger:
                        counts[last["tool"]] = count_statuses(
                            json.loads(last["called_items"]), ledger.count(last["called_at"]))
    return counts


@contextlib.contextmanager
def open_connection(call):
    """Hold the pipeline's connection to look at what is there. Raise UserError if that fails."""
    with contextlib.closing(Database(call.pipeline.get_connection)) as database:
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
    path = find_ledger_path(call.folder)
    with contextlib.closing(Ledger(conn, path, call.pipeline.name, tool, "", "")) as ledger:
        yield ledger if ledger.is_there() else None


def command_items(call):
    """Show the items of a tool that were tried, or those that failed, page by page."""
    options = call.options
    tool, *names = options.operand
    check_tool(call, tool)
    if not has_items(call.pipeline.tools[tool]):
        raise UserError(f"{tool} has no items.", "A tool has items if its module has a function "
                        'items(), or if TOOL_MAP says "each" of it.')
    count = 0
    with open_connection(call) as conn:
        for page in load_item_pages(call, conn, tool, names):
            if options.json:  # as to_json() has it, but for the whole of it in memory
                show("," if count else '{\n  "items": [', end="")
                show(to_json(page)[1:-2].replace("\n", "\n  "), end="")
            else:
                show(format_items({"items": page}, make_style(sys.stdout)))
            count += len(page)
    if options.json:
        show("\n  ]\n}" if count else to_json({"items": []}))
    elif not count:
        which = " or ".join(map(format_name, names)) or "item"
        say(f"No {which} of {tool} has {'failed' if options.failed else 'been tried'}.")
    return EXIT_SUCCESS


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
    if options.operand:
        run = history.find_run(options.operand)
        attempts = history.load_attempts(run["run_id"])
        for row in attempts:
            row["log"] = row["log"] and format_path(os.path.join(call.folder, row["log"]))
        return answer(call, {"runs": [make_run_view(run, attempts, is_detailed=True)]}, format_run)
    runs = history.load_last_runs(10 if options.last is None else options.last)
    views = [make_run_view(run, history.load_attempts(run["run_id"])) for run in runs]
    return answer(call, {"runs": views}, format_runs)


def command_logs(call):
    """Show what tools printed: in the last run or another, all tools or one."""
    history, options = need_history(call), call.options
    tool = options.operand
    if tool:
        check_tool(call, tool)
    run_id = options.run or tool and history.find_called_in(tool)
    run = history.find_run(run_id) if run_id else next(iter(history.load_last_runs(1)), None)
    logs = {}  # by file: what --json shows of it, and how much of it was shown
    goes_on, is_here = run is not None, False
    while goes_on:
        goes_on = options.follow and is_held(call.folder)  # else look once more
        for row in history.load_attempts(run["run_id"]):
            if tool in (None, row["tool"]) and row["attempt"]:
                path = find_log(find_logs(call.folder, str(run["run_id"])), row["tool"],
                                row["attempt"])
                show_log(row, path, logs, options)
                is_here = is_here or path in logs and row["pid"] == run["pid"]
        if goes_on:
            Clock().sleep(0.2)
    if is_here and not options.json:
        say("What C code and child processes of a tool print is kept only if it is isolated or "
            "runs with --jobs.")
    if options.json:
        show(to_json({"logs": [log for log, _ in logs.values()]}))
    elif not logs:
        say("Nothing was printed.")
    return EXIT_SUCCESS


def show_log(row, path, logs, options):
    """Show what is new in the log of an attempt, and note it in `logs`."""
    if not has_bytes(path):
        return
    is_new = path not in logs
    log, at = logs.get(path) or ({"run_id": str(row["run_id"]), "tool": row["tool"],
                                  "attempt": row["attempt"], "path": path, "lines": []}, 0)
    if is_new and options.tail is not None:
        at = os.path.getsize(path)
        lines = read_tail(path, options.tail)
    else:
        with open(path, "rb") as file:
            file.seek(at)
            content = file.read()
        if row["status"] == "running":
            content = content[:content.rfind(b"\n") + 1]  # whole lines
        at += len(content)
        lines = clean(content.decode("utf-8", "replace")).splitlines()
    logs[path] = {**log, "status": row["status"]}, at
    if options.json:
        log["lines"] += lines
        return
    if is_new and not options.operand:
        show(make_style(sys.stdout).bold(f"{row['tool']}, attempt {row['attempt']} ({path}):"))
    for line in lines:
        show(line)


@contextlib.contextmanager
def change_history(call):
    """Hold the history to write to it, in which a run that was killed is closed, and say so."""
    with hold_history(call.folder, call.base, call.options.wait) as history:
        run_id, tools = history.close_killed()
        if run_id:
            where = f"at {', '.join(tools)}" if tools else "between two tools"
            say(f"Run {run_id} was cut off {where}; it is recorded as interrupted.")
        yield history


def command_mark_done(call):
    """Record tools of the run that a resume would go on with as done, by hand."""
    for tool in call.options.operand:
        check_tool(call, tool)
    call.options.resume = ""
    with change_history(call) as history:
        plan, request, arguments = find_plan(call, history)
        left = mark_done(call.pipeline, plan, request, arguments, history, call.options.operand,
                         Clock().wall())
    say("Marked as done: " + ", ".join(call.options.operand) + ".")
    say(f"Left to do: {', '.join(left)}. Next: "
        + format_command(call, "--resume") if left else "Nothing is left to do.")
    return EXIT_SUCCESS


def command_prune(call):
    """Forget old runs."""
    text = call.options.operand[0]
    try:
        age_s = parse_duration_s(text)
    except ValueError:
        raise UserError(f"--prune: {text!r} is no duration.",
                        'Write "90d" to forget runs that are older than 90 days.') from None
    need_history(call)
    with change_history(call) as history:
        gone = history.prune(Clock().wall() - age_s)
    show(f"{format_plural(len(gone) or 'no', 'run')} forgotten")
    return EXIT_SUCCESS


def command_run(call):
    """Run the plan, and tell on stderr how it goes."""
    if call.options.no_history:
        return carry_out(call, History("", call.base))
    with change_history(call) as history:
        return (backfill if call.options.backfill else carry_out)(call, history)


def find_periods(call, history):
    """Return the periods of --backfill, in order, with what is to be done of each."""
    options, request = call.options, call.make_request()
    tools = [call.pipeline.tools[step.tool] for step in make_plan(
        call.pipeline, request.targets, exclude=request.exclude,
        start_from=request.start_from).steps]
    if not any(takes_any(tool, PERIOD_ARGUMENTS) for tool in tools):
        raise UserError("--backfill: no tool of this plan takes period_start or period_end, so "
                        "each period would be the same.",
                        "Write `def run(conn, period_start=None, period_end=None):`.")
    periods = make_periods(options.backfill, options.step or "day")
    today = find_day(Clock().wall())
    check_begun(options.backfill, periods, today)
    lasts = history.load_last_like(request)

    def find_last(period):
        row = lasts.get(format_arguments({**call.arguments, **period.arguments()}))
        return row and (row["run_id"], row["status"], history.find_started_at("", row["run_id"]))

    periods = [decide_period(period, find_last(period), options.reprocess or "", today)
               for period in periods]
    return periods[::-1] if options.reverse else periods


def backfill(call, history):
    """Run the plan once per period that is not done, and tell how each went."""
    periods = find_periods(call, history)
    left = [period for period in periods if period.action != "skip"]
    codes = {}
    not_over = ""
    for number, period in enumerate(left, 1):
        if not call.options.quiet:
            say(f"\nPeriod {period.start} to {period.end} ({number} of {len(left)})")
        is_early = find_day(Clock().wall()) < period.end
        codes[period.start] = code = carry_out(call, history, period)
        if is_early and not code:
            not_over = (f"; the period from {period.start} is not over yet, and will be run again "
                        "when it is")
        if code > EXIT_SIGNAL or code and call.options.fail_fast:
            break
    cut_off = [start for start, code in codes.items() if code > EXIT_SIGNAL]
    failed = [start for start, code in codes.items() if code and start not in cut_off]
    failed += [p.start for p in periods if p.action == "skip" and "failed" in p.reason]
    done, not_begun = sum(not code for code in codes.values()), len(left) - len(codes)
    say(f"\nBackfill: {format_plural(done, 'period')} done now, {len(periods) - len(left)} left "
        f"alone, {len(failed)} failed" + (": " + ", ".join(failed[:10]) if failed else "")
        + "".join(f", {start} cut off" for start in cut_off)
        + f", {not_begun} not begun" * bool(not_begun) + not_over)
    if failed or cut_off:
        again = [] if call.options.reprocess or cut_off else ["--reprocess", "failed"]
        say("Next: " + format_command(call, *call.argv, *again))
    return max(codes.values(), default=EXIT_SUCCESS) or (EXIT_FAILED if failed else EXIT_SUCCESS)


def find_run_to_resume(call, history):
    """Return the run to go on with. Raise UserError if there is none, with the way to have items
    tried again where that was asked for too.
    """
    try:
        return history.find_resumable(call.options.resume or None)
    except Settled as error:
        tools = list(read_retries(call.options.retry_items))
        if not tools:
            raise
        words = [word for given in call.options.retry_items for word in ("--retry-items", *given)]
        raise UserError(error.problem, "To try items again that it gave up: "
                        + format_command(call, *tools, *words)) from None


def find_plan(call, history, period=None):
    """Return the plan, what was asked for, and the arguments of the tools; with --resume, those
    of the run that is resumed.
    """
    options, arguments, done = call.options, call.arguments, {}
    request, describe = call.make_request(), None
    if period:
        arguments = {**arguments, **period.arguments()}
        if period.action == "resume":
            request = request._replace(resumes=period.run_id)
            done = history.find_done(period.run_id)
    elif options.resume is not None:
        # No second connection: a worker would inherit it, and close it over the first one's head.
        history = history if history.folder else need_history(call)
        run = find_run_to_resume(call, history)
        request, arguments, changed = find_resumed(call, run)
        done = find_valid(call.pipeline, history.find_done(run["run_id"]), arguments)
    if options.command is command_plan:
        describe = functools.partial(
            describe_items, has_database=call.pipeline.get_connection is not no_connection)
    jobs = count_jobs(options.jobs)
    past = None if options.no_history else make_past(
        call.pipeline, history, arguments, Clock().wall(), done, options.force,
        bool(jobs > 1 or describe))
    plan = make_plan(call.pipeline, request.targets, exclude=request.exclude,
                     start_from=request.start_from, jobs=jobs, past=past, describe=describe)
    if options.resume is not None:
        tell_changes(call.pipeline, run, plan, changed)
    return plan, request, arguments


def find_resumed(call, run):
    """Return what a resume of a run asks for, its arguments, and in words which of them the flags
    beside --resume changed.
    """
    options, request = call.options, make_request(run)
    said, now = (None, None) if request.words is None else call.parse(request.words, {})
    recorded = read_arguments(run, now)
    arguments = {**recorded, **call.parse(call.argv, recorded)[1]}
    changed = find_changed(format_arguments(recorded), format_arguments(arguments))
    item = options.item or request.item or said and said.item
    words = (*request.words, *call.argv) if changed and said else request.words
    return request._replace(item=item, words=words), arguments, [
        f"{name} ({arguments[name]}, was {recorded[name]})" for name in changed]


def find_changed(was, now):
    """Return the names of arguments, both as format_arguments() says them, that are not as they
    were; one that did not exist then has not changed.
    """
    import json
    was, now = json.loads(was), json.loads(now)
    return [name for name in now if now[name] != was.get(name, now[name])]


def find_valid(pipeline, done, arguments):
    """Return those of the tools that are done which got no other arguments than they would now."""
    now = format_arguments(arguments)
    changed = {was: find_changed(was, now) for was in {each.arguments for each in done.values()}}
    return {tool: success for tool, success in done.items() if tool not in pipeline.tools
            or not changed[success.arguments]
            or not takes_any(pipeline.tools[tool], changed[success.arguments])}


def tell_changes(pipeline, run, plan, changed):
    """Say what changed since a run that is resumed, and which of that is not run again."""
    tools = {step.tool: pipeline.tools[step.tool] for step in plan.steps}
    now = find_versions(pipeline, tools.values())
    modules = [module for module, source in now.sources.items()
               if run["sources"].get(module, source) != source]
    what = ["the tables"] * (now.tables != run["tables"]) + modules + changed
    kept = [step.tool for step in plan.steps if step.success
            and tools[step.tool].module in modules]
    if what:
        say(f"Changed since run {run['run_id']}: {', '.join(what)}."
            + (f" Done before, and not run again: {', '.join(kept)}." if kept else ""))


def carry_out(call, history, period=None):
    """Run the plan, for a period if there is one, and tell on stderr how it goes."""
    options = call.options
    plan, request, arguments = find_plan(call, history, period)
    # Descriptors of its own: those of tools lead nowhere once nothing more can be written to them.
    stream, out = sys.stderr, sys.stdout
    if history.folder:
        stream, out = own_stream(stream, 2), own_stream(out, 1, "wb")
    screen = Screen(stream, options.quiet, options.verbose, out)
    gc.freeze()  # what is here will stay: no collection during the run need walk it
    result = run_plan(Session(
        call.pipeline, plan, arguments, history, request, options.fail_fast, options.verbose,
        keep_results=False, on_event=screen.on_event, find_said=call.find_said,
        retry_items=None if period and options.reprocess else read_retries(options.retry_items)))
    if not options.quiet or result.status != "success":
        for tail in screen.tails.values():
            say("\n" + tail)
        next_command = "" if period else make_next_command(result, call)
        say(format_summary(result, next_command, screen.style))
    if result.status == "interrupted":
        return EXIT_SIGNAL + (result.signal or SIGINT)
    return EXIT_FAILED if result.status == "failed" or screen.has_lost else EXIT_SUCCESS


def read_retries(given):
    """Return what --retry-items asks for, by tool; all items of a tool where none is named."""
    named = {}
    for tool, *items in given:
        named.setdefault(tool, []).append(items)
    return {tool: tuple(sum(lists, [])) if all(lists) else () for tool, lists in named.items()}


class Screen:
    """The listener of a run on the command line: one line per event, one live line."""

    def __init__(self, stream, quiet, verbose, out=None):
        self.stream, self.quiet, self.style = stream, quiet, make_style(stream)
        self.out = sys.stdout if out is None else out  # takes what tools print in workers
        self.is_terminal = stream is not None and stream.isatty()
        self.width = 0
        self.shown_s = 0.0
        self.started_s = {}  # by tool that runs
        self.is_live = False  # whether the last line is a live one, to be written over
        self.follows = verbose  # whether workers' output is shown at once
        self.outputs = {}  # by tool: file, how much of it was shown
        self.log_level = 10 if verbose else 30 if quiet else 20  # DEBUG, WARNING, INFO
        self.has_lost = False  # whether what tools printed did not reach stdout
        self.tails = {}  # by tool that failed: what it printed last

    def on_event(self, event):
        """Show an event."""
        if event.kind == "run_started":
            self.width = max(len(step.tool) for step in event.plan.steps)
        elif event.kind == "progress":
            self.show_live(event)
        elif event.kind == "log" and event.level >= self.log_level:
            self.has_lost = self.has_lost or event.level == OUTPUT_LOST
            self.show(event)
        elif event.kind == "tool_started":
            self.started_s[event.tool] = self.shown_s = event.at
            if event.output:
                self.outputs[event.tool] = (event.output, 0)
            self.show(event)
        elif event.kind in ("tool_ended", "tool_retried"):
            self.show_output(event.tool, is_whole=True)
            if event.outcome.traceback:
                self.write(event.outcome.traceback.rstrip())
            self.show(event)
            tail = read_tail(event.outcome.log, 10) if event.outcome.status == "failed" else []
            if tail:
                path = format_path(event.outcome.log)
                self.tails[event.tool] = "\n  ".join(
                    [self.style.bold(f"Last lines of {event.tool} ({path}):"), *tail])
        elif event.kind == "tick" and self.follows:
            for tool in list(self.outputs):
                self.show_output(tool, is_whole=False)

    def show_output(self, tool, is_whole):
        """Copy to stdout what a tool printed in its worker: whole lines, or all at its end.

        In pieces, so that it may be larger than memory; with the tool's name in front of each
        line where several tools are shown at once.
        """
        file, shown = self.outputs.get(tool, ("", 0))
        if is_whole:
            self.outputs.pop(tool, None)
        if not os.path.exists(file):
            return
        if self.is_live:
            self.write("")
        name = tool.encode() + b" | " if self.follows else b""
        with open(file, "rb") as source:
            while True:
                source.seek(shown)
                lines = [line for line in source.readlines(1 << 20)
                         if is_whole or line.endswith(b"\n")]
                if not lines:
                    break
                shown += sum(map(len, lines))
                self.put(b"".join(name + line for line in lines))
        if not is_whole:
            self.outputs[tool] = file, shown

    def put(self, content):
        """Write to stdout what tools printed, and say once if that fails."""
        problem = write_bytes(self.out, content)
        if problem and self.out is not sys.stdout and not self.has_lost:
            self.has_lost = True
            self.write(f"stdout could not be written: {problem}; --logs shows all of it")

    def show(self, event):
        """Write the line of an event, unless only failures are wanted."""
        if not self.quiet or event.kind == "log" or event.outcome and event.outcome.error:
            self.write(format_event(event, self.width, self.style))

    def show_live(self, event):
        """Write the live line, on a terminal and at most ten times a second."""
        if self.is_terminal and not self.quiet and event.at - self.shown_s >= 0.1:
            self.shown_s, self.is_live = event.at, True
            line = format_progress(event, self.width, event.at - self.started_s[event.tool])
            say("\r" + line[:find_columns(self.stream) - 1] + "\x1b[K", self.stream, end="")

    def write(self, text):
        """Write a line, over the live one."""
        if self.is_live:
            self.is_live = False
            text = "\r\x1b[K" + text
        try:
            sys.stdout.flush()  # what the tool printed belongs before what we say of it
        except (AttributeError, OSError, ValueError):
            pass  # it is closed
        say(text, self.stream)


def own_stream(stream, fd, mode="w"):
    """Return a second stream to where stdout or stderr leads, where that is no terminal."""
    if not is_own_fd(stream, fd) or stream.isatty():
        return stream
    if mode == "wb":  # without a buffer, in which what can not be written would stay
        return open(os.dup(fd), mode, buffering=0)
    return open(os.dup(fd), mode, encoding=stream.encoding, errors=stream.errors)


def find_columns(terminal):
    """Return the width of a terminal, or what is usual where it does not tell."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def write_bytes(stream, content):
    """Write what a process printed to a stream, unchanged where it takes bytes; return what kept
    it from that, or "".
    """
    try:
        if "b" in getattr(stream, "mode", ""):
            write_all(stream.fileno(), content)
        elif hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(content)
        else:
            stream.write(content.decode("utf-8", "replace"))
        stream.flush()
    except OSError as error:
        return "" if isinstance(error, BrokenPipeError) else error.strerror or str(error)
    except (ValueError, AttributeError):
        pass  # it is closed
    return ""


class OutputError(Exception):
    """Output could not be written. Without a text if there is nothing to say: `| head`."""


def show(text, end="\n"):
    """Write a line to stdout: what a command was asked for. Raise OutputError if that fails."""
    if sys.stdout is None:
        raise OutputError("stdout could not be written: it is closed.")
    try:
        print(fit(text, sys.stdout), end=end, flush=True)
    except OSError as error:
        # The interpreter, which will flush once more at its end, is not to fail then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise OutputError from error
        raise OutputError(f"stdout could not be written: {error.strerror or error}.") from error


def fit(text, stream):
    """Return a text in which letters that a stream can not show are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text, stream=None, end="\n"):
    """Write a line to stderr: what there is to say beside that."""
    stream = sys.stderr if stream is None else stream
    try:
        stream.write(fit(text, stream) + end)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody reads it, or there is none (pythonw): no reason for a run to end


def make_style(stream):
    """Return the style for a stream: colours on a terminal, unless NO_COLOR is set."""
    has_colours = os.environ.get("TERM", "dumb") != "dumb" or "WT_SESSION" in os.environ
    return Style(has_colours and not os.environ.get("NO_COLOR")
                 and stream is not None and stream.isatty())


def to_json(data):
    """Return data as JSON for programs."""
    import json
    return json.dumps(data, indent=2, ensure_ascii=False)


def make_next_command(result, call):
    """Return the command that goes on where a run stopped; nothing after a success."""
    left = [tool for tool, o in result.outcomes.items() if o.status not in DONE]
    if not left:
        return ""
    argv, options = call.argv, call.options
    retries, named = [], read_retries(options.retry_items)
    for tool, o in result.outcomes.items():  # of whose items some have no try left
        if o.items and o.status not in DONE and (o.items["failed"] or o.items["given_up"]):
            names = named.get(tool, ())
            # All of the tool, unless the named are for sure those that have failed.
            are_those = o.items["failed"] == o.items["pending"] == len(names)
            retries += ["--retry-items", tool, *(names if are_those else ())]
    if not options.no_history:
        flags = ["--force"] * options.force + retries
        flags += ["--jobs", str(options.jobs)] if options.jobs != 1 else []
        return format_command(call, "--resume", *flags)
    words = [word for i, word in enumerate(argv) if not word.startswith("--from=")
             and word != "--from" and (i == 0 or argv[i - 1] != "--from")]
    return format_command(call, *words, *retries, "--from", left[0])


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
    if os.name == "nt":
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
