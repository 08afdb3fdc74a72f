#!/usr/bin/env bash
# Runs the tests in the pinned environment: bash tests/run.sh [pytest's arguments], `--long` for the long ones too.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh --with-tests
# Two files at a time, in their order, which begins with those that take longest; each test waits much of its own.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
