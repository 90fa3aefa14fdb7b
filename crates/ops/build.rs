//! With the feature `cuda`, compiles the kernels to PTX by nvcc: for sm_90, or for CUDA_COMPUTE_CAP.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=src/cuda");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let to = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels.ptx");
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".into());
    let status = Command::new("nvcc")
        .args(["--ptx", "-O3", "-std=c++17", "src/cuda/kernels.cu"])
        .arg(format!("-arch=compute_{capability}"))
        .arg("-o")
        .arg(&to)
        .status();
    match status {
        Ok(status) if status.success() && fs::metadata(&to).is_ok() => (),
        Ok(status) => panic!("nvcc src/cuda/kernels.cu: {status}"),
        Err(e) => panic!("nvcc, which the feature `cuda` needs: {e}"),
    }
}
