#!/usr/bin/env bash
# Every way to select real images, at 5, 10, 20 and 30 % of 10,000 images of CIFAR-10, three networks each, all trained
# with the same number of updates; writes sweep.json, sweep.md, accuracy.png and coverage.png. A killed run continues.
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-selection/run.sh
# SCORES are the C-scores of the archive's images. EPOCHS are those on the smallest sets. More words are options of the command.
set -euo pipefail
: "${IMAGES:=cifar10-jpeg.tar.gz}" "${SCORES:=cifar10-jpeg-cscore.npy}" "${OUT:=runs/cifar10-selection}" "${SELMATCH:=selmatch}"
: "${MODEL:=ConvNetW16}" "${EPOCHS:=60}"
# The share of the hardest images that window, ccs and d2 leave out, by share selected: 0.3 at 10 % is that of CCS's
# README, the others are ours. None was tuned.
cutoff=0.4:0.3:0.2:0.1
curves="random=select window=select,start.select=window,start.window.beta=$cutoff ccs=select,start.select=ccs,start.ccs.cutoff=$cutoff
  d2=select,start.select=d2,start.d2.cutoff=$cutoff c-score=select,start.select=c-score,start.scores.source=$SCORES"
for select in herding k-center moderate craig gradmatch forgetting el2n grand aum least-confidence entropy margin; do
  curves+=" $select=select,start.select=$select"
done
training() {  # of a part of the settings, for a number of epochs
  echo "--$1.training.epochs $2 --$1.training.batch 64 --$1.training.lr 0.05 --$1.training.momentum 0.9
    --$1.training.weight-decay 5e-4 --$1.training.schedule cosine"
}
# shellcheck disable=SC2046,SC2086
$SELMATCH sweep --device cpu --data.dataset "imagefolder:$IMAGES" --data.per-class 1000 --data.cache "$OUT/images" --out "$OUT" \
  --shares 0.05 0.1 0.2 0.3 --curves $curves --start.scores.source aum --start.scores.model $MODEL --start.scores.runs 1 \
  --start.features.model $MODEL --evaluation.model $MODEL --evaluation.networks 3 --coverage-networks 1 \
  $(training evaluation $EPOCHS) $(training start.scores 10) $(training start.features 10) "$@"
