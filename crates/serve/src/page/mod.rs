//! The web page, served from the binary.
