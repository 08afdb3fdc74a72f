#!/usr/bin/env bash
# Step 1 on one GPU: OPT-1.3B fine-tuned with LoRA.
# Further flags are passed on and win over the recipe, launch/recipes/1gpu/sft.yaml: bash launch/sft_1gpu.sh --help
exec bash "$(dirname "$0")/run_step.sh" step1_sft 1gpu/sft.yaml 1 "$@"
