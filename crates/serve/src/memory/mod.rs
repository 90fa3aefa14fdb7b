//! Which memory a text fetches, from banks that are loaded, swapped and unloaded while others are served.
