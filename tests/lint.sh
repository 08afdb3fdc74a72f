#!/usr/bin/env bash
# What the code must pass besides its tests: lint, format, the ladder of folders, types.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh --with-tests
ruff check .
ruff format --check --quiet . || { echo "error: run \`ruff format .\`" >&2; exit 1; }
lint-imports --no-cache
mypy
