"""Leave out the months without a count, or with fewer rides than are worth counting."""
import argparse
import csv

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--raw", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--least", type=int, default=0, help="rides that a month must have")
args = parser.parse_args()

with open(args.raw, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
kept = [row for row in rows if row["rides"] and int(row["rides"]) >= args.least]
if not kept:
    parser.error(f"no month of {args.raw} has {args.least} rides")

with open(args.out, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, ["year", "month", "rides"])
    writer.writeheader()
    writer.writerows(kept)
print(f"{len(kept)} of {len(rows)} months kept")
