//! Memory by text served in this process, and asked by a client over loopback.

mod access;
mod calls;
mod support;
