"""What a rank sees of its own host: software, GPUs, limits, W&B. Facts only; ``judge_host`` says what they mean."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from mlm_dist.lifecycle import environment
from mlm_dist.wandb_mirror import resolve_mode

WANDB_TIMEOUT_S = 3.0
_INFINIBAND = Path("/sys/class/infiniband")


def name() -> str:
    """What the host is called."""
    return socket.gethostname()


def versions() -> dict[str, Any]:
    """Versions of what decides the numbers of a run, and the commit of this program."""
    found = environment()
    return {
        "python": found["python"],
        **found["packages"],
        "commit": found["commit"],
        "torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "platform": found["platform"],
    }


def imports() -> dict[str, Any]:
    """Import what training imports; raises what that raises."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for package in ("transformers", "webdataset", "deepspeed"):
        importlib.import_module(package)
    return {}


def gpus() -> dict[str, Any]:
    """The host's GPUs by the driver, whatever this process may see of them: {installed: [{name, memory_mib}], driver}."""
    if shutil.which("nvidia-smi") is None:
        return {"installed": [], "driver": None}
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    if done.returncode:
        return {"error": f"nvidia-smi fails: {(done.stdout + done.stderr).strip()[:300]}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return {
        "installed": [{"name": name, "memory_mib": int(memory) if memory.isdigit() else 0} for name, memory, _ in rows],
        "driver": rows[0][2] if rows else None,
    }


def device(local_rank: int) -> dict[str, Any]:
    """What torch sees of this rank's GPU; ``visible`` 0 where there is none."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= visible:
        return {"visible": visible}
    free, total = torch.cuda.mem_get_info(local_rank)
    return {
        "visible": visible,
        "name": torch.cuda.get_device_name(local_rank),
        "free": free,
        "total": total,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def limits() -> dict[str, Any]:
    """Resource limits of this process: open files at most, as training raises its limit, locked memory in bytes (-1: none), /dev/shm in bytes."""
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shm = Path("/dev/shm")
    return {
        "open_files": _most(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        "memlock": -1 if memlock == resource.RLIM_INFINITY else memlock,
        "infiniband": _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
        "shm": shutil.disk_usage(shm).free if shm.is_dir() else None,
    }


def _most(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def wandb(setting: str) -> dict[str, Any]:
    """What ``track.wandb`` comes to here and, if that is online, whether the server answers. Of a login only whether there is one."""
    mode = resolve_mode(setting)
    logged_in = resolve_mode("auto", {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}) == "online"
    parts = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without a password that may be in it
    facts: dict[str, Any] = {"mode": mode, "logged_in": logged_in, "url": url}
    if mode == "online":
        facts["unreachable"] = _unreachable(url)
    return facts


def _unreachable(url: str) -> str | None:
    """Why the server of a URL does not answer, or None: any answer will do."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=WANDB_TIMEOUT_S):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:  # ValueError: no URL at all
        return str(getattr(error, "reason", error))
