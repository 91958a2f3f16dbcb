# Sourced by the scripts that train: how `training.train` runs best on this machine. Sets `launch`, the command before
# `-m training.train`; `processes`; and `precision`, of `--mixed-precision`.
#
# On a CPU a process of one thread for each core is twice as fast as one process with all threads, bfloat16 pays only
# where the processor has it, and tcmalloc, where it is installed, is faster than the usual allocator (docs/training.md).
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    launch=(python -m accelerate.commands.launch) processes=1 precision=bf16
else
    processes=1
    while [ $((2 * processes)) -le "$(nproc)" ] && [ $processes -lt 64 ]; do processes=$((2 * processes)); done
    preload=()
    if ldconfig -p 2>/dev/null | grep "libtcmalloc_minimal\.so\.4 " > /dev/null; then  # not the slow libtcmalloc_minimal_debug
        preload=(LD_PRELOAD=libtcmalloc_minimal.so.4)
    fi
    launch=(env ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 ${preload[@]+"${preload[@]}"}
        python -m torch.distributed.run --standalone --nproc_per_node "$processes")
    precision=$(python -c "from zero123plus.loading import *; print('bf16' if cpu_has_bfloat16() else 'no')" 2>/dev/null)
fi
