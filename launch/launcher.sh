# Sourced by the scripts that launch a step: sets up the environment, and runs the deepspeed launcher so that no process
# remains afterwards.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

# number NAME VALUE: prints VALUE; if it is not a whole number above 0, prints an error and exits with 2.
number() {
    case $2 in
        "" | 0* | *[!0-9]*) echo "error: $1 $2: a whole number above 0 is needed" >&2; exit 2 ;;
    esac
    echo "$2"
}

# Uses the active environment if it has DeepSpeed, otherwise the pinned one.
use_environment() {
    command -v deepspeed > /dev/null || source "$root/launch/environment.sh"
}

# Selects the CPU for DeepSpeed if torch finds no GPU. DeepSpeed itself looks for nvidia-smi, which is missing in many
# containers and with ROCm's GPUs.
choose_accelerator() {
    if [ -z "${DS_ACCELERATOR:-}" ] &&
            ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
        export DS_ACCELERATOR=cpu
    fi
    if [ "${DS_ACCELERATOR:-}" = cpu ]; then
        # Threads that spin while they wait take cores from working threads; a busy machine becomes ten times slower.
        export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    fi
}

# step_command PROGRAM GPUS FLAGS...: sets `command` to the command that runs PROGRAM/main.py on GPUS ranks.
step_command() {
    local program=$1 gpus=$2 port
    shift 2
    use_environment
    choose_accelerator
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    command=(deepspeed --log_level critical --num_gpus "$gpus" --master_port "$port" "$root/$program/main.py" "$@")
}

# launch_step PROGRAM GPUS FLAGS...: runs the step as a child process, and returns its exit code.
launch_step() {
    local status=0
    step_command "$@"
    # A signal to this script, Ctrl-C too, is passed on to the launcher and its ranks, which have a process group of
    # their own (-m). They save a checkpoint, and the script ends when they have ended.
    set -m
    "${command[@]}" < /dev/null &
    launched=$!
    set +m
    trap 'end_launched; exit 130' INT
    trap 'end_launched; exit 143' TERM HUP
    wait "$launched" || status=$?
    trap - INT TERM HUP
    return "$status"
}

# Ranks that have not ended 35 seconds after the signal are killed; the launcher does so after 30.
end_launched() {
    local waited=0
    kill -TERM -- "-$launched" 2> /dev/null || return 0
    while [ "$waited" -lt 350 ] && kill -0 -- "-$launched" 2> /dev/null; do
        sleep 0.1
        waited=$((waited + 1))
    done
    kill -KILL -- "-$launched" 2> /dev/null || true
}
