"""`gptjax doctor`."""

import argparse
import dataclasses
import json
from typing import Any

from gptjax.cli.common import add_command
from gptjax.support.units import readable


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "doctor",
        run,
        summary="report on this machine and installation, and on what is wrong with them",
        epilog="examples:\n  gptjax doctor\n  gptjax doctor --json > report.json\n\n"
        "The exit status is 1 if a problem keeps gptjax from working.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.diagnostics.doctor import examine

    report = examine()
    status = 0 if report.works else 1
    if args.json:
        problems = [dataclasses.asdict(problem) for problem in report.problems]
        print(json.dumps({**report.facts, "problems": problems, "works": report.works}, ensure_ascii=False))
        return status
    width = max(len(name) for facts in report.facts.values() for name in facts)
    for topic, facts in report.facts.items():
        print(topic)
        for name, value in facts.items():
            print(f"  {name.removesuffix('_bytes'):{width}}  {readable(value) if name.endswith('_bytes') else value}")
    print()
    for number, problem in enumerate(report.problems, 1):
        print(f"{number}. {problem.problem}\n   {problem.fix}")
    if not report.problems:
        print("no problems found")
    elif report.works:
        print("gptjax works nevertheless")
    return status
