"""Images of loaded models in host RAM, and the slabs on a device that are filled from them."""
