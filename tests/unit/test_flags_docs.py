"""docs/flags.md lists every option as it is declared."""

from __future__ import annotations

import re

from flags_docs import COMMAND, DOCS, STEPS, document

from common.config.parser import options


def test_the_page_is_current():
    assert DOCS.read_text(encoding="utf-8") == document(), f"{COMMAND} writes it anew"


def test_every_option_of_every_step_is_in_it_once():
    rows = re.findall(r"^\| `--(\w+)` .*$", DOCS.read_text(encoding="utf-8"), re.M)
    assert set(rows) == {name for cls in STEPS.values() for name in options(cls)}
    with_effect = {name for cls in STEPS.values() for name, meta in options(cls).items() if not meta.ignored}
    assert {name for name in with_effect if rows.count(name) > 1} <= {
        "output_dir",
        "model_name_or_path",
        "learning_rate",
        "eval_iters",
        "offload",
        "eval_interval",
        "log_interval",
    }


def test_a_row_says_default_unit_steps_aliases_and_resume():
    text = DOCS.read_text(encoding="utf-8")
    assert (
        "| `--generation_batches` | 1 |  | 3 | rollout batches per iteration; also `--generation_batch_numbers` | no |"
        in text
    )
    assert "| `--max_kl` | none | nats per answer | 3 |" in text
    assert "| `--num_warmup_steps` | 0 (1), 0 (2), 0 (DPO), 100 (3) | optimizer steps | 1, 2, DPO, 3 |" in text
    assert "yes; other figures of evaluations |" in text
