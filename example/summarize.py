"""Count delays per carrier, per hour, and per day and hour."""
from collections import defaultdict
from statistics import mean, median

# `late` counts arrivals more than 15 minutes late, `very_late` those of them over 60 minutes;
# `trouble` is the share of all flights that were late or cancelled. Mean and median are of the
# arrival delay in minutes (early is negative), and NULL where no flight arrived.
CREATE_TABLES = (
    """CREATE TABLE by_carrier (
        carrier TEXT PRIMARY KEY, flights INTEGER, cancelled INTEGER, late INTEGER,
        very_late INTEGER, trouble REAL, mean_delay_min REAL, median_delay_min REAL)""",
    """CREATE TABLE by_hour (
        hour INTEGER PRIMARY KEY, flights INTEGER, cancelled INTEGER, late INTEGER,
        very_late INTEGER, trouble REAL, mean_delay_min REAL, median_delay_min REAL)""",
    """CREATE TABLE by_day_hour (
        flight_date TEXT, hour INTEGER, flights INTEGER, cancelled INTEGER, late INTEGER,
        very_late INTEGER, trouble REAL, mean_delay_min REAL, median_delay_min REAL,
        PRIMARY KEY (flight_date, hour))""",
)


def run(conn, since=None):
    """Replace all three tables, which cover the days from `since` on; return their rows."""
    # A mean over other days is another mean: here nothing of an earlier run is worth keeping.
    conn.execute("DROP TABLE IF EXISTS by_carrier")
    conn.execute("DROP TABLE IF EXISTS by_hour")
    conn.execute("DROP TABLE IF EXISTS by_day_hour")
    for statement in CREATE_TABLES:
        conn.execute(statement)
    query = """SELECT flight_date, hour, carrier_name, delay_group, arr_delay_min
        FROM enriched_flights WHERE flight_date >= ?"""
    carriers, hours, days_hours = defaultdict(list), defaultdict(list), defaultdict(list)
    for day, hour, carrier, group, delay in conn.execute(query, (since or "",)):
        for flights in carriers[(carrier,)], hours[(hour,)], days_hours[(day, hour)]:
            flights.append((group, delay))
    conn.executemany("INSERT INTO by_carrier VALUES (?, ?, ?, ?, ?, ?, ?, ?)", measure(carriers))
    conn.executemany("INSERT INTO by_hour VALUES (?, ?, ?, ?, ?, ?, ?, ?)", measure(hours))
    conn.executemany(
        "INSERT INTO by_day_hour VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", measure(days_hours)
    )
    return len(carriers) + len(hours) + len(days_hours)


def measure(flights_by_key):
    """Yield one row for each key, a tuple: the key itself, then counts, share, mean and median."""
    for key, flights in sorted(flights_by_key.items()):
        groups = [group for group, _ in flights]
        delays = [delay for _, delay in flights if delay is not None]
        cancelled, very_late = groups.count("cancelled"), groups.count("over 60")
        late = groups.count("up to 60") + very_late
        trouble = (late + cancelled) / len(flights)
        average = (mean(delays), median(delays)) if delays else (None, None)
        yield (*key, len(flights), cancelled, late, very_late, trouble, *average)
