#!/usr/bin/env bash
# Runs a command of megatron-oreal on the tasks of a Slurm job: README.md says how it is used and which variables it has.
# Usage, within a job: job.sh train|sft|eval|passrate|convert ARGUMENT...
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2

fail() {
    echo "job.sh: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is no Slurm job; submit one of the .slurm files with sbatch"
[ $# -gt 0 ] || fail "name a command: train, sft, eval, passrate or convert"
[ -f examples/slurm/job.sh ] || fail "submit from the root of the checkout, not from $PWD"
command=$1
shift
case $command in
    train | sft | eval | passrate | convert) ;;
    *) fail "no command $command; there are train, sft, eval, passrate and convert" ;;
esac
max_restarts=${MAX_RESTARTS:-3}
case $max_restarts in '' | *[!0-9]*) fail "MAX_RESTARTS must be a whole number >= 0, got $max_restarts" ;; esac

# The command, in the image or from this checkout.
container=()
program=${MEGATRON_OREAL_BIN:-$PWD/.venv/bin}
if [ -n "${IMAGE:-}" ]; then
    program=${MEGATRON_OREAL_BIN:-/opt/megatron_oreal/bin}
    container=(--container-image="$IMAGE" --container-mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir="$PWD"
        --no-container-mount-home "--container-env=MASTER_ADDR,MASTER_PORT")
elif [ ! -x "$program/megatron-oreal" ]; then
    fail "$program/megatron-oreal is not there; run tools/setup_env.sh, or set IMAGE or MEGATRON_OREAL_BIN"
fi

# A member of an array trains with its number as the seed, in a run directory of its own.
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && { [ "$command" = train ] || [ "$command" = sft ]; }; then
    run_dir=$(sed -n "s/^run_dir: *[\"']\{0,1\}\([^ #\"']*\).*/\1/p" "${1:-/dev/null}")
    for argument in "$@"; do
        case $argument in run_dir=*) run_dir=${argument#run_dir=} ;; esac
    done
    [ -n "$run_dir" ] || fail "${1:-no configuration}: no run_dir to give each member of the array a folder beside"
    set -- "$@" "seed=$SLURM_ARRAY_TASK_ID" "run_dir=$run_dir-seed$SLURM_ARRAY_TASK_ID"
fi
if [ "$command" = convert ]; then
    work=("$program/python" tools/convert.py "$@")
    tasks=(--nodes=1 --ntasks=1)
else
    work=("$program/megatron-oreal" "$command" "$@")
    tasks=()
fi

MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1) # where the first rank runs
[ -n "$MASTER_ADDR" ] || fail "scontrol show hostnames names no node for SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-}"
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))                            # below the ports that Linux gives out itself
export MASTER_ADDR MASTER_PORT
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # tensor parallelism overlaps in Megatron's order
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# srun does not take over what sbatch was told of CPUs.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

LOG_DIR=${LOG_DIR:-logs}
mkdir -p "$LOG_DIR" || fail "LOG_DIR=$LOG_DIR cannot be made; name a folder that all nodes see"
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
step=0
stopping=0
terminated=0
# Only training saves when it is asked to stop; the other commands have to work until they are done.
case $command in
    train | sft) trap 'stopping=1; [ "$step" = 0 ] || kill -USR1 "$step"' USR1 ;;
    *) trap '' USR1 ;;
esac
trap 'terminated=1' TERM

again() { # back into the queue, where the same job number continues
    echo "job.sh: $(date -Is) the step ended with $status; job $job is put back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    sleep 600 # Slurm ends this job within seconds; ending by itself would count as done
    exit 75
}

# A job that cannot work ends here, within a minute. Codes other than 1 and 2 are not the doctor's own: the run will tell.
if [ "$command" != convert ] && [ "${DOCTOR:-1}" != 0 ]; then
    log=$LOG_DIR/${SLURM_JOB_NAME:-job}_${job}_doctor_r${SLURM_RESTART_COUNT:-0}
    echo "job.sh: $(date -Is) doctor on $SLURM_JOB_NODELIST, log ${log}_0_NODE.log" >&2
    srun --kill-on-bad-exit=1 ${container[@]+"${container[@]}"} --output="${log}_%t_%N.log" \
        "$program/megatron-oreal" doctor --command="$command" "$@" 2>"${log}_srun.log"
    status=$?
    first=$(sed -n 's/.*: Exited with exit code \([0-9]*\)$/\1/p' "${log}_srun.log" | head -n 1)
    status=${first:-$status}
    grep -h -E '^(error|warning|doctor:|Error:) ' "$log"_*_*.log "${log}_srun.log" >&2
    case $status in 1 | 2) exit "$status" ;; esac
fi

# Steps that the signal ended before they could save. A line each, for a job that always fails must leave the queue.
unsaved=$LOG_DIR/${SLURM_JOB_NAME:-job}_$job.unsaved

for ((attempt = 0; attempt <= max_restarts; attempt++)); do
    log=$LOG_DIR/${SLURM_JOB_NAME:-job}_${job}_${command}_r${SLURM_RESTART_COUNT:-0}.$attempt
    echo "job.sh: $(date -Is) $command on $SLURM_JOB_NODELIST, logs ${log}_RANK_NODE.log" >&2
    srun --kill-on-bad-exit=1 ${tasks[@]+"${tasks[@]}"} ${container[@]+"${container[@]}"} --output="${log}_%t_%N.log" \
        "${work[@]}" 2>"${log}_srun.log" &
    step=$!
    if [ "$stopping" = 1 ]; then kill -USR1 "$step"; fi    # the signal came before there was a step to pass it to
    while kill -0 "$step" 2>/dev/null; do wait "$step"; done # A signal ends `wait`, not the step.
    wait "$step"
    status=$?
    step=0
    cat "${log}_srun.log" >&2
    # srun ends the other tasks at the first code that is not 0, and then reports their deaths instead of that code.
    first=$(sed -n 's/.*: Exited with exit code \([0-9]*\)$/\1/p' "${log}_srun.log" | head -n 1)
    status=${first:-$status}
    case $status in
        0 | 2) break ;; # done, or a mistake that starting again would repeat
        75) # saved
            rm -f "$unsaved"
            again
            ;;
    esac
    if [ "$stopping" = 1 ]; then
        echo "$(date -Is) $status" >>"$unsaved"
        if [ "$(wc -l <"$unsaved")" -le "$max_restarts" ]; then again; fi
        break
    fi
    if [ "$terminated" = 1 ]; then # cancelled or preempted: Slurm decides which when it ends this script
        sleep 600
        break
    fi
    echo "job.sh: the step ended with $status; it starts again from the last checkpoint" >&2
done
rm -f "$unsaved"
if [ "$status" != 0 ]; then # the first rank says what is wrong; srun's own line names the rank that failed first
    tail -n 3 "$log"_0_*.log >&2
fi
exit "$status"
