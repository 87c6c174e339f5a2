#!/bin/sh
# Is everything right on this GPU, and how fast? Kernel tests, whole training steps, one layer, and a short training that
# is left and continued, in under 8 minutes on one GPU. Stops at the first failure.
#
#   sh examples/gpu_check.sh [FOLDER]     results go to FOLDER, by default gpu_check; summary.txt there has them in short
#
# Needs: a CUDA GPU with about 40 GB for the full size (else GPU_CHECK_PRESET=mini), `pip install -e training pytest`, and
# for the fused kernels `pip install "mamba-ssm>=2.3"`; without that it checks everything else.
# Set by the environment: PYTHON (python3), GPU_CHECK_PRESET (small), GPU_CHECK_BATCH (64), GPU_CHECK_STEPS (10),
# GPU_CHECK_SECONDS (480), GPU_CHECK_TUNING (few; full: kernels try all their variants, which takes many minutes).
# Exit status: 0 all is well, 1 something failed or took too long, 2 there is no GPU or something is missing.
set -u

python=${PYTHON:-python3}
preset=${GPU_CHECK_PRESET:-small}
batch=${GPU_CHECK_BATCH:-64}
steps=${GPU_CHECK_STEPS:-10}
seconds=${GPU_CHECK_SECONDS:-480}
tuning=${GPU_CHECK_TUNING:-few}
training=$(cd "$(dirname "$0")/../training" && pwd) || exit 2
mkdir -p "${1:-gpu_check}" && out=$(cd "${1:-gpu_check}" && pwd) || exit 2
summary=$out/summary.txt

missing() {
    echo "gpu_check: $1" >&2
    exit 2
}
"$python" -c 'import mamba3_jepa' 2>/dev/null || missing "$python has no mamba3_jepa: pip install -e training"
"$python" -c 'import pytest' 2>/dev/null || missing "$python has no pytest: pip install pytest"
command -v timeout >/dev/null || missing "there is no command timeout (GNU coreutils)"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    missing "torch finds no CUDA GPU on this machine: nothing was checked"

kernels=require
"$python" -c 'import sys; from mamba3_jepa.models.kernels import siso_kernel; sys.exit(siso_kernel() is None)' || {
    kernels=auto
    echo "gpu_check: mamba-ssm is not installed, or its kernels do not fit: checking without them"
}

# The command line or pytest, with kernels that try few of their variants.
run='
import sys
from mamba3_jepa.models import kernel_tuning, kernels
what, tuning, *arguments = sys.argv[1:]
kernels.siso_kernel()
if tuning == "few":
    kernel_tuning.restrict(num_warps=4, most_stages=2)
if what == "pytest":
    import pytest
    sys.exit(pytest.main(arguments))
from mamba3_jepa.cli.main import main
sys.exit(main(arguments))
'
began=$(date +%s)
: >"$summary"

# part NAME OUTPUT pytest|command ARGUMENTS...
part() {
    name=$1 file=$out/$2
    what=$3
    shift 3
    start=$(date +%s)
    left=$((seconds - (start - began)))
    printf '%-34s ' "$name"
    if [ "$left" -gt 0 ]; then
        (cd "$training" && exec timeout "$left" "$python" -c "$run" "$what" "$tuning" "$@") >"$file" 2>"$file.log"
        status=$?
    else
        status=124
    fi
    took=$(($(date +%s) - start))
    verdict=ok
    [ "$status" -eq 0 ] || verdict="FAILED (status $status)"
    [ "$status" -ne 124 ] || verdict="NOT DONE within $seconds s of all"
    echo "$took s  $verdict"
    printf '%-34s %4s s  %s\n' "$name" "$took" "$verdict" >>"$summary"
    if [ "$status" -ne 0 ]; then
        tail -n 30 "$file" "$file.log" >&2
        echo "gpu_check: $name: $verdict; all of it is in $file and $file.log" >&2
        exit 1
    fi
}

step() {
    name=$1 file=$2
    shift 2
    part "$name" "$file" command bench step --preset "$preset" --batch-size "$batch" --steps "$steps" \
        --precision bf16 --device cuda --json "$@"
}

part "environment" environment.json command inspect --environment --json
part "kernel tests" tests.txt pytest -q -p no:cacheprovider -k "not mimo" \
    tests/test_kernels_cuda.py tests/test_kernels.py tests/test_fused.py
step "bench step" step.json --kernels "$kernels"
step "bench step, without kernels" step_without_kernels.json --kernels off
step "bench step, without X-Encoder" step_kept_tokens.json --kernels "$kernels" --kept-tokens
step "bench step, compiled" step_compiled.json --kernels "$kernels" --compile
part "bench layer" layer.json command bench layer --bfloat16 --batch 8 --length 2048 --rounds 5 --kernels "$kernels" \
    --device cuda --no-compiled --no-sequential --no-packages --scaling-lengths --json
train="train-jepa --preset mini --precision bf16 --synthetic-scenes 1000 --val-samples 128 --save-every 40"
# shellcheck disable=SC2086 # words are meant
part "training, 80 steps" train.txt command $train --max-steps 80 --kernels "$kernels" --output-dir "$out/training"
# shellcheck disable=SC2086
part "training, 20 steps more" resume.txt command $train --max-steps 100 --kernels "$kernels" --resume \
    --output-dir "$out/training"

"$python" - "$out" >>"$summary" <<'END' || exit 1
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
print()
for name in ("step", "step_without_kernels", "step_kept_tokens", "step_compiled"):
    found = json.loads((out / f"{name}.json").read_text())
    peak = f"{found['utilisation']:.1%} of {found['peak'] / 1e12:.3g} x 10^12 ({found['peak_from']})"
    memory = f"{(found['peak_bytes'] or 0) / 2**30:.1f} GiB"
    print(f"{name}: {found['samples_per_second']:,.1f} samples/s, {peak}, {memory}; kernels {found['kernels']}")
    print("    " + ", ".join(f"{each['section']} {each['share']:.1%}" for each in found["sections"]))
layer = json.loads((out / "layer.json").read_text())
print("layer: " + ", ".join(f"{each['name']} {each['ratio']:.2f}" for each in layer["timings"]) + f" ({layer['hardware']})")
END
echo "all of it: $(($(date +%s) - began)) s" >>"$summary"
echo
cat "$summary"
