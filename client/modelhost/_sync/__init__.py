"""The client without asyncio. All but ``transport`` is made from ``modelhost._async``."""
