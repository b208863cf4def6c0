"""The least that lets a checkout train here, written apart from the launcher: what its runs are compared with.

python stock.py SCRIPT ARGUMENTS …
"""

import os
import runpy
import sys
import types
from pathlib import Path

for _name, _attributes in {
    "deepspeed.compression.compress": ("init_compression", "redundancy_clean"),
    "megatron.model.vision.knn_monitor": ("compute_feature_bank",),
}.items():
    _module = types.ModuleType(_name)
    for _attribute in _attributes:
        setattr(_module, _attribute, None)
    sys.modules[_name] = _module

os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
script = Path(sys.argv[1])
sys.argv = [str(script), *sys.argv[2:], "--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion"]
sys.path[0] = str(script.parent)
runpy.run_path(str(script), run_name="__main__")
