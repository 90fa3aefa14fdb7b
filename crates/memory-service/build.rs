//! Compiles proto/memory.proto; no protoc is needed.

use std::error::Error;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=../../proto/memory.proto");
    let descriptors = protox::compile(["memory.proto"], ["../../proto"])?;
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(format!("{out}/memory.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .codec_path("crate::codec::WireCodec")
        // Blocks are encoded from and decoded into their own place, without a copy in between.
        .extern_path(".memory.v1.FetchResponse", "crate::codec::FetchPiece")
        .extern_path(".memory.v1.PushRequest", "crate::codec::PushPiece")
        .compile_fds(descriptors)?;
    Ok(())
}
