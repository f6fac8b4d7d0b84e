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
#   7 CALLING      find, import and call a tool, one attempt in one transaction
#   8 WORKERS      the ways to execute an attempt: in this process, in worker processes
#   9 RUNNING      one loop that carries out a Plan -> RunResult
#  10 VIEWS        text and JSON for people and programs
#  11 DOOR         the command line

# ruff: noqa: E402
_YOURS = dict(globals())  # your names, before the engine adds its own: see the last lines

import argparse
import contextlib
import errno
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
_CODE = sys._getframe().f_code  # of this whole file, yours and the engine's
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

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
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
    """A tool's last success, as history knows it, or what passed of its items.

    `work` is the id of the attempt that did it, which stays the same while the tool is cached.
    `needed` gives the work that each tool it needs had done by then; `source` what ran, as
    describe_source() says, and `inputs` what its files were like: both are empty where that is
    not recorded. `result` is JSON, or None if that could not say it.
    """
    work: int
    run_id: str
    started_at: float
    ended_at: float
    rows: Optional[int] = None
    result: Optional[str] = None
    kind: str = ""
    arguments: str = ""
    source: Mapping[str, Any] = {}
    inputs: str = ""
    needed: Mapping[str, int] = {}


class Past(NamedTuple):
    """What planning may ask of history, in functions. `now` is in seconds since the epoch.

    `find_whole_success` is of a success that says something of all the data with the arguments of
    this run: see History. `find_change` tells what changed in a tool itself since a success of it,
    or "". `done` are the tools that ended well in the run that is resumed. `is_forced` overrides
    cache, freshness and missing needs.
    """
    now: float
    find_success: Callable[[str], Optional[Success]]
    find_whole_success: Callable[[str], Optional[Success]]
    find_expected_s: Callable[[str], Optional[float]]
    find_change: Callable[[Tool, Success], str]
    done: Mapping[str, Success] = {}
    is_forced: bool = False


class Step(NamedTuple):
    """One tool's place in a plan. `action` is run, cached, or skip: done before a resume.

    `success` is what a tool that is not run again did when it was; `expected_s` is None where
    nothing is known of it.
    """
    tool: str
    wave: int
    action: str
    reason: str
    needs: Union[str, Tuple[str, ...]]
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
    """An item that is to be done. `attempts` and `deaths` are those that its row in the ledger
    tells; `is_seen` whether there is such a row, None if that is to be looked up once more.
    """
    name: str
    version: str = ""
    is_seen: Optional[bool] = None
    attempts: int = 0
    deaths: int = 0


class Ending(NamedTuple):
    """How a try of an item ended, if not well: `status` is that of its row, pending if it comes
    again; `attempt` counts the tries. `is_death`: it took its process down.
    """
    item: Item
    status: str
    attempt: int
    error: str
    traceback: str = ""
    is_death: bool = False


class Tally(NamedTuple):
    """What came of some items: how many passed, with how many rows, and how others ended.

    `elsewhere` counts those that somebody else did meanwhile; `left` are those that were not
    done, and `at_work` the one of these that was being done; `charged` is how many of the
    charges in the order are recorded; `has_lost` whether an item lost the connection, and there
    was no other to record that, so that its slip stays.
    """
    passed: int = 0
    rows: Optional[int] = None
    endings: Tuple[Ending, ...] = ()
    elsewhere: int = 0
    left: Tuple[Item, ...] = ()
    at_work: Optional[Item] = None
    charged: int = 0
    has_lost: bool = False


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


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def parse_duration_s(value: Any) -> float:
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


def parse_bytes(value: Any) -> int:
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


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float; True and False are neither here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def retry_delay_s(tool: Tool, attempt: int,
                  random: Callable[[], float] = lambda: 0.0) -> float:
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


def format_duration(seconds: Optional[float]) -> str:
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


def format_moment(at: Optional[float]) -> Optional[str]:
    """Return a moment, in seconds since the epoch, as ISO 8601 in UTC; None for None.

    >>> format_moment(1357020000.5)
    '2013-01-01T06:00:00.500Z'
    """
    if at is None:
        return None
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    return f"{whole}.{int(at * 1000) % 1000:03d}Z"


def merge_errors(errors: Sequence[UserError]) -> UserError:
    """Return one error that says all of them, so that nobody mends a table line by line."""
    return errors[0] if len(errors) == 1 else UserError("\n".join(map(str, errors)))


# === 2 SETUP ====================================================================================
# The user's tables become a Pipeline, or one sentence for each mistake in them. Every rule about
# the tables stands here. No input or output: whether a module exists is asked in CALLING.

def load_pipeline(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
                  get_connection: Optional[Callable[[], Any]] = None, **more: Any) -> Pipeline:
    """Return the checked tables. Raise UserError with every mistake that they hold."""
    pipeline = read_pipeline(tool_map, stages, get_connection, **more)
    if pipeline.mistakes:
        raise merge_errors(pipeline.mistakes)
    return pipeline


def read_pipeline(tool_map: Mapping[str, Any], stages: Optional[Mapping[str, Any]] = None,
                  get_connection: Optional[Callable[[], Any]] = None, *,
                  name: Optional[str] = None,
                  limits: Optional[Mapping[str, Any]] = None) -> Pipeline:
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
    errors: List[UserError] = []
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


def no_connection() -> None:
    """Stand for get_connection in a pipeline without a database."""


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
    if not isinstance(options, (dict, Mapping)):  # what is a dict is spared the slower question
        raise UserError(f"{where} is {format_type(value)}, not a module path or a dict of options.",
                        f'Write "{name}": "folder.module".')
    fields: Dict[str, Any] = {}
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


def make_limit(name: str, value: Any) -> int:
    """Return a row of LIMITS. Raise UserError if it is none."""
    check_name("LIMITS", name)
    try:
        return read_positive(value)
    except ValueError:
        raise UserError(f"LIMITS[{name!r}] is {value!r}, not a whole number from 1 on.",
                        f'Write "{name}": 2 to let two units of it be used at a time.') from None


def accept(value: Any, is_right: Any) -> Any:
    """Return a value that is right. Raise ValueError for another."""
    if not is_right:
        raise ValueError(value)
    return value


def read_module_path(value: Any) -> str:
    """Return `package.module` or `package.module:function`. Raise ValueError for others."""
    module, colon, function = value.partition(":") if isinstance(value, str) else ("", "", "")
    return accept(value, all(map(str.isidentifier, module.split(".")))
                  and (not colon or function.isidentifier()))


def read_names(value: Any) -> Tuple[str, ...]:
    """Return a list of texts; a single text stands for a list of it."""
    names = (value,) if isinstance(value, str) else value
    return tuple(dict.fromkeys(accept(names, isinstance(names, (list, tuple)) and all(
        name and isinstance(name, str) for name in names))))


def read_count(value: Any, least: int = 0) -> int:
    """Return a whole number, not less than `least`."""
    return accept(value, isinstance(value, int) and not isinstance(value, bool)
                  and value >= least)


def read_positive(value: Any) -> int:
    """Return a whole number from 1 on."""
    return read_count(value, least=1)


def read_text(value: Any) -> str:
    """Return a text that is not empty."""
    return accept(value, value and isinstance(value, str))


def read_number(least: float, most: float) -> Callable[[Any], float]:
    """Return a reader of numbers between two bounds."""
    return lambda value: float(accept(value, is_number(value) and least <= value <= most))


def read_choice(*choices: Any) -> Callable[[Any], Any]:
    """Return a reader of one of some texts, or of True and False."""
    return lambda value: accept(value, isinstance(value, (str, bool)) and value in choices)


def read_uses(value: Any) -> Tuple[Tuple[str, int], ...]:
    """Return the units of each resource, sorted by its name."""
    accept(value, isinstance(value, Mapping) and all(isinstance(name, str) for name in value))
    return tuple(sorted((name, read_positive(units)) for name, units in value.items()))


def read_positive_s(value: Any) -> float:
    """Return a duration above zero, in seconds."""
    seconds = parse_duration_s(value)
    return accept(seconds, seconds > 0)


def read_cache_s(value: Any) -> Optional[float]:
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
    "each": ("each", read_text, "the name of a tool with items", '"validate"'),
    "batch": ("batch", read_positive, "a whole number from 1 on", "500"),
    # how old its last success may be for those that need it and do not run it
    "fresh_for": ("fresh_for_s", read_positive_s, _DURATION + ", above 0", '"24h"'),
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


def needs_of(tool: Tool) -> Tuple[str, ...]:
    """Return the tools that a tool names as needed, by `needs` or `each`."""
    return (tool.needs or ()) + ((tool.each,) if tool.each else ())


def find_unknown_needs(tools: Mapping[str, Tool], names: Iterable[Any]) -> List[UserError]:
    """Return an error for each need that is not among the names of all tools."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: no tool {need!r} to "
                      + ("take items of." if need == tool.each else "need."),
                      format_nearest(need, map(str, names)))
            for tool in tools.values() for need in needs_of(tool) if need not in names]


def find_wrong_uses(tools: Mapping[str, Tool], limits: Mapping[str, int]) -> List[UserError]:
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


def find_needs(errors: List[UserError],
               tools: Mapping[str, Tool]) -> Dict[str, Union[str, Tuple[str, ...]]]:
    """Return what each tool waits for: what it needs, and who writes what it reads.

    What nobody writes is an outside source. Who reads a name needs all its writers, but not those
    that come after it; who writes it as well needs those that only write it. Add to errors each
    two writers whose order is not known then, and the circles in which tools need each other.
    """
    needs = {tool.name: dict.fromkeys(need for need in needs_of(tool) if need in tools)
             for tool in tools.values()}
    writers: Dict[str, List[str]] = {}
    for tool in tools.values():
        for name in tool.writes or ():
            writers.setdefault(name, []).append(tool.name)
    shared = {name: found for name, found in writers.items() if len(found) > 1}
    reads = [(tool.name, name, writer) for tool in tools.values() for name in tool.reads or ()
             for writer in writers.get(name, ()) if writer != tool.name]
    for reader, name, writer in reads:
        if name not in shared:
            needs[reader][writer] = None
    add_needs(needs, shared, [
        (reader, name, writer) for reader, name, writer in reads
        if reader in shared.get(name, ()) and name not in (tools[writer].reads or ())])
    unordered = find_unordered(needs, shared) if not errors else []  # a wrong row may order them
    if not unordered:
        add_needs(needs, shared, reads)
    errors += unordered
    errors += [UserError(f"TOOL_MAP: tools need each other in a circle: {path}.",
                         "Take one of these needs out, or one of the reads or writes behind it.")
               for path in find_circles(needs)]
    return {tool.name: ALL_BEFORE if tool.needs is tool.reads is tool.writes is tool.each is None
            else tuple(needs[tool.name]) for tool in tools.values()}


def add_needs(needs: Mapping[str, Dict[str, None]], shared: Mapping[str, Sequence[str]],
              reads: Iterable[Tuple[str, str, str]]) -> None:
    """Let the readers of names with several writers need those that do not come after them."""
    before = find_before(needs, shared)
    for reader, name, writer in reads:
        if name in shared and reader not in before[writer]:
            needs[reader][writer] = None


def find_unordered(needs: Mapping[str, Iterable[str]],
                   shared: Mapping[str, Sequence[str]]) -> List[UserError]:
    """Return an error for each two writers of one name that could run in either order."""
    before = find_before(needs, shared)
    return [UserError(f"TOOL_MAP: {one!r} and {other!r} write {name!r} in no order.",
                      f'Let one need the other: "needs": ["{one}"] in {other!r}.')
            for name, found in shared.items() for i, one in enumerate(found)
            for other in found[i + 1:] if one not in before[other] and other not in before[one]]


def find_before(needs: Mapping[str, Iterable[str]],
                shared: Mapping[str, Sequence[str]]) -> Dict[str, Dict[str, None]]:
    """Return for each writer of the shared names all that it needs, directly or not."""
    return {writer: find_all_before(writer, needs) for found in shared.values()
            for writer in found}


def find_circles(needs: Mapping[str, Iterable[str]]) -> List[str]:
    """Return a path `a -> b -> a` for each circle apart from the others, or for many of them."""
    from graphlib import CycleError, TopologicalSorter
    paths: List[str] = []
    needs = {name: needed for name, needed in needs.items() if needed}  # the others are in none
    while len(paths) < 20:
        try:
            TopologicalSorter(needs).prepare()
            break
        except CycleError as error:
            circle = dict.fromkeys(reversed(error.args[1]))
            paths.append(" -> ".join([*circle, next(iter(circle))]))
            needs = {name: [need for need in needed if need not in circle]
                     for name, needed in needs.items() if name not in circle}
    return paths


def find_all_before(tool: str, needs: Mapping[str, Iterable[str]]) -> Dict[str, None]:
    """Return all that a tool needs, directly or not, itself excluded."""
    found: Dict[str, None] = {}
    left = list(needs[tool])
    while left:
        each = left.pop()
        if each not in found:
            found[each] = None
            left += needs[each]
    return found


def expand_stages(errors: List[UserError], tools: Iterable[str],
                  members: Mapping[str, Tuple[str, ...]]) -> Dict[str, Stage]:
    """Return every stage with the tools it comes to; none, and errors, if one contains itself.

    A name that is both is the stage, but the tool inside the stage of that name.
    """
    from graphlib import TopologicalSorter

    def is_stage(name: str, inside: str) -> bool:
        return name in members and not (name == inside and name in tools)

    inner = {stage: [n for n in names if is_stage(n, stage)] for stage, names in members.items()}
    circles = find_circles(inner)
    if circles:
        errors += [UserError(f"STAGES: a stage contains itself: {path}.",
                             "Take one of them out of the other.") for path in circles]
        return {}
    tools_of: Dict[str, Tuple[str, ...]] = {}
    for stage in TopologicalSorter(inner).static_order():
        tools_of[stage] = tuple(dict.fromkeys(
            tool for name in members[stage]
            for tool in (tools_of[name] if is_stage(name, stage) else (name,))))
    errors += [UserError(f"STAGES[{stage!r}]: a tool has this name too and is not in the stage, so "
                         "that nothing could name it.", "Rename the one or the other.")
               for stage, found in tools_of.items()
               if stage in tools and stage not in found and {*found} <= {*tools}]
    return {stage: Stage(stage, names, tools_of[stage]) for stage, names in members.items()}


def check_arguments(arguments: Any) -> None:
    """Raise UserError if tools could not get this as arguments by name."""
    check_table("arguments", arguments)
    for name in arguments:
        if not isinstance(name, str):
            raise UserError(f"arguments: the name {name!r} is {format_type(name)}, not text.",
                            "Put it in quotes.")
        if name in RESERVED_ARGUMENTS:
            raise UserError(f"arguments: {name!r} is the engine's own.", "Choose another name.")


def format_type(value: Any) -> str:
    """Return the type of a value for a sentence: `a list`, `an int`."""
    kind = type(value).__name__
    return ("an " if kind[0].lower() in "aeiou" else "a ") + kind


# === 3 PLANNING =================================================================================
# Targets become a Plan, which is data: what runs, in which order, and why. Planning decides, the
# run does; what --plan shows is the very Plan that a run carries out. No input or output.

DEFAULT_STAGE = "full"


def make_plan(pipeline: Pipeline, targets: Union[None, str, Iterable[str]] = (), *,
              exclude: Union[None, str, Iterable[str]] = (), start_from: Optional[str] = None,
              jobs: int = 1, past: Optional[Past] = None,
              describe: Callable[[Tool], str] = lambda tool: "") -> Plan:
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
    reasons: Dict[str, str] = {}
    for target in targets:
        for tool, reason in expand_reasons(pipeline, target).items():
            reasons.setdefault(tool, reason)
    if not targets:
        reasons = dict.fromkeys(pipeline.tools, "in TOOL_MAP")
    order = sort_by_needs(reasons, pipeline.needs)
    order = leave_out(pipeline, order, exclude, start_from)
    if not order:
        raise UserError("Nothing is left to run.", "Name a target that holds a tool, or take "
                        "something out of --exclude; --list shows them all.")
    if past:
        check_needs_met(pipeline, order, past)
    redo: Dict[str, str] = {}
    while True:
        steps = make_steps(pipeline, order, reasons, past, redo, describe)
        lost = find_lost_results(steps)
        if not lost:
            break
        redo.update(lost)
    known = all(step.expected_s is not None for step in steps)
    expected_s = simulate(
        Schedule(steps, pipeline, jobs), durations_of(steps), jobs) if known else None
    return Plan(tuple(steps), find_critical_path(steps), expected_s, jobs)


def check_needs_met(pipeline: Pipeline, order: Sequence[str], past: Past) -> None:
    """Raise UserError for each need outside the plan whose tool has no success fresh enough."""
    there = set(order)
    errors = []
    for tool in [] if past.is_forced else order:
        needs = pipeline.needs[tool]
        if needs == ALL_BEFORE or tool in past.done or pipeline.tools[tool].when == "always":
            continue
        missing = [(need, find_staleness(pipeline.tools[need], past))
                   for need in needs if need not in there]
        missing = [f"{need}, which {why}" for need, why in missing if why]
        if missing:
            errors.append(UserError(
                f"{tool} needs what is not in this plan: {'; '.join(missing)}.",
                f"Run that too: +{tool} takes all that {tool} needs; or go on without: --force."))
    if errors:
        raise merge_errors(errors)


def find_staleness(tool: Tool, past: Past) -> str:
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


def is_young(success: Success, limit_s: float, now: float) -> bool:
    """Return whether a success is not older than a limit; one in the future has no known age."""
    return limit_s == float("inf") or 0 <= now - success.ended_at <= limit_s


def format_age(success: Success, now: float) -> str:
    """Return how long ago a success was, in words."""
    if now < success.ended_at:
        return "in the future, if the clock is right"
    return format_duration(now - success.ended_at) + " ago"


def find_needed_works(pipeline: Pipeline, tool: str,
                      find_success: Callable[[str], Optional[Success]]) -> Dict[str, int]:
    """Return the last work of each tool that one needs: what it was, or would be, built on.

    For a tool that waits for all before it, the newest work of those before it in TOOL_MAP.
    """
    def find_work(name: str) -> int:
        success = find_success(name)
        return success.work if success else 0

    needs = pipeline.needs[tool]
    if needs != ALL_BEFORE:
        return {need: find_work(need) for need in needs}
    newest = 0
    for name in pipeline.tools:
        if name == tool:
            break
        newest = max(newest, find_work(name))
    return {ALL_BEFORE: newest}


def decide(pipeline: Pipeline, tool: str, running: Mapping[str, None], redo: Mapping[str, str],
           past: Past) -> Tuple[str, str, Optional[Success]]:
    """Return the action for a tool, the reason for it, and the success that it rests on, if any.

    `running` are the tools before it in the plan that will run; `redo` those that must, and why.
    """
    done = past.done.get(tool)
    cache_s = None if past.is_forced else pipeline.tools[tool].cache_s
    success = done or (past.find_success(tool) if cache_s else None)
    if success is None or tool in redo:
        return "run", redo.get(tool, ""), None
    needs = pipeline.needs[tool]
    ran = next((need for need in (running if needs == ALL_BEFORE else needs) if need in running),
               None)
    if ran is not None:
        return "run", f"again, because {ran} will run", None
    if done:
        return "skip", f"succeeded in run {done.run_id}", done
    if not success.source:
        return "run", f"what it was in run {success.run_id} is not recorded", None
    needed = find_needed_works(pipeline, tool, past.find_success)
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


def find_lost_results(steps: Sequence[Step]) -> Dict[str, str]:
    """Return the tools that must run again for their results, which are not kept, and why."""
    lost: Dict[str, str] = {}
    waiting: Dict[str, str] = {}  # need -> a tool that will run and waits for it
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


def read_targets(where: str, value: Any) -> List[str]:
    """Return a list of names; a single text stands for a list of it, None for none."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    names = list(value) if is_list else [] if value is None else [value]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} is {value!r}, not a list of names.",
                        f'Give stages and tools: {where}=["fetch"].')
    return names


def make_steps(pipeline: Pipeline, order: Sequence[str], reasons: Mapping[str, str],
               past: Optional[Past], redo: Mapping[str, str],
               describe: Callable[[Tool], str]) -> List[Step]:
    """Return the steps for tools in an order that their needs allow."""
    waves: Dict[str, int] = {}
    running: Dict[str, None] = {}
    last_wave = 0
    steps = []
    for tool in order:
        needs = pipeline.needs[tool]
        waves[tool] = 1 + (last_wave if needs == ALL_BEFORE else
                           max((waves[need] for need in needs if need in waves), default=0))
        last_wave = max(last_wave, waves[tool])
        action, why, success = decide(
            pipeline, tool, running, redo, past) if past else ("run", "", None)
        if action == "run":
            running[tool] = None
        expected_s = 0.0 if success else (
            past and past.find_expected_s(tool)) or pipeline.tools[tool].estimate_s
        reason = why if success else "; ".join(filter(None, [
            reasons[tool], why, describe(pipeline.tools[tool])]))
        steps.append(Step(tool, waves[tool], action, reason, needs, expected_s, success))
    return steps


def expand_reasons(pipeline: Pipeline, target: str) -> Dict[str, str]:
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
    ways = [("needed by", edges)] if target.startswith("+") else []
    ways += [("needs", invert(edges))] if target.endswith("+") else []
    added = {each: f"{word} {tool}" for word, way in ways for tool in tools
             for each in find_all_before(tool, way)}
    return {**reasons, **{tool: added[tool] for tool in pipeline.tools
                          if tool in added and tool not in reasons}}


def invert(needs: Mapping[str, Iterable[str]]) -> Dict[str, List[str]]:
    """Return for each tool the tools that need it directly."""
    after: Dict[str, List[str]] = {tool: [] for tool in needs}
    for tool, needed in needs.items():
        for each in needed:
            after[each].append(tool)
    return after


def sort_by_needs(reasons: Dict[str, str], needs: Mapping[str, Any]) -> List[str]:
    """Return the tools with each after what it needs, otherwise in the order given.

    A tool that had to move forward gets that added to its reason.
    """
    position = {tool: i for i, tool in enumerate(reasons)}
    order: Dict[str, None] = {}

    def needs_in_order(tool: str) -> Iterator[str]:
        if needs[tool] == ALL_BEFORE or not needs[tool]:
            return iter(())
        return iter(sorted((n for n in needs[tool] if n in position), key=position.__getitem__))

    for first in position:
        # each tool of the path is needed by the one before it, and placed after its own needs
        path = [] if first in order else [(first, needs_in_order(first))]
        while path:
            tool, left = path[-1]
            need = next((each for each in left if each not in order), None)
            if need is not None:
                path.append((need, needs_in_order(need)))
                continue
            path.pop()
            if path and not reasons[tool].startswith("needed by"):
                reasons[tool] += f"; moved before {path[-1][0]}, which needs it"
            order[tool] = None
    return list(order)


def durations_of(steps: Iterable[Step]) -> Dict[str, float]:
    """Return the seconds to reckon with for each tool; for an unknown one, the mean of the rest."""
    known = [step.expected_s for step in steps if step.expected_s is not None]
    mean_s = sum(known) / len(known) if known else 1.0
    return {step.tool: mean_s if step.expected_s is None else step.expected_s for step in steps}


def find_critical_path(steps: Sequence[Step]) -> Tuple[str, ...]:
    """Return the chain of tools, each waiting for the one before it, that takes longest."""
    durations_s = durations_of(steps)
    end_s: Dict[str, float] = {}
    via: Dict[str, Optional[str]] = {}
    latest: Optional[str] = None  # the tool so far that ends last
    for step in steps:
        via[step.tool] = latest if step.needs == ALL_BEFORE else max(
            (tool for tool in step.needs if tool in end_s), key=end_s.__getitem__, default=None)
        end_s[step.tool] = durations_s[step.tool] + end_s.get(via[step.tool] or "", 0.0)
        if latest is None or end_s[step.tool] >= end_s[latest]:
            latest = step.tool
    path: List[str] = []
    while latest is not None:
        path.append(latest)
        latest = via[latest]
    return tuple(reversed(path))


def find_ways_s(steps: Sequence[Step]) -> Dict[str, float]:
    """Return for each tool the seconds from its start to the end, on the longest way there."""
    durations_s = durations_of(steps)
    way_s = dict(durations_s)
    longest_s = 0.0  # of the tools after this one that wait for all before them
    for step in reversed(steps):
        way_s[step.tool] = max(way_s[step.tool], durations_s[step.tool] + longest_s)
        if step.needs == ALL_BEFORE:
            longest_s = max(longest_s, way_s[step.tool])
        else:
            for need in step.needs:
                if need in way_s:
                    way_s[need] = max(way_s[need], durations_s[need] + way_s[step.tool])
    return way_s


class Schedule:
    """Which tool of a plan may start next: the longest way to the end first, within the limits;
    with one job, which no order makes faster, the plan's own order.

    As in graphlib: `done(tool)` tells that a tool is settled and returns those that wait for
    nothing any more; `add(tool)` makes one of them ready; `next()` takes the best ready tool
    for which there is room, and `release(tool)` gives that room back.

    State: `missing`, how many needs of each tool are not settled; `settled`, by position in the
    plan, and `open_from`, the first position that is not, for tools that wait for all before
    them; `ready`, a heap for each set of uses, since those with the same uses have room
    together; `free`, what is left of the limits.
    """

    def __init__(self, steps: Sequence[Step], pipeline: Pipeline, jobs: int = 2) -> None:
        self.steps, self.tools = steps, pipeline.tools
        self.position = {step.tool: i for i, step in enumerate(steps)}
        self.rank: Mapping[str, Any] = self.position
        if jobs > 1:
            ways_s = find_ways_s(steps)
            self.rank = {tool: (-ways_s[tool], i) for tool, i in self.position.items()}
        self.after: Dict[str, List[str]] = {}
        self.missing: Dict[str, int] = {}
        for step in steps:
            if step.needs != ALL_BEFORE:
                needed = [need for need in step.needs if need in self.position]
                self.missing[step.tool] = len(needed)
                for need in needed:
                    self.after.setdefault(need, []).append(step.tool)
        self.settled = [False] * len(steps)
        self.open_from = 0
        self.ready: Dict[Tuple[Tuple[str, int], ...], List[Any]] = {}
        self.free = dict(pipeline.limits)

    def begin(self) -> List[str]:
        """Return the tools that wait for nothing from the start."""
        return [tool for tool, count in self.missing.items() if not count] + self._next_in_line()

    def done(self, tool: str) -> List[str]:
        """Note a tool as settled and return those that wait for nothing any more."""
        freed = []
        for each in self.after.get(tool, ()):
            self.missing[each] -= 1
            if not self.missing[each]:
                freed.append(each)
        was = self.open_from
        self.settled[self.position[tool]] = True
        while self.open_from < len(self.steps) and self.settled[self.open_from]:
            self.open_from += 1
        return freed + self._next_in_line() if self.open_from > was else freed

    def _next_in_line(self) -> List[str]:
        step = self.steps[self.open_from] if self.open_from < len(self.steps) else None
        return [step.tool] if step and step.needs == ALL_BEFORE else []

    def add(self, tool: str) -> None:
        """Make a tool ready."""
        heappush(self.ready.setdefault(self.tools[tool].uses, []), (self.rank[tool], tool))

    def next(self) -> Optional[str]:
        """Take the best ready tool for which there is room, and its room; None if there is none."""
        heaps = [heap for uses, heap in self.ready.items() if heap and self._has_room(uses)]
        if not heaps:
            return None
        _, tool = heappop(min(heaps))  # which their best, at the front, decide
        self.take(tool)
        return tool

    def _has_room(self, uses: Tuple[Tuple[str, int], ...]) -> bool:
        return not uses or all(units <= self.free[resource] for resource, units in uses)

    def take(self, tool: str) -> bool:
        """Take room for one more worker of a tool that runs; return False if there is none."""
        uses = self.tools[tool].uses
        if not self._has_room(uses):
            return False
        for resource, units in uses:
            self.free[resource] -= units
        return True

    def release(self, tool: str) -> None:
        """Give back the room that a tool took."""
        for resource, units in self.tools[tool].uses:
            self.free[resource] += units

    def take_all(self) -> List[str]:
        """Return the ready tools, in the plan's order, which are then ready no more."""
        tools = [tool for heap in self.ready.values() for _, tool in heap]
        self.ready.clear()
        return sorted(tools, key=lambda tool: self.position[tool])


def simulate(schedule: Schedule, durations_s: Mapping[str, float], jobs: int) -> float:
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

    def arguments(self) -> Dict[str, str]:
        """Return what tools get of it by name."""
        return dict(zip(PERIOD_ARGUMENTS, (self.start, self.end)))


PERIOD_ARGUMENTS = ("period_start", "period_end")


def has_period(arguments: Mapping[str, Any]) -> bool:
    """Return whether a run with these arguments is one of a backfill."""
    return any(arguments.get(name) is not None for name in PERIOD_ARGUMENTS)


def find_day(at: float) -> str:
    """Return the day of a moment, in local time, as `2024-01-31`.

    To ask for the day of a moment, and not for the moment at which a day ends, is right also where
    clocks are changed at midnight, and that day has none, or two.
    """
    return time.strftime("%Y-%m-%d", time.localtime(at))


STEPS = ("day", "week", "month")


def make_periods(span: str, step: str) -> List[Period]:
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


def check_begun(span: str, periods: Sequence[Period], today: str) -> None:
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


def decide_period(period: Period, last: Optional[Tuple[int, str, float]], reprocess: str,
                  today: str) -> Period:
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


def leave_out(pipeline: Pipeline, order: List[str], exclude: Sequence[str],
              start_from: Optional[str]) -> List[str]:
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


def expand_target(pipeline: Pipeline, name: str) -> Tuple[str, ...]:
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

SCHEMA_VERSION = 3
APPLICATION_ID = 0x6F726368  # "orch" in the header of the file says whose it is

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
"""
UPGRADES: Dict[int, str] = {  # schema version -> the statements that lead to the next one
    1: "ALTER TABLE attempts ADD COLUMN items TEXT",
    2: """
ALTER TABLE runs ADD COLUMN item TEXT;
UPDATE runs SET item = '' WHERE words LIKE '%"-' || '-item"%' OR words LIKE '%"-' || '-item=%'
""",  # two hyphens side by side would begin a comment
}

RESULT_CAP_BYTES = 2**20  # a longer result is not kept
LOG_CAP_BYTES = 10 * 2**20  # a longer log keeps its beginning and its end
_WORKER_BYTES = 2**30  # byte 0 of the lock file is the run's, these many after it the workers'
WORKERS_END_S = 5.0  # workers of a killed run are gone by then
LOOK_S = 0.3  # and somebody who only looks whether a run goes on has let go of the lock
# Lock files that this very process holds, and by which Lock of it, since the kernel only keeps
# processes apart. A program has this module twice if a tool of it imports it by its name.
_held: Dict[str, Any] = vars(sys).setdefault("_orchestrator_held", {})


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


def find_pipeline_folder(home: str, name: str) -> str:
    """Return the folder of a pipeline in a home folder."""
    return os.path.join(os.path.abspath(home), make_file_name(name))


def make_file_name(name: str) -> str:
    """Return a name that every file system takes, and that no other name comes to.

    >>> make_file_name("daily"), make_file_name("a/b")
    ('daily', 'a_b-07f4401c')
    """
    if name.isidentifier() and name.isascii() and len(name) <= 80:
        return name
    from zlib import crc32
    safe = re.sub(r"[^\w.-]", "_", name)[:80].lstrip(".")
    while len(safe.encode()) > 200:  # most file systems take 255 bytes
        safe = safe[:-1]
    return safe if safe == name else f"{safe}-{crc32(name.encode('utf-8', 'surrogatepass')):08x}"


def find_histories(home: str) -> List[str]:
    """Return the names of the pipelines that have a history in a home folder."""
    names = sorted(os.listdir(home)) if os.path.isdir(home) else []
    return [name for name in names if os.path.exists(os.path.join(home, name, "history.db"))]


def make_folder(folder: str) -> None:
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


def write_private(path: str, text: str = "") -> None:
    """Create a file that only its owner can read, if it is not there."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        if not file.tell():
            file.write(text.encode())


def refused(path: str, error: BaseException) -> UserError:
    """Return the sentence for a folder or file of the history that can not be used."""
    import sqlite3
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, sqlite3.DatabaseError) and (
            "not a database" in text or "malformed" in text):
        return UserError(f"{path} is damaged: {text}.",
                         "Nothing was changed in it. Move it away to begin a new history, or run "
                         "without one: --no-history.")
    return UserError(f"The history can not be used, {path}: {text}.",
                     "Mend that, choose another folder in the environment variable "
                     "ORCHESTRATOR_HOME, or run without history: --no-history.")


class Lock:
    """Keeps runs of one pipeline apart, by locks on bytes of a file, which the kernel frees.

    Byte 0 belongs to the run, one byte after it to each worker. So the lock of a run that was
    killed is free when the last of its workers is gone. No other code of this process may open
    the file: to close it would free the locks (fcntl(2)).
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.realpath(os.path.join(folder, "lock"))
        self.fd: Optional[int] = None

    def take(self) -> str:
        """Take the lock and return ""; or who has it, "run" or "worker"."""
        if _held.setdefault(self.path, self) is not self:  # which no other thread can tear
            return "run"
        holder = "run"
        try:
            self.fd = open_lock(self.path)
            if lock_bytes(self.fd, 0, 1):
                holder = "worker"
                if lock_bytes(self.fd, 1, _WORKER_BYTES):
                    lock_bytes(self.fd, 1, _WORKER_BYTES, free=True)
                    holder = ""
        finally:
            if holder:
                self.release()
        return holder

    def release(self) -> None:
        """Give the lock back."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        if _held.get(self.path) is self:
            del _held[self.path]


def open_lock(path: str) -> int:
    """Return the lock file, opened."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise refused(path, error) from error


def lock_bytes(fd: int, first: int, count: int, free: bool = False) -> bool:
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


def hold_worker_byte(folder: str) -> None:
    """Let the run's lock not be free while this process lives. Runs in a worker."""
    lock_bytes(open_lock(os.path.join(folder, "lock")), 1 + os.getpid() % _WORKER_BYTES, 1)


def open_database(path: str) -> Any:
    """Return a connection to a history, created or upgraded if need be.

    Raise UserError if the file is somebody else's, damaged, or of a newer engine.
    """
    import sqlite3
    try:
        # Once it is there, nobody but SQLite opens it: to close it here would free the locks of
        # another connection of this process (https://sqlite.org/howtocorrupt.html, 2.2).
        if not os.path.exists(path):
            write_private(path)
        db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("BEGIN")  # so that the three tell of one moment
        version = db.execute("PRAGMA user_version").fetchone()[0]
        owner = db.execute("PRAGMA application_id").fetchone()[0]
        has_tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        db.execute("COMMIT")
        check_is_whole(db, path)
        if owner != APPLICATION_ID and (owner or version or has_tables):
            raise UserError(f"{path} is a database of something else.",
                            "Move it away, or choose another folder in ORCHESTRATOR_HOME.")
        if version > SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {version}, and this engine, "
                            f"{VERSION}, knows {SCHEMA_VERSION}.",
                            "Use the newer orchestrator.py that wrote it.")
        db.execute("PRAGMA wal_autocheckpoint = 4000")
        if version < SCHEMA_VERSION:
            db.execute("PRAGMA page_size = 1024")  # a commit writes whole pages
            use_wal(db)
            upgrade(db, version)
    except (sqlite3.Error, OSError) as error:
        raise refused(path, error) from error
    return db


def check_is_whole(db: Any, path: str) -> None:
    """Raise sqlite3.DatabaseError if a file ends before its last page, which SQLite itself takes
    for a page of zeros. With a log of changes beside it (`-wal`) it may well be shorter.
    """
    import sqlite3
    pages, page_bytes = (db.execute(f"PRAGMA {name}").fetchone()[0]
                         for name in ("page_count", "page_size"))
    if not has_bytes(path + "-wal") and pages * page_bytes > os.path.getsize(path):
        raise sqlite3.DatabaseError("it is malformed, its end is missing")


def use_wal(db: Any) -> None:
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


def upgrade(db: Any, version: int) -> None:
    """Bring a history to the schema of this engine, or create it, in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    if db.execute("PRAGMA user_version").fetchone()[0] != version:  # another start was first
        db.execute("COMMIT")
        return
    for text in [SCHEMA] if version == 0 else [
            UPGRADES[each] for each in range(version, SCHEMA_VERSION)]:
        for statement in re.sub(r"--.*", "", text).split(";"):
            db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


class NoHistory:
    """Stands for a history where none is kept: it takes all and knows nothing."""
    folder = base = ""

    def begin_run(self, plan: Plan, request: Request, arguments: Mapping[str, Any],
                  versions: Versions, at: float) -> str:
        """Return an id for a run that sorts by its start: `20130101T060000Z-1a2b`."""
        return time.strftime("%Y%m%dT%H%M%SZ-", time.gmtime(at)) + os.urandom(2).hex()

    def begin_attempt(self, tool: str, attempt: int, at: float, pid: int) -> None:
        """Record that an attempt begins."""

    def note_items(self, tool: str, counts: Mapping[str, int]) -> None:
        """Record how many items a tool that runs has."""

    def end_attempt(self, tool: str, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        """Record how an attempt ended."""

    def note(self, tool: str, outcome: Outcome, at: float) -> None:
        """Record why there was no attempt."""

    def end_run(self, status: str, duration_s: float) -> None:
        """Record how a run ended."""

    def commit(self) -> None:
        """Make durable what was recorded."""

    def find_success(self, tool: str) -> Optional[Success]:
        """Return the last success of a tool."""

    def find_last_success_at(self, tool: str) -> Optional[float]:
        """Return when the last success of a tool with the arguments of this run began."""

    def find_whole_success(self, tool: str, arguments: str) -> Optional[Success]:
        """Return the last success of a tool that says something of all the data: not of a period,
        not of a single item, and with these arguments, as they are recorded.
        """

    def find_expected_s(self, tool: str) -> Optional[float]:
        """Return the seconds that a tool is expected to take."""

    def find_last(self, tool: str, least_attempt: int = 0) -> Optional[Dict[str, Any]]:
        """Return the newest row of `attempts` for a tool; with 1, of those that called it."""

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""


_SUCCESS = """
    SELECT a.tool, a.status, w.attempt_id, w.run_id, w.started_at, w.duration_s, w.rows,
           w.result, w.kind, r.arguments, w.source, w.inputs, w.needed
    FROM attempts a LEFT JOIN attempts w ON w.attempt_id = a.work
                    LEFT JOIN runs r ON r.run_id = w.run_id
"""

# A period is among the arguments, so one with others is of no backfill, unless these have one.
_WHOLE = ("WHERE a.tool = ? AND a.status = 'success' AND r.item IS NULL AND r.arguments = ? "
          "ORDER BY a.attempt_id DESC LIMIT 1")
_CHAIN = """
    WITH RECURSIVE chain (run_id) AS (
        SELECT ? UNION
        SELECT r.resumes FROM runs r JOIN chain USING (run_id) WHERE r.resumes IS NOT NULL)
"""  # a run, and those that it goes on with


def make_success(row: Sequence[Any]) -> Success:
    """Return a row of _SUCCESS as a Success."""
    import json
    (work, run_id, started_at, duration_s, rows, result, kind, arguments, source, inputs,
     needed) = row[2:]
    return Success(work, str(run_id), started_at, started_at + (duration_s or 0.0), rows, result,
                   kind or "", arguments, load_source(source), inputs or "",
                   json.loads(needed) if needed else {})


def load_source(text: Optional[str]) -> Dict[str, Any]:
    """Return what ran at a success; {} where that is not recorded, or only the fingerprint of a
    syntax tree: engines before this one did not say which function they had called, nor how.
    """
    import json
    return json.loads(text) if text and text[0] == "{" else {}


class History(NoHistory):
    """The history of a pipeline, in its folder. Only who holds its lock writes to it.

    `base` is the folder from which the pipeline names files. State: `run_id` of the run that is
    recorded; `open`, the attempt_id of each attempt that runs; `successes`, the last success of
    each tool that was asked for; `arguments` of the run, as recorded, or None for a backfill, which
    has no last success; `marks`, when that began, of each tool that asked; `killed`, the run that
    reads as interrupted, though it is recorded as running, until the next start records that.
    """

    def __init__(self, folder: str, base: str) -> None:
        self.folder, self.base = folder, base
        self.path = os.path.join(folder, "history.db")
        self._db: Any = None
        self._cursor: Any = None  # for what is recorded: to make one each time costs time
        self.is_changed = False  # whether something is recorded that is not yet durable
        self.run_id = 0
        self.open: Dict[str, int] = {}
        self.successes: Dict[str, Optional[Success]] = {}
        self.arguments: Optional[str] = None
        self.marks: Dict[str, Optional[float]] = {}
        self.killed: Optional[int] = None

    def change(self, sql: str, values: Sequence[Any]) -> Any:
        """Execute a statement that commit() makes durable."""
        if not self.is_changed:
            self.do("BEGIN", (), self._cursor)
            self.is_changed = True
        return self.do(sql, values, self._cursor)

    def commit(self) -> None:
        """Make durable what was recorded."""
        if self.is_changed:
            self.do("COMMIT", (), self._cursor)
            self.is_changed = False

    def do(self, sql: str, values: Sequence[Any] = (), cursor: Any = None) -> Any:
        """Execute a statement. Raise UserError if the file does not take it."""
        import sqlite3
        if self._db is None:
            self._db = open_database(self.path)
            self._cursor = self._db.cursor()
        try:
            return (cursor or self._db).execute(sql, values)
        except sqlite3.Error as error:
            raise refused(self.path, error) from error

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._db is not None:
            self._db.close()
            self._db = self._cursor = None
            self.is_changed = False

    # --- what a run writes ---

    def close_killed(self) -> Tuple[str, List[str]]:
        """Record a run that did not come to its end as interrupted.

        Return its id, or "" if there is none, and the tools that ran.
        """
        killed = self.find_running()
        if killed is None:
            return "", []
        logs, tools = find_logs(self.folder, str(killed["run_id"])), []
        self.do("BEGIN IMMEDIATE")
        for attempt in self.load_attempts(killed):
            if attempt["status"] == "running":
                log = find_log(logs, attempt["tool"], attempt["attempt"])
                if attempt["pid"] == killed["pid"]:
                    append_spools(logs, log)
                self.do("UPDATE attempts SET status = 'interrupted', log = ?, "
                        "reason = 'its run was cut off' WHERE attempt_id = ?",
                        (os.path.relpath(log, self.folder) if has_bytes(log) else None,
                         attempt["attempt_id"]))
                tools.append(attempt["tool"])
        remove_spools(logs)
        self.do("UPDATE runs SET status = 'interrupted' WHERE run_id = ?", (killed["run_id"],))
        self.do("COMMIT")
        return str(killed["run_id"]), tools

    def begin_run(self, plan: Plan, request: Request, arguments: Mapping[str, Any],
                  versions: Versions, at: float) -> str:
        """Record a run, with the tools that it need not do, and return its id."""
        import json
        text = format_arguments(arguments)
        self.arguments, self.marks = None if has_period(arguments) else text, {}
        self.do("BEGIN IMMEDIATE")
        row = self.do("SELECT coalesce(max(attempt_id), 0) + 1 FROM attempts").fetchone()
        self.run_id = self.do(
            "INSERT INTO runs (status, resumes, targets, exclude, start_from, item, arguments, "
            "words, planned, started_at, pid, first_attempt, version, git_commit, tables, sources) "
            "VALUES ('running', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (request.resumes, json.dumps(request.targets), json.dumps(request.exclude),
             request.start_from, request.item, text,
             None if request.words is None else json.dumps(request.words), len(plan.steps), at,
             os.getpid(), row[0], VERSION, find_git_commit(self.base), versions.tables,
             json.dumps(versions.sources))).lastrowid
        for step in plan.steps:
            if step.success:
                self.do("INSERT INTO attempts (run_id, tool, attempt, status, reason, started_at, "
                        "work, rows) VALUES (?, ?, 0, 'cached', ?, ?, ?, ?)",
                        (self.run_id, step.tool, step.reason, at, step.success.work,
                         step.success.rows))
        self.do("COMMIT")
        return str(self.run_id)

    def begin_attempt(self, tool: str, attempt: int, at: float, pid: int) -> None:
        """Record that an attempt begins."""
        self.open[tool] = self.change(
            "INSERT INTO attempts (run_id, tool, attempt, status, started_at, pid) "
            "VALUES (?, ?, ?, 'running', ?, ?)", (self.run_id, tool, attempt, at, pid)).lastrowid

    def note_items(self, tool: str, counts: Mapping[str, int]) -> None:
        """Record how many items a tool that runs has."""
        import json
        self.change("UPDATE attempts SET items = ? WHERE attempt_id = ?",
                    (json.dumps(counts), self.open[tool]))

    def end_attempt(self, tool: str, outcome: Outcome, facts: Mapping[str, Any]) -> None:
        """Record how an attempt ended, and of a tool with `cache` what its success was built on."""
        if outcome.items is not None:
            self.note_items(tool, outcome.items)
        attempt_id = self.open.pop(tool)
        work = result = kind = None
        if outcome.status in ("success", "partial"):
            work = attempt_id
            result, kind = outcome.kept or keep_result(outcome.result)
            self.successes.pop(tool, None)
        self.change("UPDATE attempts SET status = ?, duration_s = ?, work = ?, rows = ?, "
                    "result = ? WHERE attempt_id = ?",
                    (outcome.status, outcome.duration_s, work, outcome.rows, result, attempt_id))
        rare = (kind, outcome.error or None,
                outcome.traceback.encode("utf-8", "backslashreplace").decode() or None,
                os.path.relpath(outcome.log, self.folder) if outcome.log else None,
                facts.get("source"), facts.get("inputs"), facts.get("needed"))
        if outcome.reason or any(rare):  # most attempts are spared the longer statement
            self.change("UPDATE attempts SET reason = ?, kind = ?, error = ?, traceback = ?, "
                        "log = ?, source = ?, inputs = ?, needed = ? WHERE attempt_id = ?",
                        (outcome.reason, *rare, attempt_id))

    def note(self, tool: str, outcome: Outcome, at: float) -> None:
        """Record why there was no attempt."""
        self.change("INSERT INTO attempts (run_id, tool, attempt, status, reason, started_at) "
                    "VALUES (?, ?, 0, ?, ?, ?)",
                    (self.run_id, tool, outcome.status, outcome.reason, at))

    def end_run(self, status: str, duration_s: float) -> None:
        """Record how a run ended."""
        self.change("UPDATE runs SET status = ?, duration_s = ? WHERE run_id = ?",
                    (status, duration_s, self.run_id))
        self.commit()

    def prune(self, before: float) -> List[str]:
        """Forget the runs that began before a moment; return the ids of those that are gone.

        The newest run, and those that hold the last success of a tool, stay: also the last that
        is of no backfill and of no single item, which is what tools and `fresh_for` look at.
        """
        import shutil
        self.do("BEGIN IMMEDIATE")
        rows = self.do("""
            SELECT run_id FROM runs WHERE started_at < ? AND status <> 'running'
               AND run_id < (SELECT max(run_id) FROM runs)
               AND run_id NOT IN (
                   SELECT run_id FROM attempts WHERE attempt_id IN (
                       SELECT max(work) FROM attempts WHERE work IS NOT NULL GROUP BY tool
                       UNION
                       SELECT max(attempt_id) FROM attempts JOIN runs USING (run_id)
                       WHERE attempts.status = 'success' AND item IS NULL
                          AND arguments NOT LIKE '%"period_start": "%' GROUP BY tool))
            """, (before,)).fetchall()
        for row in rows:
            self.do("DELETE FROM attempts WHERE attempt_id >= (SELECT first_attempt FROM runs "
                    "WHERE run_id = ?1) AND run_id = ?1", row)
            self.do("DELETE FROM runs WHERE run_id = ?", row)
        self.do("COMMIT")
        self.do("VACUUM")
        for row in rows:
            shutil.rmtree(os.path.join(self.folder, "logs", str(row[0])), ignore_errors=True)
        return [str(row[0]) for row in rows]

    # --- what planning and views ask ---

    def hold_still(self) -> None:
        """Let all that is read from now on tell of one moment."""
        self.do("BEGIN")

    def _read(self, cursor: Any) -> List[Dict[str, Any]]:
        """Return rows of `runs` or `attempts` by column."""
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row)) for row in cursor]
        for row in rows:
            if row["run_id"] == self.killed and row["status"] == "running":
                row["status"] = "interrupted"
        return rows

    def find_success(self, tool: str) -> Optional[Success]:
        """Return the last success of a tool."""
        if tool not in self.successes:
            row = self.do(_SUCCESS + "WHERE a.tool = ? AND a.status IN ('success', 'partial', "
                          "'cached') ORDER BY a.attempt_id DESC LIMIT 1", (tool,)).fetchone()
            self.successes[tool] = make_success(row) if row and row[2] else None
        return self.successes[tool]

    def find_last_success_at(self, tool: str) -> Optional[float]:
        """Return when the last success of a tool with the arguments of this run began."""
        if self.arguments is not None and tool not in self.marks:
            row = self.do("SELECT a.started_at "  # noqa: S608 - of our own constants
                          "FROM attempts a CROSS JOIN runs r USING (run_id) " + _WHOLE,
                          (tool, self.arguments)).fetchone()
            self.marks[tool] = row[0] if row else None
        return self.marks.get(tool)

    def find_whole_success(self, tool: str, arguments: str) -> Optional[Success]:
        """Return the last success of a tool that says something of all the data: not of a period,
        not of a single item, and with these arguments, as they are recorded.
        """
        row = self.do(_SUCCESS + _WHOLE, (tool, arguments)).fetchone()
        return make_success(row) if row else None

    def find_started_at(self, tool: str, run_id: int) -> float:
        """Return when the last attempt of a tool began in a run or in those that it goes on with;
        if there was none, when the first of these runs began.
        """
        row = self.do(_CHAIN + "SELECT started_at FROM attempts "  # noqa: S608 - the same
                      "WHERE tool = ? AND attempt > 0 AND run_id IN chain "
                      "ORDER BY attempt_id DESC LIMIT 1", (run_id, tool)).fetchone()
        return row[0] if row else self.find_began_at(run_id)

    def find_began_at(self, run_id: int) -> float:
        """Return when a run began, or the first of those that it goes on with."""
        return self.do(_CHAIN + "SELECT min(started_at) "  # noqa: S608 - the same
                       "FROM runs WHERE run_id IN chain", (run_id,)).fetchone()[0]

    def find_expected_s(self, tool: str) -> Optional[float]:
        """Return the median of the seconds that a tool's last successes took."""
        rows = self.do("SELECT duration_s FROM attempts WHERE tool = ? AND status = 'success' "
                       "AND duration_s IS NOT NULL ORDER BY attempt_id DESC LIMIT 11",
                       (tool,)).fetchall()
        return sorted(rows)[len(rows) // 2][0] if rows else None

    def find_done(self, run_id: int) -> Dict[str, Success]:
        """Return the tools that ended well in a run or were done before it."""
        done: Dict[str, Success] = {}
        first = self.do("SELECT first_attempt FROM runs WHERE run_id = ?", (run_id,)).fetchone()[0]
        for row in self.do(_SUCCESS + "WHERE a.attempt_id >= ? AND a.run_id = ? "
                           "ORDER BY a.attempt_id", (first, run_id)):
            done.pop(row[0], None)
            if row[1] in DONE and row[2]:
                done[row[0]] = make_success(row)
        return done

    def find_run(self, run_id: str) -> Dict[str, Any]:
        """Return a row of `runs`. Raise UserError if there is none with that id."""
        run = None
        if str(run_id).isascii():
            run = self._find_last_run("WHERE run_id = ?", (run_id,))
        if run is None:
            newest = self.do("SELECT max(run_id) FROM runs").fetchone()[0]
            raise UserError(f"There is no run {run_id!r}.",
                            f"The last run is {newest}; --history shows which there are."
                            if newest else "Nothing has been run yet.")
        return run

    def find_last_like(self, request: Request, arguments: Mapping[str, Any]
                       ) -> Optional[Tuple[int, str, float]]:
        """Return the last run of the same targets, item and arguments: its id, its status, and
        when it began, or the first of those that it goes on with.
        """
        import json
        row = self.do("SELECT run_id, status FROM runs WHERE targets = ? AND exclude = ? "
                      "AND start_from IS ? AND item IS ? AND arguments = ? "
                      "ORDER BY run_id DESC LIMIT 1",
                      (json.dumps(request.targets), json.dumps(request.exclude),
                       request.start_from, request.item, format_arguments(arguments))).fetchone()
        return row and (*row, self.find_began_at(row[0]))

    def find_running(self) -> Optional[Dict[str, Any]]:
        """Return the row of the run that is not recorded as ended: it goes on, or was killed."""
        return self._find_last_run("WHERE status = 'running'")

    def load_last_runs(self, count: int) -> List[Dict[str, Any]]:
        """Return the rows of the last runs, the newest first."""
        return self._load_runs("ORDER BY run_id DESC LIMIT ?", (count,))

    def _find_last_run(self, where: str, values: Sequence[Any] = ()) -> Optional[Dict[str, Any]]:
        runs = self._load_runs(f"{where} ORDER BY run_id DESC LIMIT 1", values)
        return runs[0] if runs else None

    def _load_runs(self, where: str, values: Sequence[Any] = ()) -> List[Dict[str, Any]]:
        import json
        runs = self._read(self.do(
            f"SELECT * FROM runs {where}", values))  # noqa: S608 - text of our own
        for run in runs:
            for name in ("targets", "exclude", "arguments", "words", "sources"):
                run[name] = run[name] and json.loads(run[name])
        return runs

    def load_attempts(self, run: Mapping[str, Any]) -> List[Dict[str, Any]]:
        """Return the rows of `attempts` of a run, in the order in which they began."""
        return self._read(self.do(
            "SELECT * FROM attempts WHERE attempt_id >= ? AND run_id = ? ORDER BY attempt_id",
            (run["first_attempt"], run["run_id"])))

    def find_last(self, tool: str, least_attempt: int = 0) -> Optional[Dict[str, Any]]:
        """Return the newest row of `attempts` for a tool; with 1, of those that called it."""
        rows = self._read(self.do("SELECT * FROM attempts WHERE tool = ? AND attempt >= ? "
                                  "ORDER BY attempt_id DESC LIMIT 1", (tool, least_attempt)))
        return rows[0] if rows else None

    def find_resumable(self, run_id: Optional[str]) -> Dict[str, Any]:
        """Return the run that a resume goes on with: the last of the runs that resumed it.

        Without an id, of the last run that did not succeed. Raise Settled if there is nothing
        to resume.
        """
        next_one = self._find_last_run("WHERE status <> 'success'") if run_id is None \
            else self.find_run(run_id)
        if next_one is None:
            raise Settled("There is nothing to resume: no run failed or was interrupted.")
        while next_one:
            run = next_one
            next_one = self._find_last_run("WHERE resumes = ?", (run["run_id"],))
        good = self.do(
            "SELECT a.run_id FROM runs a, runs b WHERE b.run_id = ? AND a.run_id >= b.run_id "
            "AND a.status = 'success' AND a.targets = b.targets AND a.exclude = b.exclude "
            "AND a.start_from IS b.start_from AND a.item IS b.item "
            "AND a.arguments = b.arguments LIMIT 1",
            (run["run_id"],)).fetchone()
        if good:
            raise Settled(f"There is nothing to resume: run {good[0]} did all of "
                          f"{'it' if good[0] == run['run_id'] else 'run ' + str(run['run_id'])}.")
        return run


_NOT_JSON = "repr"  # {"repr": "PosixPath('a')"} stands for what JSON can not say


def format_arguments(arguments: Mapping[str, Any]) -> str:
    """Return the arguments of tools as JSON, in one order; what JSON can not say, by its repr.

    >>> format_arguments({"since": None, "shift": 1j})
    '{"shift": {"repr": "1j"}, "since": null}'
    """
    import json

    def describe(value: Any) -> Dict[str, Any]:
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


def keep_result(result: Any) -> Tuple[Optional[str], Optional[str]]:
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


def find_git_commit(folder: str) -> Optional[str]:
    """Return the commit that is checked out around a folder, as the files in .git tell."""
    while not os.path.exists(os.path.join(folder, ".git")):
        folder, below = os.path.dirname(folder), folder
        if folder == below:
            return None
    git = os.path.join(folder, ".git")
    try:
        if os.path.isfile(git):  # a worktree: "gitdir: PATH"
            git = os.path.join(folder, read_file(git).partition(": ")[2])
        head = read_file(os.path.join(git, "HEAD"))
        if not head.startswith("ref: "):
            return head
        if os.path.exists(os.path.join(git, "commondir")):
            git = os.path.join(git, read_file(os.path.join(git, "commondir")))
        loose = os.path.join(git, head[5:])
        if os.path.exists(loose):
            return read_file(loose)
        for line in read_file(os.path.join(git, "packed-refs")).splitlines():
            if line.endswith(" " + head[5:]):
                return line.partition(" ")[0]
    except (OSError, ValueError):
        pass  # a repository without a commit, or one of a kind that we do not know
    return None


def read_file(path: str) -> str:
    """Return a small text file, without blanks around it."""
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def find_reads(tool: Tool, base: str, known: Mapping[str, Any]) -> Dict[str, Any]:
    """Return size, time of change and content's fingerprint of the files that a tool reads.

    Names are seen from the folder `base`; those that are no files or folders, such as tables, do
    not count. The fingerprint is taken from `known`, the state at another time, where size and
    time are the same.
    """
    files: Dict[str, Any] = {}
    for name in tool.reads or ():
        top = os.path.join(base, name)
        for path in [top] if os.path.isfile(top) else find_files(top):
            shown = os.path.relpath(path, base).replace(os.sep, "/")
            try:
                stat = os.stat(path)
                size_time = [stat.st_size, stat.st_mtime_ns]
                same = known.get(shown, [None])[:2] == size_time
                files[shown] = [*size_time, known[shown][2] if same else hash_file(path)]
            except OSError:
                files[shown] = [0, 0, ""]  # its tool will tell, if it matters
    return files


def find_writes(tool: Tool, base: str) -> List[str]:
    """Return those of the names that a tool writes that are files or folders."""
    return [name for name in tool.writes or () if os.path.exists(os.path.join(base, name))]


def find_files(folder: str) -> List[str]:
    """Return all files in a folder, at any depth, in one order; no links to nowhere, no pipes."""
    paths = (os.path.join(each, name) for each, _, names in os.walk(folder) for name in names)
    return sorted(filter(os.path.isfile, paths))


def hash_file(path: str) -> str:
    """Return a fingerprint of a file's content."""
    from hashlib import sha256
    digest = sha256()
    with open(path, "rb") as file:
        while True:
            piece = file.read(1 << 20)
            if not piece:
                return digest.hexdigest()
            digest.update(piece)


def find_changed_file(tool: Tool, base: str, inputs: str) -> str:
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


SPOOLS = (".stdout", ".stderr")  # beside the logs of a run, while it lasts: see Capture
SHOWN = ".shown"  # beside each of them, how many of its bytes are in the log already


def find_logs(folder: str, run_id: str) -> str:
    """Return the folder for the logs of a run."""
    return os.path.join(folder, "logs", run_id)


def find_log(logs: str, tool: str, attempt: int) -> str:
    """Return the file for what an attempt prints."""
    return f"{logs}{os.sep}{make_file_name(tool)}.{attempt}.log"


def append_spools(logs: str, log: str) -> None:
    """Append to a log what a run that was killed had printed last, and not carried there yet."""
    from shutil import copyfileobj
    for name in SPOOLS:
        spool = os.path.join(logs, name)
        shown = int(read_file(spool + SHOWN) or 0) if os.path.exists(spool + SHOWN) else 0
        if has_bytes(spool) and os.path.getsize(spool) > shown:
            with open(spool, "rb") as source, open(log, "ab") as target:
                source.seek(shown)
                copyfileobj(source, target)
    remove_spools(logs)


def remove_spools(logs: str) -> None:
    """Remove what a run that was killed has left beside its logs."""
    for name in SPOOLS:
        for path in (os.path.join(logs, name), os.path.join(logs, name + SHOWN)):
            if os.path.exists(path):
                os.unlink(path)


def has_bytes(path: str) -> bool:
    """Return whether a file is there and not empty."""
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def open_log(path: str) -> int:
    """Return a log, opened to append to it; its folder is made again if somebody removed it."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def append_log(path: str, line: str) -> None:
    """Add a line to a log."""
    with open(open_log(path), "ab") as file:
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def tidy_log(path: str) -> None:
    """Remove a log without a byte, and trim one that is too long."""
    if has_bytes(path):
        trim_log(path)
    elif os.path.exists(path):
        os.unlink(path)


def trim_log(path: str, cap_bytes: int = LOG_CAP_BYTES) -> None:
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


def read_tail(path: str, lines: int, line_bytes: int = 1000) -> List[str]:
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


def clean(text: str) -> str:
    """Return a text without control characters but tabs and ends of lines.

    >>> clean("a\\x1b[31mred\\x1b[0m\\r\\n\\x00b")
    'ared\\nb'
    """
    return re.sub(_ESCAPES, "", text.replace("\r\n", "\n"))


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

    def __init__(self, get_connection: Callable[[], Any],
                 is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self.get_connection, self.is_cancelled = get_connection, is_cancelled
        self.conn: Any = None
        self.raw: Any = None
        self.is_open = self.is_ours = self.has_begun = self.is_tried = False
        self.is_sqlite = self.is_simple = False
        self.autocommit: Any = None
        self.alchemy: Optional[Alchemy] = None
        self.wrapper: Optional[Wrapper] = None
        self.schema: Optional[str] = None
        self.has_set = False

    def open(self) -> Any:
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

    def begin(self, is_urgent: bool = False, commits: bool = False) -> None:
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

    def lend(self) -> None:
        """Open the connection for a tool that begins and ends its transactions itself."""
        self.open()
        self.is_ours = False
        if self.alchemy:
            self.alchemy.is_ours = False

    def commit(self) -> None:
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

    def is_aborted(self) -> bool:
        """Return whether a COMMIT would undo the transaction instead."""
        return is_aborted(self.conn)

    def rollback(self) -> bool:
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

    def close(self) -> None:
        """Close the connection if it is open; the next use opens another. Never raises."""
        conn, self.conn, self.raw, self.is_open = self.conn, None, None, False
        alchemy, self.alchemy, self.wrapper = self.alchemy, None, None
        if alchemy:
            alchemy.is_ours = False
        try:
            call_if_there(conn, "close")
        except Exception:
            pass  # what was committed is safe; what was not is gone with the connection

    def _end(self, how: str) -> bool:
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

    def __init__(self, conn: Any) -> None:
        self.conn, self.is_session = conn, is_session(conn)
        self.is_ours = self.is_urgent = self.has_begun = False
        self.parts: List[Any] = []
        self.session: Any = None
        self.begins: Optional[bool] = None
        self.problem = ""

    def begin(self, is_urgent: bool, commits: bool) -> None:
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

    def _find_session(self) -> Any:
        """Return the Session, which a scoped_session keeps inside."""
        return self.conn.registry() if hasattr(self.conn, "registry") else self.conn

    def _hear(self, session: Any, _transaction: Any, part: Any) -> None:
        """Hear that a Session has begun a transaction on a connection."""
        if self.is_ours and session is self.session:
            self._join(part)

    def _join(self, part: Any) -> None:
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

    def is_aborted(self) -> bool:
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

    def end(self, how: str) -> bool:
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

    def __init__(self, conn: Any) -> None:
        self.conn, self.is_sqlite = conn, False

    def begin(self) -> None:
        """Begin a transaction, of SQLite too, which would not do so before all statements."""
        if not hasattr(self.conn, "in_transaction"):
            call_if_there(self.conn, "begin")
        if self.is_sqlite:
            with contextlib.suppress(Exception):  # it has begun
                self._say("BEGIN")

    def try_out(self) -> None:
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

    def _does(self, sql: str) -> bool:
        try:
            self._say(sql)
        except Exception:
            return False
        return True

    def _say(self, sql: str) -> None:
        asked = self.conn if hasattr(self.conn, "execute") else self.conn.cursor()
        asked.execute(sql)
        call_if_there(asked, "fetchall")


def is_cursor(thing: Any) -> bool:
    """Return whether a thing is a DB-API cursor; some connections can fetch, but also commit."""
    return hasattr(thing, "fetchone") and hasattr(thing, "description") \
        and not hasattr(thing, "commit")


def is_sqlite(conn: Any) -> bool:
    """Return whether a connection is Python's sqlite3, or a driver made in its image."""
    return isinstance(getattr(conn, "in_transaction", None), bool) and hasattr(conn, "execute")


def was_closed(conn: Any) -> bool:
    """Return whether somebody here has closed a connection, and the server has not."""
    return getattr(conn, "closed", 0) == 1 and not getattr(conn, "broken", False)  # psycopg2, 3


def is_session(conn: Any) -> bool:
    """Return whether a connection is a Session of SQLAlchemy, or a scoped_session."""
    return "sqlalchemy" in sys.modules and hasattr(conn, "get_bind") \
        and callable(getattr(conn, "connection", None))


def is_async(conn: Any) -> bool:
    """Return whether a connection is to be awaited, or its methods are."""
    if hasattr(type(conn), "__await__"):
        return True
    flags = [getattr(getattr(getattr(conn, name, None), "__code__", None), "co_flags", 0)
             for name in ("commit", "rollback", "execute")]
    is_one = hasattr(type(conn), "__aenter__") and not hasattr(type(conn), "__enter__")
    return any(flag & _CO_COROUTINE for flag in flags) or is_one and hasattr(conn, "commit")


def is_pending(conn: Any) -> bool:
    """Return whether a thing is a generator, or a `with` block that nobody has entered."""
    return hasattr(type(conn), "gi_frame") or isinstance(conn, contextlib._GeneratorContextManager)


def find_raw(conn: Any) -> Any:
    """Return the connection of the driver, which SQLAlchemy keeps inside its own."""
    if not hasattr(conn, "dbapi_connection"):
        inner = getattr(conn, "connection", None)
        conn = inner if hasattr(inner, "cursor") else conn  # or it is a method, or anything else
    return getattr(conn, "dbapi_connection", conn)


def check_ends(conn: Any) -> None:
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


def is_autocommit(raw: Any, part: Any) -> bool:
    """Return whether the driver of a Connection of SQLAlchemy commits each statement at once;
    but for SQLite, which does not where the engine begins.
    """
    mode = getattr(raw, "autocommit", None)
    if not isinstance(mode, bool) and callable(getattr(raw, "get_autocommit", None)):
        mode = raw.get_autocommit()  # of MySQL drivers
    if isinstance(mode, bool) or is_sqlite(raw):
        return mode is True
    return part.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def is_in_transaction(conn: Any) -> Optional[bool]:
    """Return whether a connection of a driver is in a transaction; None if it does not tell."""
    if is_sqlite(conn):  # which is always in one where autocommit is False
        return conn.in_transaction and getattr(conn, "autocommit", None) is not False
    status = getattr(getattr(conn, "info", None), "transaction_status", None)
    if status is None and isinstance(getattr(conn, "server_status", None), int):
        status = conn.server_status & 1  # of PyMySQL
    return None if status is None else status != 0


def is_aborted(conn: Any) -> bool:
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
    problem: Optional[Exception] = None
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


def find_driver(conn: Any) -> Tuple[str, str]:
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


def keeps_ledger(conn: Any) -> bool:
    """Return whether a connection is one of a database, which can keep a ledger."""
    return hasattr(conn, "cursor") or hasattr(conn, "execute")


def find_schema(conn: Any) -> str:
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


def find_hint(error: BaseException) -> str:
    """Return the way out of an error of a database driver, where one is known, else ""."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if not kinds & {"DatabaseError", "InterfaceError", "ResourceClosedError"}:
        return ""  # others have connections, too
    return next((hint for text, hint in _HINTS if re.search(text, str(error), re.I)), "")


def call_if_there(thing: Any, method: str) -> Any:
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


def bind(sql: str, style: str) -> str:
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


def make_ledger_key(name: str) -> str:
    """Return the name of a pipeline or tool as the ledger knows it."""
    return name if len(name) <= 80 else make_file_name(name)


def is_locked(error: Optional[BaseException]) -> bool:
    """Return whether an error only says that another was at the same rows at that moment."""
    for each in find_chain(error):
        number = each.args[0] if each.args else None
        kinds = {kind.__name__ for kind in type(each).__mro__}
        if "DatabaseError" in kinds and (
                find_sqlstate(each) in _LOCKED_STATES or number in _LOCKED_NUMBERS
                or re.search(r"database (table |schema )?is locked", str(each))):
            return True
    return False


def find_chain(error: Optional[BaseException]) -> List[BaseException]:
    """Return an error and those behind it, up to the end of a transaction that came too early."""
    seen: List[BaseException] = []
    # People can make a ring of such a chain.
    while error is not None and error not in seen and not isinstance(error, EndedEarly):
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def find_sqlstate(error: BaseException) -> Optional[str]:
    """Return the SQLSTATE of an error of a driver that gives one: psycopg, psycopg2."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def is_of_place(error: Optional[BaseException]) -> bool:
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


def count_tries(item: Item) -> int:
    """Return how often an item was tried, as far as it is recorded."""
    return item.attempts + item.deaths


class Taken(Exception):
    """Somebody else wrote the row of an item after it was looked at."""


class EndedEarly(Exception):
    """An item ended its transaction itself, so that it may have been done."""


class Guard:
    """Refuses on SQLite what would end the transaction of an item, while it is up.

    State: `is_up`; `tried`, what the item tried in spite of it.
    """
    TRANSACTION, DENY = 22, 1  # SQLITE_TRANSACTION, SQLITE_DENY

    def __init__(self) -> None:
        self.is_up, self.tried = False, ""

    def install(self, conn: Any) -> None:
        """Watch a connection. What it has prepared before is prepared anew, and so seen."""
        if hasattr(conn, "set_authorizer"):
            conn.set_authorizer(self.authorize)

    def authorize(self, action: int, what: Optional[str], *_: Any) -> int:
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

    def __init__(self, conn: Any, path: str, pipeline: str, tool: str, run_id: str,
                 source: str, former: str = "", schema: Optional[str] = None) -> None:
        self.is_apart = not keeps_ledger(conn)
        if self.is_apart:
            import sqlite3
            conn = sqlite3.connect(path or ":memory:", timeout=60.0, isolation_level=None)
        self.conn = conn
        self.key = (make_ledger_key(pipeline), make_ledger_key(tool))
        self.run_id, self.source = run_id, source
        self.sources = source, former  # the same, as this engine says it and as former ones did
        self.kind, self.style = find_driver(conn)
        self.guard = Guard()
        self.has_savepoints = self.kind != "duckdb"
        self.transaction: Any = None
        self.doubles: List[str] = []  # names that find_pending() has found a second time
        self.move(find_schema(conn) if schema is None or self.is_apart else schema)
        self._direct = getattr(conn, "exec_driver_sql", None) or (
            # A cursor of DuckDB's is another connection, with a transaction of its own.
            conn.execute if self.kind in ("sqlite", "duckdb") else None)
        self.raw = find_raw(conn)
        if self.kind == "sqlite":
            self.guard.install(self.raw)

    def close(self) -> None:
        """Close what is open beside the tool's own connection."""
        if self.is_apart:
            self.conn.close()

    def move(self, schema: str) -> None:
        """Keep the ledger in a schema."""
        self.schema, self._sql = schema, {}
        self.near = {"sqlite": "temp.", "postgresql": "pg_temp.", "duckdb": "temp.main."}.get(
            self.kind, schema)

    def do(self, sql: str, values: Sequence[Any] = ()) -> Any:
        """Execute a statement of ours, whose parameters are `?`, and return the cursor."""
        return self._execute(self._sql.get(sql) or self._bind(sql), values)

    def _bind(self, sql: str) -> str:
        """Return a statement of ours as the driver takes it, with the full names of tables."""
        bound = bind(sql, self.style).replace("orchestrator_items", self.schema
                                              + "orchestrator_items")
        for name in ("orchestrator_listed", "orchestrator_pending"):
            bound = bound.replace(name, self.near + name)
        self._sql[sql] = bound
        return bound

    def read(self, sql: str, values: Sequence[Any] = ()) -> List[Tuple[Any, ...]]:
        """Return the rows of a SELECT of ours, as tuples whatever the connection makes of rows."""
        if self.kind == "sqlite" and hasattr(self.conn, "row_factory"):
            cursor = self.conn.cursor()
            cursor.row_factory = None
            return cursor.execute(self._sql.get(sql) or self._bind(sql), values).fetchall()
        return [tuple(row.values() if isinstance(row, Mapping) else row)
                for row in self.do(sql, values).fetchall()]

    def do_theirs(self, sql: str) -> Any:
        """Execute a statement that holds a SELECT of the user's, in which % and ? are letters."""
        if hasattr(self.conn, "exec_driver_sql"):  # it hands on an empty tuple, and % is a mark
            return self.conn.exec_driver_sql(sql, execution_options={"no_parameters": True})
        return self._execute(sql)

    def _execute(self, *statement: Any) -> Any:
        if self._direct:
            return self._direct(*statement)
        cursor = self.conn.cursor()
        cursor.execute(*statement)
        return cursor

    # --- the table ---

    def is_there(self) -> bool:
        """Return whether the ledger's table exists; where not, the transaction may be over."""
        try:
            self.read("SELECT 1 FROM orchestrator_items WHERE 1 = 0")
        except Exception:
            return False
        return True

    def create(self) -> None:
        """Create the ledger's table."""
        dialect = self._find_dialect()
        schema = LEDGER_SCHEMA.format(text=dialect.text, more=dialect.collate + dialect.more)
        self.do(re.sub(r"--.*", "", schema))

    def _find_dialect(self) -> Dialect:
        if self.kind == "mysql" and "mariadb" in str(self.read("SELECT version()")).lower():
            self.kind = "mariadb"
        return _DIALECTS.get(self.kind, Dialect())

    # --- which items there are ---

    def list_items(self, found: Any, each: Optional[str]) -> None:
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

    def _create(self, name: str, more: str = "") -> None:
        """Create a temporary table of items, or empty it.

        It is not dropped: SQLite refuses that while a query of the tool's is open.
        """
        dialect = self._find_dialect()
        self.do(f"CREATE TEMPORARY TABLE IF NOT EXISTS orchestrator_{name} (seq {dialect.seq}, "
                f"item {dialect.text}, version {dialect.text}{more}){dialect.collate}")
        self.do(f"DELETE FROM orchestrator_{name}")  # noqa: S608 - a name of our own

    def _insert_selected(self, select: str, dialect: Dialect) -> None:
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

    def _insert_all(self, found: Iterable[Any]) -> None:
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

    def give_back(self, names: Sequence[str]) -> List[str]:
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

    def find_others(self) -> List[str]:
        """Return the pipelines that have items of this tool in the ledger, if this one has none."""
        if self.read("SELECT 1 FROM orchestrator_items WHERE pipeline = ? AND tool = ? LIMIT 1",
                     self.key):
            return []
        return [row[0] for row in self.read(
            "SELECT DISTINCT pipeline FROM orchestrator_items WHERE tool = ?", self.key[1:])]

    def find_pending(self) -> Iterator[Tuple[Item, str, str]]:
        """Yield the items that are not done, in order, each with the status of the last try of
        this version, "" if there was none, and the run of that.

        The database finds them.
        """
        self._create("pending", ", status VARCHAR(20), attempts INTEGER, deaths INTEGER, "
                     "run_id VARCHAR(40)")
        sql = ("INSERT INTO orchestrator_pending "
               "SELECT l.seq, l.item, l.version, "
               "CASE WHEN d.version = l.version AND d.source IN (?, ?) THEN d.status END, "
               "d.attempts, d.deaths, d.run_id "
               "FROM orchestrator_listed l LEFT JOIN orchestrator_items d "
               "ON d.pipeline = ? AND d.tool = ? AND d.item = l.item "
               "WHERE (d.passed IS NULL OR d.passed <> l.version)")
        self.do(sql, (*self.sources, *self.key))
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

    def count_listed(self, only: Optional[str] = None) -> int:
        """Return how many items were listed, or how often one of them was."""
        sql = "SELECT count(*) FROM orchestrator_listed"
        rows = self.read(sql) if only is None else self.read(sql + " WHERE item = ?", (only,))
        return rows[0][0]

    def has_passed(self) -> bool:
        """Return whether any item ever passed."""
        return bool(self.read("SELECT 1 FROM orchestrator_items WHERE pipeline = ? AND tool = ? "
                              "AND passed IS NOT NULL LIMIT 1", self.key))

    # --- how one ended ---

    def look(self, item: Item) -> Tuple[Item, str, Optional[int], Optional[str]]:
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
        if version != item.version or source not in self.sources:
            return item, "pending", None, None
        if attempts + deaths <= count_tries(item):  # as it was when it was listed
            status = "pending"
        return (item._replace(attempts=attempts, deaths=deaths),
                status if is_ours or status == "pending" else "done", rows, error)

    def record(self, item: Item, status: str, attempts: int, at: float,
               duration_s: Optional[float], rows: Optional[int] = None,
               error: Optional[str] = None) -> None:
        """Write how a try of an item ended. Raise Taken if somebody else wrote its row since it
        was looked at, or did it.

        To delete a row and insert it anew would let two do one item: each would see its own.
        """
        passed = item.version if status == "success" else None
        values = (item.version, passed, status, attempts, item.deaths, self.source, self.run_id,
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

    def begin(self, is_urgent: bool) -> None:
        """Begin a transaction of SQLite's inside SQLAlchemy's, which would do so at the first
        statement of an item.
        """
        if self.kind == "sqlite" and hasattr(self.conn, "exec_driver_sql"):
            if not self.conn.in_transaction():
                self.conn.begin()
            if not self.raw.in_transaction:
                self.raw.execute("BEGIN IMMEDIATE" if is_urgent else "BEGIN")

    def begin_item(self) -> None:
        """Begin the part of a transaction that is an item's; without savepoints, the whole."""
        if self.has_savepoints:
            self.do("SAVEPOINT orchestrator_item")
        else:
            self.transaction = self._find_transaction()

    def leave_item(self) -> None:
        """End the part of a transaction that is an item's; it fails if that is no more."""
        if self.has_savepoints:
            self.do("RELEASE SAVEPOINT orchestrator_item")
        elif self._find_transaction() != self.transaction:
            raise RuntimeError("the transaction is another")

    def undo_item(self) -> None:
        """Undo the part of a transaction that is an item's; it fails if that is no more."""
        if self.has_savepoints:
            self.do("ROLLBACK TO SAVEPOINT orchestrator_item")
        elif not is_aborted(self.conn):  # only what is still open can be aborted
            self.leave_item()

    def _find_transaction(self) -> Any:
        return self.read("SELECT txid_current()")[0]

    # --- what views ask ---

    def count(self, since: float) -> Dict[str, Tuple[int, int]]:
        """Return how many items have each status, and of how many the last try ended since a
        moment.
        """
        return {status: (count, int(new)) for status, count, new in self.read(
            "SELECT status, count(*), sum(CASE WHEN ended_at >= ? THEN 1 ELSE 0 END) "
            "FROM orchestrator_items WHERE pipeline = ? AND tool = ? GROUP BY status",
            (since, *self.key))}

    def load_items(self, statuses: Sequence[str], after: str) -> List[Dict[str, Any]]:
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


def count_changed(cursor: Any) -> int:
    """Return how many rows an UPDATE changed, which DuckDB gives as a row."""
    return cursor.fetchone()[0] if cursor.rowcount < 0 else cursor.rowcount


def read_item(number: int, found: Any) -> Tuple[str, str]:
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


def check_item(name: Optional[str], version: str) -> None:
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


def write_slip(fd: int, item: Item) -> None:
    """Note the item that is at work, unsynced: read_slip() tells it if this process dies."""
    content = f"{item.name}\0{item.version}\0{item.attempts}\0{item.deaths}\0".encode()
    if hasattr(os, "pwrite"):
        os.pwrite(fd, content, 0)
    else:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, content)


NO_ITEM = Item("")  # what a slip says while nothing is at work


def read_slip(path: str) -> Optional[Item]:
    """Return the item that was at work in a process that has died, or None."""
    try:
        with open(path, "rb") as file:
            name, version, attempts, deaths = file.read().decode("utf-8").split("\0")[:4]
        return Item(name, version, None, int(attempts), int(deaths)) if name else None
    except (OSError, ValueError):
        return None


def find_ledger_path(folder: str) -> str:
    """Return the file for the ledgers of tools without a database, in a folder for history, or
    "" without that.
    """
    return folder and os.path.join(folder, "history.db")


def find_slips(folder: str, tool: str) -> str:
    """Return the folder for the slips of a tool's items."""
    return os.path.join(folder, "slips", make_file_name(tool))


# === 7 CALLING ==================================================================================
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
    items: Optional[Callable[..., Any]] = None
    items_takes: Parameters = Parameters()
    is_main: bool = False  # whether what run() returns is an exit code

    @property
    def takes_conn(self) -> bool:
        """Whether run() or check() gets the connection."""
        run, check = self.run_takes, self.check_takes
        return run.takes_all or check.takes_all or "conn" in run.names or "conn" in check.names

    @property
    def has_items(self) -> bool:
        """Whether run() is called once per item."""
        return self.items is not None or self.tool.each is not None


class Packed(NamedTuple):
    """A result that came, or is to go, through a pipe: pickled, or only the name of its type."""
    content: Optional[bytes]
    kind: str


def pack_result(result: Any) -> Packed:
    """Return a result as it travels between processes. Never raises: who asks for it is told."""
    import pickle
    if isinstance(result, Packed):
        return result
    try:
        return Packed(pickle.dumps(result, pickle.HIGHEST_PROTOCOL), format_type(result))
    except Exception:
        return Packed(None, format_type(result))


class Results(Mapping[str, Any]):
    """What tools returned, by name, to read only. What came through a pipe is unpacked when asked.

    Raises TypeError for a result that could not travel, KeyError for a tool without one.
    """

    def __init__(self, results: Mapping[str, Any]) -> None:
        self._results = results

    def __getitem__(self, tool: str) -> Any:
        try:
            result = self._results[tool]
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

    def __contains__(self, tool: object) -> bool:
        return tool in self._results

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        def show(tool: str, result: Any) -> str:
            if isinstance(result, Packed) and not (result.content and len(result.content) < 1000):
                return f"{tool!r}: <{result.kind}>"
            return f"{tool!r}: {self[tool]!r}"

        return "{" + ", ".join(show(*each) for each in self._results.items()) + "}"


class Part(Mapping[str, Any]):
    """A part of a mapping, as it is when asked."""

    def __init__(self, whole: Mapping[str, Any], has: Callable[[str], bool]) -> None:
        self._whole, self._has = whole, has

    def __getitem__(self, name: str) -> Any:
        if name in self._whole and self._has(name):
            return self._whole[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return filter(self._has, self._whole)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Context:
    """What a tool may know of its run: `context` among its arguments.

    run_id: text. tool: its name. item, version: of the item that is done, or None. attempt: which
    try of the item, or else of the tool, it is: 1, 2, ... results: what the tools that it waits for
    returned, by name, to read only. last_success: the moment in UTC, a `datetime`, at which the
    last success of this tool with the same arguments began, so that what came later has not been
    seen; None if there was none, in a backfill, or if no history is kept. Not counted are successes
    of a backfill, of a single item, and of some items only.
    """

    def __init__(self, run_id: str, tool: str, attempt: int, results: Mapping[str, Any],
                 tell: Callable[..., None],
                 find_last_success_at: Callable[[str], Optional[float]]) -> None:
        self.run_id, self.tool, self.attempt, self.results = run_id, tool, attempt, results
        self.item: Optional[str] = None
        self.version: Optional[str] = None
        self._find_last_success_at = find_last_success_at
        self._tell = tell  # tell(kind, tool, ...) reaches the listener of the run
        self._log: Any = None

    @property
    def last_success(self) -> Any:
        """When the last success with these arguments began, a `datetime` in UTC, or None."""
        from datetime import datetime, timezone
        at = self._find_last_success_at(self.tool)
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
            self._tell("progress", self.tool, done=done, total=total)


def make_log(tool: str, tell: Callable[..., None]) -> Any:
    """Return a logger whose lines are events, unless somebody has set up handlers of their own.

    It is not registered with `logging`, so nothing of a run stays behind in the process.
    """
    import logging

    class Teller(logging.Handler):
        def emit(self, record: Any) -> None:
            """Make an event of a line, unless others have set up logging; never raise."""
            if logger.parent.hasHandlers():  # asked for each line: they may come at any time
                return
            try:
                text = self.format(record)
            except Exception:
                self.handleError(record)  # a line with wrong arguments fails nothing
            else:
                tell("log", tool, text=text, level=record.levelno)

    class Log(logging.Logger):
        def getEffectiveLevel(self) -> int:
            of_others = self.parent.getEffectiveLevel() if self.parent.hasHandlers() else 0
            return self.level or of_others or logging.DEBUG

        def isEnabledFor(self, level: int) -> bool:  # the cache of Logger would not notice them
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

    def __init__(self) -> None:
        self.signal: Optional[int] = None
        self.signal_s = 0.0  # when it came
        self.in_tool = False  # whether foreign code is being called
        self.is_on_main_thread = False
        self.before: Dict[int, Any] = {}
        self.before_exit: Callable[[], None] = lambda: None

    def __enter__(self) -> "Interrupts":
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

    def __exit__(self, *_: Any) -> None:
        import signal
        if self in Interrupts.lasting:
            Interrupts.lasting.remove(self)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @staticmethod
    def leave_all() -> None:
        """Take signals as before. Runs in a process that was forked."""
        for interrupts in [*Interrupts.lasting]:
            interrupts.__exit__()

    def on_signal(self, number: int, _frame: Any) -> None:
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

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
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

    def own_argv(self, tool: Tool) -> None:
        """Let sys.argv be a tool's name alone, until call() returns: the words of the command line
        are the orchestrator's, and a tool that reads it would take `--force` for its own.
        """
        if self.is_on_main_thread:
            sys.argv = [tool.name]

    def finish(self, step: Callable[..., Any], *args: Any) -> Any:
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
    tools = list(tools)
    missing = {module for module in {tool.module for tool in tools} if find_module(module) is None}
    if missing:
        raise merge_errors([missing_module(tool) for tool in tools if tool.module in missing])


def missing_module(tool: Tool) -> UserError:
    """Return the sentence for a module that is not there, with the nearest one that is."""
    import pkgutil
    package, dot, _ = tool.module.rpartition(".")
    places = sys.path[:1]
    if package:
        places = getattr(find_module(package), "submodule_search_locations", None) or ()
    there = [package + dot + each.name for each in pkgutil.iter_modules(list(places))]
    return UserError(f"TOOL_MAP[{tool.name!r}]: there is no module {tool.module!r}.",
                     format_near(tool.module, there, "Write it, or correct its path")
                     + f" (dots between folders, starting from {sys.path[0] or 'this folder'}).")


def format_near(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return the way out of a mistyped word if a known one is near, or else another."""
    fix = format_nearest(word, known)
    return fix if fix.startswith("Did") else otherwise


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


def find_base(get_connection: Optional[Callable[[], Any]]) -> str:
    """Return the folder of the file that defines get_connection, else of the main program."""
    code = getattr(get_connection, "__code__", None)
    file = getattr(code, "co_filename", None) \
        or getattr(sys.modules["__main__"], "__file__", None) or "."
    return os.path.dirname(os.path.abspath(file))


class Sources:
    """Fingerprints of the files of tools' modules, each of which is read once.

    Bytes count, since a syntax tree is another in each version of Python; only the ends of lines
    do not, which a checkout may change, and which mean the same to Python. Nor does what a module
    imports. `is_of_run`: they tell what this process runs, which is what a file held when it was
    imported; asked for before that, so that who changes it meanwhile has changed it since.
    """
    imported: Dict[str, Tuple[Any, str]] = {}  # of this process: module -> its spec, fingerprint

    def __init__(self, is_of_run: bool = False) -> None:
        self.is_of_run = is_of_run
        self._known: Dict[str, str] = {}
        self._former: Dict[str, str] = {}

    def find(self, tool: Tool) -> str:
        """Return the fingerprint of a tool's module; "" of one without a file.

        Raise UserError if the module is not there.
        """
        module = tool.module
        if module not in self._known:
            spec, digest = self.imported.get(module, (None, ""))
            is_same = self.is_of_run and spec and spec is find_imported_spec(module)
            self._known[module] = digest if is_same else hash_module(tool)
        return self._known[module]

    def note_imported(self) -> None:
        """Keep what the modules held that this process has imported, however long it lives."""
        for module, digest in self._known.items():
            spec = find_imported_spec(module)
            if spec is not None:
                self.imported[module] = spec, digest

    def find_former(self, tool: Tool) -> str:
        """Return the fingerprint that former engines gave to a module, that of its syntax tree:
        by it the rows are known that they wrote into ledgers.
        """
        if tool.module not in self._former:
            import ast
            from hashlib import sha256
            self._former[tool.module] = self.find(tool)
            with contextlib.suppress(UserError):  # it is no Python any more
                _, tree = read_module(tool)
                if tree is not None:
                    self._former[tool.module] = sha256(ast.dump(tree).encode()).hexdigest()
        return self._former[tool.module]


def find_imported_spec(module: str) -> Any:
    """Return the spec with which a module was imported, or last reloaded; None if it was not."""
    return getattr(sys.modules.get(module), "__spec__", None)


def hash_module(tool: Tool) -> str:
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


def describe_source(tool: Tool, sources: Sources) -> Dict[str, Any]:
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


def find_changed_source(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what changed of a tool itself, as describe_source() says, in words, or ""."""
    if was["calls"] != now["calls"]:
        return f"it calls another function, {now['calls']},"
    old, new = was["options"], now["options"]
    names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    if names:
        return f"its options changed ({', '.join(names)})"
    return "its source changed" if was["source"] != now["source"] else ""


def hash_item_source(tool: Tool, sources: Sources) -> str:
    """Return a short fingerprint of what the tries of an item are of: a change gives them back."""
    from hashlib import sha256
    what = tool.module, tool.function, tool.commits, sources.find(tool)
    return sha256(repr(what).encode()).hexdigest()[:16]


def find_versions(pipeline: Pipeline, tools: Iterable[Tool]) -> Versions:
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
    if not body or not isinstance(body[0], ast.Expr):
        return ""
    text = getattr(body[0].value, "value", None)
    return text.strip().partition("\n")[0].strip() if isinstance(text, str) else ""


def find_mistakes(tools: Iterable[Tool], available: Iterable[str]) -> List[UserError]:
    """Return all mistakes in the tools' modules, with file and line, importing none."""
    mistakes = (mistake for tool in tools for mistake in find_mistakes_of(tool, available))
    return list({str(each): each for each in mistakes}.values())  # tools may share a module


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
        if not path and hasattr(find_module(tool.module), "submodule_search_locations"):
            yield missing_run(tool, tool.module.replace(".", os.sep), ())  # it is a mere folder
        return

    def at(line: int, error: UserError) -> UserError:
        return UserError(f"{format_path(path)}:{line}: {error.problem}", error.fix)

    run = find_definition(tree, tool.function)
    if run is None:
        yield at(1, missing_run(tool, path, [n.name for n in tree.body if hasattr(n, "name")]))
    for value in find_plain_values(tree, run):
        yield at(run.lineno, wrong_run(tool, path, value))
    has_own_items = defines_items(tree)
    for name in ("items", tool.function, "check"):
        node = find_definition(tree, name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.decorator_list:
            takes, given = read_parameters(node), {*available}
            try:
                if name == tool.function:
                    check_item_options(tool, has_own_items, takes)
                if name != "items" and (has_own_items or tool.each is not None):
                    given.add("item")
                check_parameters(tool, name, takes, given)
            except UserError as error:
                yield at(node.lineno, error)
    with tokenize.open(path) as file:
        lines = file.read().splitlines()
    for line in find_built_sql(tree, lines):
        yield at(line, UserError("a value is written into SQL, not bound to it.",
                                 'Write execute("... WHERE day >= ?", (since,)); if the text is '
                                 "safe, say so with `# noqa: S608`."))


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


def find_plain_values(tree: Any, name: Any) -> Iterator[Any]:
    """Yield the number, text, list or the like that the node of a name is given, if it is one."""
    import ast
    for node in walk_scope(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        if name in targets and isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            try:
                yield ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError):
                pass  # it is made by a call, say


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
                    and not re.search(_NOQA, "\n".join(lines[node.lineno - 1:node.end_lineno])):
                found.add(node.lineno)
    return sorted(found)


_EXECUTES = ("execute", "executemany", "executescript")
_NOQA = r"# noqa(?!:)|# noqa:.*\bS608\b"


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


def load_callees(tools: Sequence[Tool], available: Iterable[str],
                 interrupts: Interrupts) -> Dict[str, Callee]:
    """Return the tools imported and ready to be called, by name.

    `available` are the names of the arguments that there will be. Raise UserError with all that
    is wrong: a module that is missing or can not be imported, no run(), a run() that asks for
    more than there is.
    """
    check_modules_exist(tools)
    errors: List[UserError] = []
    known = {*available, "conn", "context"}
    loaded: Dict[Tuple[Any, ...], Callee] = {}  # tools may share a function

    def load(_: str, tool: Tool) -> Callee:
        # and what it must be like depends on these options
        key = tool.module, tool.function, tool.each is None, tool.batch, tool.cache_s
        if key not in loaded:
            loaded[key] = load_callee(tool, known, interrupts)
        return loaded[key]._replace(tool=tool)

    callees = make_all(errors, load, {tool.name: tool for tool in tools})
    if errors:
        raise merge_errors(errors)
    return callees


def load_callee(tool: Tool, available: Iterable[str], interrupts: Interrupts) -> Callee:
    """Return one tool, imported. Raise UserError if that can not be done."""
    import importlib
    where = f"TOOL_MAP[{tool.name!r}]"
    interrupts.own_argv(tool)
    try:
        module = importlib.import_module(tool.module)
    except SystemExit as error:
        raise UserError(f"{where}: importing {tool.module} called {format_one_line(error)}, "
                        f"{format_place(error, tool)}.",
                        join_reasons('Put that under `if __name__ == "__main__":`',
                                     explain_exit(error)) + ".") from error
    except Exception as error:
        raise UserError(f"{where}: importing {tool.module} failed, {format_place(error, tool)}:\n"
                        f"  {format_one_line(error)}",
                        "Mend that line, or install what it needs. -v shows the whole traceback."
                        ) from error
    run, file = getattr(module, tool.function, None), getattr(module, "__file__", None)
    if not hasattr(module, tool.function):
        raise missing_run(tool, file, (name for name in vars(module) if not name.startswith("_")))
    if not callable(run):
        raise wrong_run(tool, file, run)
    check, items = (find_function(module, name, run) for name in ("check", "items"))
    callee = Callee(tool, run, find_parameters(run),
                    check, find_parameters(check) if check else Parameters(),
                    items, find_parameters(items) if items else Parameters(),
                    "main" in (tool.function, getattr(run, "__name__", "")))
    if not callee.has_items and "item" in callee.run_takes.required and hasattr(module, "items"):
        raise UserError(f"{where}: items of {tool.module} is {format_type(module.items)}, not a "
                        "function.", "Write `def items(conn):` and return it there.")
    check_item_options(tool, items is not None, callee.run_takes)
    check_parameters(tool, "items", callee.items_takes, available)
    available = {*available, "item"} if callee.has_items else available
    check_parameters(tool, tool.function, callee.run_takes, available)
    check_parameters(tool, "check", callee.check_takes, available)
    return callee


def find_function(module: Any, name: str, run: Any) -> Optional[Callable[..., Any]]:
    """Return a function of a tool's module beside `run`, or None."""
    found = getattr(module, name, None)
    return found if callable(found) and found is not run else None


def check_item_options(tool: Tool, has_items: bool, run_takes: Parameters) -> None:
    """Raise UserError if what TOOL_MAP says of a tool does not go with its items, or their lack."""
    where = f"TOOL_MAP[{tool.name!r}]"
    if not has_items and tool.each is None:
        if tool.batch != 1:
            raise UserError(f"{where}: 'batch' is for tools with items, and {tool.module} has no "
                            "function items().", "Write one, or take 'batch' out.")
        return
    if has_items and tool.each is not None:
        raise UserError(f"{where}: its items are those of {tool.each!r}, but {tool.module} has a "
                        "function items() too.", "Take out the one or the other.")
    if tool.cache_s is not None:
        raise UserError(f"{where}: 'cache' is not for tools with items, of which each is done "
                        "once.", "Take 'cache' out.")
    if "item" not in run_takes.names and not run_takes.takes_all:
        raise UserError(f"{where}: {tool.function}() of {tool.module} is called once per item, "
                        "but does not take it.", f"Write `def {tool.function}(conn, item):`.")


def read_takes(tool: Tool) -> List[Parameters]:
    """Return what the functions of a tool take, as its module reads; of what can not be read so,
    that it takes all.
    """
    try:
        _, tree = read_module(tool)
    except UserError:
        tree = None
    if tree is None:
        return [Parameters(takes_all=True)]
    nodes = [find_definition(tree, name) for name in (tool.function, "items", "check")]
    return [read_parameters(node) if hasattr(node, "args") else Parameters(takes_all=True)
            for node in nodes if node is not None]


def takes_any(tool: Tool, names: Iterable[str]) -> bool:
    """Return whether a function of a tool takes one of some arguments, or can not be read."""
    return any(each.takes_all or {*names} & {*each.names} for each in read_takes(tool))


def check_are_taken(arguments: Iterable[str], callees: Mapping[str, Callee],
                    tools: Mapping[str, Tool], find_said: Callable[[], Mapping[str, str]]) -> None:
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


def find_untaken(arguments: Iterable[str], takes: Iterable[Parameters]) -> List[str]:
    """Return the arguments that none takes. The two ends of a period are one."""
    names: Dict[str, None] = {}
    for each in takes:
        if each.takes_all:
            return []
        names.update(dict.fromkeys(each.names))
    if any(name in names for name in PERIOD_ARGUMENTS):
        names.update(dict.fromkeys(PERIOD_ARGUMENTS))
    return [name for name in arguments if name not in names]


def check_get_connection(get_connection: Callable[[], Any]) -> None:
    """Raise UserError if get_connection() asks for something, which nothing gives it."""
    if getattr(get_connection, "__code__", None) is None:
        return  # to look into other callables takes `inspect`, whose import is slow
    asks = find_parameters(get_connection).required
    if asks:
        raise UserError(f"get_connection() asks for {', '.join(map(repr, asks))}, which nothing "
                        "gives.", "It is called without arguments: give them defaults, or read "
                        "them from the environment.")


def describe_items(tool: Tool, has_database: bool) -> str:
    """Return how a tool does its items, if it has some, for its reason in a plan."""
    if not has_items(tool):
        return ""
    source = f" of {tool.each}" if tool.each else ""
    is_exact = has_database and not tool.commits
    return f"each item{source} " + ("exactly once" if is_exact else "at least once")


def has_items(tool: Tool) -> bool:
    """Return whether a tool has items, as its module reads."""
    if tool.each is not None:
        return True
    try:
        _, tree = read_module(tool)
    except UserError:
        return False
    return tree is not None and defines_items(tree)


def defines_items(tree: Any) -> bool:
    """Return whether a module has a function items(), as it reads."""
    node = find_definition(tree, "items")
    return node is not None and not any(True for _ in find_plain_values(tree, node))


def find_wrong_each(pipeline: Pipeline, tools: Iterable[Tool]) -> List[UserError]:
    """Return an error for each tool whose items are to be those of one that has none."""
    return [UserError(f"TOOL_MAP[{tool.name!r}]: 'each' is {tool.each!r}, which has no items.",
                      f"Write `def items(conn):` in {pipeline.tools[tool.each].module}.")
            for tool in tools if tool.each in pipeline.tools
            and not has_items(pipeline.tools[tool.each])]


def check_each(pipeline: Pipeline, tools: Iterable[Tool]) -> None:
    """Raise UserError for tools whose items are to be those of one that has none."""
    errors = find_wrong_each(pipeline, tools)
    if errors:
        raise merge_errors(errors)


def missing_run(tool: Tool, file: Optional[str], names: Iterable[str]) -> UserError:
    """Return the sentence for a module without the function that its tool needs."""
    near = format_near(tool.function, names)
    return UserError(f"TOOL_MAP[{tool.name!r}]: {format_path(file or tool.module)} has no function "
                     f"{tool.function}().",
                     f"{near} Write `def {tool.function}(conn, **kwargs):` in it.".lstrip())


def wrong_run(tool: Tool, file: Optional[str], value: Any) -> UserError:
    """Return the sentence for a module in which the name of the function is something else."""
    return UserError(f"TOOL_MAP[{tool.name!r}]: {tool.function} of "
                     f"{format_path(file or tool.module)} is {format_type(value)}, not a function.",
                     f"Write `def {tool.function}(conn, **kwargs):` in it.")


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
    if function == "items" and "item" in missing:
        raise UserError(f"{where} asks for 'item', but it is what tells which there are.",
                        "Take that out of its parameters.")
    if missing:
        if missing[0] in PERIOD_ARGUMENTS:
            raise UserError(f"{where} asks for {missing[0]!r}, which only --backfill gives.",
                            f"Run it so, or give it a default: {missing[0]}=None.")
        raise UserError(f"{where} asks for {', '.join(map(repr, missing))}, which nothing gives.",
                        "Write `def items(conn):` beside it, which returns what there is to do."
                        if missing[0] == "item" else format_near(
                            missing[0], available,
                            f"Give it a default ({missing[0]}=None), or declare "
                            f"--{missing[0].replace('_', '-')} in add_arguments()."))


def choose_arguments(takes: Parameters, available: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the arguments that a function names, or all of them for its **kwargs.

    A `conn` that is None goes only to a function that names it.
    """
    if not takes.takes_all:
        return {name: available[name] for name in takes.names if name in available}
    if available.get("conn") is None and "conn" not in takes.names:
        return {name: value for name, value in available.items() if name != "conn"}
    return dict(available)


class SaysFailed(Exception):
    """What a tool returned says that it failed; the text is all that there is to tell."""


def take_result(callee: Callee, result: Any) -> Any:
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


def call_check(callee: Callee, available: Mapping[str, Any], interrupts: Interrupts) -> None:
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


def is_false(value: Any) -> bool:
    """Return whether a value is False, or what numpy and its like have for that."""
    if value is False:
        return True
    try:
        return getattr(value, "shape", None) == () and str(value.dtype).endswith("bool") \
            and not value
    except Exception:
        return False


def is_good_exit(code: Any) -> bool:
    """Return whether sys.exit() with this code ends a program well: with 0 or None."""
    return code is None or isinstance(code, int) and code == 0


def call_function(function: Callable[..., Any], takes: Parameters,
                  available: Mapping[str, Any]) -> Any:
    """Return what a function returns, or what the coroutine that it returns comes to."""
    return find_value(function, function(**choose_arguments(takes, available)))


def find_value(function: Callable[..., Any], result: Any) -> Any:
    """Return what a function has returned, or what the coroutine that it returned comes to."""
    if result is None or type(result) is int:
        return result
    code = getattr(result, "gi_code", None) or getattr(result, "ag_code", None)
    if code is not None and code is getattr(function, "__code__", None):
        raise TypeError(f"{function.__name__}() returned a generator, so nothing of it has run: "
                        "take the `yield` out of it")
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
    pid = os.getpid()
    step = ""  # of the engine's own, if it is one that fails
    try:
        result = interrupts.call(call_in_transaction, callee, database, arguments, context,
                                 interrupts)
        end_if_copy(pid)
        step = "at the commit: "
        if callee.takes_conn:
            database.commit()
        return Outcome("success", result=result, rows=count_rows(result))
    except BaseException as error:
        end_if_copy(pid)
        if callee.takes_conn and not database.is_open:
            step = "in get_connection(): "
        had_ended = database.is_open and database.rollback()
        return make_failure(
            error, step, interrupts, verbose,
            "its transaction had ended before: what it committed stays" * had_ended)


def end_if_copy(pid: int) -> None:
    """End this process if it is a copy of that one, which a tool forked and which came back."""
    if os.getpid() != pid:
        os._exit(EXIT_FAILED)


def make_failure(error: BaseException, step: str, interrupts: Interrupts, verbose: bool,
                 reason: str = "") -> Outcome:
    """Return how an attempt ended of which a step has failed, or that a signal has ended."""
    if interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
        return Outcome("interrupted", reason=format_signal(interrupts.signal))
    return Outcome("failed", join_reasons(find_hint(error), explain_exit(error), reason),
                   error=step + format_one_line(error), traceback=format_traceback(error, verbose))


def join_reasons(*reasons: str) -> str:
    """Return in one line those of some reasons that there are."""
    return "; ".join(filter(None, reasons))


_PARSERS = ("argparse", "optparse", "click", "typer", "fire", "docopt", "absl")


def explain_exit(error: BaseException) -> str:
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


def call_in_transaction(callee: Callee, database: Database, arguments: Mapping[str, Any],
                        context: Context, interrupts: Interrupts) -> Any:
    """Return what run() returns, in a transaction that is left open, and passed by check()."""
    if callee.takes_conn:  # else it may go on beside one that holds the database
        if callee.tool.commits:
            database.lend()
        else:
            database.begin()
    available = {**arguments, "conn": database.conn, "context": context}
    interrupts.own_argv(callee.tool)  # not for get_connection(), which is part of the program
    try:
        result = take_result(callee, call_function(callee.run, callee.run_takes, available))
    except SystemExit as error:  # ends the tool, not the run
        if not is_good_exit(error.code):
            raise
        result = None
    call_check(callee, available, interrupts)
    return result


class ItemOrder(NamedTuple):
    """What to do of a tool's items: to list them all, or to do some.

    `charges` are tries to record first, which failed with the process that they were in. `slip`
    is the file that tells which item is at work, or ""; `run_id` that of the ledger; `source` the
    fingerprint of the tool, and `former` that which rows of former engines have. `only`: none but
    this item. `retry`: the items to try again that were given up; all if it is empty, none if it
    is None.
    """
    is_listing: bool
    source: str
    run_id: str = ""
    items: Tuple[Item, ...] = ()
    charges: Tuple[Ending, ...] = ()
    slip: str = ""
    only: Optional[str] = None
    retry: Optional[Tuple[str, ...]] = None
    former: str = ""


class ToolError(Exception):
    """What fails a tool and is charged to no item: `__cause__`, at the step that is its text."""


class Lost(Exception):
    """An item lost the connection, by `__cause__`."""


_GONE = "the connection is gone: "
LOCKED_S = 60.0  # how long an item comes again because others are at the same rows
_TAKEN_TRIES = 20  # and how often because somebody else wrote its row


class ItemWork:
    """Does items of one tool over one connection, each in one transaction with its row in the
    ledger; with "batch", several in one transaction, each in a savepoint.

    State: `step`, what is being done, if it is not the tool itself; `is_own_fault`, whether an
    error then is an item's; `is_watched`, whether an item may not commit; `tries`, how often a
    transaction was begun anew, and `was_taken`, whether to look at rows once more in it; `left`,
    the items that are not done; `at_work`, the one that is being done, since `started_s`; `lost`,
    one that lost the connection, until there is another, which its slip outlasts;
    `available`, the arguments for it, and `chosen`, those that run() takes; `passed`, `rows`,
    `elsewhere` and `endings`, what came of those that are committed; `new`, the same of those
    that are not.
    """

    def __init__(self, callee: Callee, database: Database, arguments: Mapping[str, Any],
                 context: Context, interrupts: Interrupts, order: ItemOrder, pipeline: str,
                 ledger_path: str, verbose: bool) -> None:
        self.callee, self.tool, self.database = callee, callee.tool, database
        self.arguments, self.context, self.interrupts = arguments, context, interrupts
        self.order, self.pipeline, self.ledger_path = order, pipeline, ledger_path
        self.verbose, self.pid = verbose, os.getpid()
        self.ledger: Any = None
        self.slip_fd = -1
        self.step, self.is_own_fault, self.is_watched = "", False, True
        self.tries, self.was_taken = 0, False
        self.left = [*order.items]
        self.at_work: Optional[Item] = None
        self.lost: Optional[Item] = None
        self.started_s = 0.0
        self.passed, self.elsewhere, self.charged = 0, 0, 0
        self.rows: Optional[int] = None
        self.endings: List[Ending] = []
        self.new: List[Tuple[Optional[int], Optional[Ending]]] = []

    def carry_out(self, take: Callable[[List[Item]], None]) -> Outcome:
        """Carry out the order and return an Outcome, whose result is a Tally.

        `take` gets the pending items, page by page, when they are listed. Never raises.
        """
        outcome = Outcome("success")
        try:
            self._insist(self._open)
            for charge in self.order.charges:
                self._charge(charge.item, charge.error, is_death=charge.is_death)
                self.charged += 1
            if self.order.is_listing:
                outcome = self._list(take)
            self._open_slip()
            self.is_watched = not (self.ledger.is_apart or self.tool.commits)
            # What is done is not undone without a savepoint, and so is committed one by one.
            size = self.tool.batch if self.is_watched and self.ledger.has_savepoints else 1
            while self.left:
                if self.interrupts.signal is not None:
                    raise KeyboardInterrupt(self.interrupts.signal)
                self._do_group(self.left[:size])
        except BaseException as error:
            outcome = self._fail(error)
        finally:
            self._close_slip()
            if self.ledger:
                self.ledger.close()
        return outcome._replace(result=Tally(self.passed, self.rows, tuple(self.endings),
                                             self.elsewhere, tuple(self.left), self.at_work,
                                             self.charged, self.lost is not None))

    def _fail(self, error: BaseException) -> Outcome:
        """Return the outcome of an order that could not be carried out to its end."""
        end_if_copy(self.pid)
        if isinstance(error, ToolError):
            step, error = str(error), error.__cause__
            step = f"at {format_name(self.at_work.name)}: {step}" if self.at_work else step
        else:
            step = self.step if self.database.is_open else "in get_connection(): "
            if self.database.is_open:
                self.database.rollback()
        if isinstance(error, UserError) and self.interrupts.signal is None:
            return Outcome("failed", NOT_AGAIN, error=error.problem)
        return make_failure(error, step, self.interrupts, self.verbose)

    def _open(self) -> None:
        """Open the connection and the ledger on it, and create that if it is not there."""
        database = self.database
        database.begin(commits=self.tool.commits)
        self.ledger = ledger = Ledger(
            database.conn, self.ledger_path, self.pipeline, self.tool.name, self.order.run_id,
            self.order.source, self.order.former, database.schema)
        if not ledger.is_apart and (not ledger.kind or is_session(database.conn)):
            raise TypeError(f"get_connection() returned {format_type(database.conn)}, in which the "
                            "ledger of items can not be kept: return the connection of the driver "
                            "itself, or engine.connect() (in run() then Session(conn) works)")
        self.available = {**self.arguments, "conn": database.conn, "context": self.context}
        self.chosen = choose_arguments(self.callee.run_takes, {**self.available, "item": None})
        if self.ledger.is_there():
            database.commit()
            return
        self.step = "in the ledger: "
        database.rollback()
        database.begin(commits=self.tool.commits)
        if database.has_set and self._is_elsewhere():
            database.commit()
            self.step = ""
            return
        try:
            self.ledger.create()
            database.commit()
        except Exception:
            database.rollback()
            database.begin(commits=self.tool.commits)
            if not self.ledger.is_there():  # it was not another start either
                raise
            database.commit()
        self.step = ""

    def _is_elsewhere(self) -> bool:
        """Return whether there is a ledger in another schema, which became the default with the
        rollback of a SET of get_connection(): so it was made there before it was looked for here.
        """
        ledger = self.ledger
        schema, other = ledger.schema, find_schema(ledger.conn)
        if other == schema:
            return False
        ledger.move(other)
        if ledger.is_there():
            return True
        self.database.rollback()
        self.database.begin(commits=self.tool.commits)
        ledger.move(schema)
        return False

    def _open_slip(self) -> None:
        if self.order.slip and self.order.items:
            self.step = "in the history: "
            os.makedirs(os.path.dirname(self.order.slip), 0o700, exist_ok=True)
            self.slip_fd = os.open(self.order.slip, os.O_WRONLY | os.O_CREAT, 0o600)
            self.step = ""

    def _close_slip(self) -> None:
        if self.slip_fd >= 0:
            with contextlib.suppress(OSError):  # the tool closed it
                if self.lost is None:
                    write_slip(self.slip_fd, NO_ITEM)
                os.close(self.slip_fd)

    def _list(self, take: Callable[[List[Item]], None]) -> Outcome:
        """Have the items listed, and hand on those that are pending; tell how many there are."""
        order, ledger = self.order, self.ledger
        if self.tool.each and ledger.is_apart and not self.ledger_path:
            raise UserError(f"nothing tells which items passed {self.tool.each}: there is neither "
                            "a database nor a history")
        self.database.begin(commits=self.tool.commits)
        self.interrupts.call(self._find_items)
        self._give_back()
        others = ledger.find_others()
        pending, given_up = 0, 0
        news = {ending.item.name for ending in self.endings if ending.status == "quarantined"}
        names: List[str] = []  # of the first that were given up
        page: List[Item] = []
        for item, status, run_id in ledger.find_pending():
            is_of_this_run = run_id == order.run_id
            if item.name in news:
                pending += 1  # until this very start
            elif not self._is_given_up(item, status, is_of_this_run):
                pending += 1
                page += [item] * (order.only in (None, item.name))
            elif not is_of_this_run or self.context.attempt == 1:  # else it is counted
                given_up += 1
                names += [item.name] * (given_up <= 3)
            if len(page) == _PAGE:
                take(page)
                page = []
        take(page)
        listed = ledger.count_listed()
        if order.only is not None and not ledger.count_listed(order.only):
            raise UserError(f"there is no item {order.only!r} among the {listed} that are listed")
        is_hopeless = given_up > 0 and not ledger.has_passed()
        self.database.commit()
        self.step = ""
        reasons = []
        if given_up:
            reasons.append(f"{count_items(given_up)} given up before: "
                           f"{format_names(names, given_up)}; {format_retry(self.tool.name)}")
        if ledger.doubles:
            reasons.append("left out, since the name came before: "
                           + format_names(ledger.doubles[:3], len(ledger.doubles)))
        if others and pending:
            reasons.append(f"the ledger has items of this tool in pipeline {others[0]!r}, not in "
                           f"{self.pipeline!r}: its NAME says which it is")
        counts = {"listed": listed, "pending": pending, "given_up": given_up}
        # An error only if nothing comes of those that are pending either: see make_outcome().
        hopeless = "all that was tried is given up, and none ever passed" * is_hopeless
        return Outcome("success", "; ".join(reasons), items=counts, error=hopeless)

    def _is_given_up(self, item: Item, status: str, is_of_this_run: bool) -> bool:
        """Return whether an item that is not done is left alone: until it changes, or somebody
        asks for it. Without retries one that failed comes again in the next run.
        """
        return status == "quarantined" or status == "failed" and (
            is_of_this_run or 0 < self.tool.retries < item.attempts)

    def _give_back(self) -> None:
        """Let items have their tries again that were given up, where that was asked for."""
        order = self.order
        wanted = order.retry if order.only is None else (order.only,)
        missing = [] if wanted is None else self.ledger.give_back(wanted)
        if missing and order.only is None:
            raise UserError(f"{format_names(missing, len(missing))} can not be tried again: not "
                            "given up")

    def _find_items(self) -> None:
        """Call items(), and bring what it gives into the database."""
        found: Any = ()
        self.interrupts.own_argv(self.tool)
        if self.callee.items is not None:
            try:
                found = self.callee.items(**choose_arguments(self.callee.items_takes,
                                                             self.available))
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

    def _do_group(self, group: Sequence[Item]) -> None:
        """Do some items in one transaction, again and again while others are in the way.

        Raise ToolError for what is no item's fault, and KeyboardInterrupt.
        """
        try:
            self._insist(self._attempt, group)
        except Lost as error:
            self._do_without(group, error.__cause__)
            return
        except ToolError as error:
            if not self.is_own_fault or not self.database.is_open \
                    or is_locked(error.__cause__) or is_of_place(error.__cause__):
                raise
            self._do_singly(group, error.__cause__)
            return
        for rows, ending in self.new:
            self._count(rows, ending)
        del self.left[:len(group)]
        self.at_work = None

    def _count(self, rows: Optional[int], ending: Optional[Ending]) -> None:
        """Count how an item ended: well, if there is no Ending."""
        if ending is None or ending.status == "success":
            self.passed += 1
            self.rows = self.rows if rows is None else (self.rows or 0) + rows
        elif ending.status == "done":  # by somebody else
            self.elsewhere += 1
        else:  # there is a row of it now, but one in memory is soon forgotten
            is_seen = None if self.ledger.is_apart else True
            self.endings.append(ending._replace(item=ending.item._replace(is_seen=is_seen)))

    def _attempt(self, group: Sequence[Item]) -> None:
        """Do some items in one transaction."""
        self.step, self.is_own_fault, self.new, self.at_work = "", False, [], None
        if self.tool.commits:
            self.database.lend()
        else:
            # A transaction that begins with a look at a row could not wait for the lock later.
            is_urgent = self.tries > 1 or group[0].is_seen is None
            self.database.begin(is_urgent)
            self.ledger.begin(is_urgent)
        for item in group:
            self._do_item(item._replace(is_seen=None) if self.was_taken else item,
                          is_alone=len(group) == 1)
        self.step, self.is_own_fault = "at the commit: ", True
        self.database.commit()

    def _insist(self, step: Callable[..., Any], *args: Any) -> Any:
        """Take a step in a transaction of its own, again and again while others are in the way.

        Return what it returns. Raise ToolError from what else it raises, and KeyboardInterrupt.
        """
        began_s, self.tries, self.was_taken = time.monotonic(), 0, False
        while True:
            try:
                return step(*args)
            except BaseException as error:
                self._roll_back(error)
                self.tries += 1
                if isinstance(error, Taken) and self.tries < _TAKEN_TRIES:
                    self.was_taken = True
                elif is_locked(error) and time.monotonic() - began_s < LOCKED_S:
                    self._wait(self.tries)
                else:
                    raise ToolError(self.step) from error

    def _roll_back(self, error: BaseException) -> None:
        """Undo a transaction. Raise ToolError if the connection is lost with it."""
        end_if_copy(self.pid)
        if self.ledger:
            self.ledger.guard.is_up = False
        is_closed = was_closed(self.database.conn)
        if self.database.is_open:
            self.database.rollback()
        if self.interrupts.signal is not None or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if self.database.is_open or self.ledger is None and is_locked(error):
            return
        if isinstance(error, EndedEarly):
            if is_closed:
                self._open()  # `with conn:` of psycopg 3 commits and closes
                return
            error = error.__cause__
        # SQLite has no server that could go away: what breaks it is its disk.
        if self.at_work and not (self.ledger.kind == "sqlite" and is_of_place(error)):
            raise Lost from error
        raise ToolError("" if self.ledger else "in get_connection(): ") from error

    def _wait(self, tries: int) -> None:
        """Wait a little, and not as long as others do."""
        from random import random
        self.interrupts.call(time.sleep, random() * min(0.005 * 2 ** tries, 1.0))

    def _do_singly(self, group: Sequence[Item], error: BaseException) -> None:
        """Do each item of a group in a transaction of its own; charge the one whose fault an
        error is that ended the transaction of all.
        """
        at_fault = self.at_work if len(group) == 1 or isinstance(error, EndedEarly) else None
        for item in group:
            if at_fault is not None and item.name == at_fault.name:
                self._charge(at_fault, self.step + format_one_line(error), error,
                             time.monotonic() - self.started_s)
                del self.left[0]
            else:
                self._do_group([item._replace(is_seen=None)])

    def _do_without(self, group: Sequence[Item], error: BaseException) -> None:
        """Charge the item that lost the connection with a death, over a new one, and do the others
        of its group.
        """
        lost = self.lost = self.at_work
        self.at_work = None
        text = _GONE + format_one_line(error)
        self.ledger.close()
        self.ledger = None
        try:
            self._insist(self._open)
        except ToolError as problem:
            raise ToolError(f"at {format_name(lost.name)}: {text}; {problem}"
                            ) from problem.__cause__
        self._charge(lost._replace(is_seen=None), text, error, time.monotonic() - self.started_s,
                     is_death=True)
        self.lost = None
        self.left = [item for item in self.left if item.name != lost.name]
        for item in group:
            if item.name != lost.name:
                self._do_group([item._replace(is_seen=None)])

    def _do_item(self, item: Item, is_alone: bool) -> None:
        """Do an item and write its row, within a transaction that is open."""
        ledger = self.ledger
        if item.is_seen is None:
            item, status, rows, problem = ledger.look(item)
            if status != "pending":
                self.new.append((rows, Ending(item, status, item.attempts, problem or "")))
                return
        if self.slip_fd >= 0:
            write_slip(self.slip_fd, item)
        saves = self.is_watched and not (is_alone and ledger.kind == "sqlite")
        if saves:
            self.at_work = None  # a connection that was lost before is no item's fault
            ledger.begin_item()
        self.at_work, self.started_s = item, time.monotonic()
        context = self.context
        context.item, context.version, context.attempt = item.name, item.version, item.attempts + 1
        self.is_own_fault = True
        try:
            rows = self.interrupts.call(self._call, item.name)
            if saves:  # before its row, which might be committed at once if nothing is open
                self._release()
            self.step, self.is_own_fault = "in the ledger: ", False
            ledger.record(item, "success", item.attempts + 1, time.time(),
                          time.monotonic() - self.started_s, rows)
            self.step = ""
            self.new.append((rows, None))
        except Exception as error:
            if saves and self.is_own_fault and not isinstance(error, EndedEarly):
                if self._undo(error) and not is_alone \
                        and not is_locked(error) and not is_of_place(error):
                    ending = self._make_ending(item, format_one_line(error), error)
                    self.is_own_fault = False
                    self._record(ending, time.monotonic() - self.started_s)
                    self.step = ""
                    self._release()
                    self.new.append((None, ending))
                    return
            raise

    def _release(self) -> None:
        """Leave the savepoint of an item. Raise EndedEarly if it is gone."""
        try:
            self.ledger.leave_item()
        except Exception as error:
            self.is_own_fault, self.step = True, ""
            raise EndedEarly(_ENDED_EARLY) from error

    def _undo(self, error: BaseException) -> bool:
        """Go back to the savepoint of an item; return whether that was still to do. Raise
        EndedEarly if it is gone and what it did may not be.
        """
        try:
            self.ledger.undo_item()
        except Exception:
            if self.ledger.kind == "sqlite":  # nobody else could: all of the group is undone
                return False
            if is_locked(error) and self.ledger.kind in ("mysql", "mariadb"):
                return False  # a deadlock undoes all of the transaction there, and its savepoints
            raise EndedEarly(f"{format_one_line(error)}; {_ENDED_EARLY}") from error
        return True

    def _call(self, name: str) -> Optional[int]:
        """Return the rows of an item that run() has done and check() passed."""
        callee, available, guard = self.callee, self.available, self.ledger.guard
        self.chosen["item"] = available["item"] = name
        guard.is_up, guard.tried = not self.tool.commits, ""
        self.interrupts.own_argv(self.tool)
        try:
            try:
                result = find_value(callee.run, callee.run(**self.chosen))
                result = take_result(callee, result)
            except SystemExit as error:
                if not is_good_exit(error.code):
                    raise RuntimeError(join_reasons(format_one_line(error),
                                                    explain_exit(error))) from error
                result = None
            call_check(callee, available, self.interrupts)
        except Exception as error:
            if guard.tried:
                raise PermissionError(_REFUSED % guard.tried) from error
            raise
        finally:
            guard.is_up = False
        end_if_copy(self.pid)
        if guard.tried:
            raise PermissionError(_REFUSED % guard.tried)
        if self.is_watched:
            self._check_transaction()
        return count_rows(result)

    def _check_transaction(self) -> None:
        """Raise RuntimeError if the transaction of an item is over or can not be committed."""
        conn, kind = self.ledger.raw, self.ledger.kind
        if kind == "sqlite":
            if not conn.in_transaction:
                raise RuntimeError("SQLite undid its transaction after an error that was ignored")
        elif kind not in ("mysql", "mariadb") and is_aborted(conn):
            raise RuntimeError("an error of the database was caught and ignored, after which "
                               "nothing can be committed")

    def _make_ending(self, item: Item, text: str, error: Optional[BaseException],
                     is_death: bool = False) -> Ending:
        """Return how a try of an item failed, and what becomes of the item."""
        tries = item.attempts + (not is_death)
        deaths = item.deaths + is_death
        is_final = tries > self.tool.retries and not is_death
        # One that ended its transaction may have been done: it is not done again unasked.
        is_left = deaths >= DEATHS_ALLOWED or isinstance(error, EndedEarly)
        status = "quarantined" if is_left else "failed" if is_final else "pending"
        return Ending(item._replace(attempts=tries, deaths=deaths), status, tries + deaths, text,
                      format_traceback(error, self.verbose) if error else "", is_death)

    def _record(self, ending: Ending, duration_s: Optional[float]) -> None:
        self.step = "in the ledger: "
        self.ledger.record(ending.item, ending.status, ending.item.attempts, time.time(),
                           duration_s, error=ending.error)

    def _charge(self, item: Item, text: str, error: Optional[BaseException] = None,
                duration_s: Optional[float] = None, is_death: bool = False) -> None:
        """Record a failed try of an item, of which nothing is left, in a transaction."""
        def record() -> Tuple[bool, Ending]:
            """Record it if it is not yet. Return whether it was not, and how the item ended."""
            self.database.begin(commits=self.tool.commits)
            self.step = "in the ledger: "
            found, status = item, "pending"
            if item.is_seen is None or self.was_taken:
                found, status, *_ = self.ledger.look(item)
            ending = Ending(found, status, count_tries(found), text, "", is_death)
            # It may have been recorded before: its process ended then, or a former charge did.
            is_new = status == "pending" and count_tries(found) <= count_tries(item)
            if is_new:
                ending = self._make_ending(found, text, error, is_death)
                self._record(ending, duration_s)
            self.database.commit()
            return is_new, ending

        self.is_own_fault, self.at_work = False, None
        is_new, ending = self._insist(record)
        if is_new or not self.order.is_listing:  # else what becomes of it is listed
            self._count(None, ending)
        self.step = ""


def until_exit(found: Iterable[Any]) -> Iterator[Any]:
    """Yield what items() yields; sys.exit() ends that, and is a failure as it is elsewhere."""
    try:
        yield from found
    except SystemExit as error:
        if not is_good_exit(error.code):
            raise


def format_retry(tool: str) -> str:
    """Return what to type to have the items of a tool tried again that are given up."""
    import shlex
    word = f'"{tool}"' if os.name == "nt" and " " in tool else shlex.quote(tool)
    return f"--retry-items {word} tries again"


def count_items(count: int) -> str:
    """Return a number of items in words."""
    return f"{count:,} item{'s' * (count != 1)}"


def format_names(names: Sequence[str], count: int) -> str:
    """Return the first names of items for a sentence, of which there are `count`."""
    texts = [text if len(text) < 60 else text[:57] + "..." for text in map(format_name, names)]
    return ", ".join(texts) + ", ..." * (count > len(names))


def format_name(name: str) -> str:
    """Return the name of an item for a line: quoted if it has blanks or what is not printable."""
    return name if name.isprintable() and not re.search(r"[\s,'\"]", name) else repr(name)


_ENDED_EARLY = ('it ended its transaction inside the item, so that it may have been done: leave '
                'commit and rollback to the engine (CREATE TABLE commits, too, on MySQL), or say '
                '"commits": True and take at-least-once')
_REFUSED = ("%s was refused inside an item, which the engine commits: take conn.commit(), "
            "conn.rollback(), `with conn:` and executescript() out, or say \"commits\": True in "
            "TOOL_MAP and take at-least-once")


def count_rows(result: Any) -> Optional[int]:
    """Return the rows that a result speaks of: a count, or the "rows" of a dict; else None."""
    rows = result.get("rows") if isinstance(result, dict) else result
    if rows is None or isinstance(rows, bool):
        return None
    try:
        count = operator.index(rows)
    except TypeError:
        return None
    return count if 0 <= count < 2**63 else None  # -1 is what cursors say that do not know


def format_signal(number: Optional[int]) -> str:
    """Return what ended a run, in words."""
    import signal
    if number in (None, SIGINT):
        return "interrupted by Ctrl-C"
    return f"interrupted by {signal.Signals(number).name}"


_LINE_LENGTH = 300  # of an error; its traceback keeps more


def format_one_line(error: BaseException) -> str:
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


def format_path(path: str) -> str:
    """Return a path as seen from the working folder, where that is shorter."""
    try:
        return min(os.path.relpath(path), path, key=len)
    except (ValueError, OSError):  # on another drive; or a tool removed the working folder
        return path


def is_engine_frame(file: str, line: Optional[int]) -> bool:
    """Return whether a frame of a traceback is the engine's or the interpreter's own."""
    return file.startswith("<frozen importlib") or (file == _ENGINE_FILE
                                                    and (line or 0) > _ENGINE_LINE)


def leave_out_engine(frames: Sequence[Any]) -> List[Any]:
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


def format_traceback(error: BaseException, verbose: bool = False) -> str:
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


def format_place(error: BaseException, tool: Tool) -> str:
    """Return where an import failed: the tool's own line, and the one that it led to elsewhere."""
    import importlib
    import traceback
    own = getattr(find_module(tool.module), "origin", None)
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)
              if not is_engine_frame(f.filename, f.lineno) and f.filename != importlib.__file__]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    last = [place for place in places if place[0] == own][-1:]
    last += [place for place in places[-1:] if place[0] != own]
    return " -> ".join(f"{format_path(file)}:{line}" for file, line in last) \
        or "in no line of its own"


# === 8 WORKERS ==================================================================================
# The ways to execute attempts, behind one interface: start(order) begins an attempt, wait() returns
# what came of those that were begun, as (kind, job, what): "event" with the fields of an Event,
# "items" with some that are pending, or "ended" with an Outcome. Those in worker processes can be
# told by signal(job, name) to end, and close() ends all.
# It does not decide what runs, when to give up, or what an outcome means.


class Order(NamedTuple):
    """An attempt to execute, or a part of one: which try of which tool, with what results,
    printing to where. `items` says what is to be done of its items, if it has some; `job` is what
    it is called by who ordered it.
    """
    job: str
    tool: str
    attempt: int
    run_id: str
    results: Mapping[str, Any]
    output: str = ""
    last_success_at: Optional[float] = None
    items: Optional[ItemOrder] = None


class Here:
    """Executes attempts in this process, one at a time, over one shared connection."""

    def __init__(self, callees: Mapping[str, Callee], database: Database,
                 arguments: Mapping[str, Any], interrupts: Interrupts, verbose: bool,
                 tell: Callable[..., None], capture: "Capture",
                 find_last_success_at: Callable[[str], Optional[float]], pipeline: str,
                 ledger_path: str, take_items: Callable[[str, List[Item]], None]) -> None:
        self.find_last_success_at = find_last_success_at
        self.pipeline, self.ledger_path, self.take_items = pipeline, ledger_path, take_items
        self.callees, self.database, self.arguments = callees, database, arguments
        self.interrupts, self.verbose, self.capture = interrupts, verbose, capture
        self.order: Optional[Order] = None
        self._tell = tell

    def tell(self, kind: str, tool: str, **what: Any) -> None:
        """Tell the listener, after what the tool printed before."""
        self.capture.drain()
        self._tell(kind, tool, **what)

    def reserve(self) -> int:
        """Return the id of the process that will execute what is started next."""
        return os.getpid()

    def start(self, order: Order) -> None:
        """Note what wait() is to execute."""
        self.order = order

    def wait(self) -> List[Tuple[str, str, Any]]:
        """Execute what was started, however long it takes."""
        order, self.order = self.order, None
        context = Context(order.run_id, order.tool, order.attempt, Results(order.results),
                          self.tell, self.find_last_success_at)
        self.capture.begin(order.output)
        what = self.callees[order.tool], self.database, self.arguments, context, self.interrupts
        if order.items is None:
            outcome = run_attempt(*what, self.verbose)
        else:
            outcome = ItemWork(*what, order.items, self.pipeline, self.ledger_path,
                               self.verbose).carry_out(
                                   lambda items: self.take_items(order.job, items))
        log = self.capture.end()
        return [("ended", order.job, outcome._replace(log=log) if log else outcome)]


OUTPUT_LOST = 50  # the level of the log event that tells so: CRITICAL, as in logging


class Capture:
    """Keeps what tools in this process print in their logs, besides showing it; without a folder
    for logs, nothing of it.

    On a terminal, and where Python's streams are not the process's own (a notebook), what Python
    writes is copied. Elsewhere the file descriptor leads into a file, the spool, so that C code
    and child processes are heard too; a thread carries that on to where the descriptor led
    before, within a tenth of a second. What a process that dies had printed is still in its spool.
    State: `log`, the file of the attempt that runs, made at the first byte; `log_fd`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.streams = {1: sys.stdout, 2: sys.stderr} if folder else {}
        self.spools: List[Spool] = []
        self.log, self.log_fd = "", -1
        self.error = ""  # what could not be written, if anything

    def __enter__(self) -> "Capture":
        import threading
        self.lock, self.stop = threading.RLock(), threading.Event()
        for fd, stream in self.streams.items():
            if is_own_fd(stream, fd) and not stream.isatty():
                self.spools.append(Spool(stream, fd, os.path.join(self.folder, SPOOLS[fd - 1])))
            elif stream is not None:
                self.set_stream(fd, Copier(stream, self.write_log))
        self.thread = threading.Thread(target=self.carry, daemon=True)
        if self.spools:
            self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.end()
        finally:
            self.stop.set()
            if self.spools:
                self.thread.join()
            for spool in self.spools:
                spool.close()
                self.error = self.error or spool.error
            for fd, stream in self.streams.items():
                self.set_stream(fd, stream)

    @staticmethod
    def set_stream(fd: int, stream: Any) -> None:
        """Let Python write to a stream what is meant for a file descriptor."""
        setattr(sys, "stdout" if fd == 1 else "stderr", stream)

    def begin(self, log: str) -> None:
        """Let what is printed from now on go into a log as well."""
        self.log = log

    def drain(self) -> None:
        """Let what was printed until now reach the screen and the log."""
        with self.lock:
            for spool in self.spools:
                flush(spool.stream)
                if spool.has_more():
                    spool.carry(self.write_log)

    def end(self) -> str:
        """Let what is printed from now on go into no log any more; return the log, if it is made.
        """
        if not self.folder:
            return ""
        with self.lock:  # the thread may be at a piece that belongs to this log
            self.drain()
            for spool in self.spools:
                spool.empty()
            log, fd = self.log, self.log_fd
            self.log, self.log_fd = "", -1
        if fd < 0:
            return ""
        with contextlib.suppress(OSError):  # it was removed, or the tool closed all descriptors
            os.close(fd)
            trim_log(log)
        return log

    def carry(self) -> None:
        """Show again and again what is new. Runs in a thread."""
        import signal
        if hasattr(signal, "pthread_sigmask"):  # one that comes here would not wake a tool
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self.stop.wait(0.1):
            for spool in self.spools:
                with self.lock:
                    spool.carry(self.write_log)

    def write_log(self, content: bytes) -> None:
        """Write to the log of the attempt that runs, if there is one."""
        with self.lock:
            try:
                if self.log and self.log_fd < 0:
                    self.log_fd = open_log(self.log)
                if self.log:
                    write_all(self.log_fd, content)
            except OSError as error:  # no reason for a tool to fail, but to say so
                self.error = f"{self.log} could not be written: {error.strerror}"


class Spool:
    """A stream whose file descriptor leads into a file, from which carry() brings what is printed
    to where it led.
    """

    def __init__(self, stream: Any, fd: int, path: str) -> None:
        stream.flush()
        self.stream, self.stream_errors = stream, stream.errors
        self.fd, self.real = fd, os.dup(fd)
        into = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(into, fd)
        os.close(into)
        self.file = open(path, "r+b", buffering=0)
        write_private(path + SHOWN)
        self.mark = open(path + SHOWN, "r+b", buffering=0)
        self.shown, self.error = 0, ""
        # A letter that the stdout of a cron job can not say is no reason to fail.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def set_shown(self, shown: int) -> None:
        """Note how much is carried, also for append_spools(), should this process be killed."""
        self.shown = shown
        with contextlib.suppress(OSError):  # on a full disk a log may have a piece twice
            self.mark.seek(0)
            self.mark.write(b"%20d" % shown)

    def has_more(self) -> bool:
        """Return whether there is something to carry."""
        return self.file.seek(0, os.SEEK_END) > self.shown

    def carry(self, keep: Callable[[bytes], None]) -> None:
        """Bring what is new to where the descriptor led, and to `keep`."""
        self.file.seek(self.shown)
        while True:
            piece = self.file.read(1 << 20)
            if not piece:
                return
            keep(piece)
            self.set_shown(self.shown + len(piece))
            try:
                write_all(self.real, piece)
            except BrokenPipeError:
                pass  # nobody reads it, which is no reason for a tool to fail
            except OSError as error:
                self.error = (f"{('stdout', 'stderr')[self.fd - 1]} could not be written: "
                              f"{error.strerror}; --logs shows all of it")

    def empty(self) -> None:
        """Begin the file anew, if all of it was carried."""
        if self.shown and not self.has_more():
            self.file.truncate(0)
            self.set_shown(0)

    def close(self) -> None:
        """Let the descriptor lead again to where it led."""
        for step in (lambda: os.dup2(self.real, self.fd), lambda: os.close(self.real),
                     self.file.close, lambda: os.unlink(self.file.name),
                     self.mark.close, lambda: os.unlink(self.mark.name),
                     lambda: self.stream.reconfigure(line_buffering=False,
                                                     errors=self.stream_errors)):
            with contextlib.suppress(OSError, ValueError):  # a tool closed, removed or kept it open
                step()


class Copier:
    """A stream of which a copy is kept of what Python writes to it."""

    def __init__(self, stream: Any, keep: Callable[[bytes], None]) -> None:
        self._stream, self._keep = stream, keep

    def write(self, text: str) -> Any:
        """Write a text, and keep it."""
        written = self._stream.write(text)
        self._keep(text.encode("utf-8", "backslashreplace"))
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts, and keep them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_own_fd(stream: Any, fd: int) -> bool:
    """Return whether a stream of Python is one of the process's own file descriptors."""
    try:
        return stream.fileno() == fd and hasattr(stream, "reconfigure")
    except (AttributeError, OSError, ValueError):
        return False


def write_all(fd: int, content: bytes) -> None:
    """Write all of some bytes."""
    while content:
        content = content[os.write(fd, content):]


class Worker:
    """A worker process as its orchestrator sees it; `pid` is 0 until it is known."""

    def __init__(self, channel: Any, pid: int = 0) -> None:
        self.channel, self.pid = channel, pid
        self.job = ""  # what it executes, if anything
        self.results: Mapping[str, Any] = {}  # what that may see
        self.was_signalled = False  # whether a signal was sent to it, of which it may not know yet

    def hang_up(self) -> None:
        """Close the channel, if it is open: the worker goes when it waits for its next order."""
        if self.channel:
            self.channel.close()
            self.channel = None


class Workers:
    """Executes attempts in worker processes, each with its own connection and process group.

    A worker serves many attempts, but one whose tool started processes goes, and its group with
    it, so that nothing of a tool outlives it. State: `workers`, by the file descriptor of their
    channel; `idle`, those of them that wait for an order.
    """

    def __init__(self, count: int, pipeline: Pipeline, arguments: Mapping[str, Any],
                 verbose: bool, folder: str) -> None:
        server = Server(pipeline, dict(arguments), verbose, folder)
        self.starter: Any = Nursery(server) if can_fork() else Spawner(server)
        self.workers: List[Worker] = []
        self.idle = [self._add() for _ in range(count)]

    def _add(self) -> Worker:
        worker = self.starter.start()
        self.workers.append(worker)
        return worker

    def reserve(self) -> int:
        """Return the id of the process that will execute what is started next, as far as can be
        foreseen.
        """
        if not self.idle:
            self.idle.append(self._add())
        if not self.idle[-1].pid:
            self.starter.settle()
        return self.idle[-1].pid

    def start(self, order: Order) -> None:
        """Hand an attempt to an idle worker, or to a new one."""
        while True:
            worker = self.idle.pop() if self.idle else self._add()
            try:
                worker.channel.send(tuple(order._replace(results={})))  # it asks for what it reads
                break
            except OSError:
                pass  # it died while idle
        worker.job, worker.results = order.job, order.results

    def wait(self, timeout_s: float) -> List[Tuple[str, str, Any]]:
        """Return what the workers said within some seconds; how one died, if it did not say."""
        from multiprocessing.connection import wait
        channels = {worker.channel: worker for worker in self.workers if worker.channel}
        said: List[Tuple[str, str, Any]] = []
        for ready in wait([*channels, *self.starter.waitables()], timeout_s):
            if ready in channels:
                self._hear(channels[ready], said)
        for pid, status in self.starter.collect():
            worker = next(worker for worker in self.workers if worker.pid == pid)
            while worker.channel and worker.channel.poll():
                self._hear(worker, said)
            worker.hang_up()
            self.workers.remove(worker)
            if worker in self.idle:
                self.idle.remove(worker)
            if worker.job:
                said.append(("ended", worker.job, Outcome("failed", error=format_end(status))))
        return said

    def _hear(self, worker: Worker, said: List[Tuple[str, str, Any]]) -> None:
        try:
            kind, what, is_leaving = worker.channel.recv()
            if kind == "asks":
                worker.channel.send(find_result(worker.results, what))
                return
        except (EOFError, OSError):
            worker.hang_up()  # the starter will tell how it ended
            return
        said.append((kind, worker.job, Outcome(*what) if kind == "ended" else what))
        if kind == "ended":
            worker.job, worker.results = "", {}
            if worker.was_signalled:  # it would take the signal for one that ends the next
                worker.hang_up()
            elif not is_leaving:
                self.idle.append(worker)

    def signal(self, job: str, name: str) -> None:
        """Ask the process group of an attempt to end, by SIGTERM, or end it, by SIGKILL."""
        for worker in self.workers:
            if worker.job == job:
                self.starter.settle()  # every pid is known after that
                worker.was_signalled = True
                signal_group(worker.pid, name)

    def close(self, grace_s: float) -> None:
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


def find_result(results: Mapping[str, Any], tool: Optional[str]) -> Any:
    """Return a result as it travels, None if there is none; the names of all if asked for None."""
    if tool is None:
        return list(results)
    return pack_result(results[tool]) if tool in results else None


class Asked(Mapping[str, Any]):
    """What tools returned, asked of the orchestrator each time it is read. In the worker.

    So what nobody reads is not sent, and a worker keeps nothing.
    """

    def __init__(self, channel: Any, interrupts: Interrupts, lock: Any) -> None:
        self._channel, self._interrupts, self._lock = channel, interrupts, lock
        self._pid = os.getpid()

    def _ask(self, tool: Optional[str]) -> Any:
        if os.getpid() != self._pid:
            raise RuntimeError("context.results can not be read in a process that the tool started "
                               "or after the tool has ended: read it before, in run() itself")
        with self._lock, bounded_memory(2**62):  # the tool's own bound would tear the answer
            self._channel.send(("asks", tool, False))
            return self._channel.recv()

    def __getitem__(self, tool: str) -> Any:
        name = str.__str__(tool) if isinstance(tool, str) else ""  # nothing strange may travel
        result = self._interrupts.finish(self._ask, name)
        if result is None:
            raise KeyError(tool)
        return result

    def __contains__(self, tool: object) -> bool:
        return tool in [*self]

    def __iter__(self) -> Iterator[str]:
        return iter(self._interrupts.finish(self._ask, None))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def close(self) -> None:
        """Let nobody ask any more: a thread that the tool left would take the next order."""
        with self._lock:
            self._pid = 0


def can_fork() -> bool:
    """Return whether workers may be forked: on Linux, while no other thread holds a lock."""
    if not sys.platform.startswith("linux") or os.environ.get("ORCHESTRATOR_SPAWN"):
        return False
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def signal_group(pid: int, name: str) -> None:
    """Send a signal to a worker and all that it started; where there are no groups, end it."""
    import signal
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(pid, getattr(signal, name))
        else:
            os.kill(pid, signal.SIGTERM)


def format_end(status: int) -> str:
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

    def __init__(self, server: "Server") -> None:
        import socket
        self.socket, theirs = socket.socketpair()
        life, self.life = os.pipe()  # its writing end is ours alone: it closes when we die
        self.born: List[Worker] = []
        self.dead: List[Tuple[int, int]] = []
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

    def start(self) -> Worker:
        """Return a new worker, which is on its way."""
        import socket
        from multiprocessing import Pipe
        ours, theirs = Pipe()
        socket.send_fds(self.socket, [b"w"], [theirs.fileno()])
        theirs.close()
        self.born.append(Worker(ours))
        return self.born[-1]

    def waitables(self) -> List[Any]:
        """Return what becomes readable when a worker has ended."""
        return [self.socket]

    def collect(self) -> List[Tuple[int, int]]:
        """Return the (pid, exit status) of workers that have ended."""
        import select
        while select.select([self.socket], [], [], 0)[0]:
            self._read()
        dead, self.dead = self.dead, []
        return dead

    def settle(self) -> None:
        """Wait until the pid of every worker is known."""
        while self.born:
            self._read()

    def _read(self) -> None:
        import struct
        answer = self.socket.recv(struct.calcsize("ii"), 0x100)  # MSG_WAITALL
        if not answer:
            raise RuntimeError("the process that starts the workers was killed")
        pid, status = struct.unpack("ii", answer)
        if status == self.NEWBORN:
            self.born.pop(0).pid = pid
        else:
            self.dead.append((pid, status))

    def close(self) -> None:
        """End the nursery, and with it whatever is left of its workers."""
        self.socket.close()
        os.close(self.life)
        os.waitpid(self.pid, 0)


def tend(socket: Any, life: int, server: "Server") -> None:
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
    workers: List[int] = []
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


def bury_dead(socket: Any, workers: List[int]) -> None:
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


def send_pair(socket: Any, pid: int, status: int) -> None:
    """Tell the orchestrator of a worker. In the nursery."""
    import struct
    with contextlib.suppress(OSError):  # it is gone; the end of the socket says so too
        socket.sendall(struct.pack("ii", pid, status))


def own_group(pid: int) -> None:
    """Put a process into a group of its own, if the system has groups."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(pid, pid)


class Spawner:
    """Starts workers as fresh interpreters: where we can not fork, or other threads are about."""

    def __init__(self, server: "Server") -> None:
        from multiprocessing import get_context
        check_can_spawn(server.pipeline.get_connection)
        self.server, self.context = server, get_context("spawn")
        self.life_read, self.life = self.context.Pipe(duplex=False)
        self.processes: Dict[int, Any] = {}

    def start(self) -> Worker:
        """Return a new worker."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=self.server.serve, args=(theirs, self.life_read))
        process.start()
        theirs.close()
        self.processes[process.pid] = process
        return Worker(ours, process.pid)

    def waitables(self) -> List[Any]:
        """Return what becomes readable when a worker has ended."""
        return [process.sentinel for process in self.processes.values()]

    def collect(self) -> List[Tuple[int, int]]:
        """Return the (pid, exit status) of workers that have ended."""
        dead = []
        for pid, process in list(self.processes.items()):
            if process.exitcode is not None:
                signal_group(pid, "SIGKILL")
                process.join()
                dead.append((pid, process.exitcode))
                del self.processes[pid]
        return dead

    def settle(self) -> None:
        """Every pid is known from the start."""

    def close(self) -> None:
        """Let go of what the workers watch."""
        self.life.close()
        self.life_read.close()


def check_can_spawn(get_connection: Callable[[], Any]) -> None:
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


def has_main_guard(file: str) -> bool:
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
    """What a worker does: it serves attempts until its channel closes. Runs in the worker."""

    def __init__(self, pipeline: Pipeline, arguments: Dict[str, Any], verbose: bool,
                 folder: str) -> None:
        self.pipeline, self.arguments, self.verbose = pipeline, arguments, verbose
        self.folder = folder  # of the history, or ""

    def serve_forked(self, channel_fd: int, life_fd: int) -> None:
        """Be a forked worker. Does not return."""
        from multiprocessing.connection import Connection
        try:
            self.serve(Connection(channel_fd), Connection(life_fd))
        finally:
            os._exit(EXIT_BUG)

    def serve(self, channel: Any, life: Any) -> None:
        """Execute attempts one after another. Does not return."""
        import threading
        own_group(0)
        die_with_orchestrator(life)
        self.lock = threading.RLock()  # threads of a tool share the channel, one message at a time
        pid = os.getpid()
        if self.folder:
            hold_worker_byte(self.folder)
        own_streams()
        with Interrupts() as interrupts:
            database = Database(self.pipeline.get_connection,
                                lambda: interrupts.signal is not None)
            callees: Dict[str, Callee] = {}
            is_leaving = False
            while not is_leaving and interrupts.signal is None:
                try:
                    order = Order(*channel.recv())
                except (EOFError, OSError):
                    break
                children = count_children()
                try:
                    outcome = self.execute(order, callees, database, interrupts, channel)
                except Exception as error:  # what the tool did to this process reaches the engine
                    outcome = Outcome("failed", error="in its worker: " + format_one_line(error),
                                      traceback=format_traceback(error, verbose=True))
                if os.getpid() != pid:
                    os._exit(EXIT_FAILED)
                is_leaving = interrupts.signal is not None or count_children() != children
                if is_leaving:
                    database.close()
                kept = keep_result(outcome.result) if self.folder else None
                outcome = outcome._replace(result=pack_result(outcome.result), kept=kept)
                with self.lock:
                    channel.send(("ended", tuple(outcome), is_leaving))
            database.close()
        os._exit(EXIT_SUCCESS)

    def execute(self, order: Order, callees: Dict[str, Callee], database: Database,
                interrupts: Interrupts, channel: Any) -> Outcome:
        """Return how an attempt ended, its output in a file, its memory bounded."""
        tool = self.pipeline.tools[order.tool]
        shown_s = 0.0

        def tell(kind: str, _tool: str, **what: Any) -> None:
            """Send an event to the run; of those that tell of progress, ten a second."""
            nonlocal shown_s
            if kind == "progress":
                now_s = time.monotonic()
                if now_s - shown_s < 0.1 and what["done"] != what["total"]:
                    return
                shown_s = now_s
            with self.lock:
                interrupts.finish(channel.send, ("event", {"kind": kind, **what}, False))

        def take(items: List[Item]) -> None:
            with self.lock:  # no tool is being called now
                channel.send(("items", items, False))

        with output_to(order.output), bounded_memory(tool.memory_bytes):
            try:
                if order.tool not in callees:
                    known = {*self.arguments, "conn", "context"}
                    callees[order.tool] = interrupts.call(load_callee, tool, known, interrupts)
            except KeyboardInterrupt:
                return Outcome("interrupted")
            except UserError as error:
                return Outcome("failed", NOT_AGAIN, error=format_one_line(error))
            results = Asked(channel, interrupts, self.lock)
            context = Context(order.run_id, order.tool, order.attempt, Results(results), tell,
                              lambda _: order.last_success_at)
            what = callees[order.tool], database, self.arguments, context, interrupts
            try:
                if order.items is None:
                    return run_attempt(*what, self.verbose)
                return ItemWork(*what, order.items, self.pipeline.name,
                                find_ledger_path(self.folder), self.verbose).carry_out(take)
            finally:
                results.close()


def die_with_orchestrator(life: Any) -> None:
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

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            life.recv_bytes()
        signal_group(os.getpid(), "SIGKILL")

    threading.Thread(target=watch, daemon=True).start()


def flush(stream: Any) -> None:
    """Let what Python keeps of its output go out, unless the tool closed the stream."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass


def own_streams() -> None:
    """Let Python's output streams be the file descriptors 1 and 2, and input empty."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = map(make_stream, (1, 2))


def make_stream(fd: int) -> Any:
    """Return a stream of Python's on a file descriptor, which outlives it."""
    return open(fd, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


@contextlib.contextmanager
def output_to(file: str) -> Iterator[None]:
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


def point_output(into: int) -> None:
    """Let the file descriptors 1 and 2 lead to where another does, which is closed."""
    os.set_inheritable(into, True)
    os.dup2(into, 1)
    os.dup2(into, 2)
    if into > 2:  # else a tool had closed that, and it was the next to be given
        os.close(into)


@contextlib.contextmanager
def bounded_memory(limit_bytes: Optional[int]) -> Iterator[None]:
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


def count_children() -> Tuple[bool, int]:
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


# === 9 RUNNING ==================================================================================
# One loop on one thread carries out a Plan and owns all state of the run: what is ready, what
# runs, how each tool ended, what that means for the others, what is tried again. Every rule about
# failure stands here. It prints nothing.

GRACE_S = 10.0  # between asking a process group to end and killing it
_BEAT_S = 0.1  # the longest that the loop waits before it looks at signals and the clock


class Clock(NamedTuple):
    """The time, as a run sees it; tests hold it still."""
    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def run_plan(pipeline: Pipeline, plan: Plan, arguments: Mapping[str, Any], *,
             history: NoHistory = NoHistory(), request: Request = Request(),
             fail_fast: bool = False, verbose: bool = False, keep_results: bool = True,
             grace_s: float = GRACE_S,
             retry_items: Optional[Mapping[str, Tuple[str, ...]]] = {},
             on_event: Optional[Callable[[Event], None]] = None, clock: Clock = Clock(),
             find_said: Callable[[], Mapping[str, str]] = dict) -> RunResult:
    """Carry out a plan and return how it ended.

    retry_items: by tool, the items that are to be tried again though they were given up; all of
    them where there are no names, and of all tools if it is None. find_said: see
    check_are_taken(). Raise UserError, before anything has run, if a module can not be imported or
    called, or an argument reaches no tool; and if the history can not be written.
    """
    tools = [pipeline.tools[step.tool] for step in plan.steps if not step.success]
    check_get_connection(pipeline.get_connection)
    check_modules_exist(tools)
    check_each(pipeline, tools)
    # Workers come first, before anything is opened: neither threads nor connections are inherited.
    workers = make_workers(pipeline, plan, arguments, verbose, history)
    sources = Sources(is_of_run=True)
    try:
        with Interrupts() as interrupts:
            for tool in tools:
                if tool.cache_s is not None:
                    sources.find(tool)
            callees = interrupts.call(load_callees, tools, arguments, interrupts)
            check_are_taken(arguments, callees, pipeline.tools, find_said)
            item_orders = make_item_orders(callees, plan, request.item, retry_items, sources)
            sources.note_imported()
            database = Database(pipeline.get_connection, lambda: interrupts.signal is not None)
            run = Run(pipeline, plan, interrupts, on_event, clock, fail_fast, keep_results,
                      grace_s, history, item_orders, sources)
            run.begin(request, arguments, find_versions(pipeline, tools))
            with Capture(run.logs) as capture, contextlib.closing(database):
                here = Here(callees, database, arguments, interrupts, verbose, run.tell_now,
                            capture, history.find_last_success_at, pipeline.name,
                            find_ledger_path(history.folder), run.take_items)
                run.loop(here, workers)
            if capture.error:
                run.tell_now("log", text=capture.error, level=OUTPUT_LOST)
            return run.end()
    except BaseException:
        grace_s = 0.0  # the run can not go on, and nothing would record how its tools end
        raise
    finally:
        if workers:
            workers.close(grace_s)


def make_workers(pipeline: Pipeline, plan: Plan, arguments: Mapping[str, Any],
                 verbose: bool, history: NoHistory) -> Optional[Workers]:
    """Return the workers that a plan wants, or None if it can do without."""
    wanted = [step for step in plan.steps if not step.success
              and needs_worker(pipeline.tools[step.tool], plan.jobs)]
    if not wanted:
        return None
    history.close()
    return Workers(min(plan.jobs, len(wanted)), pipeline, arguments, verbose, history.folder)


def make_item_orders(callees: Mapping[str, Callee], plan: Plan, only_item: Optional[str],
                     retry_items: Optional[Mapping[str, Tuple[str, ...]]],
                     sources: Sources) -> Dict[str, ItemOrder]:
    """Return for each tool with items the order with which it begins: to list them.

    Raise UserError if items are asked for of a tool that has none or is not in the plan.
    """
    having = [tool for tool, callee in callees.items() if callee.has_items]
    if only_item is not None and (len(plan.steps) > 1 or not having):
        raise UserError("--item is for a single tool with items; the plan has "
                        f"{', '.join(step.tool for step in plan.steps[:5])}.",
                        "Name one" + (": " + having[0] if having else "") + ".")
    if retry_items is None:
        retry_items = dict.fromkeys(having, ())
    for tool in retry_items:
        if tool not in having:
            raise UserError(f"--retry-items: {tool!r} is no tool with items in this plan.",
                            format_nearest(tool, having) if having else
                            "Name such a tool as a target, too.")
    return {tool: ItemOrder(True, hash_item_source(callees[tool].tool, sources), only=only_item,
                            retry=retry_items.get(tool),
                            former=sources.find_former(callees[tool].tool)[:16])
            for tool in having}


def needs_worker(tool: Tool, jobs: int) -> bool:
    """Return whether a tool is to run in a worker: where others run beside it, or on its own
    wish for a process that can be ended or bounded.
    """
    return jobs > 1 or tool.isolate or tool.timeout_s is not None or tool.memory_bytes is not None


class Attempt:
    """An attempt of a tool that is not over: since when, by whom, where it prints to, what a
    success of it would be built on.

    `facts` are that last; `log` the file for what it prints, or ""; `has_logged` whether it used
    context.log; `lines` what it logged so in a worker, which joins the log when what it printed
    has been shown.
    """

    def __init__(self, started_s: float, executor: Any, log: str, facts: Dict[str, Any]) -> None:
        self.started_s, self.executor, self.log, self.facts = started_s, executor, log, facts
        self.in_worker = isinstance(executor, Workers)
        self.has_logged = False
        self.lines: List[str] = []


class Job:
    """What an executor does: an attempt, or a part of one; until when, and why it is being ended,
    if it is. The slip of its order tells which item is `at_work`.
    """

    def __init__(self, tool: str, started_s: float, deadline_s: float,
                 order: Optional[ItemOrder]) -> None:
        self.tool, self.started_s, self.order = tool, started_s, order
        self.deadline_s = deadline_s  # when the next measure is due: terminate, then kill
        self.at_work: Optional[Item] = None
        self.verdict = ""


_CHUNK_S = 0.5  # what a worker is to do at a time of many items
_CHUNK_ITEMS = 1000  # but not more of them than this
_FRESH_ITEMS = 20_000  # that are held in memory before a file takes the rest
_TOLD_ITEMS = 20  # so many failures of a tool's items are told, the others are in the ledger


class Items:
    """The items of a tool that runs: those to do, and what came of the others.

    State: `counts`, what was listed, None before that is known; `fresh`, the next that are
    pending, and `spool`, a file of those after them, a page to a line; `to_read`, how many lines
    of it are left; `again`, a heap of (moment, number, item) that failed and come again;
    `charges`, tries that failed with their process and are to be recorded, and the slips that
    tell of them; `size`, how many items to do at a time; `numbers`, how many jobs there were;
    `jobs`, those that go on; `problem`, the outcome of one that ended the attempt; the rest is
    what came of the items, in a former attempt too.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.passed = self.failed = self.elsewhere = self.told = 0
        self.rows: Optional[int] = None
        self.error = ""  # of the first that failed
        self.failed_names: List[str] = []

    def begin(self) -> None:
        """Begin an attempt, in which they are listed anew."""
        from collections import deque
        self.size = self.batch
        self.counts: Optional[Mapping[str, int]] = None
        self.fresh: Any = deque()
        self.spool: Any = None
        self.to_read = self.read_at = 0
        self.again: List[Tuple[float, int, Item]] = []
        self.charges: List[Tuple[str, Ending]] = []
        self.numbers = self.jobs = 0
        self.problem: Optional[Outcome] = None
        self.reason = self.hopeless = ""  # of those given up before
        self.ended_before = self.count_ended()

    def add(self, items: Sequence[Item]) -> None:
        """Take some that are pending."""
        if len(self.fresh) < _FRESH_ITEMS and not self.to_read:
            self.fresh.extend(items)
            return
        import json
        if self.spool is None:
            import tempfile
            self.spool = tempfile.TemporaryFile()
        self.spool.seek(0, os.SEEK_END)
        self.spool.write(json.dumps(items).encode() + b"\n")
        self.to_read += 1

    def _read_page(self) -> None:
        import json
        self.spool.seek(self.read_at)
        self.fresh.extend(Item(*each) for each in json.loads(self.spool.readline()))
        self.read_at = self.spool.tell()
        self.to_read -= 1

    def come_again(self, due_s: float, item: Item) -> None:
        """Take one that is to be done after the others."""
        self.numbers += 1
        heappush(self.again, (due_s, self.numbers, item))

    def has_more(self) -> bool:
        """Return whether there is anything left to do."""
        return self.problem is None and (self.counts is None or self.find_due_s() < float("inf"))

    def find_due_s(self) -> float:
        """Return when there is something to do: at once, at a moment, or never."""
        if self.problem is not None or self.counts is None:
            return float("inf")
        if self.fresh or self.to_read or self.charges:
            return 0.0
        return self.again[0][0] if self.again else float("inf")

    def take(self, now_s: float, jobs: int) -> Tuple[Item, ...]:
        """Return the next items to do together: not so many that other workers had none."""
        while self.to_read and len(self.fresh) < max(_PAGE, self.size + self.batch):
            self._read_page()
        size = self.size
        if jobs > 1 and not self.to_read:
            size = min(size, -(-len(self.fresh) // (2 * jobs)) or size)
        size = -(-size // self.batch) * self.batch
        taken = [self.fresh.popleft() for _ in range(min(size, len(self.fresh)))]
        if not taken:
            while self.again and len(taken) < size and self.again[0][0] <= now_s:
                taken.append(heappop(self.again)[2])
        return tuple(taken)

    def note_speed(self, count: int, took_s: float) -> None:
        """Let the next items take about _CHUNK_S together, after `count` took some seconds."""
        if count:
            fitting = int(_CHUNK_S * count / max(took_s, 1e-6))
            self.size = max(1, min(fitting, 10 * self.size, max(_CHUNK_ITEMS, self.batch)))

    def note(self, tally: Tally) -> None:
        """Add what came of some items, but for how those ended that did not pass."""
        self.passed += tally.passed
        self.elsewhere += tally.elsewhere
        if tally.rows is not None:
            self.rows = (self.rows or 0) + tally.rows

    def note_failed(self, ending: Ending) -> None:
        """Add one that failed for good, or was quarantined."""
        self.failed += 1
        self.error = self.error or f"{format_name(ending.item.name)}: {ending.error}"
        if len(self.failed_names) < 3:
            self.failed_names.append(ending.item.name)

    def count_ended(self) -> int:
        """Return how many ended in this run."""
        return self.passed + self.failed + self.elsewhere

    def count(self) -> Optional[Dict[str, int]]:
        """Return the counts that history keeps."""
        if self.counts is None:
            return None
        return {**self.counts, "pending": self.counts["pending"] + self.ended_before,
                "passed": self.passed, "failed": self.failed, "elsewhere": self.elsewhere}

    def make_outcome(self) -> Outcome:
        """Return the outcome of a tool whose items have all been tried."""
        tried = self.passed + self.failed
        names = ": " + format_names(self.failed_names, self.failed) if self.failed > 1 else ""
        reasons = [f"{self.failed:,} of {count_items(tried)} failed{names}"] * bool(self.failed)
        if self.elsewhere:
            reasons.append(f"{count_items(self.elsewhere)} done by another run meanwhile")
        if self.passed and not self.failed:
            reasons.append(f"{count_items(self.passed)} done")
        if not tried and not self.elsewhere:
            reasons.append(f"none of {count_items(self.counts['listed'])} is pending"
                           if self.counts["listed"] else "no items")
        reasons.append(self.reason)
        if self.hopeless and not tried and not self.elsewhere:
            return Outcome("failed", "; ".join(filter(None, reasons)), error=self.hopeless)
        status = "success" if not self.failed else "partial" if self.passed else "failed"
        result = {"items": self.passed, "failed": self.failed, "rows": self.rows or 0}
        return Outcome(status, "; ".join(filter(None, reasons)), result, self.rows, self.error)

    def close(self) -> None:
        """Let go of the file."""
        if self.spool is not None:
            self.spool.close()


class Run:
    """One execution of a plan.

    Constant: pipeline, plan, sources and switches. Changing, and only by this class:
    `statuses` and `outcomes` of the tools; `results` of those that succeeded; `attempts`, how
    often each was tried; `causes`, for each tool that those who need it can not have, the tool
    that failed first; `first_cause`, the position of the first of these and what failed there;
    `open`, the attempts that are not over, by tool; `jobs`, what is being executed of them;
    `retries`, a heap of (moment, tool) that failed and come again, and `tried`, how they failed;
    `items`, those of each tool that has some; `stopped_by`, the tool whose failure keeps anything
    more from starting; `is_interrupted`; `told`, the events that the listener hears at the next
    publish().
    """

    def __init__(self, pipeline: Pipeline, plan: Plan, interrupts: Interrupts,
                 on_event: Optional[Callable[[Event], None]], clock: Clock, fail_fast: bool,
                 keep_results: bool, grace_s: float, history: NoHistory,
                 item_orders: Dict[str, ItemOrder], sources: Sources) -> None:
        self.pipeline, self.plan, self.interrupts = pipeline, plan, interrupts
        self.history = history
        self.on_event, self.clock, self.grace_s = on_event, clock, grace_s
        self.fail_fast, self.keep_results = fail_fast, keep_results
        self.item_orders, self.sources = item_orders, sources
        self.steps = {step.tool: step for step in plan.steps}
        self.schedule = Schedule(plan.steps, pipeline, plan.jobs)
        self.run_id = self.ledger_run_id = ""
        self.started_s = clock.monotonic()
        self.statuses = dict.fromkeys(self.steps, "pending")
        self.outcomes: Dict[str, Outcome] = {}
        self.results: Dict[str, Any] = {}
        self.attempts: Dict[str, int] = {}
        self.causes: Dict[str, str] = {}
        self.first_cause = (len(plan.steps), "")
        self.open: Dict[str, Attempt] = {}
        self.jobs: Dict[str, Job] = {}
        self.retries: List[Tuple[float, str]] = []
        self.tried: Dict[str, Outcome] = {}
        self.items: Dict[str, Items] = {}
        self.stopped_by: Optional[str] = None
        self.is_interrupted = False
        # how many still wait for a result: those that need it and, of those that wait for all
        # before them, the last one, since it is settled after the others
        self.last_in_line = max((i for i, step in enumerate(plan.steps)
                                 if step.needs == ALL_BEFORE), default=-1)
        self.users = {tool: len(self.schedule.after.get(tool, ())) + (i < self.last_in_line)
                      for i, tool in enumerate(self.steps)}
        self.logs = ""  # the folder for what tools print
        self.told: List[Event] = []
        self.here: Any = None  # who executes what needs no worker
        self.workers: Optional[Workers] = None
        interrupts.before_exit = self.forget_work

    def begin(self, request: Request, arguments: Mapping[str, Any], versions: Versions) -> None:
        """Record that the run begins."""
        self.run_id = self.history.begin_run(self.plan, request, arguments, versions,
                                             self.clock.wall())
        self.ledger_run_id = f"{self.run_id}.{os.urandom(2).hex()}"
        if self.history.folder:
            self.logs = find_logs(self.history.folder, self.run_id)
            try:
                os.makedirs(self.logs, 0o700, exist_ok=True)
            except OSError as error:
                raise refused(self.logs, error) from error

    def loop(self, here: Here, workers: Optional[Workers]) -> None:
        """Start what is ready and settle what has ended, until nothing is left to do."""
        if workers and not self.logs:
            import tempfile
            self.logs = tempfile.mkdtemp(prefix="orchestrator-")
        self.here, self.workers = here, workers
        try:
            self.tell("run_started", plan=self.plan)
            self.unblock(self.schedule.begin())
            while True:
                self.look_at_signals()
                self.look_at_clock()
                if self.item_orders:
                    self.end_items()
                self.start_ready()
                self.publish()
                if not self.open and (self.is_interrupted or not self.retries):
                    return
                self.wait()
        finally:
            if workers and not self.history.folder:
                import shutil
                shutil.rmtree(self.logs, ignore_errors=True)

    def wait(self) -> None:
        """Wait until something has ended, or the clock says that something is due."""
        if not self.jobs:
            self.clock.sleep(self.find_timeout_s())
            return
        said = self.here.wait() if self.here.order else self.workers.wait(self.find_timeout_s())
        for kind, job, what in said:
            if kind == "ended" and self.jobs[job].order:
                self.items_ended(job, what)
            elif kind == "ended":
                self.ended(job, what, self.jobs.pop(job).verdict)
            elif kind == "items":
                self.take_items(job, what)
            elif job:
                self.tell(tool=self.jobs[job].tool, **what)
        if not said:
            self.tell("tick")

    def find_timeout_s(self) -> float:
        """Return the seconds until something is due, but not more than a beat."""
        now_s = self.clock.monotonic()
        items = [self.items[tool].find_due_s() for tool in self.open
                 if tool in self.items and not self.items[tool].jobs]
        dues = [due_s for due_s in items if due_s > now_s]  # what is past that waits for room
        dues += [each.deadline_s for each in self.jobs.values()] + [at for at, _ in self.retries]
        return max(0.0, min([_BEAT_S, *(due_s - now_s for due_s in dues)]))

    def look_at_signals(self) -> None:
        """After the first signal, start nothing more and end what runs within the grace."""
        if self.interrupts.signal is not None and not self.is_interrupted:
            self.is_interrupted = True
            for job in self.jobs:
                self.end_job(job, "interrupted")

    def look_at_clock(self) -> None:
        """End what has run too long, kill what would not end, and let come again what is due."""
        now_s = self.clock.monotonic()
        for name, job in self.jobs.items():
            limit_s = self.pipeline.tools[job.tool].timeout_s
            if limit_s is not None and job.order and not job.verdict:
                at_work = read_slip(job.order.slip)
                if at_work != job.at_work:  # the limit is for each item
                    job.at_work, job.deadline_s = at_work, now_s + limit_s
            if job.deadline_s <= now_s:
                if job.verdict:
                    self.workers.signal(name, "SIGKILL")
                    job.deadline_s = now_s + self.grace_s
                else:
                    self.end_job(name, f"timed out after {format_duration(limit_s)}")
        while self.retries and self.retries[0][0] <= now_s:
            self.schedule.add(heappop(self.retries)[1])

    def end_job(self, name: str, verdict: str) -> None:
        """Ask a job to end; look_at_clock() kills it after the grace."""
        job = self.jobs[name]
        job.verdict = verdict
        job.deadline_s = self.clock.monotonic() + self.grace_s
        self.workers.signal(name, "SIGTERM")

    def start_ready(self) -> None:
        """Start what is ready and has room: items of tools that have begun and wait for a worker,
        tools, and then more items, side by side.
        """
        if self.item_orders:
            self.start_items(is_first=True)
        while len(self.jobs) < self.plan.jobs and not self.is_interrupted:
            tool = self.schedule.next()
            if tool is None:
                break
            self.start(tool)
        if self.item_orders:
            self.start_items(is_first=False)

    def start(self, tool: str) -> None:
        """Start an attempt."""
        options = self.pipeline.tools[tool]
        executor = self.workers if needs_worker(options, self.plan.jobs) else self.here
        self.tried.pop(tool, None)
        attempt = self.attempts[tool] = self.attempts.get(tool, 0) + 1
        if attempt == 1:
            self.statuses[tool] = check_move(self.statuses[tool], "running")
        self.history.begin_attempt(tool, attempt, self.clock.wall(), executor.reserve())
        log = find_log(self.logs, tool, attempt) if self.logs else ""
        first = self.item_orders.get(tool)
        if first:
            self.items.setdefault(tool, Items(options.batch)).begin()
        self.open[tool] = Attempt(self.clock.monotonic(), executor, log, self.find_facts(tool))
        self.tell_now("tool_started", tool, output=log if self.open[tool].in_worker else "")
        self.start_job(tool, first._replace(run_id=self.ledger_run_id,
                                            charges=self.find_deaths(tool)) if first else None)

    def start_job(self, tool: str, order: Optional[ItemOrder]) -> None:
        """Have an attempt executed, or a part of it."""
        attempt, now_s = self.open[tool], self.clock.monotonic()
        timeout_s = self.pipeline.tools[tool].timeout_s
        name = tool
        if order:
            items = self.items[tool]
            items.numbers += 1
            items.jobs += 1
            name = f"{tool}\0{items.numbers}"
            folder = self.history.folder or self.logs
            if folder:
                order = order._replace(slip=os.path.join(
                    find_slips(folder, tool), f"{items.numbers}-{order.source}"))
        self.jobs[name] = Job(tool, now_s,
                              float("inf") if timeout_s is None else now_s + timeout_s, order)
        attempt.executor.start(Order(
            name, tool, self.attempts[tool], self.run_id, self.results_for(tool), attempt.log,
            self.history.find_last_success_at(tool) if attempt.in_worker else None, order))

    def find_deaths(self, tool: str) -> Tuple[Ending, ...]:
        """Return the items that were at work when a former run was cut off, in a tool whose source
        has not been changed since: that mended it, perhaps.
        """
        folder = find_slips(self.history.folder, tool) if self.history.folder else ""
        charges, order = self.items[tool].charges, self.item_orders[tool]
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            slip = os.path.join(folder, name)
            item = read_slip(slip)
            if item is not None and name.rpartition("-")[2] in (order.source, order.former):
                charges.append((slip, Ending(
                    item, "pending", 0, "its process ended while it was at work", is_death=True)))
            else:
                os.unlink(slip)
        return tuple(ending for _, ending in charges)

    def start_items(self, is_first: bool) -> None:
        """Have more items done where there is room, by tools of which none are being done if
        `is_first`.
        """
        now_s = self.clock.monotonic()
        for tool in self.open:
            items = self.items.get(tool)
            while items and len(self.jobs) < self.plan.jobs and not self.is_interrupted \
                    and items.find_due_s() <= now_s and not (is_first and items.jobs) \
                    and self.schedule.take(tool):
                charges = () if items.jobs else tuple(ending for _, ending in items.charges)
                first = self.item_orders[tool]
                order = ItemOrder(False, first.source, self.ledger_run_id,
                                  items.take(now_s, self.plan.jobs), charges, former=first.former)
                if not order.items and not charges:
                    self.schedule.release(tool)
                    break
                self.start_job(tool, order)

    def take_items(self, job: str, items: Sequence[Item]) -> None:
        """Take items that are pending from who lists them."""
        self.items[self.jobs[job].tool].add(items)

    def items_ended(self, name: str, outcome: Outcome) -> None:
        """Take what came of some items, or of listing them."""
        job = self.jobs.pop(name)
        tool, order, now_s = job.tool, job.order, self.clock.monotonic()
        items, tally = self.items[tool], outcome.result
        self.schedule.release(tool)
        items.jobs -= 1
        if isinstance(tally, Packed):
            tally = Results({tool: tally})[tool]
        if isinstance(tally, Tally):
            died_at = None
            self.forget_slips(items, order, tally.charged, tally.has_lost)
        else:  # it did not say, or could not even begin
            died_at = read_slip(order.slip)
            tally = Tally(left=tuple(item._replace(is_seen=None) for item in order.items))
        items.note(tally)
        for ending in tally.endings:
            self.item_ended(tool, ending, is_new=not order.is_listing)
        at_fault = died_at or (tally.at_work if job.verdict else None)
        if outcome.status == "success":
            if order.is_listing:
                items.counts, items.reason = outcome.items, outcome.reason
                items.hopeless = outcome.error
                self.history.note_items(tool, outcome.items)
                # what was given back is not given back once more
                self.item_orders[tool] = self.item_orders[tool]._replace(retry=None)
            items.note_speed(len(order.items), now_s - job.started_s)
        elif self.is_interrupted or outcome.status == "interrupted" and not job.verdict:
            self.is_interrupted = True
            items.problem = Outcome("interrupted", format_signal(self.interrupts.signal))
            if job.verdict:  # if it had to be killed, that was our doing
                self.forget_slips(items, order, charged=0)
        elif at_fault or job.verdict and tally.left:
            if at_fault:
                items.charges.append((order.slip, Ending(
                    at_fault, "pending", 0, job.verdict or outcome.error,
                    is_death=not job.verdict)))
            for item in tally.left:
                if not at_fault or item.name != at_fault.name:
                    items.come_again(0.0, item)
        else:
            items.problem = outcome._replace(
                status="failed", result=None, error=job.verdict or outcome.error)
        if items.counts:
            self.tell("progress", tool, done=items.count_ended(),
                      total=items.ended_before + items.counts["pending"])

    @staticmethod
    def forget_slips(items: Items, order: ItemOrder, charged: int, has_lost: bool = False) -> None:
        """Remove the slips of the deaths that an order has recorded, and that of the order itself,
        unless that tells of one that is not.
        """
        recorded = order.charges[:charged]
        slips = [slip for slip, charge in items.charges if charge in recorded]
        items.charges = [each for each in items.charges if each[1] not in recorded]
        for slip in [*slips, *[order.slip] * (not has_lost)]:
            with contextlib.suppress(OSError):
                os.unlink(slip)

    def forget_work(self) -> None:
        """Let no item be charged with the end of this process, which is somebody's wish. Runs in
        the handler of a signal.
        """
        for job in [*self.jobs.values()]:
            if job.order:
                with contextlib.suppress(OSError):
                    os.unlink(job.order.slip)

    def item_ended(self, tool: str, ending: Ending, is_new: bool) -> None:
        """Take how an item ended that did not pass: it comes again, or has failed."""
        options, items = self.pipeline.tools[tool], self.items[tool]
        text = f"{format_name(ending.item.name)}: {ending.error}"
        if ending.is_death:
            what = "connection" if ending.error.startswith(_GONE) else "process"
            text += f"; it took its {what} down {ending.item.deaths} of {DEATHS_ALLOWED} times"
        elif options.retries:
            text += f"; try {ending.attempt} of {options.retries + 1}"
        if ending.status == "pending" and is_new:
            from random import random
            delay_s = 0.0 if ending.is_death else retry_delay_s(options, ending.attempt, random)
            items.come_again(self.clock.monotonic() + delay_s, ending.item)
            text += "; again" + (f" in {format_duration(delay_s)}" if delay_s else "")
        elif ending.status != "pending":
            is_quarantined = ending.status == "quarantined"
            text += "; quarantined" * is_quarantined
            if is_new or is_quarantined:  # no run has told of that: the last was cut off
                items.note_failed(ending)
        items.told += 1
        if items.told == _TOLD_ITEMS:
            text = f"more items fail; --items {tool} --failed will list them"
        traceback = ending.traceback.rstrip()
        if items.told == 1 and traceback:
            text += "\n" + traceback
        if items.told <= _TOLD_ITEMS:
            self.tell("log", tool, text=text, level=30 if ending.status == "pending" else 40)
        if 1 < items.told < _TOLD_ITEMS and traceback:
            self.note_log(tool, traceback)

    def end_items(self) -> None:
        """Settle the tools of whose items nothing is left to do."""
        for tool in list(self.open):
            items = self.items.get(tool)
            if not items or items.jobs or items.has_more() and not self.is_interrupted:
                continue
            items.close()
            outcome = items.problem or (items.make_outcome() if not items.has_more() else Outcome(
                "interrupted", format_signal(self.interrupts.signal)))
            self.ended(tool, outcome._replace(items=items.count()),
                       is_final=items.problem is None)

    def find_facts(self, tool: str) -> Dict[str, Any]:
        """Return what a success of a tool with `cache` would be built on, before it begins."""
        options, history = self.pipeline.tools[tool], self.history
        if not options.cache_s or not isinstance(history, History):
            return {}
        import json
        needed = find_needed_works(self.pipeline, tool, history.find_success)
        return {"source": json.dumps(describe_source(options, self.sources)),
                "needed": json.dumps(needed),
                "reads": find_reads(options, history.base, {})}

    def results_for(self, tool: str) -> Mapping[str, Any]:
        """Return the results that a tool may see: those of the tools that it waits for; of one
        that is not in the plan, its last.
        """
        needs = self.steps[tool].needs
        if needs == ALL_BEFORE:
            mine, position = self.schedule.position[tool], self.schedule.position
            return Part(self.results, lambda each: position[each] < mine)
        results = {}
        for need in needs:
            success = None if need in self.steps else self.history.find_success(need)
            if need in self.results:
                results[need] = self.results[need]
            elif success:
                results[need] = load_result(success)
        return results

    def ended(self, tool: str, outcome: Outcome, verdict: str = "",
              is_final: bool = False) -> None:
        """Take the outcome of an attempt: settle the tool, or let it come again unless that says
        nothing new. `verdict` is why it was ended, if it was.
        """
        attempt, options = self.open.pop(tool), self.pipeline.tools[tool]
        if tool not in self.items:
            self.schedule.release(tool)
        if outcome.status != "success" and verdict:
            outcome = Outcome("interrupted", format_signal(self.interrupts.signal)) \
                if self.is_interrupted else Outcome("failed", error=verdict)
        elif outcome.status == "interrupted":
            self.is_interrupted = True
        tries = self.attempts[tool]
        is_final = is_final or outcome.status != "failed" or outcome.reason == NOT_AGAIN \
            or tries > options.retries or self.stopped_by is not None or self.is_interrupted
        outcome = self.describe(tool, outcome, attempt)
        if not is_final:
            from random import random
            delay_s = retry_delay_s(options, tries, random)
            heappush(self.retries, (self.clock.monotonic() + delay_s, tool))
            self.tried[tool] = outcome
            again = "again" + (f" in {format_duration(delay_s)}" if delay_s else "")
            outcome = add_reason(outcome, f"try {tries} of {options.retries + 1}; {again}")
        self.record(tool, outcome, attempt.facts)
        output = attempt.log if attempt.in_worker else ""
        if is_final:
            self.settle(tool, outcome, output)
        else:
            self.tell("tool_retried", tool, outcome=outcome, output=output)
        if output:
            self.publish()  # who listens shows the file, before it is cut
            if attempt.lines:
                append_log(output, "\n".join(attempt.lines))
            tidy_log(output)
        if self.stopped_by:  # nothing is tried again
            self.retries.clear()
            while self.tried:
                each = next(iter(self.tried))
                self.settle(each, self.tried.pop(each))

    def describe(self, tool: str, outcome: Outcome, attempt: Attempt) -> Outcome:
        """Return an outcome with what only the run knows of it: which try, how long, the log."""
        options, tries = self.pipeline.tools[tool], self.attempts[tool]
        if outcome.status == "failed" and 1 < tries > options.retries:
            outcome = add_reason(outcome, f"try {tries} of {options.retries + 1}")
        has_log = outcome.log or attempt.has_logged or attempt.in_worker and has_bytes(attempt.log)
        error = outcome.error
        if options.memory_bytes is not None and error.startswith("MemoryError"):
            error += f"; its memory is bounded to {options.memory_bytes / 2**20:.1f} MB"
        return outcome._replace(attempts=tries, error=error, log=attempt.log if has_log else "",
                                duration_s=self.clock.monotonic() - attempt.started_s)

    def record(self, tool: str, outcome: Outcome, facts: Dict[str, Any]) -> None:
        """Record how an attempt ended."""
        if facts and outcome.status == "success":
            import json
            writes = find_writes(self.pipeline.tools[tool], self.history.base)
            facts["inputs"] = json.dumps({"reads": facts["reads"], "writes": writes})
        self.history.end_attempt(tool, outcome, facts)

    def note_end(self, tool: str, outcome: Outcome, output: str = "") -> None:
        """Note how a tool ended, or that it need not or can not begin."""
        self.statuses[tool] = check_move(self.statuses[tool], outcome.status)
        self.outcomes[tool] = outcome
        if outcome.status in ("success", "partial", "cached"):
            self.results[tool] = outcome.result
        self.tell("tool_ended", tool, outcome=outcome, output=output)
        self.drop_results(tool)

    def settle(self, tool: str, outcome: Outcome, output: str = "") -> None:
        """Note how a tool ended that was tried, and let those go on that waited for it."""
        self.note_end(tool, outcome, output)
        if outcome.status in ("failed", "partial"):
            policy = "stop" if self.fail_fast else self.pipeline.tools[tool].on_failure
            if policy != "continue" and outcome.status == "failed":
                self.note_cause(tool, tool)
            if policy == "stop" and self.stopped_by is None:
                self.stopped_by = tool
        if outcome.status != "interrupted":
            freed = self.schedule.done(tool)
            ready = self.schedule.take_all() if self.stopped_by else []
            self.unblock([each for each in ready if each not in self.tried] + freed)

    def unblock(self, tools: Sequence[str]) -> None:
        """Make tools ready that wait for nothing any more; settle those that are not to run."""
        left = list(tools)
        while left:
            tool = left.pop(0)
            step = self.steps[tool]
            if step.success:
                outcome = make_cached(step)
            else:
                reason = self.find_hindrance(tool)
                if reason is None:
                    self.schedule.add(tool)
                    continue
                outcome = Outcome("skipped", reason)
                self.history.note(tool, outcome, self.clock.wall())
            self.note_end(tool, outcome)
            left += self.schedule.done(tool)

    def find_hindrance(self, tool: str) -> Optional[str]:
        """Return why a tool must be skipped, or None. Notes the cause for those that need it."""
        step = self.steps[tool]
        if self.pipeline.tools[tool].when == "always" or tool in self.attempts:
            return None
        if step.needs == ALL_BEFORE:
            position, first = self.first_cause
            root = first if position < self.schedule.position[tool] else None
        else:
            root = next((self.causes[need] for need in step.needs if need in self.causes), None)
        if root is not None:
            self.note_cause(tool, root)
            return f"needs {root}, which failed"
        if self.stopped_by is not None:
            return f"not started, because {self.stopped_by} failed" + (
                " and --fail-fast was given" if self.fail_fast else ' and says "stop"')
        return None

    def note_cause(self, tool: str, root: str) -> None:
        """Note that those who need a tool can not have it, because `root` failed."""
        self.causes[tool] = root
        self.first_cause = min(self.first_cause, (self.schedule.position[tool], root))

    def drop_results(self, tool: str) -> None:
        """Let go of the results that only this tool still waited for."""
        if self.keep_results:
            return
        needs = self.steps[tool].needs
        if needs == ALL_BEFORE:
            position = self.schedule.position[tool]
            needs = tuple(self.steps)[:position] if position == self.last_in_line else ()
        for each in needs:
            if each in self.users:
                self.users[each] -= 1
        for each in (tool, *needs):
            if not self.users.get(each):
                self.results.pop(each, None)

    def tell(self, kind: str, tool: str = "", **what: Any) -> None:
        """Have the listener told at the next publish(); what a tool logs, its log too."""
        if kind == "log":
            self.note_log(tool, what["text"])
        if self.on_event:
            self.told.append(Event(kind, self.clock.wall(), self.run_id, tool, **what))

    def note_log(self, tool: str, text: str) -> None:
        """Add a text to the log of a tool that runs, if there are logs."""
        if tool not in self.open or not self.history.folder:
            return
        attempt = self.open[tool]
        attempt.has_logged = True
        if attempt.in_worker:
            attempt.lines.append(text)
        else:
            append_log(attempt.log, text)

    def tell_now(self, kind: str, tool: str = "", **what: Any) -> None:
        """Have the listener told at once."""
        self.tell(kind, tool, **what)
        self.publish()

    def publish(self) -> None:
        """Make durable what was recorded, and only then tell the listener of it."""
        self.history.commit()
        while self.told:
            self.on_event(self.told.pop(0))

    def end(self) -> RunResult:
        """Return how the run ended, and tell the listener."""
        for tool, status in self.statuses.items():
            if status == "running":  # it waited for another try
                self.statuses[tool] = "interrupted"
                self.outcomes[tool] = Outcome("interrupted", "waited for another try",
                                              attempts=self.attempts[tool])
        having: Dict[str, List[str]] = {status: [] for status in MOVES}
        for tool, status in self.statuses.items():
            having[status].append(tool)
        failed, partial = having["failed"], having["partial"]
        status = "interrupted" if self.is_interrupted \
            else "failed" if failed or partial else "success"
        outcomes = {tool: self.outcomes.get(tool) or Outcome("pending", "not started")
                    for tool in self.statuses}
        result = RunResult(self.run_id, status, having["success"], having["cached"], partial,
                           failed, having["skipped"],
                           {tool: outcomes[tool].error for tool in [*failed, *partial]},
                           Results(self.results), self.clock.monotonic() - self.started_s,
                           outcomes, self.interrupts.signal)
        if self.history.folder:
            with contextlib.suppress(OSError):
                os.rmdir(self.logs)  # if nobody has printed anything
        self.history.end_run(status, result.duration_s)
        self.tell_now("run_ended", result=result)
        return result


def add_reason(outcome: Outcome, reason: str) -> Outcome:
    """Return an outcome with one more reason."""
    return outcome._replace(reason="; ".join(filter(None, [outcome.reason, reason])))


def load_result(success: Success) -> Any:
    """Return what a tool returned at a success, or what is known of that."""
    import json
    return Packed(None, success.kind) if success.result is None else json.loads(success.result)


def make_cached(step: Step) -> Outcome:
    """Return the outcome of a tool whose last success still stands."""
    return Outcome("cached", step.reason, load_result(step.success), step.success.rows)


@contextlib.contextmanager
def hold_history(folder: str, base: str, wait_s: float = 0.0,
                 clock: Clock = Clock()) -> Iterator[History]:
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


def make_locked(history: History, holder: str) -> Locked:
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


def find_running(history: History) -> Tuple[Optional[Dict[str, Any]], List[Dict[str, Any]]]:
    """Return the run that is not recorded as ended, and the attempts in it that run."""
    run = history.find_running()
    attempts = history.load_attempts(run) if run else []
    return run, [attempt for attempt in attempts if attempt["status"] == "running"]


def is_held(folder: str) -> bool:
    """Return whether a run holds the lock of a pipeline, or a worker of one that was killed."""
    lock = Lock(folder)
    holder = lock.take()
    lock.release()
    return bool(holder)


def make_request(run: Mapping[str, Any]) -> Request:
    """Return what a resume of a run asks for."""
    words = run["words"]
    return Request(tuple(run["targets"]), tuple(run["exclude"]), run["start_from"],
                   None if words is None else tuple(words), run["run_id"], run["item"] or None)


def mark_done(pipeline: Pipeline, plan: Plan, request: Request, arguments: Mapping[str, Any],
              history: History, tools: Sequence[str], now: float) -> List[str]:
    """Record a run in which nothing was done but these tools, by hand; return what is left.

    Each keeps the start of its attempt that failed: what came in after that, the next run will
    still have to see.

    Raise UserError for a tool that is not in the plan, or that needs one that is not done.
    """
    marked = dict.fromkeys(tools)
    open_tools = [step.tool for step in plan.steps if not step.success and step.tool not in marked]
    steps = {step.tool: step for step in plan.steps}
    for tool in marked:
        if tool not in steps:
            raise UserError(f"{tool!r} is not in run {request.resumes}.",
                            format_nearest(tool, steps))
        before = list(steps)[:list(steps).index(tool)]
        needs = before if steps[tool].needs == ALL_BEFORE else steps[tool].needs
        left = [need for need in needs if need in open_tools]
        if left:
            raise UserError(f"{tool} needs {left[0]}, which is not done.",
                            f"Mark {left[0]} as done too, if it is.")
    history.begin_run(plan, request, arguments,
                      find_versions(pipeline, [pipeline.tools[tool] for tool in steps]), now)
    for tool in marked:
        started_at = history.find_started_at(tool, request.resumes)
        known_at = history.find_last_success_at(tool) or started_at  # of a run since, by itself
        history.begin_attempt(tool, 1, max(started_at, known_at), os.getpid())
        history.end_attempt(tool, Outcome("success", "marked as done by hand", duration_s=None), {})
    history.end_run("failed" if open_tools else "success", 0.0)
    return open_tools


def make_past(pipeline: Pipeline, history: NoHistory, arguments: Mapping[str, Any], now: float,
              done: Mapping[str, Success], is_forced: bool,
              wants_durations: bool = True) -> Past:
    """Return what planning may ask of a history. Durations cost time, and decide nothing where
    tools run one after another and nobody looks at the plan.
    """
    mine, sources = format_arguments(arguments), Sources()
    texts = [mine]
    if has_period(arguments):  # then a run of all periods will do, too
        texts.append(format_arguments({name: value for name, value in arguments.items()
                                       if name not in PERIOD_ARGUMENTS}))

    def find_whole_success(tool: str) -> Optional[Success]:
        found = [history.find_whole_success(tool, text) for text in texts]
        return max(filter(None, found), key=lambda success: success.work, default=None)

    def find_change(tool: Tool, success: Success) -> str:
        if success.arguments != mine:
            return "arguments changed"
        if find_day(success.started_at) < str(arguments.get(PERIOD_ARGUMENTS[1]) or ""):
            return "its period has gone on"
        return find_changed_source(success.source, describe_source(tool, sources)) \
            or find_changed_file(tool, history.base, success.inputs)

    find_expected_s = history.find_expected_s if wants_durations else NoHistory().find_expected_s
    return Past(now, history.find_success, find_whole_success, find_expected_s, find_change, done,
                is_forced)


def count_jobs(jobs: Any) -> int:
    """Return how many tools may run side by side; 0 means the number of cores."""
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 0:
        raise UserError(f"jobs is {jobs!r}, not a whole number from 0 on.",
                        "Give how many tools may run side by side; 0 means one for each core.")
    affinity = getattr(os, "sched_getaffinity", None)
    return jobs or (len(affinity(0)) if affinity else os.cpu_count() or 1)


def find_request(history: History, request: Request, arguments: Optional[Mapping[str, Any]],
                 resume: Union[bool, str]) -> Tuple[Request, Any, Dict[str, Success]]:
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


def read_arguments(run: Mapping[str, Any],
                   now: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
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


def make_own_request(targets: Any, exclude: Any, start_from: Optional[str], arguments: Any,
                     home: Optional[str], resume: Union[bool, str]) -> Request:
    """Return what run_pipeline() was asked for. Raise UserError for what it can not be asked."""
    request = Request(tuple(read_targets("targets", targets)),
                      tuple(read_targets("exclude", exclude)), start_from)
    check_arguments({} if arguments is None else arguments)
    if home is None and resume:
        raise UserError("resume needs a history.", "Say where it is: home=.")
    return request


def check_keywords(name: Any, item: Any, home: Any, resume: Any, grace_s: Any, wait_s: Any,
                   on_event: Any) -> None:
    """Raise UserError for a keyword of run_pipeline() that would fail late, or be passed over."""
    def is_text(value: Any) -> bool:
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


def make_retries(given: Any) -> Dict[str, Tuple[str, ...]]:
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
    pipeline = load_pipeline(tool_map, stages, get_connection, name=name, limits=limits)
    request = make_own_request(targets, exclude, start_from, arguments, home, resume)
    said = arguments or {}  # those of a run that is resumed are not said anew
    with contextlib.ExitStack() as stack:
        history, past = NoHistory(), None
        if home is not None:
            history = stack.enter_context(hold_history(
                find_pipeline_folder(home, pipeline.name), find_base(get_connection), wait_s))
            history.close_killed()
            request, arguments, done = find_request(history, request, arguments, resume)
            past = make_past(pipeline, history, arguments or {}, Clock().wall(), done, force,
                             count_jobs(jobs) > 1)
        if item is not None:
            request = request._replace(item=item)
        plan = make_plan(pipeline, request.targets, exclude=request.exclude, past=past,
                         start_from=request.start_from, jobs=count_jobs(jobs))
        result = run_plan(pipeline, plan, arguments or {}, history=history, request=request,
                          fail_fast=fail_fast, verbose=verbose, grace_s=grace_s,
                          retry_items=make_retries(retry_items), on_event=on_event,
                          find_said=lambda: dict.fromkeys(said, "arguments"))
    pass_on_signal(result)
    return result


def pass_on_signal(result: RunResult) -> None:
    """Do what the signal that interrupted a run would have done without it."""
    if result.signal is not None:
        import signal
        signal.raise_signal(result.signal)
    if result.status == "interrupted":
        raise KeyboardInterrupt


# === 10 VIEWS ===================================================================================
# Text and JSON from plans, events and results. Nothing is decided, asked or printed here.

_COLOURS = {"success": 32, "cached": 32, "failed": 31, "quarantined": 31, "partial": 33,
            "skipped": 33, "interrupted": 33, "run": 36, "running": 36}


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


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]],
                 style: Style = Style()) -> List[str]:
    """Return the names of columns, and the rows under them, as aligned lines.

    The column of `>name` is aligned to the right; that of `?name` is left out where it is empty;
    that of `status` is coloured.
    """
    shown = []
    for column, *cells in zip(columns, *rows):
        if column[:1] == "?" and not any(cells):
            continue
        cells.insert(0, column.lstrip(">?"))
        width = max(map(len, cells))
        texts = [cell.rjust(width) if column[:1] == ">" else cell.ljust(width) for cell in cells]
        if cells[0] == "status":
            texts = [style.paint(text, cell) for text, cell in zip(texts, cells)]
        shown.append(texts)
    head, *lines = ["  ".join(texts).rstrip() for texts in zip(*shown)]
    return [style.bold(head), *lines]


def format_number(number: Optional[int]) -> str:
    """Return a number of rows for a table; nothing where it is not known."""
    return "" if number is None else f"{number:,}"


def format_plural(count: Union[int, str], thing: str) -> str:
    """Return how many things there are, in words: `1 tool`, `3 tools`, `no tools`."""
    return f"{count} {thing}{'s' * (count != 1)}"


Row = Mapping[str, Any]  # a row of the history's tables, by column


def make_list(pipeline: Pipeline, tools: Sequence[str], find_summary: Callable[[Tool], str],
              find_last: Callable[[str], Optional[Row]]) -> Dict[str, Any]:
    """Return what --list shows, as data, for some of the tools and the stages made of them."""
    def make_last(row: Optional[Row]) -> Optional[Dict[str, Any]]:
        return row and {"status": row["status"], "run_id": str(row["run_id"]),
                        "at": format_moment(row["started_at"])}

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


def format_list(shown: Mapping[str, Any], style: Style) -> str:
    """Return --list as text."""
    _, *lines = format_table(("", "?status", ""), [
        ("  " + t["name"], t["last"]["status"] if t["last"] else "", t["summary"])
        for t in shown["tools"]], style)
    lines = [style.bold("Tools"), *lines]
    if shown["stages"]:
        _, *stages = format_table(("", ""), [("  " + s["name"], " ".join(s["tools"]))
                                             for s in shown["stages"]])
        lines += ["", style.bold("Stages"), *stages]
    return "\n".join(lines)


def make_plan_view(plan: Plan) -> Dict[str, Any]:
    """Return what --plan shows, as data."""
    return {"steps": [{"tool": step.tool, "wave": step.wave, "action": step.action,
                       "reason": step.reason, "needs": step.needs if step.needs == ALL_BEFORE
                       else list(step.needs), "expected_s": step.expected_s}
                      for step in plan.steps],
            "critical_path": list(plan.critical_path), "expected_s": plan.expected_s}


def format_plan(plan: Plan, style: Style) -> str:
    """Return --plan as text: the steps by waves, the critical path, what is expected."""
    there = {step.tool for step in plan.steps}
    lines = format_table((">wave", "tool", "action", ">expected", "reason"), [
        (str(s.wave), s.tool, s.action, "" if s.success else format_duration(s.expected_s),
         s.reason + format_needs(s, there))
        for s in sorted(plan.steps, key=lambda s: s.wave)], style)
    lines += ["", "Critical path: " + " -> ".join(plan.critical_path)]
    if plan.expected_s is not None:
        alone_s = sum(step.expected_s or 0.0 for step in plan.steps)
        lines.append(f"Expected: {format_duration(plan.expected_s)} with --jobs {plan.jobs}"
                     + (f", {format_duration(alone_s)} one after another" * (plan.jobs > 1)))
    return "\n".join(lines)


def format_needs(step: Step, there: Iterable[str]) -> str:
    """Return what a step waits for, as a clause; nothing for one that waits for nothing.

    `there` are the tools of its plan.
    """
    if step.success:
        return ""
    if step.needs == ALL_BEFORE:
        return "; after all before it" if step.wave > 1 else ""
    needs = [need if need in there else f"{need} (not in this plan)" for need in step.needs]
    return "; needs " + ", ".join(needs) if needs else ""


def format_event(event: Event, width: int, style: Style) -> str:
    """Return the line of an event of a tool; `width` is that of the longest name."""
    line = format_start(event, width)
    if event.outcome is None:
        level = "error: " if event.level >= 40 else "warning: " if event.level >= 30 else ""
        return line + level + (event.text or "running")
    word = "retry" if event.kind == "tool_retried" else event.outcome.status
    status = style.paint(word.ljust(11), event.outcome.status)
    return (line + status + "  " + format_details(event.outcome)).rstrip()


def format_start(event: Event, width: int) -> str:
    """Return how the line of an event begins: local time and tool."""
    return time.strftime("%H:%M:%S  ", time.localtime(event.at)) + event.tool.ljust(width) + "  "


def format_details(outcome: Outcome) -> str:
    """Return what there is to say of a tool beside its status, in one line."""
    rows = "" if outcome.rows is None else f"{outcome.rows:,} row{'s' * (outcome.rows != 1)}"
    took = format_duration(outcome.duration_s) if outcome.attempts else ""
    return ", ".join(filter(None, [rows, took, outcome.error, outcome.reason]))


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
    lines = format_table(("tool", "status", ">rows", ">duration", ""), [
        (tool, o.status, format_number(o.rows),
         format_duration(o.duration_s) if o.attempts else "",
         ", ".join(filter(None, [o.error, o.reason])))
        for tool, o in result.outcomes.items()], style)
    lines += ["", style.paint(result.status, result.status)
              + f": {len(result.succeeded) + len(result.cached)} of "
              + format_plural(len(result.outcomes), "tool")
              + f" done in {format_duration(result.duration_s)} (run {result.run_id})"]
    if next_command:
        lines.append("Next: " + style.bold(next_command))
    return "\n".join(["", *lines])


def format_local(moment: str) -> str:
    """Return a moment of format_moment() as people's clocks say it: `2013-01-01 07:00:00`."""
    from datetime import datetime
    return f"{datetime.fromisoformat(moment.replace('Z', '+00:00')).astimezone():%Y-%m-%d %H:%M:%S}"


def make_status(tools: Sequence[str], find_last: Callable[[str], Optional[Row]],
                running: Optional[Row], attempts: Sequence[Row], now: float,
                items: Mapping[str, Mapping[str, int]]) -> Dict[str, Any]:
    """Return what --status shows, as data: the run that goes on, if any, and each tool, with how
    many of its `items` have each status.
    """
    rows = []
    for tool in tools:
        last = find_last(tool) or {}
        status = last.get("status", "pending")
        age_s = max(0.0, now - last["started_at"]) if last else None  # a clock may be set back
        rows.append({"tool": tool, "status": status,
                     "run_id": str(last["run_id"]) if last else None,
                     "started_at": format_moment(last.get("started_at")), "age_s": age_s,
                     "duration_s": age_s if status == "running" else last.get("duration_s"),
                     "rows": last.get("rows"), "reason": last.get("reason") or "",
                     "error": last.get("error") or "", "items": items.get(tool)})
    return {"running": running and {
        "run_id": str(running["run_id"]), "pid": running["pid"],
        "started_at": format_moment(running["started_at"]),
        "tools": [each["tool"] for each in attempts]}, "tools": rows}


def format_status(shown: Mapping[str, Any], style: Style) -> str:
    """Return --status as text."""
    lines = format_table(
        ("tool", "status", ">run", ">age", ">duration", ">rows", "?items", ""),
        [(t["tool"], t["status"], t["run_id"] or "", format_duration(t["age_s"]),
          format_duration(t["duration_s"]), format_number(t["rows"]), format_counts(t["items"]),
          t["error"] or t["reason"]) for t in shown["tools"]], style)
    run = shown["running"]
    what = "Nothing runs now." if run is None else (
        f"Run {run['run_id']} goes on, process {run['pid']}, since "
        f"{format_local(run['started_at'])}: "
        f"{', '.join(run['tools']) or 'between two tools'}")
    return "\n".join([*lines, "", what])


def count_statuses(listed: Mapping[str, int],
                   counts: Mapping[str, Tuple[int, int]]) -> Dict[str, int]:
    """Return how many items have each status, from the ledger and from what was listed last:
    `counts` tells how many rows of each status there are, and how many are newer than that, which
    matters while the tool runs, and after a kill.
    """
    shown = {status: counts.get(status, (0, 0))[0] for status in ITEM_STATUSES}
    ended = sum(new for status, (_, new) in counts.items() if status != "pending") \
        if "passed" not in listed else sum(listed[key] for key in ("passed", "failed", "elsewhere"))
    shown["pending"] = max(0, listed.get("pending", 0) - ended)
    return shown


def format_counts(items: Optional[Mapping[str, int]]) -> str:
    """Return how many items have each status, in words."""
    if items is None:
        return ""
    return ", ".join(f"{count:,} {'done' if status == 'success' else status}"
                     for status, count in items.items() if count or status == "success")


def make_item_view(row: Row) -> Dict[str, Any]:
    """Return a row of the ledger as --items shows it, as data."""
    shown = {key: row[key] for key in ("item", "version", "status", "attempts", "deaths",
                                       "duration_s", "error")}
    return {**shown, "run_id": row["run_id"].partition(".")[0],
            "ended_at": format_moment(row["ended_at"]), "rows": row["row_count"]}


def format_items(shown: Sequence[Mapping[str, Any]], style: Style) -> str:
    """Return --items as text."""
    return "\n".join(format_table(
        ("item", "?version", "status", ">tries", "run", "ended", ">rows", ""),
        [(*(format_names([t[key]], 1) for key in ("item", "version")), t["status"],
          str(t["attempts"] + t["deaths"]), t["run_id"], format_local(t["ended_at"]),
          format_number(t["rows"]), t["error"] or "") for t in shown], style))


def make_backfill_view(periods: Sequence[Period]) -> Dict[str, Any]:
    """Return what --plan shows of a backfill, as data."""
    return {"periods": [{**p.arguments(), "action": p.action, "reason": p.reason,
                         "run_id": p.run_id and str(p.run_id)} for p in periods]}


def format_backfill(shown: Mapping[str, Any], style: Style) -> str:
    """Return --plan of a backfill as text."""
    columns, periods = (*PERIOD_ARGUMENTS, "action", "reason"), shown["periods"]
    lines = format_table(columns, [[p[name] for name in columns] for p in periods], style)
    left = sum(p["action"] != "skip" for p in periods)
    return "\n".join([*lines, "", f"{left} of {format_plural(len(periods), 'period')} to run"])


def make_run_view(run: Row, attempts: Sequence[Row], is_detailed: bool = False) -> Dict[str, Any]:
    """Return a run as --history shows it, as data: each tool once, as its last attempt ended."""
    tools: Dict[str, Dict[str, Any]] = {}
    for row in attempts:
        shown = {"tool": row["tool"], "status": row["status"], "reason": row["reason"],
                 "attempts": row["attempt"], "started_at": format_moment(row["started_at"]),
                 "duration_s": row["duration_s"], "rows": row["rows"], "error": row["error"]}
        if is_detailed:
            shown.update({key: row[key] for key in ("traceback", "log", "pid", "result", "items")})
        tools.pop(row["tool"], None)
        tools[row["tool"]] = shown
    started_at, duration_s = run["started_at"], run["duration_s"]
    view = {"run_id": str(run["run_id"]), "status": run["status"], "targets": run["targets"],
            "arguments": run["arguments"], "started_at": format_moment(started_at),
            "ended_at": format_moment(None if duration_s is None else started_at + duration_s),
            "duration_s": duration_s, "planned": run["planned"], "tools": list(tools.values())}
    if is_detailed:
        view.update({key: run[key] for key in
                     ("exclude", "start_from", "resumes", "pid", "version", "git_commit")})
    return view


def format_runs(shown: Mapping[str, Any], style: Style) -> str:
    """Return --history as text: a line for each run, the newest first."""
    rows = []
    for run in shown["runs"]:
        done = sum(tool["status"] in DONE for tool in run["tools"])
        start, end = map(run["arguments"].get, PERIOD_ARGUMENTS)
        period = [f"({start} to {end})"] if start and end else []
        rows.append((run["run_id"], run["status"], format_local(run["started_at"]),
                     format_duration(run["duration_s"]), f"{done} of {run['planned']}",
                     " ".join([*run["targets"], *period])))
    return "\n".join(format_table(
        (">run", "status", "started", ">duration", ">tools", "targets"), rows, style))


def format_run(shown: Mapping[str, Any], style: Style) -> str:
    """Return --history RUN as text: all that is known of one run."""
    import json
    run, = shown["runs"]
    facts = [("run", run["run_id"] + (f", which resumed run {run['resumes']}"
                                      if run["resumes"] else "")),
             ("status", run["status"]), ("targets", " ".join(run["targets"])),
             ("without", " ".join(run["exclude"])), ("from", run["start_from"] or ""),
             ("arguments", json.dumps(run["arguments"], ensure_ascii=False)),
             ("started", format_local(run["started_at"])),
             ("duration", format_duration(run["duration_s"])),
             ("version", run["version"] + (f", commit {run['git_commit'][:12]}"
                                           if run["git_commit"] else ""))]
    _, *lines = format_table(("", ""), [fact for fact in facts if fact[1]])
    lines += ["", *format_table(
        ("tool", "status", ">attempts", "started", ">duration", ">rows", ""),
        [(t["tool"], t["status"], str(t["attempts"] or ""), format_local(t["started_at"])[11:],
          format_duration(t["duration_s"]), format_number(t["rows"]), t["error"] or t["reason"])
         for t in run["tools"]], style)]
    for tool in run["tools"]:
        if tool["traceback"]:
            lines += ["", style.bold(tool["tool"]), tool["traceback"].rstrip()]
        if tool["log"]:
            lines += [f"log of {tool['tool']}: {tool['log']}"]
    return "\n".join(lines)


def format_tail(tool: str, log: str, lines: Sequence[str], style: Style) -> str:
    """Return the last lines that a failed tool printed, under its name."""
    return "\n".join([style.bold(f"Last lines of {tool} ({log}):"),
                      *("  " + line for line in lines)])


# === 11 DOOR ====================================================================================
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
        check_not_hidden(yours)
        check_spelling(yours)
        options, arguments = parse_arguments(add_arguments, argv)
        verbose = options.verbose
        load = read_pipeline if options.command is command_check else load_pipeline
        pipeline = load(tool_map, stages, get_connection, name=name or find_name(), limits=limits)
        base = find_base(get_connection)
        home = home or os.environ.get("ORCHESTRATOR_HOME") or os.path.join(base, ".orchestrator")
        call = Call(pipeline, options, arguments, argv, find_program(), base,
                    find_pipeline_folder(home, pipeline.name), add_arguments)
        code = options.command(call)
        if is_open(sys.stdout):
            show("", end="")  # what tools printed last goes out while a failure can be told
        return code
    except UserError as error:
        if verbose and error.__cause__:
            say(format_traceback(error.__cause__, verbose))
        say(str(error))
        return error.exit_code
    except SystemExit as done:  # argparse, after --help and --version; or add_arguments()
        return end_by_exit(done.code)
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


def end_by_exit(code: Any) -> int:
    """Return the exit code that sys.exit() has for what it is given, of which it says a text."""
    if code is None or isinstance(code, int):
        return int(code or EXIT_SUCCESS)
    say(str(code))
    return EXIT_FAILED


def find_name() -> str:
    """Return the name of a pipeline that has none: that of its file, or of the folder around an
    orchestrator.py.
    """
    file = getattr(sys.modules["__main__"], "__file__", None) or "pipeline"
    folder, name = os.path.split(os.path.splitext(os.path.abspath(file))[0])
    return os.path.basename(folder) or "pipeline" if name == "orchestrator" else name


def check_not_hidden(yours: Mapping[str, Any]) -> None:
    """Raise UserError if the engine's names hide the user's, or the user's those of Python."""
    import builtins
    names = [name for name in yours if not name.startswith("__")]
    hidden = [name for name in names if globals()[name] is not yours[name]]
    if hidden:
        raise UserError("Above the ENGINE mark, the engine's own names hide yours: "
                        + ", ".join(hidden) + ".",
                        "Rename yours, or put them into a module of your own.")
    hiding = [name for name in names if getattr(builtins, name, yours[name]) is not yours[name]
              and engine_uses(name)]
    if hiding:
        raise UserError("Above the ENGINE mark, your names hide Python's own, which the engine "
                        "uses: " + ", ".join(hiding) + ".",
                        "Rename yours, or import single names instead of *.")


def engine_uses(name: str, code: Any = _CODE) -> bool:
    """Return whether a function of the engine names something so."""
    return code is not _CODE and name in code.co_names or any(
        engine_uses(name, each) for each in code.co_consts
        if getattr(each, "co_firstlineno", 0) > _ENGINE_LINE)


HOOKS = ("TOOL_MAP", "STAGES", "LIMITS", "get_connection", "add_arguments")


def check_spelling(yours: Mapping[str, Any]) -> None:
    """Raise UserError if a hook is missing, but a name very near to it is there."""
    errors = [UserError(f"There is no {hook} above the ENGINE mark, but {name!r}.",
                        f"Did you mean {hook}? If not, choose a name that is less like it.")
              for hook in HOOKS if hook not in yours for name in find_near(hook, yours)]
    if errors:
        raise merge_errors(errors)


def find_near(hook: str, yours: Mapping[str, Any]) -> List[str]:
    """Return the table or function, as the hook is one, that was most likely meant for it."""
    is_table = hook.isupper()
    names = {name.lower(): name for name, value in yours.items()
             if (isinstance(value, Mapping) if is_table else callable(value))
             and name[0] != "_" and name not in HOOKS
             and len(set(hook.lower()) ^ set(name.lower())) < 4}  # difflib takes 2 ms to import
    if not names:
        return []
    from difflib import get_close_matches
    found = get_close_matches(hook.lower(), names, 1, 0.8 if is_table else 0.9)
    return [names[name] for name in found]


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are UserErrors, and whose help is output like any."""

    def _print_message(self, message: str, file: Any = None) -> None:
        show(message, end="")

    def format_help(self) -> str:
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

    def error(self, message: str) -> Any:
        """Raise UserError with argparse's sentence."""
        raise UserError(message[:1].upper() + message[1:] + ".", f"See {self.prog} --help.")


def make_parser(add_arguments: Optional[Callable[[Any], None]]) -> Tuple[Parser, List[str]]:
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


def check_flags(flags: Mapping[str, str], engines: Iterable[str]) -> None:
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

    def __init__(self, *args: Any, command: Callable[..., int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.command, namespace.operand = self.command, values or None


class Once(argparse.Action):
    """A flag that would say two things if it were given twice."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) not in (None, values):
            parser.error(f"{option} was given twice")
        setattr(namespace, self.dest, values)


def read_wait_s(text: str) -> float:
    """Return how long --wait waits."""
    try:
        return parse_duration_s(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no duration like "10m"; write targets before the flag') from None


def read_whole(text: str) -> int:
    """Return a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def check_companions(options: Any) -> None:
    """Raise UserError for a flag that says nothing beside the command that was given."""
    command = options.command.__name__[len("command_"):]
    for flag, commands in [("json", ("list", "plan", "status", "history", "logs", "items")),
                           ("failed", ("items",)), ("last", ("history",)), ("run", ("logs",)),
                           ("tail", ("logs",)), ("follow", ("logs",))]:
        if getattr(options, flag) not in (None, False) and command not in commands:
            raise UserError(f"--{flag} goes with --{', --'.join(commands)}.",
                            "Add one of them." if len(commands) > 1 else "Add it.")
    for flag in ("step", "reverse", "reprocess"):
        if getattr(options, flag) and not options.backfill:
            raise UserError(f"--{flag} goes with --backfill.", "Add it: --backfill A..B.")
    if options.backfill and (options.resume is not None or options.no_history):
        raise UserError("--backfill looks into the history for what is done, and goes on there; it "
                        f"does not go with --{'no-history' if options.no_history else 'resume'}.",
                        "Leave that out.")


def add_flags(parser: Parser) -> None:
    """Declare the engine's own flags."""
    run = parser.add_argument_group("what to run")
    run.add_argument("targets", nargs="*", default=[], metavar="TARGET",
                     help='stages and tools; +TOOL adds all that it needs, TOOL+ all that needs '
                          'it; none means the stage "full", or else every tool')
    run.add_argument("--exclude", action="append", default=[], metavar="NAME",
                     help="leave out this tool or stage (may be repeated)")
    run.add_argument("--from", dest="start_from", metavar="NAME",
                     help="begin at this tool or stage, leaving out what is before it")
    run.add_argument("-j", "--jobs", type=int, default=1, metavar="N",
                     help="run up to N tools side by side; 0 means one for each core")
    run.add_argument("-x", "--fail-fast", action="store_true",
                     help="start nothing more after the first failure")
    run.add_argument("--resume", nargs="?", const="", metavar="RUN",
                     help="go on with the last run that did not succeed, or with that one")
    run.add_argument("--force", action="store_true",
                     help="run cached tools too, and do without needs that never succeeded")
    run.add_argument("--item", metavar="NAME", action=Once,
                     help="do only this item of a tool that has items")
    run.add_argument("--retry-items", nargs="+", action="append", default=[],
                     metavar=("TOOL", "ITEM"),
                     help="try items again that were given up: these, or all of the tool")
    run.add_argument("--backfill", metavar="A..B", help="run once per period from day A to day B, "
                     "which tools get as period_start and period_end (the day after the last)")
    run.add_argument("--step", choices=STEPS, help="with --backfill: how long a period is (day)")
    run.add_argument("--reverse", action="store_true", help="with --backfill: the last one first")
    run.add_argument("--reprocess", choices=("failed", "all"),
                     help="with --backfill: run periods again that failed, or all")
    run.add_argument("--wait", nargs="?", type=read_wait_s, const=float("inf"), default=0.0,
                     metavar="DURATION", help="wait for another run of this pipeline to end")
    run.add_argument("--no-history", action="store_true",
                     help="keep no history, and take no lock")
    add_commands(parser.add_argument_group("looking and tidying, without running anything"))
    other = parser.add_argument_group("other")
    other.add_argument("-v", "--verbose", action="store_true",
                       help="show the engine's part of tracebacks, and debug logs")
    other.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    other.add_argument("--version", action="version", help="show the versions and exit",
                       version=f"orchestrator.py {VERSION}, Python {sys.version.split()[0]}")
    other.add_argument("-h", "--help", action="help", help="show this help and exit")


def add_commands(look: Any) -> None:
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
    look.add_argument("--last", type=read_whole, metavar="N", help="with --history: so many runs")
    look.add_argument("--run", metavar="RUN", help="with --logs: of that run")
    look.add_argument("--tail", type=read_whole, metavar="N", help="with --logs: the last N lines")
    look.add_argument("--follow", action="store_true",
                      help="with --logs: go on while the run goes on")
    look.add_argument("--failed", action="store_true",
                      help="with --items: those that failed, with their errors")
    look.add_argument("--json", action="store_true", help="print JSON for programs")


def parse_arguments(add_arguments: Optional[Callable[[Any], None]], argv: Sequence[str],
                    with_defaults: bool = True) -> Tuple[Any, Dict[str, Any]]:
    """Return the engine's options, and apart from them the arguments that tools get.

    What add_arguments() requires is so for a run, not for looking, nor for a resume, which takes
    it from the run.
    """
    parser, names = make_parser(add_arguments)
    required = [each for each in (*parser._actions, *parser._mutually_exclusive_groups)
                if each.required]
    for each in required:
        each.required = False
    if not with_defaults:
        parser._defaults.clear()
        for action in parser._actions:
            action.default = argparse.SUPPRESS if action.dest in names else action.default
    options, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"There is no flag {unknown[0]!r}.",
                        format_nearest(unknown[0].partition("=")[0], flags))
    check_companions(options)
    if required and options.command is command_run and options.resume is None:
        for each in required:  # argparse itself says which of them is missing
            each.required = True
        parser.parse_known_intermixed_args(argv)
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

    def parse(self, words: Sequence[str], with_defaults: bool) -> Tuple[Any, Dict[str, Any]]:
        """Read words anew, with or without the defaults of add_arguments()."""
        return parse_arguments(self.add_arguments, words, with_defaults)

    def find_said(self) -> Dict[str, str]:
        """Return the arguments of tools that are on the command line, each with its flag.

        One whose action is of the user's own is left out: it may do something by itself.
        """
        _, arguments = self.parse(self.argv, False)
        parser, _ = make_parser(self.add_arguments)
        return {action.dest: action.option_strings[0] for action in parser._actions
                if action.dest in arguments and type(action).__module__ == "argparse"}


def open_history(call: Call) -> NoHistory:
    """Return the history to look at, without its lock; one that knows nothing if there is none."""
    if call.options.no_history or not os.path.exists(os.path.join(call.folder, "history.db")):
        return NoHistory()
    return History(call.folder, call.base)


def need_history(call: Call) -> History:
    """Return the history to look at. Raise UserError if there is none."""
    history = open_history(call)
    if not isinstance(history, History):
        others = find_histories(os.path.dirname(call.folder))
        raise UserError(f"There is no history in {format_path(call.folder)}.",
                        "Nothing has been run yet, or it was run with --no-history."
                        + (f" There is one of {', '.join(others)}: a pipeline is known by its "
                           "NAME, else its file's or folder's." if others else ""))
    return history


def look_at(history: NoHistory, call: Call) -> NoHistory:
    """Return a history as it is at this moment, in which a run that was killed reads so."""
    if isinstance(history, History):
        was_held = is_held(call.folder)
        history.hold_still()
        running = history.find_running()
        if running and not was_held and not is_held(call.folder):
            history.killed = running["run_id"]
    return history


def find_tools(call: Call) -> List[str]:
    """Return the tools to show: those of the targets, or without any all."""
    if not call.options.targets:
        return list(call.pipeline.tools)
    return [step.tool for step in make_plan(call.pipeline, call.options.targets).steps]


def check_tool(call: Call, name: str) -> None:
    """Raise UserError if there is no tool of that name."""
    if name not in call.pipeline.tools:
        raise UserError(f"There is no tool {name!r}.", format_nearest(name, call.pipeline.tools))


def answer(call: Call, shown: Mapping[str, Any],
           format_text: Callable[[Mapping[str, Any], Style], str]) -> int:
    """Show what a command was asked for, as text or as JSON."""
    show(to_json(shown) if call.options.json else format_text(shown, make_style(sys.stdout)))
    return EXIT_SUCCESS


def command_list(call: Call) -> int:
    """Show the tools and stages; with targets, those that belong to them."""
    tools = find_tools(call)
    try:
        history = look_at(open_history(call), call)
        shown = make_list(call.pipeline, tools, find_summary, history.find_last)
    except UserError as error:  # of the history, without which there is still a list
        say(str(error))
        shown = make_list(call.pipeline, tools, find_summary, NoHistory().find_last)
    return answer(call, shown, format_list)


def command_plan(call: Call) -> int:
    """Show the plan; of a backfill, the periods."""
    check_are_taken(call.arguments, {}, call.pipeline.tools, call.find_said)
    if call.options.backfill:
        periods = find_periods(call, open_history(call))
        return answer(call, make_backfill_view(periods), format_backfill)
    plan, _, _ = find_plan(call, open_history(call))
    show(to_json(make_plan_view(plan)) if call.options.json
         else format_plan(plan, make_style(sys.stdout)))
    return EXIT_SUCCESS


def command_check(call: Call) -> int:
    """Report all mistakes in the tables and in the modules that they name."""
    pipeline = call.pipeline
    if not pipeline.mistakes:
        for target in call.options.targets:
            expand_target(pipeline, target)
    mistakes = [*pipeline.mistakes, *find_wrong_each(pipeline, pipeline.tools.values()),
                *find_mistakes(pipeline.tools.values(),
                               {*call.arguments, *PERIOD_ARGUMENTS, "conn", "context"})]
    for mistake in mistakes:
        show(str(mistake))
    show(f"{format_plural(len(pipeline.tools), 'tool')} read, "
         f"{format_plural(len(mistakes) or 'no', 'mistake')} found")
    return EXIT_USAGE if mistakes else EXIT_SUCCESS


def command_status(call: Call) -> int:
    """Show how each tool ended last, and what runs now."""
    history = look_at(need_history(call), call)
    tools = find_tools(call)
    running, attempts = (None, []) if history.killed else find_running(history)
    lasts = {tool: history.find_last(tool) for tool in tools}
    shown = make_status(tools, lasts.get, running, attempts, Clock().wall(),
                        count_items_of(call, history, lasts))
    return answer(call, shown, format_status)


def count_items_of(call: Call, history: NoHistory,
                   lasts: Mapping[str, Optional[Row]]) -> Dict[str, Dict[str, int]]:
    """Return how many items have each status, for the tools that had items when they ran last;
    `lasts` gives the newest row of each.
    """
    import json
    lasts = {tool: last if last["attempt"] else history.find_last(tool, 1)
             for tool, last in lasts.items() if last}
    counts: Dict[str, Dict[str, int]] = {}
    having = {tool: last for tool, last in lasts.items() if last and last["items"]}
    if having:
        with open_connection(call) as conn:
            for tool, last in having.items():
                ledger = open_ledger(call, conn, tool)
                if ledger is not None:
                    counts[tool] = count_statuses(json.loads(last["items"]),
                                                  ledger.count(last["started_at"]))
                    ledger.close()
    return counts


@contextlib.contextmanager
def open_connection(call: Call) -> Iterator[Any]:
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


def open_ledger(call: Call, conn: Any, tool: str) -> Optional[Ledger]:
    """Return the ledger of a tool, to look at; None if there is none yet."""
    if not keeps_ledger(conn) and not isinstance(open_history(call), History):
        return None
    ledger = Ledger(conn, find_ledger_path(call.folder), call.pipeline.name, tool, "", "")
    if ledger.is_there():
        return ledger
    ledger.close()
    return None


def command_items(call: Call) -> int:
    """Show the items of a tool that were tried, or those that failed."""
    options = call.options
    tool, *names = options.operand
    check_tool(call, tool)
    if not has_items(call.pipeline.tools[tool]):
        raise UserError(f"{tool} has no items.", "A tool has items if its module has a function "
                        'items(), or if TOOL_MAP says "each" of it.')
    wanted = ITEM_STATUSES[1:] if options.failed else ITEM_STATUSES
    found, count = [], 0
    with open_connection(call) as conn:
        ledger = open_ledger(call, conn, tool)
        rows = ledger.load_items(wanted, "") if ledger else []
        while rows:
            page = [make_item_view(row) for row in rows if not names or row["item"] in names]
            count += len(page)
            if options.json:
                found += page
            elif page:
                show(format_items(page, make_style(sys.stdout)))
            rows = ledger.load_items(wanted, rows[-1]["item"])
        if ledger:
            ledger.close()
    if options.json:
        show(to_json({"items": found}))
    elif not count:
        which = " or ".join(map(format_name, names)) or "item"
        say(f"No {which} of {tool} has {'failed' if options.failed else 'been tried'}.")
    return EXIT_SUCCESS


def command_history(call: Call) -> int:
    """Show the last runs, or all that is known of one."""
    history, options = look_at(need_history(call), call), call.options
    if options.operand:
        run = history.find_run(options.operand)
        attempts = history.load_attempts(run)
        for row in attempts:
            row["log"] = row["log"] and format_path(os.path.join(call.folder, row["log"]))
        return answer(call, {"runs": [make_run_view(run, attempts, is_detailed=True)]}, format_run)
    runs = history.load_last_runs(10 if options.last is None else options.last)
    views = [make_run_view(run, history.load_attempts(run)) for run in runs]
    return answer(call, {"runs": views}, format_runs)


def command_logs(call: Call) -> int:
    """Show what tools printed: in the last run or another, all tools or one."""
    history, options = need_history(call), call.options
    tool = options.operand
    if tool:
        check_tool(call, tool)
    last = history.find_last(tool, 1) if tool and not options.run else None
    run_id = options.run or (str(last["run_id"]) if last else None)
    runs = [history.find_run(run_id)] if run_id else history.load_last_runs(1)
    shown: Dict[str, int] = {}  # by log: how much of it was shown
    logs: List[Dict[str, Any]] = []
    is_over = not options.follow
    for run in runs:
        while True:
            for row in history.load_attempts(run):
                if tool in (None, row["tool"]) and row["attempt"]:
                    log = find_log(find_logs(call.folder, str(run["run_id"])), row["tool"],
                                   row["attempt"])
                    logs += find_new_lines(row, log, shown, options)
            if is_over:
                break
            is_over = not is_held(call.folder)  # and look once more
            Clock().sleep(0.2)
    if options.json:
        show(to_json({"logs": logs}))
    elif not shown:
        say("Nothing was printed.")
    return EXIT_SUCCESS


def find_new_lines(row: Row, log: str, shown: Dict[str, int],
                   options: Any) -> Iterator[Dict[str, Any]]:
    """Show what is new in a log, or yield it for --json; note in `shown` how far that is."""
    if not has_bytes(log):
        return
    is_new = log not in shown
    if is_new and options.tail is not None:
        shown[log] = os.path.getsize(log)
        lines = read_tail(log, options.tail)
    else:
        with open(log, "rb") as file:
            file.seek(shown.get(log, 0))
            content = file.read()
        if row["status"] == "running":
            content = content[:content.rfind(b"\n") + 1]  # whole lines
        shown[log] = shown.get(log, 0) + len(content)
        lines = clean(content.decode("utf-8", "replace")).splitlines()
    if options.json:
        if is_new or lines:
            yield {"run_id": str(row["run_id"]), "tool": row["tool"], "attempt": row["attempt"],
                   "status": row["status"], "path": log, "lines": lines}
        return
    if is_new and not options.operand:
        show(make_style(sys.stdout).bold(f"{row['tool']}, attempt {row['attempt']} ({log}):"))
    for line in lines:
        show(line)


@contextlib.contextmanager
def change_history(call: Call) -> Iterator[History]:
    """Hold the history to write to it, in which a run that was killed is closed, and say so."""
    with hold_history(call.folder, call.base, call.options.wait) as history:
        run_id, tools = history.close_killed()
        if run_id:
            where = f"at {', '.join(tools)}" if tools else "between two tools"
            say(f"Run {run_id} was cut off {where}; it is recorded as interrupted.")
        yield history


def command_mark_done(call: Call) -> int:
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


def command_prune(call: Call) -> int:
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


def command_run(call: Call) -> int:
    """Run the plan, and tell on stderr how it goes."""
    if call.options.no_history:
        return carry_out(call, NoHistory())
    with change_history(call) as history:
        return (backfill if call.options.backfill else carry_out)(call, history)


def find_periods(call: Call, history: NoHistory) -> List[Period]:
    """Return the periods of --backfill, in order, with what is to be done of each."""
    options = call.options
    request = Request(tuple(options.targets), tuple(options.exclude), options.start_from,
                      item=options.item)
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
    find_last = history.find_last_like if isinstance(history, History) else lambda *_: None
    periods = [decide_period(period, find_last(
        request, {**call.arguments, **period.arguments()}), options.reprocess or "", today)
        for period in periods]
    return periods[::-1] if options.reverse else periods


def backfill(call: Call, history: History) -> int:
    """Run the plan once per period that is not done, and tell how each went."""
    periods = find_periods(call, history)
    left = [period for period in periods if period.action != "skip"]
    codes: Dict[str, int] = {}
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


def find_run_to_resume(call: Call, history: History) -> Row:
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


def find_plan(call: Call, history: NoHistory,
              period: Optional[Period] = None) -> Tuple[Plan, Request, Dict[str, Any]]:
    """Return the plan, what was asked for, and the arguments of the tools; with --resume, those
    of the run that is resumed.
    """
    options, arguments, done = call.options, call.arguments, {}
    request = Request(tuple(options.targets), tuple(options.exclude), options.start_from,
                      tuple(call.argv), item=options.item)
    if period:
        arguments = {**arguments, **period.arguments()}
        if period.action == "resume":
            request = request._replace(resumes=period.run_id)
            done = history.find_done(period.run_id)
    elif options.resume is not None:
        check_nothing_beside_resume(call)
        # No second connection: a worker would inherit it, and close it over the first one's head.
        history = history if isinstance(history, History) else need_history(call)
        run = find_run_to_resume(call, history)
        request = make_request(run)
        said, now = (None, None) if run["words"] is None else call.parse(run["words"], True)
        arguments = read_arguments(run, now)
        if options.item is not None:
            request = request._replace(item=options.item)
        elif said and request.item is None:
            request = request._replace(item=said.item)
        done = history.find_done(run["run_id"])
    has_database = call.pipeline.get_connection is not no_connection
    described: Dict[Any, str] = {}  # tools may share a module, which is read once

    def describe(tool: Tool) -> str:
        key = tool.module, tool.each, tool.commits
        if key not in described:
            described[key] = describe_items(tool, has_database)
        return described[key]

    jobs = count_jobs(options.jobs)
    past = None if options.no_history else make_past(
        call.pipeline, history, arguments, Clock().wall(), done, options.force,
        jobs > 1 or options.command is command_plan)
    plan = make_plan(call.pipeline, request.targets, exclude=request.exclude,
                     start_from=request.start_from, jobs=jobs, past=past,
                     describe=describe if options.command is command_plan else lambda tool: "")
    if options.resume is not None:
        tell_changes(call.pipeline, run, plan)
    return plan, request, arguments


def check_nothing_beside_resume(call: Call) -> None:
    """Raise UserError for words beside --resume that the resumed run itself says."""
    options = call.options
    given = [*options.targets, *(f"--exclude {name}" for name in options.exclude),
             *["--from"] * bool(options.start_from), *["--no-history"] * options.no_history]
    given += [f"--{name.replace('_', '-')}" for name in call.parse(call.argv, False)[1]]
    if given:
        raise UserError(f"--resume takes targets, arguments and exclusions from the run that it "
                        f"goes on with; it does not go with {' '.join(given)}.",
                        "Leave that out, or leave out --resume.")


def tell_changes(pipeline: Pipeline, run: Row, plan: Plan) -> None:
    """Say what changed since a run that is resumed, and which of that is not run again."""
    tools = {step.tool: pipeline.tools[step.tool] for step in plan.steps}
    now = find_versions(pipeline, tools.values())
    changed = [module for module, source in now.sources.items()
               if run["sources"].get(module, source) != source]
    what = ["the tables"] * (now.tables != run["tables"]) + changed
    kept = [step.tool for step in plan.steps if step.success
            and tools[step.tool].module in changed]
    if what:
        say(f"Changed since run {run['run_id']}: {', '.join(what)}."
            + (f" Done before, and not run again: {', '.join(kept)}." if kept else ""))


def carry_out(call: Call, history: NoHistory, period: Optional[Period] = None) -> int:
    """Run the plan, for a period if there is one, and tell on stderr how it goes."""
    options = call.options
    plan, request, arguments = find_plan(call, history, period)
    # Descriptors of its own: what tools print is led into their logs meanwhile.
    stream, out = sys.stderr, sys.stdout
    if history.folder:
        stream, out = own_stream(stream, 2), own_stream(out, 1, "wb")
    screen = Screen(stream, options.quiet, options.verbose, out)
    gc.freeze()  # what is here will stay: no collection during the run need walk it
    result = run_plan(call.pipeline, plan, arguments, history=history, request=request,
                      fail_fast=options.fail_fast, verbose=options.verbose, keep_results=False,
                      retry_items=None if period and options.reprocess
                      else read_retries(options.retry_items),
                      on_event=screen.on_event, find_said=call.find_said)
    if not options.quiet or result.status != "success":
        for tail in screen.tails.values():
            say("\n" + tail)
        next_command = "" if period else make_next_command(result, call)
        say(format_summary(result, next_command, screen.style))
    if result.status == "interrupted":
        return EXIT_SIGNAL + (result.signal or SIGINT)
    return EXIT_FAILED if result.status == "failed" or screen.has_lost else EXIT_SUCCESS


def read_retries(given: Sequence[Sequence[str]]) -> Dict[str, Tuple[str, ...]]:
    """Return what --retry-items asks for, by tool; all items of a tool where none is named."""
    retries: Dict[str, Tuple[str, ...]] = {}
    for tool, *items in given:
        is_all = not items or tool in retries and not retries[tool]
        retries[tool] = () if is_all else (*retries.get(tool, ()), *items)
    return retries


class Screen:
    """The listener of a run on the command line: one line per event, one live line."""

    def __init__(self, stream: Any, quiet: bool, verbose: bool,
                 out: Any = None) -> None:
        self.stream, self.quiet, self.style = stream, quiet, make_style(stream)
        self.out = sys.stdout if out is None else out  # takes what tools print in workers
        self.is_terminal = stream is not None and stream.isatty()
        self.width = 0
        self.shown_s = 0.0
        self.started_s: Dict[str, float] = {}  # by tool that runs
        self.is_live = False  # whether the last line is a live one, to be written over
        self.follows = verbose  # whether workers' output is shown at once
        self.outputs: Dict[str, Tuple[str, int]] = {}  # by tool: file, how much of it was shown
        self.log_level = 10 if verbose else 30 if quiet else 20  # DEBUG, WARNING, INFO
        self.has_lost = False  # whether what tools printed did not reach stdout
        self.tails: Dict[str, str] = {}  # by tool that failed: what it printed last

    def on_event(self, event: Event) -> None:
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
                self.tails[event.tool] = format_tail(
                    event.tool, format_path(event.outcome.log), tail, self.style)
        elif event.kind == "tick" and self.follows:
            for tool in list(self.outputs):
                self.show_output(tool, is_whole=False)

    def show_output(self, tool: str, is_whole: bool) -> None:
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
        with open(file, "rb") as source:
            source.seek(shown)
            while True:
                piece = source.read(1 << 20)
                if not is_whole or self.follows:
                    piece = piece[:piece.rfind(b"\n") + 1] or piece[:len(piece) * is_whole]
                if not piece:
                    break
                shown += len(piece)
                source.seek(shown)
                if self.follows:
                    name = tool.encode() + b" | "
                    piece = b"".join(name + line for line in piece.splitlines(keepends=True))
                problem = write_bytes(self.out, piece)
                if problem and self.out is not sys.stdout and not self.has_lost:
                    self.has_lost = True
                    self.write(f"stdout could not be written: {problem}; --logs shows all of it")
        if not is_whole:
            self.outputs[tool] = file, shown

    def show(self, event: Event) -> None:
        """Write the line of an event, unless only failures are wanted."""
        if not self.quiet or event.kind == "log" or event.outcome and event.outcome.error:
            self.write(format_event(event, self.width, self.style))

    def show_live(self, event: Event) -> None:
        """Write the live line, on a terminal and at most ten times a second."""
        if self.is_terminal and not self.quiet and event.at - self.shown_s >= 0.1:
            self.shown_s, self.is_live = event.at, True
            line = format_progress(event, self.width, event.at - self.started_s[event.tool])
            say("\r" + line[:find_columns(self.stream) - 1] + "\x1b[K", self.stream, end="")

    def write(self, text: str) -> None:
        """Write a line, over the live one."""
        if self.is_live:
            self.is_live = False
            text = "\r\x1b[K" + text
        try:
            sys.stdout.flush()  # what the tool printed belongs before what we say of it
        except (AttributeError, OSError, ValueError):
            pass  # it is closed
        say(text, self.stream)


def own_stream(stream: Any, fd: int, mode: str = "w") -> Any:
    """Return a second stream to where stdout or stderr leads, where that is no terminal."""
    if not is_own_fd(stream, fd) or stream.isatty():
        return stream
    if mode == "wb":  # without a buffer, in which what can not be written would stay
        return open(os.dup(fd), mode, buffering=0)
    return open(os.dup(fd), mode, encoding=stream.encoding, errors=stream.errors)


def find_columns(terminal: Any) -> int:
    """Return the width of a terminal, or what is usual where it does not tell."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def write_bytes(stream: Any, content: bytes) -> str:
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


def show(text: str, end: str = "\n") -> None:
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


def is_open(stream: Any) -> bool:
    """Return whether a stream can be written to; one that is detached says so by an error."""
    try:
        return not stream.closed
    except (AttributeError, ValueError):
        return False


def fit(text: str, stream: Any) -> str:
    """Return a text in which letters that a stream can not show are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, stream: Any = None, end: str = "\n") -> None:
    """Write a line to stderr: what there is to say beside that."""
    stream = sys.stderr if stream is None else stream
    try:
        stream.write(fit(text, stream) + end)
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


def make_next_command(result: RunResult, call: Call) -> str:
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


def find_program() -> Tuple[str, ...]:
    """Return the words that start this program: `python orchestrator.py`, `python -m package`.

    To be asked before a tool is imported, which may change what they are made of.
    """
    python = os.path.basename(sys.executable or "python")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (python, "-m", spec.name) if spec else (python, *sys.argv[:1])


def format_command(call: Call, *words: str) -> str:
    """Return how one would start this program with other words, in the system's shell."""
    words = (*call.program, *words)
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


if __name__ == "__main__":
    _EXIT_CODE = main(
        _YOURS.get("TOOL_MAP"), _YOURS.get("STAGES"), _YOURS.get("get_connection"),
        name=_YOURS.get("NAME"), add_arguments=_YOURS.get("add_arguments"),
        limits=_YOURS.get("LIMITS"), yours=_YOURS)
    gc.freeze()  # the interpreter's last collections would take 10 ms to walk all of this
    sys.exit(_EXIT_CODE)
