"""Package metadata: ranges that are known to work; the versions tested together are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# Read, not imported: a build environment has setuptools and nothing else.
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "bmtpt_ds/__init__.py").read_text(encoding="utf-8"), re.M)[1]
README = HERE / "README.md"

REQUIRES = [
    "torch>=2.10",
    "transformers>=5.17",
    "deepspeed>=0.19.6",  # before 0.19.3 frozen weights were re-partitioned during recompute (DeepSpeed#8148)
    "datasets>=4",  # runs no loading scripts
    "huggingface_hub",
    "mpi4py",  # launchers openmpi and mpich
    "numpy>=2",
    "protobuf",  # T5's tokenizer from a bare spiece.model
    "psutil",
    "pydantic>=2",
    "pyyaml",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentencepiece",
    "tensorboard",
    "tqdm",
]
EXTRAS = {
    "test": ["hypothesis", "openmpi; sys_platform == 'linux'", "peft", "pytest", "pytest-xdist", "ruff"],
    "plot": ["matplotlib"],
    # CUDA builds of torch bring triton; a CPU build does not, and the interpreter runs the kernels there.
    "triton": ["triton>=3.6; sys_platform == 'linux'"],
}

setup(
    name="bmtpt_ds",
    version=VERSION,
    description="Bayesian multi-task prompt tuning (BMTPT) on a frozen T5, sharded by DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["bmtpt = bmtpt_ds.cli:program"]},
    packages=[*find_packages(include=["bmtpt_ds", "bmtpt_ds.*"]), "bmtpt_ds.ds_configs"],
    # At the top of the repository, where users of DeepSpeed look for them; inside the package once installed.
    package_dir={"bmtpt_ds.ds_configs": "ds_configs"},
    package_data={"bmtpt_ds": ["recipes/**/*.yaml", "experiments/reporting/*.yaml"], "bmtpt_ds.ds_configs": ["*.json"]},
    zip_safe=False,
)
