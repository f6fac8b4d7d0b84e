"""A check that a table is not suddenly other than after the last runs.

Import it into a tool's module, which makes it that module's check, or call it from one of yours:

    from example.toolbox.drift import check

Arguments: `table`, and `figures`, more of it than how many rows there are: ["avg(price)"]. Each run
writes down what it found in the table `figures`. As check() runs before the commit, a table that is
refused leaves neither rows nor figures behind. If it is right all the same, and from now on so,
forget what was: DELETE FROM figures WHERE tool = '...'.
"""
from statistics import median

LAST, FROM = 20, 5  # runs that are looked back at, and how many there must be to say anything
SPREADS, SHARE = 5, 0.1  # how far a figure may be from their median: see find_bounds()
MARK = "?"  # of a parameter: "%s" for psycopg

CREATE = """
    CREATE TABLE IF NOT EXISTS figures (
        run_id TEXT,
        tool   TEXT,
        name   TEXT,  -- count(*), avg(price)
        value  DOUBLE PRECISION,
        at     TIMESTAMP DEFAULT CURRENT_TIMESTAMP
    )"""


def check(conn, context, table, figures=()):
    """Raise ValueError if a figure is out of bounds, else write all of them down."""
    cursor = conn.cursor()
    cursor.execute(CREATE)
    figures = ["count(*)", *figures]
    cursor.execute(f"SELECT {', '.join(figures)} FROM {table}")  # noqa: S608 - from TOOL_MAP
    for name, value in zip(figures, cursor.fetchone()):
        cursor.execute("SELECT value FROM figures WHERE tool = ? AND name = ? "
                       "ORDER BY at DESC LIMIT ?".replace("?", MARK), (context.tool, name, LAST))
        low, high = find_bounds([row[0] for row in cursor.fetchall()])
        if value is None or not low <= value <= high:  # so is what is no number
            raise ValueError(f"{name} of {table} is {value}: after the last runs it was "
                             f"{low:,.6g} to {high:,.6g}, by median and spread")
        cursor.execute("INSERT INTO figures (run_id, tool, name, value) VALUES (?, ?, ?, ?)"
                       .replace("?", MARK), (context.run_id, context.tool, name, float(value)))


def find_bounds(values):
    """Return between what a figure is expected: within SPREADS times the spread of the last ones
    around their median, or SHARE of that, whichever is more. The spread is 1.4826 times the median
    distance from the median, which a few outliers do not move, and would be the standard deviation
    if the figures were scattered normally.
    """
    if len(values) < FROM:
        return float("-inf"), float("inf")
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values)
    margin = max(SPREADS * spread, SHARE * abs(middle))
    return middle - margin, middle + margin
