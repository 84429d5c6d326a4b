"""Packaging. `tools/setup_env.sh` installs this into `.venv`."""

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-timeout"]
# What megatron-oreal prepare-data reads parquet files and hub data sets with, and finds near duplicates with.
# datasketch 2 proposes other pairs than 1.
DATA = ["pyarrow>=16", "datasets>=3", "datasketch>=2"]

# The trackers and the endpoint that `trackers` and `prometheus` in a configuration ask for. mlflow-skinny writes to
# servers and to folders; a database needs the package mlflow.
MLFLOW, WANDB, PROMETHEUS = ["mlflow-skinny>=3"], ["wandb>=0.19"], ["prometheus_client>=0.20"]
MONITORING = [*MLFLOW, *WANDB, *PROMETHEUS]

setup(
    name="megatron_oreal",
    version="0.1.0",
    description="Outcome-reward reinforcement learning for mathematical reasoning, on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_oreal", "megatron_oreal.*"]),
    package_data={"megatron_oreal.reports.viewer": ["page/*"], "megatron_oreal.reports.run_report": ["page/*"]},
    entry_points={"console_scripts": ["megatron-oreal = megatron_oreal.cli:main"]},
    install_requires=[
        "torch>=2.8",
        "megatron-core>=0.16.1",
        "einops",  # Megatron-Core imports it without requiring it
        "transformers>=5",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "pydantic>=2",
        "typing_extensions",
        "pyyaml",
        "click",
        "aiohttp",
        "tqdm",
        "tensorboard",
        "matplotlib",
        "numpy",
        "packaging",
        "sympy",
        "math-verify[antlr4_13_2]==0.9.0",  # its verdicts are the reward: another version is another experiment
    ],
    extras_require={
        # The releases that megatron-core 0.16.1 is made for.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12; sys_platform == 'linux'"],
        # For an environment of its own: SGLang pins other versions of torch and transformers than the trainer's.
        "sglang": ["sglang>=0.5.20; sys_platform == 'linux'"],
        "bench": ["trl", "datasets"],
        # Drives the Chromium that tests/browser needs; it brings no browser along.
        "browser": ["playwright"],
        "data": DATA,
        "mlflow": MLFLOW,
        "wandb": WANDB,
        "prometheus": PROMETHEUS,
        "test": [*TEST, *DATA, *MONITORING],
        "dev": [*TEST, *DATA, *MONITORING, "ruff", "mypy", "types-PyYAML", "types-tqdm", "pre-commit"],
    },
)
