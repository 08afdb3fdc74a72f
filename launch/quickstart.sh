#!/usr/bin/env bash
# The built-in task through all three steps, on the GPU if there is one: some minutes on two CPU cores.
#
#   bash launch/quickstart.sh [--num_gpus N] [--output_dir DIR] [--seed N] [--price_per_hour DOLLARS]
#
# The first run installs the pinned versions into .venv. Other flags are those of launch/pipeline.sh.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/environment.sh"
exec bash "$launch/pipeline.sh" --recipes "$launch/recipes/quickstart" --reward_from_sft --divide_batches \
    --output_dir output/quickstart "$@"
