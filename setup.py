"""Packaging of moc_ckpt. Metadata lives here; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "moc_ckpt" / "_version.py").read_text(encoding="utf-8").split('__version__ = "')[1].split('"')[0]

setup(
    name="moc_ckpt",
    version=VERSION,
    description="Fault-tolerant Mixture-of-Experts training for DeepSpeed and Megatron-DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["moc_ckpt", "moc_ckpt.*"]),
    package_data={"moc_ckpt": ["py.typed"]},
    # Loaded with ctypes, and not needed: without a compiler torch does the same, at some cost for the training thread.
    ext_modules=[
        Extension(
            "moc_ckpt.snapshot._paced_copy",
            ["moc_ckpt/snapshot/paced_copy.c"],
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        )
    ],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "deepspeed>=0.17",
        "tensorstore>=0.1.76",
        "pydantic>=2.5",
        "typer>=0.12",
        "rich>=13",
        "msgspec>=0.18",
        "numpy>=1.24",
        "scipy>=1.11",
        "crc32c>=2.7",
        "ml_dtypes>=0.3",
        "wrapt>=1.16",
    ],
    extras_require={
        "pretrain": ["megatron-core>=0.16,<0.17"],
        "patch": ["libcst>=1.1"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "moto[server]>=5",
            "hypothesis>=6.100",
            "safetensors>=0.4.3",
            "libcst>=1.1",
            "ruff>=0.6",
            "mypy>=1.10",
            "import-linter>=2.0",
        ],
    },
    entry_points={"console_scripts": ["moc-ckpt=moc_ckpt.cli.main:main"]},
)
