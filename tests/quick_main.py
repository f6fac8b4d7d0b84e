"""The part of a sandbox's orchestrator.py above the ENGINE mark, as a main program.

Workers of a QuickSandbox import it as theirs: `sys.path` begins with the sandbox's folder.
"""
import sys
from pathlib import Path

__file__ = str(Path(sys.path[0], "orchestrator.py"))
exec(compile(Path(__file__).read_text(encoding="utf-8").partition("# === ENGINE")[0], __file__,
             "exec"))
