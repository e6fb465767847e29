"""How long a test waits for what comes at once."""

LAST_RESORT = 3600  # seconds: only what hangs reaches it, however busy the machine is
