"""Copy the orders that are new or changed since the last success.

The clock alone is not to be trusted: a row may be stamped before `context.last_success` and
committed after it. So this reaches back a little, and a row that comes again replaces itself.
"""
from datetime import datetime, timedelta, timezone

OVERLAP = timedelta(hours=1)  # longer than any transaction that writes orders


def run(conn, context):
    """Copy from `incoming`, where changed_at is in UTC, to `copied`, of which id is the key."""
    last = context.last_success or datetime(1970, 1, 2, tzinfo=timezone.utc)
    rows = conn.execute("SELECT id, price FROM incoming WHERE changed_at >= ?",
                        (f"{last - OVERLAP:%Y-%m-%d %H:%M:%S}",)).fetchall()
    conn.executemany("INSERT INTO copied VALUES (?, ?) "
                     "ON CONFLICT (id) DO UPDATE SET price = excluded.price", rows)
    return len(rows)
