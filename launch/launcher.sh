# Sourced by the scripts that launch a step: the environment, and the deepspeed launcher with nothing left behind.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
if ! command -v nvidia-smi > /dev/null; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
    # Threads that spin while they wait take the cores from those that work: ten times slower on a busy machine.
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
fi

# number NAME VALUE: VALUE, or one line and exit code 2 if it is no whole number above 0.
number() {
    case $2 in
        "" | 0* | *[!0-9]*) echo "error: $1 $2: a whole number above 0 is needed" >&2; exit 2 ;;
    esac
    echo "$2"
}

# An environment that is active and has DeepSpeed is used as it is.
use_environment() {
    command -v deepspeed > /dev/null || source "$root/launch/environment.sh"
}

# launch_step PROGRAM GPUS FLAGS...: PROGRAM/main.py on GPUS ranks; returns its exit code.
launch_step() {
    local program=$1 gpus=$2 port status=0
    shift 2
    use_environment
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    # The launcher's workers outlive it when only the launcher is killed. So it gets a process group of its own (-m),
    # and a signal to this script, Ctrl-C too, ends the whole group.
    set -m
    deepspeed --log_level critical --num_gpus "$gpus" --master_port "$port" "$root/$program/main.py" "$@" < /dev/null &
    launched=$!
    set +m
    trap end_launched EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    wait "$launched" || status=$?
    end_launched
    trap - EXIT INT TERM HUP
    return "$status"
}

end_launched() {
    kill -TERM -- "-$launched" 2> /dev/null || return 0
    sleep 1
    kill -KILL -- "-$launched" 2> /dev/null || true
}
