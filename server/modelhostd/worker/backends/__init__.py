"""The backends that come with modelhost."""
