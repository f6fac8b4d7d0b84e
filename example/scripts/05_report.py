"""Print the report: python 05_report.py --all work/all.json --title "Rides" """
import argparse
import json

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--all", required=True)
parser.add_argument("--title", required=True)
args = parser.parse_args()

with open(args.all, encoding="utf-8") as file:
    summaries = json.load(file)
print(args.title)
for each in summaries:
    print(f"  {each['year']}  {each['rides']:6,} rides in {each['months']} months, "
          f"most in month {each['best_month']}")
