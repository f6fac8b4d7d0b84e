"""The vocabulary: errors, nearest words, durations, statuses and their moves."""
import doctest
import random
import re

import pytest

import orchestrator
from orchestrator import (
    MOVES, UserError, check_move, format_duration, format_nearest, merge_errors,
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


def test_a_single_error_is_not_wrapped_when_it_is_merged():
    error = UserError("a", "b")

    assert merge_errors([error]) is error


def test_merged_errors_keep_every_problem_with_its_own_fix_in_order():
    merged = merge_errors([UserError("one", "mend one"), UserError("two", "mend two")])

    assert str(merged) == "one\n  mend one\ntwo\n  mend two"


@pytest.mark.parametrize("word, known, said", [
    ("fetc", ["parse", "fetch"], "Did you mean 'fetch'?"),
    ("fetch_c", ["fetch_a", "fetch_b", "render"], "Did you mean 'fetch_b' or 'fetch_a'?"),
    ("zzz", ["fetch", "parse"], "Known: fetch, parse"),
    ("zzz", [], "Known: none"),
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
