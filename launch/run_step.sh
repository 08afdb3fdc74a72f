#!/usr/bin/env bash
# run_step.sh PROGRAM RECIPE GPUS [FLAGS...]: runs one step with a recipe of launch/recipes; flags win over the recipe.
# The environment variable NUM_GPUS wins over GPUS. Without a GPU, as many ranks run on the CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"
program=$1 recipe=$2
gpus=$(number NUM_GPUS "${NUM_GPUS:-$3}")
shift 3
step_command "$program" "$gpus" --config "$root/launch/recipes/$recipe" "$@"
exec "${command[@]}" < /dev/null
