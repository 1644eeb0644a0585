#!/usr/bin/env bash
# What the installation needs and pip cannot fetch: says the exact apt line for whatever is missing.
set -u
python=${PYTHON:-python3}

if ! command -v "$python" >/dev/null; then
    echo "error: $python is not there; gossamer needs Python 3.11 or newer" >&2
    echo "fix:   sudo apt-get install python3 python3-venv python3-dev" >&2
    exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is Python $version; gossamer needs 3.11 or newer" >&2
    echo "fix:   sudo apt-get install python3.11 python3.11-venv python3.11-dev && make PYTHON=python3.11 ..." >&2
    exit 1
fi

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$include/Python.h" ] || missing+=("python$version-dev")
compiler=${CC:-cc}
if ! command -v "$compiler" >/dev/null; then
    missing+=(build-essential libgmp-dev)
elif ! echo '#include <gmp.h>' | "$compiler" -E - >/dev/null 2>&1; then
    missing+=(libgmp-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: building libp2p's fastecdsa needs what is not installed here: ${missing[*]}" >&2
    echo "fix:   sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
