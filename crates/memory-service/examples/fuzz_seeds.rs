//! Writes the inputs that fuzzing begins with, `FOLDER/TARGET/N`: `cargo run --example fuzz_seeds FOLDER`.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).unwrap_or("corpus".into()));
    for target in memory_bank::fuzzing::targets().into_iter().chain(memory_service::fuzzing::targets()) {
        let folder = folder.join(target.name);
        std::fs::create_dir_all(&folder)?;
        for (i, seed) in target.seeds.iter().enumerate() {
            std::fs::write(folder.join(format!("seed{i}")), seed)?;
        }
    }
    Ok(())
}
