"""Load each raw file once, line by line and unchanged, from a folder or a web address.

`index.txt` names the files, because a web address cannot be listed the way a folder can. It gives
the checksum of each as well, as `sha256sum *.csv` prints it: a corrected file is loaded again.
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


def setup(conn):
    """Make the table, before several workers fill it."""
    conn.execute(CREATE_RAW)


def items(since=None, source=None):
    """Return (file, checksum) of what the index names, but for files of days before `since`."""
    index = [line.split() for line in read_text(source, "index.txt").splitlines()]
    return [(file, checksum[:12]) for checksum, file in index
            if find_day(file) is None or find_day(file) >= (since or "")]


def run(conn, item, source=None):
    """Replace the raw lines of one file; return how many lines there are."""
    lines = read_text(source, item).splitlines()
    conn.execute("DELETE FROM raw WHERE file = ?", (item,))
    conn.executemany(
        "INSERT INTO raw (file, line, day, text) VALUES (?, ?, ?, ?)",
        [(item, number, find_day(item), text) for number, text in enumerate(lines, start=1)],
    )
    return len(lines)


def find_day(file):
    """Return the day in the name of a file, such as 2013-01-04; None if there is none."""
    day = re.search(r"\d{4}-\d\d-\d\d", file)
    return day and day.group()


def read_text(source, file):
    """Return the text of one file of `source`, a folder or an http(s) address."""
    source = str(source or BUNDLED)
    if source.startswith(("http://", "https://")):
        with urlopen(source.rstrip("/") + "/" + file, timeout=30) as response:
            return response.read().decode("utf-8")
    return Path(source, file).read_text(encoding="utf-8")
