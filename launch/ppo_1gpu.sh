#!/usr/bin/env bash
# Step 3 on one GPU: PPO of step 1's model against step 2's, with LoRA.
# Further flags are passed on and win over the recipe, launch/recipes/1gpu/ppo.yaml: bash launch/ppo_1gpu.sh --help
exec bash "$(dirname "$0")/run_step.sh" step3_ppo 1gpu/ppo.yaml 1 "$@"
