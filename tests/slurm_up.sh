#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, for the tests: as root, without systemd.
#
#   tests/slurm_up.sh up FOLDER     install Slurm if it is missing (apt), start it, wait for the node
#   tests/slurm_up.sh down FOLDER   end the three daemons that `up` started
#
# FOLDER takes configuration, state and logs; export SLURM_CONF=FOLDER/slurm.conf for Slurm's commands.
# Two GPUs are declared that are none. Partitions: main (the default), low (preempted by high:
# SIGTERM, 20 s, requeued), now (preempted likewise, requeued at once) and high. Exit codes: 0 the node is ready, 1 it is not (the ends of the logs are
# printed), 2 a wrong call, 3 Slurm cannot be installed here.
set -euo pipefail
[ $# = 2 ] || { sed -n 2,11p "$0" >&2; exit 2; }
mkdir -p "$2"
folder=$(realpath "$2") host=$(hostname -s) cpus=$(env -u OMP_NUM_THREADS nproc)  # which heeds it
export SLURM_CONF=$folder/slurm.conf

is_alive() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

down() {
  local daemon pid
  for daemon in slurmd slurmctld munged; do
    is_alive $daemon || continue
    pid=$(cat "$folder/$daemon.pid")
    kill "$pid"
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true  # one whose jobs do not end
  done
}

install() {
  command -v slurmctld slurmd munged srun >/dev/null && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 3
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then  # packages would start their daemons
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  export DEBIAN_FRONTEND=noninteractive
  { timeout 300 apt-get update -qq || true
    timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge
  } >"$folder/apt.log" 2>&1 || exit 3
}

configure() {
  mkdir -p "$folder"/{state,spool}
  for number in $(seq 0 $((cpus - 1))); do
    touch "$folder/gpu$number"
    echo "Name=gpu File=$folder/gpu$number"
  done >"$folder/gres.conf"
  printf 'CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n' >"$folder/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus Gres=gpu:$cpus State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=$host PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=now Nodes=$host PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=$host PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
  if ! is_alive munged; then
    (umask 377; [ -s "$folder/munge.key" ] || head -c 1024 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
      --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
      --seed-file="$folder/munged.seed"
  fi
  is_alive slurmctld || slurmctld -f "$SLURM_CONF"
  is_alive slurmd || slurmd -f "$SLURM_CONF" || true  # its log is shown below
}

await_node() {
  local state
  for _ in $(seq 60); do
    state=$(sinfo -h -p main -o %t 2>/dev/null || true)
    case $state in
      idle | mix | alloc) return ;;
      down* | drain*) scontrol update nodename="$host" state=resume 2>/dev/null || true ;;
    esac
    sleep 1
  done
  echo "the node is ${state:-unknown} after 60 s" >&2
  tail -n 5 "$folder"/*.log >&2
  exit 1
}

case $1 in
  down) down ;;
  up) install; configure; start; await_node ;;
  *) exit 2 ;;
esac
