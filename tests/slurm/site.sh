# A real Slurm of four nodes on this machine, all in one folder: functions for `run`. Nothing of it asks for more rights
# than those of who runs it, and nothing is left when it is down.

# Starts it in folder $1, with ports from $2 on.
site_up() {
    site=$1
    local port=$2 host i
    host=$(hostname -s)
    mkdir -p "$site"/{key,socket,state,log,pid}
    chmod 700 "$site/key"
    head -c 1024 /dev/urandom >"$site/key/munge"
    chmod 600 "$site/key/munge"
    # Slurm 22.05 wants a plugin for control groups named even where none is used.
    echo 'CgroupPlugin=cgroup/v1' >"$site/cgroup.conf"
    # cred_expire is also for how long a job that is queued again waits. Memory is counted, as most sites do.
    cat >"$site/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$site/socket/munge,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile=$site/pid/slurmctld
SlurmctldLogFile=$site/log/slurmctld
SlurmdPidFile=$site/pid/%n
SlurmdLogFile=$site/log/%n
SlurmdSpoolDir=$site/spool-%n
StateSaveLocation=$site/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=3
SlurmctldTimeout=5
MessageTimeout=5
KillWait=10
ReturnToService=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[0-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=memory Nodes=n[2-3] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[0-3] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
    for i in 0 1 2 3; do
        mkdir -p "$site/spool-n$i"
        echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + i)) CPUs=2 CoresPerSocket=2 RealMemory=4000 State=UNKNOWN" >>"$site/slurm.conf"
    done
    export SLURM_CONF=$site/slurm.conf
    munged --key-file="$site/key/munge" --seed-file="$site/key/seed" --socket="$site/socket/munge" \
        --pid-file="$site/pid/munged" --log-file="$site/key/log" --num-threads=2
    slurmctld -c
    for i in 0 1 2 3; do slurmd -N "n$i"; done
    until_true 30 'the nodes are there' site_is_idle
}

site_is_idle() {
    [ "$(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null)" = 4 ]
}

# The processes whose environment holds the line $1.
processes_with() {
    local environment
    for environment in /proc/[0-9]*/environ; do
        grep -qzxF "$1" "$environment" 2>/dev/null && echo "${environment//[!0-9]/}"
    done
}

# Parents of processes that are Slurm's own.
daemons_of() {
    local pid parent
    for pid in "$@"; do
        parent=$(ps -o ppid= -p "$pid" | tr -d ' ')
        [ "$(cat "/proc/$parent/comm" 2>/dev/null)" = slurmstepd ] && echo "$parent"
    done | sort -u
}

# Node $1 fails: its daemon, what that has started for steps, and all tasks, at once.
kill_node() {
    local tasks
    mapfile -t tasks < <(processes_with "SLURMD_NODENAME=$1")
    kill -STOP "$(cat "$site/pid/$1")"
    # The steps' daemons first: they would report the ends of their tasks.
    kill -KILL $(daemons_of "${tasks[@]}") 2>/dev/null
    kill -KILL "$(cat "$site/pid/$1")" "${tasks[@]}" 2>/dev/null
    return 0
}

# Ends all that was started for it.
site_down() {
    local pid left=()
    [ -n "${site:-}" ] || return 0
    scancel --user="$(id -un)" 2>/dev/null
    for _ in {1..150}; do
        [ -z "$(squeue --noheader 2>/dev/null)" ] && break
        sleep 0.1
    done
    for pid in $(processes_with "SLURM_CONF=$SLURM_CONF"); do
        grep -qz '^SLURM_JOB_ID=' "/proc/$pid/environ" 2>/dev/null && left+=("$pid")
    done
    kill -KILL $(daemons_of "${left[@]}") "${left[@]}" 2>/dev/null
    kill $(cat "$site"/pid/* 2>/dev/null) 2>/dev/null
    for _ in {1..50}; do
        [ -z "$(ls "$site/pid")" ] && break
        sleep 0.1
    done
    return 0
}
