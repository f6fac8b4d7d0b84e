"""Load the raw files, line by line and unchanged, from a folder or a web address.

`index.txt` names the files, because a web address cannot be listed the way a folder can.
"""
import re
from pathlib import Path
from urllib.request import urlopen

BUNDLED = Path(__file__).with_name("data")

CREATE_RAW = """
    CREATE TABLE IF NOT EXISTS raw (
        file TEXT NOT NULL,
        line INTEGER NOT NULL,  -- counted from 1, which is the header
        day  TEXT,              -- YYYY-MM-DD from the file's name; NULL: the file is not of one day
        text TEXT NOT NULL,
        PRIMARY KEY (file, line)
    )"""


def run(conn, context, since=None, source=None):
    """Replace the raw lines of all days from `since` on; return how many lines there are."""
    source = str(source or BUNDLED)
    wanted = [
        (file, day)
        for file, day in find_files(source)
        if day is None or since is None or day >= since
    ]
    conn.execute(CREATE_RAW)
    # The same rows go as will come, so a second run ends where the first one did.
    conn.execute("DELETE FROM raw WHERE day IS NULL OR day >= ?", (since or "",))
    rows = 0
    for file, day in context.progress(wanted, total=len(wanted)):
        lines = read_text(source, file).splitlines()
        conn.executemany(
            "INSERT INTO raw (file, line, day, text) VALUES (?, ?, ?, ?)",
            [(file, number, day, text) for number, text in enumerate(lines, start=1)],
        )
        rows += len(lines)
    context.log.info("%d files from %s", len(wanted), source)
    return rows


def find_files(source):
    """Return (file, day) for every file that the index names; day is None if the name has none."""
    files = read_text(source, "index.txt").split()
    days = [re.search(r"\d{4}-\d\d-\d\d", file) for file in files]
    return [(file, day.group() if day else None) for file, day in zip(files, days)]


def read_text(source, file):
    """Return the text of one file of `source`, a folder or an http(s) address."""
    if source.startswith(("http://", "https://")):
        with urlopen(source.rstrip("/") + "/" + file, timeout=30) as response:
            return response.read().decode("utf-8")
    return Path(source, file).read_text(encoding="utf-8")
