//! Compiles proto/block.proto; no protoc is needed. Payloads are `Bytes`, so prost itself copies nothing that it
//! need not.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/block.proto");
    let descriptors = protox::compile(["block.proto"], ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
