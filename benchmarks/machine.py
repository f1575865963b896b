"""What a benchmark writes beside its figures: the machine, the versions, and the time; and whether it can."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from memplan.serialize import write

os.environ["MEMPLAN_CACHE"] = "0"  # every figure is of plans that are made here


def describe() -> dict[str, Any]:
    """The machine and the libraries, in words."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def writable(path: str) -> str:
    """An argument's type: refused before anything is measured where it cannot be written."""
    if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: name a file in a folder that exists and is writable")
    return path


def save(path: str | Path, figures: dict[str, Any]) -> None:
    """Write the figures as JSON with the machine described."""
    write(path, json.dumps({"machine": describe()} | figures, indent=1) + "\n")
    print(f"written: {path}")
