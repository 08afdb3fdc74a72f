#!/usr/bin/env bash
# Step 1 on 8 A100 GPUs: OPT-1.3B fine-tuned whole.
# Further flags are passed on and win over the recipe, launch/recipes/8xa100/sft.yaml: bash launch/sft_8xa100.sh --help
exec bash "$(dirname "$0")/run_step.sh" step1_sft 8xa100/sft.yaml 8 "$@"
