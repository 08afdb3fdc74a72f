"""The examples of docs/examples run as whole programs under the launcher."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.launching import ROOT, launch

DATA = "--data_path builtin:courtesy --data_split 1,1,1 --max_rows 600 --no_enable_tensorboard --dtype fp32"


def metrics(output: Path, phase: str) -> list[dict]:
    rows = [json.loads(line) for line in (output / "logs/metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def test_dpo_learns_and_leaves_a_model(tmp_path):
    launch(
        ROOT / "alternatives/dpo/main.py",
        *DATA.split(),
        *"--model_name_or_path builtin:tiny-opt --max_seq_len 64 --per_device_train_batch_size 8".split(),
        *"--num_train_epochs 2 --zero_stage 2 --lora_dim 8 --lora_learning_rate 0.01".split(),
        *f"--output_dir {tmp_path / 'dpo'} --data_output_path {tmp_path / 'data'}".split(),
        ranks=2,
    )
    before, *_, after = metrics(tmp_path / "dpo", "eval")
    assert (
        before["loss"] == pytest.approx(math.log(2)) and before["reward_margin"] == 0
    )  # policy and reference are one model
    assert after["loss"] < 0.6 and after["accuracy"] > 0.6 and after["reward_margin"] > 0
    assert json.loads((tmp_path / "dpo/provenance.json").read_text())["step"] == "dpo"
    AutoModelForCausalLM.from_pretrained(tmp_path / "dpo")
