"""Is imported by every Python that has this directory on its path: arms the agents of a fault campaign."""

import os
import sys

# An agent that takes over meets the same save: were all of them killed, the save would rightly be given up.
_MOST = 2


def _is_next() -> bool:
    for number in range(_MOST):
        try:
            os.close(os.open(f"{os.environ['MOC_CAMPAIGN_ARMED']}{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return True
    return False


_POINT = os.environ.get("MOC_CAMPAIGN_POINT")
if _POINT and any("moc_ckpt.persist.agent" in word for word in sys.orig_argv) and _is_next():
    from campaign_tools.kill_at import arm_on_import

    arm_on_import(_POINT)
