#!/usr/bin/env bash
# The paper's claims at mini scale: one change at a time, each trained for the same number of tiles from the same weights.
#
#     START="--vae vae" DATA=data/train VALIDATION=data/heldout STEPS=2000 bash training/ablations.sh
#     START="--checkpoint ." DATA=data/train VALIDATION=data/heldout STEPS=150 EVALUATE="--limit 8" bash training/ablations.sh
#
# The first starts from random weights and is fair; the second, where hours are few, changes the trained mini, which
# favours what that was trained with. OUT is the folder of everything it makes, out/ablations if not set. The same
# command continues an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/ablations}

# A name, the options of the start, and those of the training
run() {
    local folder=$out/$1
    [ -d "$folder/start" ] || python -m training.mini $START --output "$folder/start" $2
    python -m training.train --phase scratch --cache_latents --checkpoint "$folder/start" --data "$DATA" \
        --validation "$VALIDATION" --output "$folder/run" --steps "$STEPS" --batch_size 16 --micro_batch_size 16 \
        --learning_rate 1e-3 --warmup_steps 10 --ema_decay 0.99 --mixed_precision bf16 --report_to none \
        --validation_steps 100000 $3
    [ -f "$folder/results.json" ] || python -m evaluation.evaluate ${EVALUATE:-} --output "$folder" \
        --checkpoint "$(ls -d "$folder"/run/checkpoint-* | sort -V | tail -1)"
}

mkdir -p "$out"
run as-is "" ""
run scaled-linear-schedule "--beta_schedule scaled_linear" ""
run reference-blank "--without reference" ""
run reference-1x "--reference_scale 1" ""
run reference-10x "--reference_scale 10" ""
run clip-blank "--without clip" ""
run min-snr "" "--snr_gamma 5"
python -m evaluation.compare "$out"/*/results.json
