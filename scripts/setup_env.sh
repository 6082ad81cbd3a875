# Sourced by quickstart.sh and test.sh: finds a Python, gives it what oneb needs, and sets PYTHON to it.
#
#   setup_env requirements_runtime.txt …
#
# Uses the active virtual or conda environment if there is one; else .venv, made with --system-site-packages, so
# that a machine's own CUDA build of torch stays in use. torch is installed only where `import torch` finds none,
# and never replaced. The second time there is nothing to do, and it says nothing.

# The torch that a machine without one gets. ONEB_TORCH="torch==2.9.1" chooses another.
ONEB_TORCH=${ONEB_TORCH:-torch==2.13.0}

_oneb_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup_env() {
    _find_python
    _find_environment
    _check_torch
    local constraints missing line files=() wanted=() name
    for name in "$@"; do files+=("$_oneb_root/$name"); done
    missing=$("$PYTHON" "$_oneb_root/scripts/missing_requirements.py" "${files[@]}") || exit 1
    if [[ -n $missing ]]; then
        constraints=$(mktemp)
        # Whatever a package asks for, the torch that works here stays.
        if [[ -n $TORCH_VERSION ]]; then echo "torch==$TORCH_VERSION" > "$constraints"; fi
        while IFS= read -r line; do wanted+=("$line"); done <<< "$missing"
        _announce "installing packages (1 of 2): ${wanted[*]}" \
            "$PYTHON" -m pip install --progress-bar off --disable-pip-version-check -c "$constraints" "${wanted[@]}"
        rm -f "$constraints"
    fi
    if [[ -z $TORCH_VERSION ]]; then
        _announce "installing $ONEB_TORCH (2 of 2; with CUDA this is a large download)" \
            "$PYTHON" -m pip install --progress-bar off --disable-pip-version-check "$ONEB_TORCH"
        _check_torch
    fi
    _install_command
}

_fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# _announce TITLE COMMAND…: run it quietly, with a sign of life every 5 seconds; the end of its output if it fails.
_announce() {
    local log started=$SECONDS ticker status=0
    log=$(mktemp)
    printf '%s ' "$1"
    shift
    (while sleep 5 > /dev/null 2>&1; do printf '%ss ' $((SECONDS - started)); done) &
    ticker=$!
    "$@" > "$log" 2>&1 || status=$?
    kill "$ticker" 2> /dev/null || true
    wait "$ticker" 2> /dev/null || true
    if ((status)); then
        printf 'failed\n\n'
        tail -n 30 "$log" >&2
        rm -f "$log"
        _fail "the command above this line failed (exit code $status): $*"
    fi
    rm -f "$log"
    printf 'done (%ss)\n' $((SECONDS - started))
}

_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null
}

# BASE_PYTHON: python3 if it is 3.10 or later, else the newest other one on PATH.
_find_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" > /dev/null && _is_new_enough "$name"; then
            BASE_PYTHON=$(command -v "$name")
            return
        fi
    done
    if command -v python3 > /dev/null; then
        _fail "$(python3 --version) is too old: oneb needs Python 3.10 or later. Install one" \
            "(Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and run this again."
    fi
    _fail "no python3 here: oneb needs Python 3.10 or later. Install it" \
        "(Debian, Ubuntu: apt-get install python3 python3-venv) and run this again."
}

# PYTHON: that of the active environment, of .venv, or, where no environment can be made, BASE_PYTHON itself.
_find_environment() {
    local venv=$_oneb_root/.venv
    if [[ -n ${CONDA_PREFIX:-} ]] || "$BASE_PYTHON" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        PYTHON=$BASE_PYTHON
        "$PYTHON" -m pip --version > /dev/null 2>&1 ||
            _fail "the active environment ($PYTHON) has no pip. Run: $PYTHON -m ensurepip"
        return
    fi
    PYTHON=$venv/bin/python
    if [[ -x $PYTHON ]] && "$PYTHON" -m pip --version > /dev/null 2>&1; then return; fi
    rm -rf "$venv"
    echo "making a virtual environment in .venv (of $BASE_PYTHON)"
    if _make_venv "$venv"; then return; fi
    rm -rf "$venv"
    if [[ $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
        _announce "installing python3-venv" bash -c 'apt-get update && apt-get install -y python3-venv python3-pip'
        if _make_venv "$venv"; then return; fi
        rm -rf "$venv"
    fi
    if _allows_pip "$BASE_PYTHON"; then
        echo "no virtual environment can be made: installing into $BASE_PYTHON itself"
        PYTHON=$BASE_PYTHON
        return
    fi
    _fail "$BASE_PYTHON can make no virtual environment. Install what it lacks" \
        "(Debian, Ubuntu: apt-get install python3-venv) and run this again."
}

# Debian's Python and Colab's come without ensurepip; there the system's pip serves the environment.
_make_venv() {
    "$BASE_PYTHON" -m venv --system-site-packages "$1" > /dev/null 2>&1 ||
        "$BASE_PYTHON" -m venv --clear --without-pip --system-site-packages "$1" > /dev/null 2>&1
    "$1/bin/python" -m pip --version > /dev/null 2>&1
}

# PEP 668: a distribution marks a Python that pip must not write to.
_allows_pip() {
    "$1" -m pip --version > /dev/null 2>&1 && "$1" -c '
import pathlib, sys, sysconfig
sys.exit(pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists())'
}

# TORCH_VERSION (empty: no torch) and HAS_CUDA (1 or 0).
_check_torch() {
    local answer
    answer=$("$PYTHON" -W ignore -c '
import importlib.util
if importlib.util.find_spec("torch"):
    import torch
    print(torch.__version__, int(torch.cuda.is_available()))') ||
        _fail "torch is installed in $PYTHON but does not import (see above). oneb never replaces it: repair it," \
            "or remove it with '$PYTHON -m pip uninstall torch' and run this again."
    read -r TORCH_VERSION HAS_CUDA <<< "$answer" || true
    HAS_CUDA=${HAS_CUDA:-0}
}

# The `oneb` command, in our own .venv only. Everything works without it, from the checkout.
_install_command() {
    if [[ $PYTHON != "$_oneb_root/.venv/bin/python" || -e $_oneb_root/.venv/bin/oneb ]]; then return; fi
    if "$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 68)' 2> /dev/null; then
        _announce "installing the oneb command" "$PYTHON" -m pip install --progress-bar off --disable-pip-version-check \
            --no-deps --no-build-isolation -e "$_oneb_root"
    fi
}
