"""What the contract has and this daemon does not offer yet; each answers UNIMPLEMENTED.

The README's table of what works is checked against this page.
"""

UNIMPLEMENTED_METHODS = frozenset({"modelhost.v1.ModelService/ListCatalogModels"})
