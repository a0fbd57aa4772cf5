# Sourced by the other scripts: an environment with pinned dependencies, made once and again when the pins change.
# STACK names the pins: current in .venv; old, ascend (as on Ascend hosts) and, with the vendor's torch_npu, npu and
# npu-ascend in folders of their own, such as .venv-npu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stack=${STACK:-current}
case "$stack" in
  current) venv=.venv constraints=constraints.txt ;;
  old | ascend | npu | npu-ascend) venv=.venv-$stack constraints=constraints-$stack.txt ;;
  *)
    echo "There is no stack $stack: choose current, old, ascend, npu or npu-ascend." >&2
    exit 2
    ;;
esac

pins=$(cat pyproject.toml constraints*.txt | sha256sum)
if [ "$(cat "$venv/pins" 2>/dev/null)" != "$pins" ]; then
  python=${PYTHON:-}
  for candidate in python3.11 python3.12 python3.13 python3; do
    [ -n "$python" ] && break
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      python=$candidate
    fi
  done
  if [ -z "$python" ]; then
    echo "The pinned environment needs Python 3.11, 3.12 or 3.13. Name one with PYTHON=/path/to/python3.11." >&2
    exit 4
  fi
  echo "Making $venv with $("$python" --version) and the dependencies of $constraints; this is done once." >&2
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable ".[export,dev]"
  case "$stack" in
    npu*) # alone: on x86 its wheels of 2.9 ask for torch 2.9.0+cpu, which PyPI does not have
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --no-deps torch_npu
      ;;
  esac
  echo "$pins" >"$venv/pins"
fi
PATH="$PWD/$venv/bin:$PATH"
