"""``python -m wholebatch`` is the command."""

import atexit
import os
import sys

from wholebatch.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not isinstance(end.code, int):
            raise
        # A rank ends here and now: gloo's threads abort a process now and then while Python takes it apart.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)
