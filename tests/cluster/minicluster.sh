#!/usr/bin/env bash
# A real Slurm cluster of N simulated hosts on one machine, in namespaces that are thrown away.
#
#   minicluster.sh up DIR [N]          start N nodes (default 2); returns when all are idle, in about a second
#   minicluster.sh run DIR CMD...      run CMD on the login host, which is the controller too
#   minicluster.sh on DIR K CMD...     run CMD on node K
#   minicluster.sh ps DIR K            processes of node K that are not the host's own: jobs, their steps, ssh sessions
#   minicluster.sh power-off DIR K     node K is gone from one moment to the next, without a last word to its peers
#   minicluster.sh boot DIR K          switch it on again
#   minicluster.sh cut DIR K           take its network cable out
#   minicluster.sh heal DIR K          put it back
#   minicluster.sh down DIR            end all; DIR keeps the logs
#
# Exit 77: this machine cannot do it; stderr says why. DIR must not exist; all that the cluster writes is in it. The munge
# user must be able to enter it, and its path must be short (it holds a socket).
#
# Every host has its own network, hostname, processes and mounts; all are on one bridge with no way out. The file system
# is shared, as a cluster's is, but for /dev/shm and DIR/scratch, which are each host's own. Each node claims 2 CPUs and
# 2 GPUs, whatever there is. Partition "debug" is the default; a job in "high" preempts those in it.
#
# With MINICLUSTER_LEASE=FD in the environment of `up`, the cluster ends by itself when nobody holds the other end of
# that pipe any more.
#
# Needs root, slurmctld, slurmd, slurm-client, munge, iproute2, procps, util-linux; openssh-server for ssh to the nodes.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^$/{s/^# \{0,1\}//p;/^set/q}' "$0" >&2
  exit 2
fi
ME=$(readlink -f "$0")
COMMAND=$1
D=$(readlink -m "$2")
shift 2
export SLURM_CONF=$D/etc/slurm.conf
HOST_NAMESPACES=(--net --uts --mount --pid)
GRACE_SECONDS=${MINICLUSTER_PREEMPT_GRACE:-30}

skip() {
  echo "skip: $*" >&2
  exit 77
}

address() { # of node $1; 0 is the controller
  echo "10.77.$((($1 + 1) / 256)).$((($1 + 1) % 256))"
}

wait_until() { # SECONDS COMMAND...: false when the time is up
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.05
  done
}

# ---- processes, known by number and start time, for numbers are used again ----

started() { # when process $1 started, in ticks; nothing when there is none
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  stat=${stat##*) } # the name before it may hold anything
  cut -d ' ' -f 20 <<<"$stat"
}

remember() { # FILE PID
  echo "$2 $(started "$2")" >"$1"
}

recall() { # FILE: the number of the process that was remembered, if that lives
  local pid ticks
  read -r pid ticks 2>/dev/null <"$1" || return 1
  [ "$(started "$pid")" = "$ticks" ] && echo "$pid"
}

gone() { # FILE
  ! recall "$1" >/dev/null
}

child_of() {
  pgrep --parent "$1"
}

enter() { # PID CMD...: run CMD on the host whose first process is PID
  local pid=$1
  shift
  exec nsenter --target "$pid" "${HOST_NAMESPACES[@]}" --wd="$PWD" -- "$@"
}

on_controller() {
  local unshare
  unshare=$(recall "$D/run/cluster") || {
    echo "no cluster runs in $D" >&2
    exit 2
  }
  enter "$(child_of "$unshare")" "$@"
}

# ---- start ----

check_machine() {
  [ "$(id -u)" = 0 ] || skip "not root"
  local tool
  for tool in unshare nsenter setpriv ip pgrep munged munge slurmctld slurmd sbatch srun scontrol; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
  done
  id munge >/dev/null 2>&1 || skip "no user munge"
  unshare "${HOST_NAMESPACES[@]}" --fork --mount-proc true 2>/dev/null || skip "namespaces are not allowed here"
  unshare --net sh -c 'ip link add br0 type bridge && ip link add veth1 type veth peer name eth0' 2>/dev/null ||
    skip "no network bridges here"
}

write_slurm_conf() { # N
  cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: two minutes by default.
AuthInfo=socket=$D/munge/socket,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MessageTimeout=5
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=5
InactiveLimit=0
WaitTime=0
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
${MINICLUSTER_CONF:-}
NodeName=node[1-$1] CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=$GRACE_SECONDS
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF
  # Any two character devices: nobody opens them.
  printf 'Name=gpu File=/dev/%s\n' null zero >"$D/etc/gres.conf"
}

write_ssh() { # N: one host key, one user key, no questions
  mkdir -m 700 "$D/ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$D/ssh/host_key"
  ssh-keygen -q -t ed25519 -N '' -f "$D/ssh/id"
  cp "$D/ssh/id.pub" "$D/ssh/authorized_keys"
  echo "node* $(cut -d ' ' -f 1,2 "$D/ssh/host_key.pub")" >"$D/ssh/known_hosts"
  cat >"$D/ssh/sshd_config" <<CONF
HostKey $D/ssh/host_key
AuthorizedKeysFile $D/ssh/authorized_keys
StrictModes no
PasswordAuthentication no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
UseDNS no
CONF
  cat >"$D/ssh/ssh_config" <<CONF
Host node*
  IdentityFile $D/ssh/id
  IdentitiesOnly yes
  CheckHostIP no
  UserKnownHostsFile $D/ssh/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
CONF
}

write_files() { # N
  local k
  install -d -m 755 "$D" "$D"/{etc,run,log,scratch}
  install -d -m 700 "$D/state"
  install -d -m 755 -o munge -g munge "$D/munge"
  dd if=/dev/urandom bs=1024 count=1 status=none | install -m 400 -o munge -g munge /dev/stdin "$D/munge/key"
  {
    echo "127.0.0.1 localhost"
    echo "$(address 0) ctl"
    for k in $(seq "$1"); do echo "$(address "$k") node$k"; done
  } >"$D/etc/hosts"
  write_slurm_conf "$1"
  if has_ssh; then write_ssh; fi
}

has_ssh() {
  command -v ssh >/dev/null && [ -x /usr/sbin/sshd ] && [ -e /etc/ssh/ssh_config ]
}

new_host() { # LOG ARGUMENTS...: start this script in namespaces of its own; nothing of the caller's environment goes in
  local log=$1
  shift
  # --kill-child: when unshare is killed the first process dies, and with it, by the kernel, every other of the host.
  env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 MINICLUSTER_LEASE="${MINICLUSTER_LEASE:-}" \
    setsid unshare "${HOST_NAMESPACES[@]}" --fork --kill-child --mount-proc bash "$ME" "$@" \
    </dev/null >>"$log" 2>&1 &
  disown # or bash reports its end
}

all_idle() { # N
  [ "$("$ME" run "$D" sinfo --noheader --partition=debug --states=idle --format=%D 2>/dev/null)" = "$1" ]
}

up() {
  local n=${1:-2} code
  check_machine
  if [ -e "$D" ]; then
    echo "$D exists" >&2
    exit 2
  fi
  trap 'code=$?; [ "$code" = 0 ] || { tail -n 20 "$D"/log/* >&2 || true; down; }' EXIT
  trap 'exit 1' INT TERM
  write_files "$n"
  new_host "$D/log/controller.out" _controller "$D" "$n"
  remember "$D/run/cluster" $!
  wait_until 20 test -e "$D/run/booted"
  wait_until 20 all_idle "$n"
}

down() {
  local unshare
  if unshare=$(recall "$D/run/cluster"); then
    kill -KILL "$unshare"
    wait_until 10 gone "$D/run/cluster"
  fi
}

# ---- inside: the first process of a host ----

common_mounts() {
  mount -t tmpfs tmpfs /dev/shm
  mount -t tmpfs tmpfs "$D/scratch"
}

controller() { # N
  local k
  hostname ctl
  common_mounts
  mount --bind "$D/etc/hosts" /etc/hosts
  mount -t tmpfs tmpfs /run
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$(address 0)/16" dev br0
  ip link set br0 up
  if has_ssh; then
    mount --bind "$D/ssh/ssh_config" /etc/ssh/ssh_config
    mkdir /run/sshd
  fi
  setpriv --reuid=munge --regid=munge --clear-groups \
    munged --foreground --socket="$D/munge/socket" --key-file="$D/munge/key" --pid-file="$D/munge/pid" \
    --log-file="$D/munge/log" --seed-file="$D/munge/seed" --num-threads=2 &
  wait_until 10 munge --no-input --socket="$D/munge/socket" >/dev/null 2>&1
  slurmctld -D &
  for k in $(seq "$1"); do boot "$k"; done
  for k in $(seq "$1"); do booted "$k"; done
  touch "$D/run/booted"
  live
}

own_network() { # PID
  [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ]
}

boot() { # K, on the controller
  local unshare
  if recall "$D/run/node$1" >/dev/null; then return; fi
  rm -f "$D/run/node$1.booted"
  new_host "$D/log/node$1.out" _node "$D" "$1"
  unshare=$!
  remember "$D/run/node$1" "$unshare"
  wait_until 10 own_network "$unshare"
  ip link add "veth$1" type veth peer name eth0 netns "$unshare"
  ip link set "veth$1" master br0 up
}

booted() { # K
  wait_until 10 test -e "$D/run/node$1.booted"
}

node() { # K
  hostname "node$1"
  common_mounts
  ip link set lo up
  wait_until 10 ip link show eth0 >/dev/null 2>&1
  ip addr add "$(address "$1")/16" dev eth0
  ip link set eth0 up
  mkdir -p "$D/spool.node$1"
  if has_ssh; then
    /usr/sbin/sshd -f "$D/ssh/sshd_config" -E "$D/log/sshd.node$1.log"
  fi
  slurmd -D &
  touch "$D/run/node$1.booted"
  live
}

live() { # bash reaps the orphans that come to the first process
  if [ -n "${MINICLUSTER_LEASE:-}" ]; then
    read -r -u "$MINICLUSTER_LEASE" || exit 0
  fi
  sleep infinity &
  wait
}

power_off() { # K, on the controller
  local unshare
  unshare=$(recall "$D/run/node$1") || return 0
  ip link delete "veth$1" # first, so that no connection is closed
  kill -KILL "$unshare"
  wait_until 10 gone "$D/run/node$1"
}

foreign_processes() { # on a node
  # All but the first process and what that started as the host's own, and us.
  ps -e -o pid=,ppid=,comm=,args= |
    awk -v me=$$ '!($1 == 1 || $1 == me || $2 == me || ($2 == 1 && ($3 == "slurmd" || $3 == "sleep" || $4 ~ /^sshd:?$/ && /listener/)))'
}

case $COMMAND in
up) up "$@" ;;
down) down ;;
run) on_controller "$@" ;;
on | ps | power-off | boot) on_controller bash "$ME" "_$COMMAND" "$D" "$@" ;;
cut) on_controller ip link set "veth$1" down ;;
heal) on_controller ip link set "veth$1" up ;;
_controller) controller "$@" ;;
_node) node "$@" ;;
_boot)
  boot "$@"
  booted "$@"
  ;;
_power-off) power_off "$@" ;;
_on | _ps)
  K=$1
  shift
  if [ "$COMMAND" = _ps ]; then set -- bash "$ME" _foreign "$D"; fi
  enter "$(child_of "$(recall "$D/run/node$K")")" "$@"
  ;;
_foreign) foreign_processes ;;
*)
  echo "unknown command $COMMAND" >&2
  exit 2
  ;;
esac
