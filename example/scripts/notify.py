"""Say how the run went, whatever became of it; here to the terminal, elsewhere by mail or chat."""


def run(context):
    outcomes = context.outcomes
    bad = {tool: each for tool, each in outcomes.items()
           if each.status not in ("success", "cached")}
    print(f"rides: {len(outcomes) - len(bad)} of {len(outcomes)} tools done")
    for tool, each in bad.items():
        print(f"  {tool} {each.status}: {each.error}" if each.error else f"  {tool} {each.status}")
