#!/usr/bin/env bash
# Random selection, SelMatch, MTT, DM and DSA on 10,000 images of CIFAR-10 at 5 %, with coverage over iterations.
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-methods/run.sh
set -euo pipefail
: "${IMAGES:=cifar10-jpeg.tar.gz}" "${SCORES:=cifar10-jpeg-cscore.npy}" "${OUT:=runs/cifar10-methods}" "${SELMATCH:=selmatch}"
data="--device cpu --data.dataset imagefolder:$IMAGES --data.per-class 1000"
matching="--iterations 200 --inner-steps 20 --expert-epochs 1 --max-start-epoch 12 --batch-syn 50 --lr-init 0.02
  --lr-images 1000 --snapshot-every 40 --keep activations"
window="--start.select window --start.alpha 0.6 --start.window.beta 0.5 --start.scores.source $SCORES"
data="$data --start.ipc 50"

$SELMATCH experts ${data% --start*} --out "$OUT/experts" --experts.model ConvNetW64 --experts.count 3 --experts.training.epochs 15
$SELMATCH select $data --out "$OUT/window" $window
$SELMATCH select $data --out "$OUT/random" --start.select random --start.alpha 1
$SELMATCH distill selmatch $data $window $matching --experts "$OUT/experts" --out "$OUT/selmatch"
$SELMATCH distill mtt $data $matching --experts "$OUT/experts" --out "$OUT/mtt"
$SELMATCH distill dm $data --model ConvNetW64 --iterations 300 --lr-images 10 --snapshot-every 60 --out "$OUT/dm"
$SELMATCH distill dsa $data --model ConvNetW64 --iterations 4 --outer-loop 25 --inner-loop 5 --batch-real 128 \
  --snapshot-every 20 --out "$OUT/dsa"
data=${data% --start*}
$SELMATCH coverage $data --out "$OUT/coverage" --features.model ConvNetW64 --features.training.epochs 15 --coverage.networks 2 \
  --features.training.batch 64 --features.training.lr 0.02 --coverage.no-accuracy \
  "$OUT/random/random.safetensors" "$OUT/selmatch" "$OUT/mtt" "$OUT/dm" "$OUT/dsa"
for set in random/random window/window selmatch/distilled mtt/distilled dm/distilled dsa/distilled; do
  printf '%s: ' "$set"
  $SELMATCH evaluate "$OUT/$set.safetensors" $data --evaluation.model ConvNetW64 --evaluation.training.epochs 100 \
    --evaluation.training.batch 64 --evaluation.training.lr 0.05 --evaluation.networks 3 \
    --record "$OUT/${set%%/*}.json"
done
