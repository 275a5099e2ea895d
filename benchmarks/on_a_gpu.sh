#!/usr/bin/env bash
# What is to be run where a GPU is lent: the GPU tests, the tables of docs/performance.md and a profile, into a folder.
#
#     bash benchmarks/on_a_gpu.sh FOLDER
#
# About eight minutes on an H100. Each part goes on if another fails; the exit code is that of the tests.
set -uo pipefail
out=${1:?give a folder for the results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/device.csv"
python -m pytest -m gpu -n 0 tests > "$out/tests.txt" 2>&1
status=$?
tail -n 3 "$out/tests.txt"
python -m benchmarks.training_step --device cuda --seconds 3 --json "$out/training_step.json" > "$out/training_step.txt"
python -m benchmarks.training_step --device cuda --seconds 3 --sizes 4096,768,100,1000,2,cosine \
  --json "$out/large.json" > "$out/large.txt"
python -m benchmarks.training_step --device cuda --seconds 0 --sizes 128,768,100,10,2,euclidean --profile \
  > "$out/profile.txt"
python -m benchmarks.closed_form --device cuda --repeats 1 --json "$out/closed_form.json" > "$out/closed_form.txt"
cat "$out/device.csv" "$out/training_step.txt" "$out/large.txt" "$out/closed_form.txt"
exit $status
