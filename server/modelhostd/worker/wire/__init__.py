"""The half of the worker protocol that both ends share; it imports neither torch nor numpy."""
