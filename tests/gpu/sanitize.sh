#!/usr/bin/env bash
# Every Triton kernel under NVIDIA's compute-sanitizer: accesses out of bounds, races in shared memory, values read
# before they are written, barriers that not all threads reach. Needs a GPU, and takes some minutes:
#
#     tests/gpu/sanitize.sh [memcheck racecheck initcheck synccheck]
#
# torch's allocator hands out parts of large blocks, inside which nothing is out of bounds; without its cache each
# tensor is an allocation of its own. CUDA graphs need that cache, so this runs the kernels and not whole models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v compute-sanitizer >/dev/null || { echo "sanitize.sh: compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "sanitize.sh: there is no NVIDIA GPU here" >&2; exit 1; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
tests=(tests/test_kernels_*.py tests/test_weight_groups.py)
chosen="exact or epilogue or geglu or floating or definition or upsamples or skip or layernorm_quantize or denoise_step"
chosen="$chosen or descriptors or statistics or packed or triton"
status=0
for tool in "${@:-memcheck racecheck initcheck synccheck}"; do
    for one in $tool; do
        echo "== $one"
        compute-sanitizer --tool "$one" --target-processes all --error-exitcode 9 \
            python -m pytest -q -p no:cacheprovider "${tests[@]}" -k "$chosen" || status=1
    done
done
exit $status
