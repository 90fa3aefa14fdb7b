//! memory-bank
