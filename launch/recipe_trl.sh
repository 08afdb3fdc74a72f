#!/usr/bin/env bash
# The TRL recipe's three steps in a row: OPT-1.3B, a DeBERTa-v3 reward model that reads text, PPO.
#
#   bash launch/recipe_trl.sh [--num_gpus N] [--output_dir DIR] [--sft_flags "..."]
#
# The settings are in launch/recipes/trl; --reward_flags, --ppo_flags and others are those of launch/pipeline.sh.
# It installs bitsandbytes into the environment, for weights in few bits.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/launcher.sh"
use_environment
python -c 'from importlib.util import find_spec; assert find_spec("bitsandbytes")' 2> /dev/null ||
    python -m pip install --quiet -c "$root/constraints.txt" bitsandbytes
exec bash "$launch/pipeline.sh" --recipes "$launch/recipes/trl" --reward_reads_text --divide_batches \
    --output_dir output/trl "$@"
