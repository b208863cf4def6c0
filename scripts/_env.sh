# Sourced by quickstart.sh and test.sh: makes the virtual environment, or finds that it is up to date, and sets PYTHON.
#
#   MOC_VENV           where the environment lives             (default: .venv in the repository)
#   MOC_PYTHON         the interpreter to make it with         (default: python3, else another Python >= 3.10 on PATH)
#   MOC_TORCH_INDEX    extra package index for torch           (default: none; PyTorch's own has smaller CPU builds)
#
# It needs neither a compiler nor a GPU. It installs nothing outside the environment.

MOC_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
MOC_VENV="${MOC_VENV:-$MOC_ROOT/.venv}"

moc_say() { printf '[setup] %s\n' "$*" >&2; }

moc_die() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

moc_find_python() {
    local candidate
    for candidate in ${MOC_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# What the environment was made from; a change of any of it means installing again.
moc_fingerprint() {
    "$MOC_VENV/bin/python" - "$MOC_ROOT" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(sys.version.encode())
for name in ("setup.py", "scripts/constraints.txt"):
    digest.update((root / name).read_bytes())
digest.update(str(root).encode())
print(digest.hexdigest())
PY
}

moc_pip() {
    local what="$1" log="$MOC_VENV/install.log" started=$SECONDS
    shift
    moc_say "installing $what ..."
    if ! "$MOC_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        moc_die "could not install $what; the whole output is in $log"
    fi
    moc_say "installed $what ($((SECONDS - started)) s)"
}

moc_install() {
    local constraints="$MOC_ROOT/scripts/constraints.txt" torch_index=()
    if [ -n "${MOC_TORCH_INDEX:-}" ]; then
        torch_index=(--extra-index-url "$MOC_TORCH_INDEX")
    fi
    # torch first and alone, so that nothing else decides which build of it comes; numpy silences torch's warning.
    moc_pip "torch (the large one)" --retries 2 -c "$constraints" ${torch_index[@]+"${torch_index[@]}"} torch numpy
    # DeepSpeed is a source package whose setup imports torch, hence no build isolation. Its kernels are not built.
    moc_pip "build tools" -c "$constraints" setuptools wheel ninja
    DS_BUILD_OPS=0 moc_pip "deepspeed" --no-build-isolation -c "$constraints" deepspeed
    moc_pip "moc_ckpt with megatron-core and the test tools" \
        --no-build-isolation -c "$constraints" -e "$MOC_ROOT[pretrain,test]"
}

moc_environment() {
    local python stamp="$MOC_VENV/.moc-stamp"
    if [ ! -x "$MOC_VENV/bin/python" ]; then
        python="$(moc_find_python)" ||
            moc_die "no Python 3.10 or newer with the venv module found (Debian: apt install python3-venv; or set MOC_PYTHON)"
        moc_say "making the virtual environment $MOC_VENV with $("$python" --version)"
        "$python" -m venv "$MOC_VENV" || moc_die "could not make $MOC_VENV"
    fi
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$(moc_fingerprint)" ]; then
        moc_install
        moc_fingerprint >"$stamp"
        moc_say "the environment is ready: $MOC_VENV"
    fi
    PYTHON="$MOC_VENV/bin/python"
    # Scripts that pip installed (torchrun, deepspeed, moc-ckpt, ninja) come first.
    export PATH="$MOC_VENV/bin:$PATH"
}
