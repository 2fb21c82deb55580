#!/usr/bin/env bash
# Settings of run.sh, chosen on held-out training images: 10 % of CIFAR-10's take the place of the test images.
#   IMAGES=cifar10-jpeg.tar.gz SCORES=cifar10-jpeg-cscore.npy bash bench/results/cifar10-shares/choose.sh
# STEPS="windows …" runs a part.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
: "${OUT:=runs/cifar10-shares-held-out}" "${STEPS:=windows alpha rates}"
sweep() {  # FOLDER, then options
  # shellcheck disable=SC2046,SC2086
  $SELMATCH sweep $common --data.held-out 0.1 --data.cache "$OUT/images" --evaluation.networks 2 $(training evaluation 100) \
    --out "$OUT/$1" "${@:2}"
}
# Where the window lies (β).
windows() {
  local curves=(random=select)
  for beta in 0.1 0.3 0.5 0.7; do
    curves+=("window-$beta=select,start.select=window,start.window.beta=$beta")
  done
  sweep windows --shares 0.05 0.1 0.2 0.3 --curves "${curves[@]}"
  sweep windows-0.8 --shares 0.05 0.1 --curves random=select window-0.8=select,start.select=window,start.window.beta=0.8
}
# The share of the images that is learned (α), at 5 and at 20 %. Each share is a sweep: the epochs are 100 at both.
alpha() {
  local curve="selmatch,$matching,iterations=125"
  sweep alpha-5 --shares 0.05 --experts.count 3 --curves \
    "selmatch-0.2=$curve,lr-images=1000,start.window.beta=0.7,start.alpha=0.2" \
    "selmatch-0.6=$curve,lr-images=1000,start.window.beta=0.7,start.alpha=0.6"
  sweep alpha-20 --shares 0.2 --experts.count 3 --curves \
    "selmatch-0.2=$curve,lr-images=4000,start.window.beta=0.5,start.alpha=0.2" \
    "selmatch-0.6=$curve,lr-images=4000,start.window.beta=0.5,start.alpha=0.6"
}
# The step size of the images, and later start epochs, at the largest share, where networks are trained with as many
# updates as above (17 epochs).
rates() {
  local curve="$matching,iterations=125" window=start.select=window,start.window.beta=0.5,start.alpha=0.2 curves=()
  for rate in 1000 300; do
    curves+=("mtt-$rate=mtt,$curve,lr-images=$rate" "selmatch-$rate=selmatch,$curve,$window,lr-images=$rate")
  done
  curve=${curve/max-start-epoch=16/max-start-epoch=19},min-start-epoch=8,lr-images=1000
  curves+=("mtt-late=mtt,$curve" "selmatch-late=selmatch,$curve,$window")
  sweep rates --shares 0.3 --experts.count 3 --evaluation.training.epochs 17 --curves "${curves[@]}"
}
for step in $STEPS; do "$step"; done
