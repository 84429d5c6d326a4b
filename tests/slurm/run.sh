#!/usr/bin/env bash
# Tries examples/slurm on a real Slurm with two nodes on this machine (slurm_up.sh). Exits with 0 where Slurm cannot be
# installed here, and says so. Takes five to six minutes on an idle machine.
# Usage: tests/slurm/run.sh [layouts] [stop] [kill] [array] [cancel] [mistake] [doctor]; without a name all; the losses of stop and
# kill are compared with those of layouts.
# shellcheck disable=SC2317 # the trap and `check` call functions
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || ! unshare --net --mount true 2>/dev/null; then
    echo "slurm: skipped: a cluster of namespaces needs root, apt-get and the right to make namespaces"
    exit 0
fi
folder=$(mktemp -d "$PWD/slurm-test.XXXXXX")
stop() {
    bash tests/slurm/slurm_down.sh >/dev/null 2>&1
    rm -rf "$folder"
}
trap stop EXIT
if ! bash tests/slurm/slurm_up.sh; then
    echo "slurm: skipped: the cluster could not be started"
    exit 0
fi
# shellcheck disable=SC1091 # slurm_up.sh has written it
. /tmp/slurm-test/env.sh
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 LOG_DIR=$folder/logs
.venv/bin/python -m tests.slurm.task "$folder/task" || exit 1
failed=0

submit() { # [SBATCH OPTION...] -- JOB.SH ARGUMENT...: prints the job's number
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    sbatch --parsable --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@30 \
        --output="$folder/%x_%j.out" "${options[@]}" examples/slurm/job.sh "$@"
}
state() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*JobState=\([A-Z]*\).*/\1/p' | head -n 1; }
exit_code() { scontrol show job "$1" 2>/dev/null | sed -n 's/.*ExitCode=\([0-9:]*\).*/\1/p' | head -n 1; }
wait_for_end() { # JOB: until it is over for good
    for ((second = 0; second < 240; second++)); do
        case $(state "$1") in COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL | "") break ;; esac
        sleep 1
    done
}
wait_for_step() { # RUN_DIR NUMBER: until so many steps are recorded
    for ((tick = 0; tick < 1200; tick++)); do
        [ "$(wc -l 2>/dev/null <"$1/metrics.jsonl" || echo 0)" -lt "$2" ] || return 0
        sleep 0.1
    done
}
check() { # NAME COMMAND...
    local name=$1
    shift
    if "$@"; then echo "slurm: ok: $name (at $SECONDS s)"; else
        echo "slurm: FAILED: $name"
        tail -n 20 "$folder"/*.out "$LOG_DIR"/* 2>/dev/null
        failed=1
    fi
}
same() { .venv/bin/python -m tests.slurm.same_losses "$@"; }
nothing_left() { ! pgrep -f "megatron-oreal .*$folder" >/dev/null; }

case_layouts() {
    for layout in tensor data; do
        job=$(submit -- sft "$folder/task/$layout.yaml")
        wait_for_end "$job"
        check "$layout parallel over two nodes: $(state "$job")" test "$(state "$job")" = COMPLETED
        check "a log for each rank" test "$(find "$LOG_DIR" -name "*_${job}_*_[01]_n[12].log" | wc -l)" = 2
    done
}

case_stop() {
    job=$(submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/stopped")
    wait_for_step "$folder/stopped" 5
    scancel --batch --signal=USR1 "$job" # what --signal=B:USR1@SECONDS sends before the time limit
    wait_for_end "$job"
    check "USR1: saved, put back into the queue, same losses" same "$folder/stopped" "$folder/task/tensor"
    check "USR1: the step saved and said so" grep -q "the step ended with 75; job" "$folder"/*_"$job".out
    check "USR1: the job was started again" grep -q "resumed at step" "$folder/stopped/log.txt"
}

case_kill() {
    job=$(submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/killed" checkpoint.every=5)
    wait_for_step "$folder/killed" 12
    # The folder's name is this test's own, so no other process has it.
    pgrep -f "megatron-oreal sft .*run_dir=$folder/killed" | xargs -r kill -9
    wait_for_end "$job"
    check "killed ranks: the step starts again, same losses" same "$folder/killed" "$folder/task/tensor"
}

case_array() {
    job=$(submit --array=1-2 -- sft "$folder/task/tensor.yaml" run_dir="$folder/array" num_steps=3)
    wait_for_end "${job}_1"
    wait_for_end "${job}_2"
    check "an array has a run of each seed" test -s "$folder/array-seed1/metrics.jsonl" -a -s "$folder/array-seed2/metrics.jsonl"
}

case_cancel() {
    job=$(submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/cancelled")
    wait_for_step "$folder/cancelled" 3
    scancel "$job"
    wait_for_end "$job"
    check "scancel ends the job" test "$(state "$job")" = CANCELLED
    sleep 8 # KillWait
    check "scancel leaves no process" nothing_left
}

case_mistake() {
    job=$(submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/mistake" num_stepz=3)
    wait_for_end "$job"
    check "a mistake is named in the job's output" grep -q "did you mean 'num_steps'" "$folder"/*_"$job".out
    check "a mistake ends the job with 2" test "$(exit_code "$job")" = 2:0
    check "a mistake is found before the run starts" test "$(grep -c ", logs " "$folder"/*_"$job".out)" = 0
    job=$(DOCTOR=0 submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/mistake" num_stepz=3)
    wait_for_end "$job"
    check "a mistake ends the job with 2 without the doctor" test "$(exit_code "$job")" = 2:0
    check "a mistake is not tried again" test "$(grep -c ", logs " "$folder"/*_"$job".out)" = 1
}

case_doctor() {
    job=$(submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/doctor" num_steps=1)
    wait_for_end "$job"
    check "the doctor lets a good job start" test "$(exit_code "$job")" = 0:0
    check "the doctor sums over both nodes" grep -q "all-reduce    2 ranks, gloo" "$LOG_DIR"/*_"${job}"_doctor_*
    check "both nodes see the files" grep -q "all 2 hosts see the same" "$LOG_DIR"/*_"${job}"_doctor_*
    job=$(GLOO_SOCKET_IFNAME=nosuch0 submit -- sft "$folder/task/tensor.yaml" run_dir="$folder/hopeless")
    wait_for_end "$job"
    check "a hopeless job ends with 1" test "$(exit_code "$job")" = 1:0
    check "the doctor says why" grep -q "^error .*GLOO_SOCKET_IFNAME=nosuch0 is no interface" "$folder"/*_"$job".out
    check "a hopeless job does not start" test ! -e "$folder/hopeless"
}

if [ $# = 0 ]; then set -- layouts stop kill array cancel mistake doctor; fi
for name in "$@"; do "case_$name"; done
exit "$failed"
