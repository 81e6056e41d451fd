# Sourced by scripts/test and scripts/demo, from the repository root: brings .venv up to date.
#
# One rule: .venv/.installed holds a digest of what was installed. Where it matches, nothing is
# done; where .venv/.installing is left behind, an install was cut short and starts afresh.

say() { printf '[setup] %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

python_works() {
    # pyenv's shims exist for versions that are not selected, so running is the only test.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if python_works "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.12 or later (with its venv module) was not found: install it with" \
        "\`pyenv install 3.12\`, \`uv python install 3.12 --default\` or your system's packages," \
        "for example \`apt install python3.12-venv\`."
}

install_digest() {
    # The root counts, since the install points back to the checkout.
    { pwd && cat pyproject.toml scripts/constraints.txt; } | cksum
}

run_pip() {
    .venv/bin/python -m pip --disable-pip-version-check --no-input install --no-color \
        --progress-bar off -c scripts/constraints.txt "$@" 2>&1 </dev/null |
        tee -a .venv/install.log |
        awk '/^Collecting / && ++n % 20 == 0 { print "[setup]   " n " packages so far"; fflush() }
             /^Installing collected/ { print "[setup]   unpacking them"; fflush() }' >&2
}

ensure_environment() {
    local digest python started=$SECONDS
    digest=$(install_digest)
    if [[ -f .venv/.installed && $(<.venv/.installed) == "$digest" && ! -e .venv/.installing ]] &&
        python_works .venv/bin/python; then
        return
    fi
    if [[ -e .venv/.installing ]] || ! python_works .venv/bin/python; then
        python=$(find_python)
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv </dev/null || fail "could not make .venv with $python"
    fi
    : >.venv/.installing
    : >.venv/install.log
    say "installing the packages into .venv (a minute or more the first time)"
    if ! run_pip setuptools || ! run_pip --no-build-isolation -e ".[dev,plots,tasks]"; then
        tail -n 15 .venv/install.log >&2
        fail "the install failed; the whole log is .venv/install.log. Run the command again to retry."
    fi
    printf '%s\n' "$digest" >.venv/.installed
    rm .venv/.installing
    say "ready after $((SECONDS - started)) s"
}
