//! Compiles proto/memory.proto and proto/retrieval.proto; no protoc is needed.

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
        .compile_fds(descriptors.clone())?;
    retrieval(&out)?;
    // All messages as prost has them, for `fuzzing` to compare with.
    let plain = format!("{out}/plain");
    std::fs::create_dir_all(&plain)?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .out_dir(plain)
        .compile_fds(descriptors)?;
    Ok(())
}

fn retrieval(out: &str) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=../../proto/retrieval.proto");
    let descriptors = protox::compile(["retrieval.proto"], ["../../proto"])?;
    std::fs::write(format!("{out}/retrieval.bin"), descriptors.encode_to_vec())?;
    // Blocks are sent from where the bank holds them.
    tonic_prost_build::configure().bytes(".retrieval.v1.RetrievePiece").compile_fds(descriptors)?;
    Ok(())
}
