"""Prints what the three steps of a pipeline achieved: `python launch/summary.py OUTPUT_DIR`."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError
from common.paths import as_typed_in_a_shell
from common.runtime.streams import reopen_closed, tolerate_write_errors
from launch.report import STEPS, make_report, render, write_summary


def main() -> int:
    """Print the summary and write OUTPUT_DIR/summary.json. Returns the exit code."""
    reopen_closed()
    tolerate_write_errors()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", help="directory that holds sft/, reward/ and ppo/")
    parser.add_argument("--seconds", type=float, nargs=3, metavar="S", help="wall-clock time of each step")
    parser.add_argument("--price_per_hour", type=float, help="price of the machine, in dollars")
    args = parser.parse_args()
    try:
        output = Path(as_typed_in_a_shell(args.output_dir, "OUTPUT_DIR"))
        sft, reward, ppo = (output / step for step in STEPS)
        report = make_report(sft, reward, ppo, seconds=args.seconds, price_per_hour=args.price_per_hour)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(render(report))
    summary = output / "summary.json"
    try:
        write_summary(report, summary)
    except OSError as error:
        print(f"error: {summary}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"\nsaved to {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
