"""Sum up one year: python 03_year.py --year 2021 --clean work/clean.csv --out work/2021.json"""
import argparse
import csv
import json

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--year", required=True)
parser.add_argument("--clean", required=True)
parser.add_argument("--out", required=True)
args = parser.parse_args()

with open(args.clean, newline="", encoding="utf-8") as file:
    rides = {row["month"]: int(row["rides"])
             for row in csv.DictReader(file) if row["year"] == args.year}
if not rides:
    parser.error(f"{args.clean} has no month of {args.year}")

summary = {"year": int(args.year), "months": len(rides), "rides": sum(rides.values()),
           "best_month": int(max(rides, key=rides.get))}
with open(args.out, "w", encoding="utf-8") as file:
    json.dump(summary, file)
print(f"{args.year}: {summary['rides']:,} rides")
