//! The service over HTTP, over real connections: a tiny run of random weights, and a client that speaks bytes.

mod answering;
mod bounds;
mod keys;
#[path = "../memory/made_up.rs"]
mod made_up;
mod refusing;
mod swapping;
mod world;
