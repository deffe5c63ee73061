"""A hostfile and its filters, and the command and environment that start a run on these hosts. Reads the file, no more."""

from __future__ import annotations

import os
import re
import shlex
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.command import STALE, Call, runner_command
from mlm_dist.errors import UserError
from mlm_dist.redact import SECRET_VARIABLE

Slots = dict[str, tuple[int, ...]]  # by host in the order of ranks: its slots, a rank each

# What a program on another host gets beside the environment that ssh gives it: these variables and prefixes.
PASSED = ("PATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR")
EARLY = ("LD_LIBRARY_PATH", "DS_ACCELERATOR")
PASSED_PREFIXES = ("MLM_", "NCCL_", "GLOO_", "UCX_", "TORCH_", "OMP_", "PYTHON", "HF_", "WANDB_")
# What the deepspeed launcher would write on command lines by itself, in quotes that do not hold `"`, `$` or a backquote.
_DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
_URL_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def read_hostfile(path: Path) -> Slots:
    """All slots of DeepSpeed's hostfile `path`: lines `NAME slots=N`; empty ones and those that begin with # are skipped.

    Raises:
        UserError: the file cannot be read or holds anything else, the same host twice, or no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--hostfile {path}: cannot be read ({e})") from None
    if not path.is_file():
        raise UserError(f"--hostfile {path}: must be a regular file, since the deepspeed launcher reads it again")
    hosts: Slots = {}
    for number, line in enumerate((raw.strip() for raw in lines), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}: {line!r}"
        match = re.fullmatch(r"(\S+)\s+slots=([0-9]+)(\s.*)?", line)
        if match is None:
            raise UserError(f"{where}: must be NAME slots=N, such as node1 slots=8")
        host, slots = match[1], int(match[2])
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", host):
            raise UserError(f"{where}: {host!r} is no host name; a user, a port or an alias goes into ~/.ssh/config")
        if slots < 1:
            raise UserError(f"{where}: slots={slots}: at least 1; leave out a host that shall have none")
        if host in hosts:
            raise UserError(f"{where}: {host} stands here for the second time; give it all its slots on one line")
        hosts[host] = tuple(range(slots))
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host")
    return hosts


def _parse_filter(flag: str, text: str, hosts: Slots) -> Slots:
    """The slots that `text` names, NAME[:SLOT,...] joined by `@`; a host without slots in all of it stands for all."""
    named: dict[str, set[int]] = {}
    for entry in text.split("@"):
        host, colon, listing = entry.partition(":")
        if host not in hosts:
            raise UserError(f"{flag} {text}: no host {host!r} in the hostfile, which has {', '.join(hosts)}")
        slots = listing.split(",") if colon else []
        for slot in slots:
            if not re.fullmatch("[0-9]+", slot) or int(slot) not in hosts[host]:
                raise UserError(f"{flag} {text}: no slot {slot!r} on {host}, which has 0 to {hosts[host][-1]}")
        named.setdefault(host, set()).update(map(int, slots))
    return {host: tuple(sorted(slots)) or hosts[host] for host, slots in named.items()}


def select(hosts: Slots, *, include: str | None = None, exclude: str | None = None) -> Slots:
    """The slots to use, by DeepSpeed's rules: `include` or `exclude` is such as `worker-0@worker-1:0,2`.

    Raises:
        UserError: both are given, one names what is not there, or nothing is left.
    """
    if include is not None and exclude is not None:
        raise UserError("--include and --exclude: give one of them")
    if include is not None:
        named = _parse_filter("--include", include, hosts)
        return {host: named[host] for host in hosts if host in named}
    if exclude is None:
        return hosts
    named = _parse_filter("--exclude", exclude, hosts)
    kept = {host: tuple(s for s in slots if s not in named.get(host, ())) for host, slots in hosts.items()}
    kept = {host: slots for host, slots in kept.items() if slots}
    if not kept:
        raise UserError(f"--exclude {exclude}: leaves nothing to run on")
    return kept


def default_port(run: Path) -> int:
    """The rendezvous port of a run that every host finds by itself: 20000 to 29999, by the absolute path of `run`."""
    return 20000 + zlib.crc32(os.fsencode(os.path.abspath(run))) % 10000


def is_plain(word: str) -> bool:
    """Whether pdsh and every shell leave `word` as it is, without quotes."""
    return re.fullmatch(r"[\w@+=:,./-]+", word) is not None


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must stay off files and command lines: by its name, or by a URL with a password in its value."""
    return bool(SECRET_VARIABLE.search(name) or _URL_PASSWORD.search(value))


def passed_on(base: Mapping[str, str], export: Iterable[str]) -> dict[str, str]:
    """The variables of `base` that programs on other hosts get: those of PASSED, and those named in `export`.

    Raises:
        UserError: a name of `export` is not set, or holds a secret.
    """
    env = {k: v for k, v in base.items() if (k in PASSED or k.startswith(PASSED_PREFIXES)) and not is_secret(k, v)}
    for name in export:
        if name not in base:
            raise UserError(f"--export {name}: is not set here")
        if is_secret(name, base[name]):
            raise UserError(
                f"--export {name}: secrets are not put on command lines, where every user of a host sees them; "
                "keep it on the hosts, for W&B by `wandb login` (~/.netrc), for Hugging Face by `hf auth login`"
            )
        env[name] = base[name]
    return env


def python_path(base: Mapping[str, str], cwd: str, ours: str) -> str:
    """PYTHONPATH of `base` as seen from elsewhere: relative entries by `cwd`, and `ours`, this code, if only cwd has it.

    Raises:
        UserError: it holds what the deepspeed launcher cannot pass through the hosts' shells.
    """
    given = base.get("PYTHONPATH", "")
    entries = [os.path.join(cwd, p) for p in given.split(os.pathsep)] if given else []
    if os.path.realpath(cwd) == os.path.realpath(ours) and cwd not in entries:
        entries.append(cwd)
    path = os.pathsep.join(entries)
    if re.search(r'["$`\\%\n]', path):
        raise UserError(f"PYTHONPATH={path}: the deepspeed launcher cannot pass this on to other hosts; rename it")
    return path


@dataclass(frozen=True)
class Place:
    """Where the ranks go and meet."""

    hostfile: str  # absolute
    selection: tuple[str, ...]  # the deepspeed launcher's include or exclude flag
    address: str
    port: int

    def flags(self) -> list[str]:
        """Those of the deepspeed launcher for it."""
        meet = [f"--master_addr={self.address}", f"--master_port={self.port}"]
        return [f"--hostfile={self.hostfile}", *self.selection, *meet]


def ssh_flags(place: Place, env: Mapping[str, str], *, verbose: bool) -> list[str]:
    """The flags of the deepspeed launcher that starts all ranks of `place` by pdsh, which get `env`."""
    # What Python itself needs on a host, before `launcher.exec` sets the rest. pdsh takes % for its own.
    early = [f"{k}={shlex.quote(env[k]).replace('%', '%%')}" for k in EARLY if k in env]
    # What follows pdsh's own arguments goes in front of the command; -N: no "host: " before each line of rank 0.
    pdsh = [*([] if verbose else ["-N"]), *([f"export {' '.join(early)};"] if early else [])]
    # force_multi: else one host, which may be another, is taken for this one. no_ssh_check: of the first host only.
    flags = [*place.flags(), "--launcher=pdsh", "--force_multi", "--no_ssh_check"]
    if pdsh:
        flags.append(f"--launcher_args={shlex.join(pdsh)}")
    if not verbose:
        # It keeps its own log level from its part on the hosts. This value it writes as two words for their shells.
        flags.append("--enable_each_rank_log=None --log_level=critical")
    return flags


def no_ssh_flags(place: Place, node_rank: int) -> list[str]:
    """The flags of the deepspeed launcher that starts the ranks of one host."""
    return [*place.flags(), "--no_ssh", f"--node_rank={node_rank}"]


def ssh_command(python: str, flags: Sequence[str], call: Call, *, verbose: bool) -> list[str]:
    """The argument vector that runs `call` on every rank of the hosts. It must be run in the directory `/`.

    The deepspeed launcher joins arguments, its directory and its interpreter's path without quotes into a command for
    the hosts' shells. So the call is packed, the directory is one that needs no quotes, and each rank goes to its own.

    Raises:
        UserError: the path of `python` needs quotes.
    """
    if not is_plain(python):
        raise UserError(
            f"{python}: the deepspeed launcher cannot start a Python of this path on other hosts; "
            "use one at a path of letters, digits and ._-+, by a link to its environment for example"
        )
    return runner_command(python, flags, ["--packed", call.pack()], verbose=verbose)


def ssh_environment(base: Mapping[str, str], path: str, ssh_port: int | None) -> dict[str, str]:
    """The environment of `ssh_command` itself: `base` less secrets and what DeepSpeed would pass on; `path` is
    PYTHONPATH."""
    dropped = (*_DEEPSPEED_EXPORTS, "CUDA_VISIBLE_DEVICES")
    env = {k: v for k, v in base.items() if k not in STALE and not k.startswith(dropped) and not is_secret(k, v)}
    if path:
        env["PYTHONPATH"] = path
    # ssh takes the first value that it is given for an option, so the user's own come before these.
    ssh = [base.get("PDSH_SSH_ARGS_APPEND", ""), f"-p {ssh_port}" if ssh_port else ""]
    ssh += ["-o BatchMode=yes", "-o ServerAliveInterval=15", "-o ServerAliveCountMax=4"]
    env["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, ssh))
    return env
