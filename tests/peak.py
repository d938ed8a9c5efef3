"""The peak memory of a program that a test starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

IMPORT = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom peak import peak_bytes\n"
"""What such a program begins with."""


def peak_bytes() -> int:
    """The largest resident set that this program had so far.

    Linux counts in `getrusage` also what the parent had when it forked, and a test suite has gigabytes: differences
    of such peaks are 0 whatever a program takes. `VmHWM` begins anew with each program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return 1024 * int(found[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
