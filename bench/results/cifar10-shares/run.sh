#!/usr/bin/env bash
# Random images, windows, MTT, DATM, DM, DM from the window and SelMatch at 5, 10, 20 and 30 % of 10,000 images of
# CIFAR-10; writes sweep.json, sweep.md, accuracy.png and coverage.png. A killed run continues.
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-shares/run.sh
# SELMATCH="torchrun --nproc-per-node 2 -m selmatch_ext" shares the cells between two processes.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
: "${OUT:=runs/cifar10-shares}"
matching+=,iterations=200,snapshot-every=50,lr-images=1000
window=start.select=window,start.window.beta=0.7:0.7:0.5:0.5 # β, α and lr-images by choose.sh
partly=$window,start.alpha=0.2
: "${CURVES:=random=select window=select,$window mtt,$matching datm,$matching,first-max-start-epoch=8 $dm
  dm-window=$dm,$partly selmatch,$matching,$partly}"
# shellcheck disable=SC2046,SC2086
$SELMATCH sweep $common --data.cache "$OUT/images" --evaluation.networks 3 $(training evaluation 150) \
  --shares 0.05 0.1 0.2 0.3 --out "$OUT" --curves $CURVES
