"""Is imported by every Python that has this directory on its path: arms the agents of a fault campaign."""

import os
import sys

_POINT = os.environ.get("MOC_CAMPAIGN_POINT")
if _POINT and any("moc_ckpt.persist.agent" in word for word in sys.orig_argv):
    from campaign_tools.kill_at import arm_on_import

    arm_on_import(_POINT)
