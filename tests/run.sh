#!/usr/bin/env bash
# Runs the tests in the pinned environment: bash tests/run.sh [pytest's arguments], `--long` for the long ones too.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh --with-tests
exec python -m pytest "$@"
