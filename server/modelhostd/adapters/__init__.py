"""What modelhostd does in the world: hub, files, database, devices, workers, systemd."""
