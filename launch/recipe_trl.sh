#!/usr/bin/env bash
# The TRL recipe's three steps in a row: OPT-1.3B, a DeBERTa-v3 reward model that reads text, PPO.
#
#   bash launch/recipe_trl.sh [--num_gpus N] [--output_dir DIR] [--sft_flags "..."]
#
# The settings are in launch/recipes/trl; --reward_flags, --ppo_flags and others are those of launch/pipeline.sh.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec bash "$launch/pipeline.sh" --recipes "$launch/recipes/trl" --reward_reads_text --divide_batches \
    --output_dir output/trl "$@"
