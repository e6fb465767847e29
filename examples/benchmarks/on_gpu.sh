#!/usr/bin/env bash
# What only a GPU shows, in one record: the tests marked gpu, then speed, kernels, and memory beside --plan.
#
#     bash examples/benchmarks/on_gpu.sh [--device cpu] [--output_dir outputs/on_gpu]
#
# --device cpu tries all of it on the CPU, at small sizes. A test that fails is in the record, and gives exit code 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
device=cuda output=outputs/on_gpu
while (($#)); do
    case $1 in
        --device) device=$2 ;;
        --output_dir) output=$2 ;;
        *) echo "error: unknown flag $1" >&2 && exit 2 ;;
    esac
    shift 2
done
chosen=(-m gpu)
[[ $device == cpu ]] && chosen=(-m "not gpu" -k cpu)
mkdir -p "$output"
failed=0
python -m pytest tests/acceptance/test_accelerator.py -q "${chosen[@]}" --junitxml "$output/tests.xml" || failed=1
python examples/benchmarks/measure_on_device.py --device "$device" --tests "$output/tests.xml" --output_dir "$output"
exit "$failed"
