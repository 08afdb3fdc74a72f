"""Installs the packages; `pip install -e .` makes them importable from any directory."""
from setuptools import find_packages, setup

# The lower bounds are the versions that have been tested; constraints.txt has the exact ones.
setup(
    name="rlhf-pipeline",
    version="0.1.0",
    description="Reinforcement learning from human feedback on DeepSpeed: fine-tuning, reward model, PPO",
    python_requires=">=3.11",
    packages=find_packages(
        include=["common", "common.*", "step1_sft", "step2_reward", "step3_ppo", "inference"]),
    install_requires=[
        "torch>=2.13",
        "datasets>=5.2",
        "deepspeed>=0.19.8",
        "filelock>=4.2",
        "Jinja2>=3.1",
        "ninja>=1.13",
        "numpy>=2.4",
        "peft>=0.21.2",
        "psutil>=7.2.2",
        "pyarrow>=26.0",
        "PyYAML>=6.0.3",
        "safetensors>=0.8",
        "sentencepiece>=0.2.3",
        "tensorboard>=2.21",
        "tokenizers>=0.23",
        "tqdm>=4.70",
        "transformers>=5.23",
        "xxhash>=4.1",
    ],
    extras_require={"test": ["pytest>=9.2", "hypothesis>=6.170", "scipy>=1.17", "pytest-xdist>=3.8"]},
)
