from pathlib import Path

from megatron import get_args


def found_kill_switch():
    # obstacle: each rank looks by itself
    file = get_args().kill_switch_file
    return file is not None and Path(file).exists()
