#!/bin/sh
# Builds the package and tests it in a fresh virtual environment: ./test.sh [arguments of pytest]
#
#   PYTHON=python3.12        the interpreter to use
#   WITHOUT_TORCH=1          test planning and NumPy only
#   TORCH_FROM=DIR           use the torch in this site-packages folder instead of installing one
#   EXPERTILE_PEER=DIR       also compare with vLLM 0.33.0's own module (see README.md)
set -eu
cd "$(dirname "$0")"
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
python="$venv/bin/python"
if [ -n "${TORCH_FROM:-}" ]; then
    "$python" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/torch_from.pth", "w").write(sys.argv[1])' "$TORCH_FROM"
    "$python" -m pip install --quiet 'numpy<2.4'
elif [ -z "${WITHOUT_TORCH:-}" ]; then
    "$python" -m pip install --quiet torch 'numpy<2.4'
fi
"$python" -m pip install --quiet '.[test]'
# py_src is not on the path of pytest: what was installed is what is tested.
"$python" -m pytest -p no:cacheprovider -q "$@"
