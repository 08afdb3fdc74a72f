#!/usr/bin/env bash
# DPO on 8 A100 GPUs, in place of steps 2 and 3: step 1's model trained whole on comparisons.
# Further flags are passed on and win over the recipe, launch/recipes/8xa100/dpo.yaml: bash launch/dpo_8xa100.sh --help
exec bash "$(dirname "$0")/run_step.sh" alternatives/dpo 8xa100/dpo.yaml 8 "$@"
