#!/usr/bin/env bash
# DM, DSA and MTT on digits from SelMatch's window, of which the easier 85 % are learned. From random images that are all
# learned they are lines of `make methods`, and so is SelMatch, all with the same settings.
#   make methods && bash bench/results/digits-starts/run.sh
set -euo pipefail
: "${METHODS:=runs/methods}" "${OUT:=runs/digits-starts}" "${SELMATCH:=.venv/bin/selmatch}"
window="--start.select window --start.alpha 0.85 --start.window.beta 0.4 --start.scores.source el2n
  --start.scores.model ConvNetD2W32 --start.scores.training.epochs 10 --start.scores.training.lr 0.02
  --start.scores.training.momentum 0.9 --start.scores.training.batch 64"

for method in dm dsa mtt; do
  mkdir -p "$OUT/$method"
  [[ $method == mtt && ! -e $OUT/mtt/experts ]] && cp -r "$METHODS/experts" "$OUT/mtt/"
  # shellcheck disable=SC2086
  $SELMATCH run "$method" --settings "$METHODS/$method-ipc10" $window --device cpu --out "$OUT/$method"
done
