# Sourced by the scripts that train: how `training.train` runs best on this machine. Sets `launch`, the command before
# `-m training.train`; `processes`; and `precision`, of `--mixed_precision`.
#
# On a CPU a process of one thread for each core is twice as fast as one process with all threads, bfloat16 pays only
# where the processor has it, and tcmalloc, where it is installed, is faster than the usual allocator (docs/training.md).
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    launch=(python -m accelerate.commands.launch) processes=1 precision=bf16
else
    processes=1
    while [ $((2 * processes)) -le "$(nproc)" ] && [ $processes -lt 64 ]; do processes=$((2 * processes)); done
    tcmalloc=$(ldconfig -p 2>/dev/null | sed -n 's/.*=> \(.*libtcmalloc_minimal.*\)/\1/p' | head -1 || true)
    launch=(env ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
        ${tcmalloc:+LD_PRELOAD="$tcmalloc"} python -m torch.distributed.run --standalone --nproc_per_node "$processes")
    precision=$(python -c "from zero123plus.loading import *; print('bf16' if cpu_has_bfloat16() else 'no')" 2>/dev/null)
fi
