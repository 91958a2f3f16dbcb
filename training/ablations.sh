#!/usr/bin/env bash
# The paper's choices at mini scale: one change at a time, each trained from the same weights for the same tiles as an
# unchanged control, and scored on all held-out objects.
#
#     DATA=data/train VALIDATION=data/heldout bash training/ablations.sh
#     ... bash training/ablations.sh --smoke     # every step at its smallest: nothing is learned
#
# CHECKPOINT is what is changed, the one in this repository if not set: that favours what it was trained with, so that
# the table shows what a change costs a model that must learn it anew. OUT is the folder of everything it makes,
# out/ablations if not set. The same command continues an interrupted run. The table that it prints has the mean
# difference to the control over objects, with its standard error.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/ablations}
source training/launch.sh

if [ "${1:-}" = "--smoke" ]; then
    train=(--steps 2 --batch-size $((2 * processes)) --micro-batch-size 2) score=(--steps 2 --limit 2)
else  # 40,000 tiles
    train=(--steps 625 --batch-size 64 --micro-batch-size $((64 / processes)) --mixed-precision "$precision") score=()
fi

# A name, and the options of `training.mini` that make the change
run() {
    local folder=$out/$1
    shift
    [ -d "$folder/start" ] || python -m training.mini --checkpoint "${CHECKPOINT:-.}" --output "$folder/start" "$@"
    "${launch[@]}" -m training.train --phase scratch --in-memory --permute-colours --checkpoint "$folder/start" --data "$DATA" \
        --validation "$VALIDATION" --output "$folder/run" --ema-decay 0.99 --report-to none --validation-steps 1000000 \
        --keep 1 "${train[@]}"
    [ -f "$folder/results.json" ] || python -m evaluation.evaluate --checkpoint "$folder/run" --output "$folder" \
        ${score[@]+"${score[@]}"}
}

while read -r name options; do
    # shellcheck disable=SC2086  # the options are words
    run "$name" $options < /dev/null
done < training/ablations.txt
python -m evaluation.compare "$out"/*/results.json --control as-is
