"""`python -m benchmarks [NAME ...]`: run, append to results.csv, fail under a gate."""

import csv
import datetime
import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; returns 1 if a gate is missed."""
    gates = yaml.safe_load((HERE / "gates.yaml").read_text())
    missed = 0
    for name in names or gates:
        gate = gates[name]
        module, _, function = gate.get("run", f"{name}.run").partition(".")
        value = getattr(importlib.import_module(f"benchmarks.{module}"), function)()
        met = value >= gate["at_least"] if "at_least" in gate else value <= gate["at_most"]
        missed += not met
        bound = gate.get("at_least", gate.get("at_most"))
        print(f"{name}: {value:.3g} {gate['unit']} (gate {bound}) {'ok' if met else 'MISSED'}")
        _record(name, value, met)
    return int(missed > 0)


def _record(name: str, value: float, met: bool) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    file = HERE / "results.csv"
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if new:
            writer.writerow(["date", "commit", "machine", "benchmark", "value", "met"])
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        today = datetime.date.today().isoformat()
        writer.writerow([today, commit, machine, name, f"{value:.4g}", met])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
