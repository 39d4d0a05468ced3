"""modelhostd: the daemon that owns the devices of one machine."""
