#!/usr/bin/env bash
# Options of trajectory matching that are off by default, each against plain SelMatch at 5 % on held-out training
# images, as choose.sh uses them: learned labels, momentum of the student, an averaged set, two experts an update (half
# as many updates, so that the time is the same).
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-shares/ahead.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
: "${OUT:=runs/cifar10-shares-ahead}"
plain=selmatch,$matching,lr-images=1000,start.alpha=0.2,start.window.beta=0.7,iterations=200
slower=${plain/lr-init=0.02/lr-init=0.01} shorter=${plain%200}100
: "${CURVES:=window=select,start.select=window,start.window.beta=0.7 selmatch=$plain labels=$plain,labels=learned
  momentum=$slower,inner-momentum=0.5 average=$plain,ema=0.95 experts=$shorter,experts-per-iteration=2}"
# shellcheck disable=SC2046,SC2086
$SELMATCH sweep $common --data.held-out 0.1 --data.cache "$OUT/images" --experts.count 3 --evaluation.networks 3 \
  $(training evaluation 150) --shares 0.05 --out "$OUT" --curves $CURVES
