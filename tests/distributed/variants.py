"""The ways in which `gradient_cases.py` cuts up one optimizer step."""

# name -> ZeRO stage, rows per micro-batch over all ranks, gradient checkpointing, LoRA, offload
VARIANTS = {
    "whole": (0, 8, False, False, False), "accumulated": (0, 2, False, False, False),
    "checkpointed": (0, 8, True, False, False), "zero1": (1, 4, False, False, False),
    "zero2": (2, 4, False, False, False), "zero3": (3, 4, False, False, False),
    "zero3-checkpointed": (3, 8, True, False, False), "zero2-offloaded": (2, 4, False, False, True),
    "zero3-offloaded": (3, 4, False, False, True), "lora": (0, 8, False, True, False),
    "lora-zero2": (2, 4, True, True, False), "lora-zero3": (3, 4, False, True, False),
}
