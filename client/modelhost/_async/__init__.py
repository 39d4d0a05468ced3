"""The client for asyncio. The twin in ``modelhost._sync`` is made from it by generate_sync.py."""
