//! Published families: what transformers computes with tiny checkpoints of them, and what is wrong with others.

mod computed;
mod errors;
mod llama2c;
mod reference;
mod written;
