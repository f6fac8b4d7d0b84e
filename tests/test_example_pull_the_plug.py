"""The example that pulls the plug: what it counts is true, and can be otherwise."""
import re
import subprocess
import sys

from conftest import ENVIRONMENT, TOP, Ended


def pull_the_plug(*words):
    """Run the example to its end."""
    ended = subprocess.run([sys.executable, str(TOP / "example" / "pull_the_plug.py"), *words],
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, encoding="utf-8", timeout=120,
                           env=ENVIRONMENT)  # which caches the compiled engine
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def find_done(ended):
    """Return how many items were done after each kill."""
    return [int(done) for done in re.findall(
        r"^killed after \d\.\d\d s: (\d+) of 500 items done$", ended.out, re.M)]


def test_whatever_is_killed_each_item_is_done_once():
    ended = pull_the_plug()
    assert ended.code == 0, ended
    assert ended.out.splitlines()[-1] == "500 items: each done once"
    done = find_done(ended)
    assert done and done == sorted(done), ended
    assert f"{500 - done[-1]} items done" in ended.err, ended


def test_a_tool_that_commits_by_itself_is_found_to_do_items_twice():
    for _ in range(3):  # the plug is rarely pulled at no item at all
        ended = pull_the_plug("--naive")
        if ended.code:
            break
    found = re.fullmatch(r"500 items: 0 lost, (\d+) done twice", ended.out.splitlines()[-1])
    assert ended.code == 1 and found, ended
    assert 0 < int(found[1]) <= len(find_done(ended))
