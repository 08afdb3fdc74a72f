#!/usr/bin/env bash
# DPO on one GPU, in place of steps 2 and 3: step 1's model trained whole on comparisons.
# Further flags are passed on and win over the recipe, launch/recipes/1gpu/dpo.yaml: bash launch/dpo_1gpu.sh --help
exec bash "$(dirname "$0")/run_step.sh" alternatives/dpo 1gpu/dpo.yaml 1 "$@"
