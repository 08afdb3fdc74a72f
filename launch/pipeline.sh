#!/usr/bin/env bash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launcher.sh"

usage="usage: bash launch/pipeline.sh [--recipes DIR] [--num_gpus N] [--output_dir DIR]
           [--price_per_hour DOLLARS] [--reward_from_sft | --reward_reads_text] [--divide_batches]
           [--sft_flags \"...\"] [--reward_flags \"...\"] [--ppo_flags \"...\"] [flags for every step]

The three steps in a row, and a summary of what they reached, how long they took and what that cost.

--recipes         directory with sft.yaml, reward.yaml and ppo.yaml (default launch/recipes/1gpu)
--num_gpus        GPUs, or ranks where there is none (default 1)
--output_dir      gets sft/, reward/, ppo/, data/ and summary.json (default output)
--price_per_hour  of the whole machine; one A100-40GB was rented for 1.13, eight for 8.80
--reward_from_sft the reward model starts from step 1's model, not from its recipe's
--reward_reads_text
                  step 3 takes step 2's model for --reward, whatever its tokenizer is, and starts the critic from
                  step 1's model
--divide_batches  the recipes' batches are those of all GPUs together: the number of GPUs changes no step
--sft_flags ...   flags for one step; they win over its recipe"

price() {
    if [[ ! $2 =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ ]]; then
        echo "error: $1 $2: dollars are needed, such as 1.13" >&2; exit 2
    fi
    echo "$2"
}

recipes=$root/launch/recipes/1gpu gpus=1 output=output
reward_from_sft="" reward_reads_text="" divide_batches=""
sft_flags="" reward_flags="" ppo_flags="" price=() every=()
while [ $# -gt 0 ]; do
    # As in the steps' own flags, --name=value means --name value, and dashes within a name mean underscores.
    name=${1%%=*}
    case $name in --*) name=${name#--} name=--${name//-/_} ;; esac
    case $name in
        --help | -h) echo "$usage"; exit ;;
        --recipes | --num_gpus | --output_dir | --price_per_hour | --sft_flags | --reward_flags | --ppo_flags)
            case $1 in
                *=*) value=${1#*=} ;;
                *) if [ $# -lt 2 ]; then echo "error: $name needs a value" >&2; exit 2; fi
                   value=$2; shift ;;
            esac
            case $name=$value in
                --recipes= | --output_dir= | --price_per_hour=) echo "error: $name needs a value" >&2; exit 2 ;;
                --recipes=*) recipes=$value ;;
                --num_gpus=*) gpus=$(number "$name" "$value") ;;
                --output_dir=*) output=${value%/} ;;
                --price_per_hour=*) price=("$name" "$(price "$name" "$value")") ;;
                --sft_flags=*) sft_flags=$value ;;
                --reward_flags=*) reward_flags=$value ;;
                --ppo_flags=*) ppo_flags=$value ;;
            esac ;;
        --reward_from_sft | --reward_reads_text | --divide_batches)
            case $1 in *=*) echo "error: $name takes no value" >&2; exit 2 ;; esac
            declare "${name#--}=1" ;;
        --) ;;  # the steps' flags need no mark
        *) every+=("$1") ;;
    esac
    shift
done
if [ -n "$reward_from_sft" ] && [ -n "$reward_reads_text" ]; then
    echo "error: --reward_from_sft and --reward_reads_text: step 2's model has step 1's tokenizer, or one of its own" >&2
    exit 2
fi

use_environment
recipes=$(python "$root/launch/typed_path.py" --recipes "$recipes")
output=$(python "$root/launch/typed_path.py" --output_dir "$output")

# batches NAME: prints the flags that divide the batches of the recipe NAME among the GPUs.
batches() {
    local option rows
    if [ -z "$divide_batches" ] || [ ! -r "$recipes/$1.yaml" ]; then return; fi
    sed -nE 's/^(per_device_(train|generation|training)_batch_size): *([0-9]+).*/\1 \3/p' "$recipes/$1.yaml" |
        while read -r option rows; do echo "--$option $(((rows + gpus - 1) / gpus))"; done
}

data=(--data_output_path "$output/data")
# Flags in one string are split into words on purpose.
sft=(--config "$recipes/sft.yaml" --output_dir "$output/sft" "${data[@]}" $(batches sft)
     $sft_flags ${every[@]+"${every[@]}"})
reward=(--config "$recipes/reward.yaml" --output_dir "$output/reward" "${data[@]}" $(batches reward)
        ${reward_from_sft:+--model_name_or_path "$output/sft"} $reward_flags ${every[@]+"${every[@]}"})
# Step 3 requires that the models it uses by default exist. With the trailing slash these paths are not the defaults.
if [ -n "$reward_reads_text" ]; then judge=(--reward "$output/reward/"); else
    judge=(--critic_model_name_or_path "$output/reward/"); fi
ppo=(--config "$recipes/ppo.yaml" --output_dir "$output/ppo" "${data[@]}" $(batches ppo)
     --actor_model_name_or_path "$output/sft/" "${judge[@]}"
     $ppo_flags ${every[@]+"${every[@]}"})
python "$root/launch/check_flags.py" "$usage" sft "${sft[@]}" -- reward "${reward[@]}" -- ppo "${ppo[@]}"

seconds=()
# step TITLE PROGRAM FLAGS...: runs one step and records its duration.
step() {
    local title=$1 program=$2 start=$SECONDS
    shift 2
    echo
    echo "== $title"
    launch_step "$program" "$gpus" "$@"
    seconds+=("$((SECONDS - start))")
}
step "Step 1 of 3: supervised fine-tuning" step1_sft "${sft[@]}"
step "Step 2 of 3: reward model" step2_reward "${reward[@]}"
step "Step 3 of 3: PPO" step3_ppo "${ppo[@]}"

echo
python "$root/launch/summary.py" "$output" --seconds "${seconds[@]}" ${price[@]+"${price[@]}"}
