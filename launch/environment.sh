#!/usr/bin/env bash
# Activates the pinned environment. It is created once, and reused until constraints.txt or pyproject.toml change.
#
#   source launch/environment.sh [--with-tests]
#
# Its directory is .venv in the repository, or the path in RLHF_VENV; its bin/ becomes the first entry of PATH.
# PYTHON names the interpreter to create it with; the default is the first python3 that is new enough.

if [ -z "${BASH_VERSION:-}" ]; then
    echo "error: launch/environment.sh needs bash: type bash, then source it there" >&2
    return 1 2>/dev/null || exit 1
fi

_environment_main() {
    local root venv extras="" wanted state
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
    venv=${RLHF_VENV:-$root/.venv}
    case $venv in "~"/*) venv=$HOME/${venv#"~/"} ;; esac  # a file of variables may leave it unexpanded
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    if [ "${1:-}" = --with-tests ]; then extras="[test]"; fi

    wanted=$(cat "$root/constraints.txt" "$root/pyproject.toml" <(echo "$root") | cksum | cut -d " " -f 1)
    state=$(_environment_state "$venv")
    if [ "$state" != "$wanted$extras" ] && [ "$state" != "$wanted[test]" ]; then
        if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -e "$venv/installed-by-launch" ]; then
            echo "error: $venv was not made by launch/environment.sh: remove it, or set RLHF_VENV to another path" >&2
            return 1
        fi
        mkdir -p "$venv" && (_environment_update "$root" "$venv" "$wanted" "$extras") 9>> "$venv/installed-by-launch" ||
            return
    fi
    export VIRTUAL_ENV=$venv PATH="$venv/bin:$PATH"
    unset PYTHONHOME
}

# Prints what is installed: the checksum and extras, or "unfinished" if pip has not finished or its Python is missing.
_environment_state() {
    local state
    state=$(cat "$1/installed-by-launch" 2>/dev/null)
    if [ -n "$state" ] && ! "$1/bin/python" -c "" 2>/dev/null; then state=unfinished; fi
    echo "$state"
}

# Installs, one script at a time. File descriptor 9 locks the file that holds the state; scripts that waited find the
# installation finished.
_environment_update() {
    local root=$1 venv=$2 wanted=$3 extras=$4 stamp=$2/installed-by-launch state python
    if command -v flock > /dev/null && ! flock -n 9; then
        echo "waiting for another script's installation into $venv"
        flock 9 || return
    fi
    state=$(_environment_state "$venv")
    if [ "$state" = "$wanted$extras" ] || [ "$state" = "$wanted[test]" ]; then return; fi
    python=$(_environment_python) || return
    _environment_install "$root" "$venv" "$stamp" "$state" "$python" "$extras" || {
        echo "error: the installation into $venv failed (see above); run the command again to repeat it" >&2
        return 1
    }
    echo "$wanted$extras" > "$stamp"
}

_environment_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                echo "error: $candidate cannot make virtual environments: install its venv module" \
                     "(python3-venv on Debian and Ubuntu)" >&2
                return 1
            fi
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; ${PYTHON:-python3} is not: install it, or set PYTHON to its path" >&2
    return 1
}

_environment_install() {
    local root=$1 venv=$2 stamp=$3 state=$4 python=$5 extras=$6
    echo "installing the pinned versions into $venv (once; some minutes)"
    echo unfinished > "$stamp" || return
    if [ -z "$state" ] || [ "$state" = unfinished ]; then
        find "$venv" -mindepth 1 ! -name "${stamp##*/}" -delete && "$python" -m venv "$venv" || return
    fi
    # Install torch first and alone, so that the requirements of other packages cannot choose another build of it.
    "$venv/bin/python" -m pip install --quiet "$(grep '^torch==' "$root/constraints.txt")" &&
        "$venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" -e "$root$extras"
}

_environment_status=0
_environment_main "$@" || _environment_status=$?
unset -f _environment_main _environment_state _environment_update _environment_python _environment_install
return "$_environment_status" 2>/dev/null || exit "$_environment_status"
