#!/usr/bin/env bash
# Step 2 on one GPU: a reward model from OPT-350M.
# Further flags are passed on and win over the recipe, launch/recipes/1gpu/reward.yaml: bash launch/reward_1gpu.sh --help
exec bash "$(dirname "$0")/run_step.sh" step2_reward 1gpu/reward.yaml 1 "$@"
