"""Run a file of SQL, statement by statement, in the transaction of its tool.

Arguments: `file`, from the root of the repository; any others are parameters: `:since` in SQLite,
`%(since)s` in psycopg. So nothing that comes from outside is ever written into SQL.
"""
import re
import sqlite3
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # where `file` begins: fit it to the place of this one
NOTHING = r"(--.*|/\*[\s\S]*?\*/|[\s;])*"  # before a statement: comments, space, semicolons


def run(conn, context, file, **values):
    """Return how many rows were changed.

    Not by executescript(), which commits before it begins: what was done before a statement that
    fails would stay, and nobody could undo it.
    """
    rows = 0
    for line, statement in split((ROOT / file).read_text(encoding="utf-8-sig")):
        cursor = conn.cursor()
        # Without parameters a % is a % for psycopg, too, and not the beginning of one.
        is_bound = isinstance(conn, sqlite3.Connection) or "%(" in statement
        try:
            cursor.execute(statement, *[values] * is_bound)
        except Exception:
            context.log.error("%s, line %d: %s", file, line, " ".join(statement.split())[:200])
            raise
        if cursor.description is None:  # else it is a query, whose rows nobody reads
            rows += max(cursor.rowcount, 0)
        cursor.close()
    return rows


def split(text):
    """Yield each statement of a text with the line, counted from 1, on which it begins.

    SQLite itself knows where one ends: not at a semicolon in quotes, in a comment or within a
    trigger. (It knows no dollar quotes: of PostgreSQL's functions, write the body in '...'.)
    """
    line = begin = 0
    for end in [*(semicolon.end() for semicolon in re.finditer(";", text)), len(text)]:
        statement = text[begin:end]
        if end == len(text) or sqlite3.complete_statement(statement):
            first = re.match(NOTHING, statement).end()
            if first < len(statement):
                yield 1 + line + statement.count("\n", 0, first), statement[first:].strip()
            line, begin = line + statement.count("\n"), end
