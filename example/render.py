"""Write the page output/flights.html, and print the best carriers and hours."""
from pathlib import Path

from .page import Delays, format_page

PAGE = Path(__file__).resolve().parents[1] / "output" / "flights.html"

# `ranked` is false for a group with less than 1 % of the flights: too few to judge it by.
SELECT_CARRIERS = """
    SELECT carrier, flights, cancelled, late, very_late, trouble, mean_delay_min,
        100 * flights >= (SELECT sum(flights) FROM by_carrier) AS ranked
    FROM by_carrier ORDER BY ranked DESC, trouble, carrier"""
SELECT_HOURS = """
    SELECT hour, flights, cancelled, late, very_late, trouble, mean_delay_min,
        100 * flights >= (SELECT sum(flights) FROM by_hour) AS ranked
    FROM by_hour ORDER BY ranked DESC, mean_delay_min IS NULL, mean_delay_min, hour"""
SELECT_CELLS = "SELECT flight_date, hour, flights, trouble FROM by_day_hour ORDER BY 1, 2"
SELECT_LONGEST = """
    SELECT arr_delay_min, carrier_name, flight, dest_name FROM enriched_flights
    WHERE flight_date >= ? AND arr_delay_min IS NOT NULL
    ORDER BY arr_delay_min DESC, file, line LIMIT 1"""
SELECT_REJECTS = """
    SELECT reason, count(*) FROM rejects WHERE flight_date >= ? GROUP BY reason ORDER BY reason"""


def run(conn, since=None):
    """Write the page about the days from `since` on; return its path."""
    cells = conn.execute(SELECT_CELLS).fetchall()
    if not cells or cells[0][0] < (since or ""):
        raise ValueError("no summary of these days; run summarize with the same --since first")
    carriers = [Delays(*row) for row in conn.execute(SELECT_CARRIERS)]
    hours = [Delays(*row) for row in conn.execute(SELECT_HOURS)]
    longest = conn.execute(SELECT_LONGEST, (since or "",)).fetchone()
    rejects = conn.execute(SELECT_REJECTS, (since or "",)).fetchall()
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(format_page(carriers, hours, cells, longest, rejects), encoding="utf-8")
    print_best("carrier", [(group.name, group) for group in carriers])
    print_best("hour", [(f"{group.name:02}:00", group) for group in hours])
    print(f"page: {PAGE}")
    return {"rows": len(carriers) + len(hours) + len(cells), "page": str(PAGE)}


def print_best(heading, groups, count=3):
    """Print the first `count` groups as a table."""
    print(f"best {heading:<26} flights  late or cancelled  mean delay")
    for name, group in groups[:count]:
        mean = "" if group.mean_min is None else f"{group.mean_min:+.1f} min"
        print(f"  {name:<29} {group.flights:>7}  {group.trouble:>17.1%}  {mean:>10}")
    print()
