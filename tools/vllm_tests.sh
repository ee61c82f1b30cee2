#!/usr/bin/env bash
# Runs vLLM's own tests of what this plugin touches, with the plugin active. They come with vLLM's source distribution, which
# pip unpacks before it finds that it cannot build it here. Kept in .vllm-tests/<version>. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$PWD/${PY:-.venv/bin/python}"
[[ -x $python ]] || python="${PY:?}"
version="$("$python" -c 'from vllm_dspark.engine.hooks import vllm_version; print(vllm_version().split("+")[0])')"
folder="$PWD/.vllm-tests/$version"

if [[ ! -d $folder/tests ]]; then
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  TMPDIR="$scratch" "$python" -m pip download --quiet --no-deps --no-clean --no-binary :all: --no-build-isolation \
    -d "$scratch/out" "vllm==$version" >"$scratch/log" 2>&1 || true
  found="$(find "$scratch" -maxdepth 3 -type d -name tests -path '*pip-download*' | head -n 1)"
  [[ -n $found ]] || { cat "$scratch/log" >&2; echo "vLLM $version: no source distribution to take the tests from" >&2; exit 1; }
  mkdir -p "$folder"
  mv "$found" "$folder/tests"
fi

files=(
  v1/spec_decode/test_adaptive_verification.py
  v1/spec_decode/test_dspark_topk.py
  v1/spec_decode/test_dflash_causality.py
  v1/worker/test_dspark_utils.py
  models/test_dspark_mla.py
  transformers_utils/test_speculators_dspark_config.py
  config/test_speculative_draft_hf_overrides.py
)
repository="$PWD"
cd "$folder"
status=0
for file in "${files[@]}"; do # one process each: they share module-level state
  echo "== $file"
  PYTHONPATH="$repository:$repository/tests:$folder" "$python" -m pytest --noconftest -p no:cacheprovider -p vllm_own \
    -q --no-header -W ignore -c /dev/null --rootdir "$folder" "tests/$file" "$@" || status=1
done
exit "$status"
