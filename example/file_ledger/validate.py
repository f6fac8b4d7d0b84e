"""Check header, types and control total of each file in the inbox."""
from datetime import date

from .order_file import HEADER, find_version, parse_cents, read_lines

INSERT_FILE = "INSERT INTO files (file, version, orders, cents) VALUES (?, ?, ?, ?)"


def items(inbox):
    """Return (name, version) of each file, so that one with another content is done again."""
    files = [path for path in sorted(inbox.iterdir()) if path.match("orders-*.csv")]
    return [(path.name, find_version(path.read_bytes())) for path in files]


def run(conn, item, inbox):
    """Check one file, and note what is in it; return how many orders."""
    version, lines = read_lines(inbox / item)
    if lines[:1] != [HEADER]:
        raise ValueError(f"its header is not {','.join(HEADER)}")
    if lines[-1][:1] != ["total"]:
        raise ValueError("it breaks off: its last line is no control total")
    cents = [check_order(*place) for place in enumerate(lines[1:-1], start=2)]
    total = ["total", str(len(cents)), "", f"{sum(cents) / 100:.2f}"]
    if lines[-1] != total:
        raise ValueError(f"its last line is {','.join(lines[-1])}, its orders: {','.join(total)}")
    # There is something to delete only if an earlier version has passed.
    conn.execute("DELETE FROM files WHERE file = ?", (item,))
    conn.execute(INSERT_FILE, (item, version, len(cents), sum(cents)))
    return len(cents)


def check_order(number, line):
    """Return the cents of an order. Raise ValueError, with the line's number, if it is none."""
    try:
        if len(line) != len(HEADER):
            raise ValueError(f"{len(line)} values, not {len(HEADER)}")
        order, _, day, amount = line
        int(order), date.fromisoformat(day)
        return parse_cents(amount)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
