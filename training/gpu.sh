#!/usr/bin/env bash
# The part of the mini's recipe that wants a GPU, for a machine without network that is there for minutes: trains the
# UNet at a constant rate until MINUTES are over, then another quarter of these steps with the rate falling to 0.
#
#     DATA=data/train VALIDATION=data/heldout MINUTES=6 OUT=out/gpu bash training/gpu.sh
#     ... bash training/gpu.sh --smoke     # two steps, on any machine
#
# DATA and VALIDATION are folders of shards, which are encoded once and then lie on the GPU: 1,000 toys are 48 MB packed
# and 1.2 GB there. CHECKPOINT is what it starts from, the one in this repository if not set. The results are in
# OUT/result, in files of at most 15 MB: `cat trained.tar.* | tar x` gives `decayed`, to publish or score, and `constant`,
# the weights before the rate fell, to train on from. Both hold what is trained alone: copy them over a copy of
# CHECKPOINT. `log.jsonl` has the losses.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu} checkpoint=${CHECKPOINT:-.} minutes=${MINUTES:-6}
mkdir -p "$out"

train=(python -m training.train --phase scratch --cache_latents --checkpoint "$checkpoint" --data "$DATA"
    --validation "$VALIDATION" --output "$out/run" --report_to none --save_minutes 1000 --ema_decay 0.9995 --keep 1)
if [ "${1:-}" = "--smoke" ]; then
    train+=(--batch_size 2 --micro_batch_size 2 --validation_steps 2) constant=2
else
    train+=(--batch_size 256 --micro_batch_size 256 --validation_steps 1000 --mixed_precision bf16 --compile --workers 14)
    constant=1000000
fi

"${train[@]}" --steps "$constant" --decay_steps 0 --minutes "$minutes"
last=$(ls -d "$out"/run/checkpoint-* | sort -V | tail -1)
steps=${last##*-}
python -m training.publish --checkpoint "$last" --output "$out/result/constant"
"${train[@]}" --steps $((steps + (steps + 3) / 4)) --decay_steps $(((steps + 3) / 4))
python -m training.publish --checkpoint "$out/run" --output "$out/result/decayed"

cd "$out/result"
tar c {constant,decayed}/{unet,vision_encoder,model_index.json} | split -b 15M -d - trained.tar.
rm -r constant decayed
cp ../run/log.jsonl .
