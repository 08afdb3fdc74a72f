#!/usr/bin/env bash
# Runs all benchmarks and prints one JSON line for each variant: bash benchmarks/run.sh cpu|gpu [flags for every program]
# For instance `--data_path PATH_TO_HH_RLHF`. Other programs on the machine make the figures wrong.
set -uo pipefail
source "$(dirname "$0")/../launch/launcher.sh"
use_environment
choose_accelerator
machine=${1:-}
if [ $# -gt 0 ]; then shift; fi
flags=("$@")
failed=0

# bench RANKS PROGRAM FLAGS...: runs one benchmark, names it on standard error, and continues if it fails.
bench() {
    local ranks=$1 program=$2
    shift 2
    echo "benchmarks/$program.py on $ranks: $*" >&2
    deepspeed --log_level critical --num_gpus "$ranks" --master_port $((20000 + RANDOM % 20000)) \
        "$root/benchmarks/$program.py" "$@" ${flags[@]+"${flags[@]}"} < /dev/null || failed=1
}

# No token budget exceeds a full micro-batch of 16 rows of the baseline, so both have the same memory limit.
case $machine in
    cpu)
        bench 1 rollouts
        bench 1 rollouts --greedy
        bench 1 rollouts --greedy --against generate_batch
        bench 1 rollouts --dtype bf16
        for rows in 8 32; do
            bench 2 rollouts --actor_model_name_or_path random:opt-4x768 --actor_zero_stage 3 --rounds 1 --greedy \
                --prompts $((2 * rows)) --per_device_generation_batch_size $rows --max_prompt_seq_len 64
        done
        bench 1 rollouts --actor_lora_dim 8 --actor_quantize nf4 --against unfolded
        bench 1 preparation
        bench 1 sft --max_seq_len 256 --max_tokens_per_micro_batch 4096
        bench 1 sft --max_seq_len 512 --max_tokens_per_micro_batch 8192
        bench 1 sft --max_seq_len 256 --max_tokens_per_micro_batch 2048 --dtype bf16
        bench 1 sft --max_seq_len 512 --max_tokens_per_micro_batch 2048 --dtype bf16
        bench 1 sft --max_seq_len 512 --max_tokens_per_micro_batch 2048 --dtype bf16 --packing
        for quantize in none int8 nf4; do
            bench 1 sft --only product --rounds 1 --model_name_or_path random:opt-125m --max_seq_len 256 --steps 2 \
                --per_device_train_batch_size 4 --dtype bf16 --lora_dim 16 --quantize $quantize
        done
        bench 1 reward --max_seq_len 256 --max_tokens_per_micro_batch 4096
        bench 1 reward --max_seq_len 256 --max_tokens_per_micro_batch 4096 --dtype bf16
        for ppo in "1" "1 --dtype bf16" "1 --dtype bf16 --actor_lora_dim 8 --critic_lora_dim 8" \
            "2 --dtype bf16 --actor_zero_stage 2 --critic_zero_stage 2" \
            "1 --dtype bf16 --actor_zero_stage 3 --critic_zero_stage 3"; do
            bench ${ppo%% *} ppo --max_tokens_per_micro_batch 2048 $([ "$ppo" = 1 ] || echo "${ppo#* }")
        done
        for only in plain product; do
            bench 1 ppo --max_tokens_per_micro_batch 2048 --dtype bf16 --actor_lora_dim 8 --critic_lora_dim 8 \
                --only $only --rounds 1
        done
        bench 1 critic_free --max_tokens_per_micro_batch 2048 --dtype bf16
        for only in with_critic without_critic; do
            bench 1 critic_free --max_tokens_per_micro_batch 2048 --dtype bf16 --only $only --rounds 1
        done
        ;;
    gpu)
        actor=random:opt-1.3b critic=random:opt-350m
        bench 1 rollouts --actor_model_name_or_path $actor --rounds 1
        bench 1 rollouts --actor_model_name_or_path $actor --rounds 1 --actor_zero_stage 3 --prompts 32 \
            --max_answer_seq_len 32 --greedy
        bench 1 sft --model_name_or_path $actor --max_seq_len 512 --max_tokens_per_micro_batch 8192 --steps 4
        bench 1 reward --model_name_or_path $critic --max_seq_len 512 --max_tokens_per_micro_batch 16384 --steps 4
        for lora in 0 16; do
            bench 1 ppo --actor_model_name_or_path $actor --critic_model_name_or_path $critic --rounds 1 \
                --max_tokens_per_micro_batch 4096 --actor_lora_dim $lora --critic_lora_dim $lora
        done
        bench 1 critic_free --actor_model_name_or_path $actor --critic_model_name_or_path $critic --rounds 1 \
            --max_tokens_per_micro_batch 4096 --actor_lora_dim 16 --critic_lora_dim 16
        ;;
    *)
        echo "error: say cpu or gpu: bash benchmarks/run.sh cpu" >&2
        exit 2
        ;;
esac
exit $failed
