#!/usr/bin/env bash
# Step 3 on 8 A100 GPUs: PPO of step 1's model against step 2's.
# Further flags are passed on and win over the recipe, launch/recipes/8xa100/ppo.yaml: bash launch/ppo_8xa100.sh --help
exec bash "$(dirname "$0")/run_step.sh" step3_ppo 8xa100/ppo.yaml 8 "$@"
