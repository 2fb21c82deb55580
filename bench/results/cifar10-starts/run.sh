#!/usr/bin/env bash
# DM, DSA and MTT on 10,000 images of CIFAR-10 at 5 %, each from random images that are all learned, and from SelMatch's
# window of which the easier 60 % are learned (SelMatch is MTT from there). RUNS="dm-random ..." runs a part.
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-starts/run.sh
set -euo pipefail
: "${IMAGES:=cifar10-jpeg.tar.gz}" "${SCORES:=cifar10-jpeg-cscore.npy}" "${OUT:=runs/cifar10-starts}" "${SELMATCH:=selmatch}"
data="--device cpu --data.dataset imagefolder:$IMAGES --data.per-class 1000 --start.ipc 50"
evaluation="--evaluation.model ConvNetW32 --evaluation.networks 3 --evaluation.training.epochs 100
  --evaluation.training.batch 64 --evaluation.training.lr 0.05 --evaluation.training.schedule cosine
  --evaluation.selected-strategy simple"
experts="--experts.model ConvNetW32 --experts.count 3 --experts.training.epochs 15"
matching="--iterations 200 --inner-steps 20 --expert-epochs 1 --max-start-epoch 12 --batch-syn 50 --lr-init 0.02
  --lr-images 1000 --keep activations"
declare -A settings=(
  [dm]="--model ConvNetW32 --iterations 200 --lr-images 10 --batch-real 128"
  [dsa]="--model ConvNetW32 --iterations 4 --outer-loop 25 --inner-loop 5 --batch-real 64"
  [mtt]="$experts $matching"
  [selmatch]="$experts $matching"
)
declare -A starts=(
  [random]="--start.select random --start.alpha 1"
  [window]="--start.select window --start.alpha 0.6 --start.window.beta 0.5 --start.scores.source $SCORES"
)

for run in ${RUNS:-dm-random dm-window mtt-random mtt-window dsa-random dsa-window selmatch-window}; do
  method=${run%-*} start=${run#*-}
  mkdir -p "$OUT/$run"
  # What is the same in several runs is done once: experts, and the evaluations of random images and of the window.
  for done in dm-random/evaluation_random.json "dm-$start/evaluation_start.json" mtt-random/experts; do
    [[ -e $OUT/$done && ! -e $OUT/$run/${done#*/} && $method != dm ]] && cp -r "$OUT/$done" "$OUT/$run/"
  done
  # shellcheck disable=SC2086
  $SELMATCH run "$method" --out "$OUT/$run" $data $evaluation ${settings[$method]} ${starts[$start]}
done
