"""The ways in which `gradient_cases.py` cuts up one optimizer step."""

# name -> ZeRO stage, rows per micro-batch over all ranks, gradient checkpointing, LoRA
VARIANTS = {
    "whole": (0, 8, False, False), "accumulated": (0, 2, False, False), "checkpointed": (0, 8, True, False),
    "zero1": (1, 4, False, False), "zero2": (2, 4, False, False), "zero3": (3, 4, False, False),
    "zero3-checkpointed": (3, 8, True, False),
    "lora": (0, 8, False, True), "lora-zero2": (2, 4, True, True), "lora-zero3": (3, 4, False, True),
}
