//! Memory by text, over a made-up tree and banks in folders.

mod made_up;
mod reader;
mod selecting;
mod sources;
mod swapping;
