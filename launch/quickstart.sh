#!/usr/bin/env bash
# Trains the built-in task through all three steps, on the GPU if there is one; takes some minutes on two CPU cores.
#
#   bash launch/quickstart.sh [--num_gpus N] [--output_dir DIR] [--seed N] [--price_per_hour DOLLARS]
#
# The first run installs the pinned versions into .venv. Other flags are those of launch/pipeline.sh.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for flag in "$@"; do
    case $flag in
        --help | -h)
            echo "launch/quickstart.sh is launch/pipeline.sh on the built-in task, with --reward_from_sft and"
            echo "--divide_batches, recipes in launch/recipes/quickstart and results in output/quickstart."
            echo "The first run installs the pinned versions into .venv."
            echo
            exec bash "$launch/pipeline.sh" --help ;;
    esac
done
source "$launch/environment.sh"
exec bash "$launch/pipeline.sh" --recipes "$launch/recipes/quickstart" --reward_from_sft --divide_batches \
    --output_dir output/quickstart "$@"
