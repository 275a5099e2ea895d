"""What every benchmark has in common: its options, and on which machine it ran, on the screen and in a file."""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    described = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        described["processor"] = names[0] if names else described["processor"]
    return described


def parser(description: str | None, devices: Sequence[str] = ("cpu",)) -> argparse.ArgumentParser:
    """With the options that all have: where to run, and where to write."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=devices, default="cpu")
    made.add_argument("--json", type=Path, help="also write the results here")
    return made


def report(options: argparse.Namespace, described: dict[str, Any] | None = None, **results: Any) -> dict[str, Any]:
    """Say on which machine, write the file, and return what is in it.

    Args:
        options: of `parser`.
        described: the machine, where it was asked before the threads changed.
        results: to be written.
    """
    found = {"machine": described or machine(options.device), **results}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return found
