"""The vocabulary: errors, nearest words, durations, sizes, retry delays, statuses and moves."""
import doctest
import math
import random
import re

import pytest

import orchestrator
from orchestrator import (
    MOVES, Tool, UserError, check_mistakes, check_move, format_duration, format_nearest,
    parse_bytes, parse_duration_s, retry_delay_s,
)

LEGAL = [("pending", "running"), ("pending", "skipped"), ("running", "success"),
         ("running", "failed"), ("running", "interrupted")]
ILLEGAL = [("pending", "pending"), ("pending", "success"), ("pending", "failed"),
           ("pending", "interrupted"), ("running", "running"), ("running", "pending"),
           ("running", "skipped"), ("success", "running"), ("success", "failed"),
           ("failed", "running"), ("failed", "success"), ("skipped", "running"),
           ("interrupted", "running"), ("interrupted", "success")]


def test_an_error_reads_as_its_problem_and_then_its_fix_indented():
    error = UserError("No tool 'fetc'.", "Did you mean 'fetch'?\nSee --list.")

    assert str(error) == "No tool 'fetc'.\n  Did you mean 'fetch'?\n  See --list."
    assert (error.problem, error.fix) == ("No tool 'fetc'.", "Did you mean 'fetch'?\nSee --list.")


def test_an_error_without_a_fix_is_one_line():
    assert str(UserError("Nothing is left to run.")) == "Nothing is left to run."


def test_no_mistakes_are_no_error():
    check_mistakes([])


def test_a_single_mistake_is_raised_as_it_is():
    error = UserError("a", "b")

    with pytest.raises(UserError) as caught:
        check_mistakes([error])
    assert caught.value is error


def test_an_error_of_several_mistakes_keeps_every_problem_with_its_own_fix_in_order():
    with pytest.raises(UserError) as caught:
        check_mistakes([UserError("one", "mend one"), UserError("two", "mend two")])

    assert str(caught.value) == "one\n  mend one\ntwo\n  mend two"


@pytest.mark.parametrize("word, known, said", [
    ("fetc", ["parse", "fetch"], "Did you mean 'fetch'?"),
    ("fetch_c", ["fetch_a", "fetch_b", "render"], "Did you mean 'fetch_b' or 'fetch_a'?"),
    ("zzz", ["fetch", "parse"], "Known: fetch, parse"),
    ("zzz", [], "Known: none"),
    ("LOAD", ["parse", "load"], "Did you mean 'load'?"),
])
def test_an_unknown_word_is_answered_with_near_ones_or_else_with_all(word, known, said):
    assert format_nearest(word, known) == said


def test_at_most_three_near_words_are_offered():
    assert format_nearest("tool_x", [f"tool_{i}" for i in range(9)]).count("tool_") == 3


def test_at_most_twenty_known_words_are_listed_and_the_rest_is_hinted_at():
    names = [f"name{i:02d}" for i in range(21)]

    assert format_nearest("zzz", names[:20]).endswith("name19")
    assert format_nearest("zzz", names).endswith("name19, ...")


def test_known_words_may_come_from_an_iterator():
    assert format_nearest("zzz", iter(["fetch", "parse"])) == "Known: fetch, parse"


@pytest.mark.parametrize("seconds, said", [
    (None, ""), (0, "0.00 s"), (0.123, "0.12 s"), (9.99, "9.99 s"), (9.996, "10.0 s"),
    (42, "42.0 s"), (59.94, "59.9 s"), (59.96, "1m 00s"), (60, "1m 00s"), (65, "1m 05s"),
    (119.6, "2m 00s"), (3599.4, "59m 59s"), (3599.6, "1h 00m"), (7380, "2h 03m"),
    (90_061, "25h 01m"),
])
def test_a_duration_is_said_in_its_largest_two_units(seconds, said):
    assert format_duration(seconds) == said


@pytest.mark.parametrize("seed", range(3))
def test_no_duration_says_sixty_of_a_unit_or_needs_more_than_eight_columns(seed):
    chance = random.Random(seed)
    for _ in range(2000):
        said = format_duration(chance.choice([1, 10, 100, 4000, 300_000]) * chance.random())
        assert len(said) <= 8
        assert not re.search(r"(?<![\d.])60(\.0+ s|s|m)", said)


@pytest.mark.parametrize("text, seconds", [
    ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h 30m", 5400), ("24h", 86_400), ("7d", 604_800),
    ("1d2h3m4s", 93_784), ("0.5s", 0.5), ("1.5h", 5400), ("0s", 0),
    (0, 0), (30, 30), (0.25, 0.25), (10**9, 10**9),
])
def test_a_duration_is_a_number_of_seconds_or_a_text_with_units(text, seconds):
    assert parse_duration_s(text) == seconds
    assert isinstance(parse_duration_s(text), float)


NO_DURATIONS = [
    "", " ", "90", "s", "90 seconds", "90sec", "10M", "1h30", "1:30", "-5s", "+5s", "5s-", ".5s",
    "5.s", "1e3s", "1,5s", "1.2.3s", "9 0s", "ten minutes", "nan", "inf", "7w", "1ms",
    -1, -0.5, math.nan, math.inf, -math.inf, True, False, None, [], ["90s"], {}, b"90s", 5j,
    pytest.param(10**400, id="10**400"), pytest.param("9" * 400 + "s", id="400 digits")]


@pytest.mark.parametrize("value", NO_DURATIONS)
def test_what_is_no_duration_is_a_value_error(value):
    with pytest.raises(ValueError):
        parse_duration_s(value)


@pytest.mark.parametrize("text, size", [
    ("1B", 1), ("512MB", 512 * 2**20), ("2GB", 2 * 2**30), ("1.5 KB", 1536), ("1TB", 2**40),
    ("0.5GB", 2**29), (1, 1), (4096, 4096),
])
def test_a_size_is_a_number_of_bytes_or_a_text_with_a_unit(text, size):
    assert parse_bytes(text) == size
    assert isinstance(parse_bytes(text), int)


NO_SIZES = [
    "", "512", "MB", "512M", "512mb", "512MiB", "5PB", "-2GB", "+2GB", "2 G B", "1.5.5MB", "0MB",
    "0.1B", "nan", "infGB", "1e3MB", 0, -1, 1.5, 2.0, math.nan, math.inf, True, False, None, [], {},
    b"2GB", "99999999TB", 2**63,
    pytest.param("9" * 400 + "GB", id="400 digits")]


@pytest.mark.parametrize("value", NO_SIZES)
def test_what_is_no_size_is_a_value_error(value):
    with pytest.raises(ValueError):
        parse_bytes(value)


# --- how long to wait before another try ---

def delays(count, random=lambda: 0.0, **options):
    """Return the delays after the first `count` attempts."""
    tool = Tool("t", "m", **options)
    return [retry_delay_s(tool, attempt, random) for attempt in range(1, count + 1)]


def test_by_default_the_delay_is_thirty_seconds_and_doubles_up_to_an_hour():
    assert delays(10) == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


@pytest.mark.parametrize("options, wanted", [
    ({"retry_delay_s": 5}, [5, 10, 20, 40]),
    ({"retry_delay_s": 5, "retry_factor": 1}, [5, 5, 5, 5]),
    ({"retry_delay_s": 2, "retry_factor": 1.5}, [2, 3, 4.5, 6.75]),
    ({"retry_delay_s": 5, "retry_factor": 3, "retry_max_delay_s": 20}, [5, 15, 20, 20]),
    ({"retry_delay_s": 60, "retry_max_delay_s": 10}, [10, 10, 10, 10]),
    ({"retry_delay_s": 0}, [0, 0, 0, 0]),
    ({"retry_max_delay_s": 0}, [0, 0, 0, 0]),
])
def test_the_delay_grows_by_its_factor_up_to_its_most(options, wanted):
    assert delays(4, **options) == wanted


@pytest.mark.parametrize("factor", [1.0, 2, 10, 1e6])
@pytest.mark.parametrize("delay_s, wanted", [(30, 3600), (0, 0), (1e-300, 3600), (1e300, 3600)])
def test_the_ten_thousandth_attempt_waits_the_most_and_overflows_nothing(delay_s, factor, wanted):
    tool = Tool("t", "m", retry_delay_s=delay_s, retry_factor=factor)

    for attempt in (10_000, 10**9):
        assert retry_delay_s(tool, attempt) == (wanted if factor > 1 else min(delay_s, 3600))


@pytest.mark.parametrize("seed", range(20))
def test_jitter_takes_at_most_its_share_of_the_delay_away_and_never_adds_any(seed):
    chance = random.Random(seed)
    jitter, factor = chance.random(), 1 + 3 * chance.random()
    options = {"retry_delay_s": 100 * chance.random(), "retry_factor": factor,
               "retry_max_delay_s": 500 * chance.random()}

    whole = delays(50, **options)
    shortened = delays(50, chance.random, **options, retry_jitter=jitter)

    for full_s, delay_s in zip(whole, shortened):
        assert full_s * (1 - jitter) <= delay_s <= full_s
    assert len({full_s / delay_s for full_s, delay_s in zip(whole, shortened)}) > 40
    assert delays(50, chance.random, **options) == whole  # no jitter unless it is asked for


# --- statuses ---

@pytest.mark.parametrize("old, new", LEGAL)
def test_a_legal_move_returns_the_new_status(old, new):
    assert check_move(old, new) == new


@pytest.mark.parametrize("old, new", ILLEGAL)
def test_an_illegal_move_is_a_failure_that_names_both_statuses(old, new):
    with pytest.raises(AssertionError, match=f"{old} -> {new}"):
        check_move(old, new)


def test_every_status_that_a_move_leads_to_has_moves_of_its_own_or_none():
    assert {new for news in MOVES.values() for new in news} <= set(MOVES)


def test_every_status_can_be_reached_from_pending():
    reached, left = set(), ["pending"]
    while left:
        status = left.pop()
        reached.add(status)
        left += [new for new in MOVES[status] if new not in reached]

    assert reached == set(MOVES)


@pytest.mark.parametrize("name", ["Tool", "Stage", "Pipeline", "Step", "Plan", "Outcome", "Event",
                                  "RunResult"])
def test_no_field_of_a_record_can_be_changed(name):
    kind = getattr(orchestrator, name)
    record = kind(*["x"] * len(kind._fields))

    for field in kind._fields:
        with pytest.raises(AttributeError):
            setattr(record, field, "y")


def test_exit_codes_are_those_that_scripts_know():
    assert (orchestrator.EXIT_SUCCESS, orchestrator.EXIT_FAILED, orchestrator.EXIT_USAGE,
            orchestrator.EXIT_BUG, orchestrator.EXIT_SIGNAL + orchestrator.SIGINT) \
        == (0, 1, 2, 3, 130)


def test_the_examples_in_the_docstrings_are_true():
    ended = doctest.testmod(orchestrator)

    assert ended.attempted > 0
    assert ended.failed == 0
