#!/bin/sh
# Repeats the demo policy: simulator, tokenizer, demonstrations, training with DAgger, evaluation.
# About one hour on two cores. Result: work/policy (a LeRobot policy folder).
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
gym=${GYM:-../../target/release/examples/sim_gym}
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

(cd ../.. && cargo build --release -p sinew-drivers --example sim_gym)
mkdir -p work
$python export.py
$python rollout.py bc --gym "$gym" --envs 32 --seed 2 --samples 16000
$python rollout.py bc --gym "$gym" --envs 32 --seed 6 --touch 1 --samples 2000
$python train.py --minutes 24 --batch 48 --draws 6 --lr 0.0008 --name train --export work/policy
cp work/ema.pt work/stage1.pt
$python rollout.py dagger --gym "$gym" --envs 32 --seed 3 --touch 0.4 --seconds 1200 &
echo '{"dagger": 4}' > work/weights
$python train.py --minutes 26 --batch 48 --draws 4 --lr 0.0005 --resume work/stage1.pt --name train --export work/policy
wait
$python rollout.py eval --gym "$gym" --envs 32 --episodes 160 --seed 9
$python rollout.py swap --gym "$gym" --envs 32 --episodes 120 --seed 10
$python plot.py
