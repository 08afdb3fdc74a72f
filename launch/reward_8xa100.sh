#!/usr/bin/env bash
# Step 2 on 8 A100 GPUs: a reward model from OPT-350M.
# Further flags are passed on and win over the recipe, launch/recipes/8xa100/reward.yaml: bash launch/reward_8xa100.sh --help
exec bash "$(dirname "$0")/run_step.sh" step2_reward 8xa100/reward.yaml 8 "$@"
