#!/usr/bin/env bash
# The whole GPU programme in under 9 minutes on a fresh machine with an NVIDIA GPU, nvcc and this project's dependencies:
# build, correctness, benches, sanitizer. Every step has a time limit; one that fails or runs over does not stop the
# others. The outcome of all steps lies in $OUT/<gpu>-<date>.json, their output in $OUT/logs.
#
#   kernels/bench_all.sh                       results in kernels/results
#   OUT=outcome PYTHON=python3.12 kernels/bench_all.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-kernels/results}
LIMIT=${LIMIT:-530} # seconds for everything
LOGS=$OUT/logs
mkdir -p "$LOGS"
rm -f "$LOGS"/*
DINOV2=("$PYTHON" -m dinov2cli)
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # compute-sanitizer
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# step NAME SECONDS COMMAND...: run it, stdout to NAME.out, stderr to NAME.err, "rc seconds" to NAME.rc
step() {
  local name=$1 limit=$2 rc=0 started=$SECONDS
  shift 2
  local left=$((LIMIT - SECONDS))
  ((limit < left)) || limit=$left
  if ((limit < 5)); then
    echo "124 0" >"$LOGS/$name.rc"
    echo "$name: no time left"
    return
  fi
  timeout --kill-after=5 "$limit" "$@" >"$LOGS/$name.out" 2>"$LOGS/$name.err" || rc=$?
  echo "$rc $((SECONDS - started))" >"$LOGS/$name.rc"
  echo "$name: exit $rc after $((SECONDS - started)) s"
  ((rc == 0)) || tail -n 3 "$LOGS/$name.err" "$LOGS/$name.out"
}

step machine 30 "$PYTHON" -c "
import json, torch, importlib.metadata as m
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({'gpu': gpu.name if gpu else 'none', 'sms': gpu.multi_processor_count if gpu else 0,
                  'torch': torch.__version__, 'cuda': torch.version.cuda,
                  'triton': next((d.version for d in m.distributions() if d.metadata['Name'] == 'triton'), None)}))"
grep -q '"gpu": "none"' "$LOGS/machine.out" && echo "no NVIDIA GPU here: only what a CPU can do is run, and graphs fail"
# The order is that of importance: what comes last may find no time left.
step build 90 "${DINOV2[@]}" kernels build
step info 30 "${DINOV2[@]}" kernels info --json
step bench-attention 150 "${DINOV2[@]}" bench attention --json
step bench-losses 90 "${DINOV2[@]}" bench losses --json
step bench-train-vitl14 90 "${DINOV2[@]}" bench train --arch vitl14 --reference --json
step bench-train-vits14 75 "${DINOV2[@]}" bench train --arch vits14 --reference --json
step bench-train-vits14-graphs 90 "${DINOV2[@]}" bench train --arch vits14 --compile graphs --json
step tests 120 "$PYTHON" -m pytest tests/gpu -q -m gpu -k "not compile and not inductor" --durations=5
for tool in memcheck racecheck; do
  step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m dinov2cli.bench.every_kernel
done
step bench-stochastic-depth 60 "${DINOV2[@]}" bench stochastic-depth --json
step bench-curve 90 "${DINOV2[@]}" bench curve --json
step bench-train-vitl14-compiled 90 "${DINOV2[@]}" bench train --arch vitl14 --compile true --json
step tests-compiled 90 "$PYTHON" -m pytest tests/gpu -q -m gpu -k "compile or inductor"

"$PYTHON" - "$LOGS" "$OUT" <<'PY'
import datetime, json, pathlib, re, sys

logs, out = map(pathlib.Path, sys.argv[1:])
steps = {}
for rc in sorted(logs.glob("*.rc")):
    code, seconds = map(int, rc.read_text().split())
    text = (logs / f"{rc.stem}.out").read_text() if (logs / f"{rc.stem}.out").exists() else ""
    found = {"exit": code, "seconds": seconds}
    try:
        found["result"] = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found["last_lines"] = text.strip().splitlines()[-5:]
    steps[rc.stem] = found
machine = steps.get("machine", {}).get("result", {})
date = datetime.date.today().isoformat()
name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "unknown").lower()).strip("-")
path = out / f"{name}-{date}.json"
path.write_text(json.dumps({"date": date, "machine": machine, "steps": steps}, indent=1) + "\n")
print(f"results: {path}; failed: {', '.join(n for n, s in steps.items() if s['exit']) or 'none'}")
PY
